"""What the README and the docs say can be done, can be done."""

import argparse
import dataclasses
import logging
import re
import subprocess
from pathlib import Path

import pytest
from helpers import Rows, quiet, tiny_gpt2

import hf_trainopt
from hf_trainopt import EfficientTrainer, EfficientTrainingArgumentsMixin


ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = (ROOT / "docs" / "accumulation.md").read_text(encoding="utf-8")
PLACEMENT = (ROOT / "docs" / "placement.md").read_text(encoding="utf-8")
EVIDENCE = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_example_runs_as_pasted(tmp_path):
    """With no name but its own; only where it writes and how much it says is changed."""
    (example,) = [block for block in blocks(README, "python") if "trainer.train()" in block]
    quietly = f'output_dir="{tmp_path}", use_cpu=True, report_to="none", disable_tqdm=True'
    assert 'output_dir="outputs"' in example
    names: dict = {}
    exec(example.replace('output_dir="outputs"', quietly), names)
    assert names["trainer"].state.log_history[-1]["samples_seen"] == len(names["dataset"])


def test_the_policy_of_the_docs_runs(tmp_path):
    (example,) = [block for block in blocks(DOCS, "python") if "def twice_the_noise" in block]
    names: dict = {}
    exec(example.split("EfficientTrainer(")[0], names)
    args = hf_trainopt.EfficientTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, gradient_accumulation_steps=4
    )
    policy = names["twice_the_noise"]
    trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(64), accumulation_policy=policy))
    trainer.train()
    assert trainer.state.log_history[-1]["samples_seen"] == 3 * 64


def test_the_placement_examples_run(tmp_path, monkeypatch):
    """The blocks of docs/placement.md one after the other."""
    monkeypatch.chdir(tmp_path)
    logger, names = logging.getLogger("hf_trainopt"), {}
    level = logger.level
    try:
        for example in blocks(PLACEMENT, "python"):
            exec(example.replace('output_dir="outputs"', f'output_dir="{tmp_path}"'), names)
        assert logger.level == logging.INFO
    finally:
        logger.setLevel(level)
    assert names["plan_for_gpu"].details["device"] == "h100"
    assert names["args"].placement_policy == "budget"
    assert names["plan"].predicted_peak_bytes <= 0.7 * names["plan"].baseline_peak_bytes
    assert all(parameter.grad is not None for parameter in names["model"].parameters())


def test_the_evidence_examples_run(tmp_path, capsys):
    """The blocks of docs/evidence.md, each with a fresh model."""
    ours, stock = [block for block in blocks(EVIDENCE, "python") if "trainer.train()" in block]
    for example in (ours, stock):
        names = {"model": tiny_gpt2(), "dataset": Rows(64)}
        quietly = f'output_dir="{tmp_path}", use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=1e-2'
        exec(example.replace('output_dir="outputs"', quietly), names)
        last = names["trainer"].state.log_history[-1]
        assert {"train_time_s", "samples_seen", "peak_memory_gib", "target_reached"} <= last.keys()
        assert last["samples_per_second"] > 0


def test_the_commands_of_the_placement_page_parse():
    from hf_trainopt.placement.show.cli import add_parser

    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    block = "\n".join(block for block in blocks(PLACEMENT, "bash") if "hf-trainopt plan" in block)
    commands = [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    assert len(commands) >= 3
    for command in commands:
        assert command.split()[:2] == ["hf-trainopt", "plan"]
        assert parser.parse_args(command.split()[1:]).memory_budget


def test_there_are_exactly_two_commands_for_a_fresh_machine():
    commands = [block.strip() for block in blocks(README, "bash") if block.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert all("\n" not in command for command in commands)
    first, second = commands
    assert first.endswith("python run_clm.py")
    assert second.endswith("python -m pytest")


def test_ci_calls_the_second():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (pattern,) = re.findall(r"grep -m1 -E '([^']+)'", script)
    found = subprocess.run(
        ["grep", "-m1", "-E", pattern, "README.md"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert found.strip().endswith("python -m pytest")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EfficientTrainingArgumentsMixin)])
def test_every_setting_is_explained(field):
    pages = README + "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    assert field in pages, f"{field} is in neither README.md nor docs/"
    ours = [mixin for mixin in EfficientTrainingArgumentsMixin.__mro__ if mixin.__module__.startswith("hf_trainopt")]
    assert any(field in mixin.__doc__ for mixin in ours)


def test_no_placeholder_is_left():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]:
        if "template" not in path.name:
            assert "@@" not in path.read_text(encoding="utf-8"), path
