"""What both scripts do around training: logging, the checks of the output folder, reaching the Hub."""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import transformers
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint, has_length


logger = logging.getLogger(__name__)


def set_up_logging(training_args: TrainingArguments) -> None:
    """Log as the Hugging Face example scripts do: to stdout, INFO on the main process, one line per process."""
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
    )
    if training_args.should_log:
        # `log_level` is "passive" by default, which means the level of transformers: INFO makes that the default here.
        transformers.utils.logging.set_verbosity_info()
    level = training_args.get_process_log_level()
    for name in ("__main__", "hf_trainopt"):
        logging.getLogger(name).setLevel(level)
    datasets.utils.logging.set_verbosity(level)
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_default_handler()
    transformers.utils.logging.enable_explicit_format()
    distributed = training_args.parallel_mode.value == "distributed"
    logger.warning(
        f"Process rank: {training_args.local_process_index}, device: {training_args.device}, "
        f"n_gpu: {training_args.n_gpu}, distributed training: {distributed}, "
        f"16-bits training: {training_args.fp16 or training_args.bf16}"
    )
    logger.info(f"Training/evaluation parameters {training_args}")


def check_something_to_do(training_args: TrainingArguments) -> None:
    """Raise `ValueError` unless the user asked for training or evaluation."""
    if not (training_args.do_train or training_args.do_eval):
        raise ValueError("There is nothing to do: pass --do_train, --do_eval or both.")


def checkpoint_to_resume(training_args: TrainingArguments) -> str | None:
    """Return the checkpoint folder that training goes on from, or `None` to start from scratch.

    `--resume_from_checkpoint` is a folder, `True` (the last checkpoint in `output_dir`) or `False` (from scratch). A
    run never resumes by itself.

    Raises:
        ValueError: `output_dir` holds a checkpoint and the flag is unset, or the checkpoint asked for does not exist.
    """
    if not training_args.do_train:
        return None
    asked = training_args.resume_from_checkpoint
    asked = {"true": True, "false": False}.get(asked.lower(), asked) if isinstance(asked, str) else asked
    output_dir = training_args.output_dir
    last = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    if asked is True:
        if last is None:
            raise ValueError(
                f"--resume_from_checkpoint True found no checkpoint in the output directory {output_dir}."
            )
        return last
    if asked:
        if not os.path.isdir(asked):
            raise ValueError(f"The checkpoint folder {asked} of --resume_from_checkpoint does not exist.")
        return asked
    if last is not None and asked is None:
        raise ValueError(
            f"The output directory {output_dir} already holds {os.path.basename(last)}: pass "
            "--resume_from_checkpoint True to go on from it, --resume_from_checkpoint False to start from scratch, "
            "or another --output_dir."
        )
    if last is not None:
        logger.warning(f"Starting from scratch in {output_dir}, where older checkpoints stay until overwritten.")
    return None


@contextmanager
def hub_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever the Hub client raises inside the block into one `ValueError` of one sentence.

    Args:
        what: what was asked for, such as "The dataset wikitext".
        remedy: what to do instead, a clause without a full stop.
    """
    try:
        yield
    except OSError as error:
        # Connection errors, offline mode, unknown or private names: all subclasses of OSError.
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__
        raise ValueError(
            f"{what} was found neither on disk nor on the Hugging Face Hub ({type(error).__name__}: {reason[:200]}); "
            f"check the name and the network, or {remedy}."
        ) from error


def train_and_evaluate(
    trainer: Trainer, checkpoint: str | None, derive_metrics: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Do what `do_train` and `do_eval` ask for, and leave the files that the Hugging Face scripts leave.

    Args:
        trainer: its datasets are those asked for.
        checkpoint: folder to resume from.
        derive_metrics: called with the metrics of evaluation; returns some to add under their own names.

    Returns:
        The metrics of training and those of evaluation; empty for what was not asked for.
    """
    args, train_metrics, eval_metrics = trainer.args, {}, {}
    if args.do_train:
        train_metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model()
        if has_length(trainer.train_dataset):
            train_metrics["train_samples"] = len(trainer.train_dataset)
        trainer.log_metrics("train", train_metrics)
        trainer.save_metrics("train", train_metrics)
        trainer.save_state()
    if args.do_eval:
        logger.info("*** Evaluate ***")
        eval_metrics = trainer.evaluate()
        if has_length(trainer.eval_dataset):
            eval_metrics["eval_samples"] = len(trainer.eval_dataset)
        if derive_metrics is not None:
            eval_metrics |= derive_metrics(eval_metrics)
        trainer.log_metrics("eval", eval_metrics)
        trainer.save_metrics("eval", eval_metrics)
    return train_metrics, eval_metrics


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Turn a `ValueError` inside the block into its message on stderr and a non-zero exit, for `__main__` only.

    What is raised while training is nobody's flag: it keeps its traceback.
    """
    try:
        yield
    except ValueError as error:
        if any(frame.name == train_and_evaluate.__name__ for frame in traceback.extract_tb(error.__traceback__)):
            raise
        sys.exit(f"error: {error}")


def write_model_card(
    trainer: Trainer,
    *,
    task: str,
    finetuned_from: str | None = None,
    dataset: str | None = None,
    dataset_config: str | None = None,
) -> None:
    """Push the model to the Hub with its card if asked to, or write the card (`README.md`) beside the model."""
    card: dict[str, Any] = {"tasks": task}
    if finetuned_from is not None and not os.path.isdir(finetuned_from):
        card["finetuned_from"] = finetuned_from
    if dataset is not None:
        card["dataset_tags"] = dataset
        card["dataset"] = f"{dataset} {dataset_config}" if dataset_config else dataset
        if dataset_config is not None:
            card["dataset_args"] = dataset_config
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
