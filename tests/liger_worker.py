"""Liger's kernels on a CPU, by Triton's interpreter: gradients and peaks with and without placements, as JSON.

The interpreter has three gaps that this closes: it hands on Python floats as they are, has no `rsqrt` of CUDA, and its
frames hold tensors until the garbage collector comes.
"""

import os


os.environ["TRITON_INTERPRET"] = "1"

import gc
import json
import sys

import numpy as np
import torch
import triton.language as tl
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.liger import apply_liger_kernel
from triton.runtime import interpreter

from hf_trainopt.machine.devices import DEVICES
from hf_trainopt.placement.plan.plan import FULL, STORE, PlacementPlan, StageChoice
from hf_trainopt.placement.plan.planner import PlacementPlanner
from hf_trainopt.placement.recompute.apply import apply_placement
from hf_trainopt.placement.simulate.scratch import cpu_scratch
from hf_trainopt.placement.simulate.step_setup import StepSetup
from hf_trainopt.placement.simulate.tracker import StorageTracker


def close_gaps() -> None:
    stock_convert, stock_call = interpreter._implicit_cvt, interpreter.GridExecutor.__call__

    def convert(value):
        if not isinstance(value, float):
            return stock_convert(value)
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)

    def call(self, *args, **kwargs):
        stock_call(self, *args, **kwargs)
        gc.collect()

    interpreter._implicit_cvt, interpreter.GridExecutor.__call__ = convert, call
    from liger_kernel.ops import rms_norm

    rms_norm.rsqrt = lambda x: 1.0 / tl.sqrt(x)


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=31, max_position_embeddings=16, use_cache=False,
        )
    )  # fmt: skip


def step(model, batch, optimizer, plan: PlacementPlan) -> tuple[int, list[torch.Tensor]]:
    """Return the peak of a step and its gradients."""
    tracker = StorageTracker(scratch=cpu_scratch)
    tracker.count(model.parameters(), "parameters")
    tracker.count(model.buffers(), "buffers")
    tracker.count(batch.values(), "inputs")
    tracker.count(tree_leaves(list(optimizer.state.values())), "optimizer")
    with apply_placement(model, plan), tracker:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.zero_grad()
    return tracker.peak_bytes, gradients


def main() -> None:
    batch = {name: torch.randint(0, 31, (2, 8), generator=torch.manual_seed(1)) for name in ("input_ids", "labels")}
    stock_model = make_model()
    stock_model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(stock_model.parameters(), 1.0)
    stock = [parameter.grad for parameter in stock_model.parameters()]

    model = make_model()
    apply_liger_kernel(model, None)
    close_gaps()
    planner = PlacementPlanner(model, batch, StepSetup(device=DEVICES["cpu"]))
    names = planner.stages
    every = max(
        (c for c in planner._options[False][names[0]] if c.saved_ops), key=lambda choice: len(choice.saved_ops)
    )
    # Where the state of the optimizer is there, as in the replay.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    found = {
        "kernels": planner.replayer.kernels,
        "saved_ops": every.saved_ops,
        "chunked": planner.available.chunked_loss,
    }
    reference = None
    gc.collect()
    gc.freeze()  # what is there by now needn't be looked at after each kernel
    overwritten = StageChoice("selective", (0, 1))  # queries and keys, which the rotary embedding overwrites
    for name, choice in {"stored": STORE, "full": FULL, "selective": every, "overwritten": overwritten}.items():
        stages: dict[str, StageChoice] = dict.fromkeys(names, choice)
        plan = PlacementPlan("test", stages, details={"kernels": planner.replayer.kernels})
        peak, gradients = step(model, batch, optimizer, plan)
        reference = reference or gradients
        found[name] = {
            "measured": peak,
            "predicted": planner.replay(stages).peak_bytes if name != "overwritten" else None,
            "equal": all(map(torch.equal, gradients, reference)),
            "off_stock": max(float((a - b).abs().max()) for a, b in zip(gradients, stock, strict=True)),
        }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
