"""The table that a script prints at its end."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Trainer

from hf_trainopt.placement.plan.budget import gib


def peak_memory_gib(device: torch.device) -> tuple[float, str]:
    """Return the peak memory in GiB and what it counts: tensors on a CUDA device, or the whole process elsewhere.

    Raises:
        OSError: on a system without the `resource` module (Windows) and without CUDA.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30, "CUDA tensors"
    try:
        import resource
    except ImportError as error:
        raise OSError("The peak memory of a process cannot be read on this system.") from error
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    return peak / (2**30 if sys.platform == "darwin" else 2**20), "process"


def summary_rows(trainer: Trainer, train_metrics: Mapping[str, Any], eval_metrics: Mapping[str, Any]) -> list[tuple]:
    """Return `(name, value)` pairs of what a run did; what was not measured is left out."""
    rows: list[tuple[str, str]] = []
    history = trainer.state.log_history
    if train_metrics:
        reference = trainer.args.gradient_accumulation_steps
        used = getattr(trainer, "accumulation_range", None)
        chosen = f"{used[0]} to {used[1]}, last {used[2]} (reference {reference})" if used else f"{reference} (fixed)"
        rows.append(("micro-batches per step (k)", chosen))
        noise = [entry for entry in history if entry.get("noise_scale_low") is not None]
        if noise:
            first, last = _noise_text(noise[0]), _noise_text(noise[-1])
            rows.append(
                ("gradient noise scale, samples", first if len(noise) == 1 else f"{first} at first, {last} at the end")
            )
        rows.append(("optimizer steps", str(trainer.state.global_step)))
        rows.append(("samples/s", f"{train_metrics['train_samples_per_second']:.4g}"))
        rows.append(("train loss (mean of the run)", f"{train_metrics['train_loss']:.4f}"))
    plan = getattr(trainer, "placement_plan", None)
    if train_metrics and plan is not None:
        rows.append(("placement", plan.summary()))
        if plan.predicted_peak_bytes is not None:
            peaks = f"{gib(plan.predicted_peak_bytes)} predicted, {gib(plan.baseline_peak_bytes)} without placement"
            measured = plan.measured_peak_bytes
            rows.append(("peak of a step", f"{gib(measured)} measured, {peaks}" if measured is not None else peaks))
    for key, label in (("eval_loss", "eval loss"), ("perplexity", "perplexity"), ("eval_accuracy", "accuracy")):
        if key in eval_metrics:
            rows.append((label, f"{eval_metrics[key]:.4f}"))
    try:
        peak, counted = peak_memory_gib(trainer.args.device)
    except OSError:
        return rows
    # Who measures peaks by phase resets the mark.
    peak = max([peak, *(entry["peak_memory_gib"] for entry in history if "peak_memory_gib" in entry)])
    rows.append((f"peak memory ({counted}), GiB", f"{peak:.2f}"))
    return rows


def _noise_text(entry: Mapping[str, Any]) -> str:
    """The noise scale of a log line; only its lower end where the gradient is not resolved from zero."""
    if "noise_scale" in entry and "noise_scale_high" in entry:
        return f"{entry['noise_scale']:.4g}"
    return f"over {entry['noise_scale_low']:.4g}"


def print_summary(
    trainer: Trainer,
    train_metrics: Mapping[str, Any],
    eval_metrics: Mapping[str, Any],
    next_command: Sequence[str] = (),
) -> None:
    """Print the table on the main process, and `next_command`, one line of a shell command each, below it."""
    if not trainer.is_world_process_zero():
        return
    rows = summary_rows(trainer, train_metrics, eval_metrics)
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"  {name:<{width}}  {value}" for name, value in rows))
    print(f"  {'saved in':<{width}}  {trainer.args.output_dir}")
    if next_command:
        print("\nThe same at full size:\n\n  " + " \\\n      ".join(next_command) + "\n")
