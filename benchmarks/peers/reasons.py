"""Why tests of the suites end otherwise with our classes: what `report.py` writes beside each.

(suite, modes, pattern of the test's name without its folder, reason). The first that fits counts. A reason that begins
with "Open:" is a fault of ours that is known and not mended.
"""

_MANIFEST = (
    "The test deletes a file of a checkpoint (or splits it into others) and resumes it. A named checkpoint that isn't "
    "what its manifest lists is refused; deleting checkpoint_manifest.json tells that it was on purpose."
)
_DIVERGED = (
    "The test trains on with losses that are NaN. Where k varies, ten such steps in a row end the run with an error; "
    "max_skipped_windows=0 trains on as stock does."
)
_FOLDER = (
    "The test names the folder after a number of stock steps. With varying k, saves come at the same data, and "
    "folders are named after the optimizer steps, of which there are others."
)
_TIMES = (
    "The test compares weights or losses of two runs. k follows measured times, so that two runs need not be alike "
    "unless optimizer_step_cost is set: on a busy machine k leaves 1 here, on an idle one the test passes."
)
_STEPS = "The test counts optimizer steps. With varying k there are others for the same data."
_REENTRANT = (
    "Re-entrant activation checkpointing hands out gradients in pieces, so that the noise scale can't be measured: "
    "refused, with the remedy."
)

REASONS: list[tuple[str, str, str, str]] = [
    ("transformers", "fixed", "*::test_resume_training_with_checkpoint", _MANIFEST),
    ("transformers", "fixed", "*::test_resume_training_with_shard_checkpoint", _MANIFEST),
    ("transformers", "defaults", "*::test_logging_inf_nan_filter", _DIVERGED),
    ("transformers", "defaults", "*::test_can_resume_training", _FOLDER),
    ("transformers", "defaults", "*::test_multiple_peft_adapters", _FOLDER),
    ("transformers", "defaults", "*::test_resume_training_with_*", _FOLDER),
    ("transformers", "defaults", "*::test_save_checkpoints", _FOLDER),
    ("transformers", "defaults", "*::test_save_best_checkpoint", _FOLDER),
    ("transformers", "defaults", "*::StatefulCallbackTest::*", _FOLDER),
    ("transformers", "defaults", "*::test_model_init", _TIMES),
    ("transformers", "defaults", "*::test_trainer_with_datasets", _TIMES),
    ("transformers", "defaults", "*::test_training_loss", _TIMES),
    ("transformers", "defaults", "*::test_num_train_epochs_in_training", _STEPS),
    ("transformers", "defaults", "*::test_number_of_steps_in_training", _STEPS),
    ("transformers", "defaults", "*::test_resume_from_interrupted_training", _STEPS),
    ("transformers", "defaults", "*::test_training_iterable_dataset", _STEPS),
    ("transformers", "defaults", "*::test_callback_receives_control_flags", _STEPS),
    (
        "transformers",
        "defaults",
        "*::test_gradient_accumulation",
        "The test wants the weights of a run with twice the batch and no accumulation. With varying k the weights are "
        "others; `fixed` passes.",
    ),
    (
        "transformers",
        "defaults",
        "*::test_auto_batch_size_with_resume_from_checkpoint",
        "auto_find_batch_size changes the micro-batches in which k is counted: refused, with the remedy "
        "(auto_micro_batch does what it is for).",
    ),
    ("trl", "defaults", "*gradient_checkpointing_reentrant*", _REENTRANT),
]
