"""`hf-trainopt report` and `trainer.report()`."""

import re

import pytest
from helpers import Rows, arguments, quiet, tiny_gpt2
from report_helpers import our_history, stock_history, write_comparison, write_run
from transformers import Trainer, TrainingArguments

from hf_trainopt import EfficientTrainer
from hf_trainopt.cli import main
from hf_trainopt.lab.report import make_report
from hf_trainopt.lab.report.reading import read_run
from hf_trainopt.lab.report.running import run_in_memory
from hf_trainopt.metrics.targets import Target, TargetCallback


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of a tiny model: ours and a stock `Trainer`, with their folders."""
    root = tmp_path_factory.mktemp("trained")
    common = {"eval_strategy": "steps", "eval_steps": 4, "gradient_accumulation_steps": 4, "num_train_epochs": 2}
    args = arguments(
        root / "ours", **common, accumulation_policy="noise_scale", measurements="throughput,memory",
        target_metric="eval_loss", target_value=4.0,
    )  # fmt: skip
    ours = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(), eval_dataset=Rows(8)))
    stock_args = arguments(root / "stock", TrainingArguments, **common)
    stock = quiet(Trainer(model=tiny_gpt2(), args=stock_args, train_dataset=Rows(), eval_dataset=Rows(8)))
    for trainer in (ours, stock):
        trainer.train()
        trainer.save_state()
        trainer.save_model()
    return root, ours


def section(report, name: str):
    return next(section for section in report.contents.sections if section.name == name)


# ---- Trainer -------------------------------------------------------------------------------------------------------


def test_a_notebook_shows_the_run(trained):
    _, trainer = trained
    report = trainer.report()
    shown = report._repr_html_()
    assert shown.startswith('<div class="hf-trainopt-report"><style>')
    assert "<html" not in shown
    assert shown.count('role="img"') >= 8
    assert "Report of ours" in repr(report)
    assert "GPT2LMHeadModel" in report.contents.title
    values = dict(row[:2] for row in section(report, "summary").tables[0].rows)
    assert values["samples"] == "100"
    assert values["optimizer steps"] == str(trainer.state.global_step)


def test_in_memory_and_from_the_folder_are_the_same(trained):
    root, trainer = trained
    memory, disk = trainer.report(title="t"), make_report(root / "ours", title="t")
    # Between two tests the state of accelerate is reset, and with it the number of ranks.
    differing = ("devices", "samples per optimizer step")
    for name in ("summary", "memory"):
        rows = [[row for table in section(report, name).tables for row in table.rows if row[0] not in differing]
                for report in (memory, disk)]  # fmt: skip
        assert rows[0] == rows[1]
    assert "eval_loss ≤ 4 (set in the runs)" in section(disk, "verdict").text[0]


def test_of_two_targets_both_take_the_last(tmp_path):
    args = arguments(tmp_path / "run", TrainingArguments, eval_strategy="steps", eval_steps=1, max_steps=2)
    targets = [TargetCallback("loss", value) for value in (4.0, 3.0)]
    trainer = quiet(
        Trainer(model=tiny_gpt2(), args=args, train_dataset=Rows(), eval_dataset=Rows(8), callbacks=targets)
    )
    trainer.train()
    trainer.save_state()
    assert run_in_memory(trainer).target == read_run(tmp_path / "run").target == Target("eval_loss", 3.0, False)


def test_beside_another_run(trained):
    root, trainer = trained
    report = trainer.report(root / "stock")
    assert report.contents.arms == ("ours", "stock")
    panel = next(panel for panel in section(report, "loss").panels if panel.name == "loss_samples")
    assert {line.arm for line in panel.lines} == {0, 1}
    assert all(line.xs[-1] <= 101 for line in panel.lines)


def test_nothing_to_report_yet(tmp_path):
    trainer = EfficientTrainer(model=tiny_gpt2(), args=arguments(tmp_path), train_dataset=Rows())
    with pytest.raises(ValueError, match="call it after train"):
        trainer.report()


# ---- Command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    write_run(tmp_path / "stock", stock_history())
    write_run(tmp_path / "ours", our_history())
    return tmp_path


def run(folders, *words: str) -> int:
    return main(["report", *map(str, words), "--output_dir", str(folders / "out")])


def test_the_command_writes_all(folders, capsys):
    assert run(folders, folders / "stock", folders / "ours") == 0
    out = capsys.readouterr().out
    assert "| optimizer steps | 10 | 10 |" in out
    assert re.search(r"Saved .*report\.html, .*report\.md, \d pictures in ", out)
    files = {path.name for path in (folders / "out").iterdir()}
    assert {"report.html", "report.md", "loss.png"} <= files
    assert not [name for name in files if not name.endswith((".html", ".md", ".png"))]


def test_a_comparison_as_compare_says(folders, capsys):
    logs = {"stock": [our_history(10, 0.1)] * 2, "ours": [our_history(10, 0.2)] * 2}
    write_comparison(folders / "compare", logs)
    assert run(folders, folders / "compare", "--formats", "html") == 0
    assert "| optimizer steps to the target | 0.5" in capsys.readouterr().out
    assert [path.name for path in (folders / "out").iterdir()] == ["report.html"]


def test_names_and_a_folder_of_folders(folders, capsys):
    write_run(folders / "more" / "a-seed0", our_history())
    write_run(folders / "more" / "a-seed1", our_history())
    assert run(folders, f"new={folders / 'ours'}", folders / "more", "--baseline", "a", "--formats", "md") == 0
    assert "| new | a (2 seeds), baseline |" in capsys.readouterr().out


def test_a_given_target(folders, capsys):
    target = ["--target_metric", "loss", "--target_value", "2.5"]
    assert run(folders, folders / "stock", folders / "ours", *target, "--formats", "md") == 0
    assert "Target: eval_loss ≤ 2.5 (given)" in capsys.readouterr().out.replace("\\", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere isn't a folder"),
        (["."], "isn't the output folder of a run"),
        (["stock", "--baseline", "x"], "none of the runs; choose one of stock"),
        (["stock", "--formats", "pdf"], "choose from html, md, png"),
        (["stock", "--target_metric", "loss"], "go together"),
        (["stock", "--greater_is_better"], "give that too"),
        (["stock", "--target_metric", "f1", "--target_value", "1"], "they have eval_loss"),
        (["stock", "--output_dir", "file"], "is a file"),
        (["stock", "--output_dir", "file/below"], "cannot be written"),
        (["new=compare"], "leave 'new=' out"),
        (["stock", "--tittle", "x"], "did you mean --title"),
        ([], "required: RUN"),
    ],
)
def test_mistakes_are_told_in_one_line(folders, capsys, monkeypatch, words, message):
    monkeypatch.chdir(folders)
    (folders / "file").write_text("")
    write_comparison(folders / "compare", {"stock": [our_history()]})
    if words == ["."]:
        monkeypatch.chdir(folders / "compare" / "records")
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-trainopt: error: ")
    assert message in error
    assert error.count("\n") == 1
