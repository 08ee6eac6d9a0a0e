"""Run by `accelerate launch` in `test_distributed.py`: trains and writes what each rank saw at each step.

distributed_worker.py OUTPUT_DIR CASE
"""

import json
import os
import sys
from dataclasses import asdict

import torch
from helpers import AnyK, Rows, arguments, quiet, tiny_gpt2, tiny_resnet
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_trainopt import EfficientTrainer


torch.set_num_threads(1)
K_SEQUENCE = [2, 3, 2, 3, 2, 4, 2]  # no 1: one rank would make probes of them, two need none


class Watch(TrainerCallback):
    """k, learning rate and a checksum of the weights after each optimizer step, of this rank."""

    def __init__(self):
        self.steps = []
        self.trainer = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        weights = torch.cat([p.detach().double().flatten() for p in model.parameters()])
        probe = torch.arange(1, len(weights) + 1, dtype=torch.float64).sin()
        controller = getattr(self.trainer, "_controller", None)
        self.steps.append(
            {
                "k": self.trainer._last_window[0] if controller else None,
                "noise": controller.noise.value if controller and controller.noise else None,
                "samples": self.trainer._cursor.samples_seen if controller else None,
                "checksum": (weights @ probe).item(),
                "epoch": state.epoch,
                "max_steps": state.max_steps,
            }
        )


class ChangesK(TrainerCallback):
    """What users try with stock `Trainer`. Every rank does the same."""

    def on_step_end(self, args, state, control, **kwargs):
        args.gradient_accumulation_steps = 3 if state.global_step % 2 else 2


class Listening(AnyK):
    """Keeps the micro-batches of this rank and the statistics of each measured window."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.windows, self.statistics = [[]], []

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.windows[-1].append({key: value.tolist() for key, value in inputs.items()})
        if self.accelerator.sync_gradients:
            self.windows.append([])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def set_initial_training_values(self, *args, **kwargs):
        values = super().set_initial_training_values(*args, **kwargs)
        update = self._controller.tracker.update
        self._controller.tracker.update = lambda found: (self.statistics.append(asdict(found)), update(found))[1]
        return values


def make(case: str, output_dir: str, watch: Watch):
    common = {"per_device_train_batch_size": 2 * 2 // int(os.environ.get("WORLD_SIZE", "1"))}
    if case == "sequence":
        # SGD: Adam makes large steps of gradients that are zero but for rounding.
        args = arguments(output_dir, gradient_accumulation_steps=2, optim="sgd", learning_rate=0.1, **common)
        return AnyK(model=tiny_gpt2(), args=args, train_dataset=Rows(48), callbacks=[watch], sequence=K_SEQUENCE)
    if case == "buckets":
        args = arguments(output_dir, gradient_accumulation_steps=2, average_tokens_across_devices=False, **common)
        return AnyK(model=tiny_gpt2(), args=args, train_dataset=Rows(48), callbacks=[watch], sequence=K_SEQUENCE)
    if case == "stock corruption":
        args = arguments(output_dir, TrainingArguments, gradient_accumulation_steps=2, **common)
        return Trainer(model=tiny_gpt2(), args=args, train_dataset=Rows(48), callbacks=[ChangesK(), watch])
    if case == "stock":
        args = arguments(output_dir, TrainingArguments, gradient_accumulation_steps=2, **common)
        return Trainer(model=tiny_gpt2(), args=args, train_dataset=Rows(49), callbacks=[watch])
    if case == "constant":
        args = arguments(
            output_dir, gradient_accumulation_steps=2, accumulation_policy="ramp", accumulation_ramp="0:2", **common
        )
        return EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(49), callbacks=[watch])
    if case == "resnet":
        from helpers import Pictures

        args = arguments(output_dir, gradient_accumulation_steps=2, remove_unused_columns=False, **common)
        return EfficientTrainer(model=tiny_resnet(), args=args, train_dataset=Pictures(), callbacks=[watch])
    if case == "statistics":
        args = arguments(
            output_dir, gradient_accumulation_steps=2, num_train_epochs=1, noise_scale_interval=1, learning_rate=0.0,
            weight_decay=0.0, max_grad_norm=0.01, **common,
        )  # fmt: skip
        return Listening(model=tiny_gpt2(), args=args, train_dataset=Rows(48), callbacks=[watch], sequence=K_SEQUENCE)
    if case in ("goodput", "resume"):
        args = arguments(
            output_dir, gradient_accumulation_steps=4, num_train_epochs=4, noise_scale_interval=2,
            save_strategy="steps", save_steps=2, **common,
        )  # fmt: skip
        return EfficientTrainer(model=tiny_gpt2(dropout=0.1), args=args, train_dataset=Rows(49), callbacks=[watch])
    raise ValueError(case)


def main() -> None:
    output_dir, case = sys.argv[1:]
    watch = Watch()
    trainer = quiet(make(case, os.path.join(output_dir, "run"), watch))
    watch.trainer = trainer
    trainer.train()
    rank = int(os.environ.get("RANK", "0"))
    record = {
        "steps": watch.steps,
        "world_size": trainer.args.world_size,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "windows": getattr(trainer, "windows", None),
        "statistics": getattr(trainer, "statistics", None),
        "weights": {name: value.tolist() for name, value in trainer.model.state_dict().items()},
    }
    with open(os.path.join(output_dir, f"rank{rank}.json"), "w") as file:
        json.dump(record, file)


if __name__ == "__main__":
    main()
