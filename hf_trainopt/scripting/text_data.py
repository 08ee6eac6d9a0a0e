"""Text for causal language modelling: loading, a tokenizer of one's own, blocks of equal length."""

from . import _required  # noqa: F401


# isort: split
import logging
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_trainopt.models.hub import hub_errors

from .files import file_errors


logger = logging.getLogger(__name__)

FILE_FORMATS = {"txt": "text", "csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}
DEMO_DATASET = "python-docs"
END_OF_TEXT = "<|endoftext|>"
LONGEST_DEFAULT_BLOCK = 1024

AnyDataset = Dataset | IterableDataset


def load_text_datasets(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
    validation_split_percentage: int = 5,
    keep_linebreaks: bool = True,
    streaming: bool = False,
    cache_dir: str | None = None,
    token: str | None = None,
) -> dict[str, AnyDataset]:
    """Load the splits "train" and "validation" from the Hub or from local files; `"python-docs"` is the demo text.

    Where there is training text only, its first `validation_split_percentage` percent (while streaming: that many of
    every 100 rows) become the validation split.

    Raises:
        ValueError: nothing is named, a file is missing or of an unknown kind, or the Hub cannot be reached.
    """
    if not 0 < validation_split_percentage < 100:
        raise ValueError(
            f"--validation_split_percentage must lie between 0 and 100, not {validation_split_percentage}."
        )
    if dataset_name == DEMO_DATASET:
        splits = dict(load_demo_text())
        if streaming:
            splits = {name: split.to_iterable_dataset() for name, split in splits.items()}
    elif dataset_name is not None:
        remedy = "pass local files with --train_file and --validation_file"
        with hub_errors(f"The dataset {dataset_name} (--dataset_name)", remedy):
            loaded = load_dataset(
                dataset_name, dataset_config_name, cache_dir=cache_dir, token=token, streaming=streaming
            )
        splits = {name: loaded[name] for name in ("train", "validation") if name in loaded}
    elif train_file is not None or validation_file is not None:
        files = {"train": train_file, "validation": validation_file}
        splits = {
            name: _load_text_file(f"--{name}_file", file, keep_linebreaks, streaming, cache_dir)
            for name, file in files.items()
            if file
        }
    else:
        raise ValueError("There are no data: pass --dataset_name, --train_file or --validation_file.")
    if "train" in splits and "validation" not in splits:
        splits["validation"], splits["train"] = split_off_validation(splits["train"], validation_split_percentage)
    return splits


def _load_text_file(flag: str, file: str, keep_linebreaks: bool, streaming: bool, cache_dir: str | None) -> AnyDataset:
    path = Path(file)
    file_format = FILE_FORMATS.get(path.suffix.removeprefix("."))
    if file_format is None:
        known = ", ".join("." + name for name in FILE_FORMATS)
        raise ValueError(f"{flag}: the file {file} must end in one of: {known}.")
    if path.is_dir():
        raise ValueError(f"{flag}: {file} is a folder; name a file.")
    if not path.is_file():
        raise ValueError(f"{flag}: the file {file} does not exist; check the path.")
    if path.stat().st_size == 0:
        raise ValueError(f"{flag}: the file {file} is empty; name one with text.")
    options = {"keep_linebreaks": keep_linebreaks} if file_format == "text" else {}
    with file_errors(flag, file):
        return load_dataset(
            file_format, data_files=str(path), split="train", streaming=streaming, cache_dir=cache_dir, **options
        )


def split_off_validation(dataset: AnyDataset, percentage: int) -> tuple[AnyDataset, AnyDataset]:
    """Split `dataset` into `(validation, rest)`.

    Raises:
        ValueError: one of the two would be empty.
    """
    if isinstance(dataset, IterableDataset):
        # A stream has no known length: rows are dealt out by their number, so both sides see all of the stream.
        validation = dataset.filter(lambda _, index: index % 100 < percentage, with_indices=True)
        return validation, dataset.filter(lambda _, index: index % 100 >= percentage, with_indices=True)
    num_validation = round(len(dataset) * percentage / 100)
    if not 0 < num_validation < len(dataset):
        raise ValueError(
            f"{percentage} % of {len(dataset)} rows cannot be split off for validation: pass --validation_file or "
            "another --validation_split_percentage."
        )
    return dataset.select(range(num_validation)), dataset.select(range(num_validation, len(dataset)))


def load_demo_text() -> DatasetDict:
    """Return the help topics of the Python language, which ship with every Python: every tenth is for validation."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    validation = texts[::10]
    train = [text for index, text in enumerate(texts) if index % 10]
    return DatasetDict(
        train=Dataset.from_dict({"text": train}),
        validation=Dataset.from_dict({"text": validation}),
    )


def text_column(dataset: AnyDataset, name: str) -> str:
    """Return the column "text", or the first column where there is none.

    Raises:
        ValueError: that column does not hold strings.
    """
    columns = dataset.column_names
    row = next(iter(dataset), None) if columns is None else None
    columns = columns or list(row or {})
    if not columns:
        raise ValueError(f"The {name} split has no rows: pass another --{name}_file or --dataset_name.")
    column = "text" if "text" in columns else columns[0]
    features = dataset.features
    if features is not None and getattr(features[column], "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"The column {column} of the {name} split does not hold text; give the texts a column named 'text' (those "
            f"of the --{name}_file or --dataset_name are {', '.join(columns)})."
        )
    return column


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: any text can be encoded, nothing is unknown. The same texts give the same tokenizer.

    Raises:
        ValueError: `vocab_size` has no room for the 256 bytes and the end-of-text token.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(f"--train_tokenizer_vocab_size must be above {len(alphabet)}, not {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def iterate_texts(dataset: AnyDataset, column: str, max_rows: int | None = None) -> Iterator[str]:
    """Yield the strings of `column`."""
    for row in islice(dataset, max_rows):
        yield row[column]


def resolve_block_size(asked: int | None, tokenizer: PreTrainedTokenizerBase, max_positions: int | None) -> int:
    """Return the number of tokens per row: `asked`, or what model and tokenizer can take, at most 1024.

    Raises:
        ValueError: `asked` is below 2 or above the positions that the model has.
    """
    if asked is None:
        block_size = min(tokenizer.model_max_length, max_positions or LONGEST_DEFAULT_BLOCK, LONGEST_DEFAULT_BLOCK)
        logger.info(f"Using blocks of {block_size} tokens; change it with --block_size.")
        return block_size
    if asked < 2:
        raise ValueError(f"--block_size must be at least 2 (one token to read and one to predict), not {asked}.")
    if max_positions is not None and asked > max_positions:
        raise ValueError(f"--block_size {asked} is more than the {max_positions} positions of the model; lower it.")
    if asked > tokenizer.model_max_length:
        logger.warning(
            f"The block_size passed ({asked}) is larger than the maximum length for the model "
            f"({tokenizer.model_max_length}). Using block_size={tokenizer.model_max_length}."
        )
    return min(asked, tokenizer.model_max_length)


def tokenize_and_group(
    dataset: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    column: str,
    block_size: int,
    *,
    name: str,
    num_workers: int | None = None,
    overwrite_cache: bool = False,
) -> AnyDataset:
    """Tokenize `dataset` and cut it into rows of `block_size` tokens with `labels` equal to `input_ids`.

    Texts are joined 1000 rows at a time, as in the Hugging Face script; what is left of each 1000 is dropped. The
    model shifts the labels.

    Raises:
        ValueError: not one block could be filled.
    """

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        # Rows may be longer than the model takes: they are cut into blocks afterwards, so no warning.
        return dict(tokenizer(rows[column], verbose=False))

    def group(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {key: list(chain.from_iterable(rows[key])) for key in rows}
        total = len(joined["input_ids"]) // block_size * block_size
        blocks = {key: [ids[i : i + block_size] for i in range(0, total, block_size)] for key, ids in joined.items()}
        return {**blocks, "labels": [block.copy() for block in blocks["input_ids"]]}

    if isinstance(dataset, IterableDataset):
        columns = dataset.column_names or list(next(iter(dataset)))
        grouped = dataset.map(tokenize, batched=True, remove_columns=columns).map(group, batched=True)
        if next(iter(grouped), None) is None:
            raise ValueError(_too_short(name, block_size))
        return grouped
    options = {"batched": True, "num_proc": num_workers, "load_from_cache_file": not overwrite_cache}
    tokenized = dataset.map(
        tokenize, remove_columns=dataset.column_names, desc=f"Running tokenizer on the {name} split", **options
    )
    grouped = tokenized.map(group, desc=f"Grouping the {name} split in blocks of {block_size}", **options)
    if len(grouped) == 0:
        raise ValueError(_too_short(name, block_size))
    return grouped


def _too_short(name: str, block_size: int) -> str:
    return (
        f"The {name} split is too short to fill one block of {block_size} tokens: pass a smaller --block_size, or "
        "more text."
    )


def limit_rows(dataset: AnyDataset, max_rows: int | None) -> AnyDataset:
    """Return the first `max_rows` rows of `dataset`, or all of them."""
    if max_rows is None:
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.take(max_rows)
    return dataset.select(range(min(len(dataset), max_rows)))
