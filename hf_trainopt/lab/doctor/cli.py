"""`hf-trainopt doctor`: what each part will do in a run, before any training."""

import argparse
import json
import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ...placement.show.render import render_pairs, wrapped
from .probe import examine


EPILOG = """examples:
  hf-trainopt doctor run_clm.py --train_file train.txt --model_type gpt2 --do_train --memory_budget 75% ...
  hf-trainopt doctor --launcher 'torchrun --nproc_per_node 2' run_image.py --do_train ...
"""


def add_parser(subparsers: Any, **options: Any) -> None:
    """Add `doctor` to the subcommands of `hf-trainopt`."""
    parser = subparsers.add_parser(
        "doctor",
        description="Start a training script with its arguments and stop it before the first step: its data are "
        "loaded, its model is built, everything is decided, nothing is trained and nothing saved (Trainer makes an "
        "empty output_dir). Flags of doctor stand before the script.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    parser.add_argument(
        "--launcher", help="command that starts the run: 'accelerate launch --num_processes 2'; default: python"
    )
    parser.add_argument("--json", action="store_true", help="write JSON to stdout instead of text")
    parser.add_argument("script", type=Path, help="run_clm.py, run_image.py, or your own that uses EfficientTrainer")
    parser.add_argument("script_arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's arguments")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> str:
    """Examine a run; return what belongs on stdout.

    Raises:
        ValueError: The run would not start, with the reason.
    """
    if not arguments.script.is_file():
        raise ValueError(
            f"can't find the script {arguments.script}; name a Python file that trains with EfficientTrainer."
        )
    script = str(arguments.script)
    if arguments.launcher is None:
        found = examine(script, arguments.script_arguments)
    else:
        found = examine_launched(arguments.launcher, script, arguments.script_arguments)
    if "refusal" in found:
        arguments.exit_code = 2
    return json.dumps(found, indent=2) + "\n" if arguments.json else render(found)


def examine_launched(launcher: str, script: str, arguments: list[str]) -> dict[str, Any]:
    """Examine a run in the processes that a launcher starts; what the first one has found.

    Raises:
        ValueError: The launcher is not there or has failed, or the run would not start.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [*shlex.split(launcher), "-m", "hf_trainopt.lab.doctor.probe", str(report), script, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        except OSError as error:
            raise ValueError(
                f"--launcher {launcher} cannot be started ({error}); install it or correct it."
            ) from error
        if not report.is_file():
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
            raise ValueError(f"--launcher {launcher} has failed with exit code {done.returncode}: {' '.join(last)}")
        found = json.loads(report.read_text(encoding="utf-8"))
    if "error" in found:
        raise ValueError(found["error"])
    return found


def render(found: dict[str, Any]) -> str:
    """Return what was found as text."""
    width = max(len(name) for lines in found["sections"].values() for name, _ in lines)
    parts = []
    for title, lines in found["sections"].items():
        pairs = render_pairs([(name.ljust(width), text) for name, text in lines])
        parts.append(f"{title}\n" + "\n".join(f"  {line}" for line in pairs.splitlines()))
    warnings = [wrapped(f"- {text}") for text in found["warnings"]] or ["none"]
    parts.append("Warnings\n" + "\n".join(warnings))
    if "refusal" in found:
        parts.append(
            "This run would end before it trains; the above is without a placement.\n" + wrapped(found["refusal"])
        )
    return "\n\n".join(parts) + "\n"
