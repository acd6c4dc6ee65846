"""llama.cpp as PyPI has it built: the decoder alone, for which a picture's tokens are tokens like others."""

from __future__ import annotations

import random
from typing import Any

import xllamacpp  # type: ignore[import-untyped]
from work import CHAT_TOKENS, PROMPT_TOKENS, TALK_PICTURES, THREADS, Figures, serve, some_tokens

LATER_TOKENS = 15
"""What a later question of the chat adds to the prompt, its format included, besides the answer before."""


class LlamaCpp:
    def __init__(self, options: dict[str, Any]) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = options["model"]
        params.n_ctx = 2048  # what the chat fills, as the others' caches grow to
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
        self.server = xllamacpp.Server(params)
        self.numbers = random.Random()

    def first(self) -> None:
        self._generate(some_tokens(PROMPT_TOKENS, self.numbers), 1)

    def talk(self) -> Figures:
        prompt: list[int] = []
        for has_picture in TALK_PICTURES:
            prompt += some_tokens(PROMPT_TOKENS if has_picture else LATER_TOKENS, self.numbers)
            self._generate(prompt, CHAT_TOKENS)
            prompt += some_tokens(CHAT_TOKENS, self.numbers)  # of what it has said only the text is told
        return {"talk tokens": len(prompt)}

    def _generate(self, prompt: list[int], tokens: int) -> None:
        request = {"prompt": prompt, "n_predict": tokens, "ignore_eos": True, "temperature": 0, "cache_prompt": True}
        said = self.server.handle_completions(request)
        if said["usage"]["completion_tokens"] != tokens:
            raise RuntimeError(f"{said['usage']} instead of {tokens} tokens")


if __name__ == "__main__":
    serve(LlamaCpp)
