"""Charts as SVG inside a page, and as one PNG for each section.

Nothing of matplotlib's pyplot is used: no window, no global state.
"""

import contextlib
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .charts import CLASS, FAINT, WIDTH, dashes, draw, height, printable
from .contents import BarPanel, Contents, LinePanel, Panel, Section, arms_shown
from .theme import PALETTE, arm_name, light, part_name


REMEDY = "pip install 'hf-trainopt[plot]'"

_STYLE = {
    "svg.fonttype": "none",  # texts stay texts
    "text.parse_math": False,  # names may have dollars in them
    "lines.scale_dashes": False,
    "lines.solid_joinstyle": "round",
    "lines.dash_joinstyle": "round",
    "xtick.color": light("soft"),
    "ytick.color": light("soft"),
    "axes.edgecolor": light("soft"),
    "axes.labelcolor": light("soft"),
    "text.color": light("ink"),
    "grid.color": light("grid"),
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


def check_matplotlib() -> None:
    """Check that charts can be drawn.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError(f"Charts need matplotlib: {REMEDY}.") from error


def missing(contents: Contents) -> str:
    """Return what a report says where its charts can't be drawn; nothing if they can, or if there are none."""
    try:
        check_matplotlib()
    except ValueError as error:
        return str(error) if any(section.panels for section in contents.sections) else ""
    return ""


@contextlib.contextmanager
def _style(**more: Any) -> Iterator[None]:
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context({**_STYLE, **more}):
        # A name in a script that the font of pictures lacks; a page has the browser's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def svg(panel: Panel) -> str:
    """Return a chart as an `<svg>` element for an HTML page.

    Colours are the page's CSS variables, texts have its font. What is drawn has a class: `curve` with the style of the
    line, `band`, `interval`, `bar`.
    """
    from matplotlib.figure import Figure

    with _style(**{"font.size": 11, "svg.hashsalt": panel.name}):
        figure = Figure(figsize=(WIDTH / 72, height(panel) / 72), layout="constrained")
        figure.get_layout_engine().set(w_pad=2 / 72, h_pad=2 / 72)
        draw(figure.subplots(), panel)
        written = io.BytesIO()
        figure.savefig(written, format="svg", transparent=True)
    root = ElementTree.fromstring(written.getvalue())
    return _for_page(root, f"{panel.title}. {panel.summary}")


def save_pictures(contents: Contents, folder: Path) -> dict[str, str]:
    """Write a PNG for each section that has charts; return section -> file name."""
    saved = {}
    for section in contents.sections:
        if section.panels:
            saved[section.name] = f"{section.name}.png"
            with _style(**{"font.size": 9.5}):
                _section_figure(section, contents.arms).savefig(folder / saved[section.name], dpi=120)
    return saved


def _section_figure(section: Section, arms: Sequence[str]) -> Any:
    """Return the charts of a section with their titles, at most two in a row, and one legend."""
    from matplotlib.figure import Figure

    columns = min(2, len(section.panels))
    rows = math.ceil(len(section.panels) / columns)
    heights = [max(height(panel) for panel in section.panels[row * columns :][:columns]) for row in range(rows)]
    width = WIDTH * columns if columns > 1 else 1.3 * WIDTH
    figure = Figure(figsize=(width / 72, (sum(heights) + 36 * rows + 50) / 72), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06, hspace=0.06)
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"height_ratios": heights}).ravel()
    for axes, panel in zip(grid, section.panels, strict=False):
        draw(axes, panel)
        axes.set_title(printable(panel.title), loc="left", fontsize="large", fontweight="bold", color=light("ink"))
        if isinstance(panel, LinePanel):
            axes.set_ylabel(printable(panel.ylabel))
        if isinstance(panel, BarPanel) and panel.parts:
            axes.legend(handles=[_patch(part_name(part), name) for part, name in enumerate(panel.parts)], ncols=3,
                        loc="upper left", bbox_to_anchor=(0, -0.14))  # fmt: skip
    for axes in grid[len(section.panels) :]:
        axes.set_visible(False)
    if len(handles := _legend(section, arms)) > 1:
        figure.legend(handles=handles, loc="outside lower left", ncols=2)
    return figure


def _patch(colour: str, label: str, alpha: float = 1.0) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=light(colour), alpha=alpha, linewidth=0, label=printable(label))


def _legend(section: Section, arms: Sequence[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    def line(label: str, colour: str = "ink", **look: Any) -> Any:
        return Line2D([], [], color=light(colour), label=printable(label), **look)

    styles = {
        "faint": lambda text: line(text, linewidth=1, alpha=FAINT),
        "marked": lambda text: line(text, linewidth=1.7, marker="o", markersize=4),
        "seed": lambda text: line(text, linewidth=0.9, alpha=0.5),
        "guess": lambda text: line(text, linewidth=1, linestyle=":"),
        "band": lambda text: _patch("ink", text, 0.22),
        "open": lambda text: _patch("ink", text, 0.09),
    }
    curves = any(isinstance(panel, LinePanel) for panel in section.panels)
    handles = [
        line(arms[arm], arm_name(arm), linestyle=dashes(arm), linewidth=2)
        if curves
        else _patch(arm_name(arm), arms[arm])
        for arm in arms_shown(section.panels)
    ]
    return [*handles, *(styles[style](text) for style, text in section.legend)]


# ---- From matplotlib's SVG to a page's ------------------------------------------------------------------------------

_VARIABLES = {pair[0]: f"var(--{name})" for name, pair in PALETTE.items()}


def _for_page(root: ElementTree.Element, label: str) -> str:
    """Return matplotlib's SVG without sizes, fonts, metadata and unused ids, in the colours of the page."""
    parents = {child: parent for parent in root.iter() for child in parent}
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        if element.tag in ("metadata", "style"):
            parents[element].remove(element)
    used = set(re.findall(r"#([mpC]\w+)", " ".join(v for e in root.iter() for v in e.attrib.values())))
    for element in root.iter():
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}  # href without xlink
        name = attributes.get("id", "")
        if name not in used:
            attributes.pop("id", None)
        if name.startswith(CLASS):
            attributes["class"], _, title = name.removeprefix(CLASS).partition("|")
            if title:
                ElementTree.SubElement(element, "title").text = title
        if "style" in attributes:
            style = re.sub(r"font-family: [^;]*(; )?", "", attributes["style"])
            attributes["style"] = re.sub(r"#[0-9a-f]{6}", lambda match: _VARIABLES.get(match[0], match[0]), style)
        if "rotate(-0" in attributes.get("transform", ""):
            del attributes["transform"]
        for key in ("d", "x", "y"):
            if key in attributes:
                short = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.1f}", attributes[key])
                attributes[key] = re.sub(r"\s+", " ", short).strip()
        element.attrib.clear()
        element.attrib.update(attributes)
        element.tail = None
        element.text = element.text if element.tag in ("text", "title", "tspan") else None
    root.attrib = {"viewBox": root.get("viewBox"), "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")
