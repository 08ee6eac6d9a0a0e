"""Chooses k window by window: ties the running noise scale, the timer and the policy together."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from ..core.facts import data_parallel_size, rank_batch_size
from .halves import can_halve
from .noise_scale import NoiseScale, NoiseScaleTracker, WindowStatistics, noise_logs
from .policy import AccumulationPolicy, FixedPolicy, Observation, RampPolicy, limit_change
from .timing import StepTimer


logger = logging.getLogger(__name__)

# Windows that are measured one after the other until |G|² is resolved for the first time. After so many the interval
# applies all the same: where it takes longer, k stays where it is and measuring should not cost more.
STARTUP_WINDOWS = 16
# The first windows of a run don't run in halves, so that a micro-batch that doesn't fit is found at once.
WHOLE_WINDOWS = 2


@dataclass
class AccumulationController:
    """State of adaptive k. Every rank holds one and feeds it the same numbers; rank 0 alone asks the policy.

    Attributes:
        policy: What k should be.
        reference_steps: k_ref.
        minimum: Least k.
        maximum: Largest k.
        world_size: W, ranks that hold different data.
        micro_batch_size: b, samples of one rank's micro-batch.
        tracker: Running noise scale, or `None` if nothing is measured.
        measure_interval: Every n-th window is measured.
        dwell: Windows between two changes of k.
        timer: Measures what micro-batches and steps cost.
        halves: Whether a micro-batch that is alone in its window may be measured by its halves, as far as code tells.
        accumulation_steps: k decided for the next window.
        halves_work: Whether they were found to train what the whole does; `None` while that wasn't tried.
        counted: Samples, and micro-batches of all ranks, that `calibrate` has seen.
    """

    policy: AccumulationPolicy
    reference_steps: int
    minimum: int
    maximum: int
    world_size: int
    micro_batch_size: int
    tracker: NoiseScaleTracker | None
    measure_interval: int
    dwell: int = 4
    timer: StepTimer = field(default_factory=StepTimer)
    halves: bool = False
    accumulation_steps: int = field(init=False)
    num_windows: int = field(init=False, default=0)
    windows_since_change: int = field(init=False, default=0)
    windows_since_measured: int = field(init=False, default=0)
    was_resolved: bool = field(init=False, default=False)
    used_range: list[int] = field(init=False, default_factory=list)
    peak_factor: float = field(init=False, default=0.0)
    halves_work: bool | None = field(init=False, default=None)
    counted: list[int] = field(init=False, default_factory=lambda: [0, 0])

    def __post_init__(self):
        self._half_life = self.tracker.half_life if self.tracker is not None else 0.0
        # Two micro-batches are the fewest that tell their noise, and early gradients agree: starting large wastes
        # data where starting small wastes a few optimizer steps.
        self.accumulation_steps = min(self.reference_steps, 2)
        wanted = self.policy(self.observe(progress=0.0, learning_rate_factor=0.0))
        self.accumulation_steps = limit_change(
            self.accumulation_steps, wanted, self.minimum, self.maximum, exact=wanted is not None
        )

    @property
    def rows_per_sample(self) -> float | None:
        """Samples that were counted over those that the arguments say, `None` before any were."""
        samples, micro_batches = self.counted
        return samples / (micro_batches * self.micro_batch_size) if micro_batches else None

    @property
    def micro_batch_samples(self) -> float:
        """Samples in one micro-batch over all ranks (b·W), as they are counted in windows."""
        nominal = self.micro_batch_size * self.world_size
        return nominal if self.rows_per_sample in (None, 1) else nominal * self.rows_per_sample

    def calibrate(self, num_samples: int, num_micro_batches: int) -> None:
        """Take the size of a micro-batch from a window that has whole ones only.

        A collator may make one row of all samples (packing) or two rows of each (preferences), and a data loader of
        one's own have another batch size than the arguments, or none. The noise scale is in what is counted. Where the
        first window is as the arguments say, so are all; else the mean over all windows is taken.

        Args:
            num_samples: Samples that were counted in a window, over all ranks.
            num_micro_batches: Its micro-batches on each rank.
        """
        if self.rows_per_sample == 1:
            return
        is_first = self.rows_per_sample is None
        samples, micro_batches = self.counted
        self.counted = [samples + num_samples, micro_batches + num_micro_batches * self.world_size]
        if is_first and self.rows_per_sample != 1:
            logger.info(
                "A micro-batch has %g rows over all ranks, not %d: `samples_seen` and the noise scale count rows.",
                self.micro_batch_samples,
                self.micro_batch_size * self.world_size,
            )
        self._scale_half_life()

    def convert_size(self, ratio: float) -> None:
        """Count in micro-batches of another size: k keeps its samples, as far as bounds and rounding allow.

        Args:
            ratio: Samples of the micro-batches that were counted so far, over those from now on.
        """
        self.counted = [0, 0]
        self._scale_half_life()
        self.used_range = [max(1, round(k * ratio)) for k in self.used_range]
        self.accumulation_steps = min(max(round(self.accumulation_steps * ratio), self.minimum), self.maximum)

    def _scale_half_life(self) -> None:
        if self.tracker is not None:
            self.tracker.half_life = self._half_life * (self.rows_per_sample or 1)

    @property
    def noise(self) -> NoiseScale | None:
        """The running noise scale, if any."""
        return self.tracker.estimate() if self.tracker is not None else None

    def noise_logs(self) -> dict[str, float]:
        """Return the noise scale and its interval as they are logged."""
        return {} if self.tracker is None else noise_logs(self.noise, self.tracker.last_value)

    @property
    def measures_next(self) -> bool:
        """Whether gradient statistics are to be taken in the next window."""
        if self.tracker is None or (self.would_halve and self.num_windows < WHOLE_WINDOWS):
            return False
        startup = not self.was_resolved and self.num_windows < STARTUP_WINDOWS
        return startup or self.windows_since_measured + 1 >= self.measure_interval

    @property
    def would_halve(self) -> bool:
        """Whether the next window would run in halves if it were measured."""
        return self.halves and self.halves_work is not False and self.accumulation_steps == 1

    def learn_of_halves(self, work: bool | None) -> None:
        """Take in whether halves train what the whole micro-batch does; `None` if that isn't known yet."""
        self.halves_work = work
        if work is False:
            logger.log(
                logging.WARNING if isinstance(self.policy, FixedPolicy) else logging.INFO,
                "Halves of a micro-batch can't tell its noise here: batches can't be split, or their loss isn't a sum "
                "over rows. At k = 1 every %d-th optimizer step takes two micro-batches.",
                self.measure_interval,
            )

    @property
    def next_window_steps(self) -> int:
        """Micro-batches that the next window should have: k, or 2 where one micro-batch cannot tell its noise.

        A window of one micro-batch on one rank carries no information on the spread between micro-batches, unless it
        can be measured by its halves, nor one of k = 1 on the time without gradient reduction: every so often such a
        window is a probe of two.
        """
        k = self.accumulation_steps
        if k > 1 or self.maximum < 2:
            return k
        probe_noise = self.measures_next and self.world_size == 1 and not self.would_halve
        probe_time = self.tracker is not None and self.timer.needs_plain_micro_batch
        return 2 if probe_noise or probe_time else k

    def observe(self, progress: float, learning_rate_factor: float) -> Observation:
        """Gather what a policy may know before the next window.

        Args:
            progress: Share of the data budget that was consumed.
            learning_rate_factor: Schedule there, relative to the base rate.
        """
        peak = max(self.peak_factor, learning_rate_factor)
        return Observation(
            accumulation_steps=self.accumulation_steps,
            reference_steps=self.reference_steps,
            micro_batch_samples=float(self.micro_batch_samples),
            progress=progress,
            learning_rate_decay=learning_rate_factor / peak if peak > 0 else 1.0,
            noise=self.noise,
            micro_batch_seconds=self.timer.micro_batch_seconds,
            step_seconds=self.timer.step_seconds,
        )

    def follow_schedule(self, progress: float) -> None:
        """Take k from a policy that depends on nothing measured, where a checkpoint's k was that of another one.

        Args:
            progress: Share of the data budget that was consumed.
        """
        if isinstance(self.policy, FixedPolicy | RampPolicy):
            self.accumulation_steps = self.decide(self.observe(progress, learning_rate_factor=0.0))

    def decide(self, observation: Observation) -> int:
        """Ask the policy for the next k, within the limits (rank 0 only). Changes nothing."""
        exact = isinstance(self.policy, FixedPolicy | RampPolicy)
        if not exact and self.windows_since_change < self.dwell:
            return self.accumulation_steps
        return limit_change(self.accumulation_steps, self.policy(observation), self.minimum, self.maximum, exact=exact)

    def finish_window(
        self,
        planned: int,
        statistics: WindowStatistics,
        measured: bool,
        next_k: int,
        learning_rate_factor: float = 1.0,
    ) -> None:
        """Take in a finished window and the k that rank 0 decided; every rank calls it with the same numbers.

        Args:
            planned: `next_window_steps` before the window (the last one of an epoch may have been shorter).
            statistics: Sums over ranks (only `num_samples` is used if the window was not `measured`).
            measured: Whether gradient statistics were taken.
            next_k: k from the next window on.
            learning_rate_factor: As in `observe`.
        """
        self.peak_factor = max(self.peak_factor, learning_rate_factor)
        self.used_range = [min([planned, *self.used_range]), max([planned, *self.used_range])]
        self.num_windows += 1
        self.windows_since_change += 1
        self.windows_since_measured += 1
        if self.tracker is not None:
            if measured:
                used = self.tracker.update(statistics, in_halves=planned == self.world_size == 1)
                # Where only one micro-batch, or half, has targets, or none, the next window is measured in its place;
                # not for ever, if most are like that.
                lacks_others = statistics.num_micro_batches == 1 and not self._drops_most
                if used or not (statistics.has_no_gradient or lacks_others):
                    self.windows_since_measured = 0
                noise = self.tracker.estimate()
                self.was_resolved |= noise is not None and noise.resolved
                if self.tracker.num_dropped == STARTUP_WINDOWS and not self.tracker.num_windows:
                    logger.warning(
                        "The gradient noise of none of the first %d measured optimizer steps is known, and k stays "
                        "at %d: gradients are not finite, parameters get them from several backward passes of one "
                        "micro-batch, or most micro-batches have nothing to predict. accumulation_policy='fixed' "
                        "trains with gradient_accumulation_steps=%d.",
                        STARTUP_WINDOWS,
                        self.accumulation_steps,
                        self.reference_steps,
                    )
            else:
                self.tracker.skip(statistics.num_samples)
        if next_k != self.accumulation_steps:
            self.accumulation_steps = next_k
            self.windows_since_change = 0

    @property
    def _drops_most(self) -> bool:
        return self.tracker.num_dropped > self.tracker.num_windows + STARTUP_WINDOWS

    _SAVED = ("accumulation_steps", "num_windows", "windows_since_change", "windows_since_measured", "was_resolved",
              "used_range", "peak_factor")  # fmt: skip

    def state_dict(self) -> dict:
        state = {name: getattr(self, name) for name in self._SAVED}
        state["counted"], state["halves_work"] = list(self.counted), self.halves_work
        state["timer"] = self.timer.state_dict()
        state["tracker"] = self.tracker.state_dict() if self.tracker is not None else None
        return state

    def load_state_dict(self, state: dict) -> None:
        for name in self._SAVED:
            setattr(self, name, state[name])
        # Older checkpoints don't have these.
        self.counted = state.get("counted", [0, 0])
        self.halves_work = state.get("halves_work")
        if "timer" in state:
            self.timer.load_state_dict(state["timer"])
        self._scale_half_life()
        if self.tracker is not None and state["tracker"] is not None:
            self.tracker.load_state_dict(state["tracker"])
        # Bounds may be others now.
        self.accumulation_steps = min(max(self.accumulation_steps, self.minimum), self.maximum)


def controller_of_run(
    trainer: Any,
    policy: AccumulationPolicy,
    reference_steps: int,
    num_samples: int,
    measures: bool,
    has_own_policy: bool,
) -> AccumulationController:
    """Return the controller that a run begins with, by the arguments of its Trainer.

    Args:
        trainer: The Trainer, prepared.
        policy: What k should be.
        reference_steps: k_ref.
        num_samples: Samples of the whole run, over all ranks.
        measures: Whether gradient statistics are taken.
        has_own_policy: Whether the policy is the user's own, which may ask for times.
    """
    args = trainer.args
    minimum, maximum = args.accumulation_bounds
    data_parallel = data_parallel_size(args)
    half_life = args.noise_scale_half_life
    on_cpu = args.device.type == "cpu"
    return AccumulationController(
        policy=policy,
        reference_steps=reference_steps,
        minimum=minimum,
        maximum=maximum,
        world_size=data_parallel,
        micro_batch_size=rank_batch_size(trainer),
        tracker=NoiseScaleTracker(half_life if half_life >= 1 else half_life * num_samples) if measures else None,
        measure_interval=args.noise_scale_interval,
        timer=StepTimer(
            synchronize=None if on_cpu else torch.accelerator.synchronize,
            distributed=data_parallel > 1,
            interval=1 if on_cpu else args.noise_scale_interval,
            enabled=has_own_policy or getattr(policy, "step_cost", 0.0) is None,
        ),
        halves=measures and can_halve(trainer),
    )
