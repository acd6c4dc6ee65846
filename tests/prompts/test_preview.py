"""What of a picture reaches the model, and the picture that shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import families
from helpers.command import Run
from helpers.families import FAMILIES
from helpers.pages import text_page
from helpers.tables import for_each
from PIL import Image, ImageChops, ImageDraw, ImageStat

from llava_cli.loader import load_prompter
from llava_cli.settings import LoadOptions

Checkpoint = Callable[[str], Path]

MEAN = (122, 116, 104)  # CLIP's mean color, as LLaVA rounds it


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A red circle at the left edge of a wide drawing, a blue triangle at the right one."""
    image = Image.new("RGB", (600, 200), "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((10, 30, 150, 170), fill="red")
    pen.polygon([(520, 30), (590, 170), (450, 170)], fill="blue")
    image.save(path := tmp_path / "wide.png")
    return path


def view(run: Run, path: Path, *args: str | Path) -> Image.Image:
    result = run("prompt", *args, "what is this?", "--save-view", path)
    assert (result.exit_code, "what is this?" in result.stdout) == (0, True)
    return Image.open(path).convert("RGB")


def near(pixel: object, color: tuple[int, int, int]) -> bool:
    assert isinstance(pixel, tuple)
    return all(abs(a - b) <= 2 for a, b in zip(pixel, color, strict=True))


def test_the_built_in_model_sees_both_edges_of_a_wide_drawing(run: Run, wide: Path) -> None:
    def ask(question: str, *how: str) -> str:
        return run("ask", "-q", wide, question, *how).stdout.strip()

    assert ask("what is this?") == "a red circle and a blue triangle on a white background"
    assert ask("how many shapes are there?") == "2"
    assert ask("is there a circle?") == ask("is there a triangle?") == "yes"
    assert ask("is there a circle?", "--fit", "crop") == ask("is there a triangle?", "--fit", "crop") == "no"


def test_a_tall_drawing_too(run: Run, tmp_path: Path) -> None:
    image = Image.new("RGB", (200, 600), "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((30, 10, 170, 150), fill="red")
    pen.polygon([(100, 450), (170, 590), (30, 590)], fill="blue")
    image.save(path := tmp_path / "tall.png")
    assert run("ask", "-q", path, "how many shapes are there?").stdout == "2\n"
    assert run("ask", "-q", path, "is there a circle?").stdout == "yes\n"
    assert run("ask", "-q", path, "what color is the triangle?").stdout == "blue\n"


@pytest.mark.parametrize("family", ["llava-llama", "llava-mistral", "vip-llava"])
def test_families_trained_on_padded_pictures_get_them(
    family: str, run: Run, wide: Path, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    seen = view(run, tmp_path / "view.png", "-m", checkpoint(family), wide)
    assert seen.size == (56, 56)
    assert near(seen.getpixel((28, 3)), MEAN)
    assert near(seen.getpixel((28, 52)), MEAN)
    assert near(seen.getpixel((7, 28)), (255, 0, 0))
    assert near(seen.getpixel((49, 29)), (0, 0, 255))
    cropped = view(run, tmp_path / "view.png", "-m", checkpoint(family), wide, "--fit", "crop")
    assert near(cropped.getpixel((28, 3)), (255, 255, 255))
    assert not any(near(pixel, (255, 0, 0)) for _, pixel in cropped.getcolors(56 * 56) or [])


def test_tiles_stand_beside_the_whole(run: Run, wide: Path, tmp_path: Path, checkpoint: Checkpoint) -> None:
    for family in ("llava-next-vicuna", "llava-next-mistral", "llava-onevision"):
        seen = view(run, tmp_path / "view.png", "-m", checkpoint(family), wide)
        # The whole, squeezed into a square, then a row of two tiles.
        assert seen.size == (3 * 56 + 2 * 4, 56)
        assert near(seen.getpixel((7, 28)), (255, 0, 0))
        assert near(seen.getpixel((58, 3)), (255, 255, 255))
        tiles = [seen.crop((left, 0, left + 56, 56)) for left in (60, 120)]
        colors = [{pixel for _, pixel in tile.getcolors(56 * 56) or []} for tile in tiles]
        assert any(near(pixel, (255, 0, 0)) for pixel in colors[0])
        assert any(near(pixel, (0, 0, 255)) for pixel in colors[1])


def test_a_row_for_each_picture(run: Run, wide: Path, drawing: Path, tmp_path: Path, checkpoint: Checkpoint) -> None:
    seen = view(run, tmp_path / "view.png", "-m", checkpoint("llava-llama"), wide, drawing)
    assert seen.size == (56, 2 * 56 + 4)


def test_a_view_that_cannot_be_written(run: Run, drawing: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "view.png", tmp_path / "view.nonsense"):
        result = run("prompt", drawing, "what is this?", "--save-view", path)
        assert (result.exit_code, str(path) in result.stderr) == (74, True)
        assert not path.exists()


def test_a_view_of_no_picture(run: Run, tmp_path: Path) -> None:
    result = run("prompt", "what is this?", "--save-view", tmp_path / "view.png")
    assert (result.exit_code, "--save-view" in result.stderr) == (69, True)


@for_each("family", ["builtin", *FAMILIES])
def test_pillow_resizes_whatever_else_is_installed(family: str, checkpoint: Checkpoint) -> None:
    prompter = load_prompter(LoadOptions(model=family if family == "builtin" else str(checkpoint(family))))
    assert "Pil" in type(prompter.processor.image_processor._image_processor).__name__
    assert prompter.processor.image_processor.backend == "pil"


def test_the_text_of_a_page_is_as_in_a_page_drawn_directly(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the picture sizes that LLaVA-OneVision was trained with: a page is seen in tiles, each as wide as 384."""
    pypdfium2 = pytest.importorskip("pypdfium2")
    monkeypatch.setattr(families, "SIDE", 384)
    monkeypatch.setattr(families, "GRID", [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)])
    model = families.save("llava-onevision", tmp_path / "model")
    text_page(
        page := tmp_path / "invoice.pdf", [f"Invoice {n}: {n * 379} widgets at {n * 7}.25 EUR" for n in range(44)]
    )
    seen = view(run, tmp_path / "view.png", "-m", model, page)
    direct = pypdfium2.PdfDocument(page)[0].render(scale=150 / 72).to_pil().convert("RGB")

    side, columns, rows = 384, 4, 5
    assert seen.size == ((side + 4) * (1 + columns * rows) - 4, side)
    sheet = Image.new("RGB", (side * columns, side * rows))
    for n in range(columns * rows):
        left = (n + 1) * (side + 4)  # behind the whole page in one tile
        sheet.paste(seen.crop((left, 0, left + side, side)), (n % columns * side, n // columns * side))
    width = round(direct.width * sheet.height / direct.height)
    expected = direct.resize((width, sheet.height), Image.Resampling.BICUBIC)
    left = (sheet.width - width) // 2
    difference = ImageStat.Stat(ImageChops.difference(sheet.crop((left, 0, left + width, sheet.height)), expected))
    assert max(difference.rms) < 1  # of 255; moved by one pixel, it is 25
    assert width >= direct.width  # nothing is lost
