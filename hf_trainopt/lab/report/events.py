"""What `Trainer` has written for TensorBoard: the lines of its log with the time of each, its arguments, its model."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


# Where `TensorBoardCallback` writes, below the output folder.
_PLACES = ("events.out.tfevents.*", "runs/*/events.out.tfevents.*")


@dataclass
class Call:
    """One call of `train`.

    Args:
        start: Wall time of its begin, in seconds.
        lines: Lines of the log in order, each with the wall time that it was logged at.
        texts: JSON texts that were written at the begin: `args`, `model_config`.
    """

    start: float
    lines: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def first_step(self) -> int:
        return self.lines[0][1]["step"]


def event_files(folder: Path) -> list[Path]:
    """Return the event files of a run, by time."""
    return sorted((path for place in _PLACES for path in folder.glob(place)), key=lambda path: path.name)


def can_read_events() -> bool:
    """Whether tensorboard, the package that reads event files, is installed."""
    try:
        from tensorboard.backend.event_processing import event_file_loader  # noqa: F401
    except ImportError:
        return False
    return True


def read_calls(paths: Sequence[Path]) -> list[Call]:
    """Return the calls of `train` that event files tell of, in order; those without a line are left out.

    A file that begins without the arguments is of an evaluation after training; it goes on with the call before it.

    Raises:
        ImportError: tensorboard is not installed.
    """
    calls: list[Call] = []
    for path in paths:
        scalars: list[tuple[float, int, str, float]] = []
        for wall, step, tag, value in _values(path):
            if isinstance(value, float):
                scalars.append((wall, step, _key(tag), value))
            elif tag == "args/text_summary":
                _add_lines(calls, scalars)
                scalars = []
                calls.append(Call(wall, texts={"args": value}))
            elif tag == "model_config/text_summary" and calls:
                calls[-1].texts["model_config"] = value
        if scalars and not calls:
            calls.append(Call(scalars[0][0]))  # written by something else than Trainer.train
        _add_lines(calls, scalars)
    return [call for call in calls if call.lines]


def _values(path: Path) -> Iterator[tuple[float, int, str, float | dict[str, Any]]]:
    """Yield wall time, step, tag and value: a number, or the mapping that a JSON text has in it."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            if not value.HasField("tensor"):
                continue
            array = make_ndarray(value.tensor)
            if value.metadata.plugin_data.plugin_name == "scalars" and array.size == 1:
                yield event.wall_time, event.step, value.tag, float(array.item())
            elif value.tag.endswith("/text_summary") and array.size:
                try:
                    parsed = json.loads(array.ravel()[0])
                except (ValueError, TypeError, RecursionError):
                    continue
                if isinstance(parsed, dict):
                    yield event.wall_time, event.step, value.tag, parsed


def _key(tag: str) -> str:
    """Return the key of a log line from its tag, which `rewrite_logs` of transformers has made."""
    group, separator, name = tag.partition("/")
    return f"{group}_{name}" if separator and group in ("eval", "test") else name if group == "train" else tag


def _add_lines(calls: list[Call], scalars: Sequence[tuple[float, int, str, float]]) -> None:
    """Put numbers together to lines again: each `log` wrote its numbers one after the other."""
    before = ""
    for index, (wall, step, key, value) in enumerate(scalars):
        after = scalars[index + 1][2] if index + 1 < len(scalars) else ""
        lines = calls[-1].lines
        begins = (
            not before
            or step != lines[-1][1]["step"]
            or key in lines[-1][1]
            or key == "loss"
            or (key.startswith("eval_") and not before.startswith("eval_"))
            or (key == "train_runtime" and after == "train_samples_per_second")  # the end of `train`
        )
        if begins:
            lines.append((wall, {"step": step}))
        lines[-1][1][key] = value
        before = key


def joined_lines(calls: Sequence[Call]) -> list[tuple[float, dict[str, Any]]]:
    """Return the lines of a run over its calls, with seconds since it began.

    A call that goes on from a checkpoint replaces what earlier calls logged from there on. Its time is added to what
    they took to get there.
    """
    joined: list[tuple[float, dict[str, Any]]] = []
    for call in calls:
        joined = [(seconds, line) for seconds, line in joined if line["step"] < call.first_step]
        base = joined[-1][0] if joined else 0.0
        joined += [(base + wall - call.start, line) for wall, line in call.lines]
    return joined
