"""What the tests of the two scripts share: running them in a process of their own, comparing saved weights."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from helpers import free_port
from processes import ENVIRONMENT, run_program
from safetensors.torch import load_file


REPOSITORY = Path(__file__).resolve().parent.parent

RESULT_FILES = ("config.json", "model.safetensors", "training_args.bin", "trainer_state.json", "README.md")
RESULT_FILES += ("train_results.json", "eval_results.json", "all_results.json")


# What the runs of both scripts have in common.
SHORT_RUN = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "optimizer_step_cost": 0.5,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "do_train": True,
    "do_eval": True,
}


def flag_maker(values: dict[str, object]) -> Callable[..., list[str]]:
    """Return a function that makes flags of `values`, some left out, some changed or added."""

    def make(*, without=(), **changes):
        merged = {key: value for key, value in (values | changes).items() if key not in without}
        return [f"--{key}={value}" for key, value in merged.items()]

    return make


def run_script(name: str, *flags: object, processes: int = 1, by_hand: bool = False) -> subprocess.CompletedProcess:
    """Run a script of the repository on the CPU; `by_hand`: as a user does, under torchrun with several processes."""
    if not by_hand:
        return run_program([REPOSITORY / name, *flags], ranks=processes)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    return subprocess.run(
        [*launcher, str(REPOSITORY / name), *map(str, flags)],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=170,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    left, right = weights(first), weights(second)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different
