"""One JSON record per run, and whether a run has to be made (again)."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.installed import installed_version
from .arms import ArmSpec, as_dict, config_file


RECORD_FORMAT = 1
_COMPARED_VERSIONS = ("torch", "transformers", "hf-trainopt")


@dataclass(frozen=True)
class RunSpec:
    """One run that a comparison needs.

    Args:
        arm: What is run.
        seed: Its `--seed`.
        folder: Where the records and output folders of the comparison are.
    """

    arm: ArmSpec
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.arm.slug}-seed{self.seed}"

    @property
    def record(self) -> Path:
        return self.folder / "records" / f"{self.name}.json"

    @property
    def output_dir(self) -> Path:
        """Output folder of the script."""
        return self.folder / self.name

    def identity(self, script: Path, launcher: str | None, threads: int | None = None) -> str:
        """Return what must be the same for a record to stand for this run: script, arguments, threads, versions."""
        parts: list[Any] = [
            script.resolve().as_posix(),
            hashlib.sha256(script.read_bytes()).hexdigest(),
            launcher,
            list(self.arm.arguments),
            self.seed,
            {name: versions()[name] for name in _COMPARED_VERSIONS},
        ]
        config = config_file(self.arm.arguments)
        if config is not None:
            parts.append({"config": hashlib.sha256(config.read_bytes()).hexdigest()})
        if threads is not None:
            parts.append({"threads": threads})
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    names = ("torch", "transformers", "accelerate", "hf-trainopt")
    return {"python": platform.python_version()} | {name: installed_version(name) or "not installed" for name in names}


def load(path: Path) -> dict[str, Any] | None:
    """Return a record, or `None` if there is none.

    Raises:
        ValueError: The file is no record.
    """
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} isn't a record ({error}); remove it, or start anew with --restart.") from error
    if not isinstance(values, dict) or values.get("format") != RECORD_FORMAT:
        raise ValueError(f"{path} isn't a record of format {RECORD_FORMAT}; remove it, or start anew with --restart.")
    return values


def save(path: Path, values: Mapping[str, Any]) -> None:
    """Write a record in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(partial, path)


def complete(run: RunSpec, measured: Mapping[str, Any], command: str, identity: str) -> dict[str, Any]:
    """Return the record of a run that has ended well."""
    return {
        "format": RECORD_FORMAT,
        "status": "finished",
        "arm": as_dict(run.arm),
        "seed": run.seed,
        "command": command,
        "identity": identity,
        "commit": commit(),
        **measured,
    }


def failed(run: RunSpec, command: str, identity: str, exit_code: int, errors: str) -> dict[str, Any]:
    """Return the record of a run that has not."""
    return {
        "format": RECORD_FORMAT,
        "status": "failed",
        "arm": as_dict(run.arm),
        "seed": run.seed,
        "command": command,
        "identity": identity,
        "exit_code": exit_code,
        "errors": errors,
    }


def commit() -> str | None:
    """Return the git commit of the working directory, with `+` if it has changes; `None` without git."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty=+", "--abbrev=12"], capture_output=True,
                               text=True, timeout=10)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
