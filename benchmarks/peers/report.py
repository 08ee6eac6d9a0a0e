"""Writes `benchmarks/peers.md` from the records of `run.py` and the reasons in `reasons.py`.

python benchmarks/peers/report.py [--results FOLDER] [--output FILE]
"""

import argparse
import collections
import fnmatch
import json
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from page_tables import table  # noqa: E402
from plugin import MODES  # noqa: E402
from reasons import REASONS  # noqa: E402


RESULTS = HERE.parent / "results" / "peers"
PAGE = HERE.parent / "peers.md"
UNEXPLAINED = "**unexplained**"
TITLES = {"transformers": "transformers: Trainer", "trl": "TRL: SFTTrainer"}
OUTCOMES = ("passed", "failed", "skipped")


def load(folder: Path) -> dict[str, dict[str, dict]]:
    """Return suite -> mode -> record, of suites that have a record of stock."""
    found = {suite: {m: folder / f"{suite}-{m}.json" for m in MODES} for suite in TITLES}
    records = {
        suite: {mode: json.loads(path.read_text()) for mode, path in paths.items() if path.is_file()}
        for suite, paths in found.items()
    }
    return {suite: modes for suite, modes in records.items() if "stock" in modes}


def short(test: str) -> str:
    """Return a test's name without the folder of its file."""
    return test.rsplit("/", 1)[-1]


def reason(suite: str, mode: str, test: str, reasons: list[tuple[str, str, str, str]]) -> str:
    """Return why a test ends otherwise than with stock classes: the first entry that fits."""
    for of_suite, modes, pattern, text in reasons:
        if of_suite == suite and mode in modes.split() and fnmatch.fnmatchcase(short(test), pattern):
            return text
    return UNEXPLAINED


def differences(stock: dict, ours: dict) -> list[tuple[str, str, str, str]]:
    """Return (test, outcome with stock, outcome with ours, error) of tests that end otherwise."""
    rows = []
    for test in sorted(stock.keys() | ours.keys()):
        was, now = (tests.get(test, {"outcome": "not run", "error": ""}) for tests in (stock, ours))
        if was["outcome"] != now["outcome"]:
            rows.append((test, was["outcome"], now["outcome"], now["error"] or was["error"]))
    return rows


def cell(text: str) -> str:
    """Return text that may stand in a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def code(text: str) -> str:
    """Return text as code in a cell of a table."""
    return "`" + cell(text).replace("`", "'") + "`"


def counts_table(records: dict[str, dict[str, dict]]) -> str:
    rows = []
    for suite, modes in records.items():
        stock = modes["stock"]["tests"]
        comparable = {test for test, found in stock.items() if found["outcome"] == "passed"}
        for mode, record in modes.items():
            counts = collections.Counter(found["outcome"] for found in record["tests"].values())
            also = sum(record["tests"].get(test, {}).get("outcome") == "passed" for test in comparable)
            share = "–" if mode == "stock" else f"{also} of {len(comparable)}"
            rows.append([TITLES[suite], mode, *(counts[outcome] for outcome in OUTCOMES), share, record["minutes"]])
    return table(["suite", "classes", *OUTCOMES, "passed of those that pass with stock", "minutes"], rows)


def differences_part(suite: str, mode: str, modes: dict[str, dict], reasons: list) -> str:
    """Return the table of what ends otherwise, with its reasons."""
    found = differences(modes["stock"]["tests"], modes[mode]["tests"])
    if not found:
        return "None."
    rows = [
        [
            code(short(test)),
            f"{was} → {now}",
            code(error[:160]),
            cell(reason(suite, mode, test, reasons)),
        ]
        for test, was, now, error in found
    ]
    return table(["test", "stock → ours", "says", "why"], rows)


def not_comparable(modes: dict[str, dict]) -> str:
    """Return the reasons why tests do not pass with stock classes."""
    kinds = collections.Counter(
        (found["outcome"], found["error"].removeprefix("Skipped: ")[:110])
        for found in modes["stock"]["tests"].values()
        if found["outcome"] != "passed"
    )
    rows = [[count, outcome, code(error)] for (outcome, error), count in kinds.most_common()]
    return table(["tests", "outcome", "says"], rows)


def page(records: dict[str, dict[str, dict]], reasons: list) -> str:
    """Return the page."""
    text = (HERE / "peers.template.md").read_text()
    parts = []
    for suite, modes in records.items():
        stock = modes["stock"]
        versions = ", ".join(f"{name} {version}" for name, version in stock["versions"].items())
        parts += [f"## {TITLES[suite]}", f"Tests of commit `{stock['revision'][:12]}`; {versions}."]
        for mode, title in (("fixed", "`fixed`"), ("defaults", "Our defaults")):
            parts.append(f"### {title}: what ends otherwise")
            parts.append(differences_part(suite, mode, modes, reasons) if mode in modes else "**Not run yet.**")
        parts += ["### Not comparable: tests that don't pass with stock classes here", not_comparable(modes)]
    values = {"counts": counts_table(records), "suites": "\n\n".join(parts)}
    for name, value in values.items():
        text = text.replace(f"@@{name}@@", value)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    options.output.write_text(page(load(options.results), REASONS))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
