"""Stock `Trainer` at fixed k against adaptive k, at equal data, on WikiText-2 and CIFAR-10.

    python benchmarks/accumulation.py run --task language --policy fixed -k 8 --learning_rate 2e-3 --seed 0
    python benchmarks/accumulation.py suite                    # every run of the tables that has no record yet
    python benchmarks/accumulation.py costs                    # seconds of a micro-batch and of an optimizer step
    python benchmarks/accumulation.py table                    # writes benchmarks/accumulation.md from the records

`--policy fixed` is stock `transformers.Trainer`. Every run writes one JSON record to
`benchmarks/results/accumulation/`. HF_TRAINOPT_DATA names the folder of the data (see `tasks.py`).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path


RESULTS = Path(__file__).resolve().parent / "results" / "accumulation"


def record_path(options: argparse.Namespace) -> Path:
    parts = [options.task, options.policy, f"k{options.k}", f"lr{options.learning_rate:g}"]
    if options.policy != "fixed":
        parts.append(options.rule)
    parts += [x.replace("=", "").replace("/", "-") for x in options.set] + [f"seed{options.seed}"]
    return RESULTS / ("-".join(parts) + ".json")


def run(options: argparse.Namespace) -> None:
    import torch
    import transformers
    from tasks import TASKS, build, common_arguments

    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    task = TASKS[options.task]
    parts = build(task, options.seed)
    with tempfile.TemporaryDirectory() as output_dir:
        common = common_arguments(task, output_dir) | {
            "gradient_accumulation_steps": options.k,
            "max_steps": task.num_micro_batches // options.k,
            "learning_rate": options.learning_rate,
            "seed": options.seed,
            "logging_steps": max(1, task.num_micro_batches // options.k // 50),
        }
        if options.policy == "fixed":
            trainer = transformers.Trainer(args=transformers.TrainingArguments(**common), **parts)
        else:
            from candidates import CANDIDATES

            from hf_trainopt import EfficientTrainer, EfficientTrainingArguments

            extra = dict(item.split("=", 1) for item in options.set)
            extra = {key: _number(value) for key, value in extra.items()}
            candidate = CANDIDATES.get(options.policy)
            args = EfficientTrainingArguments(
                **common,
                accumulation_policy="goodput" if candidate else options.policy,
                lr_batch_scaling=options.rule,
                **extra,
            )
            trainer = EfficientTrainer(args=args, accumulation_policy=candidate and candidate(), **parts)
        trainer.remove_callback(transformers.PrinterCallback)
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        metrics = trainer.evaluate()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    keys = ("step", "loss", "learning_rate", "grad_norm", "accumulation_steps", "noise_scale", "samples_seen")
    record = {
        "task": options.task, "policy": options.policy, "k": options.k, "learning_rate": options.learning_rate,
        "rule": options.rule if options.policy != "fixed" else None, "set": options.set, "seed": options.seed,
        "eval_loss": metrics["eval_loss"], "eval_accuracy": metrics.get("eval_accuracy"),
        "optimizer_steps": trainer.state.global_step, "wall_seconds": wall, "cpu_seconds": cpu,
        "history": [{key: entry[key] for key in keys if key in entry} for entry in logs],
        "command": " ".join(["python", "benchmarks/accumulation.py", *sys.argv[1:]]),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                    "threads": options.threads},
    }  # fmt: skip
    path = record_path(options)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{path.stem}: loss {record['eval_loss']:.4f} acc {record['eval_accuracy']} "
          f"steps {record['optimizer_steps']} cpu {cpu:.0f} s", flush=True)  # fmt: skip


def _number(text: str):
    try:
        return float(text) if "." in text or "e" in text else int(text)
    except ValueError:
        return text


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="one run, one record")
    one.add_argument("--task", choices=("language", "vision", "language_low_floor"), required=True)
    one.add_argument("--policy", default="fixed")
    one.add_argument("-k", type=int, default=8, help="gradient_accumulation_steps (the reference)")
    one.add_argument("--learning_rate", type=float, required=True)
    one.add_argument("--rule", default="none", help="lr_batch_scaling")
    one.add_argument("--set", nargs="*", default=[], metavar="ARGUMENT=VALUE")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--threads", type=int, default=1)
    commands.add_parser("suite", help="every run of the tables that has no record yet, one after the other")
    costs = commands.add_parser("costs", help="seconds of a micro-batch and of an optimizer step of each task")
    costs.add_argument("--rounds", type=int, default=5)
    costs.add_argument("--tasks", nargs="+", default=["language", "vision", "vision_resnet50"])
    commands.add_parser("table", help="write benchmarks/accumulation.md from the records")
    return parser


def main() -> None:
    options = make_parser().parse_args()
    if options.command == "run":
        run(options)
    elif options.command == "suite":
        run_suite()
    elif options.command == "costs":
        from accumulation_report import measure_costs

        measure_costs(options.rounds, options.tasks)
    else:
        from accumulation_report import write_report

        write_report()


def run_suite() -> None:
    """Run what the tables need and is not there, each in a process of its own."""
    from accumulation_report import SUITE

    for arguments in SUITE:
        options = make_parser().parse_args(["run", *arguments])
        if record_path(options).exists():
            print(f"{record_path(options).stem}: there is a record; delete it to run it again")
        else:
            subprocess.run([sys.executable, __file__, "run", *arguments], check=True)


if __name__ == "__main__":
    main()
