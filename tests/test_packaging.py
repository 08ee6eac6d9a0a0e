"""The wheel and the sdist: complete, accepted by twine, with a README whose links work on PyPI."""

import email
import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSION = PROJECT["version"]
REPOSITORY = PROJECT["urls"]["Repository"]
RAW = REPOSITORY.replace("https://github.com", "https://raw.githubusercontent.com")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and sdist, the wheel built from the sdist."""
    pytest.importorskip("build", reason="build is in the extra 'test'")
    pytest.importorskip("hatchling", reason="hatchling is in the extra 'test'")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_string(archive.read(name).decode("utf-8"))


def test_twine_accepts_both(built):
    pytest.importorskip("twine", reason="twine is in the extra 'test'")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_both_are_complete(built):
    wheel, sdist = built
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "hf_trainopt").rglob("*")}
    package = {name for name in package if (ROOT / name).is_file() and "__pycache__" not in name}
    assert {"hf_trainopt/py.typed", "hf_trainopt/lab/report/templates/report.html"} <= package
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if name.startswith("hf_trainopt/")} == package
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package <= names
    for name in ("README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "mkdocs.yml", "docs/README.md", "run_clm.py"):
        assert name in names, name
    assert all(name in names for name in ("tests/helpers.py", ".ci/run", "examples/quickstart.ipynb"))


def test_the_readme_of_pypi_has_absolute_links_to_files_that_are_there(built):
    read = metadata(built[0])
    assert read["Version"] == VERSION
    assert read["Description-Content-Type"] == "text/markdown"
    text = read.get_payload()
    assert text.startswith("# hf_trainopt")
    links = re.findall(r"(!\[[^\]]*)?\]\(([^)\s]+)\)", text)
    assert len(links) > 15
    pictures = 0
    for image, target in links:
        start = f"{RAW}/v{VERSION}/" if image else f"{REPOSITORY}/"
        assert target.startswith(start), target
        path = target.removeprefix(start).partition("#")[0]
        path = path if image else re.sub(rf"^(?:blob|tree)/v{re.escape(VERSION)}/", "", path)
        assert (ROOT / path).exists(), target
        pictures += bool(image)
    assert pictures


def test_a_link_that_leads_nowhere_ends_the_build():
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import PurePosixPath

    spec = spec_from_file_location("links", ROOT / "docs" / "links.py")
    links = module_from_spec(spec)
    spec.loader.exec_module(links)

    def absolute(text):
        return links.absolute_links(text, PurePosixPath("docs/README.md"), ROOT, REPOSITORY, "main")

    with pytest.raises(FileNotFoundError, match="nowhere"):
        absolute("[a](nowhere.md)")
    assert absolute("[a](../examples)") == f"[a]({REPOSITORY}/tree/main/examples)"
    assert absolute("[a](report.md#caveats)") == f"[a]({REPOSITORY}/blob/main/docs/report.md#caveats)"
    picture = "benchmarks/figures/convergence-language.png"
    assert absolute(f"![a](../{picture})") == f"![a]({RAW}/main/{picture})"
    for text in ("[a](#here)", "[a](https://x.y/z)", "`[a](b)`", "```text\n[a](b)\n```"):
        assert absolute(text) == text


def test_classifiers_name_the_pythons_that_were_tested():
    recorded = {
        json.loads(path.read_text())["packages"]["python"] for path in (ROOT / "docs" / "versions").glob("*.json")
    }
    tested = {".".join(version.split(".")[:2]) for version in recorded}
    start = "Programming Language :: Python :: 3."
    named = {f"3.{c.removeprefix(start)}" for c in PROJECT["classifiers"] if c.startswith(start)}
    assert named == tested


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == VERSION
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == REPOSITORY
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\d\S*)", changelog, flags=re.MULTILINE)[1] == VERSION


def test_files_for_github_are_valid():
    for path in (ROOT / ".github").rglob("*.yml"):
        assert yaml.safe_load(path.read_text(encoding="utf-8")), path
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml"):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= form.keys()
        ids = [field["id"] for field in form["body"]]
        assert len(set(ids)) == len(ids)
        assert all(field["attributes"]["label"] for field in form["body"])
    release = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    assert release.startswith("# UNTESTED")
