"""What a report says first, and that it says the same everywhere."""

import math
import re

import pytest
from report_helpers import our_history, stock_history, write_comparison, write_run

from hf_trainopt.lab.compare.render import estimate_text
from hf_trainopt.lab.compare.statistics import Estimate, Measured, paired_ratio
from hf_trainopt.lab.report import make_report
from hf_trainopt.lab.report.arms import Arm
from hf_trainopt.lab.report.ratios import ends, ratio_of_means
from hf_trainopt.lab.report.runs import Run
from hf_trainopt.lab.report.verdict import verdicts
from hf_trainopt.metrics.targets import Target


TARGET = Target("eval_loss", 2.0, False)
ARMS = tuple(Arm(name, tuple(Run(f"{name}{i}", None) for i in range(5))) for name in ("stock", "ours"))


def verdict(target=TARGET, arms=ARMS, **estimates) -> str:
    class Given:
        def __init__(self, quantity, estimate):
            self.quantity, self.estimate, self.arm = quantity, estimate, 1

    runs = [Given(quantity, estimate) for quantity, estimate in estimates.items()]
    (text,) = verdicts(arms, arms[0], runs, target)
    return text


def exact(value, low=None, high=None, pairs=5):
    return Estimate(value, low, high, "exact", pairs)


def test_the_sentence_of_the_issue():
    text = verdict(
        time_to_target=exact(0.43, 0.40, 0.47), peak_memory=exact(0.69, 0.68, 0.70),
        final_metric=exact(1.011, 1.004, 1.018),
    )  # fmt: skip
    assert text == (
        "ours reached the target in 0.430 of the time (95 %: 0.400–0.470), 31 % less memory, "
        "final eval_loss 1.1 % higher."
    )


@pytest.mark.parametrize(
    ("estimates", "said"),
    [
        ({"time_to_target": exact(0.98, 0.9, 1.1)}, "0.980 of the time (95 %: 0.900–1.10, no clear difference)"),
        ({"time_to_target": exact(1.2, 1.1, 1.3)}, "took 1.20 times the time to the target (95 %: 1.10–1.30)"),
        ({"time_to_target": exact(0.7, 0.001, 450.0)}, "0.700 of the time (too uncertain for an interval)."),
        ({"time_to_target": exact(0.7, 0.001, 450.0, pairs=2)}, "0.700 of the time (5 seeds, no interval)."),
        ({"time_to_target": Estimate(1.5, None, None, "at least", 5)}, "did not reach the target in 1.50 times the"),
        ({"time_to_target": Estimate(0.5, None, None, "at most", 5)}, "which stock did not, in at most 0.500 of its"),
        ({"time_to_target": exact(1.002, 0.9, 1.1)}, "in the same time (95 %: 0.900–1.10, no clear difference)"),
        (
            {"time_to_target": exact(0.25, 0.2, 0.3), "train_time": exact(1.39, 1.3, 1.5)},
            "), its whole training took 39 % longer",
        ),
        (
            {"peak_memory": exact(0.5, 0.4, 0.6), "train_time": exact(2.5, 2, 3)},
            "ours: its whole training took 2.50 times as long, 50",
        ),
        ({"samples_to_target": exact(0.3, 0.2, 0.4)}, "ours reached the target with 0.300 of the samples"),
        ({"peak_memory": exact(1.001, 1.0, 1.002)}, "ours: the same memory"),
        ({"peak_memory": exact(2.5, 2.4, 2.6)}, "2.50 times the memory"),
        ({"final_metric": exact(0.99, 0.97, 1.01)}, "final eval_loss 1 % lower (no clear difference)"),
        ({"final_metric": exact(2.5, 2.4, 2.6)}, "final eval_loss 2.50 times as high"),
        ({}, "have nothing in common that could be compared"),
    ],
)
def test_sentences(estimates, said):
    assert said in verdict(**estimates)


def test_a_run_that_is_hardly_longer_or_shorter_is_not_said_to_be():
    for ratio in (0.5, 1.0, 1.04):
        assert "whole run" not in verdict(time_to_target=exact(0.4, 0.3, 0.5), train_time=exact(ratio, ratio, ratio))


def test_one_run_alone_and_no_made_up_target(tmp_path):
    report = make_report(write_run(tmp_path / "mine", our_history()))
    first = report.contents.sections[0]
    assert first.name == "verdict"
    assert first.lead == ("mine took 10 optimizer steps, 50 samples, 15 s; eval_loss ended at 1.506; "
                          "peak memory 1.25 GiB.",)  # fmt: skip
    assert "target" not in " ".join(first.text)
    assert "Time to target" in dict(report.contents.absent)


def test_what_has_diverged_is_not_called_better(tmp_path):
    history = our_history()
    [line for line in history if "eval_loss" in line][-1]["eval_loss"] = math.nan
    write_run(tmp_path / "ours", history)
    write_run(tmp_path / "stock", stock_history())
    (lead,) = make_report(tmp_path / "stock", tmp_path / "ours").contents.sections[0].lead
    assert "final eval_loss not finite" in lead


def test_without_any_evaluation(tmp_path):
    for name in ("stock", "ours"):
        write_run(tmp_path / name, [line for line in our_history() if "eval_loss" not in line])
    (lead,) = make_report(tmp_path / "stock", tmp_path / "ours").contents.sections[0].lead
    assert lead == "ours: the same memory (one seed, no interval)."


# ---- One kind of mean ----------------------------------------------------------------------------------------------


def test_ratios_of_means_are_means_of_ratios():
    """Pairing changes the interval only. An arithmetic mean would say 0.700 here."""
    ours, stock = [1.0, 6.0, 0.5], [2.0, 7.0, 1.7]
    paired = paired_ratio(ours, stock).value
    found = ratio_of_means([Measured(v) for v in ours], [Measured(v) for v in stock])
    assert found.value == pytest.approx(paired)
    assert paired != pytest.approx(sum(ours) / sum(stock), rel=0.05)
    assert found.interval is None


@pytest.mark.parametrize(
    ("ours", "stock", "bound"),
    [(True, False, "at least"), (False, True, "at most"), (True, True, "unknown"), (False, False, "exact")],
)
def test_censored_runs_bound_a_ratio(ours, stock, bound):
    found = ratio_of_means([Measured(2.0, ours)], [Measured(4.0, stock)])
    assert found.bound == bound
    assert found.value == (None if bound == "unknown" else 0.5)
    assert ratio_of_means([None], [Measured(1.0)]) is ratio_of_means([Measured(0.0)], [Measured(1.0)]) is None


def test_table_and_ratios_agree(tmp_path):
    logs = {"stock": [our_history(60, 0.03 + 0.02 * s) for s in range(3)],
            "ours": [our_history(60, 0.05 + 0.06 * s) for s in range(3)]}  # fmt: skip
    report = make_report(write_comparison(tmp_path / "c", logs))
    rows = {row[0]: row[1:] for row in report.contents.sections[1].tables[0].rows}
    stock, ours = (float(re.match(r"[\d.]+", cell)[0]) for cell in rows["optimizer steps to target"])
    points = report.contents.sections[0].panels[1].points
    (ratio,) = [ratio for text, _, ratio, *_ in points if text == "optimizer steps to the target"]
    assert ours / stock == pytest.approx(ratio, rel=2e-3)


def test_of_two_seeds_there_is_no_interval_anywhere(tmp_path):
    logs = {"stock": [our_history(60, 0.03), our_history(60, 0.031)],
            "ours": [our_history(60, 0.03), our_history(60, 0.2)]}  # fmt: skip
    folder = write_comparison(tmp_path / "c", logs)
    report = make_report(folder)
    assert all(math.isnan(low) for *_, low, _ in report.contents.sections[0].panels[1].points)
    assert " to 0" not in report.to_markdown(brief=True).split("## Results")[0]
    assert "95 %" not in report.contents.sections[0].lead[0]


def test_intervals_that_mean_something():
    assert exact(0.6, 0.0, 450.0, pairs=2).interval is None
    assert ends(exact(0.6, 0.5, 0.7)) == (0.5, 0.7)
    assert ends(exact(0.6, 0.0, 0.7))[0] > 0  # 0 would be an open end
    assert estimate_text(exact(0.6, 0.0, 450.0, pairs=2)) == "0.60"
    assert estimate_text(exact(0.6, 0.0, 450.0)) == "0.60 (not resolved)"
    assert estimate_text(exact(0.6, 0.5, 0.7)) == "0.60 (0.50 to 0.70)"
    assert estimate_text(exact(0.01, -0.5, 0.7), "+.4f") == "+0.0100 (-0.5000 to +0.7000)"


def test_many_arms_leave_room_for_the_verdict(tmp_path):
    folders = [write_run(tmp_path / f"run{chr(97 + i)}", our_history(10, 0.1 + 0.02 * i)) for i in range(6)]
    sections = {section.name: section for section in make_report(*folders).contents.sections}
    assert len(sections["verdict"].lead) == 5
    shown, more = sections["verdict"].panels[1].points, sections["summary"].panels[0].points
    assert len(shown) <= 15
    assert not {text for text, *_ in shown} & {text for text, *_ in more}
