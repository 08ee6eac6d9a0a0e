"""Starts a script and stops it before the first step: `python -m hf_trainopt.lab.doctor.probe REPORT SCRIPT …`.

Nothing is guessed: the script loads its data and builds its Trainer, and that has made all its decisions when we look.
"""

import contextlib
import io
import json
import logging
import os
import runpy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from ...arguments import EfficientTrainingArgumentsMixin
from ...placement.errors import PlacementError
from ...trainer import EfficientTrainerMixin
from .memory import MemoryForecast
from .sections import describe


# Loggers whose warnings are about the run.
_LOGGERS = ("hf_trainopt", "transformers", "accelerate", "datasets")


class Examined(BaseException):
    """Ends a script; no `Exception`, which a script may catch."""


class _Examination(TrainerCallback):
    """Describes the run as it begins, and ends it."""

    def __init__(self, trainer: Trainer, resumed_from: str | None, memory: MemoryForecast, found: dict[str, Any]):
        super().__init__()
        self._trainer, self._resumed_from, self._memory, self._found = trainer, resumed_from, memory, found

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self._found["sections"] = describe(self._trainer, train_dataloader, self._resumed_from, self._memory)
        raise Examined


@contextlib.contextmanager
def examined_trainers(found: dict[str, Any]) -> Iterator[None]:
    """Context in which `Trainer.train` does what comes before the first step, fills `found` and ends the script."""
    stock = Trainer.train

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if not isinstance(self, EfficientTrainerMixin) or not isinstance(self.args, EfficientTrainingArgumentsMixin):
            raise ValueError(
                f"the script trains with {type(self).__name__}, in which none of our parts is; use EfficientTrainer "
                "and EfficientTrainingArguments, or put EfficientTrainerMixin before that class."
            )
        memory = MemoryForecast(self)
        # First: what trackers and the script's own callbacks begin with a run is not begun.
        self.callback_handler.callbacks.insert(0, _Examination(self, resume_from_checkpoint, memory, found))
        try:
            return stock(self, resume_from_checkpoint, *args, **kwargs)
        except PlacementError as error:
            # What the other parts do is told all the same, and with it what a step takes without a placement.
            found["refusal"] = " ".join(str(error).split())
            self.args.memory_budget = self.args.checkpoint_placement = None
            self.args.memory_rewrites = "auto"
            return stock(self, resume_from_checkpoint, *args, **kwargs)

    Trainer.train = train
    try:
        yield
    finally:
        Trainer.train = stock


class _Warnings(logging.Handler):
    """Keeps each warning once."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if record.funcName != "set_up_logging":  # which rank this is, said at the level of a warning
            self.add(record.getMessage())

    def add(self, text: str) -> None:
        self.texts[" ".join(text.split())] = None


@contextlib.contextmanager
def _kept_warnings(printed: io.StringIO) -> Iterator[_Warnings]:
    """Context in which warnings are kept and every other line of a log goes to `printed`."""
    handler, root = _Warnings(), logging.getLogger()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = root.level, list(root.handlers), [logger.level for logger in loggers]
    # transformers and datasets have handlers of their own, which hold the stderr of the time of their import.
    streams = {h: h.stream for logger in loggers for h in logger.handlers if isinstance(h, logging.StreamHandler)}
    for stream in streams:
        stream.setStream(printed)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            yield handler
        for warning in caught:
            if issubclass(warning.category, UserWarning | FutureWarning):
                handler.add(str(warning.message))
    finally:
        for stream, where in streams.items():
            stream.setStream(where)
        for logger, level in zip(loggers, before[2], strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        root.setLevel(before[0])
        root.handlers[:] = before[1]


def examine(script: str, arguments: list[str]) -> dict[str, Any]:
    """Run a script until its Trainer would take the first step.

    Returns:
        `sections`: title -> list of (name, text); `warnings`: list of texts; `refusal`: why no placement as asked for
        can be had, if so (the sections are then those without one). On ranks other than the first, the same.

    Raises:
        ValueError: The script would not train, with the reason.
    """
    found: dict[str, Any] = {}
    argv, path = sys.argv, list(sys.path)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    printed = io.StringIO()
    try:
        with (
            _kept_warnings(printed) as kept,
            examined_trainers(found),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            runpy.run_path(script, run_name="__main__")
    except Examined:
        return found | {"warnings": list(kept.texts)}
    except SystemExit as end:
        said = [line for line in printed.getvalue().splitlines() if line.strip()]
        if end.code not in (None, 0):
            last = said[-1] if said else f"exit code {end.code}"
            reason = str(end.code) if isinstance(end.code, str) else last
            raise ValueError(f"this run would end before it trains: {reason}") from None
    except ImportError as error:
        raise ValueError(f"this run would end before it trains: {error}") from error
    except Exception as error:
        text = " ".join(str(error).split())
        raise ValueError(f"this run would end before it trains: {type(error).__name__}: {text}") from error
    finally:
        sys.argv, sys.path[:] = argv, path
    raise ValueError(f"{script} has ended without training; is --do_train missing?")


def main(argv: list[str] | None = None) -> None:
    """Examine a script as one process of a launcher; the first process writes the report, or the error, as JSON."""
    report, script, *arguments = sys.argv[1:] if argv is None else argv
    try:
        found = examine(script, arguments)
    except ValueError as error:
        found = {"error": str(error)}
    if os.environ.get("RANK", "0") == "0":
        Path(report).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
