"""Run on two ranks in `test_uneven_ranks.py`: micro-batches that the ranks share (`split_batches`)."""

import json
import sys
from pathlib import Path

import torch
from helpers import Rows, arguments, quiet, tiny_gpt2
from transformers import Trainer, TrainingArguments

from hf_trainopt import EfficientTrainer
from hf_trainopt.metrics import GradientStatisticsCallback
from hf_trainopt.scripting.session import close_process_group


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    args = arguments(
        folder, per_device_train_batch_size=4, max_steps=3, gradient_accumulation_steps=2,
        accumulation_policy="fixed", measure_noise_scale=True, accelerator_config={"split_batches": True},
    )  # fmt: skip
    trainer = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(48)))
    trainer.train()
    record = {
        "world_size": args.world_size,
        "samples_of_a_micro_batch": trainer.trainopt.accumulation.controller.micro_batch_samples,
        "samples": trainer.trainopt.accumulation.cursor.samples_seen,
        "micro_batch_size": trainer.micro_batch_size,
    }
    callback = GradientStatisticsCallback(half_life=1.0 - 1e-9)
    stock_args = arguments(
        folder, TrainingArguments, per_device_train_batch_size=4, max_steps=3, gradient_accumulation_steps=2,
        accelerator_config={"split_batches": True},
    )  # fmt: skip
    quiet(Trainer(model=tiny_gpt2(), args=stock_args, train_dataset=Rows(48), callbacks=[callback])).train()
    record["half_life_of_callback"] = callback._controller.tracker.half_life
    (folder / f"rank{args.process_index}.json").write_text(json.dumps(record))
    close_process_group()
