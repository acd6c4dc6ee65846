"""Chat templates and tokenizers of strangers: programs that run within limits of time and memory, or not at all."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Run
from helpers.tables import for_each
from jinja2.defaults import DEFAULT_FILTERS
from tokenizers import Tokenizer

from llava_cli import limits
from llava_cli.errors import ModelUnusable, PromptTooLong
from llava_cli.loader import load_prompter
from llava_cli.prompts.sandbox import PIECE_CHARACTERS, TextRefused, TextSandbox, exceeds
from llava_cli.settings import LoadOptions

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what's ünïcode \U0001f600?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": 'a "quote"'}]},
    {"role": "user", "content": [{"type": "text", "text": "and <b>this</b>?"}]},
]
QUESTION = "what is this?"


@pytest.fixture
def folder(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A stranger's checkpoint, to be made hostile."""
    return shutil.copytree(checkpoint("llava-llama"), tmp_path / "model")


@pytest.fixture
def sandbox() -> Iterator[TextSandbox]:
    sandbox = TextSandbox(None)
    yield sandbox
    sandbox.end()


# Templates.

PROGRAMS = {
    "endless": "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
    "endless in a macro": "{% macro f(n) %}{% for i in range(9) %}{{ f(n) }}{% endfor %}{% endmacro %}{{ f(1) }}",
    "memory at once": "{{ 'a' * 10 ** 10 }}",
    "memory by doubling": "{% set x = namespace(v='a') %}{% for i in range(60) %}{% set x.v = x.v ~ x.v %}{% endfor %}",
    "memory by a list": "{% set x = namespace(v=[0]) %}{% for i in range(60) %}{% set x.v = x.v + x.v %}{% endfor %}",
    "memory by padding": "{{ 'x' | center(10 ** 11) }}",
    "a prompt of any length": "{{ 'a' * 20000000 }}",
    "a number without end": "{{ (10 ** 9) ** (10 ** 9) }}",
    "a regular file": "{% include '/etc/passwd' %}",
    "Python behind a string": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "Python behind a global": "{{ cycler.__init__.__globals__.os.system('id') }}",
    "Python behind a namespace": "{{ namespace.__init__.__globals__ }}",
    "Python behind an error": "{{ raise_exception.__globals__['sys'] }}",
    "deeply nested": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "an error of many lines": "{{ raise_exception('one\\n\\x1b[2Jtwo' * 1000) }}",
}


@for_each("template", PROGRAMS.values(), ids=PROGRAMS)
def test_a_template_that_is_a_hostile_program(
    template: str, sandbox: TextSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "TEMPLATE_SECONDS", 1.0)
    with pytest.raises(TextRefused) as raised:
        sandbox.render(template, MESSAGES, True, {})
    assert "\n" not in str(raised.value)
    assert "\x1b" not in str(raised.value)
    assert len(str(raised.value)) <= limits.NAME_CHARACTERS
    assert sandbox.render("{{ messages[0].role }}", MESSAGES, True, {}) == "system"  # others go on


@for_each(
    "where, name",
    itertools.product(["chat_template.jinja", "tokenizer_config.json"], ["memory at once", "Python behind a string"]),
    own=(folder,),
)
def test_the_command_says_so_in_a_line(where: str, name: str, folder: Path, run: Run, drawing: Path) -> None:
    if where.endswith(".json"):
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        config = json.loads((folder / where).read_text()) | {"chat_template": PROGRAMS[name]}
        (folder / where).write_text(json.dumps(config))
    else:
        (folder / where).write_text(PROGRAMS[name])
    result = run("ask", "-m", folder, drawing, QUESTION)
    assert result.exit_code == 69
    assert result.stderr.splitlines()[0].startswith("llava: the checkpoint's chat template: ")
    assert result.stdout == ""


def test_a_template_is_of_limited_length(folder: Path, run: Run, drawing: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}" + " " * limits.TEMPLATE_CHARACTERS)
    result = run("prompt", "-m", folder, drawing, QUESTION)
    assert result.exit_code == 69
    assert f"longer than {limits.TEMPLATE_CHARACTERS:,} characters" in result.stderr


def test_a_prompt_is_of_limited_length(sandbox: TextSandbox) -> None:
    with pytest.raises(TextRefused, match=f"a prompt of more than {limits.PROMPT_CHARACTERS:,} characters"):
        sandbox.render(f"{{{{ 'a' * {limits.PROMPT_CHARACTERS + 1} }}}}", MESSAGES, True, {})


ORDINARY = [
    "{% for m in messages %}{{ m.role }}: {{ m.content | tojson }}\n{% endfor %}",
    "{%- for m in messages -%}\n  {% if loop.first %}{% continue %}{% endif %}\n {{ m['role'] | upper }} {% endfor %}",
    "{% generation %}{{ bos_token }}{{ messages[1].content[1].text }}{% endgeneration %}{{ eos_token }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{{ messages | tojson(indent=2) }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}",
    "{{ strftime_now('%Y-%m') }}{{ 'a,b'.split(',') }}{{ messages[0].content[0].text.strip() }}",
    "    {% if true %}\n    indented\n    {% endif %}\ntrailing  \n",
    "{{ dict(a=1).a }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ 'long text to wrap' | wordwrap(5) }}{{ messages | pprint }}{{ 'x' | title | center(9) }}",
]


@for_each("template", ORDINARY)
def test_templates_render_as_with_transformers(template: str, folder: Path, sandbox: TextSandbox) -> None:
    tokenizer = load_prompter(LoadOptions(model=str(folder))).tokenizer
    for asks in (True, False):
        theirs = tokenizer.apply_chat_template(
            MESSAGES, chat_template=template, add_generation_prompt=asks, tokenize=False
        )
        assert sandbox.render(template, MESSAGES, asks, tokenizer.special_tokens_map) == theirs


@for_each("name", sorted(set(DEFAULT_FILTERS) - {"random", "tojson"}))
def test_all_filters_are_there(name: str, folder: Path, sandbox: TextSandbox) -> None:
    """Also those for which Jinja imports something only when they are used."""
    tokenizer = load_prompter(LoadOptions(model=str(folder))).tokenizer
    template = "{{ '<b>a</b> 12 b' | NAME }}".replace("NAME", name)
    try:
        theirs = tokenizer.apply_chat_template(MESSAGES, chat_template=template, tokenize=False)
    except Exception as error:
        with pytest.raises(TextRefused) as raised:
            sandbox.render(template, MESSAGES, False, {})
        assert str(raised.value).split(":")[0] == str(error).split(":")[0]
    else:
        assert sandbox.render(template, MESSAGES, False, {})[:20] == theirs[:20]


# Tokenizers.


def change(folder: Path, **parts: Any) -> None:
    """Sets parts of the tokenizer's file."""
    found = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(found | parts))


def regex(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


CATASTROPHES = {
    "a pre-tokenizer": {"pre_tokenizer": regex("(a+)+$")},
    "a pre-tokenizer in a sequence": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [regex("(a|a)*b")]}},
    "a normalizer": {"normalizer": replace({"Regex": "(a+)+$"}, "b")},
    "a normalizer that multiplies": {"normalizer": replace({"String": "a"}, "b" * 50_000_000)},
}


@for_each("parts", CATASTROPHES.values(), ids=CATASTROPHES, own=(folder,))
def test_a_tokenizer_that_takes_for_ever(
    parts: dict[str, Any], folder: Path, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "TOKENIZE_SECONDS", 3.0)
    change(folder, **parts)
    result = run("ask", "-m", folder, drawing, "a" * 60 + "!", "--max-tokens", "1", "-q")
    if result.exit_code:  # an engine that gives up by itself answers
        assert result.exit_code == 69
        assert "tokenizer" in result.stderr
        assert result.stderr.count("llava: ") == 1
    assert run("ask", drawing, QUESTION, "--max-tokens", "1", "-q").exit_code == 0


def test_an_exponential_expression_is_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one that this tokenizer's engine of expressions does not give up by itself."""
    monkeypatch.setattr(limits, "TOKENIZE_SECONDS", 1.0)
    change(folder, pre_tokenizer=regex("(x+x+)+y"))
    sandbox = TextSandbox(folder / "tokenizer.json")
    with pytest.raises(TextRefused):
        sandbox.count("x" * 3000)
    assert sandbox.count("short") > 0
    sandbox.end()


@for_each(
    "parts, reason",
    [
        ({"decoder": replace({"Regex": "(a+)+$"}, "")}, "its decoder has a regular expression, which is never run"),
        (
            {"decoder": {"type": "Sequence", "decoders": [replace({"String": "a"}, "b" * 20_000)]}},
            f"its decoder writes more than {limits.TOKEN_CHARACTERS} characters for a token",
        ),
        ({"model": "none"}, ""),
        ({"added_tokens": [{"id": -1}]}, ""),
    ],
    own=(folder,),
)
def test_a_tokenizer_that_is_not_loaded(
    parts: dict[str, Any], reason: str, folder: Path, run: Run, drawing: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change(folder, **parts)
    result = run("ask", "-m", folder, drawing, QUESTION)
    assert (result.exit_code, result.stdout) == (69, "")
    assert result.stderr.splitlines()[0].startswith(f"llava: {folder}: its tokenizer.json {reason}")
    assert capfd.readouterr() == ("", "")


def test_a_token_is_of_limited_length(folder: Path) -> None:
    found = json.loads((folder / "tokenizer.json").read_text())
    found["added_tokens"][-1]["content"] = "x" * (limits.TOKEN_CHARACTERS + 1)
    (folder / "tokenizer.json").write_text(json.dumps(found))
    sandbox = TextSandbox(folder / "tokenizer.json")
    with pytest.raises(TextRefused, match=f"a token of more than {limits.TOKEN_CHARACTERS} characters"):
        sandbox.check_tokenizer()
    sandbox.end()


def test_a_tokenizer_is_of_limited_size(folder: Path, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TOKENIZER_BYTES", 1000)
    result = run("ask", "-m", folder, drawing, QUESTION)
    assert result.exit_code == 69
    assert "its tokenizer.json is larger than 1,000 bytes" in result.stderr


def test_memory_of_a_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TEXT_MEMORY", 1 << 30)
    change(folder, normalizer=replace({"String": "a"}, "b" * 1_000_000))
    sandbox = TextSandbox(folder / "tokenizer.json")
    with pytest.raises(TextRefused, match="crashes, or takes too much memory"):
        sandbox.count("a" * 100_000)
    sandbox.end()


@for_each("data", [b"", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"null", b'{"version": "1.0"}'])
def test_what_is_no_tokenizer(
    data: bytes, folder: Path, run: Run, drawing: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing of what libraries say of it is seen."""
    (folder / "tokenizer.json").write_bytes(data)
    result = run("ask", "-m", folder, drawing, QUESTION)
    assert (result.exit_code, result.stdout) == (69, "")
    assert result.stderr.startswith(f"llava: {folder}: its tokenizer.json ")
    assert "Traceback" not in result.stderr
    assert capfd.readouterr() == ("", "")


def test_a_vocabulary_has_a_limited_number_of_added_tokens(
    folder: Path, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "ADDED_TOKENS", 2)
    result = run("prompt", "-m", folder, drawing, QUESTION)
    assert result.exit_code == 69
    assert "it has more than 2 added tokens" in result.stderr


def test_added_tokens_that_are_beginnings_of_each_other(folder: Path, run: Run, drawing: Path) -> None:
    found = json.loads((folder / "tokenizer.json").read_text())
    size = 1 + max(found["model"]["vocab"].values())
    for number in range(3000):
        found["added_tokens"].append({**found["added_tokens"][0], "id": size + number, "content": "<" + "a" * number})
    (folder / "tokenizer.json").write_text(json.dumps(found))
    result = run("prompt", "-m", folder, drawing, QUESTION)
    assert result.exit_code == 69
    assert "beginnings of each other" in result.stderr


def test_a_new_process_gets_the_tokenizer_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After one that has computed its share, or that has died."""
    sandbox = TextSandbox(folder / "tokenizer.json")
    count = sandbox.count(QUESTION)
    monkeypatch.setattr(limits, "SANDBOX_CPU_SECONDS", 0.001)
    assert sandbox.count(QUESTION) == count  # the last thing that it does
    monkeypatch.undo()
    assert sandbox.count(QUESTION) == count
    assert sandbox._worker._process
    sandbox._worker._process.kill()
    sandbox._worker._process.wait()
    assert sandbox.count(QUESTION) == count
    sandbox.end()


# Texts that are too long.


def test_a_long_text_is_not_tokenized_to_its_end(folder: Path) -> None:
    prompter = load_prompter(LoadOptions(model=str(folder)))
    from llava_cli.conversation import Conversation

    with pytest.raises(PromptTooLong, match="more than"):
        prompter.encode(Conversation().ask("word " * 1_000_000))


def test_how_much_is_tokenized_to_see_that_it_is_too_long() -> None:
    tokenizer = Tokenizer.from_file("llava_cli/builtin/tokenizer.json")
    seen = 0

    def tokenize(part: str) -> list[int]:
        nonlocal seen
        seen += len(part)
        return list(tokenizer.encode(part).ids)

    assert exceeds(tokenize, "word " * 1_000_000, 1000)
    assert seen <= 2 * PIECE_CHARACTERS
    assert not exceeds(tokenize, "word " * 10, 1000)
    assert not exceeds(tokenize, "word " * 10_000, 10**9)


def test_a_refusal_while_an_answer_is_prepared_is_the_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_cli.conversation import Conversation

    monkeypatch.setattr(limits, "TOKENIZE_SECONDS", 1.0)
    change(folder, pre_tokenizer=regex("(x+x+)+y"))
    prompter = load_prompter(LoadOptions(model=str(folder)))
    with pytest.raises(ModelUnusable, match="the checkpoint's tokenizer: "):
        prompter.encode(Conversation().ask("x" * 3000))
