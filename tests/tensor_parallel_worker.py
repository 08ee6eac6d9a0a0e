"""Run on one, two and four ranks in `test_tensor_parallel.py`: trains tensor-parallel models and their twins.

tensor_parallel_worker.py OUTPUT_DIR CASE[;CASE...]
"""

import os

import distributed_worker
import torch
from accelerate import ParallelismConfig
from distributed_worker import Listening, UnevenClock, Watch
from helpers import Rows, arguments
from transformers import Trainer, TrainingArguments

from hf_trainopt import EfficientTrainer, EfficientTrainingArguments


# Accelerate refuses parallel models on a CPU, where nothing but its check is in their way.
ParallelismConfig._validate_accelerator = lambda self, accelerator: None

SEQUENCE = [2, 1, 3, 4, 2]
SIZES = {"tp": {"tp_size": 2}, "2d": {"tp_size": 2, "fsdp_size": 2}, "hsdp": {"tp_size": 2, "dp_replicate_size": 2}}


def make_model(folder: str, kind: str, sharding: str):
    """The same small model, whole on each rank or spread over the ranks by transformers.

    The norms of queries and keys of `qwen3` see the heads of their rank only.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
    from transformers.distributed import DistributedConfig

    torch.manual_seed(0)
    make, config = (LlamaForCausalLM, LlamaConfig) if kind == "llama" else (Qwen3ForCausalLM, Qwen3Config)
    model = make(
        config(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=4, bos_token_id=0, eos_token_id=0, use_cache=False,
        )
    )  # fmt: skip
    if sharding not in SIZES:
        return model
    if os.environ["RANK"] == "0":
        model.save_pretrained(folder)
    torch.distributed.barrier()
    return make.from_pretrained(folder, distributed_config=DistributedConfig(**SIZES[sharding]))


def make(case: str, output_dir: str, watch: Watch):
    """A case: sharding, kind of model, what is done."""
    sharding, kind, what = case.split()
    groups = {"ddp": 2, "2d": 2, "hsdp": 2}.get(sharding, 1)  # that have different data
    # SGD: Adam makes large steps of gradients that are zero but for rounding.
    options = {
        "gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
    }  # fmt: skip
    if kind == "llama" and what in ("stock", "constant"):
        options |= {"optim": "adamw_torch", "learning_rate": 1e-2}
    if what == "constant":
        options |= {"accumulation_policy": "ramp", "accumulation_ramp": "0:2", "measure_noise_scale": True}
    if what == "recompute":
        options |= {"checkpoint_placement": "all"}
    if what == "goodput":
        options |= {
            "gradient_accumulation_steps": 4, "num_train_epochs": 2, "measurements": "throughput",
            "parallelism_config": ParallelismConfig(tp_size=2), "save_strategy": "epoch", "save_only_model": True,
        }  # fmt: skip
    if what != "stock":
        options["noise_scale_interval"] = 2 if what == "goodput" else 1
    args = arguments(output_dir, TrainingArguments if what == "stock" else EfficientTrainingArguments, **options)
    args.device  # starts torch.distributed  # noqa: B018
    model, rows = make_model(output_dir + "-model", kind, sharding), Rows(48 if what == "goodput" else 28 * groups)
    if what == "stock":
        return Trainer(model=model, args=args, train_dataset=rows, callbacks=[watch])
    if what == "goodput":
        return EfficientTrainer(model=model, args=args, train_dataset=rows, callbacks=[watch, UnevenClock()])
    if what == "constant":
        return EfficientTrainer(model=model, args=args, train_dataset=rows, callbacks=[watch])
    return Listening(model=model, args=args, train_dataset=rows, callbacks=[watch], sequence=SEQUENCE)


if __name__ == "__main__":
    distributed_worker.make = make
    distributed_worker.main()
