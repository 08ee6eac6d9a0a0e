"""Tensor parallelism (gloo, CPU): alone on two ranks, and with data parallelism and FSDP2 on four."""

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import Rows, arguments, skip_below, tiny_gpt2
from packaging.version import Version
from parallel_norms_worker import FAMILIES
from processes import run_program
from safetensors.torch import load_file
from test_distributed import assert_close_weights, launch_all

from hf_trainopt import EfficientTrainer
from hf_trainopt.accumulation import fetch
from hf_trainopt.accumulation.sums import local_sums, micro_batch_weights, pack_sums, unpack_sums
from hf_trainopt.accumulation.tensor_parallel import TensorParallelGroup, modules_with_summed_gradients
from hf_trainopt.core import versions as _versions
from hf_trainopt.core.facts import data_parallel_size, sequence_shards, tensor_parallel_size


WORKER = Path(__file__).parent / "tensor_parallel_worker.py"


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, list[dict]]:
    """Whole models on one process."""
    cases = ["whole qwen3 sequence", "whole qwen3 stock"]
    return launch_all(cases, tmp_path_factory.mktemp("alone"), num_processes=1, worker=WORKER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, list[dict]]:
    """Two ranks: tensor-parallel, or DDP."""
    skip_below("transformers", "5.23", "saving tensor-parallel models")
    cases = ["tp qwen3 sequence", "tp qwen3 recompute", "tp qwen3 constant", "tp qwen3 stock", "tp llama stock",
             "tp llama constant", "tp llama goodput", "ddp qwen3 sequence"]  # fmt: skip
    return launch_all(cases, folder, worker=WORKER)


@pytest.fixture(scope="module")
def runs_of_four(tmp_path_factory) -> dict[str, list[dict]]:
    """Four ranks: two groups of two."""
    skip_below("transformers", "5.23", "sharding at load time")
    cases = ["2d qwen3 sequence", "hsdp qwen3 sequence"]
    return launch_all(cases, tmp_path_factory.mktemp("four"), num_processes=4, worker=WORKER)


def assert_same_training(ours: list[dict], twin: dict) -> None:
    """All ranks have seen the same; k, samples, statistics and weights are those of the twin."""
    for record in ours[1:]:
        assert record["steps"] == ours[0]["steps"]
        assert record["statistics"] == ours[0]["statistics"]
    assert [(step["k"], step["samples"]) for step in ours[0]["steps"]] == [
        (step["k"], step["samples"]) for step in twin["steps"]
    ]
    assert len(ours[0]["statistics"]) == len(twin["statistics"]) > 4
    for found, expected in zip(ours[0]["statistics"], twin["statistics"], strict=True):
        assert found == pytest.approx(expected, rel=1e-6)
    assert_close_weights(ours[0], twin)


def test_statistics_and_weights_equal_those_of_one_process(runs, alone):
    """Pieces of weights, whole weights, and norms of which each rank has a term of the gradient."""
    # One group measures k = 1 by halves.
    assert {step["k"] for step in runs["tp qwen3 sequence"][0]["steps"]} == {1, 2, 3, 4}
    assert_same_training(runs["tp qwen3 sequence"], alone["whole qwen3 sequence"][0])


@pytest.mark.parametrize("sharding", ["2d", "hsdp"])
def test_statistics_and_weights_of_two_groups_equal_those_of_two_ranks(sharding, runs_of_four, runs):
    """With FSDP2 (`2d`) and with replicas (`hsdp`): W is 2, not 4."""
    assert_same_training(runs_of_four[f"{sharding} qwen3 sequence"], runs["ddp qwen3 sequence"][0])


def test_recomputed_layers_give_the_same_bits(runs):
    plain, recomputed = runs["tp qwen3 sequence"], runs["tp qwen3 recompute"]
    assert recomputed[0]["plan"]["stages"]
    for a, b in zip(plain, recomputed, strict=True):
        assert a["weights"] == b["weights"]
        assert a["statistics"] == b["statistics"]


def test_constant_k_is_stock_to_the_bit(runs):
    stock, ours = runs["tp llama stock"], runs["tp llama constant"]
    assert [step["checksum"] for step in stock[0]["steps"]] == [step["checksum"] for step in ours[0]["steps"]]
    assert stock[0]["weights"] == ours[0]["weights"]


def test_summed_gradients_are_right_where_stock_counts_them_twice(runs, alone):
    """Documents why constant k is not stock's for such models. Goes when upstream sums each micro-batch once."""
    records = alone["whole qwen3 stock"][0], runs["tp qwen3 constant"][0], runs["tp qwen3 stock"][0]
    names = [name for name in records[0]["weights"] if re.search(r"self_attn\.._norm", name)]
    expected, ours, stock = (
        torch.tensor([record["weights"][name] for name in names]) - 1
        for record in records  # they begin at 1
    )
    assert expected.abs().max() > 1e-5
    assert torch.allclose(ours, expected, rtol=0, atol=3e-7)
    assert (stock - expected).norm() > 0.5 * expected.norm()


def test_decisions_and_counts_are_the_same_on_all_ranks(runs):
    first, second = runs["tp llama goodput"]
    assert first["steps"] == second["steps"]
    assert len({step["k"] for step in first["steps"]}) > 1
    assert first["steps"][-1]["noise"] is not None
    last = first["history"][-1]
    assert last["samples_seen"] == 2 * 48
    # 12 tokens in each sample; each of the two ranks has run all of them.
    assert last["tokens_per_second"] == pytest.approx(12 * last["samples_per_second"])
    assert last["train_samples_per_second"] == pytest.approx(2 * 48 / last["train_runtime"], rel=1e-2)


@pytest.fixture(scope="module")
def norms_of_families(tmp_path_factory) -> list[dict]:
    """What each rank found, by family of models."""
    skip_below("transformers", "5.23", "tensor parallelism of experts")
    folder = tmp_path_factory.mktemp("families")
    worker = Path(__file__).parent / "parallel_norms_worker.py"
    done = run_program([worker, folder], ranks=2, cwd=worker.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_of_many_kinds_of_layers_equal_those_of_whole_gradients(family, norms_of_families):
    for found in norms_of_families:
        case = found[family]
        assert case["norms"] == pytest.approx(case["expected"], rel=1e-6)
        assert case["window"] == pytest.approx(case["expected_window"], rel=1e-6)
        assert case["difference"] < 1e-4


def test_checkpoints_are_complete_and_have_whole_weights(runs, folder):
    """`Trainer` saves no optimizer state of such models; a run can begin with their weights."""
    checkpoints = sorted((folder / "tp llama goodput" / "run").glob("checkpoint-*"), key=lambda p: p.stat().st_mtime)
    assert len(checkpoints) == 2
    assert all((path / "checkpoint_manifest.json").exists() for path in checkpoints)
    saved, trained = load_file(checkpoints[-1] / "model.safetensors"), runs["tp llama goodput"][0]["weights"]
    assert saved.keys() == trained.keys()
    assert all(torch.equal(value, torch.tensor(trained[name])) for name, value in saved.items())


# ---- Sums ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_items", [True, False])
@pytest.mark.parametrize("copies", [2, 3])
def test_groups_count_as_one_rank_each(by_items, copies):
    """Two groups, whose ranks have parts of the square norms, against two ranks."""
    items, norms, groups = [[3, 5], [4, 1]], [[0.2, 0.7], [0.5, 0.1]], 2
    total = 13 if by_items else None
    ranks, parts = [], []
    for n, norm in zip(items, norms, strict=True):
        weights = micro_batch_weights(n, groups, by_items, total)
        ranks.append(pack_sums(*_nothing(6), local_sums(norm, n, weights, 0.5)))
        shares = [0.25, 0.75] if copies == 2 else [0.5, 0.125, 0.375]
        for share in shares:
            sums = local_sums([share * square for square in norm], n, weights, 0.5, copies)
            parts.append(pack_sums(*_nothing(6 / copies), sums))
    expected, found = (unpack_sums(sum(vectors).tolist())[1] for vectors in (ranks, parts))
    assert vars(found) == pytest.approx(vars(expected), rel=1e-12)
    assert (found.num_samples, found.num_micro_batches) == (12, 4)


def _nothing(num_samples: float):
    from hf_trainopt.accumulation.sums import Proposal

    return Proposal(), num_samples, 0.0


def test_modules_are_found_by_the_plan_of_the_model():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "head_dim": 4, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=8, num_hidden_layers=11, num_key_value_heads=2, **sizes)
    model = Qwen3ForCausalLM(config)
    assert modules_with_summed_gradients(model) == []  # it is whole
    model._tp_size = 2
    found = modules_with_summed_gradients(model)
    layers = model.model.layers
    assert set(found) == {norm for layer in layers for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm)}
    assert set(modules_with_summed_gradients(torch.nn.Sequential(model))) == set(found)
    assert modules_with_summed_gradients(tiny_gpt2()) == []
    group = TensorParallelGroup(model, group=None, size=2)
    assert all(module._forward_pre_hooks for module in found)
    group.close()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_loader_that_has_read_its_last_batch_may_have_micro_batches_left():
    """DeepSpeed's adapter of sequence parallelism reads a batch on each rank, and hands them out one by one."""
    loader = SimpleNamespace(end_of_dataloader=True)
    accelerator = SimpleNamespace(gradient_state=SimpleNamespace(active_dataloader=None))

    def take(iterator, count):
        return list(iterator)[:count], None

    over = []
    for looks_ahead in (True, False):
        accelerator.gradient_state.active_dataloader = None
        fetcher = fetch.WindowFetcher(accelerator, fetches_together=False, looks_ahead=looks_ahead)
        fetcher.begin_epoch(None)
        accelerator.gradient_state.active_dataloader = loader
        fetcher.fetch(take, iter([1]), 1)
        over.append(fetcher.epoch_is_over)
    assert over == [True, False]


# ---- Refusals ------------------------------------------------------------------------------------------------------


def parallel_trainer(tmp_path, monkeypatch, sizes: dict, **options) -> EfficientTrainer:
    """A Trainer that believes that its model is parallel: on a CPU Accelerate refuses it."""
    trainer = EfficientTrainer(model=tiny_gpt2(), args=arguments(tmp_path, **options), train_dataset=Rows(8))
    config = SimpleNamespace(**{"tp_size": 1, "cp_size": 1, "sp_size": 1, "sp_backend": "deepspeed", **sizes})
    monkeypatch.setitem(trainer.accelerator.state.__dict__, "parallelism_config", config)
    return trainer


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (1, 1, 12)),
        ({"tp_size": 2}, (2, 1, 6)),
        ({"tp_size": 2, "cp_size": 3}, (2, 3, 2)),
        ({"sp_size": 4}, (1, 4, 3)),
    ],
)
def test_sizes_multiply(sizes, expected, tmp_path, monkeypatch):
    trainer = parallel_trainer(tmp_path, monkeypatch, sizes)
    monkeypatch.setattr(type(trainer.args), "world_size", 12)
    args = trainer.args
    assert (tensor_parallel_size(args), sequence_shards(args), data_parallel_size(args)) == expected
    assert trainer.trainopt.accumulation.setup["world_size"] == expected[-1]
    if Version("5.23") > _versions.TRANSFORMERS:  # upstream asks the model alone
        return
    samples = trainer._train_batch_size * args.gradient_accumulation_steps * expected[-1]
    assert trainer.get_total_train_batch_size(args) == samples


@pytest.mark.parametrize("name", ["cp_size", "sp_size"])
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulation_policy": "noise_scale"}, {"accumulation_policy": "fixed", "measure_noise_scale": True},
     {"accumulation_policy": "ramp", "accumulation_ramp": "0:2", "lr_batch_scaling": "surge"}],
)  # fmt: skip
def test_statistics_of_shared_sequences_are_refused(name, options, tmp_path, monkeypatch):
    trainer = parallel_trainer(tmp_path, monkeypatch, {name: 2}, **options)
    with pytest.raises(ValueError, match=r"no rank holds the whole gradient of a sample.*='ramp'"):
        trainer.train()


@pytest.mark.parametrize("name", ["tp_size", "cp_size", "sp_size"])
def test_policies_that_measure_nothing_are_taken(name, tmp_path, monkeypatch):
    ramp = {"accumulation_policy": "ramp", "accumulation_ramp": "0:2"}
    parallel_trainer(tmp_path, monkeypatch, {name: 2}, **ramp).trainopt.accumulation.check_setup()


def test_a_version_whose_trainer_cannot_save_such_models_is_refused(tmp_path, monkeypatch):
    trainer = parallel_trainer(tmp_path, monkeypatch, {"tp_size": 2})
    trainer.model._tp_size = 2
    monkeypatch.setattr(_versions, "TRANSFORMERS", Version("5.17.0"))
    with pytest.raises(ValueError, match=r"tensor parallelism\) needs transformers >= 5\.23, not"):
        trainer.train()


def test_tensor_parallelism_may_be_measured(tmp_path, monkeypatch):
    parallel_trainer(tmp_path, monkeypatch, {"tp_size": 2}).trainopt.accumulation.check_setup()


@pytest.mark.parametrize("name", ["tp_size", "cp_size", "sp_size"])
def test_auto_micro_batch_is_refused(name, tmp_path, monkeypatch):
    options = {"accumulation_policy": "fixed", "auto_micro_batch": True}
    with pytest.raises(ValueError, match=r"auto_micro_batch does not work with.*leave auto_micro_batch out"):
        parallel_trainer(tmp_path, monkeypatch, {name: 2}, **options).train()


def test_compiled_hooks_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="set torch_compile to False"):
        parallel_trainer(tmp_path, monkeypatch, {"tp_size": 2}, torch_compile=True).train()


@pytest.mark.parametrize("policy", ["fixed", "goodput"])
def test_a_memory_budget_is_refused(policy, tmp_path, monkeypatch):
    options = {"accumulation_policy": policy, "memory_budget": "90%"}
    trainer = parallel_trainer(tmp_path, monkeypatch, {"tp_size": 2}, **options)
    with pytest.raises(ValueError, match="where ranks share operators"):
        trainer.train()


def test_stock_accumulation_of_such_a_model_is_warned_of(tmp_path, monkeypatch, caplog):
    options = {"accumulation_policy": "fixed", "gradient_accumulation_steps": 2}
    trainer = parallel_trainer(tmp_path, monkeypatch, {"tp_size": 2}, **options)
    model = trainer.model
    model._tp_size, model._tp_plan = 2, {"transformer.h.*.ln_1": "replicated_with_grad_allreduce"}
    with caplog.at_level(logging.WARNING, "hf_trainopt"):
        trainer.trainopt.tensor_parallel.trainer_made()
    assert "accumulation_ramp='0:2'" in caplog.text


def test_doctor_says_which_devices_share_a_micro_batch(tmp_path, monkeypatch):
    from hf_trainopt.lab.doctor.sections import data

    trainer = parallel_trainer(tmp_path, monkeypatch, {"tp_size": 2})
    monkeypatch.setattr(type(trainer.args), "world_size", 8)
    trainer.state.max_steps, trainer.state.logging_steps = 4, 1
    lines = dict(data(trainer, torch.utils.data.DataLoader(Rows(8))))
    assert lines["micro-batch"] == "3 samples on each of 4 groups of 2 devices"
