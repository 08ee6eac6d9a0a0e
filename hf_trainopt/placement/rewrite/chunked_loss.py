"""Chunked loss in the language models of transformers: head and loss function computed together.

Such a model calls `logits = head(hidden)` and then `loss_function(logits, labels, ...)`. While it trains with labels,
the head here returns a stand-in (`DeferredLogits`), and the loss function computes the loss from the hidden states in
it, chunk by chunk. In any other call (evaluation, no gradients, no labels, as with label smoothing or
`compute_loss_func`, where the Trainer takes the labels out) head and loss function are the stock ones.

A model that does something else to its logits (Gemma 2 caps them, Cohere scales them) meets the stand-in's errors;
`chunked_loss_check` finds such models before training.
"""

import inspect
import itertools
import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss, ForMaskedLMLoss

from hf_trainopt.models.liger import has_liger_forward

from ..errors import PlacementError
from .chunked_cross_entropy import chunked_cross_entropy
from .deferred_logits import DeferredLogits
from .overrides import Overrides


logger = logging.getLogger(__name__)

# Loss functions of transformers that are cross-entropy over flattened logits and nothing else.
PLAIN_LOSSES = (ForCausalLMLoss, ForMaskedLMLoss)

# Name under which a model and its head know the rewrite, so that a deep copy of the model has one of its own.
_ATTRIBUTE = "_hf_trainopt_chunked_loss"
_numbers = itertools.count()


class ChunkedLoss:
    """The rewrite of one model; `undo` restores the model.

    Args:
        model: What `find_language_model` returns.
        chunk_rows: See `chunked_cross_entropy`.
        strict: Whether it is an error to use the logits of a training step. If not, they are computed when they are
            used, and the first time a warning says so.
    """

    def __init__(self, model: PreTrainedModel, chunk_rows: int | None = None, strict: bool = True):
        self.model = model
        self.strict = strict
        self._warned = False
        self.head = model.get_output_embeddings()
        self.chunk_rows = chunk_rows
        self.enabled = True
        # How many losses were computed in chunks.
        self.num_losses = 0
        self._deferring = False
        self.model_forward = model.forward
        self.head_forward = self.head.forward
        self.loss_function = _loss_function(model)

        self._overrides = Overrides()
        for module in (model, self.head):
            self._overrides.set(module, _ATTRIBUTE, self)
        # The method finds this rewrite by a name of its own: it can outlive the rewrite (see `undo`) and meet another.
        self._name = f"{_ATTRIBUTE}_{next(_numbers)}"
        self._overrides.set(model, self._name, self)
        # A method of the instance, as accelerate expects of `model.forward`; the signature is what the Trainer reads
        # the names of the columns from.
        self._forward = MethodType(_forward_method(model.forward, self._name), model)
        self._overrides.set(model, "forward", self._forward)
        self._overrides.set(self.head, "forward", MethodType(_head_forward, self.head))
        # Where the setter of `loss_function` keeps its value.
        self._overrides.set(model, "_loss_function", self._loss)

    def undo(self) -> None:
        """Restore the model; a wrapper put around its `forward` since stays, and calls the stock forward pass."""
        if not self._overrides:
            return
        self.enabled = False
        covered = self.model.__dict__.get("forward") is not self._forward
        self._overrides.undo(skip_covered=True)
        if covered:
            self.model.__dict__[self._name] = self

    def call_model(self, *args, **kwargs) -> Any:
        """Run the model's own forward pass, with logits deferred if it trains on labels."""
        self._deferring = (
            self.enabled
            and self.model.training
            and torch.is_grad_enabled()
            and _argument(self.model_forward, "labels", args, kwargs) is not None
        )
        try:
            return self.model_forward(*args, **kwargs)
        finally:
            self._deferring = False

    def call_head(self, hidden: torch.Tensor) -> torch.Tensor | DeferredLogits:
        """Run the head, or put it off."""
        if self._deferring:
            return DeferredLogits(hidden, self.head, self.head_forward, None if self.strict else self._logits_used)
        return self.head_forward(hidden)

    def _logits_used(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s in a training step. The chunked loss hasn't computed them, so they are computed now; steps that "
                "do this take more memory than planned. Set memory_rewrites='none' or 'fused_activations' to plan "
                "without the chunked loss.",
                what,
            )

    def _loss(self, *args, **kwargs) -> torch.Tensor:
        """Compute what `loss_function` would from the same arguments."""
        bound = inspect.signature(self.loss_function).bind(*args, **kwargs)
        bound.apply_defaults()
        values = bound.arguments
        logits = values["logits"]
        if not isinstance(logits, DeferredLogits):
            return self.loss_function(*args, **kwargs)
        weight = self.head.weight
        if tuple(weight.shape) != (self.head.out_features, self.head.in_features):
            raise ValueError(
                f"the weight of the head has shape {tuple(weight.shape)} outside its forward pass: it is sharded. "
                "Switch `memory_rewrites` off for this run."
            )
        if values["vocab_size"] != weight.shape[0]:
            # The stock function decides what becomes of that.
            bound.arguments["logits"] = logits.materialize()
            return self.loss_function(*bound.args, **bound.kwargs)

        labels, ignore_index = values["labels"], values["ignore_index"]
        if self.loss_function is ForCausalLMLoss:
            # As there: tokens before n predict n, and nothing follows the last.
            shifted = values["shift_labels"]
            if shifted is None:
                shifted = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
            labels = shifted
        hidden = logits._hidden.flatten(0, -2)
        self.num_losses += 1
        loss = chunked_cross_entropy(
            hidden,
            weight,
            labels.reshape(-1).to(hidden.device),
            bias=self.head.bias,
            ignore_index=ignore_index,
            num_items=values["num_items_in_batch"],
            chunk_rows=self.chunk_rows,
        )
        # The stock loss is fp32 whatever the model's type.
        return loss.float()


def apply_chunked_loss(model: torch.nn.Module, chunk_rows: int | None = None, strict: bool = True) -> ChunkedLoss:
    """Let the language model in `model` compute its training loss in chunks; return what undoes it.

    Args:
        model: The language model, or what it is wrapped in (PEFT, ...).
        chunk_rows: See `chunked_cross_entropy`.
        strict: See `ChunkedLoss`.

    Raises:
        ValueError: The model does not have the structure.
    """
    language_model = find_language_model(model)
    if language_model is None:
        raise PlacementError(
            f"{type(model).__name__} has no plain language model head (one nn.Linear and a cross-entropy of "
            "transformers); switch chunked_loss off for this model."
        )
    if rewrite_of(language_model) is not None:
        raise ValueError("the chunked loss is on already; undo it first.")
    return ChunkedLoss(language_model, chunk_rows, strict)


def find_language_model(model: torch.nn.Module) -> PreTrainedModel | None:
    """Return the innermost model with a head that the chunked loss can take the place of, or `None`.

    Looks at the structure only: the head is an `nn.Linear` and nothing derived from it (LoRA, quantised), without
    hooks, and not sharded; the loss function is one of `PLAIN_LOSSES`. What the model does between the two shows
    only when it runs: see `chunked_loss_check.check_chunked_loss`.
    """
    found = [module for module in model.modules() if isinstance(module, PreTrainedModel) and _head(module) is not None]
    # Pre-order: the last is the innermost, unless there are two side by side.
    if not found or any(all(found[-1] is not part for part in outer.modules()) for outer in found):
        return None
    innermost = found[-1]
    head = _head(innermost)
    plain = (
        type(head) is torch.nn.Linear
        # Other subclasses of tensors are sharded or quantised.
        and type(head.weight) in (torch.nn.Parameter, FakeTensor)
        and head.weight.shape == (head.out_features, head.in_features)
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
        and ("forward" not in head.__dict__ or _ATTRIBUTE in head.__dict__)
    )
    rewrite = rewrite_of(innermost)
    loss_function = _loss_function(innermost) if rewrite is None else rewrite.loss_function
    if has_liger_forward(innermost):
        return None  # its loss is chunked already, and the head isn't called
    return innermost if plain and loss_function in PLAIN_LOSSES else None


def rewrite_of(model: PreTrainedModel) -> ChunkedLoss | None:
    """Return the rewrite that is on in a model."""
    rewrite = model.__dict__.get(_ATTRIBUTE)
    return rewrite if rewrite is not None and rewrite.enabled else None


def _head(model: PreTrainedModel) -> torch.nn.Module | None:
    try:
        return model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def _loss_function(model: PreTrainedModel) -> Callable | None:
    """Return `model.loss_function` without the warning that it gives where no loss type is set."""
    if "_loss_function" in model.__dict__:
        return model.__dict__["_loss_function"]
    loss_type = getattr(model, "loss_type", None)
    return LOSS_MAPPING.get(loss_type, ForCausalLMLoss)


def _argument(function: Callable, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    if name in kwargs or not args:
        return kwargs.get(name)
    try:
        return inspect.signature(function).bind_partial(*args).arguments.get(name)
    except TypeError:  # The call itself says what is wrong.
        return None


def _forward_method(forward: Callable, name: str) -> Callable:
    """Return a method that calls the rewrite in attribute `name`, with the signature of the bound method `forward`.

    `functools.wraps` would keep the bound method, and with it the model, in the function, and a deep copy of the
    model shares the function.
    """

    def replacement(self, *args, **kwargs):
        return self.__dict__[name].call_model(*args, **kwargs)

    signature = inspect.signature(forward)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    replacement.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])
    replacement.__name__, replacement.__doc__ = "forward", forward.__doc__
    return replacement


def _head_forward(self, input: torch.Tensor) -> torch.Tensor | DeferredLogits:
    return self.__dict__[_ATTRIBUTE].call_head(input)
