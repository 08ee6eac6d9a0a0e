"""Selective recomputation: saved outputs are used once, and random numbers stay those of the forward pass."""

import contextlib
import gc
import weakref

import pytest
import torch
from test_placement_apply import assert_same, build, train
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from hf_trainopt.placement.plan.plan import PlacementPlan, StageChoice
from hf_trainopt.placement.plan.stages import find_stages
from hf_trainopt.placement.recompute.apply import apply_placement
from hf_trainopt.placement.recompute.selective import COMPUTE_OPS, is_compute_op, is_random_op, selective_contexts


aten = torch.ops.aten


class Counter(TorchDispatchMode):
    """Counts calls of compute-bound operators."""

    def __init__(self, counted=is_compute_op):
        super().__init__()
        self.counted, self.count = counted, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += self.counted(func)
        return func(*args, **(kwargs or {}))


def selective(model: nn.Module, saved_ops) -> PlacementPlan:
    return PlacementPlan("x", {name: StageChoice("selective", tuple(saved_ops)) for name in find_stages(model)})


def operators_of(model: nn.Module, stage: str, call) -> list[str]:
    """Names of the compute-bound operators of one forward pass of a stage: the slow twin of the numbering."""
    names = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name.removeprefix("aten::") in COMPUTE_OPS:
                names.append(func._schema.name.removeprefix("aten::"))
            return func(*args, **(kwargs or {}))

    modes = []
    module = model.get_submodule(stage)

    def enter(*_):
        modes.append(Recorder())
        modes[0].__enter__()

    handles = [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(lambda *_: modes.pop().__exit__(None, None, None)),
    ]
    call()
    for handle in handles:
        handle.remove()
    return names


def test_compute_ops():
    assert all(hasattr(aten, name) for name in COMPUTE_OPS)
    for op in (aten.mm.default, aten.addmm.default, aten.convolution.default, aten.bmm.default):
        assert is_compute_op(op)
    assert is_compute_op(aten._scaled_dot_product_flash_attention.default)
    assert not is_compute_op(aten.mm.out)
    assert not is_compute_op(aten.add.Tensor)
    assert not is_compute_op(aten.convolution_backward.default)
    assert not is_compute_op(aten._scaled_dot_product_flash_attention_backward.default)
    assert is_random_op(aten.bernoulli_.float)
    assert is_random_op(aten.native_dropout.default)
    assert is_random_op(aten._scaled_dot_product_efficient_attention.default)
    assert not is_random_op(aten.mm.default)


def test_numbering_of_known_stages():
    gpt2 = build("gpt2")
    tokens = torch.zeros(2, 12, dtype=torch.long)
    names = operators_of(gpt2, "transformer.h.0", lambda: gpt2(input_ids=tokens, use_cache=False))
    # Attention with dropout on the CPU is two batched products (the kernel with dropout is for other devices).
    assert names == ["addmm", "bmm", "bmm", "addmm", "addmm", "addmm"]
    gpt2.eval()
    names = operators_of(gpt2, "transformer.h.0", lambda: gpt2(input_ids=tokens, use_cache=False))
    assert names == ["addmm", "_scaled_dot_product_flash_attention_for_cpu", "addmm", "addmm", "addmm"]


SAVED = [(0,), (1,), (2, 3), (0, 3, 4), (5,), (0, 1, 2, 3, 4, 5), (1, 2)]


@pytest.mark.parametrize("saved_ops", SAVED)
@pytest.mark.parametrize("autocast", [False, True])
def test_gpt2_is_bit_equal(saved_ops, autocast):
    model = build("gpt2")
    apply_placement(model, selective(model, saved_ops))
    assert_same(train(model, autocast=autocast), train(build("gpt2"), autocast=autocast))


@pytest.mark.parametrize("name", ["llama", "vit"])
@pytest.mark.parametrize("saved_ops", [(1, 2), (3,), (0, 4)])
def test_other_transformers_are_bit_equal(name, saved_ops):
    model = build(name)
    apply_placement(model, selective(model, saved_ops))
    assert_same(train(model), train(build(name)))


@pytest.mark.parametrize("saved_ops", [(0,), (1,)])
def test_convolutions_are_bit_equal(saved_ops):
    model = build("resnet")
    plan = selective(model, saved_ops)
    stages = {name: choice for name, choice in plan.stages.items() if name.startswith("layer")}
    apply_placement(model, PlacementPlan("x", stages))
    assert_same(train(model), train(build("resnet")))


@pytest.mark.parametrize(("saved_ops", "products"), [((), 6), ((0,), 5), ((0, 1, 2), 3), ((0, 1, 2, 3, 4), 1)])
def test_saved_operators_are_not_run_again(saved_ops, products):
    """Products in the backward pass: two for each product of the forward pass, and those that are recomputed."""
    model = build("gpt2")
    tokens = torch.arange(12)[None]

    def backward_products():
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        with Counter() as counter:
            loss.backward()
        return counter.count

    stock = backward_products()
    choice = StageChoice("selective", saved_ops)
    with apply_placement(model, PlacementPlan("x", {"transformer.h.1": choice})):
        assert backward_products() - stock == products


# A product and a draw from the generator in one operator, like attention with dropout on a GPU.
@torch.library.custom_op("hf_trainopt_test::noisy_product", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def noisy_product(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mask = (torch.rand(x.shape[0], weight.shape[1]) > 0.3).to(x.dtype)
    return (x @ weight) * mask, mask


@noisy_product.register_fake
def _(x, weight):
    out = x.new_empty(x.shape[0], weight.shape[1])
    return out, torch.empty_like(out)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx, gradient, _):
    x, weight, mask = ctx.saved_tensors
    gradient = gradient * mask
    return gradient @ weight.T, x.T @ gradient


noisy_product.register_autograd(_backward, setup_context=_setup)
NOISY = torch.ops.hf_trainopt_test.noisy_product.default


def noisy_stage(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """Random product, dropout, random product, two dropouts."""
    x = torch.tanh(noisy_product(x, weights[0])[0])
    x = F.dropout(x, 0.5)
    x = torch.tanh(noisy_product(x, weights[1])[0])
    return torch.sin(F.dropout(torch.cos(F.dropout(x, 0.5)), 0.5))


def noisy_gradients(context_fn) -> list[torch.Tensor]:
    torch.manual_seed(0)
    weights = [torch.randn(16, 16, requires_grad=True) for _ in range(2)]
    x = torch.randn(8, 16, requires_grad=True)
    if context_fn is None:
        out = noisy_stage(x, weights)
    else:
        out = checkpoint(noisy_stage, x, weights, use_reentrant=False, context_fn=context_fn)
    after = F.dropout(out, 0.5)
    after.square().sum().backward()
    return [after.detach(), x.grad, *(weight.grad for weight in weights), torch.get_rng_state()]


@pytest.mark.parametrize("op", [NOISY, aten.bernoulli_.float])
def test_random_operators_that_torch_caches_give_wrong_gradients(op):
    """Why PyTorch's contexts are not used: no error, and gradients of other dropout masks."""
    expected = noisy_gradients(None)
    found = noisy_gradients(lambda: create_selective_checkpoint_contexts([op], allow_cache_entry_mutation=True))
    assert torch.equal(found[0], expected[0])
    assert not torch.allclose(found[1], expected[1], rtol=0.1)


@pytest.mark.parametrize("saved_ops", [(0,), (1,), (0, 1), ()])
def test_random_operators_that_we_cache_give_right_gradients(saved_ops):
    def contexts():
        return selective_contexts(saved_ops, "noisy", counted=lambda func: func is NOISY)

    assert_same(noisy_gradients(contexts), noisy_gradients(None))


def test_generators_are_recorded_only_after_a_cached_draw():
    x, weights = torch.randn(8, 16), [torch.randn(16, 16)] * 2
    for saved_ops, recorded in (((0,), [1]), ((1,), [3]), ((0, 1), [1, 3]), ((), [])):
        storing, _ = selective_contexts(saved_ops, "noisy", counted=lambda func: func is NOISY)
        with storing:
            noisy_stage(x, weights)
        assert list(storing._cache.random_states) == recorded


class Stage(nn.Module):
    """Two products with something between them."""

    def __init__(self, between=torch.tanh):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.between = between

    def forward(self, x):
        return torch.sin(self.second(self.between(self.first(x))))


def place(stage: nn.Module, saved_ops) -> nn.Module:
    model = nn.Sequential(stage)
    apply_placement(model, PlacementPlan("x", {"0": StageChoice("selective", saved_ops)}))
    return model


def test_an_output_modified_in_place_is_an_error():
    with pytest.raises(RuntimeError, match=r"operator 0 \(aten\.addmm\.default\) of stage '0'.*leave 0 out"):
        place(Stage(lambda x: x.relu_()), (0,))(torch.randn(2, 4))
    place(Stage(lambda x: x.relu_()), (1,))(torch.randn(2, 4)).sum().backward()

    class Late(Stage):
        def forward(self, x):
            self.out = self.first(x)
            return torch.sin(self.second(torch.tanh(self.out)))

    model = place(Late(), (0,))
    loss = model(torch.randn(2, 4)).sum()
    with torch.no_grad():
        model[0].out.add_(1)
    with pytest.raises(RuntimeError, match=r"operator 0 .* modified in place"):
        loss.backward()


def test_a_product_modified_in_place_behind_an_unsafe_view_is_an_error():
    """`x @ weight` of three dimensions ends in `_unsafe_view`, whose output has a version counter of its own."""

    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            scores = x @ self.weight
            scores += 1
            return torch.sin(scores)

    x = torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match=r"operator 0 .* modified in place"):
        place(Scores(), (0,))(x)
    place(Scores(), ())(x).sum().backward()


def test_views_of_saved_outputs():
    """A recomputed view of a saved output must be a view again."""

    def between(x):
        left, right = x.view(2, 2, 2).unbind(1)
        return torch.cat([left * 2, right.exp()], 1)

    gradients = []
    for saved_ops in (None, (0,), (0, 1)):
        torch.manual_seed(0)
        model = nn.Sequential(Stage(between)) if saved_ops is None else place(Stage(between), saved_ops)
        model(torch.randn(2, 4)).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert_same(gradients[1], gradients[0])
    assert_same(gradients[2], gradients[0])


def test_other_operators_in_the_recomputation_are_an_error():
    storing, reusing = selective_contexts((0,), "stage")
    with storing:
        torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(RuntimeError, match=r"1 operators ran, and 0 now; choose"), reusing:
        pass
    with (
        pytest.raises(RuntimeError, match=r"operator 0 was aten\.mm\.default, and is aten\.bmm\.default now"),
        reusing,
    ):
        torch.bmm(torch.ones(1, 2, 2), torch.ones(1, 2, 2))
    with pytest.raises(RuntimeError, match=r"operator 1 was no more, and is aten\.mm\.default now"), reusing:
        torch.mm(torch.mm(torch.ones(2, 2), torch.ones(2, 2)), torch.ones(2, 2))
    with pytest.raises(RuntimeError, match=r"saved_ops of stage '0' names \[7\].*only 2"):
        place(Stage(), (0, 7))(torch.randn(2, 4))


def test_an_exception_in_the_forward_pass_is_not_hidden():
    def fail(_):
        raise FloatingPointError

    with pytest.raises(FloatingPointError):
        place(Stage(fail), (0, 7))(torch.randn(2, 4))


def test_saved_outputs_are_freed():
    """Each when it is used; all when the recomputation ends early; and with the graph."""
    x = torch.randn(2, 4)
    gc.collect()
    gc.disable()
    try:
        for saved_ops, ending in (((0,), "backward"), ((0, 1), "backward"), ((0, 1), "no backward")):
            caches = []
            with pytest.MonkeyPatch.context() as patch:
                original = selective_contexts

                def spy(*args, original=original, caches=caches):
                    contexts = original(*args)
                    caches.append(weakref.ref(contexts[0]._cache))
                    return contexts

                patch.setattr("hf_trainopt.placement.recompute.segments.selective_contexts", spy)
                loss = place(Stage(), saved_ops)(x).sum()
            assert sorted(caches[0]().outputs) == list(saved_ops)
            if ending == "backward":
                loss.backward(retain_graph=True)
                assert caches[0]().outputs == {}
            del loss
            assert caches[0]() is None
    finally:
        gc.enable()


def test_saved_outputs_are_freed_while_they_are_used():
    caches, left = [], []

    def between(x):
        left.append(sorted(caches[0]._cache.outputs))
        return torch.tanh(x)

    class EndsInProduct(Stage):
        def forward(self, x):
            return self.second(self.between(self.first(x)))

    with pytest.MonkeyPatch.context() as patch:

        def spy(*args):
            contexts = selective_contexts(*args)
            caches.append(contexts[0])
            return contexts

        patch.setattr("hf_trainopt.placement.recompute.segments.selective_contexts", spy)
        loss = place(EndsInProduct(between), (0, 1))(torch.randn(2, 4)).sum()
    loss.backward(retain_graph=True)
    assert left == [[0], [1]]  # in the forward pass, 1 is still to come; in the recomputation, 0 is used up
    assert caches[0]._cache.outputs == {}  # 1 was not used: the recomputation ends before it


def test_a_second_backward_pass_computes_everything():
    gradients, products = [], []
    for saved_ops in (None, (0, 1)):
        torch.manual_seed(0)
        stage = Stage(lambda x: F.dropout(torch.tanh(x), 0.4))
        model = nn.Sequential(stage) if saved_ops is None else place(stage, saved_ops)
        loss = model(torch.randn(2, 4)).sum()
        loss.backward(retain_graph=True)
        with Counter() as counter:
            loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        products.append(counter.count)
    assert_same(*gradients)
    assert products[1] == products[0] + 2


def test_the_state_after_a_backward_pass_is_the_one_before_it():
    model = build("gpt2")
    tokens = torch.arange(12)[None]
    with contextlib.ExitStack() as stack:
        stack.enter_context(apply_placement(model, selective(model, (1, 2))))
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        before = torch.get_rng_state()
        loss.backward()
    assert torch.equal(torch.get_rng_state(), before)
