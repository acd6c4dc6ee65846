"""Answers as descriptions of pictures: a text or an XMP file beside each picture, or XMP inside it."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Protocol

from llava_cli import files, limits, regular_files, render
from llava_cli.batch.export.export_job import CHANGED, ELSEWHERE, MISSING, OUTSIDE, Job, Reason, is_elsewhere
from llava_cli.batch.export.xmp_packet import NotMergeable, OtherDescription, merged, new_packet
from llava_cli.batch.report.report_pictures import OutsideRoots, PictureFolders, decimal, task_of
from llava_cli.batch.scratch import scratch_database
from llava_cli.batch.tasks import Task
from llava_cli.errors import LlavaError, os_reason
from llava_cli.files import Change
from llava_cli.images import formats
from llava_cli.images.describe import FORMATS, Describer, Reply
from llava_cli.parts import WHOLE
from llava_cli.untrusted_text import for_page, printable

REGION = Reason("it is about a region, and the text would be the picture's", is_failure=False)
PART = Reason("it is about a page or frame, and the text would be the file's", is_failure=False)
TAKEN = Reason("another row has another text for the same file")
OTHER_TEXT = Reason("there is another text", hint="--force replaces it")
NO_TEXT = Reason("what is in the place of the text is no text file")
NO_PICTURE = Reason("it does not begin like a picture, document or film")
LINK = Reason("the picture is a link, and what it leads to is left alone")
UNSUITABLE = Reason(f"the picture cannot be written into: only {', '.join(FORMATS)}, and only if nothing else changes")
_REPLIES: dict[Reply, Change | Reason] = {
    Reply.SAME: Change.NONE,
    Reply.OTHER: OTHER_TEXT,
    Reply.UNSUITABLE: UNSUITABLE,
}
_READ_BYTES = 1 << 20


class Writer(Protocol):
    """Puts the descriptions of pictures in their places."""

    what: str
    """It is called, one of them."""

    def target(self, task: Task, picture: Path) -> Path | Reason:
        """The file that is written, or why none is."""

    def write(self, target: Path, text: str, force: bool) -> Change | Reason:
        """Writes the file, unless it has this text already, or another one without `force`. Raises `OSError`."""

    def has(self, target: Path, text: str) -> bool:
        """Whether a picture that has changed is the one that this text was written into."""

    def close(self) -> None:
        """Ends its processes."""


class _Captions:
    """`photo.txt` beside `photo.jpg`, as trainers read it: one line.

    `doc.2.txt` is about a page, and `clip.2.5s.txt` about a moment.
    """

    what = "caption"

    def target(self, task: Task, picture: Path) -> Path | Reason:
        part = f".{task.page}" if task.page is not None else f".{decimal(task.time)}s" if task.time is not None else ""
        target = picture.with_name(f"{picture.stem}{part}.txt")
        return NO_TEXT if target == picture else target

    def write(self, target: Path, text: str, force: bool) -> Change | Reason:
        line = (" ".join(text.split()) + "\n").encode()
        there = _read_sidecar(target)
        if isinstance(there, Reason) or (there and b"\0" in there):
            return NO_TEXT
        if there not in (None, line) and not force:
            return OTHER_TEXT
        return files.update(target, [line], replace=True)

    def has(self, target: Path, text: str) -> bool:
        return False

    def close(self) -> None:
        pass


class _XmpFiles(_Captions):
    """`photo.jpg.xmp` beside `photo.jpg`; the description is added to a file that is there already."""

    what = "XMP file"

    def target(self, task: Task, picture: Path) -> Path | Reason:
        return picture.with_name(f"{picture.name}.xmp") if task.part == WHOLE else PART

    def write(self, target: Path, text: str, force: bool) -> Change | Reason:
        there = _read_sidecar(target)
        if isinstance(there, Reason):
            return there
        try:
            packet = new_packet(text) if there is None else merged(there, text, force)
        except OtherDescription:
            return OTHER_TEXT
        except NotMergeable as error:
            return Reason(f"the XMP file that is there cannot be added to: {error}")
        return files.update(target, [packet], replace=True)


class _Embedding:
    """Descriptions inside pictures."""

    what = "picture"

    def __init__(self) -> None:
        self._describer = Describer()

    def target(self, task: Task, picture: Path) -> Path | Reason:
        if task.part != WHOLE:
            return PART
        return LINK if picture.is_symlink() else picture

    def write(self, target: Path, text: str, force: bool) -> Change | Reason:
        new = self._describe(target, text, force)
        if isinstance(new, Reply):
            return _REPLIES[new]
        return files.update(target, [new], replace=True)

    def has(self, target: Path, text: str) -> bool:
        return self._describe(target, text, False) is Reply.SAME

    def _describe(self, target: Path, text: str, force: bool) -> bytes | Reply:
        data = regular_files.read(target, limits.PICTURE_BYTES, follow=False)
        return self._describer.describe(str(target), data, text, force)

    def close(self) -> None:
        self._describer.close()


def export_captions(job: Job) -> None:
    """Raises `OutputError` if there is no place for what has to be kept on disk meanwhile."""
    _export(job, _Captions())


def export_descriptions(job: Job) -> None:
    """Raises as `export_captions`, and `UsageError` if the extra is missing."""
    if job.embed:
        job.need("pyexiv2", "xmp")
    _export(job, _Embedding() if job.embed else _XmpFiles())


def _export(job: Job, writer: Writer) -> None:
    with render.spinner("writing", job.quiet), closing(writer), scratch_database() as database:
        exporter = _Exporter(writer, job.force, database)
        for task, sha256, picture, text in _described(job):
            done = exporter.write(task, sha256, picture, text)
            if isinstance(done, Reason):
                job.outcome.leave_out(done, task.image)
            else:
                job.outcome.done[done] += 1
    if not job.quiet:
        render.note(f"{printable(str(job.rows.path))}: {job.outcome.changes(writer.what)}")


class _Exporter:
    """Writes one description after another; of several for one file, only the first row's."""

    def __init__(self, writer: Writer, force: bool, database: sqlite3.Connection) -> None:
        self._writer, self._force, self._database = writer, force, database
        self._hashed: tuple[Path | None, str] = None, ""
        database.execute("create table target (path blob primary key, text text) without rowid")

    def write(self, task: Task, sha256: object, picture: Path, text: str) -> Change | Reason:
        """`sha256` is what the picture had, where the row says so. Raises as `scratch_database`."""
        target = self._writer.target(task, picture)
        if isinstance(target, Reason):
            return target
        if self._first_text(target, text) != text:
            return TAKEN
        try:
            # Else a stranger's rows could have us make `requirements.txt` beside `requirements.in`.
            if not _begins_like_a_picture(picture):
                return NO_PICTURE
            if sha256 in (None, self._sha256(picture)):
                return self._writer.write(target, text, self._force)
            return Change.NONE if self._writer.has(target, text) else CHANGED
        except OSError as error:
            return Reason(f"cannot be read or written: {os_reason(error)}")

    def _first_text(self, target: Path, text: str) -> str:
        path = os.fsencode(target)
        self._database.execute("insert into target values (?, ?) on conflict (path) do nothing", (path, text))
        (first,) = self._database.execute("select text from target where path = ?", (path,)).fetchone()
        return str(first)

    def _sha256(self, picture: Path) -> str:
        """Of a picture's file; many rows in a row may be about one document."""
        if self._hashed[0] != picture:
            self._hashed = picture, _sha256(picture)
        return self._hashed[1]


def _described(job: Job) -> Iterator[tuple[Task, object, Path, str]]:
    """What can be described: its task, the SHA-256 that it should have, the picture's path and the text."""
    folders = PictureFolders.of(job.rows.path, job.root)
    for _, row in job.answered_rows():
        task = task_of(row)
        found = REGION if task.region else _picture(folders, task.image)
        if isinstance(found, Reason):
            job.outcome.leave_out(found, task.image)
        else:
            yield task, row.get("sha256"), found, _text(row["answer"])


def _picture(folders: PictureFolders, image: str) -> Path | Reason:
    if is_elsewhere(image):
        return ELSEWHERE
    try:
        path = folders.beside(image)
    except OutsideRoots:
        return OUTSIDE
    except LlavaError:
        return MISSING
    if path.is_file():
        return path
    return ELSEWHERE if folders.is_in_file(image) else MISSING


def _text(answer: str) -> str:
    """An answer that every reader of text and of XML takes: control characters are escaped."""
    return for_page(answer.strip()).replace("\ufffe", "\ufffd").replace("\uffff", "\ufffd")


def _begins_like_a_picture(path: Path) -> bool:
    """Raises `OSError`."""
    with regular_files.open_regular(path) as file:
        head = file.read(formats.HEAD_BYTES)
    return formats.begins_like_a_picture(head) or formats.is_pdf(head)


def _sha256(path: Path) -> str:
    """Of a file's bytes. Raises `OSError`."""
    digest = hashlib.sha256()
    with regular_files.open_regular(path) as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _read_sidecar(path: Path) -> bytes | Reason | None:
    """What is beside a picture; None if nothing is. Raises `OSError`."""
    if files.refuse_irregular(path) is None:
        return None
    try:
        return regular_files.read(path, limits.SIDECAR_BYTES, follow=False)
    except regular_files.TooLarge:
        return Reason(f"what is in the place of the text is larger than {limits.SIDECAR_BYTES:,} bytes")
