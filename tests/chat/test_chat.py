"""`llava chat` through a pipe: the conversation, its commands, what is kept."""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.command import Run
from helpers.faults import give_away
from helpers.homes import home
from helpers.tables import for_each
from PIL import Image

from llava_cli import Answer, Chunk, Conversation, Engine, Sampling, limits, load, open_picture
from llava_cli.chat.keyboard import keyboard
from llava_cli.chat.repl import answer_lines
from llava_cli.chat.session import Chat
from llava_cli.chat.store import SavedChat, Store
from llava_cli.errors import OutputError, PromptTooLong
from llava_cli.settings import Settings


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A yellow square on black."""
    image = Image.new("RGB", (200, 200), "black")
    image.paste("yellow", (60, 60, 140, 140))
    image.save(path := tmp_path / "other picture.png")
    return path


def test_questions_and_answers_line_by_line(run: Run, drawing: Path) -> None:
    result = run("chat", drawing, input="what is this?\n\nwhat color is the circle?\n")
    assert result.exit_code == 0
    assert result.stdout == "a red circle and a blue triangle on a white background\nred\n"
    assert result.stderr.startswith("demonstration model")
    assert run("chat", drawing, "-q", input="what is this?").stderr == ""


def test_second_picture_joins(run: Run, drawing: Path, other: Path) -> None:
    lines = ["what is this?", f"/image {other}", "what is this?", "/images"]
    result = run("chat", drawing, input="\n".join(lines))
    assert result.exit_code == 0
    _, second, *listed = result.stdout.splitlines()
    assert f"{other} (200x200) goes with the next question\n" in result.stderr
    assert second == "a yellow rectangle on a black background"
    assert listed == [f"{drawing} (300x200) with question 1", f"{other} (200x200) with question 2"]


def test_questions_about_two_pictures(run: Run, drawing: Path, other: Path) -> None:
    first = {
        "what color is the circle?": "red",
        "where is the circle?": "left",
        "how many shapes are there?": "2",
        "is there a star?": "no",
    }
    second = {
        "what color is the rectangle?": "yellow",
        "where is the rectangle?": "center",
        "how many shapes are there?": "1",
        "is there a circle?": "no",
    }
    result = run("chat", drawing, "-q", input="\n".join([*first, f"/image {other}", *second]))
    assert result.stdout.splitlines() == [*first.values(), *second.values()]


@for_each(
    "line, code, reason",
    [
        ("/image nowhere.png", 66, "no such file"),
        ("/image", 2, "which one?"),
        ("/imagee x", 2, "there is no such command\n  /image"),
        ("/xyzzy", 2, "there is no such command\n  /help"),
        ("/set temprature 1", 2, "\n  /set temperature"),
        ("/set temperature hot", 2, "'hot' is not a number"),
        ("/undo", 2, "nothing has been said yet"),
        ("/retry", 2, "nothing has been said yet"),
        ("/prompt", 2, "nothing has been said yet"),
        ("/save", 2, "to which file?"),
        ("/save /nowhere/at/all.txt", 74, "no such file or directory"),
    ],
)
def test_error_ends_a_pipe_before_the_next_question(line: str, code: int, reason: str, run: Run) -> None:
    result = run("chat", "-q", input=f"{line}\nwhat is this?\n")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("llava: ")
    assert reason in result.stderr


def test_picture_in_a_question_is_text_with_a_hint(run: Run, drawing: Path) -> None:
    result = run("chat", input=f"what is in {drawing}?\n")
    assert f"to show it: /image {drawing}" in result.stderr
    told = run("chat", drawing, input=f"what is in {drawing}?\n")
    assert "to show it" not in told.stderr


def test_conversation_is_its_familys_string(run: Run, drawing: Path) -> None:
    result = run("chat", drawing, "-q", input="what color is the circle?\nand </s> <image>?\n/prompt\n")
    first, second, *prompt = result.stdout.split("\n", 2)
    assert "\n".join(prompt) == (
        f"USER: <image>\nwhat color is the circle? ASSISTANT: {first}</s>"
        f"USER: and </s> <image>? ASSISTANT: {second}</s>\n"
    )


def test_undo_retry_clear(run: Run, drawing: Path) -> None:
    lines = ["what color is the circle?", "hm?", "/undo", "/retry", "/undo", "what is this?", "/clear", "/images"]
    result = run("chat", drawing, input="\n".join([*lines, "/exit", "not asked"]))
    assert result.exit_code == 0
    red, _, again, described, *rest = result.stdout.splitlines()
    assert (red, again) == ("red", "red")
    assert described == "a red circle and a blue triangle on a white background"  # the picture was attached again
    assert rest == ["none; /image PATH attaches one"]
    assert result.stderr.splitlines()[1:] == [
        "taken back: hm?",
        "taken back: what color is the circle?",
        "a new conversation, without pictures",
    ]


def test_set_and_system(run: Run, drawing: Path) -> None:
    lines = ["/set max_tokens 2", "what is this?", "/set max-tokens=default", "/set seed 3", "/set seed default"]
    lines += ["/set stop x=1", "/set top_p", "/system Be brief.", "/system", "/prompt", "/system none", "/system"]
    result = run("chat", drawing, input="\n".join(lines))
    assert result.exit_code == 0
    answer, top, system, prompt, *_, none = result.stdout.splitlines()
    assert (len(answer), top, system, prompt) == (len("a red"), "top_p 1.0", "Be brief.", "Be brief. USER: <image>")
    assert none == "none"
    notes = ["max_tokens 2", "max_tokens 512", "seed 3", "seed None", "stop ('x=1',)", "system text: Be brief."]
    assert result.stderr.splitlines()[1:] == [*notes, "system text: none"]


def test_stats_and_help(run: Run, drawing: Path) -> None:
    result = run("chat", drawing, "-q", input="/stats\nwhat is this?\nand this?\n/stats\n/help\n")
    assert result.stdout.startswith("no answer yet\n")
    used = next(line for line in result.stdout.splitlines() if "of context" in line)
    assert "of 1024 tokens of context" in used
    assert int(used.split("; ")[1].split()[0]) > 64  # the picture among them
    assert all(f"\n/{name}" in result.stdout for name in ("image PATH", "undo", "exit"))


def test_save_and_export(run: Run, drawing: Path, other: Path, tmp_path: Path) -> None:
    lines = ["what color is the circle?", f"/image {other}", "what is this?"]
    lines += [f"/save {tmp_path}/c.json", f"/save {tmp_path}/c.txt", f"/export {tmp_path}/c.md"]
    result = run("chat", drawing, "-q", input="\n".join(lines))
    assert result.exit_code == 0
    saved = json.loads((tmp_path / "c.json").read_text())
    assert [turn["question"] for turn in saved["turns"]] == ["what color is the circle?", "what is this?"]
    assert saved["turns"][0]["answer"] == "red"
    assert saved["turns"][1]["images"][0]["name"] == str(other)
    assert "> what color is the circle?\nred\n" in (tmp_path / "c.txt").read_text()
    markdown = (tmp_path / "c.md").read_text()
    assert "](c_pictures/2-other-picture.png)" in markdown
    with Image.open(tmp_path / "c_pictures" / "2-other-picture.png") as picture:
        assert picture.size == (200, 200)
    again = run("chat", "-q", input=f"/save {tmp_path}/c.txt\n")
    assert (again.exit_code, "is there already" in again.stderr) == (2, True)


def test_chat_goes_on(run: Run, drawing: Path, other: Path) -> None:
    run("chat", drawing, "--system", "Hm.", "-q", input="what color is the circle?\nwhat is this?\n/undo\n")
    run("chat", other, "-q", input="what is this?\n")
    listed = [line.split("\t") for line in run("chats").stdout.splitlines()]
    assert [(row[0], *row[2:]) for row in listed] == [
        ("2", "builtin", "1", "1", "what is this?"),
        ("1", "builtin", "1", "1", "what color is the circle?"),
    ]
    result = run("chat", "--resume", "1", "-q", input="what color is the triangle?\n/prompt\n")
    assert result.stdout.startswith("blue\nHm. USER: <image>\nwhat color is the circle? ASSISTANT: red</s>USER:")
    assert run("chat", "--continue", "-q", input="/images\n").stdout == f"{drawing} (300x200) with question 1\n"
    assert [line.split("\t")[0] for line in run("chats", "search", "RED").stdout.splitlines()] == ["1"]
    shown = run("chats", "show", "1").stdout
    assert shown == f"[{drawing}]\n> what color is the circle?\nred\n\n> what color is the triangle?\nblue\n\n"
    assert run("chats", "delete", "1").exit_code == 0
    assert run("chats", "show", "1").exit_code == 2
    assert len(run("chats", "list").stdout.splitlines()) == 1


def test_picture_that_changed_is_not_taken_for_the_old_one(run: Run, drawing: Path, other: Path) -> None:
    run("chat", drawing, "-q", input="what is this?\n")
    os.replace(other, drawing)
    result = run("chat", "--continue", "-q", input="what is this?\n")
    assert (result.exit_code, result.stdout) == (66, "")
    assert "it has changed\n  llava chats show 1" in result.stderr
    drawing.unlink()
    assert "no such file" in run("chat", "--continue", "-q", input="hm?\n").stderr


def test_no_save_keeps_nothing(run: Run, drawing: Path, home: Path) -> None:
    assert run("chat", drawing, "--no-save", "-q", input="what is this?\n").exit_code == 0
    assert not (home / "data").exists()
    assert run("chat", "--no-save", "--continue", input="").exit_code == 2


@pytest.mark.parametrize("words", [["--continue"], ["--resume", "7"], ["-"]])
def test_nothing_to_go_on_with(words: list[str], run: Run) -> None:
    result = run("chat", *words, input="what is this?\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 2


def test_file_that_is_no_database_is_said(run: Run, home: Path) -> None:
    (home / "data").mkdir()
    (home / "data" / "chats.db").write_bytes(b"not a database, and long enough to be read as one" * 100)
    result = run("chat", input="what is this?\n")
    assert (result.exit_code, result.stdout) == (74, "")
    assert "chats.db: file is not a database\n  --no-save" in result.stderr


def test_chats_are_for_their_owner_alone(run: Run, home: Path) -> None:
    run("chat", "-q", input="what is this?\n")
    assert os.stat(home / "data").st_mode & 0o077 == 0
    assert os.stat(home / "data" / "chats.db").st_mode & 0o077 == 0


def kept(picture: Path, name: str = "-", model: str = "m", question: str = "q?") -> Conversation:
    """A chat about a picture that has no path to come back to."""
    conversation = Conversation().ask(question, [replace(open_picture(str(picture)), name=name)]).answered("a")
    Store().save(SavedChat(), conversation, model)
    return conversation


@pytest.mark.parametrize("mask", [0, 0o022])
def test_all_that_is_kept_is_its_owners_alone(mask: int, home: Path, drawing: Path) -> None:
    umask = os.umask(mask)
    try:
        kept(drawing)
        keyboard(Store().folder / "history", str)
    finally:
        os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (home / "data").rglob("*")}
    picture = f"{open_picture(str(drawing)).sha256}.png"
    assert modes == {"chats.db": 0o600, "history": 0o600, "pictures": 0o700, picture: 0o600}
    assert (home / "data").stat().st_mode & 0o777 == 0o700
    for name in ("chats.db", "history"):
        (home / "data" / name).chmod(0o644)
    keyboard(Store().folder / "history", str)
    assert all((home / "data" / name).stat().st_mode & 0o777 == 0o600 for name in ("chats.db", "history"))


@for_each(
    "name, what",
    itertools.product(
        ["chats.db", "chats.db-journal", "chats.db-wal", "chats.db-shm", "pictures"], ["link", "dangling link", "fifo"]
    ),
    own=(home,),
)
def test_what_is_planted_among_the_chats(what: str, name: str, run: Run, home: Path, drawing: Path) -> None:
    """It is refused by name; nothing is written where a link leads, and nobody waits for a FIFO."""
    (home / "data").mkdir(mode=0o700)
    (home / "secret").write_bytes(b"mine")
    path = home / "data" / name
    if what == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("../secret" if what == "link" else "../nowhere")
    reason = "is a link to " if "link" in what else "not a "
    if name == "pictures":
        with pytest.raises(OutputError, match=f"{path}: {reason}"):
            kept(drawing)
    else:
        for command in ("chats", "chat -q"):
            result = run(*command.split(), input="what is this?\n")
            assert (result.exit_code, result.stdout) == (74, "")
            assert result.stderr.startswith(f"llava: {path}: {reason}")
            assert result.stderr.endswith("\n  --no-save keeps nothing\n")
    assert ((home / "secret").read_bytes(), (home / "nowhere").exists()) == (b"mine", False)


def test_a_planted_link_in_the_place_of_a_kept_picture(home: Path, drawing: Path) -> None:
    picture = home / "data" / "pictures" / f"{open_picture(str(drawing)).sha256}.png"
    picture.parent.mkdir(mode=0o700, parents=True)
    (home / "data").chmod(0o700)
    (home / "secret").write_bytes(b"mine")
    picture.symlink_to(home / "secret")
    with pytest.raises(OutputError, match=f"{picture}: is a link to "):
        kept(drawing)
    assert (home / "secret").read_bytes() == b"mine"


def test_a_planted_link_in_the_place_of_the_history(home: Path) -> None:
    Store()
    (home / "secret").write_bytes(b"mine")
    (home / "data" / "history").symlink_to("../secret")
    with pytest.raises(OutputError, match="history: is a link to "):
        keyboard(home / "data" / "history", str)
    assert (home / "secret").read_bytes() == b"mine"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_chats_are_not_kept_where_others_may_write(mode: int, run: Run, home: Path) -> None:
    """They could plant what SQLite takes for its own."""
    (home / "data").mkdir()
    (home / "data").chmod(mode)
    result = run("chats")
    assert (result.exit_code, result.stdout) == (74, "")
    said = f"others may write in it; chmod go-w {home / 'data'} ends that"
    assert result.stderr == f"llava: {home / 'data'}: {said}\n  --no-save keeps nothing\n"
    (home / "data").chmod(mode & ~0o022)
    assert run("chats").exit_code == 0


@pytest.mark.parametrize("name", ["data", "data/chats.db"])
def test_chats_of_another_user(name: str, run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store()
    give_away(home / name, monkeypatch)
    result = run("chats")
    assert result.exit_code == 74
    assert result.stderr.startswith(f"llava: {home / name}: belongs to another user\n")


def test_chats_on_another_disk(run: Run, home: Path, drawing: Path) -> None:
    """The user may have linked the folder there; what was kept before is found still."""
    (home / "disk").mkdir(mode=0o700)
    (home / "data").symlink_to("disk")
    kept(drawing)
    assert Store().load(1).pictures[0].name == "-"
    assert len(run("chats").stdout.splitlines()) == 1


HOSTILE = "\x1b]0;title\x07\x1b[2J\u202eevil\nsecond\tline"


def test_what_is_kept_gives_a_terminal_no_orders(run: Run, drawing: Path) -> None:
    """Models, pictures and questions of whoever they are: each chat is a line of six columns."""
    kept(drawing, f"https://example.org/{HOSTILE}", f"owner/{HOSTILE}" * 20, HOSTILE)
    (line,) = run("chats").stdout.splitlines()
    cells = line.split("\t")
    assert len(cells) == 6 and all(cell.isprintable() for cell in cells)
    assert len(cells[2]) <= limits.NAME_CHARACTERS
    with sqlite3.connect(Store().file) as database:  # as a stranger's, or of another version
        database.execute("UPDATE pictures SET name = ?", (HOSTILE,))
    first = run("chats", "show", "1").stdout.splitlines()[0]
    assert first.startswith("[\\x1b]0;title") and first.isprintable()


@for_each(
    "target, line",
    itertools.product(["secret", "nowhere"], ["/save FOLDER/c.json", "/save FOLDER/c.txt", "/export FOLDER/c.md"]),
)
def test_nothing_is_saved_through_a_link(line: str, target: str, run: Run, tmp_path: Path, drawing: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    (tmp_path / "secret").write_text("mine")
    for name in ("c.json", "c.txt", "c.md"):
        (folder / name).symlink_to(tmp_path / target)
    result = run("chat", drawing, "-q", input=f"what is this?\n{line.replace('FOLDER', str(folder))}\n")
    assert (result.exit_code, "is there already\n  choose another name" in result.stderr) == (2, True)
    assert ((tmp_path / "secret").read_text(), (tmp_path / "nowhere").exists()) == ("mine", False)
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("target", ["secret", "nowhere"])
def test_pictures_are_not_exported_through_a_link(target: str, run: Run, tmp_path: Path, drawing: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    (tmp_path / "secret").mkdir()
    (folder / "c_pictures").symlink_to(tmp_path / target)
    result = run("chat", drawing, "-q", input=f"what is this?\n/export {folder}/c.md\n")
    assert (result.exit_code, "c_pictures: is there already" in result.stderr) == (2, True)
    assert [path.name for path in folder.iterdir()] == ["c_pictures"]
    assert not list((tmp_path / "secret").iterdir())


def test_a_picture_that_is_there_twice_is_exported_once(run: Run, tmp_path: Path, drawing: Path) -> None:
    lines = ["what is this?", f"/image {drawing}", "and this?", f"/export {tmp_path}/c.md"]
    assert run("chat", drawing, "-q", input="\n".join(lines)).exit_code == 0
    assert [path.name for path in (tmp_path / "c_pictures").iterdir()] == ["1-drawing.png"]
    assert (tmp_path / "c.md").read_text().count("](c_pictures/1-drawing.png)") == 2


def test_each_turn_is_on_disk_before_the_next_question(home: Path, drawing: Path) -> None:
    kept: list[tuple[str, str]] = []

    def lines() -> Iterator[str]:
        yield "what color is the circle?\n"
        with sqlite3.connect(home / "data" / "chats.db") as database:
            kept.extend(database.execute("SELECT question, answer FROM turns"))
        yield "hm?\n"

    chat = Chat(load("builtin"), Settings(), print, lambda picture: None, Store())
    chat.attach(open_picture(str(drawing)))
    answer_lines(chat, lines())
    assert kept == [("what color is the circle?", "red")]


def test_full_context_drops_old_turns_and_keeps_pictures(run: Run, drawing: Path) -> None:
    long = "is there a red circle in the picture, " * 8
    result = run("chat", drawing, input="".join(f"{long}{n}?\n" for n in range(12)) + "/prompt\n/images\n")
    assert result.exit_code == 0
    assert "the context of 1024 tokens is nearly full" in result.stderr
    prompt = result.stdout[result.stdout.index("USER:") :]
    assert prompt.startswith("USER: <image>\nis there")
    assert 2 < prompt.count("ASSISTANT:") < 12
    assert f"{drawing} (300x200) with question 1" in result.stdout


class Counted(Engine):
    """Says how long the prompt is: a token a letter, ten a picture. Answers "no" to what is too long."""

    model, precision, device, context = "counted", "fp32", "cpu", 100

    def prompt(self, conversation: Conversation) -> str:
        parts = (f"{'p' * 10 * len(turn.pictures)}{turn.question}{turn.answer or ''}" for turn in conversation.turns)
        return "".join(parts)

    def count(self, conversation: Conversation) -> int:
        return len(self.prompt(conversation))

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Chunk]:
        if (length := self.count(conversation)) > 100:
            raise PromptTooLong("prompt", "too long")
        yield Chunk(str(length), Answer(str(length), "stop", length, 0, 1, 0.0, 0.0))

    def peak_memory(self) -> int:
        return 0


def counted(store: Store | None = None) -> tuple[Chat, list[str]]:
    notes: list[str] = []
    return Chat(Counted(), Settings(sampling=Sampling(max_tokens=20)), notes.append, lambda picture: None, store), notes


def say(chat: Chat, question: str) -> int:
    """How long the prompt was."""
    return int("".join(chunk.text for chunk in chat.ask(question)))


def test_window_slides_seldom_and_not_for_a_question_that_failed(drawing: Path) -> None:
    chat, notes = counted()
    chat.attach(open_picture(str(drawing)))
    lengths = [say(chat, "q" * 8) for _ in range(20)]
    assert max(lengths) <= 80
    assert min(lengths[1:]) >= 10 + 8  # the picture stays
    assert 2 <= len(notes) <= 6
    before = chat.prompt()
    with pytest.raises(PromptTooLong):
        say(chat, "q" * 200)
    assert chat.prompt() == before
    chat.undo()
    assert chat.prompt() in (before[: -len(before) // 9], chat.engine.prompt(chat.conversation))


def test_pictures_leave_only_where_they_alone_fill_the_context(drawing: Path) -> None:
    chat, notes = counted()
    picture = open_picture(str(drawing))
    for _ in range(12):
        chat.attach(picture)
        assert say(chat, "q") <= 80
    assert any("picture" in note for note in notes)
    chat.attached = [picture] * 7
    assert say(chat, "what are these?") >= 70


def test_two_terminals_on_one_chat_lose_nothing() -> None:
    one, _ = counted(Store())
    say(one, "a")
    number = Store().last()
    assert number is not None
    other, notes = counted(Store())
    other.resume(number, Store().load(number))
    say(one, "b")
    say(other, "c")
    assert notes == [f"chat {number} was changed elsewhere: this one goes on as chat {number + 1}"]
    assert [turn.question for turn in Store().turns(number)] == ["a", "b"]
    assert [turn.question for turn in Store().turns(number + 1)] == ["a", "c"]
    Store().delete(number + 1)
    say(other, "d")
    assert [turn.question for turn in Store().turns(number + 2)] == ["a", "c", "d"]


def test_turn_that_could_not_be_kept_is_kept_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    chat, _ = counted(store)
    say(chat, "one")
    with monkeypatch.context() as patch:
        patch.setattr(store, "save", lambda *_: (_ for _ in ()).throw(OutputError("chats.db", "disk full")))
        with pytest.raises(OutputError):
            say(chat, "two")
    say(chat, "three")
    assert [turn.question for turn in store.turns(1)] == ["one", "two", "three"]


def test_retry_leaves_new_pictures_for_the_next_question(drawing: Path) -> None:
    chat, _ = counted()
    chat.attach(open_picture(str(drawing)))
    say(chat, "one")
    chat.attach(open_picture(str(drawing)))
    list(chat.retry())
    assert (len(chat.conversation.pictures), len(chat.attached)) == (1, 1)


def test_empty_chat_is_not_kept(run: Run) -> None:
    run("chat", "-q", input="hm?\n/undo\n")
    assert run("chats").stdout == ""


def test_bytes_that_are_no_text(run: Run, tmp_path: Path, drawing: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    os.rename(drawing, path)
    result = run("chat", "-q", input=b"/image " + path + b"\nwhat is \xff this?\n")
    assert (result.exit_code, result.stderr) == (0, "")
    again = run("chat", "--continue", "-q", input="what color is the circle?\n")
    assert again.stdout == "red\n"


@for_each("line", ["/export .", "/save ~nosuch/x", "/save a\0b", "/image -", "/etc/hostname"])
def test_odd_paths_are_errors_in_a_line(line: str, run: Run) -> None:
    result = run("chat", "-q", input=f"{line}\n")
    assert result.exit_code in (2, 74)
    assert result.stderr.startswith("llava: ")
    assert "Traceback" not in result.stderr


def test_path_in_quotes(run: Run, other: Path) -> None:
    for typed in (f"'{other}'", str(other).replace(" ", "\\ ")):
        assert "yellow" in run("chat", "-q", input=f"/image {typed}\nwhat is this?\n").stdout


def test_choices_of_a_chat(run: Run, drawing: Path) -> None:
    lines = [
        *("/choices", "/choices red,green", "/choices", "what color is the circle?"),
        *("/choices star,cross --or unsure --at-least 0.999999", "what is this?", "/choices none", "is there a star?"),
    ]
    result = run("chat", drawing, "-q", input="\n".join(lines))
    assert result.stdout.splitlines() == [
        *("none; /choices A,B,C answers with one of them", "red, green", "red", "unsure", "no")
    ]
    other_order = ["/choices star,cross --at-least 0.999999 --or unsure", "what is this?"]
    assert run("chat", drawing, "-q", input="\n".join(other_order)).stdout == "unsure\n"
    assert "one is there without the other" in run("chat", drawing, "-q", input="/choices a,b --or unsure").stderr
    without = ["/set regex yes|no", "what is this?", "/set regex none", "is there a star?"]
    assert run("chat", drawing, "-q", input="\n".join(without)).stdout.splitlines()[-1] == "no"
    refused = run("chat", drawing, "-q", input="/choices red")
    assert (refused.exit_code, refused.stderr.splitlines()[0]) == (
        2,
        "llava: --choices: there has to be more than one choice",
    )
