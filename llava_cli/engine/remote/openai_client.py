"""A client of OpenAI's chat completions API: sends a conversation, returns an answer, whole or as a stream.

https://platform.openai.com/docs/api-reference/chat. The transport is the caller's: see `Post`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

from llava_cli import limits
from llava_cli.bounded_http import Response, ResponseTooLarge
from llava_cli.bounded_json import TooMuch
from llava_cli.conversation import Conversation
from llava_cli.engine.base import Answer, Chunk, Request
from llava_cli.engine.remote import openai_response
from llava_cli.engine.remote.answer_builder import AnswerBuilder
from llava_cli.engine.remote.answer_checks import Fits, checked_answer
from llava_cli.engine.remote.dialects import PLAIN, Dialect
from llava_cli.engine.remote.openai_errors import Hint, error_from
from llava_cli.engine.remote.openai_messages import ImageUrl, messages
from llava_cli.engine.remote.openai_response import HtmlResponse, MalformedResponse, RetryableError
from llava_cli.errors import BadData, ModelUnusable, NoAnswer, ServerFailed
from llava_cli.settings import Sampling
from llava_cli.untrusted_text import one_line

CHAT_PATH = "chat/completions"
_FALLBACKS: dict[str, tuple[str | None, str]] = {
    "max_tokens": ("max_completion_tokens", "max_completion_tokens"),
    "stream_options": (None, "stream_options"),
    "logprobs": (None, "logprobs"),
    "top_logprobs": (None, "logprobs"),
}
"""Parameters that some servers reject: what to send instead, another name or nothing, and what their error says."""
_TITLE = rb"<title[^<>]{0,99}>([^<>]{1,999})</title"

Post = Callable[[str, dict[str, Any]], Response]
"""Sends JSON to a path below the API's base URL. Raises `RetryableError`, `MalformedResponse` or `ResponseTooLarge`."""


class OpenAIClient:
    """Sends chat completion requests to one server.

    `name` is what errors call the server, `post` sends to it, `image_url` turns a picture into a URL that it accepts,
    `model` is the model to ask for, and `hint` gives the next command to type after an HTTP status. `dialect` is how
    the server names the form of an answer, and `fits` tells whether a text has it.
    """

    def __init__(
        self,
        name: str,
        post: Post,
        image_url: ImageUrl,
        model: str | None = None,
        hint: Hint = lambda status: "",
        dialect: Dialect = PLAIN,
        fits: Fits = lambda sampling, text: True,
    ) -> None:
        self._name, self._post, self._image_url, self._hint = name, post, image_url, hint
        self._dialect, self._fits = dialect, fits
        self._model = {"model": model} if model else {}
        self._replacements: dict[str, str | None] = {}
        """The parameters that this server has rejected, with their fallbacks."""

    def complete(self, request: Request) -> Answer:
        """The whole answer. Raises `RetryableError` or a `LlavaError`."""
        *_, last = self._chunks(self._body(request.conversation, request.sampling), request.sampling)
        assert last.answer is not None
        return last.answer

    def stream(self, conversation: Conversation, sampling: Sampling) -> Generator[Chunk, None, None]:
        """The answer as it arrives. Raises `RetryableError`, also if it breaks off, or a `LlavaError`."""
        is_checked = bool(sampling.grammar_option) and not self._dialect.is_llava
        if sampling.choices or is_checked:  # whether it is an answer shows at its end
            answer = self.complete(Request(conversation, sampling))
            yield Chunk(answer.text)
            yield Chunk("", answer)
            return
        body = {**self._body(conversation, sampling), "stream": True, "stream_options": {"include_usage": True}}
        yield from self._chunks(body, sampling)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that a path answers with. Raises `RetryableError` or a `LlavaError`."""
        with self.response_errors(), closing(self._send(path, body)) as response:
            return openai_response.read_object(response)

    @contextmanager
    def response_errors(self) -> Iterator[None]:
        """Translates the errors of a malformed response. Asking again would not help, so none is a `RetryableError`."""
        try:
            yield
        except MalformedResponse as error:
            hint = (isinstance(error, HtmlResponse) and self._hint(404)) or "curl URL/models says what it is"
            raise ModelUnusable(self._name, str(error), hint) from None
        except (ResponseTooLarge, TooMuch) as error:
            raise ServerFailed(self._name, f"its answer is refused: {error}") from None

    def error_from(self, response: Response) -> Exception:
        """What a response with an unsuccessful status means, as an exception to raise."""
        location = response.header("Location")
        if location and 300 <= response.status < 400:  # not followed: the API key is for this server alone
            return ModelUnusable(self._name, f"redirects to {one_line(location)}", "--server URL is where it listens")
        try:
            data = response.read(limits.REPLY_ERROR_BYTES)
        except (OSError, ResponseTooLarge):
            data = b""
        try:
            payload = openai_response.parse_object(data)
        except HtmlResponse:
            title = re.search(_TITLE, data[:10_000], re.IGNORECASE)
            payload = {"error": title[1].decode("utf-8", "replace") if title else ""}
        except (MalformedResponse, TooMuch):
            payload = {"error": data.decode("utf-8", "replace")}
        return error_from(self._name, self._hint, response.status, payload, response.header("Retry-After"))

    def _chunks(self, body: dict[str, Any], sampling: Sampling) -> Generator[Chunk, None, None]:
        """The answer in one piece or in several; some servers do not do what `stream` asks for."""
        builder, is_done = AnswerBuilder(keeps_space=bool(sampling.grammar_option)), False
        with self.response_errors(), closing(self._send(CHAT_PATH, body)) as response:
            for data in openai_response.read_events(response):
                if data == openai_response.DONE:
                    is_done = True
                    break
                event = openai_response.parse_object(data)
                if openai_response.is_error(event):
                    raise error_from(self._name, self._hint, 500, event)
                text, is_progress = builder.add(event)
                if is_progress:
                    response.deadline.restart()
                if text:
                    yield Chunk(text)
            if is_done and not builder.has_choices:
                raise MalformedResponse
        if not (is_done or builder.finish_reason):
            raise RetryableError(openai_response.BROKEN_OFF)
        if failure := builder.failure():
            hint = "--max-tokens N lets it say more" if builder.finish_reason == "length" else ""
            raise NoAnswer(self._name, failure, hint)
        with self.response_errors():
            answer = checked_answer(
                self._name, self._dialect, self._fits, sampling, builder.answer(), builder.openai_choices
            )
        yield Chunk("", answer)

    def _body(self, conversation: Conversation, sampling: Sampling) -> dict[str, Any]:
        """The request for the conversation's next answer. Raises `UsageError` for what the server cannot do."""
        options = self._dialect.fields(sampling, self._name)
        return {**self._model, "messages": messages(conversation, self._image_url), **options}

    def _send(self, path: str, body: dict[str, Any]) -> Response:
        """Posts the body; if the server rejects a parameter that has a fallback, posts it again with the fallback."""
        while True:
            response = self._post(path, self._with_fallbacks(body))
            if response.status == 200:
                return response
            with closing(response):
                error = self.error_from(response)
            if not self._add_fallbacks(error, body):
                raise error

    def _with_fallbacks(self, body: dict[str, Any]) -> dict[str, Any]:
        names = {name: self._replacements.get(name, name) for name in body}
        return {replacement: body[name] for name, replacement in names.items() if replacement}

    def _add_fallbacks(self, error: Exception, body: dict[str, Any]) -> bool:
        """Whether the error names a parameter of the body that has a fallback which was not yet tried."""
        if not isinstance(error, BadData):
            return False
        new = {
            name: fallback
            for name, (fallback, word) in _FALLBACKS.items()
            if name in body and name not in self._replacements and word in error.reason
        }
        self._replacements.update(new)
        return bool(new)


def skip_shown(shown: str, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """The chunks of an answer that was begun again, without the text that was `shown` before it broke off.

    Raises `ModelUnusable` if the new answer does not begin with that text.
    """
    for chunk in chunks:
        length = min(len(shown), len(chunk.text))
        if shown[:length] != chunk.text[:length]:
            raise ModelUnusable("answer", "broke off, and asked again it has another beginning", "ask again")
        shown = shown[length:]
        yield replace(chunk, text=chunk.text[length:])
