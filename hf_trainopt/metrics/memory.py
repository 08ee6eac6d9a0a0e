"""Peak memory by phase."""

import logging

import torch

from ..machine.peak_memory import PeakReader, accelerator_counter, process_counter, process_peak
from .base import MeasurementCallback
from .meter import reads_off, reduced


logger = logging.getLogger(__name__)

PHASES = ("forward_backward", "optimizer", "evaluation", "save")
_ALL = "all"


class MemoryCallback(MeasurementCallback):
    """Measures the most memory that a run has taken so far, and in which phase.

    Logged keys, in GiB, on every line: `peak_memory_gib`, and `peak_memory_<phase>_gib` for each phase that there was:
    `forward_backward` (clipping included), `optimizer`, `evaluation` (and prediction), `save`. What lies between
    (loading data, other callbacks) counts in `peak_memory_gib` alone. Values are maxima over training so far, those
    before a resume included, and over ranks; an evaluation shows from the line behind its own on.

    On accelerators that is what PyTorch's allocator has given out, on the fullest of the devices that this process
    uses. On the CPU it is the high-water mark of the process's resident memory, Python and libraries included, workers
    of data loaders not. Where that cannot be reset (macOS, Windows) there is `peak_memory_gib` alone, and it holds
    what was before training too.
    """

    def __init__(self):
        super().__init__()
        self.peaks: dict[str, int] = {}  # bytes
        self._readers: list[PeakReader] = []
        self._runs = False
        self._local: dict[str, int] = {}

    def attributes(self):
        return {"peaks": self.peaks}

    def begin(self, args, state, saved, model=None, **kwargs):
        self.peaks = dict((saved or {}).get("peaks", {}))
        self._local = {}
        self._runs = True
        self._readers = []
        if args.device.type != "cpu":
            try:
                self._readers = [accelerator_counter(index).reader() for index in _devices(args, model)]
            except (RuntimeError, NotImplementedError) as error:
                self._runs = False
                logger.info("Peak memory is not measured: %s", error)
        elif (counter := process_counter()) is not None:
            self._readers = [counter.reader()]
        else:
            logger.info("The peak of this process's memory cannot be reset here: it is not told by phase.")

    def close(self):
        self._runs = False
        self._readers = []

    def _end_phase(self, name: str | None = None) -> None:
        """Note the peak since the last call."""
        if not self._runs:
            return
        peak = max(reader.take() for reader in self._readers) if self._readers else process_peak()
        for key in (_ALL, name) if name and self._readers else (_ALL,):
            self._local[key] = max(self._local.get(key, 0), peak)

    def _agree(self, args) -> None:
        """Take the maximum over ranks; all of them call it."""
        if not self._runs:
            return
        keys = (_ALL, *PHASES)
        most = reduced([max(self.peaks.get(key, 0), self._local.get(key, 0)) for key in keys], args, "MAX")
        self.peaks = {key: value for key, value in zip(keys, most, strict=True) if value}

    def on_step_begin(self, args, state, control, **kwargs):
        self._end_phase()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._end_phase("forward_backward")

    def on_step_end(self, args, state, control, **kwargs):
        self._end_phase("optimizer")
        if reads_off(control):
            self._agree(args)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._end_phase()
        if reads_off(control):
            self._agree(args)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
        self._end_phase("evaluation")
        self._agree(args)

    def on_predict(self, args, state, control, metrics=None, **kwargs):
        self._end_phase("evaluation")

    def on_save(self, args, state, control, **kwargs):
        super().on_save(args, state, control, **kwargs)
        self._end_phase("save")
        self._agree(args)

    def values(self, args, state, logs):
        return {
            "peak_memory_gib" if phase == _ALL else f"peak_memory_{phase}_gib": peak / 2**30
            for phase, peak in self.peaks.items()
        }


def _devices(args, model: torch.nn.Module | None) -> list[int | None]:
    """Indices of the accelerators that this process uses."""
    if args.n_gpu > 1:
        return list(range(args.n_gpu))
    kind = args.device.type
    found = {p.device.index for p in model.parameters() if p.device.type == kind} if model is not None else set()
    return sorted((found | {args.device.index}) - {None}) or [None]
