"""What a terminal shows of a log line, and that trackers and `trainer_state.json` have all of it."""

import ast
import math
import sys

import pytest
from helpers import Rows, arguments, quiet, tiny_gpt2
from hypothesis import given
from hypothesis import strategies as st
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_trainopt import EfficientTrainer
from hf_trainopt.accumulation.noise_scale import NoiseScale, NoiseScaleTracker, WindowStatistics, noise_logs
from hf_trainopt.engine.console import WIDTH, RunClock, console_text, duration
from hf_trainopt.engine.parts import Parts


OURS = {
    "accumulation_steps": 8, "effective_batch_size": 64, "samples_seen": 12345, "noise_scale": 312.4,
    "noise_scale_low": 249.6, "noise_scale_high": 401.2, "train_time_s": 12.5, "samples_per_second": 80.0,
    "flops_per_second": 1e12, "peak_memory_gib": 7.216, "peak_memory_save_gib": 7.0,
}  # fmt: skip
LINE = {"loss": 4.1, "grad_norm": 1.2, "learning_rate": 5.871e-4, **OURS, "epoch": 1.7059}


def is_ours(key):
    return Parts(None, None).is_logged_key(key)


def text(logs, seconds_left=None):
    return console_text(logs, seconds_left, is_ours)


# ---- The text ------------------------------------------------------------------------------------------------------


def test_a_line_of_training():
    assert text(LINE, 4980.0) == (
        "loss 4.100 | lr 5.87e-04 | k 8 | noise scale 312 (250-401) | memory 7.22 GiB | 83 min left | epoch 1.71"
    )


def test_a_plan_is_shown_beside_what_was_measured():
    peaks = {"measured_peak_gib": 0.11023, "predicted_peak_gib": 0.1103}
    assert " | step peak 0.11 GiB (plan: 0.11) | " in text(LINE | peaks)
    assert len(text(LINE | peaks, 4980.0)) <= WIDTH
    assert text({"train_runtime": 1.0, **peaks}).endswith("step peak 0.11 GiB (plan: 0.11)")
    assert "step peak 12.5 GiB | " in text(LINE | {"measured_peak_gib": 12.5})


def test_what_is_not_known_is_left_out():
    assert text({"loss": 4.1, "learning_rate": 0.0, "accumulation_steps": 8}) == "loss 4.100 | lr 0.00e+00 | k 8"


@pytest.mark.parametrize(
    ("noise", "shown"),
    [
        ({"noise_scale_low": 16.87}, ">16.9"),
        ({"noise_scale": 73.18, "noise_scale_low": 11.3}, "73.2 (>11.3)"),
        ({"noise_scale": 41.8, "noise_scale_low": 41.8}, ">41.8"),  # kept, and raised to the lower end
        ({"noise_scale": 12345.6, "noise_scale_low": 0.0, "noise_scale_high": 2.5e8}, "12.3k (0-250M)"),
        ({"noise_scale": 999.6, "noise_scale_low": 999.4, "noise_scale_high": 4e9}, "1k (999-4G)"),
        ({"noise_scale": 312.0}, "312"),
    ],
)
def test_the_noise_scale_with_its_interval(noise, shown):
    assert text({"loss": 4.1, "learning_rate": 1e-3, **noise}).endswith(f" | noise scale {shown}")


positive = st.floats(0, 1e12)


@given(
    loss=st.floats(0, 1e9) | st.just(math.nan), lr=st.floats(0, 10), k=st.integers(1, 99_999),
    noise=st.tuples(positive, positive, positive), memory=st.floats(0, 9_999), left=st.floats(0, 1e8),
)  # fmt: skip
def test_all_seven_fit_into_120_characters(loss, lr, k, noise, memory, left):
    keys = dict(zip(("noise_scale_low", "noise_scale", "noise_scale_high"), sorted(noise), strict=True))
    logs = {"loss": loss, "learning_rate": lr, "accumulation_steps": k, "peak_memory_gib": memory, **keys}
    line = text({**logs, "epoch": 1.0}, left)
    assert len(line) <= WIDTH
    assert " left" in line
    assert line.isascii()


def test_keys_of_other_code_fill_the_line():
    assert text({**LINE, "entropy": 1.25}).endswith("epoch 1.71 | entropy 1.25")
    line = text({**LINE, **{f"rewards/{i}": 1.0 for i in range(9)}})
    assert line.endswith("| ...")
    assert "epoch 1.71 | rewards/0 1 | " not in line or len(line) <= WIDTH
    assert len(line) <= WIDTH


def test_an_evaluation_shows_every_metric():
    metrics = {f"eval_metric_{i}": 0.123456 for i in range(9)}
    logs = {"eval_loss": 3.9876, **metrics, "eval_runtime": 2.5, "eval_steps_per_second": 9.9, **OURS, "epoch": 2.0}
    lines = text(logs, 60.0).split("\n")
    assert lines[0].startswith("eval_loss 3.988 | eval_metric_0 0.1235 | ")
    assert lines[-1].endswith("eval_runtime 2.5 | epoch 2.00")
    assert len(lines) == 3
    assert all(len(line) <= WIDTH for line in lines)
    assert all(name in "".join(lines) for name in metrics)


def test_the_last_line_and_lines_of_other_code():
    end = {"train_runtime": 12.5, "train_samples_per_second": 9.0, "total_flos": 1e9, "train_loss": 3.5, **OURS}
    assert text({**end, "epoch": 3.0}) == "train_runtime 12.5 | train_loss 3.5 | memory 7.22 GiB | epoch 3.00"
    assert text({"loss": 1.0, "note": "a\nb", **OURS}) == "loss 1 | note a b"
    assert len(text({"note": "x" * 500})) == WIDTH


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (5999, "100 min"), (6060, "1 h 41 min"), (86400 * 2, "2 d 0 h")],
)
def test_durations(seconds, shown):
    assert duration(seconds).replace("1 h 40 min", "100 min") == shown


def test_time_left_counts_from_where_a_run_began():
    now = [100.0]
    clock = RunClock(lambda: now[0])
    assert clock.seconds_left(0.5) is None
    clock.start(0.5)  # resumed half-way
    assert clock.seconds_left(0.5) is None
    now[0] = 110.0
    assert clock.seconds_left(0.6) == pytest.approx(40.0)
    assert clock.seconds_left(1.0) == 0


# ---- In a run ------------------------------------------------------------------------------------------------------


class Tracker(TrainerCallback):
    def __init__(self):
        self.lines = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append(dict(logs))


def run(tmp_path, cls=EfficientTrainer, args_class=None, callbacks=(), **kwargs):
    options = {"gradient_accumulation_steps": 4, "eval_strategy": "epoch", "measurements": "auto"} | kwargs
    if args_class is not None:
        options.pop("measurements")
    args = arguments(tmp_path, *filter(None, [args_class]), **options)
    trainer = cls(model=tiny_gpt2(), args=args, train_dataset=Rows(), eval_dataset=Rows(6), callbacks=[*callbacks])
    return trainer, trainer.train().metrics


@pytest.mark.parametrize("bar", [False, True])
def test_the_terminal_gets_short_lines_and_trackers_all_keys(bar, tmp_path, capsys):
    tracker = Tracker()
    trainer, metrics = run(tmp_path, callbacks=[tracker], disable_tqdm=not bar)
    lines = [line for line in capsys.readouterr().out.splitlines() if line and "real_accelerator" not in line]
    assert len(lines) == len(trainer.state.log_history)  # without what DeepSpeed prints when it is first imported
    assert all(len(line) <= WIDTH for line in lines)
    training = [line for line in lines if line.startswith("loss ")]
    assert len(training) == len([line for line in tracker.lines if "loss" in line])
    for line in training:
        assert [part.split()[0] for part in line.split(" | ")[:3]] == ["loss", "lr", "k"]
        assert "| memory " in line
        assert " left | epoch " in line
        assert "grad_norm" not in line
    for logs, entry in zip(tracker.lines, trainer.state.log_history, strict=True):
        assert {"samples_seen", "effective_batch_size", "peak_memory_gib", "train_time_s"} <= logs.keys()
        assert logs.keys() <= entry.keys() | {"total_flos"}
    assert ("total_flos" in metrics) == bar  # stock's printer takes it away, its progress bar doesn't


@pytest.mark.parametrize("bar", [False, True])
def test_with_everything_off_the_output_is_stocks(bar, tmp_path, capsys):
    printed = []
    for cls, args_class, options in (
        (Trainer, TrainingArguments, {}),
        (EfficientTrainer, None, {"accumulation_policy": "fixed"}),
    ):
        _, metrics = run(tmp_path, cls, args_class, disable_tqdm=not bar, **options)
        lines = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines() if line]
        timed = ("runtime", "per_second")
        printed.append(([{k: v for k, v in line.items() if not k.endswith(timed)} for line in lines], metrics.keys()))
    assert printed[0] == printed[1]
    assert len(printed[0][0]) > 5


def test_lines_with_measurements_are_short_at_fixed_k_too(tmp_path, capsys):
    run(tmp_path, accumulation_policy="fixed", measurements=["memory"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("loss ")
    assert "| memory " in lines[0]
    assert " left | epoch 0." in lines[0]


def test_somebody_elses_printer_prints_as_it_likes(tmp_path, capsys):
    class Mine(PrinterCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            sys.stdout.write(f"{sorted(logs)}\n")

    args = arguments(tmp_path, gradient_accumulation_steps=4)
    trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows()))
    trainer.add_callback(Mine())
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(trainer.state.log_history)
    assert all("samples_seen" in ast.literal_eval(line) for line in lines)


# ---- The noise scale on every line ---------------------------------------------------------------------------------


def noise(value, lower, upper=math.inf):
    return NoiseScale(value, lower, upper, 1.0, 1.0, upper < math.inf, 4.0)


def test_the_last_finite_value_is_kept():
    assert noise_logs(None, None) == {}
    assert noise_logs(noise(math.inf, 5.0), None) == {"noise_scale_low": 5.0}
    assert noise_logs(noise(math.inf, 5.0), 20.0) == {"noise_scale": 20.0, "noise_scale_low": 5.0}
    assert noise_logs(noise(math.inf, 50.0), 20.0) == {"noise_scale": 50.0, "noise_scale_low": 50.0}
    assert noise_logs(noise(30.0, 20.0, 40.0), 20.0) == {
        "noise_scale": 30.0, "noise_scale_low": 20.0, "noise_scale_high": 40.0,
    }  # fmt: skip


def window(square):
    """A measured window of four micro-batches of 3 samples with a given square norm of its gradient."""
    return WindowStatistics(
        num_micro_batches=4, num_samples=12, num_items=12.0, individual_coefficient=4 / 3, mean_coefficient=1 / 3,
        squared_weight=0.25, weighted_square_norm=4.0, squared_weight_square_norm=1.0, gradient_square_norm=square,
    )  # fmt: skip


def test_a_tracker_keeps_it_over_a_checkpoint_and_reads_older_ones():
    tracker = NoiseScaleTracker(half_life=12.0)
    for _ in range(2):
        tracker.update(window(2.0))
    kept = tracker.last_value
    assert kept == tracker.estimate().value > 0
    for _ in range(6):
        tracker.update(window(0.5))  # less than its noise alone would give: |G|² comes out negative
    assert tracker.estimate().value == math.inf
    assert kept < tracker.last_value < math.inf or tracker.last_value == kept
    state = tracker.state_dict()
    other = NoiseScaleTracker(half_life=12.0)
    other.load_state_dict(state)
    assert other.last_value == tracker.last_value
    del state["last_value"]
    other.load_state_dict(state)
    assert other.last_value is None


def test_curves_of_a_run_have_no_gaps(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=4, num_train_epochs=6, eval_strategy="epoch")
    trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(), eval_dataset=Rows(6)))
    trainer.train()
    known = ["noise_scale" in entry for entry in trainer.state.log_history]
    assert all(known[known.index(True) :])
    assert known.index(True) < 8
