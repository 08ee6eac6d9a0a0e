"""Values in a replay: those of the batch are known, those of the model may be recorded and not judged."""

import json
import math

import pytest
import torch
from helpers import Rows, arguments, quiet
from placement_models import gpt2, llama
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from transformers import masking_utils

from hf_trainopt import EfficientTrainer
from hf_trainopt.core.shadow import shadow_of
from hf_trainopt.machine.devices import DEVICES
from hf_trainopt.placement.plan.chain import build_chain, chain_profile
from hf_trainopt.placement.plan.options import OptionExplorer
from hf_trainopt.placement.plan.plan import FULL, STORE
from hf_trainopt.placement.plan.solver import solve
from hf_trainopt.placement.plan.stages import find_stages
from hf_trainopt.placement.simulate.fake import fake_copy, fake_mode, fake_tensor
from hf_trainopt.placement.simulate.passes import passes_of
from hf_trainopt.placement.simulate.replay import StepReplayer
from hf_trainopt.placement.simulate.residents import ResidentModules
from hf_trainopt.placement.simulate.step_setup import StepSetup
from hf_trainopt.placement.simulate.values import UnknownNumber, UnknownNumberError, following_values


MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]])


@pytest.fixture
def known():
    """A mask whose values are known, and what a model makes, whose values are not."""
    mode = fake_mode()
    mask, weight = fake_tensor(MASK, mode), fake_tensor(torch.zeros(3, 4, requires_grad=True), mode)
    with mode, following_values([(mask, MASK)]):
        yield mask, weight.exp()
    assert MASK.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]


def in_place(mask):
    mask = mask.clone()
    mask[:, 0] = -100
    mask.view(-1)[1] = 7
    return mask


# What is computed from a mask, by the same code on real and on fake numbers.
COMPUTED = {
    "sum": lambda mask: mask.sum(),
    "lengths": lambda mask: mask.sum(-1).clamp(min=2).tolist(),
    "mean": lambda mask: (mask.float() / mask.sum()).mean(),
    "nonzero": lambda mask: mask.nonzero(),
    "where": lambda mask: torch.where(mask.bool())[1],
    "unique": lambda mask: mask.unique(),
    "repeated": lambda mask: torch.arange(3).repeat_interleave(mask.sum(1)),
    "selected": lambda mask: mask[mask.bool()],
    "in place": in_place,
    "constants": lambda mask: torch.tensor([1.5, 2.0]).sum() + torch.ones(2) + mask.max(),
    "truth": lambda mask: bool(mask.sum() > 5),
    "int": lambda mask: int(mask.sum()),
    "size": lambda mask: torch.zeros(mask.sum()),
    "format": lambda mask: f"{mask.sum().float():.2f}",
    "causal": lambda mask: (torch.arange(4)[None, :] <= torch.arange(4)[:, None]) & mask[:, None].bool(),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_values_that_follow_from_the_batch_are_known(known, name):
    mask, _ = known
    found = COMPUTED[name](mask)
    if isinstance(found, torch.Tensor):
        shape, found = found.shape, found.tolist()
    with torch.utils._python_dispatch._disable_current_modes():
        expected = COMPUTED[name](MASK.clone())
        if isinstance(expected, torch.Tensor):
            assert shape == expected.shape
            expected = expected.tolist()
    assert found == expected
    assert not isinstance(found, UnknownNumber)


def test_shapes_that_masks_of_the_batch_decide(known):
    mask, made = known
    assert made[mask.bool()].shape == (6,)
    assert torch.masked_select(made, mask.bool()).shape == (6,)
    assert made[mask.nonzero(as_tuple=True)].shape == (6,)
    changed = made.clone()
    changed[mask.bool()] = 0
    (made[mask.bool()].sum() + changed.sum()).backward()


@pytest.mark.parametrize(
    "judge",
    [
        lambda made: made.mean() > 0 or True,
        lambda made: bool(made.mean() > 0),
        lambda made: int(made.mean()),
        lambda made: [0, 1][made.argmax()],
        lambda made: made[made > 0],
        lambda made: made.nonzero(),
        lambda made: made.unique(),
    ],
)
def test_what_the_model_computes_decides_nothing(known, judge):
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        judge(known[1])


@pytest.mark.parametrize(
    "judge",
    [
        lambda number: number > 0,
        lambda number: number == 1,
        lambda number: number in [3, 4],
        lambda number: bool(number),
        lambda number: int(number),
        lambda number: round(number),
        lambda number: math.floor(number),
        lambda number: max(3, number),
        lambda number: sorted([number, 2.0]),
        lambda number: (2 * number - 1) / 3 > 0,
        lambda number: abs(-number) < 1,
        lambda number: number**2 < 1,
        lambda number: 2**number < 1,
        lambda number: sum([number, number]) / 2 > 1,
    ],
)
def test_numbers_of_the_model_are_not_judged(known, judge):
    with pytest.raises(UnknownNumberError, match="a number that the model computes decides"):
        judge(known[1].mean().item())


@pytest.mark.parametrize("use", [torch.zeros, range, lambda number: [1, 2][number]])
def test_numbers_of_the_model_are_no_sizes(known, use):
    with pytest.raises(TypeError):
        use(known[1].argmax().item())


def test_numbers_of_the_model_are_recorded(known):
    _, made = known
    number = made.mean().item()
    kept = [number, 2 * number, sum([number, number]) / 2, round(number, 3)]
    assert all(isinstance(value, UnknownNumber) for value in kept)
    assert f"{number:.2f}" == "1.00"
    assert json.dumps(kept)
    assert (made * number).shape == made.shape
    nested = made.tolist()
    assert [len(row) for row in nested] == [4, 4, 4]
    assert isinstance(nested[0][0], UnknownNumber)
    assert math.isfinite(float(made.sum()))
    assert not torch.isnan(made).any()  # as in a run that goes well
    assert bool(torch.isfinite(made).all())


def test_what_is_written_to_with_unknown_numbers_is_unknown(known):
    mask, made = known
    mask = mask.float()
    view = mask[0]
    mask[1, 1] = made.sum()
    for tensor in (mask, view, mask.t()):
        with pytest.raises(DataDependentOutputException):
            bool(tensor.sum() > 0)


def test_real_tensors_are_not_written_to():
    running, real, mode = torch.zeros(2), torch.ones(2), fake_mode()
    ones, unknown = (fake_tensor(real, mode) for _ in range(2))
    with mode, following_values([(ones, real)]):
        assert (running + ones).tolist() == [1, 1]
        running.add_(ones)
        running.add_(unknown)
        with pytest.raises(DataDependentOutputException):
            bool(running.sum() > 0)
    assert running.tolist() == [0, 0]


def test_everything_is_put_back():
    stock, mode = masking_utils.is_tracing, fake_mode()
    with mode, following_values([]):
        assert masking_utils.is_tracing is not stock
    assert masking_utils.is_tracing is stock
    with mode, pytest.raises(DataDependentOutputException):
        fake_tensor(torch.zeros(1), mode).item()


# ---- Masks of transformers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_padded", [True, False])
def test_a_mask_of_ones_is_skipped_as_in_a_run(is_padded):
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, 8:] = 0 if is_padded else 1
    batch = {"input_ids": torch.zeros_like(mask), "attention_mask": mask}
    seen = []

    def loss(model, batch):
        layer = model.model.layers[0]
        handle = layer.register_forward_pre_hook(
            lambda *args: seen.append(args[2]["attention_mask"]), with_kwargs=True
        )
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        handle.remove()
        return logits.square().mean()

    model = llama()
    loss(model, batch)  # for real
    setup = StepSetup(device=DEVICES["cpu"], compute_loss=loss, follows_values=True)
    StepReplayer(model, batch, setup, find_stages(model)).replay_choices({})
    assert len(seen) == 3
    assert {None if found is None else tuple(found.shape) for found in seen} == {(3, 1, 12, 12) if is_padded else None}


# ---- Several forward passes ----------------------------------------------------------------------------------------


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.extra = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x, extra=False):
        for layer in self.layers:
            x = layer(x)
        return self.extra(x) if extra else x


NAMES = [*(f"layers.{i}" for i in range(4)), "extra"]


def test_passes_with_and_without_gradients():
    model, x = Tower(), torch.randn(2, 8)
    assert passes_of(model, NAMES, lambda: model(x, extra=True)).once == NAMES

    def twice():
        with torch.no_grad():
            model(x, extra=True)
        return model(x) + model(x)

    found = passes_of(model, NAMES, twice)
    assert (found.once, found.others, found.count) == (NAMES[:4], [], 2)
    found = passes_of(model, NAMES, lambda: model(x) + model(x, extra=True))
    assert (found.once, found.others, found.count) == (NAMES[:4], ["extra"], 2)
    found = passes_of(model, NAMES, lambda: model.layers[0](model.layers[0](x)))
    assert (found.once, found.others) == ([], NAMES)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("lengths", [(48, 48), (48, 20), (20, 48)])
def test_the_chain_of_two_passes_is_what_replays_say(lengths):
    """Sums of parts against whole replays, for plans from nothing recomputed to everything."""

    def loss(model, batch):
        return sum(model(ids, output_hidden_states=True).hidden_states[-1].square().mean() for ids in batch.values())

    model = gpt2()
    batch = {str(i): torch.zeros(8, length, dtype=torch.long) for i, length in enumerate(lengths)}
    setup = StepSetup(device=DEVICES["cpu"], compute_loss=loss)
    replayer = StepReplayer(model, batch, setup, find_stages(model))
    baseline = replayer.replay_choices({})
    assert baseline.order == find_stages(model)
    chain = build_chain(chain_profile(baseline, OptionExplorer(replayer).explore()), max_run=1)
    for count in range(5):
        choices = {name: FULL if i < count else STORE for i, name in enumerate(baseline.order)}
        replayed = replayer.replay_choices(choices).peak_bytes
        budget = next(
            budget
            for budget in range(replayed, 2 * replayed, max(1, replayed // 200))
            if solve(chain, budget) is not None
        )
        assert budget < 1.1 * replayed


# ---- Copies of a trainer -------------------------------------------------------------------------------------------


class Holder:
    def __init__(self, module):
        self.module = module


@pytest.fixture
def trainer(tmp_path):
    return quiet(EfficientTrainer(model=gpt2(), args=arguments(tmp_path), train_dataset=Rows()))


def test_modules_of_the_trainer_are_fake_and_the_same_each_time(trainer):
    teacher = gpt2(2)
    teacher.lm_head.weight = trainer.model.lm_head.weight  # shared with the student
    trainer.teacher, trainer.nested = teacher, {"a": [Holder(teacher)]}
    trainer.head = trainer.model.lm_head
    residents, mode = ResidentModules(trainer), fake_mode()
    student = fake_copy(trainer.model, mode)
    fakes = residents.tensors(mode)
    assert sum(fake.nbytes for fake in fakes) == sum(
        tensor.nbytes for tensor in [*teacher.parameters(), *teacher.buffers()]
    ) - (trainer.model.lm_head.weight.nbytes)
    shadows = [shadow_of(trainer, student, residents.fakes(mode)) for _ in range(2)]
    for shadow in shadows:
        assert shadow.head is student.lm_head
        assert shadow.teacher is shadow.nested["a"][0].module is not teacher
        assert shadow.teacher.lm_head.weight is student.lm_head.weight
        assert all(isinstance(parameter, FakeTensor) for parameter in shadow.teacher.parameters())
    first, second = (list(shadow.teacher.parameters()) for shadow in shadows)
    assert all(one is other for one, other in zip(first, second, strict=True))
    assert not any(isinstance(parameter, FakeTensor) for parameter in teacher.parameters())
    assert trainer.teacher is teacher is trainer.nested["a"][0].module


def test_gathering_over_ranks_is_not_communication(trainer, monkeypatch):
    real = trainer.accelerator
    monkeypatch.setattr(type(trainer.args), "world_size", 3)
    monkeypatch.setattr(type(real), "num_processes", 3)
    shadow = shadow_of(trainer, trainer.model)
    assert shadow.accelerator is not real
    assert trainer.accelerator is real
    assert shadow.accelerator.gather(torch.ones(2, 4)).shape == (6, 4)
    assert shadow.accelerator.gather_for_metrics({"a": torch.ones(())})["a"].shape == (3,)
    assert shadow.accelerator.reduce(torch.ones(2), reduction="sum").shape == (2,)
