"""Adds the records of a second run to those of the first, so that a try of a few parts wipes nothing.

    python benchmarks/gpu/merge.py FOLDER [--results benchmarks/results/gpu]

A check, a part or an arm of the new record replaces the one of the same name, everything else stays. A part that was
cut off or has failed does not replace one that is whole. Each record keeps a list `runs`: when each run was, of which
commit, on which card, how it ended and what it measured.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from arm_targets import BOTH, both_have_run, targets  # noqa: E402
from run import write_json  # noqa: E402
from stage_list import STAGES  # noqa: E402


RESULTS = HERE.parent / "results" / "gpu"
# How this run went, not what it measured.
OF_A_RUN = ("seconds", "seconds_given", "prepared_s")


def merged(earlier: dict[str, Any] | None, later: dict[str, Any]) -> dict[str, Any]:
    """Return one record of both.

    Raises:
        ValueError: They are not of one stage, one is of a rehearsal and the other is not, or the later one is in the
            earlier one already.
    """
    if earlier is None:
        return later | {"runs": [of_run(later)]}
    for key in ("stage", "rehearsal"):
        if earlier.get(key) != later.get(key):
            raise ValueError(f"{key}: {earlier.get(key)!r} and {later.get(key)!r} make no common record.")
    runs = earlier.get("runs") or [of_run(earlier)]
    if of_run(later) in runs:
        raise ValueError(f"{later['stage']}: the run of {later.get('date')} is in the record already.")
    parts, checks, errors = (dict(earlier.get(key) or {}) for key in ("parts", "checks", "errors"))
    fresh = set(later.get("checks") or {})
    for name, part in (later.get("parts") or {}).items():
        whole = "part_s" in part and name not in (later.get("errors") or {})
        if whole or name not in parts or name in errors:
            parts[name] = part
            errors.pop(name, None)
            fresh.add(name)
    checks |= later.get("checks") or {}
    errors |= later.get("errors") or {}
    found = earlier | later | {
        "parts": parts, "checks": checks, "errors": errors, "runs": [*runs, of_run(later)],
        "skipped": [*_still_left_out(earlier, fresh, later), *later.get("skipped", [])],
    }  # fmt: skip
    if "end_of_log" not in later:
        found.pop("end_of_log", None)
    if "arms" in earlier or "arms" in later:
        found |= _arms(earlier.get("arms", []), later.get("arms", []), found)
    return found | _status(found, later)


def of_run(record: dict[str, Any]) -> dict[str, Any]:
    """Return what is kept of a run: when, of what, how it ended, what it measured."""
    entry = {key: record[key] for key in ("date", "status", "reason", *OF_A_RUN) if key in record}
    entry["commit"] = (record.get("versions") or {}).get("commit")
    entry["card"] = (record.get("device") or {}).get("name")
    entry["measured"] = [name for name, part in (record.get("parts") or {}).items() if "part_s" in part or part]
    return entry


def _still_left_out(earlier: dict[str, Any], measured: set[str], later: dict[str, Any]) -> list[str]:
    """Return what the earlier run left out, less what the later one has measured or has left out, too."""
    again = {line.rsplit(": ", 1)[0] for line in later.get("skipped", [])}
    return [line for line in earlier.get("skipped", []) if line.rsplit(": ", 1)[0] not in measured | again]


def _arms(earlier: list[dict[str, Any]], later: list[dict[str, Any]], found: dict[str, Any]) -> dict[str, Any]:
    """Return the arms of both with the targets and the check that need all of them."""
    arms = {(arm["name"], arm["seed"]): arm for arm in [*earlier, *later]}
    checks = found["checks"] | {BOTH: both_have_run(list(arms.values()))}
    return {"arms": list(arms.values()), "targets": targets(list(arms.values())), "checks": checks}


def _status(found: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Return how both together stand: the later run's own end counts, what the earlier was cut off from does not."""
    found.pop("reason", None)
    cut = {"reason": later["reason"]} if "reason" in later else {}
    good = not cut and not found["errors"] and all(found["checks"].values())
    return {"status": "ok" if good else "failed", **cut}


def merged_summary(earlier: dict[str, Any] | None, later: dict[str, Any]) -> dict[str, Any]:
    """Return the summaries of all runs."""
    runs = [] if earlier is None else earlier.get("runs") or [earlier]
    if later in runs:
        raise ValueError(f"the summary of {later.get('date')} is there already.")
    return {"rehearsal": later.get("rehearsal"), "runs": [*runs, later]}


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the new records")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records that are there")
    options = parser.parse_args(arguments)
    found = {}
    try:
        for name in [*(stage.name for stage in STAGES), "summary"]:
            later = read(options.folder / f"{name}.json")
            if later is not None:
                merge = merged_summary if name == "summary" else merged
                found[name] = merge(read(options.results / f"{name}.json"), later)
    except ValueError as error:
        parser.error(str(error))
    if not found:
        parser.error(f"there are no records in {options.folder}.")
    options.results.mkdir(parents=True, exist_ok=True)
    for name, record in found.items():  # all of them or none
        write_json(options.results / f"{name}.json", record)
        print(f"{name}: {record.get('status', '')} {len(record['runs'])} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
