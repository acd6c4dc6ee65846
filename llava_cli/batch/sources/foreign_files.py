"""What a SOURCE that is neither pictures nor text is, by its first bytes, and the next command to type.

Files are only looked at here, never decoded.
"""

from __future__ import annotations

from typing import NamedTuple

from llava_cli import files, regular_files
from llava_cli.images import formats
from llava_cli.images.reader import SUFFIXES

JSON_LINES = (".jsonl", ".ndjson")
HEAD_BYTES = 65_536
"""The part of a SOURCE that is looked at."""
_BATCH = 'llava batch FOLDER "what is this?"'
_PIPE = "{tool} {name} | llava batch - …"


class Foreign(NamedTuple):
    """A kind of file in which we find no pictures."""

    description: str
    """Words that follow the file's name."""
    hint: str
    """The next command; {name} is the file, quoted for a shell."""


def _archive(unpack: str) -> Foreign:
    return Foreign("is an archive", f"{unpack}; then: {_BATCH}")


def _compressed(tool: str) -> Foreign:
    """A format that compresses one file, or a tar."""
    return Foreign("is compressed", _PIPE.replace("{tool}", tool))


_PDF = 'soffice --headless --convert-to pdf {name}; then: llava batch FILE.pdf "what is this?"'
_OFFICE = Foreign("is a document of an office program", _PDF)
_SHEET = Foreign("is a spreadsheet", "save it as CSV, with the columns image and question")
_PIPED = "save it as a file, which is a SOURCE: llava batch FILE QUESTION"
_TABLE = Foreign("is a table that is damaged, or comes through a pipe", _PIPED)
_TAR = _ZIP = Foreign("is an archive that is damaged, or comes through a pipe", _PIPED)
_BINARY = Foreign("is binary, not pictures, a list or questions", "SOURCE is pictures, a folder, a list or questions")
_NUL = Foreign("has NUL bytes: its paths do not end in line ends", "-0 says that paths end in NUL")
_UNMARKED = Foreign("is UTF-16 without a byte-order mark", "iconv -f {encoding} -t utf-8 {name} | llava batch - …")
_HTML = Foreign("is an HTML page", "curl -LO URL fetches the file itself; a page may ask to sign in")
_FOREIGN = {
    "gzip": _compressed("gunzip -c"),
    "compress": _compressed("gunzip -c"),
    "bzip2": _compressed("bunzip2 -c"),
    "xz": _compressed("xz -dc"),
    "zstd": _compressed("zstd -dc"),
    "lz4": _compressed("lz4 -dc"),
    "7z": _archive("7z x {name} -oFOLDER"),
    "rar": _archive("unrar x {name} FOLDER/"),
    "tar": _TAR,
    "postscript": Foreign("is PostScript", 'ps2pdf {name} FILE.pdf; then: llava batch FILE.pdf "what is this?"'),
    "audio": Foreign("is a sound", "SOURCE is pictures, a folder, a list of paths or questions"),
    "office": _OFFICE,
    "parquet": _TABLE,
    "arrow": _TABLE,
    "sqlite": Foreign("is a database", "sqlite3 {name} 'SELECT …' | llava batch - …"),
    "hdf5": _BINARY,
    "gguf": Foreign("is a model", "llava models --help"),
    "git-lfs": Foreign("is a pointer of Git LFS, not the file", "git lfs pull"),
}
_CONTROLS = bytes((*range(1, 8), *range(14, 27)))
"""Control characters that no list has; names may contain an escape (27)."""
_TAR_SUFFIXES = (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst")
_PICTURES = formats.SUPPORTED | {
    *("pdf", "video", "raw", "jpeg-2000", "jpeg-xl", "ico", "cur", "psd", "psb", "qoi", "dds", "openexr")
}
"""Formats of pictures, documents and films: those that we open, and those for which the row's error says what they are.
"""


def is_picture(head: bytes, name: str) -> bool:
    """Whether a file is a picture by its first bytes or name: one that we open, or whose error will say what it is."""
    return (
        name.lower().endswith(SUFFIXES)
        or formats.format_of(head, _PICTURES, maybe_text=True) is not None
        or formats.is_bmp(head)
        or formats.is_heif(head)
        or formats.is_avif(head)
        or formats.is_film(head)
        or formats.text_format_of(head, ("pdf", "svg")) is not None
    )


def head_of(path: str) -> bytes:
    """The first bytes of a file, enough to know a picture; none if it cannot be read."""
    try:
        with regular_files.open_regular(path) as file:
            return file.read(formats.MAGIC_BYTES)
    except (OSError, ValueError):
        return b""


def begins_like_a_picture(path: str) -> bool:
    """Whether a file has the first bytes of a format that we open; False if it cannot be read."""
    return is_head_of_picture(head_of(path))


def is_head_of_picture(head: bytes) -> bool:
    """Whether these are the first bytes of a format that we open."""
    return formats.begins_like_a_picture(head)


def foreign(head: bytes, name: str, null: bool) -> tuple[str, str] | None:
    """What a file is that is neither a picture nor text, and the next command; `null` says that paths end in NUL."""
    kind = _format_of(head, name) or (None if null else _with_nuls(head, name))
    if kind is None:
        return None
    path = "FILE" if name == "-" else files.quoted(name)
    encoding = "utf-16be" if head[:1] == b"\0" else "utf-16le"
    return kind.description, kind.hint.format(name=path, encoding=encoding)


def _format_of(head: bytes, name: str) -> Foreign | None:
    if formats.format_of(head, ("zip",)):
        return _inside_zip(head)
    if formats.text_format_of(head, ("html",)):
        return _HTML
    kind = _FOREIGN.get(formats.format_of(head, _FOREIGN, maybe_text=True) or "")
    return _TAR if is_called_tar(name) and (kind is not None or b"\0" in head) else kind


def is_called_tar(name: str) -> bool:
    """Whether a file's name is that of a tar, which may be compressed."""
    name = name.lower()
    return name.endswith(_TAR_SUFFIXES) or name.rpartition(".")[0].endswith(".tar")


def is_document_in_zip(head: bytes) -> bool:
    """Whether a ZIP is a document of an office program, by the names of its first members."""
    return b"[Content_Types].xml" in head or b"vnd.oasis.opendocument" in head


def _inside_zip(head: bytes) -> Foreign:
    """What a ZIP is, by the names of its first members."""
    if not is_document_in_zip(head):
        return _ZIP
    return _SHEET if b"xl/" in head or b"opendocument.spreadsheet" in head else _OFFICE


def _with_nuls(head: bytes, name: str) -> Foreign | None:
    """What a file with NUL bytes is: output of `find -print0`, text in UTF-16, or no text at all."""
    if b"\0" not in head:
        return None
    halves = [len(half) - half.count(0) for half in (head[:512:2], head[1:512:2])]
    letters = len(head[:512]) * 3 // 8
    if len(head) >= 8 and min(halves) * 10 < max(halves) >= letters:  # Latin text: every second byte is zero
        return _UNMARKED
    if name.lower().endswith(JSON_LINES):  # one of its lines is damaged: its reader says which
        return None
    is_text = head == head.translate(None, _CONTROLS) and not head.startswith(b"\0") and b"\0\0" not in head
    return _NUL if is_text else _BINARY
