"""Schedules that DeepSpeed's engine would step by itself: taken over, so that they follow the data.

With an optimizer or a scheduler in its configuration, the engine makes the schedule and steps it with each optimizer
step. Here the engine gets a `Held` in its place, which it saves and loads but cannot step, so that a checkpoint holds
the schedule where stock `Trainer` and DeepSpeed look for it.
"""

import math
from typing import Any

from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper

from .schedule import METRIC_DRIVEN, STATE_KEY, DataIndexedLR


class Held:
    """A schedule as the engine has it: saved and loaded, never stepped.

    Args:
        schedule: What it stands for.
    """

    def __init__(self, schedule: "EngineLR"):
        self._schedule = schedule

    def step(self, *args, **kwargs) -> None:
        """Do nothing: the engine steps in the middle of `Trainer`'s step."""

    def __getattr__(self, name: str) -> Any:
        if name == "_schedule" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._schedule, name)


class EngineLR(DataIndexedLR, DeepSpeedSchedulerWrapper):
    """A schedule of PyTorch's kind that the engine holds. `Trainer` leaves it to the engine to save and load it."""


class DeepSpeedLR(EngineLR):
    """One of DeepSpeed's own schedules (`WarmupLR`, `OneCycle`, ...).

    They are functions of a whole number of steps. Between two of them the rate is interpolated. The engine makes its
    first step at the rate that the schedule has begun with, and its (n + 1)-th at the rate of `step(n − 1)`.
    """

    def __init__(self, inner: Any):
        # Neither `super().__init__()`: that asks for rates which some of them don't have before their first step.
        self.inner = inner
        self.optimizer = inner.optimizer
        self._closed_form = False
        self._initial_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._offset = 0
        self.position: int | float = 0
        self.scale = self.applied_scale = 1.0
        self._whole_steps = 0
        self._last_lr = list(self._initial_lrs)

    @property
    def base_lrs(self) -> list[float]:
        """Base rates of the parameter groups: the largest ones, where the schedule has them."""
        rates = getattr(self.inner, "max_lrs", None) or getattr(self.inner, "org_lrs", None) or self._initial_lrs
        return [float(rate) for rate in rates]

    @base_lrs.setter
    def base_lrs(self, value: list[float]) -> None:
        raise AttributeError("the rates of a DeepSpeed schedule are set in its configuration")

    def factor(self, position: int | float) -> float:
        base = self.base_lrs[0]
        return self._rates(position)[0] / base if base else 0.0

    def _index(self, position: int | float) -> int | float:
        return position + self._offset - 1

    def _rates(self, position: int | float) -> list[float]:
        """Return the rates at a position, not scaled."""
        index = self._index(position)
        low = math.floor(index)
        rates, share = self._rates_of_step(low), index - low
        if not share:
            return rates
        pairs = zip(rates, self._rates_of_step(low + 1), strict=True)
        return [(1 - share) * before + share * after for before, after in pairs]

    def _rates_of_step(self, index: int) -> list[float]:
        if index < 0:
            return self._initial_lrs
        before, self.inner.last_batch_iteration = self.inner.last_batch_iteration, index
        try:
            return [float(rate) for rate in self.inner.get_lr()]
        finally:
            self.inner.last_batch_iteration = before

    def step(self, epoch: Any = None) -> None:
        low = math.floor(self._index(self.position))
        if low >= 0:
            self.inner.step(low)  # `OneCycle` sets momenta as well
        self._last_lr = [rate * self.scale for rate in self._rates(self.position)]
        self.applied_scale = self.scale
        self._set_rates(self._last_lr)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if STATE_KEY in state_dict:
            super().load_state_dict(state_dict)
            return
        self.inner.load_state_dict(state_dict)  # stock's
        self._offset = self.inner.last_batch_iteration + 1 - math.floor(self.position)
        self._last_lr = [float(group["lr"]) for group in self.optimizer.param_groups]


def take_over(engine: Any) -> EngineLR | None:
    """Take the schedule away from the engine, and return one that follows the data.

    Args:
        engine: `deepspeed.DeepSpeedEngine`.

    Returns:
        `None` if it has none, or one that evaluations drive.
    """
    schedule = engine.lr_scheduler
    if isinstance(schedule, DataIndexedLR):  # made by `create_scheduler` of the Trainer, on the engine's behalf
        schedule = schedule.inner
    if schedule is None or isinstance(schedule, METRIC_DRIVEN):
        return None
    taken = DeepSpeedLR(schedule) if hasattr(schedule, "last_batch_iteration") else EngineLR(schedule)
    engine.lr_scheduler = Held(taken)
    return taken
