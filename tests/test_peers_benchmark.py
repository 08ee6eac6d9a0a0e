"""The benchmark of peers' test suites: its plugin on a suite of our own, and its page against its records."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


PEERS = Path(__file__).resolve().parent.parent / "benchmarks" / "peers"
# Stands where transformers has its Trainer tests. `Trainer` and so on are those of the mode.
SUITE = """
import time
import unittest

import pytest
import torch
from transformers import NameThatIsGone, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments


class Mine(Trainer):
    pass


class MyArguments(TrainingArguments):
    pass


class Tests(unittest.TestCase):
    def test_is_stock(self):
        self.assertFalse(hasattr(TrainingArguments("out"), "accumulation_policy"))

    def test_adapts(self):
        self.assertEqual(TrainingArguments("out").accumulation_policy, "goodput")


def policies():
    model = torch.nn.Linear(2, 2)
    made = TrainingArguments("out", accumulation_policy="ramp", accumulation_ramp="0:1")
    assert made.accumulation_policy == "ramp"  # what a test asks for stays
    trainers = [Mine(model), Mine(model, TrainingArguments("out")), Mine(model, MyArguments("out"))]
    trainers.append(Seq2SeqTrainer(model, Seq2SeqTrainingArguments("out")))
    return [trainer.args.accumulation_policy for trainer in trainers]


def test_is_fixed():
    assert policies() == ["fixed"] * 4


def test_is_at_the_defaults():
    assert policies() == ["goodput"] * 4


def test_arguments_can_be_saved(tmp_path):
    torch.save(TrainingArguments("out"), tmp_path / "args.bin")
    assert torch.load(tmp_path / "args.bin", weights_only=False).output_dir == "out"


def test_takes_too_long():
    time.sleep(60)


def test_needs_what_is_gone():
    NameThatIsGone()


@pytest.mark.slow
def test_that_is_slow():
    pass
"""
FIRST_LINES = {
    "test_takes_too_long": "TimeoutError: longer than 3 s",
    "test_needs_what_is_gone": "Skipped: the installed version has no transformers.NameThatIsGone",
}


def program(name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, PEERS / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=170)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    checkout, results = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("results")
    for folder in (checkout / "tests", checkout / "tests" / "trainer"):
        folder.mkdir()
        (folder / "__init__.py").touch()
    (checkout / "tests" / "trainer" / "test_trainer.py").write_text(SUITE)
    options = ("--revision", "abcdef", "--seconds", 3, "--no-stand-ins", "--results", results)
    done = program("run.py", "transformers", checkout, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    return results


def outcomes(results: Path, mode: str) -> dict[str, str]:
    tests = json.loads((results / f"transformers-{mode}.json").read_text())["tests"]
    for name, line in FIRST_LINES.items():
        assert next(found["error"] for test, found in tests.items() if test.endswith(name)) == line
    return {test.rsplit("::", 1)[-1]: found["outcome"] for test, found in tests.items()}


@pytest.mark.parametrize(
    ("mode", "passed"),
    [
        ("stock", {"test_is_stock"}),
        ("fixed", {"test_is_fixed"}),
        ("defaults", {"test_adapts", "test_is_at_the_defaults"}),
    ],
)
def test_each_mode_has_its_classes(results, mode, passed):
    found = outcomes(results, mode)
    assert {test for test, outcome in found.items() if outcome == "passed"} == passed | {"test_arguments_can_be_saved"}
    assert found["test_takes_too_long"] == "failed"
    assert found["test_needs_what_is_gone"] == "skipped"
    assert "test_that_is_slow" not in found


def test_differences_without_a_reason_are_visible(results, tmp_path):
    done = program("report.py", "--results", results, "--output", tmp_path / "page.md")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text()
    lines = [line for line in page.splitlines() if "**unexplained**" in line and "→" in line]
    names = [line.split("`")[1].rsplit("::", 1)[-1] for line in lines]
    assert names == [
        "test_is_stock", "test_is_fixed", "test_adapts", "test_is_stock", "test_is_at_the_defaults"
    ]  # fmt: skip
    assert "| transformers: Trainer | stock | 2 | 4 | 1 | – |" in page
    assert "| transformers: Trainer | fixed | 2 | 4 | 1 | 1 of 2 |" in page


def test_the_page_is_what_the_records_say_and_explains_it(tmp_path):
    done = program("report.py", "--output", tmp_path / "page.md")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text()
    assert page == (PEERS.parent / "peers.md").read_text()
    assert not [line for line in page.splitlines() if "**unexplained**" in line and "→" in line]
    assert "@@" not in page
