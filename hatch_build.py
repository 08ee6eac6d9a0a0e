"""Build hook: the README that PyPI shows has absolute links and pictures, at the tag of its version."""

import sys
from pathlib import Path, PurePosixPath

from hatchling.metadata.plugin.interface import MetadataHookInterface


class CustomMetadataHook(MetadataHookInterface):
    """Fills in `readme`, which pyproject.toml leaves dynamic."""

    def update(self, metadata: dict) -> None:
        root = Path(self.root)
        sys.path.insert(0, str(root / "docs"))
        try:
            from links import absolute_links
        finally:
            sys.path.pop(0)
        text = (root / "README.md").read_text(encoding="utf-8")
        tag = f"v{metadata['version']}"
        text = absolute_links(text, PurePosixPath("README.md"), root, metadata["urls"]["Repository"], tag)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
