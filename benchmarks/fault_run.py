"""The run that `faults.py` kills: a tiny GPT-2 with dropout and adaptive k, and a journal of its windows and saves.

The journal is a file of JSON lines, each one `write` of its own: a SIGKILL loses no line written before it.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, TrainerCallback

from hf_trainopt import EfficientTrainer, EfficientTrainingArguments
from hf_trainopt.reliability import find_last_complete


ZERO2 = {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": "auto",
         "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}  # fmt: skip
NUM_ROWS = 256
LENGTH = 12


class NumberedRows(torch.utils.data.Dataset):
    """Random tokens; the first one of a row is its number."""

    def __init__(self):
        self.rows = torch.randint(0, NUM_ROWS, (NUM_ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
        self.rows[:, 0] = torch.arange(NUM_ROWS)

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Journal(TrainerCallback):
    """Writes down where a run has begun, and each window with its samples.

    Args:
        path: File.
    """

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.samples: list[int] = []

    def write(self, event: str, **facts: Any) -> None:
        line = {"event": event, "time": time.monotonic(), **facts}
        os.write(self._file, (json.dumps(line) + "\n").encode())

    def on_train_begin(self, args, state, control, **kwargs):
        self.write("begun", step=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.write("window", step=state.global_step, samples=self.samples)
        self.samples = []
        control.should_save = True


class Journaled(EfficientTrainer):
    """Tells its journal of samples and saves."""

    journal: Journal

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.journal.samples += inputs["input_ids"][:, 0].tolist()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        self.journal.write("saving", step=self.state.global_step)
        super()._save_checkpoint(*args, **kwargs)
        self.journal.write("saved", step=self.state.global_step)


def make_trainer(folder: Path, journal: Journal, epochs: int, deepspeed: bool) -> Journaled:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=NUM_ROWS, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, use_cache=False,
    )  # fmt: skip
    args = EfficientTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, num_train_epochs=epochs,
        per_device_train_batch_size=2 // world_size, gradient_accumulation_steps=4, learning_rate=3e-3,
        accumulation_policy="goodput", optimizer_step_cost=1.0, noise_scale_interval=2, max_accumulation_steps=8,
        save_strategy="steps", save_steps=10**6, save_total_limit=3, logging_steps=1, measurements="none",
        ddp_timeout=60, deepspeed=ZERO2 if deepspeed else None,
    )  # fmt: skip
    trainer = Journaled(model=GPT2LMHeadModel(config), args=args, train_dataset=NumberedRows(), callbacks=[journal])
    trainer.journal = journal
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(folder: Path, journal_path: Path, epochs: int, deepspeed: bool) -> None:
    """Train, from the last complete checkpoint if there is one."""
    journal = Journal(journal_path)
    try:
        trainer = make_trainer(folder, journal, epochs, deepspeed)
        found, skipped = find_last_complete(str(folder))
        journal.write("found", step=found and found.step, skipped={c.name: c.fault for c in skipped})
        trainer.train(resume_from_checkpoint=found is not None)
        trainer.save_model()
        journal.write("done", step=trainer.state.global_step, k=trainer.accumulation_range)
    except BaseException as error:
        journal.write("error", type=type(error).__name__, message=str(error)[:300])
        raise


def fork(folder: Path, journal_path: Path, epochs: int, deepspeed: bool, environment: dict[str, str]) -> int:
    """Start a run in a child of this process, which has everything imported already; returns its id.

    Args:
        folder: Output folder of the run.
        journal_path: File of the journal.
        epochs: Of the run.
        deepspeed: Whether the ranks run DeepSpeed's ZeRO-2.
        environment: Variables of the rank.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(environment)
        log = os.open(journal_path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        train(folder, journal_path, epochs, deepspeed)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
