"""Fetches a picture that the user named by URL, with limits on time, size and where it leads.

A person may name any address, for it is their own network; but a public page may not send us on to
a private one. Each host is resolved once and dialled at the very address that was judged.
"""

from __future__ import annotations

import ipaddress
import socket
import time

from llava_cli.errors import BadImage, InputMissing

MAX_BYTES = 20_000_000
MAX_SECONDS = 10.0
MAX_REDIRECTS = 5


def fetch(url: str) -> bytes:
    """The bytes behind an http(s) URL.

    Raises `InputMissing` where they cannot be had in time, `BadImage` where they are too many.
    """
    import httpx

    deadline = time.monotonic() + MAX_SECONDS
    came_from_public, at = False, url
    try:
        # No proxy: it would resolve names itself, and the address that was judged would mean nothing.
        with httpx.Client(trust_env=False, headers={"user-agent": "llava"}) as client:
            for _ in range(MAX_REDIRECTS + 1):
                target = httpx.URL(at)
                if target.scheme not in ("http", "https") or not target.host:
                    raise InputMissing(url, "leads to an address that is no http(s) URL")
                address = _resolve(target.host, target.port or 443 if target.scheme == "https" else target.port or 80)
                public = ipaddress.ip_address(address).is_global
                if came_from_public and not public:
                    raise InputMissing(url, "a public address redirects to a private one")
                came_from_public = public
                request = client.build_request(
                    "GET",
                    target.copy_with(host=address),
                    headers={"host": target.netloc.decode("ascii").rpartition("@")[2]},
                    extensions={
                        "sni_hostname": target.host,
                        "timeout": dict.fromkeys(("connect", "read", "write", "pool"), _left(deadline, url)),
                    },
                )
                response = client.send(request, stream=True)
                try:
                    if response.is_redirect:
                        at = str(target.join(response.headers["location"]))
                        continue
                    if response.status_code != 200:
                        raise InputMissing(url, f"the server answered {response.status_code}")
                    return _body(response, url, deadline)
                finally:
                    response.close()
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        slow = isinstance(error, httpx.TimeoutException)
        raise InputMissing(url, _too_slow() if slow else str(error) or type(error).__name__) from None
    raise InputMissing(url, f"more than {MAX_REDIRECTS} redirects")


def _body(response: object, url: str, deadline: float) -> bytes:
    data = bytearray()
    for piece in response.iter_bytes(65536):  # type: ignore[attr-defined]
        data += piece
        if len(data) > MAX_BYTES:
            raise BadImage(url, f"larger than {MAX_BYTES // 1_000_000} MB")
        _left(deadline, url)
    return bytes(data)


def _left(deadline: float, url: str) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise InputMissing(url, _too_slow())
    return left


def _too_slow() -> str:
    return f"no answer within {MAX_SECONDS:.0f} s"


def _resolve(host: str, port: int) -> str:
    """The address that will be dialled, IPv4 where there is one; mapped IPv4 is judged as IPv4."""
    found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    address = ipaddress.ip_address(next((a for a in found if ":" not in a), found[0]))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
