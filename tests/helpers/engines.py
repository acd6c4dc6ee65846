"""Conversations about pictures of noise, and comparisons of an engine with transformers and with itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from llava_cli import Answer, Conversation, Sampling
from llava_cli.conversation import Picture
from llava_cli.engine import Request
from llava_cli.engine.generate.scheduler import Scheduler
from llava_cli.engine.generate.sequential import generate_alone
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
    """The tokens that transformers alone generates from the same prompt string."""
    if folder not in _MODELS:
        _MODELS[folder] = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    fit = engine.prompter.image_processor.fit  # pads if training padded
    images = [[fit(picture.image) for picture in conversation.pictures]]
    text = engine.prompter.render(conversation)
    inputs = engine.prompter.processor(text=text, images=images if images[0] else None, return_tensors="pt")
    tokens = _MODELS[folder].generate(**inputs, max_new_tokens=24, **options)
    return list(tokens[0, inputs["input_ids"].shape[1] :].tolist())


def ours(engine: LocalEngine, conversation: Conversation, sampling: Sampling, max_tokens: int = 24) -> list[int]:
    """The tokens of our answer."""
    sequence = engine.prepare(0, Request(conversation, replace(sampling, max_tokens=max_tokens)))
    if engine.can_batch(sequence):
        scheduler = Scheduler(engine.network, 1)
        scheduler.add(sequence)
        while not sequence.is_complete:
            scheduler.step()
    else:
        for _ in generate_alone(engine.network, sequence):
            pass
    return sequence.ids[len(sequence.prompt) :]


SAMPLING = Sampling(max_tokens=12)


def requests(sampling: Sampling = SAMPLING) -> list[Request]:
    """Questions of several lengths about pictures of several shapes; some share a picture, one is a second turn."""
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
    """Asserts that `answer_many` answers each request as `answer` does."""
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
    """The answer, after asserting that an engine with an empty prompt cache gives the same one."""
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
