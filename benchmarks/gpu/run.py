"""Everything that needs a GPU, in one call of nine minutes; with `--rehearse` all of it on a CPU at toy size.

    python benchmarks/gpu/run.py --output DIR [--rehearse] [--minutes 9] [--stages environment,time:60]
                                 [--checks TEXT,TEXT] [--arms "language=NAME; NAME"]

Writes `DIR/<stage>.json` as results come, and `DIR/summary.json`; at most 8 files. Each stage is a process of its own
with a time limit of its own. A stage that fails, hangs or dies leaves a record that says why and keeps what it had
measured. Time that a stage leaves unused goes to the stages after it. The next two stages import their packages and
prepare on the CPU while a stage runs, and wait for their turn before they touch the GPU: two stages never share it.

Data: the folder that `HF_TRAINOPT_DATA` names, by default `../shared/data`, with `wikitext-2/`, `cifar10/` and
`gpt2-tokenizer/`. At full size missing data, or a missing GPU, is an error before anything starts. The rehearsal makes
up tiny data where there is no such folder, and its records say so.

A session that is lent a card runs this, in the root of the repository:

    mkdir -p .gpu-data && grep -qx /.gpu-data/ .git/info/exclude || echo /.gpu-data/ >> .git/info/exclude
    cp -r ../shared/data/wikitext-2 ../shared/data/cifar10 ../shared/data/gpt2-tokenizer .gpu-data/
    rm -f .gpu-data/wikitext-2/test.txt && chmod -R u+w .gpu-data

then calls the tool `run` (in a git worktree `.git` is a file: take `$(git rev-parse --git-path info/exclude)`) with

    command:   PYTHONPATH=. HF_TRAINOPT_DATA=.gpu-data python3 benchmarks/gpu/run.py --output $OUT --minutes 9
    carry:     [".gpu-data"]
    timeout_s: 580

The tree is 5 MB and the data are 31 MB, so both fit into the 64 MiB that travel. Nothing is installed there. Then

    python benchmarks/gpu/merge.py FILES_AT
    python benchmarks/gpu/report.py

`merge.py` adds the new records to those in `benchmarks/results/gpu/`: a second try runs only what is missing, and what
it measures replaces only its own part.

A second try names its stages in the order in which they run. A stage with seconds gets those and no more; what is left
goes to the stages without:

    --minutes 5.1 --stages exactness:85,time:60,memory_expandable:28,vision:60,language
    --checks "out of memory,fp16: windows,fp16 is left,killed and resumed,nccl,SyncBatchNorm,is none to the bit"
    --arms "vision=ours, defaults, seed 0" --arms "language=stock, k = 1; ours, memory_budget 75%"

What the first run took on an H100, 475 s in all:

imports       26 s  From a cold disk, before the first stage could start. Preparing exactness took another 44 s of CPU
                    (imports and plans), of which the stage before hid a few seconds only. Now two stages start ahead,
                    and its plans are made by `plans`.
environment    5 s  All of it.
exactness     99 s  44 s of them were spent waiting for its own preparation. 12 checks of `Trainer` runs took 24 s, 52
                    checks of placements 31 s. It was cut before out of memory, fp16, resuming and one rank; these now
                    come before the placements.
memory        52 s  10 to 16 s a model; half of it is looking for the least limit. ViT was left out.
time          94 s  GPT-2 Small 15 s for 2 rounds of 11 placements, the loops 9 s for one round, ResNet-50 7 s for 2
                    rounds, Llama 7 s for the warm-up only. It was cut while `torch.compile` ran.
language     151 s  75 s an arm, 2 arms.
vision        48 s  45 s an arm, 1 arm.
plans         40 s  On the CPU beside the first stages: 5 models, 10 to 40 s of a core each.
memory_expandable   Has not run yet. Three models, five plans of each.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stage_list import DATA_FILES, ON_REQUEST, STAGES, Stage, chosen_arms, chosen_stages


HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
# A stage with less time than this is not started.
LEAST_SECONDS = 5.0
# What a stage is told is less than what it gets by this share, and by so many seconds at most: it can end by itself.
GRACE, MOST_GRACE = 0.06, 3.0
# How many stages import and prepare while another one has the GPU.
AHEAD = 2
REHEARSAL_SECONDS = {"plans": 400, "exactness": 240}
LOG_CHARACTERS = 6000


def stage_command(stage: Stage, options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command of a stage's process."""
    words = [sys.executable, str(HERE / "stage.py"), stage.name, "--output", str(options.output)]
    words += ["--folder", str(folder), *(["--rehearse"] if options.rehearse else [])]
    if stage.name == "exactness":
        words += [f"--check={text}" for text in options.checks]
    return [*words, *(f"--arm={text}" for text in options.arms.get(stage.name, ()))]


class Running:
    """The process of a stage: imports at once, works when it is told to, and is ended with all that it has started.

    Args:
        stage: Which.
        command: Its words.
        environment: Its variables.
        log: File for what it prints.
    """

    def __init__(self, stage: Stage, command: Sequence[str], environment: dict[str, str], log: Path):
        self.stage, self.log = stage, log
        self.started: float | None = None
        self.limit = 0.0
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, cwd=REPOSITORY,
                env=environment | stage.environment, process_group=0,
            )  # fmt: skip

    def go(self, limit: float) -> None:
        """Let it work for so many seconds, counted from now even if it is not ready yet."""
        self.started, self.limit = time.monotonic(), limit
        with contextlib.suppress(OSError):  # it has died already; its exit code says so
            until = self.started + limit - min(MOST_GRACE, GRACE * limit)
            self.process.stdin.write(f"go {until:.2f}\n".encode())
            self.process.stdin.flush()

    @property
    def seconds(self) -> float:
        """Seconds since it was told to work."""
        return 0.0 if self.started is None else time.monotonic() - self.started

    def wait(self) -> str | None:
        """Wait until it ends or its limit is reached; return what is wrong with how it ended."""
        try:
            code = self.process.wait(max(0.0, self.limit - self.seconds))
        except subprocess.TimeoutExpired:
            self.end()
            return f"ended after its limit of {self.limit:.0f} s"
        self.end()  # what it has left running
        return None if code == 0 else f"its process ended with code {code}"

    def end(self) -> None:
        """End it and what it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait()


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a file as a whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values, indent=1) + "\n")
    part.replace(path)


def closed_record(path: Path, running: Running, trouble: str | None, rehearsal: bool) -> dict[str, Any]:
    """Return the record of a stage that has ended, completed with how it ended, and write it."""
    record: dict[str, Any] = {"stage": running.stage.name}
    try:
        text = path.read_text()
    except OSError:
        trouble = trouble or "it has left no record"
    else:
        try:
            record = json.loads(text)
            if not isinstance(record, dict):
                raise ValueError(f"a {type(record).__name__}")
        except ValueError as error:
            record = {"stage": running.stage.name, "unreadable": text[:LOG_CHARACTERS]}
            trouble = trouble or f"its record cannot be read ({error})"
    if trouble is None and record.get("status") not in ("ok", "failed"):
        trouble = "its record has no result"
    if trouble is not None:
        record |= {"status": "failed", "reason": trouble, "seconds": round(running.seconds, 1)}
    record = {"rehearsal": rehearsal, "seconds": round(running.seconds, 1), **record}
    if record["status"] == "failed":
        log = running.log.read_text(errors="replace") if running.log.exists() else ""
        record["end_of_log"] = log[-LOG_CHARACTERS:]
    path.with_suffix(".part").unlink(missing_ok=True)
    write_json(path, record)
    return record


class Session:
    """Runs stages one after the other within a time that is given to all of them.

    Args:
        stages: In their order.
        output: Folder of the records.
        seconds: For all of them.
        command: Command of a stage's process, given a folder that the stages share.
        head: What the summary says besides.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        output: Path,
        seconds: float,
        command: Callable[[Stage, Path], list[str]],
        head: dict[str, Any],
    ):
        self.stages, self.output, self.seconds, self.command = list(stages), output, seconds, command
        self.started = time.monotonic()
        self.summary: dict[str, Any] = {
            **head, "stages": {stage.name: {"status": "skipped", "seconds": 0, "reason": "not reached"}
                               for stage in self.stages},
        }  # fmt: skip
        self.running: dict[str, Running] = {}
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        paths = [REPOSITORY, HERE, HERE.parent, REPOSITORY / "tests"]
        before = self.environment.get("PYTHONPATH", "").split(os.pathsep)
        self.environment["PYTHONPATH"] = os.pathsep.join([*map(str, paths), *(path for path in before if path)])

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - self.started)

    def run(self) -> dict[str, Any]:
        """Run all stages; return the summary."""
        scale = self.seconds / 540
        foreground = [stage for stage in self.stages if not stage.background]
        background = [stage for stage in self.stages if stage.background]
        self.output.mkdir(parents=True, exist_ok=True)
        for stage in self.stages:  # records of an earlier run are not this run's
            (self.output / f"{stage.name}.json").unlink(missing_ok=True)
        self._save()
        with tempfile.TemporaryDirectory(prefix="hf_trainopt_gpu_") as folder:
            try:
                for stage in background:
                    self._start(stage, Path(folder)).go(max(LEAST_SECONDS, self.left))
                for index, stage in enumerate(foreground):
                    running = self._start(stage, Path(folder))
                    limit = self._limit(foreground[index:], scale)
                    if limit < LEAST_SECONDS:
                        running.end()
                        del self.running[stage.name]
                        self._ended(stage, {"status": "skipped", "seconds": 0, "reason": "no time was left"})
                        continue
                    running.go(limit)
                    print(f"{stage.name}: started, {limit:.0f} s at most, {self.left:.0f} s left", flush=True)
                    for coming in foreground[index + 1 : index + 1 + AHEAD]:
                        self._start(coming, Path(folder))
                    self._close(running, running.wait())
                for stage in background:
                    running = self.running[stage.name]
                    running.limit = running.seconds + max(0.0, min(2.0, self.left) if foreground else self.left)
                    self._close(running, running.wait())
            finally:
                for running in list(self.running.values()):
                    running.end()
        return self.summary

    def _limit(self, waiting: Sequence[Stage], scale: float) -> float:
        """Return the seconds of the first of the stages that wait: its own, and what the others do not need."""
        own, *others = (
            stage.seconds * scale if stage.exact_seconds is None else stage.exact_seconds for stage in waiting
        )
        if waiting[0].exact_seconds is not None:
            return min(self.left, own)
        return min(self.left, max(own, self.left - sum(others), LEAST_SECONDS))

    def _start(self, stage: Stage, folder: Path) -> Running:
        if stage.name not in self.running:
            log = folder / f"{stage.name}.log"
            self.running[stage.name] = Running(stage, self.command(stage, folder), self.environment, log)
        return self.running[stage.name]

    def _close(self, running: Running, trouble: str | None) -> None:
        name = running.stage.name
        record = closed_record(self.output / f"{name}.json", running, trouble, self.summary["rehearsal"])
        self.running.pop(name, None)
        entry = {"status": record["status"], "seconds": record["seconds"]}
        reasons = [record["reason"]] if "reason" in record else []
        reasons += [f"{part}: an error" for part in record.get("errors", {})]
        reasons += [f"{check}: false" for check, value in record.get("checks", {}).items() if not value]
        if record["status"] != "ok":
            entry["reason"] = "; ".join(reasons)[:2000] or "its record says so"
            print(record.get("end_of_log", "")[-1500:], flush=True)
        self._ended(running.stage, entry)

    def _ended(self, stage: Stage, entry: dict[str, Any]) -> None:
        self.summary["stages"][stage.name] = entry
        print(f"{stage.name}: {entry['status']}, {entry['seconds']} s {entry.get('reason', '')}", flush=True)
        self._save()

    def _save(self) -> None:
        self.summary["seconds"] = round(self.seconds - self.left, 1)
        write_json(self.output / "summary.json", self.summary)


def data_folder() -> Path:
    """Return the folder of the data, as `benchmarks/tasks.py` has it."""
    return Path(os.environ.get("HF_TRAINOPT_DATA", REPOSITORY.parent / "shared" / "data")).resolve()


def missing_data(stages: Sequence[Stage]) -> list[str]:
    """Return the files of data that stages need and that are not there."""
    names = [name for stage in stages for name in DATA_FILES.get(stage.name, ())]
    return [name for name in names if not (data_folder() / name).exists()]


def card() -> dict[str, str]:
    """Return name, driver and memory of the GPU as nvidia-smi has them; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    if not lines:
        return {}
    return dict(zip(("name", "driver", "memory"), (value.strip() for value in lines[0].split(",")), strict=False))


def has_gpu() -> bool:
    """Return whether this machine seems to have an NVIDIA GPU."""
    return bool(card()) or any(Path(path).exists() for path in ("/dev/nvidia0", "/proc/driver/nvidia/version"))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the records")
    parser.add_argument("--rehearse", action="store_true", help="all of it on a CPU at toy size, in two minutes")
    names = [stage.name for stage in STAGES if not stage.background]
    parser.add_argument(
        "--stages", help=f"in which order, with commas: NAME, or NAME:SECONDS for no more than that; default: all but "
        f"{', '.join(ON_REQUEST)} (a rehearsal: all of {','.join(names)})"
    )  # fmt: skip
    parser.add_argument(
        "--checks", default="", help="exactness: only checks whose names contain one of these texts, with commas"
    )
    parser.add_argument(
        "--arms", action="append", default=[], metavar="TASK=NAME;NAME",
        help="only these arms of language or vision, in this order: number, name, or name and seed; may be repeated"
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it; default: 9")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    options.output = options.output.resolve()
    options.checks = [text.strip() for text in options.checks.split(",") if text.strip()]
    try:
        stages = chosen_stages(options.stages, options.rehearse)
        options.arms = chosen_arms(options.arms, options.rehearse)
    except ValueError as error:
        parser.error(str(error))
    if not options.rehearse:
        if not has_gpu():
            parser.error("there is no NVIDIA GPU here (nvidia-smi finds none); --rehearse runs all of it on a CPU.")
        if missing := missing_data(stages):
            parser.error(
                f"{data_folder()} lacks {', '.join(missing)}; name the folder of the data with HF_TRAINOPT_DATA, or "
                "leave language and vision out with --stages."
            )
    os.environ["HF_TRAINOPT_DATA"] = str(data_folder())
    found = {} if options.rehearse else card()
    os.environ["HF_TRAINOPT_CARD"] = json.dumps(found)
    if options.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    head = {
        "rehearsal": options.rehearse,
        "date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "command": shlex.join(
            ["python", "benchmarks/gpu/run.py", *(arguments if arguments is not None else sys.argv[1:])]
        ),
        "minutes": options.minutes,
        "card": found,
    }
    if options.rehearse:  # what takes long at toy size is something else
        stages = [
            dataclasses.replace(stage, seconds=REHEARSAL_SECONDS.get(stage.name, 60), exact_seconds=None)
            for stage in stages
        ]
    session = Session(
        stages, options.output, 60 * options.minutes, lambda stage, folder: stage_command(stage, options, folder), head
    )

    def stop(*_: Any) -> None:
        raise SystemExit(143)  # through `finally`: no process is left, and the records are there

    signal.signal(signal.SIGTERM, stop)
    summary = session.run()
    print(json.dumps(summary["stages"], indent=1), flush=True)
    return 0 if all(entry["status"] == "ok" for entry in summary["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
