"""Files of several pictures, with a red circle, a blue square and a green circle one after the other; pages of text."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageDraw


def _shape(color: str, is_round: bool) -> Image.Image:
    image = Image.new("RGB", (400, 400), "white")
    pen = ImageDraw.Draw(image)
    (pen.ellipse if is_round else pen.rectangle)((100, 100, 300, 300), fill=color)
    return image


def shapes() -> list[Image.Image]:
    return [_shape("red", True), _shape("blue", False), _shape("green", True)]


@pytest.fixture
def document(tmp_path: Path) -> Path:
    """A PDF with a shape on each of its 6 pages: the three, twice."""
    first, *others = shapes() * 2
    first.save(path := tmp_path / "doc.pdf", save_all=True, append_images=others)
    return path


@pytest.fixture
def animation(tmp_path: Path) -> Path:
    """A GIF with a shape in each of its 3 frames, a second each."""
    first, *others = shapes()
    first.save(path := tmp_path / "moving.gif", save_all=True, append_images=others, duration=1000)
    return path


def text_page(path: Path, lines: list[str], size: int = 11) -> None:
    """A PDF with one A4 page of text in Helvetica, `size` points high."""
    shown = "".join(f"({line}) Tj T*\n" for line in lines)
    content = f"BT /F1 {size} Tf {size * 1.5:g} TL 60 780 Td\n{shown}ET"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents 4 0 R"
        " /Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    text, offsets = "%PDF-1.4\n", []
    for number, entry in enumerate(objects, 1):
        offsets.append(len(text))
        text += f"{number} 0 obj\n{entry}\nendobj\n"
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    size_and_root = f"<< /Size {len(objects) + 1} /Root 1 0 R >>"
    end = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n{size_and_root}\nstartxref\n{len(text)}"
    path.write_text(f"{text}{end}\n%%EOF\n")
