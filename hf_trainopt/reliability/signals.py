"""SIGTERM (preemption) and Ctrl-C: noted when they come."""

import contextlib
import logging
import os
import signal
import threading
import weakref
from typing import Any


logger = logging.getLogger(__name__)

# In the order in which they count if ranks have got different ones.
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingInterrupted(KeyboardInterrupt, SystemExit):
    """Ctrl-C, after the checkpoint is saved: ends the process with 130, as the signal itself would.

    A `KeyboardInterrupt` for whoever catches one. A `SystemExit` too, since Python would end any other exception that
    nobody catches with a traceback and the exit code 1.

    Attributes:
        checkpoint: The last complete checkpoint, if there is one.
        exit_code: For scripts.
    """

    exit_code = 128 + signal.SIGINT

    def __init__(self, message: str, checkpoint: str | None):
        super().__init__(message)
        self.code = self.exit_code
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        return str(self.args[0])


class TrainingTerminated(SystemExit):
    """SIGTERM, after the checkpoint is saved: ends the process with 143, as the signal itself would.

    Attributes:
        message: What was done.
        checkpoint: The last complete checkpoint, if there is one.
    """

    def __init__(self, message: str, checkpoint: str | None):
        super().__init__(128 + signal.SIGTERM)
        self.message = message
        self.checkpoint = checkpoint


_WATCHES: weakref.WeakSet["SignalWatch"] = weakref.WeakSet()


_held = threading.local()


def _before_fork() -> None:
    # Python forgets in the child what comes between the fork and the change of handlers.
    _held.mask = None
    if any(watch.is_installed for watch in _WATCHES):
        _held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _after_fork() -> None:
    if _held.mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _held.mask)


def _in_child() -> None:
    for watch in list(_WATCHES):
        watch.leave_child()
    _after_fork()


if hasattr(os, "register_at_fork"):  # where there is `fork`
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)


class SignalWatch:
    """Notes SIGTERM and Ctrl-C while it is installed; the second Ctrl-C is what Ctrl-C always was.

    Only handlers that are Python's own are replaced: who has installed another wants the signal.
    """

    def __init__(self):
        _WATCHES.add(self)
        self.received: signal.Signals | None = None
        self._replaced: dict[signal.Signals, Any] = {}
        self._process = 0

    def install(self) -> None:
        """Begin to watch; nothing is done outside the main thread, where Python runs no handlers."""
        self.restore()
        self.received = None
        if threading.current_thread() is not threading.main_thread():
            logger.info("Not in the main thread: SIGTERM and Ctrl-C do not save a checkpoint.")
            return
        self._process = os.getpid()
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler in (signal.SIG_DFL, signal.default_int_handler):
                self._replaced[number] = signal.signal(number, self._handle)
            else:
                logger.info("%s has a handler already, which is left alone.", number.name)

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        while self._replaced:
            number, handler = self._replaced.popitem()
            # A handler of somebody else's, installed in the meantime, stays.
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            return  # a worker of the data loader: Ctrl-C reaches the whole group, and its data are still needed
        if number == signal.SIGINT and self.received is not None:
            self.restore()
            raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number)
            # The signal may have come in the middle of a write to the same stream.
            with contextlib.suppress(RuntimeError):
                logger.warning(
                    "%s: a checkpoint is saved at the end of this optimizer step, then training ends (press Ctrl-C%s "
                    "to stop at once, without saving).",
                    self.received.name,
                    " again" if number == signal.SIGINT else "",
                )

    @property
    def is_installed(self) -> bool:
        """Whether it watches now."""
        return bool(self._replaced)

    def leave_child(self) -> None:
        """Take SIGTERM as before, in a process that was forked: it means the child, such as a worker of a pool.

        A handler would not do. One that comes before the child waits for a lock runs when the child has got it.
        """
        handler = self._replaced.get(signal.SIGTERM)
        if handler is not None and signal.getsignal(signal.SIGTERM) == self._handle:
            signal.signal(signal.SIGTERM, handler)

    def counts(self) -> list[float]:
        """One number for each of `SIGNALS`, for ranks to add up: 1 if this process got it."""
        return [float(self.received == number) for number in SIGNALS]


def signal_of(counts: list[float]) -> signal.Signals | None:
    """Return the signal that any rank got, from the sums of `SignalWatch.counts`."""
    return next((number for number, count in zip(SIGNALS, counts, strict=True) if count > 0), None)


def ending(number: signal.Signals, message: str, checkpoint: str | None) -> BaseException:
    """Return the exception that training ends with."""
    kind = TrainingInterrupted if number == signal.SIGINT else TrainingTerminated
    return kind(message, checkpoint)
