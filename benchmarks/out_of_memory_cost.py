"""What `auto_micro_batch` costs on two ranks where memory suffices: gradients are averaged after they are computed.

    accelerate launch --multi_gpu --num_processes 2 --num_cpu_threads_per_process 1 benchmarks/out_of_memory_cost.py

Trains the same model with and without it in turns, and prints the quartiles of the time of an optimizer step of each
for k = 1 and 4. gloo on the CPU unless there is a GPU for each rank.
"""

import argparse
import json
import statistics
import tempfile
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, TrainerCallback

from hf_trainopt import EfficientTrainer, EfficientTrainingArguments
from hf_trainopt.scripting.session import close_process_group


class Rows(torch.utils.data.Dataset):
    def __init__(self, num_rows: int, length: int):
        self.rows = torch.randint(0, 512, (num_rows, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Clock(TrainerCallback):
    """Seconds of each optimizer step but the first two."""

    def __init__(self):
        self.seconds: list[float] = []
        self._mark = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > 2:
            self.seconds.append(time.perf_counter() - self._mark)


def times(k: int, auto: bool, steps: int, layers: int, width: int) -> list[float]:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_positions=64, n_embd=width, n_layer=layers, n_head=4, use_cache=False)
    with tempfile.TemporaryDirectory() as folder:
        args = EfficientTrainingArguments(
            folder, per_device_train_batch_size=2, gradient_accumulation_steps=k, max_steps=steps + 2,
            accumulation_policy="fixed", auto_micro_batch=auto, save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True, measurements="none", use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        clock = Clock()
        trainer = EfficientTrainer(
            model=GPT2LMHeadModel(config), args=args, train_dataset=Rows(4096, 64), callbacks=[clock]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for k in (1, 4):
        found: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(options.rounds):
            for auto in found:
                found[auto] += times(k, auto, options.steps, options.layers, options.width)
        if torch.distributed.get_rank() == 0:
            quartiles = {auto: statistics.quantiles(seconds, n=4) for auto, seconds in found.items()}
            ratio = quartiles[True][1] / quartiles[False][1]
            print(json.dumps({"k": k, "without": quartiles[False], "with": quartiles[True], "ratio": ratio}))
    close_process_group()


if __name__ == "__main__":
    main()
