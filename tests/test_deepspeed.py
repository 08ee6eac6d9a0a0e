"""Adaptive k under DeepSpeed: two ranks (gloo), a dozen configurations in one launch, against DDP and stock DeepSpeed.

What is refused, and what needs no DeepSpeed, is in test_deepspeed_checks.py.
"""

import importlib.util
import json
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from packaging.version import Version
from processes import run_program

from hf_trainopt.accumulation.deepspeed_checks import FIRST_THAT_COALESCES, FIRST_THAT_LOOKS_FOR_NAN
from hf_trainopt.core.installed import installed_version


if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is in the extra 'deepspeed'", allow_module_level=True)

INSTALLED = Version(installed_version("deepspeed"))
COALESCES, LOOKS_FOR_NAN = (Version(first) <= INSTALLED for first in (FIRST_THAT_COALESCES, FIRST_THAT_LOOKS_FOR_NAN))
needs_coalescing = pytest.mark.skipif(not COALESCES, reason=f"needs deepspeed >= {FIRST_THAT_COALESCES}")
needs_looking = pytest.mark.skipif(not LOOKS_FOR_NAN, reason=f"needs deepspeed >= {FIRST_THAT_LOOKS_FOR_NAN}")

STAGES = range(4)
WANDERING = [1, 2, 3, 2, 1, 3, 2, 4]
# Without 1: after a resume a window of one micro-batch may be a probe of what a reduction costs.
RESUMABLE = [2, 3, 2, 3, 2, 4, 2]
# Adam's ε: attention keys have biases whose gradient is zero but for rounding, and whose sign Adam would follow.
BASE = {"optim": "adamw_torch", "gradient_accumulation_steps": 2, "adam_epsilon": 1e-3, "learning_rate": 3e-3,
        "logging_first_step": True}  # fmt: skip
FIXED = {"accumulation_policy": "fixed", "measure_noise_scale": True}
SAVED = {"save_strategy": "steps", "save_steps": 3}
BF16 = {"bf16": {"enabled": "auto"}}
ADAM_NAMES = ("lr", "betas", "eps", "weight_decay")
ADAM = {"optimizer": {"type": "AdamW", "params": dict.fromkeys(ADAM_NAMES, "auto") | {"torch_adam": True}}}
WARMUP_NAMES = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")
WARMUP = {"scheduler": {"type": "WarmupDecayLR", "params": dict.fromkeys(WARMUP_NAMES, "auto")}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OFFLOAD_ALL = {**OFFLOAD, "offload_param": {"device": "cpu"}}


def zero(stage: int, zero: dict | None = None, **more) -> dict:
    return {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, **(zero or {})}, "steps_per_print": 10**9,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own is compiled for minutes
        **more,
    }  # fmt: skip


def fp16(scale_power: int) -> dict:
    return {"fp16": {"enabled": "auto", "initial_scale_power": scale_power, "hysteresis": 1}}


def make_cases() -> list[dict]:
    cases = []

    def add(name: str, config: dict | None = None, settings: dict | None = None, **more) -> None:
        cases.append({"name": name, "deepspeed": config, "arguments": BASE | (settings or {}), **more})

    add("ddp", sequence=WANDERING)
    add("ddp, Adam counts steps", None, {"adam_clock": "steps"}, sequence=WANDERING)
    for stage in STAGES:
        add(f"zero{stage}", zero(stage), sequence=WANDERING)
        if LOOKS_FOR_NAN:
            add(f"zero{stage}, bad loss", zero(stage), sequence=WANDERING, poisoned_step=3)
            add(f"zero{stage}, bad gradient", zero(stage), sequence=WANDERING, bad_gradient_step=3)
    add("ddp, bad loss", sequence=WANDERING, poisoned_step=3)
    add("zero2, offloaded", zero(2, OFFLOAD), sequence=WANDERING)
    add("zero3, offloaded", zero(3, OFFLOAD_ALL), sequence=WANDERING)
    add("zero3, DeepSpeed's Adam", zero(3, **ADAM), sequence=WANDERING)
    add("zero3, placed", zero(3), {"checkpoint_placement": "sqrt"}, sequence=WANDERING)
    for name, config in (("ddp", None), ("zero2", zero(2)), ("zero3", zero(3))):
        add(f"{name}, own loss", config, sequence=WANDERING, own_loss=True)
    one = {"gradient_accumulation_steps": 1}
    add("ddp, k_ref 1", None, one, sequence=WANDERING)
    add("zero2, k_ref 1", zero(2, OFFLOAD), one, sequence=WANDERING)
    for stage in (1, 2, 3) if COALESCES else ():
        add(f"zero{stage}, one reduction", zero(stage), {"coalesce_grad_reduction": True}, sequence=WANDERING)
    for name, config, settings in (
        ("zero0", zero(0), {}),
        ("zero2", zero(2), {}),
        ("zero3 bf16", zero(3, **BF16), {"bf16": True}),
        ("zero2 adam", zero(2, **ADAM), {}),
        ("zero1 schedule", zero(1, **WARMUP), {}),
        ("zero2 both", zero(2, **ADAM, **WARMUP), SAVED),
    ):
        add(f"constant, {name}", config, settings | FIXED)
        add(f"stock, {name}", config, settings, stock=True)
    add("from stock", zero(2, **ADAM, **WARMUP), FIXED, resume="stock, zero2 both")
    add("back to stock", zero(2, **ADAM, **WARMUP), stock=True, resume="constant, zero2 both")
    for name, config in (
        ("zero2", zero(2)),
        ("zero3", zero(3, OFFLOAD_ALL)),
        ("zero2 both", zero(2, **ADAM, **WARMUP)),
    ):
        add(f"whole, {name}", config, SAVED, sequence=RESUMABLE)
        add(f"resumed, {name}", config, sequence=RESUMABLE, resume=f"whole, {name}")
    add("terminated", zero(2), SAVED | {"save_steps": 100}, sequence=RESUMABLE, signal_step=4)
    add("resumed, terminated", zero(2), sequence=RESUMABLE, resume="terminated")
    if LOOKS_FOR_NAN:
        add("diverges", zero(2), {"max_skipped_windows": 1}, sequence=WANDERING, poisoned_step=3)
    for stage in (1, 2, 3):
        add(f"fp16, zero{stage}", zero(stage, **fp16(8)), {"fp16": True}, sequence=WANDERING)
    add("fp16, overflows", zero(2, **fp16(20)), {"fp16": True}, sequence=WANDERING)
    add("fp16, zero0", zero(0, **fp16(8)), {"fp16": True}, sequence=WANDERING)
    add("goodput", zero(2), {"optimizer_step_cost": 3.0, "num_train_epochs": 4})
    add("goodput, ddp", None, {"optimizer_step_cost": 3.0, "num_train_epochs": 4})
    return cases


class Runs:
    """What the worker wrote, by the name of a case."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __getitem__(self, name: str) -> dict:
        seen = json.loads((self.folder / f"{name}.0.json").read_text())
        assert "error" not in seen, seen["traceback"]
        return seen

    def error(self, name: str) -> str:
        return json.loads((self.folder / f"{name}.1.json").read_text())["error"]

    def lines(self, name: str, key: str) -> list:
        return [line.get(key) for line in self[name]["log"] if "loss" in line]

    def distance(self, name: str, other: str) -> float:
        """Largest difference between two weights of the same place."""
        self[name], self[other]
        one, two = (torch.load(self.folder / f"{run}.pt") for run in (name, other))
        return max((one[key] - two[key]).abs().max().item() for key in one)

    def statistics_distance(self, name: str, other: str) -> float:
        """Largest relative difference between the sums of two windows."""
        worst = 0.0
        for one, two in zip(self[name]["statistics"], self[other]["statistics"], strict=True):
            for key, value in one.items():
                assert value == pytest.approx(two[key], rel=0.5), key
                worst = max(worst, abs(value - two[key]) / abs(two[key] or 1.0))
        return worst


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("deepspeed")
    cases = folder / "cases.json"
    cases.write_text(json.dumps(make_cases()))
    worker = Path(__file__).with_name("deepspeed_worker.py")
    with mock.patch.dict("os.environ", {"DS_ACCELERATOR": "cpu"}):
        done = run_program([worker, folder, cases], ranks=2, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return Runs(folder)


# ---- Against DDP ---------------------------------------------------------------------------------------------------

LIKE_DDP = [
    *((f"zero{stage}", "ddp") for stage in STAGES),
    ("zero2, offloaded", "ddp"),
    ("zero3, offloaded", "ddp"),
    ("zero3, DeepSpeed's Adam", "ddp"),
    ("zero3, placed", "ddp"),
    ("zero2, own loss", "ddp, own loss"),
    ("zero3, own loss", "ddp, own loss"),
    ("zero2, k_ref 1", "ddp, k_ref 1"),
    *(pytest.param(f"zero{stage}, one reduction", "ddp", marks=needs_coalescing) for stage in (1, 2, 3)),
]


@pytest.mark.parametrize(("name", "reference"), LIKE_DDP)
def test_weights_statistics_norms_and_rates_are_those_of_ddp(name, reference, runs):
    assert [window["k"] for window in runs[name]["statistics"]] == WANDERING  # of different numbers of tokens
    assert runs.distance(name, reference) < 1.2e-7  # a unit in the last place of a weight of 1
    assert runs.statistics_distance(name, reference) < 1e-6
    for key in ("loss", "grad_norm", "learning_rate"):
        assert runs.lines(name, key) == pytest.approx(runs.lines(reference, key), rel=1e-5)
    noise = [[value for value in runs.lines(run, "noise_scale") if value] for run in (name, reference)]
    assert noise[0] == pytest.approx(noise[1], rel=1e-3)  # a quotient of differences
    assert runs[name]["global_samples"] == 2 * 3 * sum(WANDERING)


def test_the_clock_of_adam_is_a_part_of_that(runs):
    assert runs.distance("ddp", "ddp, Adam counts steps") > 1e-4


def test_goodput_chooses_the_same_k(runs):
    chosen = [window["k"] for window in runs["goodput"]["statistics"]]
    assert chosen == [window["k"] for window in runs["goodput, ddp"]["statistics"]]
    assert len(set(chosen)) > 1


@needs_coalescing
@pytest.mark.parametrize("stage", [2, 3])
def test_one_reduction_a_window_saves_collectives(stage, runs):
    assert runs[f"zero{stage}, one reduction"]["collectives"] <= runs[f"zero{stage}"]["collectives"]
    # Only in ZeRO-2 are they seen from Python: one for each micro-batch that is not the last of its window.
    saved = runs["zero2"]["collectives"] - runs["zero2, one reduction"]["collectives"]
    assert saved == sum(WANDERING) - len(WANDERING)


# ---- Against stock DeepSpeed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3 bf16", "zero2 adam", "zero1 schedule", "zero2 both"])
def test_with_a_constant_k_it_is_stock_deepspeed_to_the_bit(name, runs):
    assert runs.distance(f"constant, {name}", f"stock, {name}") == 0
    assert runs.lines(f"constant, {name}", "loss") == runs.lines(f"stock, {name}", "loss")


def test_checkpoints_of_stock_are_taken_up_and_ours_by_stock(runs):
    assert runs.distance("from stock", "stock, zero2 both") == 0
    assert runs.distance("back to stock", "stock, zero2 both") == 0


# ---- Resume, signals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero2 both"])
def test_a_resumed_run_ends_with_the_same_bits(name, runs):
    assert runs.distance(f"resumed, {name}", f"whole, {name}") == 0
    assert runs.lines(f"resumed, {name}", "loss") == runs.lines(f"whole, {name}", "loss")


def test_a_signal_to_one_rank_saves_and_ends_all(runs):
    assert runs["terminated"]["steps"] in (4, 5)
    assert runs.distance("resumed, terminated", "whole, zero2") == 0


# ---- Losses and gradients that aren't finite -----------------------------------------------------------------------


@needs_looking
@pytest.mark.parametrize("what", ["bad loss", "bad gradient"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(stage, what, runs):
    name = f"zero{stage}, {what}"
    assert runs.distance(name, "ddp, bad loss") < 1.2e-7
    assert runs.lines(name, "skipped_windows") == [None] * 3 + [1] * 5
    assert runs.lines(name, "learning_rate") == pytest.approx(runs.lines("ddp, bad loss", "learning_rate"))
    assert [window["k"] for window in runs[name]["statistics"]] == WANDERING


@needs_looking
def test_too_many_of_them_end_the_run(runs):
    assert "TrainingDivergedError: the loss or the gradients of 1 optimizer steps" in runs.error("diverges")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_measures_what_fp32_does(stage, runs):
    name = f"fp16, zero{stage}"
    assert runs.statistics_distance(name, "ddp") < 0.05
    assert runs.lines(name, "grad_norm") == pytest.approx(runs.lines("ddp", "grad_norm"), rel=0.01)
    assert set(runs.lines(name, "loss_scale")) == {256.0}


def test_fp16_overflows_are_skipped_and_counted(runs):
    name = "fp16, overflows"
    skipped, scales = runs.lines(name, "skipped_steps"), runs.lines(name, "loss_scale")
    assert skipped[0] == 1
    assert 1 < skipped[-1] == runs[name]["skipped_steps"] < len(WANDERING)
    assert scales[-1] == 2.0 ** (20 - skipped[-1])
    assert [math.isinf(norm) for norm in runs.lines(name, "grad_norm")].count(True) == skipped[-1]
    assert set(runs.lines(name, "skipped_windows")) == {None}  # the scaler's business
    # The data were used: schedule and k go on.
    assert runs.lines(name, "learning_rate") == pytest.approx(runs.lines("ddp", "learning_rate"), rel=0.05)
    assert [window["k"] for window in runs[name]["statistics"]] == WANDERING


def test_fp16_with_zero0_is_refused(runs):
    assert "fp16 and ZeRO stage 0, where DeepSpeed does not scale the loss" in runs.error("fp16, zero0")
