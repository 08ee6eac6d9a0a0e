"""The command `hf-trainopt`: one subcommand per module."""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn


class Command(NamedTuple):
    """A subcommand.

    Args:
        module: Has `add_parser(subparsers, **options)`, which sets `run`: arguments -> text for stdout, or texts as
            they come. It is imported only when the command is used: most of these import PyTorch.
        help: What `hf-trainopt --help` says.
    """

    module: str
    help: str


COMMANDS = {
    "plan": Command("placement.show.cli", "choose the activations to store and to recompute, for a memory budget"),
    "doctor": Command("lab.doctor.cli", "say how each part will act in a run, before any training"),
    "compare": Command("lab.compare.cli", "run a training script with stock settings and with ours, and compare"),
    "report": Command("lab.report.cli", "show runs as a page, pictures and a table, from their output folders"),
}


class CommandParser(argparse.ArgumentParser):
    """`ArgumentParser` that takes no abbreviated flags, and reports wrong values in one line as `ValueError`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.commands: dict[str, argparse.ArgumentParser] = {}

    def error(self, message: str) -> NoReturn:
        helps = [f"{self.prog} {name} --help" for name in self.commands] or [f"{self.prog} --help"]
        raise ValueError(f"{message} (see {' or '.join(helps)})")

    def parse_command(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse a subcommand and its flags.

        Raises:
            ValueError: There is no such subcommand or flag, or a value is wrong.
        """
        parser = self.commands.get(argv[0], self) if argv else self
        if parser is not self:
            parser.check_flags(argv[1:])  # first: what a mistyped flag leaves missing is not the mistake
        arguments, unknown = self.parse_known_args(argv)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        return arguments

    def check_flags(self, words: Sequence[str]) -> None:
        """Check that words which can only be flags are flags of this parser.

        Raises:
            ValueError: One is not.
        """
        known = [name for name in self._option_string_actions if name.startswith("--")]
        if any(action.nargs == argparse.REMAINDER for action in self._actions):
            return  # flags of something else may follow
        for word in words:
            flag = word.partition("=")[0]  # `--flag=value` is one word
            if flag.startswith("--") and " " not in flag and flag not in known:
                close = difflib.get_close_matches(flag, known, n=1)
                self.error(f"unrecognized arguments: {flag}{f'; did you mean {close[0]}?' if close else ''}")


class ShowVersion(argparse.Action):
    """Writes the version and ends; other commands needn't wait until it is looked up."""

    def __call__(self, parser, namespace, values, option_string=None):
        from .core.installed import installed_version

        _write(f"hf-trainopt {installed_version('hf-trainopt') or '(not installed)'}\n")
        parser.exit()


def build_parser(used: str) -> CommandParser:
    """Return the parser of all subcommands. Only the one that is used gets its flags.

    Args:
        used: Name of the subcommand on the command line. Any other word will do where there is none.
    """
    parser = CommandParser(prog="hf-trainopt", description="The Hugging Face Trainer, cheaper.")
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="show the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        if name == used:
            importlib.import_module(f"hf_trainopt.{command.module}").add_parser(subparsers, help=command.help)
        else:
            subparsers.add_parser(name, help=command.help)
    parser.commands = subparsers.choices
    return parser


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a command line up to its first `--`, and the rest."""
    if "--" not in argv:
        return list(argv), []
    place = list(argv).index("--")
    return list(argv[:place]), list(argv[place + 1 :])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 1 if a run has failed, or 2 if what is asked is impossible.

    Args:
        argv: Arguments without the program name; `None`: those of the process.
    """
    try:
        own, script_arguments = split_arguments(sys.argv[1:] if argv is None else argv)
        arguments = build_parser(own[0] if own else "").parse_command(own)
        if hasattr(arguments, "script_arguments"):
            arguments.script_arguments = [*arguments.script_arguments, *script_arguments]
        elif script_arguments:
            raise ValueError(f"'{arguments.command}' takes nothing after --.")
        texts = arguments.run(arguments)
        for text in [texts] if isinstance(texts, str) else texts:
            _write(text)
    except ValueError as error:
        sys.stderr.write(f"hf-trainopt: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("hf-trainopt: interrupted\n")
        return 130
    return getattr(arguments, "exit_code", 0)


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # `| head` has read enough. What is left in the buffer must not be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
