"""What somebody meets who tries it for the first time, with a script of their own."""

import importlib.metadata
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers import Rows, arguments, quiet, tiny_gpt2

import hf_trainopt
from hf_trainopt import EfficientTrainer, EfficientTrainingArguments
from hf_trainopt.core.installed import installed_version, installed_versions
from hf_trainopt.lab.report import make_report
from hf_trainopt.reliability import TrainingInterrupted


OWN_SCRIPT = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored
    from helpers import Rows, arguments, quiet, tiny_gpt2
    from transformers import TrainerCallback
    from hf_trainopt import EfficientTrainer

    class Presses(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    args = arguments({folder!r}, save_strategy="steps", save_steps=100, accumulation_policy="fixed")
    trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(), callbacks=[Presses()]))
    {ending}
"""


def run_script(folder, ending="trainer.train()"):
    code = textwrap.dedent(OWN_SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder), ending=ending))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_ctrl_c_ends_a_script_in_one_line(tmp_path):
    done = run_script(tmp_path)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "ended training at step" in line]
    assert f"resume from {tmp_path}/checkpoint-" in line


def test_who_catches_ctrl_c_goes_on(tmp_path):
    done = run_script(tmp_path, "\n    try: trainer.train()\n    except KeyboardInterrupt as e: print(e.checkpoint)")
    assert done.returncode == 0
    assert done.stdout.strip().splitlines()[-1].startswith(f"{tmp_path}/checkpoint-")  # after what libraries print


def test_the_exception_of_ctrl_c():
    error = TrainingInterrupted("SIGINT ended training", "run/checkpoint-3")
    assert isinstance(error, KeyboardInterrupt)
    assert (str(error), error.code, error.checkpoint) == ("SIGINT ended training", 130, "run/checkpoint-3")


def test_a_run_that_saves_nothing_can_be_reported(tmp_path):
    """As the notebook runs it."""

    def train(folder, **kwargs):
        args = arguments(folder, save_strategy="no", max_steps=4, **kwargs)
        quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows())).train()

    train(tmp_path / "measured", measurements=["throughput"])
    assert "Loss" in make_report(tmp_path / "measured").to_markdown()
    train(tmp_path / "stock", measurements="none")
    assert not list((tmp_path / "stock").glob("*.json"))


def test_every_unknown_name_gets_a_suggestion():
    with pytest.raises(TypeError) as error:
        EfficientTrainingArguments("out", learning_rte=1e-3, acumulation_policy="fixed", evaluation_strategy="no")
    for words in ("did you mean learning_rate?", "did you mean accumulation_policy?", "use eval_strategy"):
        assert words in str(error.value)


def test_every_unknown_flag_gets_a_suggestion():
    from hf_trainopt.scripting.parser import parse_script_arguments

    with pytest.raises(ValueError, match="not used") as error:
        parse_script_arguments(
            [EfficientTrainingArguments],
            argv=["--learning_rte", "-0.5", "--acumulation_policy=fixed", "--nonsense_xyz"],
        )
    assert "--learning_rte, did you mean --learning_rate?" in str(error.value)
    assert "--acumulation_policy, did you mean --accumulation_policy?" in str(error.value)
    assert "--nonsense_xyz, see --help" in str(error.value)
    assert "-0.5," not in str(error.value).partition("]")[2]


def test_a_tree_that_is_not_installed(monkeypatch, tmp_path):
    stock = importlib.metadata.version

    def version(name):
        if name in ("hf-trainopt", "timm"):
            raise importlib.metadata.PackageNotFoundError(name)
        return stock(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert installed_version("timm") is None
    assert list(installed_versions(("torch", "timm"))) == ["torch"]
    args = arguments(tmp_path, accumulation_policy="fixed", max_steps=2, memory_budget="100%", save_strategy="steps")
    trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows()))
    trainer.train()
    assert set(trainer.placement_plan.details["versions"]) == {"torch", "transformers"}


def test_the_package_shows_what_it_exports():
    assert sorted(dir(hf_trainopt)) == sorted([*hf_trainopt.__all__, "__doc__", "__version__"])
    for name in hf_trainopt.__all__:
        assert getattr(hf_trainopt, name).__module__.startswith("hf_trainopt.")
    assert not {"PackageNotFoundError", "removed_names", "version"} & set(dir(hf_trainopt))
