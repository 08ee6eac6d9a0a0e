"""Peaks of memory for several readers: an allocator keeps one high-water mark, and who resets it loses it for all."""

import functools
import os
import sys
import weakref
from collections.abc import Callable

import torch


_STATUS = "/proc/self/status"
_CLEAR_REFS = "/proc/self/clear_refs"


class PeakCounter:
    """A high-water mark that each of its readers resets for itself.

    Args:
        read: Returns the mark in bytes.
        reset: Lowers the mark to what is in use now.
    """

    def __init__(self, read: Callable[[], int], reset: Callable[[], None]):
        self._read = read
        self._reset = reset
        self._readers: weakref.WeakSet[PeakReader] = weakref.WeakSet()

    def reader(self) -> "PeakReader":
        """Return a reader whose first interval begins now."""
        reader = PeakReader(self)
        self._readers.add(reader)
        reader.take()
        return reader

    def peak(self, reader: "PeakReader") -> int:
        """Return the most bytes since the reader's interval began."""
        mark = self._read()
        for other in self._readers:
            other.highest = max(other.highest, mark)
        return reader.highest

    def restart(self, reader: "PeakReader") -> None:
        """Begin a new interval of this reader, after `peak`."""
        self._reset()
        reader.highest = 0


class PeakReader:
    """Reads the peaks of intervals that follow on each other; others may read the same counter in between.

    Attributes:
        highest: Largest mark in this interval that was reset on behalf of a reader; in bytes.
    """

    def __init__(self, counter: PeakCounter):
        self.highest = 0
        self._counter = counter

    def peak(self) -> int:
        """Return the most bytes in use since the interval began."""
        return self._counter.peak(self)

    def take(self) -> int:
        """Return the same and begin a new interval."""
        peak = self._counter.peak(self)
        self._counter.restart(self)
        return peak


@functools.cache
def accelerator_counter(index: int | None = None) -> PeakCounter:
    """Return the counter of an accelerator's allocator (of the current device, if none is named)."""
    return PeakCounter(lambda: _accelerator_peak(index), lambda: torch.accelerator.reset_peak_memory_stats(index))


def _accelerator_peak(index: int | None) -> int:
    if not torch.cuda.is_available():
        return torch.accelerator.max_memory_allocated(index)
    # The same number without flattening and sorting some two hundred others, several times a step.
    return torch.cuda.memory_stats_as_nested_dict(index).get("allocated_bytes", {}).get("all", {}).get("peak", 0)


@functools.cache
def process_counter() -> PeakCounter | None:
    """Return the counter of this process's resident memory; `None` where its high-water mark cannot be reset."""
    try:
        _reset_process_peak()
        process_peak()
    except (OSError, ValueError):
        return None
    return PeakCounter(process_peak, _reset_process_peak)


def process_peak() -> int:
    """Return the most bytes that this process had resident, since the mark was last reset where that is possible."""
    if not os.path.exists(_STATUS):
        return _unresettable_peak()
    # Opened anew each time: in a forked process the old file is still that of its parent.
    with open(_STATUS, "rb", buffering=0) as file:
        _, name, rest = file.read().partition(b"VmHWM:")
    if not name:
        raise ValueError(f"{_STATUS} has no VmHWM.")
    return int(rest.split(maxsplit=1)[0]) * 1024


def _unresettable_peak() -> int:
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _reset_process_peak() -> None:
    with open(_CLEAR_REFS, "wb", buffering=0) as file:
        file.write(b"5")
