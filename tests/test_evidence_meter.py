"""The clock, samples and tokens: whatever the model is called with and whatever runs between steps."""

import copy
import pickle
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import AnyK, Pictures, Rows, Stream, arguments, quiet, tiny_gpt2, tiny_resnet, weights_equal
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_utils import default_compute_objective

from hf_trainopt import EfficientTrainer
from hf_trainopt.metrics import MemoryCallback, TargetCallback, ThroughputCallback
from hf_trainopt.metrics.meter import TrainingMeter, count_inputs, is_compiled


def stock(tmp_path, callbacks=(), model=None, train_dataset=None, **kwargs):
    args = arguments(tmp_path, TrainingArguments, **({"gradient_accumulation_steps": 2} | kwargs))
    trainer = Trainer(
        model=model or tiny_gpt2(),
        args=args,
        train_dataset=train_dataset or Rows(),
        eval_dataset=Rows(6),
        callbacks=list(callbacks),
    )
    return quiet(trainer)


def trained(*args, resume=None, **kwargs):
    trainer = stock(*args, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def lines(trainer, key):
    return [line for line in trainer.state.log_history if key in line]


class Sleeper(TrainerCallback):
    """Wastes time in one event."""

    def __init__(self, event: str, seconds: float):
        setattr(self, event, lambda *args, **kwargs: time.sleep(seconds))


# ---- What is counted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((), {"input_ids": torch.zeros(3, 7, dtype=torch.long)}, (3, 21)),
        ((), {"input_ids": torch.zeros(9, dtype=torch.long)}, (9, 9)),  # packed into one dimension
        ((), {"input_ids": torch.zeros(2, 4, 5, dtype=torch.long)}, (2, 40)),  # multiple choice
        ((), {"input_ids": None, "inputs_embeds": torch.zeros(2, 5, 8)}, (2, 10)),
        ((), {"num_items_in_batch": torch.tensor(3), "pixel_values": torch.zeros(4, 3, 8, 8)}, (4, 0)),
        ((), {"pixel_values": torch.zeros(11, 6), "input_ids": torch.zeros(2, 7, dtype=torch.long)}, (2, 14)),
        ((torch.zeros(5, 3),), {}, (5, 0)),
        (({"pixels": torch.zeros(6, 3)},), {}, (6, 0)),
        ((), {"text": "nothing"}, (0, 0)),
    ],
)
def test_samples_and_tokens_of_a_call(args, kwargs, expected):
    assert count_inputs(args, kwargs) == expected


@pytest.mark.parametrize(
    ("data", "kwargs"),
    [
        (Rows(50), {}),  # 17 micro-batches: short last batch, short last window
        (Rows(50), {"dataloader_drop_last": True}),
        (Stream(50), {"max_steps": 12}),  # no length; two micro-batches are carried over the epoch's end
    ],
)
def test_stock_samples_are_those_that_the_model_saw(tmp_path, data, kwargs):
    seen = []

    class Watched(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if model.training:
                seen.append(inputs["input_ids"].shape)
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = arguments(tmp_path, TrainingArguments, gradient_accumulation_steps=2, **kwargs)
    trainer = quiet(Watched(model=tiny_gpt2(), args=args, train_dataset=data, callbacks=[ThroughputCallback()]))
    trainer.train()
    last = trainer.state.log_history[-1]
    assert last["samples_seen"] == sum(shape[0] for shape in seen)
    meter = trainer.callback_handler.callbacks[1].meter
    assert meter.reading.tokens == sum(shape[0] * shape[1] for shape in seen)


def test_images_have_samples_and_no_tokens(tmp_path):
    trainer = trained(tmp_path, [ThroughputCallback()], tiny_resnet(), Pictures(20), remove_unused_columns=False)
    last = trainer.state.log_history[-1]
    assert last["samples_seen"] == 40
    assert last["samples_per_second"] > 0
    assert "tokens_per_second" not in last


def test_a_model_called_with_positions_counts(tmp_path):
    class Positional(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(inputs["input_ids"], labels=inputs["labels"])
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    args = arguments(tmp_path, TrainingArguments)
    trainer = quiet(Positional(model=tiny_gpt2(), args=args, train_dataset=Rows(), callbacks=[ThroughputCallback()]))
    trainer.train()
    assert trainer.state.log_history[-1]["samples_seen"] == 100


def test_adapters_count_once(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not a dependency")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    trainer = trained(tmp_path, [ThroughputCallback()], peft.get_peft_model(tiny_gpt2(), config))
    assert trainer.state.log_history[-1]["samples_seen"] == 100


@pytest.mark.parametrize("sequence", [[1, 2, 1, 3, 5], [2]])
def test_samples_under_varying_k_are_those_of_the_trainer(tmp_path, sequence):
    args = arguments(tmp_path, measurements="throughput", gradient_accumulation_steps=2, eval_strategy="epoch")
    trainer = AnyK(model=tiny_gpt2(), args=args, train_dataset=Rows(), eval_dataset=Rows(6), sequence=sequence)
    quiet(trainer).train()
    (callback,) = (c for c in trainer.measurements if isinstance(c, ThroughputCallback))
    assert callback.meter.reading.samples == trainer.trainopt.accumulation.cursor.samples_seen == 100


def test_compiled_models_are_left_alone():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    args = SimpleNamespace(torch_compile=False)
    assert not is_compiled(args, model)
    assert is_compiled(SimpleNamespace(torch_compile=True), model)
    assert is_compiled(args, torch.compile(model))
    model[0].compile()
    assert is_compiled(args, model)
    meter = TrainingMeter()
    meter.begin(args, model, None)
    assert not model._forward_pre_hooks
    assert meter.reading.samples is None


# ---- What the clock leaves out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["on_prediction_step", "on_save", "on_predict"])
def test_evaluations_predictions_and_saves_take_no_time(tmp_path, event):
    class Predicts(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if event == "on_predict":
                trainer.predict(Rows(3))

    # Before ours: the time is over when ours hears of it.
    callbacks = [Predicts(), Sleeper(event, 0.05), ThroughputCallback()]
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
    trainer = stock(tmp_path, callbacks, **settings)
    trainer.train()
    assert 0 < trainer.state.log_history[-1]["train_time_s"] < trainer.state.log_history[-1]["train_runtime"] - 0.09


def test_data_loading_takes_time(tmp_path):
    class Slow(Rows):
        def __getitem__(self, index):
            time.sleep(0.01)
            return super().__getitem__(index)

    trainer = trained(tmp_path, [ThroughputCallback()], train_dataset=Slow(12), max_steps=2)
    assert trainer.state.log_history[-1]["train_time_s"] > 0.12


def test_data_that_a_resumed_run_passes_over_take_none():
    meter = TrainingMeter()
    args, model = SimpleNamespace(torch_compile=False), torch.nn.Linear(1, 1)
    meter.begin(args, model, {"seconds": 3.0, "samples": 7, "tokens": 0})
    time.sleep(0.05)
    meter.step_begin()
    meter.lap(SimpleNamespace(world_size=1, device=torch.device("cpu")), TrainerControl(should_log=True))
    assert meter.reading.seconds < 3.05
    assert meter.reading.samples == 7


def test_evaluation_before_training_and_at_its_start(tmp_path):
    trainer = stock(tmp_path, [ThroughputCallback(), TargetCallback("loss", 1.0)], eval_on_start=True, max_steps=2)
    assert not {"train_time_s", "samples_seen", "target_reached"} & trainer.evaluate().keys()
    trainer.train()
    (first,) = lines(trainer, "eval_loss")
    assert (first["train_time_s"], first["samples_seen"], first["step"]) == (0.0, 0, 0)
    seconds = trainer.state.log_history[-1]["train_time_s"]
    time.sleep(0.05)
    trainer.evaluate()
    assert trainer.state.log_history[-1]["train_time_s"] == seconds
    assert trainer.state.log_history[-1]["samples_seen"] == 12


# ---- Rates ----------------------------------------------------------------------------------------------------------


def test_rates_are_counts_over_seconds(tmp_path):
    trainer = trained(tmp_path, [ThroughputCallback(warmup_steps=1)], logging_steps=2)
    history = lines(trainer, "train_time_s")
    before, after = history[1:3]
    seconds = after["train_time_s"] - before["train_time_s"]
    assert after["samples_per_second"] == pytest.approx((after["samples_seen"] - before["samples_seen"]) / seconds)
    assert after["tokens_per_second"] == pytest.approx(12 * after["samples_per_second"])
    assert "samples_per_second" in history[0]  # from the end of step 1 to that of step 2


def test_warm_up_is_left_out(tmp_path):
    class SlowStart(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            time.sleep(0.3 if state.global_step < 2 else 0)

    trainer = trained(tmp_path, [SlowStart(), ThroughputCallback()])
    first, second, third = lines(trainer, "loss")[:3]
    assert "samples_per_second" not in first.keys() | second.keys()
    assert third["samples_per_second"] > 20
    assert trainer.state.log_history[-1]["samples_per_second"] > 20
    assert trainer.state.log_history[-1]["train_time_s"] > 0.6


def test_without_warm_up_the_first_line_has_rates(tmp_path):
    trainer = trained(tmp_path, [ThroughputCallback(warmup_steps=0)])
    assert "samples_per_second" in lines(trainer, "loss")[0]
    assert "samples_per_second" in trainer.state.log_history[-1]


def test_negative_warm_up_is_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        ThroughputCallback(warmup_steps=-1)


# ---- Runs that follow on each other ---------------------------------------------------------------------------------


def test_a_second_run_begins_at_zero(tmp_path):
    trainer = stock(tmp_path, [ThroughputCallback()], num_train_epochs=1)
    for _ in range(2):
        trainer.train()
        assert trainer.state.log_history[-1]["samples_seen"] == 50
        assert trainer.state.log_history[-1]["train_time_s"] < trainer.state.log_history[-1]["train_runtime"]
    assert not trainer.model._forward_pre_hooks


@pytest.mark.parametrize("restores", [False, True])
def test_a_resumed_run_counts_on(tmp_path, restores):
    callbacks = [ThroughputCallback(), MemoryCallback()]
    whole = trained(tmp_path / "a", callbacks, save_strategy="steps", save_steps=4)
    at_save = next(line for line in whole.state.log_history if line["step"] == 4)
    again = trained(
        tmp_path / "b", [ThroughputCallback(), MemoryCallback()], resume=str(tmp_path / "a" / "checkpoint-4"),
        restore_callback_states_from_checkpoint=restores,
    )  # fmt: skip
    steps = {line["step"]: line["samples_seen"] for line in lines(whole, "loss")}
    assert {line["step"]: line["samples_seen"] for line in lines(again, "loss")} == steps
    after = [line for line in again.state.log_history if line["step"] > 4]
    assert after[0]["train_time_s"] > at_save["train_time_s"]
    assert after[0]["peak_memory_forward_backward_gib"] > 0
    assert "samples_per_second" not in after[1]  # warm-up again
    assert "samples_per_second" in after[2]


def test_a_checkpoint_without_our_entries_is_said_and_nothing_is_invented(tmp_path, caplog):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4}
    trained(tmp_path / "a", **settings)
    callbacks = [ThroughputCallback(), TargetCallback("loss", 100.0)]
    trainer = trained(tmp_path / "b", callbacks, resume=str(tmp_path / "a" / "checkpoint-4"), **settings)
    assert "count from step 4 on" in caplog.text
    last = trainer.state.log_history[-1]
    assert last["train_time_s"] > 0
    assert last["steps_to_target"] == 2  # its log still tells
    assert not {"samples_seen", "samples_to_target", "time_to_target_s"} & last.keys()
    assert (tmp_path / "b" / "checkpoint-8").exists()  # saving works though the entries were missing


@pytest.mark.parametrize("trainer_class", [Trainer, EfficientTrainer])
def test_an_exception_leaves_nothing_behind(tmp_path, trainer_class):
    class Fails(TrainerCallback):
        on = True

        def on_substep_end(self, *args, **kwargs):
            if self.on:
                raise RuntimeError("out of memory")

    fails = Fails()
    if trainer_class is Trainer:
        trainer = stock(tmp_path, [ThroughputCallback(), MemoryCallback(), fails])
    else:
        args = arguments(tmp_path, measurements="throughput,memory", gradient_accumulation_steps=2)
        trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(), callbacks=[fails]))
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()  # within the step in which FLOPs are counted
    if trainer_class is Trainer:
        for callback in trainer.callback_handler.callbacks[1:3]:
            callback.close()
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert not trainer.model._forward_pre_hooks
    fails.on = False
    trainer.train()
    assert trainer.state.log_history[-1]["samples_seen"] == 100
    assert "flops_per_second" in trainer.state.log_history[-1]


def test_the_model_can_be_copied_and_pickled_while_it_is_counted():
    model, meter = torch.nn.Linear(2, 2), TrainingMeter()
    meter.begin(SimpleNamespace(torch_compile=False), model, None)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.train()(torch.zeros(3, 2))
    assert meter.local == (0, 0)
    model.train()(torch.zeros(3, 2))
    model.eval()(torch.zeros(3, 2))
    with torch.no_grad():
        model.train()(torch.zeros(3, 2))
    assert meter.local == (3, 0)


# ---- Log lines ------------------------------------------------------------------------------------------------------


class Logs(TrainerCallback):
    """A user's line in each step (at its end it would take back that a line of `Trainer` is due)."""

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.log({"mine": 1.0})


def test_lines_of_users_have_the_values_too_and_disturb_no_rates(tmp_path):
    mine = Logs()
    trainer = stock(tmp_path, [ThroughputCallback(), mine], logging_steps=4)
    mine.trainer = trainer
    trainer.train()
    assert [line["samples_seen"] for line in lines(trainer, "mine")[:3]] == [0, 6, 12]
    first, second = lines(trainer, "loss")[:2]
    rate = (second["samples_seen"] - first["samples_seen"]) / (second["train_time_s"] - first["train_time_s"])
    assert second["samples_per_second"] == pytest.approx(rate)


def test_several_ranks_are_never_waited_for_in_log(monkeypatch):
    """`values` reads what was agreed on at the end of a step: users log on one rank."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *a, **k: pytest.fail("a collective in `log`"))
    args = SimpleNamespace(world_size=2, device=torch.device("cpu"), torch_compile=False, n_gpu=0)
    state = SimpleNamespace(global_step=3, log_history=[], stateful_callbacks={}, max_steps=9)
    for callback in (ThroughputCallback(), MemoryCallback(), TargetCallback("loss", 1.0)):
        callback.begin(
            args, state, {"meter": {"seconds": 2.0, "samples": 6, "tokens": 0}}, model=torch.nn.Linear(1, 1)
        )
        if not isinstance(callback, MemoryCallback):
            callback.meter.local = callback.meter._local_at_lap = (5, 0)
        for logs in ({"mine": 1}, {"loss": 1.0}, {"eval_loss": 1.0}):
            values = callback.values(args, state, logs)
            assert values.get("samples_seen", 6) == 6
        callback.close()


def test_what_evaluate_returns_is_stock(tmp_path):
    """The objective of a hyperparameter search is the sum of all that is in it."""
    callbacks = [ThroughputCallback(), MemoryCallback(), TargetCallback("loss", 3.0)]
    trainer = trained(tmp_path, callbacks, num_train_epochs=1)
    metrics = trainer.evaluate()
    assert metrics.keys() == trained(tmp_path, num_train_epochs=1).evaluate().keys()
    assert default_compute_objective(dict(metrics)) == metrics["eval_loss"]
    assert "train_time_s" in trainer.state.log_history[-1]


@pytest.mark.parametrize("kwargs", [{}, {"gradient_accumulation_steps": 4, "bf16": True}])
def test_training_is_bit_equal_to_training_without(tmp_path, kwargs):
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", **kwargs}
    plain = trained(tmp_path / "a", model=tiny_gpt2(dropout=0.1), **settings)
    callbacks = [ThroughputCallback(), MemoryCallback(), TargetCallback("loss", 3.0)]
    measured = trained(tmp_path / "b", callbacks, tiny_gpt2(dropout=0.1), **settings)
    assert weights_equal(plain.model, measured.model)
    for a, b in zip(plain.state.log_history, measured.state.log_history, strict=True):
        times = {key for key in a if "runtime" in key or "per_second" in key}
        assert {key: a[key] for key in a.keys() - times} == {key: b[key] for key in a.keys() - times}
