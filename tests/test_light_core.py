"""A plain `pip install hf-trainopt`: what it imports, and that it trains without the packages of the extras."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ENVIRONMENT

import hf_trainopt
from hf_trainopt.cli import COMMANDS


PACKAGE = Path(hf_trainopt.__file__).parent
EXTRAS = ("datasets", "evaluate", "timm", "torchvision", "sklearn", "scipy", "matplotlib", "peft", "trl")
# Modules that only the scripts, `--timm_model`, charts and comparisons need.
OUTSIDE_THE_CORE = (
    "scripting/", "models/timm_model.py", "models/lora.py", "placement/show/plot.py", "lab/report/axes.py",
    "lab/report/pictures.py", "lab/compare/statistics.py",
)  # fmt: skip

# As if the extras were not installed: neither found nor imported.
HIDE = f"""
import sys
from importlib.machinery import PathFinder


class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {EXTRAS} else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""

TRAIN = f"""
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from hf_trainopt import EfficientTrainer, EfficientTrainingArguments

rows = torch.randint(0, 64, (48, 12), generator=torch.Generator().manual_seed(0))
data = [dict(input_ids=row, labels=row) for row in rows]
model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=12, n_embd=16, n_layer=2, n_head=2))
args = EfficientTrainingArguments(
    output_dir=sys.argv[1], per_device_train_batch_size=4, gradient_accumulation_steps=2, use_cpu=True,
    report_to="none", disable_tqdm=True, optimizer_step_cost=0.5, eval_strategy="epoch", num_train_epochs=2,
    checkpoint_placement="all", auto_micro_batch=True,
)
trainer = EfficientTrainer(model=model, args=args, train_dataset=data, eval_dataset=data[:8])
trainer.train()
assert trainer.state.log_history[-1]["train_loss"] > 0
assert not [name for name in {EXTRAS} if name in sys.modules], sys.modules.keys()
"""


def python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=170,
    )


def test_it_trains_without_the_extras(tmp_path):
    done = python(HIDE + TRAIN, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["run_clm.py", "run_image.py"])
def test_a_script_names_the_extra_that_is_missing(script):
    run = f"import runpy; runpy.run_path({str(PACKAGE.parent / script)!r}, run_name='__main__')"
    done = python(HIDE + run)
    assert done.returncode != 0
    assert "pip install 'hf-trainopt[scripts]'" in done.stderr.splitlines()[-1]


def test_a_plan_of_a_timm_model_names_the_extra():
    words = ["plan", "--timm_model", "resnet50"]
    done = python(HIDE + f"from hf_trainopt.cli import main; sys.exit(main({words}))")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("hf-trainopt: error: --timm_model: timm models need timm")
    assert "pip install 'hf-trainopt[scripts]'" in done.stderr


def test_importing_the_package_imports_nothing_heavy():
    done = python("import sys, hf_trainopt; print(*[m for m in sys.modules if m in ('torch', 'transformers')])")
    assert done.stdout.split() == [], done.stderr


def test_help_imports_nothing_heavy():
    code = "import sys\nfrom hf_trainopt.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
    done = python(code + "print('loaded:', *[m for m in sys.modules if m in ('torch', 'transformers', 'numpy')])")
    assert done.stdout.splitlines()[-1] == "loaded:", done.stderr
    assert all(name in done.stdout for name in COMMANDS)


def test_the_trainer_imports_none_of_the_tools_around_it():
    unwanted = ("hf_trainopt.lab.report", "hf_trainopt.lab.compare", "hf_trainopt.lab.doctor", "hf_trainopt.scripting",
                "matplotlib", "scipy.stats")  # fmt: skip
    done = python(
        # Some releases of transformers import scikit-learn, and SciPy with it.
        "import sys\nfrom transformers import Trainer, TrainingArguments\nbefore = set(sys.modules)\n"
        "from hf_trainopt import EfficientTrainer, EfficientTrainingArguments\n"
        f"print(*[name for name in {unwanted} if name in set(sys.modules) - before])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_a_comparison_over_seeds_names_the_extra_before_any_run(tmp_path):
    (tmp_path / "train.py").write_text("raise SystemExit('it was run')")
    words = ["compare", str(tmp_path / "train.py"), "--output_dir", str(tmp_path / "out")]
    done = python(HIDE + f"from hf_trainopt.cli import main; sys.exit(main({words}))")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("need SciPy: pip install 'hf-trainopt[compare]'.")
    assert not (tmp_path / "out").exists()


def test_a_report_needs_no_extra(tmp_path):
    lines = [{"loss": 2.0, "step": 1, "epoch": 1.0}, {"eval_loss": 1.5, "step": 1, "epoch": 1.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 1, "log_history": lines}))
    words = ["report", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    done = python(HIDE + f"from hf_trainopt.cli import main; sys.exit(main({words}))")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("pip install &#39;hf-trainopt[plot]&#39;") == 1
    assert "eval_loss" in page.replace("<wbr>", "")


def test_the_core_imports_no_extra():
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).as_posix().startswith(OUTSIDE_THE_CORE):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                assert name.partition(".")[0] not in EXTRAS, f"{path} imports {name}"


def test_the_package_shows_its_public_names_only():
    assert set(dir(hf_trainopt)) == {*hf_trainopt.__all__, "__version__", "__doc__"}
    assert hf_trainopt.__version__
    for name in hf_trainopt.__all__:
        assert getattr(hf_trainopt, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'EficientTrainer'"):
        hf_trainopt.EficientTrainer  # noqa: B018
