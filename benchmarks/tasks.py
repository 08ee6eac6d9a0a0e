"""The small real tasks of the accumulation benchmarks: language (WikiText-2) and vision (CIFAR-10).

Sizes are chosen so that one run takes minutes on one CPU thread. Everything a run needs besides the arguments under
test (data, model, schedule) is here, so that stock `Trainer` and `EfficientTrainer` get exactly the same.
"""

import hashlib
import io
import os
import platform
import sysconfig
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch


REPOSITORY = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("HF_TRAINOPT_DATA", REPOSITORY.parent / "shared" / "data"))
CACHE = Path("/tmp/hf_trainopt_benchmarks")


@dataclass(frozen=True)
class Task:
    """What a run needs besides the arguments under test."""

    name: str
    micro_batch_size: int
    num_micro_batches: int
    training_arguments: dict[str, Any] = field(default_factory=dict)


LANGUAGE = Task(
    name="language",
    micro_batch_size=4,
    num_micro_batches=1000,
    training_arguments={
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "warmup_steps": 0.05,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "per_device_eval_batch_size": 32,
    },
)
VISION = Task(
    name="vision",
    micro_batch_size=16,
    num_micro_batches=2000,
    training_arguments={
        "weight_decay": 0.05,
        "max_grad_norm": 1.0,
        "warmup_steps": 0.05,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.01},
        "per_device_eval_batch_size": 100,
    },
)
# A task that no default was tuned on: a Llama-type net on the sources of Python's standard library.
CODE = replace(LANGUAGE, name="code")
# A larger net, for which rates are searched anew.
RESNET50 = replace(VISION, name="resnet50")
TASKS = {task.name: task for task in (LANGUAGE, VISION, CODE, RESNET50)}


def common_arguments(task: Task, output_dir: str) -> dict[str, Any]:
    """Return the `TrainingArguments` that all runs of `task` share: silent, on the CPU."""
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": task.micro_batch_size,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **task.training_arguments,
    }


class TokenBlocks(torch.utils.data.Dataset):
    """Non-overlapping blocks of `block_size` tokens; labels are the inputs (the model shifts them)."""

    def __init__(self, tokens: np.ndarray, block_size: int):
        num_blocks = len(tokens) // block_size
        self.blocks = torch.from_numpy(tokens[: num_blocks * block_size].astype(np.int64)).view(num_blocks, block_size)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


class Images(torch.utils.data.Dataset):
    """Normalised 32x32 images; `flip` mirrors every other draw, decided by (index, seed): no global RNG is used."""

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor, flip: bool, seed: int = 0):
        self.pixels, self.labels = pixels, labels
        self.flip = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed)) < 0.5 if flip else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pixels = self.pixels[index].float().div_(255.0).sub_(0.4734).div_(0.2516)
        if self.flip is not None and self.flip[index]:
            pixels = pixels.flip(-1)
        return {"pixel_values": pixels, "labels": self.labels[index]}


def _require(path: Path) -> Path:
    if not path.exists():
        raise SystemExit(
            f"{path} is not there: the benchmarks need WikiText-2 (wikitext-2/train.txt, valid.txt) and CIFAR-10 "
            "(cifar10/train.parquet, test.parquet with columns img and label) in a folder that HF_TRAINOPT_DATA names."
        )
    return path


def _language_tokens(split: str) -> np.ndarray:
    """Tokens of a WikiText-2 split under a byte-level BPE of 4,096 trained on the train split (cached)."""
    source = DATA / "wikitext-2"
    key = hashlib.sha256(_require(source / "train.txt").read_bytes()).hexdigest()[:12]
    path = CACHE / f"wikitext2-bpe4096-{key}-{split}.npy"
    if not path.exists():
        from tokenizers import ByteLevelBPETokenizer

        CACHE.mkdir(parents=True, exist_ok=True)
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train([str(source / "train.txt")], vocab_size=4096, min_frequency=2, show_progress=False)
        for name in ("train", "valid"):
            lines = (source / f"{name}.txt").read_text(encoding="utf-8").splitlines(keepends=True)
            ids = [i for encoding in tokenizer.encode_batch(lines) for i in encoding.ids]
            np.save(CACHE / f"wikitext2-bpe4096-{key}-{name}.npy", np.array(ids, dtype=np.uint16))
    return np.load(path)


def _code_tokens(split: str) -> np.ndarray:
    """Tokens of the standard library's sources under a byte-level BPE of 4,096; every 20th module is validation."""
    version = platform.python_version()
    path = CACHE / f"stdlib-{version}-bpe4096-{split}.npy"
    if not path.exists():
        from tokenizers import ByteLevelBPETokenizer

        CACHE.mkdir(parents=True, exist_ok=True)
        root = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(p for p in root.rglob("*.py") if not {"site-packages", "test", "tests"} & set(p.parts))
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
        parts = {"valid": texts[::20], "train": [text for i, text in enumerate(texts) if i % 20]}
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(parts["train"], vocab_size=4096, min_frequency=2, show_progress=False)
        for name, part in parts.items():
            ids = [i for encoding in tokenizer.encode_batch(part) for i in encoding.ids]
            np.save(CACHE / f"stdlib-{version}-bpe4096-{name}.npy", np.array(ids, dtype=np.uint16))
    return np.load(path)


def _vision_arrays(split: str, limit: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    path = CACHE / f"cifar10-{split}.npz"
    if not path.exists():
        import pyarrow.parquet
        from PIL import Image

        CACHE.mkdir(parents=True, exist_ok=True)
        table = pyarrow.parquet.read_table(_require(DATA / "cifar10" / f"{split}.parquet"))
        images = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["img"].to_pylist()]
        np.savez(path, pixels=np.stack(images), labels=np.array(table["label"].to_pylist()))
    arrays = np.load(path)
    pixels = torch.from_numpy(arrays["pixels"][:limit]).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.from_numpy(arrays["labels"][:limit]).long()


def _toy_tokens(split: str) -> np.ndarray:
    return np.random.default_rng(int(split == "train")).integers(0, 64, 300 * 128).astype(np.uint16)


def _toy_arrays(split: str, limit: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(int(split == "train"))
    labels = torch.randint(0, 10, (256,), generator=generator)
    return torch.randint(0, 256, (256, 3, 32, 32), generator=generator, dtype=torch.uint8), labels


def build(task: Task, seed: int, toy: bool = False) -> dict[str, Any]:
    """Return the `Trainer` keyword arguments of `task`: model (initialised from `seed`), datasets, metrics.

    Args:
        task: Which.
        seed: Of the weights and of the flips.
        toy: Random data in place of the real ones, and a smaller language model: to try the benchmarks themselves.
    """
    torch.manual_seed(seed)
    if task is LANGUAGE:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=4096, n_positions=128, n_embd=32 if toy else 160, n_layer=1 if toy else 4, n_head=4,
            use_cache=False,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
        # GPT-2 declares no loss type, so Trainer would count T labels a row although T-1 are predicted.
        model.loss_type = "ForCausalLM"
        tokens = _toy_tokens if toy else _language_tokens
        return {
            "model": model,
            "train_dataset": TokenBlocks(tokens("train"), 128),
            "eval_dataset": TokenBlocks(tokens("valid")[: 400 * 128], 128),
        }
    if task.name == "code":
        from transformers import LlamaConfig, LlamaForCausalLM

        width = 32 if toy else 144
        config = LlamaConfig(
            vocab_size=4096, max_position_embeddings=128, hidden_size=width, intermediate_size=8 * width // 3,
            num_hidden_layers=1 if toy else 4, num_attention_heads=4, num_key_value_heads=2, use_cache=False,
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        tokens = _toy_tokens if toy else _code_tokens
        return {
            "model": LlamaForCausalLM(config),
            "train_dataset": TokenBlocks(tokens("train"), 128),
            "eval_dataset": TokenBlocks(tokens("valid")[: 400 * 128], 128),
        }
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    config = TimmWrapperConfig(
        architecture="resnet50" if task.name == "resnet50" else "resnet18", num_labels=10, do_pooling=True
    )
    arrays = _toy_arrays if toy else _vision_arrays
    return {
        "model": TimmWrapperForImageClassification(config),
        "train_dataset": Images(*arrays("train"), flip=True, seed=seed),
        "eval_dataset": Images(*arrays("test", limit=2000), flip=False),
        "compute_metrics": lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    }
