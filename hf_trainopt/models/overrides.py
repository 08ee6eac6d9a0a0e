"""Configs of transformers with changes: `--config_overrides`."""

import ast
from typing import Any

from transformers import PreTrainedConfig


def config_with(config: PreTrainedConfig, overrides: str) -> PreTrainedConfig:
    """Return a config made anew with changes, so that what it derives from them follows.

    `PreTrainedConfig.update_from_string` sets attributes of a config that is made already: a Llama of another
    `hidden_size` keeps the `head_dim` of the default one, and is another model than the one that was asked for.

    Args:
        config: With the defaults of its class.
        overrides: Changes, as `"n_layer=4,n_embd=256"`.

    Raises:
        ValueError: A name or a value does not fit the config.
    """
    try:
        return type(config)(**_parsed(config, overrides))
    except AttributeError as error:  # a property, which follows from the others
        raise ValueError(f"something there cannot be set ({error})") from error


def _parsed(config: PreTrainedConfig, overrides: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for pair in overrides.split(","):
        name, equals, text = pair.partition("=")
        name, text = name.strip(), text.strip()
        if not equals or not name:
            raise ValueError(f"'{pair}' is not of the form name=value")
        if not hasattr(config, name):
            raise ValueError(f"there is no {name}")
        if name == "model_type":
            raise ValueError("model_type is what the config is chosen by")
        own = config.attribute_map.get(name, name)  # `hidden_size` is GPT-2's `n_embd`
        if own in values:
            raise ValueError(f"{name} is given twice")
        values[own] = _value(name, text, getattr(config, name))
    return values


def _value(name: str, text: str, default: Any) -> Any:
    """Read a value as the type of its default; where that is `None` as Python would, else as text."""
    if isinstance(default, bool):
        said = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower())
        if said is None:
            raise ValueError(f"{name}={text} is neither true nor false")
        return said
    if isinstance(default, int | float):
        try:
            return type(default)(text)
        except ValueError:
            raise ValueError(f"{name}={text} is no {'whole ' if isinstance(default, int) else ''}number") from None
    if default is None:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
    if isinstance(default, str):
        return text
    raise ValueError(f"{name} is a {type(default).__name__}, which cannot be written here")
