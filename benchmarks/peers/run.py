"""Runs the Trainer tests of transformers and the SFT tests of TRL with stock classes and with ours in their place.

    python benchmarks/peers/run.py transformers DIR [--modes stock fixed defaults] [--results FOLDER]
    python benchmarks/peers/run.py trl DIR

DIR is a checkout of huggingface/transformers or huggingface/trl; its folder `tests` is enough. The installed packages
are tested, not the checkout's sources. Leaves one JSON record for each suite and mode; `report.py` makes the page.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from plugin import MODES
from stand_ins import make_data, make_models


HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "peers"
FILES = {
    "transformers": [
        "tests/trainer/test_trainer.py",
        "tests/trainer/test_trainer_callback.py",
        "tests/trainer/test_trainer_jit_checkpoint.py",
        "tests/trainer/test_trainer_seq2seq.py",
        "tests/trainer/test_trainer_utils.py",
        "tests/trainer/test_training_args.py",
        # Newer checkouts have test_trainer.py in parts.
        "tests/trainer/test_trainer_accelerator.py",
        "tests/trainer/test_trainer_checkpointing.py",
        "tests/trainer/test_trainer_data.py",
        "tests/trainer/test_trainer_evaluation.py",
        "tests/trainer/test_trainer_hyperparameter.py",
        "tests/trainer/test_trainer_optimizers.py",
    ],
    "trl": ["tests/test_sft_trainer.py"],
}
TESTED = {"transformers": ["torch", "transformers"], "trl": ["torch", "transformers", "trl"]}


def revision(checkout: Path) -> str:
    """Return the commit of a checkout."""
    done = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout} is no git checkout: name its commit with --revision.")
    return done.stdout.strip()


def run(suite: str, mode: str, checkout: Path, work: Path, seconds: float) -> dict:
    """Run a suite in one mode.

    Returns:
        Test -> outcome, first line of the error or the reason of a skip, seconds.
    """
    files = [checkout / name for name in FILES[suite] if (checkout / name).is_file()]
    if not files:
        raise SystemExit(f"{checkout} has none of the files {', '.join(FILES[suite])}.")
    record = work / f"{suite}-{mode}.json"
    paths = [str(HERE.parent.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PEERS_MODE": mode,
        "PEERS_RECORD": str(record),
        "PEERS_SECONDS": str(seconds),
        "PEERS_PACKAGES": ",".join(TESTED[suite][1:]),
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "plugin", "-p", "no:cacheprovider"]
    command += ["-c", os.devnull, "--noconftest", f"--rootdir={checkout}", "-m", "not slow", *files]
    log = work / f"{suite}-{mode}.log"
    with log.open("w") as output:
        code = subprocess.run(command, cwd=work, env=environment, stdout=output, stderr=output).returncode
    if code not in (0, 1):  # 1: some tests failed
        raise SystemExit(f"pytest ended with {code}:\n{log.read_text()[-3000:]}")
    return json.loads(record.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=list(FILES))
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--revision", help="commit of a checkout that is no git repository")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, help="where the suites run and the logs lie; else a temporary folder")
    parser.add_argument("--no-stand-ins", dest="stand_ins", action="store_false", help="ask the Hub as the tests do")
    parser.add_argument("--seconds", type=float, default=60, help="time limit of one test")
    options = parser.parse_args()
    checkout = options.checkout.resolve()
    commit = options.revision or revision(checkout)
    options.results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        if options.stand_ins:
            os.environ["HF_HUB_OFFLINE"] = "1"
            make_models(work)
            make_data(work)
        for mode in options.modes:
            begin = time.monotonic()
            tests = run(options.suite, mode, checkout, work, options.seconds)
            record = {
                "suite": options.suite,
                "mode": mode,
                "revision": commit,
                "versions": {name: importlib.metadata.version(name) for name in TESTED[options.suite]},
                "machine": f"{os.cpu_count()} cores, {platform.machine()}",
                "minutes": round((time.monotonic() - begin) / 60, 1),
            }
            lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(tests[name])}" for name in sorted(tests))
            head = json.dumps(record, indent=1)[:-2]
            path = options.results / f"{options.suite}-{mode}.json"
            path.write_text(f'{head},\n "tests": {{\n{lines}\n }}\n}}\n')
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
