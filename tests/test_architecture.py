"""The house rules of docs/architecture.md, held over the syntax trees of the package."""

import ast
from pathlib import Path

import pytest

import hf_trainopt
from hf_trainopt.core.part import Part
from hf_trainopt.engine.parts import Parts


PACKAGE = Path(hf_trainopt.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 450


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def module_level_imports(path: Path) -> set[str]:
    """Dotted names of what a file imports of the package when it is imported itself, `TYPE_CHECKING` left out."""
    here = ("hf_trainopt", *path.relative_to(PACKAGE).parts[:-1])
    found = set()
    pending = list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return {name for name in found if name.startswith("hf_trainopt")}


def package_graph() -> dict[str, set[str]]:
    """Subpackage -> those that it imports. Modules at the top level count as packages of their own."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        parts = path.relative_to(PACKAGE).parts
        own = parts[0].removesuffix(".py")
        if own in ("__init__", "__main__"):
            continue
        targets = {name.split(".")[1] for name in module_level_imports(path) if name.count(".")}
        graph.setdefault(own, set()).update(targets - {own})
    return {own: {target for target in targets if target in graph} for own, targets in graph.items()}


def test_packages_have_no_cycles():
    graph = package_graph()
    while graph:
        leaves = {own for own, targets in graph.items() if not targets}
        assert leaves, {own: sorted(targets) for own, targets in graph.items()}
        graph = {own: targets - leaves for own, targets in graph.items() if own not in leaves}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_longer_than_one_can_read(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def chain(node: ast.AST) -> list[str]:
    """Names of a dotted expression, `self.parts.accumulation` -> ["self", "parts", "accumulation"]."""
    names = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else ["", *names]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_part_reads_private_state_of_another(path):
    parts = {part.name for part in vars(Parts(None, None)).values() if isinstance(part, Part)} | {"parts", "trainopt"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owners = chain(node.value)
            assert not parts & set(owners), f"{path.name}:{node.lineno}: {'.'.join([*owners, node.attr])}"


def test_only_one_class_overrides_hooks_of_trainer():
    """Methods that are named like those of `Trainer` stand in trainer.py, in classes that it would call them on."""
    from transformers import Trainer

    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name.endswith("TrainerMixin"):
                assert path.name == "trainer.py", f"{name_of(path)}: {node.name}"
    from hf_trainopt.trainer import EfficientTrainerMixin

    assert EfficientTrainerMixin.__mro__ == (EfficientTrainerMixin, object)
    assert set(vars(EfficientTrainerMixin)) & set(vars(Trainer))


def test_all_parts_are_in_order_once():
    parts = Parts(None, None)
    members = [part for part in vars(parts).values() if isinstance(part, Part)]
    assert sorted(part.name for part in parts.in_order) == sorted(part.name for part in members)
    assert len({part.name for part in members}) == len(members)
