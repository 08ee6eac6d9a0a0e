"""Checkpoint placement: predictions against real steps, step times, frontiers against other placements, overhead.

    python benchmarks/placement.py predict                 # predicted against measured peaks, real steps on this CPU
    python benchmarks/placement.py flops                   # replayed against counted FLOPs
    python benchmarks/placement.py frontier                # ours against every_n, all and sqrt, on shapes only
    python benchmarks/placement.py budgets                 # the plans for round budgets that the README shows
    python benchmarks/placement.py knob                    # against torch's activation_memory_budget, real steps
    python benchmarks/placement.py time                    # seconds of a step: on a quiet machine
    python benchmarks/placement.py overhead                # checkpoint_placement unset: on a quiet machine
    python benchmarks/placement.py fastest                 # the micro-batch that --find chooses, against all that fit
    python benchmarks/placement.py estimators              # measured peaks beside other estimators' figures
    python benchmarks/placement.py offload                 # peaks with inputs of recomputed layers on the host
    python benchmarks/placement.py sharded                 # peaks of a rank of FSDP2 and DeepSpeed, on two ranks
    python benchmarks/placement.py effort                  # CPU seconds and replays that planning takes
    python benchmarks/placement.py table                   # benchmarks/placement.md and plots from the records

Every case writes one JSON record to `benchmarks/results/placement/`. `--case` runs some of the cases only.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports that there is no GPU

import torch
import transformers
from placement_cases import CASES, FRONTIERS, OFFLOADED, REAL, provenance
from placement_effort import DEPTHS, MODELS, effort_record


RESULTS = Path(__file__).resolve().parent / "results" / "placement"
# Those whose steps are short enough for seven rounds of all placements within ten minutes together.
TIMED = ("gpt2-512-b4", "knob-gpt2", "resnet50-b32", "vit-tiny-b48")
FASTEST = ("fastest-gpt2", "fastest-vit")
KINDS = ("fsdp2", "zero1", "zero2", "zero3")
SMALL = ("gpt2-512-b4", "resnet50-b8", "vit-tiny-b48", "llama-384-b4")


def save(folder: Path, kind: str, name: str, record: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}-{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}", flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = {
        "predict": (REAL, "predicted against measured peaks"),
        "flops": (SMALL, "replayed against counted FLOPs"),
        "time": (TIMED, "seconds of a step under each placement"),
        "frontier": (FRONTIERS, "peak against time to recompute, on shapes"),
        "budgets": (("gpt2-small-fp32", "resnet50-224"), "plans for round budgets, on shapes"),
        "knob": (("knob-gpt2",), "against torch's activation_memory_budget"),
        "fastest": (FASTEST, "the micro-batch that --find calls the fastest, against all that fit"),
        "offload": (tuple(OFFLOADED), "predicted against measured peaks with inputs on the host"),
        "overhead": ((), "what placement costs while it is off"),
        "effort": ((), "CPU seconds that planning takes"),
        "sharded": ((), "predicted against measured peaks of a rank"),
        "estimators": ((), "measured peaks beside the estimates of Accelerate and DeepSpeed"),
        "table": ((), "write benchmarks/placement.md and its plots from the records"),
    }
    for name, (cases, text) in defaults.items():
        one = commands.add_parser(name, help=text)
        one.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
        one.add_argument("--threads", type=int, default=1)
        if cases:
            one.add_argument("--case", nargs="+", choices=sorted(CASES), default=list(cases))
        if name in ("time", "overhead", "knob", "fastest"):
            rounds = {"time": 7, "overhead": 9, "knob": 5, "fastest": 7}[name]
            one.add_argument("--rounds", type=int, default=rounds)
        if name == "knob":
            one.add_argument("--values", nargs="+", type=float, help="budgets of torch's knob")
        if name in ("frontier", "knob"):
            points = {"frontier": 24, "knob": 10}[name]
            one.add_argument("--points", type=int, default=points, help="budgets that are tried")
        if name == "overhead":
            one.add_argument("--steps", type=int, default=40, help="optimizer steps of each run")
            one.add_argument("--task", nargs="+", choices=("language", "vision"), default=["language", "vision"])
        if name == "effort":
            one.add_argument("--model", nargs="*", choices=sorted(MODELS), default=list(MODELS))
            one.add_argument("--depths", nargs="*", type=int, default=list(DEPTHS))
        if name == "sharded":
            one.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
        if name == "table":
            one.add_argument("--output", type=Path, default=RESULTS.parent.parent, help="folder of page and plots")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    if options.command == "table":
        from placement_report import write_report

        write_report(options.results, options.output)
        return
    if options.command == "overhead":
        from placement_time import overhead

        for task in options.task:
            save(options.results, "overhead", task, overhead(task, options.rounds, options.steps))
        return
    if options.command == "estimators":
        from placement_estimators import estimators

        save(options.results, "estimators", "all", {**provenance(None), "rows": estimators(options.results)})
        return
    if options.command == "sharded":
        from placement_sharded import sharded

        for kind in options.kind:
            save(options.results, "sharded", kind, {"kind": kind, **provenance(), "runs": sharded(kind)})
        return
    if options.command == "effort":
        save(options.results, "effort", "planning", effort_record(options.model, tuple(options.depths)))
        return
    for name in options.case:
        save(options.results, options.command, name, run_case(options, name))


def run_case(options: argparse.Namespace, name: str) -> dict[str, Any]:
    case = CASES[name]
    if options.command == "predict":
        from placement_measure import predict

        return predict(case, options.threads)
    if options.command == "flops":
        from placement_measure import flops

        return flops(case)
    if options.command == "offload":
        from placement_offload import offloaded

        return offloaded(case)
    if options.command == "time":
        from placement_time import time_case

        return time_case(case, options.rounds)
    if options.command == "fastest":
        from placement_fastest import fastest

        return fastest(case, options.rounds)
    if options.command == "frontier":
        from placement_frontier import frontier

        return frontier(case, options.points)
    if options.command == "budgets":
        from placement_frontier import budgets

        return budgets(case)
    from placement_frontier import knob

    return knob(case, options.rounds, options.points, options.values)


if __name__ == "__main__":
    main()
