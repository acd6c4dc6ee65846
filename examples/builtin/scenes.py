"""Draws coloured shapes and asks about them: the training and test data of the built-in model.

A `Scene` is what is on a picture; `draw` paints it, `question` asks one kind of question about it
and knows the answer. Everything is drawn from the `random.Random` that is passed in, so a seed
is a data set. Lengths are in units of the picture's longer side unless a name says otherwise.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

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
DECLINE = "I am a small demonstration model that only knows drawings of colored shapes."
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
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


@dataclass(frozen=True)
class Sample:
    """A picture and what was asked about it: (kind, question, answer) in order."""

    image: Image.Image
    turns: list[tuple[str, str, str]]
    scene: Scene | None = None


# ---------------------------------------------------------------- scenes


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


def random_scene(rng: Random, most: int = 6, least: int = 1, wide: float = 0.5) -> Scene:
    """A scene of `least` to `most` shapes that do not touch; now and then a number instead.

    `wide` is how often it is not square but up to 2.6 to 1, lying or standing.
    """
    ratio = 1.0 if rng.random() > wide else math.exp(rng.uniform(0, math.log(2.6)))
    width, height = (1.0, 1 / ratio) if rng.random() < 0.5 else (1 / ratio, 1.0)
    background, fill = _background(rng)
    colors = [c for c in COLORS if c != background and (c, background) not in _TOO_CLOSE]
    if rng.random() < 0.06:
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
        smallest = (4.0 if shape in ("circle", "rectangle", "triangle") else 5.2) * PIXEL
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


# ---------------------------------------------------------------- drawing


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


# ---------------------------------------------------------------- questions

Asked = tuple[str, str] | None


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeio' else 'a'} {words}"


def _ordered(things: list[Thing]) -> bool:
    """Whether left to right is beyond doubt."""
    return all(b.x - a.x > 3 * PIXEL for a, b in pairwise(things))


def _ref(scene: Scene, thing: Thing, rng: Random) -> str | None:
    """A name that means this thing alone: "circle", "red shape" or "red circle"."""
    others = [t for t in scene.shapes if t is not thing]
    names = [thing.name] if all(t.name != thing.name for t in others) else []
    if all(t.shape != thing.shape for t in others):
        names.append(thing.shape)
    if all(t.color != thing.color for t in others):
        names.append(f"{thing.color} shape")
    return rng.choice(names) if names else None


def _some_ref(scene: Scene, rng: Random) -> tuple[Thing, str] | None:
    things = scene.shapes
    rng.shuffle(things)
    for thing in things:
        if name := _ref(scene, thing, rng):
            return thing, name
    return None


def describe(scene: Scene) -> str | None:
    """What a person would say of the drawing in one sentence; None where the order is in doubt."""
    ground = f"on a {scene.background} background" if scene.background[0] not in "o" else "on an orange background"
    things = scene.shapes
    if len(scene.things) > len(things):
        return f"the number {scene.things[0].text} in {scene.things[0].color} {ground}"
    if not things:
        return f"nothing {ground}"
    if len(things) > 4:
        return f"{len(things)} shapes {ground}"
    return f"{_join([_a(t.name) for t in things])} {ground}" if _ordered(things) else None


def _describe(scene: Scene, rng: Random) -> Asked:
    ask = rng.choice(
        [
            "what is this?",
            "what is in the picture?",
            "what do you see?",
            "describe the picture.",
            "describe this image.",
            "what is shown here?",
            "what does the image show?",
            "what is in this image?",
            "describe the drawing.",
            "describe what you see.",
            "what's this?",
            "what can you see in the picture?",
            "please describe the image.",
        ]
    )
    answer = describe(scene)
    return (ask, answer) if answer else None


def _colors(scene: Scene, rng: Random) -> Asked:
    things = scene.shapes
    if not 1 <= len(things) <= 4 or not _ordered(things):
        return None
    ask = rng.choice(["what colors are there?", "what colors are the shapes?", "which colors do the shapes have?"])
    return ask, _join(list(dict.fromkeys(t.color for t in things)))


def _shapes(scene: Scene, rng: Random) -> Asked:
    things = scene.shapes
    if not 1 <= len(things) <= 4 or not _ordered(things):
        return None
    if len(things) == 1 and rng.random() < 0.6:
        singular = ["what shape is in the image?", "what shape is present?", "what shape does the image contain?"]
        return rng.choice([*singular, "what shape is this?", "which shape is it?"]), things[0].shape
    ask = rng.choice(["what shapes are there?", "which shapes are in the picture?", "what shapes do you see?"])
    return ask, _join(list(dict.fromkeys(t.shape for t in things)))


def _color_of(scene: Scene, rng: Random) -> Asked:
    if len(scene.things) == 1 and rng.random() < 0.5:
        name = rng.choice(["shape", "it"]) if scene.things[0].shape != NUMBER else "number"
        the = name if name == "it" else f"the {name}"
        return rng.choice([f"what color is {the}?", f"what is the color of {the}?"]), scene.things[0].color
    once = [t for t in scene.shapes if sum(o.shape == t.shape for o in scene.shapes) == 1]
    if not once:
        return None
    thing = rng.choice(once)
    ask = rng.choice(["what color is the {}?", "what is the color of the {}?", "which color is the {}?"])
    return ask.format(thing.shape), thing.color


def _shape_of(scene: Scene, rng: Random) -> Asked:
    once = [t for t in scene.shapes if sum(o.color == t.color for o in scene.shapes) == 1]
    if not once:
        return None
    thing = rng.choice(once)
    ask = rng.choice(["what is the {} shape?", "what shape is {}?", "which shape is {}?", "what is {}?"])
    return ask.format(thing.color), thing.shape


def _count(scene: Scene, rng: Random) -> Asked:
    ask = rng.choice(
        ["how many shapes are there?", "how many shapes are in the picture?", "count the shapes.", "how many shapes?"]
    )
    return ask, str(len(scene.shapes))


def _count_some(scene: Scene, rng: Random) -> Asked:
    present = scene.shapes
    if present and rng.random() < 0.8:
        thing = rng.choice(present)
        shape, color = thing.shape, thing.color
    else:
        shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
    key, fits = rng.choice(
        [
            (_plural(shape), lambda t: t.shape == shape),
            (f"{color} shapes", lambda t: t.color == color),
            (f"{color} {_plural(shape)}", lambda t: t.color == color and t.shape == shape),
        ]
    )
    ask = rng.choice(["how many {} are there?", "how many {} are in the picture?", "count the {}.", "how many {}?"])
    return ask.format(key), str(sum(map(fits, present)))


def _plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def _third(at: float, names: tuple[str, str, str]) -> str | None:
    for i, name in enumerate(names):
        if i / 3 + (0.035 if i > 0 else 0) <= at <= (i + 1) / 3 - (0.035 if i < 2 else 0):
            return name
    return None


def _where(scene: Scene, rng: Random) -> Asked:
    found = _some_ref(scene, rng)
    if not found:
        return None
    thing, name = found
    row, column = _third(thing.y / scene.height, ROWS), _third(thing.x / scene.width, COLUMNS)
    if row is None or column is None:
        return None
    ask = rng.choice(["where is the {}?", "where is the {} in the picture?", "in which part of the image is the {}?"])
    return ask.format(name), " ".join(filter(None, (row, column))) or "center"


_SIDES: dict[str, tuple[list[str], Callable[[Thing, Thing], float]]] = {
    "left": (["left of", "to the left of"], lambda a, b: b.x - a.x),
    "right": (["right of", "to the right of"], lambda a, b: a.x - b.x),
    "above": (["above", "higher than"], lambda a, b: b.y - a.y),
    "below": (["below", "lower than", "under"], lambda a, b: a.y - b.y),
}
CLEAR = 5 * PIXEL  # how far apart two centres are for "left of" to be beyond doubt


def _relation(scene: Scene, rng: Random) -> Asked:
    things = scene.shapes
    if len(things) < 2:
        return None
    a, b = rng.sample(things, 2)
    name_a, name_b = _ref(scene, a, rng), _ref(scene, b, rng)
    words, distance = _SIDES[rng.choice(list(_SIDES))]
    if name_a is None or name_b is None or abs(distance(a, b)) < CLEAR:
        return None
    return f"is the {name_a} {rng.choice(words)} the {name_b}?", "yes" if distance(a, b) > 0 else "no"


def _beside(scene: Scene, rng: Random) -> Asked:
    found = _some_ref(scene, rng)
    if not found:
        return None
    thing, name = found
    words, distance = _SIDES[rng.choice(list(_SIDES))]
    apart = {id(t): distance(t, thing) for t in scene.shapes if t is not thing}
    there = [t for t in scene.shapes if apart.get(id(t), 0) > 0]
    if len(there) != 1 or any(abs(d) < CLEAR for d in apart.values()):
        return None
    return f"what is {rng.choice(words)} the {name}?", _a(there[0].name)


def _exists(scene: Scene, rng: Random) -> Asked:
    present, want = scene.shapes, rng.random() < 0.5
    colors, shapes = {t.color for t in present}, {t.shape for t in present}
    pairs = {(t.color, t.shape) for t in present}
    kind = rng.choice(("color", "shape", "both"))
    if kind == "color":
        options = sorted(colors) if want else sorted(set(COLORS) - colors)
        names = [f"{c} shape" for c in options]
    elif kind == "shape":
        names = sorted(shapes) if want else sorted(set(SHAPES) - shapes)
    else:
        near = sorted({(c, s) for c in colors for s in shapes} - pairs)
        every = sorted({(c, s) for c in COLORS for s in SHAPES} - pairs)
        chosen = sorted(pairs) if want else (near if near and rng.random() < 0.6 else every)
        names = [f"{c} {s}" for c, s in chosen]
    if not names:
        return None
    ask, negated = rng.choice(_EXIST)
    name = rng.choice(names)
    return ask.format(a=_a(name), name=name), "yes" if want != negated else "no"


_EXIST: list[tuple[str, bool]] = [
    ("is there {a}?", False),
    ("is there {a} in the image?", False),
    ("is there {a} in the picture?", False),
    ("does the image contain {a}?", False),
    ("is {a} present?", False),
    ("do you see {a}?", False),
    ("is there not {a}?", True),
    ("is there not {a} in the image?", True),
    ("does the image not contain {a}?", True),
    ("is no {name} present?", True),
]


def _background_question(scene: Scene, rng: Random) -> Asked:
    ask = rng.choice(
        ["what color is the background?", "what is the background color?", "which color is the background?"]
    )
    return ask, scene.background


def _number(scene: Scene, rng: Random) -> Asked:
    numbers = [t.text for t in scene.things if t.shape == NUMBER]
    if numbers:
        ask = ["what number is this?", "which number is written?", "what number is shown?", "what does it say?"]
        return rng.choice([*ask, "what number is in the picture?", "read the number."]), numbers[0]
    return ("is there a number in the picture?", "no") if rng.random() < 0.05 else None


KINDS: dict[str, Callable[[Scene, Random], Asked]] = {
    "describe": _describe,
    "colors": _colors,
    "shapes": _shapes,
    "color of": _color_of,
    "shape of": _shape_of,
    "count": _count,
    "count some": _count_some,
    "where": _where,
    "relation": _relation,
    "beside": _beside,
    "yes/no": _exists,
    "background": _background_question,
    "number": _number,
}
# How often each kind is tried: what is learned last is asked most.
WEIGHTS = {
    "where": 2.4,
    "relation": 2.2,
    "beside": 1.8,
    "yes/no": 1.6,
    "describe": 1.6,
    "count some": 1.4,
    "number": 3.0,
}

_OFF_TOPIC = [
    "what is the capital of france?",
    "who are you?",
    "how old is the man?",
    "what is the weather like?",
    "tell me a joke.",
    "what breed is the dog?",
    "is the cat asleep?",
    "write a poem.",
    "what time is it?",
    "what is two plus two?",
    "what is the person doing?",
    "what brand is the car?",
    "translate this into german.",
    "what food is this?",
    "how many people are there?",
    "is it day or night?",
    "what is the woman wearing?",
    "who painted this?",
    "what is your name?",
    "where was this taken?",
    "what is the dog doing?",
    "how much does it cost?",
    "what animal is this?",
    "how many cars are there?",
    "what year is it?",
    "is the man happy?",
    "what kind of bird is this?",
    "who wrote this?",
    "what is the name of the city?",
    "what sport are they playing?",
    "is there a dog?",
    "is there a cat in the picture?",
    "is there a person in the image?",
    "what is the meaning of life?",
    "explain the joke.",
    "what language is this?",
]


def vary(question: str, rng: Random) -> str:
    """The same question as somebody else would type it."""
    if rng.random() < 0.12:
        question = question.replace("color", "colour")
    if rng.random() < 0.12:
        question = question.replace("gray", "grey")
    if rng.random() < 0.15:
        question = question.replace("picture", "image") if rng.random() < 0.5 else question.replace("image", "picture")
    if rng.random() < 0.12:
        question = question.rstrip("?.")
    return question[0].upper() + question[1:] if rng.random() < 0.5 else question


def question(scene: Scene, kind: str, rng: Random) -> Asked:
    """One question of a kind and its answer; None where this scene has no certain one."""
    return KINDS[kind](scene, rng)


def turns(scene: Scene, count: int, rng: Random) -> list[tuple[str, str, str]]:
    """Up to `count` different questions with their answers."""
    asked: dict[str, tuple[str, str, str]] = {}
    kinds, weights = list(KINDS), [WEIGHTS.get(k, 1.0) for k in KINDS]
    for _ in range(count * 6):
        if len(asked) == count:
            break
        if rng.random() < 0.015:
            asked.setdefault("off", ("off topic", vary(rng.choice(_OFF_TOPIC), rng), DECLINE))
            continue
        kind = rng.choices(kinds, weights)[0]
        if found := question(scene, kind, rng):
            asked.setdefault(found[0], (kind, vary(found[0], rng), found[1]))
    return list(asked.values())


# ---------------------------------------------------------------- what is no drawing

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


def load_photos(names: list[str]) -> list[Image.Image]:
    import skimage.data

    folder = Path(skimage.data.__file__).parent
    photos = [Image.open(folder / name).convert("RGB") for name in names]
    for photo in photos:
        photo.thumbnail((512, 512))
    return photos


def crop(photo: Image.Image, rng: Random, least: float = 0.35) -> Image.Image:
    """A part of a photo that is not flat, its colours changed now and then."""
    for _ in range(8):
        w, h = (max(8, round(rng.uniform(least, 1) * s)) for s in photo.size)
        x, y = rng.randint(0, photo.width - w), rng.randint(0, photo.height - h)
        part = photo.crop((x, y, x + w, y + h))
        if np.asarray(part.resize((32, 32))).std() > 12:
            break
    else:
        part = photo
    if rng.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        bands = list(part.split())
        rng.shuffle(bands)
        part = Image.merge("RGB", bands)
    if rng.random() < 0.5:
        gains = np.array([rng.uniform(0.5, 1.5) for _ in range(3)])
        part = Image.fromarray((np.asarray(part) * gains + rng.uniform(-30, 30)).clip(0, 255).astype(np.uint8))
    return part


def texture(rng: Random) -> Image.Image:
    """Noise, clouds, stripes, checks, gradients and heaps of leaves: no drawing of shapes."""
    noise = np.random.default_rng(rng.getrandbits(32))
    n = 96
    tint = np.array([[rng.randint(0, 255) for _ in range(3)] for _ in range(2)], dtype=float)
    kind = rng.random()
    if kind < 0.45:  # clouds with the spectrum of natural pictures, in two colours or in all
        f = np.hypot(*np.meshgrid(np.fft.fftfreq(n), np.fft.fftfreq(n)))
        f[0, 0] = 1 / n
        bands = 3 if rng.random() < 0.4 else 1
        spectrum = np.fft.fft2(noise.standard_normal((bands, n, n))) / f ** rng.uniform(0.6, 1.7)
        value = np.fft.ifft2(spectrum).real
        value = (value - value.mean()) / (value.std() * 4) + 0.5
        if rng.random() < 0.3:
            value = np.abs(value - 0.5) * 2
        pixels = (
            tint[0] + (tint[1] - tint[0]) * value.transpose(1, 2, 0) if bands == 1 else 255 * value.transpose(1, 2, 0)
        )
    elif kind < 0.60:
        pixels = tint[0] + noise.standard_normal((n, n, rng.choice((1, 3)))) * rng.uniform(15, 90)
    elif kind < 0.75:
        y, x = np.mgrid[0:n, 0:n] / n
        turn, rate = rng.uniform(0, math.pi), rng.uniform(2, 24)
        wave = np.sin(rate * 2 * math.pi * (x * math.cos(turn) + y * math.sin(turn)))
        if rng.random() < 0.5:
            wave = wave * np.sin(rate * 2 * math.pi * (y * math.cos(turn) - x * math.sin(turn)))
        if rng.random() < 0.5:
            wave = np.sign(wave)
        pixels = tint[0] + (tint[1] - tint[0]) * (wave[..., None] + 1) / 2
    else:  # a heap of overlapping leaves, often under noise, as in photographs of clutter
        heap = Image.new("RGB", (n, n))
        pen = ImageDraw.Draw(heap)
        for _ in range(rng.randint(40, 160)):
            x, y, r = rng.uniform(0, n), rng.uniform(0, n), n / rng.uniform(3, 24)
            color = tuple(int(c) for c in tint[0] + (tint[1] - tint[0]) * rng.random() + noise.integers(-40, 40, 3))
            sides = rng.randint(3, 9)
            angles = [2 * math.pi * (i + rng.random()) / sides for i in range(sides)]
            pen.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for a in angles], fill=color)
        if rng.random() < 0.5:
            heap = heap.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))
        pixels = np.asarray(heap) + noise.standard_normal((n, n, 1)) * rng.uniform(0, 20)
    image = Image.fromarray(np.broadcast_to(pixels, (n, n, 3)).clip(0, 255).astype(np.uint8))
    return image.resize((round(n * rng.uniform(0.5, 1.5)), n)) if rng.random() < 0.4 else image


def no_drawing(photos: list[Image.Image], count: int, rng: Random, least: float = 0.35) -> Sample:
    """A photo or a texture, and questions that are all declined."""
    image = crop(rng.choice(photos), rng, least) if photos and rng.random() < 0.5 else texture(rng)
    asked = [q for _, q, _ in turns(random_scene(rng), count, rng)]
    asked.insert(0, vary(_describe(Scene((), "white", (255, 255, 255), 1, 1), rng)[0], rng))  # type: ignore[index]
    return Sample(image, [("decline", q, DECLINE) for q in asked[:count]])


def drawing(rng: Random, count: int, most: int = 6, crowded: float = 0.12) -> Sample:
    """A drawing of one to `most` shapes, or with a chance of `crowded` six to nine, and questions about it."""
    pick = rng.random()
    least, most = (6, 9) if pick < crowded else (1, 1) if pick > 0.85 else (1, most)
    scene = random_scene(rng, most, least)
    return Sample(draw(scene, rng), turns(scene, count, rng), scene)
