"""What a file is that somebody gives as SOURCE, by its first bytes: a picture, text, or something else with a name.

Only looked at, never decoded: what can be taken is taken elsewhere, and for the rest this knows the next command.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from llava_cli import files, regular_files
from llava_cli.images.reader import SUFFIXES

JSON_LINES = (".jsonl", ".ndjson")
HEAD_BYTES = 65_536
"""Of a SOURCE, that are looked at."""
_MAGIC_BYTES = 16
"""Of a file in a folder."""
_BATCH = 'llava batch FOLDER "what is this?"'
_PIPE = "{tool} {name} | llava batch - …"


class Foreign(NamedTuple):
    """One kind of files that hold no pictures for us to find."""

    what: str
    """After the file's name."""
    hint: str
    """What to type next; {name} is the file."""


def _archive(unpack: str) -> Foreign:
    return Foreign("is an archive", f"{unpack}; then: {_BATCH}")


def _packed(tool: str) -> Foreign:
    """What compresses one file, or a tar."""
    return Foreign("is compressed", _PIPE.replace("{tool}", tool))


_TAR = _archive("mkdir FOLDER && tar -xf {name} -C FOLDER")
_ZIP = _archive("unzip {name} -d FOLDER")
_OFFICE = Foreign("is a document of an office program", 'a picture of each page: pdftoppm -png, or "save as"')
_SHEET = Foreign("is a spreadsheet", "save it as CSV, with the columns image and question")
_VIDEO = Foreign("is a video", "mkdir FOLDER && ffmpeg -i {name} -vf fps=1 FOLDER/%06d.jpg; then: " + _BATCH)
_SOUND = Foreign("is a sound", "SOURCE is pictures, a folder, a list of paths or questions")
_TABLE = Foreign(
    "is a table in columns",
    "duckdb -c \"COPY (SELECT image, question FROM {name}) TO 'questions.jsonl'\"; then: llava batch questions.jsonl",
)
_OTHER = Foreign("is no picture, list or questions, but binary", "SOURCE is pictures, a folder, a list or questions")
_NUL = Foreign("has NUL bytes: its paths do not end in line ends", "-0 says that paths end in NUL")
_UNMARKED = Foreign("is UTF-16 without a mark that says so", "iconv -f {encoding} -t utf-8 {name} | llava batch - …")

_BEGINNINGS: tuple[tuple[int, bytes, Foreign], ...] = (
    (0, b"\x1f\x8b", _packed("gunzip -c")),
    (0, b"\x1f\x9d", _packed("gunzip -c")),
    (4, b"1AY&SY", _packed("bunzip2 -c")),
    (0, b"\xfd7zXZ\0", _packed("xz -dc")),
    (0, b"\x28\xb5\x2f\xfd", _packed("zstd -dc")),
    (0, b"\x04\x22\x4d\x18", _packed("lz4 -dc")),
    (0, b"7z\xbc\xaf\x27\x1c", _archive("7z x {name} -oFOLDER")),
    (0, b"Rar!\x1a\x07", _archive("unrar x {name} FOLDER/")),
    (257, b"ustar", _TAR),
    (0, b"%PDF-", Foreign("is a PDF", "mkdir FOLDER && pdftoppm -png {name} FOLDER/page; then: " + _BATCH)),
    (0, b"%!PS", Foreign("is PostScript", "ps2pdf {name}; then: pdftoppm -png FILE.pdf FOLDER/page")),
    (4, b"ftyp", _VIDEO),
    (4, b"moov", _VIDEO),
    (0, b"\x1a\x45\xdf\xa3", _VIDEO),
    (8, b"AVI ", _VIDEO),
    (0, b"FLV\x01", _VIDEO),
    (0, b"\0\0\1\xba", _VIDEO),
    (0, b"\0\0\1\xb3", _VIDEO),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", _VIDEO),
    (0, b"OggS\0", _SOUND),
    (0, b"ID3", _SOUND),
    (0, b"fLaC", _SOUND),
    (8, b"WAVE", _SOUND),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", _OFFICE),
    (0, b"PAR1", _TABLE),
    (0, b"ARROW1\0", _TABLE),
    (0, b"SQLite format 3\0", Foreign("is a database", "sqlite3 {name} 'SELECT …' | llava batch - …")),
    (0, b"\x89HDF\r\n\x1a\n", _OTHER),
    (0, b"GGUF", Foreign("is a model", "llava models --help")),
    (0, b"version https://git-lfs.github.com/spec/", Foreign("is a pointer of Git LFS, not the file", "git lfs pull")),
)
_CONTROLS = bytes((*range(1, 8), *range(14, 27)))
"""What no list has; names may have an escape."""
_TARS = (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst")
_PAGE = re.compile(rb"\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL)
_SVG = re.compile(rb"\s*(<\?xml.{0,200}?>\s*)?(<!--.{0,2000}?-->\s*)*(<!doctype svg.{0,400}?>\s*)?<svg\b", re.I | re.S)
_OURS: tuple[tuple[int, bytes], ...] = (
    *((0, magic) for magic in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")),
    (8, b"WEBP"),
)
_PICTURES: tuple[tuple[int, bytes], ...] = (
    *_OURS,
    *(
        (0, magic)
        for magic in (
            b"II*\0",
            b"MM\0*",
            b"II+\0",
            b"MM\0+",
            b"\0\0\1\0",
            b"\0\0\2\0",
            b"\xff\x0a",
            b"8BPS\0",
            b"qoif",
            b"DDS ",
        )
    ),
    *((0, magic) for magic in (b"\0\0\0\x0cjP  ", b"\0\0\0\x0cJXL ", b"\x76\x2f\x31\x01")),
    *((4, b"ftyp" + brand) for brand in (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")),
    *((4, b"ftyp" + brand) for brand in (b"mif1", b"msf1", b"jxl ", b"jp2 ", b"crx ")),
)


def is_picture(head: bytes, name: str) -> bool:
    """Whether bytes begin, or a name ends, like a picture: one that we open, or one whose row will say what it is."""
    return (
        name.lower().endswith(SUFFIXES)
        or any(_has(head, at, magic) for at, magic in _PICTURES)
        or _is_bmp(head)
        or _SVG.match(head) is not None
    )


def begins_like_a_picture(path: str) -> bool:
    """Whether a file is of a format that is opened everywhere, whatever its name is; False where it cannot be read."""
    try:
        with regular_files.open_regular(path) as file:
            head = file.read(_MAGIC_BYTES)
    except (OSError, ValueError):
        return False
    return any(head.startswith(magic, at) for at, magic in _OURS) or _is_bmp(head)


def _is_bmp(head: bytes) -> bool:
    return head[:2] == b"BM" and head[6:10] == bytes(4)


def foreign(head: bytes, name: str, null: bool) -> tuple[str, str] | None:
    """What a file is that is neither a picture nor text, and the next command; `null` is whether paths end in NUL."""
    kind = _kind(head, name) or (None if null else _with_nuls(head, name))
    if kind is None:
        return None
    typed = "FILE" if name == "-" else files.quoted(name)
    encoding = "utf-16be" if head[:1] == b"\0" else "utf-16le"
    return kind.what, kind.hint.format(name=typed, encoding=encoding)


def _kind(head: bytes, name: str) -> Foreign | None:
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return _inside_zip(head)
    if _PAGE.match(head):
        return Foreign("is an HTML page", "curl -LO URL fetches the file itself; a page may ask to sign in")
    kind = next((kind for at, magic, kind in _BEGINNINGS if _has(head, at, magic)), None)
    stem = name.lower().rpartition(".")[0]
    is_tar = name.lower().endswith(_TARS) or stem.endswith(".tar")
    return _TAR if is_tar and (kind is not None or b"\0" in head) else kind


def _has(head: bytes, at: int, magic: bytes) -> bool:
    """Whether bytes are there; a path in a list may begin with what is but letters."""
    return head.startswith(magic, at) and (b"\0" in head or not magic.strip().isalnum())


def _inside_zip(head: bytes) -> Foreign:
    """A ZIP, by the names of its first members."""
    if b"xl/" in head or b"opendocument.spreadsheet" in head:
        return _SHEET
    if b"[Content_Types].xml" in head or b"vnd.oasis.opendocument" in head:
        return _OFFICE
    return _ZIP


def _with_nuls(head: bytes, name: str) -> Foreign | None:
    """A list from `find -print0`, text in UTF-16, or something that is no text."""
    if b"\0" not in head:
        return None
    halves = [len(half) - half.count(0) for half in (head[:512:2], head[1:512:2])]
    letters = len(head[:512]) * 3 // 8
    if len(head) >= 8 and min(halves) * 10 < max(halves) >= letters:  # Latin ones, of which every second byte is zero
        return _UNMARKED
    if name.lower().endswith(JSON_LINES):  # one of its lines is damaged: who reads it says which
        return None
    is_text = head == head.translate(None, _CONTROLS) and not head.startswith(b"\0") and b"\0\0" not in head
    return _NUL if is_text else _OTHER
