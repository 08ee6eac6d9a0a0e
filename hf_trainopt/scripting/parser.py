"""Flags, YAML and JSON of the scripts: `HfArgumentParser` with a `--config` file, clear errors and demo defaults."""

import difflib
import json
import logging
import shlex
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


logger = logging.getLogger(__name__)

CONFIG_SUFFIXES = (".json", ".yaml", ".yml")

# Names that transformers 4 or older example scripts knew and version 5 does not: answered, never guessed.
REMOVED_NAMES: dict[str, str] = {
    "evaluation_strategy": "use eval_strategy",
    "warmup_ratio": "use warmup_steps with a float below 1, for example warmup_steps=0.1",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "overwrite_output_dir": "use resume_from_checkpoint=False to start anew in a folder that holds checkpoints",
    "include_tokens_per_second": "use include_num_input_tokens_seen",
    "include_inputs_for_metrics": "use include_for_metrics=inputs",
    "no_cuda": "use use_cpu",
    "use_mps_device": "leave it out, MPS is found by itself",
    "group_by_length": "use train_sampling_strategy=group_by_length",
    "save_safetensors": "leave it out, safetensors is the only format",
    "tpu_num_cores": "leave it out, the TPU launcher sets the number of cores",
    "past_index": "leave it out, it has no successor",
    "fp16_opt_level": "use fp16 or bf16, Apex is gone",
    "fp16_backend": "use fp16 or bf16, there is one backend",
    "half_precision_backend": "use fp16 or bf16, there is one backend",
    "use_legacy_prediction_loop": "leave it out, there is one prediction loop",
    "jit_mode_eval": "use torch_compile",
    "ray_scope": "pass it to hyperparameter_search",
    "torchdynamo": "use torch_compile_backend",
    "push_to_hub_model_id": "use hub_model_id",
    "push_to_hub_organization": "use hub_model_id",
    "push_to_hub_token": "use hub_token",
    "dispatch_batches": "use accelerator_config",
    "split_batches": "use accelerator_config",
    "per_gpu_train_batch_size": "use per_device_train_batch_size",
    "per_gpu_eval_batch_size": "use per_device_eval_batch_size",
    "mp_parameters": "leave it out, it has no successor",
    "adafactor": "use optim=adafactor",
    "torch_dtype": "use dtype",
    "use_auth_token": "use token",
    "low_cpu_mem_usage": "leave it out, it is always on",
    "feature_extractor_name": "use image_size and crop_pct, the rest of the transforms belongs to the timm model",
}


class ScriptArgumentParser(HfArgumentParser):
    """`HfArgumentParser` that takes no abbreviated flags and reports a wrong value in one line, without the usage.

    The usage of a script that takes every `TrainingArguments` flag is hundreds of lines long: printed before the
    message, as argparse does, it hides the message. Abbreviations are off because a mistyped flag would otherwise
    set another one (`--eval_step` sets `--eval_steps`).
    """

    def __init__(self, dataclass_types: Iterable[type], **kwargs: Any):
        super().__init__(tuple(dataclass_types), allow_abbrev=False, **kwargs)
        self.add_argument("--config", metavar="FILE", help="YAML or JSON file of flag values; flags given win over it")

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON mapping of flag names (without dashes) to values.

    Raises:
        ValueError: the file is missing, is not YAML or JSON, or holds something else than a mapping.
    """
    path = Path(path)
    if path.suffix not in CONFIG_SUFFIXES:
        raise ValueError(f"The config file {path} must end in {', '.join(CONFIG_SUFFIXES)}.")
    if not path.is_file():
        raise ValueError(f"The config file {path} does not exist.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"The config file {path} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"The config file {path} must hold a mapping of flag names to values.")
    return values


def parse_script_arguments(
    dataclass_types: Iterable[type],
    demo_defaults: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None,
    argv: list[str] | None = None,
    **parser_kwargs: Any,
) -> tuple[Any, ...]:
    """Parse the command line of a script into one object per dataclass.

    Later wins: the fields' defaults, `demo_defaults`, a file `<script>.args` beside the script, the file of `--config`
    (or the only argument, when it ends in .json, .yaml or .yml), the flags. All of them are read by argparse, so a
    string such as `1e-3`, which YAML 1.1 does not take for a number, is converted by the type of its flag.

    Args:
        dataclass_types: the dataclasses, in the order of the objects returned.
        demo_defaults: called with the values the user gave, by name; returns defaults that stand in for the others.
        argv: arguments without the program name; `sys.argv[1:]` unless given.
        **parser_kwargs: passed to `argparse.ArgumentParser`.

    Raises:
        ValueError: an unknown or removed name, or a config file that cannot be used.
    """
    dataclass_types = tuple(dataclass_types)
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = ScriptArgumentParser(dataclass_types, **parser_kwargs)

    if len(argv) == 1 and argv[0].endswith(CONFIG_SUFFIXES):
        argv = ["--config", argv[0]]
    tokens = _args_file_tokens() + argv
    _check_removed_flags(tokens)
    config_path = parser.parse_known_args(tokens)[0].config
    if config_path is not None:
        tokens = _as_tokens(parser, read_config_file(config_path), source=f"the config file {config_path}") + tokens
    if demo_defaults is not None:
        tokens = _as_tokens(parser, demo_defaults(_given_values(dataclass_types, tokens)), source="the demo") + tokens

    *parsed, remaining = parser.parse_args_into_dataclasses(
        tokens, return_remaining_strings=True, look_for_args_file=False
    )
    if remaining:
        message = f"Some specified arguments are not used by the HfArgumentParser: {remaining}"
        flag = next((token for token in remaining if token.startswith("--")), None)
        raise ValueError(message + (_suggestion(flag, parser._option_string_actions) if flag else "."))
    return tuple(parsed[: len(dataclass_types)])


def _args_file_tokens() -> list[str]:
    """Flags of `<script>.args`, which `HfArgumentParser` reads too; here they count as given by the user."""
    path = Path(sys.argv[0]).with_suffix(".args") if sys.argv[0] else None
    return shlex.split(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else []


def _given_values(dataclass_types: tuple[type, ...], tokens: list[str]) -> dict[str, Any]:
    probe = ScriptArgumentParser(dataclass_types, add_help=False)
    for action in probe._actions:
        action.default = SUPPRESS
    return vars(probe.parse_known_args(tokens)[0])


def _as_tokens(parser: ScriptArgumentParser, values: Mapping[str, Any], source: str) -> list[str]:
    """Turn name-value pairs into command-line tokens; `None` has no such form and becomes the parser's default."""
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest not in ("help", "config")}
    tokens: list[str] = []
    for key, value in values.items():
        name = key.replace("-", "_")
        if name in REMOVED_NAMES:
            raise ValueError(f"{key} in {source} was removed from transformers: {REMOVED_NAMES[name]}.")
        if name not in actions:
            raise ValueError(f"{key} in {source} is not the name of a flag" + _suggestion(name, actions))
        if value is None:
            parser.set_defaults(**{name: None})
        elif isinstance(value, list):
            if actions[name].nargs not in ("+", "*"):
                raise ValueError(f"{key} in {source} takes one value, not a list.")
            tokens += [f"--{name}", *map(str, value)]
        else:
            tokens.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return tokens


def _check_removed_flags(tokens: list[str]) -> None:
    for token in tokens:
        name = token.partition("=")[0].removeprefix("--").replace("-", "_")
        if token.startswith("--") and name in REMOVED_NAMES:
            raise ValueError(f"--{name} was removed from transformers: {REMOVED_NAMES[name]}.")


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.partition("=")[0].replace("-", "_") if name[0] != "-" else name, known, n=1)
    return f"; did you mean {close[0]}?" if close else "."
