"""`llava serve` as processes of their own."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai


@dataclass
class Server:
    """A `llava serve` of its own."""

    process: subprocess.Popen[str]
    socket: Path
    port: int

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", **{"api_key": "none", "max_retries": 0, **options}
        )

    def ask(
        self, path: str, method: str = "GET", body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, None if body is None else json.dumps(body), names)
        answer = connection.getresponse()
        told = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        connection.close()
        return told

    def until_running(self, count: int) -> None:
        """Asks until so many requests are in hand."""
        for _ in range(5000):
            if self.metric("llava_requests_running") == count:
                return
        raise AssertionError(self.metric("llava_requests_running"))

    def metric(self, name: str) -> float:
        lines = self.ask("/metrics")[2].decode().splitlines()
        return float(next((line.rpartition(" ")[2] for line in lines if line.startswith(name)), "0"))


Serve = Callable[..., Server]
"""`serve(*words, **variables)`: one more, with its socket in the test's home."""


def begin(folder: Path, *words: str | Path, **variables: str) -> Server:
    path = folder / "server.sock"
    environment = {**os.environ, "LLAVA_SOCKET": str(path), "HOME": str(folder), **variables}
    command = [sys.executable, "-m", "llava_cli", "serve", "--port", "0", "-p", "fp32", *map(str, words)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr
    line = process.stderr.readline()
    if " on http" not in line:
        raise AssertionError(line + process.stderr.read())
    return Server(process, path, int(line.rpartition("/v1")[0].rpartition(":")[2]))


def end(server: Server) -> int:
    server.process.terminate()
    server.process.communicate(timeout=60)
    return server.process.returncode
