"""The models that memory and time are measured on, at full size and for the rehearsal."""

import json
import time
from typing import Any

import torch
from common import Context, with_device
from placement_cases import FRONTIERS, Case, _gpt2, _llama, _timm

from hf_trainopt.placement.show.models import ModelRequest


BUDGETS = ("75%", "50%", "35%", "25%")
# How many of the cases are timed; all of them have their peaks measured.
TIMED = 3
# The one that `torch.compile` is compared with: plans along its whole frontier.
COMPILED = "gpt2-small-bf16"
FRONTIER_POINTS = 8

# 0.5 billion parameters.
_LLAMA = (
    "num_hidden_layers=16,hidden_size=1536,intermediate_size=4096,num_attention_heads=12,num_key_value_heads=4,"
    "vocab_size=32000,max_position_embeddings=2048"
)
_BF16 = {"autocast_dtype": torch.bfloat16}
_FULL = (
    FRONTIERS["gpt2-small-bf16"],
    FRONTIERS["resnet50-224"],
    _llama("llama-bf16", "Llama type, 16 layers x 1536, B=4, T=2048, bf16 autocast", _LLAMA, 4, 2048, **_BF16),
    FRONTIERS["gpt2-small-fp32"],
    FRONTIERS["vit-base-224"],
)

_TOY_GPT2 = "n_layer=2,n_embd=32,n_head=2,vocab_size=300,n_positions=64"
_TOY_LLAMA = (
    "num_hidden_layers=2,hidden_size=32,intermediate_size=64,num_attention_heads=4,num_key_value_heads=2,"
    "vocab_size=300,max_position_embeddings=64"
)
_TOY_VIT = '{"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}'
# Under the names of those that they stand for.
_TOY = (
    _gpt2("gpt2-small-bf16", "toy GPT-2, bf16 autocast", _TOY_GPT2, 2, 32, **_BF16),
    _timm("resnet50-224", "toy ResNet", "resnet10t", 2, 32),
    _llama("llama-bf16", "toy Llama, bf16 autocast", _TOY_LLAMA, 2, 32, **_BF16),
    _gpt2("gpt2-small-fp32", "toy GPT-2", _TOY_GPT2, 2, 32),
    Case(
        "vit-base-224",
        "toy ViT",
        ModelRequest(timm_model="vit_tiny_patch16_224", model_args=_TOY_VIT),
        2,
        image_size=32,
    ),
)


def cases(context: Context) -> list[Case]:
    """Return the cases, most valuable first, for the device of this run."""
    return [with_device(case, context.spec) for case in context.pick(_FULL, _TOY)]


def save_plans(context: Context, name: str, values: dict[str, Any]) -> None:
    """Let the other stages have the plans of a case."""
    path = context.folder / f"plans-{name}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values))
    part.replace(path)


def wait_for_plans(context: Context, name: str, seconds: float) -> dict[str, Any]:
    """Return the plans of a case as soon as they are there.

    Raises:
        RuntimeError: They could not be made, or are not there in time.
    """
    path, waited = context.folder / f"plans-{name}.json", time.monotonic()
    while not path.exists():
        ended = (context.folder / "plans.ended").exists()
        if (ended and not path.exists()) or time.monotonic() - waited > seconds:
            why = "planning has ended" if ended else f"{seconds:.0f} s of waiting are over"
            raise RuntimeError(f"no plans for {name}, {why}: see the record of plans.")
        time.sleep(0.1)
    values = json.loads(path.read_text())
    if "error" in values:
        raise RuntimeError(f"no plans could be made for {name}:\n{values['error']}")
    return values
