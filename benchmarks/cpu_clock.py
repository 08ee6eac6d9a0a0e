"""CPU seconds of training, for benchmarks on a machine that does other work too."""

import time

from transformers import TrainerCallback


class CpuClock(TrainerCallback):
    """CPU seconds of training at each evaluation: unlike wall time the same on a shared machine."""

    def __init__(self):
        self.seconds, self._mark, self._at = 0.0, 0.0, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self._mark = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.process_time()
        self.seconds += now - self._mark
        self._mark = now

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._at.setdefault(state.global_step, self.seconds)
        self._mark = time.process_time()

    @property
    def last_step(self) -> int | None:
        """Step of the last evaluation."""
        return max(self._at, default=None)

    def curve(self, history: list[dict]) -> list[dict]:
        keys = {"step": "step", "samples": "samples_seen", "wall_s": "train_time_s", "loss": "eval_loss",
                "accuracy": "eval_accuracy"}  # fmt: skip
        points, seen = [], set()
        for line in history:
            if "eval_loss" in line and line["step"] not in seen:
                seen.add(line["step"])
                point = {name: line[key] for name, key in keys.items() if key in line}
                points.append(point | {"cpu_s": self._at.get(line["step"], self.seconds)})
        return points
