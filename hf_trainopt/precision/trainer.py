"""Precision in `Trainer`: chosen and explained before training, left for another where fp16 overflows."""

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from .._versions import is_sharded_at_load
from ..log_lines import give_back
from .arguments import PrecisionArgumentsMixin
from .choose import PrecisionChoice
from .fallback import OverflowWatch
from .switch import PrecisionSwitch, adopt, forget_changes


logger = logging.getLogger(__name__)

# Our entry among the states of callbacks in `trainer_state.json`.
STATE_KEY = "hf_trainopt_precision"


class PrecisionTrainerMixin:
    """Precision for any `Trainer` class; a base of `EfficientTrainerMixin`.

    With `precision` unset nothing is decided here. Under a gradient scaler its skipped steps are counted in any case.
    """

    def __init__(self, *args, **kwargs):
        self._precision_choice: PrecisionChoice | None = None
        self._precision_switch: PrecisionSwitch | None = None
        self._overflows: OverflowWatch | None = None
        self._changed_at_step: int | None = None
        self._reason_to_leave: str | None = None
        self._is_stuck = False
        super().__init__(*args, **kwargs)
        if self._precision_choice is not None:
            adopt(self.model, self._precision_choice.precision)
            self._explain_precision(self._precision_choice)
        self.add_callback(_RunEvents(self._run_begins, self._step_ended))

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`, in the precision that `precision` means on the devices of this run."""
        self._precision_choice = None
        if isinstance(self.args, PrecisionArgumentsMixin) and self.args.precision is not None:
            self._precision_choice = self.args.resolve_precision(over_ranks=True)
            forget_changes()
        self._precision_switch = None
        super().create_accelerator_and_postprocess()

    def _explain_precision(self, choice: PrecisionChoice) -> None:
        details = {
            "fp32": "fp32",
            "bf16": "bf16 autocast",
            "fp16": f"fp16 autocast, dynamic loss scaling, {choice.fallback} if that fails",
        }
        weights = " and ".join(sorted({str(p.dtype) for p in self.model.parameters() if p.requires_grad}))
        logger.info("Precision: %s, weights in %s: %s.", details[choice.precision], weights, choice.reason)
        if choice.warning is not None:
            logger.warning("%s", choice.warning)

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        scaler = getattr(self.accelerator, "scaler", None)
        return scaler if scaler is not None and scaler.is_enabled() else None

    @property
    def _may_leave_fp16(self) -> bool:
        return self._precision_choice is not None and self._precision_choice.fallback is not None

    # ---- A run -----------------------------------------------------------------------------------------------------

    def set_initial_training_values(self, *args, **kwargs):
        """As in `Trainer`; every run begins in the precision of the launch, whatever became of the last one."""
        if self._precision_choice is not None:
            check_weights(self.model, self.args.precision, self._precision_choice.precision)
        elif self._scaler is not None:
            check_weights(self.model, None, "fp16")
        if self._precision_switch is not None:
            self._precision_switch.undo(self.optimizer)
        elif self._may_leave_fp16 and self._scaler is not None:
            self._precision_switch = PrecisionSwitch(self.accelerator)
        if self._precision_switch is not None:
            self._precision_switch.find_autocasts(self.model)
        return super().set_initial_training_values(*args, **kwargs)

    def _run_begins(self) -> None:
        """Take up what a checkpoint says; everything is prepared and loaded by now."""
        self._overflows = self._changed_at_step = self._reason_to_leave = None
        self._is_stuck = False
        if self._scaler is None:
            return
        saved = self.state.stateful_callbacks.get(STATE_KEY, {}).get("attributes")
        self._overflows = OverflowWatch(**saved["overflows"] if saved else {"loss_scale": self._scaler.get_scale()})
        self._changed_at_step = saved["changed_at_step"] if saved else None
        if self._precision_switch is not None:
            self._precision_switch.find_autocasts(self.model)
        if self._changed_at_step is None:
            return
        if self._precision_switch is None:
            logger.warning(
                "The run that is resumed had left fp16 at step %d. With fp16=True it goes on in fp16; set "
                "precision='fp16' or 'auto' to go on as it did.",
                self._changed_at_step,
            )
            self._changed_at_step = None
        else:
            self._change_precision(f"as the run that is resumed did at step {self._changed_at_step}")

    def _step_ended(self) -> None:
        """Count the step, and leave fp16 where it is time to: here nothing of the next step is there yet."""
        if self._overflows is None:
            return
        if self._scaler is not None:
            reason = self._overflows.step_ended(self._scaler.get_scale()) or self._reason_to_leave
            if reason is not None and not self._is_stuck:
                self._change_precision(reason)
        self._reason_to_leave = None
        self.state.stateful_callbacks[STATE_KEY] = {
            "attributes": {"overflows": asdict(self._overflows), "changed_at_step": self._changed_at_step}
        }

    def _leaves_fp16_for(self, reason: str) -> bool:
        """Leave fp16 at the end of this step if that can be done; return whether it can.

        Args:
            reason: What has happened that would end a run in another precision.
        """
        if self._scaler is None or self._precision_switch is None or self._is_stuck or self._obstacle() is not None:
            return False
        self._reason_to_leave = reason
        return True

    def _change_precision(self, reason: str) -> None:
        if self._precision_switch is None:
            self._is_stuck = True
            logger.warning(
                "Step %d: fp16 does not work out (%s), and with fp16=True it stays. Steps that overflow are skipped "
                "as in Trainer; set precision='fp16' or 'auto' in place of fp16=True to go on in bf16 or fp32.",
                self.state.global_step,
                reason,
            )
            return
        precision, step = self._precision_choice.fallback, self.state.global_step
        obstacle = self._obstacle()
        self._is_stuck = obstacle is not None
        if self._is_stuck:
            logger.warning(
                "Step %d: fp16 does not work out (%s), but %s. Steps that overflow are skipped, as in Trainer; resume "
                "with precision='%s'.",
                step,
                reason,
                obstacle,
                precision,
            )
            return
        if self._changed_at_step is None:
            self._changed_at_step = step
        self._precision_switch.change(precision, self.optimizer)
        logger.warning("Step %d: fp16 is left for %s: %s.", step, precision, reason)
        if precision == "fp32" and getattr(self.args, "places_checkpoints", False):
            logger.warning(
                "Checkpoint placement was planned for fp16: in fp32 activations take up to twice the memory. Should "
                "it run out, resume with precision='fp32', for which a new plan is made."
            )

    def _obstacle(self) -> str | None:
        """Why the precision of this run cannot be changed, if so."""
        sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
        if self.accelerator.distributed_type in sharded or is_sharded_at_load(self):
            return "a sharded model keeps the precision that it was wrapped in"
        if not self._precision_switch.find_autocasts(self.model):
            return f"Accelerate has not prepared the forward pass of {type(self.model).__name__}"
        return None

    # ---- What is saved and logged ----------------------------------------------------------------------------------

    def _load_scaler(self, checkpoint: str | None) -> None:
        # Upstream fails if there is a state and no scaler: fp16 so far, and another precision from here on.
        if getattr(self.accelerator, "scaler", None) is not None:
            super()._load_scaler(checkpoint)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in `Trainer`; a line of training has `skipped_steps` and `loss_scale` under a gradient scaler."""
        added = self._overflow_logs() if "loss" in logs else {}
        line = {**logs, **added}
        super().log(line, *args, **kwargs)
        give_back(logs, line, added)

    def _overflow_logs(self) -> dict[str, float]:
        if self._overflows is None:
            return {}
        logs: dict[str, Any] = {"skipped_steps": self._overflows.skipped_steps}
        if self._scaler is not None:
            logs["loss_scale"] = self._scaler.get_scale()
        return logs


class _RunEvents(TrainerCallback):
    """Tells when a run begins and when an optimizer step has ended."""

    def __init__(self, run_begins: Callable[[], None], step_ended: Callable[[], None]):
        self._run_begins = run_begins
        self._step_ended = step_ended

    def on_train_begin(self, args, state, control, **kwargs):
        self._run_begins()

    def on_step_end(self, args, state, control, **kwargs):
        self._step_ended()


def check_weights(model: torch.nn.Module, asked: str | None, precision: str) -> None:
    """Refuse a model whose trained weights are not in the type that the precision needs.

    Args:
        model: What is trained.
        asked: `precision` as the user gave it; `None` if `Trainer`'s own `fp16=True` is in force.
        precision: What became of it.

    Raises:
        ValueError: A trained parameter is in half precision under fp16 or fp32 (bf16 weights under bf16 are taken as
            they are).
    """
    # Under fp16=True weights in bf16 train in stock Trainer, weights in fp16 end in an error of the scaler.
    wrong = (torch.float16,) if precision == "bf16" or asked is None else (torch.float16, torch.bfloat16)
    setting = "fp16=True" if asked is None else f"precision='{asked}'"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in wrong:
            chosen = f" (here {precision})" if asked == "auto" else ""
            bf16 = " or choose precision='bf16'" if parameter.dtype == torch.bfloat16 else ""
            raise ValueError(
                f"{setting}{chosen} needs weights in fp32, to which optimizer steps are added, but {name} "
                f"is {parameter.dtype}; load the model with dtype=torch.float32 (or call model.float()){bf16}."
            )
