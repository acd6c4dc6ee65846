"""OpenAI's chat completions from the asking side: a conversation as their request, what comes back as ours.

https://platform.openai.com/docs/api-reference/chat. How a request gets to its server is the engines' business.
"""

from __future__ import annotations

import base64
import io
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from typing import Any

from llava_cli import limits
from llava_cli.bounded_http import Response, TooLarge
from llava_cli.bounded_json import TooMuch
from llava_cli.conversation import Conversation, Picture
from llava_cli.engine import wire
from llava_cli.engine.base import Answer, Chunk, FinishReason, Request
from llava_cli.engine.wire import Malformed, Unanswered, tokens
from llava_cli.errors import BadData, BadImage, LlavaError, ModelUnusable, PromptTooLong, ServerFailed
from llava_cli.settings import Sampling
from llava_cli.untrusted_text import one_line

CHAT = "chat/completions"
_ERRORS: dict[str, type[LlavaError]] = {
    "context_length_exceeded": PromptTooLong,
    "exceed_context_size_error": PromptTooLong,  # llama.cpp
    "invalid_image": BadImage,
}
_BUSY = (408, 413, 425, 429)
_WORDS = ("content", "reasoning_content", "reasoning")
"""What a server goes on with while it says something, be it only to itself."""
_FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png"}
"""That every server takes."""


Post = Callable[[str, dict[str, Any]], Response]
"""Sends JSON to a path below the API's address. Raises `Unanswered`, `Malformed` or `TooLarge`."""


class Client:
    """Chat completions of a server that errors call `name`.

    `post` sends to it, `url` makes of a picture what it takes, and `model` is the one of its models that is asked.
    """

    def __init__(self, name: str, post: Post, url: Callable[[Picture], str], model: str | None = None) -> None:
        self._name, self._post, self._url = name, post, url
        self._with = {"model": model} if model else {}

    def whole(self, request: Request) -> Answer:
        """The whole answer. Raises `Unanswered`, or what is wrong with the request or the answer."""
        begin = time.perf_counter()
        with self.understood():
            said = self.ask(CHAT, self._asking(request.conversation, request.sampling))
            seconds = time.perf_counter() - begin
            choice = wire.first_choice(said)
            text, reason = wire.content(wire.mapping(choice.get("message"))), wire.finish_reason(choice)
            return _answer(text.lstrip(), reason, said.get("usage"), 0, seconds, seconds)

    def stream(self, conversation: Conversation, sampling: Sampling) -> Generator[Chunk, None, None]:
        """The answer as it comes. Raises `Unanswered` also where it has no end, or what is wrong with either side."""
        begin = first = time.perf_counter()
        text: list[str] = []
        reason, usage, whole = None, None, False
        body = {**self._asking(conversation, sampling), "stream": True, "stream_options": {"include_usage": True}}
        with self.understood(), closing(self._sent(CHAT, body)) as response:
            for data in wire.events(response):
                if data == b"[DONE]":
                    whole = True
                    break
                event = wire.parsed(data)
                if event.get("error"):
                    raise self._error(500, event)
                usage = event.get("usage") or usage
                if event.get("choices") in (None, []):  # it has the usage, or nothing
                    continue
                choice = wire.first_choice(event)
                delta = wire.mapping(choice.get("delta") or {})
                reason = wire.finish_reason(choice) or reason
                if any(map(delta.get, _WORDS)):
                    response.deadline.restart()
                piece = wire.content(delta)
                if piece := piece if text else piece.lstrip():
                    first = first if text else time.perf_counter()
                    text.append(piece)
                    yield Chunk(piece)
        if not (whole or reason):
            raise Unanswered(wire.BROKEN_OFF)
        now = time.perf_counter()
        seconds = (first if text else now) - begin, now - begin
        yield Chunk("", _answer("".join(text), reason, usage, len(text), *seconds))

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What is said at a path. Raises `Unanswered`, or what is wrong with the request or the answer."""
        with self.understood(), closing(self._sent(path, body)) as response:
            return wire.body(response)

    @contextmanager
    def understood(self) -> Iterator[None]:
        """Translates what is wrong with an answer. It would be again, so that none of it is `Unanswered`."""
        try:
            yield
        except Malformed as error:
            raise ModelUnusable(self._name, str(error), "curl URL/models says what it is") from None
        except (TooLarge, TooMuch) as error:
            raise ServerFailed(self._name, f"its answer is refused: {error}") from None

    def _asking(self, conversation: Conversation, sampling: Sampling) -> dict[str, Any]:
        """A conversation as OpenAI's request for its next answer."""
        said = {field.name: getattr(sampling, field.name) for field in fields(Sampling)}  # of what may be all settings
        given = {name: value for name, value in said.items() if value not in (None, ())}
        return {**self._with, "messages": messages(conversation, self._url), **given}

    def _sent(self, path: str, body: dict[str, Any]) -> Response:
        response = self._post(path, body)
        if response.status == 200:
            return response
        with closing(response):
            raise self.refusal(response)

    def refusal(self, response: Response) -> Exception:
        """What a status that is no success is here."""
        location = response.header("Location")
        if location and 300 <= response.status < 400:  # not followed: the key is for this server alone
            return ModelUnusable(self._name, f"redirects to {one_line(location)}", "--server URL is where it listens")
        try:
            data = response.read(limits.REPLY_ERROR_BYTES)
        except (OSError, TooLarge):
            data = b""
        try:
            said = wire.parsed(data)
        except (Malformed, TooMuch):
            said = {"error": data.decode("utf-8", "replace")}
        return self._error(response.status, said, response.header("Retry-After"))

    def _error(self, status: int, said: dict[str, Any], after: str | None = None) -> Exception:
        """OpenAI's form of an error, or what others make of it."""
        error = said.get("error", said)
        error = error if isinstance(error, dict) else {"message": error}
        message = one_line(str(error.get("message") or said.get("detail") or "")) or f"status {status}"
        code, kind = error.get("code"), error.get("type")
        if isinstance(code, int) and 400 <= code < 600:
            status = code
        elif kind == "invalid_request_error" and status >= 500:  # within a stream, whose status was sent before
            status = 400
        if known := _ERRORS.get(str(code)) or _ERRORS.get(str(kind)):
            thing, _, reason = message.partition(": ")
            return known(thing, reason) if reason and len(thing) < 20 else known("prompt", message)
        if status in (401, 403):
            return ModelUnusable(self._name, message, "LLAVA_API_KEY=… is the key that is sent")
        if status == 404:
            return ModelUnusable(self._name, message, "-m NAME asks for another model")
        if status >= 500 or status in _BUSY:
            return Unanswered(f"{'fails' if status >= 500 else 'takes no more'} ({message})", status, _seconds(after))
        if "context length" in message:  # vLLM and others have no code for it
            return PromptTooLong("prompt", message)
        return BadData(self._name, message)


def behind(shown: str, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """An answer from its beginning, without what has been shown of it."""
    for chunk in chunks:
        both = min(len(shown), len(chunk.text))
        if shown[:both] != chunk.text[:both]:
            raise ModelUnusable("answer", "broke off, and asked again it has another beginning", "ask again")
        shown = shown[both:]
        yield replace(chunk, text=chunk.text[both:])


def at_once(
    numbered: Iterator[tuple[int, Request | LlavaError]],
    answer: Callable[[Request], Answer],
    size: int,
    go_on: Callable[[], bool],
) -> Iterator[tuple[int, Request | None, Answer | Exception]]:
    """Answers requests in `size` threads: the number, the request where it was one, and what came of it.

    Nobody waits for the threads in the end: who has given up does not want to hear of a server's answer.
    """
    inbox: queue.SimpleQueue[tuple[int, Request] | None] = queue.SimpleQueue()
    outbox: queue.SimpleQueue[tuple[int, Request, Answer | Exception]] = queue.SimpleQueue()

    def work() -> None:
        while item := inbox.get():
            try:
                outbox.put((*item, answer(item[1])))
            except Exception as error:
                outbox.put((*item, error))

    for _ in range(size):
        threading.Thread(target=work, daemon=True).start()
    running, more = 0, True
    try:
        while running or more:
            while more and running < size:
                item = next(numbered, None) if go_on() else None
                if item is None:
                    more = False
                elif isinstance(item[1], LlavaError):
                    yield item[0], None, item[1]
                else:
                    inbox.put((item[0], item[1]))
                    running += 1
            if running:
                yield outbox.get()
                running -= 1
    finally:
        for _ in range(size):
            inbox.put(None)


def messages(conversation: Conversation, url: Callable[[Picture], str]) -> list[dict[str, Any]]:
    """A conversation as OpenAI's messages, its pictures by their URLs."""
    made: list[dict[str, Any]] = []
    if conversation.system is not None:
        made.append({"role": "system", "content": conversation.system})
    for turn in conversation.turns:
        shown = [{"type": "image_url", "image_url": {"url": url(picture)}} for picture in turn.pictures]
        # Text alone is a string: some servers' templates take nothing else.
        content = [*shown, {"type": "text", "text": turn.question}] if shown else turn.question
        made.append({"role": "user", "content": content})
        if turn.answer is not None:
            made.append({"role": "assistant", "content": turn.answer})
    return made


def whole_file(picture: Picture) -> str:
    """A picture's own bytes, for a server that decodes them as we do; what has no end, as far as it goes."""
    if picture.data and not picture.truncated:
        return _uri("", picture.data)
    return _encoded(picture, "PNG")


def plain_file(picture: Picture) -> str:
    """A picture's own bytes if any decoder sees in them what ours does, else what ours saw."""
    if picture.data and picture.plain and picture.format in _FORMATS:
        return _uri(_FORMATS[picture.format], picture.data)
    return _encoded(picture, "JPEG" if picture.format == "JPEG" else "PNG")  # what has lost something may lose more


def _encoded(picture: Picture, kind: str) -> str:
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"compress_level": 1}
    picture.image.save(file := io.BytesIO(), kind, **options)
    return _uri(_FORMATS[kind], file.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _answer(text: str, reason: str | None, usage: Any, pieces: int, first: float, total: float) -> Answer:
    """`pieces` that came are how many tokens the answer has where the server does not say."""
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    cached = tokens(details.get("cached_tokens")) if isinstance(details, dict) else 0
    why: FinishReason = "length" if reason == "length" else "stop"
    answered = tokens(usage.get("completion_tokens")) or pieces
    return Answer(text, why, tokens(usage.get("prompt_tokens")), cached, answered, first, total)


def _seconds(after: str | None) -> float:
    try:
        return max(0.0, float(after or 0))
    except ValueError:  # a date
        return 0.0
