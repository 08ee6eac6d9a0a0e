"""Plans for models with Liger's Triton kernels: none is launched in a replay, and what they overwrite isn't kept."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.integrations.liger import apply_liger_kernel
from transformers.models.llama import modeling_llama

from hf_trainopt.cli import main
from hf_trainopt.machine.devices import DEVICES
from hf_trainopt.models.liger import liger_kernels, uses_liger, with_liger
from hf_trainopt.placement.plan.plan import STORE, PlacementPlan, StageChoice
from hf_trainopt.placement.plan.planner import PlacementPlanner
from hf_trainopt.placement.recompute.apply import apply_placement
from hf_trainopt.placement.simulate.step_setup import StepSetup
from hf_trainopt.placement.simulate.triton_kernels import written_arguments


pytest.importorskip("liger_kernel")


@pytest.fixture(autouse=True)
def stock_modules():
    """Liger replaces functions of the module that a model is defined in, for all models of the process."""
    before = dict(vars(modeling_llama))
    yield
    vars(modeling_llama).update(before)


def llama(layers: int = 2) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=500, max_position_embeddings=64, use_cache=False,
        )
    )  # fmt: skip


def planner_of(model, device: str = "a100", **setup) -> PlacementPlanner:
    ids = torch.randint(0, 500, (4, 32))
    return PlacementPlanner(model, {"input_ids": ids, "labels": ids}, StepSetup(device=DEVICES[device], **setup))


@cache
def interpreted() -> dict:
    """Return what real steps take and compute, by Triton's interpreter."""
    worker = Path(__file__).with_name("liger_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(worker)], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


class TestRealKernels:
    @pytest.mark.parametrize("placement", ["stored", "full", "selective"])
    def test_peaks_are_those_of_real_steps(self, placement):
        found = interpreted()[placement]
        assert found["measured"] == found["predicted"]

    @pytest.mark.parametrize("placement", ["full", "selective"])
    def test_gradients_are_equal_to_the_bit(self, placement):
        found = interpreted()[placement]
        assert found["equal"]
        assert found["off_stock"] < 1e-6

    def test_an_output_that_a_kernel_overwrites_is_never_kept(self):
        """Kept, it gives other gradients and no error: this is what the plan has to know."""
        found = interpreted()
        assert not found["overwritten"]["equal"]
        assert not {0, 1} & set(found["selective"].get("saved_ops", found["saved_ops"]))


def test_the_loss_in_pieces_is_counted():
    stock = planner_of(llama()).baseline.peak_by_kind()["loss"]
    assert planner_of(with_liger(llama())).baseline.peak_by_kind()["loss"] < 0.6 * stock


def test_the_gradient_of_the_head_is_added_up_in_place_on_cuda_only():
    """Elsewhere there is an array as large as the head in float32 for each piece of the logits."""
    on_cuda, on_cpu = (
        planner_of(with_liger(llama()).bfloat16(), device).baseline.peak_by_kind()["loss"]
        for device in ("a100", "cpu")
    )
    assert on_cpu - on_cuda > 0.9 * 4 * 64 * 500
    assert planner_of(with_liger(llama()).bfloat16(), "t4").baseline.peak_by_kind()["loss"] == on_cpu


def test_no_chunked_loss_beside_ligers():
    assert planner_of(llama()).available.chunked_loss
    assert not planner_of(with_liger(llama())).available.chunked_loss


def test_ligers_plain_cross_entropy(monkeypatch):
    """It checks that labels are within the vocabulary."""
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", torch.nn.functional.cross_entropy)  # to be restored
    model = llama()
    apply_liger_kernel(model, {"cross_entropy": True, "fused_linear_cross_entropy": False})
    planner_of(model)


def test_questions_of_others_about_values_stay_questions():
    """A loss that branches on a number of the batch is followed in a second try, with Liger as without."""

    def branching(model, batch):
        if (batch["labels"] != -100).sum().item() > 0:
            return model(**batch).loss
        raise AssertionError("there are labels")

    with pytest.raises(ValueError, match="cannot be replayed"):
        planner_of(with_liger(llama()), compute_loss=branching)
    planner_of(with_liger(llama()), compute_loss=branching, follows_values=True)


def test_a_model_whose_module_is_not_registered():
    namespace = {"LlamaForCausalLM": LlamaForCausalLM, "__name__": "nowhere"}
    exec("class Own(LlamaForCausalLM):\n    pass", namespace)
    assert not uses_liger(namespace["Own"](llama().config))


def test_a_model_of_classes_that_liger_has_replaced_is_found(monkeypatch):
    from liger_kernel.transformers import LigerRMSNorm, liger_rotary_pos_emb

    assert not uses_liger(llama())
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "LlamaRMSNorm", LigerRMSNorm)
        model = llama()
    assert uses_liger(model)
    planner_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", liger_rotary_pos_emb)
        model = llama()
        assert uses_liger(model)
        planner_of(model)
    assert not uses_liger(llama())


def test_a_plan_that_keeps_outputs_must_be_made_with_the_kernels():
    planner = planner_of(llama(1))
    stages = dict.fromkeys(planner.stages, StageChoice("selective", (0,)))
    apply_placement(llama(1), PlacementPlan("test", stages)).undo()
    with pytest.raises(ValueError, match=r"kernels of Liger that the plan wasn't made for.*--use_liger_kernel"):
        apply_placement(with_liger(llama(1)), PlacementPlan("test", stages))
    apply_placement(with_liger(llama(1)), PlacementPlan("test", dict.fromkeys(stages, STORE))).undo()
    assert planner.for_budget("100%").details["kernels"] == []
    found = planner_of(with_liger(llama(1))).for_budget("100%").details["kernels"]
    assert found[0].startswith("liger-kernel 0.")
    assert any("RMSNorm" in name for name in found[1:])


def test_a_plan_for_fewer_kernels_is_not_one_for_more():
    partly = llama(1)
    apply_liger_kernel(partly, {"rope": False})
    fewer = liger_kernels(partly)
    stages = dict.fromkeys(planner_of(partly).stages, StageChoice("selective", (0,)))
    plan = PlacementPlan("test", stages, details={"kernels": fewer})
    apply_placement(partly, plan).undo()
    whole = with_liger(llama(1))
    assert set(fewer) < set(liger_kernels(whole))
    with pytest.raises(ValueError, match="the plan wasn't made for"):
        apply_placement(whole, plan)


def test_a_model_that_liger_has_no_kernels_for_is_refused():
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20)
    with pytest.raises(ValueError, match="Liger has no kernels for GPT2LMHeadModel; leave it out"):
        with_liger(GPT2LMHeadModel(config))


def test_the_command_plans_with_the_kernels(capsys):
    words = ["--model_type", "llama", "--device", "a100", "--per_device_train_batch_size", "2", "--block_size", "64",
             "--config_overrides", "hidden_size=64,intermediate_size=128,num_hidden_layers=2,num_attention_heads=2,"
             "num_key_value_heads=1", "--json"]  # fmt: skip
    peaks = []
    for more in ([], ["--use_liger_kernel"]):
        main(["plan", *words, *more])
        peaks.append(json.loads(capsys.readouterr().out)["baseline_peak_bytes"])
    assert peaks[1] < peaks[0]


def pointers_written(kernel) -> set[str]:
    """Names of sizes and strides, which addresses are computed from as well, left out."""
    names = written_arguments(kernel.fn)
    return {name for name in names if "ptr" in name or name in ("out", "total", "target", "source", "cos", "sin")}


class TestWrittenArguments:
    def test_of_ligers_kernels(self):
        from liger_kernel.ops import rms_norm, rope, swiglu
        from liger_kernel.ops.utils import element_mul_kernel

        assert pointers_written(rope._triton_rope) == {"q_ptr", "k_ptr"}
        assert pointers_written(rms_norm._rms_norm_forward_kernel) == {"Y_ptr", "RSTD_ptr"}
        assert pointers_written(swiglu._swiglu_forward_kernel) == {"c_ptr"}
        assert pointers_written(swiglu._swiglu_backward_kernel) == {"a_ptr", "b_ptr"}
        assert pointers_written(element_mul_kernel) == {"X_ptr"}

    def test_through_variables_atomics_and_other_kernels(self):
        import triton_examples as examples

        assert pointers_written(examples.by_variables) == {"out"}
        assert pointers_written(examples.by_atomics) == {"total"}
        assert pointers_written(examples.by_another) == {"target"}
        assert pointers_written(examples.by_keyword) == {"out"}
        assert pointers_written(examples.by_name) == {"out"}
        assert pointers_written(examples.by_descriptor) == {"out"}
        assert pointers_written(examples.by_module) == {"target"}
        assert pointers_written(examples.by_itself) == {"out"}

    def test_a_kernel_that_is_not_understood_writes_to_all(self):
        import triton_examples as examples

        from hf_trainopt.placement.simulate.triton_kernels import triton_not_launched

        launched = []
        with triton_not_launched(lambda *kernel: launched.append(kernel)):
            for kernel, counts in ((examples.not_understood, (1, 1)), (examples.by_atomics, (1, 0))):
                tensors = torch.zeros(2), torch.zeros(3)
                kernel[(1,)](*tensors)
                assert tuple(tensor._version for tensor in tensors) == counts
        assert launched == [(20, 0, torch.float32)] * 2
