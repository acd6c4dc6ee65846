"""`llava chat` at a terminal: keys, Ctrl-C, history, thumbnails."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest
from helpers.command import Run
from helpers.desktop import Copy, copy, display
from helpers.terminal import Open, Terminal

from llava_cli.models.registry import builtin_folder

__all__ = ["copy", "display"]
ENTER, ESCAPE = "\r", "\x1b"
PROMPT = "(>\x08|Question: )"  # as prompt_toolkit draws it, and as `--plain` does


@pytest.fixture
def chat(terminal: Open) -> Open:
    """Runs `llava chat ARGS` at a terminal and waits for its prompt."""

    def start(*args: str | Path) -> Terminal:
        child = terminal("chat", *args, PROMPT_TOOLKIT_NO_CPR="1")  # nobody answers where the cursor is
        if "-q" not in args:
            child.expect("Ctrl-D leaves")
        child.expect(PROMPT)
        return child

    return start


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """The built-in model, never ending an answer by itself."""
    folder = tmp_path / "endless"
    shutil.copytree(builtin_folder(), folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": []}')
    return folder


def test_keys(chat: Open, drawing: Path, run: Run) -> None:
    child = chat(drawing)
    child.send(f"what color{ESCAPE}\ris the circle?{ENTER}")  # Alt-Enter, then Enter
    child.expect(r"\[\?2004lred\r\n")
    child.send("unfinished words")
    child.expect("words")
    child.sendintr()  # takes them back, and does not leave
    child.expect(PROMPT)
    child.send("/hel\t")
    child.expect("p")  # completed
    child.send(ENTER)
    child.expect("List these commands")
    child.send(f"/image nowhere.png{ENTER}")
    child.expect("no such file")
    child.send(f"/img x{ENTER}")
    child.expect("there is no such command\r\n  /image")
    child.send("\x04")
    assert child.leave() == 0
    assert run("chats", "show", "1").stdout.endswith("> what color\n> is the circle?\nred\n\n")


def test_history_is_there_the_next_time(chat: Open, drawing: Path) -> None:
    child = chat("--no-preview")
    child.send(f"/image {drawing}{ENTER}")
    child.expect("goes with the next question")
    assert "▀" not in (child.before or "")
    child.send(f"what color is the circle?{ENTER}")
    child.expect(r"\[\?2004lred\r\n")
    child.send(f"/exit{ENTER}")
    assert child.leave() == 0
    child = chat("--continue")
    child.send(f"\x1b[A\x1b[A{ENTER}")  # up, over /exit
    child.expect(r"\[\?2004lred\r\n")


def test_ctrl_c_stops_the_answer_and_keeps_it(chat: Open, endless: Path, drawing: Path, run: Run) -> None:
    child = chat(drawing, "-m", endless, "--max-tokens", "900", "--no-preview")
    child.send(f"what is this?{ENTER}")
    child.expect("a red circle")
    child.sendintr()
    child.expect("stopped")
    child.expect(PROMPT)
    child.send(f"/set max_tokens 3{ENTER}")
    child.expect("max_tokens 3")
    child.send(f"what color is the triangle?{ENTER}")
    child.expect(r"\[\?2004lblue")
    child.send(f"/stats{ENTER}")
    read_before = r"(\d+) of them were read before"
    child.expect(read_before)
    assert child.match and int(child.match[1]) > 64
    child.expect(PROMPT)  # while it is made ready, Python's event loop can lose a Ctrl-C
    child.sendintr()
    child.expect("Ctrl-C again leaves")
    child.expect(PROMPT)
    child.sendintr()
    assert child.leave() == 0
    assert run("chats", "show", "1").stdout.startswith(f"[{drawing}]\n> what is this?\na red circle")


def test_kill_loses_only_the_turn_in_progress(chat: Open, endless: Path, drawing: Path, run: Run) -> None:
    child = chat(drawing, "-m", endless, "--max-tokens", "5", "--no-preview")
    child.send(f"what color is the circle?{ENTER}")
    child.expect(r"\[\?2004lred")
    child.expect(PROMPT)
    child.send(f"/set max_tokens 900{ENTER}")
    child.expect("max_tokens 900")
    child.send(f"what is this?{ENTER}")
    child.expect("a red circle")
    child.kill(signal.SIGKILL)
    child.expect(pexpect.EOF)
    assert run("chats", "show", "1").stdout.count("> ") == 1


def test_path_is_completed_and_the_picture_shown(chat: Open, drawing: Path) -> None:
    child = chat()
    child.send(f"/image {drawing.parent}/draw\t")
    child.expect(re.escape("ing.png"))
    child.send(ENTER)
    child.expect("▀")
    child.expect(re.escape("(300x200) goes with the next question"))


def test_model_gives_the_terminal_no_orders(chat: Open, checkpoint: Callable[[str], Path], drawing: Path) -> None:
    child = chat(drawing, "--plain", "-m", checkpoint("vip-llava"), "-p", "fp32", "--no-save", "-q")
    child.sendline("what is this?")
    child.expect("Question: ")
    said = (child.before or "").replace("\r\n", "\n")
    assert len(said) > 100
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", said)


def test_plain_draws_nothing(chat: Open, drawing: Path) -> None:
    child = chat(drawing, "--plain")
    child.sendline("what is this?")
    child.expect("background\r\n")
    assert ESCAPE not in (child.before or "")
    child.sendeof()
    assert child.leave() == 0


def test_ctrl_v_pastes_a_picture_or_text(chat: Open, copy: Copy, drawing: Path) -> None:
    child = chat("--no-preview")
    child.send("\x16")
    child.expect("llava: clipboard: is empty")
    copy(drawing, "image/png")
    child.expect(PROMPT)
    child.send("what color\x16")
    child.expect(re.escape("clipboard (300x200) goes with the next question"))
    copy(b"\x1b[31m\r\nis the circle?")
    child.expect("what color")  # drawn again below the note
    child.send(f"\x16{ENTER}")
    child.expect(r"\[\?2004lred\r\n")
    child.send(f"/images{ENTER}")
    child.expect(re.escape("clipboard (300x200) with question 1"))
    child.send(f"/exit{ENTER}")
    assert child.leave() == 0
