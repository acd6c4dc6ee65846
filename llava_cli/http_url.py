"""URLs that may be sent to a server, and the proxy that the environment names for them."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from urllib.parse import quote, unquote_to_bytes, urlsplit

from llava_cli import limits

_SAFE = "%/:=&?~+!$,;'@()*[]"
"""Characters of a path or query that stay unchanged: those allowed by RFC 3986, and "%" of what is escaped already."""


@dataclass(frozen=True)
class Url:
    """An http(s) URL, in the parts that a request needs: all ASCII, without control characters."""

    is_tls: bool
    host: str
    port: int
    target: str
    """Path and query, percent-encoded."""
    authorization: str | None
    """The Basic `Authorization` header for a user name and password in the URL."""

    @classmethod
    def parse(cls, text: str) -> Url:
        """Parses a URL as people type it. Raises `ValueError` if it is not an http(s) URL."""
        if len(text) > limits.REPLY_HEAD_BYTES:
            raise ValueError("URL too long")
        if any(character < " " or "\x7f" <= character <= "\x9f" for character in text):
            raise ValueError("control character in the URL")  # urlsplit would leave some of them out
        parts = urlsplit(text)
        if parts.scheme not in ("http", "https"):
            raise ValueError("not an http(s) URL")
        if not parts.hostname:
            raise ValueError("no host")
        query = f"?{_quoted(parts.query)}" if parts.query else ""
        user, at, _ = parts.netloc.rpartition("@")
        return cls(
            parts.scheme == "https",
            _ascii_host(parts.hostname),
            _port(parts.netloc) or (443 if parts.scheme == "https" else 80),
            (_quoted(parts.path) or "/") + query,
            f"Basic {b64encode(unquote_to_bytes(user if ':' in user else f'{user}:')).decode()}" if at else None,
        )

    @property
    def authority(self) -> str:
        """Host and port, as in the `Host` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_tls else 80) else f"{host}:{self.port}"


def _quoted(text: str) -> str:
    return quote(text, safe=_SAFE, errors="surrogateescape")


def _ascii_host(host: str) -> str:
    """The host in ASCII (IDNA). Raises `ValueError` if it cannot be looked up."""
    if not host.isascii():
        import idna

        host = idna.encode(host, uts46=True).decode()
    if not all(0 < len(label) < 64 for label in host.removesuffix(".").split(".")):
        raise ValueError("invalid host name")
    return host


def _port(netloc: str) -> int | None:
    """The port; None if there is none. Raises `ValueError`, with a shorter message than urllib's."""
    _, colon, port = netloc.rpartition("@")[2].rpartition("]")[2].rpartition(":")
    if not colon or not port:
        return None
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
        raise ValueError(f"invalid port: {port!r}")
    return int(port)


class UnusableProxy(ValueError):
    """The environment names a proxy that cannot be used; `hint` says how to do without it."""

    def __init__(self, reason: str, host: str) -> None:
        super().__init__(reason)
        self.hint = f"NO_PROXY={host} goes without it"


def proxy_for(url: Url) -> Url | None:
    """The proxy for a URL by the variables `http_proxy`, `https_proxy`, `all_proxy` and `no_proxy`; None for none.

    Raises `UnusableProxy`, whose message does not show the address: it may contain a password.
    """
    from urllib.request import getproxies, proxy_bypass

    proxies = getproxies()
    address = proxies.get("https" if url.is_tls else "http") or proxies.get("all")
    if not address or proxy_bypass(f"{url.host}:{url.port}"):
        return None
    try:
        proxy = Url.parse(address if "://" in address else f"http://{address}")
    except ValueError:
        proxy = None
    if proxy is None or proxy.is_tls:
        raise UnusableProxy("not an http:// address", url.host)
    return proxy
