"""`EfficientTrainer`: wires the parts into the public hooks of `transformers.Trainer`."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint, has_length

from .accumulation.controller import STATE_VERSION, AccumulationController
from .accumulation.cursor import DataCursor
from .accumulation.gradient_norms import MicroBatchNorms, gradient_square_norm
from .accumulation.noise_scale import NoiseScaleTracker
from .accumulation.policy import AccumulationPolicy, FixedPolicy
from .accumulation.timing import StepTimer
from .accumulation.window import (
    LocalSums,
    Window,
    count_samples,
    count_target_tokens,
    from_vector,
    local_sums,
    to_vector,
)
from .args import EfficientTrainingArgumentsMixin
from .checks import check_adaptive_setup, check_resumed_state
from .flow import WindowCallbackHandler, put_on_data_axis
from .schedule import METRIC_DRIVEN, DataIndexedLR, batch_scaling_factor, is_adaptive_optimizer


logger = logging.getLogger(__name__)

ACCUMULATION_STATE_NAME = "accumulation_state.json"


class EfficientTrainerMixin:
    """Adaptive gradient accumulation for any `Trainer` class: put it before that class.

    One accumulation window is one step of the upstream loop: `get_batch_samples` hands the loop a single `Window`, and
    `training_step` runs its micro-batches, gradients synchronised in the last one only. With
    `accumulation_policy="fixed"` (and nothing measured) none of this is in play and the loop is stock.

    Args:
        *args: As for `Trainer`.
        accumulation_policy (`AccumulationPolicy`, *optional*): Your own policy in place of the one that
            `args.accumulation_policy` names: a callable from `Observation` to the k it would like (`None`: hold).
        **kwargs: As for `Trainer`.

    Raises:
        ValueError: `args` is no `EfficientTrainingArguments`, or something asked for cannot work with varying k.
    """

    def __init__(self, *args, accumulation_policy: AccumulationPolicy | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, EfficientTrainingArgumentsMixin):
            raise ValueError(
                f"args is a {type(self.args).__name__}; pass EfficientTrainingArguments (or a subclass of "
                "EfficientTrainingArgumentsMixin and your TrainingArguments)."
            )
        self._has_own_policy = accumulation_policy is not None
        self.accumulation_policy = (
            accumulation_policy if self._has_own_policy else self.args.make_accumulation_policy()
        )
        self._reference_steps = self.args.gradient_accumulation_steps
        self._cursor: DataCursor | None = None
        self._controller: AccumulationController | None = None
        self._norms: MicroBatchNorms | None = None
        self._resumed_state: dict[str, Any] | None = None
        self._initial_samples_seen = 0
        self._epoch_examples = 0
        self._last_window: tuple[int, int] | None = None
        self._epoch_is_over = False
        if self._adapts:
            check_adaptive_setup(self, self._measures)
        self.callback_handler = WindowCallbackHandler(
            self.callback_handler, self._reference_steps_shown, self._before_step_end
        )
        self.callback_handler.callbacks = put_on_data_axis(self.callback_handler.callbacks, lambda: self._cursor)

    # ---- What is in play -------------------------------------------------------------------------------------------

    @property
    def _measures(self) -> bool:
        """Whether gradient statistics are taken."""
        if self.args.measure_noise_scale is not None:
            return self.args.measure_noise_scale
        named = self.args.accumulation_policy in ("noise_scale", "goodput")
        return named or self.args.lr_batch_scaling == "gain" or self._has_own_policy

    @property
    def _adapts(self) -> bool:
        """Whether training goes through windows at all; if not, everything is stock."""
        return self._measures or not isinstance(self.accumulation_policy, FixedPolicy)

    # ---- The loop --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _accumulation_steps_shown(self, value: int) -> Iterator[None]:
        before = self.args.gradient_accumulation_steps
        self.args.gradient_accumulation_steps = value
        try:
            yield
        finally:
            self.args.gradient_accumulation_steps = before

    def _reference_steps_shown(self):
        """Context in which `args.gradient_accumulation_steps` is the user's (stock: it always is)."""
        if self._cursor is None:
            return contextlib.nullcontext()
        return self._accumulation_steps_shown(self._reference_steps)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As `Trainer.train`; a checkpoint that was written with varying k resumes at the exact micro-batch.

        Raises:
            ValueError: The checkpoint was written with another micro-batch size, number of ranks or k_ref.
        """
        self._resumed_state = None
        self._cursor = self._controller = None
        # Arguments may have changed since the last call (hyperparameter search).
        self._reference_steps = self.args.gradient_accumulation_steps
        if not self._has_own_policy:
            self.accumulation_policy = self.args.make_accumulation_policy()
        if self._adapts:
            check_adaptive_setup(self, self._measures)
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir) if os.path.isdir(self.args.output_dir) else None
        if checkpoint:
            path = os.path.join(checkpoint, ACCUMULATION_STATE_NAME)
            if os.path.isfile(path):
                with open(path, encoding="utf-8") as file:
                    self._resumed_state = json.load(file)
                check_resumed_state(self._resumed_state, self._setup, path, self._adapts)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def set_initial_training_values(self, args, dataloader, *other, **kwargs):
        """Let the loop run as many steps as there can be windows; schedules stay in reference windows."""
        values = super().set_initial_training_values(args, dataloader, *other, **kwargs)
        if not self._adapts:
            return values
        epochs, _, examples, samples, total_batch, steps_in_epoch, max_steps = values
        self._epoch_examples = examples
        sized = has_length(dataloader)
        self._cursor = DataCursor(
            reference_steps=self._reference_steps,
            budget=max_steps,
            micro_batches_per_epoch=steps_in_epoch if sized else None,
            epoch_length=steps_in_epoch,
        )
        minimum, maximum = args.accumulation_bounds
        half_life = args.noise_scale_half_life
        if half_life < 1:
            half_life *= max_steps * self._reference_steps * self._train_batch_size * args.world_size
        device = args.device
        self._controller = AccumulationController(
            policy=self.accumulation_policy,
            reference_steps=self._reference_steps,
            minimum=minimum,
            maximum=maximum,
            world_size=args.world_size,
            micro_batch_size=self._train_batch_size,
            tracker=NoiseScaleTracker(half_life) if self._measures else None,
            measure_interval=args.noise_scale_interval,
            timer=StepTimer(
                synchronize=None if device.type == "cpu" else torch.accelerator.synchronize,
                distributed=args.world_size > 1,
                interval=1 if device.type == "cpu" else args.noise_scale_interval,
            ),
        )
        self._norms = MicroBatchNorms(self.model.parameters(), device) if self._measures else None
        self._last_window = None
        # k >= 1, so an epoch has at most as many windows as micro-batches; an iterator that is dry ends it earlier.
        return epochs, steps_in_epoch, examples, samples, total_batch, steps_in_epoch, max_steps

    def _init_training_state(self, *args, **kwargs):
        epochs, micro_batches = super()._init_training_state(*args, **kwargs)
        if self._cursor is None:
            return epochs, micro_batches
        if self._resumed_state is not None:
            for name, value in self._resumed_state["cursor"].items():
                setattr(self._cursor, name, value)
            self._controller.load_state_dict(self._resumed_state["controller"])
        elif self.state.global_step:
            self._place_cursor_of_stock_checkpoint()
        self._initial_samples_seen = self._cursor.samples_seen
        self.state.max_steps = self.state.global_step + self._cursor.remaining_windows(
            self._controller.accumulation_steps
        )
        return self._cursor.epoch, 0 if self.args.ignore_data_skip else self._cursor.micro_batch

    def _place_cursor_of_stock_checkpoint(self) -> None:
        """A checkpoint of stock Trainer: every step was a reference window."""
        cursor, k = self._cursor, self._reference_steps
        length = cursor.micro_batches_per_epoch or cursor.budget_units
        windows_per_epoch = -(-length // k)
        cursor.epoch, windows = divmod(self.state.global_step, windows_per_epoch)
        cursor.finished_windows = cursor.epoch * windows_per_epoch
        cursor.micro_batch = windows * k
        micro_batch_samples = self._train_batch_size * self.args.world_size
        epoch_samples = min(length * micro_batch_samples, self._epoch_examples)
        cursor.samples_seen = cursor.epoch * epoch_samples + cursor.micro_batch * micro_batch_samples
        logger.info("The checkpoint has no %s: taken as written at k = %d throughout.", ACCUMULATION_STATE_NAME, k)

    def _run_epoch(self, *args, **kwargs):
        if self._cursor is None:
            return super()._run_epoch(*args, **kwargs)
        self._epoch_is_over = False
        with self._accumulation_steps_shown(1):
            return super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, *args, **kwargs):
        """Take the micro-batches of one window and hand them to the loop as one batch."""
        if self._cursor is None:
            return super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)
        controller = self._controller
        planned, measures = controller.next_window_steps, controller.measures_next
        wanted = 0 if self._epoch_is_over else min(planned, self._cursor.available())
        if wanted:
            controller.timer.start_window()
        with self._accumulation_steps_shown(max(1, wanted)):
            micro_batches, num_items = super().get_batch_samples(epoch_iterator, wanted, *args, **kwargs)
        if len(micro_batches) < wanted:
            self._epoch_is_over = True
        if not micro_batches:
            if self._cursor.micro_batch:
                self._cursor.close_epoch()
            # The loop is set to as many steps as the epoch has micro-batches: let it not count through the rest.
            self.control.should_epoch_stop = True
            return [], num_items
        controller.timer.fetched(len(micro_batches))
        measured = measures and len(micro_batches) * self.args.world_size >= 2
        return [Window(micro_batches, planned, measured)], num_items

    def training_step(self, model, inputs, num_items_in_batch=None, *args, **kwargs):
        """Run the micro-batches of a window; gradients are reduced over ranks in the last one only."""
        if not isinstance(inputs, Window):
            return super().training_step(model, inputs, num_items_in_batch, *args, **kwargs)
        window, timer = inputs, self._controller.timer
        steps = len(window)
        self.current_gradient_accumulation_steps = steps
        loss = None
        with self._accumulation_steps_shown(steps), self._norms if window.measured else contextlib.nullcontext():
            for index, micro_batch in enumerate(window.micro_batches):
                last = index == steps - 1
                self.accelerator.sync_gradients = last
                with contextlib.nullcontext() if last or self._syncs_each_batch else self.accelerator.no_sync(model):
                    part = super().training_step(model, micro_batch, num_items_in_batch, *args, **kwargs)
                loss = part if loss is None else loss + part
                if window.measured:
                    self._norms.end_micro_batch()
                timer.micro_batch_done(last)
                if not last:
                    self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
        self._finish_window(window, num_items_in_batch)
        timer.restart()
        return loss

    @property
    def _syncs_each_batch(self) -> bool:
        return self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)

    def _finish_window(self, window: Window, num_items_in_batch: Any) -> None:
        """Count the window, take in its statistics, choose k and place the learning rate for the next one."""
        cursor, controller = self._cursor, self._controller
        samples = sum(count_samples(micro_batch) for micro_batch in window.micro_batches)
        next_k, square_norm, sums = 0, 0.0, None
        if self.args.process_index == 0:
            next_k = controller.decide(controller.observe(cursor.progress, self._learning_rate_factor()))
        if window.measured:
            sums = self._measured_sums(window, num_items_in_batch)
            if self.args.process_index == 0:
                square_norm = gradient_square_norm(self.model.parameters(), self.args.device) * self._unscale**2
        vector = to_vector(next_k, samples, square_norm, sums)
        if self.args.world_size > 1:
            vector = self.accelerator.reduce(vector.to(self.args.device), reduction="sum").cpu()
        next_k, statistics = from_vector(vector.tolist())
        controller.finish_window(window.planned, statistics, window.measured, next_k)
        cursor.advance(len(window), statistics.num_samples, end_of_epoch=self._epoch_is_over)
        self._epoch_is_over |= cursor.micro_batch == 0
        self._last_window = (window.planned, statistics.num_samples)
        self._place_learning_rate()

    @property
    def _unscale(self) -> float:
        """1/(loss scale): gradients are still scaled when they are measured."""
        scaler = getattr(self.accelerator, "scaler", None)
        return 1.0 / scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0

    def _measured_sums(self, window: Window, num_items_in_batch: Any) -> LocalSums:
        """This rank's terms of the window's statistics."""
        world_size = self.args.world_size
        by_tokens = num_items_in_batch is not None and (
            self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        )
        if by_tokens:
            # The loss of each micro-batch was divided by the items of the window, on all ranks or on this one.
            items = [count_target_tokens(batch, self._loss_shifts_labels) for batch in window.micro_batches]
            if self.args.average_tokens_across_devices:
                weights = [n / float(num_items_in_batch) for n in items]
            else:
                weights = [n / (sum(items) * world_size) for n in items]
        else:
            # The loss of each micro-batch is a mean of its own, divided by their number.
            items = [count_samples(batch) for batch in window.micro_batches]
            weights = [1.0 / (len(window) * world_size)] * len(window)
        return local_sums(self._norms.finish(), items, weights, self._unscale / world_size)

    # ---- Learning rate ---------------------------------------------------------------------------------------------

    def create_scheduler(self, *args, **kwargs):
        """As in `Trainer`, in reference windows, evaluated by the data consumed."""
        scheduler = super().create_scheduler(*args, **kwargs)
        if self._cursor is None:
            return scheduler
        if isinstance(scheduler, METRIC_DRIVEN):
            if self.args.lr_batch_scaling != "none":
                raise ValueError(
                    f"lr_batch_scaling='{self.args.lr_batch_scaling}' does not work with lr_scheduler_type="
                    f"'{self.args.lr_scheduler_type}', which sets the rate itself; set it to 'none'."
                )
            return scheduler
        inner = scheduler.inner if isinstance(scheduler, DataIndexedLR) else scheduler
        self.lr_scheduler = DataIndexedLR(inner)
        self._place_learning_rate()
        self.lr_scheduler.step()
        return self.lr_scheduler

    def _learning_rate_factor(self) -> float:
        return self.lr_scheduler.factor() if isinstance(self.lr_scheduler, DataIndexedLR) else 1.0

    def _place_learning_rate(self) -> None:
        """Tell the schedule where the next window begins and how large it will be."""
        if not isinstance(self.lr_scheduler, DataIndexedLR):
            return
        controller, rule = self._controller, self.args.lr_batch_scaling
        noise = controller.noise if rule == "gain" else None
        micro_batch_samples = controller.micro_batch_size * controller.world_size
        factor = batch_scaling_factor(
            rule,
            controller.next_window_steps,
            self._reference_steps,
            noise.value / micro_batch_samples if noise is not None and noise.resolved else None,
            is_adaptive_optimizer(self.optimizer),
        )
        self.lr_scheduler.set_position(self._cursor.reference_position, factor)

    # ---- What callbacks, logs and checkpoints see ------------------------------------------------------------------

    def _before_step_end(self, state) -> None:
        """Runs before any `on_step_end`: the loop has set `state` as if windows were all alike."""
        if self._cursor is None:
            return
        self._controller.timer.step_done()
        state.epoch = self._cursor.reported_epoch
        remaining = self._cursor.remaining_windows(self._controller.accumulation_steps)
        state.max_steps = state.global_step + remaining
        # The loop does not step the schedule after a skipped optimizer step (fp16 overflow), but the data were used.
        if self.accelerator.optimizer_step_was_skipped and isinstance(self.lr_scheduler, DataIndexedLR):
            self.lr_scheduler.step()

    def floating_point_ops(self, inputs, *args, **kwargs):
        """As in `Trainer`; the sum over the micro-batches of a window."""
        if not isinstance(inputs, Window):
            return super().floating_point_ops(inputs, *args, **kwargs)
        # Not a generator: zero-argument `super()` does not reach into one.
        total = 0
        for micro_batch in inputs.micro_batches:
            total += super().floating_point_ops(micro_batch, *args, **kwargs)
        return total

    def _track_num_input_tokens(self, inputs):
        for micro_batch in inputs.micro_batches if isinstance(inputs, Window) else [inputs]:
            super()._track_num_input_tokens(micro_batch)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in `Trainer`, with k, batch, noise scale and samples on every line (not if everything is stock).

        Logged keys: `accumulation_steps` (k decided for the last window), `effective_batch_size` (samples that it had
        over all ranks), `samples_seen` (over all ranks), and once measured `noise_scale`, `noise_scale_low`,
        `noise_scale_high` (B_noise and its 95 % interval, in samples; absent where infinite).
        """
        if self._cursor is not None and "train_samples_per_second" in logs and logs.get("train_runtime"):
            # Upstream takes the share of steps for the share of the data.
            samples = self._cursor.samples_seen - self._initial_samples_seen
            logs["train_samples_per_second"] = round(samples / logs["train_runtime"], 3)
        ours = self._accumulation_logs()
        line = {**logs, **ours}
        with self._reference_steps_shown():
            super().log(line, *args, **kwargs)
        # What upstream adds in place (`epoch`) goes back to the caller, whose dict may be the result of `evaluate`.
        logs.update({key: value for key, value in line.items() if key not in ours})

    def _accumulation_logs(self) -> dict[str, float]:
        if self._cursor is None or self._last_window is None:
            return {}
        k, samples = self._last_window
        logs = {"accumulation_steps": k, "effective_batch_size": samples, "samples_seen": self._cursor.samples_seen}
        noise = self._controller.noise
        if noise is not None:
            for key, value in (("", noise.value), ("_low", noise.lower), ("_high", noise.upper)):
                if value < float("inf"):
                    logs[f"noise_scale{key}"] = value
        return logs

    def save_model(self, *args, **kwargs):
        """As in `Trainer`."""
        with self._reference_steps_shown():  # `training_args.bin` holds the user's value
            return super().save_model(*args, **kwargs)

    @property
    def _setup(self) -> dict[str, int]:
        """What the position in the data is counted in."""
        return {
            "per_device_train_batch_size": self._train_batch_size,
            "world_size": self.args.world_size,
            "gradient_accumulation_steps": self._reference_steps,
        }

    def _save_optimizer_and_scheduler(self, output_dir: str, *args, **kwargs) -> None:
        super()._save_optimizer_and_scheduler(output_dir, *args, **kwargs)
        if self._cursor is None or not self.args.should_save:
            return
        state = {
            "version": STATE_VERSION,
            "setup": self._setup,
            "cursor": self._cursor.state_dict(),
            "controller": self._controller.state_dict(),
        }
        with open(os.path.join(output_dir, ACCUMULATION_STATE_NAME), "w", encoding="utf-8") as file:
            json.dump(state, file, indent=1)


class EfficientTrainer(EfficientTrainerMixin, Trainer):
    """Drop-in for `transformers.Trainer`; see `EfficientTrainerMixin` and `EfficientTrainingArguments`."""
