"""Downloads what the user names by URL, a picture or an archive, with limits on time, size and redirects.

A person may name any address, since it is their own network; but a public page must not redirect to a private address.
Each host is resolved once, and the connection goes to the very address that was checked.
"""

from __future__ import annotations

import concurrent.futures
import ipaddress
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import closing, suppress
from types import MappingProxyType
from urllib.parse import urljoin

from llava_cli import limits
from llava_cli.bounded_http import (
    Deadline,
    Response,
    ResponseTooLarge,
    connect,
    connect_through,
    send_request,
    start_tls,
)
from llava_cli.errors import BadImage, InputMissing, UsageError, plain_message
from llava_cli.http_url import UnusableProxy, Url, proxy_for
from llava_cli.images.public_address import is_public
from llava_cli.images.remote_names import shown

_REDIRECTS = (301, 302, 303, 307, 308)


def fetch(url: str, public: bool = False) -> bytes:
    """The bytes at an http(s) URL; with `public` only from addresses on the public Internet, at every redirect.

    URLs that a person names go through the environment's proxies. Raises `InputMissing` if the bytes do not arrive in
    time, `BadImage` if they are too many, `UsageError` for an unusable proxy.
    """
    name, deadline = shown(url), Deadline(limits.FETCH_SECONDS)
    try:
        _slots.acquire(deadline)
    except TimeoutError:
        raise InputMissing(name, f"{limits.FETCHES} others are still being fetched") from None
    download = _Download(url, name, public, deadline)
    try:
        return download.run()
    except TimeoutError:
        raise InputMissing(name, f"no answer within {deadline.seconds:.0f} s", _proxy_hint(url, public)) from None
    except ResponseTooLarge as error:
        raise BadImage(name, str(error)) from None
    except UnusableProxy as error:
        raise UsageError(name, f"the proxy for it is {error}", error.hint) from None
    except (OSError, ValueError) as error:
        raise InputMissing(name, plain_message(error), _proxy_hint(url, public)) from None
    finally:
        _slots.release_after(download.lookup)


def request(url: str, headers: Mapping[str, str], deadline: Deadline) -> Response:
    """The response to a URL that a person names, after redirects, whatever its status; the caller closes it.

    Raises `InputMissing` for a redirect that is not followed, `UnusableProxy`, `OSError` or `ValueError`.
    """
    return _Download(url, shown(url), False, deadline).open(headers)


class _Slots:
    """Limits this process to `limits.FETCHES` downloads; one whose lookup hangs keeps its slot until that ends."""

    def __init__(self) -> None:
        self._used, self._released = 0, threading.Condition()

    def acquire(self, deadline: Deadline) -> None:
        """Waits for a slot. Raises `TimeoutError`."""
        with self._released:
            while self._used >= limits.FETCHES:
                self._released.wait(deadline.remaining())
            self._used += 1

    def release_after(self, lookup: Future[str] | None) -> None:
        """Releases a slot once a download's last lookup has ended: earlier ones have."""
        if lookup:
            lookup.add_done_callback(lambda _: self._release())
        else:
            self._release()

    def _release(self) -> None:
        with self._released:
            self._used -= 1
            self._released.notify()


_slots = _Slots()


class _Download:
    """One download, which follows redirects. Everything raises `OSError`, `ValueError` or `ResponseTooLarge`."""

    def __init__(self, url: str, name: str, only_public: bool, deadline: Deadline) -> None:
        self._url, self._name, self._only_public, self._deadline = url, name, only_public, deadline
        self._is_public = only_public  # whether the last host was on the public Internet
        self._host = ""
        self.lookup: Future[str] | None = None
        """The last name lookup, which may still run."""

    def run(self) -> bytes:
        with closing(self.open()) as response:
            if response.status != 200:
                raise InputMissing(self._name, f"the server answered {response.status}")
            return response.read(limits.FETCH_BYTES)

    def open(self, headers: Mapping[str, str] = MappingProxyType({})) -> Response:
        """The response that redirects lead to."""
        url = self._url
        for _ in range(limits.FETCH_REDIRECTS + 1):
            response = self._request(url, headers)
            location = response.header("Location")
            if response.status not in _REDIRECTS or not location:
                return response
            response.close()
            url = urljoin(url, _as_utf_8(location))
        raise InputMissing(self._name, f"more than {limits.FETCH_REDIRECTS} redirects")

    def _request(self, url: str, more_headers: Mapping[str, str]) -> Response:
        is_redirect = url != self._url
        target = self._parse(url, is_redirect)
        # With `only_public` the connection goes to the address that was checked: a proxy would look it up itself.
        proxy = None if self._only_public else proxy_for(target)
        address = "" if proxy else self._look_up(target)
        is_public_host = self._seems_public(target, is_redirect) if proxy else is_public(address)
        if self._is_public and not is_public_host:
            reason = "a public address redirects to a private one" if is_redirect else "not a public address"
            raise InputMissing(self._name, reason)
        self._host, self._is_public = target.host, is_public_host
        headers = {"Host": target.authority, **more_headers}
        if target.authorization:
            headers["Authorization"] = target.authorization
        if proxy:
            connection, path, proxy_headers = connect_through(proxy, target, self._deadline)
            headers |= proxy_headers
        else:
            connection, path = connect(address, target.port, self._deadline), target.target
            if target.is_tls:
                connection = start_tls(connection, target.host, self._deadline)
        return send_request(connection, self._deadline, "GET", path, headers)

    def _parse(self, url: str, is_redirect: bool) -> Url:
        try:
            return Url.parse(url)
        except ValueError as error:
            reason = "redirects to an address that is not an http(s) URL" if is_redirect else plain_message(error)
            raise InputMissing(self._name, reason) from None

    def _seems_public(self, target: Url, is_redirect: bool) -> bool:
        """Whether a host that a proxy will look up is on the public Internet, as far as we can know.

        Where a person's own URL leads matters only for what it may redirect to.
        """
        if target.host == self._host:
            return self._is_public
        try:
            return is_public(self._look_up(target) if is_redirect else target.host)
        except TimeoutError:
            raise
        except (OSError, ValueError):  # a name that only the proxy knows, or that was not looked up
            return True

    def _look_up(self, target: Url) -> str:
        """The address of a URL's host. `getaddrinfo` has no timeout, so it gets a thread that may outlive this."""
        lookup: Future[str] = Future()

        def work() -> None:
            try:
                lookup.set_result(_resolve(target.host, target.port))
            except BaseException as error:  # raised again by `lookup.result`
                lookup.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        self.lookup = lookup
        try:
            return lookup.result(self._deadline.remaining())
        except concurrent.futures.TimeoutError:  # not Python's own TimeoutError before 3.11
            raise TimeoutError from None


def _proxy_hint(url: str, public: bool) -> str:
    """A hint for users with a proxy, which is not used for this URL."""
    with suppress(ValueError):
        if public and proxy_for(Url.parse(url)):
            return "proxies are not used for URLs in lists; curl -OL URL uses one"
    return ""


def _as_utf_8(header: str) -> str:
    """A header decoded as UTF-8, which it most likely is; unchanged if it is not."""
    try:
        return header.encode("latin-1").decode()
    except UnicodeDecodeError:
        return header


def _resolve(host: str, port: int) -> str:
    """The address to connect to: IPv4 if the host has one; a mapped IPv4 address as IPv4."""
    # As bytes: Python would encode a str again, by other rules than the URL's.
    infos = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)
    addresses = [str(info[4][0]) for info in infos]
    address = ipaddress.ip_address(next((address for address in addresses if ":" not in address), addresses[0]))
    return str(getattr(address, "ipv4_mapped", None) or address)
