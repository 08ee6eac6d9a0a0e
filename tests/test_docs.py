"""Every code block of the docs runs or, where it is a command, is taken by the parser of what it calls."""

import needs_scripts  # noqa: F401


# isort: split
import importlib.util
import logging
import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from helpers import Rows, arguments, quiet, tiny_gpt2

import hf_trainopt
import run_clm
import run_image
from hf_trainopt import EfficientTrainer, EfficientTrainingArguments
from hf_trainopt.cli import build_parser, split_arguments
from hf_trainopt.scripting.parser import parse_script_arguments


ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# A block that cannot be run has this before it, with the reason.
MARKER = re.compile(r"<!-- not run: (?P<reason>[^\n]+) -->\n$")

# Run by tests of their own, since what they show is looked at there: name of the page -> test.
NOT_OF_PARTS = ("README.md", "architecture.md")
RUN_ELSEWHERE = {"placement.md": "test_readme.py", "evidence.md": "test_readme.py", "README.md": "test_readme.py"}

SCRIPTS = {"run_clm.py": run_clm, "run_image.py": run_image}
SYSTEM_COMMANDS = ("python3 -m venv", "pip install", "ruff ", "python -m pytest", "python -m torch")


def blocks(page: Path, language: str) -> list[tuple[str, str | None]]:
    """Return the blocks of a language, each with the reason why it is not run."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in re.finditer(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        marker = MARKER.search(text[: match.start()])
        found.append((match[1], marker["reason"] if marker else None))
    return found


def commands(block: str) -> list[str]:
    """Return the commands of a bash block without comments, environment variables and redirections."""
    lines = [line for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    parts = [part.strip() for line in lines for part in re.split(r"&&|;|\|", line)]
    return [re.sub(r"^(?:[A-Z_]+=\S+ )+", "", re.sub(r"\s#.*$", "", part)) for part in parts if part]


def check_command(command: str) -> None:
    """Raise unless a command is one that the parser of what it calls takes."""
    words = [word for word in shlex.split(command) if word != "..."]
    if words[0] == "hf-trainopt":
        own, script_arguments = split_arguments(words[1:])
        parsed = build_parser(own[0]).parse_command(own)
        rest = [*getattr(parsed, "script_arguments", []), *script_arguments]
        if hasattr(parsed, "script") and Path(parsed.script).name in SCRIPTS:
            check_flags(Path(parsed.script).name, rest)
        if getattr(parsed, "launcher", None):
            check_launcher([*shlex.split(parsed.launcher), "run_clm.py"])
    elif words[:2] == ["accelerate", "launch"] or words[0] == "torchrun":
        check_launcher(words)
    elif words[0] in ("python", "python3") and Path(words[1]).name in SCRIPTS:
        check_flags(Path(words[1]).name, words[2:])
    elif words[0] in ("python", "python3") and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), f"there is no {words[1]}"
    else:
        known = command.startswith((*SYSTEM_COMMANDS, ". .venv/bin/activate", "cd ", "git ", "export "))
        assert known, f"'{command}' is not checked: add its parser here, or say why it cannot be run"


def check_launcher(words: list[str]) -> None:
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed, unknown = get_args_parser().parse_known_args(words[1:])
    else:
        parsed, unknown = launch_command_parser().parse_known_args(words[2:])
    assert not unknown, unknown
    config = getattr(parsed, "config_file", None)
    assert config is None or not config.startswith("examples/") or (ROOT / config).is_file(), config
    if Path(parsed.training_script).name in SCRIPTS:
        check_flags(Path(parsed.training_script).name, parsed.training_script_args)


def check_flags(script: str, flags: list[str]) -> None:
    """Check the names and values of a script's flags, but not whether files and devices are there."""
    from hf_trainopt.scripting.parser import ScriptArgumentParser

    module = SCRIPTS[script]
    classes = (module.ModelArguments, module.DataTrainingArguments, EfficientTrainingArguments)
    parsed, unknown = ScriptArgumentParser(classes).parse_known_args(flags)
    assert not unknown, f"{script} takes no {unknown}"
    if parsed.config is not None and parsed.config.startswith("examples/"):
        parse_script_arguments(classes, None, ["--config", str(ROOT / parsed.config), "--bf16", "False"])


BASH = [(page.name, i, block) for page in PAGES for i, (block, why) in enumerate(blocks(page, "bash")) if why is None]


@pytest.mark.parametrize(("page", "block"), [pytest.param(p, b, id=f"{p}-{i}") for p, i, b in BASH])
def test_commands_are_taken_by_what_they_call(page, block, monkeypatch):
    found = commands(block)
    assert found
    for command in found:
        check_command(command)


@pytest.mark.parametrize(
    "command",
    [
        "hf-trainopt plan --model_typ gpt2",
        "hf-trainopt compare run_clm.py -- --learning_rat 1",
        "hf-trainopt doctor run_clm.py --memory_budge 1",
        "torchrun --procs_per_node 2 run_clm.py",
        "accelerate launch --num_process 2 run_clm.py --do_trai",
        "python run_image.py --timm_mode resnet50",
        "python examples/none.py",
        "make all",
    ],
)
def test_a_wrong_command_is_found(command):
    with pytest.raises((AssertionError, ValueError, SystemExit)):
        check_command(command)


PYTHON = [
    (page.name, i, block)
    for page in PAGES
    if page.name not in RUN_ELSEWHERE
    for i, (block, why) in enumerate(blocks(page, "python"))
    if why is None
]


@pytest.mark.parametrize(("page", "block"), [pytest.param(p, b, id=f"{p}-{i}") for p, i, b in PYTHON])
def test_python_blocks_run(page, block, tmp_path, monkeypatch):
    """With a tiny model, its data and the names that a reader has by then; `...` stands for arguments of a Trainer."""
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger("hf_trainopt").level
    if page == "report.md":
        for run in ("stock", "ours"):
            args = arguments(tmp_path / "outputs" / run, max_steps=2)
            runner = quiet(EfficientTrainer(model=tiny_gpt2(), args=args, train_dataset=Rows(32)))
            runner.train()
            runner.save_state()
    model, dataset = tiny_gpt2(), Rows(32)
    args = arguments(tmp_path / "outputs", max_steps=2)
    names = {
        **{name: getattr(hf_trainopt, name) for name in hf_trainopt.__all__},
        "model": model,
        "dataset": dataset,
        "args": args,
        "trainer": quiet(EfficientTrainer(model=model, args=args, train_dataset=dataset)),
    }
    quietly = f'output_dir="{tmp_path}", use_cpu=True, report_to="none", disable_tqdm=True'
    code = block.replace('output_dir="outputs"', quietly).replace(
        "Trainer(...", "Trainer(model=model, args=args, train_dataset=dataset"
    )
    try:
        exec(compile(code, page, "exec"), names)
    finally:
        logging.getLogger("hf_trainopt").setLevel(level)


def test_every_block_says_what_it_is_and_every_reason_is_one():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        opened = re.findall(r"^```(\w*)$", text, flags=re.MULTILINE)[::2]
        assert set(opened) <= {"python", "bash", "yaml", "json", "text", "diff"}, f"{page.name}: {opened}"
        for language in ("python", "bash"):
            for _, why in blocks(page, language):
                assert why is None or len(why) > 10


def test_the_index_names_every_page_and_links_lead_somewhere():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def headings(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^(#+ .+)$", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parent.name == "docs" and page.name not in NOT_OF_PARTS]
)
def test_every_page_has_the_same_sections(page):
    """What it does, and then these; pages may have more."""
    known = [f"## {name}" for name in ("Arguments", "How it works", "With the other parts", "Caveats", "Logged keys")]
    assert [heading for heading in headings(page) if heading in known] == known


def test_links_into_pages_meet_a_heading():
    for page in PAGES:
        for name, anchor in re.findall(r"\]\(([\w./-]*\.md)?#([\w-]+)\)", page.read_text(encoding="utf-8")):
            target = page.parent / name if name else page
            anchors = [re.sub(r"[^\w -]", "", h.lstrip("# ").lower()).replace(" ", "-") for h in headings(target)]
            assert anchor in anchors, f"{page.name}: {name}#{anchor}"


def test_generated_pages_are_up_to_date():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for path, text in generate.files().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is out of date: run python docs/generate.py"


def test_every_file_of_the_package_is_in_the_layout():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^`(hf_trainopt[\w/]*)/`\n\n((?:- .*\n)+)", text, flags=re.MULTILINE))
    for path in (ROOT / "hf_trainopt").rglob("*.py"):
        line = re.search(
            rf"^- `{re.escape(path.name)}`: (.+)$",
            sections[path.parent.relative_to(ROOT).as_posix()],
            flags=re.MULTILINE,
        )
        assert line, path
        assert len(line[1]) > 10, path
