"""The stages of a model: the modules between whose calls activations can be kept or recomputed."""

import re

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import PlacementError


def find_stages(model: nn.Module, pattern: str | None = None) -> list[str]:
    """Return the names of the stages of `model`, in the order of registration.

    The stages are, in this order of preference: the modules whose whole name matches `pattern`; the outermost
    `GradientCheckpointingLayer`s of transformers; the composite members of `nn.Sequential` and `nn.ModuleList` (the
    blocks of timm models), where sequences of sequences are followed down to their blocks; the members of a model
    that is an `nn.Sequential` itself. No stage lies inside another one.

    Args:
        model: Any module.
        pattern: Regular expression for names as in `model.named_modules()`.

    Raises:
        ValueError: `pattern` matches nothing or is no regular expression, or the model has no such modules.
    """
    if pattern is not None:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise PlacementError(
                f"placement_stages is '{pattern}', which isn't a regular expression ({error}); fix it or leave it out."
            ) from error
        names = _outermost(name for name, _ in model.named_modules() if name and expression.fullmatch(name))
        if not names:
            examples = ", ".join(name for name, module in model.named_modules() if name.count(".") == 1)[:120]
            raise PlacementError(
                f"placement_stages='{pattern}' matches no module name as a whole; names are such as {examples}."
            )
        return names
    names = _outermost(
        name for name, module in model.named_modules() if name and isinstance(module, GradientCheckpointingLayer)
    )
    if not names:
        names = _members_of_sequences(model, "")
    if not names and isinstance(model, nn.Sequential):
        names = [name for name, _ in model.named_children()]
    if not names:
        raise PlacementError(
            f"{type(model).__name__} has no layers of transformers, blocks of timm or nn.Sequential between which "
            "activations could be placed; name its stages with placement_stages='a regular expression'."
        )
    return names


def _outermost(names) -> list[str]:
    """Drop names that lie inside another one (they come parents first)."""
    kept: list[str] = []
    for name in names:
        if not any(name.startswith(f"{outer}.") for outer in kept):
            kept.append(name)
    return kept


def _is_composite(module: nn.Module) -> bool:
    """Whether a module is made of layers; a norm with its activation function, or a parametrized layer, is one."""
    return any(
        True for name, child in module.named_children() if name != "parametrizations" for _ in child.parameters()
    )


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)


def _repeats(module: nn.Module) -> bool:
    """Whether a module is several blocks of one class, in attributes of their own (the stages of RegNet)."""
    classes = [type(child) for child in module.children() if _is_composite(child)]
    return len(classes) >= 2 and len(set(classes)) == 1 and not issubclass(classes[0], nn.ModuleList | nn.ModuleDict)


def _members_of_sequences(module: nn.Module, prefix: str, is_member: bool = False) -> list[str]:
    """Return the blocks below `module`: the composite members of sequences that hold no sequences of blocks."""
    found: list[str] = []
    members = _is_sequence(module) or (not is_member and _repeats(module))
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if _holds_blocks(child, members):
            found += _members_of_sequences(child, f"{path}.", members)
        elif _is_composite(child) and members:
            found.append(path)
        elif isinstance(child, nn.Sequential) and len(child) > 1 and _is_composite(child):
            found.append(path)  # a sequence of single layers (a stem, a head) is one unit
        elif not _is_sequence(child):
            found += _members_of_sequences(child, f"{path}.", members)
    return found


def _holds_blocks(module: nn.Module, is_member: bool) -> bool:
    """Whether a module is a sequence of blocks, or (a stage of Swin, ConvNeXt) has one as a child."""
    if _is_sequence(module):
        return any(_is_composite(member) for member in module.children())
    if not is_member and _repeats(module):
        return True
    return any(
        _is_sequence(child) and sum(_is_composite(member) for member in child.children()) >= 2
        for child in module.children()
    )
