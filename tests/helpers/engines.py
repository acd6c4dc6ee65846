"""Conversations with pictures of noise, and what engines are compared by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from llava_cli import Answer, Conversation, Sampling
from llava_cli.conversation import Picture
from llava_cli.engine import Request
from llava_cli.engine.generate.decode import decode
from llava_cli.engine.generate.prefix import PrefixCache
from llava_cli.engine.local import LocalEngine


def picture(width: int, height: int, seed: int = 0) -> Picture:
    noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Picture(f"{width}x{height}", Image.fromarray(noise.numpy()), sha256="")


CONVERSATIONS = {
    "one": Conversation().ask("what is this?", [picture(60, 60)]),
    "wide": Conversation().ask("what is this?", [picture(200, 50)]),
    "tall": Conversation().ask("what is this?", [picture(50, 200)]),
    "two": Conversation().ask("what changed?", [picture(60, 60, 1), picture(90, 70, 2)]),
    "turns": Conversation().ask("what is this?", [picture(60, 60)]).answered("a cat").ask("what color is it?"),
    "later": Conversation().ask("a?", [picture(60, 60)]).answered("b").ask("and this?", [picture(80, 50, 3)]),
}


_MODELS: dict[Path, Any] = {}


def reference(engine: LocalEngine, folder: Path, conversation: Conversation, **options: Any) -> list[int]:
    """The new tokens by transformers alone, from the same prompt string."""
    if folder not in _MODELS:
        _MODELS[folder] = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    images = [[engine.prompter._view(p.image) for p in conversation.pictures]]  # padded where training padded
    text = engine.prompter.render(conversation)
    inputs = engine.prompter.processor(text=text, images=images if images[0] else None, return_tensors="pt")
    tokens = _MODELS[folder].generate(**inputs, max_new_tokens=24, **options)
    return list(tokens[0, inputs["input_ids"].shape[1] :].tolist())


def ours(engine: LocalEngine, conversation: Conversation, sampling: Sampling) -> list[int]:
    return list(decode(PrefixCache(engine.network), engine.inputs(conversation), sampling, 24))


SAMPLING = Sampling(max_tokens=12)


def requests(sampling: Sampling = SAMPLING) -> list[Request]:
    """Pictures of several shapes with questions of several lengths, some about the same picture, some in turns."""
    same, wide = picture(60, 60, 1), picture(200, 50, 2)
    asked = [
        Conversation().ask("what is this?", [same]),
        Conversation().ask("what color is the thing on the left of the picture?", [same]),
        Conversation().ask("what?", [same]),
        Conversation().ask("what is this?", [wide]),
        Conversation().ask("what is this?", [picture(50, 200, 3)]),
        Conversation().ask("what changed?", [same, wide]),
        Conversation().ask("what is this?", [picture(60, 60, 4)]).answered("a cat").ask("what color is it?"),
        Conversation().ask("hm?", [picture(90, 90, 5)]),
        Conversation().ask("no picture?"),
    ]
    return [Request(conversation, sampling) for conversation in asked]


def same_as_alone(engine: LocalEngine, asked: list[Request], size: int | None) -> None:
    alone = [engine.answer(request.conversation, request.sampling) for request in asked]
    found = dict(engine.answer_many(iter(asked), size))
    assert sorted(found) == list(range(len(asked)))
    for number, expected in enumerate(alone):
        answer = found[number]
        assert isinstance(answer, Answer)
        assert (answer.text, answer.answer_tokens, answer.prompt_tokens, answer.finish_reason) == (
            expected.text,
            expected.answer_tokens,
            expected.prompt_tokens,
            expected.finish_reason,
        )


def same(kept: LocalEngine, fresh: LocalEngine, conversation: Conversation) -> Answer:
    """The answer, which has to be what an engine that has read nothing says."""
    answer, expected = kept.answer(conversation, SAMPLING), fresh.answer(conversation, SAMPLING)
    assert (answer.text, answer.answer_tokens, answer.prompt_tokens) == (
        expected.text,
        expected.answer_tokens,
        expected.prompt_tokens,
    )
    assert expected.cached_tokens == 0
    return answer


def kinds(model: Any) -> dict[str, str]:
    """The class of every linear layer, by name."""
    return {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
