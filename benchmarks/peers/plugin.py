"""A pytest plugin that puts our classes in place of the upstream ones, for test suites that know nothing of us.

`pytest -p plugin` with this folder on the path. It reads from the environment:

- `PEERS_MODE`: `stock` changes nothing; `fixed` puts our classes in with `accumulation_policy="fixed"` wherever a test
  asks for no policy; `defaults` puts them in as they are.
- `PEERS_RECORD`: the file that gets {test: {"outcome", "error", "seconds"}} as JSON.
- `PEERS_SECONDS`: seconds that one test may take.
- `PEERS_PACKAGES`: packages whose classes are replaced.

pytest imports plugins before it imports test modules, so that `from transformers import Trainer` and
`class Mine(Trainer)` in a test get ours. Only names that the packages export are replaced. What the packages use
inside stays. A checkout of another version may import names that the installed version lacks: tests that use one are
skipped.
"""

import ast
import importlib
import json
import operator
import os
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


MODES = ("stock", "fixed", "defaults")
PAIRS = {  # package -> trainers and their arguments
    "transformers": (("Trainer", "TrainingArguments"), ("Seq2SeqTrainer", "Seq2SeqTrainingArguments")),
    "trl": (("SFTTrainer", "SFTConfig"),),
}


def trainer_class(stock: type) -> type:
    """Return our trainer over `stock`."""
    from hf_trainopt import EfficientTrainer, EfficientTrainerMixin

    if stock in EfficientTrainer.__bases__:
        return EfficientTrainer
    return type(f"Efficient{stock.__name__}", (EfficientTrainerMixin, stock), {"__module__": __name__})


def with_defaults(cls: type, **defaults: Any) -> type:
    """Return a class of arguments like `cls`, under its name, with other defaults of some settings."""
    known = cls.__dataclass_fields__
    members = {name: field(default=value, metadata=known[name].metadata) for name, value in defaults.items()}
    types = {name: known[name].type for name in defaults}
    members |= {"__module__": __name__, "__doc__": cls.__doc__, "__annotations__": types}
    made = dataclass(type(cls.__name__, (cls,), members))
    globals()[made.__name__] = made  # training_args.bin names the class
    return made


def arguments_class(stock: type, mode: str) -> type:
    """Return our arguments over `stock`; in the mode `fixed` that is the default policy."""
    from hf_trainopt.arguments import efficient_class

    ours = efficient_class(stock)
    if mode == "fixed":
        # For trainers that are given plain arguments or none.
        ours.__dataclass_fields__["accumulation_policy"].default = "fixed"
        ours = with_defaults(ours, accumulation_policy="fixed")
    return ours


def put_in_place(mode: str, module: ModuleType) -> None:
    """Replace the classes that `module` (transformers, trl) exports by those of a mode."""
    import torch

    for trainer, arguments in PAIRS[module.__name__]:
        if module.__name__ == "trl" and not torch.cuda.is_available():
            # Its default is bf16, which arguments without `use_cpu` refuse on a CPU.
            setattr(module, arguments, with_defaults(getattr(module, arguments), use_cpu=True))
        if mode != "stock":
            setattr(module, arguments, arguments_class(getattr(module, arguments), mode))
            setattr(module, trainer, trainer_class(getattr(module, trainer)))


def absent(name: str) -> Any:
    """Return what stands for a name that the installed version lacks: a class whose use skips the test.

    Test modules call `is_..._available` when they are imported: these answer no.
    """
    if name.endswith("_available"):
        return lambda: False

    def skip(*args, **kwargs):
        pytest.skip(f"the installed version has no {name}")

    return type(name, (), {"__new__": skip})


def add_absent_names(path: Path) -> None:
    """Give the installed packages each name that a test module, or its neighbours that it imports, asks of them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        neighbour = path.parent / f"{node.module}.py"
        if node.level == 1 and neighbour.is_file():
            add_absent_names(neighbour)
        elif node.level == 0 and node.module.split(".")[0] in PAIRS:
            module = importlib.import_module(node.module)
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            module = importlib.import_module(node.module)  # looking may have loaded, and so replaced, it
            for name in missing:
                setattr(module, name, absent(f"{node.module}.{name}"))


class Recorder:
    """Writes the outcome of each test, and stops those that take too long.

    Args:
        path: The record.
        seconds: Time limit of a test.
    """

    def __init__(self, path: Path, seconds: float):
        self.path, self.seconds = path, seconds
        self.tests: dict[str, dict] = {}
        self.root = ""

    def pytest_sessionstart(self, session) -> None:
        self.root = str(session.config.rootpath)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        if threading.current_thread() is not threading.main_thread():
            return (yield)

        def stop(signum, frame):
            raise TimeoutError(f"longer than {self.seconds:g} s")

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def pytest_runtest_logreport(self, report) -> None:
        found = self.tests.setdefault(report.nodeid, {"outcome": "passed", "error": "", "seconds": 0.0})
        found["seconds"] = round(found["seconds"] + report.duration, 2)
        if report.outcome == "passed" or found["outcome"] == "failed":
            return
        found["outcome"], found["error"] = report.outcome, self._first_line(report)

    def pytest_runtest_logfinish(self, nodeid) -> None:
        self.path.write_text(json.dumps(self.tests, indent=1))

    def _first_line(self, report) -> str:
        """Say why: the exception's first line, or the reason of a skip."""
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            text = report.longrepr[2]
        else:
            crash = getattr(report.longrepr, "reprcrash", None)  # a str where pytest itself fails
            text = crash.message if crash else str(report.longrepr)
        return text.strip().split("\n")[0][:300]


def pytest_configure(config) -> None:
    if "PEERS_MODE" not in os.environ:
        return  # imported by a test of ours
    mode = os.environ["PEERS_MODE"]
    if mode not in MODES:
        raise pytest.UsageError(f"PEERS_MODE is {mode!r}, not one of {', '.join(MODES)}")
    packages = os.environ["PEERS_PACKAGES"].split(",")
    for name in packages:
        # While transformers loads its Trainer, another module takes the place of the one in sys.modules.
        for pair in PAIRS[name]:
            operator.attrgetter(*pair)(importlib.import_module(name))
    for path in map(Path, config.args):
        add_absent_names(path)
    for name in packages:
        put_in_place(mode, importlib.import_module(name))
    recorder = Recorder(Path(os.environ["PEERS_RECORD"]), float(os.environ["PEERS_SECONDS"]))
    config.pluginmanager.register(recorder)
