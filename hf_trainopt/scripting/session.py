"""What both scripts do around training: logging, the checks of the output folder, reaching the Hub."""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import transformers
from huggingface_hub import is_offline_mode
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import has_length

from hf_trainopt.placement import PlacementError
from hf_trainopt.reliability import (
    CheckpointError,
    TrainingDivergedError,
    TrainingInterrupted,
    TrainingTerminated,
    find_last_complete,
)
from hf_trainopt.reliability.resume import check_named, describe_skipped, last_checkpoint
from hf_trainopt.reliability.saving import make_output_dir


logger = logging.getLogger(__name__)

# Methods of `Trainer` within which nothing is set up any more.
LOOPS = ("_run_epoch", "evaluation_loop", "_finalize_training")
# What `train` raises, on all ranks, before it begins.
BEFORE_TRAINING = (PlacementError, CheckpointError)


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
    import datasets  # here, since programs that close a process group or report errors need none

    datasets.utils.logging.set_verbosity(level)
    # Its own handler has no time and level, and would write each line of the root's a second time.
    logging.getLogger("datasets").handlers.clear()
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_default_handler()
    transformers.utils.logging.enable_explicit_format()
    distributed = training_args.parallel_mode.value == "distributed"
    logger.warning(
        f"Process rank: {training_args.local_process_index}, device: {training_args.device}, "
        f"n_gpu: {training_args.n_gpu}, distributed training: {distributed}, "
        f"16-bits training: {training_args.mixed_precision in ('fp16', 'bf16')}"
    )
    logger.info(f"Training/evaluation parameters {training_args}")


def check_something_to_do(training_args: TrainingArguments) -> None:
    """Raise `ValueError` unless the user asked for training or evaluation, and for nothing that is not there."""
    if not (training_args.do_train or training_args.do_eval):
        raise ValueError("There is nothing to do: pass --do_train, --do_eval or both.")
    # Flyte alone is not among those that can be asked for.
    missing = set(training_args.report_to) - {"flyte", *get_available_reporting_integrations()}
    if missing:
        name = min(missing)
        raise ValueError(f"--report_to {name} needs a package that is not installed: install {name}, or pass another.")
    if training_args.push_to_hub and is_offline_mode():
        raise ValueError("--push_to_hub needs the Hub, but HF_HUB_OFFLINE is set: unset it, or leave the flag out.")


def check_counts(arguments: Any, *names: str) -> None:
    """Raise `ValueError` unless the flags of these names are unset or at least 1."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1, or leave it out.")


def check_one_source(arguments: Any, split: str, *names: str) -> None:
    """Raise `ValueError` if more than one of the flags of these names is set: only one of them would be read."""
    given = [f"--{name}" for name in names if getattr(arguments, name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} all name {split} data; leave all but one of them out.")


def checkpoint_to_resume(training_args: TrainingArguments) -> str | bool | None:
    """Return what `train` is to resume from: a checkpoint folder, `True`, or `None` to start from scratch.

    `--resume_from_checkpoint` is a folder, `True` (the last complete checkpoint in `output_dir`, which `train` looks
    for, as the machines of a run have to agree on it) or `False` (from scratch). A run never resumes by itself.

    Raises:
        ValueError: `output_dir` cannot be made, or holds a checkpoint and the flag is unset, or what is asked for is
            not there or not complete.
    """
    if training_args.should_save:
        make_output_dir(training_args.output_dir)  # as `Trainer` does, before data are loaded
    if not training_args.do_train:
        return None
    asked = training_args.resume_from_checkpoint
    asked = {"true": True, "false": False}.get(asked.lower(), asked) if isinstance(asked, str) else asked
    output_dir = training_args.output_dir
    if asked is True:
        last_checkpoint(output_dir)
        return True
    if asked:
        if not os.path.isdir(asked):
            raise ValueError(f"The checkpoint folder {asked} of --resume_from_checkpoint does not exist.")
        return check_named(asked).path
    last, passed_over = find_last_complete(output_dir)
    if last is not None and asked is None:
        raise ValueError(
            f"The output directory {output_dir} already holds {last.name}: pass --resume_from_checkpoint True to go "
            "on from it, --resume_from_checkpoint False to start from scratch, or another --output_dir."
        )
    if last is not None:
        logger.warning(f"Starting from scratch in {output_dir}, where older checkpoints stay until overwritten.")
    elif passed_over:
        logger.warning(
            f"Starting from scratch: {output_dir} has no complete checkpoint ({describe_skipped(passed_over)})."
        )
    return None


def train_and_evaluate(
    trainer: Trainer,
    checkpoint: str | bool | None,
    derive_metrics: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Do what `do_train` and `do_eval` ask for, and leave the files that the Hugging Face scripts leave.

    Args:
        trainer: its datasets are those asked for.
        checkpoint: what `checkpoint_to_resume` returned.
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
    """Turn what the user can mend inside the block into one line on stderr and exit code 2, for `__main__` only.

    That is a `PlacementError` or `CheckpointError`, or a `ValueError` or a missing package before the loops of
    training and evaluation: an error in one of those is nobody's flag, and keeps its traceback. Of several processes
    on one machine the first one speaks. `--log_level debug` shows the traceback of any. What ends training on purpose
    is said in one line too: a signal, for which the checkpoint is saved (exit code 143 after SIGTERM, 130 after
    Ctrl-C), and a loss that is not finite (1).
    """
    try:
        yield
        close_process_group()
    except (TrainingTerminated, TrainingInterrupted, TrainingDivergedError) as error:
        code = {TrainingTerminated: 143, TrainingInterrupted: 130}.get(type(error), 1)
        _end_in_one_line(getattr(error, "message", error), code, all_are_here=True)
    except (ValueError, ImportError) as error:
        trains = any(frame.name in LOOPS for frame in traceback.extract_tb(error.__traceback__))
        if trains and not isinstance(error, BEFORE_TRAINING):
            raise
        _end_in_one_line(f"error: {error}", 2, all_are_here=isinstance(error, BEFORE_TRAINING))


def _end_in_one_line(message: object, code: int, all_are_here: bool) -> NoReturn:
    logger.debug("The error was raised here:", exc_info=True)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        # At once: when another process ends first, the launcher stops this one.
        sys.stderr.write(f"{os.path.basename(sys.argv[0])}: {' '.join(str(message).split())}\n")
        sys.stderr.flush()
    if all_are_here:
        close_process_group()
    sys.exit(code)


def close_process_group() -> None:
    """Close the process group, if there is one: with gloo's threads alive, the exit may be an abort.

    Call it on all processes: they wait for one another.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
