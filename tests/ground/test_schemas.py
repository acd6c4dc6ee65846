"""What a user gives as a form of answers, and the text that it becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tables import for_each

from llava_cli import Sampling, limits
from llava_cli.errors import LlavaError, UsageError
from llava_cli.schemas import parse_grammar, parse_schema, written_grammar, written_schema

TEXT, NUMBER = {"type": "string"}, {"type": "number"}


def fields(optional: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


@for_each(
    "line, schema",
    [
        ("shop", fields(shop=TEXT)),
        ("shop, total float", fields(shop=TEXT, total=NUMBER)),
        (" n int ,b bool,x number", fields(n={"type": "integer"}, b={"type": "boolean"}, x=NUMBER)),
        ("on date", fields(on={"type": "string", "format": "date"})),
        ("date, time", fields(date=TEXT, time=TEXT)),  # names, though they are types behind one
        ("tip? float, note?, x", fields(("tip", "note"), tip=NUMBER, note=TEXT, x=TEXT)),
        ("items [name, price float]", fields(items={"type": "array", "items": fields(name=TEXT, price=NUMBER)})),
        ("names [str]", fields(names={"type": "array", "items": TEXT})),
        ("names [name]", fields(names={"type": "array", "items": fields(name=TEXT)})),
        ("m [[float]]", fields(m={"type": "array", "items": {"type": "array", "items": NUMBER}})),
        ("c [red|blue]", fields(c={"type": "array", "items": {"enum": ["red", "blue"]}})),
        ("l [{a}]", fields(l={"type": "array", "items": fields(a=TEXT)})),
        ("from {city, zip? int}", fields(**{"from": fields(("zip",), city=TEXT, zip={"type": "integer"})})),
        ("size small|very_large", fields(size={"enum": ["small", "very_large"]})),
        ('v 1|2.5|"3"|null|true|x', fields(v={"enum": [1, 2.5, "3", None, True, "x"]})),
        ('"unit price" float', fields(**{"unit price": NUMBER})),
        (r'"a \"b\", c"', fields(**{'a "b", c': TEXT})),
        ("größe, 名前 int", fields(größe=TEXT, 名前={"type": "integer"})),
        ("[name, n int]", {"type": "array", "items": fields(name=TEXT, n={"type": "integer"})}),
        ('{"type": "object"}', {"type": "object"}),
        ({"type": "object"}, {"type": "object"}),
        ({"enum": (1, 2)}, {"enum": [1, 2]}),
    ],
)
def test_fields_are_a_schema_whose_order_is_theirs(line: Any, schema: dict[str, Any]) -> None:
    text = parse_schema("--schema", line)
    assert text == json.dumps(schema, ensure_ascii=False)
    assert Sampling(schema=line) == Sampling(schema=text) == Sampling(schema=schema)


@for_each(
    "line, words",
    [
        ("", "neither a JSON schema nor fields"),
        (5, "neither a JSON schema nor fields"),
        ("shop, total flaot", r"'flaot' is no type; there are str, .* \(character 13\)"),
        ("a, b, a", r"'a' is there twice \(character 7\)"),
        ("a,,b", r"there is no name for a field \(character 3\)"),
        ("a,", r"there is no name for a field \(character 3\)"),
        ("a [b", r"the line ends where a type should \(character 5\)"),
        ("a [b int", r"the line ends where ',' or '\]' should \(character 9\)"),
        ("a ]", r"']' stands where a type should \(character 3\)"),
        ("[a] b", r"'b' is one too many \(character 5\)"),
        ("a int b", r"'b' stands where ',' should \(character 7\)"),
        ("a x|", r"there is no value \(character 5\)"),
        ('a "b', r"a quote without an end \(character 2\)"),
        (r'"\q" int', r"is not a text as JSON writes it \(character 1\)"),
        ("a " + "[" * 99, r"nested too deep \(character \d+\)"),
        ("{", "not JSON"),
        ('{"a": NaN}', "not JSON"),
        ('{"a": 1e999}', "not JSON"),
        ('{"a": "\\ud800"}', "not UTF-8"),
        ({"a": float("inf")}, "not JSON"),
        ({"a": {1, 2}}, "not JSON"),
        ("x" * (limits.SCHEMA_FIELDS_CHARACTERS + 1), "longer than 10,000 characters"),
        ('{"a": "%s"}' % ("x" * limits.SCHEMA_BYTES), "larger than 1 MB"),
        ('{"a":' * (limits.SCHEMA_DEPTH + 1) + "1" + "}" * (limits.SCHEMA_DEPTH + 1), "deeper than 64 levels"),
        ({"enum": list(range(limits.SCHEMA_ITEMS))}, "more than 100,000 values"),
    ],
)
def test_what_is_no_schema_is_one_line_with_its_place(line: Any, words: str) -> None:
    with pytest.raises(UsageError, match=f"^--schema: .*{words}"):
        parse_schema("--schema", line)


def test_a_class_of_pydantic_is_a_schema() -> None:
    from pydantic import BaseModel

    class Receipt(BaseModel):
        shop: str
        total: float

    schema = json.loads(parse_schema("schema", Receipt))
    assert schema["required"] == ["shop", "total"]


def test_files_become_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("receipt.json").write_bytes(b'\xef\xbb\xbf{ "type":\n"object" }')
    Path("shop").write_text('{"type": "null"}')
    Path("answer.lark").write_text('// yes or no\nstart: "yes" | "no"\n')
    assert Sampling(schema="receipt.json").schema == '{"type": "object"}'
    assert Sampling(schema="shop").schema == '{"type": "null"}'  # a file goes before a field with its name
    grammar = Sampling(grammar="answer.lark").grammar
    assert grammar == Path("answer.lark").read_text()
    assert Sampling(grammar=grammar).grammar == grammar
    assert json.loads(written_schema("a row", "shop"))["properties"] == {"shop": TEXT}  # no file of somebody else's
    with pytest.raises(UsageError, match="no Lark grammar"):
        written_grammar("a row", "answer.lark")


@for_each(
    "option, content, words",
    [
        ("schema", None, "x.json: there is no such file"),
        ("grammar", None, "x.json: there is no such file"),
        ("schema", b"[1]", "x.json: not a JSON schema, which is an object"),
        ("schema", b"true", "x.json: not a JSON schema"),
        ("schema", b"{", "x.json: not JSON"),
        ("schema", b'{"\xff": 1}', "x.json: not JSON"),
        ("schema", b" " * (limits.SCHEMA_BYTES + 1), "x.json: is larger than 1,000,000 bytes"),
        ("grammar", b"begin: x", "x.json: no Lark grammar with a rule `start`"),
        ("grammar", b'start: "\xff"', "not UTF-8"),
        ("grammar", b"start: x\n" * limits.GRAMMAR_BYTES, "x.json: is larger than 100,000 bytes"),
    ],
)
def test_files_that_are_not_what_they_should_be(option: str, content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LlavaError, match=words) as error:
        Sampling(**{option: str(path)})
    assert error.value.exit_code == (2 if isinstance(error.value, UsageError) else 66)


@for_each(
    "options, words",
    [
        ({"regex": ""}, "there is no regular expression"),
        ({"regex": "a" * (limits.REGEX_CHARACTERS + 1)}, "longer than 10,000 characters"),
        ({"regex": "\udcff"}, "not UTF-8"),
        ({"grammar": 5}, "no Lark grammar"),
        ({"grammar": 'start: "a"\n' * limits.GRAMMAR_BYTES}, "larger than 100,000 bytes"),
        ({"grammar": "\n" * (limits.GRAMMAR_BYTES + 1)}, "larger than 100,000 bytes"),
        ({"regex": "a", "grammar": 'start: "a"'}, "--regex says already what an answer is"),
        ({"schema": "a", "choices": ("x", "y")}, "--choices says already what an answer is"),
        ({"schema": "a", "stop": ("x",)}, "--schema says already where an answer ends"),
    ],
)
def test_what_cannot_be_asked_for(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Sampling(**options)


def test_a_grammar_is_told_from_a_file_by_its_rule() -> None:
    for text in ('start: "a"', '!start: x\nx: "b"', "# words\n  ?start: /a/", 'A: "a"\nstart: A'):
        assert parse_grammar("--grammar", text) == text
