"""Adam's second moment on a clock of data: as defined whatever k does, and stock where k is constant."""

import logging
import math

import numpy as np
import pytest
import torch
from helpers import AnyK, Rows, arguments, quiet, tiny_gpt2, weights_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from precision_helpers import HalfTrainer, pretend, scales_fp16
from reference import adam_by_definition
from transformers import Adafactor, Trainer, TrainerCallback, TrainingArguments

from hf_trainopt import EfficientTrainer
from hf_trainopt.accumulation.second_moment import (
    LONGEST_MEMORY,
    SecondMomentClock,
    bias_ratio,
    moment_ratio,
    moment_setting,
    steps_taken,
)


K_REF = 4
sequences = st.lists(st.integers(1, 9), min_size=1, max_size=25)


def run(optimizer_class, ks, rate_factors=None, seed=0, longest=math.inf, **options):
    """Steps of an optimizer on float64 weights; returns it, the weights, their gradients, and the clock."""
    generator = torch.Generator().manual_seed(seed)
    parameter = torch.nn.Parameter(torch.randn(7, dtype=torch.float64, generator=generator))
    start = parameter.detach().clone().numpy()
    optimizer = optimizer_class([parameter], **options)
    clock = SecondMomentClock(optimizer, moment_setting(optimizer), longest=longest)
    gradients = []
    base = float(options.get("lr", 1e-3))
    for index, k in enumerate(ks):
        factor = 1.0 if rate_factors is None else rate_factors[index]
        optimizer.param_groups[0]["lr"] = base * factor
        parameter.grad = torch.randn(7, dtype=torch.float64, generator=generator) * 10.0 ** (index % 3 - 1)
        gradients.append(parameter.grad.clone().numpy())
        clock.begin_step(k / K_REF, factor)
        optimizer.step()
        clock.end_step()
    return optimizer, parameter, start, gradients, clock


@pytest.mark.parametrize(
    "way", [{"foreach": False}, {"foreach": True}, {"fused": True}, {"foreach": False, "amsgrad": True}]
)
@settings(max_examples=25, deadline=None)
@given(ks=sequences, seed=st.integers(0, 99), longest=st.sampled_from([math.inf, 2.0, 6.0, 12.0]))
def test_moments_and_weights_are_those_of_the_definition(way, ks, seed, longest):
    factors = [1.0 + 0.3 * math.sin(i) for i in range(len(ks))]
    options = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.3}
    optimizer, parameter, start, gradients, clock = run(
        torch.optim.AdamW, ks, factors, seed, longest, **options, **way
    )
    weights, second = adam_by_definition(
        start,
        gradients,
        [k / K_REF for k in ks],
        [3e-2 * f for f in factors],
        (0.9, 0.95),
        1e-3,
        0.3,
        factors,
        longest,
    )
    state = optimizer.state[parameter]
    np.testing.assert_allclose(state["exp_avg_sq"].numpy(), second, rtol=1e-12)
    if "amsgrad" not in way:  # it takes the largest moment so far
        np.testing.assert_allclose(parameter.detach().numpy(), weights, rtol=1e-11, atol=1e-12)
    # Nothing in the optimizer is other than in stock: its own count, its groups.
    assert int(state["step"]) == clock.steps == steps_taken(optimizer) == len(ks)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-3, 0.3)


@given(st.floats(0.5, 0.9999), st.floats(1 / 64, 8.0), st.floats(0.01, 1e4))
def test_memory_is_stretched_up_to_its_longest(beta2, ratio, longest):
    """Between what an unchanged β2 remembers of the data and what the recipe does, and no longer than it may be."""
    half_life = math.log(0.5) / math.log(beta2)
    found = moment_ratio(math.log(beta2), ratio, longest)
    in_data = ratio / found * half_life
    if ratio >= 1 or longest >= half_life:
        assert found == ratio  # to the bit: the same as if there were no longest
    else:
        assert in_data == pytest.approx(max(ratio * half_life, longest), rel=1e-9)
        assert ratio <= found <= 1


def test_groups_have_their_own_memory():
    parameters = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    betas = [(0.9, 0.5), (0.9, 0.999)]
    optimizer = torch.optim.AdamW([{"params": [p], "betas": b} for p, b in zip(parameters, betas, strict=True)])
    clock = SecondMomentClock(optimizer, moment_setting(optimizer), longest=5.0)
    ks, gradients = [1, 2, 2, 6, 1, 4], []
    for k in ks:
        gradients.append(torch.randn(3, dtype=torch.float64).numpy())
        for parameter in parameters:
            parameter.grad = torch.from_numpy(gradients[-1].copy())
        clock.begin_step(k / K_REF, 1.0)
        optimizer.step()
        clock.end_step()
    assert clock.windows == sum(ks) / K_REF
    assert clock.forgotten == [pytest.approx(4.0), pytest.approx(4 * 1.0 + 6 / 4 + 1)]
    for parameter, b in zip(parameters, betas, strict=True):
        weights, second = adam_by_definition(
            np.ones(3), gradients, [k / K_REF for k in ks], [1e-3] * 6, b, 1e-8, 1e-2, [1.0] * 6, 5.0
        )
        np.testing.assert_allclose(optimizer.state[parameter]["exp_avg_sq"].numpy(), second, rtol=1e-12)
        np.testing.assert_allclose(parameter.detach().numpy(), weights, rtol=1e-11)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "betas": (0.9, 0.5)})
    clock.begin_step(1.0, 1.0)
    assert clock.forgotten[-1] == clock.windows
    fewer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    clock = SecondMomentClock(fewer, moment_setting(fewer), 4, 2.0, forgotten=[3.0, 4.0])
    clock.begin_step(1.0, 1.0)
    assert clock.forgotten == [2.0]


@given(st.integers(1, 30), st.integers(1, 200))
def test_the_bias_is_right_by_itself_while_k_does_not_change(k, steps):
    windows = 0.0
    for _ in range(steps):
        windows += k / K_REF  # exact: quarters
    assert bias_ratio(math.log(0.999), k / K_REF, windows, steps) == 1.0


def test_the_bias_of_the_prototype_note():
    """At step 50 with β2 = .95 the rate of an uncorrected run is 1.40 times too high (k 2 → 8), 0.72 (8 → 2)."""
    log_beta2 = math.log(0.95)
    rise = 1 / bias_ratio(log_beta2, 1.0, 50 * 0.25, 50)
    fall = 1 / bias_ratio(log_beta2, 0.25, 50.0, 50)
    assert (rise, fall) == (pytest.approx(1.40, abs=0.02), pytest.approx(0.72, abs=0.02))


@pytest.mark.parametrize(
    ("optimizer_class", "options", "state_name"),
    [
        (torch.optim.Adam, {"betas": (0.9, 0.95), "weight_decay": 0.0}, "exp_avg_sq"),
        (torch.optim.NAdam, {"betas": (0.9, 0.95)}, "exp_avg_sq"),
        (torch.optim.RMSprop, {"alpha": 0.95}, "square_avg"),
    ],
)
def test_kin_of_adam(optimizer_class, options, state_name):
    ks = [1, 1, 2, 8, 8, 3, 1, 4, 4]
    optimizer, parameter, _, gradients, _ = run(optimizer_class, ks, **options)
    zeros = np.zeros(7)
    _, second = adam_by_definition(
        zeros, gradients, [k / K_REF for k in ks], [0.0] * 9, (0.9, 0.95), 1.0, 0.0, [1.0] * 9
    )
    np.testing.assert_allclose(optimizer.state[parameter][state_name].numpy(), second, rtol=1e-12)


def test_weight_decay_that_is_a_part_of_the_gradient_is_left_alone():
    assert moment_setting(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])).decouples_weight_decay
    assert not moment_setting(torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])).decouples_weight_decay


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adafactor, Adafactor])
def test_adafactor_forgets_by_reference_windows(optimizer_class):
    """Its decay rises with time: 1 − tᶜ in the reference window t. Of a window of κ, the κ-th power of that."""
    ks = [1, 1, 2, 8, 8, 3, 1, 4, 4]
    own = {"relative_step": False, "scale_parameter": False} if optimizer_class is Adafactor else {}
    optimizer, parameter, _, gradients, _ = run(optimizer_class, ks, lr=1e-3, **own)
    name, least = ("exp_avg_sq", 1e-30) if optimizer_class is Adafactor else ("variance", 0.0)
    second, windows = np.zeros(7), 0.0
    for gradient, k in zip(gradients, ks, strict=True):
        decay = (1 - (windows + 1) ** -0.8) ** (k / K_REF)
        second = decay * second + (1 - decay) * (gradient**2 + least)
        windows += k / K_REF
    np.testing.assert_allclose(optimizer.state[parameter][name].numpy(), second, rtol=1e-9)


def test_groups_have_their_own_betas():
    parameters = [torch.nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(3)]
    optimizer = torch.optim.AdamW([
        {"params": parameters[:1], "betas": (0.9, 0.95)},
        {"params": parameters[1:2], "betas": (0.8, 0.999)},
        {"params": parameters[2:], "betas": (0.9, 0.0)},
    ])  # fmt: skip
    clock = SecondMomentClock(optimizer, moment_setting(optimizer))
    clock.begin_step(0.25, 1.0)
    assert [group["betas"] for group in optimizer.param_groups] == [
        (0.9, pytest.approx(0.95**0.25)), (0.8, pytest.approx(0.999**0.25)), (0.9, 0.0),
    ]  # fmt: skip
    clock.put_back()
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.95), (0.8, 0.999), (0.9, 0.0)]


def test_rates_that_are_tensors_stay_the_same_tensors():
    """A graph or a compiled step holds on to them."""
    parameter = torch.nn.Parameter(torch.ones(1))
    rate = torch.tensor(1e-3)
    optimizer = torch.optim.AdamW([parameter], lr=rate, foreach=False, betas=(0.9, 0.95))
    clock = SecondMomentClock(optimizer, moment_setting(optimizer), steps=7, windows=2.0)
    clock.begin_step(1.0, 1.0)
    assert optimizer.param_groups[0]["lr"] != rate
    clock.end_step()
    assert optimizer.param_groups[0]["lr"] is rate


class Lion(torch.optim.SGD):
    pass


class AdamWScheduleFree(torch.optim.AdamW):
    pass


class MuonWithAuxAdam(torch.optim.AdamW):
    pass


class AdafactorBigVision(torch.optim.AdamW):
    def __init__(self, parameters):
        super().__init__(parameters)
        self.param_groups[0]["decay_rate"] = 0.8


def test_optimizers_without_a_second_moment_need_nothing():
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    assert moment_setting(torch.optim.SGD(parameters, lr=0.1, momentum=0.9)) is None
    assert moment_setting(Lion(parameters, lr=0.1)) is None


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: AdamWScheduleFree(p), "a clock of their own"),
        (lambda p: torch.optim.RAdam(p), "a clock of their own"),
        (lambda p: MuonWithAuxAdam(p), "only some of its groups"),
        (lambda p: AdafactorBigVision(p), "a negative power"),
        (lambda p: torch.optim.Adadelta(p), "no `betas`"),
    ],
)
def test_a_clock_that_cannot_be_set_is_said_once(tmp_path, caplog, make, reason):
    model = tiny_gpt2()
    args = arguments(tmp_path, gradient_accumulation_steps=4, num_train_epochs=1)
    trainer = quiet(
        AnyK(
            model=model,
            args=args,
            train_dataset=Rows(),
            sequence=[1, 5, 2],
            optimizers=(make(model.parameters()), None),
        )
    )
    with caplog.at_level(logging.WARNING, "hf_trainopt"):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "adam_clock" in record.getMessage()]
    assert len(said) == 1
    assert reason in said[0]
    assert trainer.trainopt.adam_clock.clock is None


class Listener(TrainerCallback):
    """Keeps the gradients of each window, and what the groups look like from outside a step."""

    def __init__(self):
        self.gradients, self.betas = [], set()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append([p.grad.clone() for p in model.parameters()])

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.betas |= {group["betas"] for group in optimizer.param_groups}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_moments_in_a_run(tmp_path, optim):
    listener = Listener()
    args = arguments(tmp_path, gradient_accumulation_steps=K_REF, optim=optim, adam_beta2=0.95, max_grad_norm=0.0)
    trainer = quiet(
        AnyK(
            model=tiny_gpt2(dtype=torch.float64), args=args, train_dataset=Rows(), callbacks=[listener],
            sequence=[1, 2, 2, 6, 3, 8, 1, 1, 5],
        )
    )  # fmt: skip
    ks = []
    before = trainer.trainopt.adam_clock._before_step

    def listen(*args):
        ks.append(trainer.trainopt.accumulation.last_window[0])
        before(*args)

    trainer.trainopt.adam_clock._before_step = listen
    trainer.train()
    assert len(set(ks)) >= 5
    assert listener.betas == {(0.9, 0.95)}
    half_life = math.log(0.5) / math.log(0.95)
    longest = LONGEST_MEMORY * trainer.trainopt.accumulation.cursor.budget  # so short a run stretches little
    decays = [0.5 ** (k / K_REF / max(longest, half_life * min(1, k / K_REF))) for k in ks]
    for index, parameter in enumerate(trainer.model.parameters()):
        second = torch.zeros_like(parameter)
        for gradients, decay in zip(listener.gradients, decays, strict=True):
            second = decay * second + (1 - decay) * gradients[index] ** 2
        state = trainer.optimizer.optimizer.state[parameter]
        torch.testing.assert_close(state["exp_avg_sq"], second, rtol=1e-12, atol=0)
        assert int(state["step"]) == trainer.state.global_step


def constant(observation):
    return float(observation.reference_steps)


def test_a_constant_k_is_stock_to_the_bit(tmp_path):
    """Windows, statistics and the clock are in play here, and change nothing."""
    settings = {"gradient_accumulation_steps": 2, "max_steps": 7, "adam_beta2": 0.95, "weight_decay": 0.1}
    ours = quiet(
        EfficientTrainer(
            model=tiny_gpt2(), args=arguments(tmp_path / "ours", lr_batch_scaling="surge", **settings),
            train_dataset=Rows(), accumulation_policy=constant,
        )
    )  # fmt: skip
    stock = quiet(
        Trainer(
            model=tiny_gpt2(), args=arguments(tmp_path / "stock", TrainingArguments, **settings), train_dataset=Rows()
        )
    )
    ours.train()
    stock.train()
    assert ours.trainopt.accumulation.used_range == (2, 2, 2)
    assert weights_equal(ours.model, stock.model)


def test_steps_are_the_other_clock(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=4, adam_clock="steps", num_train_epochs=1)
    trainer = quiet(AnyK(model=tiny_gpt2(), args=args, train_dataset=Rows(), sequence=[1, 5, 2]))
    seen = []
    trainer.add_callback(type("See", (TrainerCallback,), {
        "on_pre_optimizer_step": lambda self, *a, **k: seen.append(trainer.trainopt.adam_clock.clock)})())  # fmt: skip
    trainer.train()
    assert seen
    assert set(seen) == {None}


def train_and_count(trainer) -> list[int]:
    """Train; return the steps on the clock at the end of it."""
    counted = []

    class See(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            counted.append(trainer.trainopt.adam_clock.clock.steps)

    trainer.add_callback(See())
    trainer.train()
    return counted


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_skipped_step_does_not_count(tmp_path, optim):
    """Fused Adam is called for it and told on the device; the others aren't called."""

    class Bad(AnyK):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.calls += 1
            return loss * (math.nan if self.calls in (4, 9) else 1.0)

    args = arguments(tmp_path, gradient_accumulation_steps=4, optim=optim, max_skipped_windows=3)
    trainer = quiet(Bad(model=tiny_gpt2(), args=args, train_dataset=Rows(), sequence=[1, 2, 3]))
    counted = train_and_count(trainer)
    assert trainer.trainopt.skipped_steps.count.total == 2
    assert counted == [steps_taken(trainer.optimizer.optimizer)] == [trainer.state.global_step - 2]


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_an_overflow_of_fp16_does_not_count(tmp_path, monkeypatch, optim):
    """The scaler doesn't call an optimizer; fused Adam is called and looks for overflows itself."""
    pretend(monkeypatch, scales_fp16())
    cls = type("Hot", (HalfTrainer,), {"scaler": {"init_scale": 2.0**24}})
    args = arguments(tmp_path, precision="fp16", optim=optim, optimizer_step_cost=1.0, gradient_accumulation_steps=4)
    trainer = quiet(cls(model=tiny_gpt2(), args=args, train_dataset=Rows(60)))
    counted = train_and_count(trainer)
    skipped = [line["skipped_steps"] for line in trainer.state.log_history if "skipped_steps" in line][-1]
    assert skipped >= 3
    assert counted == [steps_taken(trainer.optimizer.optimizer)] == [trainer.state.global_step - skipped]


def test_hooks_leave_the_optimizer_with_the_run(tmp_path):
    model = tiny_gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    args = arguments(tmp_path, gradient_accumulation_steps=4, num_train_epochs=1)
    for _ in range(2):
        quiet(
            AnyK(model=model, args=args, train_dataset=Rows(), sequence=[1, 5], optimizers=(optimizer, None))
        ).train()
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks


def test_a_second_run_goes_on_where_the_first_has_ended(tmp_path):
    """The Trainer keeps its optimizer, and so does whoever passes it to another one."""
    args = arguments(tmp_path, gradient_accumulation_steps=8, max_steps=3, adam_beta2=0.999)
    trainer = quiet(AnyK(model=tiny_gpt2(), args=args, train_dataset=Rows(60), sequence=[1]))
    seen = []

    class See(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock = trainer.trainopt.adam_clock.clock
            seen.append((clock.steps, clock.windows))

    trainer.add_callback(See())
    trainer.train()
    first, steps_of_first = seen[-1], len(seen)
    trainer.train()
    steps, windows = seen[steps_of_first]
    assert steps == first[0] + 1
    assert first[1] < windows <= first[1] + 1


def test_a_checkpoint_without_the_optimizer_begins_on_average(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=4)
    trainer = quiet(AnyK(model=tiny_gpt2(), args=args, train_dataset=Rows(), sequence=[1]))
    part = trainer.trainopt.adam_clock
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    part.load_state_dict({"steps": 40, "windows": 10.0})
    assert part._start(optimizer) == (0, 0.0, [])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    assert part._start(optimizer) == (1, 0.25, [])
    part.load_state_dict({"steps": 40, "windows": 10.0, "forgotten": [20.0]})
    assert part._start(optimizer) == (1, 0.25, [0.5])


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_bad_loss_with_good_gradients_under_a_scaler_does_not_count(tmp_path, monkeypatch, optim):
    """The scaler sees its step through, with no gradients: the optimizer is called and does nothing."""
    pretend(monkeypatch, scales_fp16())

    class Bad(HalfTrainer):
        scaler = {"init_scale": 2.0}  # noqa: RUF012
        calls = 0

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.calls += self.model.training
            return loss + (math.inf if self.calls == 5 else 0.0)

    args = arguments(tmp_path, precision="fp16", optim=optim, optimizer_step_cost=1.0, gradient_accumulation_steps=2)
    trainer = quiet(Bad(model=tiny_gpt2(), args=args, train_dataset=Rows(60)))
    counted = train_and_count(trainer)
    assert trainer.trainopt.skipped_steps.count.total >= 1
    assert counted == [steps_taken(trainer.optimizer.optimizer)]


def test_eight_bit_adamw():
    """Against torch's own: the moments are rounded to 8 bits, the weights come out alike to that accuracy."""
    module = pytest.importorskip("bitsandbytes")
    ks = [1, 1, 2, 8, 8, 3, 1, 4, 4, 12]
    results = []
    for optimizer_class in (module.optim.AdamW8bit, torch.optim.AdamW):
        generator = torch.Generator().manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(4, 4096, generator=generator))
        optimizer = optimizer_class([parameter], lr=1e-2, betas=(0.9, 0.8), weight_decay=0.3)
        clock = SecondMomentClock(optimizer, moment_setting(optimizer))
        for k in ks:
            parameter.grad = torch.randn(4, 4096, generator=generator)
            clock.begin_step(k / K_REF, 1.0)
            optimizer.step()
            clock.end_step()
        results.append(parameter.detach().clone())
    assert (results[0] - results[1]).abs().mean() < 2e-3
