"""Precision as a part: chosen and explained before training, left for another where fp16 overflows."""

import logging
from dataclasses import asdict
from typing import Any

import torch
from accelerate.utils import DistributedType

from ..core.facts import gradient_scaler, is_sharded
from ..core.part import Part
from .choose import PrecisionChoice
from .fallback import OverflowWatch
from .switch import PrecisionSwitch, adopt, forget_changes


logger = logging.getLogger(__name__)


class PrecisionPart(Part):
    """Precision of a run.

    With `precision` unset nothing is decided here. Under a gradient scaler its skipped steps are counted in any case.

    Attributes:
        choice: What `precision` came to; `None` if it is unset.
    """

    name = "precision"
    logged_keys = ("skipped_steps", "loss_scale")

    def __init__(self, trainer: Any, parts: Any):
        super().__init__(trainer, parts)
        self.choice: PrecisionChoice | None = None
        self._switch: PrecisionSwitch | None = None
        self._overflows: OverflowWatch | None = None
        self._changed_at_step: int | None = None
        self._reason_to_leave: str | None = None
        self._is_stuck = False
        self._loaded_state: dict[str, Any] | None = None
        self._committed_state: dict[str, Any] | None = None

    def choose(self) -> None:
        """Decide what `precision` means on the devices of this run, before there is an Accelerator."""
        self.choice = self._switch = None
        if self.trainer.args.precision is not None:
            self.choice = self.trainer.args.resolve_precision(over_ranks=True)
            forget_changes()

    def trainer_made(self) -> None:
        if self.choice is not None:
            adopt(self.trainer.model, self.choice.precision)
            self._explain_precision(self.choice)

    def _explain_precision(self, choice: PrecisionChoice) -> None:
        details = {
            "fp32": "fp32",
            "bf16": "bf16 autocast",
            "fp16": f"fp16 autocast, dynamic loss scaling, {choice.fallback} if that fails",
        }
        weights = " and ".join(sorted({str(p.dtype) for p in self.trainer.model.parameters() if p.requires_grad}))
        logger.info("Precision: %s, weights in %s: %s.", details[choice.precision], weights, choice.reason)
        if choice.warning is not None:
            logger.warning("%s", choice.warning)

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return gradient_scaler(self.trainer)

    @property
    def _may_leave_fp16(self) -> bool:
        return self.choice is not None and self.choice.fallback is not None

    # ---- A run -----------------------------------------------------------------------------------------------------

    def before_preparing(self, dataloader: Any) -> None:
        """Begin in the precision of the launch, whatever became of the last run."""
        trainer = self.trainer
        if self.choice is not None:
            check_weights(trainer.model, trainer.args.precision, self.choice.precision)
        elif self._scaler is not None:
            check_weights(trainer.model, None, "fp16")
        if self._switch is not None:
            self._switch.undo(trainer.optimizer)
        elif self._may_leave_fp16 and self._scaler is not None:
            self._switch = PrecisionSwitch(trainer.accelerator)
        if self._switch is not None:
            self._switch.find_autocasts(trainer.model)

    def on_train_begin(self, args, state, control, **kwargs):
        """Take up what a checkpoint says; everything is prepared and loaded by now."""
        self._overflows = self._changed_at_step = self._reason_to_leave = None
        self._is_stuck, self._committed_state = False, self._loaded_state
        if self._scaler is None:
            return
        saved = self._loaded_state
        self._overflows = OverflowWatch(**saved["overflows"] if saved else {"loss_scale": self._scaler.get_scale()})
        self._changed_at_step = saved["changed_at_step"] if saved else None
        if self._switch is not None:
            self._switch.find_autocasts(self.trainer.model)
        if self._changed_at_step is None:
            return
        if self._switch is None:
            logger.warning(
                "The run that is resumed had left fp16 at step %d. With fp16=True it goes on in fp16; set "
                "precision='fp16' or 'auto' to go on as it did.",
                self._changed_at_step,
            )
            self._changed_at_step = None
        else:
            self._change_precision(f"as the run that is resumed did at step {self._changed_at_step}")

    def on_step_end(self, args, state, control, **kwargs):
        """Count the step, and leave fp16 where it is time to: here nothing of the next step is there yet."""
        if self._overflows is None:
            return
        if self._scaler is not None:
            reason = self._overflows.step_ended(self._scaler.get_scale()) or self._reason_to_leave
            if self._overflows.skipped_in_a_row:
                self.parts.adam_clock.was_skipped(state.global_step - 1)
            if reason is not None and not self._is_stuck:
                self._change_precision(reason)
        self._reason_to_leave = None
        self._committed_state = {"overflows": asdict(self._overflows), "changed_at_step": self._changed_at_step}

    def leave_fp16(self, reason: str) -> bool:
        """Leave fp16 at the end of this step if that can be done; return whether it can.

        Args:
            reason: What has happened that would end a run in another precision.
        """
        if self._scaler is None or self._switch is None or self._is_stuck or self._obstacle() is not None:
            return False
        self._reason_to_leave = reason
        return True

    def _change_precision(self, reason: str) -> None:
        if self._switch is None:
            self._is_stuck = True
            logger.warning(
                "Step %d: fp16 does not work out (%s), and with fp16=True it stays. Steps that overflow are skipped "
                "as in Trainer; set precision='fp16' or 'auto' in place of fp16=True to go on in bf16 or fp32.",
                self.trainer.state.global_step,
                reason,
            )
            return
        precision, step = self.choice.fallback, self.trainer.state.global_step
        obstacle = self._obstacle()
        self._is_stuck = obstacle is not None
        if self._is_stuck:
            logger.warning(
                "Step %d: fp16 does not work out (%s), but %s. Steps that overflow are skipped, as in Trainer; resume "
                "with precision='%s'.",
                step,
                reason,
                obstacle,
                precision,
            )
            return
        if self._changed_at_step is None:
            self._changed_at_step = step
        self._switch.change(precision, self.trainer.optimizer)
        logger.warning("Step %d: fp16 is left for %s: %s.", step, precision, reason)
        if precision == "fp32" and self.trainer.args.places_checkpoints:
            logger.warning(
                "Checkpoint placement was planned for fp16: in fp32 activations take up to twice the memory. Should "
                "it run out, resume with precision='fp32', for which a new plan is made."
            )

    def _obstacle(self) -> str | None:
        """Why the precision of this run cannot be changed, if so."""
        if is_sharded(self.trainer) or self.trainer.accelerator.distributed_type == DistributedType.MEGATRON_LM:
            return "a sharded model keeps the precision that it was wrapped in"
        if not self._switch.find_autocasts(self.trainer.model):
            return f"Accelerate has not prepared the forward pass of {type(self.trainer.model).__name__}"
        return None

    # ---- What is saved and logged ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any] | None:
        return self._committed_state

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._loaded_state = state

    def log_values(self, line: dict[str, Any]) -> dict[str, Any]:
        """Return `skipped_steps` and `loss_scale` for a line of training under a gradient scaler."""
        if "loss" not in line or self._overflows is None:
            return {}
        logs: dict[str, Any] = {"skipped_steps": self._overflows.skipped_steps}
        if self._scaler is not None:
            logs["loss_scale"] = self._scaler.get_scale()
        return logs


def check_weights(model: torch.nn.Module, asked: str | None, precision: str) -> None:
    """Refuse a model whose trained weights are not in the type that the precision needs.

    Args:
        model: What is trained.
        asked: `precision` as the user gave it; `None` if `Trainer`'s own `fp16=True` is in force.
        precision: What became of it.

    Raises:
        ValueError: A trained parameter is in half precision under fp16 or fp32 (bf16 weights under bf16 are taken as
            they are).
    """
    # Under fp16=True weights in bf16 train in stock Trainer, weights in fp16 end in an error of the scaler.
    wrong = (torch.float16,) if precision == "bf16" or asked is None else (torch.float16, torch.bfloat16)
    setting = "fp16=True" if asked is None else f"precision='{asked}'"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in wrong:
            chosen = f" (here {precision})" if asked == "auto" else ""
            bf16 = " or choose precision='bf16'" if parameter.dtype == torch.bfloat16 else ""
            raise ValueError(
                f"{setting}{chosen} needs weights in fp32, to which optimizer steps are added, but {name} "
                f"is {parameter.dtype}; load the model with dtype=torch.float32 (or call model.float()){bf16}."
            )
