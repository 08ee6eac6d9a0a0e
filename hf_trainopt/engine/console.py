"""Log lines on a terminal: the numbers to watch during a run, in at most 120 characters.

Trackers and `trainer_state.json` get every key. Stock's `PrinterCallback` and `ProgressCallback` say where to print,
and on which ranks; only the text is ours, and only where lines have keys of ours. Subclasses of them are left alone.
"""

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback


WIDTH = 120
_SEPARATOR = " | "
_ELLIPSIS = "..."
# Stock's keys that a training line leaves out, or shows in its own words.
_STOCK_KEYS = ("loss", "learning_rate", "grad_norm", "epoch", "num_input_tokens_seen", "total_flos")


class RunClock:
    """Tells the time that a run still needs, from the share of its data that it has used so far."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._start: tuple[float, float] | None = None  # time and progress

    def start(self, progress: float) -> None:
        """Begin; a resumed run begins at the progress of its checkpoint."""
        self._start = self._now(), progress

    def seconds_left(self, progress: float) -> float | None:
        """Return the seconds to the end, evaluations and saves included; `None` where they can't be known yet."""
        if self._start is None or not self._start[1] < progress <= 1:
            return None
        started, first = self._start
        return (self._now() - started) * (1 - progress) / (progress - first)


class ConsolePrinter(TrainerCallback):
    """Prints in place of one of stock's printing callbacks.

    Args:
        stock: That callback. A `ProgressCallback` prints above its bar.
        seconds_left: Time that the run still needs, if known.
        is_ours: Whether a key of a line is one that we add.
    """

    def __init__(
        self,
        stock: PrinterCallback | ProgressCallback,
        seconds_left: float | None,
        is_ours: Callable[[str], bool],
    ):
        self._stock = stock
        self._seconds_left = seconds_left
        self._is_ours = is_ours

    def on_log(self, args, state, control, logs=None, **kwargs):
        if type(self._stock) is PrinterCallback:
            logs.pop("total_flos", None)  # as stock's does: the results of `train` then lack it
            shown = state.is_local_process_zero
        else:
            shown = state.is_world_process_zero and self._stock.training_bar is not None
        if not shown:
            return
        text = console_text(logs, self._seconds_left, self._is_ours)
        if type(self._stock) is PrinterCallback:
            sys.stdout.write(text + "\n")
        else:
            self._stock.training_bar.write(text)


def console_text(logs: Mapping[str, Any], seconds_left: float | None, is_ours: Callable[[str], bool]) -> str:
    """Return what a terminal shows of a logged line.

    A line of training has loss, learning rate, k, noise scale with its 95 % interval, peak memory (once the peak of a
    step and the plan for it), time left and epoch, and then as many keys of other code as fit. Any other line (an
    evaluation, the end of a run) has all its keys but ours and its rates. It goes on in a second line where it must.

    Args:
        logs: The line.
        seconds_left: Time that the run still needs, if known.
        is_ours: Whether a key is one that we add.
    """
    others = {key: value for key, value in logs.items() if not is_ours(key) and key not in _STOCK_KEYS}
    epoch = [f"epoch {logs['epoch']:.2f}"] if isinstance(logs.get("epoch"), int | float) else []
    if "loss" in logs and "learning_rate" in logs:
        parts = [
            f"loss {logs['loss']:#.4g}",  # of one width, so that the columns of lines stand below each other
            f"lr {logs['learning_rate']:.2e}",
            *_training_parts(logs),
            *([] if seconds_left is None else [f"{duration(seconds_left)} left"]),
            *epoch,
        ]
        return _cut([*parts, *_named(others)])
    rest = {key: value for key, value in others.items() if not key.endswith("_per_second")}
    own = {key: value for key, value in logs.items() if key in ("loss", "learning_rate", "grad_norm")}
    memory = _memory(logs) if "train_runtime" in logs else []
    return _wrapped([*_named(own), *_named(rest), *memory, *epoch])


def _training_parts(logs: Mapping[str, Any]) -> list[str]:
    parts = []
    if "accumulation_steps" in logs:
        parts.append(f"k {logs['accumulation_steps']}")
    if "noise_scale" in logs or "noise_scale_low" in logs:
        parts.append(f"noise scale {_noise(logs)}")
    return parts + _memory(logs)


def _memory(logs: Mapping[str, Any]) -> list[str]:
    """Return the peak; under a memory budget, once, that of a step beside what was planned."""
    if "measured_peak_gib" in logs:
        planned = f" (plan: {logs['predicted_peak_gib']:.3g})" if "predicted_peak_gib" in logs else ""
        return [f"step peak {logs['measured_peak_gib']:.3g} GiB{planned}"]
    return [f"memory {logs['peak_memory_gib']:.2f} GiB"] if "peak_memory_gib" in logs else []


def _noise(logs: Mapping[str, Any]) -> str:
    value, low, high = (logs.get(f"noise_scale{end}") for end in ("", "_low", "_high"))
    if low is None:
        return _count(value)
    interval = f">{_count(low)}" if high is None else f"{_count(low)}-{_count(high)}"
    return interval if high is None and value in (None, low) else f"{_count(value)} ({interval})"


def _count(value: float) -> str:
    """Return a count to three digits: `31.2`, `312`, `31.2k`, `3.12M`."""
    value = value if value >= 0.01 else 0.0
    for unit, suffix in ((1, ""), (1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T")):
        if (shown := float(f"{value / unit:.3g}")) < 1000:
            return f"{shown:g}{suffix}"
    return f"{value:.3g}"


def _number(value: Any, digits: int = 4) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Return a time in its two largest units: `45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{round(seconds)} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def _named(values: Mapping[str, Any]) -> Iterable[str]:
    for key, value in values.items():
        text = " ".join(f"{key} {_number(value)}".split())
        yield text if len(text) <= WIDTH else text[: WIDTH - len(_ELLIPSIS)] + _ELLIPSIS


def _cut(parts: list[str]) -> str:
    """Return as many parts as fit on one line, and an ellipsis if some don't."""
    line = _SEPARATOR.join(parts)
    while len(line) > WIDTH:
        parts = parts[:-1]
        line = _SEPARATOR.join([*parts, _ELLIPSIS])
    return line


def _wrapped(parts: list[str]) -> str:
    lines = [""]
    for part in parts:
        longer = _SEPARATOR.join(filter(None, [lines[-1], part]))
        if len(longer) <= WIDTH or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(part)
    return "\n".join(lines)
