"""Programs in processes of their own, forked from one that has everything imported: imports take longer than they do.

What differs from a start by hand: a launcher's own process is not there, and what is read from the environment while
modules are imported is as it was when the first program was started. At least one test of each kind of program starts
it by hand (`scripts_helpers.run_script`, `torchrun` and `accelerate launch` in `test_scripts_*` and
`test_accelerate_examples`).
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from helpers import free_port


# One thread: tests share a small machine. Offline, the Hub client does not retry for a minute.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "hf_trainopt", "hf_trainopt.scripting.image_data", "hf_trainopt.scripting.session",
        "hf_trainopt.scripting.text_data", "hf_trainopt.models.timm_model",
        "transformers.models.auto.modeling_auto", "transformers.models.gpt2.modeling_gpt2",
    ]
)  # fmt: skip


def run_program(words: Sequence[object], *, ranks: int = 1, cwd: Path | None = None, timeout: float = 170):
    """Run `words[0]`, a Python file, with the rest as its arguments.

    Args:
        words: Path and arguments.
        ranks: Above one: as many processes as `torchrun` would start, with the variables that it sets. When one of
            them fails the others are told to end.
        cwd: Folder to run in.
        timeout: Seconds.

    Returns:
        Its exit status (the first that is not 0) and what it wrote, that of all ranks together.
    """
    words = [str(word) for word in words]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")} | ENVIRONMENT
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(ranks):
            streams = [str(Path(folder) / f"{name}{rank}") for name in ("out", "err")]
            of_rank = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            variables = environment | ({key: str(value) for key, value in of_rank.items()} if ranks > 1 else {})
            process = _context.Process(target=_run, args=(words, variables, str(cwd or Path.cwd()), streams))
            with mock.patch.dict(os.environ, ENVIRONMENT):
                process.start()
            started.append((process, streams))
        code = _wait([process for process, _ in started], time.monotonic() + timeout)
        out, err = ("".join(Path(streams[i]).read_text() for _, streams in started) for i in range(2))
    if code is None:
        raise subprocess.TimeoutExpired(words, timeout, out, err)
    return subprocess.CompletedProcess(words, code, out, err)


def _wait(processes: list, deadline: float) -> int | None:
    """Return the exit status of the first process that fails, 0 if none does, `None` if they take too long."""
    code = 0
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline:
            code = None
        elif not code:
            code = next((process.exitcode for process in processes if process.exitcode), 0)
        if code != 0:
            for end in ("terminate", "kill"):
                for process in processes:
                    getattr(process, end)()
                for process in processes:
                    process.join(30)
            return code
        time.sleep(0.02)
    return next((process.exitcode for process in processes if process.exitcode), 0)


def _run(words: list[str], environment: dict[str, str], cwd: str, streams: list[str]) -> None:
    gc.freeze()  # as in conftest.py
    for number, path in enumerate(streams, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
