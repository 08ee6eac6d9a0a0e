"""Wrong uses: each ends before any training, in one sentence that names the argument and the remedy."""

import needs_scripts  # noqa: F401


# isort: split
import re
from pathlib import Path

import bad_input_cases as cases
import pytest
import torch
from helpers import Rows, arguments, tiny_gpt2
from scripts_helpers import REPOSITORY, flag_maker, run_script
from transformers import Trainer, TrainingArguments

import run_clm
import run_image
from hf_trainopt import EfficientTrainer, EfficientTrainingArguments, cli


RUN = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "do_train": True,
}
CLM = {
    "train_file": "{files}/text.txt",
    "train_tokenizer_vocab_size": 300,
    "config_overrides": "n_embd=16,n_layer=1,n_head=2,n_positions=16",
    "block_size": 16,
}
IMAGE = {"train_dir": "{files}/good", "timm_model": "resnet10t", "image_size": 32}


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    cases.make_files(folder)
    return folder


class TrainingBegan(BaseException):
    """Too late for an error."""


@pytest.fixture(autouse=True)
def _nothing_is_trained(monkeypatch):
    def began(*args, **kwargs):
        raise TrainingBegan

    monkeypatch.setattr("torch.optim.Optimizer.zero_grad", began)
    monkeypatch.setattr("hf_trainopt.EfficientTrainer.training_step", began)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def flags(case: cases.Case, base: dict, files: Path, output_dir: Path) -> list[str]:
    """Return the words of a command line: a right one, made wrong."""
    made = flag_maker(base | RUN | {"output_dir": output_dir})(without=case.without, **case.changes)
    made += case.words
    if case.config is not None:
        (output_dir.parent / "run.yaml").write_text(case.config)
        made.append(f"--config={output_dir.parent / 'run.yaml'}")
    return [word.replace("{files}", str(files)) for word in made]


def check(message: str, case: cases.Case) -> None:
    """Fail unless the message is one sentence that names the argument and the remedy."""
    message = " ".join(message.split())  # as `report_user_errors` prints it
    assert case.argument in message, message
    assert case.remedy in message, message
    assert len(message) < 700, message
    assert "Error:" not in message.partition("(")[0], message  # a class name at the head is a traceback's
    # Full stops within what upstream says (in brackets) do not end it.
    bare = message
    while (shorter := re.sub(r"\([^()]*\)", "", bare)) != bare:
        bare = shorter
    assert not re.search(r"[.!] [A-Z]", bare), message


@pytest.mark.parametrize("case", cases.ARGUMENTS, ids=str)
def test_arguments(case, files, tmp_path):
    changes = {
        name: value.replace("{files}", str(files)) if isinstance(value, str) else value
        for name, value in case.changes.items()
    }
    # As Python does, names that do not exist are a `TypeError`.
    with pytest.raises((ValueError, TypeError)) as error:
        arguments(tmp_path, **changes)
    check(str(error.value), case)


@pytest.mark.parametrize("changes", cases.LEFT_TO_STOCK, ids=str)
def test_stock_refuses_at_once(changes, tmp_path):
    """If it no longer does, `stock_arguments.py` has to."""
    told = []
    for arguments_class, trainer_class in (
        (TrainingArguments, Trainer),
        (EfficientTrainingArguments, EfficientTrainer),
    ):
        try:
            args = arguments(tmp_path, arguments_class, **changes)
            trainer_class(model=tiny_gpt2(), args=args, train_dataset=Rows(8))
        except Exception as error:
            told.append((type(error), str(error)))
    assert len(told) == 2
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("script", "base", "case"),
    [
        *(pytest.param(run_clm, CLM, case, id=f"clm {case}") for case in cases.CLM),
        *(pytest.param(run_image, IMAGE, case, id=f"image {case}") for case in cases.IMAGE),
    ],
)
def test_scripts(script, base, case, files, tmp_path, capsys):
    with pytest.raises((ValueError, SystemExit)) as error:
        script.main(flags(case, base, files, tmp_path / "out"))
    message = str(error.value)
    if isinstance(error.value, SystemExit):
        assert error.value.code == 2
        (message,) = capsys.readouterr().err.splitlines()[-1:]
        message = message.partition("error: ")[2]
    check(message, case)


@pytest.mark.parametrize(("script", "base"), [(run_clm, CLM), (run_image, IMAGE)])
def test_what_the_cases_differ_from_trains(script, base, files, tmp_path):
    """Or every case could be refused for another reason."""
    with pytest.raises(TrainingBegan):
        script.main(flags(cases.case("", ""), base, files, tmp_path / "out"))


@pytest.mark.parametrize("case", cases.COMMANDS, ids=str)
def test_commands(case, files, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where `compare` makes its folder before it looks at all that it was told
    words = [
        word.replace("{files}", str(files)).replace("{script}", str(REPOSITORY / "run_clm.py")) for word in case.words
    ]
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hf-trainopt: error: ")
    check(line.removeprefix("hf-trainopt: error: "), case)


def test_the_table_is_long_enough():
    tables = [cases.ARGUMENTS, cases.CLM, cases.IMAGE, cases.COMMANDS]
    assert sum(len({str(case) for case in table}) for table in tables) == sum(map(len, tables)) >= 40


# ---- In a process of its own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "base", "case"),
    [
        ("run_clm.py", CLM, cases.case("num_train_epochs is 0", "raise it", num_train_epochs=0, max_steps=-1)),
        ("run_image.py", IMAGE, cases.case("--image_size", "must be positive", image_size=-3)),
    ],
)
def test_exit_code_and_one_line_on_stderr(script, base, case, files, tmp_path):
    done = run_script(script, *flags(case, base, files, tmp_path / "out"), "--log_level=error")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"{script}: error: ")
    check(last.removeprefix(f"{script}: error: "), case)


# ---- From Python ----------------------------------------------------------------------------------------------------


class Empty(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 0


class Unlabelled(Rows):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index]}


def train(tmp_path, dataset, trainer=None, **kwargs) -> None:
    args = arguments(tmp_path, **kwargs)
    EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=dataset, **trainer or {}).train()


@pytest.mark.parametrize(
    ("dataset", "options", "argument", "remedy"),
    [
        (None, {}, "train_dataset", "requires"),
        (Rows(20), {"max_steps": 0}, "max_steps is 0", "give at least 1"),
        (Rows(20), {"num_train_epochs": 0}, "num_train_epochs is 0", "raise it"),
        (Rows(2), {"dataloader_drop_last": True}, "dataloader_drop_last", "set dataloader_drop_last=False"),
        (
            Rows(2),
            {"dataloader_drop_last": True, "accumulation_policy": "fixed"},
            "per_device_train_batch_size=3",
            "set dataloader_drop_last=False",
        ),
        (Empty(), {}, "train_dataset is empty", "pass one with rows"),
        (Rows(20), {"trainer": {"accumulation_policy": "goodput"}}, "accumulation_policy", "pass a function"),
    ],
)
def test_data_and_policies(tmp_path, dataset, options, argument, remedy):
    with pytest.raises(ValueError, match=argument) as error:
        train(tmp_path, dataset, **options)
    check(str(error.value), cases.case(argument, remedy))


def test_missing_labels(tmp_path, monkeypatch):
    """Found out in the first forward pass, before a step."""
    monkeypatch.undo()
    monkeypatch.setattr("torch.optim.AdamW.step", lambda *args, **kwargs: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match="returns no loss") as error:
        train(tmp_path, Unlabelled(20))
    check(str(error.value), cases.case("train_dataset", "add a column of labels"))


def test_too_few_data_for_a_window_of_stock_are_warned_of(tmp_path, caplog):
    """Which takes them as one step: with "fixed" everything is as in `Trainer`."""
    with pytest.raises(TrainingBegan):
        train(tmp_path, Rows(5), accumulation_policy="fixed", gradient_accumulation_steps=8)
    assert "fewer than one window of gradient_accumulation_steps=8" in caplog.text
