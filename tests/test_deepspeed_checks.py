"""DeepSpeed without DeepSpeed: what is refused, schedules of its kind, times. Training is in test_deepspeed.py."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from helpers import Rows, arguments, tiny_gpt2
from transformers import Trainer

from hf_trainopt import EfficientTrainer
from hf_trainopt.accumulation import deepspeed_checks, timing
from hf_trainopt.accumulation.deepspeed_schedule import DeepSpeedLR, EngineLR, Held, take_over
from hf_trainopt.accumulation.schedule import is_adaptive_optimizer, torch_optimizer
from hf_trainopt.accumulation.timing import StepTimer


RAMP = {"accumulation_policy": "ramp", "accumulation_ramp": "0:2"}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Return a function that makes a Trainer which takes itself to be under DeepSpeed."""

    def make(config: dict, version: str | None = "0.19.8", **settings):
        stock = Trainer.create_accelerator_and_postprocess

        def create(self):
            stock(self)
            self.is_deepspeed_enabled = True

        monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create)
        monkeypatch.setattr(deepspeed_checks, "installed_version", lambda package: version)
        monkeypatch.setattr(deepspeed_checks, "config_of", lambda trainer: config)
        return EfficientTrainer(model=tiny_gpt2(), args=arguments(tmp_path, **settings), train_dataset=Rows(8))

    return make


def zero(stage: int, **more) -> dict:
    return {"zero_optimization": {"stage": stage, **more.pop("zero", {})}, **more}


REFUSED = {
    "fp16 in ZeRO-0": (zero(0, fp16={"enabled": True}), "fp16 and ZeRO stage 0.*zero_optimization.stage to 1 or more"),
    "autocast in ZeRO-0": (zero(0, torch_autocast={"enabled": True}), "torch_autocast and ZeRO stage 0.*to 1 or more"),
    "ZenFlow": (zero(2, zero={"zenflow": {"topk_ratio": 0.1}}), "ZenFlow.*take zero_optimization.zenflow out"),
    "1-bit Adam": (zero(0, optimizer={"type": "OneBitAdam"}), "optimizer.type 'onebitadam'.*choose 'AdamW'"),
    "Muon in ZeRO-3": (zero(3, optimizer={"type": "Muon"}), "Muon in ZeRO stage 3.*choose stage 2"),
    "unmanaged": (zero(2, managed_gradient_accumulation=False), "managed_gradient_accumulation: false.*take it out"),
    "AutoTP": (zero(1, tensor_parallel={"autotp_size": 2}), "tensor_parallel.*take it out"),
    "AutoEP": (zero(1, expert_parallel={"enabled": True}), "expert_parallel.*take it out"),
    "Ulysses": (zero(3, sequence_parallel_size=2), "sequence_parallel_size above 1.*take it out"),
}

REFUSED_WHERE_MEASURED = {
    "no norm": (zero(2, zero={"compute_grad_norm": False}), {}, "compute_grad_norm: false.*set it to true"),
    "DeepCompile": (zero(3, compile={"deepcompile": True}), {}, "compile.deepcompile under DeepSpeed"),
    "torch_compile": (zero(3), {"torch_compile": True}, "torch_compile under DeepSpeed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_with_the_remedy(name, make):
    config, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"does not work with {message}, or set accumulation_policy='fixed'"):
        make(config, **RAMP).train()


@pytest.mark.parametrize("name", REFUSED_WHERE_MEASURED)
def test_what_cannot_be_measured_is_refused(name, make):
    config, settings, message = REFUSED_WHERE_MEASURED[name]
    with pytest.raises(ValueError, match=message):
        make(config, **settings).train()
    make(config, **RAMP, **settings).trainopt.accumulation.check_setup()


@pytest.mark.parametrize("stage", range(4))
def test_all_stages_are_taken(stage, make):
    for precision in ({}, {"bf16": {"enabled": True}}, *([{"fp16": {"enabled": True}}] if stage else [])):
        make(zero(stage, **precision)).trainopt.accumulation.check_setup()


@pytest.mark.parametrize("settings", [{}, RAMP])
def test_versions_that_are_silently_wrong_are_refused(settings, make):
    with pytest.raises(ValueError, match=r"deepspeed 0\.18\.9.*pip install 'deepspeed>=0\.19\.0'"):
        make(zero(2), "0.18.9", **settings).train()
    make(zero(2), "0.19.0", **settings).trainopt.accumulation.check_setup()
    make(zero(2), None, **settings).trainopt.accumulation.check_setup()


def test_one_reduction_a_window_needs_a_version_and_a_stage(make):
    once = {"coalesce_grad_reduction": True}
    with pytest.raises(ValueError, match=r"coalesce_grad_reduction needs deepspeed >= 0\.19\.2, not 0\.19\.0"):
        make(zero(2), "0.19.0", **once).train()
    with pytest.raises(ValueError, match="coalesce_grad_reduction is for ZeRO stages 1 to 3"):
        make(zero(0), **once).train()


def test_one_reduction_a_window_is_ignored_without_deepspeed(tmp_path, caplog):
    args = arguments(tmp_path, coalesce_grad_reduction=True)
    with caplog.at_level(logging.WARNING):
        EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(8))
    assert "coalesce_grad_reduction is ignored: there is no DeepSpeed engine" in caplog.text


@pytest.mark.parametrize(
    ("config", "version", "reason"),
    [
        (zero(2), "0.19.8", None),
        (zero(3, bf16={"enabled": True}), None, None),
        (zero(2), "0.19.6", "deepspeed 0.19.6 steps with gradients that are not finite"),
        (zero(2, bf16={"enabled": True, "check_grad_overflow": False}), "0.19.8", "check_grad_overflow is false"),
        (zero(2, zero={"compute_grad_norm": False}), "0.19.8", "compute_grad_norm is false"),
    ],
)
def test_where_steps_cannot_be_skipped(config, version, reason, make):
    obstacle = make(config, version).trainopt.skipped_steps.obstacle
    assert obstacle is None if reason is None else reason in obstacle


# ---- Schedules -----------------------------------------------------------------------------------------------------


class Ramp:
    """A schedule as DeepSpeed's are: a function of `last_batch_iteration`, no rate before the first step."""

    def __init__(self, optimizer):
        self.optimizer, self.last_batch_iteration = optimizer, -1
        self.max_lrs = [0.5] * len(optimizer.param_groups)
        for group in optimizer.param_groups:
            group["lr"] = 0.01

    def get_lr(self):
        assert isinstance(self.last_batch_iteration, int), "whole steps only"
        return [min(0.5, 0.1 * (self.last_batch_iteration + 1) ** 2)] * len(self.optimizer.param_groups)

    def step(self, last_batch_iteration=None):
        if last_batch_iteration is None:
            last_batch_iteration = self.last_batch_iteration + 1
        self.last_batch_iteration = last_batch_iteration
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

    def get_last_lr(self):
        assert hasattr(self, "_last_lr"), "need to call step() first"
        return self._last_lr

    def state_dict(self):
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state):
        self.last_batch_iteration = state["last_batch_iteration"]


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.3)


def rates_of_steps(count: int) -> list[float]:
    """Rates that DeepSpeed's engine makes its steps with."""
    optimizer = sgd()
    schedule, rates = Ramp(optimizer), []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    return rates


def test_at_whole_positions_the_rates_are_deepspeeds():
    optimizer = sgd()
    schedule, rates = DeepSpeedLR(Ramp(optimizer)), []
    for position in range(6):
        schedule.set_position(position, 1.0)
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == rates_of_steps(6)
    assert schedule.state_dict()["last_batch_iteration"] == 4  # stock goes on from here


def test_between_them_the_rate_is_interpolated_and_scaled():
    optimizer, whole = sgd(), rates_of_steps(4)
    schedule = DeepSpeedLR(Ramp(optimizer))
    for position in (0.25, 1.5, 2.75):
        low, share = int(position), position % 1
        schedule.set_position(position, 2.0)
        schedule.step()
        expected = (1 - share) * whole[low] + share * whole[low + 1]
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * expected)
        assert schedule.get_last_lr() == [optimizer.param_groups[0]["lr"]]
        assert schedule.factor(position) == pytest.approx(expected / 0.5)


def test_it_goes_on_from_its_own_state_and_from_deepspeeds():
    optimizer, stock = sgd(), Ramp(sgd())
    schedule = DeepSpeedLR(Ramp(optimizer))
    schedule.set_position(2.5, 1.5)
    schedule.step()
    again = DeepSpeedLR(Ramp(sgd()))
    again.load_state_dict(schedule.state_dict())
    again.step()
    assert again.optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    for _ in range(3):
        stock.step()
    later = DeepSpeedLR(Ramp(sgd()))
    later.set_position(3, 1.0)
    later.load_state_dict(stock.state_dict())
    later.step()
    assert later.optimizer.param_groups[0]["lr"] == rates_of_steps(4)[3]
    stock.load_state_dict(later.state_dict())
    assert stock.last_batch_iteration == 2


def test_the_engine_saves_the_schedule_and_does_not_step_it():
    optimizer = sgd()
    engine = SimpleNamespace(lr_scheduler=Ramp(optimizer))
    taken = take_over(engine)
    assert isinstance(engine.lr_scheduler, Held)
    taken.set_position(2, 1.0)
    taken.step()
    before = optimizer.param_groups[0]["lr"]
    engine.lr_scheduler.step()
    assert optimizer.param_groups[0]["lr"] == before
    assert engine.lr_scheduler.state_dict() == taken.state_dict()
    assert engine.lr_scheduler.get_last_lr() == [before]


def test_a_schedule_of_pytorch_that_the_engine_holds_follows_the_data():
    optimizer = sgd()
    engine = SimpleNamespace(lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)))
    taken = take_over(engine)
    taken.set_position(1.5, 1.0)
    taken.step()
    assert isinstance(taken, EngineLR)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3 / 2.5)
    plateau = SimpleNamespace(lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))
    assert take_over(plateau) is None
    assert take_over(SimpleNamespace(lr_scheduler=None)) is None


# ---- The rest ------------------------------------------------------------------------------------------------------


def test_an_optimizer_is_found_inside_both_wrappers():
    Accelerator(cpu=True)  # the wrapper looks at its state
    inner = sgd()
    of_engine = SimpleNamespace(optimizer=inner, param_groups=inner.param_groups)
    wrapped = DeepSpeedOptimizerWrapper(of_engine)
    assert torch_optimizer(wrapped) is torch_optimizer(of_engine) is torch_optimizer(inner) is inner
    assert not is_adaptive_optimizer(wrapped)
    assert is_adaptive_optimizer(torch.optim.AdamW([torch.zeros(1, requires_grad=True)]))


def test_a_step_that_an_engine_takes_early_is_timed_as_a_step(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    timer = StepTimer()
    for _ in range(4):
        timer.start_window()
        timer.fetched(2)
        for last in (False, True):
            clock.now += 1.0
            timer.micro_batch_done(last=last)
        clock.now += 5.0
        timer.engine_has_stepped()
        clock.now += 100.0  # our own book-keeping
        timer.restart()
        clock.now += 0.5
        timer.step_done()
    assert timer.micro_batch_seconds == 1.0
    assert timer.step_seconds == 5.5


def test_a_bad_loss_spoils_the_gradient(make):
    part = make(zero(2)).trainopt.skipped_steps
    weight = torch.tensor([2.0], requires_grad=True)

    def gradient(loss):
        return torch.autograd.grad(part.spoiled(loss), weight)[0].item()

    assert part.spoiled(weight.sum()) is not None
    part._windows = SimpleNamespace()
    assert gradient(weight.sum() * 3) == 3.0
    assert math.isnan(gradient(weight.sum() + torch.inf))
    part._lacks = torch.tensor(True)
    assert gradient(weight.sum() + torch.nan) == 1.0  # nothing to predict: its mean is 0/0
