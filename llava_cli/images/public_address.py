"""Tells addresses on the public Internet from private and special ones."""

from __future__ import annotations

import ipaddress

# https://www.iana.org/assignments/iana-ipv4-special-registry, multicast, and reserved addresses.
_SPECIAL_IPV4 = [
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT
        "127.0.0.0/8",
        "169.254.0.0/16",  # link-local, which includes the metadata services of clouds
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
# https://www.iana.org/assignments/ipv6-address-space: everything outside it is private, special or not in use.
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
_ISATAP = (b"\x00\x00\x5e\xfe", b"\x02\x00\x5e\xfe")
"""The interface identifier of ISATAP (RFC 5214), before the IPv4 address."""


def is_public(address: str) -> bool:
    """Whether an address is that of one host on the public Internet; embedded IPv4 addresses count as themselves.

    By our own tables: Python's `is_global` differs from version to version.
    """
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv4Address):
        return not any(parsed in network for network in _SPECIAL_IPV4)
    if parsed.scope_id:
        return False
    if parsed.ipv4_mapped or parsed in _NAT64:
        return is_public(str(_embedded_ipv4(parsed)))
    if parsed not in _GLOBAL_UNICAST or any(parsed in network for network in _SPECIAL_IPV6):
        return False
    return parsed.packed[8:12] not in _ISATAP or is_public(str(_embedded_ipv4(parsed)))


def _embedded_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(address.packed[-4:])
