"""Fetches a picture that the user named by URL, with limits on time, size and where it leads.

A person may name any address, for it is their own network; but a public page may not send us on to
a private one. Each host is resolved once and dialled at the very address that was judged.
"""

from __future__ import annotations

import concurrent.futures
import ipaddress
import socket
import threading
from concurrent.futures import Future
from contextlib import closing, suppress
from urllib.parse import urljoin

from llava_cli import limits
from llava_cli.bounded_http import Deadline, NoSuchProxy, TooLarge, Url, ask, connect, connect_by, encrypt, proxy_of
from llava_cli.errors import BadImage, InputMissing, UsageError, plainly, printable

_REDIRECTS = (301, 302, 303, 307, 308)


def fetch(url: str, public: bool = False) -> bytes:
    """The bytes behind an http(s) URL; with `public` only from addresses on the open Internet, at every hop.

    What a person names goes by the proxies of the environment. Raises `InputMissing` where the bytes cannot be had in
    time, `BadImage` where they are too many, `UsageError` for a proxy that is none.
    """
    name, deadline = printable(url), Deadline(limits.FETCH_SECONDS)
    try:
        _slots.take(deadline)
    except TimeoutError:
        raise InputMissing(name, f"{limits.FETCHES} others are still being fetched") from None
    lookups: list[Future[str]] = []
    try:
        return _follow(url, name, public, deadline, lookups)
    except TimeoutError:
        raise InputMissing(name, f"no answer within {deadline.seconds:.0f} s", _no_proxy(url, public)) from None
    except TooLarge as error:
        raise BadImage(name, str(error)) from None
    except NoSuchProxy as error:
        raise UsageError(name, f"the proxy for it is {error}", error.hint) from None
    except (OSError, ValueError) as error:
        raise InputMissing(name, plainly(error), _no_proxy(url, public)) from None
    finally:
        _slots.free_after(lookups)


class _Slots:
    """`limits.FETCHES` at a time in this process. One whose lookup hangs has its slot until that ends."""

    def __init__(self) -> None:
        self._taken, self._freed = 0, threading.Condition()

    def take(self, deadline: Deadline) -> None:
        """Waits for a slot. Raises `TimeoutError`."""
        with self._freed:
            while self._taken >= limits.FETCHES:
                self._freed.wait(deadline.left())
            self._taken += 1

    def free_after(self, lookups: list[Future[str]]) -> None:
        """Frees a slot once all of its lookups have ended: only the last one may be running."""
        if lookups:
            lookups[-1].add_done_callback(lambda _: self._free())
        else:
            self._free()

    def _free(self) -> None:
        with self._freed:
            self._taken -= 1
            self._freed.notify()


_slots = _Slots()


def _follow(url: str, name: str, only_public: bool, deadline: Deadline, lookups: list[Future[str]]) -> bytes:
    at, before, came_from_public = url, "", only_public
    for _ in range(limits.FETCH_REDIRECTS + 1):
        target = _parsed(at, name, at != url)
        # What others name is dialled at the address that was judged: a proxy would look names up itself.
        proxy = None if only_public else proxy_of(target)
        address = "" if proxy else _looked_up(target, deadline, lookups)
        if not proxy:
            public = is_public(address)
        elif target.host == before:
            public = came_from_public
        else:
            public = _seems_public(target, at != url, deadline, lookups)
        if came_from_public and not public:
            raise InputMissing(
                name, "a public address redirects to a private one" if at != url else "not a public address"
            )
        before, came_from_public = target.host, public
        headers = {"Host": target.authority}
        if target.authorization:
            headers["Authorization"] = target.authorization
        if proxy:
            connection, path, for_proxy = connect_by(proxy, target, deadline)
            headers |= for_proxy
        else:
            connection, path = connect(address, target.port, deadline), target.target
            if target.is_tls:
                connection = encrypt(connection, target.host, deadline)
        with closing(ask(connection, deadline, "GET", path, headers)) as response:
            location = response.header("Location")
            if response.status in _REDIRECTS and location:
                at = urljoin(at, _text(location))
                continue
            if response.status != 200:
                raise InputMissing(name, f"the server answered {response.status}")
            return response.read(limits.FETCH_BYTES)
    raise InputMissing(name, f"more than {limits.FETCH_REDIRECTS} redirects")


def _seems_public(target: Url, redirected: bool, deadline: Deadline, lookups: list[Future[str]]) -> bool:
    """Whether a host is on the open Internet that a proxy looks up, as far as it is known here.

    Where a person's own URL leads does not matter, but for what it may redirect to.
    """
    try:
        if redirected:
            return is_public(_looked_up(target, deadline, lookups))
        return is_public(target.host)
    except TimeoutError:
        raise
    except (OSError, ValueError):  # a name that only the proxy knows, or nobody has asked for
        return True


def _no_proxy(url: str, public: bool) -> str:
    """A hint for who has a proxy, which is not used."""
    with suppress(ValueError):
        if public and proxy_of(Url.parse(url)):
            return "proxies are not used for URLs in lists; curl -OL URL goes by one"
    return ""


def _parsed(url: str, name: str, redirected: bool) -> Url:
    try:
        return Url.parse(url)
    except ValueError as error:
        reason = "leads to an address that is no http(s) URL" if redirected else plainly(error)
        raise InputMissing(name, reason) from None


def _text(header: str) -> str:
    """A header as the UTF-8 that it most likely is."""
    try:
        return header.encode("latin-1").decode()
    except UnicodeDecodeError:
        return header


def _looked_up(target: Url, deadline: Deadline, lookups: list[Future[str]]) -> str:
    """The address of a URL's host. No timeout ends `getaddrinfo`: it gets a thread, which may be left behind."""
    lookup: Future[str] = Future()

    def work() -> None:
        try:
            lookup.set_result(_resolve(target.host, target.port))
        except BaseException as error:  # raised again where the result is asked for
            lookup.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    lookups.append(lookup)
    try:
        return lookup.result(deadline.left())
    except concurrent.futures.TimeoutError:  # another class than Python's own before 3.11
        raise TimeoutError from None


def _resolve(host: str, port: int) -> str:
    """The address that will be dialled, IPv4 where there is one; mapped IPv4 is judged as IPv4."""
    # As bytes: Python would encode a str once more, with other rules than the URL's.
    found = [str(info[4][0]) for info in socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)]
    address = ipaddress.ip_address(next((a for a in found if ":" not in a), found[0]))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def is_public(address: str) -> bool:
    """Whether an address is one host's on the open Internet, whatever IPv4 address it may stand for.

    By tables of our own: what Python takes for global differs from version to version.
    """
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv4Address):
        return not any(found in network for network in _SPECIAL_IPV4)
    if found.scope_id:
        return False
    if found.ipv4_mapped or found in _NAT64:
        return is_public(str(_last_ipv4(found)))
    if found not in _GLOBAL_UNICAST or any(found in network for network in _SPECIAL_IPV6):
        return False
    isatap = found.packed[8:12] in (b"\x00\x00\x5e\xfe", b"\x02\x00\x5e\xfe")
    return not isatap or is_public(str(_last_ipv4(found)))


def _last_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(address.packed[-4:])


# https://www.iana.org/assignments/iana-ipv4-special-registry, multicast and what is reserved.
_SPECIAL_IPV4 = [
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # behind a provider's NAT
        "127.0.0.0/8",
        "169.254.0.0/16",  # link-local, among them clouds' metadata
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
]
# https://www.iana.org/assignments/ipv6-address-space: all that is not in it is somebody's own, special or not in use.
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# https://www.iana.org/assignments/iana-ipv6-special-registry, within global unicast.
_SPECIAL_IPV6 = [
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments: Teredo, benchmarks, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
]
