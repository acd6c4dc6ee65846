"""OpenAI's chat completions from the asking side: a conversation as their request, what comes back as ours.

https://platform.openai.com/docs/api-reference/chat. How a request gets to its server is the engines' business.
"""

from __future__ import annotations

import base64
import io
import queue
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

from llava_cli import limits
from llava_cli.bounded_http import Response, TooLarge
from llava_cli.bounded_json import TooMuch
from llava_cli.conversation import Conversation, Picture, Turn
from llava_cli.engine.base import Answer, Chunk, FinishReason, Request
from llava_cli.engine.remote import wire
from llava_cli.engine.remote.wire import Malformed, Message, Unanswered, WebPage, tokens
from llava_cli.errors import BadData, BadImage, LlavaError, ModelUnusable, NoAnswer, PromptTooLong, ServerFailed
from llava_cli.settings import Sampling
from llava_cli.untrusted_text import one_line

CHAT = "chat/completions"
_ERRORS: dict[str, type[LlavaError]] = {
    "context_length_exceeded": PromptTooLong,
    "exceed_context_size_error": PromptTooLong,  # llama.cpp
    "invalid_image": BadImage,
}
_STATUSES = {
    "insufficient_quota": 402,  # which comes as 429, and asking again is no use
    "invalid_api_key": 401,
    "authentication_error": 401,
    "permission_error": 403,
    "model_not_found": 404,
    "not_found_error": 404,
    "NotFoundError": 404,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "invalid_request_error": 400,
    "BadRequestError": 400,
}
"""What the code or type of an error means where its status does not say, as within an answer that has begun."""
_BUSY = (408, 413, 425, 429)
_OTHERWISE = {"max_tokens": "max_completion_tokens", "stream_options": None}
"""What newer servers call otherwise, and what some do not know and can do without."""
_FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png"}
"""That every server takes."""
_TITLE = rb"<title[^<>]{0,99}>([^<>]{1,999})</title"


Post = Callable[[str, dict[str, Any]], Response]
"""Sends JSON to a path below the API's address. Raises `Unanswered`, `Malformed` or `TooLarge`."""
Hint = Callable[[int], str]
"""The next command to type where a server answers with this status."""


class Client:
    """Chat completions of a server that errors call `name`.

    `post` sends to it, `url` makes of a picture what it takes, and `model` is the one of its models that is asked.
    """

    def __init__(
        self,
        name: str,
        post: Post,
        url: Callable[[Picture], str],
        model: str | None = None,
        hint: Hint = lambda status: "",
    ) -> None:
        self._name, self._post, self._url, self._hint = name, post, url, hint
        self._with = {"model": model} if model else {}
        self._otherwise: dict[str, str | None] = {}

    def whole(self, request: Request) -> Answer:
        """The whole answer. Raises `Unanswered`, or what is wrong with the request or the answer."""
        *_, last = self._chunks(self._asking(request.conversation, request.sampling))
        assert last.answer is not None
        return last.answer

    def stream(self, conversation: Conversation, sampling: Sampling) -> Generator[Chunk, None, None]:
        """The answer as it comes. Raises `Unanswered` also where it has no end, or what is wrong with either side."""
        body = {**self._asking(conversation, sampling), "stream": True, "stream_options": {"include_usage": True}}
        return self._chunks(body)

    def _chunks(self, body: dict[str, Any]) -> Generator[Chunk, None, None]:
        """What comes of a request, in one piece or in several: some servers do not as they are asked."""
        heard, is_whole = _Heard(), False
        with self.understood(), closing(self._sent(CHAT, body)) as response:
            for data in wire.events(response):
                if data == wire.DONE:
                    is_whole = True
                    break
                event = wire.parsed(data)
                if wire.is_error(event):
                    raise self._error(500, event)
                text, is_new = heard.take(event)
                if is_new:
                    response.deadline.restart()
                if text:
                    yield Chunk(text)
            if is_whole and not heard.has_choices:
                raise Malformed
        if not (is_whole or heard.reason):
            raise Unanswered(wire.BROKEN_OFF)
        if reason := heard.no_answer():
            hint = "--max-tokens N lets it say more" if heard.reason == "length" else ""
            raise NoAnswer(self._name, reason, hint)
        yield Chunk("", heard.answer())

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
            hint = (isinstance(error, WebPage) and self._hint(404)) or "curl URL/models says what it is"
            raise ModelUnusable(self._name, str(error), hint) from None
        except (TooLarge, TooMuch) as error:
            raise ServerFailed(self._name, f"its answer is refused: {error}") from None

    def _asking(self, conversation: Conversation, sampling: Sampling) -> dict[str, Any]:
        """A conversation as OpenAI's request for its next answer.

        What nobody has set, and is as it is when nothing is said, is the server's to choose: newer ones take no other.
        """
        usual = Sampling()
        given = {
            name: value
            for name in Sampling.names()
            if (value := getattr(sampling, name)) not in (None, ())
            and (name not in sampling.unset or value != getattr(usual, name))
        }
        return {**self._with, "messages": messages(conversation, self._url), **given}

    def _sent(self, path: str, body: dict[str, Any]) -> Response:
        while True:
            response = self._post(path, self._reworded(body))
            if response.status == 200:
                return response
            with closing(response):
                error = self.refusal(response)
            if not self._learns(error, body):
                raise error

    def _reworded(self, body: dict[str, Any]) -> dict[str, Any]:
        """A request in this server's words."""
        names = {name: self._otherwise.get(name, name) for name in body}
        return {other: body[name] for name, other in names.items() if other}

    def _learns(self, error: Exception, body: dict[str, Any]) -> bool:
        """Whether an error tells that something has another name there, or none."""
        if not isinstance(error, BadData):
            return False
        new = {
            name: other
            for name, other in _OTHERWISE.items()
            if name in body and name not in self._otherwise and (other or name) in error.reason
        }
        self._otherwise.update(new)
        return bool(new)

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
        except WebPage:
            title = re.search(_TITLE, data[:10_000], re.IGNORECASE)
            said = {"error": title[1].decode("utf-8", "replace") if title else ""}
        except (Malformed, TooMuch):
            said = {"error": data.decode("utf-8", "replace")}
        return self._error(response.status, said, response.header("Retry-After"))

    def _error(self, status: int, said: dict[str, Any], after: str | None = None) -> Exception:
        """OpenAI's form of an error, or what others make of it."""
        error = said.get("error", said)
        error = error if isinstance(error, dict) else said
        message = wire.error_words(said) or f"status {status}"
        code, kind = str(error.get("code")), str(error.get("type"))
        if known := _ERRORS.get(code) or _ERRORS.get(kind):
            thing, _, reason = message.partition(": ")
            return known(thing, reason) if reason and len(thing) < 20 else known("prompt", message)
        status = _status(status, code, kind)
        if status in (401, 402, 403, 404):
            return ModelUnusable(self._name, message, self._hint(status))
        if status >= 500 or status in _BUSY:
            return Unanswered(f"{'fails' if status >= 500 else 'takes no more'} ({message})", status, _seconds(after))
        if "context length" in message:  # vLLM and others have no code for it
            return PromptTooLong("prompt", message)
        option = str(error.get("param")).replace("_", "-")
        hint = f"without --{option} it may answer" if error.get("param") in Sampling.names() else ""
        return BadData(self._name, message, hint)


class _Heard:
    """What has come of an answer, and what it took."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._first: float | None = None
        self._text: list[str] = []
        self._rest: list[Message] = []
        self._usage: Any = None
        self._pieces = 0
        self.has_choices = False
        self.reason: str | None = None

    def take(self, event: dict[str, Any]) -> tuple[str, bool]:
        """What an event adds to the text, and whether it says anything, be it to itself. Raises `Malformed`."""
        self._usage = event.get("usage") or self._usage
        if event.get("choices") in (None, []):  # it has the usage, or nothing
            return "", False
        choice, self.has_choices = wire.first_choice(event), True
        self.reason = wire.finish_reason(choice) or self.reason
        message = wire.message(choice)
        if message.refusal or message.thoughts or message.has_calls:
            self._rest.append(message)
        if text := message.text if self._text else message.text.lstrip():
            self._first = self._first or time.perf_counter()
            self._text.append(text)
            self._pieces += "delta" in choice
        return text, bool(message.text or message.thoughts or message.refusal)

    def no_answer(self) -> str | None:
        """Why what has come is no answer, or not all of one; None where it is."""
        refusal, thoughts = ("".join(getattr(one, name) for one in self._rest) for name in ("refusal", "thoughts"))
        if refusal:
            return f"refuses to answer: {one_line(refusal)}"
        if self.reason == "content_filter":
            return f"its content filter {'cuts the answer off' if self._text else 'holds the answer back'}"
        if self.reason == "error":
            return "fails in the midst of its answer"
        if self._text:
            return None
        if self.reason == "refusal":
            return "refuses to answer"
        if any(one.has_calls for one in self._rest) or self.reason == "tool_calls":
            return "calls a tool, and does not answer"
        return f"thinks, and does not answer: {one_line(thoughts)}" if thoughts else None

    def answer(self) -> Answer:
        """The whole answer; its pieces are how many tokens it has where the server does not say."""
        now = time.perf_counter()
        usage = self._usage if isinstance(self._usage, dict) else {}
        details = usage.get("prompt_tokens_details")
        cached = tokens(details.get("cached_tokens")) if isinstance(details, dict) else 0
        why: FinishReason = "length" if self.reason == "length" else "stop"
        answered = tokens(usage.get("completion_tokens")) or self._pieces
        first = (self._first or now) - self._begin
        return Answer(
            "".join(self._text), why, tokens(usage.get("prompt_tokens")), cached, answered, first, now - self._begin
        )


def _status(status: int, code: str, kind: str) -> int:
    """What an error is that came with a status: its code may know better, its type where the status says nothing."""
    if code.isdecimal() and 400 <= int(code[:9]) < 600:
        return int(code)
    if code == "insufficient_quota" or status >= 500:
        return _STATUSES.get(code) or _STATUSES.get(kind) or status
    return status


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
        if turn.system is not None:
            made.append({"role": "system", "content": turn.system})
        if not turn.is_unasked:
            made.append({"role": "user", "content": _content(turn, url)})
        if turn.answer is not None:
            made.append({"role": "assistant", "content": turn.answer})
    return made


def _content(turn: Turn, url: Callable[[Picture], str]) -> str | list[dict[str, Any]]:
    """A question; text alone is a string, for some servers' templates take nothing else."""
    if not turn.pictures:
        return turn.question
    texts = [turn.question] if turn.question else []
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": url(part)}}
        for part in turn.parts or (*turn.pictures, *texts)
    ]


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


def _seconds(after: str | None) -> float:
    """How long a server asks to be left alone: in seconds, or until a date."""
    try:
        return max(0.0, float(after or 0))
    except ValueError:
        pass
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, parsedate_to_datetime(after or "").timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
