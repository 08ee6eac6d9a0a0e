"""The memory rewrites compute the same function, take less memory, and never give wrong logits."""

import contextlib
import copy
import inspect
import weakref

import numpy as np
import pytest
import torch
import transformers
from accelerate.utils import convert_outputs_to_fp32
from helpers import skip_below
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.activations import ACT2FN

from hf_trainopt.placement.plan.plan import Rewrites
from hf_trainopt.placement.rewrite import chunked_loss
from hf_trainopt.placement.rewrite.chunked_cross_entropy import chunked_cross_entropy, default_chunk_rows
from hf_trainopt.placement.rewrite.chunked_loss_check import check_chunked_loss
from hf_trainopt.placement.rewrite.deferred_logits import DeferredLogits, LogitsNotComputedError
from hf_trainopt.placement.rewrite.fused_activation import apply_fused_activations, fusable_activations
from hf_trainopt.placement.rewrite.rewrites import apply_rewrites, available_rewrites


VOCAB = 61
CHUNKED = Rewrites(chunked_loss=True)
FUSED = Rewrites(fused_activations=True)
BOTH = Rewrites(fused_activations=True, chunked_loss=True)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def gpt2(dropout: float = 0.0, **kwargs):
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    sizes = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "use_cache": False}
    config = transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **{**sizes, **rates, **kwargs})
    return transformers.GPT2LMHeadModel(config)


def build(name: str, dropout: float = 0.0):
    torch.manual_seed(0)
    if name == "gpt2":
        return gpt2(dropout)
    if name in ("llama", "llama_tied"):
        config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=name == "llama_tied", attention_dropout=dropout)
        return transformers.LlamaForCausalLM(config)
    if name == "phi":  # The head has a bias.
        model = transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES, resid_pdrop=dropout, embd_pdrop=dropout))
        torch.nn.init.normal_(model.lm_head.bias)
        return model
    if name == "modernbert":  # A masked language model.
        config = transformers.ModernBertConfig(
            **SIZES, cls_token_id=1, sep_token_id=2, mlp_dropout=dropout, embedding_dropout=dropout
        )
        return transformers.ModernBertForMaskedLM(config)
    if name == "gemma2":
        return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8))
    if name == "cohere":
        return transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES))
    if name == "granite":
        return transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES, logits_scaling=2.0))
    assert name == "bert"
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def make_batch(rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (rows, 12), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 1 + 3 * row] = -100
    return {"input_ids": ids, "labels": labels}


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def loss_and_gradients(model, batch, **kwargs):
    model.zero_grad()
    torch.manual_seed(7)
    outputs = model(**batch, **kwargs)
    outputs.loss.backward()
    return outputs, {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages from their first operator to their death, but for those of `existing` tensors."""

    def __init__(self, existing):
        super().__init__()
        self.live = self.peak = 0
        self._existing = list(existing)
        self._known = dict.fromkeys((tensor.untyped_storage()._cdata for tensor in self._existing), 0)

    def _drop(self, key):
        self.live -= self._known.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known[storage._cdata] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._drop, storage._cdata)
        return out


# Fused activations.


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("gelu_new", lambda x: F.gelu(x, approximate="tanh")),
        ("gelu_fast", lambda x: F.gelu(x, approximate="tanh")),
        ("gelu_accurate", lambda x: F.gelu(x, approximate="tanh")),
        ("gelu_python_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("gelu_python", F.gelu),
        ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
    ],
)
def test_written_out_activations_are_fused(name, kernel):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), ACT2FN[name])
    x = torch.linspace(-6, 6, 101)
    before = model[1](x)
    assert fusable_activations(model) == ["1"]
    apply_fused_activations(model)
    torch.testing.assert_close(model[1](x), before, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model[1](x), kernel(x), rtol=1e-6, atol=1e-7)
    assert "forward" in model[1].__dict__


@pytest.mark.parametrize(
    "name", ["gelu", "gelu_pytorch_tanh", "gelu_10", "mish", "silu", "swish", "hardswish", "relu2"]
)
def test_fused_and_other_functions_are_left_alone(name):
    assert fusable_activations(torch.nn.Sequential(ACT2FN[name])) == []


@pytest.mark.parametrize("name", ["Swish", "Mish", "HardSwish", "QuickGELU"])
@pytest.mark.parametrize("inplace", [False, True])
def test_timm_activations_are_fused(name, inplace):
    activations = pytest.importorskip("timm.layers.activations")
    model = torch.nn.Sequential(getattr(activations, name)(inplace=inplace))
    x = torch.linspace(-6, 6, 101)
    before = model(x.clone())
    apply_fused_activations(model)
    torch.testing.assert_close(model(x.clone()), before, rtol=1e-6, atol=1e-6)


class AlmostGELU(torch.nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(0.7979 * (x + 0.0447 * x**3)))


class ScaledGELU(torch.nn.Module):
    def forward(self, x, scale):
        return scale * 0.5 * x * (1 + torch.erf(x / 2**0.5))


class OtherGradientGELU(torch.nn.Module):
    """Has the values of GELU, but another gradient."""

    def forward(self, x):
        return 0.5 * x * (1 + torch.erf(x / 2**0.5)) + 0.01 * (x - x.detach())


def test_a_name_is_no_proof():
    assert fusable_activations(torch.nn.Sequential(AlmostGELU(), ScaledGELU(), OtherGradientGELU())) == []
    with pytest.raises(ValueError, match="switch fused_activations off"):
        apply_rewrites(torch.nn.Sequential(AlmostGELU()), FUSED)


def test_shared_instances_of_transformers_are_left_alone():
    assert fusable_activations(torch.nn.Sequential(transformers.activations.gelu_new)) == []


def test_fusing_changes_neither_generators_nor_names_and_is_undone():
    model = build("gpt2")
    state = torch.get_rng_state()
    keys, module = list(model.state_dict()), model.transformer.h[0].mlp.act
    applied = apply_rewrites(model, FUSED)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    assert "forward" in twin.transformer.h[0].mlp.act.__dict__
    applied.undo()
    assert "forward" not in module.__dict__
    assert model.transformer.h[0].mlp.act is module


def test_undo_refuses_to_drop_a_later_replacement():
    model = build("gpt2")
    applied = apply_rewrites(model, FUSED)
    model.transformer.h[0].mlp.act.__dict__["forward"] = torch.relu
    with pytest.raises(RuntimeError, match="undo what came later first"):
        applied.undo()


# The function.


@pytest.mark.parametrize("chunk_rows", [None, 1, 7, 40])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("num_items", [None, 13, torch.tensor(13)])
def test_function_is_cross_entropy(chunk_rows, biased, num_items):
    torch.manual_seed(0)
    parts = [torch.randn(40, 8), torch.randn(50, 8), torch.randn(50)]
    labels = torch.randint(0, 50, (40,)).masked_fill_(torch.rand(40) < 0.3, 4)
    ours = [part.double().requires_grad_() for part in parts]
    stock = [part.double().requires_grad_() for part in parts]
    loss = chunked_cross_entropy(
        ours[0],
        ours[1],
        labels,
        bias=ours[2] if biased else None,
        num_items=num_items,
        ignore_index=4,
        chunk_rows=chunk_rows,
    )
    expected = F.cross_entropy(
        F.linear(stock[0], stock[1], stock[2] if biased else None),
        labels,
        ignore_index=4,
        reduction="mean" if num_items is None else "sum",
    )
    expected = expected if num_items is None else expected / num_items
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (3 * loss).backward()
    (3 * expected).backward()
    for one, other in zip(ours[: 2 + biased], stock, strict=False):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_items", [None, 5])
def test_all_labels_ignored_is_as_in_the_stock_loss(num_items):
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, torch.full((6,), -100), num_items=num_items)
    assert loss.isnan() if num_items is None else loss == 0
    loss.backward()
    assert hidden.grad.count_nonzero() == weight.grad.count_nonzero() == 0
    assert not hidden.grad.isnan().any()


def test_what_ignored_rows_hold_does_not_reach_the_loss():
    hidden, weight, labels = torch.randn(6, 4), torch.randn(9, 4), torch.tensor([1, -100, 2, 3, -100, 0])
    clean = chunked_cross_entropy(hidden, weight, labels)
    hidden[1] = float("nan")
    assert torch.equal(chunked_cross_entropy(hidden, weight, labels), clean)


@pytest.mark.parametrize("trained", [(True, False), (False, True), (False, False)])
def test_gradients_that_are_not_required_are_not_computed(trained):
    hidden, weight = (torch.randn(n, 16, requires_grad=on) for n, on in zip((64, 512), trained, strict=True))
    labels = torch.arange(64)
    with LiveBytes([hidden, weight, labels]) as bytes_:
        loss = chunked_cross_entropy(hidden, weight, labels, chunk_rows=1)
    sizes = [64 * 16 * 4 * trained[0], 512 * 16 * 4 * trained[1]]
    # Single numbers live too.
    assert sum(sizes) <= bytes_.live < sum(sizes) + 64
    assert loss.requires_grad == any(trained)
    if loss.requires_grad:
        loss.backward()
    assert [part.grad is not None for part in (hidden, weight)] == list(trained)


def test_a_second_backward_pass_is_refused():
    hidden = torch.randn(6, 4, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.randn(9, 4), torch.arange(6))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


def test_arguments_are_checked():
    hidden, weight = torch.randn(6, 4), torch.randn(9, 4)
    with pytest.raises(ValueError, match="do not fit"):
        chunked_cross_entropy(hidden, weight.T, torch.arange(6))
    with pytest.raises(ValueError, match="one label per row"):
        chunked_cross_entropy(hidden, weight, torch.arange(5))
    with pytest.raises(ValueError, match="positive"):
        chunked_cross_entropy(hidden, weight, torch.arange(6), chunk_rows=0)
    with pytest.raises((IndexError, RuntimeError)):
        chunked_cross_entropy(hidden, weight, torch.full((6,), 9))


def test_default_chunks():
    assert default_chunk_rows(8192, 768, 50257) == 256  # 126 rows at the aspect ratio: the floor.
    assert default_chunk_rows(65536, 768, 50257) == 1024
    assert default_chunk_rows(8192, 768, 50257, is_half=True) == 512
    assert default_chunk_rows(100, 768, 50257) == 100
    assert default_chunk_rows(1000, 64, 10) == 1000


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 4e-3), (torch.float16, 6e-4)])
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bit_sums_do_not_depend_on_the_number_of_chunks(dtype, rtol, autocast):
    torch.manual_seed(0)
    hidden, weight = torch.randn(256, 8), 0.1 * torch.randn(300, 8)
    labels = torch.randint(0, 4, (256,))  # Frequent labels: their gradients are sums of many terms.
    given = torch.float32 if autocast else dtype

    def run(function):
        parts = [part.to(given).requires_grad_() for part in (hidden, weight)]
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            loss = function(*parts)
        loss.backward()
        return loss.detach(), [part.grad for part in parts]

    stock = run(lambda h, w: F.cross_entropy(F.linear(h, w).float(), labels, reduction="sum"))
    for rows in (256, 1):
        loss, gradients = run(
            lambda h, w, rows=rows: chunked_cross_entropy(h, w, labels, num_items=1, chunk_rows=rows)
        )
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(stock[0].item(), rel=1e-5)
        for one, other in zip(gradients, stock[1], strict=True):
            assert one.dtype == other.dtype == given
            assert distance(one.double(), other.double()) < rtol


def test_torch_sums_in_bf16():
    """The reason for not using torch's function: fails when it is repaired, and ours may then go."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1024, 8).bfloat16(), (0.1 * torch.randn(300, 8)).bfloat16()
    labels = torch.randint(0, 300, (1024,))
    skip_below("torch", "2.14", "torch.nn.LinearCrossEntropyOptions")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4)
    theirs = F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options).item()
    ours = chunked_cross_entropy(hidden, weight, labels, num_items=1, chunk_rows=4).item()
    expected = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum").item()
    assert ours == pytest.approx(expected, rel=1e-5)
    assert theirs < 0.95 * expected


def test_scaled_fp16_gradients_do_not_vanish():
    # The mean over 4096 rows: stored after the division, the gradients would be below the smallest fp16 number.
    torch.manual_seed(0)
    hidden, weight = torch.randn(4096, 4), 1e-3 * torch.randn(8, 4)
    labels, scale = torch.randint(0, 8, (4096,)), 2.0**16
    exact = hidden.clone().requires_grad_()
    F.cross_entropy(exact @ weight.T, labels).backward()
    assert exact.grad.half().count_nonzero() < 0.9 * exact.grad.numel()
    scaled = hidden.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = chunked_cross_entropy(scaled, weight, labels)
    (scale * loss).backward()
    assert distance(scaled.grad / scale, exact.grad) < 5e-3


# The function's memory.


def run_head(device_mode, chunk_rows=64):
    with device_mode:
        hidden, weight = torch.ones(512, 32, requires_grad=True), torch.ones(2048, 32, requires_grad=True)
        labels = torch.zeros(512, dtype=torch.long)
        with LiveBytes([hidden, weight, labels]) as bytes_:
            chunked_cross_entropy(hidden, weight, labels, chunk_rows=chunk_rows).backward()
    return bytes_.peak


def test_memory_is_what_the_docstring_says_and_fake_tensors_see_it():
    gradients, chunk = (512 + 2048) * 32 * 4, 64 * 2048 * 4
    real = run_head(contextlib.nullcontext())
    assert gradients + chunk <= real <= 1.05 * (gradients + chunk)
    assert run_head(FakeTensorMode()) == pytest.approx(real, rel=0.01)
    # Twice the rows: one more chunk of the same size.
    assert run_head(FakeTensorMode(), 128) - run_head(FakeTensorMode(), 64) == pytest.approx(chunk, rel=0.01)


def test_profiler_sees_the_same_peak():
    hidden, weight = torch.randn(512, 32, requires_grad=True), torch.randn(2048, 32, requires_grad=True)
    labels = torch.zeros(512, dtype=torch.long)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        chunked_cross_entropy(hidden, weight, labels, chunk_rows=64).backward()
    live = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert run_head(FakeTensorMode()) == pytest.approx(peak, rel=0.05)


# In models.


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama_tied", "phi", "modernbert"])
@pytest.mark.parametrize("num_items", [None, 20])
def test_training_is_that_of_the_stock_model(name, num_items):
    stock, ours = build(name, dropout=0.2), build(name, dropout=0.2)
    check_chunked_loss(ours, make_batch())
    apply_rewrites(ours, CHUNKED)
    for model in (stock, ours):
        model.train()
    kwargs = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
    for step in range(5):
        batch = make_batch(seed=step)
        expected, gradients = loss_and_gradients(stock, batch, **kwargs)
        found, others = loss_and_gradients(ours, batch, **kwargs)
        assert isinstance(found.logits, DeferredLogits)
        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
        assert others.keys() == gradients.keys()
        total = torch.stack([value.norm() for value in gradients.values()]).norm()
        for key, value in gradients.items():
            assert (others[key] - value).norm() <= 1e-4 * value.norm() + 1e-6 * total, key
        with torch.no_grad():
            for model in (stock, ours):
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad


def test_both_rewrites_together_train_like_the_stock_model():
    stock, ours = build("gpt2", dropout=0.2).train(), build("gpt2", dropout=0.2).train()
    assert available_rewrites(ours) == BOTH
    apply_rewrites(ours, BOTH)
    expected, gradients = loss_and_gradients(stock, make_batch())
    found, others = loss_and_gradients(ours, make_batch())
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert all(distance(others[key], gradients[key]) < 1e-4 for key in gradients)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "bert"])
def test_other_heads_are_refused_by_the_check(name):
    model = build(name)
    with pytest.raises(ValueError, match="not the plain one"):
        check_chunked_loss(model, make_batch())
    # And the model is as before.
    assert torch.is_tensor(model.train()(**make_batch()).logits)


def test_a_loss_that_differs_is_refused_by_the_check(monkeypatch):
    model = build("gpt2")
    check_chunked_loss(model, make_batch())
    right = chunked_loss.chunked_cross_entropy
    monkeypatch.setattr(chunked_loss, "chunked_cross_entropy", lambda *a, **k: right(*a, **k) * (1 + 1e-4))
    with pytest.raises(ValueError, match=r"loss differs by 1\.0e-04"):
        check_chunked_loss(model, make_batch())

    def other_gradient(hidden, *args, **kwargs):
        return right(hidden, *args, **kwargs) + 1e-2 * (hidden - hidden.detach()).sum()

    monkeypatch.setattr(chunked_loss, "chunked_cross_entropy", other_gradient)
    with pytest.raises(ValueError, match="gradient differs"):
        check_chunked_loss(model, make_batch())


def test_the_check_leaves_no_traces():
    model = build("gpt2", dropout=0.2).eval()
    model.transformer.h[0].train()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    keys = {module: set(module.__dict__) for module in model.modules()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    check_chunked_loss(model, make_batch())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert {module: set(module.__dict__) for module in model.modules()} == keys
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert not model.lm_head._forward_pre_hooks


def test_the_check_needs_labels_and_takes_a_sample_that_has_some():
    batch = make_batch()
    batch["labels"][0] = -100
    check_chunked_loss(build("gpt2"), batch)
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="no labels that count"):
        check_chunked_loss(build("gpt2"), batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_check_allows_the_rounding_of_16_bit_types(dtype):
    with torch.autocast("cpu", dtype=dtype):
        check_chunked_loss(build("llama"), make_batch())
    if dtype == torch.bfloat16:
        check_chunked_loss(build("llama").to(dtype), make_batch())


def test_structures_that_are_not_plain_are_not_available():
    classifier = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))
    assert not available_rewrites(classifier).chunked_loss
    assert not available_rewrites(torch.nn.Linear(2, 2)).chunked_loss
    own_loss = build("gpt2")
    own_loss.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    hooked = build("gpt2")
    hooked.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    derived = build("llama")
    derived.lm_head = type("OtherLinear", (torch.nn.Linear,), {})(16, VOCAB, bias=False)
    for model in (own_loss, hooked, derived):
        assert not available_rewrites(model).chunked_loss
        with pytest.raises(ValueError, match="switch chunked_loss off"):
            apply_rewrites(model, CHUNKED)
    with pytest.raises(ValueError, match="on already"):
        apply_rewrites(model := build("gpt2"), CHUNKED) and apply_rewrites(model, CHUNKED)


def test_a_refused_rewrite_takes_the_others_back():
    model = build("gpt2")
    model.loss_function = lambda **kwargs: None
    with pytest.raises(ValueError, match="switch chunked_loss off"):
        apply_rewrites(model, BOTH)
    assert fusable_activations(model) == ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]


def test_calls_that_do_not_train_on_labels_are_stock():
    model, batch = build("gpt2"), make_batch()
    expected = model.eval()(**batch)
    apply_rewrites(model, CHUNKED)
    assert torch.equal(model(**batch).logits, expected.logits)
    assert torch.equal(model(**batch).loss, expected.loss)
    model.train()
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, expected.logits)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected.logits)
    assert isinstance(model(**batch).logits, DeferredLogits)
    # Real logits that reach the loss function of the model take the stock way.
    loss = model.loss_function(expected.logits, batch["labels"], VOCAB)
    assert torch.equal(loss, expected.loss)
    # The head alone is stock between calls, also after one that failed.
    with pytest.raises(ValueError, match="You"):
        model(labels=batch["labels"])
    assert torch.is_tensor(model.lm_head(torch.zeros(2, 16)))


def test_labels_are_found_among_positional_arguments():
    model, batch = build("llama").train(), make_batch()
    names = list(inspect.signature(model.forward).parameters)
    apply_rewrites(model, CHUNKED)
    assert list(inspect.signature(model.forward).parameters) == names
    arguments = [batch.get(name) for name in names[: names.index("labels") + 1]]
    assert isinstance(model(*arguments).logits, DeferredLogits)


def test_other_forms_of_output():
    model, batch = build("llama"), make_batch()
    apply_rewrites(model, CHUNKED)
    expected = model.eval()(**batch, output_hidden_states=True)
    model.train()
    found = model(**batch, output_hidden_states=True)
    assert torch.equal(found.hidden_states[-1], expected.hidden_states[-1])
    assert torch.equal(found["logits"].materialize(), expected.logits)
    first = model(**batch, return_dict=False)
    assert isinstance(first, tuple)
    assert first[0].item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert isinstance(first[1], DeferredLogits)
    # Slices and labels given shifted.
    kept = {**batch, "labels": batch["labels"][:, -4:], "logits_to_keep": 4}
    with torch.no_grad():
        sliced = model(**kept).loss
    assert model(**kept).loss.item() == pytest.approx(sliced.item(), rel=1e-5)
    shifted = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    assert model(**batch, shift_labels=shifted).loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    "use",
    [
        lambda logits: logits.shape,
        lambda logits: logits.view(-1),
        lambda logits: logits.argmax(-1),
        lambda logits: logits[..., :-1, :],
        lambda logits: logits * 2,
        lambda logits: 2 - logits,
        lambda logits: torch.ones(1) * logits,
        lambda logits: torch.softmax(logits, -1),
        lambda logits: F.cross_entropy(logits, torch.zeros(3)),
        lambda logits: torch.stack([logits]),
        lambda logits: logits == 1,
        len,
        bool,
        float,
        list,
        np.asarray,
        lambda logits: 3 in logits,
        lambda logits: logits.contiguous().float().sum(),
    ],
)
def test_deferred_logits_are_never_taken_for_logits(use):
    model = build("gpt2").train()
    apply_rewrites(model, CHUNKED)
    logits = model(**make_batch()).logits
    with pytest.raises(LogitsNotComputedError, match=r"materialize.*memory_rewrites"):
        use(logits)
    assert "not computed" in repr(logits)


def test_outputs_pass_through_accelerate_autocast():
    model, batch = build("gpt2").train(), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(**batch).loss.item()
    apply_rewrites(model, CHUNKED)

    @convert_outputs_to_fp32
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(**kwargs):
        return model(**kwargs)

    outputs = forward(**batch)
    assert isinstance(outputs.logits, DeferredLogits)
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-5)
    # As `Accelerator.prepare_model` does it, on the instance; undone underneath, it gives the stock model.
    accelerator = transformers.trainer.Accelerator(mixed_precision="bf16", cpu=True)
    stock = build("gpt2").train()
    applied = apply_rewrites(stock, CHUNKED)
    prepared = accelerator.prepare_model(stock)
    assert isinstance(prepared(**batch).logits, DeferredLogits)
    assert prepared(**batch).loss.item() == pytest.approx(expected, rel=1e-5)
    applied.undo()
    assert torch.is_tensor(prepared(**batch).logits)
    assert "_loss_function" not in stock.__dict__
    assert available_rewrites(stock).chunked_loss
    again = apply_rewrites(stock, CHUNKED)
    assert isinstance(prepared(**batch).logits, DeferredLogits)
    again.undo()
    assert torch.is_tensor(prepared(**batch).logits)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.is_tensor(unwrapped(**batch).logits)


@pytest.mark.parametrize("own_loss", [False, True])
def test_undo_is_exact(own_loss):
    model = build("gpt2")
    if own_loss:
        model.loss_function = transformers.loss.loss_utils.ForCausalLMLoss
    before = {module: dict(module.__dict__) for module in model.modules()}
    keys = list(model.state_dict())
    applied = apply_rewrites(model, BOTH)
    assert list(model.state_dict()) == keys
    model.train()(**make_batch()).loss.backward()
    model.zero_grad()
    model.eval()
    applied.undo()
    for module in model.modules():
        after = {**module.__dict__, "training": before[module]["training"]}
        assert after.keys() == before[module].keys()
        assert all(after[key] is before[module][key] for key in after)
    applied.undo()


def test_a_copy_has_a_rewrite_of_its_own():
    model = build("gpt2").train()
    applied = apply_rewrites(model, CHUNKED)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(10)
    applied.undo()
    expected = loss_and_gradients(copy.deepcopy(model), make_batch())[0].loss.item()
    outputs, gradients = loss_and_gradients(twin, make_batch())
    assert isinstance(outputs.logits, DeferredLogits)
    assert outputs.loss.item() != pytest.approx(expected, rel=1e-3)
    assert gradients["transformer.wte.weight"].count_nonzero() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_labels_that_are_all_ignored():
    batch = make_batch()
    batch["labels"][:] = -100
    stock, ours = build("llama").train(), build("llama").train()
    apply_rewrites(ours, CHUNKED)
    expected, gradients = loss_and_gradients(stock, batch)
    found, others = loss_and_gradients(ours, batch)
    assert expected.loss.isnan()
    assert found.loss.isnan()
    assert all(torch.equal(gradients[key], others[key]) for key in gradients)


def test_peft_adapters_with_a_frozen_head():
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
        return peft.get_peft_model(build("llama"), config).train()

    stock, ours = adapted(), adapted()
    assert available_rewrites(ours).chunked_loss
    check_chunked_loss(ours, make_batch())
    applied = apply_rewrites(ours, CHUNKED)
    expected, gradients = loss_and_gradients(stock, make_batch())
    found, others = loss_and_gradients(ours, make_batch())
    assert isinstance(found.logits, DeferredLogits)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert len(gradients) == 8
    assert all(distance(others[key], gradients[key]) < 1e-4 for key in gradients)
    applied.undo()
    assert torch.is_tensor(ours(**make_batch()).logits)
    # A head with an adapter is not a plain one.
    on_head = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["lm_head"], r=2))
    assert not available_rewrites(on_head).chunked_loss


@pytest.mark.parametrize("find_unused", [False, True])
def test_ddp(find_unused, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        stock, ours = build("gpt2").train(), build("gpt2").train()
        apply_rewrites(ours, CHUNKED)
        wrapped = torch.nn.parallel.DistributedDataParallel(ours, find_unused_parameters=find_unused)
        for seed in range(3):
            expected, gradients = loss_and_gradients(stock, make_batch(seed=seed))
            found, others = loss_and_gradients(wrapped, make_batch(seed=seed))
            assert isinstance(found.logits, DeferredLogits)
            assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
            assert all(distance(others[f"module.{key}"], gradients[key]) < 1e-4 for key in gradients)
    finally:
        torch.distributed.destroy_process_group()


# The models' memory.


def replay(rewrites: Rewrites) -> tuple[int, int]:
    """Return the bytes that live after the forward pass and the peak of forward and backward pass."""
    with FakeTensorMode():
        model = gpt2(vocab_size=4096, n_embd=64, n_positions=128).train()
        apply_rewrites(model, rewrites)
        ids = torch.zeros(8, 128, dtype=torch.long)
        with LiveBytes([*model.parameters(), *model.buffers(), ids]) as bytes_:
            loss = model(input_ids=ids, labels=ids).loss
            live = bytes_.live
            loss.backward()
    return live, bytes_.peak


def test_memory_that_the_rewrites_save():
    rows, width, vocab, layers = 8 * 128, 64, 4096, 2
    logits, weight = 4 * rows * vocab, 4 * vocab * width
    stock, fused, chunked = replay(Rewrites()), replay(FUSED), replay(CHUNKED)
    # tanh, x/2 and 1 + tanh are no longer kept, in each layer.
    gelu = layers * 3 * 4 * rows * 4 * width
    assert stock[0] - fused[0] == pytest.approx(gelu, rel=0.02)
    assert stock[1] - fused[1] == pytest.approx(gelu, rel=0.02)
    # At the peak the stock loss holds three times the logits; now there are those of 256 rows and the gradients
    # of the head.
    chunk = 4 * 256 * vocab
    assert stock[1] - chunked[1] == pytest.approx(3 * logits - chunk - weight, rel=0.05)
