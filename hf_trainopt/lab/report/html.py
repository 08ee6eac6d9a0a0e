"""A report as one HTML page that needs nothing else, or as a fragment for notebooks; made from `templates/`."""

import functools
from typing import Any

from . import pictures, theme
from .contents import Contents, IntervalPanel, LinePanel, Section, arms_shown


# Of a table that half the width of a desktop is enough for.
_COLUMNS_OF_HALF = 4


@functools.cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    def breakable(text: str) -> Markup:
        """Return a text whose long words a narrow screen breaks at `_` and `/`."""
        return escape(text).replace("_", Markup("_<wbr>")).replace("/", Markup("/<wbr>"))

    environment = Environment(
        loader=PackageLoader(__package__), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters["breakable"] = breakable
    environment.globals.update(
        palette=theme.PALETTE,
        arm_name=theme.arm_name,
        arm_dashes=theme.arm_dashes,
        part_name=theme.part_name,
        svg=pictures.svg,
        arms_shown=arms_shown,
        absent_cells=("not recorded", "–"),
        has_curves=lambda section: _has(section, LinePanel),
        has_intervals=lambda section: _has(section, IntervalPanel),
        layout=_layout,
    )
    return environment.get_template("report.html")


def _has(section: Section, kind: type) -> bool:
    return any(isinstance(panel, kind) for panel in section.panels)


def _layout(section: Section) -> str:
    """Return the classes of a section: `short` stays on one page of paper, `half` has room for another beside it."""
    classes = []
    if len(section.panels) <= 2 and sum(len(table.rows) for table in section.tables) <= 6:
        classes.append("short")
    columns = max((len(table.columns) for table in section.tables), default=0)
    if len(section.panels) <= (2 if section.name == "loss" else 1) and columns <= _COLUMNS_OF_HALF:
        classes.append("half")
    return " ".join(classes)


def render(contents: Contents, whole: bool) -> str:
    """Return a report as HTML; without matplotlib it has tables and sentences in place of charts, and says so.

    Args:
        contents: The report.
        whole: Whether it is a page of its own; if not, an element with its styles for another page.
    """
    return _template().render(contents=contents, whole=whole, charts_missing=pictures.missing(contents))
