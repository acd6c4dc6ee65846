"""Chats on disk: a SQLite database in the user's data folder, in which each turn is committed when it is answered.

A picture is saved as its path and the SHA-256 of its bytes. What has no path (from stdin, a URL, the clipboard or the
screen) and what is a page, a frame or a region is saved as a PNG file beside the database.
"""

from __future__ import annotations

import errno
import io
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from llava_cli import files
from llava_cli.conversation import Conversation, Picture, Turn
from llava_cli.errors import InputMissing, LlavaError, OutputError, UsageError, os_reason
from llava_cli.images.reader import CLIPBOARD, SCREEN, is_url, open_picture
from llava_cli.images.remote_names import is_cloud_url
from llava_cli.models.registry import is_folder
from llava_cli.parts import Part
from llava_cli.paths import data_folder
from llava_cli.untrusted_text import printable

_SCHEMA = """
CREATE TABLE IF NOT EXISTS chats (
    id INTEGER PRIMARY KEY AUTOINCREMENT, started REAL NOT NULL, changed REAL NOT NULL, model TEXT NOT NULL, system TEXT
);
CREATE TABLE IF NOT EXISTS turns (
    chat INTEGER NOT NULL REFERENCES chats ON DELETE CASCADE, number INTEGER NOT NULL,
    question TEXT NOT NULL, answer TEXT NOT NULL, PRIMARY KEY (chat, number)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pictures (
    chat INTEGER NOT NULL, turn INTEGER NOT NULL, place INTEGER NOT NULL, name TEXT NOT NULL, path BLOB NOT NULL,
    sha256 TEXT NOT NULL, PRIMARY KEY (chat, turn, place),
    FOREIGN KEY (chat, turn) REFERENCES turns ON DELETE CASCADE
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS parts (
    chat INTEGER NOT NULL, turn INTEGER NOT NULL, place INTEGER NOT NULL, origin BLOB NOT NULL, page INTEGER, time REAL,
    region TEXT, dpi INTEGER, PRIMARY KEY (chat, turn, place),
    FOREIGN KEY (chat, turn, place) REFERENCES pictures ON DELETE CASCADE
) WITHOUT ROWID;
"""
_NO_PATHS = ("-", CLIPBOARD, SCREEN)
"""Names of pictures that are not files."""


@dataclass(frozen=True)
class Summary:
    """One line of `llava chats`."""

    number: int
    changed: float
    """Seconds since 1970."""
    model: str
    turns: int
    pictures: int
    title: str
    """The first question."""


@dataclass(frozen=True)
class SavedChat:
    """What the store has of a chat in progress: its number, None before the first turn, and its turns."""

    number: int | None = None
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class SavedTurn:
    """A turn as it is on disk, with the names of its pictures."""

    question: str
    pictures: tuple[str, ...]
    answer: str


class DataFolderUnusable(OutputError):
    """Nothing can be saved in the user's data folder: it is forbidden, read-only, or cannot exist."""


_FOLDER_UNUSABLE = (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)


class Store:
    """The chats of one user. Everything here raises `OutputError` for the database, or `DataFolderUnusable`."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or data_folder()
        self.file = self.folder / "chats.db"
        with self._errors():
            files.make_own_folder(self.folder)
            # SQLite follows links when it opens its own files beside the database.
            for ending in ("-journal", "-wal", "-shm"):
                files.refuse_irregular(f"{self.file}{ending}")
            files.make_own_file(self.file)
            self._db = sqlite3.connect(self.file, timeout=10)
            self._db.create_function("fold", 1, str.casefold, deterministic=True)
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.executescript(_SCHEMA)

    def save(self, saved: SavedChat, conversation: Conversation, model: str) -> SavedChat:
        """Updates a saved chat to this conversation, in one transaction; without turns it is deleted.

        If the chat was deleted or changed by another process, the conversation becomes a new chat.
        """
        turns = conversation.turns
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(saved.turns, turns, strict=False)))
        with self._errors():
            paths = {id(picture): os.fsencode(self._path(picture)) for picture in conversation.pictures}
        with self._writing() as db:
            number = saved.number
            if number is None or len(self._turns(number)) != len(saved.turns):
                number, same = None, 0
            elif not turns:
                db.execute("DELETE FROM chats WHERE id = ?", (number,))
                return SavedChat()
            now = time.time()
            model = os.path.abspath(model) if is_folder(model) else model
            if number is None:
                if not turns:
                    return SavedChat()
                begin = "INSERT INTO chats (started, changed, model, system) VALUES (?, ?, ?, ?)"
                number = db.execute(begin, (now, now, model, conversation.system)).lastrowid
            db.execute("UPDATE chats SET changed = ?, system = ? WHERE id = ?", (now, conversation.system, number))
            db.execute("DELETE FROM turns WHERE chat = ? AND number >= ?", (number, same))
            for i, turn in enumerate(turns[same:], same):
                db.execute("INSERT INTO turns VALUES (?, ?, ?, ?)", (number, i, turn.question, turn.answer))
                for place, picture in enumerate(turn.pictures):
                    row = (number, i, place, printable(picture.label), paths[id(picture)], picture.sha256)
                    db.execute("INSERT INTO pictures VALUES (?, ?, ?, ?, ?, ?)", row)
                    if not picture.is_whole_file:
                        origin = os.fsencode(_absolute(picture.name))
                        part = (number, i, place, origin, *picture.part, picture.region, picture.dpi)
                        db.execute("INSERT INTO parts VALUES (?, ?, ?, ?, ?, ?, ?, ?)", part)
        return SavedChat(number, turns)

    def last(self) -> int | None:
        """The number of the chat that was changed last."""
        row = self._read("SELECT id FROM chats ORDER BY changed DESC, id DESC LIMIT 1")
        return row[0][0] if row else None

    def model(self, chat: int) -> str:
        """The model of a chat. Raises `UsageError` if there is no such chat."""
        if not (row := self._read("SELECT model FROM chats WHERE id = ?", chat)):
            raise UsageError(f"chat {chat}", "there is none", "llava chats lists them")
        return str(row[0][0])

    def turns(self, chat: int) -> list[SavedTurn]:
        """The turns of a chat, in order. Raises `UsageError` if there is no such chat."""
        self.model(chat)
        return [
            SavedTurn(question, tuple(row[0] for row in self._pictures(chat, number)), answer)
            for number, question, answer in self._turns(chat)
        ]

    def load(self, chat: int) -> Conversation:
        """A chat with its pictures opened. Raises `InputMissing` for a picture that is gone or has changed."""
        self.model(chat)
        system = self._read("SELECT system FROM chats WHERE id = ?", chat)[0][0]
        turns = [
            Turn(question, tuple(self._open(chat, *picture) for picture in self._pictures(chat, number)), answer)
            for number, question, answer in self._turns(chat)
        ]
        return Conversation(tuple(turns), system)

    def search(self, text: str = "") -> list[Summary]:
        """The chats that contain `text` in a question, an answer or a picture's name; the last changed first."""
        rows = self._read(
            """SELECT id, changed, model, (SELECT count(*) FROM turns WHERE chat = id),
                      (SELECT count(*) FROM pictures WHERE chat = id),
                      coalesce((SELECT question FROM turns WHERE chat = id AND number = 0), '')
               FROM chats WHERE ? = '' OR EXISTS (
                   SELECT 1 FROM turns LEFT JOIN pictures ON pictures.chat = turns.chat AND turn = number
                   WHERE turns.chat = id AND instr(fold(question || char(10) || answer || char(10)
                                                        || coalesce(name, '')), fold(?)))
               ORDER BY changed DESC, id DESC""",
            text,
            text,
        )
        return [Summary(*row) for row in rows]

    def delete(self, chat: int) -> None:
        """Deletes a chat, and its saved pictures that no other chat has. Raises `UsageError` if there is none."""
        self.model(chat)
        with self._writing() as db:
            db.execute("DELETE FROM chats WHERE id = ?", (chat,))
            used = {os.fsdecode(row[0]) for row in db.execute("SELECT path FROM pictures")}
            for file in self._pictures_folder().glob("*.png"):
                if str(file) not in used:
                    file.unlink()

    def _turns(self, chat: int) -> list[tuple[int, str, str]]:
        return self._read("SELECT number, question, answer FROM turns WHERE chat = ? ORDER BY number", chat)

    def _pictures(self, chat: int, turn: int) -> list[tuple[Any, ...]]:
        return self._read(
            """SELECT name, path, sha256, origin, page, time, region, dpi
               FROM pictures LEFT JOIN parts USING (chat, turn, place) WHERE chat = ? AND turn = ? ORDER BY place""",
            chat,
            turn,
        )

    def _path(self, picture: Picture) -> str:
        """The picture's path; one without a path, and what is not all of a file, is saved to a file first."""
        if picture.is_whole_file and _has_path(picture.name):
            return _absolute(picture.name)
        file = self._pictures_folder() / f"{picture.identity}.png"
        files.make_folder(file.parent, 0o700)
        if not files.refuse_irregular(file):
            picture.image.save(data := io.BytesIO(), "PNG")
            files.atomic_write(file, [data.getvalue()], files.SECRET)
        return str(file)

    def _open(
        self, chat: int, name: str, encoded_path: bytes, sha256: str, origin: bytes | None, *part: Any
    ) -> Picture:
        path, (page, time, region, dpi) = os.fsdecode(encoded_path), part
        is_saved_copy = Path(path).parent == self._pictures_folder()
        thing, hint = printable(path), f"llava chats show {chat} prints what was said"
        try:
            picture = open_picture(path, allow_truncated=True)
        except LlavaError as error:
            raise InputMissing(thing, error.reason, hint) from None
        if not is_saved_copy and picture.sha256 != sha256:
            raise InputMissing(thing, "is not the picture that the chat is about: it has changed", hint)
        if origin is not None:
            name = os.fsdecode(origin)
        name = name if is_saved_copy else path
        opened = Picture(name, picture.image, sha256, picture.frames, picture.truncated)
        return replace(opened, part=Part(page, time), region=region, dpi=dpi)

    def _pictures_folder(self) -> Path:
        return self.folder / "pictures"

    def _read(self, query: str, *values: object) -> list[tuple]:  # type: ignore[type-arg]
        with self._errors():
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that excludes other writers."""
        with self._errors(), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, OverflowError, UnicodeError) as error:
            thing = getattr(error, "filename", None) or self.file
            kind = DataFolderUnusable if getattr(error, "errno", None) in _FOLDER_UNUSABLE else OutputError
            raise kind(printable(str(thing)), os_reason(error), "--no-save keeps nothing") from None


def _has_path(name: str) -> bool:
    return name not in _NO_PATHS and not is_url(name) and not is_cloud_url(name)


def _absolute(name: str) -> str:
    """A picture's name as it is found from any folder."""
    return os.path.abspath(name) if _has_path(name) else name
