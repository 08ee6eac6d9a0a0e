"""Run on two ranks in `test_tensor_parallel.py`: gradient norms of tensor-parallel models, without a Trainer.

parallel_norms_worker.py OUTPUT_DIR
"""

import json
import sys

import torch
import torch.distributed as dist
import transformers
from transformers.distributed import DistributedConfig

from hf_trainopt.accumulation.gradient_norms import MicroBatchNorms
from hf_trainopt.accumulation.tensor_parallel import TensorParallelGroup


SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "use_cache": False,
}  # fmt: skip
EXPERTS = {
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
    "num_key_value_heads": 4,
}  # fmt: skip
SHORT = {"original_max_position_embeddings": 64, "max_position_embeddings": 64}
# Packed projections, biases, norms of heads, experts, latent attention.
FAMILIES = {
    "Phi3": SHORT, "GPTNeoX": {}, "Gemma3": {}, "Olmo2": {}, "Mixtral": EXPERTS, "GptOss": EXPERTS,
    "DeepseekV3": EXPERTS | LATENT,
}  # fmt: skip


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 64, (2, 12), generator=generator) for _ in range(2)]


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    """Whole gradients."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]


def square_norm(model: torch.nn.Module) -> float:
    return sum(gradient.double().square().sum().item() for gradient in gradients(model))


def added_up(*values: float) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.tolist()


def run(family: str, folder: str) -> dict:
    """Compare a model in pieces with the whole one."""
    names = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM")}
    config, model_class = (
        getattr(transformers, name) for name in names.get(family, (family + "Config", family + "ForCausalLM"))
    )
    torch.manual_seed(0)
    whole = model_class(config(**(SIZES | FAMILIES[family])))
    if dist.get_rank() == 0:
        whole.save_pretrained(folder)
    dist.barrier()
    model = model_class.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    group = TensorParallelGroup(model, None, 2)  # both ranks
    norms = MicroBatchNorms(model.train(), torch.device("cpu"), group)
    expected = []
    with norms:
        for index, ids in enumerate(batches()):
            model(input_ids=ids, labels=ids).loss.backward()
            norms.end_micro_batch()
            if index == 0:
                group.end_micro_batch()
    for ids in batches():
        whole.zero_grad()
        whole.train()(input_ids=ids, labels=ids).loss.backward()
        expected.append(square_norm(whole))
    whole.zero_grad()
    for ids in batches():
        whole(input_ids=ids, labels=ids).loss.backward()
    pairs = zip(gradients(model), gradients(whole), strict=True)
    return {
        "norms": added_up(*norms.finish()),
        "expected": expected,
        "window": added_up(norms.square_norm_share(dist.get_rank(), 2)),
        "expected_window": [square_norm(whole)],
        "difference": max((a - b).norm().item() / (b.norm().item() + 1e-6) for a, b in pairs),
    }


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {family: run(family, f"{sys.argv[1]}/{family}") for family in FAMILIES}
    with open(f"{sys.argv[1]}/rank{dist.get_rank()}.json", "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
