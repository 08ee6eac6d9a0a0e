"""Seconds, samples and tokens of training alone: without evaluations, saves and whatever else runs in between."""

import math
import time
from typing import Any, NamedTuple

import torch
from transformers import TrainerControl, TrainingArguments
from transformers.trainer_pt_utils import find_batch_size

from ..core.facts import is_compiled, ranks_per_micro_batch, tensor_parallel_size


# Inputs whose elements (positions, for embeddings) are tokens; the first that is there counts.
_TOKENS = ("input_ids", "decoder_input_ids", "inputs_embeds")


class Reading(NamedTuple):
    """What had been spent when the meter was read off.

    Attributes:
        seconds: Seconds of training.
        samples: Samples over all ranks; `None`: not counted.
        tokens: Tokens over all ranks; `None`: not counted.
    """

    seconds: float
    samples: int | None
    tokens: int | None


def count_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Return how many samples and tokens a model is called with (0 tokens where it takes none)."""
    named = next((kwargs[name] for name in _TOKENS if isinstance(kwargs.get(name), torch.Tensor)), None)
    samples = find_batch_size((named, args, kwargs)) or 0
    if named is None:
        return samples, 0
    return samples, math.prod(named.shape[:-1]) if named.is_floating_point() else named.numel()


def is_training_pass(model: torch.nn.Module) -> bool:
    """Return whether a forward pass of `model` is one that is trained on."""
    return model.training and torch.is_grad_enabled()


def reads_off(control: TrainerControl) -> bool:
    """Return whether something is logged, evaluated or saved next; the same on all ranks, as in `Trainer`."""
    return control.should_log or control.should_evaluate or control.should_save or control.should_training_stop


def reduced(values: list[int], args: TrainingArguments, operation: str = "SUM") -> list[int]:
    """Return `values` added up over ranks (or their `"MAX"`); all ranks must call it."""
    if args.world_size == 1 or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    tensor = torch.tensor(values, dtype=torch.int64, device=args.device)
    torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, operation))
    return tensor.tolist()


class TrainingMeter:
    """Counts what a run has trained on and how long that took.

    The clock runs from the end of one optimizer step to the end of the next, data loading included. What happens
    between two steps and ends in `skip` (evaluations, saves) is left out. At points where something is read off (a
    log, an evaluation, a save) the device is waited for and ranks add up their counts.

    Samples and tokens (padding included) are counted where they enter the model, by a hook on its forward pass in
    training mode, so that short last batches, streams and varying accumulation are right. A loss that takes a batch
    through the model twice counts it twice.

    Attributes:
        seconds: Seconds of training until the end of the last step, those before a resume included.
        reading: What was read off last.
        local: Samples and tokens of this rank since `begin`, up to date within steps too.
    """

    def __init__(self):
        self.seconds = 0.0
        self.reading = Reading(0.0, None, None)
        self.local = (0, 0)
        self._counted = [0, 0]  # over all ranks when it was read off last
        self._local_read = self._local_at_lap = (0, 0)
        self._counts = False
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        self._mark: float | None = None
        self._skips_data = False

    @property
    def is_running(self) -> bool:
        """Whether a run has begun and not ended."""
        return self._mark is not None

    def begin(self, args: TrainingArguments, model: torch.nn.Module | None, saved: dict[str, Any] | None) -> None:
        """Start the clock.

        Args:
            args: Of the run.
            model: Whose forward passes are counted.
            saved: `state()` of the run that is resumed, or `None` for a new one.
        """
        self.end()
        # Before its first step a resumed run goes through the data that it has seen.
        self._skips_data = saved is not None
        saved = saved or {}
        self.seconds = float(saved.get("seconds", 0.0))
        self._counted = [int(saved.get("samples", 0)), int(saved.get("tokens", 0))]
        self.local = self._local_read = self._local_at_lap = (0, 0)
        self._counts = model is not None and not is_compiled(args, model)
        if self._counts:
            self._handle = model.register_forward_pre_hook(self._count, with_kwargs=True)
        self._mark = time.perf_counter()
        self._keep_reading()

    def _count(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_training_pass(model):
            samples, tokens = count_inputs(args, kwargs)
            self.local = (self.local[0] + samples, self.local[1] + tokens)

    def step_begin(self) -> None:
        """Call at the start of each step."""
        if self._skips_data:
            self._skips_data = False
            self.skip()

    def rewind(self) -> None:
        """Take back the samples of a step that is begun anew; its time was spent all the same."""
        self.local = self._local_at_lap

    def lap(self, args: TrainingArguments, control: TrainerControl, reads: bool = False) -> None:
        """Add the time since the last step; call at the end of each step and of each epoch, on all ranks.

        Args:
            args: Of the run.
            control: What comes after the step; something that is read off, or not.
            reads: Whether the counts are read off in any case.
        """
        if self._mark is None:
            return
        reads = reads or reads_off(control)
        self._local_at_lap = self.local
        if reads:
            if args.device.type != "cpu":
                torch.accelerator.synchronize()
            samples, tokens = reduced(self._unread, args)
            # Each rank of a tensor-parallel group counts the same; those that share a sequence, its samples.
            new = [samples // ranks_per_micro_batch(args), tokens // tensor_parallel_size(args)]
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now
        if reads:
            self._add(new)

    def read(self, args: TrainingArguments) -> Reading:
        """Return what had been spent at the end of the last step; on several ranks, when it was read off last.

        Never waits for other ranks: users log on one of them.
        """
        if self._mark is not None and args.world_size == 1:
            self._add(self._unread)
        return self.reading

    @property
    def _unread(self) -> list[int]:
        return [new - old for new, old in zip(self._local_at_lap, self._local_read, strict=True)]

    def _add(self, new: list[int]) -> None:
        self._counted = [total + part for total, part in zip(self._counted, new, strict=True)]
        self._local_read = self._local_at_lap
        self._keep_reading()

    def _keep_reading(self) -> None:
        samples, tokens = self._counted if self._counts else (None, None)
        self.reading = Reading(self.seconds, samples, tokens or None)

    def skip(self) -> None:
        """Leave out the time since the last step."""
        if self._mark is not None:
            self._mark = time.perf_counter()

    def end(self) -> None:
        """Stop counting."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._mark = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"seconds": self.seconds, "samples": self._counted[0], "tokens": self._counted[1]}
