"""Which precision a device trains best in: a pure decision, and what is read of the device for it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


PRECISIONS = ("auto", "fp32", "fp16", "bf16")

# What Accelerate and `accelerate launch --mixed_precision` call them.
ACCELERATE_NAMES = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}

# Devices of which every generation that PyTorch supports computes in bf16.
_BF16_DEVICES = ("hpu", "neuron", "tpu")


@dataclass(frozen=True)
class DeviceAbilities:
    """What a decision is based on.

    Attributes:
        name: For messages.
        type: As in `torch.device`.
        native_bf16: Whether it computes in bf16 (not: converts, computes in fp32 and converts back).
        runs_bf16: Whether it takes bf16 at all, natively or emulated.
        scales_fp16: Whether Accelerate has fp16 with a gradient scaler for it (not for CPUs).
    """

    name: str
    type: str
    native_bf16: bool = False
    runs_bf16: bool = True
    scales_fp16: bool = False


@dataclass(frozen=True)
class PrecisionChoice:
    """A decision.

    Attributes:
        precision: `"fp32"`, `"fp16"` or `"bf16"`.
        reason: Why, for the log.
        warning: What is worth a warning about it.
        fallback: Where to go if fp16 does not work out; `None` for the others.
    """

    precision: str
    reason: str
    warning: str | None = None
    fallback: str | None = None


def device_abilities(device: torch.device) -> DeviceAbilities:
    """Read what a device can do; nothing is tried out on it."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.version.hip:
            # Its "compute capability" is that of the gfx number. PyTorch takes every AMD GPU to have bf16.
            return DeviceAbilities(f"{name} (ROCm)", "cuda", native_bf16=True, scales_fp16=True)
        major, minor = torch.cuda.get_device_capability(device)
        # Not `is_bf16_supported()` for `native_bf16`: that is true of every card that can hold a bf16 tensor.
        return DeviceAbilities(
            name=f"{name} (compute capability {major}.{minor})",
            type="cuda",
            native_bf16=major >= 8,
            runs_bf16=torch.cuda.is_bf16_supported(),
            scales_fp16=True,
        )
    if device.type == "cpu":
        known = torch.cpu.get_capabilities()
        native = any(known.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"))
        return DeviceAbilities("this CPU", "cpu", native_bf16=native)
    if device.type == "xpu":
        native = torch.xpu.is_bf16_supported(including_emulation=False)
        return DeviceAbilities(torch.xpu.get_device_name(device), "xpu", native_bf16=native, scales_fp16=True)
    if device.type == "mps":
        runs = torch.backends.mps.is_macos_or_newer(14, 0)
        return DeviceAbilities("this Apple GPU", "mps", runs_bf16=runs, scales_fp16=True)
    return DeviceAbilities(
        f"device type {device.type}", device.type, native_bf16=device.type in _BF16_DEVICES, scales_fp16=True
    )


def weakest(devices: Sequence[DeviceAbilities]) -> DeviceAbilities:
    """Return what all devices of a run can do: ranks must not differ in their precision."""
    names = list(dict.fromkeys(device.name for device in devices))
    return DeviceAbilities(
        name=" and ".join(names),
        type=devices[0].type,
        native_bf16=all(device.native_bf16 for device in devices),
        runs_bf16=all(device.runs_bf16 for device in devices),
        scales_fp16=all(device.scales_fp16 for device in devices),
    )


def choose_precision(asked: str, device: DeviceAbilities) -> PrecisionChoice:
    """Decide on the precision of a run.

    Args:
        asked: One of `PRECISIONS`.
        device: What the device (the weakest one of the run) can do.

    Raises:
        ValueError: No such precision, or not on this device.
    """
    if asked not in PRECISIONS:
        raise ValueError(f"precision is '{asked}'; choose one of {', '.join(PRECISIONS)}, or leave it unset.")
    if asked == "auto":
        return _best(device)
    if asked == "fp16":
        if not device.scales_fp16:
            raise ValueError(
                f"precision='fp16' needs a gradient scaler, which Accelerate has none of for {device.name} (it would "
                "train in fp32 without a word); choose precision='bf16', 'fp32' or 'auto'."
            )
        advice = "; bf16, which it computes in natively, would need no loss scaling" if device.native_bf16 else ""
        return _fp16(device, f"as asked for{advice}")
    if asked == "bf16":
        if not device.runs_bf16:
            raise ValueError(f"precision='bf16' does not run on {device.name}; choose precision='auto'.")
        warning = None
        if not device.native_bf16:
            other = "'fp16' or 'auto'" if device.scales_fp16 else "'fp32' or 'auto'"
            warning = (
                f"precision='bf16': {device.name} is not known to compute in bf16, so that PyTorch may emulate it, "
                f"slower than fp32; precision={other} may be faster."
            )
        return PrecisionChoice("bf16", "as asked for", warning)
    return PrecisionChoice("fp32", "as asked for")


def _best(device: DeviceAbilities) -> PrecisionChoice:
    if device.native_bf16:
        return PrecisionChoice("bf16", f"{device.name} computes in it natively")
    if device.type == "cuda" and device.scales_fp16:
        return _fp16(device, f"{device.name} does not compute in bf16 natively")
    return PrecisionChoice("fp32", f"{device.name} is not known to compute in bf16 natively")


def _fp16(device: DeviceAbilities, reason: str) -> PrecisionChoice:
    return PrecisionChoice("fp16", reason, fallback="bf16" if device.native_bf16 else "fp32")


def check_agreement(asked: str, choice: PrecisionChoice, fp16: bool, bf16: bool, launcher: str | None) -> None:
    """Refuse a precision that something else contradicts.

    Args:
        asked: `precision` as the user gave it.
        choice: What became of it.
        fp16: Trainer's flag; `False` says nothing.
        bf16: As `fp16`.
        launcher: `ACCELERATE_MIXED_PRECISION`; `"no"` says nothing, since `accelerate launch` sets it by default.

    Raises:
        ValueError: They disagree.
    """
    stated = {"fp16=True": "fp16"} if fp16 else {}
    if bf16:
        stated["bf16=True"] = "bf16"
    launcher = (launcher or "no").lower()
    if launcher != "no":
        stated[f"the launcher's setting (--mixed_precision, ACCELERATE_MIXED_PRECISION) '{launcher}'"] = launcher
    for what, precision in stated.items():
        if precision != choice.precision:
            chosen = f", which is {choice.precision} here ({choice.reason})," if asked == "auto" else ""
            # Subclasses such as TRL's set bf16 by themselves: it may have to be unset, not removed.
            remedy = f"set {precision}=False" if what.endswith("=True") else "launch without it"
            raise ValueError(f"precision='{asked}'{chosen} contradicts {what}; {remedy}, or leave precision unset.")


def overruled_launcher(fp16: bool, bf16: bool, launcher: str | None) -> str | None:
    """Return a warning where Trainer's flag overrules the launcher, which it does without a word; else `None`.

    Args:
        fp16: Trainer's flag.
        bf16: As `fp16`.
        launcher: `ACCELERATE_MIXED_PRECISION`; `"no"` says nothing.
    """
    flag = "fp16" if fp16 else "bf16" if bf16 else None
    launcher = (launcher or "no").lower()
    if flag is None or launcher in ("no", flag):
        return None
    return (
        f"{flag}=True overrules the launcher's setting (--mixed_precision, ACCELERATE_MIXED_PRECISION) '{launcher}'; "
        "remove one of the two."
    )
