"""Asks about scenes: each kind of question knows its answer, or that this scene has no certain one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random

from scenes import COLORS, NUMBER, PIXEL, SHAPES, Scene, Thing

DECLINE = "I am a small demonstration model that only knows drawings of colored shapes."
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")

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


def turns(scene: Scene, count: int, rng: Random, kinds: Sequence[str] | None = None) -> list[tuple[str, str, str]]:
    """Up to `count` different questions of all or some kinds, with their answers: (kind, question, answer)."""
    asked: dict[str, tuple[str, str, str]] = {}
    kinds = kinds or list(KINDS)
    weights = [WEIGHTS.get(k, 1.0) for k in kinds]
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
