"""Precision of a run: chosen by what the device does best, explained, and left for another where fp16 overflows."""

from .choose import DeviceAbilities, PrecisionChoice, choose_precision, device_abilities
from .fallback import OverflowWatch


__all__ = ["DeviceAbilities", "OverflowWatch", "PrecisionChoice", "choose_precision", "device_abilities"]
