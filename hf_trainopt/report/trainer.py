"""`trainer.report()`: what this run has done so far, in a notebook."""

from pathlib import Path
from typing import Any

from hf_trainopt.evidence.targets import TargetCallback

from .report import Report, make_report
from .runs import RunRecord, model_name


def run_in_memory(trainer: Any) -> RunRecord:
    """Return what a `Trainer` (ours or stock) has logged so far, as it would be read from its output folder."""
    callbacks = [cb for cb in trainer.callback_handler.callbacks if isinstance(cb, TargetCallback)]
    state = {"global_step": trainer.state.global_step, "max_steps": trainer.state.max_steps}
    if callbacks:
        state["stateful_callbacks"] = {"TargetCallback": {"args": callbacks[-1].arguments()}}
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    config = getattr(model, "config", None)
    described = config.to_dict() if hasattr(config, "to_dict") else {}
    return RunRecord(
        name=Path(trainer.args.output_dir).resolve().name,
        folder=None,
        history=tuple(dict(line) for line in trainer.state.log_history),
        state=state,
        plan=getattr(trainer, "placement_plan", None),
        model=model_name({**described, "architectures": [type(model).__name__]}),  # as `save_pretrained` writes it
    )


class ReportTrainerMixin:
    """Adds `report` to any `Trainer` class; a base of `EfficientTrainerMixin`."""

    def report(self, *others: Any, **options: Any) -> Report:
        """Return what this run has done so far; a notebook shows it.

        Args:
            *others: Output folders of other runs to see beside it.
            **options: As for `hf_trainopt.report.make_report`: `baseline` (unless given: this run), `target_metric`
                and `target_value`, `greater_is_better`, `title`.

        Raises:
            ValueError: Nothing has been logged yet, or another folder has no run in it.
        """
        if not self.state.log_history:
            raise ValueError("there is nothing to report yet: no line has been logged; call it after train().")
        return make_report(run_in_memory(self), *others, **options)
