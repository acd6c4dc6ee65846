"""The model that the user's own `llava serve` holds: no torch here, and nothing to load.

When the server is gone the model is loaded here after all, and what was asked is asked again.
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
from llava_cli.bounded_http import Deadline, Response, ask
from llava_cli.conversation import Conversation
from llava_cli.engine.base import Answer, Chunk, Engine, Request, always
from llava_cli.engine.remote import wire
from llava_cli.engine.remote.local_socket import SocketConnection, status
from llava_cli.engine.remote.openai_client import Client, at_once, behind, messages, whole_file
from llava_cli.engine.remote.wire import Unanswered, unanswered
from llava_cli.errors import LlavaError
from llava_cli.models.families import FAMILIES, Family
from llava_cli.settings import Sampling

AT_ONCE = 32
"""Requests in hand of a batch, where nothing else is asked for."""


class WarmEngine(Engine):
    """The model of a server at a socket, which says of itself what `said` says.

    `load` makes the engine that goes on when the server is gone, and `tell` gets one line about that.
    """

    def __init__(
        self, path: Path, said: dict[str, Any], load: Callable[[], Engine], tell: Callable[[str], None]
    ) -> None:
        self._path, self._load, self._tell = path, load, tell
        self._here: Engine | None = None
        self._client = Client("llava serve", self._post, whole_file)
        self.model, self.precision, self.device = said["model"], said["precision"], said["device"]
        self.context, self.where = said["context"], f"llava serve (pid {said['pid']})"
        self.family: Family | None = next((family for family in FAMILIES if family.name == said["family"]), None)
        self._memory = min(said["memory"], sys.maxsize)

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Chunk]:
        shown = ""
        if self._here is None:
            try:
                with closing(self._client.stream(conversation, sampling)) as chunks:
                    for chunk in chunks:
                        shown += chunk.text
                        yield chunk
                return
            except Unanswered as error:
                self._go_on(error)
        yield from behind(shown, self._local().stream(conversation, sampling))

    def answer_many(
        self,
        requests: Iterable[Request | LlavaError],
        size: int | None = None,
        go_on: Callable[[], bool] = always,
    ) -> Iterator[tuple[int, Answer | LlavaError]]:
        numbered = enumerate(requests)
        left: list[tuple[int, Request | LlavaError]] = []

        def well() -> bool:
            return not left and go_on()

        if self._here is None:
            gone: Unanswered | None = None
            for number, request, outcome in at_once(numbered, self._client.whole, size or AT_ONCE, well):
                if isinstance(outcome, (Answer, LlavaError)):
                    yield number, outcome
                elif isinstance(outcome, Unanswered) and request:
                    gone = outcome
                    left.append((number, request))
                else:
                    raise outcome
            if gone is None:
                return
            self._go_on(gone)
        left.sort(key=lambda one: one[0])
        numbers: list[int] = []

        def rest() -> Iterator[Request | LlavaError]:
            for number, request in chain(left, numbered):
                numbers.append(number)
                yield request

        for place, outcome in self._local().answer_many(rest(), size, go_on):
            yield numbers[place], outcome

    def prompt(self, conversation: Conversation) -> str:
        return self._asked(conversation)[0] if self._here is None else self._here.prompt(conversation)

    def count(self, conversation: Conversation) -> int:
        return self._asked(conversation)[1] if self._here is None else self._here.count(conversation)

    def peak_memory(self) -> int:
        return self._memory if self._here is None else self._here.peak_memory()

    def _local(self) -> Engine:
        if self._here is None:
            self._here, self.where = self._load(), ""
            self.precision, self.device = self._here.precision, self._here.device
            self.load_seconds = self._here.load_seconds
        return self._here

    def _go_on(self, error: Unanswered) -> None:
        self._tell(f"llava: serve: {error}; going on without it")
        self._local()

    def _asked(self, conversation: Conversation) -> tuple[str, int]:
        """The prompt that the server would read and its number of tokens; this engine's own, where it is gone."""
        try:
            with self._client.understood():
                said = self._client.ask("/llava/prompt", {"messages": messages(conversation, whole_file)})
                return wire.string(said.get("prompt")), wire.tokens(said.get("tokens"))
        except Unanswered as error:
            self._go_on(error)
            here = self._local()
            return here.prompt(conversation), here.count(conversation)

    def _post(self, path: str, body: dict[str, Any]) -> Response:
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogateescape")
        headers = {"Host": "llava", "Content-Type": "application/json"}
        connection, deadline = SocketConnection(self._path), Deadline(limits.OWN_REPLY_SECONDS)
        with unanswered("does not answer", deadline):
            connection.connect()
            return ask(connection.sock, deadline, "POST", urljoin("/v1/", path), headers, data)


def holder(
    wanted: dict[str, Any], load: Callable[[], Engine], tell: Callable[[str], None], path: Path
) -> Engine | None:
    """The engine of the user's own server, if that holds what is `wanted`; None where it has to be loaded here."""
    said = status(path)
    if said is None:
        return None
    for name in ("precision", "device"):  # the server says what it was asked for, what it took, and what auto is
        if wanted.pop(name) not in said[f"{name}s"]:
            return None
    if any(said.get(name) != value for name, value in wanted.items()):
        return None
    return WarmEngine(path, said, load, tell)
