#!/usr/bin/env python
"""Train or evaluate an image classifier from timm with `EfficientTrainer`; flags as in the Hugging Face scripts.

    python run_image.py                                 # a demo of two minutes: nothing is downloaded
    python run_image.py --config resnet50.yaml          # flags from a file; those given win over it
    python run_image.py --timm_model resnet50 --pretrained --train_dir photos/train --validation_dir photos/test \\
        --do_train --do_eval --output_dir outputs/photos
    torchrun --nproc_per_node 2 run_image.py ...
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TimmWrapperConfig, default_data_collator, set_seed

from hf_trainopt import EfficientTrainer, EfficientTrainingArguments
from hf_trainopt.models.timm_model import (
    DEFAULT_MODEL,
    check_timm_name,
    load_timm_config,
    load_timm_model,
    parse_model_args,
    pretrained_cfg_of,
)
from hf_trainopt.scripting import image_data
from hf_trainopt.scripting.metrics import accuracy_of_classes, predicted_classes
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


FULL_SIZE_COMMAND = (
    "python run_image.py --timm_model resnet50",
    "--dataset_name uoft-cs/cifar10 --validation_split_name test --image_size 128 --crop_scale 0.35 1.0",
    "--per_device_train_batch_size 64 --gradient_accumulation_steps 4 --dataloader_num_workers 8 --bf16",
    "--learning_rate 1e-3 --weight_decay 0.05 --lr_scheduler_type cosine --warmup_steps 0.05",
    "--num_train_epochs 30 --do_train --do_eval --output_dir outputs/resnet50-cifar10",
)


@dataclass
class ModelArguments:
    """Which timm model."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Weights to start from: a timm model on the Hub (timm/resnet50.a1_in1k) or a saved folder."},
    )
    timm_model: str | None = field(
        default=None,
        metadata={"help": f"timm architecture to train from scratch; {DEFAULT_MODEL} if no model is named."},
    )
    pretrained: bool = field(default=False, metadata={"help": "Start from timm's default weights of timm_model."})
    model_args: str | None = field(
        default=None, metadata={"help": "More arguments of the timm model as JSON, such as '{\"in_chans\": 1}'."}
    )
    drop_rate: float | None = field(default=None, metadata={"help": "Dropout before the classifier."})
    drop_path_rate: float | None = field(default=None, metadata={"help": "Stochastic depth."})
    channels_last: bool = field(default=False, metadata={"help": "Memory format channels_last: faster on GPUs."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace a classifier whose number of classes is another one."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Access token for the Hub."})

    def __post_init__(self):
        if self.model_name_or_path is not None and (self.timm_model is not None or self.pretrained):
            raise ValueError("--model_name_or_path cannot be used with --timm_model or --pretrained; leave one out.")
        if self.timm_model is not None:
            check_timm_name(self.timm_model)
        for name in ("drop_rate", "drop_path_rate"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 0 and below 1.")


@dataclass
class DataTrainingArguments:
    """Which images, and how they are transformed."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": f"Hub name of a dataset, or '{image_data.DEMO_DATASET}': scans that come with scikit-learn."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one folder of images per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same for validation."})
    train_file: str | None = field(default=None, metadata={"help": "Parquet, csv or json(l) file with image column."})
    validation_file: str | None = field(default=None, metadata={"help": "The same for validation."})
    validation_split_name: str = field(default="validation", metadata={"help": "Split of a Hub dataset to test on."})
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of the training images to validate on where there are no others."}
    )
    image_column_name: str | None = field(default=None, metadata={"help": "Column of images; unset: image or img."})
    label_column_name: str | None = field(default=None, metadata={"help": "Column of classes; unset: label(s)."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many images, drawn by seed."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many images, drawn by seed."})
    image_size: int | None = field(default=None, metadata={"help": "Height and width; unset: those of the model."})
    crop_pct: float | None = field(default=None, metadata={"help": "Share that evaluation keeps of an image's side."})
    crop_scale: list[float] = field(
        default_factory=lambda: [0.08, 1.0], metadata={"help": "Least and largest area of the random training crop."}
    )
    hflip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip in training."})
    color_jitter: float = field(default=0.4, metadata={"help": "Strength of color jitter in training."})
    auto_augment: str | None = field(default=None, metadata={"help": "timm policy, such as rand-m9-mstd0.5-inc1."})
    random_erasing_prob: float = field(default=0.0, metadata={"help": "Probability of random erasing in training."})
    mixup_alpha: float = field(default=0.0, metadata={"help": "Mixup, off at 0."})
    cutmix_alpha: float = field(default=0.0, metadata={"help": "CutMix, off at 0."})
    mixup_prob: float = field(default=1.0, metadata={"help": "Share of the batches that are mixed."})

    @property
    def mixes(self) -> bool:
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    def __post_init__(self):
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"--crop_scale takes two shares in (0, 1], the smaller first, not {self.crop_scale}.")
        for name in ("hflip", "random_erasing_prob", "mixup_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} is a probability, not {getattr(self, name)}.")
        check_counts(self, "max_train_samples", "max_eval_samples")
        check_one_source(self, "training", "dataset_name", "train_dir", "train_file")
        check_one_source(self, "validation", "dataset_name", "validation_dir", "validation_file")
        for name in ("color_jitter", "mixup_alpha", "cutmix_alpha"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must not be negative, but is {getattr(self, name)}.")


def demo_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Return the flags of the demo if the user has named neither data, model nor task; given flags win over them."""
    named = {"do_train", "do_eval", "dataset_name", "train_dir", "validation_dir", "train_file", "validation_file"}
    named |= {"model_name_or_path", "timm_model"}
    if named & given.keys():
        return {}
    return {
        "do_train": True,
        "do_eval": True,
        "dataset_name": image_data.DEMO_DATASET,
        "timm_model": "resnet18",
        "image_size": 32,
        "crop_pct": 1.0,
        "crop_scale": [0.6, 1.0],
        "hflip": 0.0,
        "num_train_epochs": 6,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 60,
        "gradient_accumulation_steps": 4,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.05,
        # So little data tells the noise only where every window is measured.
        "noise_scale_interval": 1,
        "noise_scale_half_life": 0.1,
        "logging_steps": 20,
        "save_strategy": "no",
        "output_dir": "outputs/run_image_demo",
    }


def build_datasets(
    data_args: DataTrainingArguments,
    training_args: EfficientTrainingArguments,
    config: TimmWrapperConfig,
    splits: dict[str, image_data.Dataset],
) -> dict[str, image_data.ImageDataset]:
    """Return the datasets asked for; their classes and transforms become part of `config`."""
    wanted = {"train": training_args.do_train, "validation": training_args.do_eval}
    wanted = [name for name, asked in wanted.items() if asked]
    for name in wanted:
        if name not in splits:
            raise ValueError(f"There is no {name} split: pass --{name}_dir, --{name}_file or another --dataset_name.")
    columns = {
        name: (
            image_data.find_image_column(splits[name], data_args.image_column_name),
            image_data.find_label_column(splits[name], data_args.label_column_name),
        )
        for name in wanted
    }
    own_names = [config.id2label[i] for i in range(config.num_labels)]
    data_names = image_data.class_names(splits[wanted[0]], columns[wanted[0]][1])
    names = image_data.choose_classes(data_names, own_names, training_args.do_train)
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    config.label_names = list(names)  # saved in place of the two; a config that was loaded has the old ones

    pretrained_cfg = pretrained_cfg_of(config)
    num_channels = config.model_args.get("in_chans", 3)
    data_config = image_data.resolve_data_config(
        pretrained_cfg, image_size=data_args.image_size, crop_pct=data_args.crop_pct, num_channels=num_channels
    )
    # Saved with the model, so that an image processor made from it does the same.
    config.pretrained_cfg = data_config
    if pretrained_cfg.get("fixed_input_size") and data_args.image_size is not None:
        config.model_args = {"img_size": data_args.image_size} | config.model_args
    train_transform, eval_transform = image_data.create_transforms(
        data_config,
        scale=data_args.crop_scale,
        hflip=data_args.hflip,
        color_jitter=data_args.color_jitter,
        auto_augment=data_args.auto_augment,
        re_prob=data_args.random_erasing_prob,
    )

    mixup = None
    if data_args.mixes:
        mixup = image_data.Mixup(
            data_args.mixup_alpha,
            data_args.cutmix_alpha,
            prob=data_args.mixup_prob,
            label_smoothing=0.0,
            num_classes=len(names),
        )
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    images = {}
    for name in wanted:
        split, (image_column, label_column) = splits[name], columns[name]
        if limits[name] is not None and limits[name] < len(split):
            # Rows may be sorted by class, so that the first ones would be of one class.
            split = split.shuffle(seed=seed).select(range(limits[name]))
        images[name] = image_data.ImageDataset(
            split,
            image_column,
            image_data.class_indices(split, label_column, names),
            train_transform if name == "train" else eval_transform,
            num_channels=num_channels,
            augmentation_seed=seed if name == "train" else None,
            mixup=mixup if name == "train" else None,
        )
        if len(split) == 0:
            raise ValueError(f"The {name} split has no images: pass another --{name}_dir, --{name}_file or dataset.")
        images[name][0]  # what cannot be read at all is found out now
    return images


def run(model_args: ModelArguments, data_args: DataTrainingArguments, training_args: EfficientTrainingArguments):
    """Train and evaluate; returns the Trainer, the training metrics and the evaluation metrics."""
    check_something_to_do(training_args)
    checkpoint = checkpoint_to_resume(training_args)
    set_seed(training_args.seed)
    hub = {"cache_dir": model_args.cache_dir, "revision": model_args.model_revision, "token": model_args.token}
    options = parse_model_args(
        model_args.model_args, drop_rate=model_args.drop_rate, drop_path_rate=model_args.drop_path_rate
    )
    config = load_timm_config(model_args.model_name_or_path, model_args.timm_model, options, **hub)

    with training_args.main_process_first(desc="loading the images"):
        splits = image_data.load_image_datasets(
            dataset_name=data_args.dataset_name,
            dataset_config_name=data_args.dataset_config_name,
            train_dir=data_args.train_dir,
            validation_dir=data_args.validation_dir,
            train_file=data_args.train_file,
            validation_file=data_args.validation_file,
            image_column=data_args.image_column_name,
            validation_split_name=data_args.validation_split_name,
            train_val_split=data_args.train_val_split,
            seed=training_args.seed,
            cache_dir=model_args.cache_dir,
            token=model_args.token,
        )
    images = build_datasets(data_args, training_args, config, splits)
    model = load_timm_model(
        config,
        model_args.model_name_or_path,
        pretrained=model_args.pretrained,
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        **hub,
    )
    if model_args.channels_last:
        model.to(memory_format=torch.channels_last)

    if data_args.mixes:
        model.loss_function = image_data.SoftLabelLoss(training_args.label_smoothing_factor)

    trainer = EfficientTrainer(
        model=model,
        args=training_args,
        train_dataset=images.get("train"),
        eval_dataset=images.get("validation"),
        data_collator=default_data_collator,
        compute_metrics=accuracy_of_classes,
        preprocess_logits_for_metrics=predicted_classes,
        callbacks=[image_data.EpochCallback(images["train"])] if "train" in images else None,
    )
    if data_args.mixes:
        trainer.label_smoother = None  # the loss smooths: Trainer's smoother takes class numbers only

    train_metrics, eval_metrics = train_and_evaluate(trainer, checkpoint)
    write_model_card(
        trainer,
        task="image-classification",
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
        description="Train or evaluate an image classifier from timm.",
    )
    set_up_logging(training_args)
    trainer, train_metrics, eval_metrics = run(model_args, data_args, training_args)
    is_demo = data_args.dataset_name == image_data.DEMO_DATASET
    print_summary(trainer, train_metrics, eval_metrics, FULL_SIZE_COMMAND if is_demo else ())
    return train_metrics | eval_metrics


if __name__ == "__main__":
    with report_user_errors():
        main()
