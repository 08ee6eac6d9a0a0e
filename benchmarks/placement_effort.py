"""What planning costs: CPU seconds and replays for models that run out of memory, and how they grow with depth."""

import time
from typing import Any

import torch
from placement_cases import Case, ModelRequest, provenance

from hf_trainopt.machine.devices import DEVICES


_LLAMA_1B = (
    "hidden_size=2048,intermediate_size=8192,num_hidden_layers=16,num_attention_heads=32,num_key_value_heads=8,"
    "vocab_size=128256"
)
_DEPTH = (
    "hidden_size=1024,intermediate_size=2816,num_hidden_layers={},num_attention_heads=16,num_key_value_heads=4,"
    "vocab_size=32000"
)


def _bf16(name: str, title: str, request: ModelRequest, *sizes: Any, **kwargs: Any) -> Case:
    return Case(name, title, request, *sizes, autocast_dtype=torch.bfloat16, device="a100", **kwargs)


# Name -> case and the goal in CPU seconds.
MODELS = {
    case.name: (case, goal)
    for case, goal in (
        (_bf16("gpt2", "GPT-2 Small, B=8, T=1024", ModelRequest("gpt2"), 8, 1024), 10),
        (_bf16("llama-1b", "Llama of 1.2 B, B=4, T=2048", ModelRequest("llama", _LLAMA_1B), 4, 2048), 15),
        (_bf16("llama-7b", "Llama of 6.7 B, B=2, T=2048", ModelRequest("llama"), 2, 2048), 30),
        (_bf16("gpt2-xl", "GPT-2 XL, B=4, T=1024", ModelRequest("gpt2", "n_embd=1600,n_layer=48,n_head=25"), 4, 1024),
         30),
        (_bf16("resnet50", "ResNet-50, 224², B=32", ModelRequest(timm_model="resnet50"), 32, image_size=224), 15),
        (_bf16("vit-l", "ViT-L/16, 224², B=32", ModelRequest(timm_model="vit_large_patch16_224"), 32,
               image_size=224), 20),
    )
}  # fmt: skip
DEPTHS = (4, 8, 16, 32, 64)


def effort(case: Case) -> dict[str, Any]:
    """Return what it takes to say what a step takes, and to plan for a budget halfway to the floor."""
    start = time.process_time()
    planner = case.planner("auto", DEVICES["a100"])
    first = time.process_time() - start
    budget = (planner.floor.peak_bytes + planner.baseline.peak_bytes) // 2
    plan = planner.for_budget(f"{budget}B")
    return {
        "case": case.name, "title": case.title, "stages": len(planner.stages), "first_answer_cpu_s": first,
        "plan_cpu_s": time.process_time() - start, "replays": len(planner.replayer._replays),
        "baseline_bytes": planner.baseline.peak_bytes, "floor_bytes": planner.floor.peak_bytes,
        "plan_bytes": plan.predicted_peak_bytes, "optimality_gap": plan.optimality_gap,
    }  # fmt: skip


def effort_record(names: list[str], depths: tuple[int, ...] = DEPTHS) -> dict[str, Any]:
    """Return the record of both tables."""
    found = []
    for name in names:
        case, goal = MODELS[name]
        found.append({**effort(case), "goal_cpu_s": goal})
        print(f"{name}: {found[-1]['plan_cpu_s']:.1f} CPU s", flush=True)
    deep = []
    for depth in depths:
        case = _bf16(f"depth-{depth}", f"{depth} layers", ModelRequest("llama", _DEPTH.format(depth)), 2, 1024)
        deep.append({"layers": depth, **effort(case)})
        print(f"{depth} layers: {deep[-1]['plan_cpu_s']:.1f} CPU s", flush=True)
    return {**provenance(None), "models": found, "depths": deep}
