"""The docs site builds without a network, and all links of the repository's pages lead somewhere."""

import html.parser
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "examples/**/*.md", ".github/*.md")
    for path in ROOT.glob(pattern)
    if "template" not in path.name.lower() or path.parent.name == ".github"
)


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.lstrip("# ")).replace("`", "")
    return re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_of_every_page_lead_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if urlsplit(target).scheme:
            assert target.startswith("https://"), f"{page.name}: {target}"
            continue
        name, _, anchor = target.partition("#")
        other = page.parent / unquote(name) if name else page
        assert other.exists(), f"{page.name}: {target}"
        assert other.resolve().is_relative_to(ROOT), f"{page.name}: {target}"
        if anchor:
            text = re.sub(r"^```.*?^```", "", other.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
            assert anchor in map(slug, re.findall(r"^#+ .+$", text, flags=re.MULTILINE)), f"{page.name}: {target}"


class Page(html.parser.HTMLParser):
    """What a page of the site links to, loads and can be linked at."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.loaded, self.ids = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids.update(filter(None, [values.get("id"), values.get("name")]))
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag in ("img", "script", "iframe") and values.get("src"):
            self.loaded.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload") and values.get("href"):
            self.loaded.append(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="mkdocs-material is in the extra 'docs'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_of_the_docs_is_on_the_site(site):
    names = {"index" if path.stem == "README" else path.stem for path in (ROOT / "docs").glob("*.md")}
    assert names == {path.stem for path in site.glob("*.html")} - {"404"}
    start = Page(site / "index.html")
    assert {f"{name}.html" for name in names} <= {link.partition("#")[0] for link in start.links}


def test_links_on_the_site_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    pages = {path: Page(path) for path in site.glob("*.html") if path.stem != "404"}
    inside = 0
    for path, page in pages.items():
        for target in [*page.links, *page.loaded]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                assert target in page.links, f"{path.name} loads {target}"
                continue
            other = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            other = other / "index.html" if other.is_dir() else other
            assert other.is_file(), f"{path.name}: {target}"
            if parts.fragment and other in pages:
                assert unquote(parts.fragment) in pages[other].ids, f"{path.name}: {target}"
            inside += 1
    assert inside > 200


def test_lists_and_tables_are_rendered_as_such(site):
    """Python-Markdown is stricter than GitHub: a list right behind a line of text stays text."""
    for path in site.glob("*.html"):
        text = path.read_text(encoding="utf-8")
        article = re.search(r"<article.*?</article>", text, flags=re.DOTALL)
        for paragraph in re.findall(r"<p>.*?</p>", article[0] if article else "", flags=re.DOTALL):
            assert not re.search(r"\n(?:- |\d+\. |-{3} \|)", paragraph), f"{path.name}: {paragraph[:200]}"
