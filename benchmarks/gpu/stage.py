"""The process of one stage: imports, prepares on the CPU, waits for its turn, works, writes its record.

    python benchmarks/gpu/stage.py NAME --output DIR --folder SHARED [--rehearse]

Started by `run.py`, which writes `go UNTIL` to its standard input: by when it must have ended, on the monotonic clock
that all processes share. If it is still importing or preparing then, that comes off its time. Nothing touches the GPU
before that line.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import signal
import sys
import time
import traceback
from pathlib import Path

from common import Context, Record


# The record `time` is made by `step_time`: a module `time` would hide Python's.
MODULES = {"time": "step_time"}
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Let this process end with `run.py`, even if that is killed: nobody else may find the GPU taken."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    die_with_parent()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--check", action="append", default=[])
    parser.add_argument("--arm", action="append", default=[])
    options = parser.parse_args()
    context = Context(
        options.name, options.output, options.folder, options.rehearse, tuple(options.check), tuple(options.arm)
    )
    module, prepared, failure = None, None, None
    try:
        module = importlib.import_module(f"stages.{MODULES.get(options.name, options.name)}")
        if hasattr(module, "prepare"):
            started = time.monotonic()
            prepared = module.prepare(context)
            context.prepared_s = time.monotonic() - started
    except Exception:
        failure = traceback.format_exc()
    # What was imported stays: no later collection needs to look at its million objects again.
    gc.collect()
    gc.freeze()
    word, _, until = sys.stdin.readline().strip().partition(" ")
    if word != "go":
        return 0  # not needed any more
    context.begin(float(until) - time.monotonic())
    record = Record(context)
    if failure is not None:
        record.fail("prepare", failure)
    else:
        try:
            record.describe_device()
            module.run(context, record, prepared)
        except Exception:
            record.fail("run", traceback.format_exc())
    (context.folder / f"{context.name}.ended").touch()  # whoever waits for what it has not made need not
    record.close()
    print(f"{options.name}: {record.values['status']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
