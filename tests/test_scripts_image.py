"""`run_image.py` as its users run it, on a few dozen generated images; augmentation that can be replayed."""

import needs_scripts  # noqa: F401


# isort: split
import json
import random

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scripts_helpers import RESULT_FILES, SHORT_RUN, assert_same_weights, flag_maker, run_script, weights
from timm.data import Mixup
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    TimmWrapperForImageClassification,
    TrainerControl,
    TrainerState,
    default_data_collator,
)

import run_image
from hf_trainopt.models.timm_model import parse_model_args
from hf_trainopt.scripting import image_data


CLASSES = ("blue", "green", "red")


def picture(label: int, number: int) -> Image.Image:
    pixels = np.random.default_rng(1000 * label + number).integers(0, 120, (20, 24, 3), dtype=np.uint8)
    pixels[..., 2 - label] += 120
    return Image.fromarray(pixels)


def make_folder(path, per_class=8, classes=CLASSES):
    for name in classes:
        (path / name).mkdir(parents=True)
        for number in range(per_class):
            picture(CLASSES.index(name), number).save(path / name / f"{number}.png")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def flags(tmp_path, folder):
    """Flags of a run of a second; tests add to them."""
    values = {
        **SHORT_RUN,
        "train_dir": folder,
        "train_val_split": 0.25,
        "timm_model": "test_resnet",
        "image_size": 32,
        "per_device_eval_batch_size": 4,
        "learning_rate": "1e-3",
        "cache_dir": tmp_path / "cache",
        "output_dir": tmp_path / "out",
    }
    return flag_maker(values)


# ---- The script ----------------------------------------------------------------------------------------------------


def test_files_and_metrics(tmp_path, flags, capsys):
    metrics = run_image.main(flags())
    out = tmp_path / "out"
    for name in RESULT_FILES:
        assert (out / name).is_file(), name
    results = json.loads((out / "all_results.json").read_text())
    assert (results["train_samples"], results["eval_samples"]) == (18, 6)
    assert 0 <= results["eval_accuracy"] <= 1
    assert metrics["train_loss"] == results["train_loss"]
    config = json.loads((out / "config.json").read_text())
    assert config["label_names"] == list(CLASSES)
    printed = capsys.readouterr().out
    assert "micro-batches per step (k)" in printed
    assert "accuracy" in printed


def test_saved_model_sees_the_pixels_that_it_was_trained_on(tmp_path, flags, folder):
    run_image.main(flags(max_steps=1, crop_pct=1.0))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = processor(picture(0, 0), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)

    again = flags(
        without=["timm_model", "image_size", "do_train", "train_dir", "train_val_split"],
        validation_dir=folder,
        model_name_or_path=tmp_path / "out",
        output_dir=tmp_path / "evaluated",
    )
    metrics = run_image.main(again)
    model = TimmWrapperForImageClassification.from_pretrained(tmp_path / "out").eval()
    images = [picture(label, number) for label in range(3) for number in range(8)]
    labels = torch.arange(3).repeat_interleave(8)
    with torch.no_grad():
        logits = model(**processor(images, return_tensors="pt")).logits
    assert metrics["eval_samples"] == 24
    assert metrics["eval_accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item(), abs=1e-6)
    assert metrics["eval_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)


def test_other_classes_need_a_flag(tmp_path, flags):
    run_image.main(flags(max_steps=1, do_eval=False))
    two = make_folder(tmp_path / "two", classes=CLASSES[:2])
    onward = {"model_name_or_path": tmp_path / "out", "train_dir": two, "output_dir": tmp_path / "onward"}
    with pytest.raises(ValueError, match="not for 2 classes: pass --ignore_mismatched_sizes"):
        run_image.main(flags(without=["timm_model"], **onward))
    run_image.main(flags(without=["timm_model"], **onward, ignore_mismatched_sizes=True, max_steps=1))
    assert json.loads((tmp_path / "onward" / "config.json").read_text())["label_names"] == list(CLASSES[:2])


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_files_with_an_image_column(tmp_path, flags, folder, suffix):
    rows = [(label, number) for label in range(3) for number in range(4)]
    path = tmp_path / f"images.{suffix}"
    if suffix == "parquet":
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
        table = {"img": [picture(*row) for row in rows], "label": [label for label, _ in rows]}
        datasets.Dataset.from_dict(table, features=features).to_parquet(path)
        columns = {}
    else:
        import pandas

        for label, number in rows:  # paths are relative to the file
            picture(label, number).save(tmp_path / f"{label}-{number}.png")
        table = pandas.DataFrame(
            {"photo": [f"{label}-{number}.png" for label, number in rows], "kind": [CLASSES[row[0]] for row in rows]}
        )
        table.to_csv(path, index=False) if suffix == "csv" else table.to_json(path, orient="records", lines=True)
        columns = {"image_column_name": "photo", "label_column_name": "kind"}
    metrics = run_image.main(
        flags(without=["train_dir"], train_file=path, validation_file=path, max_steps=1, **columns)
    )
    assert (metrics["train_samples"], metrics["eval_samples"]) == (12, 12)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == list(CLASSES)


def test_limits_grey_images_and_drop_rates(tmp_path, flags):
    metrics = run_image.main(
        flags(max_train_samples=6, max_eval_samples=3, model_args='{"in_chans": 1}', drop_rate=0.1, max_steps=1)
    )
    assert (metrics["train_samples"], metrics["eval_samples"]) == (6, 3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_args"] == {"in_chans": 1, "drop_rate": 0.1}
    assert config["pretrained_cfg"]["input_size"] == [1, 32, 32]


def test_transformer_of_another_size(flags):
    metrics = run_image.main(flags(timm_model="test_vit", drop_path_rate=0.1, channels_last=True, max_steps=1))
    assert metrics["eval_samples"] == 6


def test_mixing_and_label_smoothing(flags):
    plain = run_image.main(flags(label_smoothing_factor=0.1, max_steps=1, accumulation_policy="fixed"))
    assert plain["train_loss"] > 0
    mixed = run_image.main(
        flags(mixup_alpha=0.4, cutmix_alpha=1.0, label_smoothing_factor=0.1, random_erasing_prob=0.5, max_steps=3)
    )
    assert mixed["train_loss"] > 0
    assert mixed["eval_loss"] > 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_is_exact(tmp_path, flags, num_workers):
    """Bit for bit in the middle of an epoch, with random augmentation, mixup and workers that outlive epochs."""
    setting = {
        "max_steps": 12,  # of 2 micro-batches of 2 images: 2.7 epochs
        "save_strategy": "steps",
        "save_steps": 3,
        "mixup_alpha": 0.2,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "random_erasing_prob": 0.25,
        "do_eval": False,
        "dataloader_num_workers": num_workers,
    }
    if num_workers:
        setting["dataloader_persistent_workers"] = True
    run_image.main(flags(**setting, output_dir=tmp_path / "whole"))
    checkpoints = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(checkpoints) >= 3
    for checkpoint in checkpoints[: 1 if num_workers else 2]:
        resumed = tmp_path / f"resumed-{checkpoint.name}"
        run_image.main(flags(**setting, output_dir=resumed, resume_from_checkpoint=checkpoint))
        assert_same_weights(tmp_path / "whole", resumed)


def test_workers_change_nothing(tmp_path, flags):
    for num_workers in (0, 2):
        run_image.main(
            flags(
                dataloader_num_workers=num_workers, max_steps=10, do_eval=False, output_dir=tmp_path / str(num_workers)
            )
        )
    assert_same_weights(tmp_path / "0", tmp_path / "2")
    run_image.main(flags(max_steps=10, do_eval=False, data_seed=7, output_dir=tmp_path / "other"))
    assert not torch.equal(
        weights(tmp_path / "0")["timm_model.conv1.0.weight"], weights(tmp_path / "other")["timm_model.conv1.0.weight"]
    )


@pytest.mark.parametrize(
    ("changes", "without", "message"),
    [
        ({}, ["do_train", "do_eval"], "pass --do_train, --do_eval or both"),
        ({}, ["train_dir"], "There are no data: pass --dataset_name"),
        ({"train_dir": "nowhere"}, [], "nowhere is neither a folder of images nor a file"),
        ({"timm_model": "resnet51"}, [], r"timm has no model resnet51; choose --timm_model .*resnet"),
        ({"timm_model": "test_resnet", "model_args": "{bad"}, [], "--model_args must be a JSON object"),
        ({"model_args": "[1]"}, [], "--model_args must be a JSON object"),
        ({"model_args": '{"no_such_option": 1}'}, [], "test_resnet does not take --model_args"),
        ({"model_args": '{"in_chans": 2}'}, [], r"in_chans of --model_args must be 1 \(grey\) or 3"),
        ({"model_name_or_path": "x"}, [], "--model_name_or_path cannot be used with --timm_model"),
        ({"image_column_name": "photo"}, [], "There is no column photo: choose --image_column_name from image, label"),
        ({"label_column_name": "kind"}, [], "There is no column kind: choose --label_column_name"),
        ({"image_size": 0}, [], "--image_size must be positive"),
        ({"crop_pct": 1.5}, [], "--crop_pct must lie above 0"),
        ({"hflip": 2}, [], "--hflip is a probability"),
        ({"mixup_alpha": -1}, [], "--mixup_alpha must not be negative"),
        ({"crop_scale": 0.5}, [], "--crop_scale takes two shares"),
        ({"train_val_split": 1}, [], "--train_val_split must lie between 0 and 1"),
    ],
)
def test_mistakes_are_answered_before_training(flags, changes, without, message):
    with pytest.raises(ValueError, match=message):
        run_image.main(flags(without=without, **changes))


def test_hub_names_while_offline(flags, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"The dataset nobody/nothing .* was found neither.*--train_dir"):
        run_image.main(flags(dataset_name="nobody/nothing", without=["train_dir"]))
    with pytest.raises(ValueError, match=r"The model config timm/nothing .* was found neither.*--timm_model"):
        run_image.main(flags(model_name_or_path="timm/nothing", without=["timm_model"]))
    with pytest.raises(ValueError, match=r"The model timm/test_resnet.* was found neither"):
        run_image.main(flags(pretrained=True))


def test_demo_flags_give_way():
    assert run_image.demo_defaults({"max_steps": 3})["dataset_name"] == "digits"
    assert run_image.demo_defaults({"timm_model": "resnet18"}) == {}


def test_subprocess_demo_and_error(tmp_path):
    short = ("--max_steps=2", "--max_eval_samples=8", "--use_cpu")
    done = run_script("run_image.py", *short, f"--output_dir={tmp_path}", by_hand=True)
    assert done.returncode == 0, done.stderr
    assert "The same at full size:" in done.stdout
    failed = run_script("run_image.py", "--timm_model=resnet51")
    assert failed.returncode != 0
    assert "error: timm has no model resnet51" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_two_processes(tmp_path, flags):
    done = run_script("run_image.py", *flags(max_steps=5), processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("micro-batches per step (k)") == 1
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["eval_samples"] == 6


# ---- Data ----------------------------------------------------------------------------------------------------------


def table(labels, feature=None, column="label"):
    features = None if feature is None else datasets.Features({column: feature})
    return datasets.Dataset.from_dict({column: labels}, features=features)


def test_classes_are_matched_by_name_not_by_number():
    names = ["blue", "green", "red"]
    other = table([0, 1, 1], datasets.ClassLabel(names=["red", "blue"]))
    assert image_data.class_indices(other, "label", names) == [2, 0, 0]
    with pytest.raises(ValueError, match="Row 1 of the column label has the class violet"):
        image_data.class_indices(table(["red", "violet"]), "label", names)
    with pytest.raises(ValueError, match=r"Row 0 .* has the class -1"):
        image_data.class_indices(table([-1], datasets.ClassLabel(names=names)), "label", names)


def test_class_names():
    assert image_data.class_names(table([10, 9, 2, 9]), "label") == ["2", "9", "10"]
    assert image_data.class_names(table(["b", "a"]), "label") == ["a", "b"]
    assert image_data.class_names(table([0], datasets.ClassLabel(names=["x", "y"])), "label") == ["x", "y"]
    with pytest.raises(ValueError, match="classification needs two"):
        image_data.class_names(table([1, 1]), "label")
    with pytest.raises(ValueError, match="integers or strings"):
        image_data.class_names(table([1.5, None]), "label")


def test_columns_are_found_by_type_or_asked_for():
    dataset = table([0, 1], datasets.ClassLabel(names=["x", "y"]), column="fine")
    assert image_data.find_label_column(dataset, None) == "fine"
    with pytest.raises(ValueError, match="Pass --image_column_name: it cannot be told from the columns fine"):
        image_data.find_image_column(dataset, None)


def test_classes_for_evaluation():
    own = ["a", "b", "c"]
    assert image_data.choose_classes(["b", "a"], own, for_training=True) == ["b", "a"]
    assert image_data.choose_classes(["b", "a"], own, for_training=False) == own
    assert image_data.choose_classes(["0", "1", "2"], own, for_training=False) == ["0", "1", "2"]
    with pytest.raises(ValueError, match="The model has 3 classes and the data have 2 others"):
        image_data.choose_classes(["x", "y"], own, for_training=False)


def test_demo_images():
    splits = image_data.load_demo_images()
    assert (len(splits["train"]), len(splits["validation"])) == (1437, 360)
    assert splits["train"][0]["image"].size == (8, 8)
    assert np.asarray(splits["train"][0]["image"]).max() > 200


def test_model_args():
    assert parse_model_args(None, drop_rate=None) == {}
    assert parse_model_args('{"a": 1}', drop_rate=0.5) == {"a": 1, "drop_rate": 0.5}


# ---- Randomness ----------------------------------------------------------------------------------------------------


@pytest.fixture
def make_dataset():
    rows = [(label, number) for label in range(3) for number in range(3)]
    images = datasets.Dataset.from_dict({"image": [picture(*row) for row in rows]}).cast_column(
        "image", datasets.Image()
    )
    config = image_data.resolve_data_config({}, image_size=16)
    transform, _ = image_data.create_transforms(config, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5)

    def make(seed=0, mixup=None):
        return image_data.ImageDataset(
            images, "image", [label for label, _ in rows], transform, augmentation_seed=seed, mixup=mixup
        )

    return make


def pixels_of(dataset):
    return torch.stack([dataset[i]["pixel_values"] for i in range(len(dataset))])


def test_draws_depend_on_seed_epoch_and_row_only(make_dataset):
    dataset = make_dataset()
    first = pixels_of(dataset)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    assert torch.equal(first, pixels_of(make_dataset()))
    dataset.set_epoch(1)
    second = pixels_of(dataset)
    assert not torch.equal(first, second)
    dataset.set_epoch(0)
    assert torch.equal(first, pixels_of(dataset))
    assert not torch.equal(first, pixels_of(make_dataset(seed=1)))


def test_global_generators_are_left_alone(make_dataset):
    dataset = make_dataset()
    expected, drawn = [], []
    for draws, between in ((expected, lambda: None), (drawn, lambda: dataset[0])):
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        between()
        draws += [torch.rand(1).item(), random.random(), np.random.random()]
    assert expected == drawn


def test_epoch_callback(make_dataset):
    """Accelerate tells the dataset its epoch in single-process training only."""
    reference, dataset = make_dataset(), make_dataset()
    callback = image_data.EpochCallback(dataset)
    for reported, epoch in ((None, 0), (0.0, 0), (1.75, 1), (2.0, 2)):
        callback.on_epoch_begin(None, TrainerState(epoch=reported), TrainerControl())
        reference.set_epoch(epoch)
        assert torch.equal(dataset[0]["pixel_values"], reference[0]["pixel_values"])


@pytest.mark.parametrize("mixes", [False, True])
def test_living_workers_see_the_epoch(make_dataset, mixes):
    def mixup():
        return Mixup(0.5, 0.5, label_smoothing=0.0, num_classes=3) if mixes else None

    dataset, reference = make_dataset(mixup=mixup()), make_dataset(mixup=mixup())
    loader = DataLoader(
        dataset, batch_size=4, num_workers=2, persistent_workers=True, collate_fn=default_data_collator
    )
    plain = DataLoader(reference, batch_size=4, collate_fn=default_data_collator)
    seen = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        reference.set_epoch(epoch)
        batches = list(loader)
        for batch, expected in zip(batches, plain, strict=True):
            assert torch.equal(batch["pixel_values"], expected["pixel_values"])
            assert torch.equal(batch["labels"], expected["labels"])
        seen.append(torch.cat([batch["pixel_values"] for batch in batches]))
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_mixing_keeps_the_odd_row_and_sums_to_one(make_dataset):
    dataset = make_dataset(mixup=Mixup(0.5, 0.0, label_smoothing=0.0, num_classes=3))
    rows = dataset.__getitems__([0, 4, 8, 1, 5])
    labels = torch.stack([row["labels"] for row in rows])
    assert torch.allclose(labels.sum(-1), torch.ones(5))
    assert labels[1:3].max() < 1
    assert labels[4].tolist() == [0.0, 1.0, 0.0]
    assert torch.equal(rows[4]["pixel_values"], make_dataset()[5]["pixel_values"])
    # Row 0 (class 0) is mixed with row 3 (class 0 too), row 1 (class 1) with row 2 (class 2), by the same share.
    plain = make_dataset()
    share = labels[1, 1]
    expected = share * plain[4]["pixel_values"] + (1 - share) * plain[8]["pixel_values"]
    assert torch.allclose(rows[1]["pixel_values"], expected, atol=1e-6)


def test_soft_label_loss_is_cross_entropy():
    logits = torch.randn(6, 3)
    labels = torch.arange(6) % 3
    loss = image_data.SoftLabelLoss(0.1)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.allclose(loss(labels, logits, None), expected)
    assert torch.allclose(loss(torch.eye(3)[labels], logits, None), expected)
