"""For tests of `llava batch`: an engine and pictures that cost nothing, and a disk that fails at any moment."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from PIL import Image

from llava_cli import files
from llava_cli.batch import journal, row_file, run
from llava_cli.batch.ranges import folder_run
from llava_cli.batch.tasks import Task
from llava_cli.conversation import Conversation, Picture
from llava_cli.engine import Answer, Chunk, Engine
from llava_cli.errors import InputMissing, LlavaError
from llava_cli.settings import Sampling


class Told(Engine):
    """Answers with `say`, from the question and the picture's name, and loads no model."""

    model, precision, device = "told", "fp32", "cpu"

    def say(self, question: str, name: str) -> str:
        return f"{name} ist schön \u202e\x1b[1m " + "x" * (len(name) * 7 % 23)

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Chunk]:
        turn = conversation.turns[-1]
        text = self.say(turn.question, turn.pictures[0].name)
        yield Chunk(text, Answer(text, "stop", 5, 0, len(text.split()), 0.0, 0.0))

    def prompt(self, conversation: Conversation) -> str:
        return conversation.turns[-1].question

    def count(self, conversation: Conversation) -> int:
        return 5

    def peak_memory(self) -> int:
        return 0


class Pictures:
    """A `PictureLoader` of pictures that need no file; those that are `missing` are errors."""

    missing: frozenset[str] = frozenset()
    last_refusal = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def load(self, task: Task, resize: object = None) -> Picture | LlavaError:
        image = task.image
        if image in self.missing:
            return InputMissing(image, "no such file or directory")
        return Picture(image, Image.new("RGB", (2, 2)), hashlib.sha256(image.encode()).hexdigest())

    def load_all(self, tasks: Iterable[Task], resize: object = None) -> Iterator[tuple[Task, Picture | LlavaError]]:
        return ((task, self.load(task)) for task in tasks)

    def close(self) -> None:
        pass


def give_away(path: Path, patch: pytest.MonkeyPatch) -> None:
    """Makes what is there another user's: really where this is root, else as far as anybody can see in here."""
    if os.geteuid() == 0:
        os.chown(path, 54321, -1, follow_symlinks=False)
        return
    given = os.lstat(path).st_ino

    def seen(real: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def status(*args: Any, **options: Any) -> os.stat_result:
            found = real(*args, **options)
            return os.stat_result((*found[:4], 54321, *found[5:])) if found.st_ino == given else found

        return status

    for name in ("stat", "lstat", "fstat"):
        patch.setattr(os, name, seen(getattr(os, name)))


class Died(BaseException):
    """The process was killed: what the code would still do is not done."""


class Faults:
    """Stands in for `os` where output is written, and counts the moments around all that changes a disk.

    At moment `at` the process dies, or gets the error number `error`, at all later ones too if it is `lasting`; what
    is written at that moment is written in part. `power` says that what was not synced goes with the process.
    `most` is how many bytes one write takes.
    """

    def __init__(
        self,
        at: int | None = None,
        error: int = 0,
        lasting: bool = False,
        power: bool = False,
        most: int | None = None,
    ) -> None:
        self.at, self.error, self.lasting, self.power, self.most = at, error, lasting, power, most
        self.moments: list[str] = []
        self.dead = False
        self._descriptors: set[int] = set()
        self._certain: dict[int, int] = {}  # by inode: how many bytes a power cut would leave

    @contextmanager
    def __call__(self, folder: Path) -> Iterator[None]:
        """While the disk fails; `folder` is where all of the output is."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "os", self)
            for module in (journal, row_file, folder_run):
                patch.setattr(module, "os", self)
            try:
                yield
            finally:
                for descriptor in self._descriptors:  # as the kernel does it
                    os.close(descriptor)
                if self.dead and self.power:
                    self._cut_power(folder)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)  # what only reads

    def _moment(self, what: str) -> None:
        if self.dead:
            raise Died
        self.moments.append(what)
        now = len(self.moments) - 1
        if now == self.at or (self.at is not None and now > self.at and self.lasting):
            if self.error:
                raise OSError(self.error, os.strerror(self.error))
            self.dead = True
            raise Died

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            self._moment("open")
        descriptor = os.open(path, flags, mode)
        self._descriptors.add(descriptor)
        if flags & os.O_CREAT:
            self._moment("opened")
        return descriptor

    def close(self, descriptor: int) -> None:
        if not self.dead:
            self._descriptors.discard(descriptor)
            os.close(descriptor)

    def write(self, descriptor: int, data: Any) -> int:
        data = bytes(data)[: self.most]
        for part in sorted({0, 1, len(data) // 2, len(data) - 1}):
            alive = not self.dead
            try:
                self._moment("write")
            except BaseException:
                if alive:
                    self._put(descriptor, data[:part])
                raise
        count = self._put(descriptor, data)
        self._moment("wrote")
        return count

    def _put(self, descriptor: int, data: bytes) -> int:
        status = os.fstat(descriptor)
        self._certain.setdefault(status.st_ino, status.st_size)
        return os.write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        self._moment("fsync")
        self._certain.pop(os.fstat(descriptor).st_ino, None)
        self._moment("fsynced")

    def ftruncate(self, descriptor: int, size: int) -> None:
        self._moment("truncate")
        os.ftruncate(descriptor, size)
        self._moment("truncated")

    def replace(self, old: Any, new: Any) -> None:
        self._moment("rename")
        os.replace(old, new)
        self._moment("renamed")

    def link(self, old: Any, new: Any) -> None:
        self._moment("link")
        os.link(old, new)
        self._moment("linked")

    def unlink(self, path: Any) -> None:
        self._moment("unlink")
        os.unlink(path)
        self._moment("unlinked")

    def _cut_power(self, folder: Path) -> None:
        for path in folder.rglob("*"):
            with suppress(KeyError):
                os.truncate(path, min(path.stat().st_size, self._certain[path.stat().st_ino]))


NAMES = ["a.png", "bb.png", "ccc.png", "dé.png", "e e.png"]
"""The pictures of a run that faults disturb."""
KILLED = -9


def without_a_model(patch: pytest.MonkeyPatch) -> None:
    """Has batches answer by `Told` about `Pictures`, and sync every second row, whatever the time."""
    patch.setattr(run, "open_engine", lambda *_: Told())
    patch.setattr(run, "identify", lambda settings: {"model": "told"})
    patch.setattr(run, "PictureLoader", Pictures)
    patch.setattr(row_file, "SYNC_ROWS", 2)
    patch.setattr(row_file, "SYNC_SECONDS", float("inf"))


def begin(folder: Path, names: list[str] = NAMES) -> Path:
    """A folder with a list of pictures, and one for the output."""
    (folder / "out").mkdir(parents=True)
    (folder / "list.txt").write_text("\n".join(names))
    return folder


def output(folder: Path) -> bytes:
    path = folder / "out" / "out.jsonl"
    return path.read_bytes() if path.exists() else b""


def at_once(*calls: Callable[[], int]) -> list[int]:
    """What runs return that are begun at the same time, in threads, which cannot handle signals."""
    codes = list[int]()
    threads = [Thread(target=lambda call=call: codes.append(call())) for call in calls]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.StopSignal, "__enter__", lambda self: None)
        patch.setattr(run.StopSignal, "__exit__", lambda self, *error: None)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return codes
