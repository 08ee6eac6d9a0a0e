"""Tables and the picture of `hf-trainopt plan`, from plans made by hand."""

import pytest

from hf_trainopt.placement.plan.plan import FULL, STORE, PlacementPlan, Rewrites, StageChoice
from hf_trainopt.placement.show import plot, render


MIB = 2**20
GIB = 2**30
STAGES = [f"transformer.h.{index}" for index in range(4)]


def make_plan(peak=8 * GIB, time=0.0, choices=None, rewrites=None, policy="budget", **more):
    stages = dict(zip(STAGES, choices or [STORE] * 4, strict=True))
    values = {"baseline_peak_bytes": 10 * GIB, "floor_peak_bytes": 4 * GIB} | more
    return PlacementPlan(
        policy, stages, rewrites or Rewrites(), predicted_peak_bytes=peak, extra_time_ratio=time, **values
    )


@pytest.fixture
def plans():
    return [
        make_plan(10 * GIB),
        make_plan(8 * GIB, 0.021, [FULL, STORE, STORE, STORE]),
        make_plan(4 * GIB, 0.25, [FULL] * 4),
    ]


@pytest.fixture
def peak_by_key():
    table = {("parameters", ""): 40 * MIB, ("inputs", ""): 2 * MIB, ("loss", ""): 3000 * MIB}
    for stage in STAGES:
        table |= {("parameters", stage): 10 * MIB, ("optimizer", stage): 20 * MIB, ("activations", stage): 100 * MIB}
    return table


def test_rows_add_up_to_the_peak(peak_by_key):
    rows = render.memory_rows(peak_by_key, STAGES)
    assert [row.name for row in rows] == [*STAGES, render.OUTSIDE, render.LOSS_HEAD]
    assert sum(row.total for row in rows) == sum(peak_by_key.values())
    assert rows[0].columns["optimizer"] == 20 * MIB
    assert rows[-2].total == 42 * MIB
    assert rows[-1].columns == dict.fromkeys(render.COLUMNS, 0) | {"loss, temp.": 3000 * MIB}


@pytest.mark.parametrize(
    ("kind", "column"),
    [
        ("buffers", "parameters"),
        ("communication", "gradients"),
        ("inputs", "activations"),
        ("temporary", "loss, temp."),
    ],
)
def test_every_kind_has_a_column(kind, column):
    assert render.memory_rows({(kind, "a"): 7}, ["a"])[0].columns[column] == 7


def test_equal_neighbours_are_one_line(peak_by_key):
    lines = render.render_memory(peak_by_key, STAGES).splitlines()
    assert lines[0].split() == [
        "(MiB)",
        "parameters",
        "gradients",
        "optimizer",
        "activations",
        "loss,",
        "temp.",
        "total",
    ]
    assert [line.split()[-6:] for line in lines if line.startswith("transformer.h.0-3 (each)")] == [
        ["10", "0", "20", "100", "0", "130"]
    ]
    total = next(line for line in lines if line.startswith("total at the peak"))
    assert total.split()[-6:] == ["80", "0", "80", "402", "3,000", "3,562"]
    assert not any("chosen" in line for line in lines)


def test_different_neighbours_are_lines_of_their_own(peak_by_key):
    peak_by_key["activations", STAGES[1]] += 50 * MIB
    text = render.render_memory(peak_by_key, STAGES)
    assert "transformer.h.0 " in text
    assert "transformer.h.1 " in text
    assert "transformer.h.2-3 (each)" in text


def test_the_chosen_plan_is_a_line_below_the_total(peak_by_key):
    text = render.render_totals(peak_by_key, {("parameters", ""): 5 * MIB, ("activations", "h"): 7 * MIB})
    assert " ".join(text.splitlines()[-1].split()) == "total under the chosen plan 5 0 0 7 0 12"


def test_parents_are_left_out_where_names_are_too_long():
    stages = [f"model.{'inner.' * 10}blocks.{index}" for index in range(3)]
    lines = render.render_memory({("activations", stages[1]): 3 * GIB}, stages).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["blocks.0", "blocks.1", "blocks.2"]


def test_long_names_stay_within_the_width():
    stages = [f"{'inner' * 30}block{index}" for index in "ab"]
    lines = render.render_memory({("activations", stages[0]): 3 * GIB}, stages).splitlines()
    assert max(map(len, lines)) <= render.WIDTH
    assert any("…" in line and "blocka" in line for line in lines)


@pytest.mark.parametrize(
    ("choices", "rewrites", "expected"),
    [
        ([STORE] * 4, {}, "everything kept"),
        ([FULL] * 4, {}, "full on all stages"),
        ([FULL, STORE, STORE, FULL], {}, "full on h.0, h.3"),
        (
            [StageChoice("selective", (0, 1)), StageChoice("selective", (0, 2)), STORE, StageChoice("activation")],
            {"chunked_loss": True},
            "selective (2 kept) on h.0-1; activation function on h.3; chunked loss",
        ),
        (
            [StageChoice("full", run=0), StageChoice("full", run=0), FULL, STORE],
            {"fused_activations": True},
            "full on h.2; full in segments h.0-1; fused activation",
        ),
    ],
)
def test_words(choices, rewrites, expected):
    assert render.words(make_plan(choices=choices, rewrites=Rewrites(**rewrites))) == expected


def test_words_leave_out_what_all_names_share():
    stages = dict.fromkeys(["m.stem", "m.stages.0.blocks.0", "m.stages.0.blocks.1"], FULL) | {"m.head": STORE}
    assert render.words(PlacementPlan("budget", stages)) == "full on stem, stages.0.blocks.0-1"


def test_words_name_segments_across_sequences():
    stages = dict.fromkeys(["m.layer1.0", "m.layer1.1", "m.layer2.0"], StageChoice("full", run=0))
    assert render.words(PlacementPlan("sqrt", stages)) == "full in segments layer1.0 to layer2.0"


@pytest.mark.parametrize(
    ("ratio", "signed", "text"),
    [(None, True, ""), (-0.00001, True, "+0.0 %"), (-0.123, True, "-12.3 %"), (0.55, False, "55.0 %")],
)
def test_percent(ratio, signed, text):
    assert render.percent(ratio, signed=signed) == text


def test_frontier_marks_baseline_floor_and_the_chosen_plan(plans):
    lines = render.render_frontier(plans, chosen=plans[1]).splitlines()[2:]
    assert [" ".join(line.split()) for line in lines] == [
        "baseline 10.00 GiB 0.0 % +0.0 % everything kept",
        "→ 8.00 GiB 20.0 % +2.1 % full on h.0",
        "floor 4.00 GiB 60.0 % +25.0 % full on all stages",
    ]


def test_rewrites_have_a_time_of_their_own():
    plan = make_plan(rewrites=Rewrites(chunked_loss=True), details={"rewritten_time_ratio": -0.063})
    assert "+0.0 %    -6.3 %  chunked loss" in render.render_frontier([plan])


def test_named_policies_stand_below(plans):
    every = make_plan(7 * GIB, 0.12, [FULL, STORE] * 2, policy="every_2")
    text = render.render_frontier(plans, [every], every)
    above, below = text.split("Named policies")
    assert "→" not in above
    assert "→ every_2" in below


def test_a_chosen_plan_is_shown_wherever_it_is_from(plans):
    other = make_plan(5 * GIB, 0.2, [STORE, STORE, FULL, FULL])
    assert "→ budget" in render.render_frontier(plans, [], other)


def test_plans_of_almost_the_same_peak_are_left_out_but_not_if_chosen(plans):
    near = make_plan(8 * GIB - MIB, 0.03, [STORE, FULL, STORE, STORE])
    frontier = [*plans[:2], near, plans[2]]
    assert "full on h.1" not in render.render_frontier(frontier)
    assert "full on h.1" in render.render_frontier(frontier, chosen=near)


def test_no_line_is_too_long(plans):
    stages = {f"transformer.h.{index}": FULL if index % 2 else STORE for index in range(80)}
    wide = PlacementPlan(
        "every_2", stages, Rewrites(True, True), 10 * GIB, 5 * GIB, 4 * GIB, 6 * GIB, 0.1, 0.01,
        details={"rewritten_time_ratio": -0.1},
    )  # fmt: skip
    text = render.render_frontier(plans, [wide], wide) + "\n" + render.render_choice(wide, None)
    assert max(map(len, text.splitlines())) <= render.WIDTH


def test_choice_says_what_it_costs_and_how_to_use_it():
    plan = make_plan(
        8 * GIB, 0.021, [FULL, STORE, STORE, STORE], Rewrites(chunked_loss=True), budget_bytes=9 * GIB,
        optimality_gap=0.004, details={"rewritten_time_ratio": -0.05},
    )  # fmt: skip
    settings = {"memory_budget": "90%", "memory_rewrites": "chunked_loss"}
    text = render.render_choice(plan, "my.json", "python run_clm.py", settings)
    paragraph = " ".join(text.split("\n\n")[0].split())
    assert "Chosen for a budget of 90% (9.00 GiB)" in paragraph
    assert "peak 8.00 GiB, 20.0 % less than the 10.00 GiB without placement; time +2.1 % to recompute" in paragraph
    assert "to recompute, -5.0 % by rewrites. It does" in paragraph
    assert "The rewrites change results by rounding only" in paragraph
    assert "could save 0.4 % of a step's time at most" in paragraph
    assert "The floor is 4.00 GiB" in paragraph
    assert "  python run_clm.py ... --checkpoint_placement my.json\n" in text
    assert "  python run_clm.py ... --memory_budget 90% --memory_rewrites chunked_loss\n" in text
    assert '  EfficientTrainingArguments(..., memory_budget="90%", memory_rewrites="chunked_loss")' in text
    assert 'PlacementPlan.load("my.json")' in text


@pytest.mark.parametrize(
    ("extra", "settings", "said"),
    [
        # A plan that needs less recomputation may exist, with a rewrite that is slower than what it replaces.
        (0.021, {}, "No plan for this budget takes less time."),
        (0.0, {"rewrites": Rewrites(True), "details": {"rewritten_time_ratio": -0.05}}, "takes less time."),
        (0.0, {}, "It adds no time to a step."),  # with rewrites it might be faster
    ],
)
def test_a_best_plan_is_said_to_take_least_not_to_recompute_least(extra, settings, said):
    text = render.render_choice(make_plan(8 * GIB, extra, budget_bytes=9 * GIB, optimality_gap=0.0, **settings))
    assert said in " ".join(text.split("\n\n")[0].split())


def test_choice_of_nothing_is_called_so():
    text = render.render_choice(make_plan(10 * GIB, budget_bytes=12 * GIB, optimality_gap=0.0))
    assert "nothing is recomputed" in text
    assert "rounding" not in text
    assert "Write it with --output plan.json" in text
    assert "budget of 12.00 GiB:" in text
    assert "Or let the run" not in text


def test_numbers_stay_with_their_units():
    text = render.wrapped("x " * 45 + "about 10.0 % of it")
    assert text.splitlines()[0].endswith("about")
    assert text.splitlines()[1] == "10.0 % of it"


def test_plot_has_the_frontier_the_policies_and_the_budget(plans, tmp_path):
    pytest.importorskip("matplotlib")
    named = [make_plan(7 * GIB, 0.2, [FULL, STORE] * 2, policy="every_2")]
    path = tmp_path / "frontier.svg"
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot.plot_frontier(str(path), plans, named, make_plan(budget_bytes=9 * GIB), "a title")
    text = path.read_text()
    for expected in ("a title", "every_2", "budget 9.00 GiB", "without placement 10.00 GiB", "chosen: 8.00 GiB"):
        assert f">{expected}" in text


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_plans_with_rewrites_have_a_mark_of_their_own(plans):
    pytest.importorskip("matplotlib")
    assert legend_of(plot.frontier_figure(plans)) == ["plans without rewrites (exact)"]
    fused = make_plan(7 * GIB, 0.03, rewrites=Rewrites(fused_activations=True))
    both = make_plan(3 * GIB, 0.3, rewrites=Rewrites(True, True))
    figure = plot.frontier_figure([*plans, fused, both])
    assert legend_of(figure) == [
        "plans without rewrites (exact)",
        "plans with fused activations",
        "plans with fused activations and chunked loss",
    ]
    marks = {line.get_marker(): list(line.get_xdata()) for line in figure.axes[0].lines}
    del marks["None"]  # the steps
    assert list(marks.values()) == [[4.0, 8.0, 10.0], [7.0], [3.0]]


def test_plot_has_the_time_of_the_whole_step_so_that_its_line_never_rises_with_memory():
    """Recomputation that spares a rewrite slower than what it replaces: less of it at the smaller budget."""
    pytest.importorskip("matplotlib")
    fused = {"rewrites": Rewrites(fused_activations=True), "details": {"rewritten_time_ratio": -0.047}}
    both = {"rewrites": Rewrites(True, True), "details": {"rewritten_time_ratio": -0.040}}
    plans = [make_plan(8 * GIB, **fused), make_plan(7 * GIB, 0.004, **fused), make_plan(6 * GIB, **both)]
    assert [round(render.changed_time(plan), 6) for plan in plans] == [-0.047, -0.043, -0.040]
    axes = plot.frontier_figure(plans, chosen=plans[1]).axes[0]
    marks = [line for line in axes.lines if line.get_marker() in ("o", "^", "v") and len(line.get_xdata()) > 0]
    places = sorted({(x, round(y, 3)) for line in marks for x, y in zip(*line.get_data(), strict=True)})
    assert places == [(6.0, -4.0), (7.0, -4.3), (8.0, -4.7)]
    assert axes.get_ylim()[0] < -4.7
    assert "chosen: 7.00 GiB, -4.3 %" in [text.get_text() for text in axes.figure.legends[0].get_texts()]


def test_labels_of_policies_do_not_cover_each_other(plans):
    pytest.importorskip("matplotlib")
    everything = make_plan(round(4.2 * GIB), 0.24, [FULL] * 4, policy="all")
    root = make_plan(4 * GIB, 0.25, [FULL] * 4, policy="sqrt")
    figure = plot.frontier_figure(plans, [everything, root])
    figure.draw_without_rendering()
    boxes = {text.get_text(): text.get_window_extent() for text in figure.axes[0].texts}
    assert boxes["sqrt"].x1 < boxes["all"].x0  # as they lie
    same = make_plan(4 * GIB, 0.25, [FULL] * 4, policy="all")
    assert "all, sqrt" in [text.get_text() for text in plot.frontier_figure(plans, [root, same]).axes[0].texts]


def test_plot_needs_a_known_suffix():
    with pytest.raises(ValueError, match=r"--plot frontier\.txt must end in \.png"):
        plot.check_plot("frontier.txt")


def test_plot_without_matplotlib_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        plot.check_plot("frontier.png")
