"""Which packages are installed, for what is kept beside results."""

import importlib.metadata
from collections.abc import Iterable


def installed_version(package: str) -> str | None:
    """Return the version of a package; `None` if it is not installed, or run from a source tree."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return package -> version of those that are installed."""
    found = {package: installed_version(package) for package in packages}
    return {package: version for package, version in found.items() if version is not None}
