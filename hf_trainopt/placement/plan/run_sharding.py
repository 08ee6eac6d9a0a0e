"""How a run is spread over devices, read from its Trainer: before the model is wrapped, or as it was loaded."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import fsdp_utils
from torch import nn

from ...core.facts import is_distributed, is_fsdp_module, ranks_per_micro_batch
from ...core.versions import is_sharded_at_load
from ..errors import PlacementError
from ..simulate.sharding import ONE_DEVICE, Group, Sharding, ZeroSettings


_REMEDY = "choose checkpoint_placement='all', 'every_n' or 'sqrt', which need no prediction, and no memory_budget."
_ZERO_NAMES = {
    "reduce_bucket_size": "reduce_bucket_size",
    "overlap_comm": "overlap_comm",
    "stage3_prefetch_bucket_size": "prefetch_bucket_size",
    "stage3_param_persistence_threshold": "persistence_threshold",
    "stage3_model_persistence_threshold": "model_persistence_threshold",
    "stage3_max_live_parameters": "max_live_parameters",
    "stage3_max_reuse_distance": "max_reuse_distance",
    "sub_group_size": "sub_group_size",
    "memory_efficient_linear": "memory_efficient_linear",
}
# Settings of `zero_optimization` that change what is held, and the value with which they don't.
_ZERO_STOCK = {
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


def sharding_of(trainer: Any) -> Sharding:
    """Return how a Trainer's run is spread over its devices.

    Raises:
        PlacementError: The memory of one of them can't be predicted; the message names the setting and the remedy.
    """
    args = trainer.args
    if ranks_per_micro_batch(args) > 1:  # a replay runs each operator on one device
        raise PlacementError(
            "The memory of a rank isn't predicted where ranks share operators (tensor, context or sequence "
            f"parallelism); {_REMEDY}"
        )
    if trainer.is_deepspeed_enabled:
        return _deepspeed(trainer)
    if is_sharded_at_load(trainer):
        return _at_load(trainer)
    if trainer.is_fsdp_enabled:
        return _accelerate(trainer)
    return ONE_DEVICE if args.world_size == 1 else Sharding("ddp", args.world_size)


def optimizer_in_config(trainer: Any) -> dict[str, Any] | None:
    """Return the parameters of the optimizer that DeepSpeed makes by its configuration; `None` if it makes none."""
    if not trainer.is_deepspeed_enabled:
        return None
    optimizer = _config(trainer).get("optimizer")
    return None if not isinstance(optimizer, Mapping) else dict(optimizer)


# ---- DeepSpeed -----------------------------------------------------------------------------------------------------


def _config(trainer: Any) -> Mapping[str, Any]:
    return trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config


def _deepspeed(trainer: Any) -> Sharding:
    config = _config(trainer)
    zero = config.get("zero_optimization") or {}
    stage = int(zero.get("stage", 0))
    for section, name in (
        ("data_types", "grad_accum_dtype"),
        ("torch_autocast", "enabled"),
        ("compile", "deepcompile"),
    ):
        if (config.get(section) or {}).get(name):
            raise _unpredicted(f"{section}.{name}={config[section][name]}")
    if config.get("communication_data_type"):
        raise _unpredicted(f"communication_data_type={config['communication_data_type']}")
    optimizer = optimizer_in_config(trainer)
    if optimizer is not None and str(optimizer.get("type")).lower() not in _OPTIMIZERS:
        raise _unpredicted(f"the optimizer {optimizer.get('type')} of its configuration")
    precision = _precision(trainer, config)
    if stage == 0 and precision is not None:
        raise _unpredicted(f"ZeRO stage 0 in {str(precision).removeprefix('torch.')}")
    for name in ("bf16_master_weights_and_grads", "fp16_master_weights_and_grads"):
        if any((config.get(section) or {}).get(name) for section in ("bf16", "fp16")):
            raise _unpredicted(name)
    return Sharding(
        f"zero{stage}",
        trainer.args.world_size,
        offload_optimizer=stage > 0 and _is_offloaded(zero, "offload_optimizer"),
        offload_parameters=stage == 3 and _is_offloaded(zero, "offload_param"),
        dtype=precision,
        zero=zero_settings(zero, trainer.model),
    )


def _precision(trainer: Any, config: Mapping[str, Any]) -> torch.dtype | None:
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        enabled = (config.get(name) or {}).get("enabled", False)
        if enabled is True or (enabled == "auto" and trainer.accelerator.mixed_precision == name):
            return dtype
    return None


def _is_offloaded(zero: Mapping[str, Any], name: str) -> bool:
    section = zero.get(name) or {}
    device = str(section.get("device", "none"))
    if device == "nvme" or section.get("ratio", 1.0) != 1.0 or section.get("super_offload"):
        raise _unpredicted(f"{name} to {'NVMe' if device == 'nvme' else 'the host in part'}")
    return device == "cpu"


def zero_settings(zero: Mapping[str, Any], model: nn.Module) -> ZeroSettings:
    """Return the settings, with what transformers and Accelerate fill in for `"auto"`.

    Args:
        zero: `zero_optimization` of a configuration.
        model: A model of transformers.

    Raises:
        PlacementError: One of them changes what is held in a way that isn't modelled.
    """
    for name, stock in _ZERO_STOCK.items():
        if zero.get(name, stock) not in (stock, "auto"):
            raise _unpredicted(f"zero_optimization.{name}={zero[name]}")
    given = {own: zero[name] for name, own in _ZERO_NAMES.items() if name in zero}
    if "auto" not in given.values():
        return ZeroSettings(**given)
    auto = auto_settings(model.config)
    if auto is None:
        raise _unpredicted("'auto' bucket sizes for a model whose config has no hidden_size")
    filled = {name: getattr(auto, name) if value == "auto" else value for name, value in given.items()}
    return ZeroSettings(**{name: value for name, value in filled.items() if value is not None})


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


def _unpredicted(what: str) -> PlacementError:
    return PlacementError(f"The memory of a rank isn't predicted for DeepSpeed with {what}; change that, or {_REMEDY}")


# ---- FSDP2 ---------------------------------------------------------------------------------------------------------


def _at_load(trainer: Any) -> Sharding:
    """Read the groups that `fully_shard` has made."""
    model = trainer.model
    config = getattr(model.config, "distributed_config", None)
    others = [name for name in ("tp_size", "pp_size", "ep_size") if (getattr(config, name, 1) or 1) > 1]
    if others:
        raise PlacementError(
            f"The memory of a rank isn't predicted for DistributedConfig({others[0]}=...); leave it out, or {_REMEDY}"
        )
    groups, one = groups_of(model), None
    for module in model.modules():
        if is_fsdp_module(module):
            one = one or next(iter(_param_groups(module._get_fsdp_state())), None)
    if one is None:
        return Sharding("ddp", trainer.args.world_size)
    if not all(map(is_distributed, model.parameters())):
        raise PlacementError(
            f"The memory of a rank isn't predicted where FSDP2 leaves parameters whole (ignored_params); {_REMEDY}"
        )
    policy = one.mp_policy
    offloads = type(one.offload_policy).__name__ == "CPUOffloadPolicy"
    return Sharding(
        "fsdp2",
        getattr(one.mesh_info, "shard_mesh_size", 1),
        offload_optimizer=offloads,
        offload_parameters=offloads,
        dtype=policy.param_dtype,
        reduce_dtype=policy.reduce_dtype,
        groups=groups,
        reduces_always=_reduces_always(trainer),
    )


def groups_of(model: nn.Module) -> tuple[Group, ...]:
    """Return the groups that `fully_shard` has made of a model."""
    names: dict[int, list[str]] = {}
    states: dict[int, Any] = {}
    for name, module in model.named_modules():
        if is_fsdp_module(module):
            state = module._get_fsdp_state()
            states[id(state)] = state
            names.setdefault(id(state), []).append(name)
    groups = []
    modules = {module: name for name, module in model.named_modules()}
    for key, state in states.items():
        # PyTorch decides about the root when it runs first: it keeps it, unless told otherwise.
        is_root = "" in names[key] and state._auto_reshard_after_forward
        parts = _param_groups(state)
        kept = all(part.post_forward_mesh_info is None for part in parts)
        infos = [parameter._module_info for part in parts for parameter in part.fsdp_params]
        paths = (f"{modules[info.module]}.{info.param_name}".removeprefix(".") for info in infos)
        if parts:
            groups.append(Group(tuple(names[key]), is_root or kept, tuple(paths)))
    return tuple(groups)


def _param_groups(state: Any) -> list[Any]:
    found = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [part for part in found if part is not None]


def _accelerate(trainer: Any) -> Sharding:
    """Return what `Accelerator.prepare` is going to do."""
    plugin, model = trainer.accelerator.state.fsdp_plugin, trainer.model
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise PlacementError(f"The memory of a rank isn't predicted for FSDP1; set fsdp_version: 2, or {_REMEDY}")
    if getattr(plugin, "ignored_modules", None):
        raise PlacementError(f"The memory of a rank isn't predicted for FSDP2 with ignored_modules; {_REMEDY}")
    plugin.set_auto_wrap_policy(model)
    policy = fsdp_utils.fsdp2_prepare_auto_wrap_policy(plugin, model)
    keeps = not plugin.reshard_after_forward
    layers = {module for module in model.modules() if module is not model and policy is not None and policy(module)}
    groups = tuple(accelerate_groups(model, layers, keeps))
    mixed, offloads = plugin.mixed_precision_policy, bool(plugin.cpu_offload)
    if type(plugin.cpu_offload).__name__ == "OffloadPolicy":
        offloads = False
    return Sharding(
        "fsdp2",
        trainer.args.world_size,
        offload_optimizer=offloads,
        offload_parameters=offloads,
        dtype=getattr(mixed, "param_dtype", None),
        shard_dtype=None if trainer.accelerator.mixed_precision == "no" else torch.float32,
        reduce_dtype=getattr(mixed, "reduce_dtype", None),
        groups=groups,
        reduces_always=_reduces_always(trainer),
    )


def accelerate_groups(model: nn.Module, layers: set[nn.Module], keeps: bool = False) -> Iterator[Group]:
    """Yield the groups of `accelerate.utils.fsdp_utils.fsdp2_prepare_model`.

    Args:
        model: The whole model.
        layers: Its layers, each of which is a group.
        keeps: Whether their parameters stay whole between forward and backward pass.
    """
    names = {module: name for name, module in model.named_modules()}
    wrapped = set(layers)
    for name, module in model.named_modules():
        if module in layers:
            yield Group((name,), keeps)
    find_norm = getattr(fsdp_utils, "_find_final_norm", None)  # Accelerate 1.15 has groups beside the layers
    if find_norm is not None:
        embedding, head = (_embeddings(model, name) for name in ("get_input_embeddings", "get_output_embeddings"))
        weights = getattr(embedding, "weight", None), getattr(head, "weight", None)
        is_tied = weights[0] is not None and weights[0] is weights[1]
        if not is_tied and embedding is not None and embedding not in wrapped:
            wrapped.add(embedding)
            yield Group((names[embedding],), keeps)
        tail = (find_norm(model), *((embedding, head) if is_tied else (head,)))
        tail = [module for module in tail if module is not None and module not in wrapped]
        if tail:
            yield Group(tuple(names[module] for module in tail), True)
        yield Group(("",), True)
    else:
        yield Group(("",), keeps)


def _embeddings(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return getattr(model, name)()
    except (AttributeError, NotImplementedError):
        return None


def _reduces_always(trainer: Any) -> bool:
    return bool(trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False))
