"""`EfficientTrainer`: all that we override of `transformers.Trainer`, in the order in which `Trainer` calls it.

No hook decides anything here. Each hands over to a part (`engine/parts.py` lists them in order) or to
`engine/step.py`, which runs one optimizer step.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from transformers.trainer_utils import has_length

from .accumulation.policy import AccumulationPolicy
from .accumulation.window import Window
from .arguments import in_stock_names, make_efficient
from .core.log_lines import give_back
from .engine.callbacks import PartCallbackHandler
from .engine.parts import Parts
from .engine.step import take_step
from .metrics.base import MeasurementCallback
from .placement.plan.plan import PlacementPlan


if TYPE_CHECKING:
    from .lab.report import Report


class EfficientTrainerMixin:
    """Adaptive gradient accumulation and all other parts for any `Trainer` class: put it before that class.

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

    Attributes:
        trainopt: The parts, for who wants to look at what they do.
    """

    # ---- Making the Trainer ----------------------------------------------------------------------------------------

    def __init__(self, *args, accumulation_policy: AccumulationPolicy | None = None, **kwargs):
        self.trainopt = Parts(self, accumulation_policy)
        self._given_args = kwargs.get("args", args[1] if len(args) > 1 else None)
        with in_stock_names(self._given_args):
            super().__init__(*args, **kwargs)
        self.trainopt.trainer_made()
        self.callback_handler = PartCallbackHandler(self.callback_handler, self.trainopt)

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`, which calls it as soon as there are arguments: they get our settings, and a precision."""
        make_efficient(self.args, self._given_args)
        self.trainopt.precision.choose()
        super().create_accelerator_and_postprocess()
        self.trainopt.checkpoints.make_output_dir()

    @property
    def lr_scheduler(self) -> Any:
        """The schedule. Any that is set while k varies, by an override of `create_scheduler` too, follows the data."""
        return self.__dict__.get("lr_scheduler")

    @lr_scheduler.setter
    def lr_scheduler(self, scheduler: Any) -> None:
        if "trainopt" not in vars(self):  # a class may set it before our `__init__`
            self.__dict__["lr_scheduler"] = scheduler
            return
        self.__dict__["lr_scheduler"] = followed = self.trainopt.learning_rate.followed(scheduler)
        if followed is not scheduler:
            self.trainopt.learning_rate.apply()

    # ---- Before the first step -------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in `Trainer`, from the last *complete* checkpoint; signals are watched once training has begun.

        Raises:
            CheckpointError: No checkpoint could be saved, or the one asked for is not complete or of another set-up (a
                `ValueError`).
            TrainingInterrupted: Ctrl-C, after the checkpoint was saved (a `KeyboardInterrupt`).
            TrainingTerminated: SIGTERM, likewise (a `SystemExit`).
            TrainingDivergedError: `max_skipped_windows` in a row were not finite.
        """
        parts = self.trainopt
        parts.out_of_memory.check_setup()
        parts.accumulation.check_setup()
        parts.resumed_from = parts.checkpoints.find_start(resume_from_checkpoint)
        parts.checkpoints.forget_saves(kwargs.get("trial", args[0] if args else None))
        with parts.run():
            return super().train(parts.resumed_from, *args, **kwargs)

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
        """As in `Trainer`; what a run will do is checked, planned and set up before the model is wrapped."""
        self.trainopt.before_preparing(dataloader)
        values = super().set_initial_training_values(args, dataloader, *other, **kwargs)
        self.trainopt.placement.apply(dataloader)
        return self.trainopt.accumulation.begin(dataloader, values)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial, *args, **kwargs
    ):
        place = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial, *args, **kwargs
        )
        self.trainopt.resumed_from = resume_from_checkpoint  # a class below may have chosen another one
        self.trainopt.load_state()
        return place if self.trainopt.accumulation.cursor is None else self.trainopt.accumulation.place()

    def create_scheduler(self, *args, **kwargs):
        """As in `Trainer`, in reference windows, evaluated by the data consumed."""
        stock = super()
        return self.trainopt.learning_rate.create(lambda: stock.create_scheduler(*args, **kwargs))

    def _load_scaler(self, checkpoint: str | None) -> None:
        # Upstream fails if there is a state and no scaler: fp16 so far, and another precision from here on.
        if getattr(self.accelerator, "scaler", None) is not None:
            super()._load_scaler(checkpoint)

    # ---- An epoch --------------------------------------------------------------------------------------------------

    def _run_epoch(self, *args, **kwargs):
        with self.trainopt.epoch(**kwargs):
            return super()._run_epoch(*args, **kwargs)

    def _load_rng_state(self, checkpoint):
        stock = super()
        self.trainopt.random_data.load(lambda: stock._load_rng_state(checkpoint))

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, *args, **kwargs):
        """As in `Trainer`; the micro-batches of a window are handed to the loop as one batch."""
        parts, stock = self.trainopt, super()

        def fetch(iterator: Iterator, count: int) -> tuple[list[Any], Any]:
            micro_batches, num_items = stock.get_batch_samples(iterator, count, *args, **kwargs)
            parts.placement.saw(micro_batches)
            return micro_batches, num_items

        if parts.accumulation.cursor is None:
            return fetch(epoch_iterator, num_batches)
        return parts.accumulation.next_window(fetch, epoch_iterator)

    def _track_num_input_tokens(self, inputs):
        for micro_batch in inputs.micro_batches if isinstance(inputs, Window) else [inputs]:
            super()._track_num_input_tokens(micro_batch)

    def training_step(self, model, inputs, num_items_in_batch=None, *args, **kwargs):
        """As in `Trainer`; of a `Window`, all of its micro-batches are run (see `engine/step.py`)."""
        parts, stock = self.trainopt, super()

        def stock_step(inputs: Any) -> torch.Tensor:
            return stock.training_step(model, inputs, num_items_in_batch, *args, **kwargs)

        if isinstance(inputs, Window):
            return take_step(parts, stock_step, model, inputs, num_items_in_batch)
        loss = parts.skipped_steps.run_micro_batch(inputs, stock_step)
        if self.accelerator.sync_gradients:
            parts.agree_on_flags()
        return loss

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

    def floating_point_ops(self, inputs, *args, **kwargs):
        """As in `Trainer`; the sum over the micro-batches of a window."""
        total = 0  # not a generator: zero-argument `super()` does not reach into one
        for micro_batch in inputs.micro_batches if isinstance(inputs, Window) else [inputs]:
            total += super().floating_point_ops(micro_batch, *args, **kwargs)
        return total

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        self.trainopt.skipped_steps.judge(norm)
        return norm

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if grad_norm is None:  # else it was clipped, and judged
            self.trainopt.skipped_steps.judge(norm)
        return norm

    # ---- Logs, evaluations -----------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in `Trainer`, with what the parts have to say on every line; docs/evidence.md lists the keys."""
        parts = self.trainopt
        parts.accumulation.correct_line(logs)
        with parts.accumulation.reference_steps_shown():
            added = parts.log_values(logs)
            line = {**logs, **added}
            super().log(line, *args, **kwargs)
        give_back(logs, line, added.keys() - parts.placement.logged_keys)  # peaks are results of `train`, too

    def evaluation_loop(self, *args, **kwargs):
        """As in `Trainer`; an error of memory says whose it is."""
        with self.trainopt.out_of_memory.evaluation():
            return super().evaluation_loop(*args, **kwargs)

    # ---- Saving ----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial, *args, **kwargs):
        stock = super()
        self.trainopt.checkpoints.save(lambda: stock._save_checkpoint(model, trial, *args, **kwargs), trial)

    def save_model(self, *args, **kwargs):
        """As in `Trainer`; `training_args.bin` holds the user's values."""
        checkpoints = self.trainopt.checkpoints
        with self.trainopt.accumulation.reference_steps_shown(), checkpoints.limit_shown():
            return checkpoints.piece(super().save_model, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, *args, **kwargs):
        return self.trainopt.checkpoints.piece(super()._save_optimizer_and_scheduler, *args, **kwargs)

    def _save_scaler(self, *args, **kwargs):
        return self.trainopt.checkpoints.piece(super()._save_scaler, *args, **kwargs)

    def _save_rng_state(self, output_dir):
        stock = super()

        def save() -> None:
            stock._save_rng_state(output_dir)
            self.trainopt.random_data.save(output_dir)

        return self.trainopt.checkpoints.piece(save)

    def save_state(self) -> None:
        """As in `Trainer`, with the state of the parts beside `trainer_state.json`."""
        super().save_state()
        if self.args.should_save:
            self.trainopt.write_state(self.args.output_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str, *args, **kwargs):
        if not self.trainopt.checkpoints.puts_off_push(checkpoint_folder):
            with self.trainopt.accumulation.reference_steps_shown():  # it saves `training_args.bin` as well
                super()._push_from_checkpoint(checkpoint_folder, *args, **kwargs)

    def create_model_card(self, *args, **kwargs) -> None:
        """As in `Trainer`; what we log beside evaluations is not a result of theirs."""
        history = self.state.log_history
        is_ours = self.trainopt.is_logged_key
        self.state.log_history = [{k: v for k, v in entry.items() if not is_ours(k)} for entry in history]
        try:
            super().create_model_card(*args, **kwargs)
        finally:
            self.state.log_history = history

    # ---- The end of a run ------------------------------------------------------------------------------------------

    def _finalize_training(self, trial, *args, **kwargs):
        parts = self.trainopt
        parts.skipped_steps.settle()
        with parts.checkpoints.last_save(trial):
            output = super()._finalize_training(trial, *args, **kwargs)
            parts.measurements.run_is_over()
        mean = parts.accumulation.mean_loss
        return output if mean is None else output._replace(training_loss=mean)

    # ---- What a user asks a Trainer --------------------------------------------------------------------------------

    @property
    def accumulation_policy(self) -> AccumulationPolicy:
        """What k should be."""
        return self.trainopt.accumulation.policy

    @property
    def accumulation_range(self) -> tuple[int, int, int] | None:
        """Least, largest and present k of the last `train`, in the data loader's micro-batches; `None` if stock."""
        return self.trainopt.accumulation.used_range

    @property
    def micro_batch_size(self) -> int:
        """Most samples that go through the model of one rank at once in training."""
        return self.trainopt.out_of_memory.micro_batch_size

    @property
    def placement_plan(self) -> PlacementPlan | None:
        """The plan of the present or last run, where a placement was asked for."""
        return self.trainopt.placement.plan

    @property
    def measurements(self) -> list[MeasurementCallback]:
        """Measuring callbacks: the user's, and those that the arguments ask for."""
        return self.trainopt.measurements.all

    def report(self, *others: Any, **options: Any) -> "Report":
        """Return what this run has done so far; a notebook shows it.

        Args:
            *others: Output folders of other runs to see beside it.
            **options: As for `hf_trainopt.lab.report.make_report`: `baseline` (unless given: this run),
                `target_metric` and `target_value`, `greater_is_better`, `title`.

        Raises:
            ValueError: Nothing has been logged yet, or another folder has no run in it.
        """
        from .lab.report import make_report
        from .lab.report.running import run_in_memory

        if not self.state.log_history:
            raise ValueError("there is nothing to report yet: no line has been logged; call it after train().")
        return make_report(run_in_memory(self), *others, **options)


class EfficientTrainer(EfficientTrainerMixin, Trainer):
    """Drop-in for `transformers.Trainer`; see `EfficientTrainerMixin` and `EfficientTrainingArguments`."""
