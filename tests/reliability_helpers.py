"""Small disks, and runs that save often."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import Rows, arguments, quiet, tiny_gpt2
from transformers import TrainerCallback

from hf_trainopt import EfficientTrainer


# k varies, and does not depend on the clock.
GOODPUT = {"accumulation_policy": "goodput", "optimizer_step_cost": 0.5, "noise_scale_interval": 2}


class SavesAlways(TrainerCallback):
    """Saves after every window (`save_steps` counts reference windows)."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= args.save_strategy != "no"


def make(output_dir, trainer_class=EfficientTrainer, callbacks=(), model=None, eval_dataset=None, **kwargs):
    """A run of two epochs, 50 rows each in micro-batches of 3, with a checkpoint after each window; k = 3 if unset."""
    settings = {
        "gradient_accumulation_steps": 3, "save_strategy": "steps", "save_steps": 1, "accumulation_policy": "fixed",
    }  # fmt: skip
    return quiet(
        trainer_class(
            model=tiny_gpt2(dropout=0.1) if model is None else model,
            args=arguments(output_dir, **(settings | kwargs)),
            train_dataset=Rows(),
            eval_dataset=eval_dataset,
            callbacks=[SavesAlways(), *callbacks],
        )
    )


def checkpoints(folder: Path) -> list[str]:
    """Names of the checkpoints in a folder, by step."""
    return sorted((path.name for path in folder.glob("checkpoint-*")), key=lambda name: int(name.split("-")[1]))


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory at `folder`; skips the test where it cannot be mounted."""
    folder.mkdir()
    tool = shutil.which("mount")
    if tool is None or os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if subprocess.run([tool, "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
