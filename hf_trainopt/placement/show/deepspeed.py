"""The configuration that `--deepspeed` names: read as a run reads it, and checked against the other flags.

`"auto"` stands for what the flags say. Anything else in the configuration holds, and a flag that contradicts it is an
error, as in `Trainer`.
"""

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import PlacementError
from ..plan.deepspeed_config import (
    UnpredictedError,
    is_offloaded,
    optimizer_of_config,
    section_of,
    sharding_of_config,
    stage_of_config,
)
from ..simulate.sharding import Sharding


_OFFLOADS = {"offload_optimizer": "offload_optimizer", "offload_parameters": "offload_param"}
DEFAULT_OPTIM = "adamw_torch_fused"
# What a configuration with an optimizer goes with: Adam(W) is all that is planned for there.
_ADAMW = (DEFAULT_OPTIM, "adamw_torch")


def read_config(path: str) -> dict[str, Any]:
    """Return a configuration of DeepSpeed.

    Raises:
        ValueError: There is no such file, or it holds no JSON object.
    """
    if not os.path.isfile(path):
        raise ValueError(f"--deepspeed {path} is not a file.")
    with open(path, encoding="utf-8") as file:
        try:
            config = json.load(file)
        except ValueError as error:
            raise ValueError(f"--deepspeed {path} isn't JSON ({error}); correct the file.") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"--deepspeed {path} holds a {type(config).__name__}; a configuration is a JSON object, such as "
            '{"zero_optimization": {"stage": 2}}.'
        )
    return config


def settle_deepspeed(arguments: argparse.Namespace) -> None:
    """Check the flags against the configuration, and set those that it decides: sharding and offload.

    The configuration itself is then in `arguments.deepspeed_config`.

    Raises:
        ValueError: They contradict each other, or the configuration isn't one.
    """
    path = arguments.deepspeed
    if arguments.sharding is not None and not arguments.sharding.startswith("zero"):
        raise ValueError("--deepspeed needs --sharding zero0, zero1, zero2 or zero3; leave it out.")
    config = arguments.deepspeed_config = read_config(path)
    with _explained(path):
        kind = f"zero{stage_of_config(config)}"
        if arguments.sharding not in (None, kind):
            raise ValueError(
                f"--sharding {arguments.sharding} contradicts {path}, whose zero_optimization.stage is {kind[-1]}; "
                "leave out --sharding, or change the stage."
            )
        arguments.sharding = kind
        zero = section_of(config, "zero_optimization")
        for flag, name in _OFFLOADS.items():
            usable = kind != "zero0" if name == "offload_optimizer" else kind == "zero3"
            moves = usable and is_offloaded(zero, name)
            if getattr(arguments, flag) and not moves:
                raise ValueError(
                    f"--{flag} contradicts {path}, which doesn't offload that; leave it out, or set "
                    f'zero_optimization.{name} to {{"device": "cpu"}}.'
                )
            setattr(arguments, flag, moves)
        for said, given, remedy in _contradictions(config, arguments):
            raise ValueError(f"{said} in {path} contradicts {given}; {remedy}.")


def _contradictions(config: Mapping[str, Any], arguments: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Yield what the configuration says, what the flags say, and what to do, where `Trainer` would refuse the two."""
    for name in ("bf16", "fp16"):
        enabled = section_of(config, name).get("enabled", "auto")
        if enabled != "auto" and bool(enabled) != bool(getattr(arguments, name)):
            said = f"{name}.enabled {str(bool(enabled)).lower()}"
            if enabled:
                yield said, "the flags", f'pass --{name} or set "auto"'
            else:
                yield said, f"--{name}", 'leave it out or set "auto"'
    if "optimizer" in config and arguments.optim not in _ADAMW:
        yield "optimizer", f"--optim {arguments.optim}", "leave out one of them"
    numbers = {"gradient_clipping": ("max_grad_norm", arguments.max_grad_norm)}
    if "per_device_train_batch_size" not in (arguments.find or ()):
        batch, steps = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
        numbers["train_micro_batch_size_per_gpu"] = "per_device_train_batch_size", batch
        if type(steps) is int:  # not adaptive
            numbers["gradient_accumulation_steps"] = "gradient_accumulation_steps", steps
            numbers["train_batch_size"] = None, batch * steps * arguments.num_devices
    for name, (flag, given) in numbers.items():
        said = config.get(name, "auto")
        if said not in ("auto", None, given):
            if flag is None:
                yield f"{name} {said}", f"the flags, which make {given}", 'set "auto"'
            else:
                yield f"{name} {said}", f"--{flag} {given}", f'pass --{flag} {said} or set "auto"'


def sharding_of_flags(arguments: argparse.Namespace, model: nn.Module) -> Sharding:
    """Return how a run with this configuration spreads a model.

    Raises:
        ValueError: A setting isn't planned for.
    """
    precision = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "no"
    config = dict(arguments.deepspeed_config)
    if precision != "no":
        config.setdefault(precision, {"enabled": True})  # as Accelerate fills it in
    with _explained(arguments.deepspeed):
        return sharding_of_config(config, arguments.num_devices, model, precision)


def optimizer_of_flags(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Return the optimizer of the configuration; `None` if `--optim` decides."""
    return None if arguments.deepspeed is None else optimizer_of_config(arguments.deepspeed_config)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Context in which errors name the file."""
    try:
        yield
    except UnpredictedError as error:
        raise ValueError(f"--deepspeed {path} has {error.what}, which isn't planned for; change that.") from error
    except PlacementError as error:
        raise ValueError(f"--deepspeed {path}: {error}") from error
