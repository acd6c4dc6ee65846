"""Where a server listens for OpenAI's clients, and who may connect."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from dataclasses import dataclass

from llava_cli.errors import OutputTaken, UsageError, os_reason

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+", re.ASCII)


@dataclass(frozen=True)
class Address:
    """A TCP address, with the API key that clients need and the hosts and origins that `Guard` allows."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 for any that is free."""
    key: str | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises `UsageError` if other machines could connect without a key, or an origin is not one of a web page."""
        if not self.key and not _is_loopback(self.host):
            raise UsageError(
                f"--host {self.host}", "others can reach it, so a key is needed", "LLAVA_API_KEY=… sets one"
            )
        for origin in self.origins:
            if not _ORIGIN.fullmatch(origin):
                hint = "llava serve --allow-origin https://example.com"
                raise UsageError(f"--allow-origin {origin}", "no page has this origin, or any page may", hint)

    def listen(self) -> socket.socket:
        """A listening TCP socket. Raises `OutputTaken`."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        # With the protocol number, by which asyncio knows to set TCP_NODELAY: without it small pieces wait for 40 ms.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self.host, self.port))
            listener.listen(128)
        except OSError as error:
            listener.close()
            option = "--port N" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host 127.0.0.1"
            raise OutputTaken(self.url, os_reason(error), f"llava serve {option}") from None
        return listener

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v1"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
