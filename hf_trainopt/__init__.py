"""The Hugging Face Trainer, cheaper: `EfficientTrainer` and `EfficientTrainingArguments` for the stock pair."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .arguments import EfficientTrainingArguments, EfficientTrainingArgumentsMixin
    from .placement import PlacementPlan, apply_placement, plan_placement
    from .trainer import EfficientTrainer, EfficientTrainerMixin

__all__ = [
    "EfficientTrainer",
    "EfficientTrainerMixin",
    "EfficientTrainingArguments",
    "EfficientTrainingArgumentsMixin",
    "PlacementPlan",
    "apply_placement",
    "plan_placement",
]

# Loaded when they are first used: PyTorch and transformers take seconds to import.
_MODULES = {
    "EfficientTrainer": "trainer",
    "EfficientTrainerMixin": "trainer",
    "EfficientTrainingArguments": "arguments",
    "EfficientTrainingArgumentsMixin": "arguments",
    "PlacementPlan": "placement",
    "apply_placement": "placement",
    "plan_placement": "placement",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value = version("hf-trainopt")
        except PackageNotFoundError:  # run from a source tree that is not installed
            value = "0.0.0"
    elif name in _MODULES:
        from importlib import import_module

        value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__", "__doc__"]
