"""QLoRA: layers of bitsandbytes in a plan. The package isn't needed; layers here keep and allocate what its layers do.

The real ones were compared by `benchmarks/placement.py predict --case llama-384-qlora` and `llama-384-int8`.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import Rows, arguments, quiet
from placement_models import llama
from torch import nn
from torch.nn import functional as F
from transformers import set_seed

from hf_trainopt import EfficientTrainer, cli
from hf_trainopt.placement import PlacementError
from hf_trainopt.placement.plan.planner import PlacementPlanner
from hf_trainopt.placement.recompute.selective import is_compute_op
from hf_trainopt.placement.simulate.quantized import (
    Quantization,
    QuantizedLinear,
    num_parameters,
    quantize,
    stand_in,
)
from hf_trainopt.placement.simulate.sharding import Sharding
from hf_trainopt.placement.simulate.step_setup import StepSetup


peft = pytest.importorskip("peft")


class Product(torch.autograd.Function):
    """A product with a weight that isn't there between calls."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.x = layer, x if layer.keeps_input else None
        return F.linear(x, layer.whole())

    @staticmethod
    def backward(ctx, grad):
        return torch.matmul(grad, ctx.layer.whole()), None


class Quantized(nn.Linear):
    keeps_input = False

    def __init__(self, whole):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias, self.compute_dtype = (*whole.weight.shape[::-1], None, None)
        self.weight = nn.Parameter(self.packed(), requires_grad=False)
        self.quant_state = SimpleNamespace(dtype=torch.float32, nested=False)

    def packed(self):
        return torch.zeros((self.in_features * self.out_features + 1) // 2, 1, dtype=torch.uint8)

    def whole(self):
        values = torch.linspace(-0.2, 0.2, self.in_features * self.out_features)
        return values.view(self.out_features, self.in_features)

    def forward(self, x):
        return Product.apply(x, self)


class Linear4bit(Quantized):
    pass


class Linear8bitLt(Quantized):
    keeps_input = True

    def packed(self):
        return torch.zeros(self.out_features, self.in_features, dtype=torch.int8)


for kind in (Linear4bit, Linear8bitLt):
    kind.__module__ = "bitsandbytes.nn.modules"

KINDS = {4: Linear4bit, 8: Linear8bitLt}


def adapted(bits):
    """A Llama whose layers have few bits, with adapters."""
    model = llama(2)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, KINDS[bits](module))
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))


def run(folder, bits, **kwargs):
    set_seed(3)
    args = arguments(folder, accumulation_policy="fixed", max_steps=2, per_device_train_batch_size=12, **kwargs)
    trainer = quiet(EfficientTrainer(model=adapted(bits), args=args, train_dataset=Rows(48, length=24)))
    trainer.train()
    return trainer


@pytest.mark.parametrize("bits", [4, 8])
def test_a_budget_in_a_run(tmp_path, bits):
    stock = run(tmp_path / "stock", bits)
    placed = run(tmp_path / "placed", bits, memory_budget="85%", memory_rewrites="none")
    plan = placed.placement_plan
    assert not plan.is_stock
    assert plan.measured_peak_bytes == pytest.approx(plan.predicted_peak_bytes, rel=0.01)
    assert plan.details["num_parameters"] == num_parameters(llama(2)) + num_parameters(placed.model, is_trained=True)
    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (stock, placed)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_weights_in_pieces_are_refused(kind, bits):
    ids = torch.zeros(2, 24, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    with pytest.raises(PlacementError, match=r"isn't predicted for weights of 4 or 8 bits under .*; choose DDP"):
        PlacementPlanner(adapted(bits), batch, StepSetup(sharding=Sharding(kind, 2)))


def test_what_stands_in():
    layer = nn.Linear(40, 30)
    four, eight = stand_in(Linear4bit(layer)), stand_in(Linear8bitLt(layer).eval())
    assert (four.weight.numel(), four.weight.dtype, four.how) == (600, torch.uint8, Quantization(4))
    assert (eight.weight.shape, eight.weight.dtype) == ((30, 40), torch.int8)
    assert (four.training, eight.training) == (True, False)
    assert num_parameters(nn.Sequential(four, eight, nn.Linear(3, 4))) == 1200 + 1200 + 16
    assert stand_in(layer) is None


def test_bytes_of_scales():
    """64 weights share a scale of 4 bytes. Scales of 1 byte share, 256 each, one of 4 bytes more."""
    once, twice = (QuantizedLinear(512, 512, None, Quantization(4, None, double), torch.float32)
                   for double in (False, True))  # fmt: skip
    values = 16 * 4
    assert sum(b.nbytes for b in once.buffers()) == 512 * 512 // 64 * 4 + values
    assert sum(b.nbytes for b in twice.buffers()) == 512 * 512 // 64 + 16 * 4 + values + 257 * 4


def test_the_head_and_tied_weights_stay_whole():
    with torch.device("meta"):
        untied, tied = llama(), llama(tie_word_embeddings=True)
    for model in (untied, tied):
        quantize(model, Quantization(4))
        whole = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        assert whole == ["lm_head"]
        assert any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_products_are_numbered_alike_in_the_plan_and_in_the_run():
    library = torch.library.Library("bitsandbytes", "FRAGMENT")
    try:
        for name in ("gemm_4bit", "int8_scaled_mm", "quantize_4bit"):
            library.define(f"{name}(Tensor a) -> Tensor")
        ops = torch.ops.bitsandbytes
        assert is_compute_op(ops.gemm_4bit.default)
        assert is_compute_op(ops.int8_scaled_mm.default)
        assert not is_compute_op(ops.quantize_4bit.default)
        assert is_compute_op(torch.ops.aten._int_mm.default)
    finally:
        library._destroy()


LLAMA = (
    "--model_type", "llama", "--config_overrides", "num_hidden_layers=2,hidden_size=64,intermediate_size=128,"
    "num_attention_heads=2,num_key_value_heads=2,vocab_size=256", "--block_size", "64", "--device", "rtx4090",
    "--dtype", "bfloat16", "--bf16", "--memory_budget", "9GiB",  # nothing to search for
)  # fmt: skip


def planned(path, *words):
    """Return the details of a plan that fits as it is: nothing has to be searched, as it would be with `--json`."""
    assert cli.main(["plan", *LLAMA, *words, "--memory_budget", "1GiB", "--output", str(path)]) == 0
    return json.loads(path.read_text())["details"]


def test_the_command(tmp_path, capsys):
    path = tmp_path / "plan.json"
    lora = planned(path, "--lora_r", "4")
    four = planned(path, "--lora_r", "4", "--load_in_4bit")
    eight = planned(path, "--lora_r", "4", "--load_in_8bit")
    assert lora["num_parameters"] == four["num_parameters"] == eight["num_parameters"]
    parameters = [details["baseline_by_kind"]["parameters"] for details in (lora, eight, four)]
    layers = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert parameters[0] - parameters[1] == layers
    assert parameters[1] - parameters[2] == layers // 2
    for words, remedy in (
        (("--load_in_4bit",), "--load_in_4bit needs --lora_r"),
        (("--bnb_4bit_use_double_quant", "--lora_r", "4"), "needs --load_in_4bit"),
    ):
        assert cli.main(["plan", *LLAMA, *words]) == 2
        assert remedy in capsys.readouterr().err
