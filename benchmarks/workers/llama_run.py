"""llama.cpp through llama-cpp-python: the decoder alone, for which a picture's tokens are tokens like others."""

from __future__ import annotations

import random
import time
from typing import Any

from llama_cpp import Llama  # type: ignore[import-not-found]
from work import ANSWER_TOKENS, CHAT_TOKENS, PROMPT_TOKENS, THREADS, Figures, serve, some_tokens, timed

LATER_TOKENS = 15
"""What a later question of the chat adds to the prompt, its format included, besides the answer before."""


class LlamaCpp:
    def __init__(self, options: dict[str, Any]) -> None:
        self.model = Llama(
            options["model"], n_ctx=1024, n_threads=THREADS, n_threads_batch=THREADS, n_batch=1024, verbose=False
        )
        self.numbers = random.Random()

    def first(self) -> None:
        next(self._generate(some_tokens(PROMPT_TOKENS, self.numbers)))

    def answer(self) -> Figures:
        tokens = some_tokens(PROMPT_TOKENS, self.numbers)
        first, rate = timed(self._generate(tokens), ANSWER_TOKENS, time.perf_counter())
        return {"prefill": PROMPT_TOKENS / first, "decode": rate}

    def chat(self) -> Figures:
        """It finds by itself what of a prompt it has read already."""
        talk = some_tokens(PROMPT_TOKENS, self.numbers)
        for _ in range(2):
            said = self._generate(talk)
            talk = [*talk, *(next(said) for _ in range(CHAT_TOKENS)), *some_tokens(LATER_TOKENS, self.numbers)]
        begin = time.perf_counter()
        next(self._generate(talk))
        return {"chat": time.perf_counter() - begin}

    def _generate(self, tokens: list[int]) -> Any:
        return self.model.generate(tokens, temp=0.0)


if __name__ == "__main__":
    serve(LlamaCpp)
