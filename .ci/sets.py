"""Run the test suite and both scripts on a set of versions other than the newest, and record what came of it.

    python .ci/sets.py floor                          # the lowest versions that pyproject.toml allows
    python .ci/sets.py gpu --environment /tmp/gpu     # what the GPU machine has; the environment is kept there
    python .ci/sets.py newest --report /tmp/report.xml  # which has the time of each test

Each result goes to docs/versions/SET.json, from which docs/generate.py makes the table in docs/compatibility.md.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from floors import floors, project


ROOT = Path(__file__).resolve().parent.parent
SHOWN = (
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "numpy",
    "datasets",
    "evaluate",
    "timm",
    "peft",
    "trl",
    "deepspeed",
)
TESTS = ["pytest", "pytest-xdist", "hypothesis", "tensorboard", "scipy"]


@dataclass(frozen=True)
class VersionSet:
    """What a set installs.

    Args:
        interpreter: Command of the Python to use.
        requirements: For `pip install`.
        for_scripts: Packages that the scripts need and the set lacks: installed into a folder of their own, which only
            the runs of the scripts see.
    """

    interpreter: str
    requirements: list[str]
    for_scripts: tuple[str, ...] = ()


SETS = {
    "newest": VersionSet("python3.11", ["-c", str(ROOT / "constraints.txt"), f"{ROOT}[test]"]),
    "floor": VersionSet("python3.11", floors(project())),
    "gpu": VersionSet(
        "python3.12",
        ["torch==2.11.0", "torchvision==0.26.0", "transformers==5.17.0", "accelerate==1.15.0", "numpy==2.5.*", "timm",
         "peft", "scikit-learn", "pyarrow", "pandas", "matplotlib", "psutil", "xxhash", "requests", *TESTS],
        ("datasets", "evaluate", "dill", "multiprocess"),
    ),
}  # fmt: skip

SCRIPTS = {
    "run_clm.py": ["--dataset_name", "python-docs", "--model_type", "gpt2", "--train_tokenizer_vocab_size", "2048",
                   "--config_overrides", "n_embd=64,n_layer=2,n_head=2,n_positions=64", "--block_size", "64",
                   "--max_train_samples", "400", "--max_eval_samples", "50", "--max_steps", "12",
                   "--memory_budget", "90%"],
    "run_image.py": ["--timm_model", "resnet18", "--image_size", "32", "--max_train_samples", "400", "--max_steps",
                     "6", "--max_eval_samples", "50", "--dataset_name", "digits", "--checkpoint_placement", "sqrt"],
}  # fmt: skip
COMMON = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4", "--do_train", "--do_eval",
          "--report_to", "none", "--use_cpu"]  # fmt: skip


def call(*words: object, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    return subprocess.run([str(word) for word in words], cwd=ROOT, env=environment, capture_output=True, text=True)


def install(versions: VersionSet, folder: Path) -> Path:
    """Make the environment unless it is there; return its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([versions.interpreter, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *versions.requirements], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", "-e", str(ROOT)], check=True)
    return python


def installed(python: Path) -> dict[str, str]:
    """Return package -> version, of those that are shown, and Python's own."""
    listed = json.loads(call(python, "-m", "pip", "list", "--format", "json").stdout)
    found = {entry["name"].lower(): entry["version"] for entry in listed}
    version = call(python, "-c", "import platform; print(platform.python_version())").stdout.strip()
    return {"python": version, **{name: found[name] for name in SHOWN if name in found}}


def run_suite(python: Path, kept: Path | None) -> dict:
    """Run all tests; return the counts, and what failed and why. Pytest's report, with all times, stays in `kept`."""
    with tempfile.TemporaryDirectory() as folder:
        report = kept or Path(folder) / "report.xml"
        # Tests start programs by name: those of this environment.
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        done = call(python, "-m", "pytest", "--junitxml", report, PATH=path)
        if not report.exists():
            raise SystemExit(f"pytest ended without a report:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        suite = next(ET.parse(report).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    failed, skipped = {}, {}
    for case in suite.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        for problem in (*case.iter("failure"), *case.iter("error")):
            failed[name] = (problem.get("message") or "").splitlines()[0][:200]
        for reason in case.iter("skipped"):
            skipped.setdefault(reason.get("message") or "", []).append(name)
    return {
        "passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"],
        "failed": counts["failures"] + counts["errors"],
        "skipped": counts["skipped"],
        "seconds": round(float(suite.get("time"))),
        "failures": failed,
        "skips": {reason: len(names) for reason, names in sorted(skipped.items())},
    }


def run_scripts(python: Path, more: tuple[str, ...]) -> dict[str, str]:
    """Run both scripts for some steps; return name -> "ok", or the error."""
    outcome = {}
    with tempfile.TemporaryDirectory() as folder:
        packages = Path(folder) / "packages"
        if more:
            subprocess.run(
                [str(python), "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages), *more], check=True
            )
        for name, flags in SCRIPTS.items():
            output = ["--output_dir", Path(folder) / name]
            done = call(python, ROOT / name, *flags, *COMMON, *output, PYTHONPATH=str(packages))
            lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
            said = [line for line in lines if re.match(r"\w*(Error|Exception)\b", line)] or lines
            outcome[name] = "ok" if done.returncode == 0 else said[-1][:300]
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--environment", type=Path, help="folder of the environment; default: a temporary one")
    parser.add_argument("--report", type=Path, help="file for pytest's report (JUnit XML), with the time of each test")
    parser.add_argument("--scripts_only", action="store_true", help="leave the suite's counts as they were recorded")
    arguments = parser.parse_args()
    versions = SETS[arguments.set]
    record_path = ROOT / "docs" / "versions" / f"{arguments.set}.json"
    with tempfile.TemporaryDirectory() as folder:
        python = install(versions, arguments.environment or Path(folder) / "environment")
        record = {"date": datetime.date.today().isoformat(), "packages": installed(python)}
        record["commit"] = call("git", "rev-parse", "--short", "HEAD").stdout.strip()
        record["scripts"] = run_scripts(python, versions.for_scripts)
        if arguments.scripts_only:
            record["suite"] = json.loads(record_path.read_text(encoding="utf-8"))["suite"]
        else:
            record["suite"] = run_suite(python, arguments.report)
    record_path.parent.mkdir(exist_ok=True)
    record_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
