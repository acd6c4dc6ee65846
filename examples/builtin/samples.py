"""Pictures with questions: drawings, and photos and textures, about which every question is declined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from questions import DECLINE, question, turns, vary
from scenes import Scene, draw, random_scene


@dataclass(frozen=True)
class Sample:
    """A picture and what was asked about it: (kind, question, answer) in order."""

    image: Image.Image
    turns: list[tuple[str, str, str]]
    scene: Scene | None = None


# Photographs that scikit-image bundles. The second half is never trained on.
PHOTOS_TRAIN = [
    "astronaut.png",
    "camera.png",
    "cell.png",
    "clock_motion.png",
    "coins.png",
    "grass.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "page.png",
    "retina.jpg",
    "horse.png",
    "microaneurysms.png",
]
PHOTOS_TEST = ["chelsea.png", "coffee.png", "rocket.jpg", "brick.png", "gravel.png", "moon.png", "text.png"]


SIDE = 96  # of a texture, in pixels


def load_photos(names: list[str]) -> list[Image.Image]:
    import skimage.data

    folder = Path(skimage.data.__file__).parent
    photos = [Image.open(folder / name).convert("RGB") for name in names]
    for photo in photos:
        photo.thumbnail((512, 512))
    return photos


def crop(photo: Image.Image, rng: Random, least: float = 0.2) -> Image.Image:
    """A part of a photo that is not flat, mirrored half of the time."""
    for _ in range(8):
        w, h = (max(8, round(rng.uniform(least, 1) * s)) for s in photo.size)
        x, y = rng.randint(0, photo.width - w), rng.randint(0, photo.height - h)
        part = photo.crop((x, y, x + w, y + h))
        if np.asarray(part.resize((32, 32))).std() > 12:
            break
    else:
        part = photo
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


def disguise(part: Image.Image, rng: Random) -> Image.Image:
    """A photo turned, blurred or recoloured now and then: few photos have to stand for all."""
    if rng.random() < 0.4:
        part = part.transpose(rng.choice(list(Image.Transpose)))
    if rng.random() < 0.2:
        part = part.filter(ImageFilter.GaussianBlur(rng.uniform(0.005, 0.03) * max(part.size)))
    if rng.random() < 0.5:
        bands = list(part.split())
        rng.shuffle(bands)
        part = Image.merge("RGB", bands)
    if rng.random() < 0.15:
        part = part.convert("L").convert("RGB")
    if rng.random() < 0.6:
        value = np.asarray(part) / 255.0
        value = 1 - value if rng.random() < 0.2 else value
        gains = np.array([rng.uniform(0.6, 1.4) for _ in range(3)])
        value = value ** rng.uniform(0.5, 1.8) * gains + rng.uniform(-0.12, 0.12)
        part = Image.fromarray((value * 255).clip(0, 255).astype(np.uint8))
    return part


def _clouds(rng: Random, noise: np.random.Generator, tint: np.ndarray) -> np.ndarray:
    """Clouds with the spectrum of natural pictures, in two colours or in all."""
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE)))
    f[0, 0] = 1 / SIDE
    bands = 3 if rng.random() < 0.4 else 1
    spectrum = np.fft.fft2(noise.standard_normal((bands, SIDE, SIDE))) / f ** rng.uniform(0.6, 1.7)
    value = np.fft.ifft2(spectrum).real
    value = (value - value.mean()) / (value.std() * 4) + 0.5
    if rng.random() < 0.3:
        value = np.abs(value - 0.5) * 2
    return tint[0] + (tint[1] - tint[0]) * value.transpose(1, 2, 0) if bands == 1 else 255 * value.transpose(1, 2, 0)


def _noise(rng: Random, noise: np.random.Generator, tint: np.ndarray) -> np.ndarray:
    """Noise about one colour."""
    return tint[0] + noise.standard_normal((SIDE, SIDE, rng.choice((1, 3)))) * rng.uniform(15, 90)


def _waves(rng: Random, noise: np.random.Generator, tint: np.ndarray) -> np.ndarray:
    """Stripes, checks and waves."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    turn, rate = rng.uniform(0, math.pi), rng.uniform(2, 24)
    wave = np.sin(rate * 2 * math.pi * (x * math.cos(turn) + y * math.sin(turn)))
    if rng.random() < 0.5:
        wave = wave * np.sin(rate * 2 * math.pi * (y * math.cos(turn) - x * math.sin(turn)))
    if rng.random() < 0.5:
        wave = np.sign(wave)
    return tint[0] + (tint[1] - tint[0]) * (wave[..., None] + 1) / 2


def _leaves(rng: Random, noise: np.random.Generator, tint: np.ndarray) -> np.ndarray:
    """A heap of overlapping leaves, often under noise, as in photographs of clutter."""
    heap = Image.new("RGB", (SIDE, SIDE))
    pen = ImageDraw.Draw(heap)
    for _ in range(rng.randint(40, 160)):
        x, y, r = rng.uniform(0, SIDE), rng.uniform(0, SIDE), SIDE / rng.uniform(3, 24)
        color = tuple(int(c) for c in tint[0] + (tint[1] - tint[0]) * rng.random() + noise.integers(-40, 40, 3))
        sides = rng.randint(3, 9)
        angles = [2 * math.pi * (i + rng.random()) / sides for i in range(sides)]
        pen.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for a in angles], fill=color)
    if rng.random() < 0.5:
        heap = heap.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))
    return np.asarray(heap) + noise.standard_normal((SIDE, SIDE, 1)) * rng.uniform(0, 20)


def _soft_things(rng: Random, noise: np.random.Generator, tint: np.ndarray) -> np.ndarray:
    """Soft things with light and shade before a gradient, as on a table."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    pixels = tint[0] + (tint[1] - tint[0]) * (x * rng.uniform(-1, 1) + y * rng.uniform(0.2, 1))[..., None]
    for _ in range(rng.randint(1, 6)):
        u, v, a, b = rng.random(), rng.random(), rng.uniform(0.05, 0.4), rng.uniform(0.05, 0.4)
        inside = (((x - u) / a) ** 2 + ((y - v) / b) ** 2)[..., None]
        light = 0.3 + 0.7 * np.clip(1 + (x - u) / a * rng.uniform(-1, 1) + (y - v) / b * rng.uniform(-1, 1), 0, 2)
        paint = np.array([rng.randint(20, 255) for _ in range(3)]) * light[..., None]
        cover = 1 / (1 + np.exp(np.clip((inside - 1) * rng.uniform(3, 15), -50, 50)))
        pixels = pixels * (1 - cover) + paint * cover
    return pixels + noise.standard_normal((SIDE, SIDE, 1)) * rng.uniform(2, 16)


def _writing(rng: Random, noise: np.random.Generator, tint: np.ndarray) -> np.ndarray:
    """Lines of writing, too small to read."""
    page = Image.fromarray(np.broadcast_to(tint[0], (SIDE, SIDE, 3)).astype(np.uint8))
    pen, size = ImageDraw.Draw(page), rng.uniform(6, 14)
    font = ImageFont.load_default(size)
    for line in range(int(SIDE / size / 1.2) + 1):
        letters = "".join(rng.choice("abcdefghij klmnopqrs tuvwxyz, EIRT.") for _ in range(40))
        pen.text((rng.uniform(-20, 4), line * size * 1.2), letters, fill=tuple(map(int, tint[1])), font=font)
    page = page.rotate(rng.choice((0, 0, rng.uniform(-20, 20))))
    return np.asarray(page) + noise.standard_normal((SIDE, SIDE, 1)) * rng.uniform(0, 25)


# Each kind with the upper end of its share of all textures.
TEXTURES = ((0.45, _clouds), (0.60, _noise), (0.75, _waves), (0.85, _leaves), (0.95, _soft_things), (1.0, _writing))


def texture(rng: Random) -> Image.Image:
    """Noise, clouds, stripes, checks, gradients and heaps of leaves: no drawing of shapes."""
    noise = np.random.default_rng(rng.getrandbits(32))
    tint = np.array([[rng.randint(0, 255) for _ in range(3)] for _ in range(2)], dtype=float)
    kind = rng.random()
    pixels = next(make for upto, make in TEXTURES if kind < upto)(rng, noise, tint)
    image = Image.fromarray(np.broadcast_to(pixels, (SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8))
    return image.resize((round(SIDE * rng.uniform(0.5, 1.5)), SIDE)) if rng.random() < 0.4 else image


def no_drawing(photos: list[Image.Image], count: int, rng: Random) -> Sample:
    """A photo or a texture, and questions that are all declined."""
    image = disguise(crop(rng.choice(photos), rng), rng) if rng.random() < 0.6 else texture(rng)
    asked = [q for _, q, _ in turns(random_scene(rng), count, rng)]
    asked.insert(0, vary(question(Scene((), "white", (255, 255, 255), 1, 1), "describe", rng)[0], rng))  # type: ignore[index]
    return Sample(image, [("decline", q, DECLINE) for q in asked[:count]])


def drawing(
    rng: Random,
    count: int,
    most: int = 6,
    least: int = 1,
    crowded: float = 0.12,
    numbers: float = 0.06,
    kinds: Sequence[str] | None = None,
) -> Sample:
    """A drawing and up to `count` questions about it, of all `kinds` unless some are named.

    It has `least` to `most` shapes, now and then (but for a `least` of 2) one alone, with a chance of
    `crowded` six to nine, and with one of `numbers` a number instead.
    """
    pick = rng.random()
    low, high = (6, 9) if pick < crowded else (1, 1) if pick > 0.85 and least == 1 else (least, most)
    scene = random_scene(rng, high, low, numbers=numbers)
    return Sample(draw(scene, rng), turns(scene, count, rng, kinds), scene)
