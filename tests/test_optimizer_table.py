"""The table of optimizers' bytes, against the optimizers themselves where they are installed."""

import pytest
import torch
from placement_models import gpt2, tokens
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_trainopt.machine.devices import DEVICES
from hf_trainopt.placement.simulate.optimizers import STATES, Parameter, TableOptimizer, described
from hf_trainopt.placement.simulate.replay import StepReplayer
from hf_trainopt.placement.simulate.step_setup import StepSetup


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(500, 64)
        self.wide = nn.Linear(64, 2000)
        self.odd = nn.Linear(2000, 63)  # not a multiple of any block
        self.frozen = nn.Linear(63, 64)
        self.frozen.requires_grad_(False)

    def forward(self, indices):
        return self.frozen(self.odd(self.wide(self.embedding(indices)))).pow(2).sum()


def nbytes(model, name):
    return sum(
        numel * torch.empty(0, dtype=dtype).element_size()
        for _, parameter in described(model)
        for numel, dtype in STATES[name](parameter)
    )


def real_optimizer(model, name, folder):
    """Make the optimizer as Trainer does."""
    arguments = TrainingArguments(str(folder), optim=name, use_cpu=True, report_to="none")
    trainer = Trainer(model, arguments)
    return trainer.create_optimizer()


def tensors_of(value):
    if isinstance(value, torch.Tensor) and type(value) in (torch.Tensor, nn.Parameter):
        return [value]
    if hasattr(value, "codes"):  # torchao's quantized states
        return [value.codes, value.scale, value.qmap]
    return []


@pytest.mark.parametrize(
    "name",
    ["adamw_bnb_8bit", "adamw_8bit", "ademamix", "ademamix_8bit", "lion_32bit", "lion_8bit", "rmsprop_bnb",
     "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"],
)  # fmt: skip
def test_bitsandbytes(name, tmp_path):
    pytest.importorskip("bitsandbytes")
    compare(name, tmp_path)


@pytest.mark.parametrize("name", ["adamw_torch_8bit", "adamw_torch_4bit"])
def test_torchao(name, tmp_path):
    pytest.importorskip("torchao")
    compare(name, tmp_path)


def compare(name, folder):
    model = Net()
    optimizer = real_optimizer(model, name, folder)
    model(torch.arange(8)).backward()
    optimizer.step()
    kept = sum(
        tensor.numel() * tensor.element_size()
        for state in optimizer.state.values()
        for key, value in state.items()
        if not key.startswith("qmap")  # one for all parameters
        for tensor in tensors_of(value)
        if tensor.dim()
    )
    assert nbytes(model, name) == kept


def test_every_name_is_one_of_transformers():
    known = {option.value for option in __import__("transformers").training_args.OptimizerNames}
    assert set(STATES) <= known


def test_paged_buffers_are_not_on_the_device():
    large, small = Parameter((1000, 1000), torch.float32), Parameter((10, 10), torch.float32)
    assert STATES["paged_adamw_32bit"](large) == []
    assert STATES["paged_adamw_32bit"](small) == STATES["adamw_8bit"](small)
    assert STATES["paged_lion_8bit"](large) == [(-(-(10**6) // 256), torch.float32)]


def test_low_rank_states_are_those_of_projected_gradients():
    linear = Parameter((300, 1000), torch.float32, is_linear=True)
    assert STATES["galore_adamw"](linear) == [(128 * 1000, torch.float32)] * 2 + [(300 * 128, torch.float32)]
    assert STATES["galore_adamw"](Parameter((300, 1000), torch.float32)) == [(300_000, torch.float32)] * 2


def test_a_replay_counts_the_table():
    model, batch = gpt2(), tokens()
    setup = StepSetup(device=DEVICES["a100"], make_optimizer=lambda model: TableOptimizer(model, "adamw_8bit"))
    replay = StepReplayer(model, batch, setup, ["transformer.h.0"]).replay_choices({})
    assert replay.peak_by_kind()["optimizer"] == nbytes(model, "adamw_8bit")
