"""The memory rewrites: the same function with less memory and without recomputation."""

from contextlib import AbstractContextManager, nullcontext

import torch

from ..plan.plan import Rewrites
from .chunked_loss import ChunkedLoss, apply_chunked_loss, find_language_model
from .fused_activation import apply_fused_activations, fusable_activations
from .overrides import Overrides


class AppliedRewrites:
    """What `apply_rewrites` has changed in a model; `undo` restores it."""

    def __init__(self):
        self._parts: list[Overrides | ChunkedLoss] = []

    def undo(self) -> None:
        """Restore the model that the rewrites were applied to (a deep copy of it keeps its own).

        Raises:
            RuntimeError: An activation module was given yet another `forward` since.
        """
        while self._parts:
            self._parts[-1].undo()
            self._parts.pop()


def available_rewrites(model: torch.nn.Module) -> Rewrites:
    """Return which rewrites the structure of a model allows.

    Fused activations have been compared with what they replace. The chunked loss has not: run `check_chunked_loss`
    on a batch before it is used.
    """
    return Rewrites(
        fused_activations=bool(fusable_activations(model)), chunked_loss=find_language_model(model) is not None
    )


def apply_rewrites(model: torch.nn.Module, rewrites: Rewrites, strict_logits: bool = True) -> AppliedRewrites:
    """Change the model in place; names, parameters and state dict stay as they are.

    Args:
        model: The model, or what it is wrapped in (PEFT, ...).
        rewrites: What to apply.
        strict_logits: `strict` of `ChunkedLoss`.

    Raises:
        ValueError: A rewrite is not available for this model; none is applied then.
    """
    applied = AppliedRewrites()
    try:
        if rewrites.fused_activations:
            applied._parts.append(apply_fused_activations(model))
        if rewrites.chunked_loss:
            applied._parts.append(apply_chunked_loss(model, strict=strict_logits))
    except ValueError:
        applied.undo()
        raise
    return applied


def visible_scratch() -> AbstractContextManager[None]:
    """Return a context in which fake tensors see all memory that the rewrites take.

    They always do: `chunked_cross_entropy` allocates through the dispatcher. The context does nothing, and marks the
    place for a rewrite that would need it.
    """
    return nullcontext()
