"""What of transformers' inside we touch: the one list, and why. `tests/test_compat.py` checks every entry."""

import warnings

import transformers
from packaging.version import Version


# Versions that the tests were run with: [first, last).
TESTED_TRANSFORMERS = ("5.23.0", "5.24.0")

# Private attributes of `transformers.Trainer` that we override or read: name -> (parameters that we rely on, why).
PRIVATE_API: dict[str, tuple[tuple[str, ...], str]] = {
    "_run_epoch": (
        ("epoch",),
        "One window is one step of the upstream loop, so it must read gradient_accumulation_steps as 1. Overridden "
        "only to show it that; every callback and hook inside sees the user's value again.",
    ),
    "_init_training_state": (
        ("max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"),
        "Returns (epochs, micro-batches) to skip on resume, computed as global_step times k: replaced by the saved "
        "cursor.",
    ),
    "_save_checkpoint": (("model", "trial"), "The accumulation state is part of every checkpoint."),
    "_get_output_dir": (("trial",), "Where that checkpoint lies: trials of a hyperparameter search have their own."),
    "_track_num_input_tokens": (("inputs",), "Counts tokens of a batch: called for each micro-batch of a window."),
    "_loss_shifts_labels": (
        None,
        "Whether num_items_in_batch counts labels[..., 1:]; the items of single micro-batches are counted likewise.",
    ),
    "_train_batch_size": (None, "Samples in a micro-batch of one rank, as the data loader makes them."),
}


def check_transformers_version() -> None:
    """Warn once if transformers is not of the tested range."""
    first, last = TESTED_TRANSFORMERS
    if not Version(first) <= Version(transformers.__version__) < Version(last):
        warnings.warn(
            f"hf_trainopt was tested with transformers >={first},<{last}, not with {transformers.__version__}. If "
            "training misbehaves, install a tested version.",
            stacklevel=3,
        )
