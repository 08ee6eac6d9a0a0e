"""Checkpoints in `Trainer`: complete or not there, on all ranks; the last complete one is never given up."""

import logging
import math
import os
from typing import Any

from accelerate.utils import gather_object
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from .._versions import is_sharded_at_load
from ..installed import installed_version
from .manifest import complete, discard, is_leftover, refresh
from .random_data import RandomDataTrainerMixin
from .resume import (
    Checkpoint,
    CheckpointError,
    check_named,
    check_setup,
    describe_skipped,
    find_last_complete,
    last_checkpoint,
)
from .saving import SaveAttempt, check_output_dir, give_up, make_output_dir, make_room, replaced_path, surplus


logger = logging.getLogger(__name__)


class CheckpointsTrainerMixin(RandomDataTrainerMixin):
    """Complete checkpoints for any `Trainer` class; a base of `ReliabilityTrainerMixin`."""

    def __init__(self, *args, **kwargs):
        self._save_attempt: SaveAttempt | None = None
        self._user_limit: int | None = None
        self._latest_step = math.inf
        self._own_trial: Any = None  # of a hyperparameter search, whose checkpoints have a folder of their own
        self._forget_saves()
        super().__init__(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`, which makes the output folder next, with an error of its own if it cannot."""
        super().create_accelerator_and_postprocess()
        if self.args.should_save:
            make_output_dir(self.args.output_dir)

    def _forget_saves(self) -> None:
        self._failed_save: str | None = None
        self._saved_step: int | None = None
        self._saved_folder: str | None = None

    @property
    def _is_collective(self) -> bool:
        """Whether the parts of a save are done by all ranks together."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled or is_sharded_at_load(self)

    def _from_all_ranks(self, value: Any) -> list[Any]:
        return gather_object([value]) if self.args.world_size > 1 else [value]

    # ---- Before training -------------------------------------------------------------------------------------------

    def _check_start(self, asked: str | bool | None) -> str | None:
        """Return the checkpoint to resume from; whatever would fail later fails here, on all ranks."""
        self._latest_step = math.inf
        while True:
            problem = path = None
            if self.args.should_save:  # one process for each disk
                try:
                    path = self._checkpoint_asked_for(asked)
                except ValueError as error:
                    problem = str(error)
            found = self._from_all_ranks((self.args.should_save, path, problem))
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
        args = self.args
        if args.save_strategy != "no" or self._watches_signals:
            # A search with Ray leaves the model to `train`.
            parameters = self.model.parameters() if self.model is not None else ()
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
        elif not (args.ignore_data_skip or args.auto_find_batch_size):
            check_setup(chosen.path, self._setup)
        self._check_own_state(chosen.path)
        return chosen.path

    def _last_complete(self, before: float = math.inf) -> Checkpoint | None:
        # Of later steps there may be some too: an earlier run's in the same folder.
        return find_last_complete(self._get_output_dir(self._own_trial), min(before, self.state.global_step))[0]

    # ---- Saving ----------------------------------------------------------------------------------------------------

    def _save_own_state(self, folder: str) -> None:
        """What else belongs into a checkpoint is written here; `folder` is there."""

    def _check_own_state(self, folder: str) -> None:
        """Raise `ValueError` if what `_save_own_state` has written does not fit this run."""

    def _save_checkpoint(self, model, trial, *args, **kwargs):
        if self._finite is not None:
            self._settle()
        step, run_dir = self.state.global_step, self._get_output_dir(trial)
        attempt = SaveAttempt(os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}"), self._is_collective)
        best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
        if self.args.should_save:
            with attempt.noting_errors():
                make_room(attempt.folder)
                self._save_own_state(attempt.folder)
        self._from_all_ranks(None)  # nobody writes into a folder that is being moved
        self._save_attempt, self._user_limit = attempt, limit
        self.args.save_total_limit = None  # old checkpoints go when the new one is complete
        try:
            with attempt.noting_errors():
                super()._save_checkpoint(model, trial, *args, **kwargs)
        finally:
            self._save_attempt, self.args.save_total_limit = None, limit
        if not self._agree_on_save(attempt) and self.args.should_save:
            with attempt.noting_errors():
                complete(attempt.folder, self._manifest_facts())
        self._failed_save = self._agree_on_save(attempt)
        if self._failed_save is not None:
            self._report_failed_save(attempt, best)
            return
        self._saved_step, self._saved_folder = step, attempt.folder
        if self.args.should_save:
            discard(replaced_path(attempt.folder))
            self._rotate(run_dir, attempt.folder)
        if attempt.to_push is not None:
            self._push_from_checkpoint(attempt.to_push)

    def _after_save(self) -> None:
        """Take what callbacks have made of a checkpoint (`on_save`) for what it is; otherwise none would be whole."""
        folder = self._saved_folder
        if self.args.should_save and folder is not None and os.path.isdir(folder):
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
            "global_step": self.state.global_step,
            "setup": self._setup,
            "k_varies": self._adapts,
            "versions": {name: installed_version(name) for name in packages},
        }

    def _report_failed_save(self, attempt: SaveAttempt, best: str | None) -> None:
        if self.args.should_save:
            give_up(attempt.folder)
        self.state.best_model_checkpoint = best
        if self.args.should_log:
            last = self._last_complete()
            logger.error(
                "%s could not be saved (%s). Training goes on, the next save is another try, and the last complete "
                "checkpoint is %s.",
                attempt.name,
                self._failed_save,
                "none so far" if last is None else last.path,
            )

    def _good_checkpoint(self) -> str | None:
        """Return a checkpoint that is needed whatever its age."""
        return None

    def _rotate(self, run_dir: str, newest: str) -> None:
        folders = sort_checkpoints(run_dir, use_mtime=True) if self.args.save_total_limit else []
        leftovers = [folder for folder in folders if is_leftover(folder)]
        keep = [newest, self.state.best_model_checkpoint, self._good_checkpoint() if folders else None]
        for folder in surplus(folders, keep, self.args.save_total_limit, leftovers):
            logger.info("Deleting older checkpoint [%s] due to args.save_total_limit", folder)
            discard(folder)

    # The parts of a save: one that fails leaves the others out, so that all ranks come to the end of it.

    def save_model(self, *args, **kwargs):
        """As in `Trainer`."""
        attempt = self._save_attempt
        if attempt is None:
            return super().save_model(*args, **kwargs)
        self.args.save_total_limit = self._user_limit  # `training_args.bin` holds the user's value
        try:
            return self._part_of_save(super().save_model, *args, **kwargs)
        finally:
            self.args.save_total_limit = None

    def _save_optimizer_and_scheduler(self, *args, **kwargs):
        return self._part_of_save(super()._save_optimizer_and_scheduler, *args, **kwargs)

    def _save_scaler(self, *args, **kwargs):
        return self._part_of_save(super()._save_scaler, *args, **kwargs)

    def _save_rng_state(self, *args, **kwargs):
        return self._part_of_save(super()._save_rng_state, *args, **kwargs)

    def _part_of_save(self, part, *args, **kwargs):
        if self._save_attempt is None:
            return part(*args, **kwargs)
        if self._save_attempt.error is None:
            with self._save_attempt.noting_errors():
                return part(*args, **kwargs)
        return None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._save_attempt is None:
            return super()._push_from_checkpoint(checkpoint_folder)
        self._save_attempt.to_push = checkpoint_folder  # once it is complete
        return None

    def _end_without_last_save(self, trial) -> None:
        """Raise if the run leaves nothing behind; the weights are tried alone, which take a third of the space."""
        last = None
        if self.args.should_save:
            last = find_last_complete(self._get_output_dir(trial))[0]
        last = next((found for found in self._from_all_ranks(last) if found is not None), None)
        if last is not None:
            logger.error("The last checkpoint of the run could not be saved; the last complete one is %s.", last.path)
            return
        attempt = SaveAttempt(self.args.output_dir, self._is_collective)
        with attempt.noting_errors():
            self.save_model(_internal_call=True)
        kept = f"the weights alone are in {self.args.output_dir}" if attempt.error is None else "nothing was saved"
        raise RuntimeError(f"training is over but no checkpoint could be saved ({self._failed_save}); {kept}.")
