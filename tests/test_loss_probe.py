"""Losses of the user's whose code does not tell whether they are divided by the items of the step."""

import functools
import logging

import pytest
import torch
from helpers import AnyK, Recorder, Rows, arguments, quiet, tiny_gpt2, weights_equal
from torch.nn.functional import cross_entropy
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

from hf_trainopt import EfficientTrainer
from hf_trainopt.accumulation.loss_probe import divides_by_items, is_in_doubt


def mean(logits, labels, vocab_size=None, **kwargs):
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def mean_that_hands_on(logits, labels, vocab_size=None, **kwargs):
    return mean(logits, labels, **kwargs)  # which drops them


def by_items(logits, labels, vocab_size=None, num_items_in_batch=None, **kwargs):
    total = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch if num_items_in_batch is not None else mean(logits, labels)


class MeanObject:
    def __call__(self, logits, labels, vocab_size=None, **kwargs):
        return mean(logits, labels)


class OwnClass(GPT2LMHeadModel):
    """Takes what `Trainer` hands on, and drops it."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        out = super().forward(input_ids=input_ids)
        return {"loss": mean(out.logits, labels), "logits": out.logits}


def with_function(function):
    model = tiny_gpt2(dropout=0.1)
    model.loss_function = function
    return model


def own_class():
    model = OwnClass(tiny_gpt2().config)
    model.loss_type = "ForCausalLM"
    return model


MEANS = {
    "function": lambda: with_function(mean),
    "hands on": lambda: with_function(mean_that_hands_on),
    "partial": lambda: with_function(functools.partial(mean)),
    "object": lambda: with_function(MeanObject()),
    "class": own_class,
}


def make(folder, model, k=4, cls=AnyK, **kwargs):
    extra = {"sequence": [k]} if issubclass(cls, AnyK) else {}
    settings = {"gradient_accumulation_steps": 4, "max_steps": 2, "max_grad_norm": 0.0}
    return quiet(cls(model=model, args=arguments(folder, **settings), train_dataset=Rows(), **extra, **kwargs))


def first_norm(trainer):
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    return torch.cat([gradient.flatten() for gradient in recorder.gradients[0]]).norm().item()


@pytest.mark.parametrize("model", MEANS.values(), ids=MEANS)
def test_means_do_not_grow_with_k(model, tmp_path, caplog):
    norms = [first_norm(make(tmp_path, model(), k)) for k in (1, 4)]
    assert norms[1] < 1.5 * norms[0]
    assert caplog.text.count("ignores num_items_in_batch") == 2


class OwnMean(AnyK):
    """The loss of the model, as most users take it."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class OfSuper(AnyK):
    """Leaves out `num_items_in_batch` on the way."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("cls", [OwnMean, OfSuper])
def test_means_of_ones_own_do_not_grow_with_k(cls, tmp_path, caplog):
    trainers = [make(tmp_path, tiny_gpt2(), k, cls=cls) for k in (1, 4)]
    norms = [first_norm(trainer) for trainer in trainers]
    assert norms[1] < 1.5 * norms[0]
    assert caplog.text.count(f"{cls.__name__}.compute_loss ignores num_items_in_batch") == 2
    said = tiny_gpt2()
    said.accepts_loss_kwargs = False
    assert norms[1] == first_norm(make(tmp_path, said, 4))


def test_a_mean_of_ones_own_is_stock_under_fixed(tmp_path):
    class Fixed(EfficientTrainer):
        compute_loss = OwnMean.compute_loss

    class Stock(Trainer):
        compute_loss = OwnMean.compute_loss

    settings = {"gradient_accumulation_steps": 4, "max_steps": 2}
    ours = quiet(
        Fixed(tiny_gpt2(), arguments(tmp_path, accumulation_policy="fixed", **settings), train_dataset=Rows())
    )
    stock = quiet(Stock(tiny_gpt2(), arguments(tmp_path, TrainingArguments, **settings), train_dataset=Rows()))
    ours.train()
    stock.train()
    assert weights_equal(ours.model, stock.model)


def test_a_function_that_divides_stays_as_it_is(tmp_path, caplog):
    own = make(tmp_path, with_function(by_items))
    own.train()
    stock = make(tmp_path, tiny_gpt2(dropout=0.1))
    stock.train()
    assert own.model_accepts_loss_kwargs
    assert "ignores num_items_in_batch" not in caplog.text
    for one, other in zip(own.model.parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


class Callable:
    """No function, so that there is no code to read."""

    def __init__(self, divides):
        self.divides = divides

    def __call__(self, outputs, labels, num_items_in_batch=None):
        return (by_items if self.divides else mean)(outputs["logits"], labels, num_items_in_batch=num_items_in_batch)


@pytest.mark.parametrize("divides", [True, False])
def test_a_compute_loss_func_that_is_no_function(divides, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        make(tmp_path, tiny_gpt2(), compute_loss_func=Callable(divides)).train()
    assert ("whatever num_items_in_batch is" in caplog.text) is not divides


class Counts(AnyK):
    """What `compute_loss` keeps on the trainer."""

    calls = 0

    def compute_loss(self, *args, **kwargs):
        self.calls += 1
        return super().compute_loss(*args, **kwargs)


def test_trying_leaves_no_trace(tmp_path):
    """Generators, counters and weights are those of a run that tries nothing."""
    trainer = Counts(
        model=with_function(by_items), args=arguments(tmp_path, gradient_accumulation_steps=4, max_steps=2),
        train_dataset=Rows(), sequence=[4],
    )  # fmt: skip
    quiet(trainer).train()
    assert trainer.calls == 8
    args = arguments(tmp_path, TrainingArguments, gradient_accumulation_steps=4, max_steps=2)
    stock = quiet(Trainer(model=with_function(by_items), args=args, train_dataset=Rows()))
    stock.train()
    assert weights_equal(trainer.model, stock.model)


def test_what_is_not_in_doubt(tmp_path):
    assert not is_in_doubt(make(tmp_path, tiny_gpt2()))
    assert is_in_doubt(make(tmp_path, with_function(mean)))
    said = with_function(mean)
    said.accepts_loss_kwargs = False
    assert not is_in_doubt(make(tmp_path, said))

    class Own(EfficientTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            raise AssertionError

    assert not is_in_doubt(make(tmp_path, with_function(mean), cls=Own))


def test_a_loss_that_cannot_be_tried_is_left_alone(tmp_path):
    trainer = make(tmp_path, with_function(mean))
    assert divides_by_items(trainer, trainer.model, {"nothing": torch.ones(2)}, 3) is None
    assert divides_by_items(trainer, trainer.model, [torch.ones(2)], 3) is None


def test_a_resumed_run_tries_it_again(tmp_path):
    """Or gradients would grow with k from there on."""

    def run(folder, resume=None):
        args = arguments(
            folder, gradient_accumulation_steps=4, max_steps=3, max_grad_norm=0.0, save_strategy="steps", save_steps=1
        )
        trainer = quiet(AnyK(model=with_function(mean), args=args, train_dataset=Rows(), sequence=[4]))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path)
    resumed = run(tmp_path / "resumed", str(tmp_path / "checkpoint-2"))
    assert not resumed.model_accepts_loss_kwargs
    assert weights_equal(resumed.model, whole.model)


class Jitters:
    """A mean whose last digits are others each time, as kernels with atomic additions make them."""

    def __init__(self):
        self.calls = 0

    def __call__(self, logits, labels, vocab_size=None, **kwargs):
        self.calls += 1
        return mean(logits, labels) * (1 + 1e-5 * self.calls)


class Counter(OwnClass):
    """Its buffer is no running statistic that anybody knows of."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, input_ids=None, labels=None, **kwargs):
        if self.training:
            self.passes += 1
        return super().forward(input_ids=input_ids, labels=labels, **kwargs)


def test_a_mean_is_told_although_its_last_digits_differ(tmp_path, caplog):
    trainer = make(tmp_path, with_function(Jitters()))
    trainer.train()
    assert not trainer.model_accepts_loss_kwargs
    assert "ignores num_items_in_batch" in caplog.text


def test_buffers_of_any_kind_are_put_back(tmp_path):
    model = Counter(tiny_gpt2().config)
    trainer = quiet(
        AnyK(model=model, args=arguments(tmp_path, gradient_accumulation_steps=2, max_steps=1), train_dataset=Rows(),
             sequence=[2])
    )  # fmt: skip
    trainer.train()
    assert model.passes == 2


def test_two_rows_are_tried_first(tmp_path):
    sizes = []

    def loss(logits, labels, vocab_size=None, **kwargs):
        sizes.append(len(labels))
        return mean(logits, labels)

    trainer = make(tmp_path, with_function(loss), k=1)
    trainer.train()
    assert sizes[:3] == [2, 2, trainer.args.per_device_train_batch_size]
