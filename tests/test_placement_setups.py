"""How a run is spread over devices, read from its Trainer: configurations of DeepSpeed, plugins of Accelerate."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from helpers import tiny_gpt2
from torch import nn

from hf_trainopt.placement import PlacementError
from hf_trainopt.placement.plan.planner import PlacementPlanner
from hf_trainopt.placement.plan.run_optimizer import optimizer_of
from hf_trainopt.placement.plan.run_planner import RunPlanner
from hf_trainopt.placement.plan.run_sharding import sharding_of
from hf_trainopt.placement.simulate.sharding import Sharding, ZeroSettings
from hf_trainopt.placement.simulate.step_setup import StepSetup


# ---- DeepSpeed -----------------------------------------------------------------------------------------------------


CONFIGS = [
    (
        {"zero_optimization": {"stage": 2, "contiguous_gradients": False}},
        "zero_optimization.contiguous_gradients=False",
    ),
    ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size=8"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param to NVMe"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "to the host in part"),
    ({"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "fp32"}}, "data_types.grad_accum_dtype"),
    ({"zero_optimization": {"stage": 2}, "torch_autocast": {"enabled": True}}, "torch_autocast.enabled"),
    ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Lion"}}, "the optimizer Lion"),
    ({"bf16": {"enabled": True}}, "ZeRO stage 0 in bfloat16"),
    ({"zero_optimization": {"stage": 3, "allgather_sequential": True}}, "zero_optimization.allgather_sequential=True"),
    ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow"),
]


def deepspeed_run(config: dict, mixed_precision: str = "no") -> Sharding:
    trainer = SimpleNamespace(
        is_deepspeed_enabled=True, args=SimpleNamespace(world_size=2), model=tiny_gpt2(),
        accelerator=SimpleNamespace(mixed_precision=mixed_precision),
    )  # fmt: skip
    with mock.patch("hf_trainopt.placement.plan.run_sharding._config", return_value=config):
        return sharding_of(trainer)


@pytest.mark.parametrize(("config", "message"), CONFIGS)
def test_what_is_not_predicted_is_said(config, message):
    with pytest.raises(PlacementError, match=f"{message}.*checkpoint_placement='all'"):
        deepspeed_run(config)


def test_auto_buckets_are_those_of_transformers():
    config = {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_max_live_parameters": 7}}
    found = deepspeed_run(config | {"bf16": {"enabled": "auto"}}, "bf16")
    assert (found.kind, found.num_devices, found.dtype) == ("zero3", 2, torch.bfloat16)
    assert found.zero == ZeroSettings(reduce_bucket_size=16 * 16, max_live_parameters=7)


SIZES = {
    "reduce_bucket_size": "reduce_bucket_size",
    "stage3_prefetch_bucket_size": "prefetch_bucket_size",
    "prefetch_bucket_size": "prefetch_bucket_size",
    "stage3_param_persistence_threshold": "persistence_threshold",
    "param_persistence_threshold": "persistence_threshold",
    "stage3_model_persistence_threshold": "model_persistence_threshold",
    "stage3_max_live_parameters": "max_live_parameters",
    "max_reuse_distance": "max_reuse_distance",
    "sub_group_size": "sub_group_size",
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_may_be_written_as_floats(name):
    for value in (2e8, 200_000_000, "200000000"):
        found = deepspeed_run({"zero_optimization": {"stage": 3, name: value}}).zero
        assert found == ZeroSettings(**{SIZES[name]: 200_000_000})
        assert type(getattr(found, SIZES[name])) is int


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf"), -1, "2e8", None, [1]])
def test_sizes_are_whole_numbers(value):
    with pytest.raises(PlacementError, match=r"reduce_bucket_size is .*give a whole number"):
        deepspeed_run({"zero_optimization": {"stage": 2, "reduce_bucket_size": value}})


def test_flags_are_no_sizes():
    zero = {"stage": 3, "overlap_comm": True, "memory_efficient_linear": False}
    assert deepspeed_run({"zero_optimization": zero}).zero == ZeroSettings(
        overlap_comm=True, memory_efficient_linear=False
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": None}, "zero_optimization of the DeepSpeed configuration is None"),
        ({"zero_optimization": True}, "make it a JSON object"),
        ({"zero_optimization": {"stage": 4}}, "stage is 4; it must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2}, "bf16": True}, "bf16 of the DeepSpeed configuration is True"),
    ],
)
def test_what_deepspeed_does_not_take_is_said(config, message):
    with pytest.raises(PlacementError, match=message):
        deepspeed_run(config)


def test_the_old_name_of_bf16_is_read():
    zero = {"zero_optimization": {"stage": 2}}
    assert deepspeed_run(zero | {"bfloat16": {"enabled": True}}).dtype == torch.bfloat16
    assert deepspeed_run(zero | {"bfloat16": {"enabled": True}, "bf16": {"enabled": False}}).dtype is None


@pytest.mark.parametrize(
    ("stage", "old", "new"),
    [
        (2, {"cpu_offload": True}, {"offload_optimizer": {"device": "cpu"}}),
        (3, {"cpu_offload": True}, {"offload_optimizer": {"device": "cpu"}}),
        (3, {"cpu_offload_param": True}, {"offload_param": {"device": "cpu"}}),
        (3, {"cpu_offload_params": True}, {"offload_param": {"device": "cpu"}}),
        (3, {"cpu_offload": False, "cpu_offload_param": False}, {}),
    ],
)
def test_old_switches_offload_as_the_new_sections_do(stage, old, new):
    found, expected = (deepspeed_run({"zero_optimization": {"stage": stage, **zero}}) for zero in (old, new))
    assert found == expected
    assert (found.offload_optimizer or found.offload_parameters) == bool(new)


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_bnb_8bit", "galore_adamw", "lion_8bit", "sgd"])
@pytest.mark.parametrize("is_made", [False, True])
def test_the_optimizer_of_the_configuration_wins(name, is_made):
    class Own:
        def create_optimizer(self):
            raise AssertionError("Trainer doesn't ask for it")

    model = tiny_gpt2()
    trainer = Own() if is_made else SimpleNamespace()
    vars(trainer).update(
        is_deepspeed_enabled=True, args=SimpleNamespace(optim=name), model=model, compute_loss_func=None,
        optimizer=None, optimizer_cls_and_kwargs=(torch.optim.SGD, {}),
    )  # fmt: skip
    config = {"optimizer": {"type": "Adam", "params": {"torch_adam": True}}}
    with mock.patch("hf_trainopt.placement.plan.run_sharding._config", return_value=config):
        made = optimizer_of(trainer, model, is_flat=True)
    assert type(made) is torch.optim.AdamW
    assert not made.defaults["fused"]


# ---- FSDP2 through Accelerate --------------------------------------------------------------------------------------


def fsdp2_run(model: torch.nn.Module, names: list[str] | None = None, **parallelism) -> SimpleNamespace:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=names
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no",
        gradient_state=SimpleNamespace(plugin_kwargs={}), parallelism_config=ParallelismConfig(**parallelism),
    )  # fmt: skip
    return SimpleNamespace(
        args=SimpleNamespace(world_size=4), model=model, accelerator=accelerator, is_deepspeed_enabled=False,
        is_fsdp_enabled=True, is_distributed_loading_by_transformers=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "number"),
    [({}, 4), ({"dp_shard_size": 4}, 4), ({"dp_replicate_size": 2, "dp_shard_size": 2}, 2)],
)
def test_hsdp_shards_over_the_ranks_of_one_copy(sizes, number):
    found = sharding_of(fsdp2_run(tiny_gpt2(), **sizes))
    assert (found.kind, found.num_devices) == ("fsdp2", number)


@pytest.mark.parametrize("names", [None, ["GPT2Block"]])
def test_a_second_train_finds_the_groups_of_the_first(names, one_rank):
    trainer = fsdp2_run(tiny_gpt2(), names)
    first = sharding_of(trainer)
    plugin = trainer.accelerator.state.fsdp_plugin
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=True,
        torch_device_mesh=None, device=torch.device("cpu"),
    )  # fmt: skip
    fsdp2_prepare_model(accelerator, trainer.model)
    second = sharding_of(trainer)
    assert len(second.groups) == len(first.groups) >= 4
    assert {(frozenset(group.modules), group.is_kept) for group in second.groups} == {
        (frozenset(group.modules), group.is_kept) for group in first.groups
    }
    assert RunPlanner(trainer, None)._sharding_request() == {"sharding": repr(second)}


def test_classes_that_the_model_lacks_are_said():
    trainer = fsdp2_run(tiny_gpt2(), ["BertLayer"])
    with pytest.raises(PlacementError, match=r"class BertLayer in the model\. Set transformer_layer_cls_to_wrap"):
        sharding_of(trainer)
    assert "BertLayer" in RunPlanner(trainer, None)._sharding_request()["sharding"]  # named policies run


# ---- Types that differ ---------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen layer in bfloat16 and a trained one in float32, whichever comes first."""

    def __init__(self, names: tuple[str, str]):
        super().__init__()
        for name in names:
            layer = nn.Linear(128, 128, bias=False, dtype=torch.bfloat16 if name == "base" else torch.float32)
            setattr(self, name, layer.requires_grad_(name == "adapter"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.base(x.bfloat16()).float() + self.adapter(x))


@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_each_type_takes_its_own_bytes(kind):
    """Which parameter comes first says nothing of the others' types."""
    zero = ZeroSettings(20_000, prefetch_bucket_size=10**6, persistence_threshold=0)
    setup = StepSetup(sharding=Sharding(kind, 2, zero=zero))
    found = []
    for names in (("base", "adapter"), ("adapter", "base")):
        model = nn.Sequential(*(Adapted(names) for _ in range(3)))
        planner = PlacementPlanner(model, torch.zeros(2, 128), setup, memory_rewrites="none")
        found.append(planner.baseline)
    assert found[0].peak_bytes == found[1].peak_bytes
    # Under FSDP2, a layer, the buffer of the next, and that of the reduce-scatter. Under ZeRO-3 all are gathered at
    # once, into a buffer for each type, and copied out of it.
    layer = (2 + 4) * 128 * 128
    expected = {"fsdp2": 2 * layer + 4 * 128 * 128, "zero3": 2 * 3 * layer}
    assert found[0].peak_by_kind()["gathered"] == expected[kind]


def test_zero0_reduces_one_type_after_another():
    peaks = []
    for names in (("base", "adapter"), ("adapter", "base")):
        model = nn.Sequential(*(Adapted(names) for _ in range(3))).requires_grad_(True)
        setup = StepSetup(sharding=Sharding("zero0", 2), max_grad_norm=0)
        planner = PlacementPlanner(model, torch.zeros(2, 128), setup, memory_rewrites="none")
        assert planner.baseline.peak_by_kind()["communication"] == 3 * 4 * 128 * 128  # of the larger type
        peaks.append(planner.baseline.peak_bytes)
    assert peaks[0] == peaks[1]
