"""mkdocs hooks: pages outside `docs/` join the site, where links between pages work as they do in the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/RESULTS.md",
    "benchmarks/visual_tokens.svg",
    "examples/library.py",
    "examples/shapes.png",
    "llava_cli/builtin/README.md",
)
"""Files of the repository that are part of the site, at the same place below its root."""


def on_files(files: Files, config: Any) -> Files:
    """Adds the files of `OUTSIDE`."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites links for the site, where `docs/` is the root and so one level up from where it is in the repository."""
    source = page.file.src_uri
    if source in OUTSIDE:
        return markdown.replace("](docs/", "](")
    up = "../" * source.count("/")
    return re.sub(rf"\]\({re.escape(up)}\.\./(?=\w)", f"]({up}", markdown)
