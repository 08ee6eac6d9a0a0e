"""Hooks report exactly what each backward pass adds to `.grad`."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hf_trainopt.accumulation.gradient_norms import MicroBatchNorms, gradient_square_norm


CPU = torch.device("cpu")


class Tied(torch.nn.Module):
    """A weight that is used twice, one that is frozen and one that is not used at all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(6, 6)
        self.second = torch.nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen = torch.nn.Linear(6, 6).requires_grad_(False)
        self.unused = torch.nn.Linear(6, 6)

    def forward(self, x):
        return self.frozen(self.second(torch.tanh(self.first(x)))).square().mean()


def norm_by_itself(model, x) -> float:
    gradients = torch.autograd.grad(model(x), [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return sum(g.double().square().sum().item() for g in gradients if g is not None)


def test_norms_equal_autograd_one_micro_batch_at_a_time():
    model = Tied()
    batches = [torch.randn(5, 6) * (i + 1) for i in range(3)]
    norms = MicroBatchNorms(model, CPU)
    with norms:
        for batch in batches:
            model(batch).backward()
            norms.end_micro_batch()
    assert norms.finish() == pytest.approx([norm_by_itself(model, batch) for batch in batches], rel=1e-6)
    total = sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None)
    assert gradient_square_norm(model.parameters(), CPU) == pytest.approx(total, rel=1e-6)


def test_hooks_are_gone_outside():
    model = Tied()
    norms = MicroBatchNorms(model, CPU)
    with norms:
        pass
    assert not any(p._backward_hooks for p in model.parameters())
    model(torch.randn(2, 6)).backward()
    assert norms.finish() == []


def test_hooks_are_gone_after_an_error():
    model = Tied()
    with pytest.raises(RuntimeError, match="out of memory"), MicroBatchNorms(model, CPU):
        raise RuntimeError("out of memory")
    assert not any(p._backward_hooks for p in model.parameters())


def test_sparse_gradients():
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    norms = MicroBatchNorms(embedding, CPU)
    index = torch.tensor([1, 1, 4])
    with norms:
        embedding(index).square().sum().backward()
        norms.end_micro_batch()
    dense = embedding.weight.grad.to_dense()
    assert norms.finish() == pytest.approx([dense.square().sum().item()])
    assert gradient_square_norm(embedding.parameters(), CPU) == pytest.approx(dense.square().sum().item())


def test_squares_of_half_precision_gradients_do_not_overflow():
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
    norms = MicroBatchNorms(torch.nn.ParameterList([parameter]), CPU)
    with norms:
        (parameter * 300.0).sum().backward()
        norms.end_micro_batch()
    assert norms.finish() == pytest.approx([4 * 300.0**2])
    assert gradient_square_norm([parameter], CPU) == pytest.approx(4 * 300.0**2)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    """Re-entrant checkpointing reports a tied weight in pieces: NaN, never a wrong number."""
    model = Tied()
    x = torch.randn(5, 6, requires_grad=True)
    norms = MicroBatchNorms(model, CPU)
    with norms:
        hidden = checkpoint(model.first, x, use_reentrant=use_reentrant)
        hidden = checkpoint(model.second, torch.tanh(hidden), use_reentrant=use_reentrant)
        model.frozen(hidden).square().mean().backward()
        norms.end_micro_batch()
    (found,) = norms.finish()
    if use_reentrant:
        assert found != found
    else:
        assert found == pytest.approx(norm_by_itself(model, x), rel=1e-6)


def test_no_gradient_at_all():
    norms = MicroBatchNorms(torch.nn.Linear(1, 1), CPU)
    with norms:
        norms.end_micro_batch()
    assert norms.finish() != norms.finish()  # NaN
    assert gradient_square_norm([torch.nn.Parameter(torch.zeros(1))], CPU) == 0.0


def test_parameters_may_be_frozen_and_unfrozen_between_windows():
    model, batch = Tied(), torch.randn(5, 6)
    norms = MicroBatchNorms(model, CPU)
    for parameter, trained in ((model.first.weight, True), (model.first.weight, False), (model.first.weight, True)):
        parameter.requires_grad_(trained)
        model.zero_grad()
        with norms:
            model(batch).backward()
            norms.end_micro_batch()
        assert norms.finish() == pytest.approx([norm_by_itself(model, batch)], rel=1e-6)
        assert norms.accumulated_square_norm() == pytest.approx(norms.finish()[0], rel=1e-6)
