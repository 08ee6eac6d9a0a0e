"""Frames: gradients as without them, whatever is done with the graph, and nothing left behind."""

import gc

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from hf_trainopt.placement.recompute.frame import Frame, _Holder


def layers(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    # tanh and softmax save what they return, linear what it gets, gelu both ends of a chain.
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.GELU(), nn.Softmax(-1), nn.Tanh())


def framed(function, *inputs):
    with Frame("layer", function, inputs).storing():
        return function(*inputs)


def inputs() -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(model, x, call) -> list[torch.Tensor]:
    model.zero_grad()
    call(model, x).square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def stock(model, x):
    return checkpoint(model, x, use_reentrant=False)


@pytest.mark.parametrize("other", [lambda model, x: model(x), stock], ids=["plain", "torch's checkpoint"])
def test_gradients_are_those_of_no_frame_and_of_torchs_checkpoint(other):
    found = gradients(layers(), inputs(), framed)
    assert all(map(torch.equal, found, gradients(layers(), inputs(), other)))


def test_a_retained_graph_is_recomputed_again():
    model, x = layers(), inputs()
    calls = []

    def function(x):
        calls.append(1)
        return model(x)

    loss = framed(function, x).square().sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * first)
    assert len(calls) == 3


def test_second_derivatives():
    def second(call):
        model, x = layers(), inputs()
        (first,) = torch.autograd.grad(call(model, x).square().sum(), x, create_graph=True)
        first.square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    assert all(map(torch.equal, second(framed), second(lambda model, x: model(x))))


def test_gradients_that_are_computed_in_the_forward_pass():
    """As models of forces do it: an energy's gradient is part of the output."""

    def force(model, x):
        def function(x):
            energy = model(x).square().sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]

        return framed(function, x) if framing else function(x)

    framing = True
    found = gradients(layers(), inputs(), force)
    framing = False
    assert all(map(torch.equal, found, gradients(layers(), inputs(), force)))


def test_only_what_is_still_needed_is_computed():
    """The recomputation ends with the last tensor that somebody waits for."""
    ran = []

    def function(x):
        ran.append("first")
        x = x.tanh()
        x = x.tanh()
        ran.append("second")
        return x * 2  # saves nothing

    framed(function, inputs()).sum().backward()
    assert ran == ["first", "second", "first"]


def test_inputs_go_through_hooks_of_the_user():
    with save_on_cpu():
        found = gradients(layers(), inputs(), framed)
    assert all(map(torch.equal, found, gradients(layers(), inputs(), lambda model, x: model(x))))


def test_an_input_that_was_modified_is_an_error():
    x = torch.ones(4, 6)
    model = layers()
    loss = framed(model, x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("change", ["fewer", "another shape", "another type"])
def test_a_recomputation_that_differs_is_an_error(change):
    again = []

    def function(x):
        if again and change == "fewer":
            return x
        if again and change == "another shape":
            x = torch.cat([x, x])
        if again and change == "another type":
            x = x.double()
        again.append(1)
        return x.exp().exp()

    loss = framed(function, inputs()).sum()
    with pytest.raises(RuntimeError, match=r"stage 'layer' differs from its forward pass.*recompute='none'"):
        loss.backward()


def test_a_tensor_that_no_gradient_needs_is_freed_with_its_place_in_the_graph():
    """A frozen layer's input is saved, and nobody asks for it."""
    found = []
    gc.collect()
    before = sum(type(thing) is _Holder for thing in gc.get_objects())  # of other tests

    def note(*_):
        found.append(sum(type(thing) is _Holder and thing.tensor is not None for thing in gc.get_objects()) - before)

    class Frozen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            note()
            return gradient * 2

    def function(x):
        return Frozen.apply(Frozen.apply(x.exp()).exp())

    x = inputs()
    x.register_hook(note)
    framed(function, x).sum().backward()
    # The second exp asks first. When the first Frozen comes, its own input and that of the first exp are there.
    assert found == [0, 2, 0]
    gc.collect()
    assert sum(type(thing) is _Holder for thing in gc.get_objects()) == before


def test_nothing_is_left_of_frames():
    def alive():
        return sum(type(thing) is Frame for thing in gc.get_objects())

    model, x = layers(), inputs()
    gc.collect()
    gc.disable()
    try:
        before = alive()
        for _ in range(3):
            framed(model, framed(model, x)).sum().backward()
        framed(model, x)  # without a backward pass
        assert alive() == before
    finally:
        gc.enable()
