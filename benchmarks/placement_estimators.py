"""What the estimators of Accelerate and DeepSpeed say of models whose peaks were measured, beside our prediction."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.estimate import estimate_training_usage
from placement_cases import FRONTIERS, LLAMA_ON_GPU
from placement_sharded import MODELS, SIZE

from hf_trainopt.placement.show.models import build_model
from hf_trainopt.placement.simulate.quantized import num_parameters


GPU = Path(__file__).resolve().parent / "results" / "gpu" / "memory.json"
ON_GPU = (FRONTIERS["gpt2-small-fp32"], FRONTIERS["gpt2-small-bf16"], LLAMA_ON_GPU, FRONTIERS["resnet50-224"])


def accelerate_estimate(parameters: int, precision: str) -> int:
    """Return the "peak vRAM" of training with Adam that `accelerate estimate-memory` prints, in bytes."""
    return max(estimate_training_usage(4 * parameters, precision).values())


def deepspeed_estimate(parameters: int, largest_layer: int, stage: int, devices: int) -> int:
    """Return what DeepSpeed's estimators say a device needs for the states of a model, without offload, in bytes."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    if stage == 2:
        return estimate_zero2_model_states_mem_needs(parameters, devices, cpu_offload=False)[1]
    return estimate_zero3_model_states_mem_needs(parameters, largest_layer, devices, cpu_offload=False)[1]


def on_gpu() -> list[dict[str, Any]]:
    """Return the rows of models that ran on a GPU, nothing recomputed."""
    parts, rows = json.loads(GPU.read_text())["parts"], []
    for case in ON_GPU:
        plan = next(plan for plan in parts[case.name]["plans"] if plan["placement"] == "none")
        built = build_model(case.request, case.batch_size, case.block_size, case.image_size)
        precision = str(case.autocast_dtype or torch.float32).removeprefix("torch.")
        estimate = accelerate_estimate(num_parameters(built.model), precision)
        rows.append(
            {"setup": f"{parts[case.name]['title']}, one H100", "measured": plan["peak_bytes"],
             "ours": plan["predicted_bytes"], "accelerate": estimate}
        )  # fmt: skip
    return rows


def on_ranks(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of models that ran under ZeRO on two ranks, nothing recomputed."""
    runs = {
        stage: {run["model"]: run for run in _runs(folder, stage) if run["placement"] == "none"} for stage in (2, 3)
    }
    rows = []
    for stage, of_model in runs.items():
        for model, run in of_model.items():
            # Whole parameters are there under ZeRO-2, in 4 bytes each.
            parameters = runs[2][model]["predicted_by_kind"]["parameters"] // 4
            estimate = deepspeed_estimate(parameters, SIZE["width"] * SIZE["vocabulary"], stage, 2)
            size = f"B={SIZE['rows']}, T={SIZE['length']}, fp32"
            rows.append(
                {"setup": f"{MODELS[model]}, {size}, ZeRO-{stage} on two CPU ranks",
                 "measured": max(run["rank_bytes"]), "ours": run["predicted_bytes"], "deepspeed": estimate}
            )  # fmt: skip
    return rows


def _runs(folder: Path, stage: int) -> list[dict[str, Any]]:
    return json.loads((folder / f"sharded-zero{stage}.json").read_text())["runs"]


def estimators(folder: Path) -> list[dict[str, Any]]:
    """Return all rows.

    Args:
        folder: Of the records.
    """
    return on_gpu() + on_ranks(folder)
