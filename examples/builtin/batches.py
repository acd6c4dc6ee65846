"""Batches for the two stages of training, made ahead of need in a process beside the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

import numpy as np
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
    """Conversations: pixels, input ids, labels (answers and `</s>` only), right-padded.

    The first third of `steps` goes from one shape a picture to six: to look for a thing among many is
    learned in minutes by a model that can already compare a question with one thing, and hardly
    at all by one that cannot.
    """

    def __init__(self, size: int, easy: list[tuple[Path, Turns]], steps: int) -> None:
        self.size, self.easy, self.steps = size, easy, steps
        self.processor, self.photos = image_processor(), samples.load_photos(samples.PHOTOS_TRAIN)
        self.tokenizer = make_tokenizer()

    def sample(self, rng: Random, count: int, done: float) -> Sample:
        pick = rng.random()
        if pick < (0.16 if done > 0.1 else 0.40):
            path, asked = rng.choice(self.easy)
            with Image.open(path) as image:
                return Sample(image.convert("RGB"), rng.sample(asked, min(count, len(asked))))
        if pick > 0.91:
            return samples.no_drawing(self.photos, min(count, 3), rng)
        return samples.drawing(rng, count, most=min(6, 1 + int(done * 24)), crowded=0.12 if done > 0.3 else 0)

    def __call__(self, rng: Random, step: int) -> Batch:
        count, size = (18, self.size // 2) if rng.random() < 0.03 else (9, self.size)
        samples, rows = [], []
        for _ in range(size):
            two = rng.random() < 0.10
            ids, labels = [self.tokenizer.bos_token_id], [-100]
            for _ in range(2 if two else 1):
                sample = self.sample(rng, max(1, count // 2) if two else count, step / self.steps)
                samples.append(sample)
                add(self.tokenizer, sample.turns, ids, labels)
            rows.append((ids, labels))
        images, drawn = [s.image for s in samples], [s.scene for s in samples]
        return pixels(images, self.processor), pack(rows, self.tokenizer.pad_token_id), *patch_answers(drawn)


def pack(rows: list[tuple[list[int], list[int]]], pad: int) -> torch.Tensor:
    """Rows of (ids, labels) -> long [2, rows, longest]: ids padded with `pad`, labels with -100, on the right."""
    out = torch.full((2, len(rows), max(len(ids) for ids, _ in rows)), -100)
    out[0] = pad
    for i, row in enumerate(rows):
        for j in range(2):
            out[j, i, : len(row[j])] = torch.tensor(row[j])
    return out


def add(tokenizer: PreTrainedTokenizerFast, asked: Turns, ids: list[int], labels: list[int]) -> None:
    """Appends the turns about one picture in the format of `TEMPLATE`, token by token."""
    image = tokenizer.convert_tokens_to_ids("<image>")
    for i, (_, question, answer) in enumerate(asked):
        # Tokenised as the command does: the text around `<image>` and up to the end of the answer is one piece.
        text = f"{question} ASSISTANT:"
        if i == 0:
            before = tokenizer.encode("USER: ", add_special_tokens=False) + [image] * (GRID * GRID)
            ask = before + tokenizer.encode("\n" + text, add_special_tokens=False)
        else:
            ask = tokenizer.encode("USER: " + text, add_special_tokens=False)
        say = [*tokenizer.encode(" " + answer, add_special_tokens=False), tokenizer.eos_token_id]
        ids += ask + say
        labels += [-100] * len(ask) + say


def easy_vqa(split: str) -> list[tuple[Path, Turns]]:
    """The pictures of easy-VQA's `train` or `test` half, each with its questions and answers."""
    import easy_vqa as package

    folder = Path(package.__file__).parent / "data" / split
    found: dict[int, Turns] = {}
    for question, answer, picture in json.loads((folder / "questions.json").read_text()):
        found.setdefault(picture, []).append(("easy-vqa", question, answer))
    return [(folder / "images" / f"{picture}.png", asked) for picture, asked in sorted(found.items())]
