"""Linear layer and cross-entropy in one function that never holds all the logits."""

import torch
from torch.autograd.function import once_differentiable


# Below this many rows the matrix products of a chunk no longer hide that each of them reads and writes the whole
# gradient of the weight.
MIN_CHUNK_ROWS = 256


def default_chunk_rows(num_rows: int, in_features: int, num_classes: int, *, is_half: bool = False) -> int:
    """Return how many rows one chunk has: its logits take about what all the hidden states take, or 256 rows.

    In 16-bit types 512 rows at least: each chunk adds to the weight's gradient in fp32 in a pass of its own, which at
    256 rows moves as many bytes as all the rest of the loss (8 % of a step of GPT-2 Small on an A100, by roofline).

    This is the rule of torch's `LinearCrossEntropyOptions` (`"aspect_ratio"`: the power of two at or above
    `num_rows · in_features / num_classes`), but for the floor: large vocabularies would get a few rows per chunk.
    Peak of the loss's forward and backward pass for GPT-2 Small's head (768 features, 50257 classes), 8192 rows, fp32,
    replayed: 184 MiB with 64 rows per chunk, 220 with 256, 368 with 1024, 1742 in one chunk; under bf16 autocast 253,
    324, 679 and 2772. On a CPU core 32 rows take a third longer than 256, and more rows gain nothing.
    """
    rows = -(-num_rows * in_features // num_classes)
    return max(1, min(num_rows, max((1 + is_half) * MIN_CHUNK_ROWS, 1 << (rows - 1).bit_length() if rows > 0 else 1)))


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: torch.Tensor | float | None = None,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """Return `cross_entropy(linear(hidden, weight, bias), labels)` without ever holding all the logits.

    The rows are taken in chunks. The forward pass computes the gradients of each chunk at once and drops its logits;
    the backward pass only multiplies. Memory, besides the inputs: one gradient like `hidden` and one like `weight`
    (each only if it is required) from the forward to the backward pass; during the forward pass also the logits of
    one chunk (`chunk_rows · num_classes` elements of 4 bytes; 6 bytes under a 16-bit type, together with a 16-bit
    copy of the weight under autocast and a piece of the weight's gradient as large as the chunk). The stock loss
    takes three times all the logits.

    It is the scheme of `torch.nn.functional.linear_cross_entropy`, written anew for two reasons. That one sums loss
    and weight gradient over the chunks in the input's type, where the more chunks, the more is lost (bf16, 1024 rows
    in chunks of 4: a loss more than 5 % too small, `tests/test_placement_rewrites.py`); here both sums are fp32, as
    in the stock loss. And it is one opaque operator to `FakeTensorMode`, which then takes its scratch memory for none.

    Under autocast the product runs in autocast's type, as a linear layer would; the loss is at least fp32.

    Args:
        hidden: Inputs of the linear layer, `(num_rows, in_features)`.
        weight: `(num_classes, in_features)`.
        labels: int64 class indices, `(num_rows,)`.
        bias: `(num_classes,)`.
        ignore_index: Rows with this label do not count.
        num_items: What the sum of the losses is divided by. `None`: the number of rows that count.
        chunk_rows: Rows per chunk. `None`: see `default_chunk_rows`.

    Raises:
        ValueError: Shapes do not fit, or `chunk_rows` is not positive.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden states of shape {tuple(hidden.shape)} and a weight of shape {tuple(weight.shape)} do not fit; "
            "pass (rows, features) and (classes, features)."
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"{tuple(labels.shape)} labels do not fit {hidden.shape[0]} rows of hidden states; pass one label per row."
        )
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; pass a positive number of rows.")
    kind = hidden.device.type
    lowered = torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if lowered else None
    if chunk_rows is None:
        is_half = (dtype or hidden.dtype).itemsize == 2
        chunk_rows = default_chunk_rows(*hidden.shape, weight.shape[0], is_half=is_half)

    kept = labels != ignore_index
    total = _ChunkedSum.apply(hidden, weight, bias, labels.where(kept, 0), kept, chunk_rows, dtype)
    # Divided here and not inside: gradients of the sum are of the order of the weights and of the hidden states.
    # Those of the mean over thousands of rows would be stored before a gradient scaler's factor could lift them
    # (it arrives with the backward pass), and fp16 would round them to zero.
    if num_items is None:
        return total / kept.sum()
    return total / (num_items.to(total.device) if torch.is_tensor(num_items) else num_items)


class _ChunkedSum(torch.autograd.Function):
    """Sum of the losses over the rows; gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, kept, chunk_rows, dtype):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        # The weight's gradient is summed over many chunks: in bf16, terms below 1/256 of the sum would be lost.
        gradients = (
            torch.empty_like(hidden, dtype=dtype) if ctx.needs_input_grad[0] else None,
            torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None,
            torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[2] else None,
        )
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight if dtype is None else weight.to(dtype)
            offset = bias if bias is None or dtype is None else bias.to(dtype)
            for start in range(0, hidden.shape[0], chunk_rows):
                rows = slice(start, start + chunk_rows)
                chunk = hidden[rows] if dtype is None else hidden[rows].to(dtype)
                _add_chunk(total, gradients, rows, chunk, matrix, offset, labels[rows], kept[rows])
        ctx.gradients = (
            gradients[0],
            None if gradients[1] is None else gradients[1].to(weight.dtype),
            None if gradients[2] is None else gradients[2].to(bias.dtype),
        )
        ctx.input_dtype = hidden.dtype
        ctx.any_kept = kept.any()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, factor):
        if ctx.gradients is None:
            raise RuntimeError(
                "the chunked loss has given its gradients away in an earlier backward pass (it keeps one copy); "
                "compute the loss again, or switch `memory_rewrites` off to use retain_graph=True."
            )
        gradients, ctx.gradients = ctx.gradients, None
        # All labels ignored: the mean is 0/0, and the gradients are zeros all the same, as in the stock loss.
        factor = torch.where(ctx.any_kept, factor, 0)
        hidden = None if gradients[0] is None else gradients[0].to(ctx.input_dtype).mul_(factor)
        weight, bias = (None if gradient is None else gradient.mul_(factor) for gradient in gradients[1:])
        return hidden, weight, bias, None, None, None, None


def _add_chunk(total, gradients, rows, hidden, weight, bias, labels, kept) -> None:
    """Add the loss of one chunk to `total`, and its gradients to `gradients`.

    A function of its own so that nothing of a chunk is alive when the next one begins.
    """
    hidden_gradient, weight_gradient, bias_gradient = gradients
    # Rounded to the layer's type before it is widened: as the stock head and loss do.
    logits = torch.nn.functional.linear(hidden, weight, bias).to(total.dtype)
    logits.sub_(logits.amax(1, keepdim=True))
    of_label = logits.gather(1, labels[:, None]).squeeze(1)
    sums = logits.exp_().sum(1)
    # `where`, not a product: what ignored rows hold must not matter, not even NaN.
    total.add_(torch.where(kept, sums.log() - of_label, 0).sum())
    if all(gradient is None for gradient in gradients):
        return

    logits.mul_((kept / sums)[:, None])
    logits.scatter_add_(1, labels[:, None], -kept[:, None].to(logits.dtype))
    if bias_gradient is not None:
        bias_gradient.add_(logits.sum(0))
    logits = logits.to(hidden.dtype)
    if hidden_gradient is not None:
        torch.mm(logits, weight, out=hidden_gradient[rows])
    if weight_gradient is not None:
        if weight_gradient.dtype == hidden.dtype:
            weight_gradient.addmm_(logits.T, hidden)
            return
        # Products of 16-bit matrices are summed in fp32 a piece of the vocabulary at a time: a piece takes no more
        # memory than the chunk's logits.
        size = max(1, logits.numel() // hidden.shape[1])
        for some, gradient in zip(logits.split(size, 1), weight_gradient.split(size), strict=True):
            gradient.add_(_wide_product(some.T, hidden))


def has_wide_product(matrix: torch.Tensor) -> bool:
    """Whether the device multiplies 16-bit matrices to an fp32 product without widening them first."""
    return matrix.is_cuda


def _wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the fp32 product of two 16-bit matrices. In fp16 sums over many rows could exceed the range."""
    if has_wide_product(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())
