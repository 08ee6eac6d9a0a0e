"""Images for classification: loading, class names, timm transforms whose random draws can be replayed, mixup."""

from . import _required  # noqa: F401


# isort: split
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, load_dataset
from timm.data import Mixup, create_transform
from timm.data.mixup import one_hot
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from hf_trainopt.models.hub import hub_errors

from .files import file_errors


logger = logging.getLogger(__name__)

DEMO_DATASET = "digits"
FILE_FORMATS = {"csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels")
PIXEL_MODES = {1: "L", 3: "RGB"}


# ---- Loading -----------------------------------------------------------------------------------------------------


def load_image_datasets(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_dir: str | None = None,
    validation_dir: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
    image_column: str | None = None,
    validation_split_name: str = "validation",
    train_val_split: float = 0.15,
    seed: int = 42,
    cache_dir: str | None = None,
    token: str | None = None,
) -> dict[str, Dataset]:
    """Load the splits "train" and "validation" from the Hub, from folders or from files; `"digits"` is the demo data.

    Where there are training images only, a share of `train_val_split` of them, drawn with `seed`, becomes the
    validation split.

    Raises:
        ValueError: nothing is named, a path is missing or of an unknown kind, or the Hub cannot be reached.
    """
    if not 0 < train_val_split < 1:
        raise ValueError(f"--train_val_split must lie between 0 and 1, not {train_val_split}.")
    paths = {"train": train_dir or train_file, "validation": validation_dir or validation_file}
    if dataset_name == DEMO_DATASET:
        return load_demo_images()
    if dataset_name is not None:
        remedy = "pass local images with --train_dir or --train_file"
        with hub_errors(f"The dataset {dataset_name} (--dataset_name)", remedy):
            loaded = load_dataset(dataset_name, dataset_config_name, cache_dir=cache_dir, token=token)
        if validation_split_name != "validation" and validation_split_name not in loaded:
            raise ValueError(
                f"The dataset {dataset_name} has no split {validation_split_name}; choose --validation_split_name "
                f"from {', '.join(loaded)}."
            )
        names = {"train": "train", "validation": validation_split_name}
        splits = {key: loaded[name] for key, name in names.items() if name in loaded}
    elif any(paths.values()):
        flags = {"train": "--train_dir" if train_dir else "--train_file"}
        flags["validation"] = "--validation_dir" if validation_dir else "--validation_file"
        splits = {name: _load_path(flags[name], path, image_column, cache_dir) for name, path in paths.items() if path}
    else:
        raise ValueError(
            "There are no data: pass --dataset_name, --train_dir or --train_file (or those of validation)."
        )
    if "train" in splits and "validation" not in splits:
        halves = splits["train"].train_test_split(test_size=train_val_split, seed=seed)
        splits = {"train": halves["train"], "validation": halves["test"]}
    return splits


def _load_path(flag: str, path: str, image_column: str | None, cache_dir: str | None) -> Dataset:
    if os.path.isdir(path):
        # A metadata file brings the labels itself; otherwise they are the names of the folders, even of a single one.
        has_metadata = any(Path(path).glob("**/metadata.*"))
        options = {} if has_metadata else {"drop_labels": False}
        try:
            return load_dataset(
                "imagefolder", data_files=os.path.join(path, "**"), split="train", cache_dir=cache_dir, **options
            )
        except (FileNotFoundError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise ValueError(
                f"{flag}: the folder {path} holds no images; it needs one folder of images per class."
            ) from error
    file_format = FILE_FORMATS.get(Path(path).suffix.removeprefix("."))
    if file_format is None:
        known = ", ".join("." + name for name in FILE_FORMATS)
        raise ValueError(f"{flag}: {path} is neither a folder of images nor a file that ends in one of: {known}.")
    if not os.path.isfile(path):
        raise ValueError(f"{flag}: the file {path} does not exist; check the path.")
    with file_errors(flag, path):
        dataset = load_dataset(file_format, data_files=path, split="train", cache_dir=cache_dir)
    column = find_image_column(dataset, image_column)
    if getattr(dataset.features[column], "dtype", None) in ("string", "large_string"):
        folder = Path(path).parent
        dataset = dataset.map(lambda row: {column: str(folder / row[column])}, desc="Resolving image paths")
    if not isinstance(dataset.features[column], datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image())
    return dataset


def load_demo_images() -> dict[str, Dataset]:
    """Return the 1797 scanned digits (8x8, grey) that ship with scikit-learn: every fifth is for validation."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    # The scans have 17 levels of grey.
    images = [Image.fromarray(pixels) for pixels in np.rint(digits.images * (255 / 16)).astype(np.uint8)]
    labels = digits.target.tolist()
    features = datasets.Features({"image": datasets.Image(), "label": ClassLabel(names=[str(n) for n in range(10)])})
    rows = {"train": [i for i in range(len(labels)) if i % 5], "validation": list(range(0, len(labels), 5))}
    return {
        name: Dataset.from_dict(
            {"image": [images[i] for i in chosen], "label": [labels[i] for i in chosen]}, features=features
        )
        for name, chosen in rows.items()
    }


# ---- Columns and classes -----------------------------------------------------------------------------------------


def find_image_column(dataset: Dataset, name: str | None) -> str:
    """Return the column `name`, or without one "image", "img" or the only column of images.

    Raises:
        ValueError: there is no such column.
    """
    by_type = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    return _find_column(dataset, name, IMAGE_COLUMNS, by_type, "--image_column_name")


def find_label_column(dataset: Dataset, name: str | None) -> str:
    """Return the column `name`, or without one "label", "labels" or the only column of classes.

    Raises:
        ValueError: there is no such column.
    """
    by_type = [column for column, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    return _find_column(dataset, name, LABEL_COLUMNS, by_type, "--label_column_name")


def _find_column(dataset: Dataset, name: str | None, usual: Sequence[str], by_type: Sequence[str], flag: str) -> str:
    if name is not None:
        if name not in dataset.column_names:
            raise ValueError(f"There is no column {name}: choose {flag} from {', '.join(dataset.column_names)}.")
        return name
    found = next((column for column in usual if column in dataset.column_names), None)
    if found is None and len(by_type) == 1:
        found = by_type[0]
    if found is None:
        raise ValueError(f"Pass {flag}: it cannot be told from the columns {', '.join(dataset.column_names)}.")
    return found


def class_names(dataset: Dataset, column: str) -> list[str]:
    """Return the names of the classes in the order of their numbers; numbers or strings in a file are their own names.

    Raises:
        ValueError: there are fewer than two classes, or the column holds neither integers nor strings.
    """
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    else:
        values = set(dataset[column])
        if not all(isinstance(value, int | str) for value in values):
            raise ValueError(
                f"The label column {column} must hold integers or strings, without gaps: mend it, or choose another "
                "with --label_column_name."
            )
        names = [str(value) for value in sorted(values, key=lambda value: (isinstance(value, str), value))]
    if len(names) < 2:
        raise ValueError(
            f"The label column {column} has {len(names)} class(es), and classification needs two: put the images of "
            "each class into a folder of their own, or choose another column with --label_column_name."
        )
    return names


def class_indices(dataset: Dataset, column: str, names: Sequence[str]) -> list[int]:
    """Return the class of each row as its position in `names`: splits may number their classes differently.

    Raises:
        ValueError: a row has a class that is not in `names`.
    """
    feature, positions = dataset.features[column], {name: i for i, name in enumerate(names)}
    if isinstance(feature, ClassLabel):
        by_value = {i: positions.get(name) for i, name in enumerate(feature.names)}
        indices = [by_value.get(value) for value in dataset[column]]
    else:
        indices = [positions.get(str(value)) for value in dataset[column]]
    if None in indices:
        row = indices.index(None)
        raise ValueError(
            f"Row {row} of the column {column} has the class {dataset[column][row]}, which is none of the model's: "
            f"{', '.join(list(names)[:20])}{', ...' if len(names) > 20 else ''}."
        )
    return indices


def choose_classes(data_names: list[str], model_names: list[str], for_training: bool) -> list[str]:
    """Return the class names that labels are numbered by: those of the data for training, else the model's.

    Raises:
        ValueError: the data to evaluate on have classes that the model has not.
    """
    if for_training:
        return data_names
    if set(data_names) <= set(model_names):
        return model_names
    if len(data_names) != len(model_names):
        raise ValueError(
            f"The model has {len(model_names)} classes and the data have {len(data_names)} others; evaluate on data "
            "with the classes that it was trained on."
        )
    logger.warning("The classes of the data have other names than the model's: taken to be in the same order.")
    return data_names


# ---- Transforms and replayable randomness ------------------------------------------------------------------------


def resolve_data_config(
    pretrained_cfg: dict[str, Any],
    *,
    image_size: int | None = None,
    crop_pct: float | None = None,
    num_channels: int = 3,
) -> dict[str, Any]:
    """Return timm's data configuration (size, mean, ...), as in `timm.data.resolve_data_config`, with overrides.

    Raises:
        ValueError: a size or share that cannot be, or a number of channels other than 1 or 3.
    """
    from timm.data import resolve_data_config as resolve

    if num_channels not in PIXEL_MODES:
        raise ValueError(f"in_chans of --model_args must be 1 (grey) or 3 (RGB), not {num_channels}.")
    if image_size is not None and image_size < 1:
        raise ValueError(f"--image_size must be positive, not {image_size}.")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"--crop_pct must lie above 0 and not above 1, not {crop_pct}.")
    config = resolve({"crop_pct": crop_pct}, pretrained_cfg=pretrained_cfg)
    size = config["input_size"][-2:] if image_size is None else (image_size, image_size)
    config["input_size"] = (num_channels, *size)
    if num_channels == 1:
        config["mean"], config["std"] = ((float(np.mean(config[key])),) for key in ("mean", "std"))
    return config


def create_transforms(data_config: dict[str, Any], **augmentation: Any) -> tuple[Callable, Callable]:
    """Return timm's transforms `(train, evaluation)`; `augmentation` are arguments of `timm.data.create_transform`.

    Raises:
        ValueError: timm knows no such `auto_augment`.
    """
    try:
        training = create_transform(**data_config, is_training=True, **augmentation)
    except (AssertionError, ValueError) as error:
        policy = augmentation.get("auto_augment")
        if policy is None:
            raise
        raise ValueError(
            f"--auto_augment {policy} isn't a timm policy ({error}); give one such as rand-m9-mstd0.5 or original."
        ) from error
    return training, create_transform(**data_config, is_training=False)


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Let every global random generator on the CPU draw from `entropy` inside the block, and as before after it."""
    # timm and torchvision draw from all three.
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    # Not `torch.manual_seed`, which would seed accelerators, too.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


class ImageDataset(torch.utils.data.Dataset):
    """Transformed images with their classes: `{"pixel_values": tensor, "labels": int}`.

    With an `augmentation_seed` the random draws of row i in epoch e depend on (seed, e, i) only, and those of `mixup`
    on (seed, e, rows of the batch): not on the number of workers, nor on what was drawn before, so that a resumed run
    sees the images of an uninterrupted one.

    Args:
        dataset: images in `image_column`.
        image_column: its name.
        labels: class of each row.
        transform: makes a tensor of an image.
        num_channels: 3 for RGB, 1 for grey.
        augmentation_seed: makes the random draws of `transform` replayable.
        mixup: mixes the images of a batch; labels become shares of each class. Needs `augmentation_seed`.
    """

    def __init__(
        self,
        dataset: Dataset,
        image_column: str,
        labels: Sequence[int],
        transform: Callable,
        *,
        num_channels: int = 3,
        augmentation_seed: int | None = None,
        mixup: Mixup | None = None,
    ):
        self.images = dataset.select_columns([image_column])
        self.image_column = image_column
        self.labels = labels
        self.transform = transform
        self.mode = PIXEL_MODES[num_channels]
        self.augmentation_seed = augmentation_seed
        self.mixup = mixup
        # In shared memory: dataloader workers may outlive an epoch and would not see a plain attribute change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the draws of an epoch, in this process and in running dataloader workers."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self._image(index)
        if self.augmentation_seed is None:
            return {"pixel_values": self.transform(image), "labels": self.labels[index]}
        with seeded(self.augmentation_seed, int(self._epoch), index):
            return {"pixel_values": self.transform(image), "labels": self.labels[index]}

    def _image(self, index: int) -> Any:
        try:
            return self.images[index][self.image_column].convert(self.mode)
        except (OSError, AttributeError) as error:
            raise ValueError(
                f"The image in row {index} (column {self.image_column}) cannot be read ({error}); mend or remove it, "
                "or choose another column with --image_column_name."
            ) from error

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Rows of one batch; the DataLoader asks for them all at once. Mixing cannot wait for the collator, which
        evaluation shares."""
        rows = [self[index] for index in indices]
        if self.mixup is None:
            return rows
        pixels = torch.stack([row["pixel_values"] for row in rows])
        labels = torch.tensor([row["labels"] for row in rows])
        shares = one_hot(labels, self.mixup.num_classes)
        # timm mixes a batch with itself reversed and wants an even number: an odd last row stays as it is.
        paired = len(rows) // 2 * 2
        if paired:
            with seeded(self.augmentation_seed, int(self._epoch), *indices):
                pixels[:paired], shares[:paired] = self.mixup(pixels[:paired].clone(), labels[:paired])
        return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, shares, strict=True)]


class EpochCallback(TrainerCallback):
    """Tells an `ImageDataset` the epoch: accelerate does so in single-process training only."""

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))


class SoftLabelLoss:
    """Cross-entropy for class numbers and soft labels alike, to be set as `model.loss_function`.

    The loss of transformers takes labels that are not integers for several classes per image.
    """

    def __init__(self, label_smoothing: float = 0.0):
        self.label_smoothing = label_smoothing

    def __call__(self, labels: torch.Tensor, logits: torch.Tensor, config: Any, **kwargs: Any) -> torch.Tensor:
        return cross_entropy(logits.float(), labels.to(logits.device), label_smoothing=self.label_smoothing)
