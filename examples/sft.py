#!/usr/bin/env python
"""Supervised fine-tuning with TRL's `SFTTrainer`, made efficient with the two mixins.

    pip install '.[examples]'
    python examples/sft.py   # a small model, under a minute, nothing is downloaded
    python examples/sft.py --model_name_or_path gpt2 --num_train_epochs 3

The loss is taken over completions only, so that micro-batches have different numbers of tokens: they are weighted by
them, in the gradient as in the noise scale, whatever k is. Flags: `--help`.
"""

from dataclasses import dataclass, field
from pydoc_data.topics import topics

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, set_seed
from trl import SFTConfig, SFTTrainer

from hf_trainopt import EfficientTrainerMixin, EfficientTrainingArgumentsMixin
from hf_trainopt.scripting import text_data
from hf_trainopt.scripting.parser import parse_script_arguments
from hf_trainopt.scripting.session import report_user_errors


@dataclass
class EfficientSFTConfig(EfficientTrainingArgumentsMixin, SFTConfig):
    """`SFTConfig` with our arguments."""


class EfficientSFTTrainer(EfficientTrainerMixin, SFTTrainer):
    """`SFTTrainer` with our parts."""


@dataclass
class SftArguments:
    """What is tuned."""

    _argument_group_name = "example"

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model to tune, a Hub name or a folder. Unset: a small GPT-2 without training."},
    )


def defaults(given):
    """Return small defaults; flags that are given win over them."""
    return {
        "output_dir": "outputs/sft",
        "max_length": 64,
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        # SFTConfig turns both on. Here precision is what the device does best, and memory has a plan of its own.
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
    }


def questions() -> Dataset:
    """Return prompts and completions: topics of the Python documentation, and the first paragraph of each."""
    rows = []
    for name, text in sorted(topics.items()):
        paragraphs = [part.strip() for part in text.split("\n\n") if len(part.strip()) > 60]
        if paragraphs:
            rows.append({"prompt": f"What does Python say of {name}?\n", "completion": paragraphs[0]})
    return Dataset.from_list(rows)


def main(argv: list[str] | None = None) -> EfficientSFTTrainer:
    """Run the example with `argv`, the command line unless given."""
    example, args = parse_script_arguments(
        (SftArguments, EfficientSFTConfig), defaults, argv, description=__doc__.splitlines()[0]
    )
    set_seed(args.seed)
    data = questions()
    if example.model_name_or_path is not None:
        tokenizer = AutoTokenizer.from_pretrained(example.model_name_or_path)
        model = AutoModelForCausalLM.from_pretrained(example.model_name_or_path)
    else:
        tokenizer = text_data.train_tokenizer([row["prompt"] + row["completion"] for row in data], 1024)
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=args.max_length, n_embd=64, n_layer=2, n_head=4, use_cache=False,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # GPT-2 names none, and Trainer would count a token too many in each row
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    trainer = EfficientSFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        first, last, _ = trainer.accumulation_range
        print(f"k went from {first} to {last}; model: {args.output_dir}")
    return trainer


if __name__ == "__main__":
    with report_user_errors():
        main()
