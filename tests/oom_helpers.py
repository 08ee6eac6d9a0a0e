"""Simulated out of memory: a model that takes no more than so many rows, or fails at given micro-steps."""

import random
from collections.abc import Callable, Collection

import torch
from helpers import Rows, arguments, quiet, tiny_gpt2
from torch._subclasses.fake_tensor import FakeTensor
from transformers import TrainerCallback

from hf_trainopt import EfficientTrainer


# Where in a micro-step memory runs out: before the model runs, in its forward pass, and at the beginning and the end
# of the backward pass, when gradients of some parameters have been added up already.
PLACES = ("inputs", "forward", "backward", "last gradient")


def cuda_error() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation.")


class Memory:
    """Lets a model run out of memory in training.

    Attributes:
        steps: Micro-steps that were begun.
        failures: Micro-steps that failed.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        most_rows: int | None = None,
        fails_at: Collection[int] = (),
        places: Collection[str] = PLACES,
        error: Callable[[], Exception] = cuda_error,
        seed: int = 0,
        layer: str = "transformer.h.1",
        first: str = "transformer.wte",
    ):
        self.most_rows, self.fails_at, self.places, self.error = most_rows, set(fails_at), tuple(places), error
        self.steps, self.failures = 0, []
        self._random = random.Random(seed)
        self._place: str | None = None
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.get_submodule(layer).register_forward_hook(self._in_layer)
        self._handle = None
        self._first = model.get_submodule(first).weight

    def _begin(self, model, args, kwargs):
        self._place = None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if not (model.training and torch.is_grad_enabled()):
            return
        inputs = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        if isinstance(inputs, FakeTensor):
            return  # a placement plan is being made
        self.steps += 1
        rows = inputs.shape[0]
        if (self.most_rows is not None and rows > self.most_rows) or self.steps in self.fails_at:
            self._place = self._random.choice(self.places)
            if self._place == "last gradient":
                self._handle = self._first.register_hook(self._fail)
        if self._place == "inputs":
            self._fail()

    def _in_layer(self, module, args, output):
        # A recomputation comes here as well, and finds the place taken.
        if self._place == "forward":
            self._fail()
        if self._place == "backward":
            self._place = None
            (output[0] if isinstance(output, tuple) else output).register_hook(self._fail)

    def _fail(self, *_):
        self._place = None
        self.failures.append(self.steps)
        raise self.error()


class Seen(TrainerCallback):
    """What came of each optimizer step."""

    def __init__(self):
        self.weights: list[torch.Tensor] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())


class SwitchAt(TrainerCallback):
    """Makes micro-batches smaller after so many steps, without any lack of memory."""

    def __init__(self, step: int, size: int):
        self.step, self.size = step, size
        self.trainer = None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.trainer.trainopt.out_of_memory._slice_size = self.size


class Recording(EfficientTrainer):
    """Keeps the first tokens of the rows of each window that counted, piece by piece."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.windows: list[list[list[int]]] = []
        advance = self.trainopt.accumulation.advance

        def note(window, num_items_in_batch):
            self.windows.append([piece.inputs["input_ids"][:, 0].tolist() for piece in window.slices])
            advance(window, num_items_in_batch)

        self.trainopt.accumulation.advance = note


def make(folder, batch: int = 4, k: int = 2, dropout: float = 0.0, callbacks=(), cls=Recording, rows=None, **kwargs):
    """A run of GPT-2 over 50 numbered rows (or others) in windows of `batch * k`."""
    settings = {
        "per_device_train_batch_size": batch, "gradient_accumulation_steps": k, "accumulation_policy": "fixed",
        "auto_micro_batch": True,
    }  # fmt: skip
    model = tiny_gpt2(dropout=dropout)
    data = Rows(50, numbered=True) if rows is None else rows
    args = arguments(folder, **(settings | kwargs))
    trainer = quiet(cls(model=model, args=args, train_dataset=data, eval_dataset=data, callbacks=list(callbacks)))
    for callback in callbacks:
        if isinstance(callback, SwitchAt):
            callback.trainer = trainer
    return trainer
