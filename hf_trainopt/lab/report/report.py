"""Reports: from folders or runs in memory to a page, pictures and a table."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_trainopt.metrics.targets import Target

from . import html, markdown, pictures
from .arms import Arm, find_arm, group
from .comparison import ComparisonFolder, is_comparison, read_comparison
from .contents import Contents
from .metrics import choose_target, evaluation_metrics
from .reading import is_run, read_run
from .runs import Run
from .sections import contents
from .summary import NOT_RECORDED


logger = logging.getLogger(__name__)

FORMATS = ("html", "md", "png")

# What is told where there is no room for more.
BRIEF = ("verdict", "summary", "comparison")


@dataclass(frozen=True)
class Report:
    """What runs have done; a notebook shows it as charts and tables.

    Args:
        contents: Its tables and charts as data.
    """

    contents: Contents

    def _repr_html_(self) -> str:
        return html.render(self.contents, whole=False)

    def __str__(self) -> str:
        return self.to_markdown()

    def __repr__(self) -> str:
        return f"<Report of {', '.join(self.contents.arms) or self.contents.title}; save(folder) writes it>"

    def to_html(self) -> str:
        """Return one self-contained HTML page."""
        return html.render(self.contents, whole=True)

    def to_markdown(self, brief: bool = False) -> str:
        """Return texts and tables as Markdown.

        Args:
            brief: Verdict, results and comparisons only.
        """
        return markdown.markdown(self.contents, only=BRIEF if brief else None)

    def save(self, folder: str | Path, formats: Sequence[str] | None = None) -> list[Path]:
        """Write the report; what a former one has left under the same names is replaced.

        Args:
            folder: Made if it is not there.
            formats: Out of `html` (report.html), `md` (report.md) and `png` (a picture for each section); all of them
                unless given, without pictures where matplotlib is missing (the page then has no charts either).

        Returns:
            The files, the page first.

        Raises:
            ValueError: There is no such format, the folder is a file, or matplotlib is missing for pictures
                that are asked for.
        """
        if formats is None:
            formats = _formats_here()
        check_formats(formats)
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; name a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        saved = []
        if "html" in formats:
            saved.append(_write(folder / "report.html", self.to_html()))
        drawn = pictures.save_pictures(self.contents, folder) if "png" in formats else {}
        if "md" in formats:
            saved.append(_write(folder / "report.md", markdown.markdown(self.contents, drawn)))
        return [*saved, *(folder / name for name in drawn.values())]


def _write(path: Path, text: str) -> Path:
    # A lone surrogate (a file name that is no UTF-8) cannot be written.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def _formats_here() -> tuple[str, ...]:
    """Return all formats; without pictures, and with a warning, where matplotlib is missing."""
    try:
        pictures.check_matplotlib()
    except ValueError:
        logger.warning("matplotlib is not installed: the report has no charts; %s for them.", pictures.REMEDY)
        return tuple(name for name in FORMATS if name != "png")
    return FORMATS


def check_formats(formats: Sequence[str]) -> None:
    """Check formats before any work.

    Raises:
        ValueError: One is unknown, there is none, or matplotlib is missing for pictures.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ValueError(f"formats has '{', '.join(unknown)}'; choose from {', '.join(FORMATS)}.")
    if "png" in formats:
        pictures.check_matplotlib()


def make_report(
    *sources: Any,
    baseline: str | None = None,
    target_metric: str | None = None,
    target_value: float | None = None,
    greater_is_better: bool | None = None,
    title: str | None = None,
) -> Report:
    """Return a report of runs.

    Args:
        *sources: Output folders of `EfficientTrainer` or of stock `Trainer`, folders of `hf-trainopt compare`, folders
            of such folders, or `Run`s. `NAME=FOLDER` names the arm of a run.
        baseline: Run or arm that others are divided by; of a comparison its own, else the first, unless given.
        target_metric: Metric that time to target is measured on, as `eval_loss` or `loss`.
        target_value: The value to be reached. Without: the target of the comparison or of the runs, else the last
            evaluation of the baseline.
        greater_is_better: Whether the metric rises; by its name unless given.
        title: Heading.

    Raises:
        ValueError: A folder has no run in it, or what is asked for is not there.
    """
    if not sources:
        raise ValueError("there is nothing to report on; name an output folder.")
    runs: list[Run] = []
    labels: list[tuple[str, str] | None] = []
    comparisons: list[ComparisonFolder] = []
    for source in sources:
        for found, label in _read(source):
            if isinstance(found, ComparisonFolder):
                comparisons.append(found)
                runs += [run for _, run in found.runs]
                labels += [(str(found.folder.resolve()), name) for name, _ in found.runs]
            else:
                runs.append(found)
                labels.append(label)
    runs, labels = _without_repeats(runs, labels)
    arms = group(runs, labels)
    base = _baseline(arms, baseline, comparisons)
    given = _given_target(arms, target_metric, target_value, greater_is_better, comparisons)
    target, no_target = choose_target(arms, base, given)
    title = title or _title(arms, comparisons)
    return Report(
        contents(arms, title=title, baseline=base, target=target, no_target=no_target, comparisons=tuple(comparisons))
    )


def _read(source: Any) -> list[tuple[Run | ComparisonFolder, tuple[str, str] | None]]:
    """Return what a source has in it, each run with the arm that the user has named."""
    if isinstance(source, Run):
        return [(source, None)]
    folder, label = Path(source), None
    name, separator, place = str(source).partition("=")
    if separator and name.strip() and not folder.exists():
        folder, label = Path(place), ("", name.strip())
    if folder.is_dir() and is_comparison(folder):
        if label is not None:
            raise ValueError(f"{folder} is a comparison, whose arms have names; leave '{label[1]}=' out.")
        return [(read_comparison(folder), None)]
    if folder.is_dir() and not is_run(folder):
        inside = sorted(path for path in folder.iterdir() if path.is_dir())
        if found := [path for path in inside if is_comparison(path) or is_run(path)]:
            return [pair for path in found for pair in _read_one(path, label)]
    return [(read_run(folder), label)]


def _read_one(path: Path, label: tuple[str, str] | None) -> list[tuple[Run | ComparisonFolder, Any]]:
    return [(read_comparison(path), None) if is_comparison(path) else (read_run(path), label)]


def _without_repeats(
    runs: Sequence[Run], labels: Sequence[tuple[str, str] | None]
) -> tuple[list[Run], list[tuple[str, str] | None]]:
    """Return the runs less those whose folder came before: named twice, or in a comparison too."""
    seen: set[Path] = set()
    kept = []
    for run, label in zip(runs, labels, strict=True):
        place = run.folder.resolve() if run.folder is not None else None
        if place is None or place not in seen:
            kept.append((run, label))
        seen |= {place} if place is not None else set()
    return [run for run, _ in kept], [label for _, label in kept]


def _baseline(arms: Sequence[Arm], name: str | None, comparisons: Sequence[ComparisonFolder]) -> Arm | None:
    if name is not None:
        return find_arm(arms, name)
    if len(arms) < 2:
        return arms[0] if arms else None
    if comparisons and comparisons[0].result is not None:
        own = comparisons[0].result.baseline
        folders = {run.folder for arm, run in comparisons[0].runs if arm == own}
        return next((arm for arm in arms if any(run.folder in folders for run in arm.runs)), arms[0])
    return arms[0]


def _given_target(
    arms: Sequence[Arm],
    metric: str | None,
    value: float | None,
    greater_is_better: bool | None,
    comparisons: Sequence[ComparisonFolder],
) -> Target | None:
    """Return the target that the user has given, else that of the first comparison."""
    if (metric is None) != (value is None):
        raise ValueError("target_metric and target_value go together; give both or neither.")
    if metric is not None:
        return Target.of(metric, value, greater_is_better)
    if greater_is_better is not None:
        raise ValueError("greater_is_better is about target_metric; give that too, with target_value.")
    own = next((comparison.target for comparison in comparisons if comparison.target is not None), None)
    return own if own is not None and own.metric in evaluation_metrics(arms) else None


def _title(arms: Sequence[Arm], comparisons: Sequence[ComparisonFolder]) -> str:
    folders = {run.folder.parent if run.folder is not None else None for arm in arms for run in arm.runs}
    if len(comparisons) == 1 and folders <= {comparisons[0].folder}:
        result = comparisons[0].result
        what = Path(result.script).name if result is not None else comparisons[0].folder.name
        return f"{what}: {' and '.join(arm.name for arm in arms)}" if arms else what
    names = [arm.name for arm in arms]
    models = {run.model for arm in arms for run in arm.runs} - {None, NOT_RECORDED}
    of = f", {models.pop()}" if len(models) == 1 else ""
    return (f"{' and '.join(names)}{of}" if len(names) <= 3 else f"{len(names)} runs{of}") or "Training runs"
