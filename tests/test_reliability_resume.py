"""Which checkpoint is complete, whenever its saving or deleting was stopped and whatever befell its files."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import Rows, arguments, quiet, skip_without_scripts, tiny_gpt2, weights_equal
from reliability_helpers import GOODPUT, checkpoints, make
from transformers import Trainer, TrainingArguments

from hf_trainopt.reliability import CheckpointError, find_last_complete, inspect_checkpoint
from hf_trainopt.reliability.manifest import HASHED_BYTES, INCOMPLETE_NAME, MANIFEST_NAME, begin, complete, discard


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with a checkpoint after each window, never stopped."""
    trainer = make(tmp_path_factory.mktemp("whole"), **GOODPUT)
    trainer.train()
    return trainer


@pytest.fixture
def run_dir(whole, tmp_path):
    """A copy of its last three checkpoints, to spoil."""
    source = Path(whole.args.output_dir)
    for name in checkpoints(source)[-4:-1]:
        shutil.copytree(source / name, tmp_path / "run" / name)
    return tmp_path / "run"


def spoil_nothing(folder):
    pass


def cut(name):
    def spoil(folder):
        os.truncate(folder / name, (folder / name).stat().st_size // 2)

    return spoil


def zero_the_end(folder):
    path = folder / "optimizer.pt"
    size = path.stat().st_size
    with open(path, "rb+") as file:
        file.seek(size - 100)
        file.write(b"\0" * 100)


def of_another_step(folder):
    shutil.copy(folder.parent / checkpoints(folder.parent)[0] / "model.safetensors", folder)


def manifest_of(content):
    return lambda folder: (folder / MANIFEST_NAME).write_text(content)


def without_manifest(then):
    def spoil(folder):
        (folder / MANIFEST_NAME).unlink()
        then(folder)

    return spoil


def interrupted_save(folder):
    (folder / MANIFEST_NAME).unlink()
    (folder / "rng_state.pth").unlink()
    (folder / INCOMPLETE_NAME).write_text("")


# What befalls the last checkpoint -> what is said of it.
FAULTS = {
    "save interrupted": (interrupted_save, "its saving was interrupted"),
    "weights cut": (cut("model.safetensors"), "model.safetensors has"),
    "optimizer cut": (cut("optimizer.pt"), "optimizer.pt has"),
    "zeros": (zero_the_end, "optimizer.pt is not what was saved"),
    "other weights": (of_another_step, "model.safetensors is not what was saved"),
    "file gone": (lambda folder: (folder / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "manifest cut": (cut(MANIFEST_NAME), f"{MANIFEST_NAME} cannot be read"),
    "foreign manifest": (manifest_of('{"version": 1, "files": {"a": 3}}'), f"{MANIFEST_NAME} cannot be read"),
    "later manifest": (manifest_of('{"version": 99, "files": {}}'), "has version 99, this hf_trainopt reads 1"),
    "stock: nothing in it": (lambda f: [p.unlink() for p in f.iterdir()], "it has no trainer_state.json"),
    "stock: weights cut": (without_manifest(cut("model.safetensors")), "model.safetensors is cut short"),
    "stock: optimizer cut": (without_manifest(cut("optimizer.pt")), "optimizer.pt is cut short"),
    "stock: state cut": (without_manifest(cut("trainer_state.json")), "trainer_state.json is not valid JSON"),
    "stock: no weights": (
        without_manifest(lambda folder: (folder / "model.safetensors").unlink()), "it has no weights"
    ),
    "stock: foreign state": (
        without_manifest(lambda folder: (folder / "trainer_state.json").write_text('{"mine": 1}')),
        "trainer_state.json wasn't written by a Trainer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_checkpoint_is_passed_over_and_it_is_said_why(run_dir, fault):
    spoil, said = FAULTS[fault]
    last = checkpoints(run_dir)[-1]
    spoil(run_dir / last)
    found, skipped = find_last_complete(str(run_dir))
    assert found.name == checkpoints(run_dir)[-2]
    assert [checkpoint.name for checkpoint in skipped] == [last]
    assert said in skipped[0].fault


def test_resuming_from_the_last_complete_one(whole, run_dir, caplog):
    *_, good, bad = checkpoints(run_dir)
    interrupted_save(run_dir / bad)
    trainer = make(run_dir, **GOODPUT)
    trainer.train(resume_from_checkpoint=True)
    assert f"{good}; passed over: {bad}: its saving was interrupted" in caplog.text
    assert weights_equal(trainer.model, whole.model)
    assert inspect_checkpoint(str(run_dir / bad)).fault is None  # written anew


def test_one_that_is_named_must_be_complete(run_dir):
    good, bad = checkpoints(run_dir)[-2:]
    cut("optimizer.pt")(run_dir / bad)
    with pytest.raises(
        CheckpointError, match=f"valid checkpoint at .*{bad}: optimizer.pt has .*complete one is .*{good}"
    ):
        make(run_dir, **GOODPUT).train(resume_from_checkpoint=str(run_dir / bad))
    with pytest.raises(CheckpointError, match=r"valid checkpoint at .*: it does not exist"):
        make(run_dir, **GOODPUT).train(resume_from_checkpoint=str(run_dir / "checkpoint-99"))
    for name in checkpoints(run_dir):
        cut("optimizer.pt")(run_dir / name)
    with pytest.raises(CheckpointError, match=r"No valid checkpoint found in output directory .*optimizer.pt has"):
        make(run_dir, **GOODPUT).train(resume_from_checkpoint=True)


def test_every_moment_of_a_save_and_of_a_deletion(tmp_path, monkeypatch):
    """Stopped before each of their operations: incomplete, or complete with the content it is to have."""

    class Killed(BaseException):
        pass

    def stopped_after(count, function):
        left = [count]

        def counted(real):
            def call(*args, **kwargs):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("open", "replace", "remove", "rename", "makedirs", "unlink", "rmdir"):
                patch.setattr(os, name, counted(getattr(os, name)))
            patch.setattr("builtins.open", counted(open))
            try:
                function()
            except Killed:
                return False
        return True

    def save(folder):
        begin(folder)
        for name in ("trainer_state.json", "pytorch_model.bin", "rng_state.pth"):
            with open(os.path.join(folder, name), "w") as file:
                file.write("{}")
        complete(folder, {"global_step": 1})

    seen, count, finished = set(), 0, False
    while not finished:
        folder = str(tmp_path / f"checkpoint-{count}")
        finished = stopped_after(count, lambda folder=folder: save(folder))
        if os.path.isdir(folder):
            fault = inspect_checkpoint(folder).fault
            seen.add(fault)
            assert fault is None or "interrupted" in fault or not os.listdir(folder)
        count += 1
    assert seen >= {None, "its saving was interrupted"}
    assert count > 10

    seen, count, finished = set(), 0, False
    while not finished:
        folder = str(tmp_path / f"checkpoint-{1000 + count}")
        save(folder)
        finished = stopped_after(count, lambda folder=folder: discard(folder))
        if os.path.isdir(folder):
            fault, names = inspect_checkpoint(folder).fault, os.listdir(folder)
            seen.add(fault)
            # Without the manifest, its files but one would look like a checkpoint of stock `Trainer`.
            assert MANIFEST_NAME in names if fault is None else "interrupted" in fault or not names
            assert fault is not None or len(names) >= 4
        count += 1
    assert seen >= {None, "its saving was interrupted"}


def test_a_large_file_is_told_by_its_blocks(tmp_path):
    folder = tmp_path / "checkpoint-1"
    begin(str(folder))
    path = folder / "model.bin"
    path.write_bytes(bytes(3 * HASHED_BYTES))
    complete(str(folder), {})
    assert inspect_checkpoint(str(folder)).fault is None
    with open(path, "rb+") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"1")
    assert inspect_checkpoint(str(folder)).fault == "model.bin is not what was saved"


def test_checkpoints_of_stock_can_be_taken_and_one_put_aside_is_found(tmp_path, caplog):
    args = arguments(tmp_path, TrainingArguments, gradient_accumulation_steps=3, save_strategy="steps", save_steps=1)
    stock = quiet(Trainer(model=tiny_gpt2(dropout=0.1), args=args, train_dataset=Rows()))
    stock.train()
    last = checkpoints(tmp_path)[-1]
    shutil.rmtree(tmp_path / last)
    before = checkpoints(tmp_path)[-1]
    os.rename(tmp_path / before, tmp_path / f"replaced-{before}")  # killed while it was to be replaced
    begin(str(tmp_path / before))
    trainer = make(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert f"replaced-{before} has no manifest" in caplog.text
    assert weights_equal(trainer.model, stock.model)


def test_steps_of_other_samples_are_said(tmp_path, caplog):
    """As in stock, which counts its place in steps, the run goes on at other samples."""
    make(tmp_path, max_steps=2).train()
    last = checkpoints(tmp_path)[-1]

    def warning(**kwargs):
        caplog.clear()
        make(tmp_path / "again", **kwargs).train(resume_from_checkpoint=str(tmp_path / last))
        return caplog.text

    smaller = warning(per_device_train_batch_size=2)
    assert "has 6 samples, but" in smaller
    assert "with 9: per_device_train_batch_size is 2 (there 3)" in smaller
    assert "same product" in smaller
    assert "gradient_accumulation_steps is 4 (there 3)" in warning(gradient_accumulation_steps=4)
    assert "same product" not in warning()
    assert "same product" not in warning(gradient_accumulation_steps=4, ignore_data_skip=True)


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_cannot_run_code(name, tmp_path):
    make(tmp_path / "run", max_steps=2).train()
    folder = tmp_path / "run" / checkpoints(tmp_path / "run")[0]
    torch.save(Harmful(str(tmp_path / "harm")), folder / name)
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        make(tmp_path / "run", max_steps=2).train(resume_from_checkpoint=str(folder))
    assert not (tmp_path / "harm").exists()


def test_nothing_of_ours_unpickles_or_trusts_remote_code():
    skip_without_scripts()
    import ast

    import hf_trainopt
    from run_clm import ModelArguments

    package = Path(hf_trainopt.__file__).parent
    files = [*package.rglob("*.py"), *package.parent.glob("run_*.py")]
    assert len(files) > 50
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("pickle.load", "pickle.loads", "joblib.load"), path
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "torch.load":
                assert keywords.get("weights_only") == "True", path
            assert keywords.get("trust_remote_code") in (None, "False", "model_args.trust_remote_code"), path
    assert ModelArguments().trust_remote_code is False


def test_a_resumed_run_that_is_over_says_so(whole, run_dir, caplog):
    last = checkpoints(Path(whole.args.output_dir))[-1]
    folder = run_dir / last
    shutil.copytree(Path(whole.args.output_dir) / last, folder)
    trainer = make(run_dir, **GOODPUT)
    trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.state.global_step == whole.state.global_step
    assert f"Nothing was trained: the checkpoint of step {whole.state.global_step} is at the end of" in caplog.text
    caplog.clear()
    make(run_dir, **GOODPUT).train(resume_from_checkpoint=str(run_dir / checkpoints(run_dir)[0]))
    assert "Nothing was trained" not in caplog.text
