"""A model and an example batch without memory, from what a command line names."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, TimmWrapperConfig
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights

from hf_trainopt.models.hub import hub_errors
from hf_trainopt.models.liger import with_liger
from hf_trainopt.models.overrides import config_with

from ..simulate.quantized import Quantization, quantize


# Task -> the class that builds its models.
TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}

# How the names of a task's classes in `config.architectures` end.
_ARCHITECTURES = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForConditionalGeneration": "seq2seq-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForImageClassification": "image-classification",
}

LONGEST_DEFAULT_BLOCK = 1024
DEFAULT_IMAGE_SIZE = 224


@dataclass(frozen=True)
class ModelRequest:
    """What to build; the names are those of the flags of the scripts.

    Args:
        model_type: Model type of transformers, with its default config.
        config_overrides: Changes to it, as `"n_layer=4,n_embd=256"`.
        timm_model: Architecture of timm.
        model_args: More arguments of a timm model as JSON.
        model_name_or_path: Folder or Hub name, of which only the config is read.
        task: One of `TASKS`; `None`: what the config is for.
        num_classes: Classes of a classifier; `None`: as many as the config has.
        attn_implementation: As in `from_pretrained`.
        dtype: Type of the weights; `None`: that of the config.
        lora_r: Rank of LoRA adapters, which alone are trained; `None`: the whole model is.
        lora_target_modules: Modules that get adapters: names, a regular expression, or `"all-linear"`; `None`: PEFT's
            default for the model.
        quantization: How the weights of linear layers are kept; `None`: as they are.
        use_liger_kernel: Whether it runs Liger's kernels.
    """

    model_type: str | None = None
    config_overrides: str | None = None
    timm_model: str | None = None
    model_args: str | None = None
    model_name_or_path: str | None = None
    task: str | None = None
    num_classes: int | None = None
    attn_implementation: str | None = None
    dtype: torch.dtype | None = None
    lora_r: int | None = None
    lora_target_modules: Sequence[str] | None = None
    quantization: Quantization | None = None
    use_liger_kernel: bool = False

    @property
    def name(self) -> str:
        """What the model is called."""
        return str(self.model_type or self.timm_model or self.model_name_or_path)

    @property
    def changes(self) -> str | None:
        """What is not as its config says."""
        return self.config_overrides or self.model_args

    @property
    def label(self) -> str:
        """Its name and what is changed."""
        return f"{self.name} ({self.changes})" if self.changes else self.name


@dataclass(frozen=True)
class BuiltModel:
    """A model and a batch on the meta device.

    Args:
        model: The model, with the shapes and ties of a real one.
        batch: Its keyword arguments.
        task: One of `TASKS`.
        sample: A sample in words, as `"1024 tokens"`.
    """

    model: nn.Module
    batch: dict[str, torch.Tensor]
    task: str
    sample: str


def load_config(request: ModelRequest) -> PreTrainedConfig:
    """Return the config of what is asked for; of a folder or Hub name nothing else is read.

    Raises:
        ValueError: There is no such model, or its config cannot be changed as asked.
    """
    if request.timm_model is not None:
        timm_model = _timm_models("--timm_model")
        timm_model.check_timm_name(request.timm_model)
        model_args = timm_model.parse_model_args(request.model_args)
        config = timm_model.load_timm_config(None, request.timm_model, model_args)
        config.num_labels = timm_model.pretrained_cfg_of(config).get("num_classes") or 1000
    elif request.model_type is not None:
        config = _default_config(request.model_type, request.config_overrides)
    else:
        config = _named_config(request.model_name_or_path)
        if isinstance(config, TimmWrapperConfig):
            timm_model = _timm_models(f"The model {request.model_name_or_path}")
            config.model_args = {**(config.model_args or {}), **timm_model.parse_model_args(request.model_args)}
        elif request.model_args is not None:
            raise ValueError("--model_args is for timm models; leave it out, or name the model with --timm_model.")
    if request.num_classes is not None:
        config.num_labels = request.num_classes
    if hasattr(config, "use_cache"):
        config.use_cache = False  # as `Trainer` does
    return config


def _timm_models(what: str) -> ModuleType:
    """Import what builds timm models. timm is part of the extra `scripts`.

    Raises:
        ValueError: timm is not installed.
    """
    try:
        from hf_trainopt.models import timm_model
    except ImportError as error:
        raise ValueError(f"{what}: {error}") from error
    return timm_model


def _default_config(model_type: str, overrides: str | None) -> PreTrainedConfig:
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"--model_type {model_type} is not a model type of transformers; give one, such as gpt2.")
    config = CONFIG_MAPPING[model_type]()
    if overrides:
        try:
            config = config_with(config, overrides)
        except (ValueError, TypeError) as error:
            example = "n_layer=4,n_embd=256"
            reason = str(error).rstrip(".")
            raise ValueError(
                f"--config_overrides {overrides} does not fit {model_type} ({reason}); give pairs of its config's "
                f"names and values, such as {example} for gpt2."
            ) from error
    return config


def _named_config(name: str) -> PreTrainedConfig:
    looks_like_path = name.startswith((".", "~", os.sep)) or os.path.isdir(name)
    if looks_like_path and not os.path.isfile(os.path.join(name, "config.json")):
        what = "holds no config.json" if os.path.isdir(name) else "is no folder"
        raise ValueError(f"--model_name_or_path {name} {what}; give the folder of a saved model or a Hub name.")
    with hub_errors(f"The model config {name}", "pass a local folder, --model_type or --timm_model"):
        try:
            return AutoConfig.from_pretrained(name, trust_remote_code=False)
        except (ValueError, KeyError) as error:
            reason = _first_sentence(error)
            raise ValueError(
                f"The config of --model_name_or_path {name} is not one of transformers ({reason}); models with code "
                "of their own are planned in a script, with plan_placement."
            ) from error


def task_of(config: PreTrainedConfig) -> str:
    """Return the task that a config is for: by its architectures, else by its model type.

    Raises:
        ValueError: Neither says it.
    """
    if isinstance(config, TimmWrapperConfig):
        return "image-classification"
    for architecture in config.architectures or ():
        for ending, task in _ARCHITECTURES.items():
            if architecture.endswith(ending) and _takes(task, config):
                return task
    # Encoders are among the causal models as well: for them "masked-lm" comes first.
    if config.is_encoder_decoder and _takes("seq2seq-lm", config):
        return "seq2seq-lm"
    for task in ("masked-lm", "causal-lm", "seq2seq-lm", "image-classification", "sequence-classification"):
        if _takes(task, config):
            return task
    raise ValueError(
        f"Models of type {config.model_type} are for none of the tasks {', '.join(TASKS)}; plan them in a script, "
        "with plan_placement."
    )


def _takes(task: str, config: PreTrainedConfig) -> bool:
    return type(config) in getattr(transformers, TASKS[task])._model_mapping


def build_model(request: ModelRequest, batch_size: int, block_size: int | None, image_size: int | None) -> BuiltModel:
    """Return a model and a batch that take no memory.

    Args:
        request: What to build.
        batch_size: Samples in the batch.
        block_size: Tokens per sample; `None`: what the model takes, at most 1024.
        image_size: Height and width of images; `None`: those that the model is for.

    Raises:
        ValueError: Something asked for does not exist or does not fit the model.
    """
    config = load_config(request)
    task = request.task or task_of(config)
    if isinstance(config, TimmWrapperConfig) and task != "image-classification":
        raise ValueError(f"--task {task} does not fit a timm model; leave it out.")
    if task == "image-classification":
        if block_size is not None:
            raise ValueError("--block_size is for text and this model is for images; use --image_size.")
        size, channels = _image_shape(config, image_size)
        sample, shape = f"{channels} x {size} x {size} pixels", (batch_size, channels, size, size)
    else:
        if image_size is not None:
            raise ValueError("--image_size is for images and this model is for text; use --block_size.")
        block = _block_size(config, block_size)
        sample, shape = f"{block} tokens", (batch_size, block)
    if task == "sequence-classification" and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # decoders look for the last token that is no padding
    if task == "seq2seq-lm" and getattr(config, "decoder_start_token_id", None) is None:
        # Default configs of T5 lack what all saved ones have; labels are shifted with it.
        config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0
    model = _on_meta(request, config, task)
    with torch.device("meta"):
        if task == "image-classification":
            pixels = torch.empty(shape, dtype=request.dtype or torch.float32)
            batch = {"pixel_values": pixels, "labels": torch.empty(batch_size, dtype=torch.long)}
        else:
            tokens = torch.empty(shape, dtype=torch.long)
            single = task == "sequence-classification"
            labels = torch.empty(batch_size, dtype=torch.long) if single else torch.empty_like(tokens)
            batch = {"input_ids": tokens, "labels": labels}
    return BuiltModel(model, batch, task, sample)


def _on_meta(request: ModelRequest, config: PreTrainedConfig, task: str) -> nn.Module:
    """Build a model as `from_pretrained` does before it loads weights: on the meta device, nothing initialised."""
    with ExitStack() as stack:
        for context in (torch.device("meta"), no_init_weights(), meta_device_safe_creation_ops()):
            stack.enter_context(context)
        if isinstance(config, TimmWrapperConfig):
            model = _timm_models("The model").load_timm_model(config, None)
        else:
            if not _takes(task, config):
                raise ValueError(
                    f"--task {task} does not fit models of type {config.model_type}; leave it out, or choose another "
                    f"one of {', '.join(name for name in TASKS if _takes(name, config))}."
                )
            options: dict[str, Any] = {} if request.dtype is None else {"dtype": request.dtype}
            if request.attn_implementation is not None:
                options["attn_implementation"] = request.attn_implementation
            try:
                model = getattr(transformers, TASKS[task]).from_config(config, **options)
            except Exception as error:  # whatever a config of the user's makes a model do
                raise ValueError(
                    f"{request.label} cannot be built ({type(error).__name__}: {_first_sentence(error)}); check "
                    "--config_overrides and --attn_implementation."
                ) from error
    model.tie_weights()  # part of the initialisation that was left out
    if task == "causal-lm" and getattr(model, "loss_type", None) is None:
        model.loss_type = "ForCausalLM"  # as run_clm.py has it
    if request.quantization is not None:
        quantize(model, request.quantization)
    if request.lora_r is not None:
        from hf_trainopt.models.lora import with_lora

        model = with_lora(model, request.lora_r, request.lora_target_modules)
    return with_liger(model) if request.use_liger_kernel else model


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")[:200]


def max_positions_of(config: PreTrainedConfig) -> int | None:
    """Return the most tokens that a model has positions for; `None` where there is no such number."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_source_positions"):
        positions = getattr(text, name, None)
        if isinstance(positions, int) and positions > 0:
            # RoBERTa's positions begin behind the padding token: two of 514 are never used.
            return positions - 2 if (positions - 2).bit_count() == 1 and positions > 4 else positions
    return None


def _block_size(config: PreTrainedConfig, asked: int | None) -> int:
    most = max_positions_of(config)
    if asked is None:
        return min(most or LONGEST_DEFAULT_BLOCK, LONGEST_DEFAULT_BLOCK)
    if most is not None and asked > most:
        raise ValueError(f"--block_size {asked} is more than the {most} positions of the model; lower it.")
    return asked


def _image_shape(config: PreTrainedConfig, asked: int | None) -> tuple[int, int]:
    """Return height (and width) and channels; a model of one size only is changed to the size that is asked for."""
    if isinstance(config, TimmWrapperConfig):
        options = config.model_args or {}
        pixels = _timm_models("The model").pretrained_cfg_of(config)
        own = options.get("img_size") or (pixels.get("input_size") or (3, DEFAULT_IMAGE_SIZE))[-1]
        own = own[0] if isinstance(own, list | tuple) else own
        if asked is not None and pixels.get("fixed_input_size"):
            config.model_args = {"img_size": asked, **options}
        return asked or own, options.get("in_chans", 3)
    own = getattr(config, "image_size", None)
    if asked is not None and own is not None:
        config.image_size = asked
    own = own[0] if isinstance(own, list | tuple) else own
    return asked or own or DEFAULT_IMAGE_SIZE, getattr(config, "num_channels", 3)
