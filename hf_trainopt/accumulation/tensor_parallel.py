"""Tensor parallelism as a part: ranks that share layers train on the same data, and gradients of some are sums.

The ranks of a group train on the same micro-batches. Autograd gives each the gradient of its piece of a weight, or the
same gradient of a weight that all of them hold whole. So a square norm is the sum over the group, with whole ones
counted once (`sharded.local_piece`).

Some weights are whole but see a piece of the activations, such as the norms of queries and keys in Qwen3 and Gemma 3,
which see the heads of their rank. Each rank's gradient is one term of a sum. transformers adds the terms up in `.grad`
after each backward pass (`replicated_with_grad_allreduce` in the model's `tp_plan`). In the second micro-batch of a
window `.grad` already holds the first one's whole gradient, on every rank, and that is added up again. So stock
`Trainer` counts it as often as there are ranks. Here it is divided by their number first.
"""

import logging
import re
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ..core.facts import ranks_per_micro_batch, tensor_parallel_size
from ..core.part import Part


logger = logging.getLogger(__name__)

_SUMMED_STYLE = "replicated_with_grad_allreduce"


def modules_with_summed_gradients(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules whose weights are whole on each rank, and whose gradients are sums over the ranks.

    Args:
        model: Tensor-parallel by transformers, or not.
    """
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None or (inner.tp_size or 1) == 1:  # it has a plan all the same
        return []
    styles = {name for name, style in (inner.tp_plan or {}).items() if style == _SUMMED_STYLE}
    return [
        module for name, module in inner.named_modules() if re.sub(r"\.\d+(?=\.|$)", ".*", name) in styles
    ]  # as transformers matches names with plans


class TensorParallelGroup:
    """The ranks that train on the same micro-batches as this one.

    Args:
        model: The model.
        group: The process group.
        size: Ranks in it.
    """

    def __init__(self, model: torch.nn.Module, group: Any, size: int):
        self.size = size
        self._group = group
        # Found as they are used: FSDP2 puts whole weights in the place of pieces for the length of a pass.
        self._summed: dict[int, torch.nn.Parameter] = {}
        modules = modules_with_summed_gradients(model)
        self._handles = [module.register_forward_pre_hook(self._before_forward) for module in modules]

    @classmethod
    def of(cls, trainer: Any) -> "TensorParallelGroup | None":
        """Return the group of this rank; `None` where the model isn't tensor-parallel.

        Args:
            trainer: The Trainer, before or after its model is wrapped.
        """
        size = tensor_parallel_size(trainer.args)
        if size == 1:
            return None
        return cls(trainer.model, trainer.accelerator.torch_device_mesh["tp"].get_group(), size)

    def _before_forward(self, module: torch.nn.Module, _: tuple) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                self._summed[id(parameter)] = parameter

    def sums_gradient_of(self, key: int) -> bool:
        """Return whether the gradient of a parameter, of this `id`, is a sum over the ranks."""
        return key in self._summed

    def summed(self, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return gradients of which each rank has a term, added up; all ranks of the group call it.

        Args:
            gradients: The same parameters' on all ranks. They are left as they are.
        """
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=self._group)
        return list(flat.split([gradient.numel() for gradient in gradients]))

    def end_micro_batch(self) -> None:
        """Make up for what transformers will add up again; call after each backward pass but the last of a window."""
        for parameter in self._summed.values():
            if parameter.grad is not None:
                parameter.grad.div_(self.size)

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._summed = {}


class TensorParallelPart(Part):
    """What a run needs to know of tensor parallelism: the group of this rank, while it goes through windows."""

    name = "tensor_parallel"

    def __init__(self, trainer: Any, parts: Any):
        super().__init__(trainer, parts)
        self._group: TensorParallelGroup | None = None

    def trainer_made(self) -> None:
        trainer = self.trainer
        size, k = tensor_parallel_size(trainer.args), trainer.args.gradient_accumulation_steps
        is_stock = not self.parts.accumulation.adapts
        if is_stock and size > 1 and k > 1 and modules_with_summed_gradients(trainer.model):
            logger.warning(
                "%s has norms that each rank applies to heads of its own (replicated_with_grad_allreduce in its "
                "tp_plan). With gradient_accumulation_steps > 1, transformers counts their gradients of earlier "
                "micro-batches %d times or more. accumulation_policy='ramp' with accumulation_ramp='0:%d' trains at "
                "the same k with the right ones.",
                type(trainer.model).__name__,
                size,
                k,
            )

    def run(self) -> AbstractContextManager[None]:
        self._check()
        return super().run()

    def _check(self) -> None:
        """Refuse what can't work where ranks share operators.

        Raises:
            ValueError: A memory budget or `auto_micro_batch` under tensor, context or sequence parallelism.
        """
        args = self.trainer.args
        if ranks_per_micro_batch(args) == 1:
            return
        if args.auto_micro_batch:
            raise ValueError(
                "auto_micro_batch does not work with tensor or context parallelism, whose ranks communicate in each "
                "micro-batch; train with DDP, or leave auto_micro_batch out."
            )
        if args.placement_policy == "budget":  # a replay runs each operator on one device
            raise ValueError(
                "memory_budget does not work with tensor, context or sequence parallelism, where ranks share "
                "operators; choose checkpoint_placement='all', 'every_n', 'sqrt' or a plan file."
            )

    def begin(self) -> TensorParallelGroup | None:
        """Return the group of this rank in a run that goes through windows, if the model is tensor-parallel."""
        self.end_run()
        self._group = TensorParallelGroup.of(self.trainer)
        return self._group

    def end_micro_batch(self) -> None:
        """Call after each backward pass but the last of a window."""
        if self._group is not None:
            self._group.end_micro_batch()

    def end_run(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None
