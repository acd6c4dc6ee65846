"""Every picture that a user may hand over: the good come out upright and RGB, the bad are refused in one line."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pillow_heif
import pytest
from helpers.command import Run
from helpers.pdf_bytes import text_pdf
from helpers.picture_bytes import (
    BAD_BYTES,
    CUT,
    END,
    PROGRESSIVE_CUT,
    TAKE_IT,
    TURN,
    Pixel,
    encoded,
    entry,
    frames,
    header,
    idat,
    make_names,
    noise,
    opened,
    pixels,
    png,
    tiff_exif,
)
from helpers.tables import for_each
from PIL import Image
from typer.testing import Result

from llava_cli import limits
from llava_cli.errors import BadImage, InputMissing, LlavaError, printable
from llava_cli.images import reader, sandbox
from llava_cli.images.decode import decode
from llava_cli.images.reader import looks_like_picture, open_picture
from llava_cli.images.resize import limit_size, make_square
from llava_cli.images.sandbox import SandboxPool

QUESTION = "what is this?"
BLACK, WHITE, RED, GREEN, BLUE = (0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 128, 0), (0, 0, 255)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test stands in a folder of its own, so that names are short."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def near(found: Pixel, wanted: Pixel, most: int) -> bool:
    return all(abs(a - b) <= most for a, b in zip(found, wanted, strict=True))


def assert_refused(result: Result, name: str, reason: str, code: int, hint: str = "") -> None:
    """One line about the file, perhaps a hint, and nothing else."""
    assert result.stderr.splitlines() == [f"llava: {name}: {reason}", *([f"  {hint}"] if hint else [])]
    assert result.exit_code == code
    assert result.stdout == ""


# Refused: what is in the file.


@for_each("name", BAD_BYTES, own=(folder,))
def test_bad_bytes_are_refused(name: str, run: Run, folder: Path) -> None:
    data, reason, hint = BAD_BYTES[name]
    (folder / name).write_bytes(data)
    assert_refused(run("ask", name, QUESTION), name, reason, 65, hint)


@for_each("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_no_cut_is_taken_for_a_whole_picture(kind: str) -> None:
    data = encoded(noise(12, 9), kind)
    whole = opened(data)
    for end in range(len(data)):
        try:
            assert opened(data[:end]) == whole
        except BadImage as error:
            assert error.reason in ("empty file", "not an image", "damaged", "truncated", "truncated or damaged")


def test_damaged_png_data_is_refused_or_read_but_never_black() -> None:
    data = encoded(Image.new("RGB", (9, 7), "white"), "PNG", compress_level=0)
    refused = 0
    for place in range(8, len(data)):
        for value in (0, 255, data[place] ^ 1):
            broken = data[:place] + bytes([value]) + data[place + 1 :]
            for allow in (False, True):
                try:
                    assert opened(broken, allow_truncated=allow).getbbox() is not None
                except BadImage:
                    refused += 1
    assert refused


@for_each(
    ("name", "data", "reason", "hint"),
    [
        ("img.heic", encoded(noise(), "HEIF"), "HEIC needs the extra llava-cli[heic]", "pip install 'llava-cli[heic]'"),
        ("img.jxl", b"\xff\x0a" + bytes(40), "JPEG XL needs pillow-jxl-plugin", "pip install pillow-jxl-plugin"),
        ("paper.pdf", text_pdf("one"), "PDF needs the extra llava-cli[pdf]", "pip install 'llava-cli[pdf]'"),
    ],
    own=(folder,),
)
def test_an_extra_that_is_missing_is_named(
    name: str, data: bytes, reason: str, hint: str, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process has not imported before it gave up its rights is missing in it."""
    decoder = sandbox._Decoder
    monkeypatch.setattr(sandbox, "_Decoder", lambda package: decoder())
    monkeypatch.setattr(reader, "sandbox_pool", SandboxPool)
    (folder / name).write_bytes(data)
    assert_refused(run("ask", name, QUESTION), name, reason, 65, hint)


def test_a_file_over_the_limit_is_refused_without_reading_it_all(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PICTURE_BYTES", 1_000_000)
    with open(folder / "sparse.png", "wb") as file:
        file.truncate(1 << 40)
    assert_refused(run("ask", "sparse.png", QUESTION), "sparse.png", "larger than 1 MB", 65)


# Refused: what the name leads to.


NO_FILE = "no such file or directory"
BAD_NAMES = {
    "photos": ("is a directory", "llava ask photos/PICTURE QUESTION"),
    "my photos": ("is a directory", "llava ask 'my photos'/PICTURE QUESTION"),
    "link": ("is a directory", "llava ask link/PICTURE QUESTION"),
    "loop": ("too many levels of symbolic links", ""),
    "dangling.png": (NO_FILE, ""),
    "fifo.png": ("not a regular file", ""),
    "zero.png": ("not a regular file", ""),
    "/dev/zero": ("not a regular file", ""),
    "zz.jpg": (NO_FILE, ""),
    "kittn.png": (NO_FILE, "did you mean kitten.png?"),
    "./kittens.png": (NO_FILE, "did you mean ./kitten.png?"),
    "kitten.png/img.png": ("not a directory", ""),
    "n" * 300 + ".png": ("file name too long", ""),
    "nul\0": ("embedded null byte", ""),
    "two\nlines.png": (NO_FILE, ""),
    "\x1b[31mred\x1b[0m.png": (NO_FILE, ""),
    "\u202egnp.evil.png": (NO_FILE, ""),
    "\udcff\udcfe.png": (NO_FILE, ""),
}


@for_each("name", BAD_NAMES, own=(folder,))
def test_bad_names_are_refused(name: str, run: Run, folder: Path) -> None:
    make_names(folder)
    reason, hint = BAD_NAMES[name]
    result = run("ask", name, QUESTION)
    assert_refused(result, printable(name), reason, 66, hint)
    assert result.stderr.removesuffix("\n").replace("\n  ", "").isprintable()


def test_an_empty_name_can_be_seen(run: Run) -> None:
    assert_refused(run("ask", "", QUESTION), "''", NO_FILE, 66)


@pytest.fixture
def secret(folder: Path) -> Iterator[Path]:
    """A file that may not be read, also where the tests run as root, whom no permission stops."""
    path, user = folder / "secret.png", os.geteuid()
    path.touch()
    path.chmod(0)
    if user == 0:
        os.seteuid(65534)
    yield path
    os.seteuid(user)


def test_permission_denied(secret: Path) -> None:
    with pytest.raises(InputMissing, match=r"secret\.png: permission denied$"):
        open_picture(str(secret))


@for_each("name", ["photos", "fifo.png", "zero.png", "kitten.png", "nothing.png"], own=(folder,))
def test_no_file_stays_open(name: str, folder: Path) -> None:
    make_names(folder)
    reader.start_sandbox()
    before = os.listdir("/dev/fd")
    for _ in range(3):
        try:
            open_picture(name)
        except LlavaError as error:
            assert error.exit_code == 66
    assert len(os.listdir("/dev/fd")) == len(before)


@pytest.mark.parametrize(("data", "reason"), [(b"", "empty file"), (b"hello", "not an image")])
def test_bad_stdin_is_refused(data: bytes, reason: str, run: Run) -> None:
    assert_refused(run("ask", "-", QUESTION, input=data), "-", reason, 65)


def test_a_closed_stdin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputMissing, match="-: stdin cannot be read"):
        open_picture("-")


# Taken: names.


@for_each(
    "name",
    ["-v.png", "--help", os.fsdecode(b"caf\xe9.png"), "two\nlines.png", "\x1b]0;title\x07.png", "a b'c.png"],
    own=(folder,),
)
def test_odd_names_are_taken(name: str, run: Run, folder: Path) -> None:
    (folder / name).write_bytes(data := encoded(noise(), "PNG"))
    assert open_picture(name).sha256 == hashlib.sha256(data).hexdigest()
    result = run("ask", "--max-tokens", "1", "--json", "--quiet", "--", name, QUESTION)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["images"] == [name]
    assert result.stdout.removesuffix("\n").isprintable()
    assert result.stderr == ""


@for_each("text", ["-", "http://x/y", "HTTPS://x", "gone.jpg", "GONE.HEIC", "here.txt", "dangling"], own=(folder,))
def test_looks_like_a_picture(text: str, folder: Path) -> None:
    (folder / "here.txt").touch()
    (folder / "dangling").symlink_to("gone")
    assert looks_like_picture(text)


@for_each("text", ["what is this?", "", "ftp://x/y", "what is in img.jpg?", "why\0", "x" * 10_000])
def test_looks_like_a_question(text: str) -> None:
    assert not looks_like_picture(text)


@for_each(
    ("name", "shown"),
    [
        ("plain name.png", "plain name.png"),
        ("été 日本.png", "été 日本.png"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\u202eabc", "\\u202eabc"),
        ("\udcff", "\\udcff"),
    ],
)
def test_printable(name: str, shown: str) -> None:
    assert printable(name) == shown


# Taken: formats, golden pixels.


@for_each("kind", ["PNG", "BMP", "GIF", "JPEG", "WEBP", "HEIF"], own=(folder,))
def test_every_format_is_taken_whatever_its_name(kind: str, folder: Path) -> None:
    image = Image.new("RGB", (64, 32), RED)
    image.paste(BLUE, (32, 0, 64, 32))
    (folder / "img.txt").write_bytes(data := encoded(image, kind))
    picture = open_picture("img.txt")
    assert (picture.name, picture.frames, picture.truncated) == ("img.txt", 1, False)
    assert picture.sha256 == hashlib.sha256(data).hexdigest()
    assert picture.image.size == (64, 32)
    assert near(pixels(picture.image)[16][8], RED, 6)
    assert near(pixels(picture.image)[16][56], BLUE, 6)


def test_a_picture_from_stdin(run: Run) -> None:
    result = run("ask", "-", QUESTION, "--max-tokens", "1", "-q", input=encoded(noise(), "JPEG"))
    assert (result.exit_code, result.stderr) == (0, "")


def test_the_hash_is_of_the_bytes_that_were_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "img.png").write_bytes(data := encoded(noise(), "PNG"))

    class Slow(SandboxPool):
        def open(self, *args: Any, **options: Any) -> Any:
            (folder / "img.png").write_bytes(b"other bytes")
            return super().open(*args, **options)

    monkeypatch.setattr(reader, "sandbox_pool", Slow)
    picture = open_picture("img.png")
    assert picture.sha256 == hashlib.sha256(data).hexdigest()
    assert picture.image == noise()


A, B, C, D, E, F = RED, GREEN, BLUE, WHITE, BLACK, (9, 90, 200)
UPRIGHT = [[A, B, C], [D, E, F]]
TURNED = {
    1: [[A, B, C], [D, E, F]],
    2: [[C, B, A], [F, E, D]],
    3: [[F, E, D], [C, B, A]],
    4: [[D, E, F], [A, B, C]],
    5: [[A, D], [B, E], [C, F]],
    6: [[D, A], [E, B], [F, C]],
    7: [[F, C], [E, B], [D, A]],
    8: [[C, F], [B, E], [A, D]],
}


def asymmetric() -> Image.Image:
    image = Image.new("RGB", (3, 2))
    image.putdata([pixel for row in UPRIGHT for pixel in row])
    return image


@for_each("orientation", TURNED)
def test_exif_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    for kind, options in {"PNG": {}, "WEBP": {"lossless": True}}.items():
        assert pixels(opened(encoded(asymmetric(), kind, exif=exif, **options))) == TURNED[orientation]
    blocks = asymmetric().resize((96, 64), Image.Resampling.NEAREST)
    turned = pixels(opened(encoded(blocks, "JPEG", exif=exif, quality=95, subsampling=0)))
    for y, row in enumerate(TURNED[orientation]):
        for x, wanted in enumerate(row):
            assert near(turned[32 * y + 16][32 * x + 16], wanted, 4)


@for_each(
    ("chunks", "wanted"),
    [
        (
            [header(2, 1, 8, 3), (b"PLTE", bytes([*RED, *BLUE])), (b"tRNS", b"\xff\0"), idat(b"\0\1"), END],
            [[RED], [WHITE]],
        ),
        ([header(2, 1, 16, 0), idat(b"\0\0\xff\xff"), END], [[BLACK], [WHITE]]),
        ([header(2, 1, 1, 0), idat(b"\x40"), END], [[BLACK], [WHITE]]),
        ([header(2, 1, 8, 4), idat(b"\0\xff\0\x80"), END], [[BLACK], [(127, 127, 127)]]),
        ([header(2, 1), (b"tRNS", b"\0\0\0\0\0\xff"), idat(bytes([*BLUE, *RED])), END], [[WHITE], [RED]]),
    ],
    ids=["palette", "16-bit grey", "1 bit", "LA", "one transparent color"],
)
def test_exif_orientation_of_every_kind_of_png(chunks: list[tuple[bytes, bytes]], wanted: list[list[Pixel]]) -> None:
    turn = b"eXIf", tiff_exif(TURN).removeprefix(b"Exif\0\0")
    assert pixels(opened(png(chunks[0], turn, *chunks[1:]))) == wanted


MALFORMED = {
    "garbage": (b"Exif\0\0garbage garbage", 1),
    "nothing": (b"Exif\0\0", 1),
    "orientation 0": (tiff_exif(entry(0x112, 3, 1, bytes(4))), 1),
    "orientation 9": (tiff_exif(entry(0x112, 3, 1, b"\0\x09\0\0")), 1),
    "orientation is text": (tiff_exif(entry(0x112, 2, 4, b"abc\0")), 1),
    "orientation without a value": (tiff_exif(entry(0x112, 3, 0, bytes(4))), 1),
    "fewer entries than it says": (tiff_exif(TURN, count=500), 6),
    "an entry of no known type": (tiff_exif(TURN, entry(0x131, 99, 1, bytes(4))), 6),
    "an entry beyond the end": (tiff_exif(TURN, entry(0x131, 2, 1000, b"\0\xff\xff\xff")), 6),
    "an entry that cannot be written back": (tiff_exif(entry(0x100, 9, 1, struct.pack(">i", -5)), TURN), 6),
    "a directory that holds itself": (tiff_exif(TURN, entry(0x8769, 4, 1, b"\0\0\0\x08")), 6),
    "a directory that is text": (tiff_exif(TURN, entry(0x8825, 2, 4, b"abc\0")), 6),
}


@pytest.mark.filterwarnings("error")
@for_each("kind, malformed", itertools.product(["PNG", "JPEG", "WEBP"], MALFORMED))
def test_of_malformed_exif_only_the_orientation_matters(malformed: str, kind: str) -> None:
    exif, orientation = MALFORMED[malformed]
    image = opened(encoded(asymmetric(), kind, exif=exif))
    assert image.size == ((2, 3) if orientation == 6 else (3, 2))
    if kind == "PNG":
        assert pixels(image) == TURNED[orientation]


def test_a_heic_is_turned_once() -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    data = encoded(asymmetric().resize((96, 64), Image.Resampling.NEAREST), "HEIF", exif=exif, quality=95)
    assert opened(data).size == pillow_heif.open_heif(io.BytesIO(data)).size


def test_16_bit_grey_keeps_its_levels() -> None:
    levels = [i * 65535 // 999 for i in range(1000)]
    row = pixels(opened(png(header(1000, 5, 16, 0), idat(*[struct.pack(">1000H", *levels)] * 5), END)))[4]
    for found, level in zip(row, levels, strict=True):
        assert near(found, (level // 257,) * 3, 1)
    assert (row[0], row[-1], len(set(row))) == (BLACK, WHITE, 256)


def test_8_bit_grey_comes_back_from_16() -> None:
    row = struct.pack(">256H", *range(0, 65536, 257))
    assert pixels(opened(png(header(256, 2, 16, 0), idat(row, row), END)))[1] == [(n, n, n) for n in range(256)]


def test_16_bit_grey_has_one_transparent_level() -> None:
    """Levels that become the same of 256 are not transparent with it."""
    data = png(header(4, 1, 16, 0), (b"tRNS", b"\x80\0"), idat(struct.pack(">4H", 0, 0x8000, 0x7FF0, 0xC000)), END)
    assert pixels(opened(data))[0] == [BLACK, WHITE, (127, 127, 127), (191, 191, 191)]


def test_more_transparent_levels_than_a_palette_has_colors() -> None:
    """As every browser shows it: without those that stand for nothing."""
    palette = (b"PLTE", bytes((*RED, *GREEN, *BLUE)))
    data = png(header(3, 1, 8, 3), palette, (b"tRNS", b"\xff\x00" + b"\xff" * 300), idat(bytes((0, 1, 2))), END)
    assert [opened(data).getpixel((x, 0)) for x in range(3)] == [RED, WHITE, BLUE]


def test_16_bit_colors_have_one_transparent_color() -> None:
    colors = struct.pack(">9H", 0, 0, 0, 0x8000, 0x8000, 0x8000, 0xFFFF, 0x0101, 0)
    data = png(header(3, 1, 16, 2), (b"tRNS", colors[6:12]), idat(colors), END)
    assert pixels(opened(data))[0] == [BLACK, WHITE, (255, 1, 0)]


def transparent_palette(kind: str) -> bytes:
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *BLUE, *BLACK])
    image.putdata([0, 1, 2])
    return encoded(image, kind, transparency=1)


def opaque_palette(kind: str) -> bytes:
    image = Image.new("P", (4, 1))
    image.putpalette([*RED, *F, *BLACK, *WHITE])
    image.putdata([3, 1, 0, 2])
    return encoded(image, kind)


def few_bits(depth: int, color: int, row: bytes, key: bytes = b"") -> bytes:
    """A PNG of four pixels; `key` is what of it is transparent."""
    palette = [(b"PLTE", bytes([*RED, *F, *BLACK, *WHITE]))] if color == 3 else []
    return png(header(4, 1, depth, color), *palette, *([(b"tRNS", key)] if key else []), idat(row), END)


def right_half() -> Image.Image:
    """An alpha of two pixels, of which the second one can be seen."""
    alpha = Image.new("L", (2, 1))
    alpha.putpixel((1, 0), 255)
    return alpha


GOLDEN = {
    "palette PNG": (transparent_palette("PNG"), [RED, WHITE, BLACK]),
    "palette GIF": (transparent_palette("GIF"), [RED, WHITE, BLACK]),
    "opaque palette PNG": (opaque_palette("PNG"), [WHITE, F, RED, BLACK]),
    "opaque palette GIF": (opaque_palette("GIF"), [WHITE, F, RED, BLACK]),
    "opaque palette BMP": (opaque_palette("BMP"), [WHITE, F, RED, BLACK]),
    "1 bit palette": (few_bits(1, 3, b"\x60"), [RED, F, F, RED]),
    "2 bit palette": (few_bits(2, 3, b"\x1b"), [RED, F, BLACK, WHITE]),
    "4 bit palette": (few_bits(4, 3, b"\x01\x23"), [RED, F, BLACK, WHITE]),
    "transparent 2 bit palette": (few_bits(2, 3, b"\x1b", b"\xff\xff\0"), [RED, F, WHITE, WHITE]),
    "2 bit grey": (few_bits(2, 0, b"\x1b"), [BLACK, (85, 85, 85), (170, 170, 170), WHITE]),
    "4 bit grey": (few_bits(4, 0, b"\x01\xef"), [BLACK, (17, 17, 17), (238, 238, 238), WHITE]),
    "one transparent level of 1 bit": (few_bits(1, 0, b"\x60", b"\0\0"), [WHITE, WHITE, WHITE, WHITE]),
    "one transparent level of 2 bits": (few_bits(2, 0, b"\x1b", b"\0\1"), [BLACK, WHITE, (170, 170, 170), WHITE]),
    "one transparent level of 4 bits": (few_bits(4, 0, b"\x01\xef", b"\0\x0e"), [BLACK, (17, 17, 17), WHITE, WHITE]),
    "one transparent level of 8 bits": (
        few_bits(8, 0, b"\x07\x08\0\xff", b"\0\7"),
        [WHITE, (8, 8, 8), BLACK, WHITE],
    ),
    "16-bit grey": (
        png(header(6, 1, 16, 0), idat(struct.pack(">6H", 0, 0x0101, 0x1234, 0x7FFF, 0xC0C0, 0xFFFF)), END),
        [BLACK, (1, 1, 1), (18, 18, 18), (127, 127, 127), (192, 192, 192), WHITE],
    ),
    "16-bit RGB": (
        png(header(3, 1, 16, 2), idat(struct.pack(">9H", 65535, 0, 0, 0x1234, 0x8080, 0xFFF0, 0x0101, 0, 0xFEFE)), END),
        [RED, (18, 128, 255), (1, 0, 254)],
    ),
    "16-bit LA": (
        png(header(3, 1, 16, 4), idat(struct.pack(">6H", 0x4040, 65535, 0x4040, 0, 0, 0x8080)), END),
        [(64, 64, 64), WHITE, (127, 127, 127)],
    ),
    "half transparent palette": (
        png(header(2, 1, color=3), (b"PLTE", bytes([*RED, *BLACK])), (b"tRNS", b"\x80"), idat(b"\0\1"), END),
        [(255, 127, 127), BLACK],
    ),
    "RGBA": (
        png(header(3, 1, color=6), idat(bytes([*RED, 255, *RED, 0, *BLACK, 128])), END),
        [RED, WHITE, (127, 127, 127)],
    ),
    "LA": (png(header(3, 1, color=4), idat(bytes([9, 255, 9, 0, 0, 128])), END), [(9, 9, 9), WHITE, (127, 127, 127)]),
    "16-bit RGBA": (
        png(header(2, 1, 16, 6), idat(struct.pack(">8H", 65535, 0, 0, 65535, 0, 0, 0, 0)), END),
        [RED, WHITE],
    ),
    "one transparent color": (
        png(header(2, 1), (b"tRNS", struct.pack(">3H", *BLUE)), idat(bytes([*BLUE, *RED])), END),
        [WHITE, RED],
    ),
    "1 bit PNG": (png(header(3, 1, 1, 0), idat(b"\xa0"), END), [WHITE, BLACK, WHITE]),
    "1 bit BMP": (encoded(Image.new("1", (2, 1), 1), "BMP"), [WHITE, WHITE]),
    "8-bit grey": (png(header(2, 1, color=0), idat(b"\x07\xf0"), END), [(7, 7, 7), (240, 240, 240)]),
    "transparent WebP": (
        encoded(Image.merge("RGBA", [*Image.new("RGB", (2, 1), RED).split(), right_half()]), "WEBP", lossless=True),
        [WHITE, RED],
    ),
    "half transparent WebP": (
        encoded(Image.new("RGBA", (2, 1), (255, 0, 0, 128)), "WEBP", lossless=True),
        [(255, 127, 127), (255, 127, 127)],
    ),
}


@for_each("name", GOLDEN)
def test_golden_pixels(name: str) -> None:
    data, wanted = GOLDEN[name]
    assert pixels(opened(data))[0] == wanted


@for_each(
    ("ink", "wanted"),
    [
        ((0, 0, 0, 0), WHITE),
        ((0, 0, 0, 255), BLACK),
        ((0, 255, 255, 0), RED),
        ((255, 255, 0, 0), BLUE),
        ((0, 0, 0, 128), (127, 127, 127)),
    ],
)
def test_cmyk_jpeg(ink: tuple[int, int, int, int], wanted: Pixel) -> None:
    """Its ink is stored inverted, as Adobe does it, also where no marker says that Adobe did."""
    data = encoded(Image.new("CMYK", (16, 16), ink), "JPEG", quality=95)
    begin, end = adobe_marker(data)
    for made in (data, data[:begin] + data[end:]):
        assert near(pixels(opened(made))[8][8], wanted, 3)


@for_each(
    ("stored", "wanted"),
    [
        ((0, 128, 128, 255), WHITE),
        ((255, 128, 128, 255), BLACK),
        ((0, 128, 128, 0), BLACK),
        ((179, 171, 1, 255), RED),
        ((76, 85, 255, 255), (0, 255, 255)),
        ((0, 128, 128, 128), (128, 128, 128)),
    ],
)
def test_ycck_jpeg(stored: tuple[int, int, int, int], wanted: Pixel) -> None:
    """What Photoshop makes of CMYK: inks as brightness and two color differences, and black, inverted."""
    data = bytearray(encoded(Image.new("CMYK", (16, 16), tuple(255 - value for value in stored)), "JPEG", quality=95))
    data[adobe_marker(data)[1] - 1] = 2
    assert near(pixels(opened(bytes(data)))[8][8], wanted, 3)


def adobe_marker(data: bytes | bytearray) -> tuple[int, int]:
    """Where it begins and ends; its last byte tells how the colors are stored."""
    begin = data.index(b"\xff\xee\0\x0eAdobe")
    return begin, begin + 16


@for_each("kind", ["GIF", "WEBP", "PNG", "MPO"])
def test_of_many_frames_the_first(kind: str) -> None:
    image, number, truncated, *_ = decode(frames(kind), "x")
    assert (number, truncated, image.size) == (3, False, (8, 6))
    assert near(pixels(image)[3][4], RED, 4)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_that_begins_half_transparent(kind: str, folder: Path) -> None:
    first, second = Image.new("RGBA", (3, 1)), Image.new("RGBA", (3, 1), (*GREEN, 255))
    first.putdata([(*RED, 255), (0, 0, 0, 0), (*BLUE, 255)])
    options = {"lossless": True} if kind == "WEBP" else {}
    (folder / "moving").write_bytes(encoded(first, kind, save_all=True, append_images=[second, first], **options))
    picture = open_picture("moving")
    assert (picture.frames, pixels(picture.image)) == (3, [[RED, WHITE, BLUE]])


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_an_animation_is_turned(kind: str) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    second = Image.new("RGB", (3, 2), GREEN)
    options = {"lossless": True} if kind == "WEBP" else {}
    image, number, *_ = decode(
        encoded(asymmetric(), kind, save_all=True, append_images=[second], exif=exif, **options), "x"
    )
    assert (number, pixels(image)) == (2, TURNED[6])


def test_a_damaged_later_frame_does_not_matter() -> None:
    data = frames("GIF")
    image, number, truncated, *_ = decode(data[: data.rindex(b"\x2c") + 5], "x")
    assert (number >= 1, truncated) == (True, False)
    assert near(pixels(image)[3][4], RED, 4)


# Truncated, and allowed.


@for_each(
    "data",
    [
        CUT,
        PROGRESSIVE_CUT,
        encoded(noise(), "PNG")[:2000],
        encoded(noise(), "GIF")[:1500],
        encoded(noise(), "BMP")[:-1],
    ],
    ids=["JPEG", "progressive JPEG", "PNG", "GIF", "BMP"],
    own=(folder,),
)
def test_truncated_and_allowed(data: bytes, folder: Path) -> None:
    (folder / "cut").write_bytes(data)
    picture = open_picture("cut", allow_truncated=True)
    assert picture.truncated is True
    assert picture.image.size == (40, 30)
    assert len(set(picture.image.get_flattened_data())) > 100


def test_a_jpeg_without_its_last_byte() -> None:
    """Pillow notices where it still waits for pixels; where it has all of them, nothing is lost."""
    refused = 0
    for width in range(20, 40):
        data = encoded(noise(width), "JPEG")
        assert opened(data[:-1], allow_truncated=True) == opened(data)
        try:
            assert opened(data[:-1]) == opened(data)
        except BadImage as error:
            assert (error.reason, error.hint) == ("truncated", TAKE_IT)
            refused += 1
    assert refused


def test_a_whole_picture_is_not_marked_where_truncated_ones_are_allowed() -> None:
    data = encoded(noise(), "JPEG")
    assert decode(data, "x", allow_truncated=True)[2] is False


@pytest.mark.parametrize(
    "data",
    [png(header(3, 2), (b"IDAT", b""), END), png(header(3, 2), idat(b""), END), encoded(noise(), "BMP")[:60]],
    ids=["no data", "little data", "BMP"],
)
def test_truncated_to_nothing_is_refused_even_where_allowed(data: bytes) -> None:
    with pytest.raises(BadImage, match="truncated, and nothing of it can be seen"):
        decode(data, "x", allow_truncated=True)


def test_damaged_is_refused_where_truncated_is_allowed() -> None:
    with pytest.raises(BadImage, match="x: damaged"):
        decode(BAD_BYTES["garbage.png"][0], "x", allow_truncated=True)


def test_the_command_says_that_a_picture_is_truncated(run: Run, folder: Path) -> None:
    (folder / "cut.jpg").write_bytes(CUT)
    result = run("ask", "cut.jpg", QUESTION, "--allow-truncated", "--max-tokens", "1")
    assert result.exit_code == 0
    assert result.stderr.splitlines()[0] == "llava: cut.jpg: truncated; the answer is about what is there"


def test_one_thread_allowing_truncated_pictures_does_not_allow_them_to_another() -> None:
    cut = encoded(noise(100, 100), "JPEG")[:-300]
    finished = threading.Event()

    def allowing() -> None:
        while not finished.is_set():
            assert decode(cut, "x", allow_truncated=True)[2]

    switching = sys.getswitchinterval()
    thread = threading.Thread(target=allowing)
    thread.start()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(100):
            with pytest.raises(BadImage, match=r"x: truncated$"):
                decode(cut, "x")
    finally:
        sys.setswitchinterval(switching)
        finished.set()
        thread.join()


# Sizes.


@for_each(
    "size, fit",
    itertools.product(
        [(1, 1), (1, 2), (1, 3), (3, 1), (2, 2), (3, 5), (4, 4), (200, 1), (1, 200)], ["auto", "pad", "crop"]
    ),
    own=(folder,),
)
def test_tiny_pictures_reach_the_model(size: tuple[int, int], fit: str, run: Run, folder: Path) -> None:
    (folder / "tiny.png").write_bytes(encoded(Image.new("RGB", size, "red"), "PNG"))
    result = run("prompt", "tiny.png", QUESTION, "--fit", fit, "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")


def test_tiny_pictures_are_answered(run: Run, folder: Path) -> None:
    for width, height in ((1, 1), (1, 3), (3, 1), (2, 2), (3, 5)):
        (folder / "tiny.png").write_bytes(encoded(Image.new("RGB", (width, height), "red"), "PNG"))
        result = run("ask", "tiny.png", QUESTION, "--max-tokens", "1", "--quiet")
        assert (result.exit_code, result.stderr) == (0, "")


def test_reduce_keeps_a_picture_whose_square_fits() -> None:
    image = Image.new("L", (7071, 40))
    assert limit_size(image) is image


def test_reduce_makes_a_long_picture_fit_as_a_square() -> None:
    image = Image.new("RGB", (10_000, 100), RED)
    small = limit_size(image)
    assert small.size == (7071, 71)
    assert max(small.size) ** 2 <= limits.PICTURE_PIXELS
    assert image.size == (10_000, 100)


GREY = (127, 127, 127)


@for_each(
    ("size", "how", "box"),
    [
        ((3, 3), "pad", (0, 0)),
        ((3, 1), "pad", (0, 1)),
        ((1, 3), "pad", (1, 0)),
        ((4, 1), "pad", (0, 1)),
        ((5, 2), "pad", (0, 1)),
        ((2, 5), "pad", (1, 0)),
        ((3, 3), "crop", (0, 0)),
        ((5, 3), "crop", (1, 0)),
        ((3, 5), "crop", (0, 1)),
        ((4, 3), "crop", (0, 0)),
        ((3, 6), "crop", (0, 1)),
    ],
)
def test_square(size: tuple[int, int], how: str, box: tuple[int, int]) -> None:
    """In whole pixels, rounded down, as LLaVA does it."""
    image = noise(*size)
    result = make_square(image, how, GREY)  # type: ignore[arg-type]
    if how == "pad":
        side = max(size)
        wanted = Image.new("RGB", (side, side), GREY)
        wanted.paste(image, box)
    else:
        side = min(size)
        wanted = image.crop((*box, box[0] + side, box[1] + side))
    assert result.size == (side, side)
    assert pixels(result) == pixels(wanted)
