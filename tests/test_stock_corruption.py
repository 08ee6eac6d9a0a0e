"""Documents what stock `Trainer` does when a callback changes k, and that ours does not do it."""

import pytest
from helpers import Rows, Sequence, arguments, quiet, tiny_gpt2
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_trainopt import EfficientTrainer


class Halve(TrainerCallback):
    """k from 4 to 2 after the first steps, the way users do it."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            args.gradient_accumulation_steps = 2


def spying(base):
    class Spy(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.seen = []

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.seen += inputs["input_ids"][:, 0].tolist()
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Spy


def test_stock_never_trains_on_some_samples(tmp_path):
    args = arguments(tmp_path, TrainingArguments, gradient_accumulation_steps=4, num_train_epochs=1)
    trainer = quiet(
        spying(Trainer)(model=tiny_gpt2(), args=args, train_dataset=Rows(numbered=True), callbacks=[Halve()])
    )
    trainer.train()
    assert len(set(trainer.seen)) < 50
    assert trainer.state.epoch < 1.0  # it ends early, and silently


@pytest.mark.parametrize("values", [[4, 4, 2], [4, 4, 8], [4, 1, 3]])
def test_ours_trains_on_all_of_them(tmp_path, values):
    args = arguments(tmp_path, gradient_accumulation_steps=4, num_train_epochs=1)
    trainer = quiet(
        spying(EfficientTrainer)(
            model=tiny_gpt2(), args=args, train_dataset=Rows(numbered=True), accumulation_policy=Sequence(values)
        )
    )
    trainer.train()
    assert sorted(trainer.seen) == list(range(50))
    assert trainer.state.epoch == 1.0
