"""Which checkpoint to resume from: the last one that is complete, and why others are not."""

import json
import math
import os
import re
import zipfile
from dataclasses import dataclass

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .manifest import MANIFEST_NAME, find_fault, is_leftover, read_manifest


TRAINER_STATE_NAME = "trainer_state.json"
# Where a checkpoint lies while another is written in its place.
REPLACED_PREFIX = "replaced-"

_FOLDER = re.compile(rf"^({REPLACED_PREFIX})?{PREFIX_CHECKPOINT_DIR}-(\d+)$")
_WEIGHTS = (
    "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json",
    "adapter_model.safetensors", "adapter_model.bin", "pytorch_model_fsdp.bin",
)  # fmt: skip


class CheckpointError(ValueError):
    """No checkpoint could be saved, or the one asked for cannot be resumed from; raised before training."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder that looks like a checkpoint.

    Attributes:
        path: The folder.
        step: Optimizer steps, by its name.
        fault: Why it cannot be resumed from, `None` if it can.
        has_manifest: Whether a manifest says so; if not, it was written by something else and taken on its looks.
    """

    path: str
    step: int
    fault: str | None
    has_manifest: bool

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


def inspect_checkpoint(path: str) -> Checkpoint:
    """Look whether a folder is a complete checkpoint.

    With a manifest that is certain. Without one (stock `Trainer` wrote it) every file is checked for being whole, as
    far as that can be told without loading it.
    """
    path = os.path.normpath(path)
    found = _FOLDER.match(os.path.basename(path))
    step = int(found[2]) if found else -1
    if not os.path.isdir(path):
        return Checkpoint(path, step, "it is no folder" if os.path.exists(path) else "it does not exist", False)
    try:
        manifest = read_manifest(path)
        if manifest is not None:
            return Checkpoint(path, manifest.get("global_step", step), find_fault(path, manifest), True)
        return Checkpoint(path, step, find_fault_of_stock(path), False)
    except ValueError as error:
        return Checkpoint(path, step, str(error), True)
    except OSError as error:
        return Checkpoint(path, step, f"it cannot be read ({error})", False)


def list_checkpoints(run_dir: str) -> list[str]:
    """Return the checkpoint folders of a run, that of the latest step first."""
    found = []
    for name in os.listdir(run_dir) if os.path.isdir(run_dir) else ():
        match = _FOLDER.match(name)
        if match and os.path.isdir(os.path.join(run_dir, name)):
            found.append((-int(match[2]), match[1] is not None, os.path.join(run_dir, name)))
    return [path for _, _, path in sorted(found)]


def find_last_complete(run_dir: str, latest: float = math.inf) -> tuple[Checkpoint | None, list[Checkpoint]]:
    """Return the last complete checkpoint of a run, and the later ones that were passed over because of a fault.

    Args:
        run_dir: Output folder of the run.
        latest: Last step that comes into question.
    """
    skipped = []
    for path in list_checkpoints(run_dir):
        checkpoint = inspect_checkpoint(path)
        if checkpoint.step > latest:
            continue
        if checkpoint.fault is None:
            return checkpoint, skipped
        skipped.append(checkpoint)
    return None, skipped


def describe_skipped(skipped: list[Checkpoint]) -> str:
    """Return one clause for each checkpoint that was passed over."""
    return "; ".join(f"{checkpoint.name}: {checkpoint.fault}" for checkpoint in skipped)


def last_checkpoint(run_dir: str, latest: float = math.inf) -> tuple[Checkpoint, list[Checkpoint]]:
    """Return what `find_last_complete` does.

    Raises:
        ValueError: There is none; the message says what is wrong with those that are there.
    """
    chosen, skipped = find_last_complete(run_dir, latest)
    if chosen is None:
        why = f" ({describe_skipped(skipped)})" if skipped else ""
        raise ValueError(
            # In stock's words, which others may look for.
            f"No valid checkpoint found in output directory ({run_dir}){why}; leave resume_from_checkpoint out to "
            "start from scratch, or name a checkpoint."
        )
    return chosen, skipped


def check_named(path: str) -> Checkpoint:
    """Look at a checkpoint that the user has named.

    Raises:
        ValueError: It is not complete; the message names the last one beside it that is.
    """
    checkpoint = inspect_checkpoint(path)
    if checkpoint.fault is not None:
        other, _ = find_last_complete(os.path.dirname(checkpoint.path) or ".")
        remedy = "there is no complete one beside it" if other is None else f"the last complete one is {other.path}"
        if checkpoint.has_manifest:
            remedy += f" (if it was changed on purpose, delete its {MANIFEST_NAME})"
        raise ValueError(f"Can't find a valid checkpoint at {path}: {checkpoint.fault}; {remedy}.")  # likewise
    return checkpoint


# ---- Checkpoints without a manifest ---------------------------------------------------------------------------------


def find_fault_of_stock(folder: str) -> str | None:
    """Return what is visibly wrong with a checkpoint that has no manifest, `None` if nothing is."""
    if is_leftover(folder):
        return "its saving was interrupted"
    if not os.path.isfile(os.path.join(folder, TRAINER_STATE_NAME)):
        return f"it has no {TRAINER_STATE_NAME}, which is saved last"
    names = os.listdir(folder)
    if not any(name in _WEIGHTS for name in names) and not any(map(_holds_weights, _folders_in(folder))):
        return "it has no weights"
    if "scheduler.pt" in names and not any(name.startswith(("optimizer", "rank", "global_step")) for name in names):
        return "it has a scheduler but no optimizer"
    for name in sorted(names):
        fault = _fault_of_file(os.path.join(folder, name))
        if fault is not None:
            return f"{name} {fault}"
    try:
        TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME))
    except (TypeError, AttributeError):
        return f"{TRAINER_STATE_NAME} wasn't written by a Trainer"
    return None


def _folders_in(folder: str) -> list[str]:
    return [entry.path for entry in os.scandir(folder) if entry.is_dir()]


def _holds_weights(folder: str) -> bool:
    """Whether a folder inside a checkpoint is one of FSDP, DeepSpeed or an adapter's."""
    name = os.path.basename(folder)
    return name.startswith(("pytorch_model_fsdp", "global_step")) or any(n in _WEIGHTS for n in os.listdir(folder))


def _fault_of_file(path: str) -> str | None:
    """Why a file cannot be whole, by its kind."""
    if path.endswith(".json"):
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
        except ValueError:
            return "is not valid JSON"
        if path.endswith(".index.json"):
            shards, folder = set(content.get("weight_map", {}).values()), os.path.dirname(path)
            missing = [name for name in sorted(shards) if not os.path.isfile(os.path.join(folder, name))]
            return f"names {missing[0]}, which is missing" if missing else None
    elif path.endswith(".safetensors"):
        return None if _is_whole_safetensors(path) else "is cut short or not in the safetensors format"
    elif path.endswith((".pt", ".pth", ".bin")):
        with open(path, "rb") as file:
            start = file.read(2)
        # The formats before PyTorch 1.6 are no archives; whether they are whole is not known without loading them.
        if not start or (start == b"PK" and not zipfile.is_zipfile(path)):
            return "is cut short"
    return None


def _is_whole_safetensors(path: str) -> bool:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
    return size == 8 + length + max(ends, default=0)
