"""LoRA adapters of PEFT on a model, for plans."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def with_lora(model: nn.Module, rank: int, target_modules: Sequence[str] | None, device: str = "meta") -> nn.Module:
    """Return a model on a device with LoRA adapters of PEFT, as `get_peft_model` makes them.

    Raises:
        ValueError: PEFT isn't installed, or doesn't find the modules.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("--lora_r needs PEFT; pip install peft.") from error
    targets: Any = target_modules
    if target_modules is not None and len(target_modules) == 1:
        # A text is a regular expression for PEFT, or "all-linear"; a list has the last parts of names.
        last_parts = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        targets = list(target_modules) if target_modules[0] in last_parts else target_modules[0]
    config = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
    try:
        with torch.device(device):
            return get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        reason = str(error).split(". ")[0].rstrip(".")
        raise ValueError(
            f"--lora_target_modules: {reason}; name modules of the model, such as q_proj v_proj, or all-linear."
        ) from error
