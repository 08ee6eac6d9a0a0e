"""Set-ups that broke once: each test is named for what went wrong."""

import json

import pytest
import torch
from helpers import AnyK, Pictures, Recorder, Rows, Stream, arguments, quiet, tiny_gpt2, weights_equal
from transformers import (
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    get_linear_schedule_with_warmup,
)
from transformers.trainer_callback import ProgressCallback

from hf_trainopt import EfficientTrainer


def make(output_dir, stock: bool = False, k: int = 1, dataset=None, model=None, trainer=None, **kwargs):
    """A windowed run at constant k (`ramp`), or the same in stock."""
    trainer, kwargs = trainer or {}, {"gradient_accumulation_steps": 2} | kwargs
    if stock:
        cls, args = Trainer, arguments(output_dir, TrainingArguments, **kwargs)
    else:
        policy = {"accumulation_policy": "ramp", "accumulation_ramp": f"0:{k}"}
        if "accumulation_policy" in kwargs or "accumulation_policy" in trainer:
            policy = {}
        cls, args = EfficientTrainer, arguments(output_dir, **(policy | kwargs))
    return quiet(cls(model=model or tiny_gpt2(), args=args, train_dataset=dataset or Rows(), **trainer))


def last_checkpoint(folder):
    return str(max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])))


@pytest.mark.parametrize(
    ("before", "after"),
    [({"max_steps": 4}, {"max_steps": 8}), ({"num_train_epochs": 1}, {"num_train_epochs": 2})],
    ids=["max_steps", "num_train_epochs"],
)
def test_a_raised_budget_is_trained_on_resume(tmp_path, before, after):
    seen = []
    for stock in (True, False):
        folder = tmp_path / str(stock)
        make(folder, stock, save_strategy="steps", save_steps=2, **before).train()
        resumed = make(folder, stock, **after)
        resumed.train(resume_from_checkpoint=last_checkpoint(folder))
        seen.append(resumed.state.epoch)
    assert seen[0] == pytest.approx(seen[1])


def test_a_lowered_budget_stops_where_it_says(tmp_path):
    make(tmp_path, num_train_epochs=2, save_strategy="steps", save_steps=2).train()
    resumed = make(tmp_path, max_steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert resumed.trainopt.accumulation.cursor.micro_batches_passed == 16


def test_each_trial_of_a_search_has_its_own_reference(tmp_path):
    """What `hyperparameter_search` does: arguments change after `train` was entered."""

    class Trials(EfficientTrainer):
        def _hp_search_setup(self, trial):
            self.args.gradient_accumulation_steps, self.args.accumulation_ramp = self.asked
            self.create_accelerator_and_postprocess()

    args = arguments(tmp_path, accumulation_policy="ramp", accumulation_ramp="0:1", num_train_epochs=1)
    trainer = quiet(Trials(model=tiny_gpt2(), args=args, train_dataset=Rows(48)))
    for reference, ramp, steps in ((2, "0:2", 8), (8, "0:4", 4), (1, "0:1", 16)):
        trainer.asked = (reference, ramp)
        trainer.train()
        assert trainer.state.global_step == steps
        assert trainer.trainopt.accumulation.cursor.reference_steps == reference
        assert trainer.state.epoch == 1.0


def test_a_checkpoint_of_weights_only_finds_its_place(tmp_path):
    saving = {"save_only_model": True, "save_strategy": "steps", "save_steps": 1}
    make(tmp_path, gradient_accumulation_steps=4, **saving).train()
    resumed = make(tmp_path, gradient_accumulation_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert resumed.trainopt.accumulation._initial_samples_seen == 36
    assert resumed.state.log_history[-1]["samples_seen"] == 100


def test_a_lost_state_is_not_taken_for_stock(tmp_path):
    make(tmp_path, k=1, save_strategy="steps", save_steps=1).train()
    for name in ("trainopt_state.json", "checkpoint_manifest.json"):  # as if stock Trainer had written it
        (tmp_path / "checkpoint-4" / name).unlink()
    with pytest.raises(ValueError, match="its place in the data is unknown"):
        make(tmp_path, k=1).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_stream_that_ends_with_a_window_is_saved_and_evaluated(tmp_path, k):
    """10 micro-batches, three reference windows of 4: the last is short."""
    trainer = make(
        tmp_path, k=k, dataset=Stream(30), max_steps=3, gradient_accumulation_steps=4, save_strategy="steps",
        save_steps=100, eval_strategy="steps", eval_steps=100, trainer={"eval_dataset": Rows(6)},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == 10 // k
    assert (tmp_path / f"checkpoint-{10 // k}").is_dir()
    assert any("eval_loss" in entry for entry in trainer.state.log_history)


def test_no_interval_is_missed_where_a_stream_begins_again(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    make(tmp_path, dataset=Stream(30), max_steps=9, gradient_accumulation_steps=4, **saving).train()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 3


def test_parameters_may_be_frozen_while_training(tmp_path):
    class Freeze(TrainerCallback):
        def on_epoch_begin(self, args, state, control, model=None, **kwargs):
            model.transformer.wpe.requires_grad_(state.epoch is None or state.epoch < 1)

    args = arguments(tmp_path, accumulation_policy="noise_scale", noise_scale_interval=1)
    trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(), callbacks=[Freeze()]))
    trainer.train()
    assert trainer.trainopt.accumulation.controller.tracker.num_dropped == 0


def test_an_epoch_may_be_stopped_early(tmp_path):
    class StopFirst(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop |= state.global_step == 3

    results = []
    for stock in (True, False):
        recorder = Recorder()
        trainer = make(
            tmp_path, stock, gradient_accumulation_steps=1, num_train_epochs=3,
            trainer={"callbacks": [StopFirst(), recorder]},
        )  # fmt: skip
        trainer.train()
        results.append((trainer.state.global_step, recorder.epochs))
    assert results[0] == results[1]


def test_a_checkpoint_from_the_middle_of_a_step_loses_no_data(tmp_path):
    """`enable_jit_checkpoint` saves before the optimizer step."""

    class SaveBeforeStep(TrainerCallback):
        trainer = None

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 3:
                self.trainer._save_checkpoint(self.trainer.model, trial=None)
                control.should_training_stop = True

    results = []
    for stock in (True, False):
        callback, folder = SaveBeforeStep(), tmp_path / str(stock)
        trainer = make(folder, stock, gradient_accumulation_steps=1, trainer={"callbacks": [callback]})
        callback.trainer = trainer
        trainer.train()
        resumed = make(folder, stock, gradient_accumulation_steps=1)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
        results.append(resumed)
    assert results[0].state.global_step == results[1].state.global_step
    assert weights_equal(results[0].model, results[1].model)


def test_a_ramp_changes_where_it_says(tmp_path):
    trainer = make(
        tmp_path, dataset=Rows(48), num_train_epochs=1, gradient_accumulation_steps=4, accumulation_policy="ramp",
        accumulation_ramp="0:8,0.5:1",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 9
    assert trainer.state.log_history[-1]["accumulation_steps"] == 1


@pytest.mark.parametrize("across", [True, False])
def test_windows_without_a_single_target_are_dropped(tmp_path, across):
    class Masked(Rows):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            return row if index >= 9 else row | {"labels": torch.full_like(row["labels"], -100)}

    def loss(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"][:, :-1].reshape(-1, 64)
        total = torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum")
        return total / max(1.0, float(num_items_in_batch))

    args = arguments(
        tmp_path, accumulation_policy="noise_scale", noise_scale_interval=1, train_sampling_strategy="sequential",
        average_tokens_across_devices=across, num_train_epochs=1,
    )  # fmt: skip
    trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Masked(), compute_loss_func=loss))
    trainer.train()
    assert trainer.trainopt.accumulation.controller.tracker.num_dropped >= 1
    assert trainer.trainopt.accumulation.controller.tracker.num_windows >= 4


def test_stock_goes_on_from_a_measured_run_at_constant_k(tmp_path):
    measured = make(
        tmp_path, accumulation_policy="fixed", measure_noise_scale=True, save_strategy="steps", save_steps=2
    )
    measured.train()
    resumed = make(tmp_path, accumulation_policy="fixed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert weights_equal(measured.model, resumed.model)


class Classes(torch.utils.data.Dataset):
    """Token rows with a class each, or what `label` makes of their number."""

    def __init__(self, label=lambda index: torch.tensor(index % 3)):
        self.rows, self.label = Rows(48).rows, label

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index] % 32, "labels": self.label(index)}


LOSSES_OF_THEIR_OWN = {
    "own cross-entropy": (BertForSequenceClassification, {"num_labels": 3}, Classes()),
    "arguments not handed on": (LlamaForSequenceClassification, {"num_labels": 3, "pad_token_id": 0}, Classes()),
    "regression": (
        BertForSequenceClassification,
        {"num_labels": 1},
        Classes(lambda index: torch.tensor(float(index % 3))),
    ),
    "several labels": (
        LlamaForSequenceClassification,
        {"num_labels": 3, "pad_token_id": 0, "problem_type": "multi_label_classification"},
        Classes(lambda index: torch.arange(3) % (1.0 + index % 3)),
    ),
}


def classifier(cls, **config):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    still = (
        {} if cls is LlamaForSequenceClassification else {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    )
    return cls(cls.config_class(**sizes, intermediate_size=8, **still, **config))


@pytest.mark.parametrize("case", LOSSES_OF_THEIR_OWN)
def test_losses_that_ignore_the_items_do_not_grow_with_k(tmp_path, caplog, case):
    cls, config, data = LOSSES_OF_THEIR_OWN[case]
    args = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 4}

    def first_window(k):
        recorder = Recorder()
        args_of_run = arguments(tmp_path, **args, max_steps=2, learning_rate=0.0)
        trainer = AnyK(
            model=classifier(cls, **config), args=args_of_run, train_dataset=data, callbacks=[recorder], sequence=[k]
        )
        quiet(trainer).train()
        norm = torch.cat([gradient.flatten() for gradient in recorder.gradients[0]]).norm()
        return trainer.state.log_history[0]["loss"], norm.item()

    (loss, norm), (loss_of_8, norm_of_8) = first_window(2), first_window(8)
    assert "ignores num_items_in_batch" in caplog.text
    assert loss_of_8 == pytest.approx(loss, rel=0.3)
    assert norm_of_8 < 1.5 * norm
    stock = arguments(tmp_path, accumulation_policy="fixed")
    assert EfficientTrainer(model=classifier(cls, **config), args=stock, train_dataset=data).model_accepts_loss_kwargs


def test_a_problem_type_that_only_labels_tell_is_refused_at_once(tmp_path):
    class SeveralLabels(Pictures):
        def __getitem__(self, index):
            return {"pixel_values": self.pixels[index], "labels": torch.tensor([1.0, 0.0, 1.0])}

    def trainer(**problem):
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=16, num_labels=3, **problem))
        return quiet(EfficientTrainer(model=model, args=arguments(tmp_path), train_dataset=SeveralLabels()))

    with pytest.raises(ValueError, match=r"for multi_label_classification .* set `model.config.problem_type`"):
        trainer().train()
    trainer(problem_type="multi_label_classification").train()


def test_optimizers_that_step_inside_backward_are_refused(tmp_path):
    trainer = EfficientTrainer(model=tiny_gpt2(), args=arguments(tmp_path, optim="lomo"), train_dataset=Rows())
    with pytest.raises(ValueError, match="in the backward pass of every micro-batch"):
        trainer.train()


def test_a_loader_that_is_not_of_accelerate_after_one_that_is(tmp_path):
    """The loader of the first run is left at its end, in a state of the process that said "the data are over"."""

    class Plain(EfficientTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=3, collate_fn=self.data_collator)

    args = {"accumulation_policy": "ramp", "accumulation_ramp": "0:2", "num_train_epochs": 1}
    first = quiet(EfficientTrainer(model=tiny_gpt2(), args=arguments(tmp_path, **args), train_dataset=Rows(48)))
    first.train()
    second = quiet(Plain(model=tiny_gpt2(), args=arguments(tmp_path, **args), train_dataset=Rows(48)))
    second.train()
    assert [trainer.state.global_step for trainer in (first, second)] == [8, 8]


def test_a_schedule_of_the_users_goes_on_with_fixed_accumulation(tmp_path):
    model = tiny_gpt2()
    optimizer, recorder = torch.optim.AdamW(model.parameters(), lr=1e-2), Recorder()
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 10)
    trainer = make(
        tmp_path, model=model, max_steps=3, gradient_accumulation_steps=1,
        trainer={"optimizers": (optimizer, schedule), "callbacks": [recorder]},
    )  # fmt: skip
    trainer.train()
    trainer.args.accumulation_policy, trainer.args.accumulation_ramp = "fixed", None
    trainer.train()
    assert recorder.learning_rates == pytest.approx([1e-2 * (1 - step / 10) for step in range(6)])


def test_steps_that_a_callback_sets_are_not_ignored_without_a_word(tmp_path, caplog):
    class Sets(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            args.gradient_accumulation_steps = 8

    trainer = make(tmp_path, trainer={"callbacks": [Sets()]})
    trainer.train()
    assert caplog.text.count("gradient_accumulation_steps=8, set in the middle of training, is ignored") == 1
    assert trainer.args.gradient_accumulation_steps == 2


@pytest.mark.parametrize("policy", ["fixed", "goodput"])
def test_arguments_that_have_changed_count_when_a_run_is_resumed(tmp_path, policy, caplog):
    def trainer(k):
        settings = {"accumulation_policy": policy, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        return make(tmp_path, gradient_accumulation_steps=k, **settings)

    first = trainer(2)
    first.train()
    resumed = trainer(4)
    resumed.args.gradient_accumulation_steps = 2
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == first.state.global_step
    if policy != "fixed":  # where k varies the place in the data is counted in samples
        return
    other = trainer(2)
    other.args.gradient_accumulation_steps = 4
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "gradient_accumulation_steps is 4 (there 2)" in caplog.text


def test_resuming_a_finished_run_leaves_its_place(tmp_path):
    make(tmp_path, max_steps=4, save_strategy="steps", save_steps=2).train()
    checkpoint = last_checkpoint(tmp_path)
    again = make(tmp_path, max_steps=4)
    again.train(resume_from_checkpoint=checkpoint)
    place = json.loads((tmp_path / checkpoint / "trainopt_state.json").read_text())["parts"]["accumulation"]["cursor"]
    assert (
        (again.trainopt.accumulation.cursor.epoch, again.trainopt.accumulation.cursor.micro_batch)
        == (place["epoch"], place["micro_batch"])
        == (0, 8)
    )


def test_ignoring_the_data_skip_begins_the_epoch_again(tmp_path):
    class Spy(AnyK):
        seen = ()

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.seen += tuple(inputs["input_ids"][:, 0].tolist())
            return super().compute_loss(model, inputs, *args, **kwargs)

    def run(**kwargs):
        args = arguments(
            tmp_path, gradient_accumulation_steps=2, train_sampling_strategy="sequential", save_strategy="steps",
            save_steps=3, **kwargs,
        )  # fmt: skip
        return quiet(Spy(model=tiny_gpt2(), args=args, train_dataset=Rows(48, numbered=True), sequence=[2]))

    run().train()
    resumed = run(ignore_data_skip=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.seen[:48] == tuple(range(48))


def test_infinite_wishes_are_clamped(tmp_path):
    trainer = make(tmp_path, trainer={"accumulation_policy": lambda observation: float("inf")})
    trainer.train()
    assert trainer.state.log_history[0]["accumulation_steps"] == 32


def test_a_progress_bar_that_is_added_later_goes_by_the_data(tmp_path):
    trainer = make(tmp_path)
    trainer.add_callback(ProgressCallback)
    bar = next(callback for callback in trainer.callback_handler.callbacks if type(callback) is ProgressCallback)
    totals = []
    begin = bar.on_train_begin

    def on_train_begin(args, state, control, **kwargs):
        totals.append(state.max_steps)
        return begin(args, state, control, **kwargs)

    bar.on_train_begin = on_train_begin
    trainer.train()
    assert totals == [trainer.trainopt.accumulation.cursor.budget_micro_batches]
