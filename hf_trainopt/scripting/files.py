"""Errors of local data files in one sentence."""

from . import _required  # noqa: F401


# isort: split
from collections.abc import Iterator
from contextlib import contextmanager

import datasets


@contextmanager
def file_errors(flag: str, file: str) -> Iterator[None]:
    """Turn whatever is raised inside the block because of what a local file holds into one `ValueError`."""
    try:
        yield
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split()).rstrip(".") or type(cause).__name__
        raise ValueError(
            f"{flag}: the file {file} cannot be read ({reason[:200]}); mend it, or name another one."
        ) from error
