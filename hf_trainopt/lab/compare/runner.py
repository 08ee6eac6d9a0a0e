"""Runs a script and records what its `Trainer` did: `python -m hf_trainopt.lab.compare.runner RECORD SCRIPT …`.

In this process, and nowhere else, every `Trainer` that the script makes gets our measuring callbacks, so that scripts
need not know of them.
"""

import functools
import json
import os
import platform
import resource
import runpy
import sys
import time
from pathlib import Path
from typing import Any


def watch_trainers() -> list[Any]:
    """Give measuring callbacks to every `Trainer` made from now on, and return the list that these end up in."""
    from transformers import Trainer

    from hf_trainopt.metrics import MemoryCallback, ThroughputCallback

    made: list[Any] = []
    stock = Trainer.__init__

    @functools.wraps(stock)
    def init(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        present = {type(callback) for callback in self.callback_handler.callbacks}
        for callback in (ThroughputCallback, MemoryCallback):
            if callback not in present:
                self.add_callback(callback())
        made.append(self)

    Trainer.__init__ = init
    return made


def machine() -> dict[str, Any]:
    """Return what the run ran on."""
    import torch

    devices = []
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": devices,
        "system": platform.system(),
    }


def peak_resident_gib() -> float:
    """Return the high-water mark of this process in GiB."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def record_of(trainer: Any, wall: float, cpu: float) -> dict[str, Any]:
    """Return what is kept of a run; times in seconds of the whole process."""
    from hf_trainopt import EfficientTrainerMixin
    from hf_trainopt.lab.compare.records import versions

    return {
        "log_history": trainer.state.log_history,
        "optimizer_steps": trainer.state.global_step,
        "is_ours": isinstance(trainer, EfficientTrainerMixin),
        "took": {name: getattr(trainer.args, name, None) for name in ("seed", "output_dir", "accumulation_policy")},
        "world_size": trainer.args.world_size,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "peak_resident_gib": peak_resident_gib(),
        "versions": versions(),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def main(argv: list[str] | None = None) -> None:
    """Run the script, then write the record (on the main process)."""
    record, script, *arguments = sys.argv[1:] if argv is None else argv
    trainers = watch_trainers()
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    record = str(Path(record).resolve())  # the script may change the working directory
    start = time.perf_counter()
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    wall, cpu = time.perf_counter() - start, time.process_time()
    trained = [trainer for trainer in trainers if trainer.state.global_step]
    if not trained:
        sys.exit("error: the script has trained nothing with transformers.Trainer; is --do_train missing?")
    trainer = trained[-1]
    if trainer.is_world_process_zero():
        path = Path(record)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record_of(trainer, wall, cpu)) + "\n")
        os.replace(partial, path)


if __name__ == "__main__":
    main()
