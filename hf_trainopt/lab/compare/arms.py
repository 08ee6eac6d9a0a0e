"""What is compared: arms, each a set of arguments for the same script."""

import dataclasses
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_trainopt.arguments import EfficientTrainingArguments


STOCK, OURS, BEST = "stock", "ours", "best fixed"

# Everything off: stock `Trainer`, bit for bit.
OFF = ("--accumulation_policy", "fixed", "--lr_batch_scaling", "none", "--checkpoint_placement", "none")
_PLACEMENT = ("checkpoint_placement", "memory_budget", "memory_rewrites", "placement_stages")
# Counted in optimizer steps, so that another k needs other numbers for the same data.
_IN_STEPS = ("max_steps", "warmup_steps", "eval_steps", "logging_steps", "save_steps")


@dataclass(frozen=True)
class ArmSpec:
    """One way to run the script.

    Args:
        name: What it is called in tables.
        arguments: All arguments of the script but `--seed` and `--output_dir`.
    """

    name: str
    arguments: tuple[str, ...]

    @property
    def slug(self) -> str:
        """The name as it stands in file names."""
        return re.sub(r"(?:[^\w.]|_)+", "-", self.name).strip("-")


def own_flags() -> set[str]:
    """Return the names of the arguments that stock `TrainingArguments` lack."""
    stock = {field.name for field in dataclasses.fields(TrainingArguments)}
    return {field.name for field in dataclasses.fields(EfficientTrainingArguments)} - stock


def flag_name(word: str) -> str | None:
    """Return the argument that a word of a command line names, or `None` if it is a value."""
    if not word.startswith("--") or len(word) == 2:
        return None
    return word[2:].partition("=")[0].replace("-", "_")


def value_of(arguments: Sequence[str], name: str) -> str | None:
    """Return the last value that a command line gives to an argument."""
    found = None
    for index, word in enumerate(arguments):
        if flag_name(word) == name:
            if "=" in word:
                found = word.partition("=")[2]
            elif index + 1 < len(arguments) and flag_name(arguments[index + 1]) is None:
                found = arguments[index + 1]
            else:
                found = "True"
    return found


def config_file(arguments: Sequence[str]) -> Path | None:
    """Return the file of flags that `--config` names, if there is one."""
    name = value_of(arguments, "config")
    return Path(name) if name is not None and Path(name).is_file() else None


def config_names(arguments: Sequence[str]) -> set[str]:
    """Return the arguments that the file of `--config` sets; none of a file that is no mapping."""
    path = config_file(arguments)
    if path is None:
        return set()
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return set()  # the script will say so
    return {str(name).replace("-", "_") for name in loaded} if isinstance(loaded, dict) else set()


def without(arguments: Sequence[str], names: set[str]) -> tuple[str, ...]:
    """Return a command line less some arguments and their values."""
    kept, dropping = [], False
    for word in arguments:
        name = flag_name(word)
        if name is not None:
            dropping = name in names
        if not dropping:
            kept.append(word)
    return tuple(kept)


def stock_arm(script_arguments: Sequence[str]) -> ArmSpec:
    """Return the arm of stock `Trainer`: the arguments less those of ours, everything of ours off.

    Raises:
        ValueError: The file of `--config` sets some of ours, which cannot be taken out of it.
    """
    own = sorted(own_flags() & config_names(script_arguments))
    if own:
        raise ValueError(
            f"the file of --config sets {', '.join(own)}, which stock Trainer must not have; pass it after -- instead."
        )
    return ArmSpec(STOCK, (*without(script_arguments, own_flags()), *OFF))


def our_arm(script_arguments: Sequence[str], extra: Sequence[str] = ()) -> ArmSpec:
    """Return the arm of our defaults, or of what the arguments say of them."""
    return ArmSpec(OURS, (*script_arguments, *extra))


def ablations(ours: ArmSpec) -> list[ArmSpec]:
    """Return arms in which one of our parts is on alone, and one in which the learning rate does not follow k."""
    placement = [name for name in _PLACEMENT if value_of(ours.arguments, name) is not None]
    arms = []
    if placement:
        accumulation = (*without(ours.arguments, set(_PLACEMENT)), "--checkpoint_placement", "none")
        arms.append(ArmSpec("accumulation alone", accumulation))
        alone = without(ours.arguments, {"accumulation_policy", "lr_batch_scaling"})
        arms.append(ArmSpec("placement alone", (*alone, *OFF[:4])))
    rule = without(ours.arguments, {"lr_batch_scaling"})
    return [*arms, ArmSpec("rate not scaled", (*rule, "--lr_batch_scaling", "none"))]


# A β2 of a sweep that has the half-life of the given one in data, whatever k is.
SAME_IN_DATA = "data"


def sweep_arms(
    stock: ArmSpec, steps: Sequence[int], rates: Sequence[str], betas2: Sequence[str] = ()
) -> list[ArmSpec]:
    """Return the stock arm at every k, learning rate and β2 of Adam, at equal data.

    What is counted in optimizer steps is set to the same share of the data.

    Args:
        stock: Its arguments have `--gradient_accumulation_steps` and `--learning_rate`.
        steps: k.
        rates: Learning rates, or factors to the given one such as `0.5x`.
        betas2: Values of `adam_beta2`, or `"data"` for the given one to the power of k/k_ref, whose half-life in data
            is the same at every k. None: the given one.

    Raises:
        ValueError: The arguments lack one of the two, a β2 is out of range, or the file of `--config` has what must be
            set.
    """
    fixed = sorted(set(_IN_STEPS) & {n for n in config_names(stock.arguments) if value_of(stock.arguments, n) is None})
    if fixed:
        raise ValueError(
            f"a sweep needs --{fixed[0]} among the script's arguments (after --), where it can follow k, and not in "
            "the file of --config; move it."
        )
    given = {name: value_of(stock.arguments, name) for name in ("gradient_accumulation_steps", "learning_rate")}
    for name, value in given.items():
        if value is None:
            raise ValueError(f"a sweep needs --{name} among the script's arguments (after --); add it.")
    if betas2 and "adam_beta2" in config_names(stock.arguments):
        raise ValueError(
            "a sweep needs --adam_beta2 among the script's arguments (after --), not in --config; move it."
        )
    reference, rate = int(given["gradient_accumulation_steps"]), float(given["learning_rate"])
    beta2 = float(value_of(stock.arguments, "adam_beta2") or TrainingArguments.adam_beta2)
    chosen = [rate * float(text[:-1]) if text.endswith("x") else float(text) for text in rates]
    arms = []
    for k in steps:
        base = _at(stock.arguments, reference, k)
        second = [beta2 ** (k / reference) if text == SAME_IN_DATA else float(text) for text in betas2]
        if any(not 0 <= number < 1 for number in second):
            raise ValueError("β2 is not within [0, 1)")
        for value in chosen:
            arm = ArmSpec(f"{STOCK}, k = {k}, rate {value:g}", (*base, "--learning_rate", f"{value:g}"))
            arms += [_with_beta2(arm, number) for number in dict.fromkeys(second)] or [arm]
    return arms


def _with_beta2(arm: ArmSpec, value: float) -> ArmSpec:
    given = (*without(arm.arguments, {"adam_beta2"}), "--adam_beta2", repr(value))
    return ArmSpec(f"{arm.name}, β2 {value:.8g}", given)


def _at(arguments: Sequence[str], reference: int, k: int) -> tuple[str, ...]:
    changed: list[str] = list(without(arguments, {"gradient_accumulation_steps", "learning_rate"}))
    for name in _IN_STEPS:
        value = value_of(arguments, name)
        if value is not None and float(value) >= 1:  # below 1 it is a share, -1 is unset
            scaled = max(1, round(float(value) * reference / k))
            changed = [*without(changed, {name}), f"--{name}", str(scaled)]
    return (*changed, "--gradient_accumulation_steps", str(k))


def words_of(flag: str, text: str) -> list[str]:
    """Return the words of a command line that is the value of a flag.

    Raises:
        ValueError: A quotation mark has no second one.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{flag} {text} cannot be read ({error}); close what is quoted.") from error


def parse_arm(text: str, script_arguments: Sequence[str], built_in: dict[str, ArmSpec]) -> ArmSpec:
    """Return the arm of `--arm NAME` (a built-in one) or `--arm NAME=ARGUMENTS` (added to those of the script).

    Raises:
        ValueError: The name is empty or unknown.
    """
    name, separator, extra = text.partition("=")
    name = name.strip()
    if not name:
        raise ValueError(f"--arm '{text}' has no name; write --arm NAME='--flag value'.")
    if not separator:
        if name not in built_in:
            raise ValueError(f"--arm {name} is none of {', '.join(built_in)}; write --arm {name}='--flag value'.")
        return built_in[name]
    return ArmSpec(name, (*script_arguments, *words_of("--arm", extra)))


def as_dict(arm: ArmSpec) -> dict[str, Any]:
    return {"name": arm.name, "arguments": list(arm.arguments)}
