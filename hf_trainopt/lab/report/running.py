"""The record of a run that is still in memory, for `trainer.report()`."""

from pathlib import Path
from typing import Any

from hf_trainopt.accumulation.loss_scaling import base_model
from hf_trainopt.metrics.targets import TargetCallback

from .reading import model_name, with_derived
from .runs import Run
from .settings import settings_of


def run_in_memory(trainer: Any) -> Run:
    """Return what a `Trainer` (ours or stock) has logged so far, as it would be read from its output folder."""
    measuring = getattr(trainer, "measurements", trainer.callback_handler.callbacks)
    callbacks = [cb for cb in measuring if isinstance(cb, TargetCallback)]
    state = {"global_step": trainer.state.global_step, "max_steps": trainer.state.max_steps}
    if callbacks:
        state["measurements"] = [{"name": "TargetCallback", "arguments": callbacks[-1].arguments()}]
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    config = getattr(model, "config", None)
    described = config.to_dict() if hasattr(config, "to_dict") else {}
    config = {**described, "architectures": [type(base_model(model)).__name__]}  # as `save_pretrained` writes it
    run = Run(
        name=Path(trainer.args.output_dir).resolve().name,
        folder=None,
        history=tuple(dict(line) for line in trainer.state.log_history),
        state=state,
        plan=getattr(trainer, "placement_plan", None),
        model=model_name(config),
        settings=settings_of(vars(trainer.args)),
    )
    return with_derived(run, config)
