"""What to tell the user about an image file that we do not open: its format, and a command that converts it."""

from __future__ import annotations

import zlib
from typing import NamedTuple

from llava_cli.images import formats


class Unsupported(NamedTuple):
    """A kind of file that we do not open."""

    description: str
    """Words that follow the file's name."""
    hint: str = ""
    """The next command; {name} is the file, quoted for a shell."""


_FIRST_FRAME = "magick {name}'[0]' {name}.png"
_WHOLE_IMAGE = "magick {name} {name}.png"


def _image(kind: str, convert: str = _FIRST_FRAME) -> Unsupported:
    return Unsupported(f"{kind} is not a supported image", convert)


def _archive(kind: str, unpack: str) -> Unsupported:
    return Unsupported(f"a {kind} archive, not an image", unpack)


_SHOW_CONTENT = "less {name} shows what came in its place"
_UNSUPPORTED = {
    "raw": _image("a camera's RAW"),
    "tiff": _image("a TIFF of this kind"),
    "jpeg-xr": _image("JPEG XR", "JxrDecApp -i {name} -o {name}.bmp"),
    "jpeg-2000": _image("JPEG 2000"),
    "jpeg-ls": _image("JPEG-LS", "ffmpeg -i {name} {name}.png"),
    "tga": _image("TGA"),
    "ico": _image("an icon (ICO)"),
    "cur": _image("a cursor (CUR)"),
    "ani": _image("an animated cursor (ANI)"),
    "icns": _image("an icon (ICNS)", "icns2png -x {name}"),
    "psd": _image("PSD"),
    "psb": _image("PSB"),
    "xcf": _image("XCF"),
    "mng": _image("MNG"),
    "jng": _image("JNG"),
    "qoi": _image("QOI"),
    "dds": _image("DDS"),
    "openexr": _image("OpenEXR"),
    "hdr": _image("Radiance HDR"),
    "fits": _image("FITS"),
    "bpg": _image("BPG", "bpgdec -o {name}.png {name}"),
    "flif": _image("FLIF", "flif -d {name} {name}.png"),
    "djvu": _image("DjVu", "ddjvu -format=tiff -page=1 {name} {name}.tif; magick {name}.tif {name}.png"),
    "ktx": _image("KTX"),
    "pcx": _image("PCX"),
    "sgi": _image("SGI"),
    "sun-raster": _image("Sun raster"),
    "xpm": _image("XPM"),
    "wmf": _image("WMF"),
    "emf": _image("EMF"),
    "dicom": _image("DICOM", "dcm2img {name} {name}.png"),
    "postscript": _image("PostScript", "magick -density 150 {name} {name}.png"),
    "svg": _image("SVG", "rsvg-convert -o {name}.png {name}"),
    "avif": _image("AVIF", _WHOLE_IMAGE),
    "pnm": _image("PNM"),
    "audio": Unsupported("a sound, not an image"),
    "video": Unsupported("a video, not an image", "ffmpeg -i {name} -frames:v 1 {name}.png"),
    "zip": _archive("ZIP", "unzip {name} -d FOLDER"),
    "7z": _archive("7z", "7z x {name}"),
    "rar": _archive("RAR", "unrar x {name}"),
    "tar": _archive("tar", "tar -xf {name}"),
    "gzip": _archive("gzip", "gunzip -k {name}, or tar -xf {name}"),
    "bzip2": _archive("bzip2", "bunzip2 -k {name}, or tar -xf {name}"),
    "xz": _archive("xz", "xz -dk {name}, or tar -xf {name}"),
    "zstd": _archive("zstd", "zstd -d {name}, or tar -xf {name}"),
    "git-lfs": Unsupported("a pointer of Git LFS, not the image", "git lfs pull"),
    "appledouble": Unsupported(
        "what macOS notes about a file, not the image", "the image has the same name without ._"
    ),
    "macos-alias": Unsupported("an alias of macOS, not the image", "give the file that it leads to"),
    "windows-shortcut": Unsupported("a shortcut of Windows, not the image", "give the file that it leads to"),
    "url-shortcut": Unsupported("a link to a web page, not an image", "cat {name} shows the URL"),
    "numpy": Unsupported("an array of NumPy, not an image"),
    "image-as-text": Unsupported("an image that was saved as text, which has lost bytes", "copy it again, as binary"),
    "base64": Unsupported("an image as base64 text", "base64 -d {name} > {name}.png"),
    "data-url": Unsupported("a data: URL, not an image", "sed 's/^.*,//' {name} | base64 -d > {name}.png"),
    "html": Unsupported("a web page, not an image", _SHOW_CONTENT),
    "json": Unsupported("JSON, not an image", _SHOW_CONTENT),
    "xml": Unsupported("XML, not an image", _SHOW_CONTENT),
    "zeros": Unsupported("nothing but zero bytes", "copy it again: it was never written"),
    "bmp": _image("a BMP of this kind"),
    "iphone-png": _image("an iPhone's own PNG", "pngcrush -revert-iphone-optimizations {name} {name}.png"),
}
UNUSUAL_BMP, UNUSUAL_TIFF, IPHONE_PNG = _UNSUPPORTED["bmp"], _UNSUPPORTED["tiff"], _UNSUPPORTED["iphone-png"]
RAW, AVIF = _UNSUPPORTED["raw"], _UNSUPPORTED["avif"]
HINTS = tuple(dict.fromkeys(kind.hint for kind in _UNSUPPORTED.values()))
"""Every hint of this module."""
_JPEG_PROCESSES = {
    **dict.fromkeys((0xC3, 0xC7, 0xCB, 0xCF), "a lossless JPEG"),
    **dict.fromkeys((0xC5, 0xC6, 0xCD, 0xCE), "a hierarchical JPEG"),
    **dict.fromkeys((0xC9, 0xCA), "an arithmetic-coded JPEG"),
}
"""Uncommon coding processes of JPEG by their start-of-frame marker (ITU-T T.81, table B.1)."""


def identify(data: bytes) -> Unsupported | None:
    """What a file is that is no image of a supported format; None if its format is unknown."""
    name = _unsupported_format(data)
    return _UNSUPPORTED[name] if name else None


def _unsupported_format(data: bytes) -> str | None:
    head = data[: formats.HEAD_BYTES]
    if formats.is_film(head):
        return "video"
    if head.startswith(b"\x1f\x8b") and _gunzip(head).lstrip().startswith((b"<svg", b"<?xml")):
        return "svg"
    if name := formats.format_of(head, _UNSUPPORTED) or formats.text_format_of(head):
        return name
    if data.endswith(b"TRUEVISION-XFILE.\0"):
        return "tga"
    return "zeros" if data and not data.strip(b"\0") else None


def unusual_jpeg(frame_header: bytes) -> Unsupported | None:
    """What a JPEG is that few programs read, by its start-of-frame segment; None for any other."""
    if len(frame_header) < 10:
        return None
    marker, bits, components = frame_header[1], frame_header[4], frame_header[9]
    kind = _JPEG_PROCESSES.get(marker) or (f"a {bits}-bit JPEG" if bits in (12, 16) else "")
    if not kind and components == 2:
        kind = "a JPEG of two components"
    return _image(kind, _WHOLE_IMAGE) if kind else None


def _gunzip(head: bytes) -> bytes:
    """The first 512 bytes that gzip data unpacks to; none for anything else."""
    try:
        return zlib.decompressobj(31).decompress(head, 512)
    except zlib.error:
        return b""
