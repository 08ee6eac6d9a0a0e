"""Every example runs, offline, as its users run it."""

import needs_scripts  # noqa: F401


# isort: split
import importlib.util
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient
from scripts_helpers import ENVIRONMENT
from transformers import PrinterCallback, Trainer

import hf_trainopt
import run_clm
import run_image
from hf_trainopt import EfficientTrainingArguments
from hf_trainopt.scripting.parser import parse_script_arguments


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
QUICK = ["--disable_tqdm", "True", "--use_cpu", "--max_steps", "8", "--logging_steps", "2"]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(PrinterCallback, "on_log", lambda *args, **kwargs: None)


def load(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / f"{name}.py")])
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_lora(tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="peft is in the extra 'examples'")
    trainer = load("lora", monkeypatch).main([*QUICK, "--output_dir", str(tmp_path)])
    assert trainer.state.log_history[-1]["samples_seen"] == 8 * 4 * 4
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "model.safetensors").exists()
    changed = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert changed
    assert all("lora" in name for name in changed)


def test_sft(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="trl is in the extra 'examples'")
    trainer = load("sft", monkeypatch).main([*QUICK, "--output_dir", str(tmp_path)])
    # 79 rows: the short window at the end of an epoch counts as a whole one.
    assert trainer.state.log_history[-1]["samples_seen"] == 79 + 3 * 4 * 4
    assert "accumulation_steps" in trainer.state.log_history[0]
    assert (tmp_path / "model.safetensors").is_file()


def test_plain_callbacks(tmp_path, monkeypatch, capsys):
    trainer = load("plain_callbacks", monkeypatch).main([*QUICK, "--eval_steps", "4", "--output_dir", str(tmp_path)])
    assert type(trainer) is Trainer
    last = trainer.state.log_history[-1]
    assert last["samples_seen"] == 8 * 4 * 4
    assert {"noise_scale", "samples_per_second", "peak_memory_gib", "target_reached"} <= last.keys()
    assert "samples_per_second" in capsys.readouterr().out


def test_the_notebook(tmp_path):
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "commit it without outputs"
    paths = [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    client = NotebookClient(notebook, timeout=170, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    assert "text/html" in code[-1].outputs[-1].data, "the report shows itself"
    printed = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert "loss " in printed
    assert "it/s" not in printed, "progress bars are quiet"
    assert "% of the memory" in "".join(output.get("text", "") for output in code[-2].outputs)


def test_the_notebook_installs_itself_and_uses_public_names_only():
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    text = "".join(cell.source for cell in notebook.cells)
    assert "colab.research.google.com/github/hf-trainopt/hf_trainopt/blob/main/examples/quickstart.ipynb" in text
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert 'find_spec("hf_trainopt") is None' in code[0]
    assert "%pip install" in code[0]
    assert len(code) == 4
    names = re.findall(r"from (hf_trainopt\S*) import (.+)", text)
    assert names
    for module, imported in names:
        assert module == "hf_trainopt"
        assert set(imported.split(", ")) <= set(hf_trainopt.__all__)
    assert not re.search(r"\b_[a-z]|loss_type|\.trainopt", text.replace("_ = trainer.train()", ""))


def flags_of(command: tuple[str, ...]) -> dict[str, str]:
    pairs = re.findall(r"--(\w+)((?: (?!--)\S+)*)", " ".join(command))
    return {name: " ".join(values.split()) or "True" for name, values in pairs}


@pytest.mark.parametrize(("name", "script"), [("gpt2-wikitext2", run_clm), ("resnet50-cifar10", run_image)])
def test_configs_are_the_full_size_commands(name, script):
    path = EXAMPLES / "configs" / f"{name}.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    command = flags_of(script.FULL_SIZE_COMMAND)
    assert values.keys() == command.keys()
    classes = (script.ModelArguments, script.DataTrainingArguments, EfficientTrainingArguments)
    values.pop("bf16", None)  # CI has no GPU
    without_precision = [word for flag in command if flag != "bf16" for word in (f"--{flag}", *command[flag].split())]
    by_file = parse_script_arguments(classes, None, [flag for k, v in values.items() for flag in words(k, v)])
    by_flags = parse_script_arguments(classes, None, without_precision)
    for ours, theirs in zip(by_file, by_flags, strict=True):
        assert {k: getattr(ours, k) for k in values if hasattr(ours, k)} == {
            k: getattr(theirs, k) for k in values if hasattr(theirs, k)
        }


def words(name, value):
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
