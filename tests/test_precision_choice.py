"""Which precision a run takes, what it must agree with, and that it really computes in it."""

import logging

import pytest
import torch
from helpers import Rows, arguments, quiet, tiny_gpt2, weights_equal
from precision_helpers import HalfOnCPU, HalfTrainer, Network, Points, lines, make, pretend
from transformers import Trainer, TrainingArguments

from hf_trainopt import EfficientTrainer, EfficientTrainingArguments
from hf_trainopt.precision import DeviceAbilities, choose_precision, device_abilities
from hf_trainopt.precision.choose import weakest
from hf_trainopt.scripting.parser import parse_script_arguments


AMPERE = DeviceAbilities("A100", "cuda", native_bf16=True, scales_fp16=True)
VOLTA = DeviceAbilities("V100", "cuda", scales_fp16=True)
KEPLER = DeviceAbilities("K80", "cuda", runs_bf16=False, scales_fp16=True)
NEW_CPU = DeviceAbilities("this CPU", "cpu", native_bf16=True)
OLD_CPU = DeviceAbilities("this CPU", "cpu")
APPLE = DeviceAbilities("this Apple GPU", "mps", scales_fp16=True)


# ---- The decision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "device", "precision", "fallback", "reason", "warning"),
    [
        ("auto", AMPERE, "bf16", None, "A100 computes in it natively", None),
        ("auto", VOLTA, "fp16", "fp32", "V100 does not compute in bf16", None),
        ("auto", KEPLER, "fp16", "fp32", "K80 does not", None),
        ("auto", NEW_CPU, "bf16", None, "this CPU computes in it", None),
        ("auto", OLD_CPU, "fp32", None, "not known to compute in bf16", None),
        ("auto", APPLE, "fp32", None, "not known to compute in bf16", None),
        ("fp16", AMPERE, "fp16", "bf16", "would need no loss scaling", None),
        ("fp16", VOLTA, "fp16", "fp32", "as asked for", None),
        ("fp16", APPLE, "fp16", "fp32", "as asked for", None),
        ("bf16", AMPERE, "bf16", None, "as asked for", None),
        ("bf16", VOLTA, "bf16", None, "as asked for", "precision='fp16' or 'auto' may be faster"),
        ("bf16", NEW_CPU, "bf16", None, "as asked for", None),
        ("bf16", OLD_CPU, "bf16", None, "as asked for", "precision='fp32' or 'auto' may be faster"),
        ("fp32", AMPERE, "fp32", None, "as asked for", None),
    ],
)
def test_decisions(asked, device, precision, fallback, reason, warning):
    choice = choose_precision(asked, device)
    assert (choice.precision, choice.fallback) == (precision, fallback)
    assert reason in choice.reason
    assert warning in choice.warning if warning else choice.warning is None


@pytest.mark.parametrize(
    ("asked", "device", "message"),
    [
        ("fp16", NEW_CPU, "train in fp32 without a word.; choose precision='bf16', 'fp32' or 'auto'"),
        ("bf16", KEPLER, "does not run on K80"),
        ("fp8", AMPERE, "choose one of auto, fp32, fp16, bf16"),
    ],
)
def test_refusals(asked, device, message):
    with pytest.raises(ValueError, match=message):
        choose_precision(asked, device)


def test_the_weakest_device_decides_for_all_ranks():
    assert weakest([AMPERE, AMPERE]) == AMPERE
    mixed = weakest([AMPERE, VOLTA, AMPERE])
    assert mixed == DeviceAbilities("A100 and V100", "cuda", scales_fp16=True)
    assert choose_precision("auto", mixed).precision == "fp16"


@pytest.mark.parametrize(
    ("capability", "native"), [((6, 1), False), ((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)]
)
def test_what_is_read_of_a_cuda_device(monkeypatch, capability, native):
    """Emulated bf16, for which `is_bf16_supported()` is true as well, is not native."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    abilities = device_abilities(torch.device("cuda:0"))
    name = f"Card (compute capability {capability[0]}.{capability[1]})"
    assert abilities == DeviceAbilities(name, "cuda", native_bf16=native, scales_fp16=True)
    assert choose_precision("auto", abilities).precision == ("bf16" if native else "fp16")


@pytest.mark.parametrize(
    ("known", "native"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"bf16": True}, True), ({"avx512_f": True}, False)],
)
def test_what_is_read_of_a_cpu(monkeypatch, known, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert device_abilities(torch.device("cpu")) == DeviceAbilities("this CPU", "cpu", native_bf16=native)


# ---- What it must agree with ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "launcher", "given", "both"),
    [
        (OLD_CPU, None, {"precision": "fp32", "bf16": True}, ("precision='fp32'", "bf16=True")),
        (OLD_CPU, None, {"precision": "auto", "bf16": True}, ("precision='auto', which is fp32 here", "bf16=True")),
        (VOLTA, None, {"precision": "bf16", "fp16": True}, ("precision='bf16'", "fp16=True")),
        (AMPERE, None, {"precision": "auto", "fp16": True}, ("precision='auto', which is bf16 here", "fp16=True")),
        (VOLTA, "bf16", {"precision": "fp16"}, ("precision='fp16'", "ACCELERATE_MIXED_PRECISION) 'bf16'")),
        (AMPERE, "fp8", {"precision": "bf16"}, ("precision='bf16'", "'fp8'")),
        (OLD_CPU, "bf16", {"precision": "fp32"}, ("precision='fp32'", "--mixed_precision")),
        (OLD_CPU, None, {"fp16": True}, ("fp16=True is ignored on a CPU", "bf16=True")),
        (OLD_CPU, "fp16", {}, ("ACCELERATE_MIXED_PRECISION='fp16'", "precision='auto'")),
        (OLD_CPU, None, {"precision": "fp16"}, ("precision='fp16'", "'bf16', 'fp32' or 'auto'")),
        (OLD_CPU, None, {"precision": "half"}, ("precision is 'half'", "choose one of")),
    ],
)
def test_contradictions_name_both_sides(tmp_path, monkeypatch, device, launcher, given, both):
    pretend(monkeypatch, device)
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    with pytest.raises(ValueError, match="precision") as error:
        arguments(tmp_path, **given)
    assert all(name in str(error.value) for name in both), error.value


@pytest.mark.parametrize(
    ("launcher", "given", "expected"),
    [
        (None, {"precision": "fp16", "fp16": True}, "fp16"),
        ("no", {"precision": "fp16"}, "fp16"),  # what `accelerate launch` sets unless told otherwise
        ("FP16", {"precision": "auto"}, "fp16"),
        ("bf16", {"precision": "bf16", "bf16": True}, "bf16"),
        ("bf16", {}, "bf16"),
        (None, {"fp16": True}, "fp16"),
        (None, {}, "no"),
    ],
)
def test_agreement(tmp_path, monkeypatch, launcher, given, expected):
    pretend(monkeypatch, VOLTA)
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    assert arguments(tmp_path, **given).mixed_precision == expected


def test_contradictions_say_what_to_unset(tmp_path, monkeypatch):
    """TRL's arguments set bf16=True by themselves: there is nothing to remove."""
    pretend(monkeypatch, OLD_CPU)
    with pytest.raises(ValueError, match="contradicts bf16=True; set bf16=False, or leave precision unset"):
        arguments(tmp_path, precision="fp32", bf16=True)


def test_a_flag_that_overrules_the_launcher_is_warned_of(tmp_path, monkeypatch, caplog):
    """As in `Trainer` it does, but not without a word."""
    pretend(monkeypatch, VOLTA)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert arguments(tmp_path, bf16=True).mixed_precision == "bf16"
    assert "bf16=True overrules the launcher's setting" in caplog.text
    caplog.clear()
    arguments(tmp_path, fp16=True)
    arguments(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    arguments(tmp_path, bf16=True)
    assert "overrules" not in caplog.text


def test_deepspeed_says_its_own(tmp_path):
    args = arguments(tmp_path, precision="fp32")
    args.deepspeed_plugin = object()
    with pytest.raises(ValueError, match="precision='fp32' does not work with DeepSpeed"):
        args.resolve_precision()


def test_the_flag_of_the_scripts(tmp_path, capsys):
    def parse(*flags):
        (args,) = parse_script_arguments([EfficientTrainingArguments], argv=["--use_cpu", *flags])
        return args

    assert parse().precision is None
    assert parse("--precision", "bf16").mixed_precision == "bf16"
    config = tmp_path / "run.yaml"
    config.write_text("precision: fp32\n")
    assert parse("--config", str(config)).precision == "fp32"
    with pytest.raises(SystemExit):
        parse("--precision", "fp64")
    assert "--precision" in capsys.readouterr().err


# ---- Weights, and what is said --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "dtype", "message"),
    [
        ("fp16", torch.float16, "precision='fp16' needs weights in fp32, .* dtype=torch.float32"),
        ("fp16", torch.bfloat16, "or choose precision='bf16'"),
        ("fp32", torch.bfloat16, "precision='fp32' needs weights in fp32"),
        ("auto", torch.float16, r"precision='auto' \(here fp16\)"),
        ("bf16", torch.float16, "precision='bf16' needs weights in fp32"),
    ],
)
def test_half_weights_are_refused(tmp_path, monkeypatch, precision, dtype, message):
    pretend(monkeypatch, VOLTA)
    with pytest.raises(ValueError, match=message):
        make(tmp_path, Points([1.0] * 4), model=Network().to(dtype), precision=precision).train()


def test_half_weights_under_the_flag_of_trainer(tmp_path, monkeypatch):
    """Which stock Trainer finds out at the first step."""
    pretend(monkeypatch, VOLTA)
    with pytest.raises(ValueError, match=r"fp16=True needs weights in fp32.*dtype=torch\.float32"):
        make(tmp_path, Points([1.0] * 4), model=Network().half(), fp16=True).train()


def test_frozen_half_weights_and_bf16_weights_under_bf16_are_fine(tmp_path, monkeypatch, caplog):
    pretend(monkeypatch, VOLTA)
    model = Network()
    model.inner.half().requires_grad_(False)
    make(tmp_path, Points([1.0] * 4), model=model, precision="fp16")
    with caplog.at_level(logging.INFO, "hf_trainopt"):
        make(tmp_path, Points([1.0] * 4), model=Network().bfloat16(), precision="bf16")
    assert "Precision: bf16 autocast, weights in torch.bfloat16: as asked for." in caplog.text


@pytest.mark.parametrize(
    ("device", "asked", "line"),
    [
        (AMPERE, "auto", "Precision: bf16 autocast, weights in torch.float32: A100 computes in it natively."),
        (
            VOLTA,
            "auto",
            "Precision: fp16 autocast, dynamic loss scaling, fp32 if that fails, weights in torch.float32",
        ),
        (OLD_CPU, "fp32", "Precision: fp32, weights in torch.float32: as asked for."),
    ],
)
def test_one_line_explains(tmp_path, monkeypatch, caplog, device, asked, line):
    pretend(monkeypatch, device)
    with caplog.at_level(logging.INFO, "hf_trainopt"):
        make(tmp_path, Points([1.0] * 4), precision=asked)
    said = [record.message for record in caplog.records if "precision" in record.name]
    assert len(said) == 1
    assert said[0].startswith(line)


def test_emulated_bf16_is_warned_of(tmp_path, monkeypatch, caplog):
    pretend(monkeypatch, OLD_CPU)
    make(tmp_path, Points([1.0] * 4), precision="bf16")
    assert "PyTorch may emulate it" in caplog.text


# ---- What it computes in --------------------------------------------------------------------------------------------


class HalfStock(HalfOnCPU, Trainer):
    scaler: dict = {"init_scale": 2.0**20, "growth_interval": 2}  # noqa: RUF012


def history(trainer) -> list[dict]:
    ours = ("skipped_steps", "loss_scale")
    return [
        {k: v for k, v in line.items() if k not in ours and "_per_second" not in k and "runtime" not in k}
        for line in trainer.state.log_history
    ]


@pytest.mark.parametrize("given", [{}, {"precision": "fp32"}, {"precision": "bf16"}, {"bf16": True}])
def test_as_stock_trainer_to_the_bit(tmp_path, monkeypatch, given):
    pretend(monkeypatch, NEW_CPU)
    common = {"num_train_epochs": 1, "gradient_accumulation_steps": 3}
    stock_flags = {"bf16": "bf16" in given.values() or "bf16" in given}
    stock_args = arguments(tmp_path, TrainingArguments, **common, **stock_flags)
    stock = quiet(Trainer(model=tiny_gpt2(dropout=0.1), args=stock_args, train_dataset=Rows()))
    stock.train()
    args = arguments(tmp_path, accumulation_policy="fixed", **common, **given)
    ours = quiet(EfficientTrainer(model=tiny_gpt2(dropout=0.1), args=args, train_dataset=Rows()))
    ours.train()
    assert weights_equal(stock.model, ours.model)
    assert ours.state.log_history[0].keys() == stock.state.log_history[0].keys()
    assert history(ours) == history(stock)
    assert list(ours.state.stateful_callbacks) == list(stock.state.stateful_callbacks)


@pytest.mark.parametrize("given", [{"precision": "fp16"}, {"precision": "auto"}, {"fp16": True}])
def test_fp16_is_that_of_stock_trainer_to_the_bit(tmp_path, monkeypatch, given):
    pretend(monkeypatch, VOLTA)
    common = {"num_train_epochs": 2, "gradient_accumulation_steps": 3}
    stock_args = arguments(tmp_path, TrainingArguments, fp16=True, **common)
    stock = quiet(HalfStock(model=tiny_gpt2(dropout=0.1), args=stock_args, train_dataset=Rows()))
    stock.train()
    args = arguments(tmp_path, accumulation_policy="fixed", **common, **given)
    cls = type("Half", (HalfTrainer,), {"scaler": HalfStock.scaler})
    ours = quiet(cls(model=tiny_gpt2(dropout=0.1), args=args, train_dataset=Rows()))
    ours.train()
    assert weights_equal(stock.model, ours.model)
    assert str(history(ours)) == str(history(stock))  # nan, where a step was skipped
    assert lines(ours)[-1]["skipped_steps"] > 2
    assert ours.accelerator.scaler.state_dict() == stock.accelerator.scaler.state_dict()


@pytest.mark.parametrize("first", ["fp32", "bf16"])
@pytest.mark.parametrize("second", ["fp32", "bf16"])
def test_a_model_that_another_trainer_has_prepared(tmp_path, monkeypatch, first, second):
    """Accelerate would leave it in the precision of that one without a word."""
    pretend(monkeypatch, NEW_CPU)
    model = Network()
    for precision in (first, second):
        model.precisions.clear()
        make(tmp_path, Points([1.0] * 8), model=model, precision=precision).train()
        assert set(model.precisions) == {{"fp32": torch.float32, "bf16": torch.bfloat16}[precision]}
