"""The README and the docs keep to plain English: three turns of phrase that give a translation away stay rare."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED_TABLES = ("compatibility.md",)  # docs/generate.py writes its tables from reasons given in the code

PATTERNS = {
    # "what it does is", "what a run took"; "whatever" and "somewhat" are other words.
    "what-clause": re.compile(r"\bwhat\b(?!-)", re.IGNORECASE),
    # "a smaller k is no cure"; "there is no GPU" and "is no longer" are ordinary English.
    "is no X": re.compile(r"(?<!\bthere )\b(?:is|are|was|were) no (?!longer\b)", re.IGNORECASE),
    # "the losses are those of stock"; English says "stock's losses", "the same losses as stock".
    "that of / those of": re.compile(r"\b(?:that|those) of\b", re.IGNORECASE),
}

# Twice the rates per 10,000 words in TRL's README and docs.
LIMITS = {"what-clause": 2.0, "is no X": 2.0, "that of / those of": 0.2}


def prose(text: str, tables: bool = True) -> str:
    """Return a page's sentences: no code, comments, headings, heads of tables, link targets or questions."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^.*\n(?=\|?\s*-{3,}[\s|:-]*\n)", "", text, flags=re.MULTILINE)
    text = re.sub(r"^(?:#.*|[\s|:-]*-{3,}[\s|:-]*)$", "", text, flags=re.MULTILINE)
    if not tables:
        text = re.sub(r"^.* \| .*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`]+`", "code", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = " ".join(text.split())
    return re.sub(r"[^.?!:;|]*\?", "", text)


def counts(text: str) -> dict[str, int]:
    return {name: len(pattern.findall(text)) for name, pattern in PATTERNS.items()}


def allowed(limit: float, words: int) -> int:
    """Return how often a phrase may occur in so many words: at least once."""
    return max(1, round(limit * words / 10_000))


@pytest.mark.parametrize("name", PATTERNS)
def test_the_docs_stay_within_twice_the_rates_of_trl(name):
    texts = {page: prose(page.read_text(encoding="utf-8"), page.name not in GENERATED_TABLES) for page in PAGES}
    words = sum(len(text.split()) for text in texts.values())
    found = [
        f"{page.name}: ...{text[max(0, match.start() - 40) : match.end() + 40]}..."
        for page, text in texts.items()
        for match in PATTERNS[name].finditer(text)
    ]
    assert words > 10_000
    limit = allowed(LIMITS[name], words)
    assert len(found) <= limit, f"{len(found)} of '{name}' in {words} words, {limit} allowed:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("sentence", "name"),
    [
        ("It costs what any known plan costs.", "what-clause"),
        ("What a run took can be seen.", "what-clause"),
        ("Does it fit? If not, this is what to do.", "what-clause"),
        ("name | why\n--- | ---\nk | what was set", "what-clause"),
        ("`skipped_steps` of a few is no fault.", "is no X"),
        ("Evaluations after training\nare no part of the curve.", "is no X"),
        ("Losses are those of stock `Trainer`.", "that of / those of"),
        ("The figure is that of one device.", "that of / those of"),
    ],
)
def test_a_phrase_is_found(sentence, name):
    assert counts(prose(sentence)) == {pattern: int(pattern == name) for pattern in PATTERNS}


@pytest.mark.parametrize(
    "sentence",
    [
        "## What it costs\n\nAbout 2 %.",
        "what | why\n--- | ---\n`k` | accumulation",
        "| what | why |\n| --- | --- |\n| `k` | accumulation |",
        "What does it cost? About 2 %.",
        "```text\nwhat is no code\n```\n",
        "Whatever k does, a window is no longer fixed, and there is no other rule.",
        "The weights of those that are frozen don't change.",
    ],
)
def test_ordinary_english_is_left_alone(sentence):
    assert not any(counts(prose(sentence)).values())
