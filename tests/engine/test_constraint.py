"""Answers of a given form: they fit it, whatever the model, its tokens, the other rows and the options."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import families
from helpers.command import Run
from helpers.engines import CONVERSATIONS, ours, reference, requests, same_as_alone
from helpers.other_families import OTHERS
from helpers.schemas import random_schema, validator
from helpers.tables import for_each
from tokenizers import Tokenizer, decoders, models
from transformers import LogitsProcessorList, PreTrainedTokenizerFast

from llava_cli import Answer, Conversation, Sampling, limits, load, open_picture
from llava_cli.engine import Request
from llava_cli.engine.forward import Forward
from llava_cli.engine.generate.constraint import Constraint, Grammars, check
from llava_cli.engine.generate.token_bytes import token_bytes
from llava_cli.engine.local import LocalEngine
from llava_cli.errors import ModelUnusable, UsageError

Engines = Callable[[str], LocalEngine]
Get = Callable[[str], Path]

FORMS: tuple[dict[str, Any], ...] = (
    {"schema": "color red|green|blue, count int, on date"},
    {},
    {"regex": "(yes|no|maybe)( [a-z]{3})?"},
    {"schema": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}},
    {"grammar": 'start: "(" (start | NUMBER)* ")"\nNUMBER: /[0-9]{1,3}/'},
    {"regex": " *[αβγ]+ *"},
)
CONVERSATION = CONVERSATIONS["one"]


def forms(**options: Any) -> list[Request]:
    """Questions with answers of several forms, and without one."""
    asked = requests()
    return [Request(r.conversation, Sampling(**FORMS[i % len(FORMS)], **options)) for i, r in enumerate(asked)]


def test_answers_fit_random_schemas(engines: Engines) -> None:
    """`benchmarks/schemas.py` does the same with 10,000 of them."""
    dice, engine = random.Random(7), engines("llava-llama")
    asked = [
        Request(CONVERSATION, Sampling(schema=random_schema(dice), max_tokens=200, temperature=1, seed=number))
        for number in range(60)
    ]
    finished = 0
    for number, answer in engine.answer_many(iter(asked)):
        schema = asked[number].sampling.schema
        assert isinstance(answer, Answer)
        assert schema
        if answer.finish_reason == "stop":
            finished += 1
            assert validator(schema)(answer.data), (schema, answer.text)
        else:
            assert answer.data is None
    assert finished > 40


@pytest.mark.parametrize("family", ["llava-llama", "llava-next-qwen", "smolvlm"])
def test_tokens_are_those_of_generate_with_the_others_forbidden(family: str, engines: Engines, checkpoint: Get) -> None:
    """Which are forbidden is found here by comparing texts: each has to begin one of those that fit."""
    words = [first + second for first in ("yes", "no", "né", "[", "12") for second in ("", " a", " bc", "!!", "é")]
    engine = engines(family)
    texts = token_bytes(engine.prompter.tokenizer)
    ends = engine.end_tokens

    def forbid(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = b"".join(texts[token] or b"" for token in ids[0, forbid.start :].tolist())
        left = [word.encode() for word in words if word.encode().startswith(said.removeprefix(b" "))]

        def fits(text: bytes) -> bool:
            """Whether an answer may begin so; a space before it is none of its own."""
            return any(word.startswith(text.removeprefix(b" ")) for word in left)

        may_come = [
            fits(said + text) if text else token in ends and said.removeprefix(b" ") in left
            for token, text in enumerate(texts)
        ]
        return scores.masked_fill(~torch.tensor(may_come[: scores.shape[-1]]), -torch.inf)

    pattern = "|".join(map(re.escape, words))
    for conversation in list(CONVERSATIONS.values())[:3]:
        forbid.start = engine.count(conversation)
        expected = reference(
            engine, checkpoint(family), conversation, do_sample=False, logits_processor=LogitsProcessorList([forbid])
        )
        found = ours(engine, conversation, Sampling(regex=pattern))
        assert found == expected[: len(found)]
        assert set(expected[len(found) :]) <= ends  # ours ends where nothing else can follow


@pytest.mark.parametrize("size", [None, 3])
def test_a_batch_of_several_forms_gives_the_answers_of_each_alone(size: int | None, engines: Engines) -> None:
    same_as_alone(engines("llava-llama"), forms(max_tokens=40), size)
    same_as_alone(engines("llava-llama"), forms(max_tokens=40, temperature=1.0, seed=3), size)


def test_answers_fit_their_form(engines: Engines) -> None:
    engine = engines("llava-llama")
    for options in FORMS:
        for seed in range(4):
            answer = engine.answer(CONVERSATION, Sampling(**options, max_tokens=300, temperature=1.0, seed=seed))
            *chunks, last = engine.stream(CONVERSATION, Sampling(**options, max_tokens=300, temperature=1.0, seed=seed))
            assert "".join(chunk.text for chunk in [*chunks, last]) == answer.text
            if "regex" in options and answer.finish_reason == "stop":
                assert re.fullmatch(options["regex"], answer.text)  # outer spaces too
            if "schema" in options and answer.finish_reason == "stop":
                assert answer.data == json.loads(answer.text)
                assert answer.details()["data"] == answer.data


def test_out_of_memory_starts_rows_over(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, decode, calls = engines("llava-llama"), Forward.decode, iter(range(10_000))
    asked = forms(max_tokens=40)
    alone = [engine.answer(request.conversation, request.sampling).text for request in asked]

    def failing(self: Forward, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if next(calls) in (3, 9):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return decode(self, *args)

    monkeypatch.setattr(Forward, "decode", failing)
    found = dict(engine.answer_many(iter(asked), 8))
    assert [found[number].text for number in range(len(asked))] == alone  # type: ignore[union-attr]


def test_what_is_cut_off_has_no_data(engines: Engines) -> None:
    answer = engines("llava-llama").answer(CONVERSATION, Sampling(schema="color red|green", max_tokens=5))
    assert (answer.finish_reason, answer.answer_tokens, answer.data) == ("length", 5, None)
    whole = '{"color": "red"}'
    answer = engines("llava-llama").answer(CONVERSATION, Sampling(regex=re.escape(whole), max_tokens=len(whole) + 1))
    assert (answer.finish_reason, answer.text) == ("stop", whole)
    assert answer.answer_tokens <= len(whole) + 1  # a space, and no end token: nothing else could follow


@for_each(
    "config",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": list(range(200))},
        {"forced_eos_token_id": 256},
        {"min_new_tokens": 30},
        {"stop_strings": ["o", '"']},
        {"top_k": 3},
        {"bad_words_ids": [[ord("y") - 33]]},
    ],
)
def test_options_of_a_checkpoint_do_not_break_a_form(
    config: dict[str, Any], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines("llava-llama")
    for name, value in config.items():
        monkeypatch.setattr(engine.network.generation_config, name, value, raising=False)
    for temperature in (0.0, 1.0):
        sampling = Sampling(regex="(yes yes|no no no)", max_tokens=30, temperature=temperature, seed=1, top_p=0.01)
        answer = engine.answer(CONVERSATION, sampling)
        assert answer.text in ("yes yes", "no no no")
        assert answer.finish_reason == "stop"


def test_a_model_that_reads_each_prompt_by_itself(tmp_path: Path) -> None:
    engine = load(str(families.save_made(OTHERS["mllama"], tmp_path)), precision="fp32", device="cpu")
    asked = [Request(r.conversation, r.sampling) for r in forms(max_tokens=30)[:4]]
    same_as_alone(engine, asked, None)
    answer = engine.answer(asked[0].conversation, Sampling(schema="color red|blue", max_tokens=60))
    assert answer.data in ({"color": "red"}, {"color": "blue"})


def constraint(tokens: list[bytes | None], **options: Any) -> Constraint:
    return Grammars(tokens, [len(tokens) - 1]).constraint(Sampling(**options))


def allowed(one: Constraint, width: int) -> list[int]:
    """The ids of the tokens that may come next."""
    return [int(i) for i in one.mask(torch.zeros(1, width))[0].isfinite().nonzero()]


def test_a_first_token_may_have_a_space_that_is_not_the_answers() -> None:
    tokens = [b" yes", b"yes", b" ", b" no", b"no", b"!", b" !", None]
    one = constraint(tokens, regex="(yes|no)!")
    assert allowed(one, 10) == [0, 1, 2, 3, 4]
    assert one.append(0) == "yes"
    assert allowed(one, 10) == [5]
    one.restart()
    assert one.append(2) == ""
    assert allowed(one, 10) == [1, 4]
    one = constraint(tokens, regex=" (yes|no)!")
    assert allowed(one, 10) == [0, 2, 3]
    assert one.append(0) == " yes"  # here the space is the answer's


def test_characters_of_several_tokens_are_shown_whole() -> None:
    one = constraint([bytes([byte]) for byte in range(256)] + [None], regex="é🙂")
    assert [one.append(byte) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert one.stopped


def test_a_model_without_the_tokens_that_a_form_needs() -> None:
    one = constraint([b"a", b"b", None], regex="ab|ac")
    one.append(0)
    assert allowed(one, 3) == [1]
    one = constraint([b"a", b"b", None], regex="ab?c")
    one.append(0)
    one.append(1)
    one.mask(torch.zeros(1, 3))
    assert one.stopped
    with pytest.raises(UsageError, match=r"--regex: the answer cannot go on after 2 characters: .*"):
        one.data("ab")


def test_one_row_that_cannot_go_on_leaves_the_others(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engines("llava-llama")
    texts = [None if text == b"7" else text for text in token_bytes(engine.prompter.tokenizer)]
    monkeypatch.setattr(engine, "grammars", Grammars(texts, engine.end_tokens), raising=False)
    asked = [Request(CONVERSATION, Sampling(regex=regex, max_tokens=9)) for regex in ("no 7", "no 8", "[a-z]{4}")]
    found = dict(engine.answer_many(iter(asked)))
    assert isinstance(found[0], UsageError)
    assert found[1].text == "no 8"  # type: ignore[union-attr]
    assert re.fullmatch("[a-z]{4}", found[2].text)  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="cannot go on after 3 characters"):
        list(engine.stream(CONVERSATION, asked[0].sampling))
    assert engine.answer(CONVERSATION, asked[1].sampling).text == "no 8"


@for_each(
    "decoder, word, text",
    [
        (decoders.ByteLevel(), "Ġcafé", b" caf\xe9"),
        (decoders.ByteLevel(), "ĠĊ", b" \n"),
        (decoders.Metaspace(), "▁x", b" x"),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), "<0x0A>", b"\n"),
        (
            decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Strip(" ", 1, 0)]),
            "▁",
            b" ",
        ),
        (decoders.WordPiece(), "##x", None),
        (decoders.Sequence([decoders.Replace("x", "y"), decoders.ByteFallback()]), "x", None),
        (decoders.CTC(), "x", None),
        (None, "x", None),
    ],
)
def test_the_bytes_of_tokens(decoder: Any, word: str, text: bytes | None) -> None:
    core = Tokenizer(models.WordLevel({word: 0, "<unk>": 1}, unk_token="<unk>"))
    if decoder:
        core.decoder = decoder
    core.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    if text is None:
        with pytest.raises(ModelUnusable, match="joins tokens in a way for which --schema"):
            token_bytes(tokenizer)
    else:
        assert token_bytes(tokenizer)[0] == text
        assert token_bytes(tokenizer)[2] is None


def accepts(text: str, **options: Any) -> bool:
    """Whether an answer can be this text."""
    one = constraint([bytes([byte]) for byte in range(256)] + [None], **options)
    for byte in text.encode():
        if byte not in allowed(one, 257):
            return False
        one.append(byte)
    return 256 in allowed(one, 257)


@for_each(
    "name, right, wrong",
    [
        ("date", ["2024-02-29", "2000-02-29", "0001-12-31"], ["2023-02-29", "1900-02-29", "0000-01-01", "2023-04-31"]),
        ("time", ["23:59:59Z", "00:00:00.123456+23:59"], ["23:59:60Z", "24:00:00Z", "10:00Z", "10:00:00"]),
        ("date-time", ["2024-02-29T01:02:03Z"], ["2023-02-29T01:02:03Z", "2024-02-29t01:02:03Z", "2024-02-29"]),
        ("email", ["a.b+c@ex-ample.org"], ["a@b@c", "@a", "a..b@c", "x" * 70 + "@a", "a@b--c"]),
        ("hostname", ["a-b.example.org"], ["-a", "a-", "a..b", "xn--a"]),
        ("unheard-of", ["anything"], []),
    ],
)
def test_formats_are_kept_as_strict_validators_have_them(name: str, right: list[str], wrong: list[str]) -> None:
    schema = {"type": "string", "format": name}
    check_value = validator(json.dumps(schema))
    for text in right:
        assert accepts(json.dumps(text), schema=schema), text
        assert check_value(text)
    for text in wrong:
        assert not accepts(json.dumps(text), schema=schema), text


def test_an_object_has_its_own_names_unless_its_schema_speaks_of_others() -> None:
    plain = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
    more = '{"a": null, "b": 1}'
    assert not accepts(more, schema=plain)
    assert not accepts(f"[{more}]", schema={"items": {"$ref": "#/$defs/x"}, "type": "array", "$defs": {"x": plain}})
    for schema in (
        plain | {"additionalProperties": True},
        {"allOf": [plain, {"type": "object", "properties": {"b": {"type": "integer"}}}]},
        {"$ref": "#/$defs/x", "properties": {"b": {}}, "$defs": {"x": plain}},
        {"anyOf": [plain], "properties": {"b": {}}},
        {"type": "object", "properties": {"a": {}}, "required": ["a", "b"]},
    ):
        assert accepts(more, schema=schema), schema


def test_json_is_written_in_one_way() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    assert accepts('{"a": 1, "b": "é\\n"}', schema=schema)
    for text in ('{"a":1}', '{ "a": 1}', '{"a": 1, "\\u0061": "x"}', '{"a": 1, "a": "x"}', '{"a": 1}\n'):
        assert not accepts(text, schema=schema), text
    assert not accepts('{"a"=1}', schema=schema | {"x-guidance": {"key_separator": "="}})
    assert accepts("1", regex=r"\d")
    assert not accepts("٣", regex=r"\d")
    assert accepts("a/b\n", regex="a/b\n")


def test_numbers_that_no_float_can_be_are_the_largest_one(engines: Engines) -> None:
    largest = 1.7976931348623157e308
    for text, number in (("1e999", largest), ("-1e999", -largest), ("9" * 500, largest), ("9" * 5000, largest)):
        one = constraint([bytes([byte]) for byte in range(256)] + [None], schema={"type": "number"})
        assert one.data(text) == number
        json.dumps(one.data(text), allow_nan=False)
    assert one.data("12345678901234567890") == 12345678901234567890


def chain(length: int) -> dict[str, Any]:
    """A schema of objects in objects, each by a reference; a stack without bounds would end at three times as many."""
    inner = {f"a{i}": {"properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(length)}
    return {"$defs": inner | {f"a{length}": {"type": "null"}}, "$ref": "#/$defs/a0"}


def named(keyword: str, count: int) -> dict[str, Any]:
    return {"type": "object", keyword: {f"^a{i}$": {"type": "null"} for i in range(count + 1)}}


def rules(length: int) -> str:
    return "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(length)) + f'a{length}: "x"'


@for_each(
    "options, words",
    [
        ({"schema": {"not": {}}}, '--schema: "not" cannot be kept'),
        ({"schema": {"type": "array", "uniqueItems": True}}, '"uniqueItems" cannot be kept'),
        ({"schema": {"type": "array", "contains": {}}}, '"contains" cannot be kept'),
        ({"schema": {"if": {}}}, '"if" cannot be kept'),
        ({"schema": {"x-guidance": {"lenient": True}, "items": {"not": {}}}}, '"not" cannot be kept'),
        ({"schema": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "oneOf can be kept only where"),
        ({"schema": {"$ref": "http://example.org/x"}}, "'http://example.org/x' is elsewhere, and not fetched"),
        ({"schema": {"$ref": "#/$defs/x"}}, r"pointer '/\$defs/x' does not exist"),
        ({"schema": {"type": "objekt"}}, "invalid type: objekt"),
        ({"schema": {"properties": 5}}, "properties must be an object"),
        ({"schema": {"enum": []}}, "no answer can satisfy it: anyOf is empty"),
        ({"schema": {"type": "integer", "minimum": 2, "maximum": 1}}, r"no answer can .*: minimum \(2\) is greater"),
        ({"schema": {"type": "string", "pattern": "^a$", "minLength": 2}}, "no text fits it"),
        ({"schema": {"type": "string", "format": "date", "pattern": "^x"}}, "no text fits it"),
        ({"schema": {"type": "string", "format": "iri"}}, "the format 'iri' cannot be kept"),
        ({"schema": {"type": "string", "pattern": "(?!a)b"}}, "look-around, .*, is not supported"),
        ({"schema": {"minProperties": 2}}, "minProperties can only be kept by names that are required"),
        ({"schema": {"type": "integer", "multipleOf": limits.SCHEMA_MULTIPLE + 3}}, "multipleOf has too many digits"),
        ({"schema": {"allOf": [{"multipleOf": n} for n in (7919, 7.907, -79.01)]}}, "multipleOf has too many"),
        ({"schema": {"$ref": "#"}}, "never ends"),
        ({"schema": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}}, "never ends"),
        ({"schema": named("properties", limits.SCHEMA_PROPERTIES)}, "an object with more than 1,000 properties"),
        ({"schema": {"allOf": [named("patternProperties", limits.SCHEMA_PATTERNS)]}}, "more than 64 patternProp"),
        ({"schema": chain(limits.SCHEMA_REF_DEPTH)}, "its [$]refs nest more than 256 levels"),
        ({"regex": "("}, "--regex: unclosed group"),
        ({"regex": r"a\b"}, r"--regex: look-around, such as \\b, is not supported"),
        ({"regex": r"(a)\1"}, "--regex: backreferences are not supported"),
        ({"grammar": "start: x"}, '--grammar: line 1, column 8: unknown name: "x"'),
        ({"grammar": 'start: "a'}, "--grammar: line 1, column 10: lexer error"),
        ({"grammar": 'start: <image> "a"'}, "<image> is a special token, and an answer is text"),
        ({"grammar": "start: <[5]>"}, "special token"),
        ({"grammar": "start: start"}, "no text fits it"),
        ({"grammar": 'start: %json {"not": {}}'}, '--grammar: "not" cannot be kept'),
        ({"grammar": "start: %json [1]"}, "what follows %json is no JSON schema"),
        ({"grammar": 'start: %json {"a"'}, "what follows %json is not JSON"),
        ({"grammar": rules(limits.GRAMMAR_RULES)}, "more than 500 rules and terminals"),
        ({"grammar": 'start: "b"\n' + "a" * 90_000}, "--grammar: "),  # takes minutes where each letter begins a search
        ({"grammar": 'start: "b"\n' + "a[" * 45_000}, "--grammar: "),
    ],
)
def test_what_cannot_be_kept_is_said_without_a_model(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        check(Sampling(**options))
    assert error.value.hint


@for_each("option, value", [("--schema", '{"not": {}}'), ("--regex", "("), ("--grammar", "start: x")])
def test_commands_say_so_before_they_load_or_write_anything(
    option: str, value: str, run: Run, drawing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_cli.loader.load_engine", None)
    for command in (["ask"], ["batch", "-o", tmp_path / "out.jsonl"]):
        result = run(*command, drawing, "a?", option, value)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"llava: {option}: ")
        assert result.stderr.count("\n") == 2  # the error and the hint
    assert list(tmp_path.iterdir()) == []


def test_a_form_that_needs_too_many_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GRAMMAR_STATES", 10)
    with pytest.raises(UsageError, match=r"--regex: .*too many states"):
        constraint([bytes([byte]) for byte in range(256)] + [None], regex="(abc|bcd|cde){1,30}")


def test_what_only_looks_wrong() -> None:
    check(Sampling(schema=chain(60)))
    check(Sampling(grammar=rules(300)))
    check(Sampling(schema=named("patternProperties", 60)))
    tree = {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["next"],
    }
    check(Sampling(schema=tree))
    for grammar in ('start: "<image>"', "start: /<b>/", 'start: "a" // <image>\n', 'start: %json {"const": "<image>"}'):
        check(Sampling(grammar=grammar))


def test_rows_have_their_data(run: Run, drawing: Path, tmp_path: Path) -> None:
    schema = "color red|blue, shapes [circle|triangle]"
    result = run("batch", drawing, drawing, "what?", "--schema", schema, "--max-tokens", 60, "-o", tmp_path / "o.jsonl")
    assert result.exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["data"] == json.loads(row["answer"])
        assert row["finish_reason"] == "stop"
    settings = next(path for path in tmp_path.rglob("settings.json"))
    assert json.loads(json.loads(settings.read_text())["schema"])["required"] == ["color", "shapes"]
    shown = run("ask", drawing, "what?", "--schema", schema, "--max-tokens", 60, "--json")
    assert json.loads(shown.stdout)["data"] == rows[0]["data"]
    short = run("ask", drawing, "what?", "--schema", schema, "--max-tokens", 3)
    assert "cut off after 3 tokens, so it is not complete; --max-tokens N allows more" in short.stderr
    cut = run("batch", drawing, "what?", "--schema", schema, "--max-tokens", 3)
    row = json.loads(cut.stdout)
    assert "data" not in row
    assert "cut_off" in row["flags"]


def test_a_space_that_a_model_puts_before_its_answer_is_no_obstacle(drawing: Path) -> None:
    """The built-in model's token for "yes" begins with a space, and there is none without it."""
    engine, picture = load(), [open_picture(str(drawing))]
    forms: list[dict[str, Any]] = [
        {"regex": "(yes|no|maybe)"},
        {"grammar": 'start: "yes" | "no"'},
        {"grammar": "start: / ?(yes|no)/"},
    ]
    for question, answer in (("is there a circle?", "yes"), ("is there a star?", "no")):
        talk = Conversation().ask(question, picture)
        for form in forms:
            assert engine.answer(talk, Sampling(**form)).text.strip() == answer
