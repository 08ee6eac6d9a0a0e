"""Time to target: our defaults, stock `Trainer` at k = 8, and the best that a sweep of stock finds; at equal data.

    python benchmarks/convergence.py sweep                  # stock, k x learning rate x beta2, both tasks, seed 0
    python benchmarks/convergence.py paired                 # five seeds of what is compared
    python benchmarks/convergence.py others                 # a task on which no default was tuned
    python benchmarks/convergence.py ablations              # the defaults' parts, wrong rates, fewest steps
    python benchmarks/convergence.py dear_steps             # ours where a step costs as much as 1 or 3 micro-batches
    python benchmarks/convergence.py resnet50               # a larger net: rates searched; then resnet50_paired
    python benchmarks/convergence.py ranks                  # two ranks, on the idle machine; then ranks_paired
    python benchmarks/convergence.py run --task language --policy fixed -k 8 --learning_rate 2e-3 --seed 0
    python benchmarks/convergence.py table                  # benchmarks/convergence.md from the records
    python benchmarks/convergence.py --quick --results FOLDER all   # everything at toy sizes, into another folder

Every run (but a toy one) is a process of its own and writes one JSON record to `benchmarks/results/convergence/`;
runs that have one are left out, so that a suite can be stopped and continued. `--streams 2` runs two at a time, one
thread each. Tasks, data and models are those of `tasks.py`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from convergence_suite import PARTS, STEP_COST


HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "convergence"
STOCK = "fixed"
NUM_EVALUATIONS = 20
# Evaluations along the way are on a part of the validation data, the last one on all.
CURVE_SAMPLES = {"language": 100, "vision": 500, "code": 100, "resnet50": 500}


def record_path(options: argparse.Namespace) -> Path:
    parts = [options.task, options.policy, f"k{options.k}", f"lr{options.learning_rate:g}"]
    parts += [
        f"{name.removeprefix('adam_')}_{value:.6g}" for name, value in swept(options).items() if value is not None
    ]
    if options.policy != STOCK:
        parts += [options.rule, options.clock]
        if options.step_cost not in (None, STEP_COST[options.task]):
            parts.append(f"cost{options.step_cost:g}")
    if options.ranks > 1:
        parts.append(f"ranks{options.ranks}")
    return options.results / ("-".join([*parts, f"seed{options.seed}"]) + ".json")


def swept(options: argparse.Namespace) -> dict[str, float | None]:
    """Return the arguments that a run may have in place of the task's."""
    return {"adam_beta1": options.beta1, "adam_beta2": options.beta2, "weight_decay": options.weight_decay}


def run(options: argparse.Namespace) -> None:
    """Train once and write the record (rank 0)."""
    import torch
    import transformers
    from cpu_clock import CpuClock
    from tasks import TASKS, build, common_arguments

    from hf_trainopt.metrics import ThroughputCallback
    from hf_trainopt.scripting.session import close_process_group

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    task = TASKS[options.task]
    toy_budget = 32 if options.task == "language" else 16
    budget = toy_budget if options.quick else task.num_micro_batches
    parts = build(task, options.seed, toy=options.quick)
    everything = parts["eval_dataset"]
    part = 16 if options.quick else CURVE_SAMPLES[options.task]
    parts["eval_dataset"] = torch.utils.data.Subset(everything, range(part))
    max_steps = budget // options.k // options.ranks
    clock = CpuClock()
    with tempfile.TemporaryDirectory() as output_dir:
        common = common_arguments(task, output_dir) | {
            "gradient_accumulation_steps": options.k,
            "max_steps": max_steps,
            "learning_rate": options.learning_rate,
            "seed": options.seed,
            "logging_steps": max(1, max_steps // 50),
            "eval_strategy": "steps",
            "eval_steps": max(1, max_steps // NUM_EVALUATIONS),
            "ddp_find_unused_parameters": False,
        }
        common |= {name: value for name, value in swept(options).items() if value is not None}
        if options.policy == STOCK:
            args = transformers.TrainingArguments(**common)
            trainer = transformers.Trainer(args=args, callbacks=[ThroughputCallback(), clock], **parts)
        else:
            trainer = ours(options, common, parts, clock)
        trainer.remove_callback(transformers.PrinterCallback)
        load = os.getloadavg()[0]
        trainer.train()
        last = trainer.evaluate(everything if not options.quick else parts["eval_dataset"])
    is_first = trainer.args.process_index == 0
    close_process_group()
    if not is_first:
        return
    history = trainer.state.log_history
    record = {
        "task": options.task,
        "policy": options.policy,
        "k": options.k,
        "learning_rate": options.learning_rate,
        "adam_beta1": trainer.args.adam_beta1,
        "adam_beta2": trainer.args.adam_beta2,
        "weight_decay": trainer.args.weight_decay,
        "rule": None if options.policy == STOCK else options.rule,
        "adam_clock": None if options.policy == STOCK else options.clock,
        "seed": options.seed,
        "ranks": options.ranks,
        "optimizer_step_cost": options.step_cost,
        "eval_loss": last["eval_loss"],
        "eval_accuracy": last.get("eval_accuracy"),
        "optimizer_steps": trainer.state.global_step,
        "curve": clock.curve(history),
        "history": [{key: line[key] for key in HISTORY if key in line} for line in history if "loss" in line],
        "command": " ".join(["python", "benchmarks/convergence.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": 1,
            "load_at_start": round(load, 2),
        },
    }
    path = record_path(options)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(
        f"{path.stem}: loss {record['eval_loss']:.4f} accuracy {record['eval_accuracy']} steps "
        f"{record['optimizer_steps']} cpu {record['curve'][-1]['cpu_s']:.0f} s",
        flush=True,
    )


HISTORY = ("step", "loss", "learning_rate", "accumulation_steps", "noise_scale", "noise_scale_low", "samples_seen")


def ours(options: argparse.Namespace, common: dict, parts: dict, clock):
    """Return our Trainer under the policy that is asked for."""
    from hf_trainopt import EfficientTrainer, EfficientTrainingArguments

    policy, extra = options.policy, {}
    if policy == "goodput":
        extra["optimizer_step_cost"] = options.step_cost
    elif policy == "ramp":
        extra["accumulation_ramp"] = "0:1,0.4:2,0.7:4"
    elif policy == "half_noise_scale":
        policy, extra = "noise_scale", {"noise_scale_ratio": 0.5}
    args = EfficientTrainingArguments(
        **common,
        accumulation_policy=policy,
        lr_batch_scaling=options.rule,
        adam_clock=options.clock,
        measurements="throughput",
        **extra,
    )
    return EfficientTrainer(args=args, callbacks=[clock], **parts)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--streams", type=int, default=1, help="runs at a time, one thread each")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="one run, one record")
    one.add_argument("--task", choices=tuple(CURVE_SAMPLES), required=True)
    one.add_argument("--policy", default=STOCK)
    one.add_argument("-k", type=int, default=8, help="gradient_accumulation_steps (the reference)")
    one.add_argument("--learning_rate", type=float, required=True)
    one.add_argument("--beta2", type=float, default=None, help="adam_beta2; default: the task's")
    one.add_argument("--beta1", type=float, default=None, help="adam_beta1; default: the task's")
    one.add_argument("--rule", default="sqrt", help="lr_batch_scaling")
    one.add_argument("--clock", default="tokens", help="adam_clock")
    one.add_argument("--weight_decay", type=float, default=None, help="default: the task's")
    one.add_argument("--step_cost", type=float, default=None, help="optimizer_step_cost; default: measured in the run")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--ranks", type=int, default=1)
    for name in (*PARTS, "all"):
        commands.add_parser(name, help="the runs of this part that have no record yet")
    commands.add_parser("table", help="write benchmarks/convergence.md from the records")
    return parser


def run_suite(options: argparse.Namespace) -> None:
    """Run what a part needs and is not there, each in a process of its own."""
    parts = PARTS.values() if options.command == "all" else [PARTS[options.command]]
    for part in parts:  # later parts take their settings from the records of earlier ones
        waiting = []
        for arguments in part(options.results, options.quick):
            words = ["--results", str(options.results), *(["--quick"] if options.quick else []), "run", *arguments]
            one = make_parser().parse_args(words)
            if not record_path(one).exists():
                waiting.append((one, words))
        if options.quick:  # a toy run takes less than its imports
            for one, words in waiting:
                run(one) if one.ranks == 1 else launch((one, words))
            continue
        with ThreadPoolExecutor(options.streams) as pool:
            list(pool.map(launch, waiting))


def launch(waiting: tuple[argparse.Namespace, list[str]]) -> None:
    options, words = waiting
    command = [sys.executable, __file__, *words]
    if options.ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}"]
        command = [sys.executable, *launcher, __file__, *words]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    if options.quick and options.results.resolve() == RESULTS:
        parser.error("--quick makes no real record: name another folder with --results")
    if options.command == "run":
        run(options)
    elif options.command == "table":
        from convergence_report import write_report

        write_report(options.results, options.results / "convergence.md" if options.quick else None)
    else:
        run_suite(options)


if __name__ == "__main__":
    main()
