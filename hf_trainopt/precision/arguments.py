"""The argument of precision, on top of `TrainingArguments`."""

import logging
import os
from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate.utils import gather_object

from .choose import (
    ACCELERATE_NAMES,
    PrecisionChoice,
    check_agreement,
    choose_precision,
    device_abilities,
    overruled_launcher,
    weakest,
)


logger = logging.getLogger(__name__)


@dataclass
class PrecisionArgumentsMixin:
    """Precision, for any `TrainingArguments` class.

    Args:
        precision (`str`, *optional*): `"auto"`, `"fp32"`, `"fp16"` or `"bf16"`. Unset: what `fp16`, `bf16` and the
            launcher say, as in `Trainer`.
    """

    precision: Literal["auto", "fp32", "fp16", "bf16"] | None = field(
        default=None,
        metadata={
            "help": "Precision of the computation, weights stay in fp32: 'bf16', 'fp16' (with loss scaling, left for "
            "bf16 or fp32 if the loss scale collapses), 'fp32', or 'auto' = bf16 where the device computes in it "
            "natively, else fp16 on CUDA, else fp32. Unset (the default): what fp16, bf16 and the launcher say. Set "
            "'auto' on a GPU; name one to have the same on every machine."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.resolve_precision()
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION")
        if self.precision is None and (overruled := overruled_launcher(self.fp16, self.bf16, launcher)):
            logger.warning("%s", overruled)

    def resolve_precision(self, over_ranks: bool = False) -> PrecisionChoice | None:
        """Set `mixed_precision`, which the accelerator is made with, to what `precision` means on this device.

        Args:
            over_ranks: Whether the devices of all ranks count; then every rank must call it.

        Returns:
            The decision, or `None` if `precision` is unset.

        Raises:
            ValueError: No such precision, not on this device, or something else contradicts it.
        """
        device = device_abilities(self.device)
        if self.precision is None:
            scaled = device.scales_fp16 or self.deepspeed_plugin is not None  # DeepSpeed scales the loss itself
            if self.mixed_precision == "fp16" and device.type == "cpu" and not scaled:
                what = "fp16=True" if self.fp16 else "ACCELERATE_MIXED_PRECISION='fp16' (--mixed_precision fp16)"
                raise ValueError(
                    f"{what} is ignored on a CPU by Accelerate, which would train in fp32 without a word; use "
                    "bf16=True with use_cpu=True, or leave it out (precision='auto' takes what the device does best)."
                )
            return None
        if over_ranks and self.world_size > 1 and torch.distributed.is_initialized():
            device = weakest(gather_object([device]))
        if self.deepspeed_plugin is not None:
            raise ValueError(
                f"precision='{self.precision}' does not work with DeepSpeed, whose own configuration says it; leave "
                "precision unset and set fp16 or bf16."
            )
        choice = choose_precision(self.precision, device)
        check_agreement(self.precision, choice, self.fp16, self.bf16, os.environ.get("ACCELERATE_MIXED_PRECISION"))
        self.mixed_precision = ACCELERATE_NAMES[choice.precision]
        return choice
