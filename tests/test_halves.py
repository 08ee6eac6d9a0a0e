"""At k = 1 on one device a micro-batch tells its noise by its halves, and every step trains on what it would have."""

import logging

import pytest
import torch
from helpers import Pictures, Recorder, Rows, arguments, quiet, tiny_gpt2, tiny_resnet, weights_equal
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from hf_trainopt import EfficientTrainer
from hf_trainopt.accumulation.halves import can_halve, in_halves


class Counting(EfficientTrainer):
    """Records the micro-batches of each window, and the rows of what runs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sizes, self.rows = [], []

    def training_step(self, model, inputs, *args, **kwargs):
        self.sizes.append(len(inputs))
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.rows.append(len(inputs["labels"]))
        return super().compute_loss(model, inputs, *args, **kwargs)


def measured(tmp_path, cls=Counting, model=None, dataset=None, trainer=None, **kwargs):
    """A run at k = 1 in which every second window is measured."""
    settings = {
        "accumulation_policy": "fixed", "gradient_accumulation_steps": 1, "measure_noise_scale": True,
        "noise_scale_interval": 2, "num_train_epochs": 1, "per_device_train_batch_size": 4,
    }  # fmt: skip
    return quiet(
        cls(
            model=model or tiny_gpt2(dtype=torch.float64),
            args=arguments(tmp_path, **(settings | kwargs)),
            train_dataset=dataset or Rows(64),
            **(trainer or {}),
        )
    )


def vit():
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config).double()


def bert():
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config).double()


class Sentences(Rows):
    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": index % 3}


class DoublePictures(Pictures):
    def __getitem__(self, index):
        row = super().__getitem__(index)
        return row | {"pixel_values": row["pixel_values"].double()}


MODELS = {
    "language model": (lambda: tiny_gpt2(dtype=torch.float64), lambda: Rows(64)),
    "ViT": (vit, lambda: DoublePictures(64)),
    "BERT": (bert, lambda: Sentences(64)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_measured_run_at_k_1_takes_the_steps_of_one_that_is_not_measured(tmp_path, name):
    make_model, make_data = MODELS[name]
    halved, whole = Recorder(), Recorder()
    runs = []
    for settings, recorder in (({}, halved), ({"measure_noise_scale": False, "noise_scale_interval": 8}, whole)):
        torch.manual_seed(0)
        model, callbacks = make_model(), {"callbacks": [recorder]}
        runs.append(measured(tmp_path, model=model, dataset=make_data(), trainer=callbacks, **settings))
        runs[-1].train()
    trainer, stock = runs
    assert trainer.sizes == [1] * 16
    assert trainer.rows.count(4) == 16 - trainer.rows.count(2) / 2  # the others run in halves
    assert trainer.rows.count(2) >= 2 * 8
    assert trainer.trainopt.accumulation.controller.tracker.num_windows >= 8
    for found, expected in zip(halved.gradients, whole.gradients, strict=True):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    assert halved.learning_rates == whole.learning_rates
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(stock.state.log_history[-1]["train_loss"])


def test_adaptive_k_stays_at_1_where_it_is_measured(tmp_path):
    trainer = measured(tmp_path, accumulation_policy="goodput", optimizer_step_cost=0.0, num_train_epochs=4)
    trainer.train()
    assert set(trainer.sizes) == {1}
    assert trainer.trainopt.accumulation.controller.tracker.num_windows > 16


def _own_loss(outputs, labels, num_items_in_batch=None):
    loss = torch.nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), reduction="sum")
    return loss / num_items_in_batch


class OwnLoss(Counting):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.rows.append(len(inputs["labels"]))
        outputs = model(**inputs)
        loss = outputs.loss * (1 if num_items_in_batch is None else 1.0)
        return (loss, outputs) if return_outputs else loss


def with_norm():
    model = tiny_gpt2()
    model.transformer.norm = torch.nn.BatchNorm1d(16, track_running_stats=False)
    model.transformer.wte.register_forward_hook(
        lambda _, inputs, output: model.transformer.norm(output.transpose(1, 2)).transpose(1, 2)
    )
    return model


def routed():
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, output_router_logits=True,
    )  # fmt: skip
    return MixtralForCausalLM(config)


class Mean(GPT2LMHeadModel):
    """The mean over tokens, as it says of itself."""

    accepts_loss_kwargs = False


CANNOT = {
    "BatchNorm in a classifier": lambda: {"model": tiny_resnet(), "dataset": Pictures(64)},
    "BatchNorm in a language model": lambda: {"model": with_norm()},
    "loss of a router": lambda: {"model": routed()},
    "a mean that isn't known to be over rows": lambda: {"model": Mean(tiny_gpt2().config)},
    "one row": lambda: {"per_device_train_batch_size": 1, "dataset": Rows(16)},
    "compute_loss_func": lambda: {"trainer": {"compute_loss_func": _own_loss}},
    "compute_loss of one's own": lambda: {"cls": OwnLoss},
}


@pytest.mark.parametrize("name", CANNOT)
def test_where_halves_would_train_something_else_a_probe_takes_two_micro_batches(tmp_path, name, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = measured(tmp_path, **CANNOT[name]())
    assert "takes two" in caplog.text
    trainer.train()
    assert not trainer.trainopt.accumulation.controller.halves
    assert max(trainer.sizes) == 2
    assert len(set(trainer.rows)) == 1  # whole micro-batches
    assert trainer.trainopt.accumulation.controller.tracker.num_windows > 2


def test_no_warning_where_halves_are_measured(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert can_halve(measured(tmp_path))
    assert "takes two" not in caplog.text


def test_compiled_models_and_losses_in_doubt_are_not_halved(tmp_path):
    trainer = measured(tmp_path)
    trainer.model = torch.compile(trainer.model)
    assert not can_halve(trainer)

    class Unknown(type(tiny_gpt2())):
        def forward(self, *args, num_items_in_batch=None, **kwargs):
            return super().forward(*args, **kwargs)

    Unknown.__module__ = "users"
    assert not can_halve(measured(tmp_path, model=Unknown(tiny_gpt2().config)))


class Packed(Rows):
    """Rows with what a collator of padding-free batches adds: the micro-batch has no rows to split."""

    def __getitem__(self, index):
        return super().__getitem__(index) | {"max_length_q": 12}


def _packs(features):
    batch = {name: torch.stack([feature[name] for feature in features]) for name in ("input_ids", "labels")}
    return batch | {"max_length_q": 12}


class Drops(Counting):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, {k: v for k, v in inputs.items() if k != "max_length_q"}, *args, **kwargs)


def test_micro_batches_that_cannot_be_split_are_measured_by_probes_from_then_on(tmp_path):
    trainer = measured(tmp_path, cls=Drops, trainer={"data_collator": _packs}, save_strategy="steps", save_steps=3)
    assert can_halve(trainer)
    trainer.train()
    assert trainer.sizes[:3] == [1, 2, 2]
    assert not trainer.trainopt.accumulation.controller.halves
    resumed = measured(tmp_path, cls=Drops, trainer={"data_collator": _packs})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.sizes[4:] == resumed.sizes  # it is still known
    assert weights_equal(trainer.model, resumed.model)


def test_a_short_micro_batch_at_the_end_of_an_epoch_changes_nothing(tmp_path):
    trainer = measured(tmp_path, dataset=Rows(21), num_train_epochs=3, noise_scale_interval=1)
    trainer.train()
    assert trainer.sizes == [1] * 18
    assert trainer.rows.count(1) == 3
    assert trainer.trainopt.accumulation.controller.halves


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path):
    settings = {"accumulation_policy": "goodput", "optimizer_step_cost": 0.01, "num_train_epochs": 3}
    trainer = measured(tmp_path, save_strategy="steps", save_steps=7, **settings)
    trainer.train()
    resumed = measured(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-14"))
    assert weights_equal(trainer.model, resumed.model)
    assert resumed.trainopt.accumulation.controller.noise == trainer.trainopt.accumulation.controller.noise


def test_auto_micro_batch_goes_on_from_halves(tmp_path):
    """A window whose halves don't fit is repeated with single rows."""

    class Short(Counting):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if len(inputs["labels"]) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return super().compute_loss(model, inputs, *args, **kwargs)

    recorder = Recorder()
    trainer = measured(tmp_path, cls=Short, auto_micro_batch=True, trainer={"callbacks": [recorder]})
    trainer.train()
    assert trainer.trainopt.out_of_memory.micro_batch_size == 1
    assert set(trainer.sizes) == {1}
    assert trainer.trainopt.accumulation.controller.tracker.num_windows >= 8
    whole = Recorder()
    measured(tmp_path, measure_noise_scale=False, noise_scale_interval=8, trainer={"callbacks": [whole]}).train()
    for found, expected in zip(recorder.gradients, whole.gradients, strict=True):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("rows", "sizes"), [(4, [2, 2]), (5, [3, 2]), (2, [1, 1])])
def test_halves_of_a_micro_batch(rows, sizes):
    found = in_halves({"labels": torch.arange(rows)})
    assert [len(piece.inputs["labels"]) for piece in found] == [piece.num_rows for piece in found] == sizes
    assert [piece.num_rows_of_micro_batch for piece in found] == [rows, rows]
    assert [piece.ends_micro_batch for piece in found] == [False, True]
    assert torch.cat([piece.inputs["labels"] for piece in found]).tolist() == list(range(rows))


@pytest.mark.parametrize(
    "batch",
    [{"labels": torch.arange(1)}, {"max_length_q": 3, "labels": torch.arange(4)}, {}],
)
def test_what_has_no_halves(batch):
    assert in_halves(batch) == []


def test_a_window_that_is_left_out_is_timed_later():
    from hf_trainopt.accumulation.timing import StepTimer

    timer = StepTimer(interval=4)
    seconds = []
    for index in range(14):
        timer.start_window()
        seconds.append(timer._timed)
        if index == 4:
            timer.leave_out_window()
        timer.step_done()
    assert [index for index, timed in enumerate(seconds) if timed] == [4, 5, 8, 12]
