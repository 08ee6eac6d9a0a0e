"""Makes relative links of Markdown pages absolute, for PyPI and the docs site, which lack the other files."""

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath


_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?P<image>!\[[^\]]*)?\]\((?P<target>[^)\s]+)\)")


def file_url(path: PurePosixPath, root: Path, repository: str, ref: str, image: bool = False) -> str:
    """Return where the repository shows a file or folder.

    Args:
        path: Relative to `root`.
        root: The clone.
        repository: Address of the repository on GitHub.
        ref: Branch or tag.
        image: Whether to return the file itself and not the page around it.
    """
    if image:
        return f"{repository.replace('https://github.com', 'https://raw.githubusercontent.com')}/{ref}/{path}"
    return f"{repository}/{'tree' if (root / path).is_dir() else 'blob'}/{ref}/{path}"


def absolute_links(
    text: str,
    page: PurePosixPath,
    root: Path,
    repository: str,
    ref: str,
    stays: Callable[[PurePosixPath], bool] = lambda target: False,
) -> str:
    """Return a Markdown page with absolute links to other files.

    Args:
        text: The page.
        page: Its path, relative to `root`.
        root: The clone.
        repository: Address of the repository on GitHub.
        ref: Branch or tag that links lead to.
        stays: Whether links to this path are left alone.

    Raises:
        FileNotFoundError: A link leads nowhere.
    """

    def replaced(match: re.Match) -> str:
        name, hash_sign, anchor = match["target"].partition("#")
        if not name or ":" in name:
            return match[0]
        path = PurePosixPath((root / page.parent / name).resolve().relative_to(root.resolve()).as_posix())
        if not (root / path).exists():
            raise FileNotFoundError(f"{page} links to {name}, which isn't there.")
        if stays(path):
            return match[0]
        url = file_url(path, root, repository, ref, image=match["image"] is not None)
        return f"{match['image'] or ''}]({url}{hash_sign}{anchor})"

    parts = _CODE.split(text)  # every second part is code
    parts[::2] = [_LINK.sub(replaced, part) for part in parts[::2]]
    return "".join(parts)
