"""Checkpoints from before `trainopt_state.json` still resume: two that were written by version 0.1.0 of 2026-11-27."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import quiet

from hf_trainopt import EfficientTrainer, EfficientTrainingArguments
from hf_trainopt.core.state import STATE_NAME, read_state


FOLDER = Path(__file__).parent / "old_checkpoints"
RESULTS = json.loads((FOLDER / "results.json").read_text())
SETTINGS = {
    "varying": {"optimizer_step_cost": 2.0, "max_accumulation_steps": 8},
    "fixed": {"accumulation_policy": "fixed", "measurements": ["throughput", "memory"]},  # as was the default
}


class Line(torch.nn.Module):
    """The model that wrote them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 1)
        self.accepts_loss_kwargs = False

    def forward(self, x, labels):
        return {"loss": (self.linear(x).squeeze(-1) - labels).square().mean()}


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    y = x.sum(-1) + torch.randn(64, generator=generator)
    return [{"x": features, "labels": label} for features, label in zip(x, y, strict=True)]


@pytest.mark.parametrize("name", SETTINGS)
def test_they_resume_as_they_did(name, tmp_path):
    expected = RESULTS[name]
    checkpoint = tmp_path / expected["checkpoint"]
    shutil.copytree(FOLDER / name / expected["checkpoint"], checkpoint)
    args = EfficientTrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=3,
        learning_rate=0.05, warmup_steps=2, lr_scheduler_type="cosine", report_to="none", disable_tqdm=True,
        use_cpu=True, save_strategy="steps", save_steps=10, logging_steps=5, seed=0, **SETTINGS[name],
    )  # fmt: skip
    trainer = quiet(EfficientTrainer(model=Line(), args=args, train_dataset=rows()))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    logged, lines = [line for line in trainer.state.log_history if "loss" in line], expected["logged"]
    if name == "varying":  # goodput's batch and rate follow other rules since, and Adam another clock
        lines = [line for line in lines if line["step"] <= int(checkpoint.name.rpartition("-")[2])]
        assert lines
        assert logged[len(lines)]["accumulation_steps"] <= 2 * lines[-1]["accumulation_steps"]
    else:
        assert trainer.state.global_step == expected["steps"]
        assert len(logged) == len(lines)
        for found, weights in zip(trainer.model.parameters(), expected["weights"], strict=True):
            torch.testing.assert_close(found.flatten(), torch.tensor(weights))
    for found, line in zip(logged, lines, strict=False):
        assert {key: found[key] for key in line} == pytest.approx(line, rel=1e-5)
    # What measures goes on counting, and the next checkpoint has the new format only.
    assert trainer.state.log_history[-1]["samples_seen"] == 3 * 64
    assert not [entry for entry in trainer.state.stateful_callbacks if entry != "TrainerControl"]
    newest = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert (newest / STATE_NAME).exists()
    assert not (newest / "accumulation_state.json").exists()


def test_a_stock_checkpoint_has_no_state(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": {"TrainerControl": {}}}))
    assert read_state(str(tmp_path)) is None


def test_an_old_checkpoint_of_an_unknown_version_is_refused(tmp_path):
    (tmp_path / "accumulation_state.json").write_text(json.dumps({"version": 7}))
    with pytest.raises(ValueError, match="version 7"):
        read_state(str(tmp_path))
