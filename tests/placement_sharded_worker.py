"""Run on two ranks in `test_placement_sharded.py`: short runs of sharded models, predicted against measured peaks.

placement_sharded_worker.py OUTPUT_DIR CASES.json
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from helpers import AnyK, Rows, arguments, quiet
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_trainopt import EfficientTrainer
from hf_trainopt.placement import PlacementError


torch.set_num_threads(1)


def gpt2_config() -> GPT2Config:
    return GPT2Config(
        vocab_size=1000, n_positions=64, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0,
        use_cache=False,
    )  # fmt: skip


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip


def make_model(case: dict, folder: Path):
    torch.manual_seed(0)
    kind = case.get("model", "llama")
    model = LlamaForCausalLM(llama_config()) if kind == "llama" else GPT2LMHeadModel(gpt2_config())
    model.loss_type = "ForCausalLM"
    if not case.get("fsdp"):
        return model
    import torch.distributed as dist
    from transformers.distributed import DistributedConfig

    path = folder / f"{kind}-model"
    if os.environ["RANK"] == "0" and not path.exists():
        model.save_pretrained(path)
    dist.barrier()
    plan = {}
    if kind == "gpt2":  # transformers has no plan for it
        plan = {"_fsdp_plan": {f"transformer.h.{i}": "free_full_weight" for i in range(4)}}
    cls = type(model)
    stock = getattr(cls, "_fsdp_plan", None)
    if plan:
        cls._fsdp_plan = {"transformer.h.*": "free_full_weight"}
    try:
        model = cls.from_pretrained(path, distributed_config=DistributedConfig(fsdp_size=2, **case.get("config", {})))
    finally:
        cls._fsdp_plan = stock
    model.loss_type = "ForCausalLM"
    return model


def clean_up(trainer) -> None:
    engine = getattr(trainer, "deepspeed", None)
    if engine is not None:
        engine.destroy()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    gc.collect()


def run(case: dict, folder: Path) -> dict:
    settings = {"per_device_train_batch_size": case.get("rows", 4), "num_train_epochs": 1, "optim": "adamw_torch"}
    settings |= case.get("arguments", {})
    if case.get("deepspeed"):
        settings["deepspeed"] = case["deepspeed"]
    args = arguments(folder / case["name"], max_steps=case.get("steps", 3), **settings)
    args.device  # starts torch.distributed  # noqa: B018
    model = make_model(case, folder)
    make, options = (AnyK, {"sequence": case["sequence"]}) if "sequence" in case else (EfficientTrainer, {})
    trainer = quiet(
        make(model=model, args=args, train_dataset=Rows(200, length=64, vocab_size=1000), **options)
    )
    try:
        trainer.train()
        plan = trainer.trainopt.placement.plan
        planner = trainer.trainopt.placement.planner.last
        seen = {
            "plan": plan.to_dict(), "predicted": plan.predicted_peak_bytes, "measured": plan.measured_peak_bytes,
            "loss": [line["loss"] for line in trainer.state.log_history if "loss" in line],
            "micro_batch": trainer.trainopt.out_of_memory.micro_batch_size,
            "planned_here": planner is not None,
        }  # fmt: skip
    finally:
        clean_up(trainer)
    return seen


def main() -> None:
    if os.environ.get("DS_ACCELERATOR"):
        import deepspeed.ops
        from deepspeed.accelerator import get_accelerator

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else DeepSpeed compiles it, for minutes
        get_accelerator().is_fp16_supported = lambda: True
    folder = Path(sys.argv[1])
    for case in json.loads(Path(sys.argv[2]).read_text()):
        try:
            seen = run(case, folder)
        except Exception as error:
            is_refusal = isinstance(error, PlacementError | ValueError)
            seen = {"error": str(error), "is_refusal": is_refusal, "traceback": traceback.format_exc()}
        (folder / f"{case['name']}.{os.environ['RANK']}.json").write_text(json.dumps(seen))
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


main()
