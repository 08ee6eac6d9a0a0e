"""Whether the loss of a run is divided by `num_items_in_batch`: gradients would grow with k otherwise."""

import logging
from collections.abc import Callable
from typing import Any

import torch

from ..core.versions import MEAN_LOSS_REMEDY
from .checks import loss_ignores_num_items
from .loss_probe import divides_by_items, is_in_doubt
from .loss_scaling import own_loss_ignoring_num_items


logger = logging.getLogger(__name__)

_IGNORES_ITEMS = (
    "%s ignores num_items_in_batch, so that in stock Trainer gradients and losses are k times too large: here they "
    "are means over the micro-batches. To have that in both, without this warning, %s."
)
_REMEDY = "set `accepts_loss_kwargs = False` on the model"


class LossDivision:
    """Decides `trainer.model_accepts_loss_kwargs` for runs that go through windows.

    In stock, a loss that ignores `num_items_in_batch` grows with k, which is a constant there. A mean of micro-batch
    means doesn't, so such losses are divided by the number of micro-batches here. What the code of a model or of the
    user's `compute_loss` tells is known before the run (`read`); the rest is tried on the first micro-batch
    (`try_on`).
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._stock = self._decided = trainer.model_accepts_loss_kwargs
        self._is_tried = False
        self._own_loss: str | None = None

    def read(self, adapts: bool) -> None:
        """Decide anew, for a run that goes through windows (`adapts`) or one that doesn't."""
        trainer = self._trainer
        self._is_tried = False
        if trainer.model_accepts_loss_kwargs != self._decided:  # the user has set it since
            self._stock = trainer.model_accepts_loss_kwargs
        trainer.model_accepts_loss_kwargs = self._stock
        # Where there is a `compute_loss_func`, `Trainer` never divides: of that one a warning tells.
        self._own_loss = own_loss_ignoring_num_items(trainer) if trainer.compute_loss_func is None else None
        if adapts and (self._own_loss or loss_ignores_num_items(trainer)):
            trainer.model_accepts_loss_kwargs = False
        self._decided = trainer.model_accepts_loss_kwargs

    def warn_if_changed(self) -> None:
        """Say that the loss is taken for a mean, where stock takes it for a sum."""
        if self._decided == self._stock:
            return
        if self._own_loss:
            logger.warning(_IGNORES_ITEMS, self._own_loss, MEAN_LOSS_REMEDY)
        else:
            logger.warning(_IGNORES_ITEMS, f"The loss of {type(self._trainer.model).__name__}", _REMEDY)

    def try_on(self, model: torch.nn.Module, batch: Any, num_items_in_batch: Any, forget: Callable[[], None]) -> None:
        """Try on the first micro-batch of a run whether a loss that code doesn't tell of divides by the items.

        Args:
            model: As the loop has it.
            batch: The micro-batch.
            num_items_in_batch: Of its window.
            forget: Called after the tries, which are not part of the step.
        """
        if self._is_tried:
            return
        self._is_tried = True
        trainer = self._trainer
        if not is_in_doubt(trainer):
            return
        divides = divides_by_items(trainer, model, batch, num_items_in_batch)
        forget()
        if trainer.args.world_size > 1:  # a rank without targets can't tell, and all have to do the same
            told = torch.tensor([divides is False, divides is True], device=trainer.args.device).float()
            ignoring, dividing = trainer.accelerator.reduce(told, reduction="sum").tolist()
            divides = None if bool(ignoring) == bool(dividing) else bool(dividing)
        if divides is not False:
            return
        if trainer.compute_loss_func is None:
            trainer.model_accepts_loss_kwargs = self._decided = False
            self.warn_if_changed()
        elif own_loss_ignoring_num_items(trainer) is None:  # of which a warning has told
            logger.warning(
                "compute_loss_func returns the same loss whatever num_items_in_batch is, by which Trainer expects it "
                "to be divided: gradients grow with k. Divide a sum by it, or set `loss_is_scaled_for_ga = False` on "
                "the Trainer if the loss is a mean."
            )
