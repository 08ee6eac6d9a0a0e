"""Whether a model's loss is what the chunked loss computes: shown by running both."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ...machine.random_state import forked_random_state
from ..errors import PlacementError
from .chunked_loss import ChunkedLoss, apply_chunked_loss, find_language_model, rewrite_of
from .deferred_logits import LogitsNotComputedError


def check_chunked_loss(model: torch.nn.Module, batch: Mapping[str, Any], *, rtol: float = 1e-5) -> None:
    """Compare the chunked loss with the stock one on one sample of a batch.

    Runs the model twice in training mode, from the same state of the random generators (dropout included), and
    compares the loss and its gradient with respect to the inputs of the head (to its weight if those need none).
    Generators, buffers and modes are restored; `.grad` is not touched. Memory: the stock loss of one sample.

    Args:
        model: The language model, or what it is wrapped in (PEFT; not DDP, which waits for a backward pass), with or
            without the rewrite.
        batch: Keyword arguments of the model, with `labels`. The first sample with labels that count is used.
        rtol: Largest relative difference of the losses in fp32; ten times that, in the norm, for the gradients. In
            16-bit types (of the head or of autocast) one and four units of rounding are allowed if that is more.

    Raises:
        ValueError: The model does not have the structure, its loss is another one, or the batch has no labels.
    """
    with ExitStack() as stack:
        language_model = find_language_model(model)
        rewrite = None if language_model is None else rewrite_of(language_model)
        if rewrite is None:
            rewrite = apply_chunked_loss(model)
            stack.callback(rewrite.undo)
        name = type(rewrite.model).__name__
        sample = _one_sample(batch, rewrite.head.weight.device)
        stack.enter_context(_training_mode(model))
        stack.enter_context(torch.enable_grad())
        stack.callback(setattr, rewrite, "enabled", True)

        rewrite.enabled = False
        expected = _loss_and_gradient(model, rewrite, sample)
        rewrite.enabled = True
        num_losses = rewrite.num_losses
        try:
            found = _loss_and_gradient(model, rewrite, sample)
        except LogitsNotComputedError as error:
            raise PlacementError(
                f"the loss head of {name} is not the plain one: it uses its logits before or beside the loss; switch "
                "chunked_loss off for this model."
            ) from error
        if rewrite.num_losses != num_losses + 1:
            raise PlacementError(
                f"{name} computes its loss without its head and loss_function; switch chunked_loss off for this model."
            )

    dtype = _compute_dtype(rewrite.head.weight)
    unit = torch.finfo(dtype).eps if dtype.itemsize < 4 else 0.0
    for what, one, other, tolerance in zip(
        ("loss", "gradient"), expected, found, (max(rtol, unit), max(10 * rtol, 4 * unit)), strict=True
    ):
        difference = ((one - other).norm() / one.norm().clamp_min(torch.finfo(one.dtype).tiny)).item()
        if not difference <= tolerance:
            raise PlacementError(
                f"the loss head of {name} is not the plain one: the chunked {what} differs by {difference:.1e} "
                f"(allowed: {tolerance:.1e}); switch chunked_loss off for this model."
            )


def _one_sample(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    labels = batch.get("labels")
    # The first label of a row is never predicted by a causal model.
    rows = [] if labels is None else (labels[:, 1:] != -100).flatten(1).any(1).nonzero().flatten().tolist()
    if not rows:
        raise PlacementError(
            "the batch has no labels that count, so that there is no loss to compare; pass another batch."
        )
    index, size = rows[0], labels.shape[0]

    def take(value: Any) -> Any:
        if not torch.is_tensor(value):
            return value
        return (value[index : index + 1] if value.ndim and value.shape[0] == size else value).to(device)

    return {name: take(value) for name, value in batch.items()}


@contextmanager
def _training_mode(model: torch.nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _loss_and_gradient(model: torch.nn.Module, rewrite: ChunkedLoss, sample: dict[str, Any]) -> list[torch.Tensor]:
    device = rewrite.head.weight.device
    inputs: list[torch.Tensor] = []
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    hook = rewrite.head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        with forked_random_state([device]):
            outputs = model(**sample)
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
        sources = [tensor for tensor in (*inputs[:1], rewrite.head.weight) if tensor.requires_grad][:1]
        gradients = torch.autograd.grad(loss, sources, allow_unused=True) if loss.requires_grad else ()
    finally:
        hook.remove()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    # Without anything to train the losses alone are compared.
    gradient = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None] or [loss.new_zeros(1)])
    return [loss.detach().double(), gradient.double()]


def _compute_dtype(weight: torch.Tensor) -> torch.dtype:
    kind = weight.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype
