"""Reports of stock runs: what they show although stock `Trainer` logs neither time nor samples."""

import json
import os
import pickle
import shutil
import sys
import zipfile

import pytest
import torch
from helpers import Rows, arguments, quiet, tiny_gpt2
from report_helpers import our_history, stock_history, write_run
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_trainopt import EfficientTrainer
from hf_trainopt.lab.report import make_report
from hf_trainopt.lab.report.clock import clock_of_history
from hf_trainopt.lab.report.loss_scale import MEAN, loss_scale
from hf_trainopt.lab.report.reading import read_run
from hf_trainopt.lab.report.settings import read_settings
from hf_trainopt.lab.report.summary import figure


pytest.importorskip("tensorboard")

K = 4


class Sentences(Rows):
    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index][0] % 2}


def tiny_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=12, **sizes))


class Losses(TrainerCallback):
    """Keeps the loss of every micro-batch in the order of training."""

    def __init__(self, model: torch.nn.Module):
        self.values = []
        model.register_forward_hook(
            lambda m, i, output: self.values.append(output.loss.item()) if m.training else None
        )


def trained(folder, model, data, trainer=Trainer, resume=None, **options):
    kind = {} if trainer is EfficientTrainer else {"kind": TrainingArguments}
    common = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": K, "num_train_epochs": 4,
              "eval_strategy": "steps", "eval_steps": 4, "logging_steps": 2, "report_to": "tensorboard",
              "save_strategy": "steps", "save_steps": 6}  # fmt: skip
    args = arguments(folder, *kind.values(), **{**common, **options})
    made = quiet(trainer(model=model, args=args, train_dataset=data(48), eval_dataset=data(8)))
    made.losses = Losses(model)
    made.train(resume_from_checkpoint=resume)
    return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A language model that was resumed; a classifier under stock, under our loop with a fixed k and under ours."""
    root = tmp_path_factory.mktemp("runs")
    trained(root / "gpt", tiny_gpt2(), Rows, num_train_epochs=2)
    trained(root / "gpt", tiny_gpt2(), Rows, resume=str(root / "gpt" / "checkpoint-6"))
    for name, trainer, options in (
        ("bert", Trainer, {}),
        ("fixed", EfficientTrainer, {"accumulation_policy": "fixed"}),
        ("ours", EfficientTrainer, {"accumulation_policy": "noise_scale"}),
    ):
        made = trained(root / name, tiny_bert(), Sentences, trainer, **options)
        made.save_state()
        (root / f"{name}.json").write_text(json.dumps(made.losses.values))
    return root


def rows_of(report, name="summary", index=0) -> dict[str, tuple[str, ...]]:
    (part,) = [part for part in report.contents.sections if part.name == name]
    return {row[0]: row[1:] for row in part.tables[index].rows}


# ---- Arguments -----------------------------------------------------------------------------------------------------


def test_settings_are_those_of_the_run(runs):
    settings = read_settings(runs / "bert" / "checkpoint-12" / "training_args.bin")
    assert settings["per_device_train_batch_size"] == 4
    assert settings["gradient_accumulation_steps"] == K
    assert (settings["world_size"], settings["n_gpu"]) == (1, 1)
    assert (settings["lr_scheduler_type"], settings["eval_strategy"]) == ("cosine", "steps")
    rows = rows_of(make_report(runs / "bert", runs / "ours"), index=1)
    assert rows["samples per optimizer step"] == ("16", "16")
    assert rows["accumulation policy"] == ("not recorded", "noise_scale")


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def write_arguments(path, value) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("training_args/data.pkl", pickle.dumps(value, protocol=2))


def test_reading_arguments_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = arguments(tmp_path, TrainingArguments, per_device_train_batch_size=4)
    args.harm, args.list = Harmful(), [Harmful()]
    write_arguments(tmp_path / "training_args.bin", args)
    assert read_settings(tmp_path / "training_args.bin")["per_device_train_batch_size"] == 4
    assert not (tmp_path / "harmed").exists()
    pickle.loads(pickle.dumps(Harmful()))
    assert (tmp_path / "harmed").exists()  # so harm would have been seen


@pytest.mark.parametrize("content", [b"", b"nonsense", 5, {"a": 1}])
def test_arguments_that_cant_be_read_are_a_note(tmp_path, content):
    folder = write_run(tmp_path / "run", stock_history())
    if isinstance(content, bytes):
        (folder / "training_args.bin").write_bytes(content)
    else:
        write_arguments(folder / "training_args.bin", content)
    run = read_run(folder)
    assert run.settings == {}
    assert "training_args.bin can't be read" in run.notes[0]
    assert "training_args.bin can't be read" in make_report(folder).to_markdown()


# ---- Time ----------------------------------------------------------------------------------------------------------


def test_a_resumed_stock_run_has_all_axes(runs):
    run = read_run(runs / "gpt")
    assert run.end("steps") == 12
    assert run.end("samples") == pytest.approx(192, rel=0.01)
    assert "wall times" in run.clock.source
    seconds = run.positions("time")
    assert None not in seconds
    assert seconds == sorted(seconds)
    assert [line["step"] for line in run.history if "loss" in line] == [2, 4, 6, 8, 10, 12]
    assert "checkpoint-12" in run.notes[0]
    assert any("train_runtime" in line for line in run.history)  # which no checkpoint has
    report = make_report(runs / "gpt")
    rows = rows_of(report)
    assert rows["k, last"] == (str(K),)
    assert rows["training time"][0].endswith(" s")
    assert "samples/s" in rows
    panels = {panel.name for part in report.contents.sections for panel in part.panels}
    assert {"loss_time", "samples_per_second", "accumulation_steps", "effective_batch", "learning_rate"} <= panels
    report = make_report(runs / "gpt", target_metric="eval_loss", target_value=4.2)
    assert "training time to target" in rows_of(report)


def test_evaluations_are_not_training_time(tmp_path):
    import time

    class Slow(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            time.sleep(0.3)

    args = arguments(tmp_path, TrainingArguments, eval_strategy="steps", eval_steps=1, max_steps=3, logging_steps=1,
                     report_to="tensorboard")  # fmt: skip
    trainer = quiet(Trainer(model=tiny_gpt2(), args=args, train_dataset=Rows(), eval_dataset=Rows(8),
                            callbacks=[Slow()]))  # fmt: skip
    trainer.train()
    slept = sum(line.get("eval_runtime", 0) for line in trainer.state.log_history)
    assert slept > 0.9
    trainer.save_state()
    (total,) = [line["train_runtime"] for line in trainer.state.log_history if "train_runtime" in line]
    assert read_run(tmp_path).end("time") < total - slept + 0.2


def test_without_the_state_the_log_is_from_the_events(runs, tmp_path):
    shutil.copytree(runs / "bert" / "runs", tmp_path / "run" / "runs")
    alone, whole = read_run(tmp_path / "run"), read_run(runs / "bert")
    assert [set(line) for line in alone.history] == [set(line) for line in whole.history]
    for key in ("loss", "eval_loss", "learning_rate", "step"):
        assert [line.get(key) for line in alone.history] == [
            pytest.approx(line[key], rel=1e-6) if key in line else None for line in whole.history
        ]
    assert alone.settings["gradient_accumulation_steps"] == K
    assert "from the TensorBoard events" in alone.notes[0]


def test_events_of_another_run_are_left_out(runs, tmp_path):
    folder = write_run(tmp_path / "run", stock_history())
    shutil.copytree(runs / "bert" / "runs", folder / "runs")
    run = read_run(folder)
    assert "are of another run" in run.notes[0]
    assert run.clock.is_uniform


@pytest.mark.parametrize("keep", [0, 40, 700])
def test_event_files_that_end_early(runs, tmp_path, keep):
    folder = shutil.copytree(runs / "bert", tmp_path / "run")
    (path,) = folder.glob("runs/*/events*")
    path.write_bytes(path.read_bytes()[:keep] + b"garbage" * 20)
    run = read_run(folder)
    assert run.end("steps") == 12
    assert run.has_axis("time")


def test_without_tensorboard_the_whole_time_is_known(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing", None)
    run = read_run(runs / "bert")
    assert "pip install tensorboard" in run.notes[0]
    assert run.clock.is_uniform
    (last,) = [line["train_runtime"] for line in run.history if "train_runtime" in line]
    evaluations = sum(line.get("eval_runtime", 0) for line in run.history)
    assert run.end("time") == pytest.approx(last - evaluations)
    assert not read_run(runs / "gpt").has_axis("time")  # resumed, and its checkpoint lacks the last line


def test_times_on_the_lines_go_on_after_a_resume():
    """As with `include_num_input_tokens_seen`; every evaluation takes half a second."""
    lines = [{"loss": 1.0, "step": 1, "train_runtime": 1.0}, {"eval_loss": 1.0, "eval_runtime": 0.5, "step": 1},
             {"loss": 1.0, "step": 2, "train_runtime": 2.5}, {"loss": 1.0, "step": 3, "train_runtime": 1.25},
             {"train_runtime": 1.5, "train_loss": 1.0, "step": 3}]  # fmt: skip
    clock = clock_of_history(lines, is_resumed=True)
    assert [clock.at(step) for step in (0, 1, 2, 3, 4)] == [0.0, 1.0, 2.0, 3.25, None]
    assert not clock.is_uniform


# ---- Losses that are k times the mean ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "fixed", "ours"])
def test_training_losses_are_means_whatever_was_logged(runs, name):
    """The loss of each log line of 2 steps against the losses of its micro-batches."""
    run, losses = read_run(runs / name), json.loads((runs / f"{name}.json").read_text())
    assert run.loss_scale.divisor == (1.0 if name == "ours" else K)
    shown = [value for value in run.column("loss") if value is not None]
    if name != "ours":
        expected = torch.tensor(losses).view(-1, 2 * K).mean(1).tolist()
        assert shown == pytest.approx(expected, rel=1e-4)
        assert max(line["loss"] for line in run.history if "loss" in line) > 2 * max(expected)
    assert max(shown) <= max(losses)


def test_the_report_says_what_was_divided(runs):
    report = make_report(runs / "bert", runs / "ours")
    for text in (report.to_markdown(), report.to_markdown(brief=True), report.to_html()):
        words = text.replace("<wbr>", "").replace("\\", "")
        assert "BertForSequenceClassification ignores num_items_in_batch" in words
        assert "so stock Trainer logs 4 times the mean loss. Shown are means" in words
    assert "ignores num_items_in_batch" not in make_report(runs / "gpt", runs / "ours").to_markdown()


def lines_with(ratio: float) -> list[dict]:
    return [{"loss": 2.0 * ratio, "step": 1}, {"eval_loss": 2.0, "step": 1}]


BERT, GPT2 = ({"architectures": [name]} for name in ("BertForSequenceClassification", "GPT2LMHeadModel"))
ACCUMULATED = {"gradient_accumulation_steps": K}


@pytest.mark.parametrize(
    ("settings", "config", "history", "divisor", "in_doubt"),
    [
        (ACCUMULATED, BERT, lines_with(4.0), 4, False),
        (ACCUMULATED, BERT, [{"loss": 8.0, "step": 1}], 4, False),
        (ACCUMULATED, BERT, lines_with(1.0), 1, True),  # loss_is_scaled_for_ga=False, a compute_loss of one's own
        (ACCUMULATED, {}, lines_with(4.0), 1, True),
        (ACCUMULATED, {"architectures": ["MyModel"]}, lines_with(4.0), 1, True),
        (ACCUMULATED, {}, lines_with(1.0), 1, False),
        (ACCUMULATED, GPT2, lines_with(4.0), 1, False),  # it learns fast
        ({}, BERT, lines_with(4.0), 1, False),
        ({"gradient_accumulation_steps": 1}, BERT, lines_with(4.0), 1, False),
        ({**ACCUMULATED, "label_smoothing_factor": 0.1}, BERT, lines_with(1.0), 1, False),
        ({**ACCUMULATED, "average_tokens_across_devices": True, "world_size": 2}, BERT, lines_with(4.0), 8, False),
        (ACCUMULATED, BERT, our_history(), 1, False),
    ],
)
def test_what_a_loss_is(settings, config, history, divisor, in_doubt):
    found = loss_scale(settings, config, history)
    assert (found.divisor, found.in_doubt) == (divisor, in_doubt)
    assert (found == MEAN) == (divisor == 1 and not in_doubt)


def test_several_ranks_multiply_evaluated_losses_too():
    """As measured with two processes: k = 4 of BERT began at 8 log(4), its evaluations at 2 log(4)."""
    ranks = {"average_tokens_across_devices": True, "world_size": 2}
    for k, ratio in ((4, 4.0), (1, 1.0)):
        found = loss_scale({"gradient_accumulation_steps": k, **ranks}, BERT, lines_with(ratio))
        keys = ("loss", "grad_norm", "eval_loss", "eval_accuracy", "learning_rate")
        assert [8 / found.apply(key, 8.0) for key in keys] == [2 * k, 2 * k, 2, 1, 1]
    assert loss_scale({**ACCUMULATED, **ranks}, GPT2, lines_with(4.0)) == MEAN


def test_a_loss_in_doubt_is_drawn_apart(runs, tmp_path):
    folder = shutil.copytree(runs / "bert", tmp_path / "doubtful")
    for path in folder.rglob("config.json"):
        path.unlink()
    report = make_report(folder, runs / "ours")
    panels = {panel.name: panel for part in report.contents.sections for panel in part.panels}
    assert {line.arm for line in panels["loss_samples"].lines if line.style == "faint"} == {1}
    (line,) = panels["loss_0"].lines
    assert line.ys[0] == max(line["loss"] for line in read_run(folder).history if "loss" in line)
    assert {line.arm for line in panels["grad_norm"].lines} == {1}
    rows = rows_of(report)
    assert rows["train loss, last logged"][0] == rows["the same, mean or sum over k"][1] == "not recorded"
    assert rows["the same, mean or sum over k"][0] == figure(line.ys[-1])
    assert "is drawn apart, as it was logged" in report.to_markdown()
