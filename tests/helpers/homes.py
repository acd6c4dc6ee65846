"""A home for each test: its own config, data and cache, and no network beyond this machine."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

NOWHERE = "http://127.0.0.1:9"
"""An address where nobody listens."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for config, data and cache; connections to other machines fail."""
    folder = tmp_path / "home"
    folder.mkdir()
    for name in [n for n in os.environ if n.startswith(("LLAVA_", "HF_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("LLAVA_CONFIG", str(folder / "config.toml"))
    monkeypatch.setenv("LLAVA_DATA", str(folder / "data"))
    monkeypatch.setenv("LLAVA_CACHE", str(folder / "cache"))
    monkeypatch.setenv("LLAVA_SOCKET", str(folder / "server.sock"))
    monkeypatch.setenv("HF_HOME", str(folder / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    connect = socket.socket.connect

    def only_here(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and not ipaddress.ip_address(address[0]).is_loopback:
            raise AssertionError(f"a test reached for {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", only_here)
    yield folder
