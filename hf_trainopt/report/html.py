"""A report as one HTML page that needs nothing else, and as a fragment for notebooks.

No scripts, nothing from elsewhere; the page forbids both by its content security policy. Every text goes through
`escape`. All styles are below one class, so that a fragment leaves the notebook around it as it is.
"""

from collections.abc import Sequence

from .contents import BarPanel, Contents, IntervalPanel, LinePanel, Panel, Section, Table
from .style import stylesheet
from .svg import arm_variable, draw, escape, part_variable
from .theme import arm_dashes


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(contents: Contents) -> str:
    """Return a report as a whole page."""
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(contents.title)}</title>\n<style>{stylesheet(page=True)}</style>\n</head>\n"
        f'<body>\n<main class="hf-trainopt-report">\n{_body(contents, anchors=True)}\n</main>\n</body>\n</html>\n'
    )


def fragment(contents: Contents) -> str:
    """Return a report as an element to be put into another page, with its styles."""
    body = _body(contents, anchors=False)
    return f'<div class="hf-trainopt-report"><style>{stylesheet(page=False)}</style>\n{body}\n</div>\n'


def _body(contents: Contents, anchors: bool) -> str:
    parts = [f"<h1>{escape(contents.title)}</h1>"]
    if anchors and len(contents.sections) > 2:
        links = [f'<a href="#{escape(section.name)}">{escape(section.title)}</a>' for section in contents.sections]
        if contents.absent:
            links.append('<a href="#absent">Not recorded</a>')
        parts.append(f"<nav>{' '.join(links)}</nav>")
    parts += [_section(section, contents.arms, anchors) for section in contents.sections]
    if contents.absent:
        items = [f"<dt>{escape(what)}</dt><dd>{escape(how)}</dd>" for what, how in contents.absent]
        parts.append(f"<section{_id('absent', anchors)}><h2>Not recorded</h2><dl>{''.join(items)}</dl></section>")
    return "\n".join(parts)


def _id(name: str, anchors: bool) -> str:
    return f' id="{escape(name)}"' if anchors else ""


def _section(section: Section, arms: Sequence[str], anchors: bool) -> str:
    rows = sum(len(table.rows) for table in section.tables)
    # On paper a short section stays on one page.
    kind = ' class="short"' if len(section.panels) <= 2 and rows <= 6 else ""
    parts = [f"<section{_id(section.name, anchors)}{kind}><h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(text)}</p>" for text in section.text]
    tables = [_table(table) for table in section.tables]
    charts = []
    if section.panels:
        figures = "".join(_figure(panel) for panel in section.panels)
        charts = [_legend(section, arms), f'<div class="panels">{figures}</div>']
    # Intervals are what a comparison is about; elsewhere the table is the shorter answer.
    first = any(isinstance(panel, IntervalPanel) for panel in section.panels)
    parts += [*charts, *tables] if first else [*tables, *charts]
    return "".join([*parts, "</section>"])


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_breakable(text)}</th>' for text in table.columns)
    rows = []
    for name, *cells in table.rows:
        values = "".join(_cell(text) for text in cells)
        rows.append(f'<tr><th scope="row">{_breakable(name)}</th>{values}</tr>')
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    # The focus lets a keyboard scroll what is wider than the screen.
    scrolled = (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(table.title or "table")}">{body}</div>'
    )
    if table.folded:
        return f"<details><summary>{escape(table.title)}</summary>{scrolled}</details>"
    return (f"<h3>{escape(table.title)}</h3>" if table.title else "") + scrolled


def _cell(text: str) -> str:
    kind = ' class="none"' if text in ("not recorded", "–") else ' class="words"' if len(text) > 40 else ""
    return f"<td{kind}>{_breakable(text)}</td>"


def _breakable(text: str) -> str:
    """Return an escaped text whose long words a narrow screen breaks at `_` and `/`."""
    return escape(text).replace("_", "_<wbr>").replace("/", "/<wbr>")


def arms_shown(panels: Sequence[Panel]) -> list[int]:
    """Return the arms that have a colour in some of the charts, in order."""
    found: set[int] = set()
    for panel in panels:
        if isinstance(panel, LinePanel):
            found |= {line.arm for line in panel.lines} | {band.arm for band in panel.bands}
        elif isinstance(panel, BarPanel):
            found |= {arm for _, arm, _ in panel.bars if arm is not None}
    return sorted(found)


def _legend(section: Section, arms: Sequence[str]) -> str:
    curves = any(isinstance(panel, LinePanel) for panel in section.panels)
    entries = [(_key_of_arm(arm, curves), arms[arm]) for arm in arms_shown(section.panels)]
    entries += [(_KEYS[style], text) for style, text in section.legend]
    if len(entries) < 2:
        return ""
    items = "".join(f"<li>{key}{escape(text)}</li>" for key, text in entries)
    return f'<ul class="legend">{items}</ul>'


def _key(inside: str) -> str:
    return f'<svg viewBox="0 0 26 12" class="key" aria-hidden="true">{inside}</svg>'


def _patch(colour: str) -> str:
    return _key(f'<rect x="4" y="1" width="18" height="10" fill="{colour}"/>')


def _key_of_arm(arm: int, curves: bool) -> str:
    colour = arm_variable(arm)
    if not curves:
        return _patch(colour)
    dashes = arm_dashes(arm)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return _key(f'<path d="M0 6H26" class="curve line" stroke="{colour}"{dashed}/>')


# What the styles of `Section.legend` look like, without an arm's colour.
_KEYS = {
    "faint": _key('<path d="M0 6H26" class="curve faint" stroke="var(--ink)"/>'),
    "marked": _key(
        '<path d="M0 6H26" class="curve marked" stroke="var(--ink)"/>'
        '<circle cx="13" cy="6" r="2.8" fill="var(--ink)"/>'
    ),
    "seed": _key('<path d="M0 6H26" class="curve seed" stroke="var(--ink)"/>'),
    "guess": _key('<path d="M0 6H26" class="curve guess" stroke="var(--ink)" stroke-dasharray="1.5 3"/>'),
    "band": _key('<rect width="26" height="12" class="band" fill="var(--ink)"/>'),
    "open": _key('<rect width="26" height="12" class="band open" fill="var(--ink)"/>'),
}


def _figure(panel: Panel) -> str:
    says_more = isinstance(panel, LinePanel) and panel.ylabel.lower() not in panel.title.lower()
    unit = f" <small>({escape(panel.ylabel)})</small>" if says_more else ""
    parts = ""
    if isinstance(panel, BarPanel) and panel.parts:
        keys = [f"<li>{_patch(part_variable(index))}{escape(name)}</li>" for index, name in enumerate(panel.parts)]
        parts = f'<ul class="legend">{"".join(keys)}</ul>'
    title = "" if not panel.title else f"<figcaption>{escape(panel.title)}{unit}</figcaption>"
    return f"<figure>{title}{parts}{draw(panel)}</figure>"
