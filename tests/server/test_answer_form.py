"""Answers of a given form over OpenAI's API: schemas, choices, regular expressions, grammars; by its own client."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
from helpers.servers import Endpoint, in_thread
from helpers.tables import for_each

from llava_cli import Conversation, Sampling, limits, load
from llava_cli.engine.local import LocalEngine
from llava_cli.images.reader import open_picture
from llava_cli.server.chat_request import ChatRequest

SHAPES = Path(__file__).parents[2] / "examples" / "shapes.png"
QUESTION = "what color is the star?"
COLORS = ["red", "orange", "blue"]


class Star(pydantic.BaseModel):
    """A star, as a program wants it."""

    color: Literal["red", "orange", "blue"]
    points: int = pydantic.Field(ge=5, le=6)
    note: str | None = pydantic.Field(default=None, max_length=4)


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return load("builtin", precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def server(engine: LocalEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with in_thread(engine, tmp_path_factory.mktemp("server")) as running:
        yield running


def asked() -> Any:
    url = f"data:image/png;base64,{base64.b64encode(SHAPES.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return {"model": "builtin", "messages": [{"role": "user", "content": content}]}


def json_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # of the client, for a message with `parsed`
def test_a_class_of_pydantic_is_parsed(server: Endpoint) -> None:
    completions = server.client().chat.completions
    message = completions.parse(**asked(), response_format=Star).choices[0].message
    assert isinstance(message.parsed, Star)
    assert message.model_extra == {"llava": {"data": message.parsed.model_dump()}}
    with completions.stream(**asked(), response_format=Star) as stream:
        texts = [event.delta for event in stream if event.type == "content.delta"]
        streamed = stream.get_final_completion().choices[0].message
    assert streamed.parsed == message.parsed
    assert streamed.model_extra == message.model_extra
    assert "".join(texts) == message.content
    assert len(texts) > 3
    conversation = [*asked()["messages"], message, {"role": "user", "content": "what shape is orange?"}]
    assert completions.create(**asked() | {"messages": conversation}).choices[0].message.content == "star"
    with pytest.raises(openai.BadRequestError, match=r"messages.0.llava is not supported"):
        completions.create(**asked() | {"messages": [{"role": "user", "content": "?", "llava": {"sight": True}}]})


def test_text_is_a_form_of_its_own() -> None:
    """It is what the server was not started with, and needs no reading."""
    chat = ChatRequest(**asked(), response_format={"type": "text"})
    assert not chat.has_form
    defaults = Sampling(choices=("a", "b"), otherwise="c", at_least=0.9, temperature=0.5)
    assert chat.sampling(defaults, chat.form()) == Sampling(temperature=0.5)
    stopped = Sampling(stop=(".",))
    assert chat.sampling(stopped, chat.form()) == stopped
    both = ChatRequest(**asked(), response_format={"type": "text"}, regex="a")
    assert both.has_form and both.sampling(defaults, both.form()).regex == "a"


@for_each("field", ["structured_outputs", "guided_choice"])
def test_choices_are_those_of_the_engine(field: str, server: Endpoint, engine: LocalEngine) -> None:
    body = {field: {"choice": COLORS} if field == "structured_outputs" else COLORS}
    body["llava"] = {"confidence": True, "sight": True, "otherwise": "unsure", "at_least": 1}
    message = server.client().chat.completions.create(**asked(), extra_body=body).choices[0].message
    sampling = Sampling(choices=COLORS, confidence=True, sight=True, otherwise="unsure", at_least=1)  # type: ignore[arg-type]
    expected = engine.answer(Conversation().ask(QUESTION, [open_picture(str(SHAPES))]), sampling)
    assert message.content == expected.text == "unsure"
    assert message.model_extra == {"llava": expected.details()}
    assert next(iter(message.model_extra["llava"]["probabilities"])) == "orange"


@for_each(
    ("options", "content"),
    [
        ({"response_format": {"type": "text"}}, "orange"),
        ({"response_format": json_schema({"const": None})}, "null"),
        ({"response_format": json_schema({"anyOf": [{"const": None}, {"enum": [None]}]})}, "null"),
        ({"response_format": {"type": "json_object", "schema": {"const": {"a": 1}}}}, '{"a": 1}'),
        ({"response_format": {"type": "json_object"}, "max_tokens": 2}, "{"),
        ({"structured_outputs": {"json_object": True}, "max_tokens": 2}, "{"),
        ({"structured_outputs": {"json": {"const": 7}}}, "7"),
        ({"structured_outputs": {"regex": "[2]{3}"}}, "222"),
        ({"structured_outputs": {"grammar": 'start: "a" "b"'}}, "ab"),
        ({"guided_json": '{"const": [1, 2]}'}, "[1, 2]"),
        ({"guided_regex": "x"}, "x"),
        ({"guided_grammar": "start: /c{2}d/\n"}, "ccd"),
        ({"json_schema": {"const": "a"}}, '"a"'),
        ({"regex": "y"}, "y"),
        ({"guided_choice": None, "response_format": None}, "orange"),
        ({"guided_regex": "z", "logprobs": True, "top_logprobs": 2}, "z"),
    ],
)
def test_forms(options: dict[str, Any], content: str, server: Endpoint) -> None:
    choice = server.client().chat.completions.create(**asked(), extra_body=options).choices[0]
    assert choice.message.content == content
    assert choice.finish_reason == ("length" if "max_tokens" in options else "stop")
    assert bool(choice.logprobs) == ("logprobs" in options)


@for_each(
    ("options", "message", "param"),
    [
        ({"response_format": []}, "has to be an object", "response_format"),
        ({"response_format": {"type": "xml"}}, "has to be one of text, json_object, json_schema", "response_format"),
        ({"response_format": {"type": "json_schema"}}, "schema: is missing", "response_format"),
        ({"response_format": json_schema([])}, "has to be a JSON schema", "response_format"),
        ({"response_format": json_schema({"type": "strin"})}, "invalid type: strin", "response_format"),
        ({"response_format": json_schema({"type": "string", "minLength": 2, "maxLength": 1})}, "no answer can", None),
        ({"response_format": json_schema(False)}, "has to be a JSON schema", "response_format"),
        ({"response_format": json_schema({"$ref": "http://elsewhere/x"})}, "not fetched", "response_format"),
        ({"response_format": {**json_schema({}), "mode": 1}}, "is not supported", "response_format.mode"),
        ({"structured_outputs": {"structural_tag": "x"}}, "is not supported", "structured_outputs.structural_tag"),
        ({"grammar": 'root ::= "a"'}, "is not supported", "grammar"),
        ({"guided_grammar": 'root ::= "a"'}, "no Lark grammar", "guided_grammar"),
        ({"guided_grammar": "/etc/hostname"}, "no Lark grammar", "guided_grammar"),
        ({"guided_json": "/etc/hostname"}, "has to be a JSON schema", "guided_json"),
        ({"guided_choice": ["/etc/hostname"]}, "more than one choice", "guided_choice"),
        ({"guided_choice": "a,b"}, "has to be a list", "guided_choice"),
        ({"guided_choice": ["a", " b"]}, "begins or ends with a space", "guided_choice"),
        ({"guided_choice": ["a", "A"]}, "may be spelled alike", "guided_choice"),
        ({"guided_choice": ["a", "b"], "logprobs": True}, "is chosen, not generated", "logprobs"),
        ({"guided_choice": ["a", "b"], "guided_regex": "a"}, "says already what an answer is", "guided_regex"),
        ({"guided_choice": ["a", "b"], "llava": {"at_least": 1}}, "one is there without the other", "llava.at_least"),
        ({"guided_choice": ["a", "b"], "llava": {"at_least": 2, "otherwise": "c"}}, "is not between", "llava.at_least"),
        ({"llava": {"otherwise": "c", "at_least": 1}}, "there are no choices", "llava.otherwise"),
        ({"llava": {"choices": ["a", "b"]}}, "is not supported", "llava.choices"),
        ({"guided_regex": "("}, "unclosed group", "guided_regex"),
        ({"guided_regex": r"\bx"}, "look-around", "guided_regex"),
        ({"guided_regex": "a", "stop": ["a"]}, "says already where an answer ends", "stop"),
    ],
)
def test_what_no_answer_can_be_is_refused(
    options: dict[str, Any], message: str, param: str | None, server: Endpoint
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as raised:
        server.client().chat.completions.create(**asked(), extra_body=options)
    assert raised.value.param == (param or "response_format")


def test_sizes(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REQUEST_SCHEMA_CHARACTERS", 100)
    monkeypatch.setattr(limits, "REQUEST_CHOICES_CHARACTERS", 10)
    large = {"guided_json": {"const": "x" * 100}}, {"guided_choice": ["abcdef", "ghijkl"]}
    for body in large:
        with pytest.raises(openai.BadRequestError, match="more than 10"):
            server.client().chat.completions.create(**asked(), extra_body=body)


def test_what_compiles_slowly_delays_no_other_request(server: Endpoint, engine: LocalEngine) -> None:
    """Compiling waits until another request, without a form, has been answered."""
    is_compiling, may_go_on = threading.Event(), threading.Event()
    prepare = engine.prepare_form

    def slow(sampling: Sampling) -> None:
        is_compiling.set()
        assert may_go_on.wait(60)
        prepare(sampling)

    answers: list[Any] = []
    body = json.dumps({**asked(), "guided_regex": "slow"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "prepare_form", slow)
        ask = lambda: answers.append(  # noqa: E731
            server.ask("/v1/chat/completions", "POST", json.loads(body), Content_Type="application/json")
        )
        thread = threading.Thread(target=ask)
        thread.start()
        assert is_compiling.wait(60)
        assert server.client().chat.completions.create(**asked()).choices[0].message.content == "orange"
        may_go_on.set()
        thread.join(60)
    ((status, _, answer),) = answers
    assert status == 200
    assert json.loads(answer)["choices"][0]["message"]["content"] == "slow"
