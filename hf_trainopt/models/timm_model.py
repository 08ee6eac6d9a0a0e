"""timm models as transformers models: configs from names and JSON, pretrained weights, the classifier replaced."""

import difflib
import json
import logging
from typing import Any

from transformers import AutoConfig, TimmWrapperConfig, TimmWrapperForImageClassification

from .hub import hub_errors


try:
    import timm
    from timm.models import get_pretrained_cfg
except ImportError as error:
    raise ImportError(f"timm models need timm ({error}); pip install 'hf-trainopt[scripts]'.") from error


logger = logging.getLogger(__name__)

DEFAULT_MODEL = "resnet50"


def check_timm_name(name: str) -> None:
    """Raise `ValueError` unless timm knows the architecture `name`."""
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f" ({', '.join(close)}, ...)" if close else ""
        raise ValueError(f"timm has no model {name}; choose --timm_model from timm.list_models(){hint}.")


def parse_model_args(text: str | None, **more: Any) -> dict[str, Any]:
    """Return the arguments of a timm model in the JSON object `text`, and those of `more` that are not `None`.

    Raises:
        ValueError: `text` is no JSON object.
    """
    try:
        options = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"--model_args must be a JSON object ({error}), not {text}.") from error
    if not isinstance(options, dict):
        raise ValueError(f"--model_args must be a JSON object, not {text}.")
    return options | {name: value for name, value in more.items() if value is not None}


def load_timm_config(
    name_or_path: str | None, architecture: str | None, model_args: dict[str, Any], **hub: Any
) -> TimmWrapperConfig:
    """Return the config of saved weights, or a new one of `architecture` (ResNet-50 unless given).

    Raises:
        ValueError: the weights are not there, or not of a timm model.
    """
    if name_or_path is None:
        return TimmWrapperConfig(architecture=architecture or DEFAULT_MODEL, model_args=model_args)
    with hub_errors(f"The model config {name_or_path} (--model_name_or_path)", "train from scratch with --timm_model"):
        config = AutoConfig.from_pretrained(name_or_path, **hub)
    if not isinstance(config, TimmWrapperConfig):
        raise ValueError(f"{name_or_path} is not a timm model; on the Hub their names start with timm/.")
    config.model_args = {**(config.model_args or {}), **model_args}
    return config


def pretrained_cfg_of(config: TimmWrapperConfig) -> dict[str, Any]:
    """Return the pixels (size, mean, ...) that the model was made for: those saved with it, or timm's."""
    timm_cfg = get_pretrained_cfg(config.architecture)
    return timm_cfg.to_dict() | (getattr(config, "pretrained_cfg", None) or {})


def load_timm_model(
    config: TimmWrapperConfig,
    name_or_path: str | None,
    *,
    pretrained: bool = False,
    ignore_mismatched_sizes: bool = False,
    **hub: Any,
) -> TimmWrapperForImageClassification:
    """Return a model of `config`: with saved weights, with timm's default weights (`pretrained`), or new.

    Raises:
        ValueError: the weights are not there, or their classifier is for another number of classes.
    """
    if name_or_path is None and not pretrained:
        try:
            model = TimmWrapperForImageClassification(config)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ValueError(
                f"{config.architecture} does not take --model_args {config.model_args} ({error}); leave out "
                "the ones it doesn't know."
            ) from error
        logger.info(f"Training new model from scratch - Total size={model.num_parameters() / 1e6:.2f}M params")
        return model
    if name_or_path is None:
        # timm's default weights are for other classes: their classifier is replaced without being asked.
        ignore_mismatched_sizes = True
        name_or_path = f"timm/{config.architecture}"
        if "." not in config.architecture:
            name_or_path += f".{get_pretrained_cfg(config.architecture).tag}"
    try:
        with hub_errors(
            f"The model {name_or_path}", "train from scratch, without --pretrained and --model_name_or_path"
        ):
            return TimmWrapperForImageClassification.from_pretrained(
                name_or_path, config=config, ignore_mismatched_sizes=ignore_mismatched_sizes, **hub
            )
    except RuntimeError as error:
        if ignore_mismatched_sizes or "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"The classifier of {name_or_path} is not for {config.num_labels} classes: pass "
            "--ignore_mismatched_sizes to replace it."
        ) from error
