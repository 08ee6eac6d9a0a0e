"""Tiny models, data and runs that the tests share. Everything is deterministic and offline."""

import mmap
import socket
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TrainerCallback,
    TrainingArguments,
)

from hf_trainopt import EfficientTrainer, EfficientTrainingArguments
from hf_trainopt.core.versions import TORCH, TRANSFORMERS
from hf_trainopt.scripting.requirements import PACKAGES


def skip_without_scripts() -> None:
    """Skip a test, or a module that calls it while it is imported, where the extra `scripts` is not installed."""
    for module in PACKAGES.values():
        pytest.importorskip(module, reason=f"{module} is in the extra 'scripts'")


def skip_below(package: str, first: str, what: str) -> None:
    """Skip a test of something that needs a newer PyTorch or transformers than the installed one."""
    installed = {"torch": TORCH, "transformers": TRANSFORMERS}[package]
    if installed < Version(first):
        pytest.skip(f"{what} needs {package} >= {first}")


def table(columns: dict[str, list]) -> Any:
    """Return a `datasets.Dataset`; skip the test where datasets is not installed."""
    return pytest.importorskip("datasets", reason="datasets is in the extra 'scripts'").Dataset.from_dict(columns)


class Rows(torch.utils.data.Dataset):
    """Token rows of which different numbers of tokens are predicted; `sample_id` in the first token if `numbered`."""

    def __init__(self, num_rows: int = 50, length: int = 12, vocab_size: int = 64, numbered: bool = False):
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(0, vocab_size, (num_rows, length), generator=generator)
        if numbered:
            self.rows[:, 0] = torch.arange(num_rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.rows[index].clone()
        labels[: 1 + 3 * (index % 4)] = -100
        return {"input_ids": self.rows[index], "labels": labels}


class Stream(torch.utils.data.IterableDataset):
    """The rows of `Rows` without a length."""

    def __init__(self, *args, **kwargs):
        self.rows = Rows(*args, **kwargs)

    def __iter__(self):
        return (self.rows[index] for index in range(len(self.rows)))


class Pictures(torch.utils.data.Dataset):
    def __init__(self, num_rows: int = 22):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(num_rows, 3, 32, 32, generator=generator)
        self.labels = torch.randint(0, 4, (num_rows,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def tiny_gpt2(vocab_size: int = 64, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config).to(dtype)
    # Lets Trainer count the labels that are predicted (`labels[..., 1:]`).
    model.loss_type = "ForCausalLM"
    return model


def tiny_resnet() -> TimmWrapperForImageClassification:
    torch.manual_seed(0)
    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture="resnet10t", num_labels=4))


def arguments(output_dir, cls: type[TrainingArguments] = EfficientTrainingArguments, **kwargs: Any):
    """Arguments of a short silent CPU run; anything can be overridden."""
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 3,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    if issubclass(cls, EfficientTrainingArguments):
        defaults["measurements"] = "none"  # the lines of stock Trainer, and ours beside them
    return cls(**(defaults | kwargs))


def touch(mib: int) -> None:
    """Have that much memory for a moment: in pages of its own, as malloc may hand out what is resident already."""
    with mmap.mmap(-1, mib * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        for begin in range(0, len(pages), mmap.PAGESIZE):
            pages[begin] = 1


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def quiet(trainer):
    """Remove the callback that prints each log line."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def measuring(trainer) -> list[TrainerCallback]:
    """Return the callbacks that may measure, of a Trainer of ours or a stock one."""
    return getattr(trainer, "measurements", trainer.callback_handler.callbacks)


class Sequence:
    """A policy that asks for the given k one after the other (the last one for ever)."""

    def __init__(self, values: list[int]):
        self.values = values
        self.count = 0

    def __call__(self, observation) -> float:
        value = self.values[min(self.count, len(self.values) - 1)]
        self.count += 1
        return float(value)


class AnyK(EfficientTrainer):
    """`EfficientTrainer` in which k follows a given sequence to the letter: no dwell, no limits, no probes."""

    def __init__(self, *args, sequence: list[int], **kwargs):
        super().__init__(*args, accumulation_policy=Sequence(sequence), **kwargs)
        self.sequence = sequence

    def set_initial_training_values(self, *args, **kwargs):
        values = super().set_initial_training_values(*args, **kwargs)
        controller, sequence = self.trainopt.accumulation.controller, self.sequence
        controller.accumulation_steps = sequence[0]

        def decide(observation):
            return sequence[min(controller.num_windows + 1, len(sequence) - 1)]

        controller.decide = decide
        return values


class Recorder(TrainerCallback):
    """What happened at each optimizer step."""

    def __init__(self):
        self.gradients: list[list[torch.Tensor]] = []
        self.learning_rates: list[float] = []
        self.epochs: list[float] = []
        self.steps: list[int] = []
        self.max_steps: list[int] = []
        self.substeps = 0
        self.accumulation_steps_seen: set[int] = set()

    def on_substep_end(self, args, state, control, **kwargs):
        self.substeps += 1
        self.accumulation_steps_seen.add(args.gradient_accumulation_steps)

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.gradients.append([p.grad.detach().clone() for p in model.parameters() if p.grad is not None])
        self.learning_rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, **kwargs):
        self.epochs.append(state.epoch)
        self.steps.append(state.global_step)
        self.max_steps.append(state.max_steps)
        self.accumulation_steps_seen.add(args.gradient_accumulation_steps)


def weights_equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether parameters and buffers agree to the bit."""
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
