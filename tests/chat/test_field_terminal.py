"""What people's terminals, shells and fingers do to `llava chat` and `llava ask`.

kind | example | own variants | right value | test
--- | --- | --- | --- | ---
thumbnails | a terminal that does not answer | Kitty, Sixel, tmux, dumb, no TERM, NO_COLOR, C locale, failures | \
a picture or nothing, and nothing is asked | test_a_thumbnail_is_drawn_or_not, test_a_thumbnail_that_fails, \
test_a_picture_of_any_shape_fits
typed ahead | a letter while the model loads | three scripts, emoji, two lines, 0 x 0, 1 x 1, dumb, resized | \
the question as typed | test_what_is_typed_ahead_is_asked
pasted | two lines | behind a picture, resized while it is drawn; Kitty, Sixel | one question | \
test_what_is_pasted_behind_a_picture
closed streams | `ask >&-` | stderr, stdin, all, a full disk; other commands | 74, or the answer | test_closed_streams
words | `exit` | `quit`, `:q`, `/bye`, `help`, `?` | not asked | test_words_of_other_programs
/image lines | several pictures | a question, quotes, escapes, spaces, `file://` | attached | test_image_lines
hints | `shot\\u202fPM.png` | spaces, a quote | what is hinted is obeyed | test_a_hint_can_be_pasted
marks | UTF-8 with a mark | UTF-16, both orders, CRLF; `ask` | the command is obeyed | test_byte_order_marks
"""

from __future__ import annotations

import codecs
import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Run
from helpers.homes import home
from helpers.screen import Screen
from helpers.tables import for_each
from helpers.terminal import Open
from PIL import Image

from llava_cli import open_picture
from llava_cli.chat import thumbnail

DESCRIBED = "a red circle and a blue triangle on a white background"
KITTY, SIXEL = "\x1b_Ga=T,f=100,q=2,", "\x1bP"
ASKS = re.compile(r"\x1b\[[?>=]?[0-9;]*[cnt]|\x1b_G[^;]*a=q")  # device attributes, reports, sizes, Kitty's query


def drawn(monkeypatch: pytest.MonkeyPatch, picture: Path, encoding: str = "utf-8", **variables: str) -> str:
    """What a thumbnail writes to a terminal of which the environment says this."""
    for name in ("TERM", "TERM_PROGRAM", "COLORTERM", "NO_COLOR", "TMUX", "STY", "KONSOLE_VERSION", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    screen = Screen()
    screen.encoding = encoding
    with monkeypatch.context() as only_here:
        only_here.setattr(sys, "stdout", screen)
        only_here.setattr(sys, "stdin", None)  # whoever reads fails
        thumbnail.draw(open_picture(str(picture)))
    return screen.getvalue()


@for_each(
    "variables, begins",
    [
        ({"TERM": "xterm-256color"}, "▀"),
        ({"TERM": "linux"}, "▀"),
        ({"TERM": "xterm-kitty"}, KITTY),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, KITTY),
        ({"TERM": "foot"}, SIXEL),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, SIXEL),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "230800"}, SIXEL),
        ({"TERM": "tmux-256color", "TERM_PROGRAM": "WezTerm"}, "▀"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux-0/default,1,0"}, "▀"),
        ({"TERM": "dumb"}, None),
        ({"TERM": "unknown"}, None),
        ({"TERM": "xterm-kitty", "NO_COLOR": "1"}, None),
        ({"TERM": "xterm-256color", "encoding": "ascii"}, None),
        ({}, None),
    ],
)
def test_a_thumbnail_is_drawn_or_not(
    variables: dict[str, str], begins: str | None, drawing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = drawn(monkeypatch, drawing, **variables)
    assert begins in said if begins else said == ""
    assert (KITTY in said, SIXEL in said) == (begins == KITTY, begins == SIXEL)
    assert not ASKS.search(said)
    if begins == "▀":
        assert [line.count("▀") for line in said.splitlines()] == [30] * 10


@pytest.mark.parametrize("name", ["_half_blocks", "_cells", "_graphics_protocol"])
def test_a_thumbnail_that_fails(name: str, drawing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("a library's words")

    monkeypatch.setattr(thumbnail, name, fail)
    assert drawn(monkeypatch, drawing, TERM="xterm-256color").count("▀") == (300 if name == "_graphics_protocol" else 0)


@for_each("size, columns", itertools.product([(1, 1), (40, 4000), (4000, 40), (4000, 3000)], ["1", "20", "100"]))
def test_a_picture_of_any_shape_fits(
    size: tuple[int, int], columns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", size).save(path := tmp_path / "shape.png")
    lines = drawn(monkeypatch, path, TERM="xterm-256color", COLUMNS=columns).splitlines()
    assert 1 <= len(lines) <= 10
    assert all(1 <= line.count("▀") <= int(columns) for line in lines)


@pytest.mark.parametrize(
    "typed, variables, size",
    [
        ("what is this? é жизнь 漢字 🙂", {}, (40, 100)),
        ("жизнь", {"TERM": "xterm-kitty"}, (40, 100)),
        ("漢字", {"TERM": "foot"}, (0, 0)),
        ("first\rsecond", {"TERM": "dumb"}, (1, 1)),
    ],
)
def test_what_is_typed_ahead_is_asked(
    typed: str, variables: dict[str, str], size: tuple[int, int], terminal: Open, drawing: Path, run: Run
) -> None:
    child = terminal("chat", drawing, size=size, echo=False, **variables)
    child.send(f"{typed}\r")
    child.setwinsize(30, 90)
    child.send("/exit\r")
    code, said = child.leave(), child.before or ""
    assert code == 0, said
    assert not ASKS.search(said)
    assert "WARNING" not in said
    questions = [line[2:] for line in run("chats", "show", "1").stdout.splitlines() if line.startswith("> ")]
    assert questions == typed.split("\r")


@pytest.mark.parametrize("term", ["xterm-256color", "xterm-kitty", "foot"])
def test_what_is_pasted_behind_a_picture(term: str, terminal: Open, drawing: Path, run: Run) -> None:
    child = terminal("chat", echo=False, TERM=term)
    prompt = re.escape("\x1b[?2004h")  # from here on pastes are bracketed
    child.expect(prompt)
    child.send(f"/image {drawing}\r")
    child.setwinsize(12, 30)
    child.expect(prompt)
    child.send("\x1b[200~two lines,\nжизнь\x1b[201~\r")
    child.setwinsize(50, 160)
    child.send("/exit\r")
    assert child.leave() == 0, child.before
    assert not ASKS.search(child.before or "")
    shown = run("chats", "show", "1").stdout
    assert "> two lines,\n> жизнь\n" in shown
    assert drawing.name in shown


SAYS = {"ask": DESCRIBED, "--version": "llava", "batch": DESCRIBED}


@for_each(
    "command, redirection, code, answers",
    [
        ("ask", ">/dev/full", 74, False),
        ("ask", ">&- 2>&- <&-", 74, False),
        ("ask", "2>&- <&-", 0, True),
        ("batch", ">&-", 74, False),
        ("--version", ">&-", 74, False),
        ("--version", "2>&-", 0, True),
    ],
)
def test_closed_streams(command: str, redirection: str, code: int, answers: bool, drawing: Path) -> None:
    asked = f"{command} '{drawing}' 'what is this?'" if command in ("ask", "batch") else command
    line = f"'{sys.executable}' -m llava_cli {asked} {redirection}"
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=600)
    assert result.returncode == code, result.stderr
    assert (SAYS[command] in result.stdout) == answers
    assert "Traceback" not in result.stderr
    if code and "2>" not in redirection:
        assert result.stderr.splitlines()[-1].startswith("llava: output: ")


LEAVE = ["exit", "quit", "Exit", ":q", ":q!", ":wq", "bye", "quit()", "exit()", "\\q", "/bye", "/quit", "/q", " exit "]


@for_each("word", [*LEAVE, "help", "?", "/?", ":help"])
def test_words_of_other_programs(word: str, run: Run) -> None:
    result = run("chat", "-q", input=f"{word}\n")
    assert result.exit_code == 0
    assert ("List these commands" in result.stdout) == (word not in LEAVE)
    assert run("chats").stdout == ""  # nothing was asked


def test_a_question_that_begins_like_a_command_is_asked(run: Run, drawing: Path) -> None:
    assert run("chat", drawing, "-q", input="help me: what is this?\nexit signs?\n").stdout.count("\n") == 2


@for_each(
    "line, attached, asked",
    [
        ("{a} {b}", 2, False),
        ("{a} what is this?", 1, True),
        ('"{b}" {a} what is this?', 2, True),
        ("'{b}'", 1, False),
        ("{escaped} what is this?", 1, True),
        ("{b} what is this?", 1, True),
        ("{url}", 1, False),
        ("{url} {a}  ", 2, False),
        ("'{url}' what is this?", 1, True),
        ("~/a.png what is this?", 1, True),
    ],
    own=(home,),
)
def test_image_lines(line: str, attached: int, asked: bool, drawing: Path, home: Path, run: Run) -> None:
    a, b = home / "a.png", home / "b c.png"
    a.write_bytes(drawing.read_bytes())
    b.write_bytes(drawing.read_bytes())
    typed = line.format(a=a, b=b, escaped=str(b).replace(" ", "\\ "), url=b.as_uri())
    result = run("chat", input=f"/image {typed}\n/images\n")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == attached + asked
    assert all(line.endswith("with question 1" if asked else "with the next question") for line in lines[-attached:])


def test_one_picture_that_is_missing_attaches_none(drawing: Path, run: Run) -> None:
    result = run("chat", input=f"/image {drawing} nowhere.png\n")
    assert result.exit_code == 66
    assert "nowhere.png: no such file" in result.stderr
    assert "goes with" not in result.stderr


@for_each("name", ["shot\u202fPM.png", "two words.png", "it's.png", "line\nbreak.png"])
def test_a_hint_can_be_pasted(
    name: str, drawing: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "folder").mkdir()
    monkeypatch.chdir(folder)
    Path(name).write_bytes(drawing.read_bytes())
    missed = run("chat", input=f"/image {name[:3]}X{name[4:].replace(chr(10), '_')}\n")
    suggested = re.search(r"did you mean (.*)\?", missed.stderr)
    assert suggested
    pasted = run("chat", input=f"/image {suggested[1]}\n/images\n")
    assert pasted.stdout.count("with the next question") == 1
    assert subprocess.run(["bash", "-c", f"test -f {suggested[1]}"]).returncode == 0


@for_each(
    "encoding, mark, end",
    [
        ("utf-8", codecs.BOM_UTF8, "\n"),
        ("utf-8", codecs.BOM_UTF8, "\r\n"),
        ("utf-16-le", codecs.BOM_UTF16_LE, "\r\n"),
        ("utf-16-be", codecs.BOM_UTF16_BE, "\n"),
        ("utf-8", b"", "\r\n"),
    ],
)
def test_byte_order_marks(encoding: str, mark: bytes, end: str, drawing: Path, run: Run) -> None:
    lines = [f"/image {drawing}", "what is this?", "/exit"]
    piped = mark + "".join(line + end for line in lines).encode(encoding)
    assert run("chat", "-q", input=piped).stdout == DESCRIBED + "\n"
    assert run("ask", drawing, input=mark + f"what is this?{end}".encode(encoding)).stdout == DESCRIBED + "\n"
