"""Print the lowest versions that `pyproject.toml` allows, one requirement a line, for `pip install -r`."""

import itertools
import re
import sys
import tomllib
from pathlib import Path


def floors(project: dict) -> list[str]:
    requirements = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    pinned = []
    for requirement in requirements:
        if requirement.startswith(project["name"]):  # extras that name other extras
            continue
        found = re.fullmatch(r"([\w.-]+)>=([\w.]+)(,<\w+)?", requirement)
        if found is None:
            raise SystemExit(f"{requirement} states no floor; write NAME>=VERSION")
        pinned.append(f"{found[1]}=={found[2]}")
    return pinned


def project() -> dict:
    """Return the table `project` of `pyproject.toml`."""
    path = Path(__file__).resolve().parent.parent / "pyproject.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))["project"]


if __name__ == "__main__":
    sys.stdout.write("\n".join(floors(project())) + "\n")
