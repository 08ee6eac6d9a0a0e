"""The data of the headline runs: WikiText-2 in GPT-2's tokens, and CIFAR-10; made up where a rehearsal has none."""

import io
from typing import Any

import numpy as np
import torch
from common import Context
from tasks import DATA, Images, TokenBlocks, _toy_arrays, _toy_tokens, _vision_arrays


# What a rehearsal reads of real data.
REHEARSED_LINES = 300
REHEARSED_IMAGES = 256


def language_tokens(context: Context, vocabulary: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Return the tokens of WikiText-2's train and validation split, and where they are from.

    Args:
        context: Of the stage.
        vocabulary: Tokens that a toy model has; a rehearsal takes remainders.
    """
    if context.rehearse and not (DATA / "wikitext-2").exists():
        return _toy_tokens("train"), _toy_tokens("valid"), f"made up: there is no {DATA}"
    from tokenizers import ByteLevelBPETokenizer

    files = [str(DATA / "gpt2-tokenizer" / name) for name in ("vocab.json", "merges.txt")]
    tokenizer = ByteLevelBPETokenizer.from_file(*files)
    found = []
    for split in ("train", "valid"):
        lines = (DATA / "wikitext-2" / f"{split}.txt").read_text(encoding="utf-8").splitlines(keepends=True)
        if context.rehearse:
            lines = lines[:REHEARSED_LINES]
        ids = np.array([i for encoding in tokenizer.encode_batch(lines) for i in encoding.ids], dtype=np.uint16)
        found.append(ids % vocabulary if context.rehearse else ids)
    return *found, f"WikiText-2 from {DATA}" + (", its beginning" if context.rehearse else "")


def token_blocks(tokens: np.ndarray, length: int, limit: int | None = None) -> TokenBlocks:
    """Return blocks of so many tokens, at most `limit` of them."""
    return TokenBlocks(tokens if limit is None else tokens[: limit * length], length)


def images(context: Context, enlarged: int) -> tuple[dict[str, Any], str]:
    """Return pixels and labels of CIFAR-10 by split, and where they are from.

    Args:
        context: Of the stage.
        enlarged: How often each pixel is repeated in both directions.
    """
    if not context.rehearse:
        read, source = _vision_arrays, f"CIFAR-10 from {DATA}"
    elif (DATA / "cifar10").exists():
        read, source = _first_images, f"CIFAR-10 from {DATA}, its beginning"
    else:
        read, source = _toy_arrays, f"made up: there is no {DATA}"
    found = {}
    for split in ("train", "test"):
        pixels, labels = read(split)
        found[split] = pixels.repeat_interleave(enlarged, -1).repeat_interleave(enlarged, -2), labels
    return found, source


def _first_images(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    import pyarrow.parquet
    from PIL import Image

    file = pyarrow.parquet.ParquetFile(DATA / "cifar10" / f"{split}.parquet")
    rows = next(file.iter_batches(batch_size=REHEARSED_IMAGES)).to_pylist()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")) for row in rows])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor([row["label"] for row in rows])


def image_data(arrays: dict[str, Any], seed: int, evaluated: int) -> tuple[Images, Images]:
    """Return training images, mirrored by `seed`, and the first of the test images."""
    pixels, labels = arrays["test"]
    return Images(*arrays["train"], flip=True, seed=seed), Images(pixels[:evaluated], labels[:evaluated], flip=False)
