"""A failed try leaves no trace in the batch, whatever the user's code does to it."""

import numpy as np
import pytest
import torch
from helpers import arguments, quiet, tiny_gpt2
from transformers import BatchEncoding, Trainer

from hf_trainopt import EfficientTrainerMixin
from hf_trainopt.core.batch import copy_batch


def pop(inputs):
    inputs.pop("weight")
    return inputs


def pop_inside(inputs):
    inputs["extra"].pop("weight")
    return inputs


def replace(inputs):
    inputs["input_ids"] = (inputs["input_ids"] + 1) % 64
    return inputs


def in_place(inputs):
    inputs["input_ids"].add_(1).remainder_(64)
    return inputs


def clear(inputs):
    taken = dict(inputs)
    inputs.clear()
    return taken


CHANGES = {"pop": pop, "pop inside": pop_inside, "replace": replace, "in place": in_place, "clear": clear}


def make(folder, change, fails, batch, k):
    class Mine(Trainer):
        left = int(fails)

        def training_step(self, model, inputs, *args, **kwargs):
            return super().training_step(model, change(inputs), *args, **kwargs)

        def compute_loss(self, model, inputs, *args, **kwargs):
            inputs = {name: inputs[name] for name in ("input_ids", "labels")}
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if self.left and len(inputs["labels"]) == 4:
                self.left -= 1
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return loss

    def collate(samples):
        ids = torch.stack(list(samples))
        weight = torch.ones(len(samples))
        return {"input_ids": ids, "labels": ids.clone(), "weight": weight, "extra": {"weight": weight}}

    rows = torch.arange(8 * 12).reshape(8, 12) % 63
    args = arguments(
        folder, per_device_train_batch_size=batch, gradient_accumulation_steps=k, max_steps=1, auto_micro_batch=True,
        remove_unused_columns=False, accumulation_policy="fixed",
    )  # fmt: skip
    cls = type("Efficient", (EfficientTrainerMixin, Mine), {})
    return quiet(cls(model=tiny_gpt2(), args=args, train_dataset=list(rows), data_collator=collate))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_second_try_begins_with_the_same_batch(change, tmp_path):
    expected, found = make(tmp_path, change, False, 2, 4), make(tmp_path, change, True, 4, 2)
    expected.train()
    found.train()
    assert found.micro_batch_size == 2
    for one, other in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_copy_shares_nothing_that_can_be_changed():
    batch = BatchEncoding(
        {"ids": torch.ones(2), "array": np.ones(2), "rows": [torch.ones(1), {"a": torch.ones(1)}], "pair": (1, "text")}
    )
    made = copy_batch(batch)
    assert type(made) is BatchEncoding
    made["ids"].zero_()
    made["array"][:] = 0
    made["rows"][1]["a"].zero_()
    made["rows"].pop(0)
    assert batch["ids"].sum() == batch["array"].sum() == 2
    assert len(batch["rows"]) == 2
    assert batch["rows"][1]["a"] == 1
    assert made["pair"] == (1, "text")
