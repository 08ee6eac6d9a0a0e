"""Which DeepSpeed settings don't work with varying k, and how it handles gradients that aren't finite."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from packaging.version import Version

from ..core.installed import installed_version


# Older ones accumulate wrongly where k varies, some where it doesn't (docs/devices.md).
FIRST_VERSION = "0.19.0"
FIRST_THAT_COALESCES = "0.19.2"
# Until then bf16 and fp32 gradients were stepped with whatever they were, but for some settings.
FIRST_THAT_LOOKS_FOR_NAN = "0.19.8"

# They exchange what they have compressed, with a memory of what was left out of the last step.
_ONE_BIT = ("onebitadam", "onebitlamb", "zerooneadam")


def config_of(trainer: Any) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a Trainer; `"auto"` values that arguments decide are filled in."""
    return trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config


def stage_of(config: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a configuration."""
    return int(_section(config, "zero_optimization").get("stage", 0))


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _is_on(config: Mapping[str, Any], name: str) -> bool:
    return _section(config, name).get("enabled") is True


def steps_are_plain(engine: Any) -> bool:
    """Return whether the engine steps a plain optimizer with the whole gradients in `.grad` (ZeRO-0 in fp32)."""
    return isinstance(engine.optimizer, torch.optim.Optimizer)


def check_deepspeed(trainer: Any, measures: bool, what: str, remedy: str) -> None:
    """Refuse what cannot work with varying k under DeepSpeed.

    Args:
        trainer: Its Accelerator is there; the model isn't wrapped.
        measures: Whether gradient statistics are taken.
        what: What asks for it, for messages.
        remedy: What to do in place of it.

    Raises:
        ValueError: Something doesn't work.
    """
    _check_versions(trainer, what, remedy)
    config = config_of(trainer)
    stage = stage_of(config)
    problem = _problem(config, stage)
    if problem is None and measures:
        problem = _problem_of_measuring(config, trainer)
    if problem is not None:
        raise ValueError(f"{what} does not work with {problem}, or {remedy}.")
    if trainer.args.coalesce_grad_reduction and stage == 0:
        raise ValueError(
            "coalesce_grad_reduction is for ZeRO stages 1 to 3; leave it out, since ZeRO-0 reduces once a window "
            "anyway."
        )


def _check_versions(trainer: Any, what: str, remedy: str) -> None:
    version = installed_version("deepspeed")
    if version is None:  # run from a source tree
        return
    if Version(version) < Version(FIRST_VERSION):
        raise ValueError(
            f"{what} does not work with deepspeed {version}, which accumulates gradients wrongly where k varies; "
            f"pip install 'deepspeed>={FIRST_VERSION}', or {remedy}."
        )
    if trainer.args.coalesce_grad_reduction and Version(version) < Version(FIRST_THAT_COALESCES):
        raise ValueError(
            f"coalesce_grad_reduction needs deepspeed >= {FIRST_THAT_COALESCES}, not {version}; upgrade it, or leave "
            "coalesce_grad_reduction out."
        )


def _problem(config: Mapping[str, Any], stage: int) -> str | None:
    """Return what of a configuration varying k doesn't work with, and what to do about it."""
    zero = _section(config, "zero_optimization")
    optimizer = str(_section(config, "optimizer").get("type", "")).lower()
    if stage == 0 and (_is_on(config, "fp16") or _is_on(config, "torch_autocast")):
        name = "fp16" if _is_on(config, "fp16") else "torch_autocast"
        return (
            f"{name} and ZeRO stage 0, where DeepSpeed does not scale the loss as it should; set bf16, or "
            "zero_optimization.stage to 1 or more"
        )
    if zero.get("zenflow"):
        return "ZenFlow, which updates parameters by its own count of steps; take zero_optimization.zenflow out"
    if optimizer in _ONE_BIT:
        return f"optimizer.type '{optimizer}', which compresses gradients by its own count of steps; choose 'AdamW'"
    if optimizer == "muon" and stage == 3:
        return "Muon in ZeRO stage 3, which would orthogonalize gradients of single micro-batches; choose stage 2"
    if config.get("managed_gradient_accumulation") is False:
        return "managed_gradient_accumulation: false, which leaves no boundary to set; take it out"
    for name, size in (("tensor_parallel", "autotp_size"), ("expert_parallel", "autoep_size")):
        section = _section(config, name)
        if (section.get(size) or 0) > 1 or (name == "expert_parallel" and section.get("enabled")):
            return f"{name}, where a gradient on one rank is not of its own samples alone; take it out"
    if (config.get("sequence_parallel_size") or 1) > 1:
        return "sequence_parallel_size above 1, where no rank holds the gradient of a sample; take it out"
    return None


def _problem_of_measuring(config: Mapping[str, Any], trainer: Any) -> str | None:
    if _section(config, "zero_optimization").get("compute_grad_norm") is False:
        return "zero_optimization.compute_grad_norm: false, where the noise scale is measured; set it to true"
    compiled = trainer.args.torch_compile or is_compiled_module(trainer.model)
    if compiled or _section(config, "compile").get("deepcompile"):
        name = "torch_compile" if compiled else "compile.deepcompile"
        return f"{name} under DeepSpeed, which leaves out the hooks that measure gradients; set {name} to false"
    return None


def obstacle_to_skipping(trainer: Any) -> str | None:
    """Return why DeepSpeed takes steps whose gradients aren't finite, if so."""
    config, version = config_of(trainer), installed_version("deepspeed")
    if version is not None and Version(version) < Version(FIRST_THAT_LOOKS_FOR_NAN):
        return f"deepspeed {version} steps with gradients that are not finite (>= {FIRST_THAT_LOOKS_FOR_NAN} does not)"
    if _section(config, "zero_optimization").get("compute_grad_norm") is False:
        return "zero_optimization.compute_grad_norm is false"
    if _is_on(config, "bf16") and _section(config, "bf16").get("check_grad_overflow") is False:
        return "bf16.check_grad_overflow is false in the DeepSpeed configuration"
    return None
