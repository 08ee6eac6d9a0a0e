"""Arguments of reliability, on top of `TrainingArguments`."""

from dataclasses import dataclass, field


@dataclass
class ReliabilityArgumentsMixin:
    """What a run does about signals and about losses that are not finite, for any `TrainingArguments` class.

    Args:
        save_on_interrupt (`bool`, *optional*): On SIGTERM or Ctrl-C save a checkpoint at the end of the optimizer
            step and end. Unset: unless `save_strategy="no"` or `enable_jit_checkpoint=True`.
        max_skipped_windows (`int`, *optional*): So many optimizer steps in a row may be left out because their loss
            or gradients are not finite; then the run stops. 0: nothing is checked, as in `Trainer`. Unset: 10 where
            k varies, 0 with `accumulation_policy="fixed"`.
    """

    save_on_interrupt: bool | None = field(
        default=None,
        metadata={
            "help": "On SIGTERM or Ctrl-C, save a checkpoint at the end of the optimizer step and end (a second "
            "Ctrl-C ends at once). Unset (the default): unless save_strategy is 'no' or enable_jit_checkpoint is set. "
            "Set it False where something else handles these signals.",
            "nargs": "?",
            "const": True,
        },
    )
    max_skipped_windows: int | None = field(
        default=None,
        metadata={
            "help": "An optimizer step whose loss or gradients are not finite is left out; after this many in a row "
            "the run stops with an error. Unset (the default): 10 where k varies, and 0 with "
            "accumulation_policy='fixed'. Set 0 to take such steps, as stock Trainer does."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.validate_reliability()

    def validate_reliability(self) -> None:
        """Check the settings of reliability.

        Raises:
            ValueError: One is out of range or contradicts another.
        """
        if self.max_skipped_windows is not None and self.max_skipped_windows < 0:
            raise ValueError(
                f"max_skipped_windows is {self.max_skipped_windows}; it must be at least 1, or 0 for no check at all."
            )
        if self.save_on_interrupt and self.enable_jit_checkpoint:
            raise ValueError(
                "save_on_interrupt and enable_jit_checkpoint both want SIGTERM; leave enable_jit_checkpoint out."
            )

    @property
    def saves_on_interrupt(self) -> bool:
        """Whether signals are watched."""
        if self.save_on_interrupt is not None:
            return self.save_on_interrupt
        return self.save_strategy != "no" and not self.enable_jit_checkpoint
