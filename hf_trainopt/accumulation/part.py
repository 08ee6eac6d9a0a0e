"""Adaptive k as a part: reads the arguments, hands out windows, counts them and chooses k for the next one."""

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers.trainer_utils import has_length

from ..core.facts import data_parallel_size, rank_batch_size, sequence_shards
from ..core.part import Part
from .checkpoint import check_constant, check_state, place_after_stock_steps, restore, run_state
from .checks import (
    check_adaptive_setup,
    check_amount_of_data,
    check_equal_lengths,
    check_first_loss,
    may_end_unevenly,
    warn_of_adaptive_setup,
    warn_of_ignored_settings,
)
from .controller import AccumulationController, controller_of_run
from .cursor import DataCursor
from .fetch import StockFetch, WindowFetcher
from .halves import can_halve, in_halves
from .loss_division import LossDivision
from .loss_probe import rows_add_up
from .mean_loss import MeanLoss
from .measurement import WindowMeasurement
from .noise_scale import WindowStatistics
from .policy import AccumulationPolicy, FixedPolicy, growth_of
from .schedule import NOISE_SCALING_RULES, DataIndexedLR
from .sums import POLICY_FAILED, Proposal, with_counted_items
from .window import Slice, Window


logger = logging.getLogger(__name__)


class AccumulationPart(Part):
    """Adaptive gradient accumulation.

    While `cursor` is `None` training doesn't go through windows, and everything is stock.

    Args:
        trainer: As for `Part`.
        parts: As for `Part`.
        policy: The user's own policy, if any.

    Raises:
        ValueError: The policy can't be called.

    Attributes:
        policy: What k should be.
        has_own_policy: Whether the policy is the user's own.
        reference_steps: k_ref.
        cursor: Position in the data, or `None`.
        controller: k and the running averages, or `None`.
        measurement: Takes gradient statistics, where `cursor` isn't `None`.
        last_was_halved: Whether the micro-batch of the last window ran in halves, to be measured.
    """

    name = "accumulation"
    logged_keys = ("accumulation_steps", "effective_batch_size", "samples_seen", "micro_batch_size", "noise_scale",
                   "noise_scale_low", "noise_scale_high")  # fmt: skip

    def __init__(self, trainer: Any, parts: Any, policy: AccumulationPolicy | None):
        if policy is not None and not callable(policy):
            raise ValueError(
                f"accumulation_policy is {policy!r}, which cannot be called; pass a function of Observation, or name "
                "a policy in EfficientTrainingArguments(accumulation_policy=...)."
            )
        super().__init__(trainer, parts)
        self.has_own_policy = policy is not None
        self.policy = policy
        self.reference_steps = 1
        self.cursor: DataCursor | None = None
        self.controller: AccumulationController | None = None
        self.measurement: WindowMeasurement | None = None
        self.last_window: tuple[int, int] | None = None  # k and samples
        self.last_was_halved = False
        self._division: LossDivision | None = None
        self._fetcher: WindowFetcher | None = None
        self._mean_loss = MeanLoss()
        self._epoch_examples = 0
        self._initial_samples_seen = self._initial_micro_batches = 0
        self._rate_is_outdated = False
        self._warned_of_other_steps = False
        self._committed_state: dict[str, Any] | None = None
        self._loaded_state: dict[str, Any] | None = None

    def trainer_made(self) -> None:
        self._division = LossDivision(self.trainer)
        self.read_arguments()
        warn_of_ignored_settings(self.trainer, self.measures, self.has_own_policy)
        if self.adapts:
            warn_of_adaptive_setup(self.trainer, self.measures)
            self._division.warn_if_changed()

    # ---- What is in play -------------------------------------------------------------------------------------------

    @property
    def measures(self) -> bool:
        """Whether gradient statistics are taken."""
        args = self.trainer.args
        if args.measure_noise_scale is not None:
            return args.measure_noise_scale
        named = args.accumulation_policy in ("noise_scale", "goodput")
        return named or args.lr_batch_scaling in NOISE_SCALING_RULES or self.has_own_policy

    @property
    def varies(self) -> bool:
        """Whether k may vary (a fixed one may in probes, if it is measured)."""
        return self.measures or not isinstance(self.policy, FixedPolicy)

    @property
    def adapts(self) -> bool:
        """Whether training goes through windows at all; if not, everything is stock."""
        return self.varies or self.parts.out_of_memory.is_on

    @property
    def most_steps(self) -> int:
        """Most micro-batches that an optimizer step may have, a half counted for one."""
        args = self.trainer.args
        most = args.accumulation_bounds[1] if self.varies else args.gradient_accumulation_steps
        return 2 if most == 1 and self.measures and can_halve(self.trainer) else most

    @property
    def used_range(self) -> tuple[int, int, int] | None:
        """Least, largest and present k of the last run; `None` if it was stock."""
        if self.controller is None or not self.controller.used_range:
            return None
        return (*self.controller.used_range, self.controller.accumulation_steps)

    @property
    def setup(self) -> dict[str, int]:
        """What the position in the data is counted in."""
        return {
            "per_device_train_batch_size": self.trainer._train_batch_size,
            "world_size": data_parallel_size(self.trainer.args),
            "gradient_accumulation_steps": self.reference_steps,
        }

    def read_arguments(self) -> None:
        """Take k_ref and the policy from the arguments, which may have changed (hyperparameter search)."""
        args = self.trainer.args
        self.reference_steps = args.gradient_accumulation_steps
        args.validate_accumulation()
        if not self.has_own_policy:
            self.policy = args.make_accumulation_policy()
        self._division.read(self.adapts)

    def check_setup(self) -> None:
        """Refuse what can't work in training; a Trainer that only evaluates or predicts may have it."""
        self.reference_steps = self.trainer.args.gradient_accumulation_steps  # may have changed since the last run
        if self.adapts:
            check_adaptive_setup(self.trainer, self.measures, self.has_own_policy)

    # ---- A run -----------------------------------------------------------------------------------------------------

    def before_preparing(self, dataloader: Any) -> None:
        self.read_arguments()  # a trial of a hyperparameter search is applied after `train` was entered
        self.check_setup()
        num_micro_batches = len(dataloader) if has_length(dataloader) else None
        check_amount_of_data(self.trainer.args, num_micro_batches, self.varies)
        self.cursor = self.controller = None

    def begin(self, dataloader: Any, values: tuple) -> tuple:
        """Set up a run; return what the loop is told in place of `Trainer.set_initial_training_values`.

        Args:
            dataloader: For training.
            values: What upstream has returned. The loop is told to run as many steps as there can be windows;
                schedules stay in reference windows.
        """
        if not self.adapts:
            return values
        epochs, _, examples, samples, total_batch, steps_in_epoch, max_steps = values
        trainer, args = self.trainer, self.trainer.args
        sized = has_length(dataloader)
        if args.world_size > 1 and sized:
            check_equal_lengths(trainer.accelerator, len(dataloader))
        self._epoch_examples = examples
        uneven = args.world_size > 1 and may_end_unevenly(dataloader)
        self._fetcher = WindowFetcher(trainer.accelerator, uneven, looks_ahead=sequence_shards(args) == 1)
        self.cursor = DataCursor(
            reference_steps=self.reference_steps,
            budget=max_steps,
            micro_batches_per_epoch=steps_in_epoch if sized else None,
            epoch_length=steps_in_epoch,
        )
        budget = max_steps * self.reference_steps * rank_batch_size(trainer) * data_parallel_size(args)
        self.controller = controller_of_run(
            trainer, self.policy, self.reference_steps, budget, self.measures, self.has_own_policy
        )
        parts = self.parts
        self.measurement = WindowMeasurement(trainer, self.measures, parts.deepspeed, parts.tensor_parallel.begin())
        self.last_window, self._rate_is_outdated = None, False
        self._mean_loss = MeanLoss()
        logger.info(
            "%s: in the lines below, a step means %s of data, and 'update steps per epoch' means micro-batches.",
            "k varies" if self.varies else "auto_micro_batch",
            "one micro-batch" if self.reference_steps == 1 else f"{self.reference_steps} micro-batches",
        )
        # k >= 1, so an epoch has at most as many windows as micro-batches; an iterator that is dry ends it earlier.
        return epochs, steps_in_epoch, examples, samples, total_batch, steps_in_epoch, max_steps

    def place(self) -> tuple[int, int]:
        """Return the epoch to begin with and the micro-batches of it to skip, after `load_state_dict`."""
        trainer, cursor, state = self.trainer, self.cursor, self._loaded_state
        if state is not None:
            restore(state, cursor, self.controller, self.setup)
            is_same_k = state["controller"]["accumulation_steps"] == self.controller.accumulation_steps
            self._rate_is_outdated = not is_same_k or state["setup"] != self.setup
        elif trainer.state.global_step:
            place_after_stock_steps(
                cursor,
                trainer.state.global_step,
                self.controller.micro_batch_samples,
                self._epoch_examples,
                trainer.state.log_history,
            )
        if trainer.args.ignore_data_skip:
            cursor.restart_epoch()
        self._initial_samples_seen, self._initial_micro_batches = cursor.samples_seen, cursor.micro_batches_passed
        self._committed_state = run_state(self.setup, cursor, self.controller)
        trainer.state.max_steps = self._forecast_steps()
        return cursor.epoch, cursor.micro_batch

    def _forecast_steps(self) -> int:
        return self.trainer.state.global_step + self.cursor.remaining_windows(self.controller.accumulation_steps)

    @contextlib.contextmanager
    def epoch(self, *, epoch: int, train_dataloader: Any = None, **loop: Any) -> Iterator[None]:
        if self.cursor is None:
            yield
            return
        if epoch > self.cursor.epoch:  # a callback has stopped the last one early
            self.cursor.close_epoch()
        if self._rate_is_outdated:  # it is that of a k or of a micro-batch that this run doesn't have
            self._rate_is_outdated = False
            self.parts.learning_rate.apply()
        self._fetcher.begin_epoch(train_dataloader)
        try:
            with self.steps_shown(1):
                yield
        finally:
            self._fetcher.end_epoch()

    @contextlib.contextmanager
    def steps_shown(self, value: int) -> Iterator[None]:
        """Context in which `args.gradient_accumulation_steps` is `value`, for upstream to read."""
        args = self.trainer.args
        before, args.gradient_accumulation_steps = args.gradient_accumulation_steps, value
        try:
            yield
        finally:
            if args.gradient_accumulation_steps != value and not self._warned_of_other_steps:
                self._warned_of_other_steps = True
                logger.warning(
                    "gradient_accumulation_steps=%s, set in the middle of training, is ignored: k is chosen by "
                    "accumulation_policy; for a rule of your own pass EfficientTrainer(accumulation_policy=...).",
                    args.gradient_accumulation_steps,
                )
            args.gradient_accumulation_steps = before

    def reference_steps_shown(self) -> contextlib.AbstractContextManager[None]:
        """Context in which `args.gradient_accumulation_steps` is the user's (stock: it always is)."""
        return contextlib.nullcontext() if self.cursor is None else self.steps_shown(self.reference_steps)

    # ---- A window --------------------------------------------------------------------------------------------------

    def next_window(self, stock_fetch: StockFetch, iterator: Iterator) -> tuple[list[Window], Any]:
        """Return the next window as a list of one batch for the loop, and its `num_items_in_batch`.

        The list is empty at the end of an epoch.
        """
        cursor, controller, control = self.cursor, self.controller, self.trainer.control
        planned, measures = controller.next_window_steps, controller.measures_next
        wanted = 0 if self._fetcher.epoch_is_over else min(planned, cursor.available())
        if wanted:
            controller.timer.start_window()

        def fetch(source: Iterator, count: int) -> tuple[list[Any], Any]:
            with self.steps_shown(max(1, count)):
                return stock_fetch(source, count)

        micro_batches, num_items = self._fetcher.fetch(fetch, iterator, wanted)
        if not micro_batches:
            if wanted and cursor.micro_batch:
                cursor.close_epoch()
            # The loop is set to as many steps as the epoch has micro-batches: don't let it count through the rest.
            control.should_epoch_stop = True
            control.should_training_stop |= cursor.exhausted
            return [], num_items
        controller.timer.fetched(len(micro_batches))
        slices: list[Slice] = []
        if measures and controller.would_halve and not controller.timer.needs_whole_micro_batch:
            slices = in_halves(self.trainer, micro_batches[0], num_items)
            if slices:
                controller.timer.leave_out_window()
            elif not self._fetcher.epoch_is_over:  # where it is, the micro-batch may be short
                controller.learn_of_halves(False)
        measured = measures and max(len(slices), len(micro_batches) * data_parallel_size(self.trainer.args)) >= 2
        return [Window(micro_batches, planned, measured, slices)], num_items

    def try_loss(self, model: torch.nn.Module, window: Window, num_items_in_batch: Any) -> Window:
        """Try what isn't known of the loss: whether the items divide it, and whether halves add up.

        Returns:
            The window: whole and not measured, if it was in halves that don't.
        """
        batch, forget = window.micro_batches[0], self.parts.measurements.restart_step
        self._division.try_on(model, batch, num_items_in_batch, forget)
        if not window.is_halved or self.controller.halves_work:
            return window
        found = rows_add_up(self.trainer, model, batch, num_items_in_batch)
        forget()
        self.controller.learn_of_halves(found)
        return window if found else replace(window, measured=False, slices=[])

    def restart_step(self) -> None:
        self.controller.timer.abandon_window()

    def advance(self, window: Window, num_items_in_batch: Any) -> None:
        """Move on in the data by a window that has run."""
        if self.controller.num_windows == 0:
            check_first_loss(self.trainer, num_items_in_batch)
        self.cursor.advance(len(window), end_of_epoch=self._fetcher.epoch_is_over)
        self._fetcher.epoch_is_over |= self.cursor.micro_batch == 0

    def propose(self, learning_rate_factor: float) -> Proposal:
        """Return the next k on rank 0, or what went wrong (the other ranks wait for an answer); zeros elsewhere."""
        if self.trainer.args.process_index != 0:
            return Proposal()
        try:
            observation = self.controller.observe(self.cursor.progress, learning_rate_factor)
            return Proposal(self.controller.decide(observation), growth_of(self.policy, observation) or 0.0)
        except Exception as error:
            return Proposal(POLICY_FAILED, failure=error)

    def finish_window(
        self,
        window: Window,
        loss: torch.Tensor,
        next_k: int,
        statistics: WindowStatistics,
        divided_by: float | None,
        learning_rate_factor: float,
    ) -> None:
        """Take in what ranks have agreed on; every rank calls it with the same numbers.

        Args:
            window: The window.
            loss: Its mean over ranks.
            next_k: k from the next window on.
            statistics: Sums over ranks.
            divided_by: What all ranks have divided their losses by, if known.
            learning_rate_factor: As for `propose`.
        """
        cursor, controller = self.cursor, self.controller
        if divided_by is not None:
            statistics = with_counted_items(statistics, divided_by)
        if window.measured and self.parts.skipped_steps.loss_is_bad:
            # The step will be skipped, though its gradients may be finite: the loss overflows before they do.
            statistics = replace(statistics, gradient_square_norm=math.nan)
        cursor.samples_seen += statistics.num_samples
        if not self._fetcher.epoch_is_over:  # the last micro-batch of an epoch may be short
            controller.calibrate(statistics.num_samples, len(window))
        controller.finish_window(window.planned, statistics, window.measured, next_k, learning_rate_factor)
        self._mean_loss.add(loss, len(window), window.planned, self.trainer.args.logging_nan_inf_filter)
        self.last_window = (window.planned, statistics.num_samples)
        self.last_was_halved = window.is_halved and not self.parts.out_of_memory.is_split

    def step_ended(self, state: Any) -> None:
        """Correct `state`, which the loop has set as if windows were all alike; before any callback hears of it."""
        if self.cursor is None:
            return
        self.controller.timer.step_done()
        state.epoch = self.cursor.reported_epoch
        state.max_steps = self._forecast_steps()
        self._committed_state = run_state(self.setup, self.cursor, self.controller)
        # The loop doesn't step the schedule after a skipped optimizer step (fp16 overflow), but the data were used.
        scheduler = self.trainer.lr_scheduler
        if self.trainer.accelerator.optimizer_step_was_skipped and isinstance(scheduler, DataIndexedLR):
            scheduler.step()

    # ---- Logs and checkpoints --------------------------------------------------------------------------------------

    def correct_line(self, logs: dict[str, float]) -> None:
        """Correct what upstream has computed as if all steps were of one size."""
        if self.cursor is None:
            return
        if "train_samples_per_second" in logs and logs.get("train_runtime"):
            # Upstream takes the share of steps for the share of the data.
            cursor = self.cursor
            if self.controller.rows_per_sample in (None, 1):
                samples = cursor.samples_seen - self._initial_samples_seen
                logs["train_samples_per_second"] = round(samples / logs["train_runtime"], 3)
            else:  # rows aren't samples
                share = (cursor.micro_batches_passed - self._initial_micro_batches) / cursor.budget_micro_batches
                logs["train_samples_per_second"] = round(logs["train_samples_per_second"] * share, 3)
        if "train_loss" in logs:
            logs["train_loss"] = self.mean_loss or logs["train_loss"]
        elif "loss" in logs and "learning_rate" in logs:  # a line of training, not the user's
            mean = self._mean_loss.take()
            logs["loss"] = logs["loss"] if mean is None else mean

    @property
    def mean_loss(self) -> float | None:
        """Mean loss of the run over equal data; `None` where k hasn't varied, so that upstream's is right."""
        return None if self.cursor is None else self._mean_loss.overall()

    def log_values(self, line: dict[str, Any]) -> dict[str, Any]:
        if self.cursor is None or self.last_window is None:
            return {}
        k, samples = self.last_window
        values = {"accumulation_steps": k, "effective_batch_size": samples, "samples_seen": self.cursor.samples_seen}
        memory = self.parts.out_of_memory
        if memory.is_split:
            size = memory.micro_batch_size
            values |= {"accumulation_steps": k * -(-rank_batch_size(self.trainer) // size), "micro_batch_size": size}
        return values | self.controller.noise_logs()

    def state_dict(self) -> dict[str, Any] | None:
        # That of the last finished step: a checkpoint may be asked for in the middle of one.
        return None if self.cursor is None else self._committed_state

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if state is not None and not self.adapts:
            check_constant(state)  # arguments may have changed since `train` was entered (hyperparameter search)
        self._loaded_state = state

    def check_state(self, path: str, state: dict[str, Any] | None, setup: dict[str, int] | None) -> None:
        """Refuse a checkpoint that doesn't fit this run.

        Args:
            path: The checkpoint, for errors.
            state: Its state of this part, if any.
            setup: `setup` of the run that wrote it, if known.

        Raises:
            ValueError: The run is stock, and k has varied in the checkpoint.
        """
        keeps_place = not self.trainer.args.ignore_data_skip
        check_state(path, state, setup or {}, self.setup, self.adapts, keeps_place)
