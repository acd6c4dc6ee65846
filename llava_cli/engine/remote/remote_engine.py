"""A model behind an OpenAI-compatible API: vLLM, SGLang, llama.cpp, Ollama, `llava serve` elsewhere, or a cluster."""

from __future__ import annotations

import json
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any, TypeVar
from urllib.parse import urlsplit

from llava_cli import limits
from llava_cli.bounded_http import Deadline, NoSuchProxy, Response, Url, ask, connect, connect_by, encrypt, proxy_of
from llava_cli.conversation import Conversation
from llava_cli.engine.base import Answer, Chunk, Engine, Request, always
from llava_cli.engine.remote import wire
from llava_cli.engine.remote.openai_client import CHAT, Client, at_once, behind, messages, plain_file, whole_file
from llava_cli.engine.remote.wire import Malformed, Unanswered, unanswered
from llava_cli.errors import BadData, LlavaError, ModelUnusable, NoAnswer, ServerFailed, UsageError, plainly, printable
from llava_cli.settings import Sampling
from llava_cli.untrusted_text import one_line

T = TypeVar("T")
TRIES = 8
_ENDPOINTS = (f"/{CHAT}", "/models", "/completions", "/responses")
"""What people copy behind the address where an API's paths begin."""
_LOCAL = r"(?:localhost|\[[0-9a-f:.]+\]|[0-9]+(?:\.[0-9]+){3}|[\w.-]+(?=:[0-9]))(?::[0-9]+)?(?:/|$)"
"""An address without `http://` that is of this machine or has a port: a name alone may be one for `https://`."""
LONGEST_WISH = 120.0
"""Seconds that a server may ask to be left alone for."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between two tries; each one is twice the one before, so that a server has a minute to come back."""


class RemoteEngine(Engine):
    """The model that `url` has: the one called `model`, or its only one.

    `tell` gets one line when it has to be asked again. Raises `UsageError` where `url` is none, `ModelUnusable` where
    nobody is there, the key is wrong or it is not clear which model is meant.
    """

    precision = device = ""  # which only the server knows

    def __init__(
        self, url: str, key: str | None, model: str | None, concurrency: int, tell: Callable[[str], None]
    ) -> None:
        self.where = _address(url)
        self._tell, self._concurrency = tell, concurrency
        self._lock, self._is_well = threading.Lock(), True
        self._authorization = _authorization(key)
        self._names: list[str] = []
        self._client = Client(self.where, self._post, plain_file, hint=self._hint)
        try:
            found = self._models() if model else self._patiently(self._models)
        except Unanswered:  # some cannot list what they have, and answer all the same
            found = []
        self._names = [str(one["id"]) for one in found]
        asked = model or self._only()
        self.model = one_line(asked)
        is_ours = any(one.get("owned_by") == "llava" for one in found)  # and decodes pictures as we do
        self._client = Client(self.where, self._post, whole_file if is_ours else plain_file, asked, self._hint)

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Chunk]:
        shown = ""
        for number in range(TRIES):
            try:
                with closing(self._client.stream(conversation, sampling)) as chunks:
                    for chunk in behind(shown, chunks):
                        shown += chunk.text
                        yield self._checked(chunk)
                self._is_well = True
                return
            except Unanswered as error:
                self._pause(error, number)

    def answer_many(
        self,
        requests: Iterable[Request | LlavaError],
        size: int | None = None,
        go_on: Callable[[], bool] = always,
    ) -> Iterator[tuple[int, Answer | LlavaError]]:
        """As every engine does; raises what no request would get past: a wrong key, nobody there, only failures."""
        failed = 0
        for number, _, outcome in at_once(enumerate(requests), self._whole, self._concurrency, go_on):
            if not isinstance(outcome, (Answer, LlavaError)) or isinstance(outcome, ModelUnusable):
                raise outcome
            is_failure = isinstance(outcome, (BadData, ServerFailed)) and not isinstance(outcome, NoAnswer)
            failed = failed + 1 if is_failure else 0
            if failed > self._concurrency and isinstance(outcome, LlavaError):
                raise outcome
            yield number, outcome

    def prompt(self, conversation: Conversation) -> str:
        """The messages that are sent: the string that the model reads is made by the server."""
        return json.dumps(messages(conversation, lambda picture: picture.name), ensure_ascii=False, indent=1)

    def count(self, conversation: Conversation) -> int:
        raise UsageError("tokens", f"only {self.where} could count them")

    def peak_memory(self) -> int:
        """Nothing of the model is held here."""
        return 0

    def _whole(self, request: Request) -> Answer:
        answer = self._patiently(lambda: self._client.whole(request))
        self._checked(Chunk("", answer))
        return answer

    def _checked(self, chunk: Chunk) -> Chunk:
        """Raises `NoAnswer` for a whole answer of no words: nobody could tell it from a server's mistake."""
        if chunk.answer and not chunk.answer.text:
            raise NoAnswer(self.where, "answers with nothing", f"-m NAME asks for another model than {self.model}")
        return chunk

    def _patiently(self, ask: Callable[[], T]) -> T:
        number = 0
        while True:
            try:
                answer = ask()
                self._is_well = True
                return answer
            except Unanswered as error:
                self._pause(error, number)
                number += 1

    def _pause(self, error: Unanswered, number: int) -> None:
        """Waits before it is asked again after try `number`. Raises where there is nothing more to wait for."""
        if error.status == 413:
            raise BadData(self.where, str(error)) from None
        if number + 1 >= TRIES:
            kind = ModelUnusable if error.status is None else ServerFailed
            raise kind(self.where, f"{error}, {TRIES} times", "the same command asks again") from None
        with self._lock:
            first, self._is_well = self._is_well, False
        if first:
            self._tell(f"llava: {self.where}: {error}; asking again")
        pause = min(FIRST_PAUSE * 2**number, LONGEST_PAUSE)
        # Not all at the same moment: they would meet there again.
        time.sleep(min(max(error.after, pause * random.uniform(0.5, 1)), LONGEST_WISH))

    def _models(self) -> list[dict[str, Any]]:
        """What the server says of those of its models that have a name; nothing where it does not tell."""
        try:
            with self._client.understood(), closing(self._send("GET", "models")) as response:
                if response.status == 404:
                    return []
                if response.status != 200:
                    raise self._client.refusal(response)
                found = _listed(response)
        except Unanswered as error:
            if error.status is None:  # nobody has been there yet: more likely a wrong address than one that will be
                raise ModelUnusable(self.where, str(error), "--server URL is where it listens") from None
            raise
        return [one for one in found if isinstance(one, dict) and one.get("id") and isinstance(one["id"], str)]

    def _only(self) -> str:
        if len(self._names) == 1:
            return self._names[0]
        if not self._names:
            raise ModelUnusable(self.where, "does not say which models it has", f"{self._hint(404)}")
        raise ModelUnusable(self.where, "has several models", self._hint(404))

    def _hint(self, status: int) -> str:
        """What to type where the server answers with this status."""
        if status in (401, 403):
            return f"LLAVA_API_KEY=… is the key that is sent{'' if self._authorization else '; there is none'}"
        if status != 404:
            return ""
        if self._names:
            return f"-m NAME asks for one of {', '.join(map(one_line, self._names[:20]))}"
        other = "" if self.where.endswith("/v1") else f"; its API may be at --server {self.where}/v1"
        return f"-m NAME asks for a model{other}"

    def _post(self, path: str, body: dict[str, Any]) -> Response:
        return self._send("POST", path, json.dumps(body).encode())  # escaped, for not all that is typed is text

    def _send(self, method: str, path: str, body: bytes | None = None) -> Response:
        """Raises `Unanswered`, `Malformed` or `TooLarge`."""
        url = Url.parse(f"{self.where}/{path}")
        common = {"Host": url.authority, "Content-Type": "application/json"}
        try:
            connection, target, for_proxy = _route(url, Deadline(limits.CONNECT_SECONDS))
        except OSError as error:
            if "WRONG_VERSION_NUMBER" in str(error):
                other = self.where.replace("https:", "http:", 1)
                raise ModelUnusable(self.where, "speaks HTTP there, without TLS", f"--server {other}") from None
            raise Unanswered(f"does not answer ({plainly(error)})", None) from None
        deadline = Deadline(limits.REPLY_SECONDS)
        with unanswered("does not answer", deadline):
            return ask(connection, deadline, method, target, {**common, **self._authorization, **for_proxy}, body)


def _listed(response: Response) -> list[Any]:
    try:
        found = wire.body(response).get("data")
    except Malformed:
        return []
    return found if isinstance(found, list) else []


def _address(url: str) -> str:
    """Where the API's paths begin: `/v1` unless something else is named. Raises `UsageError` for what is no address."""
    url = url.strip()
    if re.match(_LOCAL, url, re.IGNORECASE):
        url = f"http://{url}"
    try:
        parts = urlsplit(url)
        path = re.sub("/{2,}", "/", parts.path).rstrip("/")
        api = next((path.removesuffix(end) for end in _ENDPOINTS if path.endswith(end)), path or "/v1")
        address = f"{parts.scheme}://{parts.netloc}{api}"
        Url.parse(f"{address}/{CHAT}")
    except ValueError:
        hint = "--server http://127.0.0.1:8000" if ":/" in url else f"--server https://{printable(url)}"
        raise UsageError(f"--server {printable(url)}", "not an http(s) address", hint) from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError("--server", "an address without a name, a key or a query", "LLAVA_API_KEY=… is for the key")
    return address


def _authorization(key: str | None) -> dict[str, str | bytes]:
    """The header with the key. Raises `UsageError`."""
    if not key:
        return {}
    if not key.isprintable():
        raise UsageError("LLAVA_API_KEY", "not one line of text")
    return {"Authorization": f"Bearer {key}".encode()}


def _route(url: Url, deadline: Deadline) -> tuple[socket.socket, str, dict[str, str]]:
    """A connection that a URL is asked through, what it is asked for there, and the headers that a proxy gets.

    Raises `OSError`, or `UsageError` for a proxy that is none.
    """
    try:
        proxy = proxy_of(url)
    except NoSuchProxy as error:
        raise UsageError("the proxy for --server", str(error), error.hint) from None
    if proxy:
        return connect_by(proxy, url, deadline)
    connection = connect(url.host, url.port, deadline)
    return encrypt(connection, url.host, deadline) if url.is_tls else connection, url.target, {}
