"""URLs of files on other machines, as people type them: which are taken, and how they are shown."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from llava_cli.untrusted_text import printable

CLOUD_SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "hf")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)


def scheme_of(word: str) -> str:
    """The scheme of a URL in lower case; empty for other words."""
    match = _URL.fullmatch(word)
    return match[1].lower() if match else ""


def is_cloud_url(word: str) -> bool:
    """Whether a word names a bucket, a data set, or something in them."""
    return scheme_of(word) in CLOUD_SCHEMES


def without_secrets(url: str) -> str:
    """An http(s) URL without the user's name, password and query, which may be a signature; other words as they are."""
    scheme = scheme_of(url)
    if scheme not in ("http", "https"):
        return url
    try:
        parts = urlsplit(url)
    except ValueError:  # not a URL after all: whoever opens it says why
        return f"{scheme}://…" if "@" in url or "?" in url else url
    return f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def shown(url: str) -> str:
    """As in messages and in commands that are printed: `…` stands for a query."""
    name = without_secrets(url)
    return printable(name + ("?…" if name != url and "?" in url else ""))


def path_of(url: str) -> str:
    """What follows the scheme of a bucket's URL: `bucket/key`."""
    match = _URL.fullmatch(url)
    return match[2] if match else url
