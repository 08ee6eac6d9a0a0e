"""Methods replaced on single instances, and put back."""

from typing import Any

import torch


class Overrides:
    """Replaces attributes in the `__dict__` of modules and restores them exactly.

    Nothing is renamed, wrapped or registered: module names, state dicts and types stay as they are.
    """

    def __init__(self):
        self._replaced: list[tuple[torch.nn.Module, str, Any, bool, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._replaced)

    def set(self, module: torch.nn.Module, name: str, value: Any) -> None:
        """Set `module.name` for this instance."""
        self._replaced.append((module, name, value, name in module.__dict__, module.__dict__.get(name)))
        module.__dict__[name] = value

    def undo(self, skip_covered: bool = False) -> None:
        """Restore what was there.

        Args:
            skip_covered: Leave in place what someone has replaced since (accelerate wraps `forward`, for instance).

        Raises:
            RuntimeError: Something was replaced since and `skip_covered` is not set.
        """
        for module, name, value, _, _ in self._replaced:
            if not skip_covered and module.__dict__.get(name) is not value:
                raise RuntimeError(
                    f"`{name}` of a {type(module).__name__} was replaced again since; undo what came later first."
                )
        while self._replaced:
            module, name, value, existed, previous = self._replaced.pop()
            if module.__dict__.get(name) is not value:
                continue
            if existed:
                module.__dict__[name] = previous
            else:
                del module.__dict__[name]
