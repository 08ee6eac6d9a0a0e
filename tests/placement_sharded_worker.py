"""Run on two ranks in `test_placement_sharded.py`: short runs of sharded models, predicted against measured peaks.

placement_sharded_worker.py OUTPUT_DIR CASES.json
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from unittest import mock

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


def fresh_model(kind: str):
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config()) if kind == "llama" else GPT2LMHeadModel(gpt2_config())


def make_model(case: dict, folder: Path):
    kind = case.get("model", "llama")
    if case.get("fsdp"):
        from transformers.distributed import DistributedConfig

        cls = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel}[kind]
        with mock.patch.object(cls, "_fsdp_plan", case.get("plan") or cls._fsdp_plan):
            model = cls.from_pretrained(saved(folder, kind), distributed_config=DistributedConfig(fsdp_size=2))
    elif case.get("loads"):  # under ZeRO-3 parameters are partitioned as they are loaded
        model = LlamaForCausalLM.from_pretrained(saved(folder, "llama"))
    else:
        model = fresh_model(kind)
    model.loss_type = "ForCausalLM"
    return model


def saved(folder: Path, kind: str) -> Path:
    return folder / f"{kind}-model-{os.environ['RANK']}"


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
    trainer = quiet(make(model=model, args=args, train_dataset=Rows(200, length=64, vocab_size=1000), **options))
    placement = trainer.trainopt.placement
    peaks, done = [], placement._peak_measured
    placement._peak_measured = lambda num_bytes: (peaks.append(num_bytes), done(num_bytes))
    try:
        trainer.train()
        plan = placement.plan
        seen = {
            "plan": plan.to_dict(), "predicted": plan.predicted_peak_bytes, "measured": peaks[0],
            "fullest": plan.measured_peak_bytes,
            "loss": [line["loss"] for line in trainer.state.log_history if "loss" in line],
            "micro_batch": trainer.trainopt.out_of_memory.micro_batch_size,
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
    for kind in ("llama", "gpt2"):
        fresh_model(kind).save_pretrained(saved(folder, kind))
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
