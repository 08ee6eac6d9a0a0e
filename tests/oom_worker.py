"""Run on two ranks in `test_oom_ranks.py`: several runs in turn in which ranks run out of memory.

oom_worker.py OUTPUT_DIR CASES

CASES is a JSON object of names and settings: `fails_at` (micro-steps, by rank), `most_rows` (by rank), `switches`
(pairs of a step and a size; or the name of an earlier case, to do what that came to), `seed`, `model`, `num_rows`, and
arguments of `oom_helpers.make`.
"""

import json
import os
import sys

import torch
from distributed_worker import Watch
from helpers import Pictures, Rows, arguments, quiet
from oom_helpers import Memory, SwitchAt, make

from hf_trainopt import EfficientTrainer
from hf_trainopt.scripting.session import close_process_group


class Normed(torch.nn.Module):
    """A mean loss, running statistics, a layer that only even windows use and one that none does."""

    accepts_loss_kwargs = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = torch.nn.Conv2d(3, 8, 5, stride=3), torch.nn.BatchNorm2d(8)
        self.second, self.seldom, self.never = (torch.nn.Linear(8, 4) for _ in range(3))

    def forward(self, pixel_values, labels):
        features = torch.relu(self.norm(self.first(pixel_values))).mean((2, 3))
        logits = self.second(features)
        if labels[0] % 2:
            logits = logits + self.seldom(features)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def make_case(output_dir: str, watch: Watch, fails_at=None, most_rows=None, seed=0, switches=(), **settings):
    """Make the trainer of a case."""
    rank = os.environ.get("RANK", "0")
    callbacks = [watch, *(SwitchAt(step, size) for step, size in switches)]
    if settings.pop("model", "gpt2") == "normed":
        args = arguments(
            output_dir, per_device_train_batch_size=4, gradient_accumulation_steps=2, remove_unused_columns=False,
            accumulation_policy="fixed", ddp_find_unused_parameters=True, **settings,
        )  # fmt: skip
        trainer = quiet(EfficientTrainer(model=Normed(), args=args, train_dataset=Pictures(96), callbacks=callbacks))
        for callback in callbacks[1:]:
            callback.trainer = trainer
        layers = {"layer": "second", "first": "first"}
    else:
        rows = Rows(settings.pop("num_rows", 96))
        trainer = make(output_dir, callbacks=callbacks, rows=rows, **({"dropout": 0.1} | settings))
        layers = {}
    limits = {"most_rows": (most_rows or {}).get(rank), "fails_at": (fails_at or {}).get(rank, ())}
    trainer.memory = Memory(trainer.model, seed=seed + int(rank), **limits, **layers)
    return trainer


def main() -> None:
    output_dir, cases = sys.argv[1:]
    record = {}
    for name, settings in json.loads(cases).items():
        if isinstance(settings.get("switches"), str):
            sizes = [line.get("micro_batch_size") for line in record[settings["switches"]]["log"]]
            settings["switches"] = [(sizes.index(size), size) for size in dict.fromkeys(sizes) if size]
        watch = Watch()
        watch.trainer = trainer = make_case(os.path.join(output_dir, name), watch, **settings)
        trainer.train()
        record[name] = {
            "steps": watch.steps,
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
            "failures": trainer.memory.failures,
            "size": trainer.micro_batch_size,
            "weights": {key: value.tolist() for key, value in trainer.model.state_dict().items()},
        }
    record["world_size"] = trainer.args.world_size
    with open(os.path.join(output_dir, f"rank{os.environ['RANK']}.json"), "w") as file:
        json.dump(record, file)
    close_process_group()


if __name__ == "__main__":
    main()
