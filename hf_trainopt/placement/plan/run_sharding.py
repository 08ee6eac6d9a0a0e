"""How a run is spread over devices, read from its Trainer: before the model is wrapped, or as it was loaded."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import fsdp_utils
from torch import nn

from ...core.facts import is_distributed, is_fsdp_module, ranks_per_micro_batch
from ...core.versions import is_sharded_at_load
from ..errors import PlacementError
from ..simulate.sharding import ONE_DEVICE, Group, Sharding
from .deepspeed_config import UnpredictedError, optimizer_of_config, sharding_of_config


_REMEDY = "choose checkpoint_placement='all', 'every_n' or 'sqrt', which need no prediction, and no memory_budget."


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
    return optimizer_of_config(_config(trainer))


# ---- DeepSpeed -----------------------------------------------------------------------------------------------------


def _config(trainer: Any) -> Mapping[str, Any]:
    return trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config


def _deepspeed(trainer: Any) -> Sharding:
    try:
        return sharding_of_config(
            _config(trainer), trainer.args.world_size, trainer.model, trainer.accelerator.mixed_precision
        )
    except UnpredictedError as error:
        raise PlacementError(
            f"The memory of a rank isn't predicted for DeepSpeed with {error.what}; change that, or {_REMEDY}"
        ) from error


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
    if is_fsdp_module(model):  # by an earlier `train`; Accelerate leaves it as it is
        groups = groups_of(model)
    else:
        groups = tuple(accelerate_groups(model, _layers(plugin, model), not plugin.reshard_after_forward))
    mixed, offloads = plugin.mixed_precision_policy, bool(plugin.cpu_offload)
    if type(plugin.cpu_offload).__name__ == "OffloadPolicy":
        offloads = False
    return Sharding(
        "fsdp2",
        _shard_size(trainer),
        offload_optimizer=offloads,
        offload_parameters=offloads,
        dtype=getattr(mixed, "param_dtype", None),
        shard_dtype=None if trainer.accelerator.mixed_precision == "no" else torch.float32,
        reduce_dtype=getattr(mixed, "reduce_dtype", None),
        groups=groups,
        reduces_always=_reduces_always(trainer),
    )


def _layers(plugin: Any, model: nn.Module) -> set[nn.Module]:
    """Modules that the policy of Accelerate's plugin wraps, each in a group of its own.

    Raises:
        PlacementError: It names classes that the model lacks, so that Accelerate won't prepare it either.
    """
    try:
        plugin.set_auto_wrap_policy(model)
        policy = fsdp_utils.fsdp2_prepare_auto_wrap_policy(plugin, model)
    except ValueError as error:
        raise PlacementError(
            f"The FSDP2 configuration doesn't fit the model: {error} Set transformer_layer_cls_to_wrap "
            "(fsdp_transformer_layer_cls_to_wrap for accelerate launch) to classes of its layers."
        ) from error
    if policy is None:
        return set()
    return {module for module in model.modules() if module is not model and policy(module)}


def _shard_size(trainer: Any) -> int:
    """Ranks over which Accelerate shards: those of one copy of the model, where HSDP keeps several."""
    config = getattr(trainer.accelerator, "parallelism_config", None)
    if config is None or config.total_size == 1:  # no mesh, so `fully_shard` takes all ranks
        return trainer.args.world_size
    return config.dp_shard_size * config.cp_size


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
