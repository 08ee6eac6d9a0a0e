"""DeepSpeed as a part: its engine reduces gradients and steps where a window ends, whatever k is.

DeepSpeed's engine takes the optimizer step by itself, inside Accelerate's `backward`, so that neither `Trainer`'s loop
nor we could look at the gradients before it. Here the engine is told with each backward pass whether it is the last of
its window, and steps once the window has run. What a window needs to know of a step is kept from there: the loss scale
that its gradients had, their norm, and whether the engine has left the step out.

The norms of micro-batch gradients need nothing of this module. In all ZeRO stages autograd hands the hooks of
`MicroBatchNorms` the local gradient of a whole parameter before it is reduced.
"""

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper

from ..core.part import Part
from .deepspeed_checks import steps_are_plain
from .gradient_norms import gradient_square_norm
from .window import Window


logger = logging.getLogger(__name__)


class DeepSpeedPart(Part):
    """Drives the engine of DeepSpeed by windows; without DeepSpeed it does nothing.

    Attributes:
        engine: `deepspeed.DeepSpeedEngine`, while a run trains with it through windows; else `None`.
        grad_norm: Of the last window, averaged over ranks, unscaled, not clipped; infinite if it overflowed, `None` if
            the engine doesn't tell.
        loss_scale: What the gradients of the last window were multiplied by.
    """

    name = "deepspeed"

    def __init__(self, trainer: Any, parts: Any):
        super().__init__(trainer, parts)
        self.engine: Any = None
        self.grad_norm: float | None = None
        self.loss_scale = 1.0
        self._stock_wrapper: DeepSpeedEngineWrapper | None = None
        self._stock_batch_size = 0

    # ---- A run -----------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        """Put our wrapper in place of Accelerate's; everything is prepared and loaded by now."""
        self.end_run()
        accelerator = self.trainer.accelerator
        if not self.trainer.is_deepspeed_enabled:
            return
        has_windows = self.parts.accumulation.cursor is not None
        if not has_windows and not self.parts.skipped_steps.limit:
            return  # stock
        self._stock_wrapper = accelerator.deepspeed_engine_wrapped
        engine = self._stock_wrapper.engine
        accelerator.deepspeed_engine_wrapped = WindowEngine(engine, self)
        if has_windows:
            self.engine, self._stock_batch_size = engine, engine.train_batch_size()
            self.grad_norm, self.loss_scale = None, 1.0

    def end_run(self) -> None:
        if self._stock_wrapper is not None:
            self.trainer.accelerator.deepspeed_engine_wrapped = self._stock_wrapper
        if self.engine is not None:
            self.engine.set_train_batch_size(self._stock_batch_size)
        self._stock_wrapper = self.engine = None

    # ---- A window --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def window(self) -> Iterator[None]:
        """Context of the passes of a window: reduced over ranks as the engine does it, or once at its end if asked.

        Raises:
            ValueError: `coalesce_grad_reduction` doesn't work with the engine's optimizer.
        """
        if self.engine is None or not self.trainer.args.coalesce_grad_reduction:
            yield
            return
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.engine.coalesce_grad_reduction())
            except NotImplementedError as error:
                raise ValueError(
                    f"coalesce_grad_reduction does not work with this DeepSpeed configuration ({error}); leave it out."
                ) from error
            yield

    def step(self, window: Window) -> None:
        """Let the engine take its step, after the last pass of a window; all ranks call it.

        Args:
            window: The window.
        """
        engine = self.engine
        if engine is None:
            return
        timer, clock = self.parts.accumulation.controller.timer, self.parts.adam_clock
        self.loss_scale = float(engine.optimizer.loss_scale) if self.scales_loss else 1.0
        engine.set_gradient_accumulation_boundary(is_boundary=True)
        # What the engine counts as samples, and what its monitors show.
        engine.set_train_batch_size(len(window) * engine.train_micro_batch_size_per_gpu() * engine.dp_world_size)
        norm = None
        if steps_are_plain(engine):
            parameters = (parameter for parameter in engine.module.parameters() if parameter.requires_grad)
            norm = math.sqrt(gradient_square_norm(parameters, self.trainer.args.device))
        if norm is not None and not math.isfinite(norm) and self.parts.skipped_steps.is_on:
            engine.zero_grad()  # ZeRO-0 in fp32 doesn't look
            was_taken = False
        else:
            clock.begin_step(window.planned)
            engine.step()
            was_taken = not getattr(engine.optimizer, "overflow", False)
            clock.end_step(was_taken)
        if norm is None and not was_taken:
            norm = math.inf
        elif norm is None:
            norm = engine.get_global_grad_norm()
        self.grad_norm = None if norm is None else float(norm)
        timer.engine_has_stepped()

    @property
    def scales_loss(self) -> bool:
        """Whether the engine multiplies the loss (fp16), and skips steps that overflow."""
        return self.engine is not None and self.engine.fp16_enabled()

    @property
    def square_norm(self) -> float:
        """|ĝ|² of the last window; NaN if it isn't known."""
        return math.nan if self.grad_norm is None else self.grad_norm**2

    def loss_to_differentiate(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss that a backward pass begins with (see `SkippedStepsPart.spoiled`)."""
        return self.parts.skipped_steps.spoiled(loss)

    # ---- Logs ------------------------------------------------------------------------------------------------------

    def log_values(self, line: dict[str, Any]) -> dict[str, Any]:
        """Return `skipped_steps` and `loss_scale` for a line of training in fp16."""
        if "loss" not in line or not self.scales_loss:
            return {}
        return {"skipped_steps": self.engine.skipped_steps, "loss_scale": float(self.engine.optimizer.loss_scale)}


class WindowEngine(DeepSpeedEngineWrapper):
    """What Accelerate has in place of its own wrapper of the engine: it doesn't step while a window runs.

    Args:
        engine: `deepspeed.DeepSpeedEngine`.
        part: Takes the steps where training goes through windows.
    """

    def __init__(self, engine: Any, part: DeepSpeedPart):
        super().__init__(engine)
        self._part = part

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs):
        """As in Accelerate.

        Args:
            loss: Of a micro-batch.
            sync_gradients: Whether it is the last one of its window.
            **kwargs: For the engine.
        """
        loss = self._part.loss_to_differentiate(loss)
        if self._part.engine is None:
            super().backward(loss, sync_gradients=sync_gradients, **kwargs)
            return
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)

    def get_global_grad_norm(self) -> float | None:
        """As in Accelerate; known in ZeRO-0, too."""
        return super().get_global_grad_norm() if self._part.engine is None else self._part.grad_norm
