"""Output folders as runs leave them, made without running anything."""

import json
import math
from pathlib import Path
from typing import Any

from hf_trainopt.lab.compare.arms import ArmSpec
from hf_trainopt.lab.compare.comparison import compare, freeze_target
from hf_trainopt.lab.compare.records import RECORD_FORMAT, RunSpec, save


def stock_history(steps: int = 10, rate: float = 0.1) -> list[dict[str, Any]]:
    """Lines of a stock `Trainer`: a loss and a learning rate each step, an evaluation every other one."""
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 3 * math.exp(-rate * step) + 1
        common = {"epoch": step / steps, "step": step}
        lines.append({"loss": loss, "grad_norm": 1 / step, "learning_rate": 1e-3 * (1 - step / steps), **common})
        if step % 2 == 0:
            lines.append({"eval_loss": loss + 0.1, "eval_runtime": 1.0, "eval_samples_per_second": 9.0, **common})
    lines.append({"train_runtime": 20.0, "train_samples_per_second": 4.0 * steps / 20, "train_loss": 2.0,
                  "epoch": 1.0, "step": steps})  # fmt: skip
    return lines


def our_history(steps: int = 10, rate: float = 0.2) -> list[dict[str, Any]]:
    """The same with all that `EfficientTrainer` adds; from half of the run on the noise scale is not resolved."""
    lines = stock_history(steps, rate)
    for line in lines:
        step = line["step"]
        k = 1 if step <= steps // 2 else 4
        samples = 2 * min(step, steps // 2) + 8 * max(0, step - steps // 2)
        line |= {
            "accumulation_steps": k, "effective_batch_size": 2 * k, "samples_seen": samples,
            "train_time_s": 1.5 * step, "noise_scale": 5.0 + step, "noise_scale_low": 2.0 + step,
            "peak_memory_gib": 1.25,
            "peak_memory_forward_backward_gib": 1.25, "peak_memory_optimizer_gib": 0.75,
        }  # fmt: skip
        if step <= steps // 2:
            line["noise_scale_high"] = 20.0 + step
        if "loss" in line:
            line |= {"samples_per_second": 4.0, "tokens_per_second": 400.0}
    lines[-1] |= {"samples_per_second": 5.0, "tokens_per_second": 500.0}
    return lines


def write_run(folder: Path, history: list[dict[str, Any]], **state: Any) -> Path:
    """Write a folder with a `trainer_state.json`."""
    folder.mkdir(parents=True)
    steps = max((line["step"] for line in history), default=0)
    values = {"global_step": steps, "max_steps": steps, "log_history": history, "stateful_callbacks": {}, **state}
    (folder / "trainer_state.json").write_text(json.dumps(values))
    return folder


def write_comparison(folder: Path, histories: dict[str, list[list[dict[str, Any]]]], result: bool = True) -> Path:
    """Write a folder of `hf-trainopt compare` with the code that it uses; the first arm is the baseline.

    Args:
        folder: Where.
        histories: Arm -> a log for each seed; `None`: a run that has failed.
        result: Whether all runs were made, so that there is a `comparison.json`.
    """
    machine = {"processor": "p", "cores": 2, "threads": 1, "devices": []}
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for name, logs in histories.items():
        for seed, history in enumerate(logs):
            run = RunSpec(ArmSpec(name, ()), seed, folder)
            record = {"format": RECORD_FORMAT, "arm": {"name": name, "arguments": []}, "seed": seed, "command": "c",
                      "identity": "i"}  # fmt: skip
            if history is None:
                record |= {"status": "failed", "exit_code": 1, "errors": "it broke"}
            else:
                record |= {"status": "finished", "log_history": history, "optimizer_steps": history[-1]["step"],
                           "machine": machine, "versions": {"torch": "2"}, "peak_resident_gib": 1.0}  # fmt: skip
            save(run.record, record)
            by_arm.setdefault(name, []).append(record)
    if result:
        baseline = next(iter(histories))
        target = freeze_target(by_arm[baseline][0], "eval_loss", None, 0.8, None)
        save(folder / "comparison.json", compare("run_x.py", baseline, by_arm, target, "eval_loss").to_dict())
    return folder
