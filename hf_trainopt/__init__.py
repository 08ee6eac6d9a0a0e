"""The Hugging Face Trainer, cheaper: `EfficientTrainer` and `EfficientTrainingArguments` for the stock pair."""

from importlib.metadata import PackageNotFoundError, version

from ._compat import check_transformers_version
from .args import EfficientTrainingArguments, EfficientTrainingArgumentsMixin
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

try:
    __version__ = version("hf-trainopt")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.0.0"

check_transformers_version()
