"""What a configuration of DeepSpeed says about memory, as runs and the command read it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import PlacementError
from ..simulate.sharding import Sharding, ZeroSettings


# Settings of `zero_optimization` that are sizes: DeepSpeed takes those of ZeRO-3 with and without `stage3_`.
_SIZES = {
    "reduce_bucket_size": "reduce_bucket_size",
    "stage3_prefetch_bucket_size": "prefetch_bucket_size",
    "stage3_param_persistence_threshold": "persistence_threshold",
    "stage3_model_persistence_threshold": "model_persistence_threshold",
    "stage3_max_live_parameters": "max_live_parameters",
    "stage3_max_reuse_distance": "max_reuse_distance",
    "sub_group_size": "sub_group_size",
}
# Switches that became sections; DeepSpeed 0.19 still reads all but the last.
_OLD_OFFLOADS = {
    "offload_optimizer": ("cpu_offload",),
    "offload_param": ("cpu_offload_param", "cpu_offload_params"),
}
_FLAGS = ("overlap_comm", "memory_efficient_linear")
# Settings of `zero_optimization` that change what is held, and the value with which they don't.
_STOCK = {
    "contiguous_gradients": True,
    "reduce_scatter": True,
    "round_robin_gradients": False,
    "parameter_alignment": False,
    "use_multi_rank_bucket_allreduce": True,
    "stage3_use_all_reduce_for_fetch_params": False,
    "stage3_allgather_sequential": False,
    "stage3_module_granularity_threshold": 0,
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_gradients": False,
    "zero_quantized_nontrainable_weights": False,
    "mics_shard_size": -1,
}
_OPTIMIZERS = ("adam", "adamw")
# Sections whose null DeepSpeed doesn't take for an empty one.
_NEVER_NULL = ("zero_optimization", "optimizer")


class UnpredictedError(PlacementError):
    """A setting changes what a rank holds in a way that isn't modelled.

    Args:
        what: The setting and its value.
    """

    def __init__(self, what: str):
        super().__init__(f"The memory of a rank isn't predicted for DeepSpeed with {what}.")
        self.what = what


def sharding_of_config(
    config: Mapping[str, Any], num_devices: int, model: nn.Module, mixed_precision: str | None
) -> Sharding:
    """Return how DeepSpeed spreads a model.

    Args:
        config: The configuration.
        num_devices: That share the training.
        model: A model of transformers, for `"auto"` bucket sizes.
        mixed_precision: `"bf16"`, `"fp16"` or none of them, for `"auto"` types.

    Raises:
        UnpredictedError: A setting isn't modelled.
        PlacementError: A setting is none that DeepSpeed takes.
    """
    zero = section_of(config, "zero_optimization")
    stage = stage_of_config(config)
    for section, name in (
        ("data_types", "grad_accum_dtype"),
        ("torch_autocast", "enabled"),
        ("compile", "deepcompile"),
    ):
        if section_of(config, section).get(name):
            raise UnpredictedError(f"{section}.{name}={config[section][name]}")
    if config.get("communication_data_type"):
        raise UnpredictedError(f"communication_data_type={config['communication_data_type']}")
    optimizer = optimizer_of_config(config)
    if optimizer is not None and str(optimizer.get("type")).lower() not in _OPTIMIZERS:
        raise UnpredictedError(f"the optimizer {optimizer.get('type')} of its configuration")
    precision = _precision(config, mixed_precision)
    if stage == 0 and precision is not None:
        raise UnpredictedError(f"ZeRO stage 0 in {str(precision).removeprefix('torch.')}")
    for name in ("bf16_master_weights_and_grads", "fp16_master_weights_and_grads"):
        if any(section_of(config, section).get(name) for section in ("bf16", "fp16")):
            raise UnpredictedError(name)
    return Sharding(
        f"zero{stage}",
        num_devices,
        offload_optimizer=stage > 0 and is_offloaded(zero, "offload_optimizer"),
        offload_parameters=stage == 3 and is_offloaded(zero, "offload_param"),
        dtype=precision,
        zero=zero_settings(zero, model),
    )


def stage_of_config(config: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a configuration.

    Raises:
        PlacementError: There is no such stage.
    """
    stage = section_of(config, "zero_optimization").get("stage", 0)
    if stage not in range(4):
        raise PlacementError(f"zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3.")
    return int(stage)


def section_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a section of a configuration, empty if it is left out.

    Raises:
        PlacementError: It isn't a JSON object.
    """
    section = config.get(name, {})
    if section is None and name not in _NEVER_NULL:
        return {}
    if not isinstance(section, Mapping):
        raise PlacementError(
            f"{name} of the DeepSpeed configuration is {section!r}; make it a JSON object, or leave it out."
        )
    return section


def optimizer_of_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the optimizer that DeepSpeed makes, its type and parameters; `None` if it makes none."""
    return dict(section_of(config, "optimizer")) if "optimizer" in config else None


def config_optimizer(optimizer: Mapping[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """Return a stand-in for the Adam or AdamW of a configuration. DeepSpeed's kernels hold nothing beside its state.

    Args:
        optimizer: As `optimizer_of_config` returns it.
        model: Whose parameters it steps.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, fused=not section_of(optimizer, "params").get("torch_adam"))


def _precision(config: Mapping[str, Any], mixed_precision: str | None) -> torch.dtype | None:
    # DeepSpeed still reads the old name where there is no new one.
    bf16 = "bf16" if "bf16" in config else "bfloat16"
    for section, name, dtype in ((bf16, "bf16", torch.bfloat16), ("fp16", "fp16", torch.float16)):
        enabled = section_of(config, section).get("enabled", False)
        if enabled is True or (enabled == "auto" and mixed_precision == name):
            return dtype
    return None


def is_offloaded(zero: Mapping[str, Any], name: str) -> bool:
    """Return whether something is kept on the host.

    Args:
        zero: `zero_optimization` of a configuration.
        name: `"offload_optimizer"` or `"offload_param"`.

    Raises:
        UnpredictedError: Only a part of it is, or it is on a disk.
    """
    if zero.get(name) is None and any(zero.get(old) for old in _OLD_OFFLOADS[name]):
        return True
    section = section_of(zero, name)
    device = str(section.get("device", "none"))
    if device == "nvme" or section.get("ratio", 1.0) != 1.0 or section.get("super_offload"):
        raise UnpredictedError(f"{name} to {'NVMe' if device == 'nvme' else 'the host in part'}")
    return device == "cpu"


def zero_settings(zero: Mapping[str, Any], model: nn.Module) -> ZeroSettings:
    """Return the settings, with what transformers and Accelerate fill in for `"auto"`.

    Args:
        zero: `zero_optimization` of a configuration.
        model: A model of transformers.

    Raises:
        UnpredictedError: One of them changes what is held in a way that isn't modelled.
        PlacementError: A size is no whole number.
    """
    for name, stock in _STOCK.items():
        for alias in {name, name.removeprefix("stage3_")}:
            if zero.get(alias, stock) not in (stock, "auto"):
                raise UnpredictedError(f"zero_optimization.{alias}={zero[alias]}")
    if zero.get("zenflow"):
        raise UnpredictedError("zero_optimization.zenflow")
    given = {name: zero[name] for name in _FLAGS if zero.get(name) not in (None, "auto")}
    autos = []
    for name, own in _SIZES.items():
        for alias in (name.removeprefix("stage3_"), name):  # the second wins
            if alias in zero:
                given[own] = zero[alias] if zero[alias] == "auto" else _size(alias, zero[alias])
        if given.get(own) == "auto":
            autos.append(own)
            del given[own]
    if not autos:
        return ZeroSettings(**given)
    auto = auto_settings(getattr(model, "config", None))
    if auto is None:
        raise UnpredictedError("'auto' bucket sizes for a model whose config has no hidden_size")
    return ZeroSettings(**given, **{own: getattr(auto, own) for own in autos})


def _size(name: str, value: Any) -> int:
    """Return a size as a whole number: JSON has no other way than 2e8, a float, to write one short."""
    try:
        size = int(value)
    except (TypeError, ValueError, OverflowError):
        size = None
    if size is None or (not isinstance(value, str) and size != value) or size < 0:
        raise PlacementError(
            f"zero_optimization.{name} is {value!r}; give a whole number, such as 200000000 or 2e8, or 'auto'."
        )
    return size


def auto_settings(config: Any) -> ZeroSettings | None:
    """Return the settings that transformers and Accelerate make of `"auto"`; `None` without a hidden size.

    Args:
        config: Of a model of transformers.
    """
    text = getattr(config, "text_config", None)
    sizes = [getattr(config, "hidden_size", None), *(getattr(config, "hidden_sizes", None) or [])]
    sizes += [getattr(text, "hidden_size", None), *(getattr(text, "hidden_sizes", None) or [])]
    found = [size for size in sizes if isinstance(size, int)]
    if not found:
        return None
    size = found[0] if isinstance(sizes[0], int) else max(found)
    return ZeroSettings(
        reduce_bucket_size=size * size, prefetch_bucket_size=int(0.9 * size * size), persistence_threshold=10 * size
    )
