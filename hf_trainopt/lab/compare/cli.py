"""`hf-trainopt compare`: arguments, the runs in their order, and what is written."""

import argparse
import functools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_trainopt.metrics.targets import Target, metric_key

from . import arms as arms_of
from . import records
from .arms import BEST, OURS, STOCK, ArmSpec
from .comparison import Comparison, compare, freeze_target, quantities
from .render import markdown
from .statistics import check_scipy


_DEFAULTS = {"eval_strategy": "steps", "eval_steps": "0.05", "save_strategy": "no"}

EPILOG = """examples:
  hf-trainopt compare run_clm.py --seeds 5 --output_dir outputs/compare -- --model_type gpt2 --do_train --do_eval ...
  hf-trainopt compare run_clm.py --ours '--memory_budget 75%' --ablate -- --train_file ...
  hf-trainopt compare run_clm.py --sweep 1,2,4,8 --sweep_learning_rates 0.5x,1x,2x -- --learning_rate 2e-3 \\
      --gradient_accumulation_steps 8 ...
  hf-trainopt compare train.py --arm 'small=--batch 8' --arm 'large=--batch 64' --baseline large -- --epochs 3
"""


def add_parser(subparsers: Any, **options: Any) -> None:
    """Add `compare` to the subcommands of `hf-trainopt`."""
    parser = subparsers.add_parser(
        "compare",
        description="Run a training script under stock Trainer settings and under ours: the same seeds and data, in "
        "turn, each run a process of its own. Finished runs are kept: the same command goes on where it was stopped. "
        "Arguments of the script come after --; without --eval_strategy it is evaluated 20 times.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    parser.add_argument("script", type=Path, help="run_clm.py, run_image.py, or your own script that uses Trainer")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compare"), help="default: outputs/compare")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to n-1; default: 3")
    parser.add_argument("--ours", default="", help="more arguments for our arm alone: '--memory_budget 75%%'")
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME[=ARGUMENTS]",
        help=f"an arm of your own, or a built-in one by its name ({STOCK}, {OURS}); replaces the built-in two",
    )
    parser.add_argument("--baseline", help="arm that ratios are to; default: the first")
    parser.add_argument("--target_metric", default="eval_loss", help="default: eval_loss")
    parser.add_argument("--target_value", type=float, help="default: see --target_share")
    parser.add_argument(
        "--target_share",
        type=float,
        default=0.8,
        help="the target is the value that the baseline's first run has at this share of its data; default: 0.8",
    )
    parser.add_argument("--greater_is_better", action=argparse.BooleanOptionalAction, help="default: by the name")
    parser.add_argument("--sweep", help="k of stock to search first, such as 1,2,4,8: its best becomes an arm")
    parser.add_argument(
        "--sweep_learning_rates",
        default="0.5x,1x,2x",
        help="learning rates of that search, or factors to the given one; default: 0.5x,1x,2x",
    )
    parser.add_argument(
        "--sweep_adam_beta2",
        help="values of adam_beta2 in that search, such as 0.95,data,0.999; 'data' keeps the half-life of the given "
        "one in data at every k; default: the given one",
    )
    parser.add_argument("--ablate", action="store_true", help="more arms: each of our parts alone")
    parser.add_argument("--threads", type=int, help="CPU threads of a run; default: PyTorch's own")
    parser.add_argument(
        "--launcher", help="command that starts a run: 'accelerate launch --num_processes 2'; default: python"
    )
    parser.add_argument("--restart", action="store_true", help="make every run again")
    parser.set_defaults(run=run, script_arguments=[])


def run(arguments: argparse.Namespace) -> str:
    """Make the runs that are missing; return the comparison as Markdown.

    Raises:
        ValueError: Something asked for is impossible, or the first run of the baseline has failed.
    """
    check(arguments)
    script_arguments = with_defaults(arguments.script_arguments)
    chosen = choose_arms(arguments, script_arguments)
    folder: Path = arguments.output_dir
    executor = Executor(arguments)
    baseline = arguments.baseline or chosen[0].name
    if arguments.sweep:
        if not baseline.startswith(BEST):  # whose name says what the search has found
            check_baseline(baseline, chosen)
        chosen.insert(1, best_fixed(arguments, executor, script_arguments))
    check_baseline(baseline, chosen)
    order = [
        (arm, seed)
        for seed in range(arguments.seeds)
        for arm in (chosen if seed % 2 == 0 else chosen[::-1])  # none is always the first
    ]
    order.sort(key=lambda run: (run[0].name, run[1]) != (baseline, 0))  # the others need the baseline's first run
    found = executor.make(order, check_first=functools.partial(check_first_run, own_arms=bool(arguments.arm)))
    by_arm = {arm.name: [found[arm.name, seed] for seed in range(arguments.seeds)] for arm in chosen}
    finished = [record for record in by_arm[baseline] if record["status"] == "finished"]
    metric = metric_key(arguments.target_metric)
    target = freeze_target(
        finished[0], metric, arguments.target_value, arguments.target_share, arguments.greater_is_better
    )
    if target is None or not any(line.get(metric) is not None for line in finished[0]["log_history"]):
        names = sorted({key for line in finished[0]["log_history"] for key in line if key.startswith("eval_")})
        raise ValueError(
            f"no evaluation had --target_metric {metric}; they had {', '.join(names) or 'none: pass --do_eval data'}."
        )
    result = compare(str(arguments.script), baseline, by_arm, target, metric)
    text = markdown(result)
    write(folder, result, text)
    failures = _first_failure(by_arm)
    arguments.exit_code = 1 if failures else 0
    ends = f"\nSaved {folder / 'comparison.json'} and comparison.md; see it with `hf-trainopt report {folder}`.\n"
    return text + (f"\n{failures}\n" if failures else "") + ends


def write(folder: Path, result: Comparison, text: str) -> None:
    records.save(folder / "comparison.json", result.to_dict())
    (folder / "comparison.md").write_text(text)


def check(arguments: argparse.Namespace) -> None:
    """Raise `ValueError` for what cannot be run."""
    if not arguments.script.is_file():
        raise ValueError(f"can't find the script {arguments.script}; name a Python file that trains with Trainer.")
    if arguments.seeds < 1:
        raise ValueError(f"--seeds is {arguments.seeds}; it must be at least 1.")
    if arguments.seeds > 1:
        check_scipy()
    if not 0 < arguments.target_share <= 1:
        raise ValueError(f"--target_share is {arguments.target_share}; it must be above 0 and at most 1.")
    if arguments.target_value is not None and not math.isfinite(arguments.target_value):
        raise ValueError(f"--target_value is {arguments.target_value}; it must be a finite number.")
    if arguments.threads is not None and arguments.threads < 1:
        raise ValueError(f"--threads is {arguments.threads}; it must be at least 1.")
    for name in ("seed", "output_dir"):
        if arms_of.value_of(arguments.script_arguments, name) is not None:
            raise ValueError(f"--{name} of the script is set by compare; leave it out after --.")
    if arguments.sweep_adam_beta2 and not arguments.sweep:
        raise ValueError("--sweep_adam_beta2 is a part of --sweep; add --sweep 1,2,4,8.")
    if arguments.sweep and arguments.arm:
        raise ValueError("--sweep searches for the best of stock and is not for arms of your own; leave --arm out.")
    if arguments.ablate and arguments.arm:
        raise ValueError("--ablate is for our own arm; leave --arm out.")
    if arguments.output_dir.exists() and not arguments.output_dir.is_dir():
        raise ValueError(f"--output_dir {arguments.output_dir} is a file; name a folder.")
    try:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--output_dir {arguments.output_dir} cannot be made ({error.strerror}); name another."
        ) from error


def check_baseline(baseline: str, arms: Sequence[ArmSpec]) -> None:
    """Raise `ValueError` if the baseline is none of the arms."""
    names = [arm.name for arm in arms]
    if baseline not in names:
        raise ValueError(f"--baseline {baseline} is none of the arms: {', '.join(names)}.")


def with_defaults(script_arguments: Sequence[str]) -> list[str]:
    """Return the script's arguments, with 20 evaluations and no checkpoints unless they say otherwise."""
    known = arms_of.config_names(script_arguments)
    added = []
    evaluates = {"eval_strategy", "eval_steps"}
    for name, value in _DEFAULTS.items():
        related = evaluates if name in evaluates else {name}
        if not any(arms_of.value_of(script_arguments, other) is not None or other in known for other in related):
            added += [f"--{name}", value]
    return [*script_arguments, *added]


def choose_arms(arguments: argparse.Namespace, script_arguments: Sequence[str]) -> list[ArmSpec]:
    """Return the arms, the baseline first unless it is named otherwise.

    Raises:
        ValueError: Two have one name, or a name is unknown.
    """
    stock = arms_of.stock_arm(script_arguments)
    ours = arms_of.our_arm(script_arguments, arms_of.words_of("--ours", arguments.ours))
    built_in = {STOCK: stock, OURS: ours}
    chosen = [arms_of.parse_arm(text, script_arguments, built_in) for text in arguments.arm] or [stock, ours]
    if arguments.ablate:
        chosen += arms_of.ablations(ours)
    slugs = [arm.slug for arm in chosen]
    for arm in chosen:
        if not arm.slug:
            raise ValueError(f"the arm '{arm.name}' has no letter or digit to name files by; rename it.")
        if slugs.count(arm.slug) > 1:
            raise ValueError(f"two arms are called '{arm.slug}' in the names of files; give them different names.")
    return chosen


def best_fixed(arguments: argparse.Namespace, executor: "Executor", script_arguments: Sequence[str]) -> ArmSpec:
    """Search stock over k, learning rate and β2 on the first seed; return the setting with the best final metric.

    Raises:
        ValueError: A number cannot be read, or no run of the search has ended with the metric.
    """
    betas2 = [text.strip() for text in (arguments.sweep_adam_beta2 or "").split(",") if text.strip()]
    try:
        steps = [int(text) for text in arguments.sweep.split(",")]
        rates = [text.strip() for text in arguments.sweep_learning_rates.split(",")]
        swept = arms_of.sweep_arms(arms_of.stock_arm(script_arguments), steps, rates, betas2)
    except ValueError as error:
        if "sweep needs" in str(error):
            raise
        raise ValueError(
            f"--sweep '{arguments.sweep}' takes whole numbers and --sweep_learning_rates "
            f"'{arguments.sweep_learning_rates}' numbers or factors such as 0.5x, divided by commas"
            + (f"; --sweep_adam_beta2 '{arguments.sweep_adam_beta2}' numbers in [0, 1) or 'data'." if betas2 else ".")
        ) from error
    if min(steps) < 1:
        raise ValueError(f"--sweep '{arguments.sweep}' has a k below 1.")
    sys.stderr.write(f"hf-trainopt: {len(swept)} runs to find the best fixed setting of stock\n")
    found = executor.make([(arm, 0) for arm in swept], check_first=check_is_ours)
    metric = metric_key(arguments.target_metric)
    target = Target.of(metric, 0.0, arguments.greater_is_better)  # of which the direction counts
    ended = [
        (value.value, arm)
        for arm in swept
        if (record := found[arm.name, 0])["status"] == "finished"
        and (value := quantities(record, None, metric)["final_metric"]) is not None
        and math.isfinite(value.value)
    ]
    if not ended:
        raise ValueError(
            f"no run of the sweep has ended with a finite {metric}. {_first_failure({'': list(found.values())})}"
        )
    _, winner = (max if target.greater_is_better else min)(ended, key=lambda pair: pair[0])
    k = arms_of.value_of(winner.arguments, "gradient_accumulation_steps")
    rate = arms_of.value_of(winner.arguments, "learning_rate")
    beta2 = f", β2 {float(arms_of.value_of(winner.arguments, 'adam_beta2')):.6g}" if betas2 else ""
    arm = ArmSpec(f"{BEST} (k = {k}, rate {rate}{beta2})", winner.arguments)
    executor.alias(arm, winner, seed=0)
    return arm


# What argparse and HfArgumentParser say of a flag that they don't have.
_REFUSES_OURS = re.compile(r"(unrecognized arguments|not used by the HfArgumentParser).*--accumulation_policy")


def check_first_run(record: dict[str, Any], own_arms: bool) -> None:
    """Raise `ValueError` if the first run, of the baseline, shows that there can be no comparison.

    Args:
        record: Of the run.
        own_arms: Whether all arms are the user's: then the script may use any Trainer.
    """
    if not own_arms:
        check_is_ours(record)
    if record["status"] == "failed":
        name = record["arm"]["name"]
        failure = _first_failure({name: [record]})
        raise ValueError(f"the first run of the baseline '{name}' failed, so no other was started. {failure}")
    check_takes_arguments(record, own_arms)


def check_is_ours(record: dict[str, Any]) -> None:
    """Raise `ValueError` if a script that is to be run as 'stock' and as 'ours' doesn't know our Trainer."""
    if record["status"] == "failed" and _REFUSES_OURS.search(record["errors"]):
        reason = "it doesn't take our arguments"
    elif record["status"] == "finished" and not record.get("is_ours", True):
        reason = "it trains with another Trainer"
    else:
        return
    raise ValueError(
        "the arms 'stock' and 'ours' need a script that trains with EfficientTrainer and EfficientTrainingArguments, "
        f"but {reason}. Change its imports, or compare arms of your own with --arm NAME='--flag value'."
    )


def check_takes_arguments(record: dict[str, Any], own_arms: bool) -> None:
    """Raise `ValueError` if the Trainer of a script doesn't have what its command line says: all arms would be alike.

    Args:
        record: Of a run that has finished.
        own_arms: Whether all arms are the user's: then a script may have a seed of its own.
    """
    told = {
        "seed": record["seed"],
        "output_dir": arms_of.value_of(shlex.split(record["command"]), "output_dir"),
        "accumulation_policy": arms_of.value_of(record["arm"]["arguments"], "accumulation_policy"),
    }
    took = record.get("took", told)  # older records don't say
    others = [name for name, value in told.items() if value is not None and took[name] != value]
    # A script may change the folder, but then not its seed.
    if {"seed", "output_dir"} <= set(others) or (others not in ([], ["output_dir"]) and not own_arms):
        listed = " and ".join(f"{name}={took[name]!r} (told {told[name]!r})" for name in others)
        raise ValueError(
            f"the script ignores its command line: its Trainer has {listed}. Read the command line with "
            "HfArgumentParser, and pass the training arguments that it returns to the Trainer."
        )


def _first_failure(by_arm: dict[str, list[dict[str, Any]]]) -> str:
    failures = [record for found in by_arm.values() for record in found if record["status"] == "failed"]
    if not failures:
        return ""
    first = failures[0]
    return (
        f"{len(failures)} run(s) failed; the first, {first['arm']['name']} with seed {first['seed']}, ended with code "
        f"{first['exit_code']}: {first['errors'].strip()[-1500:]}"
    )


class Executor:
    """Makes the runs of a comparison that have no record yet, one after the other.

    Args:
        arguments: Of the command.
        launch: Runs a command with an environment and returns its exit code and the end of its stderr.
    """

    def __init__(self, arguments: argparse.Namespace, launch: Callable[..., tuple[int, str]] | None = None):
        self._script: Path = arguments.script
        self._folder: Path = arguments.output_dir
        self._launcher: str | None = arguments.launcher
        self._threads: int | None = arguments.threads
        self._restart: bool = arguments.restart
        self._launch = launch or run_process
        self._made: set[str] = set()

    def make(
        self,
        order: Sequence[tuple[ArmSpec, int]],
        check_first: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> dict[tuple[str, int], dict[str, Any]]:
        """Return the records of all runs, by arm and seed.

        Args:
            order: The runs.
            check_first: Raises `ValueError` if the record of the first one shows that the others are of no use.

        Raises:
            ValueError: The folder has a record of a run with other arguments, or `check_first` raised it.
        """
        runs = [records.RunSpec(arm, seed, self._folder) for arm, seed in order]
        found = {run.name: self._kept(run) for run in runs}
        with tqdm(total=len(runs), unit="run", file=sys.stderr, disable=None) as bar:
            for number, run in enumerate(runs, 1):
                bar.set_description(run.name)
                if bar.disable:  # no terminal: a file, the log of a job
                    state = "is there already" if found[run.name] is not None else f"begins; log: {_log_of(run)}"
                    sys.stderr.write(f"hf-trainopt: run {number} of {len(runs)}, {run.name}, {state}\n")
                    sys.stderr.flush()
                if found[run.name] is None:
                    found[run.name] = self._make(run)
                if number == 1:
                    check_first(found[run.name])
                bar.update()
        return {(run.arm.name, run.seed): found[run.name] for run in runs}

    def alias(self, arm: ArmSpec, source: ArmSpec, seed: int) -> None:
        """Let the record of one arm stand for another with the same arguments."""
        record = records.load(records.RunSpec(source, seed, self._folder).record)
        target = records.RunSpec(arm, seed, self._folder)
        if record is not None:
            values = {**record, "arm": arms_of.as_dict(arm), "identity": self._identity(target)}
            records.save(target.record, values)
            self._made.add(target.name)

    def _identity(self, run: records.RunSpec) -> str:
        return run.identity(self._script, self._launcher, self._threads)

    def _kept(self, run: records.RunSpec) -> dict[str, Any] | None:
        record = None if self._restart and run.name not in self._made else records.load(run.record)
        if record is None or record["status"] != "finished":
            return None
        if record["identity"] != self._identity(run):
            raise ValueError(
                f"{run.record} is of a run with another script, other arguments (or --config file, --threads, "
                "--launcher) or other versions; choose another --output_dir, or make all runs again with --restart."
            )
        return record

    def _make(self, run: records.RunSpec) -> dict[str, Any]:
        measured = run.record.with_suffix(".run")
        measured.parent.mkdir(parents=True, exist_ok=True)
        measured.unlink(missing_ok=True)
        start = arms_of.words_of("--launcher", self._launcher) if self._launcher else [sys.executable]
        words = [*run.arm.arguments, "--seed", str(run.seed), "--output_dir", str(run.output_dir)]
        command = [*start, "-m", "hf_trainopt.lab.compare.runner", str(measured), str(self._script), *words]
        environment = dict(os.environ)
        if self._threads is not None:
            environment["OMP_NUM_THREADS"] = str(self._threads)
        log = _log_of(run)
        if log.exists():
            # Left by an attempt of ours: a script does not begin anew where there are checkpoints, and a plan that is
            # not made again would be shown as this run's.
            shutil.rmtree(run.output_dir, ignore_errors=True)
        code, errors = self._launch(command, environment, log)
        shown = shlex.join([*start, str(self._script), *words])
        if code == 0 and measured.exists():
            record = records.complete(run, json.loads(measured.read_text()), shown, self._identity(run))
        else:
            record = records.failed(run, shown, self._identity(run), code, errors)
        measured.unlink(missing_ok=True)
        records.save(run.record, record)
        self._made.add(run.name)
        return record


def _log_of(run: records.RunSpec) -> Path:
    return run.record.with_suffix(".log")


def run_process(command: Sequence[str], environment: dict[str, str], log: Path) -> tuple[int, str]:
    """Run a command with its output in a file; return its exit code and the last lines that it wrote."""
    with log.open("w") as output:
        try:
            code = subprocess.run(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
            ).returncode
        except OSError as error:
            raise ValueError(f"--launcher {command[0]} cannot be started ({error}); install or correct it.") from error
    return code, "\n".join(log.read_text(errors="replace").splitlines()[-15:])
