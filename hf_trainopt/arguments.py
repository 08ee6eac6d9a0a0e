"""Arguments of the efficient parts, on top of `TrainingArguments`."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal

from transformers import TrainingArguments

from .accumulation.policy import FixedPolicy, GoodputPolicy, NoiseScalePolicy, RampPolicy
from .accumulation.schedule import BATCH_SCALING_RULES, NOISE_SCALING_RULES
from .metrics.arguments import EvidenceArgumentsMixin
from .out_of_memory.arguments import OutOfMemoryArgumentsMixin
from .placement.arguments import PlacementArgumentsMixin
from .precision.arguments import PrecisionArgumentsMixin
from .reliability.arguments import ReliabilityArgumentsMixin
from .stock_arguments import (
    COUNT,
    OPTIONAL_COUNT,
    Range,
    check_names,
    check_ranges,
    check_stock_arguments,
)


logger = logging.getLogger(__name__)

ADAM_CLOCKS = ("tokens", "steps")
POLICIES = ("fixed", "noise_scale", "goodput", "ramp")

RANGES = {
    "gradient_accumulation_steps": COUNT,
    "min_accumulation_steps": COUNT,
    "max_accumulation_steps": OPTIONAL_COUNT,
    "noise_scale_ratio": Range(0, above=True),
    "optimizer_step_cost": Range(0, optional=True),
    "noise_scale_interval": COUNT,
    "noise_scale_half_life": Range(0, above=True, infinite=True),  # infinite: nothing is forgotten
}


@dataclass
class EfficientTrainingArgumentsMixin(
    PlacementArgumentsMixin,
    EvidenceArgumentsMixin,
    PrecisionArgumentsMixin,
    ReliabilityArgumentsMixin,
    OutOfMemoryArgumentsMixin,
):
    """Adaptive gradient accumulation, for any `TrainingArguments` class.

    `gradient_accumulation_steps` becomes the *reference* k_ref: it fixes the data budget (`max_steps` means max_steps
    windows of k_ref micro-batches, the same samples as in stock `Trainer`), the unit of `warmup_steps`,
    `logging_steps`, `eval_steps` and `save_steps`, and the batch that `learning_rate` is meant for. How many
    micro-batches really make a step is chosen by `accumulation_policy`.

    Args:
        accumulation_policy (`str`, defaults to `"goodput"`): `"fixed"`, `"noise_scale"`, `"goodput"` or `"ramp"`.
        min_accumulation_steps (`int`, defaults to 1): Least k.
        max_accumulation_steps (`int`, *optional*): Largest k; the larger of 32 and 4·k_ref if unset.
        lr_batch_scaling (`str`, defaults to `"auto"`): How the learning rate follows k relative to k_ref: `"none"`,
            `"sqrt"`, `"linear"` or `"surge"`. `"auto"`: `"surge"` where the noise scale is measured, else `"sqrt"`.
        adam_clock (`str`, defaults to `"tokens"`): Where k varies, Adam's second moment and AdamW's weight decay keep
            their half-life in data (`"tokens"`) or in optimizer steps (`"steps"`).
        noise_scale_ratio (`float`, defaults to 1.0): ρ of `"noise_scale"`.
        accumulation_ramp (`str`, *optional*): Schedule of `"ramp"`, as `"share of data:k,..."`.
        optimizer_step_cost (`float`, *optional*): Cost of an optimizer step in micro-batches for `"goodput"` instead
            of the measured one.
        measure_noise_scale (`bool`, *optional*): Take gradient statistics. Unset: where the policy or the learning
            rate needs them.
        noise_scale_interval (`int`, defaults to 8): Every n-th window is measured.
        noise_scale_half_life (`float`, defaults to 0.05): Half-life of the averages, in samples, or below 1 as a share
            of the data budget.
        coalesce_grad_reduction (`bool`, defaults to `False`): Under DeepSpeed ZeRO-1 to 3, reduce gradients over ranks
            once in a window.
    """

    argument_group: ClassVar[str] = "accumulation"  # in `--help` of the scripts

    accumulation_policy: Literal["fixed", "noise_scale", "goodput", "ramp"] = field(
        default="goodput",
        metadata={
            "help": "How the number of micro-batches in an optimizer step (k) is chosen: 'goodput' = most progress "
            "per second, from the measured gradient noise and the measured times; 'noise_scale' = batch follows the "
            "noise scale, for those who pay per optimizer step; 'ramp' = a stated schedule (accumulation_ramp); "
            "'fixed' = gradient_accumulation_steps always, exactly as stock Trainer. Set 'fixed' to compare with "
            "stock, or where varying k is refused (FSDP1, model parallelism)."
        },
    )
    min_accumulation_steps: int = field(
        default=1,
        metadata={
            "help": "Least k that a policy may choose. Raise it where batches below some size are known not to work, "
            "as in contrastive losses."
        },
    )
    max_accumulation_steps: int | None = field(
        default=None,
        metadata={
            "help": "Largest k that a policy may choose. Unset (the default): the larger of 32 and 4 times "
            "gradient_accumulation_steps. Lower it where batches above some size are known to generalise worse; raise "
            "it if k stays at it (accumulation_steps in the log)."
        },
    )
    lr_batch_scaling: Literal["auto", "none", "sqrt", "linear", "surge"] = field(
        default="auto",
        metadata={
            "help": "How the learning rate follows k relative to gradient_accumulation_steps: 'none', 'sqrt' (Adam), "
            "'linear' (SGD), or 'surge' (as the measured noise scale says: the rate rises with the batch up to the "
            "noise scale and stays there). 'auto' (the default) = 'surge' where the noise scale is measured, else "
            "'sqrt'. Set 'linear' for SGD with a ramp, 'none' to leave the rate alone."
        },
    )
    adam_clock: Literal["tokens", "steps"] = field(
        default="tokens",
        metadata={
            "help": "What Adam's second moment (adam_beta2) and AdamW's weight decay forget by where k varies: "
            "'tokens' (the default) keeps their half-life in data, as if every optimizer step had "
            "gradient_accumulation_steps micro-batches; 'steps' keeps it in optimizer steps, so that it follows k. "
            "Set 'steps' if adam_beta2 was tuned for runs in which k varies."
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
            "help": "accumulation_policy='ramp': k over the data as 'share:k' pairs, such as '0:1,0.25:2,0.5:4'. "
            "Unset (the default) for any other policy; set it to repeat a schedule that is known to work."
        },
    )
    optimizer_step_cost: float | None = field(
        default=None,
        metadata={
            "help": "accumulation_policy='goodput': cost of an optimizer step in micro-batches. Unset (the default): "
            "it is measured; set it to make a run reproducible to the bit."
        },
    )
    measure_noise_scale: bool | None = field(
        default=None,
        metadata={
            "help": "Measure and log the gradient noise scale. Unset (the default): only where accumulation_policy or "
            "lr_batch_scaling needs it. Set it to see the noise scale of a run with a fixed k.",
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
            "below 1 as a share of the data. Raise it where noise_scale jumps about in the log, lower it where it "
            "lags."
        },
    )
    coalesce_grad_reduction: bool = field(
        default=False,
        metadata={
            "help": "DeepSpeed ZeRO stages 1 to 3 (>= 0.19.2): reduce gradients over ranks once in an optimizer step "
            "and not in each micro-batch, for which every rank keeps a whole gradient. Off (the default): as "
            "DeepSpeed does it. Set it where the network is slow and a whole gradient fits."
        },
    )

    def __new__(cls, *args, **kwargs):
        """As in Python; a name that does not exist is answered with the one that does."""
        check_names(cls, kwargs)
        return super().__new__(cls)

    def __post_init__(self):
        check_stock_arguments(self)
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
            gone = " ('gain' has become a part of 'surge')" if self.lr_batch_scaling == "gain" else ""
            raise ValueError(
                f"lr_batch_scaling is '{self.lr_batch_scaling}'; choose one of {', '.join(BATCH_SCALING_RULES)}{gone}."
            )
        if self.adam_clock not in ADAM_CLOCKS:
            raise ValueError(f"adam_clock is '{self.adam_clock}'; choose one of {', '.join(ADAM_CLOCKS)}.")
        check_ranges(self, RANGES)
        if self.max_accumulation_steps is not None and self.max_accumulation_steps < self.min_accumulation_steps:
            raise ValueError(
                f"max_accumulation_steps ({self.max_accumulation_steps}) is below min_accumulation_steps "
                f"({self.min_accumulation_steps}); raise the one or lower the other."
            )
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
            self.accumulation_policy in ("noise_scale", "goodput") or self.lr_batch_scaling in NOISE_SCALING_RULES
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
        return GoodputPolicy(step_cost=self.optimizer_step_cost, anneals=self.lr_batch_scaling != "none")


@dataclass
class EfficientTrainingArguments(EfficientTrainingArgumentsMixin, TrainingArguments):
    """`TrainingArguments` with adaptive gradient accumulation; see `EfficientTrainingArgumentsMixin`.

    > [!NOTE]
    > No default of `TrainingArguments` is changed. `accumulation_policy="fixed"` is stock `Trainer`, bit for bit.
    """


@functools.cache
def efficient_class(cls: type[TrainingArguments]) -> type[TrainingArguments]:
    """Return the class of arguments that has our settings besides those of `cls`.

    Args:
        cls: A class of `TrainingArguments` (`SFTConfig`, ...); one that has them already is returned as it is.
    """
    if issubclass(cls, EfficientTrainingArgumentsMixin):
        return cls
    if cls is TrainingArguments:
        return EfficientTrainingArguments

    def reduce(self, protocol):  # `training_args.bin`: no module holds the class
        return _with_state, (cls, vars(self))

    members = {"__reduce_ex__": reduce, "__module__": __name__, "__doc__": cls.__doc__}
    return dataclass(type(f"Efficient{cls.__name__}", (EfficientTrainingArgumentsMixin, cls), members))


def make_efficient(args: TrainingArguments, given: Any = None) -> None:
    """Give arguments of any class our settings, in place: who holds them sees the same object.

    Args:
        args: What the Trainer has.
        given: What it was given. If it has made arguments of its own class of ours, the settings of ours are kept;
            else they are at their defaults.
    """
    before, made = type(args), efficient_class(type(args))
    if made is before:
        return
    args.__class__ = made
    kept = vars(given) if isinstance(given, EfficientTrainingArgumentsMixin) else {}
    for setting in fields(made):
        if setting.name in vars(args):
            continue
        if setting.name in kept:
            value = kept[setting.name]
        else:
            value = setting.default if setting.default is not MISSING else setting.default_factory()
        setattr(args, setting.name, value)
    args.validate_accumulation()
    if not kept:
        logger.info("args is a %s: settings of %s that it lacks have their defaults.", before.__name__, made.__name__)


@contextlib.contextmanager
def in_stock_names(args: Any) -> Iterator[None]:
    """Let `args.to_dict()` leave our settings out.

    Trainers of other packages make arguments of their own class with it (TRL: `SFTConfig(**args.to_dict())`),
    which doesn't know them. `make_efficient` puts them back.
    """
    if not isinstance(args, EfficientTrainingArgumentsMixin):
        yield
        return
    ours = {setting.name for setting in fields(EfficientTrainingArgumentsMixin)}
    whole = args.to_dict
    args.to_dict = lambda: {name: value for name, value in whole().items() if name not in ours}
    try:
        yield
    finally:
        del args.to_dict


def _with_state(cls: type[TrainingArguments], state: dict[str, Any]) -> TrainingArguments:
    args = object.__new__(efficient_class(cls))
    vars(args).update(state)
    return args
