"""Checkpoints as a part: complete or not there, on all ranks; the last complete one is never given up."""

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

from accelerate.utils import gather_object
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from ..core.facts import is_sharded
from ..core.installed import installed_version
from ..core.part import Part
from ..core.state import read_state, write_state
from .manifest import complete, discard, is_leftover, refresh
from .resume import (
    Checkpoint,
    CheckpointError,
    check_named,
    describe_skipped,
    find_last_complete,
    last_checkpoint,
)
from .saving import SaveAttempt, check_output_dir, give_up, make_output_dir, make_room, replaced_path, surplus


logger = logging.getLogger(__name__)


class CheckpointsPart(Part):
    """Saves complete checkpoints, and finds the one to resume from.

    Attributes:
        failure: Why the last save came to nothing; `None` if it didn't.
    """

    name = "checkpoints"

    def __init__(self, trainer: Any, parts: Any):
        super().__init__(trainer, parts)
        self._attempt: SaveAttempt | None = None
        self._user_limit: int | None = None
        self._latest_step = math.inf
        self._first_step = 0
        self._trial: Any = None  # of a hyperparameter search, whose checkpoints have a folder of their own
        self.forget_saves()

    def on_train_begin(self, args, state, control, **kwargs):
        self._first_step = state.global_step

    def on_train_end(self, args, state, control, **kwargs):
        if state.global_step == self._first_step > 0 and args.should_log:
            logger.warning(
                "Nothing was trained: the checkpoint of step %d is at the end of this run already, or past it. Raise "
                "num_train_epochs or max_steps to train on, or leave resume_from_checkpoint out to begin anew.",
                state.global_step,
            )

    def make_output_dir(self) -> None:
        """Make the output folder before upstream does, with an error of ours if that can't be done."""
        if self.trainer.args.should_save:
            make_output_dir(self.trainer.args.output_dir)

    def forget_saves(self, trial: Any = None) -> None:
        """Begin a run, of a trial of a hyperparameter search if there is one."""
        self._trial = trial
        self.failure: str | None = None
        self._saved_step: int | None = None
        self._saved_folder: str | None = None

    @property
    def is_saved(self) -> bool:
        """Whether the present step is in a checkpoint."""
        return self._saved_step == self.trainer.state.global_step

    @property
    def _is_collective(self) -> bool:
        """Whether ranks do the pieces of a save together."""
        return is_sharded(self.trainer)

    def _from_all_ranks(self, value: Any) -> list[Any]:
        return gather_object([value]) if self.trainer.args.world_size > 1 else [value]

    # ---- Before training -------------------------------------------------------------------------------------------

    def find_start(self, asked: str | bool | None) -> str | None:
        """Return the checkpoint to resume from; whatever would fail later fails here, on all ranks.

        Args:
            asked: `resume_from_checkpoint`.

        Raises:
            CheckpointError: No checkpoint could be saved, or the one asked for can't be resumed from.
        """
        self._latest_step = math.inf
        while True:
            problem = path = None
            if self.trainer.args.should_save:  # one process for each disk
                try:
                    path = self._checkpoint_asked_for(asked)
                except ValueError as error:
                    problem = str(error)
            found = self._from_all_ranks((self.trainer.args.should_save, path, problem))
            for _, _, other in found:
                if other is not None:
                    raise CheckpointError(other)
            paths = [path for saves, path, _ in found if saves]
            steps = {int(path.rpartition("-")[2]) for path in paths} if asked is True else {0}
            if len(steps) == 1:
                return path or paths[0]
            # Nodes with disks of their own: the last checkpoint that all of them have in full.
            self._latest_step = min(steps)

    def _checkpoint_asked_for(self, asked: str | bool | None) -> str | None:
        args, model = self.trainer.args, self.trainer.model
        if args.save_strategy != "no" or self.parts.interrupts.is_on:
            # A search with Ray leaves the model to `train`.
            parameters = model.parameters() if model is not None else ()
            weights = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
            check_output_dir(args.output_dir, 0 if self._is_collective else weights)
        if not asked:
            return None
        if asked is True:
            chosen, skipped = last_checkpoint(args.output_dir, self._latest_step)
            if skipped:
                logger.warning("Resuming from %s; passed over: %s.", chosen.path, describe_skipped(skipped))
        else:
            chosen = check_named(os.fspath(asked))
        if not chosen.has_manifest:
            logger.warning(
                "%s has no manifest (stock Trainer wrote it, or an older hf_trainopt): its files look whole, but "
                "that it is complete is not certain.",
                chosen.path,
            )
        if not args.auto_find_batch_size:  # which takes the checkpoint's batch size
            saved = read_state(chosen.path)
            if saved is not None:
                accumulation = self.parts.accumulation
                accumulation.check_state(chosen.path, saved.parts.get(accumulation.name), saved.setup)
        return chosen.path

    def last_complete(self, before: float = math.inf) -> Checkpoint | None:
        """Return the last complete checkpoint of this run, of a step up to `before`; `None` if there is none."""
        # Of later steps there may be some too: an earlier run's in the same folder.
        run_dir, step = self.trainer._get_output_dir(self._trial), self.trainer.state.global_step
        return find_last_complete(run_dir, min(before, step))[0]

    # ---- Saving ----------------------------------------------------------------------------------------------------

    def save(self, stock_save: Callable[[], None], trial: Any) -> None:
        """Save a checkpoint.

        Args:
            stock_save: Upstream's `_save_checkpoint`.
            trial: Of a hyperparameter search.
        """
        self.parts.skipped_steps.settle()
        trainer, args = self.trainer, self.trainer.args
        step, run_dir = trainer.state.global_step, trainer._get_output_dir(trial)
        attempt = SaveAttempt(os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}"), self._is_collective)
        best, limit = trainer.state.best_model_checkpoint, args.save_total_limit
        if args.should_save:
            with attempt.noting_errors():
                make_room(attempt.folder)
                write_state(self.parts.state(), attempt.folder)
        self._from_all_ranks(None)  # nobody writes into a folder that is being moved
        self._attempt, self._user_limit = attempt, limit
        args.save_total_limit = None  # old checkpoints go when the new one is complete
        try:
            with attempt.noting_errors():
                stock_save()
        finally:
            self._attempt, args.save_total_limit = None, limit
        if not self._agree_on_save(attempt) and args.should_save:
            with attempt.noting_errors():
                complete(attempt.folder, self._manifest_facts())
        self.failure = self._agree_on_save(attempt)
        if self.failure is not None:
            self._report_failed_save(attempt, best)
            return
        self._saved_step, self._saved_folder = step, attempt.folder
        if args.should_save:
            discard(replaced_path(attempt.folder))
            self._rotate(run_dir, attempt.folder)
        if attempt.to_push is not None:
            trainer._push_from_checkpoint(attempt.to_push)

    def save_now(self) -> None:
        """Save the present step out of turn, and tell callbacks."""
        trainer = self.trainer
        trainer._save_checkpoint(trainer.model, self._trial)
        trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)

    def callbacks_saved(self) -> None:
        """Take what callbacks have made of a checkpoint (`on_save`) for what it is; otherwise none would be whole."""
        folder = self._saved_folder
        if self.trainer.args.should_save and folder is not None and os.path.isdir(folder):
            try:
                changed = refresh(folder)
            except (OSError, ValueError) as error:
                logger.error("A callback has changed %s, whose manifest cannot be written anew: %s.", folder, error)
                return
            if changed:
                logger.info("A callback has changed %s; its manifest was written anew.", folder)

    def _agree_on_save(self, attempt: SaveAttempt) -> str | None:
        """Return the error of any rank; all ranks have come to here."""
        return next((error for error in self._from_all_ranks(attempt.error) if error is not None), None)

    def _manifest_facts(self) -> dict[str, Any]:
        packages = ("hf-trainopt", "torch", "transformers", "accelerate")
        return {
            "global_step": self.trainer.state.global_step,
            "versions": {name: installed_version(name) for name in packages},
        }

    def _report_failed_save(self, attempt: SaveAttempt, best: str | None) -> None:
        if self.trainer.args.should_save:
            give_up(attempt.folder)
        self.trainer.state.best_model_checkpoint = best
        if self.trainer.args.should_log:
            last = self.last_complete()
            logger.error(
                "%s could not be saved (%s). Training goes on, the next save is another try, and the last complete "
                "checkpoint is %s.",
                attempt.name,
                self.failure,
                "none so far" if last is None else last.path,
            )

    def _good_checkpoint(self) -> str | None:
        """Return a checkpoint that is needed whatever its age.

        Saves between windows that aren't finite must not push out the one to go back to.
        """
        step = self.parts.skipped_steps.last_good_step
        good = None if step is None else self.last_complete(step)
        return None if good is None else good.path

    def _rotate(self, run_dir: str, newest: str) -> None:
        folders = sort_checkpoints(run_dir, use_mtime=True) if self.trainer.args.save_total_limit else []
        leftovers = [folder for folder in folders if is_leftover(folder)]
        keep = [newest, self.trainer.state.best_model_checkpoint, self._good_checkpoint() if folders else None]
        for folder in surplus(folders, keep, self.trainer.args.save_total_limit, leftovers):
            logger.info("Deleting older checkpoint [%s] due to args.save_total_limit", folder)
            discard(folder)

    # The pieces of a save: one that fails leaves the others out, so that all ranks come to the end of it.

    def piece(self, save_piece: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Save a piece of a checkpoint (weights, optimizer, ...), unless an earlier one has failed.

        Args:
            save_piece: Upstream's way.
            *args: For `save_piece`.
            **kwargs: For `save_piece`.
        """
        if self._attempt is None:
            return save_piece(*args, **kwargs)
        if self._attempt.error is None:
            with self._attempt.noting_errors():
                return save_piece(*args, **kwargs)
        return None

    @contextlib.contextmanager
    def limit_shown(self) -> Iterator[None]:
        """Context in which `args.save_total_limit` is the user's, for `training_args.bin`."""
        if self._attempt is None:
            yield
            return
        args = self.trainer.args
        args.save_total_limit = self._user_limit
        try:
            yield
        finally:
            args.save_total_limit = None

    def puts_off_push(self, checkpoint_folder: str) -> bool:
        """Return whether a checkpoint is pushed later, once it is complete."""
        if self._attempt is None:
            return False
        self._attempt.to_push = checkpoint_folder
        return True

    @contextlib.contextmanager
    def last_save(self, trial: Any) -> Iterator[None]:
        """Context of the end of a run: a save that failed is tried once more.

        Raises:
            RuntimeError: The run leaves no checkpoint behind.
        """
        if self.failure is not None:
            self.trainer._save_checkpoint(self.trainer.model, trial)
        yield
        if self.failure is not None:
            self._end_without_last_save(trial)

    def _end_without_last_save(self, trial: Any) -> None:
        """Raise if the run leaves nothing behind; the weights are tried alone, which take a third of the space."""
        last = None
        if self.trainer.args.should_save:
            last = find_last_complete(self.trainer._get_output_dir(trial))[0]
        last = next((found for found in self._from_all_ranks(last) if found is not None), None)
        if last is not None:
            logger.error("The last checkpoint of the run could not be saved; the last complete one is %s.", last.path)
            return
        attempt = SaveAttempt(self.trainer.args.output_dir, self._is_collective)
        with attempt.noting_errors():
            self.trainer.save_model(_internal_call=True)
        kept = f"the weights alone are in {attempt.folder}" if attempt.error is None else "nothing was saved"
        raise RuntimeError(f"training is over but no checkpoint could be saved ({self.failure}); {kept}.")
