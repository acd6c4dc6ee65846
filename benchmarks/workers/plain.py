"""The script of the model's page in transformers' documentation, in bf16 or with bitsandbytes in nf4."""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from transformers import AutoProcessor, BitsAndBytesConfig, LlavaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer
from work import (
    ANSWER_TOKENS,
    BATCH,
    BATCH_TOKENS,
    CHAT_TOKENS,
    LATER,
    PROMPT_TOKENS,
    QUESTION,
    Figures,
    batch_of,
    serve,
    some_tokens,
)

Talk = list[dict[str, Any]]


class Clock(BaseStreamer):
    """When each token came; `generate` also shows it the prompt, first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Plain:
    def __init__(self, options: dict[str, Any]) -> None:
        how: dict[str, Any] = {"dtype": torch.bfloat16}
        if options["precision"] == "nf4":
            how["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
        self.processor = AutoProcessor.from_pretrained(options["model"])
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(options["model"], device_map="cpu", **how)
        self.path = options["picture"]
        self.numbers = random.Random()
        self.third: Talk = []

    def first(self) -> None:
        self._generate(self._ask([], QUESTION), 1)

    def vision(self) -> Figures:
        pixels = self._inputs(self._ask([], QUESTION))["pixel_values"]
        begin = time.perf_counter()
        with torch.inference_mode():
            self.model.get_image_features(pixel_values=pixels)
        return {"vision": time.perf_counter() - begin}

    def prefill(self) -> Figures:
        ids = torch.tensor([some_tokens(PROMPT_TOKENS, self.numbers)])
        begin = time.perf_counter()
        with torch.inference_mode():
            self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return {"prefill": PROMPT_TOKENS / (time.perf_counter() - begin)}

    def answer(self) -> Figures:
        first, rate, _ = self._generate(self._ask([], QUESTION), ANSWER_TOKENS)
        return {"first": first, "decode": rate}

    def chat(self) -> Figures:
        """The third turn reads everything again; the turns before it are the same in every run."""
        if not self.third:
            self.third = self._ask([], QUESTION)
            for question in LATER:
                text = self._generate(self.third, CHAT_TOKENS)[2]
                said = {"role": "assistant", "content": [{"type": "text", "text": text}]}
                self.third = self._ask([*self.third, said], question)
        return {"chat": self._generate(self.third, 1)[0]}

    def batch(self) -> Figures:
        return batch_of(self.path, self._answer_all)

    def _answer_all(self, paths: list[str]) -> None:
        inputs = self._inputs([self._ask([], QUESTION, path) for path in paths], padding=True)
        out = self.model.generate(**inputs, max_new_tokens=BATCH_TOKENS, do_sample=False, pad_token_id=0)
        assert out.shape == (BATCH, inputs["input_ids"].shape[1] + BATCH_TOKENS)

    def _ask(self, before: Talk, question: str, path: str = "") -> Talk:
        picture = [] if before else [{"type": "image", "path": path or self.path}]
        return [*before, {"role": "user", "content": [*picture, {"type": "text", "text": question}]}]

    def _inputs(self, talk: Talk | list[Talk], **options: Any) -> Any:
        inputs = self.processor.apply_chat_template(
            talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
        )
        return inputs.to(self.model.device, torch.bfloat16)

    def _generate(self, talk: Talk, tokens: int) -> tuple[float, float, str]:
        """Seconds to the first token, tokens a second after it, the answer."""
        clock, begin = Clock(), time.perf_counter()
        inputs = self._inputs(talk)
        out = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0, streamer=clock)
        times, length = clock.times[1:], inputs["input_ids"].shape[1]
        assert len(times) == tokens
        text = self.processor.decode(out[0, length:], skip_special_tokens=True)
        rate = (tokens - 1) / (times[-1] - times[0]) if tokens > 1 else 0.0
        return times[0] - begin, rate, text


if __name__ == "__main__":
    serve(Plain)
