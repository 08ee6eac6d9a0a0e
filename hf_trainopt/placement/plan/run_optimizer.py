"""An optimizer like that of a run, over the parameters of another model."""

import inspect
from typing import Any

import torch

from ...core.shadow import shadow_of
from ..simulate.optimizers import STATES, TableOptimizer
from .deepspeed_config import config_optimizer
from .own_loss import overridden
from .run_sharding import optimizer_in_config


def optimizer_of(trainer: Any, model: torch.nn.Module, *, is_flat: bool) -> torch.optim.Optimizer:
    """Return an optimizer like that of the run, over the same parameters of another model.

    Args:
        trainer: The Trainer.
        model: A copy of its model.
        is_flat: Whether each of its groups becomes one tensor (DeepSpeed), so that groups must be those of the run.
    """
    config = optimizer_in_config(trainer)
    if config is not None:  # `Trainer` asks neither `optim` nor `create_optimizer` then
        return config_optimizer(config, model)
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    # What `prepare` has made for an earlier `train` holds flat partitions under DeepSpeed.
    is_prepared = trainer.is_deepspeed_enabled and hasattr(trainer.optimizer, "optimizer")
    if trainer.optimizer is not None and not is_prepared:
        inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        if name in STATES and type(inner).__module__.partition(".")[0] not in ("torch", "transformers"):
            return TableOptimizer(model, name)  # made by an earlier `train`
        taken = _parameters_of(type(inner))
        defaults = {n: v for n, v in inner.defaults.items() if n in taken}
        return type(inner)(_same_groups(inner, trainer.model, model), **defaults)
    if "create_optimizer" in overridden(trainer):
        shadow = shadow_of(trainer, model)
        shadow.model = shadow.model_wrapped = model
        made = shadow.create_optimizer()
        return shadow.optimizer if made is None else made
    if trainer.optimizer_cls_and_kwargs is None and name in STATES:
        return TableOptimizer(model, name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if is_flat:  # which makes a flat tensor of each group
        trained = _decay_groups(trained, model, trainer.get_decay_parameter_names(model))
    if trainer.optimizer_cls_and_kwargs is not None:
        cls, kwargs = trainer.optimizer_cls_and_kwargs
    else:
        cls, kwargs = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    kwargs = {name: value for name, value in kwargs.items() if name not in ("params", "model", "optimizer_dict")}
    return cls(trained, **kwargs)


def _parameters_of(cls: type) -> set[str]:
    """Names of what a class's constructor takes, also of those that it hands on to the class that it is made from."""
    names: set[str] = set()
    for owner in cls.__mro__:
        if "__init__" in vars(owner):
            parameters = inspect.signature(owner.__init__).parameters
            names |= set(parameters)
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                break
    return names


def _decay_groups(trained: list[torch.Tensor], model: torch.nn.Module, decayed: list[str]) -> list[dict[str, Any]]:
    """Return the groups that `Trainer` makes: parameters with weight decay, and without."""
    with_decay = {id(parameter) for name, parameter in model.named_parameters() if name in set(decayed)}
    groups = [[p for p in trained if (id(p) in with_decay) == decays] for decays in (True, False)]
    return [{"params": group} for group in groups if group]


def _same_groups(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, other: torch.nn.Module
) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimizer, with the parameters of the same names in another model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    others = dict(other.named_parameters())
    groups = []
    for group in optimizer.param_groups:
        unknown = [parameter for parameter in group["params"] if id(parameter) not in names]
        if unknown:
            raise ValueError(
                f"the optimizer has {len(unknown)} parameters that the model lacks, so that no peak can be predicted; "
                "choose checkpoint_placement='all', 'every_n' or 'sqrt'."
            )
        groups.append({**group, "params": [others[names[id(parameter)]] for parameter in group["params"]]})
    return groups
