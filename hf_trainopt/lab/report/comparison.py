"""Results of `hf-trainopt compare`, read from its folder: `comparison.json`, and the runs from `records/`."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_trainopt.lab.compare.arms import STOCK
from hf_trainopt.lab.compare.comparison import RATIOS, SCHEMA_VERSION, ArmResult, Comparison
from hf_trainopt.lab.compare.records import RECORD_FORMAT
from hf_trainopt.lab.compare.render import machine_words, ratio_rows, ratio_words, target_words, value_rows
from hf_trainopt.lab.compare.statistics import Estimate
from hf_trainopt.metrics.targets import Target

from .contents import Table
from .reading import model_name, read_beside, with_derived
from .runs import Run, number
from .summary import figure


RESULT_NAME, RECORDS_NAME = "comparison.json", "records"

_REMEDY = "run the same `hf-trainopt compare` command again, which keeps finished runs"


@dataclass(frozen=True)
class ComparisonFolder:
    """What is in a folder of `hf-trainopt compare`.

    Args:
        folder: The folder.
        result: What `comparison.json` says; `None` while it has not been written.
        runs: Name of an arm, and one of its finished runs; in the order of the arms, then of seeds.
        others: The same for records that the result does not stand on: those of a sweep, and what earlier calls with
            other arms or more seeds have left.
        notes: What could not be read.
    """

    folder: Path
    result: Comparison | None
    runs: tuple[tuple[str, Run], ...] = ()
    others: tuple[tuple[str, Run], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def target(self) -> Target | None:
        """The target that was frozen."""
        return self.result.target if self.result is not None else None

    def text(self) -> tuple[str, ...]:
        """Return what the runs are, in paragraphs."""
        if self.result is None:
            unfinished = f"There is no {RESULT_NAME} yet: {_REMEDY}. Below are the runs that have finished."
            return (unfinished, *self.notes)
        words = [ratio_words(self.result, self.result.baseline)] if len(self.result.arms) > 1 else []
        return (*words, f"Script: {self.result.script}. {machine_words(self.result)}", *self.notes)

    def tables(self) -> tuple[Table, ...]:
        """Return what has no curve on the page: arms without records, and runs that are not compared."""
        if self.result is None:
            return ()
        tables = []
        drawn = {name for name, _ in self.runs}
        if any(arm.name not in drawn for arm in self.result.arms):
            rows = tuple(tuple(_said(cell) for cell in row) for row in value_rows(self.result))
            arms = (arm.name for arm in self.result.arms)
            tables.append(Table(("", *arms), rows, f"As {RESULT_NAME} has it: geometric mean (lowest to highest)"))
        if self.others and self.result.target is not None:
            metric = self.result.target.metric
            swept = tuple((name, _metric(run, metric)) for name, run in self.others if _is_swept(name))
            left = tuple((run.name, _metric(run, metric)) for name, run in self.others if not _is_swept(name))
            for first, rows, title in (
                ("setting", swept, "Search for the best fixed setting"),
                ("run", left, "Earlier runs that are not compared"),
            ):
                if rows:
                    tables.append(Table((first, f"{metric}, last"), rows, title, folded=True))
        return tuple(tables)


def _is_swept(name: str) -> bool:
    return name.startswith(f"{STOCK}, k = ")  # as `sweep_arms` names them


def _said(cell: str) -> str:
    return "not known" if cell == "–" else cell


def _metric(run: Run, metric: str) -> str:
    value = run.last(metric)
    return "not recorded" if value is None else f"{value:.4f}" if math.isfinite(value) else figure(value)


# ---- Reading -------------------------------------------------------------------------------------------------------


def is_comparison(folder: Path) -> bool:
    """Whether a folder is one of `hf-trainopt compare`."""
    return (folder / RESULT_NAME).is_file() or any((folder / RECORDS_NAME).glob("*.json"))


def read_comparison(folder: Path) -> ComparisonFolder:
    """Read a folder of `hf-trainopt compare`.

    Raises:
        ValueError: `comparison.json` cannot be read, or there is neither it nor a finished run.
    """
    path = folder / RESULT_NAME
    result = _read_result(path) if path.is_file() else None
    notes: list[str] = []
    records = list(_read_records(folder, notes))
    finished = [record for record in records if record["status"] == "finished"]
    if result is None and not finished:
        raise ValueError(f"No run in {folder / RECORDS_NAME} has finished; {_REMEDY}.")
    if failed := len(records) - len(finished):
        notes.append(f"{failed} {'run has' if failed == 1 else 'runs have'} failed; see {RECORDS_NAME}/.")
    runs = [(record["arm"]["name"], _run_of(folder, record)) for record in finished]
    if result is None:
        return ComparisonFolder(folder, None, tuple(runs), notes=tuple(notes))
    names = [arm.name for arm in result.arms]
    compared = {(arm.name, seed) for arm in result.arms for seed in arm.seeds}
    pairs = list(zip(runs, (record["seed"] for record in finished), strict=True))
    of_arms = [pair for pair, seed in pairs if (pair[0], seed) in compared]
    of_arms.sort(key=lambda pair: names.index(pair[0]))
    others = [pair for pair, seed in pairs if (pair[0], seed) not in compared]
    if len(of_arms) < sum(len(arm.seeds) for arm in result.arms):
        notes.append(f"Not all runs have a record in {RECORDS_NAME}/; curves are of those that have one.")
    return ComparisonFolder(folder, result, tuple(of_arms), tuple(others), tuple(notes))


def _read_result(path: Path) -> Comparison:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"its schema_version is {values.get('schema_version')}, not {SCHEMA_VERSION}")
        target = Target(**values["target"]) if values["target"] is not None else None
        arms = [_arm_of(arm) for arm in values["arms"]]
        result = Comparison(
            str(values["script"]), str(values["baseline"]), target, arms, values["machine"], values["versions"]
        )
        # Whatever is missing deeper inside shows here and not half way through a page.
        value_rows(result), ratio_rows(result), machine_words(result), target_words(result)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError | TypeError) else str(error)
        raise ValueError(f"{path} cannot be read ({reason}); {_REMEDY}.") from error
    return result


def _arm_of(values: Mapping[str, Any]) -> ArmResult:
    difference = values["final_difference"]
    return ArmResult(
        name=str(values["name"]),
        seeds=list(values["seeds"]),
        values={quantity: list(values["values"].get(quantity, [])) for quantity in RATIOS},
        ratios={name: Estimate(**estimate) for name, estimate in values["ratios"].items()},
        final_difference=Estimate(**difference) if difference is not None else None,
        failed_seeds=list(values["failed_seeds"]),
    )


def _read_records(folder: Path, notes: list[str]) -> Iterable[dict[str, Any]]:
    """Return the records that can be read, by seed; the others are noted."""
    found = []
    for path in sorted((folder / RECORDS_NAME).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != RECORD_FORMAT or not isinstance(record["arm"]["name"], str):
                raise ValueError
            int(record["seed"])
            record["status"], record["log_history" if record["status"] == "finished" else "errors"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            notes.append(f"{RECORDS_NAME}/{path.name} isn't a record of this version and is left out.")
            continue
        found.append({**record, "stem": path.stem})
    return sorted(found, key=lambda record: record["seed"])


def _run_of(folder: Path, record: Mapping[str, Any]) -> Run:
    history = record["log_history"] if isinstance(record["log_history"], list) else []
    steps = number(record.get("optimizer_steps"))
    output = folder / record["stem"]  # where the script was told to write; plan and config are there if it did
    notes: list[str] = []
    plan, config, settings = read_beside(output, notes)
    run = Run(
        name=record["stem"],
        folder=output,
        history=tuple(line for line in history if isinstance(line, dict)),
        state={} if steps is None else {"global_step": int(steps)},
        plan=plan,
        model=model_name(config),
        settings=settings,
        notes=tuple(notes),
    )
    return with_derived(run, config)
