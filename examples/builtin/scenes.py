"""Draws coloured shapes: the pictures of the built-in model's training and test data.

A `Scene` is what is on a picture; `draw` paints it. Everything is drawn from the `random.Random` that
is passed in, so a seed is a data set. Lengths are in units of the picture's longer side unless a
name says otherwise.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Each name's usual values; the first eight are easy-VQA's.
COLORS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((255, 0, 0), (220, 30, 40)),
    "green": ((0, 255, 0), (0, 128, 0), (50, 180, 70)),
    "blue": ((0, 0, 255), (30, 90, 220)),
    "yellow": ((255, 255, 0), (250, 215, 20)),
    "teal": ((0, 128, 128), (0, 128, 128), (20, 150, 150)),
    "gray": ((128, 128, 128), (128, 128, 128), (160, 160, 160)),
    "black": ((0, 0, 0), (20, 20, 20)),
    "brown": ((165, 42, 42), (130, 75, 35)),
    "orange": ((255, 165, 0), (250, 125, 10)),
    "purple": ((128, 0, 128), (140, 0, 190)),
    "pink": ((255, 105, 180), (255, 155, 190)),
    "white": ((255, 255, 255),),
}
SHAPES = ("circle", "rectangle", "triangle", "star", "cross", "diamond")
NUMBER = "number"  # drawn like a shape, but never counted as one
PIXEL = 1 / 64  # one pixel of what the model sees


@dataclass(frozen=True)
class Thing:
    """One shape (or number): centre and radius in units of the longer side."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    stretch: tuple[float, float] = (1.0, 1.0)
    turn: float = 0.0
    text: str = ""

    @property
    def name(self) -> str:
        return f"the number {self.text}" if self.shape == NUMBER else f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Things on a background; `width` and `height` are at most 1 and one of them is 1."""

    things: tuple[Thing, ...]
    background: str  # a colour's name, "pale" for a light tint, "" for what is no drawing at all
    fill: tuple[int, int, int]
    width: float
    height: float

    @property
    def shapes(self) -> list[Thing]:
        """The shapes from left to right."""
        return sorted((t for t in self.things if t.shape != NUMBER), key=lambda t: t.x)


def _jitter(rng: Random, color: tuple[int, int, int], amount: int) -> tuple[int, int, int]:
    r, g, b = (max(0, min(255, c + rng.randint(-amount, amount))) for c in color)
    return r, g, b


def _background(rng: Random) -> tuple[str, tuple[int, int, int]]:
    pick = rng.random()
    if pick < 0.40:
        return "white", _jitter(rng, (253, 253, 253), 2)
    if pick < 0.60:
        while True:
            tint = (rng.randint(228, 255), rng.randint(228, 255), rng.randint(228, 255))
            if max(tint) - min(tint) >= 12:
                return "pale", tint
    name = rng.choice(list(COLORS))
    return name, _jitter(rng, rng.choice(COLORS[name]), 10)


def random_scene(rng: Random, most: int = 6, least: int = 1, wide: float = 0.5, numbers: float = 0.06) -> Scene:
    """A scene of `least` to `most` shapes that do not touch; with a chance of `numbers` a number instead.

    `wide` is how often it is not square but up to 2.6 to 1, lying or standing.
    """
    ratio = 1.0 if rng.random() > wide else math.exp(rng.uniform(0, math.log(2.6)))
    width, height = (1.0, 1 / ratio) if rng.random() < 0.5 else (1 / ratio, 1.0)
    background, fill = _background(rng)
    colors = [c for c in COLORS if c != background and (c, background) not in _TOO_CLOSE]
    if rng.random() < numbers:
        radius = rng.uniform(9 * PIXEL, 0.42 * min(width, height))
        text = str(rng.randint(0, 9) if rng.random() < 0.7 else rng.randint(10, 99))
        half = radius * (0.6 if len(text) == 1 else 1.0)
        x, y = rng.uniform(half, width - half), rng.uniform(radius, height - radius)
        one = Thing(NUMBER, rng.choice(colors), x, y, radius, text=text)
        return Scene((one,), background, fill, width, height)
    palette = rng.sample(colors, rng.randint(2, min(6, len(colors))))
    count = 0 if least <= 1 and rng.random() < 0.02 else rng.randint(least, most)
    things: list[Thing] = []
    largest = min(0.30, 0.70 * math.sqrt(width * height / max(count, 2) / math.pi))
    for _ in range(count * 12):
        if len(things) == count:
            break
        shape = rng.choice(SHAPES)
        smallest = (5.0 if shape in ("circle", "rectangle", "triangle") else 6.0) * PIXEL
        radius = rng.uniform(smallest, max(smallest, min(largest, 0.46 * min(width, height))))
        stretch = (1.0, 1.0)
        if shape == "rectangle":
            stretch = (rng.uniform(0.45, 1), rng.uniform(0.45, 1))
        turn = rng.uniform(-0.25, 0.25) if rng.random() < 0.4 else 0.0
        x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        if all(math.hypot(x - t.x, y - t.y) > radius + t.radius + 1.5 * PIXEL for t in things):
            things.append(Thing(shape, rng.choice(palette), x, y, radius, stretch, turn))
    return Scene(tuple(things), background, fill, width, height)


# Pairs a person would not call apart at a glance, whichever is on top of the other.
_TOO_CLOSE = {("white", "pale"), ("red", "brown"), ("brown", "red"), ("teal", "gray"), ("gray", "teal")}


def _outline(thing: Thing) -> list[tuple[float, float]]:
    """The corners of a shape around its centre, in radii."""
    if thing.shape == "rectangle":
        sx, sy = thing.stretch
        k = 0.9 / math.hypot(sx, sy)
        return [(-sx * k, -sy * k), (sx * k, -sy * k), (sx * k, sy * k), (-sx * k, sy * k)]
    if thing.shape == "triangle":
        return [(0, -1), (0.92, 0.62), (-0.92, 0.62)]
    if thing.shape == "diamond":
        return [(0, -1), (0.78, 0), (0, 1), (-0.78, 0)]
    if thing.shape == "star":
        radii = [1 if i % 2 == 0 else 0.42 for i in range(10)]
        return [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate(radii)]
    a, b = 0.30, 0.95  # a cross
    return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]


def _paint(pen: ImageDraw.ImageDraw, thing: Thing, scale: float, fill: object, edge: object = None) -> None:
    x, y, r = thing.x * scale, thing.y * scale, thing.radius * scale
    if thing.shape == NUMBER:
        font = ImageFont.load_default(r * 1.9)
        pen.text((x, y), thing.text, fill=fill, font=font, anchor="mm")  # type: ignore[arg-type]
    elif thing.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=edge)  # type: ignore[arg-type]
    else:
        c, s = math.cos(thing.turn), math.sin(thing.turn)
        corners = [(x + r * (u * c - v * s), y + r * (u * s + v * c)) for u, v in _outline(thing)]
        pen.polygon(corners, fill=fill, outline=edge)  # type: ignore[arg-type]


def draw(scene: Scene, rng: Random, side: int | None = None) -> Image.Image:
    """Paints a scene; its longer side is `side` pixels or a random 64 to 320, sometimes as a JPEG."""
    side = side or round(math.exp(rng.uniform(math.log(64), math.log(320))))
    smooth = 2 if side < 200 and rng.random() < 0.6 else 1
    scale = side * smooth
    image = Image.new("RGB", (max(1, round(scene.width * scale)), max(1, round(scene.height * scale))), scene.fill)
    pen = ImageDraw.Draw(image)
    edge = (0, 0, 0) if rng.random() < 0.08 else None
    for thing in scene.things:
        _paint(pen, thing, scale, _jitter(rng, rng.choice(COLORS[thing.color]), rng.choice((0, 0, 12))), edge)
    if smooth > 1:
        image = image.resize((max(1, image.width // smooth), max(1, image.height // smooth)), Image.Resampling.BOX)
    if rng.random() < 0.15:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(60, 95))
        image = Image.open(buffer).convert("RGB")
    return image


def owners(scene: Scene, side: int) -> np.ndarray:
    """Which thing each pixel of the padded square belongs to: int [side, side], 0 for none."""
    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)
    dx, dy = (1 - scene.width) / 2, (1 - scene.height) / 2
    for i, t in enumerate(scene.things, 1):
        _paint(pen, Thing(t.shape, t.color, t.x + dx, t.y + dy, t.radius, t.stretch, t.turn, t.text), side, i)
    return np.asarray(mask)
