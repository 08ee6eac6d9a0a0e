"""SIGKILL a run of adaptive k again and again, resume it each time, and compare with a run that was left alone.

    python benchmarks/faults.py                        # 60 kills of one rank, then 15 kills of one of two ranks
    python benchmarks/faults.py --deepspeed            # 15 kills of one of two ranks under DeepSpeed's ZeRO-2
    python benchmarks/faults.py --ranks 1 --kills 4 --epochs 1

The run is a tiny GPT-2 with dropout under `accumulation_policy="goodput"` that saves after every window
(`fault_run.py`). Its processes are real ones, which nothing is able to clean up in, but they are forked from this
process, which has imported everything: that saves the eight seconds of imports that each start would take, and all
else of a start (model, Trainer, process group, resuming) is done anew.

A kill is aimed at one of four kinds of moments, and at a random one of that kind: while the run is being set up and
resumed, in a save, in the training of a window (a tenth of the time, saves take the rest), or anywhere. With two ranks
one of them is killed, by turns; the other must end, by itself or, as under `torchrun`, when it is ended.

A window is *committed* if a later attempt, or the end of the run, built on it: those of each attempt up to the step
that the next one has resumed from. Shown is that the committed windows hold every sample once an epoch, in the order
of the undisturbed run, and that the weights are its weights to the bit. Exits with 1 if not.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from fault_run import NUM_ROWS, fork


RESULTS = Path(__file__).resolve().parent / "results" / "faults"
# What kills are aimed at, by share.
MOMENTS = {"setting up": 0.2, "save": 0.3, "window": 0.3, "anywhere": 0.2}
# How long the other rank gets to end by itself.
GRACE_SECONDS = 30.0


def read_journal(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    # A line that is being written has no end yet.
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


class Attempt:
    """One start of the run, all of its ranks.

    Args:
        folder: Output folder of the run.
        journals: Folder of the journals.
        number: Of this attempt.
        ranks: How many.
        epochs: Of the run.
        deepspeed: Whether the ranks run DeepSpeed's ZeRO-2.
    """

    def __init__(self, folder: Path, journals: Path, number: int, ranks: int, epochs: int, deepspeed: bool):
        self.journals = [journals / f"attempt-{number:03d}-rank{rank}.jsonl" for rank in range(ranks)]
        self.codes: dict[int, int] = {}
        self.start = time.monotonic()
        environments = [{}]
        if ranks > 1:
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                port = listener.getsockname()[1]
            environments = [
                {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }
                for rank in range(ranks)
            ]  # fmt: skip
        self.processes = [
            fork(folder, journal, epochs, deepspeed, environment)
            for journal, environment in zip(self.journals, environments, strict=True)
        ]

    def events(self, rank: int = 0) -> list[dict[str, Any]]:
        return read_journal(self.journals[rank])

    def count(self, event: str) -> int:
        return sum(entry["event"] == event for entry in self.events())

    def poll(self) -> bool:
        """Return whether any process still runs."""
        for rank, process in enumerate(self.processes):
            if rank not in self.codes:
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.processes)

    def wait_for(self, event: str, count: int) -> bool:
        """Wait until so many of an event were written; returns whether all processes still run."""
        while self.poll() and not self.codes and self.count(event) < count:
            time.sleep(0.001)
        return not self.codes

    def wait(self, seconds: float = float("inf")) -> bool:
        """Wait until all processes have ended; returns whether they have."""
        deadline = time.monotonic() + seconds
        while self.poll():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def signal(self, rank: int, number: int) -> None:
        if rank not in self.codes:
            os.kill(self.processes[rank], number)


def end_survivors(attempt: Attempt) -> dict[str, Any]:
    """Wait for the ranks that were not killed, and end them as `torchrun` would if they do not end."""
    start = time.monotonic()
    how = "by itself"
    for name, number in (("by itself", None), ("by SIGTERM", signal.SIGTERM), ("by SIGKILL", signal.SIGKILL)):
        how = name
        if number is not None:
            for rank in range(len(attempt.processes)):
                attempt.signal(rank, number)
        if attempt.wait(GRACE_SECONDS):
            break
    return {"ended": how, "seconds": round(time.monotonic() - start, 2)}


def kill_once(
    attempt: Attempt, moment: str, victim: int, times: dict[str, float], chance: random.Random
) -> dict | None:
    """Kill one rank of an attempt; returns what was met, or `None` if the run was over before."""
    windows = chance.randint(0, 2)
    if moment != "setting up":
        event = "saving" if moment == "save" else "saved" if windows else "begun"
        count = windows + 1 if moment == "save" else max(1, windows)
        if not attempt.wait_for(event, count):
            return None
    time.sleep(chance.uniform(0, times[moment]))
    if not attempt.poll() or attempt.codes:
        return None
    attempt.signal(victim, signal.SIGKILL)
    survivors = end_survivors(attempt)
    events = attempt.events(victim)
    last = events[-1]["event"] if events else "started"
    steps = [entry["step"] for entry in events if entry["event"] in ("begun", "window")]
    record = {
        "aimed_at": moment,
        "met": {"begun": "window", "saved": "window", "window": "window", "saving": "save"}.get(last, "setting up"),
        "step": steps[-1] if steps else None,
    }
    if len(attempt.processes) > 1:
        errors = [entry for entry in attempt.events(1 - victim) if entry["event"] == "error"]
        record |= {"victim": victim, "survivor": survivors, "survivor_code": attempt.codes[1 - victim]}
        record["survivor_error"] = errors[-1]["type"] if errors else None
    return record


def committed(attempts: list[list[dict[str, Any]]]) -> list[tuple[int, list[int]]]:
    """Return the windows that the run consists of, (step, samples), from the journals of its attempts."""
    starts = [next((e["step"] for e in events if e["event"] == "begun"), None) for events in attempts]
    windows = []
    for index, events in enumerate(attempts):
        if starts[index] is None:
            continue
        end = next((start for start in starts[index + 1 :] if start is not None), float("inf"))
        windows += [(e["step"], e["samples"]) for e in events if e["event"] == "window" and e["step"] <= end]
    return windows


def each_sample_once(ranks: list[list[tuple[int, list[int]]]], epochs: int) -> bool:
    """Whether the samples of all ranks together are each row once an epoch, epoch for epoch."""
    streams = [[sample for _, samples in windows for sample in samples] for windows in ranks]
    per_epoch = NUM_ROWS // len(streams)
    if any(len(stream) != per_epoch * epochs for stream in streams):
        return False
    return all(
        Counter(s for stream in streams for s in stream[epoch * per_epoch : (epoch + 1) * per_epoch])
        == Counter(range(NUM_ROWS))
        for epoch in range(epochs)
    )


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def durations(events: list[dict[str, Any]], start: float) -> dict[str, float]:
    """Return how long each kind of moment lasts, from the journal of a run (medians)."""
    at = {name: [e["time"] for e in events if e["event"] == name] for name in ("begun", "saving", "saved")}
    save = statistics.median(end - begin for begin, end in zip(at["saving"], at["saved"], strict=True))
    window = statistics.median(end - begin for begin, end in zip(at["saved"], at["saving"][1:], strict=False))
    return {"setting up": at["begun"][0] - start, "save": save, "window": window, "anywhere": save + window}


def run(ranks: int, kills: int, epochs: int, deepspeed: bool, seed: int, work: Path) -> dict[str, Any]:
    """Run undisturbed, then with kills; return the record."""
    chance = random.Random(seed)
    for name in ("whole", "killed", "journals"):
        (work / name).mkdir(parents=True)
    whole = Attempt(work / "whole", work / "journals", 0, ranks, epochs, deepspeed)
    whole.wait()
    if any(whole.codes.values()):
        raise RuntimeError(whole.journals[0].with_suffix(".log").read_text()[-3000:])
    times = durations(whole.events(), whole.start)

    records, attempts = [], []
    started = time.monotonic()
    while True:
        attempt = Attempt(work / "killed", work / "journals", len(attempts) + 1, ranks, epochs, deepspeed)
        attempts.append(attempt)
        record = None
        if len(records) < kills:
            (moment,) = chance.choices(list(MOMENTS), MOMENTS.values())
            record = kill_once(attempt, moment, len(records) % ranks, times, chance)
        if record is None:
            break
        found = next((e for e in attempt.events() if e["event"] == "found"), {})
        records.append(record | {"resumed_from": found.get("step"), "passed_over": found.get("skipped", {})})
        print(len(records), record, flush=True)
    attempt.wait()
    if any(attempt.codes.values()):
        raise RuntimeError(attempt.journals[0].with_suffix(".log").read_text()[-3000:])

    windows = [committed([a.events(rank) for a in attempts]) for rank in range(ranks)]
    undisturbed = [committed([whole.events(rank)]) for rank in range(ranks)]
    last = attempt.events()
    passed_over = [r["passed_over"] for r in records] + [e["skipped"] for e in last if e["event"] == "found"]
    result = {
        "ranks": ranks,
        "engine": "DeepSpeed ZeRO-2" if deepspeed else "DDP" if ranks > 1 else None,
        "epochs": epochs,
        "seed": seed,
        "kills": len(records),
        "kills_wanted": kills,
        "met": dict(Counter(record["met"] for record in records)),
        "resumes_that_passed_over_checkpoints": sum(bool(found) for found in passed_over),
        "faults_passed_over": dict(Counter(fault for found in passed_over for fault in found.values())),
        "windows": len(undisturbed[0]),
        "windows_trained_again": sum(
            sum(e["event"] == "window" for e in a.events()) for a in attempts
        ) - len(windows[0]),
        "k": last[-1]["k"],
        "same_windows": windows == undisturbed,
        "each_sample_once_an_epoch": each_sample_once(windows, epochs),
        "weights_equal": digest(work / "killed") == digest(work / "whole"),
        "weights_sha256": digest(work / "whole"),
        "seconds": round(time.monotonic() - started, 1),
        "seconds_of": {name: round(value, 4) for name, value in times.items()},
        "each": records,
    }  # fmt: skip
    if ranks > 1:
        result["survivors"] = dict(Counter(r["survivor"]["ended"] for r in records))
        result["longest_survivor_seconds"] = max((r["survivor"]["seconds"] for r in records), default=0.0)
    return result


def holds(result: dict[str, Any]) -> bool:
    shown = ("same_windows", "each_sample_once_an_epoch", "weights_equal")
    return result["kills"] >= result["kills_wanted"] and all(result[name] for name in shown)


def import_deepspeed() -> None:
    """Import it before the forks, without the operation that it would compile for minutes."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=None, help="default: 1, then 2")
    parser.add_argument("--kills", type=int, default=None, help="default: 60 for one rank, 15 for two")
    parser.add_argument("--epochs", type=int, default=None, help="default: 6 for one rank, 4 for two")
    parser.add_argument("--deepspeed", action="store_true", help="two ranks under DeepSpeed's ZeRO-2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints, journals and logs, and say where")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.deepspeed:
        if options.ranks == 1:
            parser.error("--deepspeed shards over two ranks")
        import_deepspeed()
    fine = True
    for ranks in (2,) if options.deepspeed else (options.ranks,) if options.ranks else (1, 2):
        work = Path(tempfile.mkdtemp(prefix="faults-"))
        kills = options.kills if options.kills is not None else {1: 60, 2: 15}[ranks]
        result = run(ranks, kills, options.epochs or {1: 6, 2: 4}[ranks], options.deepspeed, options.seed, work)
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions["transformers"] = transformers.__version__
        record = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "versions": versions, **result}
        options.results.mkdir(parents=True, exist_ok=True)
        engine = "_zero2" if options.deepspeed else ""
        path = options.results / f"kills_{ranks}_rank{'s' if ranks > 1 else ''}{engine}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps({name: value for name, value in record.items() if name != "each"}, indent=1))
        fine &= holds(result)
        if options.keep:
            print(work)
        else:
            shutil.rmtree(work)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
