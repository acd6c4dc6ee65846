"""The engine over a transformers model on this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llava_cli.conversation import Conversation
from llava_cli.engine.base import Answer, Chunk, Engine, FinishReason
from llava_cli.engine.decode import decode, end_tokens
from llava_cli.engine.prefix import PrefixCache
from llava_cli.engine.text import TextStream
from llava_cli.errors import PromptTooLong, model_errors
from llava_cli.prompt import Prompter
from llava_cli.settings import Sampling

if TYPE_CHECKING:
    import torch


class LocalEngine(Engine):
    """One transformers model with its prompter. The loader makes it."""

    def __init__(self, name: str, model: Any, prompter: Prompter, precision: str, load_seconds: float) -> None:
        self.model, self.precision, self.device = name, precision, model.device.type
        self.load_seconds = load_seconds
        self.prompter = prompter
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._model = model
        self._prefix = PrefixCache(model)
        self._ends = end_tokens(model)

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Chunk]:
        begin = first = time.perf_counter()
        tokens: list[int] = []
        text, parts = TextStream(self.prompter.tokenizer, sampling.stop), []
        with model_errors(self.model, "fails while answering"):
            inputs = self._inputs(conversation)
            length = inputs["input_ids"].shape[1]
            most = self._most(length, sampling.max_tokens)
            for token in decode(self._prefix, inputs, sampling, most):
                tokens.append(token)
                if len(tokens) == 1:
                    first = time.perf_counter()
                if token in self._ends:
                    break
                if piece := text.put(token):
                    parts.append(piece)
                    yield Chunk(piece)
                if text.stopped:
                    break
        parts.append(text.end())
        stopped = text.stopped or (bool(tokens) and tokens[-1] in self._ends)
        reason: FinishReason = "stop" if stopped else "length"
        answer = Answer(
            text="".join(parts),
            finish_reason=reason,
            prompt_tokens=length,
            cached_tokens=self._prefix.found,
            answer_tokens=len(tokens),
            first_token_seconds=first - begin,
            total_seconds=time.perf_counter() - begin,
        )
        yield Chunk(parts[-1], answer)

    def prompt(self, conversation: Conversation) -> str:
        return self.prompter.render(conversation)

    def count(self, conversation: Conversation) -> int:
        with model_errors(self.model, "fails while reading the prompt"):
            return int(self.prompter.encode(conversation)["input_ids"].shape[1])

    def peak_memory(self) -> int:
        import torch

        if self.device == "cuda":
            return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
        if self.device == "mps":
            return torch.mps.driver_allocated_memory()
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def _inputs(self, conversation: Conversation) -> dict[str, torch.Tensor]:
        """The prompt's tensors on the model's device, pixels in the vision tower's dtype."""
        inputs = self.prompter.encode(conversation)
        device, dtype = self._model.device, self._model.dtype
        return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}

    def _most(self, length: int, wanted: int) -> int:
        """How many tokens an answer to a prompt of `length` may have."""
        if self.context is None:
            return wanted
        if length >= self.context:
            reason = f"{length} tokens; {self.model} reads at most {self.context}"
            raise PromptTooLong("prompt", reason, "llava prompt prints it and counts its tokens")
        return min(wanted, self.context - length)
