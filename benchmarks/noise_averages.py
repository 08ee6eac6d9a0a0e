"""How long to average for the noise scale, and how often to measure: how far the estimate is off, and why.

    python benchmarks/noise_averages.py --task language vision

Trains at k = 2 with the rate of k = 8 and measures every window; then plays these windows to the tracker as if every
n-th had been measured. There are n such series in one run, and they differ by nothing but the noise of the estimate.
Writes `benchmarks/results/noise_averages.json`. Estimates are held against the ratio of centred means over a tenth of
the data, of all windows.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path


RESULT = Path(__file__).resolve().parent / "results" / "noise_averages.json"
RATES = {"language": 2e-3, "vision": 7e-4}
HALF_LIVES = (0.025, 0.05, 0.1, 0.2)
INTERVALS = (2, 4, 8)
# Means over less than this share of the data, at either end, aren't compared.
MARGIN = 0.1


def measured_windows(name: str, seed: int) -> list:
    """Return the statistics of all windows of a run."""
    import torch
    import transformers
    from tasks import TASKS, build, common_arguments

    from hf_trainopt import EfficientTrainer, EfficientTrainingArguments
    from hf_trainopt.accumulation.noise_scale import NoiseScaleTracker

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    parts = build(TASKS[name], seed)
    for key in ("eval_dataset", "compute_metrics"):
        parts.pop(key, None)
    windows = []
    stock = NoiseScaleTracker.update
    NoiseScaleTracker.update = lambda self, seen: windows.append(seen) or stock(self, seen)
    try:
        with tempfile.TemporaryDirectory() as folder:
            args = EfficientTrainingArguments(
                **common_arguments(TASKS[name], folder), max_steps=TASKS[name].num_micro_batches // 8,
                gradient_accumulation_steps=8, learning_rate=RATES[name], seed=seed, accumulation_policy="ramp",
                accumulation_ramp="0:2", lr_batch_scaling="surge", measure_noise_scale=True, noise_scale_interval=1,
                logging_strategy="no",
            )  # fmt: skip
            trainer = EfficientTrainer(args=args, **parts)
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
    finally:
        NoiseScaleTracker.update = stock
    return windows


def truth_of(windows: list) -> list[float]:
    """Return the noise scale at each window from centred means over a tenth of the data."""
    from hf_trainopt.accumulation.noise_scale import estimate_noise

    pairs = [estimate_noise(window) for window in windows]
    half = len(windows) // 20
    found = []
    for index, window in enumerate(windows):
        near = pairs[max(0, index - half) : index + half + 1]
        trace, square = (statistics.fmean(column) for column in zip(*near, strict=True))
        found.append(trace / (window.num_items / window.num_samples) / square if square > 0 else math.nan)
    return found


def series(windows: list, half_life: float, interval: int, offset: int) -> list[float]:
    """Return the noise scale at each window, as it is known where every n-th window was measured."""
    from hf_trainopt.accumulation.noise_scale import NoiseScaleTracker

    tracker = NoiseScaleTracker(half_life * sum(window.num_samples for window in windows))
    found = []
    for index, window in enumerate(windows):
        if index % interval == offset:
            tracker.update(window)
        else:
            tracker.skip(window.num_samples)
        noise = tracker.estimate()
        found.append(noise.value if noise is not None and math.isfinite(noise.value) else math.nan)
    return found


def deviations(windows: list, truth: list[float], half_life: float, interval: int) -> dict[str, float]:
    """Return how far the estimate is off in log2: its mean (the lag), its spread between series, and both together."""
    every = [series(windows, half_life, interval, offset) for offset in range(interval)]
    margin = round(MARGIN * len(windows))
    means, spreads, squares, unknown = [], [], [], 0
    for index in range(margin, len(windows) - margin):
        logs = [math.log2(one[index] / truth[index]) for one in every if one[index] / truth[index] > 0]
        unknown += interval - len(logs)
        if len(logs) > 1:
            means.append(statistics.fmean(logs))
            spreads.append(statistics.variance(logs))
            squares += [value**2 for value in logs]
    return {
        "half_life": half_life, "interval": interval, "lag": statistics.fmean(means),
        "spread": math.sqrt(statistics.fmean(spreads)), "rms": math.sqrt(statistics.fmean(squares)),
        "unknown": unknown / (interval * (len(windows) - 2 * margin)),
    }  # fmt: skip


def noise_averages_table() -> str:
    """Return the table of `convergence.md`."""
    from page_tables import table

    rows = []
    for task, entry in json.loads(RESULT.read_text())["tasks"].items():
        for row in entry["rows"]:
            cells = [f"{row[name]:+.2f}" if name == "lag" else f"{row[name]:.2f}" for name in ("lag", "spread", "rms")]
            rows.append([task, f"{row['half_life']:g}", row["interval"], *cells, f"{row['unknown']:.0%}"])
    header = ["task", "half-life, share of the data", "measured, every n-th window", "lag, log2", "spread, log2",
              "rms, log2", "without a value"]  # fmt: skip
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=tuple(RATES), default=list(RATES))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    record = json.loads(RESULT.read_text()) if RESULT.exists() else {"tasks": {}}
    for task in options.task:
        windows = measured_windows(task, options.seed)
        truth = truth_of(windows)
        settings = [(h, 8) for h in HALF_LIVES] + [(0.05, n) for n in INTERVALS if n != 8]
        record["tasks"][task] = {
            "command": " ".join(["python", "benchmarks/noise_averages.py", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"), "seed": options.seed,
            "truth_in_micro_batches": [
                round(truth[int(share * len(windows))] / (windows[0].num_samples / 2), 2)
                for share in (0.1, 0.25, 0.5, 0.75, 0.9)
            ],
            "rows": [deviations(windows, truth, half_life, interval) for half_life, interval in settings],
        }  # fmt: skip
        RESULT.write_text(json.dumps(record, indent=1) + "\n")
        print(task, json.dumps(record["tasks"][task]["rows"]))


if __name__ == "__main__":
    main()
