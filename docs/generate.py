"""Writes what of the docs is read from the code: compatibility.md, and the layout in CONTRIBUTING.md."""

import ast
import re
import tomllib
from pathlib import Path

from hf_trainopt import _compat, _versions


ROOT = Path(__file__).resolve().parent.parent

BEGIN, END = "<!-- layout: written by docs/generate.py -->", "<!-- end of layout -->"

TITLES = {
    "PRIVATE_API": "Private names of `Trainer`",
    "PRIVATE_TORCH": "Private names of PyTorch, and of transformers outside `Trainer`",
    "PRIVATE_PRECISION": "What a change of precision in a run reads and sets",
    "PRIVATE_DDP": "What averaging gradients without DDP calls",
}

HEAD = """<!-- Written by docs/generate.py: change that, or hf_trainopt/_compat.py, and run it. -->
# Compatibility

hf_trainopt is tested with transformers >={first} and below {last}; with another version it warns once and goes on.
It overrides public hooks of `Trainer`, calls `super()` in each, and hands arguments that it does not know through. The
few private names that it touches are listed here with the reason, and `tests/test_compat.py` fails as soon as one is
gone, has other parameters, or one is touched that is not listed.

## Versions

Python 3.11 or newer. Floors are those of `pyproject.toml`, tested versions those of `constraints.txt`, with which the
figures of the README were made (`pip install -c constraints.txt .`).

package | floor | tested
--- | --- | ---
"""

MIDDLE = """
## What to do when something breaks

- A warning about the version: install a tested one, `pip install -c constraints.txt .`.
- An error within `Trainer` after an upgrade: run `python -m pytest tests/test_compat.py`; what fails names what moved.
- See whether the error stays with `accumulation_policy="fixed"`, `measurements="none"`, `max_skipped_windows=0` and no
  placement: then the loop is that of stock `Trainer`.

## Arguments

There are none.

## How it works

Every part reads what it needs of transformers and PyTorch through public names and these.
"""

TAIL = """
## With the other parts

- **Reliability.** The versions of a run are in the manifest of each of its checkpoints
  ([reliability.md](reliability.md)).
- **Compare.** Runs of other versions are not compared with each other ([compare.md](compare.md)).

## Caveats

- Private names change without notice. transformers and accelerate are held below their next major version,
  torch is not.
- The whole suite was run on the tested versions and on the floors (`python .ci/floors.py`), nothing in between.

## Logged keys

There are none.
"""


def versions() -> list[str]:
    """Return the rows of the table of versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    rows = []
    for text in project["dependencies"]:
        name, conditions = re.match(r"([\w-]+)(.*)", text).groups()
        rows.append(
            f"{name} | {conditions.replace('>=', '', 1).replace(',<', ', below ')} | {tested.get(name, 'newest')}"
        )
    return rows


def private_names() -> list[str]:
    """Return a table for each dictionary `PRIVATE_...` of `_compat`."""
    parts = []
    for dictionary, title in TITLES.items():
        parts += ["", f"### {title}", "", "name | why", "--- | ---"]
        for place, value in getattr(_compat, dictionary).items():
            entries = value.items() if isinstance(value, dict) else [(None, value)]
            for name, entry in entries:
                reason = entry if isinstance(entry, str) else entry[-1]
                full = place if name is None else f"{place}.{name}"
                parts.append(f"`{full}` | {reason}")
    return parts


def page() -> str:
    """Return the page.

    Raises:
        ValueError: A dictionary of `_compat` has no title here.
    """
    unknown = {name for name in vars(_compat) if name.startswith("PRIVATE_")} ^ TITLES.keys()
    if unknown:
        raise ValueError(f"docs/generate.py has no title for {', '.join(sorted(unknown))}, or one too many.")
    first, last = _versions.TESTED_TRANSFORMERS
    head = HEAD.format(first=first, last=last).rstrip("\n")
    lines = [head, *versions(), MIDDLE.rstrip("\n"), *private_names(), TAIL.rstrip("\n")]
    return "\n".join(lines) + "\n"


def layout() -> str:
    """Return a line for each module of the package: the first one of its docstring."""
    lines, folder = [], None
    for path in sorted((ROOT / "hf_trainopt").rglob("*.py"), key=lambda path: (path.parent, path.name)):
        if path.parent != folder:
            folder = path.parent
            lines += ["", f"`{folder.relative_to(ROOT).as_posix()}/`", ""]
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"- `{path.name}`: {docstring.splitlines()[0]}")
    return "\n".join(lines).strip() + "\n"


def contributing(text: str) -> str:
    """Return the text of CONTRIBUTING.md with its layout as it is now."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + layout() + END + rest.partition(END)[2]


def files() -> dict[Path, str]:
    """Return path -> text of what is generated."""
    guide = ROOT / "CONTRIBUTING.md"
    return {ROOT / "docs" / "compatibility.md": page(), guide: contributing(guide.read_text(encoding="utf-8"))}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
