"""Reports: axes, the page, Markdown, pictures, and that nothing in them is taken for markup."""

import html.parser
import itertools
import math
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from reference import median_at_positions
from report_helpers import our_history, stock_history, write_comparison, write_run

from hf_trainopt.lab.report import Report, make_report
from hf_trainopt.lab.report.axes import limits, ratio_limits, set_ticks, tick_text
from hf_trainopt.lab.report.charts import free_place
from hf_trainopt.lab.report.contents import Band, IntervalPanel, Line, LinePanel, Panel
from hf_trainopt.lab.report.pictures import svg
from hf_trainopt.lab.report.seeds import median_curve, with_medians
from hf_trainopt.lab.report.summary import figure, ratio_text, spread
from hf_trainopt.lab.report.theme import PALETTE, arm_dashes, arm_name
from hf_trainopt.placement import PlacementPlan
from hf_trainopt.placement.plan.plan import StageChoice


HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(2)>&amp;|`_*$x$"""

_FINITE = st.floats(-1e12, 1e12, allow_nan=False)
_POSITIVE = st.floats(1e-9, 1e12)


# ---- Axes and numbers ----------------------------------------------------------------------------------------------


def ticks_of(scale: str, ends: tuple[float, float]) -> list[float]:
    axis = Figure().subplots().yaxis
    axis.axes.set_yscale("linear" if scale == "linear" else "log")
    axis.axes.set_ylim(ends)
    set_ticks(axis, scale, ends)
    least = 1e-9 * (ends[1] - ends[0])  # a tick that is off the end by rounding is drawn
    return [tick for tick in axis.get_majorticklocs() if ends[0] - least <= tick <= ends[1] + least]


def panel_of(*ys: float, scale: str = "linear", bands: tuple[Band, ...] = ()) -> LinePanel:
    return LinePanel("n", "t", "x", "y", (Line(0, np.arange(float(len(ys))), np.array(ys)),), bands, scale=scale)


@given(_FINITE, _FINITE)
@example(0.0, 5e-324)
@example(1.0, 1.0 + 2**-52)
@settings(deadline=None)
def test_linear_axes(a, b):
    scale, _, ends = limits(panel_of(a, b))
    assert scale == "linear"
    assert ends[0] <= min(a, b) <= max(a, b) <= ends[1]
    assert ends[0] < ends[1]
    assert 1 <= len(ticks_of(scale, ends)) <= 7


@given(_POSITIVE, st.floats(1, 1e9), st.sampled_from(["log", "log2"]))
@example(522462175573.0, 3.0, "log")
@settings(deadline=None)
def test_log_axes(low, ratio, kind):
    scale, _, ends = limits(panel_of(low, low * ratio, 0.0, scale=kind))
    assert scale == kind
    assert 0 < ends[0] <= low * (1 + 1e-6)
    assert low * ratio <= ends[1] * (1 + 1e-6)
    assert 2 <= len(ticks_of(scale, ends)) <= 9


def test_nothing_positive_is_no_log_axis():
    assert limits(panel_of(-1.0, 0.0, scale="log"))[0] == "linear"


@given(st.lists(st.tuples(_POSITIVE, st.just(math.nan), st.just(math.nan)), min_size=1, max_size=5))
def test_axes_of_ratios_have_one_on_them(points):
    low, high = ratio_limits(IntervalPanel("n", "t", "x", tuple(("", 0, *point) for point in points)))
    assert low < 1 < high
    assert all(low <= ratio <= high for ratio, _, _ in points)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0005, "0.0005"), (1e-5, "1e-5"), (12000, "12,000"), (2.5e6, "2.5M"), (3e9, "3G"), (-0.5, "−0.5"), (0, "0")],
)
def test_texts_of_ticks(value, text):
    assert tick_text(value) == text


def test_numbers_as_text():
    assert [figure(value) for value in (1852.3, 3.2e-5, math.inf)] == ["1,852", "3.2e-05", "∞"]
    assert [spread([seconds], "s") for seconds in (92.13, 743, 11556)] == ["92.1 s", "12.4 min", "3.21 h"]
    assert [ratio_text(value) for value in (1.0, 0.9784, 123.4, 5000)] == ["1.00", "0.978", "123", "5,000"]
    assert spread([0.01], "GiB") == "10.24 MiB"
    assert spread([1.0, 4.0], "s") == "2 s (1 to 4)"
    assert spread([0.0, 3.0]) == "0 to 3"
    assert spread([2.0, 2.0], "GiB") == "2 GiB"
    assert spread([1.0, math.nan]) == "not finite in 1 of 2 seeds"
    assert spread([0.42], "%") == "42 %"


def test_a_wide_interval_does_not_flatten_the_curve():
    band = Band(0, np.arange(3.0), np.full(3, 1e-9), np.array([8.0, 1e12, np.inf]))
    _, _, (low, high) = limits(panel_of(5.0, 6.0, 7.0, scale="log", bands=(band,)))
    assert 0.3 < low < 1
    assert 50 < high < 100


def test_curves_begin_at_the_beginning():
    _, (left, right), _ = limits(LinePanel("n", "t", "x", "y", (Line(0, np.array([10.0, 20.0]), np.ones(2)),)))
    assert (left, right) == (0, pytest.approx(20.3))


def test_arms_beyond_the_colours_have_other_dashes():
    looks = {(arm_name(arm), arm_dashes(arm)) for arm in range(24)}
    assert len(looks) == 24


def test_every_colour_has_a_variable_of_its_own():
    assert len({pair[0] for pair in PALETTE.values()}) == len(PALETTE)


# ---- Charts --------------------------------------------------------------------------------------------------------


def drawn(panel: Panel) -> ElementTree.Element:
    return ElementTree.fromstring(svg(panel))


def of_class(root: ElementTree.Element, *names: str) -> list[ElementTree.Element]:
    return [element for element in root.iter("g") if {*names} <= {*element.get("class", "").split()}]


def paths(element: ElementTree.Element) -> list[str]:
    return [path.get("d") for path in element.iter("path")]


def test_gaps_stay_gaps():
    root = drawn(panel_of(1.0, 2.0, np.nan, 3.0, 4.0, np.nan, 5.0))
    (curve,) = of_class(root, "curve")
    assert sum(len(re.findall(r"M [\d.]+ [\d.]+ L", path)) for path in paths(curve)) == 2
    (alone,) = of_class(root, "alone")
    assert len(list(alone.iter("use"))) == 1  # the last value stands alone
    assert "nan" not in svg(panel_of(1.0, np.nan, 2.0))


def test_long_curves_are_short_in_a_drawing():
    ys = np.random.default_rng(0).normal(size=20_000)
    band = Band(0, np.arange(20_000.0), ys + 8, np.where(ys > 1, np.inf, ys + 11))
    text = svg(panel_of(*(ys + 10), scale="log", bands=(band,)))
    assert len(text) < 200_000  # all points would be 600,000
    assert len(of_class(ElementTree.fromstring(text), "band", "open")) == 1


def test_steps_hold_until_the_next_value():
    line = Line(0, np.array([0.0, 1.0, 2.0]), np.array([1.0, 2.0, 4.0]), "step")
    (curve,) = of_class(drawn(LinePanel("n", "t", "x", "y", (line,), scale="log2")), "curve", "step")
    points = [tuple(map(float, point)) for point in re.findall(r"([\d.]+) ([\d.]+)", paths(curve)[0])]
    assert len(points) == 5
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        assert (x == next_x) != (y == next_y)


def test_open_intervals_are_drawn_apart():
    band = Band(0, np.arange(6.0), np.ones(6), np.array([4, 4, np.inf, np.inf, 4, 4.0]))
    root = drawn(panel_of(*[2.0] * 6, scale="log", bands=(band,)))
    assert [element.get("class") for element in of_class(root, "band")] == ["band", "band open"]
    closed, opened = of_class(root, "band")
    assert [sum(path.count("M") for path in paths(element)) for element in (closed, opened)] == [2, 1]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(width=32), st.floats(width=32), st.floats(width=32)), min_size=1, max_size=6),
    st.sampled_from(["linear", "log", "log2"]),
    st.sampled_from(["line", "faint", "marked", "step", "guess"]),
)
def test_any_values_make_a_drawing(points, scale, style):
    """Whatever a log has in it, coordinates are numbers."""
    ys, low, high = (np.array(column) for column in zip(*points, strict=True))
    xs = np.arange(float(len(points)))
    root = drawn(LinePanel("n", "t", "x", "y", (Line(0, xs, ys, style),), (Band(0, xs, low, high),), (1.0, "target"),
                           scale))  # fmt: skip
    values = [value for element in root.iter() for key, value in element.attrib.items() if key in ("d", "x", "y")]
    assert not [value for value in values if re.search("nan|inf", value)]


def test_seeds_are_thin_and_their_median_is_not():
    xs, marked = np.arange(3.0), [np.array([3.0, 2.0, 1.0]) + seed for seed in range(3)]
    lines = [*(Line(0, xs, ys, "marked") for ys in marked), *(Line(0, xs, ys + 9, "faint") for ys in marked)]
    shown = with_medians([*lines, Line(1, xs, xs)])
    assert [(line.arm, line.style, line.of_seed) for line in shown] == [
        *[(0, "marked", True)] * 3, (0, "marked", False), (0, "faint", False), (1, "line", False),
    ]  # fmt: skip
    assert shown[3].ys.tolist() == [4.0, 3.0, 2.0]
    root = drawn(LinePanel("n", "t", "x", "y", tuple(shown)))
    assert len(of_class(root, "curve", "seed")) == 3
    assert [len(list(curve.iter("use"))) for curve in of_class(root, "curve")].count(3) == 1  # marks of the median


@pytest.mark.parametrize("ending", ["early", "gap"])
def test_raw_values_of_seeds_are_all_shown_where_their_median_would_hide_some(ending):
    xs = np.arange(10.0)
    ys = np.where(xs == 4, np.nan, xs) if ending == "gap" else xs
    other = Line(0, xs[:4], ys[:4], "faint") if ending == "early" else Line(0, xs, ys, "faint")
    lines = [Line(0, xs, xs, "faint"), other]
    assert with_medians(lines) == lines


@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(0, 30), st.one_of(st.floats(-5, 5), st.just(math.nan))),
            min_size=1, max_size=8, unique_by=lambda point: point[0],
        ),
        min_size=2, max_size=4,
    ),
    st.sampled_from(["line", "step"]),
)  # fmt: skip
def test_the_median_over_seeds_is_that_of_its_slow_twin(curves, style):
    curves = [sorted(points) for points in curves]
    lines = [Line(0, *(np.array(column, dtype=float) for column in zip(*points, strict=True)), style)
             for points in curves]  # fmt: skip
    found = median_curve(lines)
    expected = median_at_positions(curves, holds=style == "step")
    assert (found is None) == (expected is None)
    if found is not None:
        assert found.xs.tolist() == [x for x, _ in expected]
        assert found.ys.tolist() == pytest.approx([y for _, y in expected], nan_ok=True)


def test_intervals_that_are_open_or_missing():
    bounds = (("b", 1, 1.2, 1.2, math.inf), ("c", 2, 0.8, 0.0, 0.8))
    points = (("a", 0, 0.5, 0.4, 0.6), *bounds, ("d", 3, 2.0, math.nan, math.nan))
    root = drawn(IntervalPanel("n", "t", "x", points))
    texts = [element.text for element in root.iter("text")]
    assert len(of_class(root, "interval")) == 3
    assert {"0.500 (0.400 to 0.600)", "≥ 1.20", "≤ 0.800", "2.00"} <= set(texts)


def boxes(root: ElementTree.Element, size: float = 11.0) -> list[tuple[str, float, float, float, float]]:
    """Return text, left, top, right and bottom of each text of a chart, by the average width of a character."""
    found = []
    for element in root.iter("text"):
        style, words = element.get("style", ""), element.text or ""
        x, y = float(element.get("x")), float(element.get("y"))
        wide = 0.6 * size * len(words)
        left = x - (wide if "text-anchor: end" in style else wide / 2 if "text-anchor: middle" in style else 0)
        found.append((words, left, y - 0.75 * size, left + wide, y + 0.2 * size))
    return found


def test_texts_of_intervals_do_not_meet_the_line_at_one_or_each_other():
    points = tuple((f"quantity number {i}", 0, 10 ** (i / 4 - 1), 0.9 * 10 ** (i / 4 - 1), 10 ** (i / 4 - 0.9))
                   for i in range(9))  # fmt: skip
    root = drawn(IntervalPanel("n", "t", "x", points))
    texts = boxes(root)
    drawings = [path for one in of_class(root, "one") for path in paths(one)]
    strokes = [[tuple(map(float, point)) for point in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)] for path in drawings]
    assert len(strokes) == len(points)
    for (x, y), (_, end) in strokes:
        for words, left, top, right, bottom in texts:
            meets = left < x < right and top < max(y, end) and bottom > min(y, end)
            assert not meets, words
    for (a, *first), (b, *second) in itertools.combinations(texts, 2):
        apart = first[2] <= second[0] or second[2] <= first[0] or first[3] <= second[1] or second[3] <= first[1]
        assert apart, (a, b)


def test_cut_intervals_end_in_arrows():
    def arrows(low, high):
        return len(of_class(drawn(IntervalPanel("n", "t", "x", (("a", 0, 0.9, low, high),))), "arrow"))

    assert arrows(0.8, 1.0) == 0
    assert arrows(0.001, 1.0) == 1
    assert arrows(1e-9, 400.0) == 2
    assert arrows(0.9, math.inf) == 1
    assert arrows(0.0, 0.9) == 1


def test_intervals_that_say_nothing_are_not_numbers():
    (words,) = [words for words, *_ in boxes(drawn(IntervalPanel("n", "t", "x", (("a", 0, 0.9, 1e-9, 400.0),))))
                if words.startswith("0.9")]  # fmt: skip
    assert words == "0.900 (not resolved)"


@pytest.mark.parametrize(
    ("ys", "place"),
    [
        ([4.0, 3.0, 2.0, 1.0], ("right", "above")),  # the curve is far below the level at its end
        ([4.0, 3.0, 2.05, 2.1], ("left", "below")),  # it ends right above it
        ([2.3, 2.3, 2.2, 1.5], ("right", "above")),
    ],
)
def test_the_text_at_a_target_hides_no_curve(ys, place):
    line = Line(0, np.arange(4.0), np.array(ys))
    panel = LinePanel("n", "t", "x", "y", (line,), level=(2.0, "target"))
    scale, across, up = limits(panel)
    side, where = free_place(panel, "target 2", across, up, scale)
    assert where == place[1] or side == place[0]
    (words, left, top, right, bottom) = next(box for box in boxes(drawn(panel)) if box[0].startswith("target"))
    (curve,) = of_class(drawn(panel), "curve")
    points = [tuple(map(float, point)) for point in re.findall(r"(-?[\d.]+) (-?[\d.]+)", paths(curve)[0])]
    xs, heights = zip(*points, strict=True)
    at = np.interp(np.linspace(left, right, 20), xs, heights, left=np.nan, right=np.nan)
    assert not ((at > top) & (at < bottom)).any(), words


# ---- The page ------------------------------------------------------------------------------------------------------


class Reader(html.parser.HTMLParser):
    """Keeps tags with their attributes, and texts; complains of what is not closed."""

    VOID = ("meta", "wbr")

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A stock run, one of ours with a plan, and a comparison."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "stock", stock_history())
    write_run(root / "ours", our_history())
    kinds = {"parameters": 2**28, "activations": 2**29, "optimizer": 2**27}
    figures = {"baseline_peak_bytes": 2**30, "predicted_peak_bytes": 2**29, "extra_time_ratio": 0.1}
    choices = {f"h.{index}": StageChoice("full") for index in range(4)}
    details = {"baseline_by_kind": kinds, "predicted_by_kind": kinds}
    PlacementPlan("budget", choices, measured_peak_bytes=2**29, details=details, **figures).save(
        root / "ours" / "placement.json"
    )
    logs = {"stock": [our_history(10, 0.1 + 0.01 * seed) for seed in range(3)],
            "ours": [our_history(10, 0.2 + 0.01 * seed) for seed in range(3)]}  # fmt: skip
    write_comparison(root / "compare", logs)
    return root


@pytest.fixture(scope="module")
def report(folders) -> Report:
    return make_report(folders / "stock", folders / "ours", folders / "compare")


def test_all_parts_are_there(report):
    reader = Reader(report.to_html())
    headings = reader.text
    for part in ("Verdict", "Results", "Ratios to", "training time to target", "Loss against training time",
                 "Loss against samples", "Loss against optimizer steps", "k, micro-batches of a step",
                 "Effective batch", "Gradient noise scale", "Learning rate", "samples/s", "Peak memory by phase",
                 "Checkpoint placement"):  # fmt: skip
        assert part in headings
    assert sum(tag == "svg" for tag, _ in reader.tags) >= 12
    labels = [attrs["aria-label"] for tag, attrs in reader.tags if tag == "svg" and attrs.get("role") == "img"]
    assert any(re.search(r"Last values: .*/stock 2\.\d+; ", label) for label in labels)


def test_the_page_needs_nothing_from_elsewhere(report):
    for text in (report.to_html(), report._repr_html_()):
        reader = Reader(text)
        assert not {tag for tag, _ in reader.tags} & {"script", "img", "link", "iframe", "object", "base", "form"}
        names = {name for _, attrs in reader.tags for name in attrs}
        assert not {name for name in names if name.startswith("on")} | names & {"src", "srcset", "xlink:href"}
        assert all(attrs["href"].startswith("#") for _, attrs in reader.tags if "href" in attrs)
        assert not re.search(r"https?:|//|url\((?!#)|@import", text.replace("</", ""))


def test_several_seeds_have_a_median(report, folders):
    assert "their median, as far as all of them go" in Reader(report.to_html()).text
    (panel,) = (p for s in report.contents.sections for p in s.panels if p.name == "loss_steps")
    assert sum(line.of_seed and line.style == "marked" for line in panel.lines) == 6
    assert sum(not line.of_seed and line.style == "marked" for line in panel.lines) == 4
    alone = make_report(folders / "stock")
    assert "median" not in Reader(alone.to_html()).text
    assert "baseline" not in alone.to_markdown()


def test_links_lead_somewhere(report):
    reader = Reader(report.to_html())
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["href"][1:] for _, attrs in reader.tags if "href" in attrs} <= set(ids)


def test_hostile_names_are_text(tmp_path):
    name = HOSTILE.replace("/", "")
    history = our_history()
    for line in history:
        if "eval_loss" in line:
            line[f"eval_{HOSTILE}"] = 0.5
    folder = write_run(tmp_path / name, history)
    (folder / "config.json").write_text('{"architectures": ["</script><b>bold"]}')
    hostile = make_report(folder, write_run(tmp_path / "other", history), title=f"</title>{HOSTILE}")
    safe = make_report(write_run(tmp_path / "a", history), tmp_path / "other", title="t")
    for text, reference in ((hostile.to_html(), safe.to_html()), (hostile._repr_html_(), safe._repr_html_())):
        reader = Reader(text)
        assert {tag for tag, _ in reader.tags} <= {tag for tag, _ in Reader(reference).tags} | {"wbr"}
        assert not [attr for _, attrs in reader.tags for attr in attrs if attr.startswith("on")]
        assert HOSTILE in reader.text
        assert "</script><b>bold" in reader.text
    markdown = hostile.to_markdown()
    assert "<" not in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables if "not recorded" not in line} <= {3, 4, 7}


def test_hostile_names_in_a_comparison(tmp_path):
    logs = {HOSTILE: [our_history()] * 2, "ours": [our_history(10, 0.3)] * 2}
    reader = Reader(make_report(write_comparison(tmp_path / "c", logs)).to_html())
    assert not {tag for tag, _ in reader.tags} & {"script", "img"}
    assert f"Ratios to {HOSTILE}" in reader.text


def test_names_that_no_xml_can_hold(tmp_path, recwarn):
    name = "a\x1b\udce9\ufffe 名前"
    logs = {name: [our_history()] * 2, "ours": [our_history(10, 0.3)] * 2, "more": [our_history(10, 0.4)] * 2}
    report = make_report(write_comparison(tmp_path / "c", logs), baseline="ours")
    assert len(report.save(tmp_path / "out")) > 5
    assert "名前" in (tmp_path / "out" / "report.html").read_text()
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_what_is_missing_is_said(folders, tmp_path):
    text = Reader(make_report(folders / "stock").to_html()).text
    assert "Noise scaleEfficientTrainer measures it" in text
    assert "wasn't logged. It is from its train_runtime" in text
    assert "weren't logged: they follow from" in text
    both = make_report(folders / "stock", folders / "ours").to_markdown()
    assert re.search(r"\| peak memory \| not recorded \| 1\.25 GiB \|", both)
    bare = write_run(tmp_path / "bare", stock_history()[:-1])
    assert "No training time was logged" in Reader(make_report(bare).to_html()).text
    assert "compared on samples and steps only" in make_report(bare, folders / "ours").to_markdown()


def test_styles_do_not_leave_a_fragment(report):
    (style,) = re.findall(r"<style>(.*?)</style>", report._repr_html_(), flags=re.DOTALL)
    flat = re.sub(r"@page\{[^}]*\}", "", style)
    flat = re.sub(r"@media[^{]*\{", "", flat)
    for rule in re.findall(r"([^{}]+)\{[^{}]*\}", flat):
        for selector in rule.split(","):
            assert ".hf-trainopt-report" in selector, selector
    assert 'data-jp-theme-light="false"' in style


def test_two_reports_in_a_notebook_do_not_mix(report, folders):
    """What has the same id (a mark, the frame that curves are cut off at) is the same in both."""
    found: dict[str, str] = {}
    for shown in (report, make_report(folders / "ours"), make_report(folders / "stock")):
        defined = re.findall(r'<(?:path|clipPath) id="(\w+)"([^>]*>(?:<rect[^>]*>)?)', shown._repr_html_())
        assert len(defined) == len([1 for _, attrs in Reader(shown._repr_html_()).tags if "id" in attrs]) > 10
        for name, what in defined:
            assert found.setdefault(name, what) == what


def test_a_page_of_many_long_runs_stays_small(tmp_path):
    folders = [write_run(tmp_path / f"run-seed{seed}", our_history(3000)) for seed in range(4)]
    assert len(make_report(*folders).to_html()) < 1_500_000


# ---- Markdown and pictures -----------------------------------------------------------------------------------------


def test_markdown_tables(report):
    text = report.to_markdown()
    assert "| optimizer steps | 10 | 10 |" in text
    brief = report.to_markdown(brief=True)
    assert "## Verdict" in brief
    assert "training time to target" in brief
    assert "ratio to " in brief
    assert "## Throughput" not in brief
    assert str(report) == text


def test_pictures(report, tmp_path):
    saved = report.save(tmp_path / "out")
    names = {path.name for path in saved}
    assert {"report.html", "report.md", "loss.png", "noise_scale.png", "memory.png", "verdict.png"} <= names
    for path in saved:
        if path.suffix == ".png":
            assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
            assert path.stat().st_size > 5000
    assert "![Loss](loss.png)" in (tmp_path / "out" / "report.md").read_text()


def test_pictures_of_hostile_names(tmp_path):
    history = our_history()
    report = make_report(write_run(tmp_path / "a$b_{$^", history), write_run(tmp_path / "$\\frac$", history))
    assert len(report.save(tmp_path / "out", ["png"])) >= 5


def test_without_matplotlib_the_remedy_is_said(report, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'hf-trainopt\[plot\]'"):
        report.save(tmp_path / "out", ["html", "png"])
    assert not (tmp_path / "out").exists()
    assert [path.name for path in report.save(tmp_path / "out", ["html", "md"])] == ["report.html", "report.md"]
    assert not caplog.records
    for name in ("report.html", "report.md"):
        text = (tmp_path / "out" / name).read_text()
        assert text.count("pip install") == 1
        assert "Last values: " in text
        assert "training time to target" in text
    assert "<svg" not in (tmp_path / "out" / "report.html").read_text()


def test_without_matplotlib_and_a_choice_of_formats_the_page_is_written(report, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert [path.name for path in report.save(tmp_path / "out")] == ["report.html", "report.md"]
    assert "pip install 'hf-trainopt[plot]'" in caplog.text


@pytest.mark.parametrize("formats", [["pdf"], []])
def test_unknown_formats(report, tmp_path, formats):
    with pytest.raises(ValueError, match="choose from html, md, png"):
        report.save(tmp_path / "out", formats)
