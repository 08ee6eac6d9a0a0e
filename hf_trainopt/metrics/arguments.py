"""Arguments of measuring, on top of `TrainingArguments`."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from .memory import MemoryCallback
from .targets import TargetCallback
from .throughput import ThroughputCallback


MEASUREMENTS = {"throughput": ThroughputCallback, "memory": MemoryCallback}


@dataclass
class EvidenceArgumentsMixin:
    """What a run measures of itself.

    Args:
        measurements (`str` or `list[str]`, defaults to `"auto"`): What is logged beside the loss: a list out of
            `throughput` and `memory`, or a text with commas; `"none"` or an empty list for nothing. `"auto"`: both
            where k varies, nothing with `accumulation_policy="fixed"`.
        target_metric (`str`, *optional*): Evaluation metric whose time to `target_value` is measured.
        target_value (`float`, *optional*): That target.
        stop_at_target (`bool`, defaults to `False`): End training once it is met.
    """

    argument_group: ClassVar[str] = "measurements"  # in `--help` of the scripts

    # With a factory: `HfArgumentParser` forgets a plain default of a field that may be a list.
    measurements: str | list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={
            "help": "What is logged beside the loss, as a list: throughput (seconds of training, samples and tokens a "
            "second, FLOPs), memory (peaks by phase). 'auto' (the default): both where k varies, nothing with "
            "accumulation_policy='fixed'. Set 'none' to have none of it."
        },
    )
    target_metric: str | None = field(
        default=None,
        metadata={
            "help": "Evaluation metric, such as eval_loss, whose time, samples and steps to target_value are logged. "
            "Unset (the default): none. Set it, with eval_strategy, to compare how soon runs get somewhere."
        },
    )
    target_value: float | None = field(
        default=None,
        metadata={"help": "The value that target_metric shall reach. Unset (the default): none. Set it with that."},
    )
    stop_at_target: bool = field(
        default=False,
        metadata={
            "help": "End training once target_metric has reached target_value. Set it where what comes after is of no "
            "use, as in a benchmark."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.validate_evidence()

    def validate_evidence(self) -> None:
        """Check the settings of measuring against each other.

        Raises:
            ValueError: One is unknown or contradicts another.
        """
        given = self.measurements or []
        parts = given if isinstance(given, list | tuple) else [given]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(
                f"measurements is {given!r}; give a list out of {', '.join(MEASUREMENTS)}, or 'none' or 'auto' alone."
            )
        unknown = [name for name in self.measured if name not in MEASUREMENTS]
        if unknown:
            raise ValueError(
                f"measurements has '{unknown[0]}'; choose out of {', '.join(MEASUREMENTS)}, or 'none' or 'auto' alone."
            )
        if (self.target_metric is None) != (self.target_value is None):
            given, missing = ("target_metric", "target_value")[:: 1 if self.target_value is None else -1]
            raise ValueError(f"{given} is set without {missing}; set both or none.")
        if self.stop_at_target and self.target_metric is None:
            raise ValueError("stop_at_target=True needs target_metric and target_value.")
        if self.target_value is not None and not math.isfinite(self.target_value):
            raise ValueError(f"target_value is {self.target_value}; it must be a finite number.")
        if self.target_metric is not None and self.eval_strategy == "no":
            raise ValueError("target_metric needs evaluations; set eval_strategy='steps' (and eval_steps) or 'epoch'.")

    @property
    def measured(self) -> list[str]:
        """Names in `measurements`, each once."""
        given = self.measurements or ()
        parts = [given] if isinstance(given, str) else given
        names = [name.strip() for part in parts for name in part.split(",") if name.strip()]
        if names == ["auto"]:  # with a constant k a run is stock's unless it is asked for more
            names = ["none"] if getattr(self, "accumulation_policy", None) == "fixed" else list(MEASUREMENTS)
        return [] if names == ["none"] else list(dict.fromkeys(names))

    def make_measurements(self) -> list:
        """Return the callbacks that these arguments ask for."""
        callbacks = [MEASUREMENTS[name]() for name in self.measured]
        if self.target_metric is not None:
            is_best_metric = self.target_metric.removeprefix("eval_") == (
                self.metric_for_best_model or ""
            ).removeprefix("eval_")
            better = self.greater_is_better if is_best_metric else None
            callbacks.append(TargetCallback(self.target_metric, self.target_value, better, self.stop_at_target))
        return callbacks
