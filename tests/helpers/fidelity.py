"""The reference that engines are compared with: transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers import families
from helpers.engines import picture
from transformers import AutoModelForImageTextToText

from llava_cli import Conversation, Sampling
from llava_cli.engine.local import LocalEngine

MOST = 24  # tokens of an answer; `engines.ours` generates as many
SAMPLING = Sampling(max_tokens=MOST)
TALKS = {
    "one": Conversation().ask("what is this?", [picture(60, 60, 1)]),
    "wide": Conversation().ask("what is this?", [picture(300, 40, 2)]),
    "tall": Conversation().ask("what is this?", [picture(40, 300, 3)]),
    "several": Conversation().ask("what changed?", [picture(60, 60, 4), picture(120, 60, 5), picture(50, 90, 6)]),
    "turns": Conversation()
    .ask("what is this?", [picture(60, 60, 7)])
    .answered("a cat")
    .ask("and this?", [picture(90, 50, 8)])
    .answered("a dog")
    .ask("which is larger?"),
}


@dataclass(frozen=True)
class Reference:
    """A checkpoint as transformers alone reads it."""

    processor: Any
    model: Any

    def inputs(self, engine: LocalEngine, *talks: Conversation) -> dict[str, torch.Tensor]:
        """The processor's own batch of prompts, padded, each with a list of its pictures."""
        texts = [engine.prompter.render(talk) for talk in talks]
        views = [[engine.prompter.image_processor.fit(p.image) for p in talk.pictures] for talk in talks]
        # As `apply_chat_template` has it: a template that begins with BOS has added it already.
        has_bos = texts[0].startswith(self.processor.tokenizer.bos_token or "\0")
        options = {"add_special_tokens": False} if has_bos else {}
        return dict(self.processor(text=texts, images=views, padding=True, return_tensors="pt", **options))

    def tokens(self, engine: LocalEngine, *talks: Conversation, **options: Any) -> list[list[int]]:
        """Each answer of one `generate`, with its end token and without what pads it."""
        inputs = self.inputs(engine, *talks)
        options = {"do_sample": False, "max_new_tokens": MOST, **options}
        rows = self.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()
        end = self.processor.tokenizer.eos_token_id
        return [row[: row.index(end) + 1] if end in row else row for row in rows]

    def log_probabilities(self, engine: LocalEngine, talk: Conversation, tokens: Sequence[int]) -> list[float]:
        """Of these tokens as the answer, in the raw logits of one `generate` that is made to say them."""
        inputs = self.inputs(engine, talk)
        length = inputs["input_ids"].shape[1]

        def only(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            said = torch.full_like(scores, -torch.inf)
            said[:, tokens[ids.shape[1] - length]] = 0
            return said

        options = {"max_new_tokens": len(tokens), "output_logits": True, "return_dict_in_generate": True}
        logits = torch.cat(self.model.generate(**inputs, **options, logits_processor=[only], do_sample=False).logits)
        return list(logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist())

    def text(self, tokens: Sequence[int]) -> str:
        return str(self.processor.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def reference(family: str, folder: Path) -> Reference:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return Reference(families.processor_of(family, folder), model)
