"""Memory budgets: "12GiB", "800 MB", "device", "90% of device", "75%", or a number of bytes."""

import math
import re

from ...machine.device_memory import DeviceMemory


_UNITS = {
    "B": 1,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip

_BUDGET = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*(%|[A-Za-z]*)\s*")


_OF_DEVICE = re.compile(r"\s*(?:(.*%)\s*of\s+)?device\s*")
_FORMS = "give '12GiB', 'device', '90% of device', '75%' (of the step's own peak) or a number of bytes"


def is_of_device(text: str | int | float) -> bool:
    """Return whether a budget depends on the memory of the device."""
    return _OF_DEVICE.fullmatch(str(text)) is not None


def is_of_own_peak(text: str | int | float) -> bool:
    """Return whether a budget is a share of the step's own peak without recomputation."""
    return not is_of_device(text) and str(text).strip().endswith("%")


def parse_budget(
    text: str | int | float, baseline_bytes: int | None = None, device: DeviceMemory | None = None
) -> int:
    """Return a memory budget in bytes.

    Args:
        text: A number of bytes; a number with a unit (`"12GiB"`, `"800MB"`; GiB are 2^30 bytes, GB 10^9);
            `"device"`, what tensors can take of the device; `"90% of device"`, a share of all its memory; or a share
            of the peak without recomputation (`"75%"`).
        baseline_bytes: That peak; without it shares are checked and returned as 0.
        device: The device's memory; likewise.

    Raises:
        ValueError: The text is none of these, or not positive, or a share above 100 %.
    """
    of_device = _OF_DEVICE.fullmatch(str(text))
    if of_device is not None:
        if of_device[1] is None:
            return 0 if device is None else device.usable_bytes
        return parse_budget(of_device[1].strip(), 0 if device is None else device.total_bytes)
    match = None if isinstance(text, bool) else _BUDGET.fullmatch(str(text))
    if match is None:
        raise ValueError(f"memory_budget is '{text}'; {_FORMS}.")
    number, unit = float(match[1]), match[2]
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"memory_budget is '{text}'; it must be positive and finite.")
    if unit == "%":
        if number > 100:
            raise ValueError(f"memory_budget is '{text}'; a share is at most 100%.")
        return 0 if baseline_bytes is None else int(baseline_bytes * number / 100)
    if not unit:
        if number < 2**20:
            # 0.75 and 75 are mostly meant as shares, as in other libraries.
            share = f" or '{100 * number if number <= 1 else number:g}%'" if number <= 100 else ""
            raise ValueError(f"memory_budget is '{text}', {number:g} bytes; give a unit, such as '{text}GiB'{share}.")
        return int(number)
    if unit.upper() not in _UNITS:
        raise ValueError(f"memory_budget is '{text}'; its unit must be GiB, MiB, GB, MB or %; {_FORMS}.")
    return int(number * _UNITS[unit.upper()])


def gib(num_bytes: int | float, *, up: bool = False) -> str:
    """Return bytes for people: `6.33 GiB`, below 1 GiB `812 MiB`.

    Args:
        num_bytes: How many.
        up: Whether to round up, so that the text is enough as a budget.
    """
    if abs(num_bytes) >= 2**30:
        number, form, unit = num_bytes / 2**30, ".2f", "GiB"
    else:
        number, unit = num_bytes / 2**20, "MiB"
        form = ".4g" if abs(number) < 100 else ".0f"
    text = f"{number:{form}}"
    if up and float(text) < number:
        last = 10.0 ** (math.floor(math.log10(number)) - 3) if form == ".4g" else 10.0 ** -int(form[1])
        text = f"{number + 0.6 * last:{form}}"
    return f"{text} {unit}"


def stated_budget(text: str | int | float, num_bytes: int) -> str:
    """Return a budget as it was given, and what it is: `30% (4.22 GiB)`; only as given if that says it."""
    given = str(text).strip()
    return given if given.lower().endswith("ib") else f"{given} ({gib(num_bytes)})"


def enough_share(num_bytes: int, baseline_bytes: int) -> str:
    """Return the least share of the peak without recomputation, in tenths of a per cent, that is enough as a budget.

    Args:
        num_bytes: What is needed, at most `baseline_bytes`.
        baseline_bytes: That peak.
    """
    tenths = min(1000, math.ceil(1000 * num_bytes / baseline_bytes))
    while tenths < 1000 and parse_budget(f"{tenths / 10:g}%", baseline_bytes) < num_bytes:
        tenths += 1
    return f"{tenths / 10:g}%"
