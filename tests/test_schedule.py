"""Learning rates: stock at constant k, right where k varies, and scaled with the batch as the papers say."""

import collections
import copy
import functools
import logging
import math

import numpy as np
import pytest
import torch
from helpers import Rows, arguments, quiet, tiny_gpt2
from torch.optim.lr_scheduler import StepLR
from transformers import TrainerCallback, get_scheduler
from transformers.optimization import AdafactorSchedule

from hf_trainopt import EfficientTrainer
from hf_trainopt.accumulation.schedule import (
    NOISE_SCALING_RULES,
    DataIndexedLR,
    batch_scaling_factor,
    chosen_rule,
    is_adaptive_optimizer,
)


def optimizer(cls=torch.optim.AdamW, lr: float = 0.1):
    first, second = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    return cls([{"params": [first]}, {"params": [second], "lr": lr / 3}], lr=lr)


SCHEDULES = [
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_restarts",
]


@pytest.mark.parametrize("name", SCHEDULES)
def test_whole_positions_are_stock_to_the_bit(name):
    stock_optimizer, our_optimizer = optimizer(), optimizer()
    stock = get_scheduler(name, stock_optimizer, num_warmup_steps=3, num_training_steps=20)
    ours = DataIndexedLR(get_scheduler(name, our_optimizer, num_warmup_steps=3, num_training_steps=20))
    for step in range(21):
        rates = [[group["lr"] for group in o.param_groups] for o in (stock_optimizer, our_optimizer)]
        assert rates[0] == rates[1]
        assert ours.get_last_lr() == stock.get_last_lr()
        stock_optimizer.step()
        stock.step()
        ours.set_position(step + 1, 1.0)
        ours.step()


def test_fractional_positions_lie_on_the_curve():
    ours = DataIndexedLR(get_scheduler("cosine", optimizer(), num_warmup_steps=0, num_training_steps=20))
    ours.set_position(7.25, 1.0)
    ours.step()
    assert ours.get_last_lr()[0] == pytest.approx(0.1 * 0.5 * (1 + math.cos(math.pi * 7.25 / 20)))
    assert ours.get_last_lr()[1] == pytest.approx(ours.get_last_lr()[0] / 3)
    assert ours.factor(7.25) == pytest.approx(0.5 * (1 + math.cos(math.pi * 7.25 / 20)))


def test_a_recursive_schedule_is_stepped_once_a_reference_window():
    ours = DataIndexedLR(StepLR(optimizer(), step_size=2, gamma=0.5))
    found = []
    ours.optimizer.step()  # torch warns of a schedule that is stepped before
    for position in (0.5, 0.5, 1.5, 2.25, 6.75):
        ours.set_position(position, 2.0)
        ours.step()
        found.append(ours.get_last_lr()[0])
    assert found == pytest.approx([0.2, 0.2, 0.2, 0.1, 0.2 * 0.5**3])


def test_step_is_idempotent_and_scales():
    ours = DataIndexedLR(get_scheduler("linear", optimizer(), num_warmup_steps=0, num_training_steps=10))
    ours.set_position(5, 0.5)
    ours.step()
    ours.step()
    assert ours.optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


def test_state_round_trip_and_stock_state():
    def fresh():
        return DataIndexedLR(get_scheduler("cosine", optimizer(), num_warmup_steps=2, num_training_steps=10))

    first, second = fresh(), fresh()
    first.set_position(3.5, 1.4)
    first.step()
    second.load_state_dict(first.state_dict())
    assert second.get_last_lr() == first.get_last_lr()
    assert second.position == 3.5
    stock_optimizer = optimizer()
    stock = get_scheduler("cosine", stock_optimizer, num_warmup_steps=2, num_training_steps=10)
    for _ in range(4):
        stock_optimizer.step()
        stock.step()
    third = fresh()
    third.set_position(4, 1.0)
    third.load_state_dict(stock.state_dict())
    third.step()
    assert third.get_last_lr() == stock.get_last_lr()
    # ... and stock loads ours.
    stock.load_state_dict(first.state_dict())


def test_a_schedule_that_was_stepped_before_goes_on_from_there():
    stock_optimizer, our_optimizer = optimizer(), optimizer()
    stock = get_scheduler("linear", stock_optimizer, num_warmup_steps=0, num_training_steps=10)
    inner = get_scheduler("linear", our_optimizer, num_warmup_steps=0, num_training_steps=10)
    for scheduler in (stock, inner):
        for _ in range(3):
            scheduler.optimizer.step()
            scheduler.step()
    ours = DataIndexedLR(inner)
    for step in range(4):
        ours.set_position(step, 1.0)
        ours.step()
        assert ours.get_last_lr() == stock.get_last_lr()
        stock_optimizer.step()
        stock.step()


def test_a_stepped_schedule_that_is_loaded_goes_on_from_what_was_saved():
    """As where `train` is called a second time, to resume, with a schedule of the user's."""

    def stepped(times):
        scheduler = get_scheduler("linear", optimizer(), num_warmup_steps=0, num_training_steps=10)
        for _ in range(times):
            scheduler.optimizer.step()
            scheduler.step()
        return scheduler

    saved = DataIndexedLR(stepped(2))
    saved.set_position(3, 1.0)
    saved.step()
    for state in (saved.state_dict(), stepped(5).state_dict()):
        ours = DataIndexedLR(stepped(4))
        ours.set_position(3, 1.0)
        ours.load_state_dict(state)
        ours.set_position(4, 1.0)
        ours.step()
        assert ours.get_last_lr() == stepped(6).get_last_lr()


def test_schedules_without_base_rates():
    inner_optimizer = optimizer()
    first = StepLR(inner_optimizer, step_size=2)
    second = get_scheduler("constant", inner_optimizer)
    ours = DataIndexedLR(torch.optim.lr_scheduler.SequentialLR(inner_optimizer, [first, second], milestones=[3]))
    assert ours.base_lrs == pytest.approx([0.1, 0.1 / 3])
    second_optimizer = optimizer()
    DataIndexedLR(torch.optim.lr_scheduler.ChainedScheduler([StepLR(second_optimizer, step_size=2)]))


class Floored(torch.optim.lr_scheduler.LambdaLR):
    """A rate of its own, as `AdafactorSchedule` of transformers has one."""

    def get_lr(self):
        return [max(rate, 0.02) for rate in super().get_lr()]


class Duck:
    """What `Trainer` needs of a schedule and no more: no `LRScheduler`, no `optimizer`."""

    def __init__(self, optimizer):
        self._optimizer, self.count = optimizer, 0

    def step(self):
        self.count += 1
        for group in self._optimizer.param_groups:
            group["lr"] *= 0.5

    def get_last_lr(self):
        return [group["lr"] for group in self._optimizer.param_groups]

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: Floored(optimizer, lambda step: 1 - step / 10),
        lambda optimizer: AdafactorSchedule(optimizer, 1e-3),
        Duck,
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.7, 0.3, 0.1, 0.0][step]),
    ],
)
def test_schedules_of_ones_own_have_their_rates(make):
    stock_optimizer, our_optimizer = optimizer(), optimizer()
    for made in (stock_optimizer, our_optimizer):
        made._get_lr = lambda group, state: 0.5  # Adafactor's
    stock, ours = make(stock_optimizer), DataIndexedLR(make(our_optimizer), our_optimizer)
    for step in range(4):
        assert ours.get_last_lr() == pytest.approx(stock.get_last_lr())
        assert [group["lr"] for group in our_optimizer.param_groups] == pytest.approx(stock.get_last_lr())
        stock_optimizer.step()
        our_optimizer.step()
        stock.step()
        for position in (step + 0.5, float(step + 1)):
            ours.set_position(position, 1.0)
            ours.step()


def test_a_table_is_constant_between_whole_steps(caplog):
    table = [1.0, 0.5, 0.25]
    ours = DataIndexedLR(torch.optim.lr_scheduler.LambdaLR(optimizer(), lambda step: table[min(step, 2)]))
    for position, factor in ((0, 1.0), (0.75, 1.0), (1.5, 0.5), (2.25, 0.25)):
        ours.set_position(position, 1.0)
        ours.step()
        assert ours.get_last_lr()[0] == pytest.approx(0.1 * factor)
        assert ours.factor(position) == factor
    assert len([record for record in caplog.records if "whole steps only" in record.message]) == 1
    broken = DataIndexedLR(torch.optim.lr_scheduler.LambdaLR(optimizer(), lambda step: 1.0 if step < 1 else [][0]))
    broken.set_position(1.5, 1.0)
    with pytest.raises(IndexError):
        broken.step()


def test_callbacks_change_the_schedule_inside():
    ours = DataIndexedLR(get_scheduler("linear", optimizer(), num_warmup_steps=0, num_training_steps=10))
    ours.base_lrs = [1.0, 2.0]
    ours.set_position(5, 1.0)
    ours.step()
    assert ours.get_last_lr() == [0.5, 1.0]
    ours.lr_lambdas = [lambda step: 0.1] * 2
    ours.step()
    assert ours.get_last_lr() == [0.1, 0.2]
    ours.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 4.0})
    ours.base_lrs.append(4.0)
    ours.lr_lambdas.append(lambda step: step)
    ours.step()
    assert ours.get_last_lr() == [0.1, 0.2, 20.0]
    ours.last_epoch = 8
    ours.step()
    assert ours.get_last_lr() == [0.1, 0.2, 32.0]
    assert copy.copy(ours).get_last_lr() == ours.get_last_lr()
    with pytest.raises(AttributeError, match="nonsense"):
        _ = ours.nonsense


@pytest.mark.parametrize("rule", ["none", "sqrt", "linear", "surge"])
@pytest.mark.parametrize("noise", [None, 0.5, 10.0])
@pytest.mark.parametrize("adaptive", [True, False])
def test_the_reference_batch_is_never_scaled(rule, noise, adaptive):
    assert batch_scaling_factor(rule, 8, 8, noise, adaptive) == 1.0


def test_rules():
    assert batch_scaling_factor("none", 2, 8, 4.0, True) == 1.0
    assert batch_scaling_factor("sqrt", 2, 8, 4.0, True) == pytest.approx(0.5)
    assert batch_scaling_factor("linear", 2, 8, 4.0, True) == pytest.approx(0.25)
    gain = (1 + 4 / 8) / (1 + 4 / 2)
    surge = (math.sqrt(4 / 4) + math.sqrt(4 / 4)) / (math.sqrt(4 / 2) + math.sqrt(2 / 4))  # best at the noise scale, 4
    assert batch_scaling_factor("surge", 2, 8, 4.0, adaptive=True) == pytest.approx(surge)
    assert batch_scaling_factor("surge", 2, 8, 4.0, adaptive=False) == pytest.approx(gain)
    with pytest.raises(ValueError, match="lr_batch_scaling"):
        batch_scaling_factor("cube", 2, 8, 4.0, True)


@pytest.mark.parametrize(("adaptive", "limit"), [(False, "linear"), (True, "sqrt")])
@pytest.mark.parametrize("rule", NOISE_SCALING_RULES)
def test_rules_of_the_noise_scale_lie_between_their_limits(rule, adaptive, limit):
    """No noise: a larger batch is worth nothing. All noise: linear (SGD) or root (Adam)."""
    assert batch_scaling_factor(rule, 2, 8, 1e-9, adaptive) == pytest.approx(1.0)
    assert batch_scaling_factor(rule, 2, 8, 1e9, adaptive) == pytest.approx(
        batch_scaling_factor(limit, 2, 8, None, adaptive), rel=1e-6
    )
    for unknown in (None, math.inf):
        assert batch_scaling_factor(rule, 2, 8, unknown, adaptive) == batch_scaling_factor(limit, 2, 8, None, adaptive)


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0, 5.5, 8.0, 40.0])
def test_surge_is_the_best_rate_of_updates_by_sign(noise):
    """The rates of Li et al. 2024 with their top held from the noise scale on, tabulated and divided."""
    batches = range(1, 17)
    rates = [2 / (math.sqrt(noise / b) + math.sqrt(b / noise)) for b in batches]
    rates = [rate if b < noise else 1.0 for b, rate in zip(batches, rates, strict=True)]
    factors = [batch_scaling_factor("surge", b, 8, noise, adaptive=True) for b in batches]
    assert factors == pytest.approx([rate / rates[7] for rate in rates])
    assert factors == sorted(factors)
    for b, factor in zip(batches, factors, strict=True):
        root = batch_scaling_factor("sqrt", b, 8, noise, adaptive=True)
        assert min(1.0, root) - 1e-12 <= factor <= max(1.0, root) + 1e-12


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("noise", [None, 3.0, 40.0])
def test_what_annealing_adds_to_a_batch_keeps_the_noise_of_the_schedule(adaptive, noise):
    """Transfer to k* as if there were no more, then rate²/k (Adam) or rate/k (SGD) as it was at k*."""
    power = 2 if adaptive else 1
    for wanted in (1.0, 2.5, 8.0):
        at_wanted = batch_scaling_factor("surge", wanted, 8, noise, adaptive)
        for growth in (1.0, 2.0, 5.0):
            factor = batch_scaling_factor("surge", growth * wanted, 8, noise, adaptive, growth=growth)
            assert factor**power / growth == pytest.approx(at_wanted**power)
    # There is no batch of less than one micro-batch.
    assert batch_scaling_factor("surge", 2, 8, noise, adaptive, 7.0) == batch_scaling_factor(
        "surge", 2, 8, noise, adaptive, 2.0
    )
    for rule in ("none", "sqrt", "linear"):
        assert batch_scaling_factor(rule, 6, 8, noise, adaptive, growth=3.0) == batch_scaling_factor(
            rule, 6, 8, noise, adaptive
        )


def test_auto_takes_the_noise_scale_where_it_is_measured():
    assert (chosen_rule("auto", True), chosen_rule("auto", False)) == ("surge", "sqrt")
    assert chosen_rule("linear", True) == "linear"
    with pytest.raises(ValueError, match="lr_batch_scaling"):  # must have been resolved
        batch_scaling_factor("auto", 2, 8, 4.0, True)


def test_which_optimizers_are_adaptive():
    assert is_adaptive_optimizer(optimizer(torch.optim.AdamW))
    assert not is_adaptive_optimizer(optimizer(torch.optim.SGD))


class Lookup:
    def __init__(self, *values):
        self.values = values

    def __call__(self, step):
        if not isinstance(step, int):
            raise RuntimeError("steps are whole")
        return self.values[step]


VALUES = [1.0, 0.5, 0.25, 0.125]
TABLES = {
    "list": VALUES.__getitem__,
    "tuple": tuple(VALUES).__getitem__,
    "dictionary": dict(enumerate(VALUES)).__getitem__,
    "get": dict(enumerate(VALUES)).get,  # None between two steps
    "deque": collections.deque(VALUES).__getitem__,
    "array": np.array(VALUES).__getitem__,
    "tensor": torch.tensor(VALUES, dtype=torch.float64).__getitem__,
    "object": Lookup(*VALUES),
    "partial": functools.partial(lambda table, step: table[step], dict(enumerate(VALUES))),
    "assertion": lambda step: VALUES[step] if step == int(step) and isinstance(step, int) else int("no number"),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_table_of_any_kind_is_constant_between_whole_steps(table, caplog):
    ours = DataIndexedLR(torch.optim.lr_scheduler.LambdaLR(optimizer(), table))
    for position in (0, 0.75, 1.5, 2, 2.25, 3):
        ours.set_position(position, 1.0)
        ours.step()
        assert float(ours.get_last_lr()[0]) == pytest.approx(0.1 * VALUES[int(position)])
        assert ours.factor(position) == VALUES[int(position)]
    assert len([record for record in caplog.records if "whole steps only" in record.message]) == 1
    ours.set_position(4, 1.0)
    if table is not TABLES["get"]:
        with pytest.raises((LookupError, RuntimeError)):
            ours.step()  # a step that the table lacks is an error, as in stock


class Places(TrainerCallback):
    """What the schedule of the next window stands on, after each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        parts = self.trainer.trainopt
        rate, controller = parts.learning_rate, parts.accumulation.controller
        self.seen.append({
            "progress": parts.accumulation.cursor.progress,
            "base": rate.factor(),
            "noise": rate.transfer_noise,
            "kept": rate.keeps_noise,
            "growth": rate.growth,
            "k": controller.next_window_steps,
            "scale": self.trainer.lr_scheduler.scale,
            "running": controller.noise.value if controller.noise is not None else None,
            "resolved": controller.noise is not None and controller.noise.resolved,
        })  # fmt: skip


def test_a_rate_that_jumps_late_is_explained(tmp_path, caplog):
    """Where the noise scale is known late, a factor of √κ becomes the one that follows from it."""
    caplog.set_level(logging.INFO)
    places = Places()
    args = arguments(
        tmp_path, gradient_accumulation_steps=8, optimizer_step_cost=0.1, noise_scale_interval=1, num_train_epochs=6,
        lr_scheduler_type="linear", warmup_steps=0,
    )  # fmt: skip
    trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(), callbacks=[places]))
    places.trainer = trainer
    trainer.train()
    first = next(index for index, place in enumerate(places.seen) if place["noise"] is not None)
    before, place = places.seen[first - 1 : first + 1]
    assert place["progress"] > 0.1
    assert place["scale"] > 1.25 * before["scale"]
    (told,) = [text for text in caplog.messages if "The noise scale is known from here on" in text]
    assert f"{place['scale']:.3g} times the schedule's; it was {before['scale']:.3g} times" in told


@pytest.mark.parametrize("warmup", [0.02, 0.5])
def test_rates_are_transferred_by_the_noise_at_their_peak(tmp_path, warmup):
    places = Places()
    args = arguments(
        tmp_path, gradient_accumulation_steps=3, optimizer_step_cost=2.0, noise_scale_interval=1, num_train_epochs=6,
        warmup_steps=warmup, lr_scheduler_type="cosine",
    )  # fmt: skip
    trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(), callbacks=[places]))
    places.trainer = trainer
    trainer.train()
    kept = [place for place in places.seen if place["kept"]]
    assert 5 < len(kept) < len(places.seen) - 3
    assert len({place["noise"] for place in kept}) == 1
    assert len({place["running"] for place in kept}) > 5
    # Not before the rate has begun to fall, nor in the first tenth of the data.
    assert kept[0]["progress"] >= max(0.1, warmup)
    assert all(place["noise"] == place["running"] for place in places.seen if not place["kept"] and place["resolved"])
    # The batch grows as the rate falls, and not before.
    assert kept[-1]["growth"] > 1.5
    assert {place["growth"] for place in places.seen if place["progress"] < warmup} <= {1.0}
    for place in places.seen:
        noise = None if place["noise"] is None else place["noise"] / 3  # micro-batches of 3
        factor = batch_scaling_factor("surge", place["k"], 3, noise, True, place["growth"])
        assert place["scale"] == factor


def test_a_batch_that_has_not_grown_is_not_taken_for_one_that_has(tmp_path):
    """k is above k* for other reasons too: bounds, probes, rounding. At k = k_ref the rate is the user's."""
    places = Places()
    args = arguments(
        tmp_path, gradient_accumulation_steps=4, min_accumulation_steps=4, optimizer_step_cost=0.02,
        noise_scale_interval=1, num_train_epochs=4, lr_scheduler_type="constant", warmup_steps=0,
    )  # fmt: skip
    trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(), callbacks=[places]))
    places.trainer = trainer
    trainer.train()
    assert any(place["resolved"] for place in places.seen)
    assert {(place["k"], place["scale"]) for place in places.seen} == {(4, 1.0)}
