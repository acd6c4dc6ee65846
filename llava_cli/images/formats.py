"""Recognizes file formats by their first bytes.

Files are only looked at here, never decoded. Names are ignored: what is saved as `.jpg` may be anything. The signatures
are those of each format's specification, mostly as collected in https://www.garykessler.net/library/file_sigs.html.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple


class Signature(NamedTuple):
    """Bytes that identify a format, at `offset` in its files."""

    format: str
    offset: int
    magic: bytes


SIGNATURES: tuple[Signature, ...] = tuple(
    Signature(name, offset, magic)
    for name, offset, magics in (
        # Images. Where one signature is the beginning of another, the longer one is first.
        ("raw", 0, (b"II*\0\x10\0\0\0CR", b"IIU\0", b"IIRO", b"IIRS", b"MMOR", b"FUJIFILMCCD-RAW", b"FOVb", b"\0MRM")),
        ("raw", 6, (b"HEAPCCDR", b"HEAPJPGM")),
        ("raw", 4, (b"ftypcrx ",)),
        ("tiff", 0, (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
        ("jpeg-xr", 0, (b"II\xbc",)),
        ("jpeg-2000", 0, (b"\0\0\0\x0cjP  \r\n\x87\n", b"\0\0\0\x0cjP\x1a\x1a\r\n\x87\n", b"\xff\x4f\xff\x51")),
        ("jpeg-2000", 4, (b"ftypjp2 ",)),
        ("jpeg-xl", 0, (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")),
        ("jpeg-xl", 4, (b"ftypjxl ",)),
        ("jpeg-ls", 0, (b"\xff\xd8\xff\xf7",)),
        ("jpeg", 0, (b"\xff\xd8\xff",)),
        ("png", 0, (b"\x89PNG\r\n\x1a\n",)),
        ("gif", 0, (b"GIF87a", b"GIF89a")),
        ("webp", 8, (b"WEBP",)),
        ("tga", 0, tuple(b"\0\0" + kind + bytes(5) for kind in (b"\2", b"\3", b"\x0a", b"\x0b"))),
        ("ico", 0, (b"\0\0\1\0",)),
        ("cur", 0, (b"\0\0\2\0",)),
        ("ani", 8, (b"ACON",)),
        ("icns", 0, (b"icns",)),
        ("psd", 0, (b"8BPS\0\1",)),
        ("psb", 0, (b"8BPS\0\2",)),
        ("xcf", 0, (b"gimp xcf",)),
        ("mng", 0, (b"\x8aMNG",)),
        ("jng", 0, (b"\x8bJNG",)),
        ("qoi", 0, (b"qoif",)),
        ("dds", 0, (b"DDS ",)),
        ("openexr", 0, (b"\x76\x2f\x31\x01",)),
        ("hdr", 0, (b"#?RADIANCE", b"#?RGBE")),
        ("fits", 0, (b"SIMPLE  =",)),
        ("bpg", 0, (b"BPG\xfb",)),
        ("flif", 0, (b"FLIF",)),
        ("djvu", 0, (b"AT&TFORM",)),
        ("ktx", 0, (b"\xabKTX ",)),
        ("pcx", 0, (b"\x0a\x05\x01\x08",)),
        ("sgi", 0, (b"\x01\xda",)),
        ("sun-raster", 0, (b"\x59\xa6\x6a\x95",)),
        ("xpm", 0, (b"/* XPM */",)),
        ("wmf", 0, (b"\xd7\xcd\xc6\x9a",)),
        ("emf", 40, (b" EMF",)),
        ("dicom", 128, (b"DICM",)),
        # Documents.
        ("pdf", 0, (b"%PDF-",)),
        ("postscript", 0, (b"%!PS", b"\xc5\xd0\xd3\xc6")),
        ("office", 0, (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",)),  # OLE 2: the office programs of before 2007
        # Sound and video.
        ("ogg-video", 28, (b"\x80theora", b"fishead\0", b"OVP80")),
        ("audio", 4, (b"ftypM4A ", b"ftypM4B ", b"ftypM4P ")),
        ("audio", 0, (b"OggS", b"ID3", b"fLaC")),
        ("audio", 8, (b"WAVE",)),
        ("mp4", 4, (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")),
        ("avi", 8, (b"AVI ",)),
        ("matroska", 0, (b"\x1a\x45\xdf\xa3",)),
        ("flv", 0, (b"FLV\1",)),
        ("mpeg-ps", 0, (b"\0\0\1\xba",)),
        ("asf", 0, (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",)),
        ("video", 0, (b"\0\0\1\xb3",)),
        # Archives and compressed files.
        ("zip", 0, (b"PK\3\4", b"PK\5\6")),
        ("7z", 0, (b"7z\xbc\xaf\x27\x1c",)),
        ("rar", 0, (b"Rar!\x1a\x07",)),
        ("tar", 257, (b"ustar",)),
        ("gzip", 0, (b"\x1f\x8b",)),
        ("compress", 0, (b"\x1f\x9d",)),
        ("bzip2", 4, (b"1AY&SY",)),
        ("xz", 0, (b"\xfd7zXZ\0",)),
        ("zstd", 0, (b"\x28\xb5\x2f\xfd",)),
        ("lz4", 0, (b"\x04\x22\x4d\x18",)),
        # Data.
        ("numpy", 0, (b"\x93NUMPY",)),
        ("parquet", 0, (b"PAR1",)),
        ("arrow", 0, (b"ARROW1\0",)),
        ("sqlite", 0, (b"SQLite format 3\0",)),
        ("hdf5", 0, (b"\x89HDF\r\n\x1a\n",)),
        ("gguf", 0, (b"GGUF",)),
        # Stand-ins for the file itself.
        ("git-lfs", 0, (b"version https://git-lfs.github.com/spec/",)),
        ("appledouble", 0, (b"\0\5\x16\7", b"\0\5\x16\0")),
        ("macos-alias", 0, (b"book\0\0\0\0mark",)),
        ("windows-shortcut", 0, (b"L\0\0\0\1\x14\2\0",)),
        ("url-shortcut", 0, (b"[InternetShortcut]",)),
        ("image-as-text", 0, (b"\x89PNG\n\x1a\n", b"\x89PNG\r\r\n\x1a")),
        ("image-as-text", 0, (b"\xef\xbf\xbdPNG", b"\xc2\x89PNG", b"\xef\xbf\xbd" * 3, b"\xc3\xbf\xc3\x98")),
        ("base64", 0, (b"iVBORw0KGgo", b"/9j/", b"R0lGODlh", b"R0lGODdh", b"UklGR")),
        ("data-url", 0, (b"data:image/",)),
    )
    for magic in magics
)
_TEXT_PATTERNS = {
    "svg": rb"(?:<\?xml[^>]{0,200}>|<!--(?:(?!-->).){0,1000}-->|<!doctype\s[^>]{0,400}>|\s)*<(?:\w{1,20}:)?svg\b",
    "html": rb"(?:<!--(?:(?!-->).){0,1000}-->|<\?xml[^>]{0,200}>|\s)*"
    rb"<(?:!doctype\s+html|html|head|body|title|script)\b",
    "xml": rb"<\?xml\b|<[a-z][\w:]{0,40}[\s>]",
    "json": rb'(?:\{\s*["}]|\[\s*[\]{"])',
    "pnm": rb"P[1-6]\s+(?:#[^\n]{0,200}\n\s*)*\d+\s+\d+\s|P7\nWIDTH|P[Ff]\n",
    "pdf": rb"%pdf-",
    "postscript": rb"%!ps",
}
"""Text formats, after a byte-order mark and white space; compiled only when no signature matches."""
HEAD_BYTES = 4096
"""The part of a text file that is searched."""
MAGIC_BYTES = 512
"""The part of a file that all signatures are in."""
DOCUMENT_SUFFIXES = (".pdf", ".tif", ".tiff")
ANIMATION_SUFFIXES = (".gif", ".webp", ".apng", ".png", ".avif", ".avifs", ".heic", ".heif", ".hif", ".heics", ".jxl")
FILM_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".vob", ".mts", ".m2ts", ".wmv", ".asf"),
    *(".flv", ".3gp", ".3g2", ".ogv"),
)
FILM_DEMUXERS = {
    **{"mp4": "mov", "matroska": "matroska", "avi": "avi", "flv": "flv", "asf": "asf", "ogg-video": "ogg"},
    **{"mpeg-ps": "mpeg", "mpeg-ts": "mpegts"},
}
"""The formats of films that we open, and what libavformat calls the demuxer of each."""
_OFTEN_TAKEN_FOR_FILMS = ("audio", "gif", "jpeg-2000", "jpeg-xl", "raw")
SINGLE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".mpo", ".bmp", ".dib", ".svg")
SUFFIXES_OF_SEVERAL = (*DOCUMENT_SUFFIXES, *ANIMATION_SUFFIXES, *FILM_SUFFIXES)
SUPPORTED = frozenset({"jpeg", "png", "gif", "webp", "tiff"})
"""Formats with a signature that need no extra; BMP and AVIF, which are opened too, have functions of their own."""
HEIF, JPEG_XL, PDF = "pillow_heif", "pillow_jxl", "pypdfium2"
"""The packages that open what Pillow does not."""
_PDF_HEAD_BYTES = 1024
"""Where in a file readers of PDF look for its first bytes."""
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def format_of(head: bytes, among: Collection[str], maybe_text: bool = False) -> str | None:
    """The first format of `among` whose signature the beginning of a file has; None if there is none.

    With `maybe_text` a signature of letters alone, with which a text could begin, counts only if the head has a NUL.
    """
    for name, offset, magic in SIGNATURES:
        if name in among and head.startswith(magic, offset):
            if maybe_text and magic.strip().isalnum() and b"\0" not in head:
                continue
            return name
    return None


def text_format_of(head: bytes, among: Collection[str] = tuple(_TEXT_PATTERNS)) -> str | None:
    """The first text format of `among` that the beginning of a file looks like; None if there is none."""
    text = _as_utf_8(head[:HEAD_BYTES]).lstrip()
    flags = re.IGNORECASE | re.DOTALL
    return next(
        (name for name, pattern in _TEXT_PATTERNS.items() if name in among and re.match(pattern, text, flags)), None
    )


def is_bmp(head: bytes) -> bool:
    """Whether a file begins like a BMP: "BM", 4 bytes of size, and 4 reserved zero bytes."""
    return head[:2] == b"BM" and head[6:10] == bytes(4)


def is_heif(head: bytes) -> bool:
    """Whether a file's `ftyp` box says HEIF (ISO/IEC 23008-12), which has a decoder of its own."""
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS and b"avif" not in head[8:40]


def is_avif(head: bytes) -> bool:
    """Whether a file's `ftyp` box lists AVIF among its brands."""
    return head[4:8] == b"ftyp" and re.search(b"avi[fs]", head[8:40]) is not None


def is_jpeg_xl(head: bytes) -> bool:
    """Whether a file begins like JPEG XL, in its container or without."""
    return format_of(head, ("jpeg-xl",)) is not None


def is_pdf(head: bytes) -> bool:
    """Whether a file is a PDF, perhaps behind a few other bytes, and nothing that is opened as a picture."""
    is_picture = format_of(head, SUPPORTED) or is_bmp(head) or is_heif(head) or is_avif(head) or is_jpeg_xl(head)
    return not is_picture and b"%PDF-" in head[:_PDF_HEAD_BYTES]


def film_format(head: bytes) -> str | None:
    """The one of `FILM_DEMUXERS` that a file begins like; `head` should have `MAGIC_BYTES`."""
    if is_heif(head) or is_avif(head):
        return None
    name = format_of(head, (*FILM_DEMUXERS, *_OFTEN_TAKEN_FOR_FILMS), maybe_text=True)
    name = name or ("mpeg-ts" if _is_mpeg_ts(head) else None)
    return name if name in FILM_DEMUXERS else None


def is_film(head: bytes) -> bool:
    """Whether a file begins like a film that we open."""
    return film_format(head) is not None


def _is_mpeg_ts(head: bytes) -> bool:
    """Whether packets of an MPEG transport stream (ISO/IEC 13818-1) begin where they should: every 188 or 192 bytes."""
    begins = ((0, 188), (4, 192))
    return b"\0" in head and any(head[start : start + 2 * size + 1 : size] == b"GGG" for start, size in begins)


def begins_like_a_picture(head: bytes) -> bool:
    """Whether a file begins like a picture, document or film that we open, if need be with an extra."""
    known = (is_bmp, is_heif, is_avif, is_jpeg_xl, is_film)
    return format_of(head, (*SUPPORTED, "pdf")) is not None or any(is_it(head) for is_it in known)


def has_several(head: bytes) -> bool:
    """Whether a file begins like a document or a film, all of whose pictures count."""
    return format_of(head, ("raw", "tiff")) == "tiff" or is_pdf(head) or is_film(head)


def package_for(head: bytes) -> str:
    """The package that opens what begins like this; empty for what Pillow opens by itself, and for what nobody does."""
    if is_heif(head):
        return HEIF
    if is_jpeg_xl(head):
        return JPEG_XL
    return PDF if is_pdf(head) else ""


def _as_utf_8(head: bytes) -> bytes:
    """Text as ASCII patterns match it, without its byte-order mark."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16, whose decoder could not be imported in the sandbox
        return head[2:].replace(b"\0", b"")
    return head.removeprefix(b"\xef\xbb\xbf")
