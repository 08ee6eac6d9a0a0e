#!/usr/bin/env python
"""Train or evaluate a causal language model with `EfficientTrainer`; flags as in the Hugging Face script `run_clm.py`.

    python run_clm.py                                   # a demo of two minutes: nothing is downloaded
    python run_clm.py --config gpt2.yaml --do_train     # flags from a file; those given win over it
    python run_clm.py --model_name_or_path gpt2 --dataset_name Salesforce/wikitext \\
        --dataset_config_name wikitext-2-raw-v1 --do_train --do_eval --output_dir outputs/gpt2
    torchrun --nproc_per_node 2 run_clm.py ...
"""

import logging
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)

from hf_trainopt import EfficientTrainer, EfficientTrainingArguments
from hf_trainopt.models.hub import hub_errors
from hf_trainopt.models.overrides import config_with
from hf_trainopt.scripting import text_data
from hf_trainopt.scripting.metrics import accuracy_of_next_tokens, perplexity_of_loss, predicted_classes
from hf_trainopt.scripting.parser import parse_script_arguments
from hf_trainopt.scripting.session import (
    check_counts,
    check_one_source,
    check_something_to_do,
    checkpoint_to_resume,
    report_user_errors,
    set_up_logging,
    train_and_evaluate,
    write_model_card,
)
from hf_trainopt.scripting.summary import print_summary


logger = logging.getLogger(__name__)

FULL_SIZE_COMMAND = (
    "python run_clm.py --model_type gpt2 --tokenizer_name gpt2",
    "--dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1",
    "--per_device_train_batch_size 8 --gradient_accumulation_steps 8 --learning_rate 6e-4 --warmup_steps 0.05",
    "--num_train_epochs 3 --do_train --do_eval --output_dir outputs/gpt2-wikitext2",
)


@dataclass
class ModelArguments:
    """Which model and tokenizer."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Weights to start from, a Hub name or a folder. Unset: train from scratch."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Model type for training from scratch, such as gpt2 (the default) or llama."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changes to the default config of a model type: n_embd=128,n_layer=4."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Config to train from scratch with, a Hub name or a folder."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, a Hub name or a folder. Unset: that of model_name_or_path."}
    )
    train_tokenizer_vocab_size: int | None = field(
        default=None, metadata={"help": "Train a byte-level BPE of this size on the training text instead."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Access token for the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code from the Hub on this machine."})
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = field(
        default=None, metadata={"help": "Type of the weights; with 'auto' or unset that of the checkpoint."}
    )

    def __post_init__(self):
        if self.config_overrides is not None and (self.config_name or self.model_name_or_path):
            raise ValueError(
                "--config_overrides cannot be used with --config_name or --model_name_or_path; leave one of them out."
            )
        if self.model_type is not None and self.model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"--model_type {self.model_type} is not a model type of transformers; give one such as gpt2."
            )
        if self.train_tokenizer_vocab_size is not None and (self.tokenizer_name or self.model_name_or_path):
            raise ValueError(
                "--train_tokenizer_vocab_size cannot be used with --tokenizer_name or --model_name_or_path; leave one "
                "of them out."
            )


@dataclass
class DataTrainingArguments:
    """Which text, and how it is cut."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None,
        metadata={"help": f"Hub name of a dataset, or '{text_data.DEMO_DATASET}': help topics that come with Python."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_file: str | None = field(default=None, metadata={"help": "Training text: txt, csv, json(l) or parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation text, in the same formats."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many blocks."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many blocks."})
    streaming: bool = field(default=False, metadata={"help": "Read the data while training; needs max_steps."})
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens per sample. Unset: what the model takes, at most 1024."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize anew instead of using cached results."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Percentage of the training text to validate on where there is no other."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes for tokenizing."})
    keep_linebreaks: bool = field(default=True, metadata={"help": "Keep line breaks of txt files."})

    def __post_init__(self):
        check_counts(self, "max_train_samples", "max_eval_samples", "preprocessing_num_workers")
        check_one_source(self, "training", "dataset_name", "train_file")
        check_one_source(self, "validation", "dataset_name", "validation_file")


def demo_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Return the flags of the demo if the user has named neither data, model nor task; given flags win over them."""
    named = {"do_train", "do_eval", "dataset_name", "train_file", "validation_file"}
    named |= {"model_name_or_path", "model_type", "config_name", "tokenizer_name"}
    if named & given.keys():
        return {}
    return {
        "do_train": True,
        "do_eval": True,
        "dataset_name": text_data.DEMO_DATASET,
        "train_tokenizer_vocab_size": 2048,
        "config_overrides": "n_embd=128,n_layer=4,n_head=4,n_positions=128,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0",
        "block_size": 128,
        "num_train_epochs": 6,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 16,
        "gradient_accumulation_steps": 4,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.1,
        "logging_steps": 20,
        "save_strategy": "no",
        "output_dir": "outputs/run_clm_demo",
    }


def hub_options(model_args: ModelArguments) -> dict[str, Any]:
    return {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }


def load_config(model_args: ModelArguments) -> PreTrainedConfig:
    """Return the config of the named model, or the default one of the model type."""
    name = model_args.config_name or model_args.model_name_or_path
    if name:
        with hub_errors(
            f"The model config {name} (--config_name, --model_name_or_path)",
            "pass a local folder, or --model_type to train from scratch",
        ):
            return AutoConfig.from_pretrained(name, **hub_options(model_args))
    config = CONFIG_MAPPING[model_args.model_type or "gpt2"]()
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"--model_type {model_args.model_type} has no causal language model; give one such as gpt2.")
    if model_args.config_overrides:
        try:
            config = config_with(config, model_args.config_overrides)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"--config_overrides {model_args.config_overrides} does not fit the config of {config.model_type} "
                f"({error}); give pairs of its names and values, such as n_embd=128,n_layer=4 for gpt2."
            ) from error
    return config


def load_tokenizer(
    model_args: ModelArguments, config: PreTrainedConfig, splits: dict[str, text_data.AnyDataset], column: str
) -> PreTrainedTokenizerBase:
    """Return the named tokenizer, or train one on the training text."""
    if model_args.train_tokenizer_vocab_size is not None:
        if "train" not in splits:
            raise ValueError("--train_tokenizer_vocab_size needs training text: pass --train_file.")
        texts = text_data.iterate_texts(splits["train"], column)
        return text_data.train_tokenizer(texts, model_args.train_tokenizer_vocab_size)
    name = model_args.tokenizer_name or model_args.model_name_or_path
    if name is None:
        raise ValueError(
            "There is no tokenizer: pass --tokenizer_name, or --train_tokenizer_vocab_size to train one on the text."
        )
    with hub_errors(
        f"The tokenizer {name} (--tokenizer_name)", "pass a local folder, or --train_tokenizer_vocab_size to train one"
    ):
        options = hub_options(model_args)
        if os.path.isdir(name) and not {"config.json", "tokenizer_config.json"} & set(os.listdir(name)):
            options["config"] = config  # bare vocabulary files do not say which tokenizer they are for
        return AutoTokenizer.from_pretrained(name, **options)


def load_model(
    model_args: ModelArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Return the pretrained model, or a new one with as many embeddings as the tokenizer has tokens."""
    dtype = model_args.dtype if model_args.dtype in ("auto", None) else getattr(torch, model_args.dtype)
    if model_args.model_name_or_path:
        name = model_args.model_name_or_path
        options = hub_options(model_args) | ({} if dtype is None else {"dtype": dtype})
        with hub_errors(f"The model {name}", "pass a local folder, or --model_type to train from scratch"):
            model = AutoModelForCausalLM.from_pretrained(name, config=config, **options)
    else:
        if "vocab_size=" not in (model_args.config_overrides or "") and not model_args.config_name:
            config.vocab_size = len(tokenizer)
            config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        options = {} if dtype in ("auto", None) else {"dtype": dtype}
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=model_args.trust_remote_code, **options)
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
            raise ValueError(
                f"A {config.model_type} with this config cannot be built ({error}); check --config_overrides "
                f"{model_args.config_overrides} and --config_name."
            ) from error
        logger.info(f"Training new model from scratch - Total size={model.num_parameters() / 1e6:.2f}M params")
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        logger.warning(
            "The model has fewer embeddings than the tokenizer has %d tokens: more are added.", len(tokenizer)
        )
        model.resize_token_embeddings(len(tokenizer))
    if getattr(model, "loss_type", None) is None:
        # GPT-2 and others declare no loss type. Trainer would then count T labels in a row of which T-1 are predicted,
        # and losses would come out (T-1)/T too small.
        model.loss_type = "ForCausalLM"
    return model


def run(model_args: ModelArguments, data_args: DataTrainingArguments, training_args: EfficientTrainingArguments):
    """Train and evaluate; returns the Trainer, the training metrics and the evaluation metrics."""
    check_something_to_do(training_args)
    checkpoint = checkpoint_to_resume(training_args)
    if data_args.streaming and training_args.do_train and training_args.max_steps <= 0:
        raise ValueError("--streaming needs --max_steps: a stream has no known length.")
    set_seed(training_args.seed)

    config = load_config(model_args)
    with training_args.main_process_first(desc="loading and tokenizing the text"):
        splits = text_data.load_text_datasets(
            dataset_name=data_args.dataset_name,
            dataset_config_name=data_args.dataset_config_name,
            train_file=data_args.train_file,
            validation_file=data_args.validation_file,
            validation_split_percentage=data_args.validation_split_percentage,
            keep_linebreaks=data_args.keep_linebreaks,
            streaming=data_args.streaming,
            cache_dir=model_args.cache_dir,
            token=model_args.token,
        )
        wanted = {"train": training_args.do_train, "validation": training_args.do_eval}
        for name in (name for name, needed in wanted.items() if needed and name not in splits):
            raise ValueError(f"There is no {name} split: pass --{name}_file or another --dataset_name.")
        columns = {name: text_data.text_column(split, name) for name, split in splits.items()}
        tokenizer = load_tokenizer(model_args, config, splits, columns.get("train", ""))
        max_positions = getattr(config, "max_position_embeddings", None)
        block_size = text_data.resolve_block_size(data_args.block_size, tokenizer, max_positions)
        blocks = {
            name: text_data.tokenize_and_group(
                splits[name],
                tokenizer,
                columns[name],
                block_size,
                name=name,
                num_workers=data_args.preprocessing_num_workers,
                overwrite_cache=data_args.overwrite_cache,
            )
            for name, needed in wanted.items()
            if needed
        }
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    blocks = {name: text_data.limit_rows(split, limits[name]) for name, split in blocks.items()}

    trainer = EfficientTrainer(
        model=load_model(model_args, config, tokenizer),
        args=training_args,
        train_dataset=blocks.get("train"),
        eval_dataset=blocks.get("validation"),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=accuracy_of_next_tokens,
        preprocess_logits_for_metrics=predicted_classes,
    )
    train_metrics, eval_metrics = train_and_evaluate(trainer, checkpoint, perplexity_of_loss)
    write_model_card(
        trainer,
        task="text-generation",
        finetuned_from=model_args.model_name_or_path,
        dataset=data_args.dataset_name,
        dataset_config=data_args.dataset_config_name,
    )
    return trainer, train_metrics, eval_metrics


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the script with `argv` (the command line unless given) and return all metrics.

    Raises:
        ValueError: flags or data that cannot be used; the message says what to do.
    """
    model_args, data_args, training_args = parse_script_arguments(
        (ModelArguments, DataTrainingArguments, EfficientTrainingArguments),
        demo_defaults,
        argv,
        description="Train or evaluate a causal language model.",
    )
    set_up_logging(training_args)
    trainer, train_metrics, eval_metrics = run(model_args, data_args, training_args)
    is_demo = data_args.dataset_name == text_data.DEMO_DATASET
    print_summary(trainer, train_metrics, eval_metrics, FULL_SIZE_COMMAND if is_demo else ())
    return train_metrics | eval_metrics


if __name__ == "__main__":
    with report_user_errors():
        main()
