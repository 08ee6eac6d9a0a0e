"""The arguments that a run was started with, read from its `training_args.bin` without running code from the file."""

import io
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any


ARGUMENTS_NAME = "training_args.bin"

# The file of an ordinary run has a few kilobytes.
_MOST_BYTES = 4 * 2**20


class _Inert:
    """Stands for an object of any class in a pickle: keeps its state, runs nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        made = object.__new__(cls)
        made.__dict__["arguments"] = args
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


class _InertUnpickler(pickle.Unpickler):
    """Puts an inert object in place of every object: no class is imported, and nothing is called.

    `torch.load(weights_only=True)` can't read these files: it would have to import the class of the arguments, which
    may be in TRL or in the user's script, and to run its methods.
    """

    def find_class(self, module: str, name: str) -> type:
        return type(name, (_Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        return _Inert()


def read_settings(path: Path) -> dict[str, Any]:
    """Return the arguments in a `training_args.bin` that are numbers, texts or lists of these.

    Enumerations are their values. `world_size` and `n_gpu` are added from what the arguments know of the devices.

    Raises:
        ValueError: The file can't be read, with the reason.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            inside = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
            if inside.file_size > _MOST_BYTES:
                raise ValueError("it is too large for arguments")
            arguments = _InertUnpickler(io.BytesIO(archive.read(inside))).load()
        values = vars(arguments)
    except StopIteration:
        raise ValueError("it isn't a file of torch.save") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(str(error) or type(error).__name__) from error
    return settings_of(values)


def settings_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `read_settings` does from the attributes of arguments, those of a file or of a Trainer in memory."""
    settings = {name: plain for name, value in values.items() if (plain := _plain(value)) is not None}
    settings.pop("arguments", None)  # of `_Inert`
    state = values.get("distributed_state")
    settings["world_size"] = 1 if state is None else settings_number(vars(state), "num_processes")
    settings["n_gpu"] = max(1, settings.pop("_n_gpu", 1) or 1)
    return settings


def _plain(value: Any) -> Any:
    if isinstance(value, _Inert):
        first = value.arguments[0] if len(value.arguments) == 1 else None
        return first if isinstance(first, str | int) else None
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple) and all(isinstance(item, str | int | float) for item in value):
        return list(value)
    return value if isinstance(value, str | int | float) else None


def settings_number(settings: Mapping[str, Any], name: str) -> int | None:
    """Return a setting that must be a whole number from 1; `None` if it is anything else."""
    value = settings.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else None


def reference_steps(settings: Mapping[str, Any]) -> int | None:
    """Return k as it was set."""
    return settings_number(settings, "gradient_accumulation_steps")


def devices(settings: Mapping[str, Any]) -> int | None:
    """Return the number of devices that micro-batches went to."""
    ranks, on_each = settings_number(settings, "world_size"), settings_number(settings, "n_gpu")
    return ranks * on_each if ranks and on_each else None


def samples_per_step(settings: Mapping[str, Any]) -> int | None:
    """Return the samples of a full optimizer step at the k that was set, over all devices."""
    factors = (settings_number(settings, "per_device_train_batch_size"), devices(settings), reference_steps(settings))
    return factors[0] * factors[1] * factors[2] if all(factors) else None


def _length(settings: Mapping[str, Any]) -> str | None:
    steps, epochs = settings.get("max_steps"), settings.get("num_train_epochs")
    return (
        f"{steps:,} steps"
        if isinstance(steps, int) and steps > 0
        else None
        if epochs is None
        else f"{epochs:g} epochs"
    )


def _precision(settings: Mapping[str, Any]) -> str | None:
    named = [name for name in ("bf16", "fp16") if settings.get(name) is True]
    asked = settings.get("precision")
    return str(asked) if asked else named[0] if named else "fp32" if "bf16" in settings else None


# What the table of settings has: label, and a name or a function.
_ROWS = {
    "micro-batch of a device": "per_device_train_batch_size",
    "devices": devices,
    "k (gradient_accumulation_steps)": "gradient_accumulation_steps",
    "samples per optimizer step": samples_per_step,
    "accumulation policy": "accumulation_policy",
    "length": _length,
    "optimizer": "optim",
    "learning rate": "learning_rate",
    "schedule": "lr_scheduler_type",
    "warm-up (steps, or share of them)": "warmup_steps",
    "weight decay": "weight_decay",
    "clipped at a gradient norm of": "max_grad_norm",
    "precision": _precision,
    "memory budget": "memory_budget",
    "seed": "seed",
}


def settings_rows(arms: Sequence[Sequence[Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """Return a row for each setting that is known of some arm: its name, and for each arm its values.

    Args:
        arms: For each arm the settings of its runs.
    """
    rows = []
    for label, source in _ROWS.items():
        cells = []
        for runs in arms:
            values = [source(run) if callable(source) else run.get(source) for run in runs]
            cells.append(", ".join(dict.fromkeys(_text(value) for value in values if value is not None)))
        if any(cells):
            rows.append((label, *(cell or "not recorded" for cell in cells)))
    return rows


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
