"""`hf-trainopt compare`: arms, order, resuming, failures; and once for real."""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import pytest

from hf_trainopt.cli import main
from hf_trainopt.lab.compare import cli
from hf_trainopt.lab.compare.arms import OFF, ArmSpec, ablations, our_arm, stock_arm, sweep_arms, value_of, without
from hf_trainopt.lab.compare.comparison import compare, freeze_target, value_at_share
from hf_trainopt.lab.compare.render import machine_words, ratio_words
from hf_trainopt.metrics.targets import Evaluation


SCRIPT = """
import torch
from dataclasses import dataclass
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments, set_seed

@dataclass
class Own:
    width: int = 8

own, args = HfArgumentParser((Own, TrainingArguments)).parse_args_into_dataclasses()
if own.width == 13:
    raise RuntimeError("thirteen is not allowed")
set_seed(args.seed)
model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=own.width, n_layer=1, n_head=1,
                                   use_cache=False, bos_token_id=0, eos_token_id=0))
rows = torch.randint(0, 16, (24, 8), generator=torch.Generator().manual_seed(0))
data = [{"input_ids": row, "labels": row} for row in rows]
Trainer(model=model, args=args, train_dataset=data, eval_dataset=data[:8]).train()
"""
BASE = ["--learning_rate", "1e-2", "--gradient_accumulation_steps", "4"]


def line(step: int, loss: float, **more) -> dict:
    return {"step": step, "eval_loss": loss, "samples_seen": 10 * step, "train_time_s": 2.0 * step, **more}


def history(losses: list[float]) -> list[dict]:
    points = [line(step, loss) for step, loss in enumerate(losses, 1)]
    last = line(len(losses), 0.0, train_runtime=1.0, samples_per_second=5.0, peak_memory_gib=1.5)
    del last["eval_loss"]
    return [*points, last]


def measured(losses: list[float]) -> dict:
    machine = {"processor": "p", "cores": 2, "threads": 1, "devices": []}
    return {"log_history": history(losses), "optimizer_steps": len(losses), "peak_resident_gib": 2.0,
            "machine": machine, "versions": {"torch": "2"}}  # fmt: skip


class Launcher:
    """Stands for the processes: `losses` of each arm, or an exit code."""

    def __init__(self, outcome):
        self.outcome, self.commands, self.more = outcome, [], {}

    def __call__(self, command, environment, log):
        record, arguments = Path(command[3]), command[5:]
        self.commands.append(arguments)
        result = self.outcome(arguments)
        if isinstance(result, int):
            return result, "it broke"
        record.write_text(json.dumps(measured(result) | self.more))
        return 0, ""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def run(monkeypatch, script, words, launcher, rest=BASE):
    monkeypatch.setattr(cli, "run_process", launcher)
    return main(["compare", str(script), "--output_dir", str(script.parent / "out"), *words, "--", *rest])


def is_stock(arguments) -> bool:
    return value_of(arguments, "accumulation_policy") == "fixed"


def test_stock_has_none_of_our_arguments_and_everything_off():
    given = ["--memory_budget", "75%", "--max_steps=5", "--measurements", "none", "--bf16"]
    stock = stock_arm(given)
    assert stock.arguments == ("--max_steps=5", "--bf16", *OFF)
    assert our_arm(given, ["--lr_batch_scaling", "surge"]).arguments == (*given, "--lr_batch_scaling", "surge")


def test_arguments_are_found_and_removed():
    words = ["--a", "1", "--b-c=2", "--d", "--a", "3"]
    assert (value_of(words, "a"), value_of(words, "b_c"), value_of(words, "d")) == ("3", "2", "True")
    assert value_of(words, "e") is None
    assert without(words, {"a", "d"}) == ("--b-c=2",)


def test_sweep_keeps_the_data():
    stock = ArmSpec("stock", (*BASE, "--max_steps", "100", "--warmup_steps", "0.1", "--eval_steps=10"))
    arms = sweep_arms(stock, [1, 8], ["0.5x", "3e-3"])
    rates = [
        (value_of(a.arguments, "gradient_accumulation_steps"), value_of(a.arguments, "learning_rate")) for a in arms
    ]
    assert rates == [("1", "0.005"), ("1", "0.003"), ("8", "0.005"), ("8", "0.003")]
    assert [value_of(arms[i].arguments, "max_steps") for i in (0, 2)] == ["400", "50"]
    assert [value_of(arms[i].arguments, "eval_steps") for i in (0, 2)] == ["40", "5"]
    assert value_of(arms[0].arguments, "warmup_steps") == "0.1"
    with pytest.raises(ValueError, match="needs --learning_rate"):
        sweep_arms(ArmSpec("stock", ("--gradient_accumulation_steps", "4")), [1], ["1x"])


def test_sweep_of_beta2():
    stock = ArmSpec("stock", (*BASE, "--adam_beta2", "0.9"))
    arms = sweep_arms(stock, [2, 4], ["1x"], ["0.9", "data", "0.99"])
    found = [(value_of(a.arguments, "gradient_accumulation_steps"), value_of(a.arguments, "adam_beta2")) for a in arms]
    # At the given k "data" is the given value, and is run once.
    assert found == [("2", "0.9"), ("2", repr(0.9**0.5)), ("2", "0.99"), ("4", "0.9"), ("4", "0.99")]
    assert arms[1].name == "stock, k = 2, rate 0.01, β2 0.9486833"
    assert len({arm.slug for arm in arms}) == 5


def test_ablations_turn_on_one_part_each():
    names = {arm.name: arm.arguments for arm in ablations(our_arm(["--memory_budget", "75%"]))}
    assert set(names) == {"accumulation alone", "placement alone", "rate not scaled"}
    assert value_of(names["accumulation alone"], "memory_budget") is None
    assert value_of(names["placement alone"], "accumulation_policy") == "fixed"
    assert value_of(names["placement alone"], "memory_budget") == "75%"
    assert value_of(names["rate not scaled"], "lr_batch_scaling") == "none"


def test_target_is_what_the_baseline_reaches_at_a_share_of_its_data():
    curve = [Evaluation(5.0, 1, 10), Evaluation(4.0, 2, 20), Evaluation(2.0, 4, 40)]
    assert value_at_share(curve, 0.75) == pytest.approx(3.0)
    assert value_at_share(curve, 1.0) == 2.0
    record = {"arm": {"name": "stock"}, "seed": 0, "log_history": history([5.0, 4.0, 3.0, 2.0])}
    target = freeze_target(record, "eval_loss", None, 0.625, None)
    assert target.value == pytest.approx(3.5)
    assert not target.greater_is_better
    assert freeze_target(record, "eval_accuracy", 0.9, 0.8, None).greater_is_better


def test_a_target_that_the_first_evaluation_has_is_told():
    """The loss rises: whoever evaluates first is there first."""
    falling = {"arm": {"name": "stock"}, "seed": 0, "log_history": history([5.0, 4.0, 3.0, 2.0])}
    assert freeze_target(falling, "eval_loss", None, 0.5, None).source == "stock, seed 0, at 50% of its data"
    rising = falling | {"log_history": history([2.0, 3.0, 4.0, 5.0])}
    source = freeze_target(rising, "eval_loss", None, 0.5, None).source
    assert source.endswith("; it is no better than that run's first evaluation, so the time to it says little")


def test_a_run_that_never_gets_there_is_a_bound():
    def record(seed, losses):
        return {"status": "finished", "seed": seed, "arm": {"name": "x"}, **measured(losses)}

    target = freeze_target(record(0, [5.0]), "eval_loss", 3.5, 0.8, None)
    slow = {"stock": [record(0, [4.0, 3.0])], "ours": [record(0, [5.0, 4.5, 4.0, 3.9])]}
    ours = compare("s", "stock", slow, target, "eval_loss").arms[1]
    assert ours.ratios["steps_to_target"].bound == "at least"
    assert ours.ratios["steps_to_target"].value == pytest.approx(4 / 1.5)
    assert ours.values["steps_to_target"] == [None]
    assert ours.ratios["final_metric"].value == pytest.approx(3.9 / 3.0)


def test_few_seeds_are_said():
    def words(seeds):
        runs = {name: [{"status": "finished", "seed": seed, "arm": {"name": name}, **measured([4.0, 3.0])}
                       for seed in range(seeds)] for name in ("stock", "ours")}  # fmt: skip
        return ratio_words(compare("s", "stock", runs, None, "eval_loss"), "stock")

    assert "One seed has no interval" in words(1)
    assert "Two seeds have no interval that means anything: use --seeds 5" in words(2)
    assert "use --seeds" not in words(3)
    assert "failed" not in words(3)
    # Pairs are counted: a seed of the baseline that has failed leaves one the less.
    runs = {name: [{"status": "finished", "seed": seed, "arm": {"name": name}, **measured([4.0, 3.0])}
                   for seed in range(2)] for name in ("stock", "ours")}  # fmt: skip
    runs["stock"][1]["status"] = "failed"
    text = ratio_words(compare("s", "stock", runs, None, "eval_loss"), "stock")
    assert "One seed has no interval" in text
    assert "A seed whose run has failed, here or there, is left out" in text


def test_runs_that_diverge_are_neither_hidden_nor_fatal():
    def record(seed, losses):
        return {"status": "finished", "seed": seed, "arm": {"name": "x"}, **measured(losses)}

    steady = [4.0, 3.0, 2.0]
    runs = {
        "stock": [record(0, steady), record(1, steady)],
        "ours": [record(0, [4.0, 2.0, math.nan]), record(1, steady)],
    }
    target = freeze_target(runs["stock"][0], "eval_loss", None, 0.8, None)
    ours = compare("s", "stock", runs, target, "eval_loss").arms[1]
    assert ours.values["final_metric"] == [None, 2.0]
    assert "final_metric" not in ours.ratios  # of seed 1 alone it would flatter
    assert ours.final_difference is None
    with pytest.raises(ValueError, match="--target_value"):
        freeze_target(runs["ours"][0], "eval_loss", None, 0.8, None)


def test_runs_of_different_machines_are_said():
    def record(seed, threads):
        values = measured([4.0, 3.0])
        return {"status": "finished", "seed": seed, "arm": {"name": "x"}, **values,
                "machine": values["machine"] | {"threads": threads}}  # fmt: skip

    def words(threads):
        runs = {"stock": [record(0, 1)], "ours": [record(0, threads)]}
        return machine_words(compare("s", "stock", runs, None, "eval_loss"))

    assert "do not compare" not in words(1)
    assert "2 kinds of machine or thread counts, and times do not compare" in words(2)


def test_a_sweep_does_not_choose_what_has_diverged(monkeypatch, script, capsys):
    def outcome(arguments):
        return [4.0, math.nan if value_of(arguments, "learning_rate") == "0.01" else 3.0]

    words = ["--seeds", "1", "--sweep", "4", "--sweep_learning_rates", "1x,2x", "--target_value", "3.5"]
    run(monkeypatch, script, words, Launcher(outcome))
    assert "best fixed (k = 4, rate 0.02)" in capsys.readouterr().out


def test_runs_take_turns_and_are_made_once(monkeypatch, script, capsys):
    launcher = Launcher(lambda arguments: [5.0, 4.0, 3.0] if is_stock(arguments) else [4.0, 3.0, 2.0])
    assert run(monkeypatch, script, ["--seeds", "3"], launcher) == 0
    assert [is_stock(arguments) for arguments in launcher.commands] == [True, False, False, True, True, False]
    assert [value_of(arguments, "seed") for arguments in launcher.commands] == ["0", "0", "1", "1", "2", "2"]
    assert all(value_of(arguments, "eval_steps") == "0.05" for arguments in launcher.commands)
    shown = capsys.readouterr()
    assert "| optimizer steps to the target | 0.58 (0.58 to 0.58) |" in shown.out
    assert "run 1 of 6, " in shown.err  # also where it is no terminal
    assert "begins; log: " in shown.err
    saved = json.loads((script.parent / "out" / "comparison.json").read_text())
    assert saved["arms"][1]["ratios"]["steps_to_target"]["value"] == pytest.approx(1.4 / 2.4)
    assert run(monkeypatch, script, ["--seeds", "4"], launcher) == 0
    assert len(launcher.commands) == 8  # those of seed 3 only
    assert run(monkeypatch, script, ["--seeds", "1", "--restart"], launcher) == 0
    assert len(launcher.commands) == 10


def test_records_of_other_arguments_are_not_mixed_in(monkeypatch, script, capsys):
    launcher = Launcher(lambda arguments: [5.0, 4.0])
    assert run(monkeypatch, script, ["--seeds", "1"], launcher) == 0
    assert run(monkeypatch, script, ["--seeds", "1"], launcher, rest=[*BASE, "--bf16"]) == 2
    assert "--restart" in capsys.readouterr().err
    script.write_text(SCRIPT + "# changed\n")
    assert run(monkeypatch, script, ["--seeds", "1"], launcher) == 2


def test_records_of_other_threads_or_another_config_file_are_not_mixed_in(monkeypatch, script, capsys):
    launcher, config = Launcher(lambda arguments: [5.0, 4.0]), script.parent / "run.yaml"
    config.write_text("weight_decay: 0.1\n")
    rest = [*BASE, "--config", str(config)]
    assert run(monkeypatch, script, ["--seeds", "1", "--threads", "1"], launcher, rest) == 0
    assert run(monkeypatch, script, ["--seeds", "1", "--threads", "1"], launcher, rest) == 0
    assert run(monkeypatch, script, ["--seeds", "1", "--threads", "2"], launcher, rest) == 2
    config.write_text("weight_decay: 0.2\n")
    assert run(monkeypatch, script, ["--seeds", "1", "--threads", "1"], launcher, rest) == 2
    assert "--config file" in capsys.readouterr().err
    assert len(launcher.commands) == 2


def test_a_config_file_cannot_hide_what_an_arm_must_change(monkeypatch, script, capsys):
    launcher, config = Launcher(lambda arguments: [5.0, 4.0]), script.parent / "run.yaml"
    config.write_text("memory_budget: 75%\n")
    rest = [*BASE, "--config", str(config)]
    assert run(monkeypatch, script, ["--seeds", "1"], launcher, rest) == 2
    assert "sets memory_budget, which stock Trainer must not have" in capsys.readouterr().err
    config.write_text("max_steps: 40\n")
    assert run(monkeypatch, script, ["--seeds", "1", "--sweep", "2,4"], launcher, rest) == 2
    assert "a sweep needs --max_steps" in capsys.readouterr().err
    assert not launcher.commands
    assert run(monkeypatch, script, ["--seeds", "1", "--sweep", "2,4"], launcher, [*rest, "--max_steps", "40"]) == 0


def test_a_run_is_made_again_in_an_empty_folder(monkeypatch, script):
    left = script.parent / "out" / "ours-seed0" / "checkpoint-2"

    class Interrupted(Launcher):
        def __call__(self, command, environment, log):
            log.write_text("")
            found.append(left.exists())
            left.mkdir(parents=True, exist_ok=True)
            return super().__call__(command, environment, log)

    found: list[bool] = []
    assert run(monkeypatch, script, ["--seeds", "1", "--arm", "ours"], Interrupted(lambda arguments: 1)) == 2
    assert run(monkeypatch, script, ["--seeds", "1", "--arm", "ours"], Interrupted(lambda arguments: [2.0, 1.0])) == 0
    assert found == [False, False]


def test_a_folder_that_is_not_ours_is_left_alone(monkeypatch, script):
    kept = script.parent / "out" / "ours-seed0" / "model.safetensors"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert run(monkeypatch, script, ["--seeds", "1", "--arm", "ours"], Launcher(lambda arguments: [2.0, 1.0])) == 0
    assert kept.exists()


def test_a_launcher_that_is_not_there(script, capsys):
    words = ["--output_dir", str(script.parent / "out"), "--launcher", "no-such-launcher -n 2", "--seeds", "1"]
    assert main(["compare", str(script), *words, "--", *BASE]) == 2
    assert "--launcher no-such-launcher cannot be started" in capsys.readouterr().err


def test_a_quotation_that_is_not_closed(script, capsys):
    for flag in ("--ours", "--launcher", "--arm"):
        value = "x='--width 8" if flag == "--arm" else "'x"
        words = ["--output_dir", str(script.parent / "out"), flag, value]
        assert main(["compare", str(script), *words, "--", *BASE]) == 2
        assert f"{flag} '" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(script, capsys):
    assert main(["compare", str(script), "--output_dir", "/proc/none/out", "--", *BASE]) == 2
    assert "--output_dir /proc/none/out cannot be made" in capsys.readouterr().err


def test_a_wrong_baseline_is_told_before_the_search(monkeypatch, script, capsys):
    launcher = Launcher(lambda arguments: [5.0, 4.0])
    assert run(monkeypatch, script, ["--seeds", "1", "--sweep", "2,4", "--baseline", "stok"], launcher) == 2
    assert not launcher.commands
    words = [
        "--seeds",
        "1",
        "--sweep",
        "4",
        "--sweep_learning_rates",
        "1x",
        "--baseline",
        "best fixed (k = 4, rate 0.01)",
    ]
    assert run(monkeypatch, script, words, launcher) == 0


def test_a_failed_run_is_told_and_made_again(monkeypatch, script, capsys):
    broken = Launcher(
        lambda arguments: 3 if not is_stock(arguments) and value_of(arguments, "seed") == "1" else [5.0, 4.0]
    )
    assert run(monkeypatch, script, ["--seeds", "2"], broken) == 1
    out = capsys.readouterr().out
    assert "1 run(s) failed; the first, ours with seed 1, ended with code 3: it broke" in out
    assert "| seeds | 2 | 1, 1 failed |" in out
    whole = Launcher(lambda arguments: [5.0, 4.0])
    assert run(monkeypatch, script, ["--seeds", "2"], whole) == 0
    assert len(whole.commands) == 1


def test_nothing_else_is_started_once_the_baseline_has_failed(monkeypatch, script, capsys):
    broken = Launcher(lambda arguments: 3 if is_stock(arguments) else [5.0, 4.0])
    assert run(monkeypatch, script, ["--seeds", "2"], broken) == 2
    assert "the first run of the baseline 'stock' failed, so no other was started" in capsys.readouterr().err
    assert len(broken.commands) == 1
    arms = ["--arm", "a=--width 16", "--arm", "b=--width 8", "--baseline", "b"]
    broken = Launcher(lambda arguments: 3 if value_of(arguments, "width") == "8" else [5.0, 4.0])
    assert run(monkeypatch, script, arms, broken) == 2
    assert [value_of(words, "width") for words in broken.commands] == ["8"]


@pytest.mark.parametrize("words", [[], ["--sweep", "1,2"]])
def test_stock_and_ours_need_a_script_with_our_trainer(monkeypatch, script, capsys, words):
    real = script.parent / "plain"
    assert (
        main(["compare", str(script), "--output_dir", str(real), "--seeds", "1", *words, "--", "--use_cpu", *BASE])
        == 2
    )
    said = capsys.readouterr().err
    assert "need a script that trains with EfficientTrainer" in said
    assert "doesn't take our arguments" in said
    assert len(list((real / "records").glob("*.json"))) == 1
    ignoring = Launcher(lambda arguments: [5.0, 4.0])
    ignoring.more = {"is_ours": False}
    assert run(monkeypatch, script, words, ignoring) == 2
    assert "it trains with another Trainer. Change its imports" in capsys.readouterr().err
    assert len(ignoring.commands) == 1


def test_a_script_must_take_what_its_command_line_says(monkeypatch, script, capsys):
    """One that doesn't read it would be compared with itself."""
    ignoring = Launcher(lambda arguments: [5.0, 4.0])
    ignoring.more = {"took": {"seed": 42, "output_dir": "here", "accumulation_policy": "goodput"}}
    assert run(monkeypatch, script, ["--seeds", "2"], ignoring) == 2
    said = capsys.readouterr().err
    assert "its Trainer has seed=42 (told 0) and output_dir='here' (told " in said
    assert "and accumulation_policy='goodput' (told 'fixed'). Read the command line with HfArgumentParser" in said
    assert len(ignoring.commands) == 1
    arms = ["--arm", "a=--width 16", "--arm", "b=--width 8", "--restart", "--seeds", "1"]
    assert run(monkeypatch, script, arms, ignoring) == 2
    assert "its Trainer has seed=42" in capsys.readouterr().err
    # Such a script may have a seed of its own, and any script may put its outputs elsewhere.
    ignoring.more["took"]["seed"] = 0
    assert run(monkeypatch, script, arms, ignoring) == 0
    elsewhere = Launcher(lambda arguments: [5.0, 4.0])
    elsewhere.more = {"took": {"seed": 0, "output_dir": "/elsewhere", "accumulation_policy": "fixed"}}
    assert run(monkeypatch, script, ["--seeds", "1", "--restart"], elsewhere) == 0
    elsewhere.more["took"] |= {"output_dir": str(script.parent / "out" / "stock-seed0"), "seed": 7}
    assert run(monkeypatch, script, ["--seeds", "1", "--restart"], elsewhere) == 2


def test_sweep_gives_stock_its_best_setting(monkeypatch, script, capsys):
    def outcome(arguments):
        if not is_stock(arguments):
            return [4.0, 3.0, 2.0]
        good = value_of(arguments, "gradient_accumulation_steps") == "2"
        return [4.5, 3.5, 2.5 - float(value_of(arguments, "learning_rate"))] if good else [5.0, 4.0, 3.0]

    launcher = Launcher(outcome)
    words = ["--seeds", "2", "--sweep", "2,4", "--sweep_learning_rates", "1x,2x"]
    assert run(monkeypatch, script, words, launcher) == 0
    out = capsys.readouterr().out
    assert "best fixed (k = 2, rate 0.02)" in out
    # 4 of the sweep; stock and ours twice; the best on seed 1 (on seed 0 it was run in the sweep).
    assert len(launcher.commands) == 4 + 4 + 1


def test_a_script_may_end_itself_and_change_its_folder(tmp_path, monkeypatch):
    path, record = tmp_path / "train.py", Path("record.run")
    path.write_text(f"import os, sys\n{SCRIPT}\nos.chdir('/')\nsys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    words = ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--use_cpu", "--report_to", "none"]
    command = [
        sys.executable,
        "-m",
        "hf_trainopt.lab.compare.runner",
        str(record),
        str(path),
        *words,
        "--save_strategy",
        "no",
    ]
    assert cli.run_process(command, dict(os.environ), tmp_path / "log")[0] == 0
    assert "found in sys.modules" not in (tmp_path / "log").read_text()  # the runner is not imported beforehand
    assert json.loads(record.read_text())["optimizer_steps"] == 2


def test_arms_of_ones_own(monkeypatch, script, capsys):
    launcher = Launcher(lambda arguments: [5.0, 4.0])
    words = ["--seeds", "1", "--arm", "small=--width 8", "--arm", "large=--width 16", "--baseline", "large"]
    assert run(monkeypatch, script, words, launcher) == 0
    assert [value_of(arguments, "width") for arguments in launcher.commands] == ["16", "8"]  # the baseline is first
    assert "Against **large**" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "rest", "message"),
    [
        (["--seeds", "0"], [], "--seeds is 0"),
        (["--target_share", "1.5"], [], "--target_share is 1.5"),
        (["--threads", "0"], [], "--threads is 0"),
        (["--baseline", "theirs"], [], "--baseline theirs is none of the arms"),
        (["--arm", "theirs"], [], "--arm theirs is none of stock, ours"),
        (["--arm", "=--x 1"], [], "has no name"),
        (["--arm", "a=--x 1", "--arm", "a=--x 2"], [], "two arms are called 'a'"),
        (["--arm", "++=--x 1"], [], "no letter or digit"),
        (["--sweep", "1,two"], BASE, "takes whole numbers"),
        (["--sweep", "0"], BASE, "below 1"),
        (
            ["--sweep", "2", "--sweep_adam_beta2", "much"],
            BASE,
            "--sweep_adam_beta2 'much' numbers in [0, 1) or 'data'",
        ),
        (["--sweep", "2", "--sweep_adam_beta2", "1.5"], BASE, "numbers in [0, 1)"),
        (["--sweep_adam_beta2", "0.9"], BASE, "add --sweep"),
        (["--sweep", "1"], [], "needs --gradient_accumulation_steps"),
        (["--sweep", "1", "--arm", "stock"], [], "leave --arm out"),
        (["--ablate", "--arm", "stock"], [], "leave --arm out"),
        ([], ["--seed", "3"], "--seed of the script is set by compare"),
        ([], ["--output_dir=x"], "--output_dir of the script is set by compare"),
        (["--target_metric", "accuracy"], [], "no evaluation had --target_metric eval_accuracy; they had eval_loss"),
    ],
)
def test_wrong_uses_say_what_to_do(monkeypatch, script, capsys, words, rest, message):
    assert run(monkeypatch, script, ["--seeds", "1", *words], Launcher(lambda arguments: [5.0, 4.0]), rest) == 2
    assert message in capsys.readouterr().err


def test_a_missing_script_and_arguments_for_plan_are_refused(capsys):
    assert main(["compare", "nowhere.py", "--", "--x"]) == 2
    assert "can't find the script nowhere.py" in capsys.readouterr().err
    assert main(["plan", "--model_type", "gpt2", "--", "--x"]) == 2
    assert "'plan' takes nothing after --" in capsys.readouterr().err


def test_evaluations_of_a_config_file_are_kept(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("eval_strategy: epoch\n")
    assert cli.with_defaults(["--config", str(config)]) == ["--config", str(config), "--save_strategy", "no"]
    given = ["--eval_strategy", "epoch"]
    assert cli.with_defaults(given) == [*given, "--save_strategy", "no"]


def test_progress_is_not_lost_when_interrupted(script):
    done = []

    def launch(command, environment, log):
        if done:
            raise KeyboardInterrupt
        done.append(command)
        Path(command[3]).write_text(json.dumps(measured([5.0])))
        return 0, ""

    arguments = argparse.Namespace(
        script=script, output_dir=script.parent / "o", launcher=None, threads=1, restart=False
    )
    arm = ArmSpec("stock", ())
    with pytest.raises(KeyboardInterrupt):
        cli.Executor(arguments, launch).make([(arm, 0), (arm, 1)])
    kept = Launcher(lambda arguments: [5.0])
    cli.Executor(arguments, kept).make([(arm, 0), (arm, 1)])
    assert [value_of(words, "seed") for words in kept.commands] == ["1"]


def test_a_script_with_plain_trainer_for_real(script, capsys):
    out = script.parent / "real"
    arms = ["--arm", "wide=--width 16", "--arm", "narrow=--width 8", "--arm", "broken=--width 13"]
    rest = ["--num_train_epochs", "2", "--per_device_train_batch_size", "4", "--use_cpu", "--report_to", "none"]
    words = ["compare", str(script), "--output_dir", str(out), "--seeds", "1", "--threads", "1", *arms, "--", *rest]
    assert main(words) == 1
    text = capsys.readouterr().out
    assert "thirteen is not allowed" in text
    saved = json.loads((out / "comparison.json").read_text())
    wide, narrow, broken = saved["arms"]
    assert wide["values"]["samples"] == narrow["values"]["samples"] == [48.0]
    assert wide["values"]["optimizer_steps"] == [12.0]
    assert narrow["ratios"]["train_time"]["value"] > 0
    assert wide["values"]["peak_memory"][0] > 0.05
    assert broken["failed_seeds"] == [0]
    record = json.loads((out / "records" / "wide-seed0.json").read_text())
    assert "--width 16" in record["command"]
    assert record["took"] == {"seed": 0, "output_dir": str(out / "wide-seed0"), "accumulation_policy": None}
    assert record["world_size"] == 1
    assert record["versions"]["torch"]
