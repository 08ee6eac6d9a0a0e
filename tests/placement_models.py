"""Small models of each kind that placement is tested with, and batches for them."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)


def gpt2(num_layers: int = 4, width: int = 32, vocab_size: int = 211, **kwargs: Any) -> GPT2LMHeadModel:
    """GPT-2 with all its dropouts (0.1) on."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=num_layers, n_embd=width, n_head=4, vocab_size=vocab_size, n_positions=64, use_cache=False,
            bos_token_id=0, eos_token_id=0, **kwargs,
        )
    )  # fmt: skip


def llama(num_layers: int = 3, **kwargs: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=num_layers, hidden_size=32, intermediate_size=64, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=211, max_position_embeddings=64, use_cache=False,
            attention_dropout=0.1, **kwargs,
        )
    )  # fmt: skip


def timm_model(name: str, **model_args: Any) -> TimmWrapperForImageClassification:
    torch.manual_seed(0)
    return TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture=name, num_labels=5, model_args=model_args or None)
    )


def resnet50() -> TimmWrapperForImageClassification:
    return timm_model("resnet50", drop_path_rate=0.1)


def vit() -> TimmWrapperForImageClassification:
    return timm_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, drop_path_rate=0.1,
        proj_drop_rate=0.1, attn_drop_rate=0.1,
    )  # fmt: skip


def tokens(rows: int = 3, length: int = 48, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 211, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def pictures(rows: int = 4, size: int = 32, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(rows, 3, size, size, generator=generator),
        "labels": torch.randint(0, 5, (rows,), generator=generator),
    }


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[..., dict[str, torch.Tensor]]]] = {
    "gpt2": (gpt2, tokens),
    "llama": (llama, tokens),
    "resnet50": (resnet50, pictures),
    "vit": (vit, pictures),
}
