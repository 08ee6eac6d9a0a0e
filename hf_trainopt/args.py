"""Arguments of the efficient parts, on top of `TrainingArguments`."""

import logging
from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from .accumulation.policy import FixedPolicy, GoodputPolicy, NoiseScalePolicy, RampPolicy
from .schedule import BATCH_SCALING_RULES


logger = logging.getLogger(__name__)

POLICIES = ("fixed", "noise_scale", "goodput", "ramp")


@dataclass
class EfficientTrainingArgumentsMixin:
    """Adaptive gradient accumulation, for any `TrainingArguments` class.

    `gradient_accumulation_steps` becomes the *reference* k_ref: it fixes the data budget (`max_steps` means max_steps
    windows of k_ref micro-batches, the same samples as in stock `Trainer`), the unit of `warmup_steps`,
    `logging_steps`, `eval_steps` and `save_steps`, and the batch that `learning_rate` is meant for. How many
    micro-batches really make a step is chosen by `accumulation_policy`.

    Args:
        accumulation_policy (`str`, defaults to `"goodput"`): `"fixed"`, `"noise_scale"`, `"goodput"` or `"ramp"`.
        min_accumulation_steps (`int`, defaults to 1): Least k.
        max_accumulation_steps (`int`, *optional*): Largest k; the larger of 32 and 4·k_ref if unset.
        lr_batch_scaling (`str`, defaults to `"sqrt"`): `"none"`, `"sqrt"`, `"linear"` or `"gain"`, relative to k_ref.
        noise_scale_ratio (`float`, defaults to 1.0): ρ of `"noise_scale"`.
        accumulation_ramp (`str`, *optional*): Schedule of `"ramp"`, as `"share of data:k,..."`.
        optimizer_step_cost (`float`, *optional*): Cost of an optimizer step in micro-batches for `"goodput"` instead
            of the measured one.
        annealing_noise_ratio (`float`, defaults to 0.25): As the learning rate decays, the batch of `"goodput"` grows
            in its place, up to this many noise scales; 0 for never.
        measure_noise_scale (`bool`, *optional*): Take gradient statistics. Unset: where the policy or the learning
            rate needs them.
        noise_scale_interval (`int`, defaults to 8): Every n-th window is measured.
        noise_scale_half_life (`float`, defaults to 0.05): Half-life of the averages, in samples, or below 1 as a share
            of the data budget.
    """

    accumulation_policy: Literal["fixed", "noise_scale", "goodput", "ramp"] = field(
        default="goodput",
        metadata={
            "help": "How the number of micro-batches in an optimizer step (k) is chosen: 'goodput' = most progress "
            "per second, from the measured gradient noise and the measured times; 'noise_scale' = batch follows the "
            "noise scale, for those who pay per optimizer step; 'ramp' = a stated schedule (accumulation_ramp); "
            "'fixed' = gradient_accumulation_steps always, exactly as stock Trainer."
        },
    )
    min_accumulation_steps: int = field(default=1, metadata={"help": "Least k that a policy may choose."})
    max_accumulation_steps: int | None = field(
        default=None,
        metadata={
            "help": "Largest k that a policy may choose. Defaults to the larger of 32 and 4 times "
            "gradient_accumulation_steps."
        },
    )
    lr_batch_scaling: Literal["none", "sqrt", "linear", "gain"] = field(
        default="sqrt",
        metadata={
            "help": "How the learning rate follows k relative to gradient_accumulation_steps: 'none', 'sqrt' (Adam), "
            "'linear' (SGD), or 'gain' (AdaScale: linear below the noise scale, flat above; its root for Adam)."
        },
    )
    noise_scale_ratio: float = field(
        default=1.0,
        metadata={"help": "accumulation_policy='noise_scale': batch in units of the noise scale. Lower it to use less "
                  "data, raise it to take fewer steps."},
    )  # fmt: skip
    accumulation_ramp: str | None = field(
        default=None,
        metadata={
            "help": "accumulation_policy='ramp': k over the data as 'share:k' pairs, such as '0:1,0.25:2,0.5:4'."
        },
    )
    optimizer_step_cost: float | None = field(
        default=None,
        metadata={
            "help": "accumulation_policy='goodput': cost of an optimizer step in micro-batches. Measured if unset; "
            "set it to make a run reproducible to the bit."
        },
    )
    annealing_noise_ratio: float = field(
        default=0.25,
        metadata={
            "help": "accumulation_policy='goodput': as the learning rate decays, the batch grows in its place, up to "
            "this many noise scales (not with lr_batch_scaling='none'). 0: never."
        },
    )
    measure_noise_scale: bool | None = field(
        default=None,
        metadata={
            "help": "Measure and log the gradient noise scale. If unset, only where accumulation_policy or "
            "lr_batch_scaling needs it.",
            "nargs": "?",
            "const": True,
        },
    )
    noise_scale_interval: int = field(
        default=8, metadata={"help": "Every n-th optimizer step is measured. Raise it if the overhead matters."}
    )
    noise_scale_half_life: float = field(
        default=0.05,
        metadata={
            "help": "Half-life of the running averages of the gradient statistics in samples over all devices, or "
            "below 1 as a share of the data."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.validate_accumulation()
        if self.noise_scale_ratio != 1.0 and self.accumulation_policy != "noise_scale":
            logger.warning("noise_scale_ratio is ignored: accumulation_policy is '%s'.", self.accumulation_policy)
        if self.optimizer_step_cost is not None and self.accumulation_policy != "goodput":
            logger.warning("optimizer_step_cost is ignored: accumulation_policy is '%s'.", self.accumulation_policy)

    def validate_accumulation(self) -> None:
        """Check the settings of adaptive accumulation against each other.

        Raises:
            ValueError: One is out of range or contradicts another.
        """
        if self.accumulation_policy not in POLICIES:
            raise ValueError(
                f"accumulation_policy is '{self.accumulation_policy}'; choose one of {', '.join(POLICIES)}, or pass "
                "your own as EfficientTrainer(accumulation_policy=...)."
            )
        if self.lr_batch_scaling not in BATCH_SCALING_RULES:
            raise ValueError(
                f"lr_batch_scaling is '{self.lr_batch_scaling}'; choose one of {', '.join(BATCH_SCALING_RULES)}."
            )
        if self.gradient_accumulation_steps < 1:
            raise ValueError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}; it must be at least 1."
            )
        if self.min_accumulation_steps < 1:
            raise ValueError(f"min_accumulation_steps is {self.min_accumulation_steps}; it must be at least 1.")
        if self.max_accumulation_steps is not None and self.max_accumulation_steps < self.min_accumulation_steps:
            raise ValueError(
                f"max_accumulation_steps ({self.max_accumulation_steps}) is below min_accumulation_steps "
                f"({self.min_accumulation_steps}); raise the one or lower the other."
            )
        if self.noise_scale_ratio <= 0:
            raise ValueError(f"noise_scale_ratio is {self.noise_scale_ratio}; it must be positive.")
        if self.optimizer_step_cost is not None and self.optimizer_step_cost < 0:
            raise ValueError(f"optimizer_step_cost is {self.optimizer_step_cost}; it must not be negative.")
        if self.annealing_noise_ratio < 0:
            raise ValueError(f"annealing_noise_ratio is {self.annealing_noise_ratio}; it must not be negative.")
        if self.noise_scale_interval < 1:
            raise ValueError(f"noise_scale_interval is {self.noise_scale_interval}; it must be at least 1.")
        if self.noise_scale_half_life <= 0:
            raise ValueError(f"noise_scale_half_life is {self.noise_scale_half_life}; it must be positive.")
        if self.accumulation_policy == "ramp":
            if self.accumulation_ramp is None:
                raise ValueError("accumulation_policy='ramp' needs accumulation_ramp, such as '0:1,0.25:2,0.5:4'.")
            try:
                ramp = RampPolicy.parse(self.accumulation_ramp)
            except ValueError as error:
                raise ValueError(f"accumulation_ramp: {error}") from None
            smallest, largest = self.accumulation_bounds
            if min(ramp.values) < smallest or max(ramp.values) > largest:
                raise ValueError(
                    f"accumulation_ramp has values outside min_accumulation_steps ({smallest}) to "
                    f"max_accumulation_steps ({largest}); leave these unset."
                )
        elif self.accumulation_ramp is not None:
            raise ValueError(
                f"accumulation_ramp is set but accumulation_policy is '{self.accumulation_policy}'; set it to 'ramp'."
            )
        smallest, largest = self.accumulation_bounds
        if self.accumulation_policy == "fixed" and not smallest <= self.gradient_accumulation_steps <= largest:
            raise ValueError(
                f"accumulation_policy='fixed' keeps k at gradient_accumulation_steps "
                f"({self.gradient_accumulation_steps}), which is not within min_accumulation_steps ({smallest}) and "
                f"max_accumulation_steps ({largest}); leave these unset."
            )
        if self.measure_noise_scale is False and (
            self.accumulation_policy in ("noise_scale", "goodput") or self.lr_batch_scaling == "gain"
        ):
            raise ValueError(
                "measure_noise_scale=False contradicts accumulation_policy="
                f"'{self.accumulation_policy}' with lr_batch_scaling='{self.lr_batch_scaling}', which need it; leave "
                "it unset."
            )

    @property
    def accumulation_bounds(self) -> tuple[int, int]:
        """Least and largest k."""
        largest = self.max_accumulation_steps
        if largest is None:
            largest = max(32, 4 * self.gradient_accumulation_steps, self.min_accumulation_steps)
            if self.accumulation_policy == "ramp":
                largest = max(largest, *RampPolicy.parse(self.accumulation_ramp).values)
        return self.min_accumulation_steps, largest

    def make_accumulation_policy(self) -> FixedPolicy | NoiseScalePolicy | GoodputPolicy | RampPolicy:
        """Return the policy that `accumulation_policy` names."""
        if self.accumulation_policy == "fixed":
            return FixedPolicy()
        if self.accumulation_policy == "noise_scale":
            return NoiseScalePolicy(ratio=self.noise_scale_ratio)
        if self.accumulation_policy == "ramp":
            return RampPolicy.parse(self.accumulation_ramp)
        # Without the rate following the batch, a growing batch would be a second decay on top of the schedule.
        annealing = 0.0 if self.lr_batch_scaling == "none" else self.annealing_noise_ratio
        return GoodputPolicy(step_cost=self.optimizer_step_cost, annealing_ratio=annealing)


@dataclass
class EfficientTrainingArguments(EfficientTrainingArgumentsMixin, TrainingArguments):
    """`TrainingArguments` with adaptive gradient accumulation; see `EfficientTrainingArgumentsMixin`.

    > [!NOTE]
    > No default of `TrainingArguments` is changed. `accumulation_policy="fixed"` is stock `Trainer`, bit for bit.
    """
