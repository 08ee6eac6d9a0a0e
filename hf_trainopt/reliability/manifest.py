"""The manifest of a checkpoint: written last, so that a checkpoint that has one is complete.

A save is bracketed by two files. `checkpoint-is-incomplete.txt` is there before anything else and goes last;
`checkpoint_manifest.json` lists what the checkpoint consists of and comes, by an atomic rename, when all of it is on
the disk. Killed anywhere in between, a save leaves the first without the second. Deleting goes the other way round.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any


MANIFEST_NAME = "checkpoint_manifest.json"
MANIFEST_VERSION = 1

# The name that transformers' just-in-time checkpoints use for the same purpose (`enable_jit_checkpoint`).
INCOMPLETE_NAME = "checkpoint-is-incomplete.txt"

# Files up to this size are hashed whole, of larger ones as much is hashed in blocks.
HASHED_BYTES = 1 << 20
HASHED_BLOCKS = 16


def fingerprint(path: str) -> str:
    """Return a sha256 of a file: of the whole of it up to 1 MiB, else of 16 blocks spread over it, ends included.

    A whole hash of weights and optimizer state would read gigabytes back at every save. Together with the size the
    blocks tell what happens to checkpoints: a file cut short, ends that were never written (zeros after a power cut),
    a file of another step or model. They do not see a single flipped bit between them.
    """
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= HASHED_BYTES:
            digest.update(file.read())
        else:
            block = HASHED_BYTES // HASHED_BLOCKS
            for index in range(HASHED_BLOCKS):
                file.seek(index * (size - block) // (HASHED_BLOCKS - 1))
                digest.update(file.read(block))
    return digest.hexdigest()


def list_files(folder: str) -> Iterator[str]:
    """Yield the files of a checkpoint, relative to it and in order; those of saving itself are left out."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            relative = os.path.relpath(os.path.join(place, name), folder)
            if relative not in (MANIFEST_NAME, MANIFEST_NAME + ".tmp", INCOMPLETE_NAME):
                yield relative.replace(os.sep, "/")


def flush(path: str) -> None:
    """Wait until a file or folder is on the disk."""
    if os.path.isdir(path):
        # Not every system and file system can do this; what a folder lists is then up to it.
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def begin(folder: str) -> None:
    """Mark a folder, which is made if it is not there, as one that is being written."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, INCOMPLETE_NAME), "w", encoding="utf-8") as file:
        file.write("This checkpoint is being written, or its writing was interrupted.\n")
    flush(folder)


def complete(folder: str, facts: dict[str, Any]) -> None:
    """Write the manifest of a folder in which everything has been written, and flush all of it to the disk.

    Args:
        folder: Checkpoint.
        facts: What to note beside the files.
    """
    files = {}
    for name in list_files(folder):
        path = os.path.join(folder, name)
        flush(path)
        files[name] = {"size": os.path.getsize(path), "sha256": fingerprint(path)}
    for place, _, _ in os.walk(folder):
        flush(place)
    temporary = os.path.join(folder, MANIFEST_NAME + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({"version": MANIFEST_VERSION, **facts, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, os.path.join(folder, MANIFEST_NAME))
    flush(folder)
    os.remove(os.path.join(folder, INCOMPLETE_NAME))


def refresh(folder: str) -> bool:
    """Write the manifest anew if files are others than it says; return whether they are.

    Args:
        folder: Checkpoint that is complete; one without a manifest is left alone.

    Raises:
        ValueError: The manifest cannot be read.
        OSError: The manifest cannot be written.
    """
    manifest = read_manifest(folder)
    if manifest is None or (
        find_fault(folder, manifest) is None and set(manifest["files"]) == set(list_files(folder))
    ):
        return False
    facts = {key: value for key, value in manifest.items() if key not in ("version", "files")}
    begin(folder)
    complete(folder, facts)
    return True


def discard(folder: str) -> None:
    """Delete a checkpoint such that, stopped on the way, what is left of it is known to be incomplete."""
    if not os.path.isdir(folder):
        return
    # On a full disk or without the right to it the mark cannot be made.
    with contextlib.suppress(OSError):
        begin(folder)
    # The mark goes last: without it, what is left of a checkpoint may look like a whole one of stock `Trainer`.
    for name in sorted(os.listdir(folder), key=lambda name: (name != MANIFEST_NAME, name == INCOMPLETE_NAME)):
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.remove(path)
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def is_leftover(folder: str) -> bool:
    """Return whether a folder is what an interrupted save or deletion left."""
    return os.path.isfile(os.path.join(folder, INCOMPLETE_NAME)) and not has_manifest(folder)


def has_manifest(folder: str) -> bool:
    """Return whether a checkpoint has a manifest (`find_fault` says whether it holds)."""
    return os.path.isfile(os.path.join(folder, MANIFEST_NAME))


def read_manifest(folder: str) -> dict[str, Any] | None:
    """Return the manifest of a checkpoint, or `None` if it has none.

    Raises:
        ValueError: It cannot be read, or a later version of hf_trainopt wrote it.
    """
    path = os.path.join(folder, MANIFEST_NAME)
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        version = manifest["version"]
        for expected in manifest["files"].values():
            expected["size"], expected["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"its {MANIFEST_NAME} cannot be read") from None
    if version != MANIFEST_VERSION:
        raise ValueError(f"its {MANIFEST_NAME} has version {version}, this hf_trainopt reads {MANIFEST_VERSION}")
    return manifest


def find_fault(folder: str, manifest: dict[str, Any]) -> str | None:
    """Return what is wrong with a checkpoint by its manifest, `None` if nothing is."""
    for name, expected in manifest["files"].items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            return f"{name} is missing"
        size = os.path.getsize(path)
        if size != expected["size"]:
            return f"{name} has {size} bytes instead of {expected['size']}"
        if fingerprint(path) != expected["sha256"]:
            return f"{name} is not what was saved"
    return None
