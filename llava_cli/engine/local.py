"""The engine over a transformers model on this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llava_cli.conversation import Conversation
from llava_cli.engine.base import Answer, Chunk, Engine, FinishReason
from llava_cli.engine.decode import decode, end_tokens
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
        self._model = model
        self._ends = end_tokens(model)

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Chunk]:
        begin = first = time.perf_counter()
        tokens: list[int] = []
        text, parts = TextStream(self.prompter.tokenizer, sampling.stop), []
        with model_errors(self.model, "fails while answering"):
            inputs = self._inputs(conversation)
            length = inputs["input_ids"].shape[1]
            most = min(sampling.max_tokens, self._room(length))
            for token in decode(self._model, inputs, sampling, most):
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
        whole = "".join(parts)
        yield Chunk(parts[-1], Answer(whole, reason, length, len(tokens), first - begin, time.perf_counter() - begin))

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

    def _room(self, length: int) -> int:
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if context is None:
            return sys.maxsize
        if length >= context:
            reason = f"{length} tokens; {self.model} reads at most {context}"
            raise PromptTooLong("prompt", reason, "llava prompt prints it and counts its tokens")
        return int(context - length)
