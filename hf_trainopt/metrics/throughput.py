"""Samples, tokens and FLOPs a second, warm-up and evaluations left out."""

import logging

from ..core.log_lines import is_last_line
from .base import MeteredCallback
from .flops import FlopCounter, StepFlops, device_peak_flops, why_not_counted
from .meter import Reading


logger = logging.getLogger(__name__)


class ThroughputCallback(MeteredCallback):
    """Measures what a run trains on in a second, over all ranks.

    Logged keys: `train_time_s` (seconds of training so far, evaluations and saves left out, those before a resume
    included) and `samples_seen` on every line; `samples_per_second`, `tokens_per_second`, `flops_per_second` and `mfu`
    since the line before on every line with a loss, and over the whole run, warm-up left out, on the last line.

    FLOPs are counted operator by operator in the first warm-up step of rank 0 (of each rank, for its own log), and
    taken as proportional to tokens, or to samples where the model takes no tokens: where lengths vary, attention,
    which is quadratic in them, is off by what that batch differs from the mean. `flops_per_second` is what the devices
    do, recomputation and optimizer included. `mfu` (model FLOPs utilisation) is the share of the devices' peak that
    one forward and one backward pass without recomputation use (PaLM, arXiv 2204.02311, appendix B); it is there where
    the peak is known (see `peak_flops`).

    Args:
        warmup_steps: Optimizer steps at the start (and after a resume) that rates leave out: lazy initialisation,
            autotuning, cold caches. With 0 FLOPs are not counted.

    Raises:
        ValueError: `warmup_steps` is negative.
    """

    def __init__(self, warmup_steps: int = 2):
        super().__init__()
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps is {warmup_steps}; it must not be negative.")
        self.warmup_steps = warmup_steps
        self.step_flops: StepFlops | None = None
        self._first_step = 0
        self._start: Reading | None = None
        self._last: Reading | None = None
        self._counter: FlopCounter | None = None
        self._before_counting = (0, 0)
        self._counted_in = (0, 0)  # samples and tokens of the step that was counted
        self._peak: float | None = None

    def arguments(self):
        return {"warmup_steps": self.warmup_steps}

    def begin(self, args, state, saved, model=None, **kwargs):
        super().begin(args, state, saved, model=model, **kwargs)
        self._first_step = state.global_step
        self.step_flops = None
        self._start = self._last = None if self.warmup_steps else self.meter.reading

    def close(self):
        super().close()
        self._leave_mode()
        self._counter = None

    def _leave_mode(self) -> None:
        if self._counter is not None and self._counter.leave():
            self._counter = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        super().on_step_begin(args, state, control, **kwargs)
        # In the first step: placement measures the second one with a mode of its own.
        rates_follow = 0 < self.warmup_steps < state.max_steps - self._first_step
        if state.global_step != self._first_step or not rates_follow or model is None:
            self._leave_mode()  # if somebody else's kept it from that
            return
        reason = why_not_counted(args, model)
        if reason is not None:
            logger.info("FLOPs are not counted: %s.", reason)
            return
        self._before_counting = self.meter.local
        self._counter = FlopCounter()
        self._counter.__enter__()

    def step_repeated(self) -> None:
        super().step_repeated()
        if self._counter is not None:
            self._counter.restart()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._counter is not None:
            self._counter.in_optimizer = True

    def on_optimizer_step(self, args, state, control, **kwargs):
        # Not at the end of the step, before which the callbacks of others may run a model.
        self._finish_counting(args)

    def on_step_end(self, args, state, control, **kwargs):
        self._finish_counting(args)  # where there was no `on_optimizer_step`
        warmed_up = state.global_step - self._first_step == self.warmup_steps
        self.meter.lap(args, control, reads=warmed_up)
        if warmed_up:
            self._start = self._last = self.meter.reading

    def _finish_counting(self, args) -> None:
        counter = self._counter
        if counter is None or counter.is_over:
            return
        self._leave_mode()
        self._counted_in = tuple(new - old for new, old in zip(self.meter.local, self._before_counting, strict=True))
        self.step_flops = counter.result()
        if self.step_flops is None:
            logger.info("FLOPs are not counted: %s.", counter.error or "no operator has a formula")
            return
        self._peak = device_peak_flops(args.device, self.step_flops)

    def values(self, args, state, logs):
        if not (self.meter.is_running or state.global_step):
            return {}
        now = self.meter.read(args)
        added = {"train_time_s": now.seconds}
        if now.samples is not None and not self.is_partial:
            added["samples_seen"] = now.samples
        if "loss" in logs and self._last is not None:
            added |= self._rates(args, self._last, now)
            self._last = now
        elif is_last_line(logs) and self._start is not None:
            added |= self._rates(args, self._start, now)
        return added

    def _rates(self, args, before: Reading, now: Reading) -> dict[str, float]:
        seconds = now.seconds - before.seconds
        if seconds <= 0:
            return {}
        rates: dict[str, float] = {}
        steps = 0.0  # of the size of the one that was counted, in a second
        for name, earlier, later, counted in zip(
            ("samples", "tokens"), before[1:], now[1:], self._counted_in, strict=True
        ):
            if earlier is not None and later is not None and later > earlier:
                rates[f"{name}_per_second"] = (later - earlier) / seconds
                steps = (later - earlier) / seconds / counted if counted else steps
        if self.step_flops is not None and steps:
            rates["flops_per_second"] = self.step_flops.total * steps
            if self._peak is not None:
                rates["mfu"] = self.step_flops.model * steps / (self._peak * args.world_size)
        return rates
