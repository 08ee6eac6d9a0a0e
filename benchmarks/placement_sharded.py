"""Peaks of a rank under FSDP2 and DeepSpeed: short runs on two ranks (gloo, CPU), predicted against measured.

placement_sharded.py OUTPUT_DIR CASES.json    # started on each rank; see `placement.py sharded`
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch


# Small enough that several buckets are filled, and that no parameter but norms and biases stays whole.
ZERO = {
    "reduce_bucket_size": 250_000, "stage3_prefetch_bucket_size": 150_000,
    "stage3_param_persistence_threshold": 2_000,
}  # fmt: skip
MODELS = {"llama": "Llama type, 4 layers x 256", "gpt2": "GPT-2, 4 layers x 256"}
SIZE = {"width": 256, "vocabulary": 4000, "length": 128, "rows": 4}
GPT2_PLAN = {"transformer.h.*": "free_full_weight"}  # how FSDP2 takes it apart; transformers has no plan for it
ONCE = {"accumulation_policy": "fixed"}
PLACEMENTS = {
    "none": {"memory_budget": "100%", "memory_rewrites": "none", **ONCE},
    "all": {"checkpoint_placement": "all", **ONCE},
    "85%": {"memory_budget": "85%", "memory_rewrites": "none", **ONCE},
    "every_2, k = 3": {"checkpoint_placement": "every_2"},
}
EXTRA = [
    ("zero2", "all", "optimizer offloaded", {"offload_optimizer": {"device": "cpu"}}),
    ("zero2", "all", "overlap_comm", {"overlap_comm": True}),
    ("zero3", "all", "optimizer and parameters offloaded",
     {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
    ("zero3", "all", "nothing kept for the backward pass", {"stage3_max_reuse_distance": 1}),
]  # fmt: skip


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """Return a configuration of DeepSpeed."""
    return {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, **ZERO, **more}, "steps_per_print": 10**9,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own is compiled for minutes
    }  # fmt: skip


def cases_of(kind: str) -> list[dict[str, Any]]:
    """Return the cases of one kind of sharding."""
    cases = []
    spread = {"fsdp": True} if kind == "fsdp2" else {"deepspeed": zero(int(kind[-1]))}
    for model in MODELS:
        for name, options in PLACEMENTS.items():
            case = {
                "name": f"{kind}, {model}, {name}",
                "model": model,
                "placement": name,
                "arguments": options,
                **SIZE,
            }
            cases.append(case | spread | {"k": 3 if "k = 3" in name else 1})
    for of, name, what, more in EXTRA:
        if of == kind:
            case = {"name": f"{kind}, llama, {name}, {what}", "model": "llama", "placement": f"{name}, {what}"}
            cases.append(
                case | SIZE | {"arguments": PLACEMENTS[name], "deepspeed": zero(int(kind[-1]), **more), "k": 1}
            )
    return cases


def sharded(kind: str) -> list[dict[str, Any]]:
    """Run the cases of one kind on two ranks; return what they took."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cases.json"
        path.write_text(json.dumps(cases_of(kind)))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*launch, __file__, folder, str(path)]
        variables = {"DS_ACCELERATOR": "cpu"} if kind != "fsdp2" else {}
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", **variables})
        found = []
        for case in cases_of(kind):
            ranks = [json.loads((Path(folder) / f"{case['name']}.{rank}.json").read_text()) for rank in range(2)]
            if "error" in ranks[0]:
                raise SystemExit(f"{case['name']}: {ranks[0]['traceback']}")
            found.append(
                {"model": case["model"], "placement": case["placement"], "k": case["k"],
                 "predicted_bytes": ranks[0]["predicted"], "rank_bytes": [rank["measured"] for rank in ranks],
                 "predicted_by_kind": ranks[0]["plan"]["details"].get("predicted_by_kind")}
            )  # fmt: skip
            print(f"{case['name']}: predicted {ranks[0]['predicted']}, measured {found[-1]['rank_bytes']}", flush=True)
    return found


# ---- On each rank --------------------------------------------------------------------------------------------------


class Tokens(torch.utils.data.Dataset):
    """Random tokens."""

    def __init__(self, length: int, vocabulary: int, samples: int):
        self.rows = torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index].clone()}


def fresh_model(kind: str, width: int, vocabulary: int, length: int) -> torch.nn.Module:
    """Return a model of four layers."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False, "vocab_size": vocabulary}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_positions=length, n_embd=width, n_layer=4, n_head=4, **ends))
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=length,
            **ends,
        )
    )


def make_model(case: dict[str, Any], folder: Path) -> torch.nn.Module:
    """Return the model of a case: whole, or in pieces as `from_pretrained` loads it."""
    from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM

    size = {name: case.get(name, SIZE[name]) for name in ("width", "vocabulary", "length")}
    kind = case.get("model", "llama")
    cls = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel}[kind]
    if case.get("fsdp") or case.get("loads"):
        options = {}
        if case.get("fsdp"):
            from transformers.distributed import DistributedConfig

            options["distributed_config"] = DistributedConfig(fsdp_size=2)
        with mock.patch.object(cls, "_fsdp_plan", GPT2_PLAN if kind == "gpt2" else cls._fsdp_plan):
            model = AutoModelForCausalLM.from_pretrained(folder / f"{kind}-{os.environ['RANK']}", **options)
    else:
        model = fresh_model(kind, **size)
    if "lora" in case:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules=case["lora"]))
    model.loss_type = "ForCausalLM"
    return model


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train three steps; return what was predicted and measured here."""
    from transformers import PrinterCallback

    from hf_trainopt import EfficientTrainer, EfficientTrainingArguments

    k = case.get("k", 1)
    settings = {
        "per_device_train_batch_size": case.get("rows", SIZE["rows"]), "optim": "adamw_torch", "max_steps": 3,
        "gradient_accumulation_steps": k, "max_accumulation_steps": max(k, 2), "logging_steps": 1, "use_cpu": True,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "measurements": "none",
        "output_dir": str(folder / "run"), **({"deepspeed": case["deepspeed"]} if "deepspeed" in case else {}),
    }  # fmt: skip
    args = EfficientTrainingArguments(**settings | case.get("arguments", {}))
    args.device  # starts torch.distributed  # noqa: B018
    options = {} if args.accumulation_policy == "fixed" else {"accumulation_policy": lambda observation: k}
    data = Tokens(
        case.get("length", SIZE["length"]), case.get("vocabulary", SIZE["vocabulary"]), case.get("samples", 256)
    )
    trainer = EfficientTrainer(model=make_model(case, folder), args=args, train_dataset=data, **options)
    trainer.remove_callback(PrinterCallback)
    placement = trainer.trainopt.placement
    peaks, done = [], placement._peak_measured
    placement._peak_measured = lambda num_bytes: (peaks.append(num_bytes), done(num_bytes))
    try:
        trainer.train()
        return {
            "plan": placement.plan.to_dict(), "predicted": placement.plan.predicted_peak_bytes, "measured": peaks[0],
            "loss": [line["loss"] for line in trainer.state.log_history if "loss" in line],
            "micro_batch": trainer.trainopt.out_of_memory.micro_batch_size,
        }  # fmt: skip
    finally:
        clean_up(trainer)


def clean_up(trainer: Any) -> None:
    """Forget a run: the next one in this process may have another configuration of DeepSpeed, or none."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    engine = getattr(trainer, "deepspeed", None)
    if engine is not None:
        engine.destroy()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    gc.collect()


def main(arguments: Sequence[str]) -> None:
    """Run the cases of a file on this rank."""
    torch.set_num_threads(1)
    if os.environ.get("DS_ACCELERATOR"):
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else DeepSpeed compiles it, for minutes
    folder, cases = Path(arguments[0]), json.loads(Path(arguments[1]).read_text())
    rank = os.environ["RANK"]
    for case in cases:  # before DeepSpeed has a say in how models are made
        kind = case.get("model", "llama")
        if (case.get("fsdp") or case.get("loads")) and not (folder / f"{kind}-{rank}").exists():
            size = {name: case.get(name, SIZE[name]) for name in ("width", "vocabulary", "length")}
            fresh_model(kind, **size).save_pretrained(folder / f"{kind}-{rank}")
    for case in cases:
        try:
            seen = run(case, folder)
        except Exception as error:
            seen = {"error": str(error), "traceback": traceback.format_exc()}
        (folder / f"{case['name']}.{rank}.json").write_text(json.dumps(seen))
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
