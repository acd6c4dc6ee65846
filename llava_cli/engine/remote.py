"""A model behind an OpenAI-compatible API: vLLM, SGLang, llama.cpp, Ollama, `llava serve` elsewhere, or a cluster."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from llava_cli.conversation import Conversation
from llava_cli.engine.base import Answer, Chunk, Engine, Request, always
from llava_cli.engine.client import (
    Client,
    Response,
    Unanswered,
    at_once,
    behind,
    messages,
    plain_file,
    whole_file,
)
from llava_cli.errors import BadData, LlavaError, ModelUnusable, ServerFailed, UsageError, plainly, printable
from llava_cli.settings import Sampling

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
CONNECT_SECONDS = 10.0
SECONDS = 600.0
"""That a server may be silent: a large model on a CPU reads a picture for minutes."""
TRIES = 8
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
        self._web = _web(self.where, key)
        self._client = Client(self.where, self._post, plain_file)
        try:
            found = self._models() if model else self._patiently(self._models)
        except Unanswered:  # some cannot list what they have, and answer all the same
            found = []
        self.model = model or self._only(found)
        is_ours = any(one.get("owned_by") == "llava" for one in found)  # and decodes pictures as we do
        self._client = Client(self.where, self._post, whole_file if is_ours else plain_file, self.model)

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Chunk]:
        shown = ""
        for number in range(TRIES):
            try:
                with closing(self._client.stream(conversation, sampling)) as chunks:
                    for chunk in behind(shown, chunks):
                        shown += chunk.text
                        yield chunk
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
            failed = failed + 1 if isinstance(outcome, (BadData, ServerFailed)) else 0
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
        return self._patiently(lambda: self._client.whole(request))

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
        """What the server says of its models; nothing where it does not tell."""
        try:
            with closing(self._send("GET", "models")) as response:
                if response.status == 404:
                    return []
                if response.status != 200:
                    raise self._client.refusal(response)
                return [one for one in json.loads(response.read())["data"] if isinstance(one, dict)]
        except Unanswered as error:
            if error.status is None:  # nobody has been there yet: more likely a wrong address than one that will be
                raise ModelUnusable(self.where, str(error), "--server URL is where it listens") from None
            raise
        except (ValueError, TypeError, KeyError):
            return []

    def _only(self, found: list[dict[str, Any]]) -> str:
        names = [printable(str(one.get("id"))) for one in found]
        if len(names) == 1:
            return str(found[0].get("id"))
        if not names:
            raise ModelUnusable(self.where, "does not say which models it has", "-m NAME asks for one")
        raise ModelUnusable(self.where, "has several models", f"-m NAME asks for one of {', '.join(names[:20])}")

    def _post(self, path: str, body: dict[str, Any]) -> Response:
        return self._send("POST", path, body)

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Response:
        import httpx

        try:
            data = None if body is None else json.dumps(body).encode()  # escaped, for not all that is typed is text
            request = self._web.build_request(method, path, content=data, headers={"Content-Type": "application/json"})
            return OverWeb(self._web.send(request, stream=True))
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Unanswered(f"does not answer ({plainly(error)})", None) from None
        except httpx.TimeoutException:
            raise Unanswered(f"no answer within {SECONDS:.0f} s") from None
        except httpx.HTTPError as error:
            raise Unanswered(f"does not answer ({plainly(error)})") from None


class OverWeb:
    """A response of httpx's."""

    def __init__(self, response: httpx.Response) -> None:
        self._response, self.status = response, response.status_code
        self.close = response.close

    def header(self, name: str) -> str | None:
        found: str | None = self._response.headers.get(name)
        return found

    def read(self) -> bytes:
        return b"".join(self._whole(self._response.iter_bytes()))

    def lines(self) -> Iterator[bytes]:
        for line in self._whole(self._response.iter_lines()):
            yield line.encode()

    def _whole(self, pieces: Iterator[Any]) -> Iterator[Any]:
        import httpx

        try:
            yield from pieces
        except httpx.HTTPError as error:
            raise Unanswered(f"ended in the midst of an answer ({plainly(error)})") from None


def _address(url: str) -> str:
    """Where the API's paths begin: `/v1` unless something else is named. Raises `UsageError` for what is no address."""
    try:
        parts = urlsplit(url.strip())
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits:
        hint = "--server http://127.0.0.1:8000" if ":/" in url else f"--server http://{printable(url)}"
        raise UsageError(f"--server {printable(url)}", "not an http(s) address", hint)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError("--server", "an address without a name, a key or a query", "LLAVA_API_KEY=… is for the key")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


def _web(url: str, key: str | None) -> httpx.Client:
    import httpx

    if key and not key.isprintable():
        raise UsageError("LLAVA_API_KEY", "not one line of text")
    return httpx.Client(
        base_url=url,
        headers={b"Authorization": f"Bearer {key}".encode()} if key else {},
        timeout=httpx.Timeout(SECONDS, connect=CONNECT_SECONDS),
        limits=httpx.Limits(max_connections=None),
    )
