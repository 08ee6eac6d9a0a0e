"""The chunked loss that nobody has asked for leaves logits usable; only an explicit `memory_rewrites` insists."""

import copy
import logging

import numpy as np
import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from helpers import Rows, arguments, quiet, tiny_gpt2
from torch.nn import functional as F

from hf_trainopt import EfficientTrainer
from hf_trainopt.placement import apply_placement
from hf_trainopt.placement.plan.plan import PlacementPlan, Rewrites
from hf_trainopt.placement.rewrite.deferred_logits import DeferredLogits, LogitsNotComputedError


CHUNKED = PlacementPlan("mine", {}, Rewrites(chunked_loss=True))


def batch():
    rows = [Rows(length=12)[index] for index in range(3)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


USES = {
    "method": lambda logits: logits.argmax(-1),
    "slice": lambda logits: logits[..., :-1, :],
    "operator": lambda logits: 2 - logits * 2,
    "function": lambda logits: torch.softmax(logits, -1),
    "loss": lambda logits: F.cross_entropy(logits.flatten(0, 1), torch.zeros(36, dtype=torch.long)),
    "in a list": lambda logits: torch.stack([logits]),
    "keyword": lambda logits: torch.argmax(input=logits, dim=-1),
    "comparison": lambda logits: logits == logits.amax(),
    "length": lambda logits: torch.tensor(len(logits)),
    "iteration": lambda logits: next(iter(logits)),
    "array": lambda logits: torch.as_tensor(np.asarray(logits.detach())),
    "size": lambda logits: torch.tensor(logits.size()),
    "shape": lambda logits: torch.tensor(logits.shape),
    "float": lambda logits: logits.contiguous().float().sum(),
    "in place": lambda logits: logits.clone().div_(2.0),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_logits_that_are_used_are_those_of_the_model(use, caplog):
    model = tiny_gpt2().train()
    expected = use(model(**batch()).logits)
    with apply_placement(model, CHUNKED), caplog.at_level(logging.WARNING):
        for _ in range(2):
            outputs = model(**batch())
            assert isinstance(outputs.logits, DeferredLogits)
            assert torch.equal(use(outputs.logits), expected)
    assert caplog.text.count("in a training step") <= 1  # the shape alone needs none


def test_gradients_flow_through_logits_that_are_used():
    def gradients(model):
        model.zero_grad()
        outputs = model(**batch())
        (outputs.loss + 0.1 * outputs.logits.square().mean()).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model = tiny_gpt2().train()
    expected = gradients(model)
    with apply_placement(model, CHUNKED):
        found = gradients(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_under_autocast_they_are_computed_as_the_model_does():
    """After the model's forward pass, that is outside its autocast context; converted to fp32 as Accelerate does."""
    model = tiny_gpt2().train()

    @convert_outputs_to_fp32
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(**kwargs):
        return model(**kwargs)

    expected = forward(**batch()).logits
    with apply_placement(model, CHUNKED):
        logits = forward(**batch()).logits
        assert isinstance(logits, DeferredLogits)  # looking for its type has not computed it
        assert logits.dtype == expected.dtype == torch.float32
        assert torch.equal(logits + 0, expected)


def test_outputs_can_be_asked_for_protocols():
    model = tiny_gpt2().train()
    with apply_placement(model, CHUNKED):
        logits = model(**batch()).logits
    assert not hasattr(logits, "__cuda_array_interface__")
    assert copy.copy(logits).shape == logits.shape
    assert "not computed" in repr(logits)


class LooksNowAndThen(EfficientTrainer):
    """Accuracy of each third step, which no replay of one step shows."""

    accuracies: list

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if self.state.global_step and self.state.global_step % 3 == 0:
            hits = outputs.logits[:, :-1].argmax(-1) == inputs["labels"][:, 1:]
            self.accuracies.append(hits.float().mean().item())
        return (loss, outputs) if return_outputs else loss


def run(folder, **kwargs):
    CHUNKED.save(folder / "plan.json")
    trainer = quiet(
        LooksNowAndThen(
            model=tiny_gpt2(),
            args=arguments(folder, accumulation_policy="fixed", max_steps=7, **kwargs),
            train_dataset=Rows(),
        )
    )
    trainer.accuracies = []
    trainer.train()
    return trainer


def test_a_run_that_looks_at_logits_now_and_then(tmp_path, caplog):
    plain = run(tmp_path)
    with caplog.at_level(logging.WARNING):
        planned = run(tmp_path, checkpoint_placement=str(tmp_path / "plan.json"))
    assert planned.placement_plan.rewrites.chunked_loss
    assert planned.accuracies == pytest.approx(plain.accuracies)
    assert len(planned.accuracies) == 2
    assert caplog.text.count("The chunked loss hasn't computed them") == 1


def test_who_asks_for_the_chunked_loss_is_told(tmp_path):
    with pytest.raises(LogitsNotComputedError, match="materialize"):
        run(tmp_path, checkpoint_placement="all", memory_rewrites="chunked_loss")
