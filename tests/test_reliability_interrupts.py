"""SIGTERM and Ctrl-C: the window is finished, a checkpoint saved, training ended; resuming ends as if nothing was."""

import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import Rows, skip_below, skip_without_scripts, weights_equal
from reliability_helpers import GOODPUT, SavesAlways, checkpoints, make
from scripts_helpers import REPOSITORY
from test_distributed import launch_all
from transformers import TrainerCallback
from transformers.trainer_utils import HPSearchBackend

from hf_trainopt.reliability import TrainingInterrupted, TrainingTerminated, find_last_complete, inspect_checkpoint
from hf_trainopt.reliability.signals import SIGNALS, SignalWatch, signal_of


@pytest.fixture(autouse=True)
def heard():
    """What runs in the background of a shell ignores Ctrl-C from its start, and with it the tests here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Sends(TrainerCallback):
    """Sends a signal to this process at an event (the n-th of its kind)."""

    def __init__(self, number, event="on_substep_end", count=8):
        self.number, self.left = number, count
        setattr(self, event, self._event)

    def _event(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


def test_a_signal_in_an_evaluation_saves_though_only_the_best_is_kept(tmp_path):
    trainer = make(
        tmp_path, save_strategy="best", metric_for_best_model="eval_loss", greater_is_better=True, num_train_epochs=3,
        eval_strategy="epoch", eval_dataset=Rows(6), callbacks=[Sends(signal.SIGINT, "on_prediction_step", 2)],
    )  # fmt: skip
    trainer.remove_callback(SavesAlways)
    with pytest.raises(TrainingInterrupted, match=r"at step 12, after a save; resume from .*checkpoint-12"):
        trainer.train()
    assert inspect_checkpoint(str(tmp_path / "checkpoint-12")).fault is None


def test_noise_in_embeddings_is_not_left_behind(tmp_path):
    settings = {"neftune_noise_alpha": 5.0}
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    trainer = make(tmp_path / "ended", callbacks=[Sends(signal.SIGINT, "on_step_end", 4)], **settings)
    with pytest.raises(TrainingInterrupted):
        trainer.train()
    embedding = trainer.model.get_input_embeddings()
    assert not embedding._forward_hooks
    trainer.train(resume_from_checkpoint=True)
    assert weights_equal(whole.model, trainer.model)


def test_a_trial_is_told_of_its_own_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.hp_params", vars)  # that of Optuna, which is not installed
    make(tmp_path, max_steps=6).train()  # later checkpoints, of another run
    trainer = make(tmp_path, callbacks=[Sends(signal.SIGINT, "on_step_end", 4)])
    trainer.hp_search_backend, trainer._hp_search_setup = HPSearchBackend.OPTUNA, lambda trial: None
    with pytest.raises(TrainingInterrupted, match="run-3/checkpoint-4"):
        trainer.train(trial=SimpleNamespace(number=3))


def test_later_checkpoints_of_an_earlier_run_are_not_recommended(tmp_path):
    make(tmp_path, max_steps=6).train()
    with pytest.raises(TrainingInterrupted, match=r"resume from .*checkpoint-4") as raised:
        make(tmp_path, callbacks=[Sends(signal.SIGINT, "on_step_end", 4)]).train()
    assert raised.value.checkpoint == str(tmp_path / "checkpoint-4")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    runs = {}
    for name, policy in (("fixed", {}), ("goodput", GOODPUT)):
        runs[name] = make(tmp_path_factory.mktemp(name), save_strategy="no", **policy)
        runs[name].train()
    return runs


@pytest.mark.parametrize(
    ("policy", "number", "event"),
    [
        ("fixed", signal.SIGTERM, "on_substep_end"),
        ("fixed", signal.SIGINT, "on_save"),
        ("goodput", signal.SIGINT, "on_substep_end"),
        ("goodput", signal.SIGTERM, "on_pre_optimizer_step"),
        ("goodput", signal.SIGTERM, "on_step_end"),
        ("goodput", signal.SIGTERM, "on_save"),
    ],
)
def test_a_signal_saves_and_ends(policy, number, event, whole, tmp_path, caplog):
    error, code = {signal.SIGTERM: (TrainingTerminated, 143), signal.SIGINT: (TrainingInterrupted, 130)}[number]
    settings = GOODPUT if policy == "goodput" else {}
    before = [signal.getsignal(one) for one in SIGNALS]
    count = {"on_substep_end": 8, "on_save": 2}.get(event, 4)
    trainer = make(tmp_path, callbacks=[Sends(number, event, count)], **settings)
    if event != "on_save":
        trainer.args.save_strategy = "no"
        trainer.args.save_on_interrupt = True
    with pytest.raises(error) as raised:
        trainer.train()
    step = trainer.state.global_step
    assert 1 < step < whole[policy].state.global_step
    path = tmp_path / f"checkpoint-{step}"
    if event == "on_save":  # served by the next window: that one was saved already
        assert checkpoints(tmp_path)[-1] == path.name
    else:
        assert checkpoints(tmp_path) == [path.name]
    assert f"{number.name} ended training at step {step}, after a save; resume from {path}." in caplog.text
    assert raised.value.checkpoint == str(path)
    assert getattr(raised.value, "exit_code", raised.value.code if number == signal.SIGTERM else None) == code
    assert [signal.getsignal(one) for one in SIGNALS] == before
    assert not trainer.is_in_train
    resumed = make(tmp_path, save_strategy="no", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert weights_equal(resumed.model, whole[policy].model)


def test_no_evaluation_is_begun_after_a_signal(tmp_path):
    evaluations = []

    class Evaluated(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            evaluations.append(state.global_step)

    trainer = make(
        tmp_path, callbacks=[Evaluated(), Sends(signal.SIGTERM)], eval_dataset=Rows(6), eval_strategy="steps",
        eval_steps=1,
    )  # fmt: skip
    with pytest.raises(TrainingTerminated):
        trainer.train()
    assert evaluations == list(range(1, trainer.state.global_step))


def test_the_second_ctrl_c_ends_at_once(tmp_path):
    trainer = make(tmp_path, callbacks=[Sends(signal.SIGINT, count=1), Sends(signal.SIGINT, count=2)])
    with pytest.raises(KeyboardInterrupt) as raised:
        trainer.train()
    assert not isinstance(raised.value, TrainingInterrupted)
    assert not checkpoints(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_can_be_switched_off(tmp_path):
    for settings in ({"save_strategy": "no"}, {"save_on_interrupt": False}):
        trainer = make(tmp_path, callbacks=[Sends(signal.SIGINT)], **settings)
        with pytest.raises(KeyboardInterrupt) as raised:
            trainer.train()
        assert not isinstance(raised.value, TrainingInterrupted)
    with pytest.raises(ValueError, match="save_on_interrupt and enable_jit_checkpoint both want SIGTERM"):
        make(tmp_path, save_on_interrupt=True, enable_jit_checkpoint=True)


def test_a_signal_in_the_last_window_of_all(tmp_path, whole):
    last = whole["fixed"].state.global_step
    trainer = make(tmp_path, callbacks=[Sends(signal.SIGTERM, "on_train_end", 1)], save_strategy="epoch")
    with pytest.raises(TrainingTerminated) as raised:
        trainer.train()
    assert raised.value.checkpoint.endswith(f"checkpoint-{last}")
    assert "all steps were done" in raised.value.message


def test_a_save_that_fails_is_said(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.Trainer._save_rng_state", full)
    trainer = make(tmp_path, callbacks=[Sends(signal.SIGTERM)], save_strategy="no", save_on_interrupt=True)
    with pytest.raises(TrainingTerminated, match="143") as raised:
        trainer.train()
    assert "without a save; the last save failed ([Errno 28] No space left" in raised.value.message
    assert raised.value.checkpoint is None


def test_handlers_of_others_are_left_alone():
    watch, mine = SignalWatch(), lambda *args: None
    before = signal.signal(signal.SIGTERM, mine)
    try:
        watch.install()
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) == watch._handle
        watch.restore()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        thread = threading.Thread(target=watch.install)  # where Python allows no handlers
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_child_is_ended_by_sigterm_and_not_by_ctrl_c():
    """Such as a worker of a `multiprocessing.Pool` in `compute_metrics`, whose end waits for it."""
    watch = SignalWatch()
    watch.install()
    try:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)  # left alone
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    finally:
        watch.restore()
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert watch.received is None


def test_which_signal_counts():
    assert signal_of([0.0, 0.0]) is None
    assert signal_of([0.0, 2.0]) == signal.SIGINT
    assert signal_of([1.0, 1.0]) == signal.SIGTERM


def test_a_signal_to_one_rank_ends_both(tmp_path):
    """Only the second rank gets it; the first one saves too, after the same window."""
    skip_below("transformers", "5.18", "resuming on several CPU ranks (stock Trainer cannot either)")
    # `timed`: probes that tell what a micro-batch takes alone don't come back after the resume.
    names = ["fixed", "goodput", "timed"]
    interrupted, cases = [f"interrupt {name}" for name in names], [f"uninterrupted {name}" for name in names]
    wholes = launch_all(cases, tmp_path / "whole")
    ended = launch_all(interrupted, tmp_path / "run")
    for before, case in zip(interrupted, cases, strict=True):
        whole, stopped = wholes[case], ended[before]
        assert [record["ended"] for record in stopped] == ["TrainingTerminated"] * 2
        assert len(stopped[0]["steps"]) == len(stopped[1]["steps"]) < len(whole[0]["steps"])
        (tmp_path / "run" / before).rename(tmp_path / "run" / case)
        found, skipped = find_last_complete(str(tmp_path / "run" / case / "run"))
        assert found.step == len(stopped[0]["steps"])
        assert not skipped
    resumed = launch_all(cases, tmp_path / "run")
    for case in cases:
        assert resumed[case][0]["weights"] == resumed[case][1]["weights"] == wholes[case][0]["weights"]


def test_a_script_that_is_told_to_end(tmp_path):
    """A preempted job: SIGTERM, the line that says where to go on, 143; `--resume_from_checkpoint True` goes on."""
    import subprocess
    import sys
    import time

    from scripts_helpers import ENVIRONMENT, run_script

    skip_without_scripts()
    flags = [
        "--output_dir", tmp_path / "out", "--dataset_name", "python-docs", "--do_train", "--use_cpu",
        "--max_steps=400",
        "--config_overrides", "n_embd=16,n_layer=1,n_head=2,n_positions=32", "--block_size=32", "--logging_steps=1",
        "--per_device_train_batch_size=2", "--optimizer_step_cost=0.5", "--save_strategy=steps", "--save_steps=1000",
        "--model_type=gpt2", "--train_tokenizer_vocab_size=300", "--max_train_samples=1600",
    ]  # fmt: skip
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "run_clm.py"), *map(str, flags)],
            env=os.environ | ENVIRONMENT, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 150
            while "| lr " not in Path(tmp_path / "log").read_text() and time.monotonic() < deadline:
                assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
                time.sleep(0.1)
            process.terminate()
            assert process.wait(60) == 143
        finally:
            process.kill()
    text = (tmp_path / "log").read_text()
    (name,) = checkpoints(tmp_path / "out")
    assert text.strip().splitlines()[-1].startswith("run_clm.py: SIGTERM ended training at step ")
    assert text.strip().endswith(f"after a save; resume from {tmp_path / 'out' / name}.")
    assert "Traceback" not in text
    # A later save that was killed is passed over.
    (tmp_path / "out" / "checkpoint-9999").mkdir()
    (tmp_path / "out" / "checkpoint-9999" / "checkpoint-is-incomplete.txt").write_text("")
    step = int(name.split("-")[1])
    done = run_script("run_clm.py", *flags, f"--max_steps={step // 2}", "--resume_from_checkpoint=True")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{name}; passed over: checkpoint-9999: its saving was interrupted" in done.stdout
