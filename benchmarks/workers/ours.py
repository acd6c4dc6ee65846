"""This tool: `load`, then `answer`, as its commands do."""

from __future__ import annotations

import random
import time
from typing import Any

from PIL import Image
from work import (
    ANSWER_TOKENS,
    BATCH,
    BATCH_TOKENS,
    CHAT_TOKENS,
    LATER,
    PROMPT_TOKENS,
    QUESTION,
    TALK_PICTURES,
    Figures,
    batch_of,
    serve,
    some_tokens,
)

from llava_cli import Conversation, Picture, Sampling, fast_start, load, open_picture
from llava_cli.engine import Answer, Request
from llava_cli.hardware import device


def use_only(isa: str) -> None:
    """Makes this a CPU whose best instruction set for kernels is `isa`, without bf16 where that has none."""
    import torch

    from llava_cli.engine.cpu.jit import compiler

    isas, _ = compiler._host_isas()
    left = tuple(one for one in isas if one.name == isa)
    if not left:
        raise RuntimeError(f"this CPU has no {isa}")
    compiler._host_isas = lambda: (left, "")
    if isa != "avx512vnni":
        device.native_precision = lambda name: ("fp32", f"a CPU of {isa} has no bf16 instructions")
        for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_vnni_supported"):
            setattr(torch.cpu, check, lambda: False)


class Ours:
    def __init__(self, options: dict[str, Any]) -> None:
        fast_start.start()
        if isa := options.get("isa"):
            use_only(isa)
        self.engine = load(options["model"], precision=options["precision"], device="cpu")
        self.path = options["picture"]
        self.numbers = random.Random()

    def first(self) -> None:
        self.engine.ask(self.path, QUESTION, max_tokens=1)

    def vision(self) -> Figures:
        import torch

        inputs = self.engine.inputs(Conversation().ask(QUESTION, [open_picture(self.path)]))
        begin = time.perf_counter()
        with torch.inference_mode():
            self.engine.network.get_image_features(pixel_values=inputs["pixel_values"])
        return {"vision": time.perf_counter() - begin}

    def prefill(self) -> Figures:
        ids = self._ids(PROMPT_TOKENS)
        begin = time.perf_counter()
        self.engine.logits(ids)
        return {"prefill": PROMPT_TOKENS / (time.perf_counter() - begin)}

    def answer(self) -> Figures:
        self.engine.logits(self._ids(2))  # the picture of the run before is forgotten
        begin = time.perf_counter()
        talk = Conversation().ask(QUESTION, [open_picture(self.path)])
        opened = time.perf_counter() - begin
        said = self.engine.answer(talk, Sampling(max_tokens=ANSWER_TOKENS))
        assert said.answer_tokens == ANSWER_TOKENS
        assert (said.prompt_tokens, said.cached_tokens) == (PROMPT_TOKENS, 0)
        rate = (ANSWER_TOKENS - 1) / (said.total_seconds - said.first_token_seconds)
        return {"first": opened + said.first_token_seconds, "decode": rate}

    def chat(self) -> Figures:
        sampling = Sampling(max_tokens=CHAT_TOKENS)
        talk = Conversation().ask(QUESTION, [open_picture(self.path)])
        for question in LATER:
            talk = talk.answered(self.engine.answer(talk, sampling).text).ask(question)
        said = self.engine.answer(talk, sampling)
        return {"chat": said.first_token_seconds, "chat tokens": said.prompt_tokens - said.cached_tokens}

    def talk(self) -> Figures:
        talk, sampling = Conversation(), Sampling(max_tokens=CHAT_TOKENS)
        for has_picture in TALK_PICTURES:
            talk = talk.ask(QUESTION, [self._new_picture()] if has_picture else [])
            said = self.engine.answer(talk, sampling)
            talk = talk.answered(said.text)
        return {"talk tokens": said.prompt_tokens}

    def batch(self) -> Figures:
        return batch_of(self.path, self._answer_all)

    def _new_picture(self) -> Picture:
        """The picture with a corner that nobody has seen before."""
        image = Image.open(self.path).convert("RGB")
        image.paste(Image.effect_noise((32, 32), 90))
        return Picture(self.path, image, sha256="")

    def _answer_all(self, paths: list[str]) -> None:
        sampling = Sampling(max_tokens=BATCH_TOKENS)
        requests = (Request(Conversation().ask(QUESTION, [open_picture(path)]), sampling) for path in paths)
        said = [answer for _, answer in self.engine.answer_many(requests, None, lambda: True)]
        assert [isinstance(answer, Answer) and answer.answer_tokens for answer in said] == [BATCH_TOKENS] * BATCH

    def _ids(self, count: int) -> dict[str, Any]:
        import torch

        return {"input_ids": torch.tensor([some_tokens(count, self.numbers)])}


if __name__ == "__main__":
    serve(Ours)
