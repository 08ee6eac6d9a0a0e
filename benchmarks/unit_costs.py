"""Seconds of a micro-batch and of an optimizer step of each task, on the idle machine; one thread.

    python benchmarks/unit_costs.py --rounds 5 --tasks language vision

Writes `benchmarks/results/unit_costs.json`. The times of `convergence.md` are computed from it.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path


COSTS = Path(__file__).resolve().parent / "results" / "unit_costs.json"


def measure(name: str, rounds: int) -> dict[str, object]:
    """Return the medians over rounds, as `StepTimer` measures them."""
    import torch
    import transformers
    from tasks import TASKS, build, common_arguments

    from hf_trainopt import EfficientTrainer, EfficientTrainingArguments

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    parts = build(TASKS[name], seed=0)
    for key in ("eval_dataset", "compute_metrics"):
        parts.pop(key, None)
    found = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            args = EfficientTrainingArguments(
                **common_arguments(TASKS[name], folder), max_steps=48, gradient_accumulation_steps=1,
                accumulation_policy="ramp", accumulation_ramp="0:1", measure_noise_scale=False, logging_strategy="no",
            )  # fmt: skip
            # A policy of one's own: steps are timed for it.
            trainer = EfficientTrainer(args=args, accumulation_policy=lambda observation: 1, **parts)
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
            timer = trainer.trainopt.accumulation.controller.timer
            found.append((timer.micro_batch_seconds, timer.step_seconds))
    micro_batch, step = (statistics.median(values) for values in zip(*found, strict=True))
    ratios = sorted(s / m for m, s in found)
    return {
        "micro_batch_seconds": micro_batch, "step_seconds": step,
        "step_cost_range_in_micro_batches": [ratios[0], ratios[-1]],
        "command": " ".join(["python", "benchmarks/unit_costs.py", *sys.argv[1:]]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", default=["language", "vision", "code"])
    options = parser.parse_args()
    result = json.loads(COSTS.read_text()) if COSTS.exists() else {"tasks": {}}
    for name in options.tasks:
        result["tasks"][name] = measure(name, options.rounds)
        print(name, result["tasks"][name], flush=True)
    COSTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
