"""Saves that fail: nothing that was complete is given up for them, training goes on, and they are tried again."""

import errno
import json
import os
import shutil

import pytest
import torch
from helpers import Pictures, Rows, arguments, quiet, tiny_gpt2, tiny_resnet, weights_equal
from reliability_helpers import GOODPUT, checkpoints, make, mounted
from transformers import Trainer, TrainerCallback

from hf_trainopt.reliability import CheckpointError, find_last_complete
from hf_trainopt.reliability import checkpoints as checkpoints_module
from hf_trainopt.reliability.saving import surplus


class FillsDisk(TrainerCallback):
    """Leaves so much room on the disk from one step on, and all of it again from another on."""

    def __init__(self, folder, full_at, free_at=10**9, room=0):
        self.ballast, self.full_at, self.free_at, self.room = folder / "ballast", full_at, free_at, room

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.full_at:
            free = shutil.disk_usage(self.ballast.parent).free
            with open(self.ballast, "wb") as file:
                file.write(bytes(max(0, free - self.room)))
        if state.global_step == self.free_at:
            self.ballast.unlink()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    trainer = make(tmp_path_factory.mktemp("undisturbed"), **GOODPUT)
    trainer.train()
    return trainer


@pytest.mark.parametrize("room", [0, 8, 48, 64, 96])
def test_a_disk_that_is_full_for_a_while(room, undisturbed, tmp_path, caplog):
    """With room (KiB) for none or some of the files: weights (40), optimizer (90), the rest."""
    with mounted(tmp_path / "disk", "size=4m") as disk:
        fills = FillsDisk(disk, full_at=4, free_at=7, room=room * 1024)
        trainer = make(disk / "run", callbacks=[fills], **GOODPUT)
        trainer.train()
        assert weights_equal(trainer.model, undisturbed.model)
        names = checkpoints(disk / "run")
        assert "checkpoint-4" not in names
        assert {"checkpoint-3", "checkpoint-7", f"checkpoint-{trainer.state.global_step}"} <= set(names)
        found, skipped = find_last_complete(str(disk / "run"))
        assert found.step == trainer.state.global_step
        assert not skipped
    assert "checkpoint-4 could not be saved" in caplog.text
    assert "MiB free). Training goes on" in caplog.text
    assert "the last complete checkpoint is " in caplog.text


def test_the_last_checkpoint_is_kept_where_there_is_room_for_no_more(undisturbed, tmp_path):
    """save_total_limit=1: the old one goes after the new one is complete, so here it stays."""
    with mounted(tmp_path / "disk", "size=4m") as disk:
        trainer = make(disk / "run", callbacks=[FillsDisk(disk, full_at=4)], save_total_limit=1, **GOODPUT)
        trainer.train()
        assert weights_equal(trainer.model, undisturbed.model)
        assert checkpoints(disk / "run") == ["checkpoint-3"]
        (disk / "ballast").unlink()
        resumed = make(disk / "run", save_total_limit=1, **GOODPUT)
        resumed.train(resume_from_checkpoint=True)
        assert weights_equal(resumed.model, undisturbed.model)


def test_a_run_that_leaves_nothing_says_so(tmp_path):
    with mounted(tmp_path / "disk", "size=4m") as disk:
        trainer = make(disk / "run", callbacks=[FillsDisk(disk, full_at=1)], max_steps=2)
        with pytest.raises(RuntimeError, match=r"no checkpoint could be saved .*; nothing was saved"):
            trainer.train()


@pytest.mark.parametrize("policy", [{}, GOODPUT])
def test_errors_of_the_disk_without_a_disk(policy, tmp_path, monkeypatch, caplog):
    """The same where nothing can be mounted: every writer fails once, each in its own way."""
    trainer = make(tmp_path, **policy)

    def failing_at(step, error, real):
        def write(*args, **kwargs):
            if trainer.state.global_step == step:
                raise error
            return real(*args, **kwargs)

        return write

    places = [
        (type(trainer.model), "save_pretrained", OSError(errno.ENOSPC, "No space left on device")),
        (Trainer, "_save_optimizer_and_scheduler", RuntimeError("[enforce fail at inline_container.cc:664]")),
        (Trainer, "_save_rng_state", OSError(errno.EDQUOT, "Disk quota exceeded")),
        (checkpoints_module, "complete", OSError(errno.EIO, "Input/output error")),
    ]
    for step, (owner, name, error) in enumerate(places, start=2):
        monkeypatch.setattr(owner, name, failing_at(step, error, getattr(owner, name)))
    trainer.train()
    lines = [record.message for record in caplog.records if "could not be saved" in record.message]
    assert len(lines) == 4
    for step, (line, (_, _, error)) in enumerate(zip(lines, places, strict=True), start=2):
        assert line.startswith(f"checkpoint-{step} could not be saved ({str(error).rstrip('.')}; ")
        assert line.endswith(f"the last complete checkpoint is {tmp_path / 'checkpoint-1'}.")
    assert checkpoints(tmp_path)[:2] == ["checkpoint-1", "checkpoint-6"]


def test_bugs_are_not_taken_for_full_disks(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Trainer, "_save_rng_state", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        make(tmp_path).train()


def never_trains(monkeypatch):
    monkeypatch.setattr(Trainer, "_inner_training_loop", lambda *args, **kwargs: pytest.fail("training began"))


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    never_trains(monkeypatch)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be made \(Not a directory\)"):
        make(tmp_path / "file" / "run").train()
    with mounted(tmp_path / "disk", "ro") as disk:
        with pytest.raises(CheckpointError, match=r"cannot be made \(Read-only file system\)"):
            make(disk / "run").train()
        with pytest.raises(CheckpointError, match=r"cannot be written to \(Read-only file system\)"):
            make(disk).train()
        with pytest.raises(pytest.fail.Exception, match="training began"):
            make(disk, save_strategy="no").train()


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    never_trains(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**20, 2**20 - 9000, 9000))
    with pytest.raises(CheckpointError, match=r"has 0 MiB free but the weights alone take 0 MiB; free some space"):
        make(tmp_path).train()


def test_a_save_over_another_checkpoint(tmp_path):
    """Resumed from an older one: those that come anew take the places of the old ones, never both gone."""
    make(tmp_path).train()
    before = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    (tmp_path / "checkpoint-3" / "mine.txt").write_text("")
    make(tmp_path, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not (tmp_path / "checkpoint-3" / "mine.txt").exists()
    after = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert after["global_step"] == before["global_step"]
    assert not list(tmp_path.glob("replaced-*"))


def test_which_checkpoints_are_deleted():
    names = [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    assert surplus(names, ["checkpoint-4"], None, []) == []
    assert surplus(names, ["checkpoint-4"], 2, []) == names[:2]
    assert surplus(names, ["checkpoint-4", "checkpoint-1"], 2, []) == ["checkpoint-2", "checkpoint-3"]
    assert surplus(names, ["checkpoint-4", "checkpoint-1", None], 1, []) == ["checkpoint-2", "checkpoint-3"]
    assert surplus(names, ["checkpoint-4"], 3, ["checkpoint-3"]) == ["checkpoint-3"]


def saved_by(trainer_class, folder, **kwargs):
    settings = {
        "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2,
        "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
    }  # fmt: skip
    efficient = {"accumulation_policy": "fixed"} if trainer_class is not Trainer else {"cls": kwargs.pop("cls")}
    if kwargs:
        settings |= {"remove_unused_columns": False, "per_device_train_batch_size": 4}
    args = arguments(folder, **settings, **efficient)
    data, model = (Pictures(), tiny_resnet()) if kwargs else (Rows(), tiny_gpt2(dropout=0.1))
    trainer = quiet(trainer_class(model=model, args=args, train_dataset=data, eval_dataset=data))
    trainer.train()
    return trainer


@pytest.mark.parametrize("pictures", [{}, {"pictures": True}])
def test_nothing_goes_wrong_and_the_run_is_stock(pictures, tmp_path):
    """Weights, log and files to the bit; what is kept is what stock keeps."""
    from transformers import TrainingArguments

    from hf_trainopt import EfficientTrainer

    stock = saved_by(Trainer, tmp_path / "stock", cls=TrainingArguments, **pictures)
    ours = saved_by(EfficientTrainer, tmp_path / "ours", **pictures)
    assert weights_equal(stock.model, ours.model)
    clock = ("runtime", "per_second")
    logs = [
        [{k: v for k, v in line.items() if not k.endswith(clock)} for line in trainer.state.log_history]
        for trainer in (stock, ours)
    ]
    assert logs[0] == logs[1]
    assert checkpoints(tmp_path / "stock") == checkpoints(tmp_path / "ours")
    for name in checkpoints(tmp_path / "stock"):
        files = [set(os.listdir(tmp_path / run / name)) for run in ("stock", "ours")]
        assert files[1] - files[0] == {"checkpoint_manifest.json", "data_rng_state.pth", "trainopt_state.json"}
        for file in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            a, b = (tmp_path / run / name / file for run in ("stock", "ours"))
            if file.endswith("safetensors"):
                assert a.read_bytes() == b.read_bytes()
            else:
                a, b = (torch.load(path, weights_only=False) for path in (a, b))
                assert repr(a) == repr(b)
