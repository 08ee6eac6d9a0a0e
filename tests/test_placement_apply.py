"""A placement changes what is stored, and nothing else: every figure is bit for bit that of the model without it."""

import contextlib
import copy
import gc
import pickle
import random
import sys
import types
import weakref

import numpy as np
import pytest
import timm
import torch
import torch.distributed
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_trainopt.core.versions import ACTIVATION_CHECKPOINTING
from hf_trainopt.placement.plan.plan import FULL, STORE, PlacementPlan, Rewrites, StageChoice
from hf_trainopt.placement.plan.stages import find_stages
from hf_trainopt.placement.recompute.apply import apply_placement
from hf_trainopt.placement.recompute.batchnorm import SMALL_BUFFER, BufferKeeper
from hf_trainopt.placement.recompute.regions import ForwardOverride, activation_modules


def gpt2(**options) -> nn.Module:
    config = GPT2Config(
        n_layer=4, n_embd=32, n_head=2, vocab_size=97, n_positions=64, bos_token_id=0, eos_token_id=0, **options
    )
    config.loss_type = "ForCausalLM"
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=97,
        attention_dropout=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def resnet() -> nn.Module:
    return timm.create_model("resnet10t", num_classes=5, drop_path_rate=0.2, drop_rate=0.1)


def evonorm() -> nn.Module:
    """BatchNorm with a cumulative average, and a norm whose buffer is not of a BatchNorm class."""
    from timm.layers import EvoNorm2dB0

    def block():
        return nn.Sequential(
            nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3, momentum=None), nn.GELU(), nn.Dropout(0.1), EvoNorm2dB0(3)
        )

    return nn.Sequential(block(), block(), block(), block(), nn.Flatten(), nn.Linear(3 * 32 * 32, 5))


def spectral() -> nn.Module:
    """The output depends on the buffers that the forward pass changes: recomputing from the new ones is wrong."""

    def block():
        return nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(48, 48)), nn.Tanh(), nn.BatchNorm1d(48), nn.Dropout(0.2)
        )

    return nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(3072, 48)), block(), block(), block(), nn.Linear(48, 5))


def vit() -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=4,
        num_heads=2,
        num_classes=5,
        drop_rate=0.1,
        proj_drop_rate=0.1,
        attn_drop_rate=0.1,
        drop_path_rate=0.2,
    )


MODELS = {f.__name__: f for f in (gpt2, llama, resnet, evonorm, spectral, vit)}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().train()


def loss_of(model: nn.Module, step: int, autocast: bool = False) -> torch.Tensor:
    """Loss of one batch: token rows with padding for language models, pictures for the others."""
    generator = torch.Generator().manual_seed(step)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if hasattr(getattr(model, "module", model), "config"):
            tokens = torch.randint(0, 97, (2, 12), generator=generator)
            mask = torch.ones_like(tokens)
            mask[1, 9:] = 0
            return model(input_ids=tokens, attention_mask=mask, labels=tokens, use_cache=False).loss
        pixels = torch.randn(4, 3, 32, 32, generator=generator)
        return F.cross_entropy(model(pixels), torch.tensor([0, 1, 2, 3]))


def train(model: nn.Module, steps: int = 3, autocast: bool = False, micro_batches: int = 1) -> list[torch.Tensor]:
    """Return losses, gradients, buffers, parameters and the state of the generator of each step."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    record: list[torch.Tensor] = []
    for step in range(steps):
        losses = [loss_of(model, step * micro_batches + i, autocast) for i in range(micro_batches)]
        for loss in losses:  # all forward passes before the first backward pass
            loss.backward()
        record += [loss.detach().clone() for loss in losses]
        record += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        record += [buffer.clone() for buffer in model.buffers()]
        optimizer.step()
        optimizer.zero_grad()
        record += [p.detach().clone() for p in model.parameters()]
        record.append(torch.get_rng_state())
    return record


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    assert [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if not torch.equal(a, b)] == []


def plan_of(model: nn.Module, kind: str) -> PlacementPlan:
    names = find_stages(model)
    if isinstance(model, nn.Sequential):
        names = [name for name, child in model.named_children() if list(child.children())]
    assert len(names) >= 2
    choices = dict.fromkeys(names, STORE)
    for index, name in enumerate(names):
        if kind == "all" or (kind == "every_2" and index % 2 == 0):
            choices[name] = FULL
        elif kind.startswith("run"):
            choices[name] = StageChoice("full", run=index // int(kind[-1]))
        elif kind == "activation":
            choices[name] = StageChoice("activation")
        elif kind == "selective":
            choices[name] = StageChoice("selective", (0,))
        elif kind == "mixed":
            mixed = (FULL, StageChoice("activation"), StageChoice("full", run=1), StageChoice("full", run=1))
            choices[name] = mixed[index] if index < 4 else STORE
    return PlacementPlan(kind, choices)


KINDS = ("all", "every_2", "run_2", "run_3", "activation", "selective", "mixed")


@pytest.fixture(scope="module")
def stock():
    """Records of models without a placement, each made once."""
    records = {}

    def get(name: str, **options) -> list[torch.Tensor]:
        key = (name, *sorted(options.items()))
        if key not in records:
            records[key] = train(build(name), **options)
        return records[key]

    return get


@contextlib.contextmanager
def count_recomputations(model: nn.Module, names: list[str]):
    """Count calls of the first child of each stage that has children."""
    counts = dict.fromkeys((name for name in names if list(model.get_submodule(name).children())), 0)
    handles = []

    def hook_of(name):
        def hook(*_):
            counts[name] += 1

        return hook

    for name in counts:
        first = next(model.get_submodule(name).children())
        handles.append(first.register_forward_pre_hook(hook_of(name)))
    yield counts
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_training_is_bit_equal(name, kind, stock):
    model = build(name)
    plan = plan_of(model, kind)
    with apply_placement(model, plan), count_recomputations(model, list(plan.stages)) as counts:
        found = train(model)
    assert_same(found, stock(name))
    recomputed = {stage for stage, choice in plan.stages.items() if choice.recompute in ("full", "selective")}
    assert len(counts) >= 4
    assert counts == {stage: 6 if stage in recomputed else 3 for stage in counts}


@pytest.mark.parametrize("kind", ["all", "run_2", "selective", "mixed"])
def test_ten_steps_and_two_forward_passes_before_backward(kind, stock):
    model = build("gpt2")
    apply_placement(model, plan_of(model, kind))
    assert_same(train(model, steps=10, micro_batches=2), stock("gpt2", steps=10, micro_batches=2))


@pytest.mark.parametrize("kind", ["all", "run_3"])
@pytest.mark.parametrize("name", ["resnet", "spectral"])
def test_two_forward_passes_before_backward_with_buffers(name, kind, stock):
    model = build(name)
    apply_placement(model, plan_of(model, kind))
    assert_same(train(model, micro_batches=2), stock(name, micro_batches=2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_autocast(name, kind, stock):
    model = build(name)
    apply_placement(model, plan_of(model, kind))
    assert_same(train(model, steps=2, autocast=True), stock(name, steps=2, autocast=True))
    assert not torch.equal(stock(name, steps=2, autocast=True)[0], stock(name)[0])


def test_key_value_caches():
    """A key-value cache that GPT-2 passes by position is dropped; one that holds something is refused."""
    model = build("gpt2")
    tokens = torch.arange(12)[None]
    torch.manual_seed(5)
    expected = model(input_ids=tokens, labels=tokens, use_cache=True).loss
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with apply_placement(model, plan_of(model, "every_2")):
        torch.manual_seed(5)
        loss = model(input_ids=tokens, labels=tokens, use_cache=True).loss
        loss.backward()
        assert_same([loss, *(p.grad for p in model.parameters())], [expected, *gradients])
        with torch.no_grad():
            past = model(input_ids=tokens, use_cache=True).past_key_values
        assert past.get_seq_length() == 12
        with pytest.raises(RuntimeError, match="use_cache=False"):
            model(input_ids=tokens, past_key_values=past, use_cache=True)


def state_of(model: nn.Module) -> list:
    own = [(name, {key: id(value) for key, value in m.__dict__.items()}) for name, m in model.named_modules()]
    return [own, list(model.state_dict()), [name for name, _ in model.named_parameters()]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_no_renaming_and_undo_restores_everything(name, kind):
    model = build(name)
    before = state_of(model)
    types_before = [type(m) for m in model.modules()]
    applied = apply_placement(model, plan_of(model, kind))
    during = state_of(model)
    assert during[1:] == before[1:]
    assert [n for n, _ in during[0]] == [n for n, _ in before[0]]
    assert [type(m) for m in model.modules()] == types_before
    if kind != "activation" or name == "gpt2":  # the activation functions of the ResNet work in place
        assert during[0] != before[0]
    applied.undo()
    assert state_of(model) == before
    applied.undo()
    assert state_of(model) == before


def test_flags_of_layers_are_restored():
    model = build("gpt2")
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        apply_placement(model, plan_of(model, "all"))
    model.gradient_checkpointing_disable()
    block = model.transformer.h[0]
    function = block._gradient_checkpointing_func
    with apply_placement(model, plan_of(model, "all")):
        assert not getattr(model, f"is_{ACTIVATION_CHECKPOINTING}")  # a flag that is set has effects of its own
        assert isinstance(block.forward, ForwardOverride)
    assert block.__dict__["gradient_checkpointing"] is False
    assert block._gradient_checkpointing_func is function
    assert "forward" not in block.__dict__


def test_undo_before_backward(stock):
    model = build("gpt2")
    torch.manual_seed(1)
    with apply_placement(model, plan_of(model, "run_2")):
        loss = loss_of(model, 0)
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert_same([loss.detach(), *gradients], stock("gpt2")[: 1 + len(gradients)])


def test_evaluation_and_no_grad_are_untouched(monkeypatch):
    for name in ("gpt2", "vit"):
        model = build(name)
        expected = loss_of(model.eval(), 0)
        with apply_placement(model, plan_of(model, "all")), monkeypatch.context() as patch:
            patch.setattr("hf_trainopt.placement.recompute.segments.Frame", None)  # calling it would raise
            assert torch.equal(loss_of(model.eval(), 0), expected)
            model.train()
            with torch.no_grad():
                loss_of(model, 0)
            with pytest.raises(TypeError):
                loss_of(model, 0)


def test_applying_twice_and_unknown_stages():
    model = build("gpt2")
    applied = apply_placement(model, PlacementPlan("none", {"transformer.h.0": STORE}))
    with pytest.raises(ValueError, match="undo"):
        apply_placement(model, plan_of(model, "all"))
    applied.undo()
    with apply_placement(model, plan_of(model, "all")), pytest.raises(ValueError, match="undo"):
        apply_placement(copy.deepcopy(model), plan_of(model, "all"))
    with pytest.raises(ValueError, match=r"lacks: transformer\.h\.7-8; .*make one for this model"):
        apply_placement(model, PlacementPlan("all", {"transformer.h.7": FULL, "transformer.h.8": FULL}))
    run = StageChoice("full", run=0)
    with pytest.raises(ValueError, match="not consecutive"):
        apply_placement(
            model, PlacementPlan("x", {"transformer.h.0": run, "transformer.h.1": STORE, "transformer.h.2": run})
        )
    assert not any(isinstance(m.__dict__.get("forward"), ForwardOverride) for m in model.modules())
    with apply_placement(model, plan_of(model, "all")):
        pass


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda m: torch.compile(m, backend="eager"), "compiled"),
        (lambda m: nn.DataParallel(m), "DistributedDataParallel"),
        (lambda m: torch.jit.trace(m, torch.zeros(1, 4)), "TorchScript"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_that_are_refused(wrap, message):
    with pytest.raises(ValueError, match=message):
        apply_placement(wrap(nn.Sequential(nn.Linear(4, 4))), PlacementPlan("none", {}))


@pytest.mark.parametrize("kind", ["all", "run_2"])
def test_compiling_afterwards_is_refused(kind):
    model = evonorm()
    apply_placement(model, plan_of(model, kind))
    with pytest.raises(Exception, match=r"torch\.compile cannot trace"):
        torch.compile(model, backend="eager")(torch.randn(2, 3, 32, 32))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "evonorm"])
def test_deep_copies_use_their_own_parameters(name, kind):
    model = build(name)
    plan = plan_of(model, kind)
    apply_placement(model, plan)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    reference = build(name)
    with count_recomputations(twin, list(plan.stages)) as counts:
        assert_same(train(twin, steps=1), train(reference, steps=1))
    if kind == "all":
        assert sum(counts.values()) > len(counts)


def test_parts_and_pickles_are_refused():
    model = evonorm()
    apply_placement(model, plan_of(model, "all"))
    with pytest.raises(ValueError, match="undo"):
        copy.deepcopy(model[0].forward)
    with pytest.raises(pickle.PicklingError, match="undo"):
        pickle.dumps(model)
    model = build("gpt2")
    apply_placement(model, plan_of(model, "all"))
    with pytest.raises(pickle.PicklingError, match="undo"):
        pickle.dumps(model)


def test_forward_on_the_instance_is_called_through(stock):
    """What accelerate does: another forward on the instance, before and after."""
    model = build("evonorm")
    calls = []

    def wrapped(old, name):
        def forward(self, x):
            calls.append(name)
            return old(x)

        return forward

    before = types.MethodType(wrapped(model[1].forward, "before"), model[1])
    model[1].forward = before
    applied = apply_placement(model, plan_of(model, "all"))
    assert list(model[1].forward.__signature__.parameters) == ["x"]
    after = types.MethodType(wrapped(model[0].forward, "after"), model[0])
    model[0].forward = after
    assert_same(train(model, steps=3), stock("evonorm"))
    assert calls.count("before") == 6
    assert calls.count("after") == 3
    applied.undo()
    assert model[1].__dict__["forward"] is before
    assert model[0].__dict__["forward"] is after
    with count_recomputations(model, ["0", "1"]) as counts:
        train(model, steps=1)
    assert counts == {"0": 1, "1": 1}


def test_arguments_keep_their_meaning():
    """Lists that a stage appends to, keyword tensors, outputs in dictionaries, and random draws between the stages."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x, seen, *, scale=None, options=None):
            seen.append(len(seen))
            hidden = F.dropout(self.linear(x["hidden"] if isinstance(x, dict) else x), 0.3)
            return {"hidden": torch.tanh(hidden * scale) * options["factor"], "extra": hidden.exp()}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))
            self.seen = []

        def forward(self, x):
            self.seen = []
            scale = x.sigmoid()
            out = x
            for block in self.blocks:
                out = block(out, self.seen, scale=scale, options={"factor": 2.0})
                scale = F.dropout(out["extra"].cos() * 2, 0.1)  # held: no output of a stage itself
            return out["hidden"].sum() + scale.sum()

    def run(kind):
        torch.manual_seed(0)
        model = Model()
        with contextlib.nullcontext() if kind is None else apply_placement(model, plan_of(model, kind)):
            x = torch.randn(3, 6, requires_grad=True)
            loss = model(x)
            loss.backward()
        assert model.seen == [0, 1, 2]
        return [loss.detach(), x.grad, torch.get_rng_state(), *(p.grad for p in model.parameters())]

    for kind in ("all", "run_2", "run_3"):
        assert_same(run(kind), run(None))


@pytest.mark.parametrize("kind", ["all", "activation", "run_2", "selective"])
def test_draws_from_python_and_numpy_are_made_again(kind):
    """LayerDrop from Python's generator, random attention (BigBird) from NumPy's."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.act = nn.Linear(6, 6), nn.GELU()

        def forward(self, x):
            hidden = self.act(self.linear(x)) * random.random()
            return hidden[torch.from_numpy(np.random.permutation(len(hidden)))]

    def run(kind):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model = Chain()
        model.blocks = nn.ModuleList(Block() for _ in model.order)
        with contextlib.nullcontext() if kind is None else apply_placement(model, plan_of(model, kind)):
            x = torch.randn(5, 6, requires_grad=True)
            loss = (model(x) * torch.arange(30.0).view(5, 6)).sum()
            loss.backward()
        state = [torch.tensor([random.random(), np.random.random()], dtype=torch.float64)]
        return [loss.detach(), x.grad, *state, *(p.grad for p in model.parameters())]

    assert_same(run(kind), run(None))


class Chain(nn.Module):
    """Blocks whose calls a test chooses."""

    def __init__(self, count: int = 3, width: int = 6):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(0.3)) for _ in range(count)
        )
        self.order = list(range(count))
        self.between = lambda x: x

    def forward(self, x):
        for index in self.order:
            x = self.between(self.blocks[index](x))
        return x


def chain_record(order, between, kind, repeats=2):
    torch.manual_seed(0)
    model = Chain()
    model.order, model.between = order, between
    with contextlib.nullcontext() if kind is None else apply_placement(model, plan_of(model, kind)):
        losses = [model(torch.randn(4, 6)).square().sum() for _ in range(repeats)]
        for loss in losses:
            loss.backward()
    return [*(loss.detach() for loss in losses), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("order", "between", "warns"),
    [
        ([0, 1, 2], lambda x: x, False),
        ([2, 1, 0], lambda x: x, True),
        ([0, 2], lambda x: x, False),
        ([1, 2], lambda x: x, True),
        ([0, 1], lambda x: x, False),
        ([0, 0, 1, 1, 2], lambda x: x, True),
        ([0, 1, 2, 0, 1, 2], lambda x: x, False),
        ([0, 1, 2], lambda x: F.dropout(x, 0.2), True),
        ([0, 1, 2], lambda x: x.mul_(1.5), True),
        ([0, 1, 2], lambda x: x + x.square(), True),
    ],
)
def test_runs_are_right_whatever_the_model_calls(order, between, warns, caplog):
    assert_same(chain_record(order, between, "run_3"), chain_record(order, between, None))
    assert ("less memory is saved" in caplog.text) == warns


def test_a_run_survives_an_exception_in_the_middle(stock):
    model = build("vit")
    apply_placement(model, plan_of(model, "run_3"))
    for place in (model.blocks[1].register_forward_pre_hook, model.blocks[1].mlp.register_forward_pre_hook):

        def fail(*_):
            raise FloatingPointError

        handle = place(fail)
        with pytest.raises(FloatingPointError):
            loss_of(model, 0)
        handle.remove()
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    assert_same(train(model), stock("vit"))


def test_a_run_joins_only_what_it_was_given():
    """Two forward passes through one run, stage by stage in turn."""

    def record(kind):
        torch.manual_seed(0)
        model = Chain(2)
        with contextlib.nullcontext() if kind is None else apply_placement(model, plan_of(model, kind)):
            first, second = model.blocks[0](torch.randn(4, 6)), model.blocks[0](torch.randn(4, 6))
            first, second = model.blocks[1](first), model.blocks[1](second)
            (first.sum() + second.square().sum()).backward()
        return [p.grad for p in model.parameters()]

    assert_same(record("run_2"), record(None))


def test_an_argument_modified_later_is_an_error():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Bilinear(6, 6, 6), nn.Bilinear(6, 6, 6)

        def forward(self, x, other):
            return self.second(self.first(x, x), other)

    for choice in (FULL, StageChoice("full", run=0)):
        model = Model()
        apply_placement(model, PlacementPlan("x", {"first": choice, "second": choice}))
        other = torch.randn(4, 6)
        loss = model(torch.randn(4, 6), other).sum()
        other.add_(1)
        with pytest.raises(RuntimeError, match=r"modified (in place|by an inplace)"):
            loss.backward()


@pytest.mark.parametrize("kind", ["all", "run_2", "run_3", "selective"])
def test_memory_is_freed_without_the_garbage_collector(kind):
    """Nothing of a region outlives its inputs' use: after the stage, after backward, and if there is no backward."""

    class Spy(nn.Module):
        def forward(self, x):
            hidden = torch.sigmoid(x) * 1.0
            alive.append(weakref.ref(hidden))
            return hidden.square()

    alive = []
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), Spy(), nn.Linear(8, 8)) for _ in range(3)))
    apply_placement(model, plan_of(model, kind))
    gc.collect()
    gc.disable()
    try:
        for backward in (True, False, True):
            alive.clear()
            outputs = []
            handles = [m.register_forward_hook(lambda *a, o=outputs: o.append(weakref.ref(a[-1]))) for m in model]
            loss = model(torch.randn(4, 8)).sum()
            assert len(alive) == 3
            assert not any(ref() is not None for ref in alive), "internals are kept after the forward pass"
            kept = [ref() is not None for ref in outputs]
            if kind == "run_2":
                assert not kept[0], "the output between two stages of a run is kept"
            if kind == "run_3":
                assert not kept[0]
                assert not kept[1]
            for handle in handles:
                handle.remove()
            if backward:
                loss.backward()
                assert len(alive) == 6, "nothing was recomputed"
            del loss
            assert not any(ref() is not None for ref in alive), "recomputed tensors are kept after the backward pass"
            assert not any(ref() is not None for ref in outputs), "outputs are kept"
    finally:
        gc.enable()


def test_graphs_without_backward_are_freed():
    """A tensor made between two stages of a run must not close a cycle through the region that holds it."""
    held = []

    class Exponential(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            held.append(weakref.ref(ctx))  # lives as long as the node of the graph
            return x.exp()

        @staticmethod
        def backward(ctx, gradient):
            raise NotImplementedError

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleDict({str(i): nn.Bilinear(6, 6, 6) for i in range(3)})

        def forward(self, x):
            other = x
            for block in self.blocks.values():
                x = block(x, other)
                other = Exponential.apply(x)
            return x.sum() + other.sum()

    model = Two()
    run = StageChoice("full", run=0)
    apply_placement(model, PlacementPlan("run", {f"blocks.{i}": run for i in range(3)}))
    gc.collect()
    gc.disable()
    try:
        loss = model(torch.randn(4, 6, requires_grad=True))
        assert all(ref() is not None for ref in held)
        del loss
        assert [ref() for ref in held] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("ending", ["backward", "no backward", "exception"])
@pytest.mark.parametrize("kind", ["all", "run_2", "run_3", "selective"])
def test_inputs_of_regions_are_freed(kind, ending):
    """Memory of an array that a tensor borrows tells whether any tensor still uses it."""
    model = Chain()
    applied = apply_placement(model, plan_of(model, kind))
    gc.collect()
    gc.disable()
    try:
        array = np.ones((4, 6), dtype=np.float32)
        ref = weakref.ref(array)
        x = torch.from_numpy(array)
        del array
        if ending == "exception":
            model.between = lambda x: 1 / 0
            with pytest.raises(ZeroDivisionError):
                model(x)
            model.between = lambda x: x
            model(torch.ones(1, 6))  # the next forward pass at the latest
        else:
            loss = model(x).sum()
            assert ref() is not None
            if ending == "backward":
                loss.backward()
            del loss
        del x
        assert ref() is None
    finally:
        gc.enable()
    applied.undo()


def test_a_model_is_freed_without_the_garbage_collector():
    model = build("evonorm")
    apply_placement(model, plan_of(model, "mixed")).undo()
    applied = apply_placement(model, plan_of(model, "mixed"))
    ref = weakref.ref(model[0])
    gc.collect()
    gc.disable()
    try:
        del model, applied
        assert ref() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["all", "run_2", "selective"])
def test_backward_twice_over_a_retained_graph(kind):
    for name in ("gpt2", "spectral"):
        gradients = []
        for placed in (False, True):
            model = build(name)
            with apply_placement(model, plan_of(model, kind)) if placed else contextlib.nullcontext():
                torch.manual_seed(3)
                loss = loss_of(model, 0)
                loss.backward(retain_graph=True)
                loss.backward()
                gradients.append([p.grad for p in model.parameters()])
        assert_same(*gradients)


def test_activation_functions_that_are_found():
    assert activation_modules(build("gpt2").transformer.h[0]) == ["mlp.act"]
    assert activation_modules(build("llama").model.layers[0]) == ["mlp.act_fn"]
    assert activation_modules(build("vit").blocks[0]) == ["mlp.act"]
    assert activation_modules(build("resnet").layer1[0]) == []  # in place
    stage = nn.Sequential(nn.ReLU(), nn.Softmax(-1), nn.PReLU(), nn.ReLU(inplace=True), nn.Dropout(), nn.LeakyReLU())
    assert activation_modules(stage) == ["0", "5"]
    assert activation_modules(nn.GELU()) == [""]
    from timm.layers.activations import Swish

    assert activation_modules(Swish()) == [""]
    assert activation_modules(Swish(inplace=True)) == []


def test_a_shared_activation_function_is_recomputed_once():
    class Block(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.linear, self.act = nn.Linear(4, 4), act

        def forward(self, x):
            return self.act(self.linear(x))

    calls = []

    class Counted(nn.GELU):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    Counted.__module__ = "torch.nn.modules.activation"
    act = Counted()
    model = nn.Sequential(Block(act), Block(act))
    apply_placement(model, plan_of(model, "activation"))
    assert act.forward.replaced is None
    model(torch.randn(2, 4)).sum().backward()
    assert len(calls) == 4


def test_buffers_are_put_back_and_large_constant_ones_not_copied(monkeypatch):
    class Codebook(nn.Module):
        """A large buffer that changes and that the output depends on, one that never does, one that is replaced."""

        def __init__(self):
            super().__init__()
            self.register_buffer("codes", torch.ones(SMALL_BUFFER + 1))
            self.register_buffer("mask", torch.ones(SMALL_BUFFER + 1))
            self.register_buffer("mean", torch.zeros(()))
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                self.codes.mul_(1.5)
                self.mean = self.mean * 0.9 + x.mean() * 0.1
            return torch.sin(self.linear(x) * self.codes[0] + self.mean) * self.mask[0]

    def record(placed):
        torch.manual_seed(0)
        model = nn.Sequential(Codebook(), Codebook())
        codes = model[0].codes
        if placed:
            apply_placement(model, plan_of(model, "all"))
        for _ in range(3):
            model(torch.randn(4, 4)).sum().backward()
        assert model[0].codes is codes
        return [p.grad for p in model.parameters()] + list(model.buffers())

    assert_same(record(True), record(False))
    module = Codebook()
    keeper = BufferKeeper()
    for _ in range(2):
        snapshot = keeper.take(module)
        copied = [e.name for e in snapshot._entries if e.copy is not None]
        module(torch.ones(1, 4))
        snapshot.finish()
    assert copied == ["codes", "mean"]
    snapshot = keeper.take(module)
    module.mask.mul_(2)
    with pytest.raises(RuntimeError, match="'mask'"):
        snapshot.finish()


def test_buffers_of_classes_that_need_a_process_group_or_a_gpu():
    """SyncBatchNorm (with the forward of BatchNorm): only the buffers of the class matter."""

    class Fake(nn.SyncBatchNorm):
        def forward(self, x):
            return nn.BatchNorm2d.forward(self, x)

    def record(placed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), Fake(4)), nn.Sequential(nn.Conv2d(4, 4, 1), Fake(4)))
        if placed:
            apply_placement(model, plan_of(model, "all"))
        model(torch.randn(2, 3, 4, 4)).square().sum().backward()
        return [*(p.grad for p in model.parameters()), *model.buffers()]

    assert_same(record(True), record(False))
    assert [int(b) for b in record(True) if not b.dtype.is_floating_point] == [1, 1]


def test_user_checkpoint_inside_a_stage_and_around_the_model():
    """Nested regions."""
    from torch.utils.checkpoint import checkpoint

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2))
            self.second = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

        def forward(self, x):
            return self.second(checkpoint(self.first, x, use_reentrant=False))

    def record(kind, outer):
        torch.manual_seed(0)
        model = nn.Sequential(Inner(), Inner(), Inner())
        for m in model.modules():
            if isinstance(m, nn.BatchNorm1d):
                m.momentum = 0.0 if outer or kind is None else 0.1
        if kind:
            apply_placement(model, plan_of(model, kind))
        x = torch.randn(4, 6)
        out = checkpoint(model, x, use_reentrant=False) if outer else model(x)
        out.square().sum().backward()
        return [p.grad for p in model.parameters()]

    expected = record(None, False)
    for kind in ("all", "run_2", "run_3", "selective"):
        assert_same(record(kind, False), expected)
        assert_same(record(kind, True), expected)


def test_rewrites_are_applied_before_and_undone_after(monkeypatch):
    order = []

    class Rewritten:
        def undo(self):
            order.append(("undo", isinstance(model.transformer.h[0].forward, ForwardOverride)))

    def apply_rewrites(model, rewrites, strict_logits):
        order.append(("apply", isinstance(model.transformer.h[0].forward, ForwardOverride)))
        assert rewrites.names() == ["chunked_loss"]
        return Rewritten()

    module = types.ModuleType("hf_trainopt.placement.rewrite.rewrites")
    module.apply_rewrites = apply_rewrites
    monkeypatch.setitem(sys.modules, "hf_trainopt.placement.rewrite.rewrites", module)
    model = build("gpt2")
    plan = plan_of(model, "all")
    with apply_placement(model, PlacementPlan("x", plan.stages, Rewrites(chunked_loss=True))):
        assert order == [("apply", False)]
    assert order[1:] == [("undo", False)]


def test_fake_tensors():
    """The planner replays placed models without memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for kind in KINDS:
        with FakeTensorMode():
            model = gpt2().train()
            apply_placement(model, plan_of(model, kind))
            tokens = torch.zeros(2, 12, dtype=torch.long)
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", ["all", "run_2", "selective"])
def test_lora(kind):
    peft = pytest.importorskip("peft")
    records = []
    for placed in (False, True):
        model = build("gpt2")
        if placed:
            apply_placement(model, plan_of(model, kind))
        torch.manual_seed(2)
        config = peft.LoraConfig(target_modules=["c_attn", "c_fc"], lora_dropout=0.1, fan_in_fan_out=True)
        model = peft.get_peft_model(model, config)
        if placed:
            with count_recomputations(model, ["base_model.model.transformer.h.1"]) as counts:
                records.append(train(model))
            assert sum(counts.values()) == 6
        else:
            records.append(train(model))
    assert_same(*records)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["all", "run_2", "selective", "mixed"])
@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_ddp(name, kind, process_group, stock):
    model = build(name)
    apply_placement(model, plan_of(model, kind))
    assert_same(train(nn.parallel.DistributedDataParallel(model)), stock(name))


def test_sync_batch_norm_of_timm_converts_before_or_after(process_group):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build("resnet"))
    apply_placement(model, plan_of(model, "all"))
    snapshot = BufferKeeper().take(model.layer1[0])
    assert sum(isinstance(owner, nn.SyncBatchNorm) for owner in snapshot._written) >= 2
