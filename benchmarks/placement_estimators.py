"""What the estimators of Accelerate and DeepSpeed say of models whose peaks were measured, beside our prediction."""

import json
from pathlib import Path
from typing import Any

from accelerate.commands.estimate import estimate_training_usage
from placement_cases import CASES, Case, _llama
from placement_sharded import MODELS, SIZE

from hf_trainopt.placement.show.models import build_model


GPU = Path(__file__).resolve().parent / "results" / "gpu" / "memory.json"
# As benchmarks/gpu/cases.py has it.
_LLAMA_BF16 = _llama(
    "llama-bf16",
    "",
    "num_hidden_layers=16,hidden_size=1536,intermediate_size=4096,num_attention_heads=12,num_key_value_heads=4,"
    "vocab_size=32000,max_position_embeddings=2048",
    4,
    2048,
)
ON_GPU = ("gpt2-small-fp32", "gpt2-small-bf16", "llama-bf16", "resnet50-224")
WITHOUT = "none"


def num_parameters(case: Case) -> int:
    """Return the parameters of a model."""
    built = build_model(case.request, case.batch_size, case.block_size, case.image_size)
    return sum(parameter.numel() for parameter in built.model.parameters())


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
    for name in ON_GPU:
        case = _LLAMA_BF16 if name == "llama-bf16" else CASES[name]
        plan = next(plan for plan in parts[name]["plans"] if plan["placement"] == WITHOUT)
        precision = "bfloat16" if name.endswith("bf16") else "float32"
        estimate = accelerate_estimate(num_parameters(case), precision)
        rows.append(
            {"setup": f"{parts[name]['title']}, one H100", "measured": plan["peak_bytes"],
             "ours": plan["predicted_bytes"], "accelerate": estimate}
        )  # fmt: skip
    return rows


def on_ranks(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of models that ran under ZeRO on two ranks, nothing recomputed."""
    rows = []
    for stage in (2, 3):
        record = json.loads((folder / f"sharded-zero{stage}.json").read_text())
        for run in record["runs"]:
            if run["placement"] != WITHOUT:
                continue
            # Whole parameters are there under ZeRO-2, in 4 bytes each.
            whole = next(r for r in json.loads((folder / "sharded-zero2.json").read_text())["runs"]
                         if (r["model"], r["placement"]) == (run["model"], WITHOUT))  # fmt: skip
            parameters = whole["predicted_by_kind"]["parameters"] // 4
            estimate = deepspeed_estimate(parameters, SIZE["width"] * SIZE["vocabulary"], stage, 2)
            rows.append(
                {"setup": f"{MODELS[run['model']]}, B={SIZE['rows']}, T={SIZE['length']}, fp32, ZeRO-{stage} on two "
                 "CPU ranks", "measured": max(run["rank_bytes"]), "ours": run["predicted_bytes"],
                 "deepspeed": estimate}
            )  # fmt: skip
    return rows


def estimators(folder: Path) -> list[dict[str, Any]]:
    """Return all rows.

    Args:
        folder: Of the records.
    """
    return on_gpu() + on_ranks(folder)
