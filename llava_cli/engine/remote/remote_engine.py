"""A model behind an OpenAI-compatible API: vLLM, SGLang, llama.cpp, Ollama, or `llava serve` on another machine."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any, TypeVar

from llava_cli import limits
from llava_cli.bounded_http import Deadline, Response, connect, connect_through, send_request, start_tls
from llava_cli.conversation import Conversation
from llava_cli.engine.base import Answer, Chunk, Engine, Request, always
from llava_cli.engine.remote.answer_checks import Fits
from llava_cli.engine.remote.base_url import base_url
from llava_cli.engine.remote.dialects import DIALECTS, PLAIN
from llava_cli.engine.remote.image_urls import original_file_url, portable_url
from llava_cli.engine.remote.openai_client import OpenAIClient, skip_shown
from llava_cli.engine.remote.openai_messages import messages
from llava_cli.engine.remote.openai_response import (
    MalformedResponse,
    RetryableError,
    connection_errors,
    read_object,
)
from llava_cli.engine.remote.thread_pool import answer_in_threads
from llava_cli.errors import (
    BadData,
    LlavaError,
    ModelUnusable,
    NoAnswer,
    ServerFailed,
    UsageError,
    plain_message,
)
from llava_cli.http_url import UnusableProxy, Url, proxy_for
from llava_cli.settings import Sampling
from llava_cli.untrusted_text import one_line

T = TypeVar("T")
MAX_ATTEMPTS = 8
FIRST_DELAY, MAX_DELAY = 0.5, 30.0
"""Seconds before another attempt; each delay is twice the one before, which gives a server a minute to come back."""
MAX_RETRY_AFTER = 120.0
"""The most seconds that we wait because a server says so."""


class RemoteEngine(Engine):
    """Answers with the model called `model` behind `url`, or with the only model there.

    `concurrency` is how many requests of `answer_many` are sent at a time; `notify` gets one line when the server has
    to be asked again; `fits` tells whether a text has the form of an answer. Raises `UsageError` if `url` is not an
    address, and `ModelUnusable` if nobody answers there, the key is wrong, or the server has several models and `model`
    does not choose one.
    """

    precision = device = ""  # known only to the server

    def __init__(
        self,
        url: str,
        key: str | None,
        model: str | None,
        concurrency: int,
        notify: Callable[[str], None],
        fits: Fits = lambda sampling, text: True,
    ) -> None:
        self.where = base_url(url)
        self._notify, self._concurrency = notify, concurrency
        self._lock, self._is_healthy = threading.Lock(), True
        self._authorization = _authorization(key)
        self._names: list[str] = []
        self._client = OpenAIClient(self.where, self._post, portable_url, hint=self._hint)
        try:
            models = self._models() if model else self._with_retries(self._models)
        except RetryableError:  # some servers cannot list their models, and answer all the same
            models = []
        self._names = [str(entry["id"]) for entry in models]
        name = model or self._only_model()
        self.model = one_line(name)
        owners = (str(entry.get("owned_by")) for entry in models)
        dialect = next((DIALECTS[owner] for owner in owners if owner in DIALECTS), PLAIN)
        image_url = original_file_url if dialect.is_llava else portable_url  # it decodes pictures as we do
        self._dialect = dialect
        self._client = OpenAIClient(self.where, self._post, image_url, name, self._hint, dialect, fits)

    def check_options(self, sampling: Sampling) -> None:
        self._dialect.fields(sampling, self.where)

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Chunk]:
        shown = ""
        for attempt in range(MAX_ATTEMPTS):
            try:
                with closing(self._client.stream(conversation, sampling)) as chunks:
                    for chunk in skip_shown(shown, chunks):
                        shown += chunk.text
                        yield self._checked(chunk)
                self._is_healthy = True
                return
            except RetryableError as error:
                self._wait(error, attempt)

    def most_at_a_time(self, size: int | None = None) -> int:
        return self._concurrency

    def answer_many(
        self,
        requests: Iterable[Request | LlavaError],
        size: int | None = None,
        go_on: Callable[[], bool] = always,
    ) -> Iterator[tuple[int, Answer | LlavaError]]:
        """As `Engine.answer_many`; raises an error that every request would meet: a wrong key, no server, or nothing
        but failures. What the server cannot do is a failure of the request that asks for it."""
        failures = 0
        for number, _, outcome in answer_in_threads(enumerate(requests), self._complete, self._concurrency, go_on):
            if not isinstance(outcome, (Answer, LlavaError)) or isinstance(outcome, ModelUnusable):
                raise outcome
            is_failure = isinstance(outcome, (BadData, ServerFailed)) and not isinstance(outcome, NoAnswer)
            failures = failures + 1 if is_failure else 0
            if failures > self._concurrency and isinstance(outcome, LlavaError):
                raise outcome
            yield number, outcome

    def prompt(self, conversation: Conversation) -> str:
        """The messages that are sent as JSON; the string that the model reads is made by the server."""
        return json.dumps(messages(conversation, lambda picture: picture.label), ensure_ascii=False, indent=1)

    def count(self, conversation: Conversation) -> int:
        raise UsageError("tokens", f"only {self.where} could count them")

    def peak_memory(self) -> int:
        """0: nothing of the model is in this process."""
        return 0

    def _complete(self, request: Request) -> Answer:
        answer = self._with_retries(lambda: self._client.complete(request))
        self._checked(Chunk("", answer))
        return answer

    def _checked(self, chunk: Chunk) -> Chunk:
        """Raises `NoAnswer` for an answer without text: nobody could tell it from a mistake of the server's."""
        if chunk.answer and not chunk.answer.text:
            raise NoAnswer(self.where, "answers with nothing", f"-m NAME asks for another model than {self.model}")
        return chunk

    def _with_retries(self, call: Callable[[], T]) -> T:
        attempt = 0
        while True:
            try:
                result = call()
                self._is_healthy = True
                return result
            except RetryableError as error:
                self._wait(error, attempt)
                attempt += 1

    def _wait(self, error: RetryableError, attempt: int) -> None:
        """Waits after a failed attempt, counted from 0. Raises a `LlavaError` if there should be no other."""
        if error.status == 413:
            raise BadData(self.where, str(error)) from None
        if attempt + 1 >= MAX_ATTEMPTS:
            kind = ModelUnusable if error.status is None else ServerFailed
            raise kind(self.where, f"{error}, {MAX_ATTEMPTS} times", "the same command asks again") from None
        with self._lock:
            is_first_failure, self._is_healthy = self._is_healthy, False
        if is_first_failure:
            self._notify(f"llava: {self.where}: {error}; asking again")
        delay = min(FIRST_DELAY * 2**attempt, MAX_DELAY)
        # Exponential backoff with jitter: requests that failed together should not come back together.
        time.sleep(min(max(error.retry_after, delay * random.uniform(0.5, 1)), MAX_RETRY_AFTER))

    def _models(self) -> list[dict[str, Any]]:
        """The server's models that have a name; an empty list if it does not list them."""
        try:
            with self._client.response_errors(), closing(self._send("GET", "models")) as response:
                if response.status == 404:
                    return []
                if response.status != 200:
                    raise self._client.error_from(response)
                models = _model_list(response)
        except RetryableError as error:
            if error.status is None:  # never reached yet: more likely a wrong address than a server that will come back
                raise ModelUnusable(self.where, str(error), "--server URL is where it listens") from None
            raise
        return [
            entry for entry in models if isinstance(entry, dict) and entry.get("id") and isinstance(entry["id"], str)
        ]

    def _only_model(self) -> str:
        if len(self._names) == 1:
            return self._names[0]
        if not self._names:
            raise ModelUnusable(self.where, "does not say which models it has", f"{self._hint(404)}")
        raise ModelUnusable(self.where, "has several models", self._hint(404))

    def _hint(self, status: int) -> str:
        """What to type after the server has answered with this status."""
        if status in (401, 403):
            return f"LLAVA_API_KEY=… is the key that is sent{'' if self._authorization else '; there is none'}"
        if status != 404:
            return ""
        if self._names:
            return f"-m NAME asks for one of {', '.join(map(one_line, self._names[:20]))}"
        other = "" if self.where.endswith("/v1") else f"; its API may be at --server {self.where}/v1"
        return f"-m NAME asks for a model{other}"

    def _post(self, path: str, body: dict[str, Any]) -> Response:
        return self._send("POST", path, json.dumps(body).encode())  # ASCII: what was typed may have lone surrogates

    def _send(self, method: str, path: str, body: bytes | None = None) -> Response:
        """Raises `RetryableError`, `MalformedResponse` or `ResponseTooLarge`."""
        url = Url.parse(f"{self.where}/{path}")
        headers: dict[str, str | bytes] = {"Host": url.authority, "Content-Type": "application/json"}
        try:
            connection, target, proxy_headers = _connection_to(url, Deadline(limits.CONNECT_SECONDS))
        except OSError as error:
            if "WRONG_VERSION_NUMBER" in str(error):
                plain_url = self.where.replace("https:", "http:", 1)
                raise ModelUnusable(self.where, "speaks HTTP there, without TLS", f"--server {plain_url}") from None
            raise RetryableError(f"does not answer ({plain_message(error)})", None) from None
        deadline = Deadline(limits.REPLY_SECONDS)
        with connection_errors("does not answer", deadline):
            headers = {**headers, **self._authorization, **proxy_headers}
            return send_request(connection, deadline, method, target, headers, body)


def _model_list(response: Response) -> list[Any]:
    try:
        models = read_object(response).get("data")
    except MalformedResponse:
        return []
    return models if isinstance(models, list) else []


def _authorization(key: str | None) -> dict[str, str | bytes]:
    """The header with the API key, if there is one. Raises `UsageError`."""
    if not key:
        return {}
    if not key.isprintable():
        raise UsageError("LLAVA_API_KEY", "not one line of text")
    return {"Authorization": f"Bearer {key}".encode()}


def _connection_to(url: Url, deadline: Deadline) -> tuple[socket.socket, str, dict[str, str]]:
    """A connection to the URL's server or proxy, the request target to send there, and headers for the proxy.

    Raises `OSError`, or `UsageError` for a proxy that cannot be used.
    """
    try:
        proxy = proxy_for(url)
    except UnusableProxy as error:
        raise UsageError("the proxy for --server", str(error), error.hint) from None
    if proxy:
        return connect_through(proxy, url, deadline)
    connection = connect(url.host, url.port, deadline)
    return start_tls(connection, url.host, deadline) if url.is_tls else connection, url.target, {}
