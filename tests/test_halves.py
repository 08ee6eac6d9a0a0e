"""At k = 1 on one device a micro-batch tells its noise by its halves, and every step trains on what it would have."""

import logging

import pytest
import torch
from helpers import Pictures, Recorder, Rows, arguments, quiet, tiny_gpt2, tiny_resnet, weights_equal
from transformers import (
    BambaConfig,
    BambaForCausalLM,
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
    assert trainer.rows[:2] == [4, 4]  # a micro-batch that does not fit is found at once
    assert trainer.rows.count(4) == 16 - trainer.rows.count(2) / 2  # the others run in halves
    assert trainer.rows.count(2) >= 2 * 7
    assert trainer.trainopt.accumulation.controller.tracker.num_windows >= 7
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


class Penalised(Counting):
    """A penalty of one's own on top of the loss, which the targets of the step don't divide."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs) + 0.01 * model.lm_head.weight.square().sum()


class Contrastive(Counting):
    """Rows are compared with each other."""

    def compute_loss(self, model, inputs, *args, num_items_in_batch=None, **kwargs):
        loss = super().compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)
        rows = model.transformer.wte(inputs["input_ids"]).mean(1)
        return loss + (rows @ rows.T).logsumexp(1).sum() / num_items_in_batch


def with_z_loss():
    config = BambaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, attn_layer_indices=[0], mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1,
        mamba_d_state=8, z_loss_coefficient=0.1,
    )  # fmt: skip
    return BambaForCausalLM(config)


TRIED = {
    "a penalty": lambda: {"cls": Penalised},
    "rows that meet": lambda: {"cls": Contrastive},
    "a loss that is added to the model's": lambda: {"model": with_z_loss()},
}


@pytest.mark.parametrize("name", TRIED)
def test_what_the_code_does_not_tell_is_tried(tmp_path, name, caplog):
    """A loss whose halves don't add up; the steps until then are those of a run that isn't measured."""
    trainer = measured(tmp_path, **TRIED[name]())
    assert can_halve(trainer)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "takes two micro-batches" in caplog.text
    assert trainer.trainopt.accumulation.controller.halves_work is False
    assert set(trainer.rows) <= {4, 2, 1}  # tries are of two rows
    assert trainer.sizes[:5] == [1, 1, 1, 2, 2]
    assert trainer.trainopt.accumulation.controller.tracker.num_windows > 2


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
    assert not trainer.trainopt.accumulation.controller.would_halve
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
    assert trainer.sizes[:5] == [1, 1, 1, 2, 2]
    assert trainer.trainopt.accumulation.controller.halves_work is False
    resumed = measured(tmp_path, cls=Drops, trainer={"data_collator": _packs})
    step = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))[2]
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert trainer.sizes[step:] == resumed.sizes  # it is still known
    assert weights_equal(trainer.model, resumed.model)


def test_a_short_micro_batch_at_the_end_of_an_epoch_changes_nothing(tmp_path):
    trainer = measured(tmp_path, dataset=Rows(21), num_train_epochs=3, noise_scale_interval=1)
    trainer.train()
    assert trainer.sizes == [1] * 18
    assert trainer.rows.count(1) == 3
    assert trainer.trainopt.accumulation.controller.halves_work


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
            if len(inputs["labels"]) > 1 and torch.is_grad_enabled():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return super().compute_loss(model, inputs, *args, **kwargs)

    recorder = Recorder()
    trainer = measured(tmp_path, cls=Short, auto_micro_batch=True, trainer={"callbacks": [recorder]})
    trainer.train()
    assert trainer.trainopt.out_of_memory.micro_batch_size == 1
    assert set(trainer.sizes) == {1}
    assert trainer.trainopt.accumulation.controller.tracker.num_windows >= 7
    whole = Recorder()
    measured(tmp_path, measure_noise_scale=False, noise_scale_interval=8, trainer={"callbacks": [whole]}).train()
    for found, expected in zip(recorder.gradients, whole.gradients, strict=True):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("rows", "sizes"), [(4, [2, 2]), (5, [3, 2]), (2, [1, 1])])
def test_halves_of_a_micro_batch(tmp_path, rows, sizes):
    found = in_halves(measured(tmp_path), {"labels": torch.arange(rows)}, 10)
    assert [len(piece.inputs["labels"]) for piece in found] == [piece.num_rows for piece in found] == sizes
    assert [piece.num_rows_of_micro_batch for piece in found] == [rows, rows]
    assert [piece.ends_micro_batch for piece in found] == [False, True]
    assert torch.cat([piece.inputs["labels"] for piece in found]).tolist() == list(range(rows))


_TOKENS = {"input_ids": torch.ones(4, 6, dtype=torch.long), "labels": torch.ones(4, 6, dtype=torch.long)}
WHOLE = {
    "one row": {name: value[:1] for name, value in _TOKENS.items()},
    "no tensors": {},
    "a tuple": tuple(_TOKENS.values()),
    "packed samples": _TOKENS | {"max_length_q": 6},
    "pictures among the text": _TOKENS | {"pixel_values": torch.zeros(4, 3, 8, 8)},
    "patches of all pictures": _TOKENS | {"image_grid_thw": torch.ones(4, 3, dtype=torch.long)},
    "positions of all rows": _TOKENS | {"position_ids": torch.arange(6)[None]},
    "a number": _TOKENS | {"attention_mask": torch.tensor(1)},
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_runs_whole(tmp_path, name):
    trainer = measured(tmp_path)
    assert len(in_halves(trainer, _TOKENS, 20)) == 2
    assert in_halves(trainer, WHOLE[name], 20) == []


def test_targets_must_be_counted_and_all_rows_of_a_mean_must_count(tmp_path):
    assert in_halves(measured(tmp_path), _TOKENS, None) == []
    trainer = measured(tmp_path, model=bert(), dataset=Sentences(64))
    batch = {"input_ids": torch.ones(4, 6, dtype=torch.long), "labels": torch.tensor([0, 1, 2, 1])}
    assert len(in_halves(trainer, batch, None)) == 2
    assert in_halves(trainer, batch | {"labels": torch.tensor([0, -100, 2, 1])}, None) == []


def test_windows_are_timed_where_all_are_measured(tmp_path):
    """Halves aren't timed: now and then a window runs whole, or the policy would never know what a step costs."""
    trainer = measured(tmp_path, accumulation_policy="goodput", noise_scale_interval=1, num_train_epochs=2)
    trainer.train()
    timer = trainer.trainopt.accumulation.controller.timer
    assert timer.micro_batch_seconds is not None
    assert timer.step_seconds is not None
    assert trainer.rows.count(2) > 4


def test_a_peak_is_measured_on_a_whole_micro_batch(tmp_path):
    """The second step of a run does run whole; of a resumed one it may not, and a later one is measured."""
    settings = {
        "max_steps": 24, "dataset": Rows(400), "checkpoint_placement": "all", "per_device_train_batch_size": 16,
    }  # fmt: skip
    trainer = measured(tmp_path / "run", save_strategy="steps", save_steps=4, **settings)
    trainer.train()
    resumed = measured(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    stock = measured(tmp_path / "stock", measure_noise_scale=False, noise_scale_interval=8, **settings)
    stock.train()
    expected = pytest.approx(stock.placement_plan.measured_peak_bytes, rel=0.01)
    assert trainer.placement_plan.measured_peak_bytes == expected
    assert resumed.placement_plan.measured_peak_bytes == expected


def test_a_plan_for_k_1_counts_the_gradients_of_the_first_half(tmp_path):
    trainer = measured(tmp_path, max_accumulation_steps=1)
    assert trainer.trainopt.accumulation.most_steps == 2
    trainer = measured(tmp_path, max_accumulation_steps=1, model=tiny_resnet(), dataset=Pictures(64))
    assert trainer.trainopt.accumulation.most_steps == 1


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
