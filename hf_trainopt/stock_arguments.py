"""Values of `TrainingArguments` that make no sense: refused at once, by name, with the remedy.

Stock `TrainingArguments` takes many of them without a word and fails when training has begun, trains nothing, or
raises an error that does not say which argument it means. No default is touched, and no value that works in
stock `Trainer` is refused.
"""

import difflib
import json
import math
import numbers
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.integrations.deepspeed import is_deepspeed_available
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

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
SEED = {"limit": 2**32, "whole": True, "remedy": "it must be at least 0 and at most 4294967295"}

RANGES: dict[str, Range] = {
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "eval_accumulation_steps": OPTIONAL_COUNT,
    "max_steps": Range(-1, whole=True, remedy="give at least 1, or -1 to train for num_train_epochs"),
    "num_train_epochs": NOT_NEGATIVE,
    "learning_rate": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": NOT_NEGATIVE,
    "max_grad_norm": Range(optional=True, infinite=True),  # not positive: nothing is clipped
    "warmup_steps": NOT_NEGATIVE,
    "label_smoothing_factor": SHARE,
    "neftune_noise_alpha": Range(0, optional=True),
    "eval_delay": NOT_NEGATIVE,
    "seed": Range(0, **SEED),
    "data_seed": Range(0, optional=True, **SEED),
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

CHOICES = {
    "eval_strategy": IntervalStrategy,
    "logging_strategy": IntervalStrategy,
    "save_strategy": SaveStrategy,
    "hub_strategy": HubStrategy,
    "lr_scheduler_type": SchedulerType,
    "optim": OptimizerNames,
}

# Mappings, as JSON on a command line; those that may be files too. The old name stays until transformers 6.
MAPPINGS = {"lr_scheduler_kwargs", f"{ACTIVATION_CHECKPOINTING}_kwargs", "gradient_checkpointing_kwargs"}
MAPPINGS_OR_FILES = ("accelerator_config", "fsdp_config", "deepspeed")


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
        ValueError: A value is of the wrong type, out of range, unknown, or contradicts another.
    """
    check_ranges(args, RANGES)
    for name, choices in CHOICES.items():
        check_choice(name, getattr(args, name), [str(choice.value) for choice in choices])
    for name, (strategy, interval) in INTERVALS.items():
        if _plain(getattr(args, strategy)) == "steps":
            check_ranges(args, {name: interval})
    for name in (*MAPPINGS, *MAPPINGS_OR_FILES):
        _check_mapping(name, getattr(args, name), may_be_file=name in MAPPINGS_OR_FILES)
    if args.fp16 and args.bf16:
        raise ValueError("fp16=True and bf16=True contradict each other; set one of them to False.")
    if args.deepspeed and not is_deepspeed_available():
        raise ValueError("deepspeed is set, but DeepSpeed is not installed; pip install deepspeed, or leave it unset.")
    _check_optim_args(args.optim_args)
    _check_trackers(args.report_to)


def check_ranges(args: Any, ranges: Mapping[str, Range]) -> None:
    """Check numbers.

    Args:
        args: What has them as attributes.
        ranges: What each may be.

    Raises:
        ValueError: One is no number, not finite, or out of its range.
    """
    for name, allowed in ranges.items():
        value = getattr(args, name)
        problem = allowed.problem(value)
        if problem is not None:
            raise ValueError(f"{name} is {f'{value!r}' if isinstance(value, str) else value}; {problem}")


def check_choice(name: str, value: Any, choices: list[str]) -> None:
    """Check a name out of a list.

    Raises:
        ValueError: It is not in the list; the message has the closest one, or all if they are few.
    """
    text = _plain(value)
    if text in choices:
        return
    close = difflib.get_close_matches(str(text), choices, n=3) if len(choices) > 20 else []
    raise ValueError(f"{name} is {text!r}; choose one of {', '.join(close or choices)}.")


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _check_mapping(name: str, value: Any, may_be_file: bool) -> None:
    if value is None or not isinstance(value, str | int | float | list):  # mappings, and objects made of them
        return
    what = "give a JSON object" + (" or the path of a JSON file" if may_be_file else "")
    if isinstance(value, str) and value.startswith("{"):
        try:
            json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} is {value!r}, which isn't JSON ({error}); {what}.") from None
    elif may_be_file and isinstance(value, str):
        if not os.path.isfile(value):
            raise ValueError(f"{name} is {value!r}, but there is no such file; {what}.")
    else:
        raise ValueError(f"{name} is {value!r}; {what}.")


def _check_optim_args(value: str | None) -> None:
    if value and any("=" not in pair for pair in value.replace(" ", "").split(",")):
        raise ValueError(f"optim_args is '{value}'; write name=value pairs, divided by commas.")


def _check_trackers(report_to: Any) -> None:
    known = {"all", "none", *INTEGRATION_TO_CALLBACK}
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name not in known:
            raise ValueError(f"report_to is {name!r}; choose out of {', '.join(sorted(known))}.")
