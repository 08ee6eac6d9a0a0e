"""What a window changes besides gradients, to begin it anew."""

import torch

from ..core.running_statistics import RunningStatistics
from ..machine.random_state import RandomState, devices_of


class WindowStart:
    """Random number generators and running statistics as they were when a window began.

    Args:
        model: Model. Of its buffers the running statistics of normalisation layers are kept, as for windows that are
            skipped; others that a forward pass changes stay changed.
        device: That of this process; other devices that hold parameters count as well.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device):
        self._statistics = RunningStatistics(model)
        self._devices = devices_of([torch.empty(0, device=device), *model.parameters()])
        self._random: RandomState | None = None

    def save(self) -> None:
        """Keep the states as they are."""
        self._random = RandomState(self._devices)
        self._statistics.save()

    def restore(self) -> None:
        """Put them back; any number of times."""
        self._random.restore()
        self._statistics.restore()
