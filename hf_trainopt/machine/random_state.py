"""What a forward pass depends on besides its arguments: random number generators and autocast."""

import contextlib
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


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

    def is_current(self) -> bool:
        """Return whether the generators are in these states now."""
        (_, key, position, *normal), (_, own_key, own_position, *own_normal) = np.random.get_state(), self._numpy
        same = (position, *normal) == (own_position, *own_normal) and np.array_equal(key, own_key)
        return same and random.getstate() == self._python


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

    def is_current(self) -> bool:
        """Return whether the generators are in these states now; false also where a dispatch mode hides it."""
        if is_in_torch_dispatch_mode():  # of fake tensors, which have no values
            return False
        now = [(self._cpu, torch.get_rng_state())]
        now += [(state, backend.get_rng_state(*which)) for backend, which, state in self._devices]
        return all(torch.equal(one, other) for one, other in now)


class RandomState:
    """The states of the generators of Python, NumPy, the CPU and `devices`, as they are now."""

    def __init__(self, devices: Iterable[torch.device] = ()):
        self._states = (HostRandomState(), TorchRandomState(devices))

    def restore(self) -> None:
        """Set the generators to these states."""
        for state in self._states:
            state.restore()


class CallState:
    """Random number generators, autocast and the default device as they are before a call, so that it can be repeated.

    Args:
        devices: Devices of the arguments; the CPU is always included.

    Attributes:
        devices: As given.
    """

    def __init__(self, devices: list[torch.device]):
        self.devices = devices
        self._host: HostRandomState | None = HostRandomState()
        self._torch: TorchRandomState | None = TorchRandomState(devices)
        kinds = {"cpu", *(device.type for device in devices)}
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted(kinds)
            if torch.amp.is_autocast_available(kind)
        ]
        self._autocast_cache = torch.is_autocast_cache_enabled()
        self._default_device = torch.get_default_device()

    def finish(self) -> None:
        """Drop the generators that the call didn't use: call after it. Setting them is slow."""
        if self._host.is_current():
            self._host = None
        if self._torch.is_current():
            self._torch = None

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Make the block see these states. The generators run on from there: fork them outside."""
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled, self._autocast_cache))
            if self._default_device.type != "cpu":
                stack.enter_context(self._default_device)
            for state in (self._host, self._torch):
                if state is not None:
                    state.restore()
            yield


@contextlib.contextmanager
def forked_random_state(devices: Iterable[torch.device]) -> Iterator[None]:
    """Put the generators of Python, NumPy, the CPU and `devices` back at the end of the block, whatever ends it."""
    with _put_back([RandomState(devices)]):
        yield


@contextlib.contextmanager
def forked_for_calls(calls: Sequence[CallState]) -> Iterator[None]:
    """Put the generators that some calls used back at the end of a block that repeats them, whatever ends it."""
    outside: list[HostRandomState | TorchRandomState] = []
    if any(call._host is not None for call in calls):
        outside.append(HostRandomState())
    if any(call._torch is not None for call in calls):
        outside.append(TorchRandomState(dict.fromkeys(device for call in calls for device in call.devices)))
    with _put_back(outside):
        yield


@contextlib.contextmanager
def _put_back(states: "Sequence[HostRandomState | TorchRandomState | RandomState]") -> Iterator[None]:
    try:
        yield
    finally:
        for state in states:
            state.restore()
