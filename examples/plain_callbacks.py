#!/usr/bin/env python
"""Evidence callbacks on a stock `Trainer`: what a run takes, without anything of ours in its loop.

    python examples/plain_callbacks.py  # a small model, under a minute, nothing is downloaded

Use it for a baseline: weights and losses are those of a run without the callbacks, bit for bit, and the lines in
`trainer_state.json` can be compared with those of `EfficientTrainer`. Flags: `--help`.
"""

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from hf_trainopt.metrics import GradientStatisticsCallback, MemoryCallback, TargetCallback, ThroughputCallback
from hf_trainopt.scripting import text_data
from hf_trainopt.scripting.parser import parse_script_arguments
from hf_trainopt.scripting.session import report_user_errors


SHOWN = ("train_time_s", "samples_per_second", "tokens_per_second", "flops_per_second", "peak_memory_gib",
         "noise_scale", "target_reached", "time_to_target_s")  # fmt: skip


def defaults(given):
    """Return small defaults; flags that are given win over them."""
    return {
        "output_dir": "outputs/plain_callbacks",
        "max_steps": 30,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "logging_steps": 10,
        "eval_strategy": "steps",
        "eval_steps": 15,
        "save_strategy": "no",
        "report_to": "none",
    }


def main(argv: list[str] | None = None) -> Trainer:
    """Run the example with `argv`, the command line unless given."""
    (args,) = parse_script_arguments((TrainingArguments,), defaults, argv, description=__doc__.splitlines()[0])
    set_seed(args.seed)
    texts = text_data.load_demo_text()
    tokenizer = text_data.train_tokenizer(texts["train"]["text"], 1024)
    blocks = {name: text_data.tokenize_and_group(texts[name], tokenizer, "text", 64, name=name) for name in texts}
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=64,
            n_embd=64,
            n_layer=2,
            n_head=4,
            use_cache=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.loss_type = "ForCausalLM"  # GPT-2 names none, and Trainer would count a token too many in each row

    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        callbacks=[
            ThroughputCallback(),
            MemoryCallback(),
            GradientStatisticsCallback(),
            TargetCallback("eval_loss", 6.0),
        ],
    )
    trainer.train()
    last = trainer.state.log_history[-1]
    for name in SHOWN if trainer.is_world_process_zero() else ():
        if name in last:
            print(f"{name:20} {last[name]:.4g}")
    return trainer


if __name__ == "__main__":
    with report_user_errors():
        main()
