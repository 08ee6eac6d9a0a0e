"""When fp16 is left: what the gradient scaler's skipped steps say."""

from dataclasses import dataclass


# Below it gradients are being shrunk to fit into fp16, whose largest number is 65504: it has nothing left to give.
COLLAPSED_SCALE = 1.0

# A scale that was right for the last step is more than 2^10 too large for ten in a row: no scaling keeps up with that.
MOST_SKIPPED_IN_A_ROW = 10


@dataclass
class OverflowWatch:
    """Counts optimizer steps that the gradient scaler skipped, and says when it is to be given up.

    A scaler begins far too high on purpose and halves its scale at each of the first steps until one fits: how many
    are skipped in a row counts only after that.

    That a step was skipped is told from the scale, which falls after such a step and no other:
    `Accelerator.optimizer_step_was_skipped` is never true with a fused optimizer (the default of `Trainer`), which
    looks for overflows by itself.

    Attributes:
        loss_scale: After the last step; at first that of the beginning.
        skipped_steps: In all.
        skipped_in_a_row: Up to the last step.
        calibrated: Whether a step was taken.
    """

    loss_scale: float
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    calibrated: bool = False

    def step_ended(self, loss_scale: float) -> str | None:
        """Count an optimizer step.

        Args:
            loss_scale: After it.

        Returns:
            Why fp16 is to be left, if so.
        """
        skipped = loss_scale < self.loss_scale or loss_scale == 0
        self.loss_scale = loss_scale
        if not skipped:
            self.calibrated = True
            self.skipped_in_a_row = 0
            return None
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if loss_scale < COLLAPSED_SCALE:
            return f"the loss scale has fallen to {loss_scale:g}"
        if self.calibrated and self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            return f"{self.skipped_in_a_row} optimizer steps in a row have overflowed"
        return None
