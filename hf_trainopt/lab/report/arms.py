"""Runs grouped into arms: what is compared, each with one or more seeds."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .runs import Run


# `ours-seed0`, `ours_s1`, `seed3`: the arm, and the number of the seed.
_SEED = re.compile(r"(?P<arm>.*?)(?:[-_. ]?seed|[-_. ]s)[-_=]?(?P<seed>\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed only.

    Args:
        name: What is compared.
        runs: One for each seed.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        """Name, with the number of seeds where there are several."""
        return self.name if len(self.runs) == 1 else f"{self.name} ({len(self.runs)} seeds)"

    def has_axis(self, axis: str) -> bool:
        """Whether all runs can be placed on an axis."""
        return all(run.has_axis(axis) for run in self.runs)


def group(runs: Sequence[Run], labels: Sequence[tuple[str, str] | None]) -> tuple[Arm, ...]:
    """Return the arms, in the order of their first runs.

    Args:
        runs: All runs.
        labels: For each run place and name of its arm, `("", name)` where the user has named it; `None`: what its
            folder's name says without a seed at its end (or the name of the folder above, if it is nothing but a
            seed). Runs in different places are different arms.
    """
    members: dict[tuple[str, str], list[Run]] = {}
    for run, label in zip(runs, labels, strict=True):
        members.setdefault(_key(run, label), []).append(run)
    keys = list(members)
    names = _unique_names(keys)
    arms = []
    for key, name in zip(keys, names, strict=True):
        of_arm = _with_unique_names(members[key])
        arms.append(Arm(name, tuple(of_arm)))
    return tuple(arms)


def _key(run: Run, label: tuple[str, str] | None) -> tuple[str, str]:
    """Return place and name of a run's arm."""
    if label is not None:
        return label
    path = run.folder.resolve() if run.folder is not None else None
    match = _SEED.fullmatch(run.name)
    if match is None:
        # A folder that is no seed is an arm by itself.
        return (str(path.parent) if path else "", run.name)
    if match["arm"]:
        return (str(path.parent) if path else "", match["arm"])
    return (str(path.parent.parent), path.parent.name) if path else ("", run.name)


def _unique_names(keys: Sequence[tuple[str, str]]) -> list[str]:
    """Return names of arms, those that are not unique with as many folders before them as it takes."""
    names = [name for _, name in keys]
    for depth in range(1, 1 + max((place.count("/") for place, _ in keys), default=0)):
        repeated = {name for name in names if names.count(name) > 1}
        if not repeated:
            break
        names = [
            "/".join([*[part for part in place.split("/") if part][-depth:], own]) if name in repeated else name
            for name, (place, own) in zip(names, keys, strict=True)
        ]
    return [name if name not in names[:index] else f"{name} [{index + 1}]" for index, name in enumerate(names)]


def _with_unique_names(runs: Iterable[Run]) -> list[Run]:
    seen: dict[str, int] = {}
    named = []
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        named.append(run if seen[run.name] == 1 else replace(run, name=f"{run.name} [{seen[run.name]}]"))
    return named


def find_arm(arms: Sequence[Arm], name: str) -> Arm:
    """Return the arm that a user means: by its name, that of a run of it, or a run's folder.

    Raises:
        ValueError: There is none.
    """
    for arm in arms:
        places = {run.folder.resolve() for run in arm.runs if run.folder is not None}
        if name in {arm.name, *(run.name for run in arm.runs)} or Path(name).resolve() in places:
            return arm
    raise ValueError(f"The baseline '{name}' is none of the runs; choose one of {', '.join(a.name for a in arms)}.")
