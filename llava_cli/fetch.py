"""Fetches a picture that the user named by URL, with limits on time, size and where it leads.

A person may name any address, for it is their own network; but a public page may not send us on to
a private one. Each host is resolved once and dialled at the very address that was judged.
"""

from __future__ import annotations

import ipaddress
import queue
import socket
import threading
import time

from llava_cli.errors import BadImage, InputMissing, plainly, printable

MAX_BYTES = 20_000_000
MAX_SECONDS = 10.0
MAX_REDIRECTS = 5


def fetch(url: str, public: bool = False) -> bytes:
    """The bytes behind an http(s) URL; with `public` only from addresses on the open Internet, at every hop.

    Raises `InputMissing` where they cannot be had in time, `BadImage` where they are too many.
    """
    name = printable(url)
    outcome: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put(_follow(url, name, public))
        except Exception as error:  # raised again below
            outcome.put(error)

    # A thread, for timeouts bound one read each: a server that drips a byte at a time, or a lookup
    # of a name that hangs, would pass them all.
    threading.Thread(target=work, daemon=True).start()
    try:
        result = outcome.get(timeout=MAX_SECONDS)
    except queue.Empty:
        raise InputMissing(name, _too_slow()) from None
    if isinstance(result, Exception):
        raise result
    return result


def _follow(url: str, name: str, came_from_public: bool) -> bytes:
    import httpx

    deadline = time.monotonic() + MAX_SECONDS
    at = url
    # Not compressed: a picture already is, and a small answer could unpack to any size.
    headers = {"user-agent": "llava", "accept-encoding": "identity"}
    try:
        # No proxy: it would resolve names itself, and the address that was judged would mean nothing.
        with httpx.Client(trust_env=False, headers=headers) as client:
            for _ in range(MAX_REDIRECTS + 1):
                target = httpx.URL(at)
                host = target.raw_host.decode("ascii")
                if target.scheme not in ("http", "https") or not host:
                    raise InputMissing(name, "leads to an address that is no http(s) URL" if at != url else "no host")
                address = _resolve(host, target.port or 443 if target.scheme == "https" else target.port or 80)
                public = is_public(address)
                if came_from_public and not public:
                    raise InputMissing(
                        name, "a public address redirects to a private one" if at != url else "not a public address"
                    )
                came_from_public = public
                request = client.build_request(
                    "GET",
                    target.copy_with(host=address),
                    headers={"host": target.netloc.decode("ascii").rpartition("@")[2]},
                    extensions={
                        "sni_hostname": host,
                        "timeout": dict.fromkeys(("connect", "read", "write", "pool"), _left(deadline, name)),
                    },
                )
                response = client.send(request, stream=True)
                try:
                    if response.has_redirect_location:
                        at = str(target.join(response.headers["location"]))
                        continue
                    if response.status_code != 200:
                        raise InputMissing(name, f"the server answered {response.status_code}")
                    return _body(response, name, deadline)
                finally:
                    response.close()
    except httpx.TimeoutException:
        raise InputMissing(name, _too_slow()) from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise InputMissing(name, plainly(error)) from None
    raise InputMissing(name, f"more than {MAX_REDIRECTS} redirects")


def _body(response: object, name: str, deadline: float) -> bytes:
    data = bytearray()
    for piece in response.iter_raw():  # type: ignore[attr-defined]
        data += piece
        if len(data) > MAX_BYTES:
            raise BadImage(name, f"larger than {MAX_BYTES // 1_000_000} MB")
        _left(deadline, name)
    return bytes(data)


def _left(deadline: float, name: str) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise InputMissing(name, _too_slow())
    return left


def _too_slow() -> str:
    return f"no answer within {MAX_SECONDS:.0f} s"


def is_public(address: str) -> bool:
    """Whether an address is one host's on the open Internet, whatever IPv4 address it may stand for."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inner = [found.ipv4_mapped, found.sixtofour, *(found.teredo or ())]
        if any(found in network for network in _WRAPPING):
            inner.append(ipaddress.IPv4Address(found.packed[-4:]))
        if not all(one is None or is_public(str(one)) for one in inner):
            return False
    return found.is_global and not found.is_multicast


_WRAPPING = [ipaddress.IPv6Network(text) for text in ("64:ff9b::/96", "::/96")]  # NAT64, and IPv4-compatible


def _resolve(host: str, port: int) -> str:
    """The address that will be dialled, IPv4 where there is one; mapped IPv4 is judged as IPv4."""
    # As bytes: Python would encode a str once more, with other rules than the URL's.
    found = [str(info[4][0]) for info in socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)]
    address = ipaddress.ip_address(next((a for a in found if ":" not in a), found[0]))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
