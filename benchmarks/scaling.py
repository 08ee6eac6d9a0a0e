"""Weak scaling: two ranks of one thread each against one rank of one thread, the same micro-batch on each rank.

    python benchmarks/scaling.py             # about 8 minutes on an idle machine of two cores
    python benchmarks/scaling.py --table     # the page alone, from the records
    python benchmarks/scaling.py --quick --results FOLDER   # toy sizes, a minute: to try it

Three settings take turns, each with k = 1, 4, 16 and adaptive: one rank; two ranks under DDP (gloo); and two runs of
one rank each side by side that know nothing of each other, the control. The control loses only what two cores cost
each other (memory bandwidth, caches, clock), so that two ranks against the control is what communication costs.
Processes are started once and wait for their turn. Results: `results/scaling/scaling.json` and `scaling.md`.
"""

import argparse
import itertools
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


HERE = Path(__file__).resolve().parent
ARMS = ("1", "4", "16", "adaptive")
SETTINGS = {"one": 1, "two": 2, "control": 2}  # processes of each
WARM_UP = 2  # optimizer steps that are not timed: lazy initialisation, DDP's buckets
MARK = "@@record "


# ---- A process that trains when it is told to ----------------------------------------------------------------------


def worker(quick: bool) -> None:
    """Read arms from standard input, train each, and answer with a line of JSON."""
    import torch
    import transformers
    from scaling_trainer import train
    from tasks import LANGUAGE, build

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    parts = build(LANGUAGE, seed=0, toy=quick)
    initial = {name: value.clone() for name, value in parts["model"].state_dict().items()}
    with tempfile.TemporaryDirectory() as output_dir:
        for line in sys.stdin:
            order = json.loads(line)
            parts["model"].load_state_dict(initial)
            record = train(parts, LANGUAGE, order["arm"], order["micro_batches"], WARM_UP, output_dir)
            print(MARK + json.dumps(record), flush=True)


class Setting:
    """The processes of one setting."""

    def __init__(self, name: str, quick: bool):
        self.name = name
        port = free_port()
        self.processes = []
        for rank in range(SETTINGS[name]):
            variables = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
            if name == "two":
                variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
            command = [sys.executable, str(Path(__file__).resolve()), "--worker", *(["--quick"] if quick else [])]
            self.processes.append(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | variables
                )
            )

    def run(self, arm: str, micro_batches: int) -> list[dict]:
        """Train one arm in all processes at once; return their records."""
        for process in self.processes:
            process.stdin.write(json.dumps({"arm": arm, "micro_batches": micro_batches}) + "\n")
            process.stdin.flush()
        return [self._answer(process) for process in self.processes]

    def _answer(self, process: subprocess.Popen) -> dict:
        for line in process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise SystemExit(f"a process of '{self.name}' ended with status {process.wait()}")

    def close(self) -> None:
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# ---- The measurement -----------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict:
    import accelerate
    import torch
    import transformers

    rounds, began = [], time.time()
    settings = [Setting(name, options.quick) for name in SETTINGS]
    try:
        for number in range(options.rounds):
            found = {name: {} for name in SETTINGS}
            order = list(itertools.product(ARMS, settings))
            for arm, setting in order if number % 2 == 0 else reversed(order):
                size = options.micro_batches * (2 if arm == "adaptive" else 1)
                found[setting.name][arm] = setting.run(arm, size)
                seconds = max(record["seconds"] for record in found[setting.name][arm])
                print(f"round {number + 1}, k {arm}, {setting.name}: {seconds:.1f} s", flush=True)
            rounds.append(found)
    finally:
        for setting in settings:
            setting.close()
    return {
        "command": " ".join(["python benchmarks/scaling.py", *sys.argv[1:]]),
        "machine": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine(),
                    "load_at_the_end": os.getloadavg()},
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, accelerate)},
        "quick": options.quick,
        "minutes": (time.time() - began) / 60,
        "rounds": rounds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--micro-batches", type=int, default=80, help="of each rank and run; adaptive takes twice that"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results" / "scaling")
    parser.add_argument("--table", action="store_true", help="write the page from the record that is there")
    parser.add_argument("--quick", action="store_true", help="toy sizes; the page goes to the folder of the results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.quick)
    if options.quick and options.results == HERE / "results" / "scaling":
        parser.error("--quick makes no real record: name another folder with --results")
    if options.quick:
        options.rounds, options.micro_batches = min(options.rounds, 2), 24
    from scaling_report import write_report

    path = options.results / "scaling.json"
    if not options.table:
        record = measure(options)
        options.results.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
    write_report(json.loads(path.read_text()), (options.results if options.quick else HERE) / "scaling.md")


if __name__ == "__main__":
    main()
