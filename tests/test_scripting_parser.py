"""Flags of the scripts: files of flags, precedence, answers to wrong names."""

import json
import sys
from dataclasses import dataclass, field, fields

import pytest
from transformers import TrainingArguments

from hf_trainopt import EfficientTrainingArguments
from hf_trainopt.scripting.parser import REMOVED_NAMES, arguments_by_part, parse_script_arguments


@dataclass
class DataArguments:
    train_file: str | None = field(default=None)
    crop_scale: list[float] = field(default_factory=lambda: [0.1, 1.0])
    options: str | None = field(default=None)
    keep_linebreaks: bool = field(default=True)


def parse(*argv, demo=None):
    return parse_script_arguments((DataArguments, EfficientTrainingArguments), demo, [str(flag) for flag in argv])


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults():
    data, training = parse()
    assert data == DataArguments()
    assert training.accumulation_policy == "goodput"


def test_flags_with_underscores_and_dashes():
    data, training = parse("--train_file", "a.txt", "--learning-rate", "0.5", "--no_keep_linebreaks")
    assert (data.train_file, data.keep_linebreaks, training.learning_rate) == ("a.txt", False, 0.5)


def test_yaml_numbers_lists_mappings_and_none(tmp_path):
    # YAML 1.1 takes 1e-3 for a string.
    config = write(
        tmp_path / "flags.yaml",
        "learning_rate: 1e-3\ndo_train: true\ncrop_scale: [0.5, 0.75]\noptions: {in_chans: 1}\n"
        "keep_linebreaks: false\nlr_scheduler_kwargs: {min_lr: 0.1}\nmax_grad_norm: 0.5\nrun_name: null\n",
    )
    data, training = parse("--config", config)
    assert training.learning_rate == pytest.approx(1e-3)
    assert training.do_train
    assert training.max_grad_norm == 0.5
    assert training.lr_scheduler_kwargs == {"min_lr": 0.1}
    assert data.crop_scale == [0.5, 0.75]
    assert json.loads(data.options) == {"in_chans": 1}
    assert not data.keep_linebreaks


@pytest.mark.parametrize(
    ("flags", "measured"),
    [
        ([], ["throughput", "memory"]),  # an argument that may be a list keeps its default
        (["--measurements", "memory", "throughput"], ["memory", "throughput"]),
        (["--measurements", "memory,throughput"], ["memory", "throughput"]),
        (["--measurements", "none"], []),
    ],
)
def test_measurements_by_flags(flags, measured):
    _, training = parse(*flags)
    assert training.measured == measured


def test_measurements_by_file(tmp_path):
    _, training = parse("--config", write(tmp_path / "flags.yaml", "measurements: [memory]\n"))
    assert training.measured == ["memory"]


@pytest.mark.parametrize("name", ["flags.json", "flags.yaml", "flags.yml"])
def test_lone_file(tmp_path, name):
    _, training = parse(write(tmp_path / name, json.dumps({"max_steps": 7, "output_dir": str(tmp_path)})))
    assert training.max_steps == 7


def test_a_lone_flag_that_ends_like_a_file_is_a_flag(tmp_path):
    config = write(tmp_path / "flags.yaml", "learning_rate: 0.25\n")
    assert parse(f"--config={config}")[1].learning_rate == 0.25
    assert parse("--train_file=rows.json")[0].train_file == "rows.json"


def test_flags_win_over_file_and_file_over_demo(tmp_path):
    config = write(tmp_path / "flags.yaml", "max_steps: 7\nseed: 3\n")
    seen = {}

    def demo(given):
        seen.update(given)
        return {"max_steps": 1, "seed": 1, "warmup_steps": 5, "crop_scale": [0.2, 0.3]}

    data, training = parse("--max_steps", 9, "--config", config, demo=demo)
    assert (training.max_steps, training.seed, training.warmup_steps) == (9, 3, 5)
    assert data.crop_scale == [0.2, 0.3]
    assert {"max_steps", "seed"} <= seen.keys()
    assert "learning_rate" not in seen


def test_args_file_beside_the_script(tmp_path, monkeypatch):
    write(tmp_path / "run_it.args", "--max_steps 4 --seed 5")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "run_it.py")])
    _, training = parse("--seed", 6)
    assert (training.max_steps, training.seed) == (4, 6)


def test_unknown_flag_names_the_closest():
    with pytest.raises(ValueError, match=r"--learning_rat.*did you mean --learning_rate\?"):
        parse("--learning_rat", "1")


def test_flags_cannot_be_abbreviated():
    with pytest.raises(ValueError, match="--accumulation_pol"):
        parse("--accumulation_pol", "fixed")


def test_unknown_key_in_file_names_the_closest(tmp_path):
    config = write(tmp_path / "flags.yaml", "train_fil: a.txt\n")
    with pytest.raises(ValueError, match=r"train_fil in the config file .*; did you mean train_file\?"):
        parse("--config", config)


@pytest.mark.parametrize("name", sorted(REMOVED_NAMES))
def test_removed_names_are_answered(tmp_path, name):
    with pytest.raises(ValueError, match=f"--{name} was removed from transformers: "):
        parse(f"--{name}=1")
    with pytest.raises(ValueError, match=f"{name} in the config file"):
        parse(write(tmp_path / "flags.yaml", f"{name}: 1\n"))


def test_removed_names_are_really_gone_and_their_successors_exist():
    fields = TrainingArguments.__dataclass_fields__
    assert not REMOVED_NAMES.keys() & fields.keys()
    for name in ("eval_strategy", "warmup_steps", "train_sampling_strategy", "include_num_input_tokens_seen"):
        assert name in fields


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("flags.txt", "a: 1", "must end in"),
        ("flags.yaml", "- 1\n", "must hold a mapping"),
        ("flags.yaml", "a: [1\n", "cannot be read"),
        ("flags.yaml", "max_steps: [1, 2]\n", "takes one value, not a list"),
    ],
)
def test_bad_config_files(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        parse("--config", write(tmp_path / name, text))


def test_missing_config_file(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        parse("--config", tmp_path / "none.yaml")


def test_bad_value_is_reported_without_the_usage(capsys):
    with pytest.raises(SystemExit):
        parse("--max_steps", "many")
    printed = capsys.readouterr().err
    assert "--max_steps" in printed
    assert len(printed.splitlines()) == 1


OURS = arguments_by_part([EfficientTrainingArguments])


def test_help_begins_with_our_arguments_each_part_in_a_group(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    stock = text.index("Hugging Face TrainingArguments:")
    assert text.index("usage:") < text.index("accumulation:") < stock
    assert {"accumulation", "placement", "measurements", "precision", "reliability"} <= OURS.keys()
    for title, (description, names) in OURS.items():
        assert text.index(f"\n{title}:") < stock
        assert description
        for name in names:
            assert text.count(f"\n  --{name} ") == 1, name
            assert text.index(f"\n{title}:") < text.index(f"\n  --{name} ") < stock
    assert text.index("--learning_rate") > stock


def test_help_says_what_is_counted_otherwise_than_in_stock_and_what_a_switch_turns_off(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for name in ("max_steps", "warmup_steps", "logging_steps", "eval_steps", "save_steps"):
        assert "With varying k" in text.split(f" --{name} ")[1].split(" --")[0], name
    assert "is the reference" in text.split(" --gradient_accumulation_steps ")[1].split(" --")[0]
    switch = "average_tokens_across_devices"
    assert f"--no_{switch} Turn --{switch} off. " in text


def test_no_argument_of_ours_is_left_out_of_the_groups():
    ours, stock = ({field.name for field in fields(cls)} for cls in (EfficientTrainingArguments, TrainingArguments))
    ours -= stock
    assert set.union(*(names for _, names in OURS.values())) == ours


@pytest.mark.parametrize("name", sorted(set.union(*(names for _, names in OURS.values()))))
def test_each_help_text_says_the_default_and_when_to_change_it(name):
    field_of = EfficientTrainingArguments.__dataclass_fields__[name]
    text = field_of.metadata["help"]
    if field_of.default is None:  # argparse adds any other default
        assert "Unset (the default)" in text, text
    assert any(word in text for word in ("Set ", "set it", "Raise ", "Lower ", "raise ", "lower ")), text
