"""Requests in the shapes that real clients send, and mutations of them, for what may not happen to a prompt."""

from __future__ import annotations

import base64
import copy
import io
import json
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from random import Random
from threading import Thread
from typing import Any, cast

import openai
from PIL import Image

from llava_cli.conversation import Conversation, Picture
from llava_cli.errors import BadImage, UsageError
from llava_cli.server.api_error import ApiError
from llava_cli.server.bodies import parse_chat_request

Image.new("RGB", (8, 8), "red").save(_file := io.BytesIO(), "PNG")
B64 = base64.b64encode(_file.getvalue()).decode()
URL = f"data:image/png;base64,{B64}"
SHOWN = {"type": "image_url", "image_url": {"url": URL, "detail": "auto"}}


def recorded(messages: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """The body that the openai client sends for these words of a program."""
    bodies: list[dict[str, Any]] = []

    class Recorder(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_error(400, "only recorded")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Recorder) as server:
        Thread(target=server.handle_request, daemon=True).start()
        direct = openai.DefaultHttpxClient(trust_env=False)  # not by way of a proxy that this machine may have
        client = openai.OpenAI(
            api_key="none", base_url=f"http://127.0.0.1:{server.server_port}/v1", http_client=direct, max_retries=0
        )
        with client, suppress(openai.BadRequestError):
            client.chat.completions.create(model="builtin", messages=cast(Any, messages), **options)
    return bodies[0]


REQUESTS: list[dict[str, Any]] = [
    # the openai client
    recorded([{"role": "user", "content": [SHOWN, {"type": "text", "text": "Which one is it?"}]}], stream=None),
    recorded(
        [
            {"role": "system", "content": "Answer in French."},
            {"role": "user", "content": [{"type": "text", "text": "Left:"}, SHOWN]},
            {"role": "assistant", "content": "Un rond."},
            {"role": "system", "content": "Now in Greek."},
            {"role": "user", "content": "And its color?", "name": "anna"},
        ],
        stream=True,
        stream_options={"include_usage": True},
        temperature=0.0,
        max_completion_tokens=64,
        stop=["\n\n"],
        user="anna",
        extra_body={"cache_prompt": True},
    ),
    # curl, as in OpenAI's documentation
    {
        "model": "builtin",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "What is this one?"}, SHOWN]}],
        "max_tokens": 300,
    },
    # its older versions
    {
        "messages": [
            {"role": "developer", "content": "Talk like a sailor."},
            {"role": "user", "content": [SHOWN, {"type": "text", "text": "Which shape?"}]},
            {"role": "assistant", "content": "A red one.", "refusal": None, "annotations": []},
            {"role": "user", "content": "And how large?"},
        ],
        "model": "default",
        "stream": False,
        "temperature": 0.2,
        "stop": ["\n"],
        "n": 1,
        "response_format": {"type": "text"},
    },
    # LangChain
    {
        "messages": [
            {"role": "system", "content": "You see pictures."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Compare it."},
                    {"type": "image", "source_type": "base64", "data": B64, "mime_type": "image/png"},
                ],
                "name": "example_user",
            },
        ],
        "model": "builtin",
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": None,
    },
    # litellm
    {
        "model": "builtin",
        "messages": [
            {"role": "assistant", "content": "How can I help?", "tool_calls": None, "provider_specific_fields": None},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Describe it, please.", "cache_control": {"type": "ephemeral"}},
                    {"type": "image_url", "image_url": URL},
                ],
            },
        ],
        "extra_body": {},
        "user": None,
    },
    # Open WebUI
    {
        "stream": True,
        "model": "builtin",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "one"}, SHOWN, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": "Both seen."},
            {"role": "user", "content": "Again, slowly."},
            {"role": "assistant", "content": ""},
        ],
    },
]
JUNK: list[Any] = [
    *[None, True, 0, -1, 1e300, 10**30, "", " ", "word", "\x00", "\ud800", URL, B64, [], {}, [[]], [None], {"a": 1}],
    *["user", "assistant", "system", "tool", "text", "image", "image_url", [SHOWN], SHOWN, ["word"], {"url": URL}],
    {"role": "user", "content": "More words."},
    {"role": "assistant", "content": "Others."},
]
HARMLESS = ("annotations", "cache_control", "detail", "id", "index", "metadata", "mime_type", "name")
NAMES = ("images", "content", "role", "text", "type", "image_url", "tools", "n", "prompt", "name", "tool_calls", "url")


def mutated(rng: Random) -> dict[str, Any]:
    """A request in which one to three things are missing, doubled, moved, renamed, or something else."""
    request = [copy.deepcopy(rng.choice(REQUESTS))]
    for _ in range(rng.randrange(1, 4)):
        places: list[tuple[Any, Any]] = [(request, 0)]
        for holder, key in places:
            inner = holder[key]
            if isinstance(inner, (dict, list)):
                places += [(inner, name) for name in (inner if isinstance(inner, dict) else range(len(inner)))]
        holder, key = rng.choice(places[1:] or places)
        change = rng.randrange(7)
        if change == 0 and holder is not request:
            del holder[key]
        elif change == 1 and isinstance(holder, list) and holder is not request:
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
        elif change == 2 and isinstance(holder, list) and holder is not request:
            rng.shuffle(holder)
        elif change == 3 and isinstance(holder, dict):
            holder[rng.choice(NAMES)] = holder.pop(key)
        elif change == 4:
            holder[key] = [holder[key]]
        else:
            holder[key] = copy.deepcopy(rng.choice(JUNK))
    return request[0] if isinstance(request[0], dict) else {"messages": request[0]}


def check(
    request: dict[str, Any], prompt: Callable[[Conversation], str], picture: Callable[[str, str], Picture]
) -> bool:
    """Whether a request is answered: then its prompt has all its texts, in order, and all its pictures."""
    try:
        chat = parse_chat_request(bytearray(json.dumps(request).encode()))
        chat.check()
        conversation = chat.question(None, picture)
        text = prompt(conversation)
    except ApiError as refusal:
        assert 400 <= refusal.status < 500
        return False
    except (UsageError, BadImage, ValueError):  # which the routes answer with 400
        return False
    place = 0
    for message in request["messages"]:
        for words in _texts(message):
            place = text.index(words.strip(), place) + len(words.strip())
    sent = sum(_pictures(message) for message in request["messages"])
    assert text.count("<image>") == len(conversation.pictures) == sent, json.dumps(request).replace(B64, "B64")
    return True


def _pictures(message: dict[str, Any]) -> int:
    """How often a message has the picture, but in its texts and in what says nothing of it."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    shown = [part for part in parts if isinstance(part, dict) and "image" in str(part.get("type"))]
    others = {name: value for name, value in message.items() if name != "content"}
    return json.dumps(_without_harmless([shown, others])).count(B64)


def _without_harmless(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_harmless(one) for one in value]
    if isinstance(value, dict):
        return {name: _without_harmless(one) for name, one in value.items() if name not in HARMLESS}
    return value


def _texts(message: dict[str, Any]) -> list[str]:
    content = message.get("content") or ""
    if isinstance(content, str):
        return [content]
    return [part if isinstance(part, str) else part.get("text") or "" for part in content]
