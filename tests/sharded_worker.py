"""Run on two ranks in `test_sharded.py`: gradient norms of FSDP2 models, without a Trainer.

sharded_worker.py OUTPUT_DIR
"""

import copy
import json
import sys

import torch
import torch.distributed as dist
from helpers import Rows, tiny_gpt2
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_trainopt.accumulation.gradient_norms import MicroBatchNorms


K = 3
CPU = torch.device("cpu")
CASES = ("deferred", "each batch", "replicas", "kept whole", "never in pieces", "recomputed", "frozen", "beside",
         "not found")  # fmt: skip


def batches(rank: int) -> list[dict[str, torch.Tensor]]:
    """K micro-batches of one rank, with different numbers of tokens."""
    rows = Rows(2 * 2 * K)
    first = 2 * K * rank
    return [{key: torch.stack([rows[first + 2 * i + j][key] for j in range(2)]) for key in rows[0]} for i in range(K)]


def make(case: str) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
    """Return the model and what `fully_shard` is to be called with, innermost first."""
    model = tiny_gpt2(dtype=torch.float64)
    if case == "frozen":
        model.transformer.wpe.requires_grad_(False)
        model.transformer.h[0].mlp.requires_grad_(False)
    if case == "recomputed":
        apply_activation_checkpointing(model, check_fn=lambda module: module in set(model.transformer.h))
    return model, [*model.transformer.h, model]


def run(case: str) -> dict:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, modules = make(case)
    options = {"mesh": init_device_mesh("cpu", (2,))}
    if case == "replicas":
        options["mesh"] = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    if case in ("kept whole", "never in pieces"):
        options["reshard_after_forward"] = False
    beside = list(model.transformer.h[1].parameters()) if case == "beside" else []
    for module in modules:
        if not (beside and module is model.transformer.h[1]):
            fully_shard(module, ignored_params=set(beside), **options)
    if case == "never in pieces":
        model.set_reshard_after_backward(False)
    optimizer = torch.optim.SGD(model.parameters())
    mine = batches(rank)
    with torch.no_grad():
        model(**mine[0])  # an evaluation
    norms = MicroBatchNorms(model, CPU)
    found = []
    for _ in range(2):  # windows
        optimizer.zero_grad()
        with norms:
            if case == "not found":
                norms._gathered.close()
            for index, batch in enumerate(mine):
                model.set_requires_gradient_sync(case == "each batch" or index == K - 1)
                (model(**batch).loss / K).backward()
                norms.end_micro_batch()
        for parameter in beside:
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks
        found.append([norms.finish(), norms.square_norm_share(rank, ranks)])
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    with norms:
        pass
    leftover = sum(len(module._forward_pre_hooks) for module in model.modules()) - hooks
    return {"windows": found, "leftover": leftover}


def twin(case: str) -> tuple[list[list[float]], float]:
    """Square norms of every micro-batch by rank, and of their mean: one gradient at a time, on one process."""
    model, _ = make("frozen" if case == "frozen" else "")
    mean, norms = 0.0, []
    for rank in range(2):
        norms.append([])
        for batch in batches(rank):
            one = copy.deepcopy(model)
            (one(**batch).loss / K).backward()
            gradient = torch.cat([p.grad.flatten() for p in one.parameters() if p.grad is not None])
            norms[-1].append(gradient.square().sum().item())
            mean = mean + gradient / 2
    return norms, mean.square().sum().item()


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {case: run(case) for case in CASES}
    with open(f"{sys.argv[1]}/rank{dist.get_rank()}.json", "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
