#!/usr/bin/env python
"""Fine-tune a causal language model with LoRA (PEFT) and adaptive gradient accumulation; a memory budget is a flag.

    pip install '.[examples]'
    python examples/lora.py  # a small model, under a minute, nothing is downloaded
    python examples/lora.py --model_name_or_path gpt2 --train_file my.txt --block_size 512 --memory_budget 75%

Nothing in it is special to LoRA: `EfficientTrainer` takes a `PeftModel` as `Trainer` does. Flags: `--help`.
"""

from dataclasses import dataclass, field

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    default_data_collator,
    set_seed,
)

from hf_trainopt import EfficientTrainer, EfficientTrainingArguments
from hf_trainopt.scripting import text_data
from hf_trainopt.scripting.parser import parse_script_arguments
from hf_trainopt.scripting.session import report_user_errors


@dataclass
class LoraArguments:
    """What is tuned, on what."""

    _argument_group_name = "example"

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model to tune, a Hub name or a folder. Unset: a small GPT-2 without training."},
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Text to tune on. Unset: help topics that come with Python."}
    )
    block_size: int = field(default=64, metadata={"help": "Tokens per sample."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of the adapters."})


def defaults(given):
    """Return small defaults; flags that are given win over them."""
    return {
        "output_dir": "outputs/lora",
        "max_steps": 30,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,  # the reference: the budget, the schedule and the intervals count in it
        "learning_rate": 5e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
    }


def load(example: LoraArguments):
    """Return the model that is tuned and its tokenizer, and the text."""
    texts = text_data.load_demo_text()["train"]
    if example.train_file is not None:
        texts = text_data.load_text_datasets(train_file=example.train_file)["train"]
    if example.model_name_or_path is not None:
        tokenizer = AutoTokenizer.from_pretrained(example.model_name_or_path)
        return AutoModelForCausalLM.from_pretrained(example.model_name_or_path), tokenizer, texts
    tokenizer = text_data.train_tokenizer(texts["text"], 1024)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=example.block_size, n_embd=64, n_layer=2, n_head=4, use_cache=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return GPT2LMHeadModel(config), tokenizer, texts


def main(argv: list[str] | None = None) -> EfficientTrainer:
    """Run the example with `argv`, the command line unless given."""
    example, args = parse_script_arguments(
        (LoraArguments, EfficientTrainingArguments), defaults, argv, description=__doc__.splitlines()[0]
    )
    set_seed(args.seed)
    model, tokenizer, texts = load(example)
    model.loss_type = "ForCausalLM"  # GPT-2 names none, and Trainer would count a token too many in each row
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=example.lora_rank, target_modules="all-linear")
    )
    adapted.print_trainable_parameters()
    blocks = text_data.tokenize_and_group(texts, tokenizer, "text", example.block_size, name="train")

    trainer = EfficientTrainer(
        model=adapted, args=args, train_dataset=blocks, processing_class=tokenizer, data_collator=default_data_collator
    )
    trainer.train()
    trainer.save_model()  # the adapters alone
    if trainer.is_world_process_zero():
        first, last, _ = trainer.accumulation_range
        print(f"k went from {first} to {last}; adapters: {args.output_dir}")
    return trainer


if __name__ == "__main__":
    with report_user_errors():
        main()
