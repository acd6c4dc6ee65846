"""Tiny checkpoints of other families than LLaVA's, each as we and as transformers alone read it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from helpers import families
from helpers.engines import picture
from helpers.fidelity import Reference
from helpers.other_families import OTHERS
from transformers import AutoModelForImageTextToText

from llava_cli import Conversation, load
from llava_cli.engine.local import LocalEngine

MOST = 8  # tokens of an answer
SAME, WIDE = picture(60, 60, 1), picture(200, 50, 2)
ONE_TURN = [
    Conversation().ask("what is this?", [SAME]),
    Conversation().ask("what color is the thing on the left?", [SAME]),
    Conversation().ask("what changed?", [WIDE, SAME, picture(50, 90, 3)]),
]
TURNS = (
    Conversation()
    .ask("what is this?", [SAME])
    .answered("a cat")
    .ask("and this?", [WIDE])
    .answered("a dog")
    .ask("which is larger?")
)
NO_PICTURE = Conversation().ask("who are you?")


class Family(NamedTuple):
    """A tiny checkpoint as we and as transformers alone read it."""

    engine: LocalEngine
    by: Reference
    talks: list[Conversation]
    """Those that its format has."""

    def expected(self, *talks: Conversation) -> list[list[int]]:
        return self.by.tokens(self.engine, *talks, max_new_tokens=MOST)

    @classmethod
    def make(cls, name: str, folder: Path) -> Family:
        folder = families.save_made(OTHERS[name], folder)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        by = Reference(families.processor_like(OTHERS[name]()[1], folder), model)
        talks = ONE_TURN if name.startswith("paligemma") else [*ONE_TURN, TURNS, NO_PICTURE]
        return cls(load(str(folder), precision="fp32", device="cpu"), by, talks)
