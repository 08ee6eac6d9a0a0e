"""`EfficientTrainer`: wires the parts into the public hooks of `transformers.Trainer`."""

import contextlib
import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import Trainer
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.trainer_utils import has_length

from ._compat import rank_batch_size
from ._versions import (
    deferred_fsdp_reduction,
    is_sharded_at_load,
    loss_is_scaled_for_ga,
)
from .accumulation.checkpoint import place_after_stock_steps, read_state, restore, run_state, write_state
from .accumulation.controller import AccumulationController
from .accumulation.cursor import DataCursor
from .accumulation.gradient_norms import MicroBatchNorms
from .accumulation.logs import AccumulationLogsTrainerMixin
from .accumulation.mean_loss import MeanLoss
from .accumulation.noise_scale import NoiseScaleTracker
from .accumulation.policy import AccumulationPolicy, FixedPolicy
from .accumulation.timing import StepTimer
from .accumulation.window import (
    POLICY_FAILED,
    REDUCED,
    LocalSums,
    Window,
    count_samples,
    count_target_tokens,
    from_vector,
    lacks_targets,
    local_sums,
    micro_batch_weights,
    to_vector,
    window_loss,
    with_counted_items,
)
from .args import in_stock_names, make_efficient
from .checks import (
    check_adaptive_setup,
    check_amount_of_data,
    check_equal_lengths,
    check_first_loss,
    loss_ignores_num_items,
    may_end_unevenly,
    warn_of_adaptive_setup,
    warn_of_ignored_settings,
)
from .evidence.gradients import GradientStatisticsCallback
from .evidence.trainer import EvidenceTrainerMixin
from .flow import WindowCallbackHandler
from .learning_rate import LearningRateTrainerMixin
from .loss_probe import divides_by_items, is_in_doubt
from .loss_scaling import own_loss_ignoring_num_items
from .out_of_memory.trainer import OutOfMemoryTrainerMixin
from .placement.trainer import PlacementTrainerMixin
from .precision.trainer import PrecisionTrainerMixin
from .reliability.trainer import ReliabilityTrainerMixin
from .schedule import (
    NOISE_SCALING_RULES,
    DataIndexedLR,
)


logger = logging.getLogger(__name__)

_IGNORES_ITEMS = (
    "The loss of %s ignores num_items_in_batch, so that in stock Trainer gradients and losses are k times too large: "
    "here they are means over the micro-batches. Set `accepts_loss_kwargs = False` on the model to have that in both, "
    "without this warning."
)


class EfficientTrainerMixin(
    LearningRateTrainerMixin,
    AccumulationLogsTrainerMixin,
    OutOfMemoryTrainerMixin,
    ReliabilityTrainerMixin,
    PlacementTrainerMixin,
    EvidenceTrainerMixin,
    PrecisionTrainerMixin,
):
    """Adaptive gradient accumulation for any `Trainer` class: put it before that class.

    One accumulation window is one step of the upstream loop: `get_batch_samples` hands the loop a single `Window`, and
    `training_step` runs its micro-batches, gradients synchronised in the last one only. With
    `accumulation_policy="fixed"` (nothing measured, no `auto_micro_batch`) none of this is in play: the loop is stock.

    Args:
        *args: As for `Trainer`. Training arguments that lack our settings, and those that the class below makes where
            it is given none, get them at their defaults.
        accumulation_policy (`AccumulationPolicy`, *optional*): Your own policy in place of the one that
            `args.accumulation_policy` names: a callable from `Observation` to the k it would like (`None`: hold).
        **kwargs: As for `Trainer`.

    Raises:
        ValueError: Something asked for cannot work with varying k.
    """

    def __init__(self, *args, accumulation_policy: AccumulationPolicy | None = None, **kwargs):
        if accumulation_policy is not None and not callable(accumulation_policy):
            raise ValueError(
                f"accumulation_policy is {accumulation_policy!r}, which cannot be called; pass a function of "
                "Observation, or name a policy in EfficientTrainingArguments(accumulation_policy=...)."
            )
        self._given_args = kwargs.get("args", args[1] if len(args) > 1 else None)
        with in_stock_names(self._given_args):
            super().__init__(*args, **kwargs)
        self._takes_num_items = self._accepts_as_set = self.model_accepts_loss_kwargs
        self._has_own_policy = accumulation_policy is not None
        self.accumulation_policy = accumulation_policy
        self._cursor: DataCursor | None = None
        self._controller: AccumulationController | None = None
        self._norms: MicroBatchNorms | None = None
        self._initial_samples_seen = self._initial_units = 0
        self._items: list[tuple[int, Any]] = []
        self._epoch_examples = 0
        self._last_window: tuple[int, int] | None = None
        self._mean_loss = MeanLoss()
        self._epoch_is_over = False
        self._was_bounded = False
        self._train_loader: Any = None
        self._other_loader: Any = None
        self._fetches_together = False
        self._warned_of_uneven_ranks = False
        self._warned_of_other_steps = False
        self._tried_loss = False
        self._committed_state: dict[str, Any] | None = None
        self._read_arguments()
        warn_of_ignored_settings(self, self._measures, self._has_own_policy)
        if self._adapts:
            warn_of_adaptive_setup(self, self._measures)
            if self.model_accepts_loss_kwargs != self._takes_num_items:
                logger.warning(_IGNORES_ITEMS, type(self.model).__name__)
        self.callback_handler = WindowCallbackHandler(
            self.callback_handler,
            self._reference_steps_shown,
            self._before_step_end,
            self._get_cursor,  # a method and no lambda, so that a copy of the Trainer asks for its own
            self._has_failed_save,
            self._after_save,
        )

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`, which calls it as soon as there are arguments."""
        make_efficient(self.args, self._given_args)
        super().create_accelerator_and_postprocess()

    # ---- What is in play -------------------------------------------------------------------------------------------

    def _get_cursor(self) -> DataCursor | None:
        return self._cursor

    def _has_failed_save(self) -> bool:
        return self._failed_save is not None

    @property
    def _measures(self) -> bool:
        """Whether gradient statistics are taken."""
        if self.args.measure_noise_scale is not None:
            return self.args.measure_noise_scale
        named = self.args.accumulation_policy in ("noise_scale", "goodput")
        return named or self.args.lr_batch_scaling in NOISE_SCALING_RULES or self._has_own_policy

    @property
    def _adapts(self) -> bool:
        """Whether training goes through windows at all; if not, everything is stock."""
        return self._varies or self._fits_micro_batches

    @property
    def _varies(self) -> bool:
        """Whether k may vary (a fixed one does in probes, if it is measured)."""
        return self._measures or not isinstance(self.accumulation_policy, FixedPolicy)

    def _read_arguments(self) -> None:
        """Take k_ref and the policy from the arguments, which may have changed (hyperparameter search)."""
        self._reference_steps = self.args.gradient_accumulation_steps
        self.args.validate_accumulation()
        if not self._has_own_policy:
            self.accumulation_policy = self.args.make_accumulation_policy()
        if self.model_accepts_loss_kwargs != self._accepts_as_set:  # the user has, since
            self._takes_num_items = self.model_accepts_loss_kwargs
        self.model_accepts_loss_kwargs = self._takes_num_items
        if self._adapts and loss_ignores_num_items(self):
            # In stock gradients grow with k, which is a constant there. A mean of micro-batch means does not.
            self.model_accepts_loss_kwargs = False
        self._accepts_as_set = self.model_accepts_loss_kwargs

    def _check_setup(self) -> None:
        """Refuse what cannot work in training; a Trainer that only evaluates or predicts is none of this."""
        if self._adapts:
            check_adaptive_setup(self, self._measures, self._has_own_policy)

    @property
    def _most_accumulation_steps(self) -> int:
        return self.args.accumulation_bounds[1] if self._varies else super()._most_accumulation_steps

    # ---- The loop --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _accumulation_steps_shown(self, value: int) -> Iterator[None]:
        before = self.args.gradient_accumulation_steps
        self.args.gradient_accumulation_steps = value
        try:
            yield
        finally:
            if self.args.gradient_accumulation_steps != value and not self._warned_of_other_steps:
                self._warned_of_other_steps = True
                logger.warning(
                    "gradient_accumulation_steps=%s, set in the middle of training, is ignored: k is chosen by "
                    "accumulation_policy; for a rule of your own pass EfficientTrainer(accumulation_policy=...).",
                    self.args.gradient_accumulation_steps,
                )
            self.args.gradient_accumulation_steps = before

    def _reference_steps_shown(self):
        """Context in which `args.gradient_accumulation_steps` is the user's (stock: it always is)."""
        if self._cursor is None:
            return contextlib.nullcontext()
        return self._accumulation_steps_shown(self._reference_steps)

    def get_train_dataloader(self, *args, **kwargs):
        """As in `Trainer`.

        Raises:
            ValueError: There are no rows.
        """
        try:
            return super().get_train_dataloader(*args, **kwargs)
        except ValueError as error:
            if self.train_dataset is None or not has_length(self.train_dataset) or len(self.train_dataset):
                raise
            raise ValueError(
                "train_dataset is empty, so that nothing would be trained; pass one with rows."
            ) from error

    def set_initial_training_values(self, args, dataloader, *other, **kwargs):
        """Let the loop run as many steps as there can be windows; schedules stay in reference windows."""
        self._read_arguments()  # a trial of a hyperparameter search is applied after `train` was entered
        self._check_setup()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, GradientStatisticsCallback):
                callback.is_redundant, callback.k_varies = self._measures, self._varies
                callback.windows_repeat = self._fits_micro_batches
        check_amount_of_data(args, len(dataloader) if has_length(dataloader) else None, self._varies)
        values = super().set_initial_training_values(args, dataloader, *other, **kwargs)
        self._cursor = self._controller = None
        self._was_bounded = False
        if not self._adapts:
            return values
        epochs, _, examples, samples, total_batch, steps_in_epoch, max_steps = values
        self._epoch_examples = examples
        sized = has_length(dataloader)
        if args.world_size > 1:
            self._fetches_together = may_end_unevenly(dataloader)
            if sized:
                check_equal_lengths(self.accelerator, len(dataloader))
        self._cursor = DataCursor(
            reference_steps=self._reference_steps,
            budget=max_steps,
            micro_batches_per_epoch=steps_in_epoch if sized else None,
            epoch_length=steps_in_epoch,
        )
        minimum, maximum = args.accumulation_bounds
        half_life = args.noise_scale_half_life
        if half_life < 1:
            half_life *= max_steps * self._reference_steps * rank_batch_size(self) * args.world_size
        device = args.device
        self._controller = AccumulationController(
            policy=self.accumulation_policy,
            reference_steps=self._reference_steps,
            minimum=minimum,
            maximum=maximum,
            world_size=args.world_size,
            micro_batch_size=rank_batch_size(self),
            tracker=NoiseScaleTracker(half_life) if self._measures else None,
            measure_interval=args.noise_scale_interval,
            timer=StepTimer(
                synchronize=None if device.type == "cpu" else torch.accelerator.synchronize,
                distributed=args.world_size > 1,
                interval=1 if device.type == "cpu" else args.noise_scale_interval,
                enabled=self._has_own_policy or getattr(self.accumulation_policy, "step_cost", 0.0) is None,
            ),
        )
        self._norms = MicroBatchNorms(self.model, device) if self._measures else None
        self._last_window, self._tried_loss = None, False
        self._mean_loss = MeanLoss()
        logger.info(
            "%s: in what is logged next, steps are reference windows of %d micro-batches, and 'update steps per "
            "epoch' are micro-batches.",
            "k varies" if self._varies else "auto_micro_batch",
            self._reference_steps,
        )
        # k >= 1, so an epoch has at most as many windows as micro-batches; an iterator that is dry ends it earlier.
        return epochs, steps_in_epoch, examples, samples, total_batch, steps_in_epoch, max_steps

    def _check_start(self, *args, **kwargs):
        self._reference_steps = self.args.gradient_accumulation_steps  # it may have changed since the last run
        self._check_setup()
        return super()._check_start(*args, **kwargs)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial, *args, **kwargs
    ):
        resumed = None
        if resume_from_checkpoint is not None:
            resumed = self._read_own_state(resume_from_checkpoint)
        epochs, micro_batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial, *args, **kwargs
        )
        if self._cursor is None:
            return epochs, micro_batches
        cursor = self._cursor
        if resumed is not None:
            restore(resumed, cursor, self._controller, self._setup)
            is_same_k = resumed["controller"]["accumulation_steps"] == self._controller.accumulation_steps
            self._was_bounded = not is_same_k or resumed["setup"] != self._setup
        elif self.state.global_step:
            place_after_stock_steps(
                cursor,
                self.state.global_step,
                self._controller.micro_batch_samples,
                self._epoch_examples,
                self.state.log_history,
            )
        if self.args.ignore_data_skip:
            cursor.restart_epoch()
        self._initial_samples_seen, self._initial_units = cursor.samples_seen, cursor.units
        self._committed_state = run_state(self._setup, cursor, self._controller)
        self.state.max_steps = self.state.global_step + cursor.remaining_windows(self._controller.accumulation_steps)
        return cursor.epoch, cursor.micro_batch

    def _run_epoch(self, *args, epoch: int, **kwargs):
        kwargs["epoch"] = epoch
        if self._cursor is None:
            return super()._run_epoch(*args, **kwargs)
        if epoch > self._cursor.epoch:  # a callback has stopped the last one early
            self._cursor.close_epoch()
        if self._was_bounded:  # the checkpoint's rate is that of a k or of a micro-batch that this run does not have
            self._was_bounded = False
            self._set_learning_rate()
        self._epoch_is_over = False
        active = self.accelerator.gradient_state.active_dataloader
        self._train_loader, self._other_loader = None, active if active is not kwargs.get("train_dataloader") else None
        try:
            with self._accumulation_steps_shown(1):
                return super()._run_epoch(*args, **kwargs)
        finally:
            self._train_loader = self._other_loader = None

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, *args, **kwargs):
        """Take the micro-batches of one window and hand them to the loop as one batch."""
        if self._cursor is None:
            return super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)
        controller = self._controller
        planned, measures = controller.next_window_steps, controller.measures_next
        wanted = 0 if self._epoch_is_over else min(planned, self._cursor.available())
        if wanted:
            controller.timer.start_window()
        source, count = epoch_iterator, wanted
        if wanted and self._fetches_together:
            source = self._fetch_together(epoch_iterator, wanted)
            count = len(source)
        with self._accumulation_steps_shown(max(1, count)):
            micro_batches, num_items = super().get_batch_samples(iter(source), count, *args, **kwargs)
        self._epoch_is_over |= len(micro_batches) < wanted or self._loader_is_dry()
        if not micro_batches:
            if wanted and self._cursor.micro_batch:
                self._cursor.close_epoch()
            # The loop is set to as many steps as the epoch has micro-batches: let it not count through the rest.
            self.control.should_epoch_stop = True
            self.control.should_training_stop |= self._cursor.exhausted
            return [], num_items
        controller.timer.fetched(len(micro_batches))
        measured = measures and len(micro_batches) * self.args.world_size >= 2
        return [Window(micro_batches, planned, measured)], num_items

    def _loader_is_dry(self) -> bool:
        """Whether the batch that was fetched last is known to be the last of the epoch; call after each fetch.

        Accelerate's loaders look one batch ahead. Which of them is active is a state of the process: it may be one
        that an earlier run, or a callback, has left in the middle, and the loader of this run none of Accelerate's.
        """
        if self._train_loader is None:
            active = self.accelerator.gradient_state.active_dataloader
            self._train_loader = active if active is not self._other_loader else False
        return self._train_loader not in (None, False) and self._train_loader.end_of_dataloader

    def _fetch_together(self, epoch_iterator: Iterator, wanted: int) -> list[Any]:
        """Take up to `wanted` micro-batches, as many as the rank that has the fewest left; all ranks call it.

        A rank that went on alone would wait for ever for the others to reduce gradients, and so would ranks of which
        one takes the epoch for finished. The epoch ends on all of them with the first that is dry.
        """
        micro_batches = list(itertools.islice(epoch_iterator, wanted))
        over = len(micro_batches) < wanted or self._loader_is_dry()
        own = torch.tensor([[len(micro_batches), over]], dtype=torch.int64, device=self.args.device)
        counts, overs = self.accelerator.gather(own).T.tolist()
        self._epoch_is_over |= any(overs)
        if (min(counts) < max(counts) or min(overs) < max(overs)) and not self._warned_of_uneven_ranks:
            self._warned_of_uneven_ranks = True
            logger.warning(
                "Some ranks have more data than others: an epoch ends with the first rank that is dry, and what the "
                "others have left of it is not trained on. Data of the same length on all ranks avoids that."
            )
        return micro_batches[: min(counts)]

    def training_step(self, model, inputs, num_items_in_batch=None, *args, **kwargs):
        """Run the micro-batches of a window; gradients are reduced over ranks in the last one only."""
        if not isinstance(inputs, Window):
            loss = super().training_step(model, inputs, num_items_in_batch, *args, **kwargs)
            if self.accelerator.sync_gradients:
                self._agree_on_flags()
            return loss

        def run(window: Window) -> torch.Tensor:
            return self._run_window(model, window, num_items_in_batch, *args, **kwargs)

        if not self._tried_loss:
            self._try_loss(model, inputs, num_items_in_batch)
        window, loss = self._until_it_fits(inputs, num_items_in_batch, run, self._forget_window)
        timer = self._controller.timer
        timer.micro_batch_done(last=True)
        self._finish_window(window, num_items_in_batch, loss)
        timer.restart()
        return loss

    def _try_loss(self, model, window: Window, num_items_in_batch: Any) -> None:
        """Try on the first micro-batch whether a loss of the user's is divided by the items of the step."""
        self._tried_loss = True
        if not is_in_doubt(self):
            return
        divides = divides_by_items(self, model, window.micro_batches[0], num_items_in_batch)
        for callback in self._measurements:
            callback.step_repeated()  # the tries are no part of the step
        if self.args.world_size > 1:  # a rank without targets cannot tell, and all have to do the same
            told = torch.tensor([divides is False, divides is True], device=self.args.device).float()
            ignoring, dividing = self.accelerator.reduce(told, reduction="sum").tolist()
            divides = None if bool(ignoring) == bool(dividing) else bool(dividing)
        if divides is not False:
            return
        if self.compute_loss_func is None:
            self.model_accepts_loss_kwargs = self._accepts_as_set = False
            logger.warning(_IGNORES_ITEMS, type(self.model).__name__)
        elif own_loss_ignoring_num_items(self) is None:  # of which a warning has told
            logger.warning(
                "compute_loss_func returns the same loss whatever num_items_in_batch is, by which Trainer expects it "
                "to be divided: gradients grow with k. Divide a sum by it, or set `loss_is_scaled_for_ga = False` on "
                "the Trainer if the loss is a mean."
            )

    def compute_loss(self, model, inputs, *args, **kwargs):
        """As in `Trainer`.

        Raises:
            ValueError: There is no loss, since the model is given no labels.
        """
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        except ValueError as error:
            if "did not return a loss" not in str(error):
                raise
            raise ValueError(
                f"{type(model).__name__} returns no loss for what train_dataset and data_collator give it "
                f"({', '.join(inputs)}); add a column of labels (label_names says which they are), or pass a "
                "data_collator that makes them or a compute_loss_func."
            ) from error

    def _run_window(self, model, window: Window, num_items_in_batch: Any, *args, **kwargs) -> torch.Tensor:
        """Run the parts of a window one after the other; return the sum of their losses."""
        timer, steps = self._controller.timer, len(window.parts)
        losses, lacks = [], []
        with self._accumulation_steps_shown(steps), self._norms if window.measured else contextlib.nullcontext():
            self._items = []
            for index, part in enumerate(window.parts):
                last = index == steps - 1
                if window.measured:  # now: a `training_step` of one's own may take the batch apart
                    self._items.append(
                        (count_samples(part.inputs), count_target_tokens(part.inputs, self._loss_shifts_labels))
                    )
                lacks.append(lacks_targets(part.inputs, self._loss_shifts_labels))
                self.current_gradient_accumulation_steps = window.divisor(part)
                self.accelerator.sync_gradients = last
                with contextlib.nullcontext() if self._syncs_in(last) else self._without_reduction(model):
                    part_loss = super().training_step(
                        model, self._inputs_of_try(part), num_items_in_batch, *args, **kwargs
                    )
                losses.append(part_loss)
                if window.measured:
                    self._norms.end_micro_batch()
                if not last:
                    if part.ends_micro_batch:
                        timer.micro_batch_done(last=False)
                    self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
        return window_loss(losses, lacks, self.args.logging_nan_inf_filter)

    def _syncs_in(self, last: bool) -> bool:
        """Whether DDP reduces gradients in a backward pass, of the last micro-batch or of another."""
        if self._ranks is not None:
            return False
        return last or self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)

    def _forget_window(self) -> None:
        """Forget what was counted in a window that is repeated."""
        self._controller.timer.abandon_window()
        if self._finite is not None:
            self._finite.restart_window()
        for callback in self._measurements:
            callback.step_repeated()

    def _without_reduction(self, model):
        """Context in which gradients are not reduced over ranks."""
        if is_sharded_at_load(self) and is_fsdp_managed_module(self.model):
            # Accelerate did not wrap it, so that its `no_sync` does nothing.
            return deferred_fsdp_reduction(self)
        return self.accelerator.no_sync(model)

    def _finish_window(self, window: Window, num_items_in_batch: Any, loss: torch.Tensor) -> None:
        """Count the window, take in its statistics, choose k and place the learning rate for the next one."""
        cursor, controller = self._cursor, self._controller
        if controller.num_windows == 0:
            check_first_loss(self, num_items_in_batch)
        cursor.advance(len(window), end_of_epoch=self._epoch_is_over)
        self._epoch_is_over |= cursor.micro_batch == 0
        next_k, square_norm, sums, divided_by = 0, 0.0, None, None
        rate = self._learning_rate_factor()
        failure: Exception | None = None
        if self.args.process_index == 0:
            try:
                next_k = controller.decide(controller.observe(cursor.progress, rate))
            except Exception as error:  # the others wait for an answer
                next_k, failure = POLICY_FAILED, error
        if window.measured:
            sums, divided_by = self._measured_sums(window, num_items_in_batch)
            share = self._norms.square_norm_share(self.args.process_index, self.args.world_size)
            square_norm = share * self._unscale**2
        vector = to_vector(next_k, window.num_samples, square_norm, sums)
        if self.args.world_size > 1:
            share = loss.detach().double().cpu().reshape(1) / self.args.world_size
            vector = torch.cat([vector, self._window_flags(), share])
            vector = self.accelerator.reduce(vector.to(self.args.device), reduction="sum").cpu()
            self._agree_on_flags(vector[len(REDUCED) : -1].tolist())
            loss = vector[-1]
        next_k, statistics = from_vector(vector[: len(REDUCED)].tolist())
        if next_k == POLICY_FAILED:
            raise failure or RuntimeError("accumulation_policy has failed on rank 0, which says how.")
        if divided_by is not None:
            statistics = with_counted_items(statistics, divided_by)
        if window.measured and self._loss_of_window_is_bad():
            # The step will be skipped, though its gradients may be finite: the loss overflows before they do.
            statistics = replace(statistics, gradient_square_norm=math.nan)
        cursor.samples_seen += statistics.num_samples
        if not self._epoch_is_over:  # the last micro-batch of an epoch may be short
            controller.calibrate(statistics.num_samples, len(window))
        controller.finish_window(window.planned, statistics, window.measured, next_k, rate)
        self._mean_loss.add(loss, len(window), window.planned, self.args.logging_nan_inf_filter)
        self._last_window = (window.planned, statistics.num_samples)
        self._place_learning_rate()

    def _can_go_on(self, skipped_in_a_row: int) -> bool:
        """Infinite losses under fp16 are overflows of the forward pass, which no loss scale mends."""
        return self._leaves_fp16_for(f"the loss of {skipped_in_a_row} optimizer steps in a row was not finite")

    @property
    def _unscale(self) -> float:
        """1/(loss scale): gradients are still scaled when they are measured."""
        scaler = getattr(self.accelerator, "scaler", None)
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        return 1.0 / scale if scale else float("inf")  # halved away: no gradient is finite

    def _measured_sums(self, window: Window, num_items_in_batch: Any) -> tuple[LocalSums, float | None]:
        """This rank's terms of the window's statistics, and what all ranks have divided their losses by, if known."""
        world_size = self.args.world_size
        scaled = loss_is_scaled_for_ga(self)
        if scaled is None:
            scaled = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        samples, tokens = zip(*self._items, strict=True)
        # Without labels the items are some of the user's: micro-batches are taken to weigh the same.
        by_tokens = scaled and num_items_in_batch is not None and None not in tokens
        total = None
        if by_tokens and self.args.average_tokens_across_devices:
            # One number a device under DataParallel, all the same.
            total = float(torch.as_tensor(num_items_in_batch).flatten()[0])
        items = [int(count) for count in (tokens if by_tokens else samples)]
        shares = [part.share for part in window.parts]
        weights = micro_batch_weights(items, world_size, by_tokens, total, shares)
        return local_sums(self._norms.finish(), items, weights, self._unscale / world_size), total

    def _finalize_training(self, *args, **kwargs):
        output = super()._finalize_training(*args, **kwargs)
        mean = None if self._cursor is None else self._mean_loss.overall()
        return output if mean is None else output._replace(training_loss=mean)

    # ---- What callbacks, logs and checkpoints see ------------------------------------------------------------------

    def _before_step_end(self, state) -> None:
        """Runs before any `on_step_end`: the loop has set `state` as if windows were all alike."""
        if self._cursor is None:
            return
        self._controller.timer.step_done()
        state.epoch = self._cursor.reported_epoch
        remaining = self._cursor.remaining_windows(self._controller.accumulation_steps)
        state.max_steps = state.global_step + remaining
        self._committed_state = run_state(self._setup, self._cursor, self._controller)
        # The loop does not step the schedule after a skipped optimizer step (fp16 overflow), but the data were used.
        if self.accelerator.optimizer_step_was_skipped and isinstance(self.lr_scheduler, DataIndexedLR):
            self.lr_scheduler.step()

    def save_model(self, *args, **kwargs):
        """As in `Trainer`."""
        with self._reference_steps_shown():  # `training_args.bin` holds the user's value
            return super().save_model(*args, **kwargs)

    def _push_from_checkpoint(self, *args, **kwargs):
        with self._reference_steps_shown():  # it saves `training_args.bin` as well
            return super()._push_from_checkpoint(*args, **kwargs)

    @property
    def _setup(self) -> dict[str, int]:
        """What the position in the data is counted in."""
        return {
            "per_device_train_batch_size": self._train_batch_size,
            "world_size": self.args.world_size,
            "gradient_accumulation_steps": self._reference_steps,
        }

    def _check_own_state(self, folder: str) -> None:
        if not self.args.auto_find_batch_size:  # which takes the checkpoint's batch size
            self._read_own_state(folder)

    def _read_own_state(self, folder: str) -> dict[str, Any] | None:
        return read_state(folder, self._setup, self._adapts, keeps_place=not self.args.ignore_data_skip)

    def _save_own_state(self, folder: str) -> None:
        if self._cursor is not None:
            # That of the last finished step, since a checkpoint may be asked for in the middle of one.
            write_state(self._committed_state, folder)


class EfficientTrainer(EfficientTrainerMixin, Trainer):
    """Drop-in for `transformers.Trainer`; see `EfficientTrainerMixin` and `EfficientTrainingArguments`."""
