"""A home for each test: its own config, data and cache, and no network beyond this machine."""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

NOWHERE = "http://127.0.0.1:9"
"""An address where nobody listens."""


@pytest.fixture(autouse=True)
def home(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Path]:
    """A folder for config, data and cache; connections to other machines fail.

    Unless the test has the mark `cold`, its cache begins with the kernels that other tests have compiled.
    """
    folder = tmp_path / "home"
    folder.mkdir()
    ours, everyones = folder / "cache" / "kernels", tmp_path_factory.getbasetemp() / "kernels"
    is_cold = request.node.get_closest_marker("cold")
    if not is_cold:
        _copy_new(everyones, ours)
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
    if not is_cold:
        _copy_new(ours, everyones)


def _copy_new(source: Path, target: Path) -> None:
    """Copies what the target does not have yet; only for this user, as the cache has to be."""
    if source.is_dir():
        target.mkdir(0o700, parents=True, exist_ok=True)
        for name in set(os.listdir(source)) - set(os.listdir(target)):
            shutil.copy2(source / name, target / name)
