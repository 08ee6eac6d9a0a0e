"""Windows whose loss or gradients are not finite: skipped and counted."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer

from ..accumulation.window import without_empty_mean
from ..core.running_statistics import RunningStatistics


logger = logging.getLogger(__name__)


class TrainingDivergedError(RuntimeError):
    """Too many windows in a row were not finite."""


@dataclass
class SkippedWindows:
    """Counts windows that were skipped.

    Attributes:
        total: In the run, over its resumes.
        in_a_row: Up to the last window.
    """

    total: int = 0
    in_a_row: int = 0

    def count(self, skipped: bool, is_empty: bool = False) -> None:
        """Count a window. One without a target (`is_empty`) says nothing about whether the run diverges."""
        self.total += skipped
        if not is_empty:
            self.in_a_row = self.in_a_row + 1 if skipped else 0


def last_good_step(step: int, skipped_in_a_row: int) -> int:
    """Return the last step whose weights are known to be good.

    The window before the first skipped one was finite, so the weights that it began with were good. Those that it left
    may be what broke the next.

    Args:
        step: Optimizer steps before the window at hand, skipped ones included.
        skipped_in_a_row: Windows, the one at hand included.
    """
    return step - skipped_in_a_row


class FiniteWindows:
    """Judges each window by its loss and its gradient norm, and keeps the optimizer from a step that it must not take.

    With fused Adam (the default of `Trainer`) that costs no wait for the device: the optimizer is told on the device,
    as a gradient scaler tells it, and the host gets to know one window later, from a copy that was made meanwhile.
    Other optimizers, and models with running statistics, which the host puts back, wait for the norm.

    Args:
        model: What is trained.
        optimizer: Accelerate's wrapper around the optimizer.
    """

    def __init__(self, model: torch.nn.Module, optimizer: AcceleratedOptimizer):
        self._model = model
        self._optimizer = optimizer
        self._statistics = RunningStatistics(model)
        inner = optimizer.optimizer
        # Not fused SGD: PyTorch leaves its momentum uninitialised if the very first step is left out that way.
        fused = isinstance(inner, torch.optim.Adam) and all(group.get("fused") for group in inner.param_groups)
        self._tells_on_device = fused and not self._statistics and not has_sharded_parameters(model)
        self._loss: torch.Tensor | None = None
        self._is_empty: torch.Tensor | None = None
        self._pending: tuple[torch.Tensor, torch.Event | None, int] | None = None
        self._by_scaler = False
        self._skips = False
        self.any_loss_is_bad = False  # on any rank, if that is known
        self.any_has_targets = False  # likewise

    def restart_window(self) -> None:
        """Forget the losses of a window that is begun anew."""
        self._loss, self._is_empty, self.any_loss_is_bad, self.any_has_targets = None, None, False, False

    def begin_micro_batch(self) -> None:
        """Call before each micro-batch."""
        if self._loss is None:
            self._statistics.save()

    def end_micro_batch(self, loss: torch.Tensor, lacks: torch.Tensor | None = None) -> None:
        """Take in the loss of a micro-batch.

        Args:
            loss: The loss.
            lacks: Whether it has no targets (see `lacks_targets`), so that its loss may be 0/0.
        """
        loss = without_empty_mean(loss, lacks)
        empty = torch.zeros_like(loss, dtype=torch.bool) if lacks is None else lacks.to(loss.device, non_blocking=True)
        if self._loss is None:
            self._loss, self._is_empty = loss, empty
        else:
            self._loss, self._is_empty = self._loss + loss, self._is_empty & empty

    @property
    def is_in_window(self) -> bool:
        """Whether there is a loss of a window that was not judged yet."""
        return self._loss is not None

    def loss_is_bad(self) -> torch.Tensor:
        """Return, on the device, whether a loss of this window on this rank is not finite."""
        return ~torch.isfinite(self._loss)

    def has_targets(self) -> torch.Tensor:
        """Return, on the device, whether a micro-batch of this window on this rank has a target."""
        return ~self._is_empty

    @property
    def is_deferred(self) -> bool:
        """Whether the last window that was judged is to be settled later."""
        return self._tells_on_device and not self._by_scaler

    def judge(self, norm: Any, step: int, by_scaler: bool) -> None:
        """Decide on the window; `settle` says how.

        Args:
            norm: Of its gradients, the same on all ranks.
            step: Optimizer steps before it.
            by_scaler: Under a gradient scaler, which skips steps whose gradients are not finite and counts them
                itself: what is left is the loss.
        """
        bad = self.loss_is_bad()
        if self.any_loss_is_bad:
            bad = torch.ones_like(bad)
        if not by_scaler:
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
            bad = bad.to(norm.device) | ~torch.isfinite(norm)
        empty = (self._is_empty & (not self.any_has_targets)).to(bad.device)
        self.restart_window()
        self._by_scaler, self._skips, copied = by_scaler, False, None
        if self.is_deferred:
            inner = self._optimizer.optimizer
            inner.grad_scale, inner.found_inf = None, bad.float()
        verdict = torch.stack([bad.any(), empty.all()])
        if self.is_deferred and bad.device.type != "cpu":
            # Reading `verdict` itself a window later would wait for all that was queued in the meantime.
            verdict = verdict.to("cpu", non_blocking=True)
            copied = torch.Event(bad.device)
            copied.record()
        self._pending = (verdict, copied, step)

    def settle(self) -> tuple[bool, bool, int] | None:
        """Return whether the last window is skipped, whether it had no targets, and the steps before it.

        `None` if that was told before.
        """
        if self._pending is None:
            return None
        (verdict, copied, step), self._pending = self._pending, None
        if copied is not None:
            copied.synchronize()
        skipped, is_empty = verdict.tolist()
        if not self.is_deferred:
            self._skips = skipped
            if skipped:
                self._statistics.restore()
        return skipped, is_empty, step

    def before_optimizer_step(self) -> None:
        """Make the step that follows one that does nothing, if the window is skipped."""
        if not self._skips:
            return
        if self._by_scaler:  # which must see its step through
            self._model.zero_grad()
        else:
            # What makes Accelerate's optimizer wait in the middle of a window.
            self._optimizer.gradient_state._set_sync_gradients(False)

    def after_optimizer_step(self) -> None:
        """Undo what was done for the step."""
        if self._skips and not self._by_scaler:
            self._optimizer.gradient_state._set_sync_gradients(True)
        self._skips = False
        inner = self._optimizer.optimizer
        if self.is_deferred and hasattr(inner, "found_inf"):
            del inner.grad_scale, inner.found_inf


def has_sharded_parameters(model: torch.nn.Module) -> bool:
    """Return whether a parameter is spread over ranks."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def obstacle_to_skipping(optimizer: Any, optim: str, engine_steps: bool) -> str | None:
    """Return why optimizer steps cannot be left out, if so.

    Args:
        optimizer: As the loop has it.
        optim: `args.optim`.
        engine_steps: Whether an engine of its own (DeepSpeed, XLA, SageMaker) takes them.
    """
    if engine_steps or not isinstance(optimizer, AcceleratedOptimizer):
        return "its optimizer steps are not taken by Accelerate"
    if any(name in optim.lower() for name in ("layerwise", "lomo")):
        return f"optim='{optim}' takes its steps inside the backward pass"
    return None
