"""Makes small models and data sets that stand in for those that the suites load from the Hub.

python benchmarks/peers/stand_ins.py DIR

They lie in DIR under the names that they have on the Hub (`trl-internal-testing/zen`, ...). transformers and datasets
take a folder of that name before they ask the Hub, so that suites which run in DIR need no network. Models have random
weights and no more than two layers; texts are sentences made here. Data with images, and models that read them, have
no stand-in: their tests fail with stock classes too, and are left out of the comparison.
"""

import json
import random
import sys
from pathlib import Path


SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS = {  # name -> model type, settings besides the sizes
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("llama", {}),
    "nickypro/tinyllama-15M": ("llama", {}),
    "openai-community/gpt2": ("gpt2", {"n_positions": 512, "n_embd": 16, "n_layer": 2, "n_head": 4}),
    "trl-internal-testing/tiny-Cohere2ForCausalLM": ("cohere2", {}),
    "trl-internal-testing/tiny-CohereForCausalLM": ("cohere", {}),
    "trl-internal-testing/tiny-GPTNeoXForCausalLM": ("gpt_neox", {}),
    "trl-internal-testing/tiny-Gemma2ForCausalLM": ("gemma2", {"head_dim": 4}),
    "trl-internal-testing/tiny-GemmaForCausalLM": ("gemma", {"head_dim": 4}),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("gpt_oss", {"head_dim": 4, **EXPERTS}),
    "trl-internal-testing/tiny-LlamaForCausalLM-3": ("llama", {}),
    "trl-internal-testing/tiny-LlamaForCausalLM-3.1": ("llama", {}),
    "trl-internal-testing/tiny-LlamaForCausalLM-3.2": ("llama", {}),
    "trl-internal-testing/tiny-MistralForCausalLM-0.1": ("mistral", {}),
    "trl-internal-testing/tiny-MistralForCausalLM-0.2": ("mistral", {}),
    "trl-internal-testing/tiny-Olmo3ForCausalLM": ("olmo3", {}),
    "trl-internal-testing/tiny-Phi3ForCausalLM": ("phi3", {"pad_token_id": 0}),
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5": ("qwen2", {}),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("qwen3", {"head_dim": 4}),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": ("qwen3_moe", {"head_dim": 4, **EXPERTS}),
}
TEMPLATES = {"gpt_oss": "gptoss", "llama": "llama3", "qwen2": "qwen2_5", "qwen3": "qwen3", "qwen3_moe": "qwen3"}
SPECIAL = ["<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ROWS = {"train": 17, "test": 2}


def make_models(folder: Path) -> None:
    """Save a model, its tokenizer and, where trl has one, the chat template of its family."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    try:
        import trl
    except ImportError:
        templates = None
    else:
        templates = Path(trl.__file__).parent / "chat_templates"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(SPECIAL + alphabet)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    for name, (kind, settings) in MODELS.items():
        torch.manual_seed(0)
        sizes = {"vocab_size": SIZES["vocab_size"]} if kind == "gpt2" else SIZES
        config = transformers.AutoConfig.for_model(kind, **sizes, **settings)
        config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 1
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / name)
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", eos_token="<|endoftext|>", additional_special_tokens=SPECIAL[2:]
        )
        if templates and kind in TEMPLATES:
            tokenizer.chat_template = (templates / f"{TEMPLATES[kind]}.jinja").read_text()
        tokenizer.save_pretrained(folder / name)


def make_data(folder: Path) -> None:
    """Save the data set `zen` in its formats, each a configuration of its own."""
    source = random.Random(0)

    def sentence() -> str:
        words = source.choices(("Simple", "is", "better", "than", "complex", "and", "flat", "beats", "nested"), k=6)
        return " ".join(words) + "."

    def said(role: str, text: str) -> dict:
        return {"role": role, "content": text}

    formats = {
        "standard_language_modeling": lambda a, b: {"text": f"{a} {b}"},
        "conversational_language_modeling": lambda a, b: {"messages": [said("user", a), said("assistant", b)]},
        "standard_prompt_completion": lambda a, b: {"prompt": a, "completion": f" {b}"},
        "conversational_prompt_completion": lambda a, b: {
            "prompt": [said("user", a)],
            "completion": [said("assistant", b)],
        },
        "standard_implicit_prompt_preference": lambda a, b: {"chosen": f"{a} {b}", "rejected": f"{a} {a}"},
    }
    zen = folder / "trl-internal-testing" / "zen"
    card = ["---", "configs:"]
    for name, make in formats.items():
        (zen / name).mkdir(parents=True, exist_ok=True)
        card += [f"- config_name: {name}", "  data_files:"]
        for split, rows in ROWS.items():
            lines = (json.dumps(make(sentence(), sentence())) for _ in range(rows))
            (zen / name / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
            card += [f"  - split: {split}", f"    path: {name}/{split}.jsonl"]
    (zen / "README.md").write_text("\n".join([*card, "---", ""]))


if __name__ == "__main__":
    where = Path(sys.argv[1])
    make_models(where)
    make_data(where)
