"""What files are that hold no picture of ours, by their first bytes: what each is called, and what to type about it.

Only looked at, never decoded. The names of files say nothing: what is saved as `.jpg` may be anything.
"""

from __future__ import annotations

import re
import zlib
from typing import NamedTuple


class Foreign(NamedTuple):
    """A kind of file that is no picture of ours."""

    what: str
    """After the file's name."""
    hint: str = ""
    """The next command; {name} is the file, as a shell takes it."""


_MAGICK = "magick {name}'[0]' {name}.png"
_MAGICK_WHOLE = "magick {name} {name}.png"


def _image(kind: str, convert: str = _MAGICK) -> Foreign:
    return Foreign(f"{kind} is not a supported image", convert)


def _archive(kind: str, unpack: str) -> Foreign:
    return Foreign(f"a {kind} archive, not an image", unpack)


_TIFF, _RAW, _FITS = _image("TIFF"), _image("a camera's RAW"), _image("FITS")
_PDF = _image("PDF", "pdftoppm -png -r 150 {name} page")
_POSTSCRIPT = _image("PostScript", "magick -density 150 {name} {name}.png")
_SVG = _image("SVG", "rsvg-convert -o {name}.png {name}")
_AVIF = _image("AVIF", _MAGICK_WHOLE)
_JPEG_2000, _JPEG_XL = _image("JPEG 2000"), _image("JPEG XL", "djxl {name} {name}.png")
_PNM, _HDR, _JPEG_XR = _image("PNM"), _image("Radiance HDR"), _image("JPEG XR", "JxrDecApp -i {name} -o {name}.bmp")
_ICON, _TGA = _image("an icon (ICO)"), _image("TGA")
_VIDEO = Foreign("a video, not an image", "ffmpeg -i {name} -frames:v 1 {name}.png")
_SOUND = Foreign("a sound, not an image")
_ZIP = _archive("ZIP", "unzip {name} -d FOLDER")
_BASE64 = Foreign("an image as base64 text", "base64 -d {name} > {name}.png")
_AS_TEXT = Foreign("an image that was saved as text, which has lost bytes", "copy it again, as binary")
_ANSWER = "less {name} shows what came in its place"
_PAGE = Foreign("a web page, not an image", _ANSWER)
_JSON = Foreign("JSON, not an image", _ANSWER)
_XML = Foreign("XML, not an image", _ANSWER)
_ZEROS = Foreign("nothing but zero bytes", "copy it again: it was never written")

_BEGINNINGS: tuple[tuple[int, bytes, Foreign], ...] = (
    # Those of images. Of two that fit, the longer one stands first.
    (0, b"II*\0\x10\0\0\0CR", _RAW),
    *((0, magic, _RAW) for magic in (b"IIU\0", b"IIRO", b"IIRS", b"MMOR", b"FUJIFILMCCD-RAW", b"FOVb", b"\0MRM")),
    *((6, magic, _RAW) for magic in (b"HEAPCCDR", b"HEAPJPGM")),
    (4, b"ftypcrx ", _RAW),
    *((0, magic, _TIFF) for magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    (0, b"II\xbc", _JPEG_XR),
    *((0, b"\0\0\0\x0c" + magic, _JPEG_2000) for magic in (b"jP  \r\n\x87\n", b"jP\x1a\x1a\r\n\x87\n")),
    (0, b"\xff\x4f\xff\x51", _JPEG_2000),
    *((0, magic, _JPEG_XL) for magic in (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")),
    (0, b"\xff\xd8\xff\xf7", _image("JPEG-LS", "ffmpeg -i {name} {name}.png")),
    *((0, b"\0\0" + kind + bytes(5), _TGA) for kind in (b"\2", b"\3", b"\x0a", b"\x0b")),  # a CUR has a number there
    (0, b"\0\0\1\0", _ICON),
    (0, b"\0\0\2\0", _image("a cursor (CUR)")),
    (8, b"ACON", _image("an animated cursor (ANI)")),
    (0, b"icns", _image("an icon (ICNS)", "icns2png -x {name}")),
    (0, b"8BPS\0\1", _image("PSD")),
    (0, b"8BPS\0\2", _image("PSB")),
    (0, b"gimp xcf", _image("XCF")),
    (0, b"\x8aMNG", _image("MNG")),
    (0, b"\x8bJNG", _image("JNG")),
    (0, b"qoif", _image("QOI")),
    (0, b"DDS ", _image("DDS")),
    (0, b"\x76\x2f\x31\x01", _image("OpenEXR")),
    *((0, magic, _HDR) for magic in (b"#?RADIANCE", b"#?RGBE")),
    (0, b"SIMPLE  =", _FITS),
    (0, b"BPG\xfb", _image("BPG", "bpgdec -o {name}.png {name}")),
    (0, b"FLIF", _image("FLIF", "flif -d {name} {name}.png")),
    (0, b"AT&TFORM", _image("DjVu", "ddjvu -format=tiff -page=1 {name} {name}.tif; magick {name}.tif {name}.png")),
    (0, b"\xabKTX ", _image("KTX")),
    (0, b"\x0a\x05\x01\x08", _image("PCX")),
    (0, b"\x01\xda", _image("SGI")),
    (0, b"\x59\xa6\x6a\x95", _image("Sun raster")),
    (0, b"/* XPM */", _image("XPM")),
    (0, b"\xd7\xcd\xc6\x9a", _image("WMF")),
    (40, b" EMF", _image("EMF")),
    (128, b"DICM", _image("DICOM", "dcm2img {name} {name}.png")),
    (0, b"%PDF", _PDF),
    *((0, magic, _POSTSCRIPT) for magic in (b"%!PS", b"\xc5\xd0\xd3\xc6")),
    # Those of videos and sounds.
    (4, b"ftypM4A ", _SOUND),
    *((0, magic, _SOUND) for magic in (b"OggS", b"ID3", b"fLaC")),
    (8, b"WAVE", _SOUND),
    *((4, magic, _VIDEO) for magic in (b"ftyp", b"moov", b"mdat", b"wide")),
    (8, b"AVI ", _VIDEO),
    *(
        (0, magic, _VIDEO)
        for magic in (b"\x1a\x45\xdf\xa3", b"FLV\1", b"\0\0\1\xba", b"\0\0\1\xb3", b"\x30\x26\xb2\x75")
    ),
    # Those of archives.
    *((0, magic, _ZIP) for magic in (b"PK\3\4", b"PK\5\6")),
    (0, b"7z\xbc\xaf\x27\x1c", _archive("7z", "7z x {name}")),
    (0, b"Rar!\x1a\x07", _archive("RAR", "unrar x {name}")),
    (257, b"ustar", _archive("tar", "tar -xf {name}")),
    (0, b"\x1f\x8b", _archive("gzip", "gunzip -k {name}, or tar -xf {name}")),
    (0, b"BZh", _archive("bzip2", "bunzip2 -k {name}, or tar -xf {name}")),
    (0, b"\xfd7zXZ\0", _archive("xz", "xz -dk {name}, or tar -xf {name}")),
    (0, b"\x28\xb5\x2f\xfd", _archive("zstd", "zstd -d {name}, or tar -xf {name}")),
    # What stands in an image's place.
    (
        0,
        b"version https://git-lfs.github.com/spec/",
        Foreign("a pointer of Git LFS, not the image", "git lfs pull"),
    ),
    *(
        (0, magic, Foreign("what macOS notes about a file, not the image", "the image has the same name without ._"))
        for magic in (b"\0\5\x16\7", b"\0\5\x16\0")
    ),
    (0, b"book\0\0\0\0mark", Foreign("an alias of macOS, not the image", "give the file that it leads to")),
    (0, b"L\0\0\0\1\x14\2\0", Foreign("a shortcut of Windows, not the image", "give the file that it leads to")),
    (0, b"[InternetShortcut]", Foreign("a link to a web page, not an image", "cat {name} shows the URL")),
    (0, b"\x93NUMPY", Foreign("an array of NumPy, not an image")),
    (0, b"\x89PNG\n\x1a\n", _AS_TEXT),
    (0, b"\x89PNG\r\r\n\x1a", _AS_TEXT),
    *((0, magic, _AS_TEXT) for magic in (b"\xef\xbf\xbdPNG", b"\xc2\x89PNG", b"\xef\xbf\xbd" * 3, b"\xc3\xbf\xc3\x98")),
    *((0, magic, _BASE64) for magic in (b"iVBORw0KGgo", b"/9j/", b"R0lGODlh", b"R0lGODdh", b"UklGR")),
    (0, b"data:image/", Foreign("a data: URL, not an image", "sed 's/^.*,//' {name} | base64 -d > {name}.png")),
)
_TEXTS: tuple[tuple[bytes, Foreign], ...] = (
    (rb"(?:<\?xml[^>]{0,200}>|<!--(?:(?!-->).){0,1000}-->|<!doctype\s[^>]{0,400}>|\s)*<(?:\w{1,20}:)?svg\b", _SVG),
    (
        rb"(?:<!--(?:(?!-->).){0,1000}-->|<\?xml[^>]{0,200}>|\s)*<(?:!doctype\s+html|html|head|body|title|script)\b",
        _PAGE,
    ),
    (rb"<\?xml\b|<[a-z][\w:]{0,40}[\s>]", _XML),
    (rb'(?:\{\s*["}]|\[\s*[\]{"])', _JSON),
    (rb"P[1-6]\s+(?:#[^\n]{0,200}\n\s*)*\d+\s+\d+\s|P7\nWIDTH|P[Ff]\n", _PNM),
    (rb"%pdf-", _PDF),
    (rb"%!ps", _POSTSCRIPT),
)
"""Patterns of text, behind a byte-order mark and white space; compiled when something is none of what we take."""
_HEAD = 4096
"""Bytes that are looked at."""
_SOF = {
    **dict.fromkeys((0xC3, 0xC7, 0xCB, 0xCF), "a lossless JPEG"),
    **dict.fromkeys((0xC5, 0xC6, 0xCD, 0xCE), "a hierarchical JPEG"),
    **dict.fromkeys((0xC9, 0xCA), "an arithmetic-coded JPEG"),
}


def foreign(data: bytes) -> Foreign | None:
    """What a file's bytes are, of what is no picture of ours; None where nobody knows."""
    head = data[:_HEAD]
    if head[4:8] == b"ftyp" and re.search(b"avi[fs]", head[8:40]):
        return _AVIF
    if _unpacked(head).lstrip().startswith((b"<svg", b"<?xml")) and head.startswith(b"\x1f\x8b"):
        return _SVG
    for at, magic, kind in _BEGINNINGS:
        if head[at : at + len(magic)] == magic:
            return kind
    text = _as_utf_8(head).lstrip()
    for pattern, kind in _TEXTS:
        if re.match(pattern, text, re.IGNORECASE | re.DOTALL):
            return kind
    if data.endswith(b"TRUEVISION-XFILE.\0"):
        return _TGA
    return _ZEROS if data and not data.strip(b"\0") else None


def unusual_jpeg(sof: bytes) -> Foreign | None:
    """What a JPEG is that has this frame header, if it is one that few programs read; its marker begins it."""
    if len(sof) < 10:
        return None
    bits, components = sof[4], sof[9]
    kind = _SOF.get(sof[1]) or (f"a {bits}-bit JPEG" if bits in (12, 16) else "")
    if not kind and components == 2:
        kind = "a JPEG of two components"
    return _image(kind, _MAGICK_WHOLE) if kind else None


def _unpacked(head: bytes) -> bytes:
    """The beginning of what gzip has packed; nothing of anything else."""
    try:
        return zlib.decompressobj(31).decompress(head, 512)
    except zlib.error:
        return b""


def _as_utf_8(head: bytes) -> bytes:
    """Text as ASCII patterns find it, without its byte-order mark."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16, whose decoder could not be imported in the sandbox
        return head[2:].replace(b"\0", b"")
    return head.removeprefix(b"\xef\xbb\xbf")


UNUSUAL_BMP = _image("a BMP of this kind")
IPHONE_PNG = _image("an iPhone's own PNG", "pngcrush -revert-iphone-optimizations {name} {name}.png")
HINTS = tuple(
    dict.fromkeys(
        kind.hint
        for kind in (
            *(kind for *_, kind in _BEGINNINGS),
            *(kind for _, kind in _TEXTS),
            *(_AVIF, _ZEROS, UNUSUAL_BMP, IPHONE_PNG),
        )
    )
)
"""All that stand above."""
