"""Which stages a step calls, in what order, and in how many forward passes of the model.

A loss may take a model through several batches (a contrastive loss), or once more without gradients (DPO, whose
reference is the model without its adapter). A pass without gradients keeps nothing, so nothing of it is recomputed.
"""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Passes:
    """What a step calls with gradients.

    Args:
        once: The stages that each forward pass calls exactly once, in the order of the first one.
        others: Stages that are called more often, or never.
        count: Number of forward passes.
    """

    once: list[str]
    others: list[str]
    count: int


def passes_of(model: nn.Module, stages: Iterable[str], run: Callable[[], Any]) -> Passes:
    """Run something and return what it calls.

    Args:
        model: The model.
        stages: Names of its stages.
        run: Computes the loss of a step.
    """
    stages = list(stages)
    calls: list[list[str]] = [[]]
    without_gradients: set[str] = set()

    def begun(*_):
        if torch.is_grad_enabled():
            calls.append([])

    def called(name):
        def hook(*_):
            if torch.is_grad_enabled():
                calls[-1].append(name)
            else:
                without_gradients.add(name)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(called(name)) for name in stages]
    handles.append(model.register_forward_pre_hook(begun))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    passes = [names for names in calls if names]
    first = passes[0] if passes else []
    once = [name for name in dict.fromkeys(first) if all(names.count(name) == 1 for names in passes)]
    with_gradients = {name for names in passes for name in names}
    others = [
        name for name in stages if name not in once and (name in with_gradients or name not in without_gradients)
    ]
    return Passes(once, others, len(passes))


@contextmanager
def calls_of_checkpoint():
    """Context that yields a list, to which each call of `torch.utils.checkpoint.checkpoint` adds something."""
    found: list[str] = []
    stock = {name: getattr(torch.utils.checkpoint, name) for name in ("_CheckpointFrame", "CheckpointFunction")}

    def frame(*args, **kwargs):
        found.append("non-reentrant")
        return stock["_CheckpointFrame"](*args, **kwargs)

    class Function:
        @staticmethod
        def apply(*args):
            found.append("re-entrant")
            return stock["CheckpointFunction"].apply(*args)

    # Who has imported the function itself meets these in it.
    torch.utils.checkpoint._CheckpointFrame, torch.utils.checkpoint.CheckpointFunction = frame, Function
    try:
        yield found
    finally:
        for name, value in stock.items():
            setattr(torch.utils.checkpoint, name, value)
