"""A report as Markdown: its texts and tables, and its pictures where there are any."""

import re
from collections.abc import Mapping, Sequence

from .charts import interval_text
from .contents import Contents, IntervalPanel, Section, Table
from .pictures import missing


def escape(text: str) -> str:
    """Return a text so that Markdown shows it as it is, in one line and in one cell."""
    text = re.sub(r"\s+", " ", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~])|(?<!\w)_|_(?!\w)", lambda match: "\\" + match[0], text)


def markdown(contents: Contents, pictures: Mapping[str, str] | None = None, only: Sequence[str] | None = None) -> str:
    """Return a report as Markdown (with the tables of GitHub).

    Args:
        contents: The report.
        pictures: Name of a section -> path of its picture.
        only: Names of the sections to show (a second comparison is `comparison_2`); all unless given.
    """
    parts = [f"# {escape(contents.title)}"]
    parts += [note] if only is None and (note := missing(contents)) else []
    for section in contents.sections:
        if only is None or section.name.rstrip("_0123456789") in only:
            parts += _section(section, (pictures or {}).get(section.name), brief=only is not None)
    if contents.absent and only is None:
        parts.append("## Not recorded")
        parts.append("\n".join(f"- {escape(what)}: {escape(how)}" for what, how in contents.absent))
    return "\n\n".join(parts) + "\n"


def _section(section: Section, picture: str | None, brief: bool) -> list[str]:
    parts = [f"## {escape(section.title)}", *(f"**{escape(text)}**" for text in section.lead)]
    parts += [escape(text) for text in section.text]
    parts += [_table(_ratios(panel)) for panel in section.panels if isinstance(panel, IntervalPanel)]
    for table in section.tables:
        parts += [f"### {escape(table.title)}"] if table.title else []
        parts.append(_table(table))
    if picture is not None:
        parts.append(f"![{escape(section.title)}]({picture})")
    if curves := [panel for panel in section.panels if not isinstance(panel, IntervalPanel) and not brief]:
        parts.append("\n".join(f"- {escape(panel.title)}: {escape(panel.summary)}" for panel in curves))
    return parts


def _ratios(panel: IntervalPanel) -> Table:
    rows = tuple((text, interval_text(ratio, low, high)) for text, _, ratio, low, high in panel.points)
    return Table(("", panel.xlabel), rows)


def _table(table: Table) -> str:
    cells = [[escape(text) for text in line] for line in (table.columns, *table.rows)]
    cells.insert(1, ["---"] * len(table.columns))
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
