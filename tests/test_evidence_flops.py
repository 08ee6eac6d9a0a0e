"""FLOPs of a step as exact integers, recomputation apart; what is known of devices."""

import functools
import logging

import pytest
import torch
from helpers import Pictures, Rows, arguments, quiet, tiny_gpt2, tiny_resnet
from torch.utils._python_dispatch import _get_current_dispatch_mode, is_in_torch_dispatch_mode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_trainopt import EfficientTrainer
from hf_trainopt.core.versions import ACTIVATION_CHECKPOINTING
from hf_trainopt.machine.costs import attention_backward_flops, attention_flops
from hf_trainopt.metrics import ThroughputCallback, throughput
from hf_trainopt.metrics.flops import FORMULAS, FlopCounter, StepFlops, peak_flops


# tiny_gpt2 by hand: 2 layers of width 16, 3 rows of 12 tokens, 64 words; 2 FLOPs a multiplication and addition.
TOKENS, WIDTH = 3 * 12, 16
LINEAR = 2 * TOKENS * WIDTH * (2 * (3 * WIDTH + WIDTH + 4 * WIDTH + 4 * WIDTH) + 64)
PRODUCT = 2 * 2 * 3 * 12 * 12 * WIDTH  # one product of each layer's attention: scores, or their sum of values
FORWARD, BACKWARD = LINEAR + 2 * PRODUCT, 2 * LINEAR + 5 * PRODUCT


def counted(run) -> StepFlops:
    with FlopCounter() as counter:
        run()
    return counter.result()


def ours_by_shape(formula):
    """A formula for `FlopCounterMode`, which hands tensors to those that say so."""
    formula = functools.partial(formula)
    formula._get_raw = True
    return formula


def by_pytorch(run) -> int:
    extra = {packet: ours_by_shape(formula) for packet, formula in FORMULAS.items() if "_for_cpu" in str(packet)}
    with FlopCounterMode(display=False, custom_mapping=extra) as counter:
        run()
    return counter.get_total_flops()


def a_step(model, data, size=3):
    batch = {key: torch.stack([data[i][key] for i in range(size)]) for key in data[0]}
    return lambda: model.train()(**batch).loss.backward()


def run(tmp_path, cls=Trainer, model=None, data=None, callback=None, **kwargs):
    """A run of 2 micro-batches a step, and its callback."""
    callback = callback or ThroughputCallback()
    arguments_class = TrainingArguments if cls is Trainer else {}
    settings = {"gradient_accumulation_steps": 2, "max_steps": 4, "remove_unused_columns": False} | kwargs
    args = arguments(tmp_path, *([arguments_class] if arguments_class else []), **settings)
    trainer = quiet(cls(model=model or tiny_gpt2(), args=args, train_dataset=data or Rows(48), callbacks=[callback]))
    trainer.train()
    return trainer, callback


def test_gpt2_by_hand_and_by_pytorch():
    step = a_step(tiny_gpt2(), Rows())
    found = counted(step)
    assert (found.total, found.model, found.recomputed) == (FORWARD + BACKWARD, FORWARD + BACKWARD, 0)
    assert found.total == by_pytorch(step)
    assert (found.dtype, found.is_convolution) == (torch.float32, False)


@pytest.mark.parametrize("heads", [6, 2, 1])
def test_attention_by_hand_and_by_pytorch(heads):
    """Grouped queries: each key and value serves several heads, and costs as much as if it were repeated."""
    batch, queries, keys, width, out = 2, 5, 7, 8, 4
    q, k, v = (
        torch.ones(batch, 6, queries, width),
        torch.ones(batch, heads, keys, width),
        torch.ones(batch, heads, keys, out),
    )
    forward = sum(2 * queries * keys * (width + out) for _ in range(batch) for _ in range(6))
    backward = sum(2 * queries * keys * (3 * width + 2 * out) for _ in range(batch) for _ in range(6))
    grad = torch.ones(batch, 6, queries, out)
    assert attention_flops(q, k, v) == forward
    assert attention_backward_flops(grad, q, k, v) == backward
    whole = [tensor.repeat_interleave(6 // heads, 1) for tensor in (k, v)]  # what older versions count, too
    aten = torch.ops.aten
    assert flop_registry[aten._scaled_dot_product_flash_attention](q, *whole, out_val=None) == forward
    assert flop_registry[aten._scaled_dot_product_flash_attention_backward](grad, q, *whole, out_val=None) == backward


def test_resnet_by_pytorch():
    step = a_step(tiny_resnet(), Pictures())
    found = counted(step)
    assert found.total == by_pytorch(step) > 10**7
    assert found.is_convolution
    # The first convolution by hand: its input needs no gradient, so it is done twice and not three times.
    convolution = torch.nn.Conv2d(3, 24, 3, stride=2, padding=1, bias=False)
    once = 2 * 2 * 24 * 16 * 16 * 3 * 3 * 3
    assert counted(lambda: convolution(torch.randn(2, 3, 32, 32)).sum().backward()).total == 2 * once


def test_frozen_weights_need_no_gradient():
    model = tiny_gpt2()
    for parameter in model.transformer.parameters():
        parameter.requires_grad = False
    head = 2 * TOKENS * WIDTH * 64
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # not that of the embedding
    assert counted(a_step(model, Rows())).total == FORWARD + head


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_is_told_apart(use_reentrant):
    weight = torch.randn(8, 8, requires_grad=True)
    data = torch.randn(4, 8, requires_grad=True)

    def step():
        out = checkpoint(lambda x: torch.tanh(x @ weight) @ weight, data, use_reentrant=use_reentrant)
        out.sum().backward()

    product = 2 * 4 * 8 * 8
    found = counted(step)
    assert found.model == 6 * product
    # Not re-entrant: the last product is not run again, nothing needs its result.
    assert found.recomputed == (2 if use_reentrant else 1) * product
    assert found.total == found.model + found.recomputed == by_pytorch(step)


def test_checkpointed_models_have_the_same_model_flops(tmp_path):
    _, plain = run(tmp_path)
    _, checkpointed = run(tmp_path, **{ACTIVATION_CHECKPOINTING: True})
    assert plain.step_flops == StepFlops(2 * (FORWARD + BACKWARD), 0, 0, torch.float32, False)
    assert checkpointed.step_flops.model == plain.step_flops.total
    assert 0 < checkpointed.step_flops.recomputed < 2 * FORWARD


@pytest.mark.parametrize("rewrites", ["none", "chunked_loss"])
def test_with_placement_both_measure(tmp_path, rewrites):
    """Its own mode counts bytes in the step behind; a chunked loss multiplies in the forward pass."""
    trainer, callback = run(
        tmp_path, EfficientTrainer, accumulation_policy="fixed", checkpoint_placement="all", memory_rewrites=rewrites
    )
    assert any("measured_peak_gib" in line for line in trainer.state.log_history)
    assert callback.step_flops.model == 2 * (FORWARD + BACKWARD)
    assert callback.step_flops.recomputed > 0


def test_the_optimizer_is_no_part_of_the_model():
    with FlopCounter() as counter:
        a_step(tiny_gpt2(), Rows())()
        counter.in_optimizer = True
        torch.ones(4, 4) @ torch.ones(4, 4)
    found = counter.result()
    assert (found.optimizer, found.model) == (128, FORWARD + BACKWARD)


def test_models_that_callbacks_run_are_no_part_of_the_step(tmp_path):
    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            for index in range(4):
                model(**{key: value[None] for key, value in Rows()[index].items()})

    counts = []
    for number, before in enumerate([(), (Looks(),)]):
        callback = ThroughputCallback()
        args = arguments(tmp_path / str(number), TrainingArguments, gradient_accumulation_steps=2, max_steps=2)
        trainer = Trainer(model=tiny_gpt2(), args=args, train_dataset=Rows(), callbacks=[*before, callback])
        quiet(trainer).train()
        counts.append(callback.step_flops)
    assert counts[0] == counts[1]


def test_half_precision_is_seen(tmp_path):
    with torch.autocast("cpu", torch.bfloat16):
        batch = {key: Rows()[0][key][None] for key in Rows()[0]}
        assert counted(lambda: tiny_gpt2()(**batch)).dtype == torch.bfloat16


def test_what_is_compiled_within_a_model_stays_compiled():
    from torch.nn.attention.flex_attention import flex_attention

    query = torch.randn(1, 2, 16, 8)
    compiled = torch.compile(flex_attention, backend="eager", fullgraph=True)
    with FlopCounter() as counter:
        found = compiled(query, query, query)
    torch.testing.assert_close(found, torch.nn.functional.scaled_dot_product_attention(query, query, query))
    assert counter.error is None


def test_rates_follow(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "device_peak_flops", lambda device, flops: 1e9)
    trainer, callback = run(tmp_path, **{ACTIVATION_CHECKPOINTING: True})
    line = trainer.state.log_history[-1]
    flops, per_token = callback.step_flops, line["tokens_per_second"] / (2 * TOKENS)
    assert line["flops_per_second"] == pytest.approx(flops.total * per_token)
    assert line["mfu"] == pytest.approx(flops.model * per_token / 1e9)


def test_images_are_counted_by_the_sample(tmp_path):
    trainer, callback = run(tmp_path, model=tiny_resnet(), data=Pictures(24))
    line = trainer.state.log_history[-1]
    assert line["flops_per_second"] == pytest.approx(callback.step_flops.total * line["samples_per_second"] / 6)
    assert "mfu" not in line  # nobody knows the peak of a CPU


class Mode(TrainerCallback):
    """Somebody else's mode around the first step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if not state.global_step:
            self.mode = FlopCounterMode(display=False)
            self.mode.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.mode.__exit__(None, None, None)


@pytest.mark.parametrize("first", [True, False])
def test_another_mode_is_left_alone(tmp_path, caplog, first):
    """Whether its callback is before ours or behind: modes must be left in the reverse order."""
    caplog.set_level(logging.INFO, "hf_trainopt")
    args = arguments(tmp_path, TrainingArguments, max_steps=4)
    callbacks = [Mode(), ThroughputCallback()][:: 1 if first else -1]
    trainer = quiet(Trainer(model=tiny_gpt2(), args=args, train_dataset=Rows(48), callbacks=callbacks))
    trainer.train()
    assert caplog.text.count("FLOPs are not counted: another TorchDispatchMode is active") == first
    last = trainer.state.log_history[-1]
    assert "tokens_per_second" in last
    assert ("flops_per_second" in last) == (not first)
    assert not is_in_torch_dispatch_mode()
    assert _get_current_dispatch_mode() is None


def test_a_formula_that_fails_is_said_once_and_training_goes_on(tmp_path, caplog, monkeypatch):
    def broken(*args, **kwargs):
        raise AssertionError("shapes")

    caplog.set_level(logging.INFO, "hf_trainopt")
    monkeypatch.setitem(FORMULAS, torch.ops.aten.mm, broken)
    trainer, callback = run(tmp_path)
    assert callback.step_flops is None
    assert caplog.text.count("FLOPs are not counted: shapes") == 1
    assert "flops_per_second" not in trainer.state.log_history[-1]


@pytest.mark.parametrize(("warmup_steps", "max_steps"), [(0, 4), (2, 2), (3, 2)])
def test_no_step_is_slowed_down_for_rates_that_never_come(tmp_path, warmup_steps, max_steps):
    _, callback = run(tmp_path, callback=ThroughputCallback(warmup_steps), max_steps=max_steps)
    assert callback.step_flops is None


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A100 80GB PCIe", torch.float32, 19.5e12),
        ("NVIDIA H100 80GB HBM3", torch.float16, 989e12),
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("Tesla T4", torch.float16, 65e12),
        ("Tesla V100-SXM2-16GB", torch.float16, 125e12),
        ("NVIDIA GeForce RTX 4090", torch.float16, 165e12),
        ("NVIDIA A100-SXM4-80GB", torch.float64, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.float16, None),
        ("NVIDIA GeForce RTX 3090 Ti", torch.float16, None),
        ("NVIDIA H100 PCIe", torch.float16, None),
        ("NVIDIA L40", torch.float16, 181e12),
        ("NVIDIA RTX A1000", torch.float16, None),
        ("AMD Instinct MI300X", torch.bfloat16, 1307e12),
        ("cpu", torch.float32, None),
    ],
)
def test_peaks_of_devices(name, dtype, expected):
    assert peak_flops(name, dtype) == expected


def test_tf32_counts_where_it_is_used():
    # Convolutions use it unless told not to, products of matrices only if told to.
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32, is_convolution=True) == 156e12
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 156e12
        assert peak_flops("Tesla T4", torch.float32) == 8.1e12
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
