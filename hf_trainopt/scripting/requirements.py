"""The packages of the extra `scripts`. The modules that need them call `check` before they import them."""

from importlib.util import find_spec


# Name for pip -> name to import.
PACKAGES = {
    "datasets": "datasets",
    "evaluate": "evaluate",
    "timm": "timm",
    "torchvision": "torchvision",
    "scikit-learn": "sklearn",
}


def check() -> None:
    """Raise `ImportError` with the remedy if a package is missing."""
    missing = [package for package, module in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise ImportError(
            f"The training scripts need {', '.join(missing)}, which a plain `pip install hf-trainopt` leaves out; run "
            "pip install 'hf-trainopt[scripts]'."
        )
