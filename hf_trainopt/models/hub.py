"""Errors of the Hugging Face Hub in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hub_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever the Hub client raises inside the block into one `ValueError` of one sentence.

    Args:
        what: what was asked for, such as "The dataset wikitext".
        remedy: what to do instead, a clause without a full stop.
    """
    try:
        yield
    except OSError as error:
        # Connection errors, offline mode, unknown or private names: all subclasses of OSError.
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__
        raise ValueError(
            f"{what} was found neither on disk nor on the Hugging Face Hub ({type(error).__name__}: {reason[:200]}); "
            f"check the name and the network, or {remedy}."
        ) from error
    except (ValueError, KeyError) as error:
        # It was found and is no such thing. What upstream says may be followed by a list of everything it knows.
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__
        raise ValueError(f"{what} cannot be loaded ({reason[:200]}); {remedy}.") from error
