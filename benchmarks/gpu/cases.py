"""The models that memory and time are measured on, at full size and for the rehearsal."""

import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from common import Context, with_device
from placement_cases import FRONTIERS, LLAMA_ON_GPU, Case, _gpt2, _llama, _timm

from hf_trainopt.placement.show.models import ModelRequest


BUDGETS = ("75%", "50%", "35%", "25%")
# Of the small models of the exactness checks.
EXACTNESS_BUDGETS = ("75%", "50%")
# How many of the cases are timed; all of them have their peaks measured.
TIMED = 3
# The one that `torch.compile` is compared with: plans along its whole frontier.
COMPILED = "gpt2-small-bf16"
FRONTIER_POINTS = 8

_BF16 = {"autocast_dtype": torch.bfloat16}
_FULL = (
    FRONTIERS["gpt2-small-bf16"],
    FRONTIERS["resnet50-224"],
    LLAMA_ON_GPU,
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


def exactness_cases(context: Context) -> list[Case]:
    """Return the models of the exactness checks: small, of four kinds, in the precisions that take other kernels."""
    width, layers, length, vocabulary = context.pick((256, 6, 256, 4096), (32, 3, 24, 211))
    gpt2 = f"n_layer={layers},n_embd={width},n_head=4,vocab_size={vocabulary},n_positions={length}"
    llama = (
        f"num_hidden_layers={layers},hidden_size={width},intermediate_size={2 * width},num_attention_heads=4,"
        f"num_key_value_heads=2,vocab_size={vocabulary},max_position_embeddings={length},attention_dropout=0.1"
    )
    shape = {"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2}
    vit = ModelRequest(
        timm_model="vit_tiny_patch16_224",
        model_args=json.dumps(shape | {"drop_path_rate": 0.1, "attn_drop_rate": 0.1}),
    )
    resnet = context.pick("resnet50", "resnet10t")
    bf16 = {"autocast_dtype": torch.bfloat16}
    rows = context.pick(8, 3)
    found = [
        _gpt2("gpt2 with dropout, fp32", "", gpt2, rows, length),
        _gpt2("gpt2 with dropout, bf16", "", gpt2, rows, length, **bf16),
        _timm(f"{resnet} with BatchNorm, fp32", "", resnet, context.pick(32, 4), context.pick(96, 32)),
        _llama("llama type, bf16", "", llama, rows, length, **bf16),
        Case("vit, fp32", "", vit, rows, image_size=context.pick(96, 32)),
    ]
    if context.on_gpu:
        found.append(_timm("resnet50 with BatchNorm, bf16", "", resnet, 32, 96, **bf16))
    return [with_device(case, context.spec) for case in found]


def save_plans(context: Context, name: str, values: dict[str, Any]) -> None:
    """Let the other stages have the plans of a case."""
    path = plans_file(context, name)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values))
    part.replace(path)


def plans_file(context: Context, name: str) -> Path:
    """Return where the plans of a case are, or will be."""
    return context.folder / f"plans-{re.sub('[^a-z0-9]+', '-', name.lower())}.json"


def wait_for_plans(context: Context, name: str, seconds: float) -> dict[str, Any]:
    """Return the plans of a case as soon as they are there.

    Raises:
        RuntimeError: They could not be made, or are not there in time.
    """
    path, waited = plans_file(context, name), time.monotonic()
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
