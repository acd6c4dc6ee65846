"""OpenVINO GenAI's VLMPipeline: picture and text."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino as ov  # type: ignore[import-not-found]
import openvino_genai as genai  # type: ignore[import-not-found]
from PIL import Image
from work import (
    ANSWER_TOKENS,
    BATCH_TOKENS,
    CHAT_TOKENS,
    LATER,
    QUESTION,
    TALK_PICTURES,
    THREADS,
    Figures,
    batch_of,
    serve,
)


class Clock(genai.StreamerBase):  # type: ignore[misc]
    """When tokens came."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def write(self, token: int | list[int]) -> genai.StreamingStatus:
        self.times += [time.perf_counter()] * (1 if isinstance(token, int) else len(token))
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


class OpenVino:
    def __init__(self, options: dict[str, Any]) -> None:
        self.pipeline = genai.VLMPipeline(options["model"], "CPU", INFERENCE_NUM_THREADS=THREADS)
        self.path = options["picture"]
        self.noise = np.random.default_rng()

    def first(self) -> None:
        self._generate(QUESTION, 1, [self._picture()])

    def answer(self) -> Figures:
        """Vision is its own figure for preparing the picture's features; the decoder's reading, what is left."""
        clock, begin = Clock(), time.perf_counter()
        told = self._generate(self._new(), ANSWER_TOKENS, [self._picture()], clock)
        first, vision = clock.times[0] - begin, told.get_prepare_embeddings_duration().mean / 1e3
        return {
            "first": first,
            "vision": vision,
            "prefill": told.get_num_input_tokens() / (first - vision),
            "prompt tokens": told.get_num_input_tokens(),
            "decode": (ANSWER_TOKENS - 1) / (clock.times[-1] - clock.times[0]),
        }

    def chat(self) -> Figures:
        self.pipeline.start_chat()
        self._generate(QUESTION, CHAT_TOKENS, [self._picture()])
        self._generate(LATER[0], CHAT_TOKENS)
        clock, begin = Clock(), time.perf_counter()
        self._generate(LATER[1], 2, clock=clock)
        self.pipeline.finish_chat()
        return {"chat": clock.times[0] - begin}

    def talk(self) -> Figures:
        self.pipeline.start_chat()
        for has_picture in TALK_PICTURES:
            told = self._generate(QUESTION, CHAT_TOKENS, [self._picture()] if has_picture else [])
        self.pipeline.finish_chat()
        return {"talk tokens": told.get_num_input_tokens()}

    def batch(self) -> Figures:
        return batch_of(self.path, self._answer_all)

    def _answer_all(self, paths: list[str]) -> None:
        """One after another: it takes one prompt at a time."""
        for path in paths:
            self._generate(self._new(), BATCH_TOKENS, [ov.Tensor(np.array(Image.open(path))[None])])

    def _new(self) -> str:
        """The question behind a number of its own: to what is remembered of an answer before, pictures are alike."""
        return f"{self.noise.integers(1000, 10000)} <ov_genai_image_0>\n{QUESTION}"

    def _picture(self) -> ov.Tensor:
        """With a few pixels that are new each time: it remembers what it has read, from one answer to the next."""
        pixels = np.array(Image.open(self.path).convert("RGB"))
        pixels[:32, :32] = self.noise.integers(0, 256, (32, 32, 3))
        return ov.Tensor(pixels[None])

    def _generate(
        self, question: str, tokens: int, pictures: list[ov.Tensor] | None = None, clock: Clock | None = None
    ) -> Any:
        """What the pipeline says of an answer of so many tokens."""
        options = {"max_new_tokens": tokens, "ignore_eos": True, "do_sample": False}
        said = self.pipeline.generate(question, images=pictures or [], streamer=clock or Clock(), **options)
        told = said.perf_metrics
        if told.get_num_generated_tokens() != tokens:
            raise RuntimeError(f"{told.get_num_generated_tokens()} tokens instead of {tokens}")
        return told


if __name__ == "__main__":
    serve(OpenVino)
