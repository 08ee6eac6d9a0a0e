"""The argument `memory_rewrites`: which rewrites plans may have."""

import dataclasses
import itertools

from ..errors import PlacementError
from ..plan.plan import Rewrites


def check_rewrites(memory_rewrites: str) -> list[str]:
    """Return the rewrites that `memory_rewrites` names; none for `"auto"` and `"none"`.

    Raises:
        ValueError: An unknown name.
    """
    if memory_rewrites in ("auto", "none"):
        return []
    fields = [field.name for field in dataclasses.fields(Rewrites)]
    asked = [name.strip() for name in str(memory_rewrites).split(",")]
    if any(name not in fields for name in asked):
        raise ValueError(
            f"memory_rewrites is '{memory_rewrites}'; give 'auto', 'none', or names out of {', '.join(fields)}."
        )
    return asked


def allowed_rewrites(memory_rewrites: str, available: Rewrites) -> list[Rewrites]:
    """Return the combinations of rewrites that plans may have, fewest first.

    Raises:
        ValueError: An unknown name, or one that the model does not allow.
    """
    asked, names = check_rewrites(memory_rewrites), available.names()
    if memory_rewrites == "none":
        return [Rewrites()]
    if memory_rewrites == "auto":
        chosen = itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1))
        return [Rewrites(**dict.fromkeys(subset, True)) for subset in chosen]
    for name in asked:
        if name not in names:
            raise PlacementError(
                f"memory_rewrites asks for {name}, which this model does not allow"
                f"{' (it allows ' + ', '.join(names) + ')' if names else ''}; leave it out."
            )
    return [Rewrites(**dict.fromkeys(asked, True))]
