"""Pages and frames: the pixels are those of the library used directly, and no file costs more than its limits."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.pdf_bytes import (
    encrypted_pdf,
    form_pdf,
    many_pages_pdf,
    nested_forms_pdf,
    pages_pdf,
    pdf,
    text,
    text_pdf,
)
from helpers.picture_bytes import encoded, noise
from helpers.tables import for_each
from PIL import Image, ImageDraw

from llava_cli import limits
from llava_cli.conversation import Picture
from llava_cli.engine.remote.image_urls import original_file_url
from llava_cli.errors import BadImage, LlavaError
from llava_cli.images import sandbox as module
from llava_cli.images import tiff
from llava_cli.images.animation import seconds_of
from llava_cli.images.resize import Resize
from llava_cli.images.sandbox import Sandbox
from llava_cli.parts import WHOLE, Content, Part

pypdfium2 = pytest.importorskip("pypdfium2")
RED, WHITE = (255, 0, 0), (255, 255, 255)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    sandbox = Sandbox()
    yield sandbox
    sandbox.end()


def picture(sandbox: Sandbox, data: bytes, page: int | None = None, **options: Any) -> Image.Image:
    found = sandbox.open("file", data, part=Part(page), **options)
    assert isinstance(found, Picture), found
    assert found.part == Part(page) and (found.data is None) == (page is not None or found.dpi is not None)
    return found.image


def refused(sandbox: Sandbox, data: bytes, page: int | None = 1) -> tuple[str, str]:
    """The error's line, and its hint."""
    found = sandbox.open("a.pdf", data, part=Part(page))
    assert isinstance(found, LlavaError), found
    assert found.exit_code == 65
    return str(found), found.hint


# PDF.


def drawn(data: bytes, page: int, scale: float) -> Image.Image:
    """A page as PDFium draws it in this process."""
    document = pypdfium2.PdfDocument(data)
    document.init_forms()
    try:
        return document[page - 1].render(scale=scale).to_pil().convert("RGB")
    finally:
        document.close()


PAGES = {
    "text": text_pdf("one", "two", "three"),
    "forms and annotations": form_pdf(),
    "turned": pages_pdf(text("one"), page=b"/Rotate 90"),
    "cropped": pages_pdf(text("one"), page=b"/CropBox[50 600 300 800]"),
    "transparent": pages_pdf(b"/G gs 1 0 0 rg 0 0 99 99 re f", page=b"/Group<</S/Transparency/CS/DeviceRGB>>"),
    "no password": encrypted_pdf(b""),
}


@for_each("name", PAGES, own=(sandbox,))
def test_a_page_is_what_pdfium_draws(name: str, sandbox: Sandbox) -> None:
    data = PAGES[name]
    count = 3 if name == "text" else 1
    assert sandbox.inspect("a.pdf", data) == Content("document", count)
    for page in (1, count):
        for dpi in (72, 150):
            assert picture(sandbox, data, page, dpi=dpi) == drawn(data, page, dpi / 72)
    assert picture(sandbox, data, dpi=72) == drawn(data, 1, 1)


def test_the_only_page_at_another_resolution_is_another_picture(sandbox: Sandbox) -> None:
    """Its file alone does not tell its pixels: to caches, and to servers that would draw it themselves."""
    coarse, fine = (sandbox.open("a.pdf", text_pdf("one"), dpi=dpi) for dpi in (72, 150))
    assert isinstance(coarse, Picture) and isinstance(fine, Picture)
    assert (coarse.sha256, coarse.data) == (fine.sha256, None)
    assert coarse.identity != fine.identity and coarse != fine
    assert original_file_url(coarse).startswith("data:image/png")


def test_what_a_page_shows(sandbox: Sandbox) -> None:
    form = picture(sandbox, form_pdf(), 1, dpi=72)
    assert form.getpixel((70, 300 - 45)) == (255, 0, 0)
    assert form.getpixel((225, 300 - 225)) == (0, 0, 255)
    assert form.getpixel((150, 150)) == WHITE
    assert picture(sandbox, PAGES["turned"], 1, dpi=72).size == (842, 595)
    assert picture(sandbox, PAGES["text"], 2).size == (1240, 1755)


def test_small_print_is_readable_at_the_default_resolution(sandbox: Sandbox) -> None:
    """Letters of 8 points are told apart as a reader does it: by the shape that each of them has."""
    letters = "abcdefghijkmnopqrsuvwxyz"
    shapes = {}
    for number, letter in enumerate(letters):
        page = picture(sandbox, pages_pdf(*(text(letter, 8) for letter in letters)), number + 1).convert("L")
        box = page.point(lambda level: 255 * (level < 128)).getbbox()
        assert box and box[3] - box[1] >= 7, letter
        shapes[letter] = page.crop((box[0], box[1], box[0] + 16, box[1] + 20)).tobytes()
    for one, other in permutations(letters, 2):
        difference = sum(abs(a - b) for a, b in zip(shapes[one], shapes[other], strict=True)) / 255
        assert difference > 4, (one, other)


def test_an_enormous_page_has_a_bound_on_its_pixels(sandbox: Sandbox) -> None:
    found = picture(sandbox, pages_pdf(text("one"), box=(14_400_000, 7_200_000)), 1, dpi=1200)
    assert found.size == (limits.PAGE_SIDE, limits.PAGE_SIDE // 2)
    assert picture(sandbox, text_pdf("one"), 1, dpi=1200).height in (limits.PAGE_SIDE, limits.PAGE_SIDE + 1)


@for_each(
    ("data", "reason", "hint"),
    [
        (encrypted_pdf(b"word"), "needs a password", "qpdf --decrypt --password=PASSWORD a.pdf a.pdf.pdf"),
        (b"%PDF-1.7\n", "a damaged PDF", "mutool clean a.pdf a.pdf.pdf"),
        (b"\n\n%PDF-1.4" + bytes(3000), "a damaged PDF", "mutool clean a.pdf a.pdf.pdf"),
        (b"%pDF-1.7\n<|", "a damaged PDF", "mutool clean a.pdf a.pdf.pdf"),
        (text_pdf("one")[:300], "a damaged PDF", "mutool clean a.pdf a.pdf.pdf"),
        (
            pdf(b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[2 0 R 2 0 R]/Count 5>>"),
            "a damaged page",
            "mutool clean a.pdf a.pdf.pdf",
        ),
        (pages_pdf(text("one"), box=(10, 5000)), "too narrow to see anything (10 x 5000)", ""),
    ],
    own=(sandbox,),
)
def test_what_cannot_be_drawn_is_said_in_a_line(data: bytes, reason: str, hint: str, sandbox: Sandbox) -> None:
    assert refused(sandbox, data) == (f"a.pdf#1: {reason}", hint)


def test_what_is_in_a_bucket_is_no_path_to_type(sandbox: Sandbox) -> None:
    found = sandbox.open("s3://bucket/a.pdf", encrypted_pdf(b"user"))
    assert isinstance(found, LlavaError) and found.hint == "qpdf --decrypt --password=PASSWORD FILE FILE.pdf"


def test_pages_that_are_not_there(sandbox: Sandbox) -> None:
    assert refused(sandbox, text_pdf("one", "two"), 3) == ("a.pdf#3: no page 3: it has 2 pages", module_hint())
    assert refused(sandbox, text_pdf("one"), 2)[0] == "a.pdf#2: no page 2: it has 1 page"
    assert refused(sandbox, encoded(noise(), "PNG"), 2)[0] == "a.pdf#2: no frame 2: it has 1 frame"


def test_only_a_film_has_times(sandbox: Sandbox) -> None:
    """Its first page would not be what was asked about."""
    for data in (text_pdf("one", "two"), encoded(noise(), "PNG")):
        found = sandbox.open("a.pdf", data, part=Part(time=1.5))
        assert isinstance(found, BadImage)
        assert (found.thing, found.reason) == ("a.pdf#t=1.5", "only a film has times")
        assert found.hint == "a.pdf#2 is its second page or frame"


def module_hint() -> str:
    return "--pages all takes what there is"


def test_a_million_pages(sandbox: Sandbox) -> None:
    data = many_pages_pdf(1_000_000)
    assert len(data) < 20_000
    assert sandbox.inspect("a.pdf", data) == Content("document", 1_000_000)
    assert picture(sandbox, data, 1_000_000, dpi=72).size == (99, 99)


def test_a_document_is_sent_once(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    ask = module.Worker.ask

    def counting(worker: Any, request: tuple[bytes, ...], most: int, seconds: float) -> bytearray:
        sent.append(len(request[1]))
        return ask(worker, request, most, seconds)

    monkeypatch.setattr(module.Worker, "ask", counting)
    one, other = text_pdf("one", "two"), text_pdf("three", "four", "five")
    sandbox.inspect("a.pdf", one)
    for page in (2, 1):
        assert picture(sandbox, one, page, dpi=72) == drawn(one, page, 1)
    assert picture(sandbox, other, 3, dpi=72) == drawn(other, 3, 1)
    assert picture(sandbox, one, 2, dpi=72) == drawn(one, 2, 1)
    assert refused(sandbox, one, 9)[0] == "a.pdf#9: no page 9: it has 2 pages"
    assert sent == [len(one), 0, 0, len(other), len(one), 0]
    pid = process_of(sandbox)
    sandbox.end()
    assert picture(sandbox, one, 2, dpi=72) == drawn(one, 2, 1)
    assert sent[-1] == len(one) and process_of(sandbox) != pid


def process_of(sandbox: Sandbox) -> int:
    pid = sandbox._decoders["pypdfium2"].worker.pid
    assert pid
    return pid


def test_pages_that_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forms within forms: a few kB that would be drawn for years. After `limits.LATE_PAGES` no more are tried."""
    monkeypatch.setattr(limits, "PAGE_SECONDS", 0.5)
    sandbox, bomb = Sandbox(), nested_forms_pdf()
    assert len(bomb) < 8000
    late = [refused(sandbox, bomb)[0] for _ in range(limits.LATE_PAGES + 1)]
    assert late[:-1] == ["a.pdf#1: takes longer than 0 s to decode"] * limits.LATE_PAGES
    assert late[-1] == f"a.pdf#1: not tried: {limits.LATE_PAGES} of its pages took too long, or too much memory"
    monkeypatch.undo()
    assert picture(sandbox, text_pdf("one"), 1, dpi=72).size == (595, 842)  # the next document has another process
    sandbox.end()


def test_less_time_than_a_page_has_gives_no_file_up() -> None:
    """A server decodes with little time first, and what takes longer again with more."""
    hasty = Sandbox(seconds=0.0)
    try:
        late = {refused(hasty, nested_forms_pdf())[0] for _ in range(limits.LATE_PAGES + 1)}
    finally:
        hasty.end()
    assert late == {"a.pdf#1: takes longer than 0 s to decode"}


def test_memory_of_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """PDFium ends its process where it gets no more."""
    monkeypatch.setattr(limits, "DOCUMENT_MEMORY", 2**28)
    sandbox = Sandbox()
    assert "takes more than 0 GB of memory, or crashes PDFium" in refused(sandbox, nested_forms_pdf(1, 10**7))[0]
    assert picture(sandbox, text_pdf("one"), 1, dpi=72).size == (595, 842)
    sandbox.end()


# TIFF.


def drawing(number: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    image = Image.new("RGB", size, ((40 * number) % 256, 99, 200))
    ImageDraw.Draw(image).text((5, 5), str(number), "white")
    return image


def several(kind: str, count: int = 4, **options: Any) -> bytes:
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    first, *others = (drawing(number) for number in range(count))
    first.save(file := io.BytesIO(), kind, save_all=True, append_images=others, **options)
    return file.getvalue()


TIFFS = {
    "none": {},
    "BigTIFF": {"big_tiff": True},
    **{name: {"compression": name} for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")},
}


@for_each("name", TIFFS, own=(sandbox,))
def test_pages_of_a_tiff(name: str, sandbox: Sandbox) -> None:
    data = several("TIFF", **TIFFS[name])
    assert sandbox.inspect("scan.tif", data) == Content("document", 4)
    check_frames(sandbox, data)


@for_each("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "LA", "YCbCr"], own=(sandbox,))
def test_colors_of_a_tiff(mode: str, sandbox: Sandbox) -> None:
    image = noise().convert("L").convert(mode) if mode in ("1", "I;16", "LA") else noise().convert(mode)
    found = picture(sandbox, encoded(image, "TIFF"))
    if mode == "I;16":
        assert found == image.convert("I").point([level // 257 for level in range(65536)], "L").convert("RGB")
    else:
        assert found == image.convert("RGB")


@for_each("turn", range(1, 9), own=(sandbox,))
def test_the_orientation_of_a_tiff(turn: int, sandbox: Sandbox) -> None:
    exif = Image.Exif()
    exif[0x112] = turn
    with Image.open(io.BytesIO(data := encoded(noise(), "TIFF", exif=exif))) as direct:
        direct.load()
        assert direct.size == ((30, 40) if turn > 4 else (40, 30))
        assert picture(sandbox, data).tobytes() == direct.convert("RGB").tobytes()


def test_thumbnails_and_masks_in_a_tiff_are_no_pages(sandbox: Sandbox) -> None:
    """As scanners and maps have them: smaller copies of a page behind it, or before it."""
    data = bytearray(several("TIFF", tiffinfo={254: 0}))
    places = [at for at in range(len(data) - 12) if data[at : at + 8] == struct.pack("<HHI", 254, 4, 1)]
    assert len(places) == 4
    for place, kind in zip(places, (1, 0, 4, 0), strict=True):
        data[place + 8] = kind
    assert sandbox.inspect("map.tif", bytes(data)) == Content("document", 2)
    assert picture(sandbox, bytes(data)) == drawing(1)
    assert [picture(sandbox, bytes(data), page) for page in (1, 2)] == [drawing(1), drawing(3)]


def test_places_that_no_file_has_end_a_tiff() -> None:
    for kind, place in (("TIFF", 4), ("BigTIFF", 8)):
        data = bytearray(several("TIFF", **TIFFS["BigTIFF" if kind == "BigTIFF" else "none"]))
        data[place : place + 8] = b"\xff" * 8
        assert tiff.page_indexes(bytes(data)) == []


def test_a_chain_of_pages_that_goes_round_ends(sandbox: Sandbox) -> None:
    data = bytearray(several("TIFF", 2))
    (first,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, first)
    next_at = first + 2 + 12 * entries
    (second,) = struct.unpack_from("<I", data, next_at)
    (entries,) = struct.unpack_from("<H", data, second)
    struct.pack_into("<I", data, second + 2 + 12 * entries, first)
    assert sandbox.inspect("a.tif", bytes(data)) == Content("document", 2)
    assert picture(sandbox, bytes(data), 2) == drawing(1)


def test_more_pages_than_are_counted(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """`limits.PAGES` and one: the others are not looked at."""
    monkeypatch.setattr(limits, "PAGES", 2)
    assert tiff.page_indexes(several("TIFF", 4)) == [0, 1, 2]


# Animations.

ANIMATIONS: dict[str, dict[str, Any]] = {
    "GIF": {"duration": [100, 200, 300, 1400]},
    "WEBP": {"duration": [100, 200, 300, 1400], "lossless": True},
    "PNG": {"duration": [100, 200, 300, 1400]},
    "AVIF": {"duration": [100, 200, 300, 1400]},
    "HEIF": {},
}


@for_each("kind", ANIMATIONS, own=(sandbox,))
def test_frames_of_an_animation(kind: str, sandbox: Sandbox) -> None:
    data = several(kind, **ANIMATIONS[kind])
    content = sandbox.inspect("a", data)
    assert isinstance(content, Content)
    assert (content.kind, content.count) == ("animation", 4)
    assert content.seconds == pytest.approx(2.0 if kind != "HEIF" else 0.0)
    check_frames(sandbox, data)


def check_frames(sandbox: Sandbox, data: bytes) -> None:
    """Each frame is what Pillow shows, in whatever order they are asked for, and without a number the first."""
    frames = []
    for number in range(4):  # opened anew, for Pillow does not restore what was below a frame that was looked at
        with Image.open(io.BytesIO(data)) as direct:
            direct.seek(number)
            frames.append(on_white(direct))
    assert len({frame.tobytes() for frame in frames}) == 4
    assert picture(sandbox, data) == frames[0]
    for page in (4, 1, 2, 3, 3, 2):
        assert picture(sandbox, data, page) == frames[page - 1], page


def on_white(image: Image.Image) -> Image.Image:
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer).convert("RGB")


def moving(kind: str, **options: Any) -> bytes:
    """A dot that moves, in frames that are transparent elsewhere."""
    frames = []
    for number in range(4):
        frame = Image.new("RGBA", (40, 20))
        ImageDraw.Draw(frame).rectangle((10 * number, 5, 10 * number + 5, 10), "red")
        frames.append(frame)
    frames[0].save(file := io.BytesIO(), kind, save_all=True, append_images=frames[1:], **options)
    return file.getvalue()


@for_each(
    ("kind", "options"),
    [
        ("GIF", {"disposal": 0}),
        ("GIF", {"disposal": 1}),
        ("GIF", {"disposal": 2}),
        ("GIF", {"disposal": 3}),
        ("PNG", {"disposal": 0, "blend": 1}),
        ("PNG", {"disposal": 1, "blend": 0}),
        ("PNG", {"disposal": 2, "blend": 1}),
        ("WEBP", {"lossless": True}),
        ("AVIF", {}),
    ],
    own=(sandbox,),
)
def test_frames_are_drawn_over_each_other(kind: str, options: dict[str, Any], sandbox: Sandbox) -> None:
    data = moving(kind, **options)
    check_frames(sandbox, data)
    is_kept = kind in ("GIF", "PNG") and options in ({"disposal": 0}, {"disposal": 1}, {"disposal": 0, "blend": 1})
    dots = [picture(sandbox, data, page).crop((0, 7, 40, 8)).getcolors() for page in (1, 2, 3, 4)]
    if kind != "AVIF":  # whose colors are near them
        assert [{color: count for count, color in found}[RED] for found in dots if found] == (
            [6, 12, 18, 24] if is_kept else [6, 6, 6, 6]
        )


def test_a_picture_for_programs_that_know_no_animation_is_no_frame(sandbox: Sandbox) -> None:
    """An APNG's default image: it stands for the file, and is not in its animation."""
    data = several("PNG", default_image=True, duration=500)
    assert sandbox.inspect("a.png", data) == Content("animation", 3, 1.5)
    assert picture(sandbox, data) == drawing(0)
    assert [picture(sandbox, data, page) for page in (1, 2, 3)] == [drawing(1), drawing(2), drawing(3)]
    assert refused(sandbox, data, 4)[0] == "a.pdf#4: no frame 4: it has 3 frames"


def test_a_frame_behind_broken_metadata(sandbox: Sandbox) -> None:
    whole = several("PNG", duration=500)
    broken = whole[:33] + struct.pack(">I4sBI", 1, b"gAMA", 1, 0) + whole[33:]
    assert picture(sandbox, broken, 3) == drawing(2)


def test_several_pictures_of_a_photo_are_no_animation(sandbox: Sandbox) -> None:
    data = several("MPO")
    assert sandbox.inspect("a.jpg", data) == Content("picture", 4)
    assert sandbox.inspect("a.jpg", encoded(noise(), "JPEG")) == Content("picture")
    assert sandbox.inspect("a.gif", encoded(noise(), "GIF")) == Content("picture")
    assert sandbox.inspect("a.tif", encoded(noise(), "TIFF")) == Content("picture")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_no_cut_of_an_animation_has_a_time_of_its_own(kind: str) -> None:
    data = several(kind, **ANIMATIONS[kind])
    assert all(0 <= seconds_of(data[:end]) <= 2.001 for end in range(len(data)))


def test_a_cut_animation_has_the_frames_that_are_there(sandbox: Sandbox) -> None:
    whole = several("GIF", duration=100)
    cut = whole[:-20]
    assert picture(sandbox, cut, 1) == picture(sandbox, whole, 1)
    assert "truncated" in refused(sandbox, cut, 4)[0]
    assert picture(sandbox, cut, 4, allow_truncated=True).size == (60, 40)


def test_jpeg_xl_where_its_plugin_is_installed(sandbox: Sandbox) -> None:
    pytest.importorskip("pillow_jxl")
    for mode in ("RGB", "RGBA", "L"):
        image = noise().convert(mode)
        assert picture(sandbox, encoded(image, "JXL", lossless=True)) == image.convert("RGB")


def test_decoders_keep_no_threads(sandbox: Sandbox) -> None:
    """Each would take memory of its own, which the sandbox limits."""
    pytest.importorskip("pillow_jxl")
    for data in (several("AVIF"), encoded(noise(), "JXL", lossless=True)):
        assert sandbox.open("a", data).image  # type: ignore[union-attr]
    assert len(sandbox.processes) >= 2
    for pid in sandbox.processes:
        assert psutil.Process(pid).num_threads() <= 2


# Files.


def test_a_file_on_this_disk_is_read(sandbox: Sandbox, tmp_path: Path) -> None:
    (file := tmp_path / "doc.pdf").write_bytes(text_pdf("one", "two"))
    found = sandbox.open("doc.pdf", file, part=Part(2), dpi=72)
    assert isinstance(found, Picture) and found.image == drawn(file.read_bytes(), 2, 1)
    assert (found.name, found.frames, found.part) == ("doc.pdf", 2, Part(2))
    link = tmp_path / "link.pdf"
    link.symlink_to(file)
    assert isinstance(sandbox.open("link.pdf", link), LlavaError)
    assert isinstance(sandbox.inspect("gone.pdf", tmp_path / "gone.pdf"), LlavaError)
    whole = sandbox.open("doc.pdf", file, dpi=72, resize=Resize.within(100))
    assert isinstance(whole, Picture) and whole.part == WHOLE and whole.dpi == 72
    assert max(whole.image.size) == 100


def test_the_kind_is_known_by_the_bytes(sandbox: Sandbox) -> None:
    for name, data in {"a.jpg": text_pdf("one", "two"), "a.pdf": several("TIFF", 2)}.items():
        assert sandbox.inspect(name, data) == Content("document", 2)
    jpeg = encoded(noise(), "JPEG", comment=b"%PDF-1.7")
    assert sandbox.inspect("a.pdf", jpeg) == Content("picture")
