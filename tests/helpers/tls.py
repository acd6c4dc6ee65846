"""TLS for test servers: a self-signed certificate for localhost and its key, which is public here."""

from __future__ import annotations

import ssl
from pathlib import Path

PEM = """
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgZwhT0PeqSmxbXM0w
qmnZnUERfJAy0Dx3YpdoMCXN9EmhRANCAAQczk18yqlY85t3dxcVwQax5jBPkGcI
4oT3cy6T2vOdB2oeWtb1umHz117NKrOk+0hG2+EY5V8GdRcpjaEllX7B
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBdzCCAR2gAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABBzOTXzKqVjzm3d3
FxXBBrHmME+QZwjihPdzLpPa850Hah5a1vW6YfPXXs0qs6T7SEbb4RjlXwZ1FymN
oSWVfsGjXjBcMBoGA1UdEQQTMBGCCWxvY2FsaG9zdIcEfwAAATAPBgNVHRMBAf8E
BTADAQH/MB0GA1UdDgQWBBRdzCgj4TbVz2gO3H8+/o6bN+kZ3jAOBgNVHQ8BAf8E
BAMCAoQwCgYIKoZIzj0EAwIDSAAwRQIgDzQWxG5/vkBZW54iFJV9CZ6wCW6tON+s
QHVWgys3c1sCIQDi16osgAYkz9L/HOSSZssvkhqox4qcInoKHb+R7jg8eQ==
-----END CERTIFICATE-----
"""


def of_a_server(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's SSL context for localhost and 127.0.0.1, and the file with which a client trusts it."""
    (file := folder / "localhost.pem").write_text(PEM)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context, file
