"""The commands of a chat, such as /image: a table of small functions."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_cli import files, render
from llava_cli.chat.export import export, save
from llava_cli.chat.session import Chat
from llava_cli.choices import parse_choices
from llava_cli.conversation import Picture
from llava_cli.engine import Chunk
from llava_cli.errors import InputMissing, UsageError
from llava_cli.images.reader import SUFFIXES, Opened, is_url, local_path, open_chosen
from llava_cli.images.remote_names import is_cloud_url
from llava_cli.parts import split_reference
from llava_cli.settings import GRAMMAR_OPTIONS, OPTIONS, PictureOptions, Sampling
from llava_cli.untrusted_text import printable

Result = str | Generator[Chunk, None, None] | None
"""Lines to print, an answer to show, or None."""


class Leave(Exception):
    """Ends the chat."""


@dataclass(frozen=True)
class Command:
    run: Callable[[Chat, str], Result]
    takes: str
    help: str


_ALIASES = {
    **dict.fromkeys(("exit", "exit()", "quit", "quit()", "bye", ":q", ":q!", ":wq", ":quit", "\\q"), "/exit"),
    **dict.fromkeys(("/bye", "/quit", "/q"), "/exit"),
    **dict.fromkeys(("help", "help()", "?", ":help", ":h", "\\?", "/?", "/h"), "/help"),
}
"""What people type in other programs to leave or to get help."""


def parse_command(line: str) -> str | None:
    """The command that a line contains, such as "/image a.png"; None if it is a question."""
    return _ALIASES.get(line.strip().lower()) or (line if line.startswith("/") else None)


def run_command(chat: Chat, line: str) -> Result:
    """Runs `/NAME ARGUMENTS`. Raises `UsageError` for an unknown name, with the most similar one as a hint."""
    name, _, arguments = line[1:].partition(" ")
    if name not in COMMANDS:
        if os.path.isfile(path := _path(line)):
            raise UsageError(printable(path), "a picture is attached by a command", f"/image {files.quoted(path)}")
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        raise UsageError(f"/{printable(name)}", "there is no such command", f"/{near[0]}" if near else "/help")
    return COMMANDS[name].run(chat, arguments.strip())


def unattached_picture(chat: Chat, question: str) -> str | None:
    """The quoted path of a picture that a question mentions and that is not attached: only /image attaches one."""
    shown = {os.path.abspath(picture.name) for picture in (*chat.conversation.pictures, *chat.attached)}
    for word in (question, *question.split()):
        path = _path(word.strip("\"'`,;:?!()<> ").rstrip("."))
        full = os.path.abspath(path)
        if path.lower().endswith(SUFFIXES) and full not in shown and os.path.isfile(full):
            return files.quoted(path)
    return None


def _path(typed: str) -> str:
    """A path as it was typed, dropped on the terminal from a file manager, or pasted from a hint."""
    path = os.path.expanduser(typed)
    if os.path.lexists(path):
        return path
    if _ANSI_C.fullmatch(typed):
        text = typed[2:-1].encode()
        return os.fsdecode(re.sub(rb"\\x([0-9a-f]{2})", lambda code: bytes([int(code[1], 16)]), text))
    with suppress(ValueError):
        words = shlex.split(typed)
        path = os.path.expanduser(words[0]) if len(words) == 1 else path
    with suppress(InputMissing):  # a file: URL of another machine; opening it fails with the reason
        path = local_path(path)
    return path


_ANSI_C = re.compile(r"\$'(?:[ -&(-\[\]-~]|\\x[0-9a-f]{2})*'")
"""A name that is not printable, as `files.quoted` writes it."""
_WORD = re.compile(r"""(?:\$'[^']*'|"(?:[^"\\]|\\.)*"|'[^']*'|\\.|\S)+""")
_MAX_PATH = 4096
"""Linux' PATH_MAX."""


def _pictures_and_question(typed: str) -> tuple[list[str], str]:
    """The arguments of /image: paths or URLs, and a question about them, which may be empty."""
    pictures: list[str] = []
    while typed and (length := _picture_length(typed, not pictures)):
        pictures.append(_path(typed[:length]))
        typed = typed[length:].lstrip()
    return pictures, typed


def _picture_length(typed: str, is_first: bool) -> int:
    """How much of `typed` names a picture: the longest prefix that is a file, with spaces or without, or a word that
    looks like a picture; 0 if the question begins here."""
    word = _WORD.match(typed, 0, _MAX_PATH)
    ends = [match.start() for match in re.finditer(r"(?<=\S)(?=\s|$)", typed[:_MAX_PATH])]
    for end in reversed(ends):
        is_word = word is not None and end == word.end()
        if _is_file(_path(typed[:end]) if is_word else os.path.expanduser(typed[:end])):
            return end
    if not word:
        return len(typed) if is_first else 0
    path = _path(word[0])
    is_named = is_url(path) or is_cloud_url(path) or path[:5].lower() == "file:"
    if is_named or split_reference(path)[0].lower().endswith(SUFFIXES):
        return word.end()
    return len(typed) if is_first else 0


def _is_file(path: str) -> bool:
    """Whether it names a file, or a page or frame of one."""
    return os.path.isfile(path) or os.path.isfile(split_reference(path)[0])


def _image(chat: Chat, typed: str) -> Result:
    paths, rest = _pictures_and_question(typed)
    if not paths or "-" in paths:
        raise UsageError("/image", "which one?", "/image PATH")
    options, question = _options_and_question(chat.picture_options, rest)
    opened = [open_chosen(path, options) for path in paths]  # before any is attached: all of them or none
    _attach(chat, opened, is_asked=bool(question))
    return chat.ask(question) if question else None


def _options_and_question(options: PictureOptions, typed: str) -> tuple[PictureOptions, str]:
    """The options after a command's pictures, `--pages 1-3`, and the question behind them."""
    given: dict[str, Any] = {}
    while match := _PICTURE_OPTION.match(typed):
        given[match[1]] = OPTIONS[match[1]].convert(f"--{match[1]}", match[2])
        typed = typed[match.end() :]
    if "frames" in given or "every" in given:  # each of them takes the place of the other
        given = {"frames": None, "every": None} | given
    return replace(options, **given), typed


_PICTURE_OPTION = re.compile(rf"--({'|'.join(PictureOptions.names())})(?:=|\s+)(\S+)\s*")


def _attach(chat: Chat, opened: Iterable[Opened], is_asked: bool) -> None:
    """Attaches pictures, with a note of each unless the question follows in the same line."""
    for one in opened:
        for picture in one.pictures:
            chat.attach(picture)
            if not is_asked:
                chat.note(f"{_description(picture)} goes with the next question")
        for note in one.notes:
            chat.note(note)


def _paste(chat: Chat, typed: str) -> Result:
    from llava_cli.images.clipboard import open_clipboard

    return _take(chat, typed, open_clipboard)


def _screen(chat: Chat, typed: str) -> Result:
    from llava_cli.images.screen import open_screen

    return _take(chat, typed, open_screen)


def _take(chat: Chat, typed: str, take: Callable[[PictureOptions], Opened]) -> Result:
    options, question = _options_and_question(chat.picture_options, typed)
    _attach(chat, [take(options)], is_asked=bool(question))
    return chat.ask(question) if question else None


def paste(chat: Chat) -> str:
    """Attaches the picture on the clipboard; without one, returns the text there, which may be empty.

    Raises a `LlavaError` if there is neither.
    """
    from llava_cli.images.clipboard import NoPicture, clipboard_text, open_clipboard

    try:
        opened = open_clipboard(chat.picture_options)
    except NoPicture:
        if text := clipboard_text():
            return text
        raise
    _attach(chat, [opened], is_asked=False)
    return ""


def _region(chat: Chat, typed: str) -> Result:
    if not typed:
        return _REGION_HELP
    region, question = _REGION.fullmatch(typed).groups()  # type: ignore[union-attr]  # it matches any text
    is_in_place = bool(chat.attached)
    picture = chat.look_at(region)
    if not question:
        place = "in the place of all of it" if is_in_place else "besides what was shown before"
        chat.note(f"{_description(picture)} goes with the next question, {place}")
    return chat.ask(question) if question else None


_REGION = re.compile(r"((?:[^,\s]+\s*,\s*){3}\S+|\S+)\s*(.*)", re.DOTALL)
_REGION_HELP = """\
/region LEFT,TOP,RIGHT,BOTTOM [QUESTION]: a part of the last picture, in pixels or percent, in full resolution
/region 60%,0,100%,30% what does the sign say?   the right of the top"""


def _images(chat: Chat, _: str) -> Result:
    pictures = [(p, f"question {n}") for n, turn in enumerate(chat.conversation.turns, 1) for p in turn.pictures]
    pictures += [(p, "the next question") for p in chat.attached]
    lines = [f"{_description(picture)} with {question}" for picture, question in pictures]
    return "\n".join(lines) or "none; /image PATH attaches one"


def _description(picture: Picture) -> str:
    return f"{printable(picture.label)} ({picture.image.width}x{picture.image.height})"


def _clear(chat: Chat, _: str) -> Result:
    chat.clear()
    chat.note("a new conversation, without pictures")
    return None


def _undo(chat: Chat, _: str) -> Result:
    chat.note(f"taken back: {chat.undo()}")
    return None


def _retry(chat: Chat, _: str) -> Result:
    return chat.retry()


def _set(chat: Chat, arguments: str) -> Result:
    name, *values = re.split("[ =]", arguments, maxsplit=1)
    names = [name for name in Sampling.names() if name not in ("choices", "otherwise", "at_least")]  # see /choices
    if not name:
        return "\n".join(f"{name} {getattr(chat.sampling, name)}" for name in names)
    name = name.replace("-", "_")
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise UsageError(f"/set {printable(name)}", f"not one of {', '.join(names)}", f"/set {near[0]}" if near else "")
    if value := "".join(values).strip():
        is_default = value == "default" or (value == "none" and name in GRAMMAR_OPTIONS)
        unset = chat.sampling.unset - {name}
        change: dict[str, Any] = {name: getattr(Sampling(), name) if is_default else value}
        chat.sampling = replace(chat.sampling, **change, unset=unset | {name} if is_default else unset)
        chat.note(f"{name} {getattr(chat.sampling, name)}")
        return None
    return f"{name} {getattr(chat.sampling, name)}"


def _choices(chat: Chat, typed: str) -> Result:
    if not typed:
        return ", ".join(chat.sampling.choices) or "none; /choices A,B,C answers with one of them"
    words, *rest = _CHOICE_OPTIONS.split(typed)
    given = dict(zip(rest[::2], rest[1::2], strict=True))
    choices = () if words == "none" else parse_choices("/choices", words)
    at_least = OPTIONS["at_least"].convert("--at-least", given["at-least"]) if "at-least" in given else None
    chat.sampling = replace(chat.sampling, choices=choices, otherwise=given.get("or"), at_least=at_least)
    chat.note(f"choices: {', '.join(choices) or 'none'}")
    return None


_CHOICE_OPTIONS = re.compile(r"\s+--(or|at-least)(?:\s+|$)")


def _system(chat: Chat, text: str) -> Result:
    if not text:
        return chat.conversation.system or "none"
    chat.set_system(None if text == "none" else text)
    chat.note(f"system text: {chat.conversation.system or 'none'}")
    return None


def _prompt(chat: Chat, _: str) -> Result:
    return chat.prompt()


def _save(chat: Chat, path: str) -> Result:
    return _write(chat, path, "/save", save)


def _export(chat: Chat, path: str) -> Result:
    return _write(chat, path, "/export", export)


def _write(chat: Chat, path: str, command: str, write: Callable[..., None]) -> Result:
    if not path:
        raise UsageError(command, "to which file?", f"{command} FILE")
    write(chat.conversation, chat.engine.model, Path(os.path.expanduser(path)))
    chat.note(f"written: {printable(path)}")
    return None


def _stats(chat: Chat, _: str) -> Result:
    if chat.last is None:
        return "no answer yet"
    used = chat.last.prompt_tokens + chat.last.answer_tokens
    context = f"{used} of {chat.engine.context} tokens of context" if chat.engine.context else f"{used} tokens"
    return f"{render.stats(chat.last, chat.engine)}\n{context}; {chat.last.cached_tokens} of them were read before"


def _help(chat: Chat, _: str) -> Result:
    width = max(len(f"{name} {command.takes}") for name, command in COMMANDS.items())
    return "\n".join(f"/{f'{name} {command.takes}':{width}}  {command.help}" for name, command in COMMANDS.items())


def _exit(chat: Chat, _: str) -> Result:
    raise Leave


COMMANDS = {
    "image": Command(_image, "PATH... [QUESTION]", "Attach pictures to the next question, or to this one."),
    "paste": Command(_paste, "[QUESTION]", "Attach the picture on the clipboard; so does Ctrl-V."),
    "screen": Command(_screen, "[QUESTION]", "Attach a picture of the screen."),
    "region": Command(_region, "L,T,R,B [QUESTION]", "Look at a part of the last picture: /region 60%,0,100%,30%"),
    "images": Command(_images, "", "List the pictures of this conversation."),
    "clear": Command(_clear, "", "Begin a new conversation."),
    "undo": Command(_undo, "", "Take back the last question and its answer."),
    "retry": Command(_retry, "", "Ask the last question again."),
    "set": Command(_set, "[NAME [VALUE]]", "Show or change how answers are made: /set temperature 0.7"),
    "choices": Command(_choices, "[A,B,C [--or WORD --at-least P]]", "Answer with one of these; /choices none."),
    "system": Command(_system, "[TEXT]", "Show or change the instructions before the conversation; /system none."),
    "prompt": Command(_prompt, "", "Print the conversation exactly as the model reads it."),
    "stats": Command(_stats, "", "Print what the last answer took."),
    "save": Command(_save, "FILE", "Write the conversation as text, or as JSON to a .json file."),
    "export": Command(_export, "FILE.md", "Write the conversation as Markdown with its pictures."),
    "help": Command(_help, "", "List these commands."),
    "exit": Command(_exit, "", "Leave; Ctrl-D does too."),
}
