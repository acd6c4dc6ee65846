"""URLs of files on other machines, as words of a command line: which are taken, what they say, and how they are shown."""

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
    """A URL without the user's name, password and query, which may be a signature; other words as they are."""
    scheme = scheme_of(url)
    if scheme not in ("http", "https"):
        return url
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        return f"{parts.scheme}://{host}{parts.path}" + ("?…" if parts.query else "")
    except ValueError:  # not a URL after all: what it is says whoever opens it
        return f"{scheme}://…"


def shown(url: str) -> str:
    """As in messages."""
    return printable(without_secrets(url))


def path_of(url: str) -> str:
    """What follows a URL's scheme: `bucket/key`; of an http(s) URL the path, without the query."""
    if scheme_of(url) in ("http", "https"):
        return without_secrets(url).partition("://")[2].removesuffix("?…")
    match = _URL.fullmatch(url)
    return match[2] if match else url
