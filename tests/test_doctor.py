"""What the doctor says of a run is what the run does, and it leaves nothing behind."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import Rows, arguments, free_port, quiet, skip_without_scripts, tiny_gpt2
from transformers import PreTrainedConfig, PreTrainedModel

from hf_trainopt import EfficientTrainer, cli
from hf_trainopt.lab.doctor.probe import examine
from hf_trainopt.lab.doctor.sections import unaligned_weights


TESTS = Path(__file__).resolve().parent

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from helpers import Rows, Stream, arguments, quiet, tiny_gpt2
from hf_trainopt import EfficientTrainer

args = arguments(sys.argv[1], {settings})
trainer = EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset={data}, {more})
trainer.train({resume})
raise RuntimeError("it was trained")
"""


def examined(tmp_path, settings="", data="Rows(50)", more="", resume=""):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(TESTS), settings=settings, data=data, more=more, resume=resume))
    return examine(str(script), [str(tmp_path / "output")])


def lines(found, title):
    return dict(found["sections"][title])


def test_what_it_says_is_what_the_run_does(tmp_path):
    settings = {
        "memory_budget": "80%",
        "memory_rewrites": "none",
        "gradient_accumulation_steps": 4,
        "max_accumulation_steps": 6,
        "optimizer_step_cost": 2.0,
        "save_strategy": "steps",
        "save_steps": 3,
        "num_train_epochs": 2,
        "precision": "fp32",
        "lr_batch_scaling": "sqrt",
    }
    found = examined(tmp_path, settings="**" + repr(settings))
    assert not (tmp_path / "output" / "placement.json").exists()
    assert not list((tmp_path / "output").glob("*"))

    trainer = EfficientTrainer(model=tiny_gpt2(), args=arguments(tmp_path / "run", **settings), train_dataset=Rows(50))
    quiet(trainer).train()
    history = [line for line in trainer.state.log_history if "loss" in line]
    last = trainer.state.log_history[-1]
    assert lines(found, "Data")["budget"].startswith(
        f"{last['samples_seen']} samples (2 epochs), 10 reference windows"
    )
    k = re.fullmatch(
        r"begins at (\d+), stays within (\d+) and (\d+); the reference is 4",
        lines(found, "Gradient accumulation")["k"],
    )
    assert int(k[1]) == history[0]["accumulation_steps"]
    assert all(int(k[2]) <= line["accumulation_steps"] <= int(k[3]) for line in history)
    plan = trainer.placement_plan
    memory = lines(found, "Memory")
    assert memory["placement"] == plan.summary()
    assert memory["with the plan"].startswith(f"{plan.predicted_peak_bytes / 2**20:.4g} MiB")
    assert memory["peak of a step"].startswith(f"{plan.baseline_peak_bytes / 2**20:.4g} MiB")
    assert lines(found, "Precision")["computation"] == "fp32: as asked for"
    rate = lines(found, "Learning rate")["rate"]
    assert rate.startswith("0 at 0%, 0.01 at 10%, 0.0")
    assert "0 at 100% of the data" in rate
    factors = lines(found, "Learning rate")["with k"]
    assert factors == "lr_batch_scaling='sqrt': ×0.5 at a k of 1, ×1 at a k of 4, ×1.22 at a k of 6"
    assert lines(found, "Learning rate")["second moment"] == (
        "forgets by data: a decay of 0.999 at a k of 1, 0.999 at a k of 4, 0.9985 at a k of 6 a step (a half-life of "
        "at most an eighth of this run, or the one at a k of 4)"
    )
    reliability = lines(found, "Checkpoints and reliability")
    assert reliability["checkpoints"].startswith("every 3 reference windows into")
    assert found["warnings"] == []


def test_a_fixed_k_is_stock(tmp_path):
    found = examined(tmp_path, settings="accumulation_policy='fixed', lr_batch_scaling='none', max_steps=7")
    assert "stock Trainer's, bit for bit" in lines(found, "Gradient accumulation")["k"]
    assert lines(found, "Data")["budget"] == "21 samples (0.412 epochs), 7 optimizer steps of 3 samples"
    memory = lines(found, "Memory")
    assert memory["placement"] == "none"
    assert "without recomputation" in memory["peak of a step"]
    assert "for" in memory
    assert lines(found, "Checkpoints and reliability")["checkpoints"] == "never"


def test_evaluation_at_the_end_and_logging_never(tmp_path):
    settings = "accumulation_policy='fixed', max_steps=7, do_eval=True, logging_steps=8"
    found = examined(tmp_path, settings=settings)
    assert lines(found, "Data")["evaluation"] == "never while it trains; afterwards, where the script does (do_eval)"
    assert any("logging_steps is 8 and the whole run has 7 optimizer steps" in text for text in found["warnings"])


def test_a_stream_a_policy_of_ones_own_and_warnings(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_trainopt.lab.doctor.sections.device_memory", lambda device: (1000, "of a toy"))
    settings = "max_steps=5, gradient_accumulation_steps=2, noise_scale_ratio=2.0"
    found = examined(tmp_path, settings, "Stream(50)", "accumulation_policy=lambda seen: 3.0")
    assert "noise_scale_ratio is ignored: accumulation_policy is 'goodput'." in found["warnings"]
    assert any("set memory_budget" in text for text in found["warnings"])
    assert lines(found, "Data")["budget"] == "30 samples, 5 reference windows of 6 samples"
    assert lines(found, "Gradient accumulation")["policy"] == "your own: <lambda>"
    assert lines(found, "Learning rate")["with k"].startswith("lr_batch_scaling='auto', here 'surge': ×")


def test_it_resumes_for_real(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 5, "optimizer_step_cost": 0.5}
    args = arguments(tmp_path / "output", **settings)
    quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(50))).train()
    checkpoints = sorted((tmp_path / "output").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    found = examined(tmp_path, settings="**" + repr(settings), resume="True")
    assert lines(found, "Checkpoints and reliability")["resumes from"] == str(checkpoints[-1])
    with pytest.raises(ValueError, match=r"would end before it trains: CheckpointError: .*nowhere"):
        examined(tmp_path, settings="**" + repr(settings), resume="'nowhere'")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("lr_batch_scaling='cube'", "ValueError: lr_batch_scaling is 'cube'"),
        ("group='b'", "TypeError: .*group"),
    ],
)
def test_what_would_not_start_is_an_error(tmp_path, settings, message):
    with pytest.raises(ValueError, match=f"would end before it trains: {message}"):
        examined(tmp_path, settings)


def test_scripts_that_do_not_train_with_us(tmp_path):
    script = tmp_path / "other.py"
    script.write_text("print(1)\n")
    with pytest.raises(ValueError, match=r"has ended without training; is --do_train missing\?"):
        examine(str(script), [])
    script.write_text("import sys\nsys.exit('no such file')\n")
    with pytest.raises(ValueError, match="would end before it trains: no such file"):
        examine(str(script), [])
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(TESTS)!r})\nfrom helpers import *\n"
        f"Trainer(tiny_gpt2(), arguments({str(tmp_path / 'o')!r}, TrainingArguments), train_dataset=Rows()).train()\n"
        .replace("Trainer(tiny", "import transformers\ntransformers.Trainer(tiny")
    )  # fmt: skip
    with pytest.raises(ValueError, match="trains with Trainer, in which none of our parts is"):
        examine(str(script), [])


def test_the_command(tmp_path, capsys, monkeypatch):
    skip_without_scripts()
    monkeypatch.chdir(tmp_path)
    script = str(TESTS.parent / "run_image.py")
    assert cli.main(["doctor", "--json", script, "--use_cpu", "--report_to", "none", "--memory_budget", "100%"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert lines(found, "Gradient accumulation")["policy"].startswith("goodput: The smallest k within 3 % of the best")
    assert "100%" in lines(found, "Memory")["budget"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert cli.main(["doctor", script, "--use_cpu", "--learning_rat", "1"]) == 2
    assert "did you mean --learning_rate?" in capsys.readouterr().err
    assert cli.main(["doctor", "none.py"]) == 2
    assert "can't find the script none.py" in capsys.readouterr().err
    assert cli.main(["doctor", "--launcher", "no-such-launcher", script]) == 2
    assert "cannot be started" in capsys.readouterr().err


def test_the_processes_of_a_launcher(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(TESTS), settings="", data="Rows(50)", more="", resume=""))
    launcher = f"{sys.executable} -m torch.distributed.run --nproc_per_node 2 --master_port {free_port()}"
    done = subprocess.run(
        [sys.executable, "-m", "hf_trainopt.cli", "doctor", "--launcher", launcher, str(script), str(tmp_path / "o")],
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 2" in done.stdout
    assert "3 samples on each of 2 devices" in done.stdout
    assert "100 samples (2 epochs), 18 reference windows of 6 samples" in done.stdout


def test_a_budget_that_cannot_be_met_leaves_the_rest_to_be_seen(tmp_path, capsys):
    """What a step takes is just what is looked for then."""
    found = examined(tmp_path, settings="memory_budget='1%', accumulation_policy='ramp', accumulation_ramp='0:2'")
    assert "no placement needs less than" in found["refusal"]
    assert any("ramp" in str(lines) for lines in found["sections"].values())
    assert found["sections"]["Memory"]
    capsys.readouterr()
    script = str(tmp_path / "train.py")
    assert cli.main(["doctor", script, str(tmp_path / "output")]) == 2
    shown = capsys.readouterr().out
    assert "This run would end before it trains" in shown
    assert shown.index("Memory") < shown.index("This run would end")


def test_matrices_that_tensor_cores_multiply_slowly_are_named():
    """GPT-2's vocabulary of 50257: its products took a fifth of a step on an H100 (benchmarks/gpu.md)."""
    model = tiny_gpt2(vocab_size=61)
    (line,) = unaligned_weights(model)
    assert line.startswith("transformer.wte.weight (61 x ")
    assert "61 isn't a multiple of 8" in line
    assert "resize_token_embeddings(pad_to_multiple_of=64)" in line
    model.resize_token_embeddings(pad_to_multiple_of=64)
    assert unaligned_weights(model) == []


def test_matrices_of_models_without_embeddings_are_named():
    class Images(PreTrainedModel):
        """Of which transformers says that it has no embeddings."""

        def __init__(self):
            super().__init__(PreTrainedConfig())
            self.head = torch.nn.Linear(16, 10)

    (line,) = unaligned_weights(Images())
    assert line.startswith("head.weight (10 x 16): 10 isn't a multiple of 8")
    assert "resize" not in line
