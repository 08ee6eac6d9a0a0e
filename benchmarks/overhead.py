"""What the windowed loop and the gradient statistics cost: seconds per micro-batch against stock `Trainer`.

    python benchmarks/overhead.py --rounds 6

The three loops take turns in one process on the same data, so that whatever else the machine does hits all of them;
the figures are the median ratio over rounds and its range. The start-up phase, in which every window is measured (16
windows of a whole run), is left out.
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
from tasks import TASKS, build

from hf_trainopt import EfficientTrainer, EfficientTrainingArguments
from hf_trainopt.accumulation import controller


RESULTS = Path(__file__).resolve().parent / "results" / "overhead.json"
LOOPS = {
    "stock": None,
    "windows": {"accumulation_policy": "ramp", "accumulation_ramp": "0:2"},
    "windows, measured": {"accumulation_policy": "fixed", "measure_noise_scale": True},
}


def seconds_per_micro_batch(task, parts: dict, loop: dict | None, windows: int, output_dir: str) -> float:
    common = {
        "output_dir": output_dir, "per_device_train_batch_size": task.micro_batch_size,
        "gradient_accumulation_steps": 2, "max_steps": windows, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no",
        **task.training_arguments,
    }  # fmt: skip
    if loop is None:
        trainer = transformers.Trainer(args=transformers.TrainingArguments(**common), **parts)
    else:
        trainer = EfficientTrainer(args=EfficientTrainingArguments(**common, **loop), **parts)
    trainer.remove_callback(transformers.PrinterCallback)
    begin = time.process_time()
    trainer.train()
    return (time.process_time() - begin) / (2 * windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--windows", type=int, default=48, help="optimizer steps of each timed run (k = 2)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    controller.STARTUP_WINDOWS = 0
    result = {"command": f"python benchmarks/overhead.py --rounds {options.rounds} --windows {options.windows}",
              "machine": {"cores": os.cpu_count(), "threads": 1}, "tasks": {}}  # fmt: skip
    with tempfile.TemporaryDirectory() as output_dir:
        for name, task in TASKS.items():
            parts = build(task, seed=0)
            parts.pop("eval_dataset")
            parts.pop("compute_metrics", None)
            rounds = []
            for index in range(options.rounds + 1):
                order = list(LOOPS) if index % 2 else list(reversed(LOOPS))
                taken = {
                    loop: seconds_per_micro_batch(task, parts, LOOPS[loop], options.windows, output_dir)
                    for loop in order
                }
                if index:  # the first round warms caches up
                    rounds.append(taken)
            entry = {"stock_seconds_per_micro_batch": statistics.median(r["stock"] for r in rounds)}
            for loop in list(LOOPS)[1:]:
                ratios = sorted(r[loop] / r["stock"] for r in rounds)
                entry[loop] = {"median_ratio": statistics.median(ratios), "range": [ratios[0], ratios[-1]]}
            result["tasks"][name] = entry
            print(name, json.dumps(entry, indent=1), flush=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
