"""Reads a run from its output folder, without running anything that the files contain."""

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_trainopt.core.log_lines import is_last_line
from hf_trainopt.core.state import STATE_NAME as OWN_STATE_NAME
from hf_trainopt.placement.plan.plan import PlacementPlan

from .clock import Clock, clock_of_events, clock_of_history
from .events import can_read_events, event_files, joined_lines, read_calls
from .loss_scale import loss_scale
from .runs import Run
from .settings import ARGUMENTS_NAME, read_settings


STATE_NAME = "trainer_state.json"
PLAN_NAME = "placement.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def read_run(folder: str | Path) -> Run:
    """Read an output folder of `EfficientTrainer` or of stock `Trainer`, or a checkpoint in one.

    Args:
        folder: As in `output_dir`. `trainer_state.json` is taken from it or else from the last checkpoint that has
            one; results, model config and placement plan are taken if they are there.

    Raises:
        ValueError: The folder is not there, or has nothing of a run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} isn't a folder; pass the output_dir of a run.")
    notes: list[str] = []
    state_path, state = _read_state(folder, notes)
    results = _read_results(folder, notes)
    events, texts = _read_events(folder, notes)
    if state is None and not results and not events:
        detail = f" ({' '.join(notes)})" if notes else ""
        raise ValueError(
            f"{folder} isn't the output folder of a run that was saved: there is neither {STATE_NAME} (in it or in a "
            f"checkpoint-N) nor all_results.json{detail}. Call trainer.save_state() after train() or save "
            "checkpoints. Of a comparison, pass the folder that `hf-trainopt compare` was given."
        )
    is_of_checkpoint = state_path is not None and state_path.parent != folder
    if state is None and events:
        notes.append(f"There is no {STATE_NAME}: the log is from the TensorBoard events.")
    elif state is None:
        notes.append(f"There is no {STATE_NAME}, so that only the final results are known.")
    elif is_of_checkpoint:
        notes.append(f"The log comes from {state_path.parent.name}: the run has not saved its state at the end.")
    state = dict(state or {})
    history = state.pop("log_history", None)
    lines = [line for line in history if isinstance(line, dict)] if isinstance(history, list) else []
    if events and not _agree(lines, events):
        notes.append("The TensorBoard events are of another run and are left out.")
        events, texts = [], {}
    if is_of_checkpoint or not lines:
        added = [line for _, line in events if _comes_after(line, lines)]
        if added and lines:
            notes.append(f"What comes after it ({len(added)} lines) is from the TensorBoard events.")
            state.pop("global_step", None)
        lines += added
    config = _read_config(folder, state_path)
    run = Run(
        name=_name_of(folder),
        folder=folder,
        history=tuple(lines),
        state=state,
        results=results,
        plan=_read_plan(folder, notes),
        model=model_name(config or texts.get("model_config", {})),
        settings=_read_settings(folder, state_path, notes) or texts.get("args", {}),
        notes=tuple(notes),
    )
    return with_derived(run, config, clock_of_events(events))


def with_derived(run: Run, config: Mapping[str, Any], clock: Clock | None = None) -> Run:
    """Return a run with what follows from the rest of it: what its losses are, and seconds where none were logged.

    Args:
        run: The run.
        config: Config of its model, as it was saved.
        clock: From elsewhere than the log, which is taken where the log has no times but that of the whole run.
    """
    run = replace(run, loss_scale=loss_scale(run.settings, config, run.history))
    if "train_time_s" in run.keys:
        return run
    own = clock_of_history(run.history, run.is_resumed)
    return replace(run, clock=own if clock is None or (own is not None and not own.is_uniform) else clock)


def _read_events(folder: Path, notes: list[str]) -> tuple[list[tuple[float, dict[str, Any]]], dict[str, Any]]:
    """Return the lines in TensorBoard's event files, with seconds since the begin, and the texts beside them."""
    folder = folder.resolve()
    paths = event_files(folder.parent if _CHECKPOINT.fullmatch(folder.name) else folder)
    if not paths:
        return [], {}
    if not can_read_events():
        notes.append("There are TensorBoard events, which tensorboard reads: pip install tensorboard.")
        return [], {}
    try:
        calls = read_calls(paths)
    except Exception as error:  # whatever a damaged file makes of tensorboard
        notes.append(f"The TensorBoard events can't be read ({error}).")
        return [], {}
    return joined_lines(calls), calls[-1].texts if calls else {}


def _agree(lines: list[dict[str, Any]], events: list[tuple[float, dict[str, Any]]]) -> bool:
    """Whether events have the losses of a log: TensorBoard keeps 32 bits of them."""
    logged = {line["step"]: line["loss"] for _, line in events if "loss" in line}
    pairs = [(line["loss"], logged.get(line.get("step"))) for line in lines if isinstance(line.get("loss"), float)]
    same = [value for value, other in pairs if other is not None and (math.isclose(value, other, rel_tol=1e-4)
            or not math.isfinite(value + other))]  # fmt: skip
    return not pairs or 2 * len(same) > len(pairs)


def _last_step(lines: Sequence[Any]) -> int:
    """Return the last step that lines of a log have; -1 if none does."""
    steps = (line.get("step") for line in lines if isinstance(line, dict))
    return max((step for step in steps if isinstance(step, int)), default=-1)


def _comes_after(line: Mapping[str, Any], lines: list[dict[str, Any]]) -> bool:
    """Whether a line was logged behind all of a log: later, or at the same step as the end of `train`."""
    last = _last_step(lines)
    return line["step"] > last or (line["step"] == last and is_last_line(line))


def _read_settings(folder: Path, state_path: Path | None, notes: list[str]) -> dict[str, Any]:
    """Return the arguments of a run; those of `checkpoint-N` are those of its last call of `train`."""
    places = [folder, *([state_path.parent] if state_path else []), *_checkpoints(folder)]
    path = next((place / ARGUMENTS_NAME for place in places if (place / ARGUMENTS_NAME).is_file()), None)
    if path is None:
        return {}
    try:
        return read_settings(path)
    except ValueError as error:
        notes.append(f"{path.name} can't be read ({error}).")
        return {}


def read_beside(folder: Path, notes: list[str]) -> tuple[PlacementPlan | None, dict[str, Any], dict[str, Any]]:
    """Return placement plan, model config and arguments in an output folder, which need not be there."""
    if not folder.is_dir():
        return None, {}, {}
    return _read_plan(folder, notes), _read_config(folder, None), _read_settings(folder, None, notes)


def is_run(folder: Path) -> bool:
    """Whether a folder has something of a run in it."""
    states = (folder / STATE_NAME, *(path / STATE_NAME for path in _checkpoints(folder)))
    return any(path.is_file() for path in states) or any(folder.glob("*_results.json")) or bool(event_files(folder))


def _name_of(folder: Path) -> str:
    path = folder.resolve()
    return f"{path.parent.name}/{path.name}" if _CHECKPOINT.fullmatch(path.name) else path.name or str(path)


def _read_json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """Return a JSON mapping; `None`, with a note, if there is something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "it is no JSON"
        notes.append(f"{path.name} cannot be read ({reason}).")
        return None
    if not isinstance(values, dict):
        notes.append(f"{path.name} has no mapping in it.")
        return None
    return values


def _checkpoints(folder: Path) -> list[Path]:
    """Return checkpoint folders, the last one first."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _read_state(folder: Path, notes: list[str]) -> tuple[Path | None, dict[str, Any] | None]:
    for place in (folder, *_checkpoints(folder)):
        state = _read_json(place / STATE_NAME, notes)
        if state is not None:
            ours = _read_json(place / OWN_STATE_NAME, notes) or {}
            with contextlib.suppress(KeyError, TypeError):  # stock `Trainer`, or nothing measured
                state["measurements"] = ours["parts"]["measurements"]["callbacks"]
            _add_line_of_checkpoint(state, ours)
            return place / STATE_NAME, state
    return None, None


def _add_line_of_checkpoint(state: dict[str, Any], ours: Mapping[str, Any]) -> None:
    """Add to a log that ends before its checkpoint how far that is; steps after the last line would lack samples."""
    history, step = state.get("log_history"), state.get("global_step")
    last = _last_step(history) if isinstance(history, list) else -1
    if last < 0 or not isinstance(step, int) or step <= last:
        return
    line = {"step": step}
    with contextlib.suppress(KeyError, TypeError):  # as above, or k doesn't vary
        line["samples_seen"] = ours["parts"]["accumulation"]["cursor"]["samples_seen"]
    for callback in state.get("measurements") or []:
        with contextlib.suppress(KeyError, TypeError):
            line["train_time_s"] = callback["attributes"]["meter"]["seconds"]
    history.append(line)


def _read_results(folder: Path, notes: list[str]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    # all_results.json has the others in it where `save_metrics` wrote them; it is read last, so that it wins.
    paths = sorted(folder.glob("*_results.json"), key=lambda path: (path.name == "all_results.json", path.name))
    for path in paths:
        merged |= _read_json(path, notes) or {}
    return merged


def _read_plan(folder: Path, notes: list[str]) -> PlacementPlan | None:
    for path in (folder / PLAN_NAME, folder.parent / PLAN_NAME):
        in_checkpoint = _CHECKPOINT.fullmatch(folder.resolve().name)
        if path.is_file() and (path.parent == folder or in_checkpoint):
            try:
                return PlacementPlan.load(path)
            except ValueError as error:
                notes.append(f"The placement plan is left out: {error}")
    return None


def _read_config(folder: Path, state_path: Path | None) -> dict[str, Any]:
    places = [folder, *([state_path.parent] if state_path else []), *_checkpoints(folder)]
    return next((config for place in places if (config := _read_json(place / "config.json", []))), {})


def model_name(config: Mapping[str, Any]) -> str | None:
    """Return what a model config calls its model: the class, and where the weights came from."""
    classes = config.get("architectures")
    kind = classes[0] if isinstance(classes, list) and classes else config.get("model_type")
    origin = config.get("_name_or_path") or config.get("architecture")
    parts = [str(part) for part in (kind, origin) if part]
    return f"{parts[0]} ({parts[1]})" if len(parts) == 2 else parts[0] if parts else None
