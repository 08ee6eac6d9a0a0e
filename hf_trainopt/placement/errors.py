"""The errors of a placement that cannot be had."""


class PlacementError(ValueError):
    """No placement as asked for can be had with this model, these data or this plan; the message says what to do.

    A subclass, so that scripts can tell it from a `ValueError` of a bug, which keeps its traceback.
    """


class ReplayError(PlacementError):
    """A step cannot be run on fake tensors, or not so that stages can be told apart in it."""


class FilledCacheError(RuntimeError):
    """A stage that is recomputed is given a key-value cache that holds something."""


class ModifiedOutputError(RuntimeError):
    """An output that selective recomputation keeps was written to afterwards.

    Args:
        index: Number of its operator.
        message: What to do.
    """

    def __init__(self, index: int, message: str):
        super().__init__(message)
        self.index = index
