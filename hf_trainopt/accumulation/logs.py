"""What `Trainer` counts and logs where a step is a window of micro-batches."""

from .._compat import rank_batch_size
from ..evidence.gradients import noise_logs
from ..evidence.keys import is_evidence_key
from ..log_lines import give_back
from .window import Window


# What `log` adds to each line.
LOGGED_KEYS = ("accumulation_steps", "effective_batch_size", "samples_seen", "micro_batch_size", "noise_scale",
               "noise_scale_low", "noise_scale_high")  # fmt: skip


class AccumulationLogsTrainerMixin:
    """k, batch, samples and noise scale in every line; a base of `EfficientTrainerMixin`, whose cursor it reads."""

    def floating_point_ops(self, inputs, *args, **kwargs):
        """As in `Trainer`; the sum over the micro-batches of a window."""
        if not isinstance(inputs, Window):
            return super().floating_point_ops(inputs, *args, **kwargs)
        # Not a generator: zero-argument `super()` does not reach into one.
        total = 0
        for micro_batch in inputs.micro_batches:
            total += super().floating_point_ops(micro_batch, *args, **kwargs)
        return total

    def _track_num_input_tokens(self, inputs):
        for micro_batch in inputs.micro_batches if isinstance(inputs, Window) else [inputs]:
            super()._track_num_input_tokens(micro_batch)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in `Trainer`, with k, batch, noise scale and samples on every line (not if everything is stock).

        Logged keys: `accumulation_steps` (k decided for the last window), `effective_batch_size` (samples that it had
        over all ranks), `samples_seen` (over all ranks), and once measured `noise_scale`, `noise_scale_low`,
        `noise_scale_high` (B_noise and its 95 % interval, in samples; absent where infinite). `loss` and `train_loss`
        are means over equal data where k has varied since the last line or in the run. Where memory was too
        short for the micro-batches of the data loader there is `micro_batch_size`, in which k is counted then.
        """
        if self._cursor is not None and "train_samples_per_second" in logs and logs.get("train_runtime"):
            # Upstream takes the share of steps for the share of the data.
            cursor = self._cursor
            if self._controller.rows_per_sample in (None, 1):
                samples = cursor.samples_seen - self._initial_samples_seen
                logs["train_samples_per_second"] = round(samples / logs["train_runtime"], 3)
            else:  # rows are no samples
                share = (cursor.units - self._initial_units) / cursor.budget_units
                logs["train_samples_per_second"] = round(logs["train_samples_per_second"] * share, 3)
        if self._cursor is not None:
            self._weigh_losses(logs)
        ours = self._accumulation_logs()
        line = {**logs, **ours}
        with self._reference_steps_shown():
            super().log(line, *args, **kwargs)
        give_back(logs, line, ours)

    def _weigh_losses(self, logs: dict[str, float]) -> None:
        """Make means over steps of different k, which upstream has computed, means over equal data."""
        if "train_loss" in logs:
            logs["train_loss"] = self._mean_loss.overall() or logs["train_loss"]
        elif "loss" in logs and "learning_rate" in logs:  # a line of training, not the user's
            mean = self._mean_loss.take()
            logs["loss"] = logs["loss"] if mean is None else mean

    def _accumulation_logs(self) -> dict[str, float]:
        if self._cursor is None or self._last_window is None:
            return {}
        k, samples = self._last_window
        logs = {"accumulation_steps": k, "effective_batch_size": samples, "samples_seen": self._cursor.samples_seen}
        if self._is_split:
            size = self.micro_batch_size
            logs |= {"accumulation_steps": k * -(-rank_batch_size(self) // size), "micro_batch_size": size}
        return logs | noise_logs(self._controller.noise)

    @property
    def accumulation_range(self) -> tuple[int, int, int] | None:
        """Least, largest and present k of the last `train`, in the data loader's micro-batches; `None` if stock."""
        if self._controller is None or not self._controller.used_range:
            return None
        return (*self._controller.used_range, self._controller.accumulation_steps)

    def create_model_card(self, *args, **kwargs) -> None:
        """As in `Trainer`; what we log beside evaluations is not a result of theirs."""
        history = self.state.log_history
        self.state.log_history = [
            {k: v for k, v in entry.items() if k not in LOGGED_KEYS and not is_evidence_key(k)} for entry in history
        ]
        try:
            super().create_model_card(*args, **kwargs)
        finally:
            self.state.log_history = history
