"""What clients send to `llava serve`, as it comes.

| kind | example | own variants | right value | test |
|---|---|---|---|---|
| base64 | line breaks | URL-safe, percent-encoded, no `data:` | the picture | `test_a_picture_as_it_comes` |
| no base64 | `%%%` | a path, a word, half of an alphabet | 400 that says so | `test_what_is_no_picture_is_said_so` |
| other forms | `image_url` as text | Anthropic's, LangChain's | the picture | `test_parts_of_other_clients` |
| null | `stream: null` | each optional field, in messages and parts | left out | `test_null_is_left_out` |
| roles | an assistant greets | several in a row, an empty one | in the prompt | `test_orders_of_roles` |
| roles | system in the middle | twice, last, before an answer | where it stands | `test_orders_of_roles` |
| roles | a tool's message | a function's | 400 that names it | `test_roles_that_are_refused` |
| order | text, picture, text, picture | two messages | kept, or 400 | `test_the_order_of_parts` |
| meaning | `images` in a message | `tool_calls`, a key twice | 400, by name | `test_what_would_be_passed_over` |
| harmless | `name`, `detail`, `user` | `cache_control`, empty lists | answered | `test_what_changes_nothing` |
| refusals | Host, Origin | a path, a method, a content type | names what allows it | `test_refusals_name_the_way` |
| numbers | a temperature of 1e-300 | `true`, 5.0, 1e400 | answered, or 400 | `test_numbers` |
| mutations | 300 requests | | all texts, or 4xx | `test_no_mutation_changes_a_prompt` |
| its page | what its schemas allow | no other members | no 5xx | `test_what_its_own_page_describes` |
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from random import Random
from typing import Any
from urllib.parse import quote

import hypothesis
import pytest
import schemathesis
from helpers import requests_of_clients
from helpers.servers import Endpoint, connected, in_thread, post, response
from helpers.tables import for_each
from PIL import Image

from llava_cli import load
from llava_cli.conversation import Picture, Turn
from llava_cli.engine.local import LocalEngine
from llava_cli.images.decode import decode
from llava_cli.server.bodies import parse_chat_request
from llava_cli.server.pictures import decode_data_url

QUESTION = "what color is the circle?"


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return load("builtin", precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def server(engine: LocalEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with in_thread(engine, tmp_path_factory.mktemp("server")) as running:
        yield running


def png() -> bytes:
    Image.effect_noise((40, 30), 90).convert("RGB").save(file := io.BytesIO(), "PNG")
    return file.getvalue()


PNG = png()
B64 = base64.b64encode(PNG).decode()
URL = f"data:image/png;base64,{B64}"
SHOWN = {"type": "image_url", "image_url": {"url": URL}}


def picture(url: str, name: str) -> Picture:
    return Picture(url, decode(decode_data_url(url), "")[0], name)


def read(*messages: dict[str, Any], **options: Any) -> list[Turn]:
    """The turns of a request that is to be answered. Raises `ApiError`."""
    chat = parse_chat_request(bytearray(json.dumps({"messages": messages, **options}).encode()))
    chat.check()
    return list(chat.question(None, picture).turns)


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def ask(server: Endpoint, body: Any, *headers: str, path: str = "/v1/chat/completions") -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with closing(connected(server, post(data, *headers, path=path))) as connection:
        status, _, said = response(connection)
    return status, said


@for_each(
    "url",
    [
        URL,
        f"data:image/png;base64,{base64.encodebytes(PNG).decode()}",
        f"data:image/png;base64,{base64.encodebytes(PNG).decode()}".replace("\n", "\r\n"),
        f"  data:image/png;base64, {B64}\n",
        URL.rstrip("="),
        f"data:image/png;base64,{base64.urlsafe_b64encode(PNG).decode()}",
        f"data:image/png;base64,{quote(B64, safe='')}",
        f"data:;base64,{B64}",
        f"data:base64;base64,{B64}",
        f"data:image/jpg;name=a%20b.jpg;charset=utf-8;base64,{B64}",
        f"DATA:image/png;BASE64,{B64}",
        f"data:image/png,{quote(PNG)}",
        B64,
    ],
)
def test_a_picture_as_it_comes(url: str) -> None:
    (turn,) = read(user({"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}))
    assert decode_data_url(url.strip()) == PNG
    assert [len(turn.pictures), turn.question] == [1, QUESTION]


@for_each(
    ("url", "words"),
    [
        ("data:image/png;base64,%%%", "not base64"),
        ("data:image/png;base64,a", "not base64"),
        ("data:image/png;base64,iVBORw0K=GgoA", "not base64"),
        ("data:image/png;base64", "not a data: URI"),
        ("/etc/passwd", "not a data: URI"),
        ("picture.png", "not a data: URI"),
    ],
)
def test_what_is_no_picture_is_said_so(url: str, words: str, server: Endpoint) -> None:
    status, said = ask(server, {"messages": [user({"type": "image_url", "image_url": url}, "what?")]})
    assert (status, said["error"]["code"]) == (400, "invalid_image_url")
    assert said["error"]["message"] == f"picture 1: {words}"


@for_each(
    "part",
    [
        {"type": "image_url", "image_url": URL},
        {"type": "image_url", "image_url": {"url": URL, "detail": "high", "format": "image/png"}},
        {"type": "input_image", "image_url": URL, "detail": "auto", "file_id": None},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": B64}},
        {"type": "image", "source": {"type": "url", "url": URL}},
        {"type": "image", "source_type": "base64", "data": B64, "mime_type": "image/png"},
        {"type": "image", "base64": B64, "mime_type": "image/png"},
        {"type": "image", "url": URL},
        {"type": "image", "image": URL},
        {"type": "image", "image": B64, "mimeType": "image/png"},
    ],
)
def test_parts_of_other_clients(part: dict[str, Any]) -> None:
    (turn,) = read(user(part, {"type": "input_text", "text": QUESTION}))
    assert [decode_data_url(one.name) for one in turn.pictures] == [PNG]
    assert turn.question == QUESTION


def test_null_is_left_out(server: Endpoint) -> None:
    names = ("stream", "stop", "n", "temperature", "top_p", "seed", "tools", "response_format", "stream_options")
    others = ("model", "logprobs", "top_logprobs", "max_completion_tokens", "frequency_penalty", "unheard_of")
    message = {
        **user({"type": "text", "text": QUESTION, "cache_control": None, "annotations": None}),
        **{"name": None, "tool_calls": None, "images": None},
    }
    before = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": None, "refusal": None}]
    body = {"messages": [*before, message], "max_tokens": 1, **dict.fromkeys((*names, *others))}
    status, said = ask(server, body)
    assert (status, said["choices"][0]["message"]["role"]) == (200, "assistant")
    assert ask(server, {**body, "stream_options": {"include_usage": None}})[0] == 200
    assert ask(server, {**body, "messages": None})[1]["error"]["message"] == "messages: is missing"


ASSISTANT = {"role": "assistant", "content": "Hello, I am here."}
ASKS = {"role": "user", "content": QUESTION}
SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = f"USER: {QUESTION} ASSISTANT: {ASSISTANT['content']}</s>"


@for_each(
    ("messages", "prompt"),
    [
        ([ASSISTANT, ASKS], " ASSISTANT: Hello, I am here.</s>USER: what color is the circle? ASSISTANT:"),
        (
            [ASKS, ASSISTANT, {**ASSISTANT, "content": "Blue."}, ASKS],
            f"USER: {QUESTION} ASSISTANT: Hello, I am here.</s> ASSISTANT: Blue.</s>USER: {QUESTION} ASSISTANT:",
        ),
        ([ASKS, {"role": "assistant", "content": ""}], f"USER: {QUESTION} ASSISTANT:"),
        ([ASKS, {"role": "assistant"}], f"USER: {QUESTION} ASSISTANT:"),
        ([ASKS, {"role": "assistant", "content": [{"type": "text", "text": ""}]}], f"USER: {QUESTION} ASSISTANT:"),
        ([{"role": "developer", "content": "Be brief."}, ASKS], f"Be brief. USER: {QUESTION} ASSISTANT:"),
        ([{**ASKS, "content": "Look."}, {**ASKS, "name": "me"}], f"USER: Look.\n{QUESTION} ASSISTANT:"),
        ([ASKS, SYSTEM, ASKS], f"USER: {QUESTION}Be brief. USER: {QUESTION} ASSISTANT:"),
        ([ASKS, ASSISTANT, SYSTEM, SYSTEM, ASKS], f"{ASKED}Be brief.\nBe brief. USER: {QUESTION} ASSISTANT:"),
        (
            [ASKS, ASSISTANT, SYSTEM, ASSISTANT, ASKS],
            f"{ASKED}Be brief.  ASSISTANT: {ASSISTANT['content']}</s>USER: {QUESTION} ASSISTANT:",
        ),
        ([ASKS, SYSTEM], f"USER: {QUESTION}Be brief.  ASSISTANT:"),
        ([user(SHOWN)], "USER: <image>\n ASSISTANT:"),
        ([user({"type": "text", "text": QUESTION}, SHOWN)], f"USER: <image>\n{QUESTION} ASSISTANT:"),
        (
            [user(SHOWN, {"type": "text", "text": "Look."}), user(SHOWN, {"type": "text", "text": QUESTION})],
            f"USER: <image>\nLook.USER: <image>\n{QUESTION} ASSISTANT:",
        ),
    ],
)
def test_orders_of_roles(messages: list[dict[str, Any]], prompt: str, engine: LocalEngine) -> None:
    chat = parse_chat_request(bytearray(json.dumps({"messages": messages}).encode()))
    chat.check()
    assert engine.prompt(chat.question(None, picture)) == prompt


@for_each(
    ("messages", "words"),
    [
        ([ASKS, {"role": "tool", "content": "4", "tool_call_id": "1"}], "messages.1.tool_call_id is not supported"),
        ([ASKS, {"role": "function", "name": "f", "content": "4"}], "messages.1.role: 'function' is not one of"),
        ([ASKS, ASSISTANT], "the last message has to be a user's"),
        ([{"role": "system", "content": [SHOWN]}, ASKS], "messages.0: pictures are for messages of role user"),
        ([user({"type": "text", "text": " "})], "there is no question"),
        ([{"role": "system", "content": "Be brief."}], "the last message has to be a user's"),
    ],
)
def test_roles_that_are_refused(messages: list[dict[str, Any]], words: str, server: Endpoint) -> None:
    status, said = ask(server, {"messages": messages})
    assert status == 400
    assert said["error"]["message"].startswith(words)


def test_the_order_of_parts(server: Endpoint) -> None:
    parts = [{"type": "text", "text": "First:"}, SHOWN, {"type": "text", "text": "Second:"}, SHOWN]
    status, said = ask(server, {"messages": [user(*parts)]})
    assert status == 400
    assert "puts all pictures of a message before its text" in said["error"]["message"]
    (turn,) = read(user(*parts))
    assert [part if isinstance(part, str) else "picture" for part in turn.parts] == [
        *("First:", "picture", "Second:", "picture")
    ]


@for_each(
    ("body", "name"),
    [
        ({"messages": [{**ASKS, "images": [B64]}]}, "messages.0.images"),
        ({"messages": [{**ASKS, "files": ["a"]}]}, "messages.0.files"),
        ({"messages": [{**ASSISTANT, "tool_calls": [{"id": "1"}]}, ASKS]}, "messages.0.tool_calls"),
        ({"messages": [{**ASSISTANT, "audio": {"id": "1"}}, ASKS]}, "messages.0.audio"),
        (
            {"messages": [user({"type": "text", "text": "a", "image_url": {"url": URL}})]},
            "messages.0.content.0.image_url",
        ),
        ({"messages": [user({"type": "input_audio", "input_audio": {}})]}, "messages.0.content.0.type"),
        ({"messages": [user({"type": "input_image", "file_id": "file-1"})]}, "messages.0.content.0.image_url"),
        ({"messages": [user({"type": "image", "url": URL, "base64": B64})]}, "messages.0.content.0"),
        ({"messages": [ASKS], "images": [B64]}, "images"),
        ({"messages": [ASKS], "prompt": "and this"}, "prompt"),
        ({"messages": [ASKS], "tools": [{"type": "function"}]}, "tools"),
        ({"messages": [ASKS], "top_k": 40}, "top_k"),
        ({"messages": [ASKS], "chat_template": "{{ 1 }}"}, "chat_template"),
    ],
)
def test_what_would_be_passed_over(body: dict[str, Any], name: str, server: Endpoint) -> None:
    status, said = ask(server, body)
    assert (status, said["error"]["param"]) == (400, name), said
    assert name in said["error"]["message"]


def test_a_name_that_is_there_twice(server: Endpoint) -> None:
    message = json.dumps([ASKS])
    status, said = ask(server, f'{{"messages": {message}, "messages": []}}'.encode())
    assert (status, said["error"]["message"]) == (400, "the body has 'messages' twice in one object")


def test_what_changes_nothing(server: Endpoint) -> None:
    message = {
        **user({"type": "text", "text": QUESTION, "cache_control": {"type": "ephemeral"}}),
        **{"name": "me", "id": "1", "metadata": {"a": 1}, "tool_calls": [], "images": []},
    }
    options: dict[str, Any] = {
        **{"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "tools": [], "logit_bias": {}},
        **{"parallel_tool_calls": True, "prompt_cache_key": "k", "safety_identifier": "s", "top_k": -1, "stop": ""},
    }
    assert ask(server, {"messages": [message], "max_tokens": 1, **options})[0] == 200


@for_each(
    ("path", "method", "status", "words"),
    [
        ("/v1/embeddings", "POST", 404, "there is no /v1/embeddings here: POST /v1/chat/completions answers"),
        ("/v1/responses", "POST", 404, "there is no /v1/responses here"),
        ("/api/chat", "POST", 404, "there is no /api/chat here"),
        ("/v1/chat/completions", "PUT", 405, "PUT /v1/chat/completions: Method Not Allowed"),
    ],
)
def test_what_is_not_there(path: str, method: str, status: int, words: str, server: Endpoint) -> None:
    told, _, said = server.ask(path, method, {})
    assert told == status
    assert words in json.loads(said)["error"]["message"]


@for_each("path", ["/v1/chat/completions/", "/chat/completions", "//v1//chat/completions", "/v1/chat//completions"])
def test_paths_as_clients_join_them(path: str, server: Endpoint) -> None:
    assert ask(server, {"messages": [ASKS], "max_tokens": 1}, path=path)[0] == 200


@for_each("path", ["//llava", "/llava/", "///llava/prompt", "/./llava"])
def test_no_path_leads_around_the_guard(path: str, server: Endpoint) -> None:
    assert server.ask(path)[0] == 404


def test_heads(server: Endpoint) -> None:
    for path in ("/health", "/v1/models", "/models/", "/v1/models/builtin"):
        assert (server.ask(path, "HEAD")[0], server.ask(path)[0]) == (200, 200)


def test_refusals_name_the_way(server: Endpoint) -> None:
    for header, value, words in (
        ("Host", "box.example:8000", "llava serve --allow-host box.example allows it"),
        ("Origin", "https://page.example", "llava serve --allow-origin https://page.example does"),
    ):
        status, _, said = server.ask("/v1/models", **{header: value})
        assert (status, words in json.loads(said)["error"]["message"]) == (403, True)
    told = server.ask("/v1/chat/completions", "POST", {"messages": [ASKS]}, Content_Type="text/plain")
    assert told[0] == 400
    assert "Content-Type: application/json, not text/plain" in json.loads(told[2])["error"]["message"]


@for_each(
    ("options", "status"),
    [
        ({"temperature": 1e-300}, 200),
        ({"temperature": 5e-324}, 200),
        ({"temperature": 1e-9, "top_p": 0.5}, 200),
        ({"temperature": True}, 400),
        ({"temperature": -1}, 400),
        ({"temperature": float("inf")}, 400),
        ({"max_tokens": 1.0}, 200),
        ({"max_tokens": True}, 400),
        ({"max_tokens": 1.5}, 400),
        ({"max_tokens": 10**30}, 400),
        ({"n": True}, 400),
        ({"seed": -5}, 200),
    ],
)
def test_numbers(options: dict[str, Any], status: int, server: Endpoint) -> None:
    told, said = ask(server, {"messages": [ASKS], "max_tokens": 1, **options})
    assert (told, "error" in said) == (status, status != 200)
    assert ask(server, b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e400}')[0] == 400


def test_no_mutation_changes_a_prompt(engine: LocalEngine) -> None:
    """What is not refused is in the prompt: each text, in order, and each picture."""
    rng, answered = Random(11), 0
    for _ in range(300):
        answered += requests_of_clients.check(requests_of_clients.mutated(rng), engine.prompt, picture)
    assert 20 < answered < 300


@pytest.mark.parametrize("is_strict", [False, True], ids=["any members", "its own members"])
def test_what_its_own_page_describes(is_strict: bool, server: Endpoint) -> None:
    """Requests that schemathesis makes of the server's OpenAPI page; `is_strict` are those that are mostly answered."""
    page = json.loads(server.ask("/openapi.json")[2])
    body = page["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    if is_strict:
        parts = page["components"]["schemas"]
        parts["Part"] = {"type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}}}
        parts["Message"]["properties"]["role"] = {"enum": ["system", "user", "assistant"]}
        body["properties"]["messages"] |= {"minItems": 1, "maxItems": 4}
        body["properties"] = {name: body["properties"][name] for name in ("messages", "seed", "stop", "logprobs")}
        page["paths"] = {"/v1/chat/completions": page["paths"]["/v1/chat/completions"]}
        for schema in (body, parts["Part"], parts["Message"]):
            schema |= {"additionalProperties": False, "required": [*schema["properties"]]}
    statuses = Counter[int]()
    for operation in schemathesis.openapi.from_dict(page).get_all_operations():

        @hypothesis.settings(
            max_examples=60, derandomize=True, database=None, deadline=None, phases=[hypothesis.Phase.generate]
        )
        @hypothesis.given(operation.ok().as_strategy())
        def answers(case: Any) -> None:
            answer = case.call(base_url=f"http://127.0.0.1:{server.port}")
            statuses[answer.status_code] += 1
            assert answer.status_code < 500, answer.text
            assert answer.status_code < 400 or case.method == "HEAD" or answer.json()["error"]["message"]

        answers()
    assert statuses[200]  # some are answered
