"""Values of `TrainingArguments` that stock takes without a word and that end a run late, or train nothing.

They are refused at once, by name, with the remedy. Values that stock refuses itself when `TrainingArguments` or
`Trainer` is made are left to it. No default is touched. Values with which stock `Trainer` would train something are
refused only where that can't be what was meant: a weight decay below zero, a label smoothing of 1.
"""

import difflib
import json
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .core.versions import ACTIVATION_CHECKPOINTING
from .removed_names import REMOVED_NAMES


@dataclass(frozen=True)
class Range:
    """What numbers an argument takes.

    Attributes:
        least: Least value.
        limit: Values are below it; infinity is allowed only where `infinite`.
        whole: Whether they are whole numbers.
        optional: Whether `None` is one.
        above: Whether `least` itself is excluded.
        remedy: Said in place of the range.
        infinite: Whether infinity is a value.
    """

    least: float = -math.inf
    limit: float = math.inf
    whole: bool = False
    optional: bool = False
    above: bool = False
    remedy: str | None = None
    infinite: bool = False

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with a value and what to give instead, or `None`."""
        if value is None:
            return None if self.optional else f"it must be a {self._kind}."
        kind = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            return f"it must be a {self._kind}, not {'text' if isinstance(value, str) else type(value).__name__}."
        if math.isnan(value) or (math.isinf(value) and not self.infinite):
            return f"it must be a finite {self._kind}."
        if value < self.least or value >= self.limit != math.inf or (self.above and value == self.least):
            return f"{self.remedy or self._range}."
        return None

    @property
    def _kind(self) -> str:
        return "whole number" if self.whole else "number"

    @property
    def _range(self) -> str:
        if self.limit != math.inf:
            return f"it must be at least {self.least:g} and below {self.limit:g}"
        if self.above:
            return "it must be positive"
        return "it must not be negative" if self.least == 0 else f"it must be at least {self.least:g}"


COUNT = Range(1, whole=True)
OPTIONAL_COUNT = Range(1, whole=True, optional=True)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1)

RANGES: dict[str, Range] = {
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "eval_accumulation_steps": OPTIONAL_COUNT,
    "max_steps": Range(whole=True),  # not positive: num_train_epochs says how long
    "num_train_epochs": NOT_NEGATIVE,
    "learning_rate": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": NOT_NEGATIVE,
    "max_grad_norm": Range(optional=True, infinite=True),  # not positive: nothing is clipped
    "label_smoothing_factor": SHARE,
    "neftune_noise_alpha": Range(0, optional=True),
    "dataloader_num_workers": Range(0, whole=True),
}

# Intervals mean something under one strategy only.
INTERVALS = {
    "logging_steps": ("logging_strategy", Range(0, above=True, remedy="give the steps between two, or set "
                      "logging_strategy='no'")),
    "eval_steps": ("eval_strategy", Range(0, optional=True, remedy="give the steps between two, or leave it unset for "
                   "those of logging_steps")),
    "save_steps": ("save_strategy", Range(0, above=True, remedy="give the steps between two, or set "
                   "save_strategy='no'")),
}  # fmt: skip

# Mappings, as JSON on a command line. The old name stays until transformers 6.
MAPPINGS = ("lr_scheduler_kwargs", f"{ACTIVATION_CHECKPOINTING}_kwargs", "gradient_checkpointing_kwargs")


def check_names(cls: type, names: Mapping[str, Any]) -> None:
    """Refuse names that `cls` does not have, as Python does, with what stands in for those of transformers 4.

    Args:
        cls: A dataclass.
        names: Keyword arguments.

    Raises:
        TypeError: One is unknown.
    """
    known = {field.name for field in fields(cls) if field.init}
    # A subclass that only overrides methods has the __init__ that it needs; one with new fields or bases has not.
    adds_nothing = len(cls.__bases__) == 1 and not vars(cls).get("__annotations__")
    if "__dataclass_fields__" not in vars(cls) and not adds_nothing:
        raise TypeError(f"{cls.__name__} isn't a dataclass itself; put @dataclass before the class.")
    problems = []
    for name in names:
        if name in known:
            continue
        if name in REMOVED_NAMES:
            problems.append(f"{name} was removed from transformers: {REMOVED_NAMES[name]}.")
            continue
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; leave it out."
        problems.append(f"{cls.__name__} has no argument {name}{hint}")
    if problems:
        raise TypeError(" ".join(problems))


def check_stock_arguments(args: Any) -> None:
    """Check what a user has set of `TrainingArguments`, before that class itself reads it.

    Args:
        args: A `TrainingArguments` at the beginning of its `__post_init__`.

    Raises:
        ValueError: A value is of the wrong type or out of range.
    """
    check_ranges(args, RANGES)
    for name, (strategy, interval) in INTERVALS.items():
        if getattr(args, strategy) == "steps":
            check_ranges(args, {name: interval})
    for name in MAPPINGS:
        _check_mapping(name, getattr(args, name))
    _check_optim_args(args.optim_args)


def check_ranges(args: Any, ranges: Mapping[str, Range]) -> None:
    """Check numbers.

    Args:
        args: What has them as attributes.
        ranges: What each may be.

    Raises:
        ValueError: One isn't a number, isn't finite, or is out of its range.
    """
    for name, allowed in ranges.items():
        value = getattr(args, name)
        problem = allowed.problem(value)
        if problem is not None:
            raise ValueError(f"{name} is {f'{value!r}' if isinstance(value, str) else value}; {problem}")


def _check_mapping(name: str, value: Any) -> None:
    if value is None or not isinstance(value, str | int | float | list):  # mappings, and objects made of them
        return
    why = ""
    if isinstance(value, str) and value.startswith("{"):
        try:
            json.loads(value)
            return
        except json.JSONDecodeError as error:
            why = f", which isn't JSON ({error})"
    raise ValueError(f"{name} is {value!r}{why}; give a JSON object.")


def _check_optim_args(value: str | None) -> None:
    if value and any("=" not in pair for pair in value.replace(" ", "").split(",")):
        raise ValueError(f"optim_args is '{value}'; write name=value pairs, divided by commas.")
