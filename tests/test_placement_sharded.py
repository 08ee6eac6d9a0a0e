"""Bytes of a rank under FSDP2 and DeepSpeed: predicted and measured on two ranks, what they add up to, refusals."""

import dataclasses
import importlib.util
import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers import skip_below
from processes import run_program
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_trainopt import cli
from hf_trainopt.machine.devices import DEVICES
from hf_trainopt.placement import PlacementError
from hf_trainopt.placement.plan.chain import path_of
from hf_trainopt.placement.plan.planner import PlacementPlanner
from hf_trainopt.placement.plan.run_sharding import accelerate_groups, groups_of
from hf_trainopt.placement.show.deepspeed import sharding_of_flags
from hf_trainopt.placement.show.flags import add_flags, check_flags
from hf_trainopt.placement.simulate.fake import fake_copy, fake_mode
from hf_trainopt.placement.simulate.sharding import Group, Sharding, ZeroSettings
from hf_trainopt.placement.simulate.step_setup import StepSetup


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is in the extra 'deepspeed'"
)
HAS_PEFT = importlib.util.find_spec("peft") is not None
SETTINGS = ZeroSettings(reduce_bucket_size=20_000, prefetch_bucket_size=10_000, persistence_threshold=100)
TIGHT = dataclasses.replace(SETTINGS, max_reuse_distance=0, max_live_parameters=20_000)


# ---- Predicted against measured ------------------------------------------------------------------------------------


BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
ZERO = {
    "reduce_bucket_size": 60_000,
    "stage3_prefetch_bucket_size": 40_000,
    "stage3_param_persistence_threshold": 1000,
}


def zero(stage: int, **more) -> dict:
    return {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, **ZERO, **more}, "steps_per_print": 10**9,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own is compiled for minutes
    }  # fmt: skip


FIXED = {"accumulation_policy": "fixed"}
ALL = {"checkpoint_placement": "all", **FIXED}
NONE = {"memory_budget": "100%", "memory_rewrites": "none", **FIXED}
EVERY_2 = {"checkpoint_placement": "every_2"}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
# It wins over `optim`.
ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}}
SPLIT = {"memory_rewrites": "none", "auto_micro_batch": True, "per_device_train_batch_size": 8, **FIXED}

# Budgets and more set-ups are in benchmarks/placement.py sharded: here each launch is to take seconds.
FSDP2_CASES = [
    {"name": "all, gpt2", "fsdp": True, "arguments": ALL, "model": "gpt2"},
    {"name": "k = 3", "fsdp": True, "arguments": EVERY_2, "k": 3},
    {"name": "planned size", "fsdp": True, "arguments": SPLIT | {"memory_budget": "13000000"}},
    # The last batch of an epoch has 8 rows on one rank and 5 on the other: no rank may wait for eight slices.
    {
        "name": "uneven ranks",
        "fsdp": True,
        "samples": 29,
        "arguments": SPLIT | {"memory_budget": "13000000", "accelerator_config": {"even_batches": False}},
    },
]
ZERO_CASES = [
    # First, in a process in which DeepSpeed hasn't replaced `F.linear` yet.
    {"name": "zero3, lora", "deepspeed": zero(3), "arguments": NONE, "lora": ["q_proj", "v_proj"]},
    {"name": "zero1, k = 3", "deepspeed": zero(1) | ADAM, "arguments": EVERY_2 | {"optim": "adamw_8bit"}, "k": 3},
    {"name": "zero2, all, gpt2", "deepspeed": zero(2, reduce_bucket_size=6e4), "arguments": ALL, "model": "gpt2"},
    {"name": "zero3, loaded in pieces", "deepspeed": zero(3), "arguments": ALL, "loads": True},
    {"name": "zero3, k = 3, offloaded", "deepspeed": zero(3, stage3_max_reuse_distance=50_000, **OFFLOADED),
     "arguments": EVERY_2, "k": 3},
    {"name": "no such budget", "deepspeed": zero(2), "arguments": {"memory_budget": "device", **FIXED}},
    {"name": "not predicted", "deepspeed": zero(2, round_robin_gradients=True), "arguments": ALL},
]  # fmt: skip


def launched(cases: list[dict], folder: Path, **environment: str) -> list[dict[str, dict]]:
    """Run cases on two ranks; return what each rank wrote, by the name of the case."""
    path = folder / "cases.json"
    path.write_text(json.dumps([case | {"width": 128, "vocabulary": 1000, "length": 64} for case in cases]))
    worker = BENCHMARKS / "placement_sharded.py"
    with mock.patch.dict("os.environ", environment):
        done = run_program([worker, folder, path], ranks=2, cwd=worker.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        {case["name"]: json.loads((folder / f"{case['name']}.{rank}.json").read_text()) for case in cases}
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory) -> list[dict[str, dict]]:
    skip_below("transformers", "5.23", "sharding at load time")
    return launched(FSDP2_CASES, tmp_path_factory.mktemp("fsdp2"))


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory) -> list[dict[str, dict]]:
    cases = [case for case in ZERO_CASES if HAS_PEFT or "lora" not in case]
    return launched(cases, tmp_path_factory.mktemp("zero"), DS_ACCELERATOR="cpu")


def check(ranks: list[dict[str, dict]], name: str) -> dict:
    """The peaks of a case are as predicted; return what the first rank wrote."""
    one, other = ranks[0][name], ranks[1][name]
    assert "error" not in one, one["traceback"]
    assert one["plan"] == other["plan"]
    # Of the fullest rank; but a thread of gloo may hold on to what it has sent, and then one rank is above that.
    assert pytest.approx(one["predicted"], rel=0.01) in (one["measured"], other["measured"])
    assert min(one["measured"], other["measured"]) < 1.01 * one["predicted"]
    assert one["loss"] == other["loss"]
    return one


@pytest.mark.parametrize("name", [case["name"] for case in FSDP2_CASES[:-1]])
def test_peaks_under_fsdp2(name, fsdp2):
    seen = check(fsdp2, name)
    assert seen["plan"]["details"]["sharding"] == "fsdp2"
    if name == "planned size":
        assert seen["predicted"] <= seen["plan"]["budget_bytes"]
        assert seen["micro_batch"] == seen["plan"]["details"]["micro_batch_size"] < 8


def test_ranks_of_unequal_rows_end_together(fsdp2):
    for seen in fsdp2:
        assert "into 8 slices on every rank" in seen["uneven ranks"]["error"]
        assert "rank 1 has only 5 rows of it. Drop the last batches" in seen["uneven ranks"]["error"]


@needs_deepspeed
@pytest.mark.parametrize("name", [case["name"] for case in ZERO_CASES[:-2]])
def test_peaks_under_deepspeed(name, deepspeed):
    if name == "zero3, lora" and not HAS_PEFT:
        pytest.skip("peft is in the extra 'examples'")
    assert check(deepspeed, name)["plan"]["details"]["sharding"] == name[:5]


@needs_deepspeed
def test_all_ranks_end_with_the_error_of_the_first(deepspeed):
    for rank in deepspeed:
        assert "which needs a GPU" in rank["no such budget"]["error"]


@needs_deepspeed
def test_a_named_policy_runs_without_a_prediction(deepspeed):
    for rank in deepspeed:
        seen = rank["not predicted"]
        assert seen["predicted"] is None
        assert {stage["recompute"] for stage in seen["plan"]["stages"].values()} == {"full"}


# ---- What a rank holds ---------------------------------------------------------------------------------------------


def llama(**options) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = {"vocab_size": 203, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}  # fmt: skip
    torch.manual_seed(0)
    ids = torch.zeros(2, 16, dtype=torch.long)
    return LlamaForCausalLM(LlamaConfig(**config | options)), {"input_ids": ids, "labels": ids}


def planner(sharding: Sharding, *, steps: int = 1, device: str = "cpu", **options) -> PlacementPlanner:
    setup = StepSetup(device=DEVICES[device], sharding=sharding, accumulation_steps=steps)
    return PlacementPlanner(*llama(**options), setup, memory_rewrites="none")


def peak(sharding: Sharding, **options) -> int:
    return planner(sharding, **options).baseline.peak_bytes


KINDS = ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2")


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_more_devices_never_need_more(kind, steps):
    found = [peak(Sharding(kind, number, zero=TIGHT), steps=steps) for number in (2, 3, 8, 16)]
    assert found == sorted(found, reverse=True)
    assert (found[0] > found[-1]) == (kind not in ("ddp", "zero0"))


@pytest.mark.parametrize("steps", [1, 2])
def test_each_stage_needs_no_more_than_the_one_before(steps):
    small = dataclasses.replace(TIGHT, reduce_bucket_size=2000, prefetch_bucket_size=2000, max_live_parameters=2000)
    found = [peak(Sharding(f"zero{stage}", 4, zero=small), steps=steps) for stage in (1, 2, 3)]
    assert found == sorted(found, reverse=True)


def test_one_device_is_one_device():
    assert peak(Sharding("ddp", 1)) == peak(Sharding("zero0", 1)) == peak(Sharding())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held_adds_up(kind):
    """Bytes by kind against a slow twin: parameter by parameter."""
    number = 3
    subject = planner(Sharding(kind, number, zero=TIGHT))
    sizes = [tuple(p.shape) for p in llama()[0].parameters()]
    numels = [torch.Size(shape).numel() for shape in sizes]
    whole = sum(numels)
    flat = -(-whole // (2 * number)) * 2
    pieces = sum(-(-numel // number) for numel in numels)
    rows = sum(-(-shape[0] // number) * numel // shape[0] for shape, numel in zip(sizes, numels, strict=True))
    parameters = {"zero1": number * flat, "zero2": number * flat, "zero3": pieces, "fsdp2": rows}.get(kind, whole)
    # Adam's two moments, and the master weights of DeepSpeed.
    states = {"zero1": 3 * flat, "zero2": 3 * flat, "zero3": 3 * pieces, "fsdp2": 2 * rows}.get(kind, 2 * whole)
    found = subject.baseline.peak_by_kind()
    assert found["parameters"] == 4 * parameters
    assert found["optimizer"] == pytest.approx(4 * states, abs=4 * 100)  # counters of steps


@pytest.mark.parametrize(
    ("kind", "optimizer", "parameters"),
    [("zero1", 1, 0), ("zero2", 1, 0), ("zero3", 1, 0), ("zero3", 1, 1), ("fsdp2", 1, 1)],
)
def test_what_is_offloaded_moves_to_the_host(kind, optimizer, parameters):
    stays = planner(Sharding(kind, 4, zero=TIGHT), device="a100").baseline
    moved = planner(Sharding(kind, 4, bool(optimizer), bool(parameters), zero=TIGHT), device="a100").baseline
    assert stays.host_bytes == 0
    assert moved.host_bytes >= stays.peak_by_kind()["optimizer"]
    assert "optimizer" not in moved.peak_by_kind()
    assert moved.peak_bytes < stays.peak_bytes
    if parameters:
        assert "parameters" not in moved.peak_by_kind()
    # On a CPU both are the same memory.
    assert planner(Sharding(kind, 4, bool(optimizer), bool(parameters), zero=TIGHT)).baseline.host_bytes == 0


def test_zero3_keeps_what_is_needed_again_soon():
    """In a model of fewer parameters than `max_reuse_distance`, all that were whole in the forward pass."""
    kept = planner(Sharding("zero3", 4, zero=SETTINGS)).baseline.peak_by_kind()["gathered"]
    assert kept == pytest.approx(4 * sum(p.numel() for p in llama()[0].parameters()), rel=0.02)
    assert planner(Sharding("zero3", 4, zero=TIGHT)).baseline.peak_by_kind()["gathered"] < 0.8 * kept


def test_larger_buckets_take_their_bytes():
    small, large = (
        planner(Sharding("zero3", 4, zero=dataclasses.replace(TIGHT, reduce_bucket_size=size))).baseline
        for size in (50_000, 150_000)
    )
    assert large.peak_by_kind()["communication"] - small.peak_by_kind()["communication"] == 4 * 100_000


def test_half_precision_halves_what_is_gathered():
    full, half = (
        planner(Sharding("fsdp2", 4, dtype=dtype), device="a100").baseline for dtype in (None, torch.bfloat16)
    )
    assert half.peak_by_kind()["parameters"] == full.peak_by_kind()["parameters"]  # shards keep their type
    assert half.peak_by_kind()["gathered"] < full.peak_by_kind()["gathered"]


def test_zero3_keeps_the_inputs_of_frozen_layers():
    model, batch = llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    found = []
    for keeps in (True, False):
        zero = dataclasses.replace(TIGHT, memory_efficient_linear=keeps)
        setup = StepSetup(sharding=Sharding("zero3", 2, zero=zero))
        found.append(PlacementPlanner(model, batch, setup, memory_rewrites="none").baseline.peak_by_kind())
    # The inputs of q, k and v, of gate and up, and of down; attention keeps that of o anyway.
    assert found[0]["activations"] - found[1]["activations"] == 2 * 4 * 2 * 16 * (32 + 32 + 48)


@pytest.mark.parametrize("kind", ["zero2", "fsdp2"])
def test_the_chain_of_the_solver_fits_the_replays(kind):
    """It counts at most one group of gathered parameters too few: the first and the last gather other neighbours."""
    subject = planner(Sharding(kind, 2, zero=SETTINGS))
    group = 4 * sum(p.numel() for p in llama()[0].model.layers[0].parameters())
    half = (subject.floor.peak_bytes + subject.baseline.peak_bytes) // 2
    plans = [subject.named("none"), subject.named("all"), subject.for_budget(f"{half}B")]
    assert plans[-1].predicted_peak_bytes <= half
    for plan in plans:
        chain = subject.chains()[plan.rewrites]
        counted = chain.peak(path_of(chain, plan.stages))
        assert 1.1 * plan.predicted_peak_bytes >= counted
        assert counted >= plan.predicted_peak_bytes - (group if kind in ("fsdp2", "zero3") else 256)


@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_the_head_in_pieces_has_no_chunked_loss(kind):
    assert not PlacementPlanner(*llama(), StepSetup(sharding=Sharding(kind, 2))).available.chunked_loss
    with pytest.raises(PlacementError, match="in pieces outside the head's forward pass; leave chunked_loss out"):
        PlacementPlanner(*llama(), StepSetup(sharding=Sharding(kind, 2)), memory_rewrites="chunked_loss")


# ---- Models that are in pieces -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_groups_are_those_that_accelerate_makes(tied, one_rank):
    from accelerate.utils import fsdp_utils

    if not hasattr(fsdp_utils, "_find_final_norm"):
        pytest.skip("an Accelerate without groups beside the layers")
    model = llama(tie_word_embeddings=tied)[0]
    expected = set(accelerate_groups(model, set(model.model.layers)))
    plugin = SimpleNamespace(
        set_auto_wrap_policy=lambda model: None, reshard_after_forward=True, cpu_offload=None, ignored_modules=None,
        mixed_precision_policy=None, cpu_ram_efficient_loading=False, auto_wrap_policy=None,
    )  # fmt: skip
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=True,
        torch_device_mesh=None, device=torch.device("cpu"),
    )  # fmt: skip
    layers = set(model.model.layers)
    with mock.patch.object(fsdp_utils, "fsdp2_prepare_auto_wrap_policy", return_value=lambda module: module in layers):
        fsdp_utils.fsdp2_prepare_model(accelerator, model)
    found = {Group(tuple(sorted(group.modules)), group.is_kept) for group in groups_of(model)}
    assert found == {
        Group(tuple(sorted(group.modules)), group.is_kept) for group in expected if group.modules != ("",)
    }


def test_a_model_in_pieces_is_copied_whole_and_left_as_it_was(one_rank):
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model, batch = llama()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=one_rank)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    copied = fake_copy(model, fake_mode())
    assert {name: parameter.shape for name, parameter in copied.named_parameters()} == shapes
    assert not any(isinstance(module, FSDPModule) or module._forward_pre_hooks for module in copied.modules())
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert isinstance(model, FSDPModule)
    model(**batch).loss.backward()


# ---- The command line ----------------------------------------------------------------------------------------------

MODEL = ["plan", "--model_type", "llama", "--config_overrides", "num_hidden_layers=1,hidden_size=32,"
         "intermediate_size=48,num_attention_heads=4,num_key_value_heads=2,vocab_size=200", "--block_size", "32",
         "--per_device_train_batch_size", "2", "--device", "a100", "--memory_rewrites", "none"]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--world_size 4", "--world_size is --num_devices now; pass --num_devices 4"),
        ("--sharding zero3", "--sharding zero3 needs --num_devices of 2 or more"),
        ("--offload_optimizer", "--offload_optimizer needs --num_devices of 2 or more"),
        ("--num_devices 4 --offload_optimizer", "needs --sharding zero1, zero2, zero3 or fsdp2, not ddp"),
        ("--num_devices 4 --sharding zero2 --offload_parameters", "needs --sharding zero3 or fsdp2, not zero2"),
        ("--num_devices 4 --sharding fsdp2 --offload_optimizer", "FSDP2 offloads both"),
        ("--num_devices 4 --sharding zero0 --bf16", "ZeRO-0 is planned in float32 only"),
        ("--num_devices 4 --sharding ddp --deepspeed x.json", "--deepspeed needs --sharding zero0"),
        ("--num_devices 4 --sharding zero2 --deepspeed x.json", "x.json is not a file"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together(flags, message, capsys):
    assert cli.main([*MODEL, *flags.split()]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("flags", ["--sharding zero3 --offload_optimizer", "--sharding fsdp2 --bf16", ""])
def test_plans_on_the_command_line(flags, capsys, tmp_path):
    path = tmp_path / "plan.json"
    budget = ["--checkpoint_placement", "all", "--output", str(path)]
    assert not cli.main([*MODEL, "--num_devices", "4", *flags.split(), *budget])
    out = " ".join(capsys.readouterr().out.split())
    assert "over 4 devices; bytes are those of one" in out
    assert ("optimizer on the host" in out) == ("offload" in flags)
    details = json.loads(path.read_text())["details"]
    assert (details["sharding"], details["num_devices"]) == (flags.split()[1] if flags else "ddp", 4)
    assert (details["host_bytes"] > 0) == ("offload" in flags)


def test_find_under_sharding(capsys):
    flags = "--num_devices 4 --sharding fsdp2 --memory_budget 16.7MiB --find per_device_train_batch_size --json"
    assert not cli.main([*MODEL, *flags.split()])
    found = json.loads(capsys.readouterr().out)
    assert found["largest"] >= 1
    sizes = next(value for value in found.values() if isinstance(value, list))
    assert all(size["seconds"] > 0 for size in sizes)


# ---- Configurations of DeepSpeed on the command line ---------------------------------------------------------------


def settled(tmp_path: Path, config: object, flags: str = "") -> tuple[Namespace, Sharding]:
    """Return the flags and the sharding of a plan with a configuration."""
    path = tmp_path / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    parser = ArgumentParser()
    add_flags(parser)
    arguments = parser.parse_args([*MODEL[1:], "--num_devices", "2", *flags.split(), "--deepspeed", str(path)])
    check_flags(arguments)
    return arguments, sharding_of_flags(arguments, llama()[0])


def test_a_configuration_decides(tmp_path, capsys):
    config = zero(2, reduce_bucket_size=12345.0, offload_optimizer={"device": "cpu"}) | ADAM
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    flags = ["--num_devices", "2", "--deepspeed", str(path), "--checkpoint_placement", "all"]
    assert not cli.main([*MODEL, *flags])
    out = " ".join(capsys.readouterr().out.split())
    assert "ZeRO-2 over 2 devices; bytes are those of one; buckets of 12,345 numbers; optimizer on the host" in out
    assert "AdamW of the DeepSpeed configuration" in out


@pytest.mark.parametrize(
    ("config", "flags", "expected"),
    [
        ({"stage": 1}, "", Sharding("zero1", 2)),
        ({"stage": 3, "cpu_offload": True}, "--sharding zero3", Sharding("zero3", 2, offload_optimizer=True)),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, "", Sharding("zero3", 2, offload_parameters=True)),
        ({"stage": 2}, "--bf16", Sharding("zero2", 2, dtype=torch.bfloat16)),
        ({"stage": 2, "reduce_bucket_size": "auto"}, "", Sharding("zero2", 2, zero=ZeroSettings(1024))),
    ],
)
def test_stage_and_offload_are_the_configurations(config, flags, expected, tmp_path):
    arguments, found = settled(tmp_path, {"zero_optimization": config, "fp16": {"enabled": "auto"}}, flags)
    assert found == expected
    assert (arguments.sharding, arguments.offload_optimizer) == (expected.kind, expected.offload_optimizer)


ZERO_2 = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        ("[]", "", "holds a list; a configuration is a JSON object"),
        ("{", "", "isn't JSON"),
        ({"zero_optimization": None}, "", "zero_optimization of the DeepSpeed configuration is None; make it"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0.5}}, "", "reduce_bucket_size is 0.5"),
        ({"zero_optimization": {"stage": 3}}, "--sharding zero2", "--sharding zero2 contradicts .*stage is 3"),
        ({}, "--sharding zero2", "--sharding zero2 contradicts .*stage is 0"),
        (ZERO_2, "--offload_optimizer", "--offload_optimizer contradicts .*set zero_optimization.offload_optimizer"),
        (ZERO_2 | {"bf16": {"enabled": True}}, "", "bf16.enabled true .*; pass --bf16"),
        (ZERO_2 | {"bf16": {"enabled": False}}, "--bf16", "bf16.enabled false .* contradicts --bf16"),
        (ZERO_2 | {"communication_data_type": "fp32"}, "", "communication_data_type=fp32, which isn't planned for"),
        (ZERO_2 | {"optimizer": {"type": "Lion"}}, "", "the optimizer Lion .*, which isn't planned for"),
        (ZERO_2 | ADAM, "--optim sgd", "optimizer in .* contradicts --optim sgd; leave out one of them"),
        (ZERO_2 | {"gradient_clipping": 0.5}, "", "gradient_clipping 0.5 .*; pass --max_grad_norm 0.5"),
        (ZERO_2 | {"train_micro_batch_size_per_gpu": 4}, "", "pass --per_device_train_batch_size 4"),
        (ZERO_2 | {"train_batch_size": 8}, "", "train_batch_size 8 .* the flags, which make 4"),
    ],
)  # fmt: skip
def test_what_a_configuration_contradicts_is_said(config, flags, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        settled(tmp_path, config, flags)
    assert not isinstance(caught.value, PlacementError)  # whose remedies are those of a run
