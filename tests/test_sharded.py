"""Gradient statistics of models that FSDP2 has spread over two ranks (gloo, CPU)."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import Rows, arguments, skip_below, tiny_gpt2
from packaging.version import Version
from processes import run_program
from sharded_worker import CASES, twin
from test_distributed import assert_close_weights, assert_ranks_agree, launch_all

from hf_trainopt import EfficientTrainer
from hf_trainopt.accumulation import WindowStatistics, estimate_noise
from hf_trainopt.accumulation.sharded import local_piece
from hf_trainopt.core import versions as _versions


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each rank measured, by case."""
    folder = tmp_path_factory.mktemp("sharded")
    worker = Path(__file__).parent / "sharded_worker.py"
    done = run_program([worker, folder], ranks=2, cwd=worker.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", [case for case in CASES if case != "not found"])
def test_norms_of_a_sharded_model_equal_those_of_whole_gradients(case, found):
    norms, mean = twin(case)
    for window in range(2):
        shares = []
        for rank in range(2):
            micro_batches, share = found[rank][case]["windows"][window]
            assert micro_batches == pytest.approx(norms[rank], rel=1e-9)
            shares.append(share)
        assert sum(shares) == pytest.approx(mean, rel=1e-9)
        assert all(0 < share < mean for share in shares)
    assert found[0][case]["leftover"] == 0


def test_parameters_that_never_came_up_are_no_number(found):
    for rank in range(2):
        for micro_batches, _ in found[rank]["not found"]["windows"]:
            assert all(math.isnan(norm) for norm in micro_batches)


def test_a_gradient_that_is_a_sum_yet_to_be_made_is_no_number():
    class Partial:
        is_partial = staticmethod(lambda: True)

    sharded = SimpleNamespace(placements=[Partial()], to_local=lambda: torch.ones(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_trainopt.accumulation.sharded.is_distributed", lambda tensor: True)
        assert math.isnan(local_piece(sharded, 2)[1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, list[dict]]:
    """The same training under DDP and sharded at load time by transformers."""
    skip_below("transformers", "5.23", "sharding at load time")
    cases = ["shard none", "shard fsdp", "shard fsdp each", "shard hsdp", "shard goodput",
             "shard none tokens", "shard fsdp tokens", "shard fsdp steps"]  # fmt: skip
    return launch_all(cases, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("case", ["shard fsdp", "shard fsdp each", "shard hsdp"])
def test_training_of_a_sharded_model_equals_ddp(case, runs):
    """k from 1 to 4, tokens weighted over ranks: statistics, k and weights."""
    ddp, ours = runs["shard none"], runs[case]
    assert_ranks_agree(ours)
    assert [step["k"] for step in ours[0]["steps"]] == [step["k"] for step in ddp[0]["steps"]]
    assert len(ours[0]["statistics"]) == len(ddp[0]["statistics"]) > 4
    for a, b in zip(ours[0]["statistics"], ddp[0]["statistics"], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
        assert estimate_noise(WindowStatistics(**a)) == pytest.approx(
            estimate_noise(WindowStatistics(**b)), rel=2e-3, abs=1e-6
        )
    assert_close_weights(ddp[0], ours[0])


def test_the_clock_of_adam_runs_in_tokens_under_fsdp2(runs):
    """Second moments in pieces follow the data as whole ones do."""
    ddp, tokens, steps = (runs[f"shard {case}"] for case in ("none tokens", "fsdp tokens", "fsdp steps"))
    assert_ranks_agree(tokens)
    assert len({step["k"] for step in tokens[0]["steps"]}) > 2
    assert_close_weights(ddp[0], tokens[0])
    with pytest.raises(AssertionError):
        assert_close_weights(steps[0], tokens[0])


def test_decisions_on_measured_noise_are_the_same_on_all_ranks(runs):
    records = runs["shard goodput"]
    assert_ranks_agree(records)
    assert records[0]["steps"][-1]["noise"] is not None
    assert len({step["k"] for step in records[0]["steps"]}) > 1


# ---- Refusals ------------------------------------------------------------------------------------------------------


def sharded_trainer(tmp_path, monkeypatch, version: int = 2, **options):
    """A Trainer that believes FSDP is on: on a CPU Accelerate never turns it on."""
    from transformers import Trainer

    stock = Trainer.__init__

    def init(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        self.is_fsdp_enabled = True
        monkeypatch.setitem(self.accelerator.state.__dict__, "fsdp_plugin", SimpleNamespace(fsdp_version=version))

    monkeypatch.setattr(Trainer, "__init__", init)
    return EfficientTrainer(model=tiny_gpt2(), args=arguments(tmp_path, **options), train_dataset=Rows(8))


def test_sharding_at_load_needs_a_version_that_accumulates_over_it(tmp_path, monkeypatch):
    model = tiny_gpt2()
    monkeypatch.setattr(_versions, "is_fsdp_managed_module", lambda module: module is model)
    monkeypatch.setattr(_versions, "TRANSFORMERS", Version("5.22.2"))
    with pytest.raises(ValueError, match=r"needs transformers >= 5\.23, not .*fsdp_version: 2"):
        EfficientTrainer(model=model, args=arguments(tmp_path), train_dataset=Rows(8)).train()


def test_fsdp1_is_refused_with_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"does not work with FSDP1.*fsdp_version: 2"):
        sharded_trainer(tmp_path, monkeypatch, version=1).train()


def test_fsdp2_is_taken(tmp_path, monkeypatch):
    sharded_trainer(tmp_path, monkeypatch).trainopt.accumulation.check_setup()


def test_fsdp2_with_torch_compile_is_refused_where_norms_are_measured(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="set torch_compile to False"):
        sharded_trainer(tmp_path, monkeypatch, torch_compile=True).train()


def test_fsdp2_with_torch_compile_and_a_ramp_is_taken(tmp_path, monkeypatch):
    ramp = {"accumulation_policy": "ramp", "accumulation_ramp": "0:2"}
    sharded_trainer(tmp_path, monkeypatch, torch_compile=True, **ramp).trainopt.accumulation.check_setup()


@pytest.mark.parametrize("name", ["ep_size", "pp_size"])
def test_experts_and_stages_on_different_ranks_are_refused(name, tmp_path):
    model = tiny_gpt2()
    model.config.distributed_config = SimpleNamespace(**{name: 2})
    with pytest.raises(ValueError, match=rf"DistributedConfig\({name}=2\)"):
        EfficientTrainer(model=model, args=arguments(tmp_path), train_dataset=Rows(8)).train()
