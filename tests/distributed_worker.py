"""Run on two ranks in `test_distributed.py`: trains and writes what each rank saw at each step.

distributed_worker.py OUTPUT_DIR CASE[;CASE...]
"""

import json
import os
import pathlib
import signal
import sys
import time
from dataclasses import asdict

import torch
from helpers import AnyK, Rows, Stream, arguments, quiet, tiny_gpt2, tiny_resnet, touch
from packaging.version import Version
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_trainopt import EfficientTrainer
from hf_trainopt.accumulation import timing
from hf_trainopt.core.versions import TORCH
from hf_trainopt.metrics import GradientStatisticsCallback, MemoryCallback, TargetCallback, ThroughputCallback
from hf_trainopt.reliability import TrainingTerminated
from hf_trainopt.scripting.session import close_process_group


torch.set_num_threads(1)
K_SEQUENCE = [2, 3, 2, 3, 2, 4, 2]  # no 1: one rank would make probes of them, two need none


# How often this rank has reduced gradients (DDP's buckets, FSDP2's groups) and other tensors, so far.
COLLECTIVES = {"buckets": 0, "all_reduce": 0, "reduce_scatter": 0}


def count_collectives() -> None:
    """Count the calls from Python from now on; DDP reduces its gradients elsewhere (see `Counting`)."""

    def counted(key, name):
        function = getattr(torch.distributed, name)

        def call(*args, **kwargs):
            COLLECTIVES[key] += 1
            return function(*args, **kwargs)

        setattr(torch.distributed, name, call)

    counted("all_reduce", "all_reduce")
    counted("reduce_scatter", "reduce_scatter_single" if Version("2.13") <= TORCH else "reduce_scatter_tensor")


class UnevenClock(TrainerCallback):
    """What the timer of this rank reads: other times than the other rank's, steps that get dear as training goes on.

    The machine's own times would be a test of the machine: k can stay where it is for all of so short a run.
    """

    def __init__(self):
        self.now, self.rank = 0.0, int(os.environ.get("RANK", 0))
        timing.time = self

    def on_train_end(self, args, state, control, **kwargs):
        timing.time = time

    def perf_counter(self) -> float:
        self.now += 1.0 + self.rank
        return self.now

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.now += (2.0 - self.rank) * state.global_step**2


class Watch(TrainerCallback):
    """k, learning rate and a checksum of the weights after each optimizer step, of this rank."""

    def __init__(self):
        self.steps = []
        self.trainer = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        weights = torch.cat([whole(p.detach()).double().flatten() for p in model.parameters()])
        probe = torch.arange(1, len(weights) + 1, dtype=torch.float64).sin()
        parts = getattr(self.trainer, "trainopt", None)
        controller = parts and parts.accumulation.controller
        self.steps.append(
            {
                "k": self.trainer.trainopt.accumulation.last_window[0] if controller else None,
                "noise": controller.noise.value if controller and controller.noise else None,
                "samples": self.trainer.trainopt.accumulation.cursor.samples_seen if controller else None,
                "checksum": (weights @ probe).item(),
                "collectives": dict(COLLECTIVES),
                "epoch": state.epoch,
                "max_steps": state.max_steps,
            }
        )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded (collective)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def tiny_llama(folder: str, sharding: str):
    """The same small model, on each rank or spread over the ranks by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if sharding == "none":
        return model
    if os.environ["RANK"] == "0":
        model.save_pretrained(folder)
    torch.distributed.barrier()
    sizes = {"fsdp_size": 1, "dp_replicate_size": 2} if sharding.startswith("hsdp") else {"fsdp_size": 2}
    return LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes))


class Counting(AnyK):
    """Counts the buckets of gradients that DDP reduces."""

    def training_step(self, model, *args, **kwargs):
        if isinstance(model, torch.nn.parallel.DistributedDataParallel) and not hasattr(self, "hooked"):
            self.hooked = True

            def hook(state, bucket):
                COLLECTIVES["buckets"] += 1
                return default_hooks.allreduce_hook(None, bucket)

            model.register_comm_hook(None, hook)
        return super().training_step(model, *args, **kwargs)


class OwnStream(EfficientTrainer):
    """Each rank reads a stream of its own; that of the second rank is shorter, or slower."""

    def __init__(self, *args, lengths: tuple[int, int], seconds: float = 0.0, says_length: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.lengths, self.seconds, self.says_length = lengths, seconds, says_length

    def get_train_dataloader(self):
        rank = self.args.process_index

        class Rank(Stream):
            def __iter__(stream):
                for index in range(self.lengths[rank]):
                    time.sleep(self.seconds * rank)
                    yield stream.rows[(2 * index + rank) % 48]

        class Sized(Rank):
            def __len__(stream):
                return max(self.lengths)

        dataset = Sized(48) if self.says_length else Rank(48)
        return torch.utils.data.DataLoader(dataset, batch_size=self.args.per_device_train_batch_size)


class ChangesK(TrainerCallback):
    """What users try with stock `Trainer`. Every rank does the same."""

    def on_step_end(self, args, state, control, **kwargs):
        args.gradient_accumulation_steps = 3 if state.global_step % 2 else 2


class Uneven(TrainerCallback):
    """What ranks do not have in common: memory in evaluations, and lines that only the first one logs."""

    def __init__(self):
        self.trainer = None

    def on_prediction_step(self, args, state, control, **kwargs):
        if args.process_index == 1:
            touch(200)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if args.process_index == 0:
            self.trainer.log({"mine": 1.0})


class Terminated(TrainerCallback):
    """A signal to the second rank alone, in the middle of a window."""

    was_sent = False

    def on_substep_end(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 3 and not self.was_sent:
            self.was_sent = True
            os.kill(os.getpid(), signal.SIGTERM)

    on_pre_optimizer_step = on_substep_end  # where the window has one micro-batch


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
        update = self.trainopt.accumulation.controller.tracker.update
        self.trainopt.accumulation.controller.tracker.update = lambda found, **kwargs: (
            self.statistics.append(asdict(found)),
            update(found, **kwargs),
        )[1]
        return values


class FailsLater:
    """A policy with a mistake that shows in the middle of training."""

    def __call__(self, observation):
        return 2 if observation.progress < 0.3 else 1 / 0


def always_one(observation) -> int:
    """A policy of the user's: one micro-batch a step. It may ask for times, so windows are timed."""
    return 1


def make(case: str, output_dir: str, watch: Watch):
    common = {"per_device_train_batch_size": 2 * 2 // int(os.environ.get("WORLD_SIZE", "1"))}
    if case == "sequence":
        # SGD: Adam makes large steps of gradients that are zero but for rounding.
        args = arguments(output_dir, gradient_accumulation_steps=2, optim="sgd", learning_rate=0.1, **common)
        args.lr_batch_scaling = "sqrt"  # the noise that one rank measures is another estimate
        return AnyK(model=tiny_gpt2(), args=args, train_dataset=Rows(48), callbacks=[watch], sequence=K_SEQUENCE)
    if case == "policy fails":
        args = arguments(output_dir, gradient_accumulation_steps=2, num_train_epochs=4, **common)
        return EfficientTrainer(
            model=tiny_gpt2(), args=args, train_dataset=Rows(48), callbacks=[watch], accumulation_policy=FailsLater()
        )
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
    if case == "goodput":
        args = arguments(
            output_dir, gradient_accumulation_steps=4, num_train_epochs=4, noise_scale_interval=2,
            save_strategy="steps", save_steps=2, **common,
        )  # fmt: skip
        callbacks = [watch, UnevenClock()]
        return EfficientTrainer(model=tiny_gpt2(dropout=0.1), args=args, train_dataset=Rows(49), callbacks=callbacks)
    if case.partition(" ")[0] in ("interrupt", "uninterrupted"):
        name = case.split()[1]
        own = {"accumulation_policy": always_one} if name == "timed" else {}
        args = arguments(
            output_dir, gradient_accumulation_steps=3, save_on_interrupt=True,
            **({} if own else {"accumulation_policy": name, "optimizer_step_cost": 0.5}), **common,
        )  # fmt: skip
        callbacks = [watch, *([Terminated()] if case.startswith("interrupt") else [])]
        return EfficientTrainer(
            model=tiny_gpt2(dropout=0.1), args=args, train_dataset=Rows(49), callbacks=callbacks, **own
        )
    if case.startswith("evidence"):
        settings = {
            "gradient_accumulation_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2,
        } | common  # fmt: skip
        uneven = Uneven()
        targets = {"target_metric": "eval_loss", "target_value": 4.15}
        if case == "evidence stock":
            callbacks = [ThroughputCallback(), MemoryCallback(), TargetCallback("loss", 4.15)]
            callbacks += [GradientStatisticsCallback(interval=2), uneven, watch]
            args = arguments(output_dir, TrainingArguments, **settings)
        else:
            callbacks = [uneven, watch]
            args = arguments(
                output_dir, measurements="throughput,memory", accumulation_policy="fixed", measure_noise_scale=True,
                noise_scale_interval=2, **settings, **targets,
            )  # fmt: skip
        uneven.trainer = (Trainer if case == "evidence stock" else EfficientTrainer)(
            model=tiny_gpt2(), args=args, train_dataset=Rows(50), eval_dataset=Rows(8), callbacks=callbacks
        )
        return uneven.trainer
    if case.startswith("shard"):
        _, sharding, *clock = case.split()
        goodput = sharding == "goodput"
        # SGD: Adam makes large steps of gradients that are zero but for rounding.
        options = {"gradient_accumulation_steps": 2, "noise_scale_interval": 1, "optim": "sgd", "learning_rate": 0.1}
        if goodput:
            options |= {"gradient_accumulation_steps": 4, "num_train_epochs": 4, "noise_scale_interval": 2}
        if clock in (["tokens"], ["steps"]):
            # A large epsilon, for the reason above.
            options |= {"optim": "adamw_torch", "learning_rate": 1e-2, "adam_epsilon": 1e-3, "adam_clock": clock[0]}
        if clock == ["each"]:
            options["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
        args = arguments(output_dir, **options, **common)
        args.device  # starts torch.distributed  # noqa: B018
        model = tiny_llama(output_dir + "-model", sharding)
        rows = Rows(48)
        if goodput:
            callbacks = [watch, UnevenClock()]
            return EfficientTrainer(model=model, args=args, train_dataset=rows, callbacks=callbacks)
        return Listening(model=model, args=args, train_dataset=rows, callbacks=[watch], sequence=[2, 1, 3, 4, 2])
    if case.startswith("count"):
        settings = arguments(output_dir, gradient_accumulation_steps=2, noise_scale_interval=1, **common)
        settings.device  # noqa: B018
        model = tiny_gpt2() if case == "count ddp" else tiny_llama(output_dir + "-model", "fsdp")
        return Counting(
            model=model, args=settings, train_dataset=Rows(48), callbacks=[watch], sequence=[1, 2, 3, 4, 2]
        )
    if case.startswith("stream"):
        options = {"gradient_accumulation_steps": 2, "max_steps": 8, "noise_scale_interval": 2} | common
        dispatch = {"stream dispatched": True, "stream of each": False, "stream split": True}.get(case)
        if dispatch is not None:
            options["accelerator_config"] = {"dispatch_batches": dispatch, "split_batches": case == "stream split"}
            args = arguments(output_dir, **options)
            return AnyK(model=tiny_gpt2(), args=args, train_dataset=Stream(23), callbacks=[watch], sequence=[3, 2, 3])
        args = arguments(output_dir, **options)
        lengths = {"stream shorter": (40, 26), "stream sized": (40, 26), "stream empty": (40, 0)}.get(case, (40, 40))
        return OwnStream(
            model=tiny_gpt2(), args=args, train_dataset=Stream(48), callbacks=[watch], lengths=lengths,
            seconds=0.02 if case == "stream slow" else 0.0, says_length=case == "stream sized",
        )  # fmt: skip
    if case == "uneven lengths":
        args = arguments(output_dir, accelerator_config={"even_batches": False}, **common)
        return EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(49), callbacks=[watch])
    if case == "fp16":
        from precision_helpers import two_rank_run

        return two_rank_run(output_dir, [watch])
    if case.startswith("placement"):
        _, budget = case.split()
        options = {} if budget == "none" else {"memory_budget": budget, "memory_rewrites": "none"}
        args = arguments(
            output_dir, gradient_accumulation_steps=2, num_train_epochs=1, per_device_train_batch_size=8,
            accumulation_policy="ramp", accumulation_ramp="0:2,0.5:3", measure_noise_scale=True, **options,
        )  # fmt: skip
        return EfficientTrainer(
            model=tiny_gpt2(dropout=0.1), args=args, train_dataset=Rows(192, length=32), callbacks=[watch]
        )
    raise ValueError(case)


def has_checkpoints(folder: str) -> bool:
    """Whether there is something to resume; the folder itself may be made by the other rank at this moment."""
    return any(pathlib.Path(folder).glob("checkpoint-*"))


def run(output_dir: str, case: str) -> None:
    os.makedirs(output_dir, exist_ok=True)
    watch = Watch()
    trainer = quiet(make(case, os.path.join(output_dir, "run"), watch))
    watch.trainer = trainer
    run, ended = os.path.join(output_dir, "run"), None
    try:
        trainer.train(resume_from_checkpoint=case.startswith("uninterrupted") and has_checkpoints(run))
    except TrainingTerminated as error:
        ended = type(error).__name__
    except (ZeroDivisionError, RuntimeError) as error:
        if case != "policy fails":
            raise
        ended = f"{type(error).__name__}: {error}"
    rank = int(os.environ.get("RANK", "0"))
    record = {
        "steps": watch.steps,
        "ended": ended,
        "world_size": trainer.args.world_size,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "history": trainer.state.log_history,
        "precision": trainer.accelerator.mixed_precision,
        "windows": getattr(trainer, "windows", None),
        "statistics": getattr(trainer, "statistics", None),
        "plan": trainer.placement_plan.to_dict() if getattr(trainer, "placement_plan", None) else None,
        "weights": {name: whole(value).tolist() for name, value in trainer.model.state_dict().items()},
    }
    with open(os.path.join(output_dir, f"rank{rank}.json"), "w") as file:
        json.dump(record, file)


def main() -> None:
    """Several cases, parted by `;`, run one after the other: each in a folder of its name."""
    output_dir, cases = sys.argv[1:]
    count_collectives()
    if ";" in cases:
        for case in cases.split(";"):
            run(os.path.join(output_dir, case), case)
    else:
        run(output_dir, cases)
    close_process_group()


if __name__ == "__main__":
    main()
