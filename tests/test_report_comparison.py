"""Reports of `hf-trainopt compare`: what is read from its folder."""

import json
import math
import re

import pytest
from report_helpers import our_history, stock_history, write_comparison, write_run

from hf_trainopt.lab.compare.comparison import compare, freeze_target
from hf_trainopt.lab.compare.records import save
from hf_trainopt.lab.report import make_report
from hf_trainopt.lab.report.comparison import is_comparison, read_comparison
from hf_trainopt.lab.report.runs import Run


def histories(shift: float = 0.0) -> list:
    return [our_history(10, 0.1 + shift + 0.01 * seed) for seed in range(3)]


@pytest.fixture
def folder(tmp_path):
    return write_comparison(tmp_path / "compare", {"stock": histories(), "ours": histories(0.1)})


def section(report, name: str):
    return next(section for section in report.contents.sections if section.name == name)


def test_ratios_and_intervals_are_those_of_the_file(folder):
    saved = json.loads((folder / "comparison.json").read_text())
    estimate = saved["arms"][1]["ratios"]["samples_to_target"]
    report = make_report(folder)
    loss, panel = section(report, "verdict").panels
    assert loss.name == "loss_time"
    (point,) = [point for point in panel.points if point[0] == "samples to the target"]
    assert point[2:] == (estimate["value"], estimate["lower"], estimate["upper"])
    assert 0 < estimate["lower"] < estimate["value"] < estimate["upper"] < 1
    ratio = f"| samples to the target | {estimate['value']:.3g} ("
    assert report.to_markdown().count(ratio) == report.to_markdown(brief=True).count(ratio) == 1
    assert report.to_markdown().count(f"{estimate['value']:.3g}") == 1  # each fact stands once
    assert report.contents.arms == ("stock (3 seeds)", "ours (3 seeds)")
    assert report.contents.arms[point[1]] == "ours (3 seeds)"


def test_baseline_and_target_are_those_of_the_comparison(folder):
    report = make_report(folder)
    saved = json.loads((folder / "comparison.json").read_text())["target"]
    verdict = section(report, "verdict")
    assert f"{saved['value']:.6g}" in verdict.text[0]
    assert "at 80% of its data" in verdict.text[0]
    assert section(report, "summary").tables[0].columns == ("", "stock (3 seeds), baseline", "ours (3 seeds)")
    other = make_report(folder, baseline="ours", target_metric="loss", target_value=2.0)
    assert "ours (3 seeds), baseline" in section(other, "summary").tables[0].columns
    assert "≤ 2 (given)" in section(other, "verdict").text[0]
    # Its own ratios have no interval; the file's, which are to another baseline, stand apart.
    (point,) = [point for point in section(other, "verdict").panels[1].points if point[0] == "samples to the target"]
    assert all(math.isnan(end) or end in (0, math.inf, point[2]) for end in point[3:])
    assert section(other, "comparison").panels[0].points == section(report, "verdict").panels[1].points
    assert f"{saved['value']:.6g}" in section(other, "comparison").text[0]


def test_curves_are_those_of_the_records(folder):
    report = make_report(folder)
    by_time, (by_samples, by_steps) = section(report, "verdict").panels[0], section(report, "loss").panels
    for panel in (by_time, by_samples, by_steps):
        marked = [line for line in panel.lines if line.style == "marked"]
        assert [line.arm for line in marked if line.of_seed] == [0, 0, 0, 1, 1, 1]
        assert [line.arm for line in marked if not line.of_seed] == [0, 1]  # their medians
    assert by_samples.lines[-1].xs[-1] == 50


def test_bounds_are_shown_as_bounds(tmp_path):
    """Ours never gets there: its ratio is at least what is computed, and has no interval."""
    never = [our_history(10, 0.001) for _ in range(3)]
    report = make_report(write_comparison(tmp_path / "c", {"stock": histories(), "ours": never}))
    part = section(report, "verdict")
    (point,) = [point for point in part.panels[1].points if point[0] == "samples to the target"]
    assert point[2] == point[3]
    assert math.isinf(point[4])
    assert "| samples to the target | ≥ " in report.to_markdown()
    assert re.match(r"ours did not reach the target in 1\.\d+ times the time of stock, ", part.lead[0])
    cells = {row[0]: row[1:] for row in section(report, "summary").tables[0].rows}
    assert cells["target reached"] == ("3 of 3 seeds", "0 of 3 seeds")
    assert cells["samples to target"][1] == "over 50"


def test_one_seed_has_no_interval(tmp_path):
    report = make_report(write_comparison(tmp_path / "c", {"stock": histories()[:1], "ours": histories(0.1)[:1]}))
    part = section(report, "verdict")
    assert all(math.isnan(end) for point in part.panels[1].points for end in point[3:])
    assert "One seed has no interval" in part.text[1]
    assert part.lead[0].endswith(" (one seed, no interval).")


def test_failed_runs_are_said(tmp_path):
    report = make_report(write_comparison(tmp_path / "c", {"stock": histories(), "ours": [*histories(0.1)[:2], None]}))
    assert "1 run has failed" in " ".join(section(report, "verdict").text)
    assert report.contents.arms == ("stock (3 seeds)", "ours (2 seeds)")


def test_a_comparison_that_is_not_finished(tmp_path):
    folder = write_comparison(tmp_path / "c", {"stock": histories()}, result=False)
    assert is_comparison(folder)
    part = section(make_report(folder), "comparison")
    assert "There is no comparison.json yet" in part.text[0]
    assert part.panels == ()


def test_runs_of_a_sweep_are_a_table(folder):
    record = json.loads((folder / "records" / "stock-seed0.json").read_text())
    record["arm"]["name"] = "stock, k = 2, rate 0.1"
    (folder / "records" / "sweep-seed0.json").write_text(json.dumps(record))
    report = make_report(folder)
    (table,) = [table for table in section(report, "summary").tables if table.folded and table.title != "Settings"]
    assert table.rows[0][0] == "stock, k = 2, rate 0.1"
    assert len(report.contents.arms) == 2


def test_what_an_earlier_call_has_left_is_not_mixed_in(tmp_path):
    """Of three seeds and two arms the last call compared one seed of one arm."""
    folder = write_comparison(tmp_path / "c", {"stock": histories(), "ours": histories(0.1)})
    records = [json.loads((folder / "records" / "stock-seed0.json").read_text())]
    target = freeze_target(records[0], "eval_loss", None, 0.8, None)
    save(folder / "comparison.json", compare("x.py", "stock", {"stock": records}, target, "eval_loss").to_dict())
    report = make_report(folder)
    assert report.contents.arms == ("stock",)
    (table,) = [table for table in section(report, "summary").tables if table.folded and table.title != "Settings"]
    assert table.title == "Earlier runs that are not compared"
    assert {name for name, _ in table.rows} == {"stock-seed1", "stock-seed2", *(f"ours-seed{s}" for s in range(3))}


def test_a_search_shows_what_has_diverged(folder):
    record = json.loads((folder / "records" / "stock-seed0.json").read_text())
    record["arm"]["name"] = "stock, k = 2, rate 0.1"
    [line for line in record["log_history"] if "eval_loss" in line][-1]["eval_loss"] = float("nan")
    (folder / "records" / "sweep-seed0.json").write_text(json.dumps(record))
    (table,) = [table for table in section(make_report(folder), "summary").tables if table.folded]
    assert table.rows == (("stock, k = 2, rate 0.1", "not a number"),)


def test_beside_a_run_in_memory(folder):
    run = Run("mine", None, tuple(our_history()), {"global_step": 10})
    assert "mine" in make_report(run, folder).contents.title


def test_beside_other_runs(folder, tmp_path):
    """Arms of the same name in two places stay apart; a run that is named twice counts once."""
    write_run(tmp_path / "stock", stock_history())
    write_run(folder / "ours-seed0", our_history())
    report = make_report(folder, tmp_path / "stock", folder / "ours-seed0")
    assert report.contents.arms == ("compare/stock (3 seeds)", "ours (3 seeds)", f"{tmp_path.name}/stock")


def test_two_comparisons(tmp_path):
    for name in ("a", "b"):
        write_comparison(tmp_path / name, {"stock": histories(), "ours": histories(0.1)})
    report = make_report(tmp_path / "a", tmp_path / "b")
    assert len(report.contents.arms) == 4
    titles = [part.title for part in report.contents.sections if part.name.startswith("comparison")]
    assert titles == [f"Comparison in {tmp_path / 'b'}"]
    assert {point[1] for point in section(report, "comparison_2").panels[0].points} == {3}


@pytest.mark.parametrize(
    "change",
    [lambda v: v.update(schema_version=9), lambda v: v.pop("arms"), lambda v: v["arms"][0].pop("seeds"),
     lambda v: v["arms"][1]["ratios"]["samples"].update(value="high"), lambda v: v.update(machine=5),
     lambda v: v["target"].update(value=None)],
)  # fmt: skip
def test_a_file_that_is_none(folder, change):
    values = json.loads((folder / "comparison.json").read_text())
    change(values)
    (folder / "comparison.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"comparison.json cannot be read .*; run the same `hf-trainopt compare`"):
        read_comparison(folder)


def test_records_that_are_none(folder):
    (folder / "records" / "ours-seed0.json").write_text("{}")
    comparison = read_comparison(folder)
    assert "records/ours-seed0.json isn't a record of this version" in comparison.notes[0]
    assert len(comparison.runs) == 5


def test_only_failures(tmp_path):
    with pytest.raises(ValueError, match="has finished"):
        make_report(write_comparison(tmp_path / "c", {"stock": [None]}, result=False))
