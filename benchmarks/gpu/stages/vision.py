"""The headline on vision: ResNet-50 from scratch on CIFAR-10, stock `Trainer` against ours."""

from typing import Any

import torch
from arms import Headline, run_arms
from common import Context, Record
from data import image_data, images
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification


EVALUATED = 2000
# Pixels are repeated so often in each direction: at 32² nearly all memory of ResNet-50 is weights, and no placement
# would save a quarter of it. The GPU does not notice: steps are bound by launches.
ENLARGED = 3


def prepare(context: Context) -> Any:
    return images(context, context.pick(ENLARGED, 1))


def accuracy(predictions: Any) -> dict[str, float]:
    return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}


def run(context: Context, record: Record, prepared: Any) -> None:
    arrays, source = prepared
    architecture = context.pick("resnet50", "test_resnet")
    _, everything = image_data(arrays, 0, context.pick(10_000, 64))

    def build(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        config = TimmWrapperConfig(architecture=architecture, num_labels=10, do_pooling=True)
        train_data, part = image_data(arrays, seed, context.pick(EVALUATED, 32))
        model = TimmWrapperForImageClassification(config)
        return {"model": model, "train_dataset": train_data, "eval_dataset": part, "compute_metrics": accuracy}

    task = Headline(
        title=context.pick("ResNet-50 on CIFAR-10, enlarged to 96², bf16, 896 micro-batches of 64", "toy ResNet"),
        micro_batch=context.pick(64, 8),
        arguments={
            "max_steps": context.pick(112, 4), "weight_decay": 0.05, "max_grad_norm": 1.0, "warmup_steps": 0.05,
            "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.01},
            "per_device_eval_batch_size": context.pick(500, 32),
        },
        build=build, everything=everything, source=source, seconds=context.pick(46.0, 1.0),
        planning_seconds=context.pick(15.0, 1.0), metric="accuracy", learns=context.on_gpu,
    )  # fmt: skip
    run_arms(context, record, task)
