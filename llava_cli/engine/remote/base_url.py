"""The value of --server -> the base URL of an OpenAI-compatible API."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from llava_cli.engine.remote.openai_client import CHAT_PATH
from llava_cli.errors import UsageError
from llava_cli.http_url import Url
from llava_cli.untrusted_text import printable

_ENDPOINTS = (f"/{CHAT_PATH}", "/models", "/completions", "/responses")
"""Paths that people copy together with the API's base URL."""
_LOCAL = r"(?:localhost|\[[0-9a-f:.]+\]|[0-9]+(?:\.[0-9]+){3}|[\w.-]+(?=:[0-9]))(?::[0-9]+)?(?:/|$)"
"""An address without a scheme that is local or has a port; a bare host name is more likely meant for `https://`."""


def base_url(url: str) -> str:
    """The base URL without a final slash; its path is `/v1` unless the user names another. Raises `UsageError`."""
    url = url.strip()
    if re.match(_LOCAL, url, re.IGNORECASE):
        url = f"http://{url}"
    try:
        parts = urlsplit(url)
        path = re.sub("/{2,}", "/", parts.path).rstrip("/")
        base_path = next((path.removesuffix(end) for end in _ENDPOINTS if path.endswith(end)), path or "/v1")
        base = f"{parts.scheme}://{parts.netloc}{base_path}"
        Url.parse(f"{base}/{CHAT_PATH}")
    except ValueError:
        hint = "--server http://127.0.0.1:8000" if ":/" in url else f"--server https://{printable(url)}"
        raise UsageError(f"--server {printable(url)}", "not an http(s) address", hint) from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError("--server", "an address without a name, a key or a query", "LLAVA_API_KEY=… is for the key")
    return base
