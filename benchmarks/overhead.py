"""What the windowed loop and the gradient statistics cost: seconds of an optimizer step against stock `Trainer`.

    python benchmarks/overhead.py --rounds 6

Steps of k = 2 are timed one by one (CPU seconds from the end of one to the end of the next) and medians compared. The
loops take turns in one process on the same data; in the measured loop every second step is measured, so that measured
and unmeasured steps alternate and whatever else the machine does hits both. By default every 8th step of a run is
measured (`noise_scale_interval`), hence the eighth of the difference.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from tasks import LANGUAGE, VISION, build, common_arguments

from hf_trainopt import EfficientTrainer, EfficientTrainingArguments
from hf_trainopt.accumulation import controller


RESULTS = Path(__file__).resolve().parent / "results" / "overhead.json"
INTERVAL = EfficientTrainingArguments.noise_scale_interval
STOCK, WINDOWS, MEASURED = "stock", "windows", "measured"
LOOPS = {
    STOCK: None,
    WINDOWS: {"accumulation_policy": "ramp", "accumulation_ramp": "0:2"},
    MEASURED: {"accumulation_policy": "fixed", "measure_noise_scale": True, "noise_scale_interval": 2},
}


class Clock(transformers.TrainerCallback):
    """CPU seconds of each optimizer step but the first ones."""

    def __init__(self):
        self.marks: list[float] = []

    def on_step_end(self, *args, **kwargs):
        self.marks.append(time.process_time())

    def seconds(self) -> dict[int, float]:
        """By number of the step, from 1."""
        return {n: self.marks[n - 1] - self.marks[n - 2] for n in range(6, len(self.marks) + 1)}


def time_steps(task, parts: dict, loop: dict | None, steps: int, output_dir: str) -> dict[int, float]:
    common = common_arguments(task, output_dir)
    common |= {"gradient_accumulation_steps": 2, "max_steps": steps, "logging_strategy": "no"}
    clock = Clock()
    if loop is None:
        trainer = transformers.Trainer(args=transformers.TrainingArguments(**common), callbacks=[clock], **parts)
    else:
        trainer = EfficientTrainer(args=EfficientTrainingArguments(**common, **loop), callbacks=[clock], **parts)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return clock.seconds()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=44, help="optimizer steps of each run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    controller.STARTUP_WINDOWS = 0  # the first 16 steps of a run, all of them measured, are left out
    result = {"command": f"python benchmarks/overhead.py --rounds {options.rounds} --steps {options.steps}",
              "machine": {"cores": os.cpu_count(), "threads": 1}, "tasks": {}}  # fmt: skip
    with tempfile.TemporaryDirectory() as output_dir:
        for task in (LANGUAGE, VISION):
            parts = build(task, seed=0)
            parts.pop("eval_dataset")
            parts.pop("compute_metrics", None)
            loop_ratios, measured_ratios, stock = [], [], []
            for index in range(options.rounds):
                order = list(LOOPS) if index % 2 else list(reversed(LOOPS))
                taken = {loop: time_steps(task, parts, LOOPS[loop], options.steps, output_dir) for loop in order}
                stock.append(statistics.median(taken[STOCK].values()))
                loop_ratios.append(statistics.median(taken[WINDOWS].values()) / stock[-1])
                # The second step of a run is the first that is measured, so those of even number are.
                measured, plain = (
                    [seconds for number, seconds in taken[MEASURED].items() if number % 2 == rest] for rest in (0, 1)
                )
                measured_ratios.append(1 + (statistics.median(measured) / statistics.median(plain) - 1) / INTERVAL)
            entry = {"stock_seconds_per_step": statistics.median(stock)}
            for loop, ratios in ((WINDOWS, loop_ratios), (MEASURED, measured_ratios)):
                entry[loop] = {"median_ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
            result["tasks"][task.name] = entry
            print(task.name, json.dumps(entry, indent=1), flush=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
