"""`hf-trainopt report`: arguments, and what is written."""

import argparse
from pathlib import Path
from typing import Any

from .report import FORMATS, check_formats, make_report


EPILOG = """examples:
  hf-trainopt report outputs/run
  hf-trainopt report outputs/stock outputs/ours --baseline stock --target_metric eval_loss --target_value 3.4
  hf-trainopt report 'ours=outputs/a-seed0' 'ours=outputs/b-seed1' outputs/stock-seed0 outputs/stock-seed1
  hf-trainopt report outputs/compare --output_dir outputs/compare/report
"""


def add_parser(subparsers: Any, **options: Any) -> None:
    """Add `report` to the subcommands of `hf-trainopt`."""
    parser = subparsers.add_parser(
        "report",
        description="Show how runs went, from their output folders alone: one HTML page that needs nothing "
        "else, a PNG picture for each part, and Markdown. Folders of EfficientTrainer, of stock Trainer, and of "
        "`hf-trainopt compare`.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="output folder of a run, a checkpoint in one, a folder of hf-trainopt compare, or a folder of these; "
        "NAME=FOLDER names the run. Folders whose names differ in a seed at the end (ours-seed0, ours-seed1) are "
        "seeds of one",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/report"), help="default: outputs/report")
    parser.add_argument(
        "--baseline", help="run that others are divided by; default: a comparison's own, else the first"
    )
    parser.add_argument("--target_metric", help="metric that time to target is measured on, such as eval_loss")
    parser.add_argument("--target_value", type=float, help="value to be reached; default: see docs/report.md")
    parser.add_argument("--greater_is_better", action=argparse.BooleanOptionalAction, help="default: by the name")
    parser.add_argument("--title", help="heading; default: made from the names of the runs")
    parser.add_argument(
        "--formats",
        help=f"out of {', '.join(FORMATS)}, with commas; default: all, png only where matplotlib is installed",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> str:
    """Write the report; return its tables as Markdown.

    Raises:
        ValueError: A folder has no run in it, or what is asked for is not there.
    """
    formats = None
    if arguments.formats is not None:
        formats = [name.strip() for name in arguments.formats.split(",") if name.strip()]
        check_formats(formats)
    report = make_report(
        *arguments.runs,
        baseline=arguments.baseline,
        target_metric=arguments.target_metric,
        target_value=arguments.target_value,
        greater_is_better=arguments.greater_is_better,
        title=arguments.title,
    )
    try:
        saved = report.save(arguments.output_dir, formats)
    except OSError as error:
        raise ValueError(
            f"The report cannot be written to {arguments.output_dir} ({error.strerror}); name another --output_dir."
        ) from error
    pictures = sum(path.suffix == ".png" for path in saved)
    names = [str(path) for path in saved if path.suffix != ".png"]
    names += [f"{pictures} pictures in {arguments.output_dir}"] if pictures else []
    return f"{report.to_markdown(brief=True)}\nSaved {', '.join(names)}.\n"
