"""All features off equals stock `Trainer` bit for bit; the windowed loop at constant k does too."""

import pytest
import torch
from helpers import Pictures, Recorder, Rows, Stream, arguments, quiet, tiny_gpt2, tiny_resnet, weights_equal
from transformers import Trainer, TrainingArguments

from hf_trainopt import EfficientTrainer, EfficientTrainingArguments


CLOCK_KEYS = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_tokens_per_second",
              "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")  # fmt: skip
OUR_KEYS = {"accumulation_steps", "effective_batch_size", "samples_seen", "noise_scale", "noise_scale_low",
            "noise_scale_high"}  # fmt: skip

# What makes the run: a task, and what is special about it. 50 rows are 17 micro-batches of 3: the last is short, and
# so is the last window for k = 3, 4.
TASKS = {
    "gpt2": (lambda: tiny_gpt2(dropout=0.1), Rows, {}),
    "gpt2, mean loss per micro-batch": (tiny_gpt2, Rows, {"average_tokens_across_devices": False}),
    "gpt2, label smoothing": (tiny_gpt2, Rows, {"label_smoothing_factor": 0.1}),
    # 12 micro-batches: where a stream runs dry within a window, stock takes no step and carries the gradients over.
    "gpt2, stream": (tiny_gpt2, lambda: Stream(36), {"max_steps": 11}),
    "gpt2, max_steps and drop_last": (tiny_gpt2, Rows, {"max_steps": 7, "dataloader_drop_last": True}),
    "gpt2, linear, sgd": (tiny_gpt2, Rows, {"optim": "sgd", "lr_scheduler_type": "linear", "max_grad_norm": 0.0}),
    "resnet": (tiny_resnet, Pictures, {"per_device_train_batch_size": 4, "remove_unused_columns": False}),
}


def run(task: str, k: int, output_dir, trainer_class=Trainer, args_class=TrainingArguments, **kwargs):
    make_model, dataset, extra = TASKS[task]
    args = arguments(
        output_dir, args_class, gradient_accumulation_steps=k, eval_strategy="steps", eval_steps=3,
        include_num_input_tokens_seen="non_padding" if "gpt2" in task else "no", **(extra | kwargs),
    )  # fmt: skip
    recorder = Recorder()
    eval_dataset = Rows(8) if "gpt2" in task else Pictures(8)
    trainer = quiet(
        trainer_class(
            model=make_model(), args=args, train_dataset=dataset(), eval_dataset=eval_dataset, callbacks=[recorder]
        )
    )
    trainer.train()
    return trainer, recorder


def assert_same(stock, ours, extra_keys: set[str]):
    (trainer, recorder), (our_trainer, our_recorder) = stock, ours
    assert weights_equal(trainer.model, our_trainer.model)
    assert recorder.learning_rates == our_recorder.learning_rates
    assert recorder.epochs == our_recorder.epochs
    assert recorder.steps == our_recorder.steps
    assert recorder.max_steps == our_recorder.max_steps
    assert recorder.substeps == our_recorder.substeps
    for stock_gradients, our_gradients in zip(recorder.gradients, our_recorder.gradients, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(stock_gradients, our_gradients, strict=True))
    history, our_history = trainer.state.log_history, our_trainer.state.log_history
    assert len(history) == len(our_history)
    for entry, our_entry in zip(history, our_history, strict=True):
        assert set(our_entry) - set(entry) <= extra_keys
        for key, value in entry.items():
            if key not in CLOCK_KEYS:
                assert our_entry[key] == value, key
    assert trainer.state.num_input_tokens_seen == our_trainer.state.num_input_tokens_seen
    assert trainer.state.total_flos == our_trainer.state.total_flos


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("task", TASKS)
def test_fixed_is_stock_to_the_bit(task, k, tmp_path):
    stock = run(task, k, tmp_path)
    ours = run(task, k, tmp_path, EfficientTrainer, EfficientTrainingArguments, accumulation_policy="fixed")
    assert ours[0].trainopt.accumulation.cursor is None
    assert_same(stock, ours, extra_keys=set())


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("task", TASKS)
def test_windows_at_constant_k_are_stock_to_the_bit(task, k, tmp_path):
    stock = run(task, k, tmp_path)
    ours = run(
        task, k, tmp_path, EfficientTrainer, EfficientTrainingArguments,
        accumulation_policy="ramp", accumulation_ramp=f"0:{k}",
    )  # fmt: skip
    assert ours[0].trainopt.accumulation.cursor is not None
    assert_same(stock, ours, extra_keys=OUR_KEYS)
    assert ours[1].accumulation_steps_seen == {k}


@pytest.mark.parametrize("task", ["gpt2", "resnet"])
def test_measuring_changes_nothing(task, tmp_path):
    stock = run(task, 3, tmp_path)
    ours = run(
        task, 3, tmp_path, EfficientTrainer, EfficientTrainingArguments, accumulation_policy="fixed",
        measure_noise_scale=True, noise_scale_interval=2,
    )  # fmt: skip
    assert_same(stock, ours, extra_keys=OUR_KEYS)
    assert ours[0].trainopt.accumulation.controller.tracker.num_windows >= 4
    assert "noise_scale_low" in ours[0].state.log_history[-1]


def test_a_second_train_call_is_stock_too(tmp_path):
    results = []
    for trainer_class, args_class, extra in (
        (Trainer, TrainingArguments, {}),
        (EfficientTrainer, EfficientTrainingArguments, {"accumulation_policy": "ramp", "accumulation_ramp": "0:4"}),
    ):
        args = arguments(tmp_path, args_class, gradient_accumulation_steps=4, **extra)
        trainer = quiet(trainer_class(model=tiny_gpt2(), args=args, train_dataset=Rows()))
        trainer.train()
        trainer.train()
        results.append(trainer)
    assert weights_equal(results[0].model, results[1].model)
