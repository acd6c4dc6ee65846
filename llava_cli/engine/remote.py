"""The model that the user's own `llava serve` holds: no torch here, and nothing to load.

When the server is gone the model is loaded here after all, and what was asked is asked again.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

from llava_cli.conversation import Conversation, Picture
from llava_cli.engine.base import Answer, Chunk, Engine, FinishReason, Request
from llava_cli.errors import BadData, BadImage, LlavaError, ModelUnusable, PromptTooLong
from llava_cli.families import Family, named
from llava_cli.place import SocketConnection, status
from llava_cli.settings import Sampling

AT_ONCE = 32
"""Requests in hand of a batch, where nothing else is asked for."""
_ERRORS: dict[str, type[LlavaError]] = {"context_length_exceeded": PromptTooLong, "invalid_image": BadImage}


class ServerGone(Exception):
    """The server did not answer to the end, in words that go on after "llava serve"."""


class WarmEngine(Engine):
    """The model of a server at a socket, which says of itself what `said` says.

    `load` makes the engine that goes on when the server is gone, and `tell` gets one line about that.
    """

    def __init__(
        self, path: Path, said: dict[str, Any], load: Callable[[], Engine], tell: Callable[[str], None]
    ) -> None:
        self._path, self._load, self._tell = path, load, tell
        self._here: Engine | None = None
        self.model, self.precision, self.device = said["model"], said["precision"], said["device"]
        self.context, self.where = said["context"], f"llava serve (pid {said['pid']})"
        self.family: Family | None = named(said["family"]) if said["family"] else None
        self._memory = int(said["memory"])

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Chunk]:
        shown = ""
        if self._here is None:
            try:
                with closing(self._told(conversation, sampling)) as chunks:
                    for chunk in chunks:
                        shown += chunk.text
                        yield chunk
                return
            except ServerGone as error:
                self._go_on(error)
        yield from _behind(shown, self._local().stream(conversation, sampling))

    def answer_many(
        self,
        requests: Iterable[Request | LlavaError],
        size: int | None = None,
        go_on: Callable[[], bool] = lambda: True,
    ) -> Iterator[tuple[int, Answer | LlavaError]]:
        numbered = enumerate(requests)
        left: list[tuple[int, Request | LlavaError]] = []
        if self._here is None:
            yield from self._many(numbered, size or AT_ONCE, go_on, left)
        if self._here is None and not left:
            return
        numbers: list[int] = []

        def rest() -> Iterator[Request | LlavaError]:
            for number, request in chain(left, numbered):
                numbers.append(number)
                yield request

        for place, outcome in self._local().answer_many(rest(), size, go_on):
            yield numbers[place], outcome

    def prompt(self, conversation: Conversation) -> str:
        return str(self._asked(conversation)["prompt"]) if self._here is None else self._here.prompt(conversation)

    def count(self, conversation: Conversation) -> int:
        return int(self._asked(conversation)["tokens"]) if self._here is None else self._here.count(conversation)

    def peak_memory(self) -> int:
        return self._memory if self._here is None else self._here.peak_memory()

    def _local(self) -> Engine:
        if self._here is None:
            self._here, self.where = self._load(), ""
            self.precision, self.device = self._here.precision, self._here.device
            self.load_seconds = self._here.load_seconds
        return self._here

    def _go_on(self, error: ServerGone) -> None:
        self._tell(f"llava: serve: {error}; going on without it")
        self._local()

    def _many(
        self,
        numbered: Iterator[tuple[int, Request | LlavaError]],
        size: int,
        go_on: Callable[[], bool],
        left: list[tuple[int, Request | LlavaError]],
    ) -> Iterator[tuple[int, Answer | LlavaError]]:
        """Answers as the server gives them; where it is gone, those that it owes are in `left`."""
        running: dict[Future[Answer], tuple[int, Request]] = {}
        gone: ServerGone | None = None
        more = True
        with ThreadPoolExecutor(size) as threads:
            while running or (more and not gone):
                while more and not gone and len(running) < size:
                    more = go_on()
                    item = next(numbered, None) if more else None
                    if item is None:
                        more = False
                    elif isinstance(item[1], LlavaError):
                        yield item[0], item[1]
                    else:
                        running[threads.submit(self._whole, item[1])] = item[0], item[1]
                done = wait(running, return_when=FIRST_COMPLETED).done if running else ()
                for future in done:
                    number, request = running.pop(future)
                    try:
                        yield number, future.result()
                    except LlavaError as error:
                        yield number, error
                    except ServerGone as error:
                        gone = error
                        left.append((number, request))
        if gone:
            self._go_on(gone)
            left.sort(key=lambda one: one[0])

    def _whole(self, request: Request) -> Answer:
        begin = time.perf_counter()
        try:
            with closing(
                self._post("/v1/chat/completions", _asking(request.conversation, request.sampling))
            ) as response:
                said = json.loads(response.read())
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ServerGone(f"ended in the midst of an answer ({_words(error)})") from None
        choice, seconds = said["choices"][0], time.perf_counter() - begin
        return _answer(choice["message"]["content"], choice["finish_reason"], said["usage"], seconds, seconds)

    def _told(self, conversation: Conversation, sampling: Sampling) -> Generator[Chunk, None, None]:
        """What the server answers. Raises `ServerGone` where that has no end."""
        begin = first = time.perf_counter()
        reason, text, usage = "", "", None
        body = {**_asking(conversation, sampling), "stream": True, "stream_options": {"include_usage": True}}
        for event in self._events(body):
            if "error" in event:
                raise _error(event["error"])
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                reason = choice["finish_reason"] or reason
                if piece := choice["delta"].get("content"):
                    first, text = first if text else time.perf_counter(), text + piece
                    yield Chunk(piece)
        if usage is None:
            raise ServerGone("ended in the midst of an answer")
        yield Chunk("", _answer(text, reason, usage, first - begin, time.perf_counter() - begin))

    def _events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with closing(self._post("/v1/chat/completions", body)) as response:
            try:
                for line in response:
                    if line.startswith(b"data: {"):
                        event: dict[str, Any] = json.loads(line[6:])
                        yield event
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise ServerGone(f"ended in the midst of an answer ({error or type(error).__name__})") from None

    def _asked(self, conversation: Conversation) -> dict[str, Any]:
        """The prompt that the server would read; of this engine's own, where it is gone."""
        try:
            with closing(self._post("/llava/prompt", _asking(conversation, Sampling()))) as response:
                found: dict[str, Any] = json.loads(response.read())
                return found
        except (ServerGone, OSError, ValueError) as error:
            self._go_on(error if isinstance(error, ServerGone) else ServerGone(str(error)))
            here = self._local()
            return {"prompt": here.prompt(conversation), "tokens": here.count(conversation)}

    def _post(self, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
        """An answer that is to be read, of status 200. Raises what the server says is wrong, or `ServerGone`."""
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogateescape")
        connection = SocketConnection(self._path)
        try:
            connection.request("POST", path, data, {"Content-Type": "application/json", "Connection": "close"})
            response = connection.getresponse()
            if response.status == 200:
                return response
            error = json.loads(response.read())["error"]
        except (OSError, ValueError, KeyError, http.client.HTTPException) as problem:
            raise ServerGone(f"does not answer ({_words(problem)})") from None
        if response.status in (413, 429, 503):
            raise ServerGone(f"takes no more ({error['message']})")
        raise _error(error)


def _answer(text: str, reason: str, usage: dict[str, Any], first: float, total: float) -> Answer:
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    why = cast(FinishReason, reason)
    return Answer(text, why, usage["prompt_tokens"], cached, usage["completion_tokens"], first, total)


def _words(error: Exception) -> str:
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return said[:1].lower() + said[1:]


def _error(error: dict[str, Any]) -> Exception:
    """What a server's error is here."""
    message, code = str(error.get("message")), str(error.get("code"))
    thing, _, reason = message.partition(": ")
    if code in _ERRORS:
        return _ERRORS[code](thing, reason)
    if error.get("type") == "server_error":
        return ServerGone(f"failed ({message})")
    return BadData("llava serve", message)


def _behind(shown: str, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """An answer from its beginning, without what has been shown of it."""
    for chunk in chunks:
        both = min(len(shown), len(chunk.text))
        if shown[:both] != chunk.text[:both]:
            hint = "ask again"
            raise ModelUnusable("answer", "the server is gone, and without it the answer has another beginning", hint)
        shown = shown[both:]
        yield replace(chunk, text=chunk.text[both:])


def _asking(conversation: Conversation, sampling: Sampling) -> dict[str, Any]:
    """A conversation as OpenAI's request for its next answer."""
    messages: list[dict[str, Any]] = []
    if conversation.system is not None:
        messages.append({"role": "system", "content": conversation.system})
    for turn in conversation.turns:
        urls = [{"type": "image_url", "image_url": {"url": _data_uri(picture)}} for picture in turn.pictures]
        messages.append({"role": "user", "content": [*urls, {"type": "text", "text": turn.question}]})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": turn.answer})
    said = {field.name: getattr(sampling, field.name) for field in fields(Sampling)}  # of what may be all settings
    return {"messages": messages, **{name: value for name, value in said.items() if value not in (None, ())}}


def _data_uri(picture: Picture) -> str:
    data = picture.data
    if not data or picture.truncated:
        picture.image.save(file := io.BytesIO(), "PNG", compress_level=1)
        data = file.getvalue()
    return "data:;base64," + base64.b64encode(data).decode()


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
