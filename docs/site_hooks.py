"""How MkDocs reads a page: links to files outside docs/ lead to the repository, and lists are as on GitHub."""

import re
import sys
from pathlib import Path, PurePosixPath


sys.path.insert(0, str(Path(__file__).parent))
from links import absolute_links


def on_page_markdown(markdown, *, page, config, files):
    """Return the page as Python-Markdown should read it."""
    root = Path(config.config_file_path).parent
    source = PurePosixPath("docs") / page.file.src_uri
    pages = {PurePosixPath("docs") / file.src_uri for file in files.documentation_pages()}
    text = absolute_links(markdown, source, root, config.repo_url, "main", stays=pages.__contains__)
    return with_indented_items(text)


def with_indented_items(text: str) -> str:
    """Return a page in which the items of lists are set off as Python-Markdown wants them.

    What belongs to an item is indented by four there; GitHub takes the width of the marker: three for `1. `, two for
    `- `. And a blank line must follow an item of several paragraphs.
    """
    lines, added, in_code, is_long = [], 0, False, False
    for line in text.split("\n"):
        in_code ^= line.startswith("```")
        if not in_code and (marker := re.match(r"(?:\d+\.|-) ", line)):
            if is_long and lines[-1]:
                lines.append("")
            added, is_long = 4 - len(marker[0]), False
        elif not line:
            is_long = added > 0
        elif not line.startswith(" "):
            added, is_long = 0, False
        lines.append(" " * added + line if line.startswith(" ") and not in_code else line)
    return "\n".join(lines)
