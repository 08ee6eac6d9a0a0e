"""Changes the precision of a run that has begun."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DynamoBackend
from accelerate.utils.operations import ConvertOutputsToFp32

from .choose import ACCELERATE_NAMES


_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

# In the state of Accelerate, which is one for the process and is reset with new `TrainingArguments`.
_LAUNCHED = "mixed_precision_at_launch"


class PrecisionSwitch:
    """Takes an accelerator that was launched in fp16 to another precision, and back.

    Changed are the accelerator's settings, the autocast contexts that it has put around the model's forward pass, and
    the scaler in its optimizer. The weights are fp32 throughout, and the optimizer's state is of unscaled gradients:
    both stay.

    Args:
        accelerator: With a gradient scaler.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.precision = "fp16"
        self._scaler = accelerator.scaler
        self._scaler_state = accelerator.scaler.state_dict()
        self._autocasts: list[torch.autocast] = []

    def find_autocasts(self, model: torch.nn.Module) -> int:
        """Add the contexts that are around `model.forward` now to those known; return how many are known.

        Called before a run and when it begins: what a rewrite of the forward pass covers in between is known then.
        """
        known = {id(context) for context in self._autocasts}
        self._autocasts += [context for context in autocasts_around(model) if id(context) not in known]
        return len(self._autocasts)

    def change(self, precision: str, optimizer: Any) -> None:
        """Go on in `"bf16"` or `"fp32"`, between two steps.

        Args:
            precision: The new one.
            optimizer: What Accelerate has made of the optimizer.
        """
        state = self.accelerator.state
        if not hasattr(state, _LAUNCHED):
            setattr(state, _LAUNCHED, state._mixed_precision)
        self._set(precision, None, optimizer)

    def undo(self, optimizer: Any) -> None:
        """Put everything back to how it was launched, the loss scale included.

        Args:
            optimizer: As in `change`; `None` if there is none yet.
        """
        if self.precision != "fp16":
            self._scaler.load_state_dict(self._scaler_state)
            self._set("fp16", self._scaler, optimizer)
            forget_changes()

    def _set(self, precision: str, scaler: torch.amp.GradScaler | None, optimizer: Any) -> None:
        self.precision = precision
        self.accelerator.state._mixed_precision = ACCELERATE_NAMES[precision]
        self.accelerator.native_amp = precision != "fp32"
        self.accelerator.scaler = scaler
        for context in self._autocasts:
            _set_context(context, precision)
        if optimizer is not None:
            optimizer.scaler = scaler
            # Without a scaler nobody resets it, and the schedule would wait for ever.
            optimizer._is_overflow = False
        if self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            torch.compiler.reset()  # contexts are constants in compiled code


def _set_context(context: torch.autocast, precision: str) -> None:
    context._enabled = precision != "fp32"
    context.fast_dtype = _DTYPES.get(precision, context.fast_dtype)


def adopt(model: torch.nn.Module, precision: str) -> None:
    """Make a model that an earlier Trainer has prepared ready for this precision.

    Accelerate prepares a model once, in the precision of that time, and would leave it so without a word.
    """
    contexts = list(autocasts_around(model))
    for context in contexts:
        _set_context(context, precision)
    if not contexts and precision != "fp32":
        model.__dict__.pop("_is_accelerate_prepared", None)


def forget_changes() -> None:
    """Let a new `Accelerator` be made in the precision of the launch, whatever an earlier run has changed to."""
    if is_initialized():
        state = AcceleratorState()
        if hasattr(state, _LAUNCHED):
            state._mixed_precision = getattr(state, _LAUNCHED)
            delattr(state, _LAUNCHED)


def autocasts_around(model: torch.nn.Module) -> Iterator[torch.autocast]:
    """Yield the autocast contexts that Accelerate has put around `model.forward`, the outermost first.

    There are several where it has prepared the model more than once (for an evaluation and then for training), and
    the innermost one is in force. Contexts of the model's own class are left alone.
    """
    own = type(model).forward
    function = _function(model.__dict__.get("forward"))
    while function is not None and function is not own:
        if isinstance(function, ConvertOutputsToFp32):  # goes around each of Accelerate's contexts
            for cell in getattr(function.model_forward, "__closure__", None) or ():
                if isinstance(cell.cell_contents, torch.autocast):
                    yield cell.cell_contents
        function = _function(getattr(function, "__wrapped__", None))


def _function(method: Any) -> Any:
    return getattr(method, "__func__", method)
