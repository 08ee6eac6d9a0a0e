"""Run on two ranks in `test_deepspeed.py`: trains once for each case, with DeepSpeed or DDP, and writes what it saw.

deepspeed_worker.py OUTPUT_DIR CASES.json
"""

import contextlib
import json
import os
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from helpers import AnyK, Rows, arguments, quiet, tiny_gpt2
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_trainopt import EfficientTrainer
from hf_trainopt.reliability import TrainingTerminated


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from placement_sharded import clean_up


torch.set_num_threads(1)
# Else DeepSpeed compiles it, for minutes.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# PyTorch computes in fp16 on any CPU, if not fast.
get_accelerator().is_fp16_supported = lambda: True


class Poison(TrainerCallback):
    """Makes the loss of one rank infinite in one micro-batch of a step, its gradient finite."""

    def __init__(self, step: int):
        self.step, self.is_here, self.on = step, os.environ["RANK"] == "1", False

    def on_step_begin(self, args, state, control, **kwargs):
        self.on = self.is_here and state.global_step == self.step

    def __call__(self, module, inputs, outputs):
        if self.on and module.training:
            outputs.loss = outputs.loss + torch.inf
            self.on = False
        return outputs


class BadGradient(Poison):
    """Makes a gradient of one rank NaN in one step."""

    def __call__(self, gradient):
        return gradient * torch.nan if self.on else gradient


class Terminate(TrainerCallback):
    """Sends a signal to one rank at the end of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)


class Collectives:
    """Counts the calls of collectives that reduce gradients."""

    names = ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter")

    def __init__(self):
        self.count = 0
        self.stock = {name: getattr(torch.distributed, name) for name in self.names}

    def __enter__(self):
        def counted(function):
            def call(*args, **kwargs):
                self.count += 1
                return function(*args, **kwargs)

            return call

        for name, function in self.stock.items():
            setattr(torch.distributed, name, counted(function))
        return self

    def __exit__(self, *exception):
        for name, function in self.stock.items():
            setattr(torch.distributed, name, function)


def weights(trainer) -> dict[str, torch.Tensor]:
    parameters = dict(trainer.model.named_parameters())
    partitioned = [parameter for parameter in parameters.values() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
        return {name: parameter.detach().float().clone() for name, parameter in parameters.items()}


def loss_of_ones_own(outputs, labels, num_items_in_batch=None):
    """Whether it divides by the items is tried, in forward passes before the first window."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


def first_checkpoint(folder: Path) -> str:
    return str(min(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])))


def run(case: dict, folder: Path) -> dict:
    stock = case.get("stock", False)
    settings = case.get("arguments", {}) | ({"deepspeed": case["deepspeed"]} if case.get("deepspeed") else {})
    output = folder / case["name"]
    args = arguments(output, TrainingArguments, **settings) if stock else arguments(output, **settings)
    model = tiny_gpt2()
    data = Rows(case.get("rows", 50))
    options = {"sequence": case["sequence"]} if "sequence" in case else {}
    own_loss = {"compute_loss_func": loss_of_ones_own} if case.get("own_loss") else {}
    kind = Trainer if stock else AnyK if options else EfficientTrainer
    trainer = quiet(kind(model=model, args=args, train_dataset=data, **options, **own_loss))
    seen = {"statistics": []}
    if not stock:
        accumulation = trainer.trainopt.accumulation
        finish = accumulation.finish_window

        def finish_window(window, loss, next_k, statistics, *rest):
            seen["statistics"].append(asdict(statistics) | {"k": len(window), "loss": float(loss)})
            finish(window, loss, next_k, statistics, *rest)

        accumulation.finish_window = finish_window
    for kind, name in ((Poison, "poisoned_step"), (BadGradient, "bad_gradient_step")):
        if name in case:
            poison = kind(case[name])
            trainer.add_callback(poison)
            if kind is Poison:
                model.register_forward_hook(poison)
            else:
                model.transformer.ln_f.weight.register_hook(poison)
    if "signal_step" in case:
        trainer.add_callback(Terminate(case["signal_step"]))
    start = first_checkpoint(folder / case["resume"]) if "resume" in case else None
    try:
        with Collectives() as collectives, contextlib.suppress(TrainingTerminated):
            trainer.train(resume_from_checkpoint=start)
        seen |= {
            "log": trainer.state.log_history,
            "steps": trainer.state.global_step,
            "collectives": collectives.count,
            "optimizer": type(trainer.optimizer.optimizer).__name__,
            "schedule": type(trainer.lr_scheduler).__name__,
        }
        engine = getattr(trainer, "deepspeed", None)
        if engine is not None:
            seen |= {"global_samples": engine.global_samples, "global_steps": engine.global_steps,
                     "skipped_steps": engine.skipped_steps}  # fmt: skip
        found = weights(trainer)
        if os.environ["RANK"] == "0":
            torch.save(found, folder / f"{case['name']}.pt")
    finally:
        clean_up(trainer)
    return seen


def main() -> None:
    folder = Path(sys.argv[1])
    for case in json.loads(Path(sys.argv[2]).read_text()):
        try:
            seen = run(case, folder)
        except Exception as error:
            seen = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        (folder / f"{case['name']}.{os.environ['RANK']}.json").write_text(json.dumps(seen))
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


main()
