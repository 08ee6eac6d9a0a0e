"""How far planning is, on stderr."""

import logging
import sys
import time


class Progress:
    """Shows progress on stderr: a bar on a terminal, else a line every few seconds.

    How much work there will be is not known before the last of it is done: the total is an estimate that grows.
    """

    def __init__(self, first_total: int = 70, seconds: float = 5.0):
        self.count, self.total, self.seconds = 0, first_total, seconds
        self.started = self.shown = time.monotonic()
        self.bar = None

    def __enter__(self) -> "Progress":
        # Warnings of the planner (stages that are left out) belong on stderr as well.
        self._handler = logging.StreamHandler(sys.stderr)
        logging.getLogger("hf_trainopt").addHandler(self._handler)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, desc="planning", unit="replay", leave=False, file=sys.stderr)
        return self

    def __call__(self, text: str) -> None:
        self.count += 1
        if self.count > 0.9 * self.total:
            self.total = round(1.25 * self.total)
        now = time.monotonic()
        if self.bar is not None:
            self.bar.total = self.total
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif now - self.shown >= self.seconds:
            self.shown = now
            sys.stderr.write(f"planning: {self.count} of about {self.total} replays, {text}\n")
            sys.stderr.flush()

    def clear(self) -> None:
        """Take the bar off the screen, for what is written to stdout."""
        if self.bar is not None:
            self.bar.clear()

    def __exit__(self, kind, *exception) -> None:
        if self.bar is not None:
            self.bar.close()
        logging.getLogger("hf_trainopt").removeHandler(self._handler)
        if kind is None:
            sys.stderr.write(f"planned in {time.monotonic() - self.started:.0f} s\n")
