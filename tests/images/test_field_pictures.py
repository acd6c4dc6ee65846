"""Pictures as people have them: what a browser shows is answered, and the rest is called what it is.

| kind | example | own variants | right value | test |
|---|---|---|---|---|
| metadata decides | 1.8 MB of packed text | iCCP, many tEXt, gAMA, fcTL | the pixels | `test_png_metadata_…` |
| in other formats | a short APP0 of a JPEG | Adobe, ICC, MPF; WEBP, GIF | the pixels | `test_metadata_of_…` |
| orientation counts | EXIF beside broken text | PNG, JPEG, WEBP | turned | `test_the_orientation_…` |
| truncation | a cut PNG with such a text | JPEG | truncated, and taken where allowed | `test_truncation_…` |
| not ours | ICO, JPEG 2000 | 50 others, by content | its name, and a command | `test_what_is_not_ours_…` |
| alpha 0 in a BMP | V4 header | V5, and alpha that counts | the colors | `test_the_alpha_of_a_bmp` |
| wholly transparent | RGBA PNG | GIF, WEBP, palette | said so | `test_nothing_to_be_seen` |
| proxies | http_proxy | ALL_PROXY, no_proxy, socks, lists | by it, or a line | `test_proxy_…` |
| other URLs | file:///a.png | escapes, a host, ftp, data | the file, or a line | `test_file_url`, `test_other_urls` |
| suggestions | U+202F in a name | a space, quote, dash | as a shell takes it | `test_suggestions_…` |
| endings | .jfif | .pjp, .dib, .apng, .mpo | meant as a picture | `test_endings` |
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import films
from helpers.command import Run
from helpers.peer import Peer, serving
from helpers.picture_bytes import END, TURN, encoded, header, idat, noise, opened, pixels, png, tiff_exif
from helpers.tables import for_each
from PIL import Image, TiffImagePlugin

from llava_cli.errors import BadImage, InputMissing, UsageError
from llava_cli.images import fetch, reader
from llava_cli.images.decode import decode
from llava_cli.images.reader import looks_like_picture, open_picture

QUESTION = "what is this?"
ROW = bytes([255, 0, 0, 0, 128, 0, 0, 0, 255])
COLORS = [(255, 0, 0), (0, 128, 0), (0, 0, 255)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def with_chunk(raw: bytes, after: bool = False) -> bytes:
    """Three pixels, and a chunk before or behind them."""
    whole = png(header(3, 1), idat(ROW), END)
    return whole[:-12] + raw + whole[-12:] if after else whole[:33] + raw + whole[33:]


PACKED = zlib.compress(b"workflow " * 200_000)
PNGS = {
    "zTXt of 1.8 MB": chunk(b"zTXt", b"workflow\0\0" + PACKED),
    "iTXt of 1.8 MB": chunk(b"iTXt", b"workflow\0\1\0\0\0" + PACKED),
    "iCCP of 1.8 MB": chunk(b"iCCP", b"profile\0\0" + PACKED),
    "iCCP of another compression": chunk(b"iCCP", b"profile\0\7"),
    "iCCP without a name": chunk(b"iCCP", b""),
    "much tEXt": chunk(b"tEXt", b"a\0" + bytes(1_000_000)) * 70,
    "tEXt with a wrong checksum": chunk(b"tEXt", b"Comment\0by hand", 77),
    "tIME with a wrong checksum": chunk(b"tIME", bytes(7), 77),
    "short gAMA": chunk(b"gAMA", b"\1"),
    "short pHYs": chunk(b"pHYs", b"\1"),
    "empty sRGB": chunk(b"sRGB", b""),
    "short cHRM": chunk(b"cHRM", b"\1\2"),
    "tRNS that is too short": chunk(b"tRNS", b"\0"),
    "fcTL out of order": chunk(b"acTL", bytes((0, 0, 0, 2, 0, 0, 0, 0))) + chunk(b"fcTL", bytes([9] * 26)),
    "eXIf of nonsense": chunk(b"eXIf", b"nonsense", 77),
}


@for_each("after, name", itertools.product([False, True], PNGS))
def test_png_metadata_does_not_decide(name: str, after: bool) -> None:
    assert pixels(opened(with_chunk(PNGS[name], after))) == [COLORS]


def test_png_transparency_with_a_wrong_checksum_does_not_count() -> None:
    assert pixels(opened(with_chunk(chunk(b"tRNS", bytes((0, 255, 0, 0, 0, 0)), 77)))) == [COLORS]


def test_png_metadata_that_is_cut_off_does_not_decide() -> None:
    assert pixels(opened(with_chunk(chunk(b"tEXt", bytes(500)), after=True)[:-200])) == [COLORS]


def test_the_commands_answer_about_it(run: Run, folder: Path) -> None:
    (folder / "made.png").write_bytes(with_chunk(PNGS["zTXt of 1.8 MB"]))
    assert run("ask", "made.png", QUESTION, "--max-tokens", "1", "-q").exit_code == 0
    assert run("batch", ".", QUESTION, "--max-tokens", "1", "-q", "-o", "../out.jsonl").exit_code == 0
    assert json.loads((folder / "../out.jsonl").read_text().splitlines()[0])["status"] == "ok"


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">HH", 0xFF00 | marker, len(data) + 2) + data


SEGMENTS = {
    "a short JFIF": segment(0xE0, b"JFIF\0"),
    "a short Adobe": segment(0xEE, b"Adobe"),
    "an empty ICC": segment(0xE2, b"ICC_PROFILE\0"),
    "a short Photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\4\4"),
    "an MPF of nonsense": segment(0xE2, b"MPF\0nonsense"),
    "an Exif of nonsense": segment(0xE1, b"Exif\0\0nonsense"),
    "an empty XMP": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0"),
    "an empty comment": segment(0xFE, b""),
}


@for_each("name", SEGMENTS)
def test_metadata_of_a_jpeg_does_not_decide(name: str) -> None:
    whole = encoded(noise(), "JPEG")
    for at in (2, 20):
        assert pixels(opened(whole[:at] + SEGMENTS[name] + whole[at:])) == pixels(opened(whole))


@for_each("kind", [b"EXIF", b"XMP ", b"ICCP", b"zzzz"])
def test_metadata_of_a_webp_does_not_decide(kind: bytes) -> None:
    whole = encoded(noise(), "WEBP", lossless=True, exif=Image.Exif(), xmp=b"<x/>")
    cut = whole + kind + struct.pack("<I", 5000) + b"only this"
    for data in (cut, cut[:4] + struct.pack("<I", len(cut) + 5000) + cut[8:]):
        assert pixels(opened(data)) == pixels(opened(whole))


def test_no_cut_is_more_than_a_reason(folder: Path) -> None:
    """Wherever a file ends, also in the midst of a header: a row's reason, and no crash."""
    made = encoded(noise(), "WEBP", lossless=True, exif=Image.Exif(), xmp=b"<x/>")
    for data in (made, PNGS["zTXt of 1.8 MB"], encoded(noise(), "JPEG"), encoded(noise(), "GIF")):
        for end in range(1, 64):
            with pytest.raises(BadImage):
                decode(data[:end], "x")


def test_metadata_of_a_gif_does_not_decide() -> None:
    whole = encoded(noise().convert("P"), "GIF")
    at = 13 + 3 * 256
    for odd in (b"!\xf9\1\0\0", b"!\xff\0", b"!\xfe\3abc\0", b"!\xf9\3\0\0\0\0"):
        assert pixels(opened(whole[:at] + odd + whole[at:])) == pixels(opened(whole))


def test_the_orientation_counts_beside_broken_metadata() -> None:
    turn = tiff_exif(TURN)
    text = chunk(b"zTXt", b"workflow\0\0" + PACKED)
    exif = chunk(b"eXIf", turn.removeprefix(b"Exif\0\0"))
    assert pixels(opened(with_chunk(text + exif))) == [[color] for color in COLORS]
    whole = encoded(noise(), "JPEG")
    assert opened(whole[:2] + SEGMENTS["a short Adobe"] + segment(0xE1, turn) + whole[2:]).size == (30, 40)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_truncation_is_seen_behind_broken_metadata(kind: str) -> None:
    whole = encoded(noise(), kind)
    at, odd = (33, PNGS["zTXt of 1.8 MB"]) if kind == "PNG" else (2, SEGMENTS["a short Adobe"])
    cut = whole[:at] + odd + whole[at : len(whole) * 3 // 4]
    with pytest.raises(BadImage, match=r"truncated$"):
        decode(cut, "x")
    found = decode(cut, "x", allow_truncated=True)
    assert found.truncated and found.image.getpixel((0, 0)) == opened(whole).getpixel((0, 0))


# What is not ours.


def jpeg_with(sof: int, bits: int = 8) -> bytes:
    data = bytearray(encoded(noise(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 1], data[at + 4] = sof, bits
    return bytes(data)


def box(brand: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0" + brand + b"isom" + bytes(40)


SUPPORTED = "is not a supported image"
TIFF_RGB = struct.pack("<HHIH", 262, 3, 1, 2)[:-1]
"""The tag of the colors, whose value is replaced by one that nobody has."""
NO_FILM = "truncated or damaged" if films.AVAILABLE else "films need Python 3.11 or later"


def raw_tiff(tag: int, kind: int) -> bytes:
    """A TIFF whose first picture is small, beside a tag that cameras write."""
    image = Image.new("RGB", (8, 8))
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[254] = 1
    tags.tagtype[tag] = kind
    tags[tag] = 8
    return encoded(image, "TIFF", tiffinfo=tags)


FOREIGN = {
    "ico": (encoded(noise(), "ICO"), f"an icon (ICO) {SUPPORTED}"),
    "cur": (b"\0\0\2\0\1\0" + bytes(40), f"a cursor (CUR) {SUPPORTED}"),
    "icns": (b"icns" + bytes(40), f"an icon (ICNS) {SUPPORTED}"),
    "jp2": (encoded(noise(), "JPEG2000"), f"JPEG 2000 {SUPPORTED}"),
    "j2k": (encoded(noise(), "JPEG2000", no_jp2=True), f"JPEG 2000 {SUPPORTED}"),
    "psd": (b"8BPS\0\1" + bytes(40), f"PSD {SUPPORTED}"),
    "psb": (b"8BPS\0\2" + bytes(40), f"PSB {SUPPORTED}"),
    "12 bits": (jpeg_with(0xC1, 12), f"a 12-bit JPEG {SUPPORTED}"),
    "16 bits": (jpeg_with(0xC3, 16), f"a lossless JPEG {SUPPORTED}"),
    "hierarchical": (jpeg_with(0xC5), f"a hierarchical JPEG {SUPPORTED}"),
    "jpeg-ls": (b"\xff\xd8\xff\xf7\0\x0b\x08" + bytes(40), f"JPEG-LS {SUPPORTED}"),
    "tiff of no kind": (
        encoded(noise(), "TIFF").replace(TIFF_RGB, b"\6\1\3\0\1\0\0\0\x23"),
        f"a TIFF of this kind {SUPPORTED}",
    ),
    "dng": (raw_tiff(50706, 4), f"a camera's RAW {SUPPORTED}"),
    "nef": (raw_tiff(330, 4), f"a camera's RAW {SUPPORTED}"),
    "cr2": (b"II*\0\x10\0\0\0CR\2\0" + bytes(40), f"a camera's RAW {SUPPORTED}"),
    "cr3": (box(b"crx "), f"a camera's RAW {SUPPORTED}"),
    "raf": (b"FUJIFILMCCD-RAW 0201" + bytes(40), f"a camera's RAW {SUPPORTED}"),
    "svg": (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!DOCTYPE svg PUBLIC 'a' 'b'>\n<svg/>", f"SVG {SUPPORTED}"),
    "utf-16 svg": ("\ufeff<svg/>".encode("utf-16-le"), f"SVG {SUPPORTED}"),
    "svgz": (gzip.compress(b"<svg>" + noise().tobytes() + b"</svg>"), f"SVG {SUPPORTED}"),
    "eps": (b"\xc5\xd0\xd3\xc6" + bytes(40), f"PostScript {SUPPORTED}"),
    "dds": (b"DDS \x7c\0\0\0" + bytes(40), f"DDS {SUPPORTED}"),
    "tga": (encoded(noise(), "TGA"), f"TGA {SUPPORTED}"),
    "ppm": (encoded(noise(), "PPM"), f"PNM {SUPPORTED}"),
    "ascii pgm": (b"P2\n# by hand\n2 1\n9\n0 9\n", f"PNM {SUPPORTED}"),
    "exr": (b"\x76\x2f\x31\x01\2\0\0\0", f"OpenEXR {SUPPORTED}"),
    "hdr": (b"#?RADIANCE\n", f"Radiance HDR {SUPPORTED}"),
    "fits": (b"SIMPLE  =                    T", f"FITS {SUPPORTED}"),
    "qoi": (b"qoif" + bytes(40), f"QOI {SUPPORTED}"),
    "mng": (b"\x8aMNG\r\n\x1a\n" + bytes(40), f"MNG {SUPPORTED}"),
    "dicom": (bytes(128) + b"DICM" + bytes(40), f"DICOM {SUPPORTED}"),
    "iphone png": (
        png((b"CgBI", b"\x50\0\x20\2"), header(3, 1), (b"IDAT", zlib.compress(b"\0" + ROW)[2:-4]), END),
        f"an iPhone's own PNG {SUPPORTED}",
    ),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n",
        "a pointer of Git LFS, not the image",
    ),
    "html": (b"<!DOCTYPE html><title>Sign in</title>", "a web page, not an image"),
    "page": (b"\n<!-- a --><HTML lang=en><body>", "a web page, not an image"),
    "json": (b'{"error": "not found"}', "JSON, not an image"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML, not an image"),
    "mp4": (box(b"isom"), NO_FILM),
    "mov": (box(b"qt  "), NO_FILM),
    "webm": (b"\x1a\x45\xdf\xa3" + bytes(40), NO_FILM),
    "mpeg": (b"\0\0\1\xb3" + bytes(40), "a video, not an image"),
    "zip": (b"PK\3\4" + bytes(40), "a ZIP archive, not an image"),
    "gz": (gzip.compress(b"words"), "a gzip archive, not an image"),
    "tar": (bytes(257) + b"ustar\x0000" + bytes(300), "a tar archive, not an image"),
    "appledouble": (b"\0\5\x16\7\0\2\0\0Mac OS X        ", "what macOS notes about a file, not the image"),
    "lnk": (b"L\0\0\0\1\x14\2\0" + bytes(60), "a shortcut of Windows, not the image"),
    "url": (b"[InternetShortcut]\r\nURL=http://x/\r\n", "a link to a web page, not an image"),
    "base64": (b"iVBORw0KGgoAAAANSUhEUgAA", "an image as base64 text"),
    "as text": (b"\xef\xbf\xbdPNG\r\n\x1a\n" + bytes(40), "an image that was saved as text, which has lost bytes"),
    "zeros": (bytes(4000), "nothing but zero bytes"),
    "text": (b"hello", "not an image"),
    "nothing": (b"", "empty file"),
}


@for_each("name", FOREIGN, own=(folder,))
def test_what_is_not_ours_is_named(name: str, folder: Path) -> None:
    data, reason = FOREIGN[name]
    (folder / "saved.jpg").write_bytes(data)
    with pytest.raises(BadImage) as raised:
        open_picture("saved.jpg")
    assert raised.value.reason == reason
    assert "{name}" not in raised.value.hint


def test_text_takes_no_long_look() -> None:
    """However often a pattern might begin or end in it."""
    for text in (b"<!-- --> " * 400, b"<!--" * 1000, b"P1 #\n" * 600, b"<?xml" + b"?> <?xml" * 500):
        with pytest.raises(BadImage):
            decode(text, "x")


@for_each(
    ("file", "kind", "hint"),
    [
        ("my icon.jpg", "ico", "magick 'my icon.jpg''[0]' 'my icon.jpg'.png"),
        ("it's.jpg", "dng", "magick 'it'\"'\"'s.jpg''[0]' 'it'\"'\"'s.jpg'.png"),
        ("-v.png", "json", "less ./-v.png shows what came in its place"),
        ("a\u202fb.jpg", "12 bits", r"magick $'a\xe2\x80\xafb.jpg' $'a\xe2\x80\xafb.jpg'.png"),
        ("photo.jpg", "lfs", "git lfs pull"),
    ],
    own=(folder,),
)
def test_what_is_not_ours_comes_with_a_command(file: str, kind: str, hint: str, run: Run, folder: Path) -> None:
    (folder / file).write_bytes(FOREIGN[kind][0])
    said = run("ask", "--", file, QUESTION)
    assert said.exit_code == 65
    assert said.stderr.splitlines()[1:] == [f"  {hint}"]


def bmp(size: int, alphas: list[int]) -> bytes:
    """A row of red, green and blue with 32 bits a pixel and a mask for alpha, by a header of this size."""
    body = b"".join(bytes((*color[::-1], alpha)) for color, alpha in zip(COLORS, alphas, strict=True))
    info = struct.pack("<IiiHHIIiiII", size, 3, 1, 1, 32, 3, len(body), 0, 0, 0, 0)
    info += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = info.ljust(size, b"\0")
    return b"BM" + struct.pack("<IHHI", 14 + size + len(body), 0, 0, 14 + size) + info + body


@pytest.mark.parametrize("size", [56, 108, 124])
def test_the_alpha_of_a_bmp(size: int) -> None:
    """Where it is 0 everywhere nobody has thought of it; else it counts."""
    assert pixels(opened(bmp(size, [0, 0, 0]))) == [COLORS]
    assert pixels(opened(bmp(size, [255, 0, 255]))) == [[COLORS[0], (255, 255, 255), COLORS[2]]]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_nothing_to_be_seen(kind: str, run: Run, folder: Path) -> None:
    (folder / "clear.png").write_bytes(encoded(Image.new("RGBA", (9, 9), (255, 0, 0, 0)), kind))
    said = run("ask", "clear.png", QUESTION)
    assert said.exit_code == 65
    assert said.stderr.startswith("llava: clear.png: wholly transparent: nothing of it can be seen\n  magick clear.png")


# URLs.


@pytest.fixture
def proxy() -> Iterator[Peer]:
    with serving() as peer:
        yield peer


@for_each("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"], own=(folder, proxy))
def test_proxy_of_the_environment(variable: str, proxy: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, proxy.url.replace("http://", "http://me:secret@"))
    with pytest.raises(InputMissing, match="the server answered"):
        open_picture("http://pictures.example:81/a.png")
    assert proxy.targets == ["http://pictures.example:81/a.png"]
    assert proxy.headers[0]["Proxy-Authorization"] == "Basic bWU6c2VjcmV0"


def test_proxy_is_not_asked_where_no_proxy_says_so(proxy: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(InputMissing, match="the server answered"):
        open_picture(f"{proxy.url}/a.png")
    assert proxy.targets == ["/a.png"]


@pytest.mark.parametrize("address", ["socks5://me:secret@127.0.0.1:9", "https://127.0.0.1:9", "socks5h://x"])
def test_proxy_of_another_kind_is_named(address: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", address)
    said = run("ask", "http://pictures.example/a.png", QUESTION)
    assert said.stderr.splitlines() == [
        "llava: http://pictures.example/a.png: the proxy for it is not an http:// address",
        "  NO_PROXY=pictures.example goes without it",
    ]
    assert said.exit_code == UsageError.exit_code


def test_proxy_is_not_used_for_data(proxy: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", proxy.url)

    def unknown(host: str, port: int) -> str:
        raise OSError(f"name or service not known: {host}")

    monkeypatch.setattr(fetch, "_resolve", unknown)
    with pytest.raises(InputMissing) as raised:
        fetch.fetch("http://pictures.example/a.png", public=True)
    assert raised.value.hint.startswith("proxies are not used for URLs in lists")
    assert proxy.targets == []


def test_file_url(run: Run, folder: Path) -> None:
    (folder / "my photo.png").write_bytes(encoded(noise(), "PNG"))
    (folder / "a#b.png").write_bytes(encoded(noise(), "PNG"))
    here = folder.as_posix()
    for url in (f"file://{here}/my%20photo.png", f"file://localhost{here}/my photo.png", f"FILE:{here}/my%20photo.png"):
        assert looks_like_picture(url)
        assert open_picture(url).name == f"{here}/my photo.png"
    for url in (f"file://{here}/a#b.png", f"file://{here}/a%23b.png"):
        assert open_picture(url).name == f"{here}/a#b.png"
    said = run("ask", f"file://{here}/my%20photo.png", QUESTION, "--max-tokens", "1", "-q")
    assert (said.exit_code, said.stderr) == (0, "")


def test_file_url_of_another_machine(run: Run) -> None:
    said = run("ask", "file://nas/a.png", QUESTION)
    assert (said.exit_code, said.stderr) == (66, "llava: file://nas/a.png: a file of another machine (nas)\n")


@pytest.mark.parametrize(
    ("url", "reason", "hint"),
    [
        (
            "sftp://h/a.png",
            "sftp://h/a.png: sftp:// URLs are not fetched",
            "curl sftp://h/a.png | llava ask - QUESTION",
        ),
        ("ftp://h/a b", "ftp://h/a b: ftp:// URLs are not fetched", "curl -L 'ftp://h/a b' | llava ask - QUESTION"),
        ("data:image/png;base64,aaaa", "data:…: data: URLs are not taken", "base64 -d FILE | llava ask - QUESTION"),
    ],
)
def test_other_urls(url: str, reason: str, hint: str, run: Run) -> None:
    said = run("ask", url, QUESTION)
    assert (said.exit_code, said.stderr) == (66, f"llava: {reason}\n  {hint}\n")


@for_each("name", ["shot\u202fPM.png", "my photo.png", "it's.png", "-kitten.png"], own=(folder,))
def test_suggestions_can_be_typed(name: str, run: Run, folder: Path) -> None:
    (folder / name).write_bytes(b"")
    said = run("ask", "--", name[:-5] + "g.png", QUESTION)
    hint = said.stderr.splitlines()[1].strip()
    typed = hint.removeprefix("did you mean ").removesuffix("?")
    found = subprocess.run(["bash", "-c", f"printf %s {typed}"], cwd=folder, capture_output=True, check=True)
    assert (folder / found.stdout.decode()).exists()


def test_a_folder_is_named_as_a_shell_takes_it(run: Run, folder: Path) -> None:
    (folder / "a\u202fb").mkdir()
    hint = run("ask", "a\u202fb", QUESTION).stderr.splitlines()[1]
    assert hint == r"  llava ask $'a\xe2\x80\xafb'/PICTURE QUESTION"


@for_each("ending", [".jfif", ".jpe", ".pjpeg", ".pjp", ".dib", ".apng", ".mpo", ".hif", ".JFIF"])
def test_endings(ending: str) -> None:
    assert looks_like_picture(f"gone{ending}")
    assert ending.lower() in reader.SUFFIXES


def test_a_mpo_is_a_picture_of_ours() -> None:
    noise().save(file := io.BytesIO(), "MPO", save_all=True, append_images=[noise()])
    assert decode(file.getvalue(), "x").frames == 2
