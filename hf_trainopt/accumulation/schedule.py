"""Learning rates as a function of the data consumed and of the batch, whatever k does."""

import logging
import math
import numbers
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from transformers.optimization import GreedyLR


logger = logging.getLogger(__name__)

# Driven by evaluation metrics, not by steps: Trainer steps them itself, and they need no index.
METRIC_DRIVEN = (ReduceLROnPlateau, GreedyLR)

# Our part of a saved schedule: it is in `scheduler.pt`, so that the state of a schedule is in one place.
STATE_KEY = "hf_trainopt"

BATCH_SCALING_RULES = ("auto", "none", "sqrt", "linear", "surge")
# Those that follow the measured noise scale.
NOISE_SCALING_RULES = ("surge",)


def chosen_rule(rule: str, measures: bool) -> str:
    """Return what `"auto"` stands for: `"surge"` where the noise scale is measured, `"sqrt"` where it is not known."""
    if rule != "auto":
        return rule
    return "surge" if measures else "sqrt"


def batch_scaling_factor(
    rule: str,
    accumulation_steps: int,
    reference_steps: int,
    noise_in_micro_batches: float | None,
    adaptive: bool,
    growth: float = 1.0,
) -> float:
    r"""Factor on the learning rate for a batch of k instead of k_ref micro-batches.

    With κ = k/k_ref:

    - `"none"`: 1.
    - `"sqrt"`: √κ (Malladi et al. 2022, arXiv 2205.10287, for Adam where noise dominates).
    - `"linear"`: κ (Goyal et al. 2017, arXiv 1706.02677, for SGD).
    - `"surge"`: transfer, then annealing. The batch has grown by the factor g = `growth` in place of a lower rate;
      without that it would have k* = max(k/g, 1) micro-batches.

      *Transfer* from k_ref to k*: s(k*)/s(k_ref), where s(B) = 2/(√(B_noise/B) + √(B/B_noise)) is the best rate of
      updates by sign, for Adam and its kin (Li et al. 2024, arXiv 2405.14578). It rises up to the noise scale; its
      fall beyond is left out. So a rate that was tuned for a batch of more than the noise scale is kept for smaller
      ones, where √κ would lower it. While B_noise is unknown √(k*/k_ref), its limit for small batches. For SGD the
      gain (1 + B_noise/k_ref)/(1 + B_noise/k*) of AdaScale (Johnson et al. 2020, arXiv 2007.05105).

      *Annealing* from k* to k: √(k/k*), for SGD k/k*, so that batch and rate together have the noise that the
      schedule asks for (Meterez et al. 2025, arXiv 2510.14717; Smith et al. 2018, arXiv 1711.00489).

    Args:
        rule: One of `BATCH_SCALING_RULES`, but not `"auto"` (see `chosen_rule`).
        accumulation_steps: k.
        reference_steps: k_ref.
        noise_in_micro_batches: B_noise in micro-batches over all ranks, or `None`.
        adaptive: Whether the optimizer is Adam-like (anything but SGD).
        growth: g, at least 1.

    Returns:
        The factor. It is 1.0 at k = k_ref, but where the batch has grown.
    """
    ratio = accumulation_steps / reference_steps
    if rule == "none":
        return 1.0
    if rule == "sqrt":
        return math.sqrt(ratio)
    if rule == "linear":
        return ratio
    if rule not in NOISE_SCALING_RULES:
        raise ValueError(f"lr_batch_scaling is '{rule}'; choose one of {', '.join(BATCH_SCALING_RULES)}.")
    power = 0.5 if adaptive else 1.0
    wanted = max(accumulation_steps / growth, 1.0)
    annealing = (accumulation_steps / wanted) ** power
    if wanted == reference_steps:
        return annealing
    noise = noise_in_micro_batches
    if noise is None or not math.isfinite(noise):
        return (wanted / reference_steps) ** power * annealing
    if adaptive:
        return _best_sign_rate(wanted, noise) / _best_sign_rate(reference_steps, noise) * annealing
    return (1 + noise / reference_steps) / (1 + noise / wanted) * annealing


def _best_sign_rate(batch: float, noise: float) -> float:
    """ε_opt(B)/ε_max of Li et al. 2024 for updates by sign; beyond the noise scale 1, where theirs falls."""
    if batch >= noise:
        return 1.0
    return 2 / (math.sqrt(noise / batch) + math.sqrt(batch / noise))


def torch_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside Accelerate's wrapper, and inside the one that DeepSpeed's engine puts around it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, Optimizer) else getattr(inner, "optimizer", inner)


def is_adaptive_optimizer(optimizer: Any) -> bool:
    """Return whether `optimizer` (or the one inside its wrappers) is anything but SGD."""
    return "sgd" not in type(torch_optimizer(optimizer)).__name__.lower()


class DataIndexedLR(LRScheduler):
    """Evaluates a step-indexed schedule at a position in the data, times the batch-scaling factor.

    Stock `Trainer` steps the schedule once an optimizer step, so that it would run too fast or too slow as k changes.
    Here `set_position` says where in the data (in reference windows, see `DataCursor`) the next window begins, and
    `step` applies it. At a whole position and factor 1 the rates are those of the schedule inside, bit for bit.

    A `LambdaLR` (every `lr_scheduler_type` that is not metric-driven is one) is evaluated at fractional positions; at
    whole ones if its function takes no others (a table of rates). Any other scheduler, a subclass with a `get_lr` of
    its own too, is a recursion and is stepped once for each whole reference window that was passed. What is not
    defined here is that of the schedule inside, for callbacks that read or change it.

    Attributes:
        applied_scale: Batch-scaling factor in the rates that the optimizer has; `scale` is that of the next `step`.

    Args:
        inner: Schedule in reference windows, with `step`, `get_last_lr` and `state_dict`.
        optimizer: Whose rates are set; by default that of the schedule.
    """

    def __init__(self, inner: Any, optimizer: Optimizer | None = None):
        # Deliberately not `super().__init__()`: that would step the optimizer's rates a second time.
        self.inner = inner
        self.optimizer = getattr(inner, "optimizer", optimizer)
        self._closed_form = isinstance(inner, LambdaLR) and type(inner).get_lr is LambdaLR.get_lr
        self._initial_lrs = [group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups]
        # A schedule that was stepped before (by the user, or in an earlier `train`) goes on from there.
        self._offset = inner.last_epoch if self._closed_form else 0
        self.position: int | float = 0
        self.scale = self.applied_scale = 1.0
        self._whole_steps = 0
        self._whole_positions = False
        self._last_lr = list(inner.get_last_lr())

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or name.startswith("__"):  # not there yet, in a copy
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def last_epoch(self) -> int | float:
        """Position in reference windows (the name is torch's). To set it moves the schedule, as in torch."""
        return self.position

    @last_epoch.setter
    def last_epoch(self, value: int | float) -> None:
        self._offset += value - self.position

    @property
    def base_lrs(self) -> list[float]:
        """Base rates of the parameter groups, those of the schedule inside."""
        return getattr(self.inner, "base_lrs", None) or self._initial_lrs

    @base_lrs.setter
    def base_lrs(self, value: list[float]) -> None:
        self.inner.base_lrs = value

    @property
    def lr_lambdas(self) -> list[Any]:
        """Functions of a `LambdaLR`, those of the schedule inside."""
        return self.inner.lr_lambdas

    @lr_lambdas.setter
    def lr_lambdas(self, value: list[Any]) -> None:
        self.inner.lr_lambdas = value

    def set_position(self, position: int | float, scale: float) -> None:
        """Say where the next window begins and how its batch scales the rate; `step` applies it."""
        self.position, self.scale = position, scale

    def factor(self, position: int | float) -> float:
        """Schedule at a position relative to the base rate, batch scaling excluded (a recursion: where it stands)."""
        if self._closed_form:
            return float(self._evaluate(self.inner.lr_lambdas[0], position))
        return self.inner.get_last_lr()[0] / self.base_lrs[0] if self.base_lrs[0] else 0.0

    def _evaluate(self, function: Any, position: int | float) -> float:
        """Return a function of a `LambdaLR` at a position; of one that takes whole steps only, at that before it.

        It may be any callable: a table's lookup has no value between two steps, whatever it says so with.
        """
        place = position + self._offset
        if isinstance(place, int):
            return function(place)
        if not self._whole_positions:
            value = problem = None
            try:
                value = function(place)
            except Exception as error:
                problem = error
            if problem is None and isinstance(value, numbers.Real | torch.Tensor | np.generic):
                return value
            try:
                function(math.floor(place))
            except Exception:  # it is something else, then
                if problem is None:
                    raise
                raise problem from None
            self._whole_positions = True
            logger.warning("The learning-rate schedule takes whole steps only: it is constant in between.")
        return function(math.floor(place))

    def step(self, epoch: Any = None) -> None:
        """Set the optimizer's learning rates for the next window. Doing it twice changes nothing."""
        if self._closed_form:
            rates = [
                base * self._evaluate(function, self.position)
                for base, function in zip(self.inner.base_lrs, self.inner.lr_lambdas, strict=True)
            ]
            self.inner.last_epoch = self.position + self._offset
            self.inner._last_lr = rates
        else:
            self._set_rates(self._unscaled_rates())
            while self._whole_steps < math.floor(self.position):
                self.inner.step()
                self._whole_steps += 1
            rates = self.inner.get_last_lr()
        self._last_lr = [rate * self.scale for rate in rates]
        self.applied_scale = self.scale
        self._set_rates(self._last_lr)

    def _set_rates(self, rates: list[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if hasattr(group["lr"], "fill_"):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _unscaled_rates(self) -> list[float]:
        """Return the rates that the schedule inside goes on from: it continues from what it finds in the optimizer.

        Those in the optimizer are scaled. If somebody has changed them since (a callback), so have these.
        """
        rates = list(self.inner.get_last_lr())
        for index, (group, last) in enumerate(zip(self.optimizer.param_groups, self._last_lr, strict=True)):
            if last and group["lr"] != last:
                rates[index] *= float(group["lr"]) / last
                if hasattr(self.inner, "_last_lr"):
                    self.inner._last_lr = rates
        return rates

    def unwrapped(self) -> LRScheduler:
        """Return the schedule inside, to go on from here with stock accumulation: its rates are not scaled."""
        self.scale = 1.0
        self.step()
        return self.inner

    def get_last_lr(self) -> list[float]:
        return self._last_lr

    def get_lr(self) -> list[float]:
        return self._last_lr

    def state_dict(self) -> dict[str, Any]:
        """The state of the schedule inside, which stock `Trainer` can load, and ours under one key."""
        ours = {
            "position": self.position,
            "scale": self.scale,
            "whole_steps": self._whole_steps,
            "offset": self._offset,
            "last_lr": [float(rate) for rate in self._last_lr],
        }
        return {**self.inner.state_dict(), STATE_KEY: ours}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load its own state, or the state of a stock schedule (a checkpoint that stock `Trainer` wrote)."""
        inner = dict(state_dict)
        ours = inner.pop(STATE_KEY, None)
        self.inner.load_state_dict(inner)
        if ours is None:
            # A position is known already: the Trainer's, taken from the number of steps.
            self._whole_steps = math.floor(self.position)
            self._last_lr = list(self.inner.get_last_lr())
            # Not where the schedule was when this run began: it may be one that an earlier `train` has stepped.
            self._offset = self.inner.last_epoch - self._whole_steps if self._closed_form else 0
            return
        self.position = ours["position"]
        self.scale = self.applied_scale = ours["scale"]
        self._whole_steps, self._offset = ours["whole_steps"], ours.get("offset", 0)
        self._last_lr = list(ours["last_lr"])
