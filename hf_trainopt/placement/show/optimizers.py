"""The optimizer that `--optim` names, to plan for."""

import tempfile
from collections.abc import Callable

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from ..simulate.optimizers import STATES, TableOptimizer


# Arguments of an optimizer that `Trainer` fills in for those that work on modules.
_NEEDS_MODEL = {"params", "model", "optimizer_dict"}


def optimizer_maker(name: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return a function that makes the optimizer of `Trainer` with this name for a model, or a stand-in.

    Raises:
        ValueError: There is no such optimizer, or it cannot be planned for.
    """
    usable = "adamw_torch_fused, adamw_torch, adafactor, sgd, adamw_8bit, paged_adamw_8bit, lion_8bit"
    if name not in [optimizer.value for optimizer in OptimizerNames]:
        raise ValueError(f"--optim {name} is not an optimizer of transformers; choose one such as {usable}.")
    if name in STATES:
        return lambda model: TableOptimizer(model, name)
    settings = TrainingArguments(tempfile.gettempdir(), optim=name, use_cpu=True, report_to="none")
    try:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(settings, None)
    except (ImportError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise ValueError(f"--optim {name} can't be planned for ({reason}); choose one such as {usable}.") from error
    if _NEEDS_MODEL & options.keys():
        raise ValueError(f"--optim {name} changes modules, which is not planned for; choose one such as {usable}.")

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return cls([parameter for parameter in model.parameters() if parameter.requires_grad], **options)

    return make
