"""Writes what of the docs is read from the code: compatibility.md, and the layout in CONTRIBUTING.md."""

import ast
import json
import re
import tomllib
from pathlib import Path

from packaging.version import Version

from hf_trainopt.core import compat as _compat
from hf_trainopt.core import versions as _versions


ROOT = Path(__file__).resolve().parent.parent

BEGIN, END = "<!-- layout: written by docs/generate.py -->", "<!-- end of layout -->"

TITLES = {
    "PRIVATE_API": "Private names of `Trainer`",
    "PRIVATE_TORCH": "Private names of PyTorch, and of transformers outside `Trainer`",
    "PRIVATE_PRECISION": "What a change of precision in a run reads and sets",
    "PRIVATE_DDP": "What averaging gradients without DDP calls",
    "PRIVATE_FSDP2": "What plans read of models that FSDP2 spreads over devices",
}

HEAD = """<!-- Written by docs/generate.py: change that, or hf_trainopt/core/compat.py, and run it. -->
# Compatibility

hf_trainopt works with PyTorch {torch} and transformers {transformers}; with another version it warns once and goes on.
It overrides public hooks of `Trainer`, calls `super()` in each, and passes on arguments that it doesn't know. The few
private names that it touches are listed here with the reason. `tests/test_compat.py` fails as soon as one of them is
gone or has other parameters, or as soon as we touch one that isn't listed.

## Versions

Python 3.11 or newer. The floors come from `pyproject.toml`. The README's figures were made with the versions in
`constraints.txt` (`pip install -c constraints.txt '.[scripts]'`).

package | needed for | floor | README's figures
--- | --- | --- | ---
"""

SETS_HEAD = """
The whole test suite and short runs of both scripts, on a CPU (`python .ci/sets.py SET`; CI runs the newest set for
every change):

set | versions | tests | scripts
--- | --- | --- | ---
"""

FEATURES = """
Some features need a newer version than the floor:

feature | needs
--- | ---
`loss_is_scaled_for_ga` on a Trainer | transformers 5.19
models that `from_pretrained` shards itself (FSDP2 at load time) | transformers 5.23
`activation_checkpointing` by this name (before: `gradient_checkpointing`) | transformers 5.23
resuming a run of several CPU ranks (stock `Trainer` fails too) | transformers 5.18

`hf_trainopt/core/versions.py` holds every branch that depends on a version, with the version it can go with.
"""

MIDDLE = """
## What to do when something breaks

- A warning about the version: install a tested one, `pip install -c constraints.txt .`.
- An error inside `Trainer` after an upgrade: run `python -m pytest tests/test_compat.py`. The failing test names the
  change.
- See whether the error stays with `accumulation_policy="fixed"`, `measurements="none"`, `max_skipped_windows=0` and no
  placement: then the loop is stock `Trainer`'s.

## Arguments

There are none.

## How it works

Apart from these names, every part uses the public interfaces of transformers and PyTorch only.
"""

TAIL = """
## With the other parts

- **Reliability.** The manifest of each checkpoint holds the versions of its run ([reliability.md](reliability.md)).
- **Compare.** Runs of different versions aren't compared with each other ([compare.md](compare.md)).

## Caveats

- Private names change without notice. transformers and accelerate are held below their next major version
  (torch isn't).
- On a GPU, only torch 2.11 with transformers 5.17 ran, on one NVIDIA H100 ([benchmarks/gpu.md](../benchmarks/gpu.md)).
- transformers before 5.17 isn't supported. On 5.3 about a hundred tests fail; 5.4 to 5.16 weren't tried. 4.x has a
  different training loop.

## Logged keys

There are none.
"""

SETS = {"newest": "newest", "gpu": "GPU machine's", "floor": "floor"}


def versions() -> list[str]:
    """Return the rows of the table of versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    shown = ("scripts", "plot", "compare", "examples")
    extras = {f"`[{name}]`": project["optional-dependencies"][name] for name in shown}
    rows = []
    for needed_for, requirements in {"everything": project["dependencies"], **extras}.items():
        for text in requirements:
            name, conditions = re.match(r"([\w-]+)(.*)", text).groups()
            if name != project["name"]:
                floor = conditions.replace(">=", "", 1).replace(",<", ", below ")
                rows.append(f"{name} | {needed_for} | {floor} | {pinned.get(name, 'any')}")
    return rows


def tested_sets() -> list[str]:
    """Return the rows of the table of sets that the suite was run on."""
    rows = []
    for name, title in SETS.items():
        path = ROOT / "docs" / "versions" / f"{name}.json"
        if not path.exists():
            rows.append(f"{title} | | not run yet | ")
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        suite, packages = record["suite"], ", ".join(f"{key} {value}" for key, value in record["packages"].items())
        counts = f"{suite['passed']:,} passed, {suite['failed']} failed, {suite['skipped']} skipped"
        scripts = ", ".join(f"{script}: {outcome}" for script, outcome in record["scripts"].items())
        rows.append(f"{title} | {packages} | {counts} ({record['date']}, {record['commit']}) | {scripts}")
    return rows


def of_versions(name: str) -> str:
    """Return the versions that a private name is used with, if not with all."""
    package, first, end = _compat.VERSIONS.get(name, (None, None, None))
    if first is not None:
        return f" ({package} {first} or newer)"
    return f" ({package} before {end})" if end is not None else ""


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
                parts.append(f"`{full}` | {reason}{of_versions(full)}")
    return parts


def between(bounds: tuple[str, str]) -> str:
    """Return a range of versions in words: the first, and the last minor version below the end."""
    first, end = map(Version, bounds)
    return f"{first.major}.{first.minor} to {end.major}.{end.minor - 1}"


def page() -> str:
    """Return the page.

    Raises:
        ValueError: A dictionary of `_compat` has no title here.
    """
    unknown = {name for name in vars(_compat) if name.startswith("PRIVATE_")} ^ TITLES.keys()
    if unknown:
        raise ValueError(f"docs/generate.py has no title for {', '.join(sorted(unknown))}, or one too many.")
    head = HEAD.format(torch=between(_versions.TESTED_TORCH), transformers=between(_versions.TESTED_TRANSFORMERS))
    parts = [head, versions(), SETS_HEAD, tested_sets(), FEATURES, MIDDLE, private_names(), TAIL]
    lines = [line for part in parts for line in ([part.rstrip("\n")] if isinstance(part, str) else part)]
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
