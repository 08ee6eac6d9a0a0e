"""The headline on language: GPT-2 Small from scratch on WikiText-2, stock `Trainer` against ours."""

from typing import Any

import torch
from arms import Headline, run_arms
from common import Context, Record
from data import language_tokens, token_blocks
from transformers import GPT2Config, GPT2LMHeadModel


EVALUATED = 64


def prepare(context: Context) -> Any:
    return language_tokens(context, 300)


def run(context: Context, record: Record, prepared: Any) -> None:
    train_tokens, valid_tokens, source = prepared
    length = context.pick(1024, 32)
    train_data = token_blocks(train_tokens, length, context.pick(None, 96))
    everything = token_blocks(valid_tokens, length, context.pick(None, 16))
    part = token_blocks(valid_tokens, length, context.pick(EVALUATED, 8))
    toy = {"vocab_size": 300, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0,
           "eos_token_id": 0}  # fmt: skip

    def build(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        with context.device:
            model = GPT2LMHeadModel(GPT2Config(use_cache=False, **context.pick({}, toy)))
        # GPT-2 declares no loss type, so Trainer would count T labels a row although T-1 are predicted.
        model.loss_type = "ForCausalLM"
        return {"model": model, "train_dataset": train_data, "eval_dataset": part}

    task = Headline(
        title=context.pick("GPT-2 Small on WikiText-2, T = 1024, bf16, three epochs", "toy GPT-2"),
        micro_batch=context.pick(8, 2),
        arguments={
            "num_train_epochs": context.pick(3, 1), "weight_decay": 0.1, "adam_beta2": 0.95, "max_grad_norm": 1.0,
            "warmup_steps": 0.05, "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "per_device_eval_batch_size": 8,
        },
        build=build, everything=everything, source=source, seconds=context.pick(76.0, 1.0),
        planning_seconds=context.pick(20.0, 1.0), tokens_per_sample=length,
    )  # fmt: skip
    run_arms(context, record, task)
