"""Several ranks: a window that did not fit on one is repeated on all, and none waits for one that ran out of memory.

DDP reduces gradients inside the last backward pass of a window. A rank that runs out of memory there leaves the others
waiting in an all-reduce that it cannot join, with a reducer of its own that expects the rest of that backward pass
("Expected to have finished reduction in the prior iteration"). So with `auto_micro_batch` DDP never reduces:

1. Buffers are broadcast before the window (DDP does it in the first forward pass, where a rank may be missing).
2. All micro-batches run under `no_sync`, the last one too. In there is no communication at all, wherever a rank stops.
3. All ranks meet in one all-reduce of a few numbers: the micro-batch that each would like (a smaller one if it ran out
   of memory), and which gradients it has.
4. If all are content, gradients are averaged in buckets with the arithmetic of DDP; if not, none of them is used.

The price is that the reduction does not overlap with the last backward pass, and one short all-reduce. The other way,
a rank that completes the collectives of a backward pass it could not do, would need DDP's reducer in a state that
PyTorch does not offer, and fails where memory runs out inside the reducer.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


# As DDP's buckets.
BUCKET_BYTES = 25 * 2**20
# So many at a time: while one is on its way the next one is filled.
_IN_FLIGHT = 2


class Ranks:
    """Agrees on windows, and averages their gradients.

    Args:
        model: The model as DDP has wrapped it.
        device: Where messages are made.
    """

    def __init__(self, model: DistributedDataParallel, device: torch.device):
        self._model = model
        self._device = device
        self._group = model.process_group
        self._world_size = dist.get_world_size(self._group)
        ignored = model.parameters_to_ignore
        self._parameters = [p for name, p in model.module.named_parameters() if name not in ignored]
        self._present: list[bool] = []

    def begin_window(self) -> None:
        """Take the buffers of rank 0, as DDP does in the first forward pass of a window; all ranks call it."""
        self._model.require_forward_param_sync = True
        if self._model.will_sync_module_buffers():
            self._model._sync_buffers()
        self.begin_try()

    def begin_try(self) -> None:
        """Keep DDP from the broadcast: a rank that stopped in a forward pass has not noted that it was done."""
        self._model.require_forward_param_sync = False

    def agree(self, size: int) -> int:
        """Return the least of the micro-batches that ranks would like; all ranks call it after a window.

        Args:
            size: What this rank would like: the present one if its window went well.
        """
        present = [parameter.grad is not None for parameter in self._parameters]
        message = torch.tensor([-size, *present], dtype=torch.float32, device=self._device)
        dist.all_reduce(message, dist.ReduceOp.MAX, group=self._group)
        size, *present = message.tolist()
        self._present = [found > 0 for found in present]
        return round(-size)

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Average `.grad` over the ranks, after `agree`; one that is missing on some ranks counts as zero there.

        As with DDP that looks for unused parameters: one that no rank has used keeps no gradient.
        """
        gradients = []
        for parameter, present in zip(self._parameters, self._present, strict=True):
            if present:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        on_the_way: deque[tuple[list[torch.Tensor], torch.Tensor, dist.Work]] = deque()
        # The last layers first, as DDP does: their gradients were the first to be there.
        for bucket in buckets(gradients[::-1], BUCKET_BYTES):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            flat.mul_(1.0 / self._world_size)  # before they are added, so that fp16 does not overflow
            on_the_way.append((bucket, flat, dist.all_reduce(flat, group=self._group, async_op=True)))
            if len(on_the_way) > _IN_FLIGHT:
                _receive(*on_the_way.popleft())
        while on_the_way:
            _receive(*on_the_way.popleft())


def _receive(bucket: list[torch.Tensor], flat: torch.Tensor, work: dist.Work) -> None:
    work.wait()
    for gradient, values in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
        gradient.copy_(values.view(gradient.shape))


def buckets(gradients: Sequence[torch.Tensor], num_bytes: int) -> Iterator[list[torch.Tensor]]:
    """Yield the gradients in lists of one type and device and of at most `num_bytes` (or of one that is larger)."""
    kinds: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for gradient in gradients:
        kinds.setdefault((gradient.dtype, gradient.device), []).append(gradient)
    for same in kinds.values():
        bucket: list[torch.Tensor] = []
        filled = 0
        for gradient in same:
            size = gradient.numel() * gradient.element_size()
            if bucket and filled + size > num_bytes:
                yield bucket
                bucket, filled = [], 0
            bucket.append(gradient)
            filled += size
        if bucket:
            yield bucket
