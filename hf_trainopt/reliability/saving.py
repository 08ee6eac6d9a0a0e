"""Saving such that a complete checkpoint is never given up for one that may not become complete."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence

import torch
from safetensors import SafetensorError

from .manifest import begin, discard, is_leftover
from .resume import REPLACED_PREFIX, CheckpointError


def replaced_path(folder: str) -> str:
    """Return where a checkpoint is put while another is written in its place."""
    parent, name = os.path.split(os.path.normpath(folder))
    return os.path.join(parent, REPLACED_PREFIX + name)


def make_room(folder: str) -> None:
    """Begin a checkpoint: leftovers in its place go, a checkpoint there is put aside until the new one is complete."""
    aside = replaced_path(folder)
    if is_leftover(folder):
        discard(folder)
    elif os.path.isdir(folder) and os.listdir(folder):
        discard(aside)
        os.rename(folder, aside)
    begin(folder)


def give_up(folder: str) -> None:
    """Delete what a failed save has written, which also frees its space, and put back what it was to replace."""
    discard(folder)
    aside = replaced_path(folder)
    if os.path.isdir(aside) and not os.path.exists(folder):
        os.rename(aside, folder)


def surplus(
    checkpoints: Sequence[str], needed: Sequence[str | None], limit: int | None, leftovers: Sequence[str]
) -> list[str]:
    """Return the checkpoints to delete so that `limit` remain, as stock `Trainer` would choose them.

    Args:
        checkpoints: Those of the run, oldest first.
        needed: Those that stay in any case: the one that was completed just now, the best one so far.
        limit: How many to keep; `None` or less than 1 for all.
        leftovers: Those of interrupted saves: they go first.
    """
    if limit is None or limit <= 0:
        return []
    keep = {os.path.normpath(path) for path in needed if path is not None}
    gone = [path for path in checkpoints if path in leftovers and os.path.normpath(path) not in keep]
    rest = [path for path in checkpoints if path not in gone]
    others = [path for path in rest if os.path.normpath(path) not in keep]
    too_many = len(rest) - max(limit, len(keep))
    return gone + others[: max(0, too_many)]


class SaveAttempt:
    """One save, in which a disk that takes no more is noted instead of raised.

    The parts of a save meet other ranks in between (barriers): one that fails on this rank must not keep it from them.

    Args:
        folder: Checkpoint to write.
        raises: Let errors through (sharded models: their parts are collective themselves).
    """

    def __init__(self, folder: str, raises: bool = False):
        self.folder = folder
        self.raises = raises
        self.error: str | None = None
        self.to_push: str | None = None

    @property
    def name(self) -> str:
        return os.path.basename(self.folder)

    @contextlib.contextmanager
    def noting_errors(self) -> Iterator[None]:
        """Context in which the first error of the disk becomes `error`."""
        try:
            yield
        except Exception as error:
            if self.raises or not is_disk_error(error):
                raise
            self.error = self.error or explain(error, self.folder)


def is_disk_error(error: Exception) -> bool:
    """Return whether an exception says that a file could not be written."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    message = str(error)
    if isinstance(error, SafetensorError):
        return "I/O error" in message
    if isinstance(error, RuntimeError):  # torch.save
        return any(part in message for part in ("inline_container", "PytorchStreamWriter", "Parent directory"))
    return isinstance(error, OSError)


def explain(error: Exception, folder: str) -> str:
    """Return an error of the disk in a clause, with the space left on it (torch.save does not say what it lacked)."""
    message = " ".join(str(error).split()).rstrip(".")
    place = folder
    while place and not os.path.isdir(place) and os.path.dirname(place) != place:
        place = os.path.dirname(place)
    with contextlib.suppress(OSError):
        return f"{message}; {shutil.disk_usage(place or '.').free / 2**20:.0f} MiB free"
    return message


def make_output_dir(folder: str) -> None:
    """Make a folder if it is not there.

    Raises:
        CheckpointError: That cannot be done.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"output_dir={folder} cannot be made ({error.strerror or error}); choose another."
        ) from None


def check_output_dir(folder: str, least_bytes: int) -> None:
    """Refuse a folder in which no checkpoint could be saved.

    Args:
        folder: Output folder, which is made if it is not there.
        least_bytes: What a checkpoint needs in any case.

    Raises:
        CheckpointError: It cannot be written to, or its disk is too full.
    """
    make_output_dir(folder)
    try:
        # Not `os.access`, which knows neither read-only mounts nor quotas.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise CheckpointError(
            f"output_dir={folder} cannot be written to ({error.strerror or error}); choose another, or set "
            "save_strategy='no'."
        ) from None
    if free < least_bytes:
        raise CheckpointError(
            f"output_dir={folder} has {free / 2**20:.0f} MiB free but the weights alone take "
            f"{least_bytes / 2**20:.0f} MiB; free some space, choose another folder, or set save_strategy='no'."
        )
