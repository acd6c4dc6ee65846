"""Answers with the model that the user's own `llava serve` has loaded: no torch in this process, and nothing to load.

If the server goes away, the model is loaded here and the open questions are asked again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from llava_cli import limits
from llava_cli.bounded_http import Deadline, Response, send_request
from llava_cli.conversation import Conversation
from llava_cli.engine.base import Answer, Chunk, Engine, Request, always
from llava_cli.engine.remote.dialects import LLAVA
from llava_cli.engine.remote.image_urls import original_file_url
from llava_cli.engine.remote.local_socket import UnixHTTPConnection, is_trusted_socket, server_info
from llava_cli.engine.remote.openai_client import OpenAIClient, skip_shown
from llava_cli.engine.remote.openai_messages import messages
from llava_cli.engine.remote.openai_response import RetryableError, as_text, connection_errors, token_count
from llava_cli.engine.remote.thread_pool import answer_in_threads
from llava_cli.errors import LlavaError
from llava_cli.models.families import FAMILIES, Family
from llava_cli.settings import Sampling

CONCURRENCY = 32
"""How many requests of a batch are sent at a time by default."""


class LocalServerEngine(Engine):
    """Answers with the server at a Unix socket, whose `server_info` is `info`.

    `load` makes the engine that takes over when the server goes away; `notify` gets one line about that.
    """

    def __init__(
        self, path: Path, info: dict[str, Any], load: Callable[[], Engine], notify: Callable[[str], None]
    ) -> None:
        self._path, self._load, self._notify = path, load, notify
        self._fallback: Engine | None = None
        self._client = OpenAIClient("llava serve", self._post, original_file_url, dialect=LLAVA)
        self.model, self.precision, self.device = info["model"], info["precision"], info["device"]
        self.context, self.where = info["context"], f"llava serve (pid {info['pid']})"
        self.family: Family | None = next((family for family in FAMILIES if family.name == info["family"]), None)
        self._server_memory = min(info["memory"], sys.maxsize)

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Chunk]:
        shown = ""
        if self._fallback is None:
            try:
                with closing(self._client.stream(conversation, sampling)) as chunks:
                    for chunk in chunks:
                        shown += chunk.text
                        yield chunk
                return
            except RetryableError as error:
                self._announce_fallback(error)
        yield from skip_shown(shown, self._load_fallback().stream(conversation, sampling))

    def most_at_a_time(self, size: int | None = None) -> int:
        return size or CONCURRENCY

    def answer_many(
        self,
        requests: Iterable[Request | LlavaError],
        size: int | None = None,
        go_on: Callable[[], bool] = always,
    ) -> Iterator[tuple[int, Answer | LlavaError]]:
        numbered = enumerate(requests)
        unanswered: list[tuple[int, Request | LlavaError]] = []

        def server_is_there() -> bool:
            return not unanswered and go_on()

        if self._fallback is None:
            failure: RetryableError | None = None
            outcomes = answer_in_threads(numbered, self._client.complete, size or CONCURRENCY, server_is_there)
            for number, request, outcome in outcomes:
                if isinstance(outcome, (Answer, LlavaError)):
                    yield number, outcome
                elif isinstance(outcome, RetryableError) and request:
                    failure = outcome
                    unanswered.append((number, request))
                else:
                    raise outcome
            if failure is None:
                return
            self._announce_fallback(failure)
        unanswered.sort(key=lambda item: item[0])
        numbers: list[int] = []

        def remaining() -> Iterator[Request | LlavaError]:
            for number, request in chain(unanswered, numbered):
                numbers.append(number)
                yield request

        for position, outcome in self._load_fallback().answer_many(remaining(), size, go_on):
            yield numbers[position], outcome

    def prompt(self, conversation: Conversation) -> str:
        return self._fallback.prompt(conversation) if self._fallback else self._rendered(conversation)[0]

    def count(self, conversation: Conversation) -> int:
        return self._fallback.count(conversation) if self._fallback else self._rendered(conversation)[1]

    def peak_memory(self) -> int:
        return self._server_memory if self._fallback is None else self._fallback.peak_memory()

    def _load_fallback(self) -> Engine:
        if self._fallback is None:
            self._fallback, self.where = self._load(), ""
            self.precision, self.device = self._fallback.precision, self._fallback.device
            self.load_seconds = self._fallback.load_seconds
        return self._fallback

    def _announce_fallback(self, error: RetryableError) -> None:
        self._notify(f"llava: serve: {error}; going on without it")
        self._load_fallback()

    def _rendered(self, conversation: Conversation) -> tuple[str, int]:
        """The prompt as the server renders it and its number of tokens; the fallback's, if the server is gone."""
        try:
            with self._client.response_errors():
                reply = self._client.post("/llava/prompt", {"messages": messages(conversation, original_file_url)})
                return as_text(reply.get("prompt")), token_count(reply.get("tokens"))
        except RetryableError as error:
            self._announce_fallback(error)
            engine = self._load_fallback()
            return engine.prompt(conversation), engine.count(conversation)

    def _post(self, path: str, body: dict[str, Any]) -> Response:
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogateescape")
        headers = {"Host": "llava", "Content-Type": "application/json"}
        connection, deadline = UnixHTTPConnection(self._path), Deadline(limits.OWN_REPLY_SECONDS)
        with connection_errors("does not answer", deadline):
            connection.connect()
            return send_request(connection.sock, deadline, "POST", urljoin("/v1/", path), headers, data)


def matching_server(
    identity: dict[str, Any], load: Callable[[], Engine], notify: Callable[[str], None], path: Path
) -> LocalServerEngine | None:
    """The engine of the user's own server, if its answers are those of a model with this identity; otherwise None."""
    info = _matching_info(identity, path)
    return None if info is None else LocalServerEngine(path, info, load, notify)


def serving_precision(identity: dict[str, Any], path: Path) -> str | None:
    """The precision in which the user's own server answers for a model with this identity; None if it does not."""
    info = _matching_info(identity, path) if is_trusted_socket(path) else None
    return None if info is None else str(info["precision"])


def _matching_info(identity: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """What the user's own server says of itself, where its answers are those of a model with this identity."""
    info = server_info(path)
    if info is None:
        return None
    identity = dict(identity)
    for name in ("precision", "device"):  # the server lists what it was asked for, what it uses, and perhaps "auto"
        if identity.pop(name) not in info[f"{name}s"]:
            return None
    return info if all(info.get(name) == value for name, value in identity.items()) else None
