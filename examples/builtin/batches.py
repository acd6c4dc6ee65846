"""Batches for the two stages of training, made ahead of need in a process beside the model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

import numpy as np
import questions
import samples
import scenes
import torch
from model import GRID, PATCH, SIDE, image_processor, make_tokenizer, pixels
from PIL import Image
from samples import Sample
from scenes import COLORS, NUMBER, SHAPES
from transformers import PreTrainedTokenizerFast

Batch = tuple[torch.Tensor, ...]
Turns = list[tuple[str, str, str]]  # (kind, question, answer)
WIDTH = 224  # tokens of a row
MOST = 14  # questions that a row may hold
WORDS = (
    (*SHAPES, NUMBER),
    tuple(COLORS),
    ("top", "center", "bottom"),
    ("left", "center", "right"),
    (*COLORS, "pale"),
)


def stream(batch: Callable[[Random, int], Batch], seed: int, first: int) -> Iterator[Batch]:
    """Batches number `first`, `first`+1, … of an endless seeded series, made ahead of need."""

    class Series(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Batch]:
            torch.set_num_threads(1)
            step = first
            while True:
                yield batch(Random(f"{seed}/{step}"), step)
                step += 1

    loader = torch.utils.data.DataLoader(Series(), batch_size=None, num_workers=1, prefetch_factor=8)
    return iter(loader)


class PatchBatch:
    """Crowded scenes: pixels, and for each patch what `Patches` asks of it."""

    def __init__(self, size: int) -> None:
        self.size, self.processor = size, image_processor()

    def __call__(self, rng: Random, step: int) -> Batch:
        drawn = [scenes.random_scene(rng, 9, 5 if rng.random() < 0.85 else 1, wide=0.2) for _ in range(self.size)]
        images = [scenes.draw(scene, rng) for scene in drawn]
        return pixels(images, self.processor), *patch_answers(drawn)


def patch_answers(drawn: Sequence[scenes.Scene | None]) -> Batch:
    """What `Patches` asks of n pictures: labels [n, 5, 64], places [n, 64, 3], masks [n, 64, 64].

    Nothing is asked of a picture whose scene is not known: its labels are -100 and its masks -1.
    """
    n, middle = len(drawn), (np.arange(GRID) + 0.5) / GRID
    labels = np.full((n, len(WORDS), GRID * GRID), -100)
    places = np.zeros((n, GRID * GRID, 3), np.float32)
    masks = np.full((n, GRID * GRID, PATCH * PATCH), -1, np.float32)
    for scene, label, place, mask in zip(drawn, labels, places, masks, strict=True):
        if scene is None:
            continue
        owner = scenes.owners(scene, SIDE).reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3)
        owner = owner.reshape(GRID * GRID, PATCH * PATCH)
        mask[:] = owner > 0
        for patch, owned in enumerate(owner):
            counts = np.bincount(owned, minlength=1)[1:]
            if not counts.any():
                label[4, patch] = WORDS[4].index(scene.background)
            elif counts.max() >= 6:
                thing = scene.things[int(counts.argmax())]
                row, column = int(thing.y / scene.height * 3), int(thing.x / scene.width * 3)
                label[:4, patch] = WORDS[0].index(thing.shape), WORDS[1].index(thing.color), row, column
                x, y = thing.x + (1 - scene.width) / 2, thing.y + (1 - scene.height) / 2
                place[patch] = x - middle[patch % GRID], y - middle[patch // GRID], thing.radius
    return torch.from_numpy(labels), torch.from_numpy(places * GRID), torch.from_numpy(masks)


class ModelBatch:
    """Conversations: pixels, rows as `pack` makes them, and what `Patches` asks of the pictures.

    In most rows each question stands alone after its picture and sees nothing of the others, as in
    `llava ask`; the rest are turns of one conversation. Now and then, and at last in every second batch,
    half as many rows of twice the length hold two pictures each. The first third of `steps` has two to
    five shapes a picture, and begins with few kinds of questions: what is hard to learn is to look up the
    thing a question is about, and pictures of one thing teach a model to answer without.
    """

    def __init__(self, size: int, easy: list[tuple[Path, Turns]], steps: int) -> None:
        self.size, self.easy, self.steps = size, easy, steps
        self.processor, self.photos = image_processor(), samples.load_photos(samples.PHOTOS_TRAIN)
        self.tokenizer = make_tokenizer()

    def sample(self, rng: Random, count: int, done: float) -> Sample:
        pick = rng.random()
        if pick < 0.16:
            path, asked = rng.choice(self.easy)
            with Image.open(path) as image:
                return Sample(image.convert("RGB"), rng.sample(asked, min(count, len(asked))))
        if pick > 0.91:
            return samples.no_drawing(self.photos, min(count, 3), rng)
        if done < 0.3:
            kinds = ["color of", "shape of", "where"] if done < 0.06 else None
            return samples.drawing(rng, count, most=3 + int(done * 10), least=2, crowded=0, kinds=kinds)
        if 5 / 11 <= done < 6 / 11 and rng.random() < 0.3:  # to compare two places is the hardest of all
            return samples.drawing(rng, count, most=4, least=2, crowded=0, kinds=["relation", "relation", "beside"])
        if done >= 1 and rng.random() < 0.4:  # to name each colour once is harder still
            return samples.drawing(rng, count, most=4, least=3, crowded=0, numbers=0, kinds=["colors", "shapes"])
        if done >= 9 / 11:  # at last what it is for: few shapes, and to name them all
            often = ["describe", "colors", "colors", "shapes", "count", "count", "count some", "yes/no"]
            kinds = [*questions.KINDS, *often]
            return samples.drawing(rng, count, most=5, crowded=0.05, numbers=0.03, kinds=kinds)
        return samples.drawing(rng, count, numbers=0.2 if done >= 6 / 11 else 0.06)

    def __call__(self, rng: Random, step: int) -> Batch:
        done = step / self.steps
        pictures = 2 if rng.random() < (0.12 if done < 1 else 0.5) else 1
        taken, rows = [], []
        for _ in range(self.size // pictures):
            row = Row(self.tokenizer)
            for number in range(1, pictures + 1):
                last = number == pictures
                sample = self.sample(rng, MOST if last else rng.randint(1, 4), done)
                row.add(sample.turns, apart=last and rng.random() < 0.65, most=WIDTH * number)
                taken.append(sample)
            rows.append(row)
        images, drawn = [s.image for s in taken], [s.scene for s in taken]
        return pixels(images, self.processor), pack(rows, WIDTH * pictures), *patch_answers(drawn)


class Row:
    """A sequence in the format of `TEMPLATE`, token by token as the command would make it.

    `labels` are the answers and their `</s>`, else -100. A token sees those before it whose part is its
    own or 0, and its position counts only these.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.ids, self.labels, self.parts, self.positions = [tokenizer.bos_token_id], [-100], [0], [0]

    def add(self, asked: Turns, apart: bool = False, most: int = sys.maxsize) -> None:
        """Appends the turns about one picture, as many as there is room for in `most` tokens.

        They are one conversation (part 0); or each stands `apart` after what there was, a part of its own.
        """
        image = self.tokenizer.convert_tokens_to_ids("<image>")
        self._append(self._tokens("USER: ") + [image] * (GRID * GRID), [], 0)
        for number, (_, question, answer) in enumerate(asked):
            # The text between `<image>` or `</s>` and the answer's end is one piece to the command's tokenizer.
            first = number == 0 or apart
            ask = self._tokens(("\n" if first else "USER: ") + f"{question} ASSISTANT:")
            say = [*self._tokens(f" {answer}"), self.tokenizer.eos_token_id]
            if len(self.ids) + len(ask) + len(say) > most:
                break
            self._append(ask, say, number + 1 if apart else 0)

    def _append(self, ask: list[int], say: list[int], part: int) -> None:
        new = ask + say
        start = self.parts.count(0)
        self.ids += new
        self.labels += [-100] * len(ask) + say
        self.parts += [part] * len(new)
        self.positions += range(start, start + len(new))

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids


def pack(rows: list[Row], width: int) -> torch.Tensor:
    """Long [4, rows, width]: ids, labels, parts, positions, padded on the right."""
    out = torch.zeros((4, len(rows), width), dtype=torch.long)
    for field, (name, padding) in enumerate({"ids": 0, "labels": -100, "parts": -1, "positions": 0}.items()):
        out[field] = padding
        for i, row in enumerate(rows):
            values = getattr(row, name)
            out[field, i, : len(values)] = torch.tensor(values)
    return out


def easy_vqa(split: str) -> list[tuple[Path, Turns]]:
    """The pictures of easy-VQA's `train` or `test` half, each with its questions and answers."""
    import easy_vqa as package

    folder = Path(package.__file__).parent / "data" / split
    found: dict[int, Turns] = {}
    for question, answer, picture in json.loads((folder / "questions.json").read_text()):
        found.setdefault(picture, []).append(("easy-vqa", question, answer))
    return [(folder / "images" / f"{picture}.png", asked) for picture, asked in sorted(found.items())]
