"""The argument of out-of-memory handling, on top of `TrainingArguments`."""

from dataclasses import dataclass, field


@dataclass
class OutOfMemoryArgumentsMixin:
    """What a run does about out of memory, for any `TrainingArguments` class.

    Args:
        auto_micro_batch (`bool`, defaults to `False`): Where a micro-batch does not fit into memory, halve it on all
            ranks and double k: the batch of an optimizer step stays what it is. With a `memory_budget` in bytes or of
            the device, the fastest micro-batch that fits is planned before the run, together with the placement; with
            FSDP2 and DeepSpeed that is all it does.
    """

    auto_micro_batch: bool = field(
        default=False,
        metadata={
            "help": "If a micro-batch doesn't fit into memory, halve it on all devices, double the micro-batches of "
            "a step (the batch stays the same) and repeat the step from its start. With memory_budget (a size, or "
            "'device'), the fastest micro-batch that fits is planned before the run; FSDP2 and DeepSpeed need one, "
            "because their steps can't be repeated. Unset (the default): such an "
            "error ends the run. Set it where you don't know what fits."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.validate_out_of_memory()

    def validate_out_of_memory(self) -> None:
        """Check the settings.

        Raises:
            ValueError: Two of them contradict each other.
        """
        if self.auto_micro_batch and self.auto_find_batch_size:
            raise ValueError(
                "auto_micro_batch and auto_find_batch_size both answer out of memory, the latter by changing the "
                "batch of a step; set auto_find_batch_size=False."
            )
