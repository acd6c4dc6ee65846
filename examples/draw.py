"""Draws the pictures in this folder: `python examples/draw.py`. They are in no training data."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

HERE = Path(__file__).parent
SCALE = 4  # drawn larger and reduced, for smooth edges


def star(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    from math import cos, pi, sin

    corners = [(radius if i % 2 == 0 else radius * 0.42, i * pi / 5) for i in range(10)]
    return [((x + r * sin(a)) * SCALE, (y - r * cos(a)) * SCALE) for r, a in corners]


def canvas(width: int, height: int, color: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width * SCALE, height * SCALE), color)
    return image, ImageDraw.Draw(image)


def save(image: Image.Image, name: str) -> None:
    image.resize((image.width // SCALE, image.height // SCALE), Image.Resampling.LANCZOS).save(HERE / name)


def box(*corners: float) -> list[float]:
    return [SCALE * c for c in corners]


def main() -> None:
    image, pen = canvas(480, 320, "white")
    pen.ellipse(box(50, 60, 170, 180), fill="red")
    pen.rectangle(box(330, 190, 440, 270), fill="blue")
    pen.polygon(star(250, 110, 60), fill="orange")
    save(image, "shapes.png")

    image, pen = canvas(300, 300, "teal")
    pen.polygon(box(70, 220, 150, 80, 230, 220), fill="yellow")
    save(image, "triangle.png")


if __name__ == "__main__":
    main()
