"""What a forward pass depends on besides its arguments: random number generators and autocast."""

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch


def devices_of(values: Iterable[Any]) -> list[torch.device]:
    """Return the devices, other than the CPU, that the tensors among `values` lie on."""
    devices = {value.device for value in values if isinstance(value, torch.Tensor)}
    return sorted((device for device in devices if device.type not in ("cpu", "meta")), key=str)


class HostRandomState:
    """The states of the global generators of Python and NumPy, as they are now.

    Models draw from them too: BigBird's attention and SpecAugment from NumPy, LayerDrop of some from Python.
    """

    def __init__(self):
        self._python, self._numpy = random.getstate(), np.random.get_state()

    def restore(self) -> None:
        """Set the generators to these states."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Make the block see these states; put the generators back at its end."""
        outside = HostRandomState()
        self.restore()
        try:
            yield
        finally:
            outside.restore()


class TorchRandomState:
    """The states of the default generators of the CPU and of `devices`, as they are now.

    Devices that were not used yet are left alone: reading their state would start them (and fail under fake tensors
    on a machine that lacks them).
    """

    def __init__(self, devices: Iterable[torch.device] = ()):
        self._cpu = torch.get_rng_state()
        self._devices = []
        for device in devices:
            if device.type in ("cpu", "meta"):
                continue
            backend = torch.get_device_module(device.type)
            if getattr(backend, "is_initialized", lambda: True)():
                which = () if device.type == "mps" else (device,)  # there is only one, and its functions take none
                self._devices.append((backend, which, backend.get_rng_state(*which)))

    def restore(self) -> None:
        """Set the generators to these states."""
        torch.set_rng_state(self._cpu)
        for backend, which, state in self._devices:
            backend.set_rng_state(state, *which)


class RandomState:
    """The states of the generators of Python, NumPy, the CPU and `devices`, as they are now."""

    def __init__(self, devices: Iterable[torch.device] = ()):
        self._states = (HostRandomState(), TorchRandomState(devices))

    def restore(self) -> None:
        """Set the generators to these states."""
        for state in self._states:
            state.restore()


class CallState:
    """Random number generators and autocast as they are before a call, so that it can be made again.

    Args:
        devices: Devices of the arguments; the CPU is always included.
    """

    def __init__(self, devices: list[torch.device]):
        self.devices = devices
        self._random = RandomState(devices)
        kinds = {"cpu", *(device.type for device in devices)}
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted(kinds)
            if torch.amp.is_autocast_available(kind)
        ]
        self._autocast_cache = torch.is_autocast_cache_enabled()

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Make the block see these states. The generators run on from there: fork them outside."""
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled, self._autocast_cache))
            self._random.restore()
            yield


@contextlib.contextmanager
def forked_random_state(devices: Iterable[torch.device]) -> Iterator[None]:
    """Put the generators of Python, NumPy, the CPU and `devices` back at the end of the block, whatever ends it."""
    outside = RandomState(devices)
    try:
        yield
    finally:
        outside.restore()
