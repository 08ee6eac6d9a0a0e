"""`--config_overrides`: the config is the one that its class makes of the changes, and so is the model."""

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from hf_trainopt.models.overrides import config_with


# model type -> (model class, changes)
CHANGES = {
    "llama": ("LlamaForCausalLM", {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "mistral": ("MistralForCausalLM", {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8}),
    "qwen2": ("Qwen2ForCausalLM", {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 6}),
    "qwen3": ("Qwen3ForCausalLM", {"hidden_size": 192, "num_hidden_layers": 3, "head_dim": 24}),
    "gemma": ("GemmaForCausalLM", {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 96, "n_layer": 3, "n_head": 3, "n_inner": 100}),
    "gpt_neox": ("GPTNeoXForCausalLM", {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}),
    "opt": ("OPTForCausalLM", {"hidden_size": 96, "num_hidden_layers": 2, "ffn_dim": 200, "num_attention_heads": 4}),
    "bert": ("BertForMaskedLM", {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "t5": ("T5ForConditionalGeneration", {"d_model": 64, "num_layers": 3, "d_ff": 96, "vocab_size": 512}),
    "vit": ("ViTForImageClassification", {"hidden_size": 96, "num_hidden_layers": 2, "image_size": 64}),
}


def num_parameters(model_class: str, config) -> int:
    with torch.device("meta"):
        return getattr(transformers, model_class)(config).num_parameters()


@pytest.mark.parametrize("model_type", CHANGES)
def test_parameters_are_those_of_a_config_made_with_the_changes(model_type):
    model_class, changes = CHANGES[model_type]
    text = ",".join(f"{name}={value}" for name, value in changes.items())
    found = config_with(CONFIG_MAPPING[model_type](), text)
    direct = CONFIG_MAPPING[model_type](**changes)
    assert found.to_dict() == direct.to_dict()
    assert num_parameters(model_class, found) == num_parameters(model_class, direct)


def test_tiny_llama_has_its_1_1_billion_parameters():
    text = "hidden_size=2048,intermediate_size=5632,num_hidden_layers=22,num_attention_heads=32,num_key_value_heads=4"
    config = config_with(CONFIG_MAPPING["llama"](), text)
    assert config.head_dim == 64
    assert num_parameters("LlamaForCausalLM", config) == 1_100_048_384


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("n_inner=64", "n_inner", 64),
        ("scale_attn_weights=false", "scale_attn_weights", False),
        ("resid_pdrop=1e-1", "resid_pdrop", 0.1),
        ("resid_pdrop=0", "resid_pdrop", 0.0),
        (" n_embd = 8 , n_head=2", "hidden_size", 8),
        ("activation_function=relu", "activation_function", "relu"),
    ],
)
def test_values_are_read_as_what_they_replace(text, name, value):
    found = getattr(config_with(CONFIG_MAPPING["gpt2"](), text), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("n_embd", "not of the form"),
        ("n_embd=8,", "not of the form"),
        ("width=8", "there is no width"),
        ("n_embd=8.5", "no whole number"),
        ("resid_pdrop=much", "no number"),
        ("scale_attn_weights=perhaps", "neither true nor false"),
        ("n_embd=8,n_embd=16", "given twice"),
        ("n_embd=8,hidden_size=16", "given twice"),
        ("model_type=llama", "chosen by"),
        ("use_return_dict=1", "cannot be set"),
    ],
)
def test_what_does_not_fit_is_said(text, reason):
    with pytest.raises(ValueError, match=reason):
        config_with(CONFIG_MAPPING["gpt2"](), text)
