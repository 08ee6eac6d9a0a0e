"""Copies to the host and back in a replay: counted as the host's memory, and as time on the link."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ...machine.costs import Cost
from ...machine.devices import DeviceSpec
from ..recompute import offload
from .tracker import StorageTracker


@contextmanager
def host_copies_counted(tracking: Callable[[], StorageTracker | None], device: DeviceSpec) -> Iterator[None]:
    """Context in which offloaded inputs are copied within a replay.

    Where the host is the device, copies are tensors like any others.

    Args:
        tracking: Returns the tracker of the step that runs; `None` outside of a step.
        device: The device.
    """

    def to_host(tensor: torch.Tensor) -> torch.Tensor:
        tracker = tracking()
        if tracker is None or not device.link:
            return torch.empty_like(tensor)
        with tracker.on_host():
            host = torch.empty_like(tensor)
        tracker.charge(copy_cost(tensor.nbytes, device))
        return host

    def to_device(host: torch.Tensor, where: torch.device) -> torch.Tensor:
        tracker = tracking()
        if tracker is not None and device.link:
            tracker.charge(copy_cost(host.nbytes, device))
        return torch.empty_like(host)

    stock = offload.to_host, offload.to_device
    offload.to_host, offload.to_device = to_host, to_device
    try:
        yield
    finally:
        offload.to_host, offload.to_device = stock


def copy_cost(num_bytes: int, device: DeviceSpec) -> Cost:
    """Return the cost of a copy between host and device; the device computes nothing meanwhile."""
    return Cost(num_bytes=num_bytes, device_seconds=num_bytes / device.link, host_seconds=device.host_s)
