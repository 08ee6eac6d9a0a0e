"""Flags, YAML and JSON of the scripts: `HfArgumentParser` with a `--config` file, clear errors and demo defaults."""

import dataclasses
import difflib
import json
import logging
import re
import shlex
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_trainopt.removed_names import REMOVED_NAMES


logger = logging.getLogger(__name__)

CONFIG_SUFFIXES = (".json", ".yaml", ".yml")

_IN_WINDOWS = (
    " With varying k it is counted in windows of gradient_accumulation_steps micro-batches: the same data as in stock"
    " Trainer, whatever the number of optimizer steps."
)
# What the help texts of `TrainingArguments` do not say of our Trainer.
_COUNTED_OTHERWISE = {
    "gradient_accumulation_steps": " Unless accumulation_policy is 'fixed' that is the reference: learning_rate is"
    " meant for its batch, and steps are counted in it; what is in force is chosen by the policy.",
    "max_steps": _IN_WINDOWS,
    "warmup_steps": _IN_WINDOWS,
    "logging_steps": _IN_WINDOWS,
    "eval_steps": _IN_WINDOWS,
    "save_steps": _IN_WINDOWS,
}


class ScriptArgumentParser(HfArgumentParser):
    """`HfArgumentParser` that takes no abbreviated flags and reports a wrong value in one line, without the usage.

    The usage of a script that takes every `TrainingArguments` flag is hundreds of lines long: printed before the
    message, as argparse does, it hides the message. Abbreviations are off because a mistyped flag would otherwise
    set another one (`--eval_step` sets `--eval_steps`).
    """

    def __init__(self, dataclass_types: Iterable[type], **kwargs: Any):
        kwargs = {"formatter_class": _HelpFormatter, "usage": "%(prog)s [--config FILE] [--FLAG VALUE ...]"} | kwargs
        super().__init__(tuple(dataclass_types), allow_abbrev=False, **kwargs)
        self.add_argument("--config", metavar="FILE", help="YAML or JSON file of flag values; flags given win over it")
        self._put_our_arguments_first(dataclass_types)

    def _put_our_arguments_first(self, dataclass_types: Iterable[type]) -> None:
        """Move the arguments of each of our parts from the many of `TrainingArguments` into a group before them.

        There is no public way to move an argument. Both lists are read by `format_help` alone.
        """
        stock = self._optionals
        stock.title = "Hugging Face TrainingArguments"
        groups = []
        for title, (description, names) in arguments_by_part(dataclass_types).items():
            group = self.add_argument_group(title, description)
            group._group_actions = [action for action in stock._group_actions if action.dest in names]
            stock._group_actions = [action for action in stock._group_actions if action.dest not in names]
            groups.append(group)
        if groups:
            for action in stock._group_actions:
                if action.dest in _COUNTED_OTHERWISE:
                    action.help = (action.help or "") + _COUNTED_OTHERWISE[action.dest]
        others = [group for group in self._action_groups if group is not stock and group not in groups]
        self._action_groups = [*groups, *others, stock]

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {_explained(message)} (see --help)\n")


# What argparse says of a value. It names a flag by all its spellings.
_WRONG_TYPE = re.compile(r"argument (--\w+)\S*: invalid (int|float) value: (.*)")
_WRONG_CHOICE = re.compile(r"argument (--\w+)\S*: invalid choice: (.*) \(choose from (.*)\)")
_WRONG_SWITCH = re.compile(r"argument (--\w+)\S*: Truthy value expected: got (.*) but expected .*")
_NO_VALUE = re.compile(r"argument (--\w+)\S*: expected (one|at least one) argument")


def _explained(message: str) -> str:
    """Return what argparse says of a wrong value with the remedy, and of many choices the closest."""
    if match := _WRONG_TYPE.fullmatch(message):
        kind = {"int": "whole number", "float": "number"}[match[2]]
        return f"{match[1]} is {match[3]}; it must be a {kind}"
    if match := _WRONG_CHOICE.fullmatch(message):
        choices = [choice.strip("'") for choice in match[3].split(", ")]
        close = difflib.get_close_matches(match[2].strip("'"), choices, n=3) if len(choices) > 20 else []
        return f"{match[1]} is {match[2]}; choose one of {', '.join(close or choices)}"
    if match := _WRONG_SWITCH.fullmatch(message):
        return f"{match[1]} is '{match[2]}'; it must be true or false"
    if match := _NO_VALUE.fullmatch(message):
        return f"{match[1]} has no value; give {match[2]}"
    return message


class _UniqueKeyLoader(yaml.SafeLoader):
    """`SafeLoader` that refuses a key which stands twice, of which it would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for index, key in enumerate(keys) if key in keys[:index]]
        if twice:
            raise yaml.YAMLError(f"{twice[0]} stands in it twice")
        return super().construct_mapping(node, deep)


class _HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Adds the default to a help text that does not say it, and names each flag once."""

    def _format_action_invocation(self, action):
        # `--like_this` alone: what `HfArgumentParser` adds, `--like-this`, doubles the length.
        if not action.option_strings or action.dest == "help":
            return super()._format_action_invocation(action)
        if action.nargs == 0:
            return action.option_strings[0]
        return (
            f"{action.option_strings[0]} {self._format_args(action, self._get_default_metavar_for_optional(action))}"
        )

    def _get_help_string(self, action):
        text = action.help or ""
        if action.nargs == 0 and action.option_strings[0].startswith("--no_"):
            # `HfArgumentParser` gives it the text of the flag that it turns off.
            return f"Turn --{action.dest} off."
        # A default of `None` is no value: what it means is for the text to say.
        return text if action.default is None or "(the default)" in text else super()._get_help_string(action)


def arguments_by_part(dataclass_types: Iterable[type]) -> dict[str, tuple[str, set[str]]]:
    """Return the arguments that are ours: title of a group -> (what the part is, the names of its arguments).

    A part is a mixin of `TrainingArguments` in this package; its group is named after its module, or after the
    `argument_group` that the mixin has of its own.
    """
    parts: dict[str, tuple[str, set[str]]] = {}
    for cls in dataclass_types:
        for owner in cls.__mro__:
            if not owner.__module__.startswith("hf_trainopt.") or not issubclass(cls, TrainingArguments):
                continue
            own = set(vars(owner).get("__annotations__", {})) & {field.name for field in dataclasses.fields(cls)}
            if not own:
                continue
            title = vars(owner).get("argument_group") or owner.__module__.split(".")[1].replace("_", " ")
            parts[title] = (
                owner.__doc__.strip().splitlines()[0].replace(", for any `TrainingArguments` class", ""),
                own,
            )
    return parts


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON mapping of flag names (without dashes) to values.

    Raises:
        ValueError: the file is missing, is not YAML or JSON, or holds something else than a mapping.
    """
    path = Path(path)
    if path.suffix not in CONFIG_SUFFIXES:
        raise ValueError(f"The config file {path} of --config must end in {', '.join(CONFIG_SUFFIXES)}.")
    if not path.is_file():
        raise ValueError(f"The config file {path} of --config does not exist; check the path.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # a `SafeLoader`
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"The config file {path} cannot be read: {reason}.") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(
            f"The config file {path} must hold a mapping of flag names to values, such as 'learning_rate: 1e-3'."
        )
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

    if len(argv) == 1 and argv[0].endswith(CONFIG_SUFFIXES) and not argv[0].startswith("-"):
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
        flags = [token for token in remaining if token.startswith("-") and not _is_number(token)]
        if not flags:
            raise ValueError(f"{message}; flags begin with --, see --help.")
        known = parser._option_string_actions
        if len(flags) == 1:
            raise ValueError(message + _suggestion(flags[0], known))
        hints = [f"{flag.partition('=')[0]}{_suggestion(flag, known).rstrip('.')}" for flag in flags]
        raise ValueError(f"{message}: {', '.join(hints)}".replace(";", ","))
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
        if value is False and "no" in (actions[name].choices or ()):
            value = "no"  # which YAML 1.1 reads as false
        if value is None:
            parser.set_defaults(**{name: None})
        elif isinstance(value, list):
            if actions[name].nargs not in ("+", "*"):
                raise ValueError(f"{key} in {source} takes one value, not a list: leave one.")
            tokens += [f"--{name}", *map(str, value)]
        else:
            tokens.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return tokens


def _check_removed_flags(tokens: list[str]) -> None:
    for token in tokens:
        name = token.partition("=")[0].removeprefix("--").replace("-", "_")
        if token.startswith("--") and name in REMOVED_NAMES:
            raise ValueError(f"--{name} was removed from transformers: {REMOVED_NAMES[name]}.")


def _is_number(token: str) -> bool:
    try:
        float(token)
    except ValueError:
        return False
    return True


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.partition("=")[0].replace("-", "_") if name[0] != "-" else name, known, n=1)
    return f"; did you mean {close[0]}?" if close else "; see --help."
