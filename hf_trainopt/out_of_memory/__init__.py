"""Out of memory in training: the micro-batch is halved, k doubled, and the window repeated from its start."""

from ..core.batch import count_rows, split_batch
from .detection import is_out_of_memory


__all__ = ["count_rows", "is_out_of_memory", "split_batch"]
