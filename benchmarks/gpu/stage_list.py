"""Which stages `run.py` has, and which stages and arms a command line asks for."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from arm_list import arms_for, choose


DATA_FILES = {
    "language": ("wikitext-2/train.txt", "wikitext-2/valid.txt", "gpt2-tokenizer/vocab.json",
                 "gpt2-tokenizer/merges.txt"),
    "vision": ("cifar10/train.parquet", "cifar10/test.parquet"),
}  # fmt: skip
# That come back from the machine with the GPU.
MOST_FILES = 8


@dataclass(frozen=True)
class Stage:
    """One process with one record.

    Args:
        name: Name of the record.
        seconds: Its limit in a run of nine minutes; scaled in others. Time that is left over comes on top.
        exact_seconds: Its limit in any run; nothing comes on top.
        background: Runs beside the others, on the CPU, from the start.
        environment: Variables of its process.
    """

    name: str
    seconds: float
    background: bool = False
    exact_seconds: float | None = None
    environment: dict[str, str] = field(default_factory=dict)


# Most valuable first.
STAGES = (
    # No GPU for it to see: planning needs none, and must take no memory there.
    Stage("plans", 400, background=True, environment={"CUDA_VISIBLE_DEVICES": ""}),
    Stage("environment", 60),
    # cuBLAS gives the same bits only with workspaces of a fixed size.
    Stage("exactness", 75, environment={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
    Stage("memory", 65),
    Stage("time", 95),
    Stage("language", 195),
    Stage("vision", 50),
    # The newer name of the variable is the second one.
    Stage("memory_expandable", 30, environment=dict.fromkeys(
        ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"), "expandable_segments:True")),
)  # fmt: skip
# One record more than can come back: it runs when it is named, and in a rehearsal.
ON_REQUEST = ("memory_expandable",)
NEEDS_PLANS = ("exactness", "memory", "memory_expandable", "time")


def chosen_stages(text: str | None, rehearse: bool) -> list[Stage]:
    """Return the stages that are named, in that order, and the planning that they need.

    Raises:
        ValueError: There is no such stage, its seconds are no number, or there would be too many records.
    """
    known = {stage.name: stage for stage in STAGES}
    if text is None:
        text = ",".join(name for name in known if rehearse or name not in ON_REQUEST)
    asked: dict[str, Stage] = {}
    for word in filter(None, map(str.strip, text.split(","))):
        name, colon, seconds = word.partition(":")
        if name not in known:
            raise ValueError(f"--stages: {name}; choose out of {', '.join(known)}.")
        try:
            asked[name] = dataclasses.replace(known[name], exact_seconds=float(seconds) if colon else None)
        except ValueError:
            raise ValueError(f"--stages: {word}: {seconds!r} is no number of seconds.") from None
    if not asked:
        raise ValueError(f"--stages: nothing; choose out of {', '.join(known)}.")
    if any(name in asked for name in NEEDS_PLANS):
        asked.setdefault("plans", known["plans"])
    if not rehearse and len(asked) + 1 > MOST_FILES:
        raise ValueError(f"--stages: {len(asked)} records and the summary; only {MOST_FILES} files come back.")
    return list(asked.values())


def chosen_arms(texts: Sequence[str], rehearse: bool) -> dict[str, list[str]]:
    """Return the arms that are named, by task.

    Raises:
        ValueError: There is no such task or arm.
    """
    found = {}
    for text in texts:
        task, _, names = text.partition("=")
        if task not in DATA_FILES:
            raise ValueError(f"--arms: {task}; write TASK=NAME;NAME with {' or '.join(DATA_FILES)} as the task.")
        found[task] = [name.strip() for name in names.split(";") if name.strip()]
        choose(arms_for(task, rehearse), found[task])
    return found
