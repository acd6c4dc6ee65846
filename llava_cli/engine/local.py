"""The engine over a transformers model on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from llava_cli.conversation import Conversation
from llava_cli.engine.base import Answer, Chunk, Engine, Request
from llava_cli.engine.generate.batch import Row
from llava_cli.engine.generate.decode import Chooser, decode, end_tokens
from llava_cli.engine.generate.prefetch import Ahead
from llava_cli.engine.generate.prefix import PrefixCache
from llava_cli.engine.generate.reply import Reply
from llava_cli.engine.generate.scheduler import Schedule
from llava_cli.errors import LlavaError, PromptTooLong, model_errors
from llava_cli.hardware import memory
from llava_cli.prompts.prompter import Prompter, same_images
from llava_cli.settings import Sampling

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

GATHER = 0.05
"""Seconds to wait for one more prompt before an idle model begins with those that are there."""


class LocalEngine(Engine):
    """One transformers model, its `network`, with its prompter. The loader makes it."""

    def __init__(self, name: str, model: Any, prompter: Prompter, precision: str, load_seconds: float) -> None:
        self.model, self.precision, self.device = name, precision, model.device.type
        self.load_seconds = load_seconds
        self.prompter, self.family = prompter, prompter.family
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.network = model
        self._prefix = PrefixCache(model)

    @cached_property
    def ends(self) -> frozenset[int]:
        """The ids of the tokens that end an answer; of use once a prompt has been made, for one is made for it."""
        return end_tokens(self.network, self.prompter)

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Chunk]:
        begin = time.perf_counter()
        with model_errors(self.model, "fails while answering"):
            inputs = self.inputs(conversation)
            length = inputs["input_ids"].shape[1]
            most = self._most(length, sampling.max_tokens)
            reply = self._reply(sampling, most, begin)
            for token in decode(self._prefix, inputs, sampling, most, self.ends):
                if piece := reply.put(token):
                    yield Chunk(piece)
                if reply.done:
                    break
        last = reply.end()
        yield Chunk(last, reply.answer(length, self._prefix.found))

    def answer_many(
        self,
        requests: Iterable[Request | LlavaError],
        size: int | None = None,
        go_on: Callable[[], bool] = lambda: True,
    ) -> Iterator[tuple[int, Answer | LlavaError]]:
        schedule = Schedule(self.network, size)
        source = Ahead(self._rows(requests), schedule.ahead)
        try:
            while True:
                more = go_on()
                while more and schedule.room:
                    if (item := source.get(0 if schedule.running else GATHER)) is None:
                        break
                    if isinstance(item, Row):
                        schedule.put(item)
                    else:
                        yield item[0], item[1] if isinstance(item[1], LlavaError) else self._outcome(item[1])
                if not schedule.running and not (more and schedule.waiting):
                    if not more or source.ended:
                        return
                    continue
                with model_errors(self.model, "fails while answering"):
                    done = schedule.step(admit=more)
                yield from done
        finally:
            source.close()

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
        return memory.peak()

    def _rows(self, requests: Iterable[Request | LlavaError]) -> Iterator[Row | tuple[int, Request | LlavaError]]:
        """Each request ready to be answered; as it is where it cannot stand in a batch, or why it cannot at all."""
        group = 0
        before: list[Image] = []
        for number, request in enumerate(requests):
            if isinstance(request, LlavaError):
                yield number, request
                continue
            pictures = [picture.image for picture in request.conversation.pictures]
            if not same_images(before, pictures):
                group, before = number, pictures
            try:
                yield self.row(number, request, group) or (number, request)
            except LlavaError as error:
                yield number, error

    def row(self, number: int, request: Request, group: Any) -> Row | None:
        """A request ready to stand in a batch; None where its model reads each prompt by itself.

        Raises `PromptTooLong` where it does not fit the model's context.
        """
        with model_errors(self.model, "fails while reading the prompt"):
            inputs = self.inputs(request.conversation)
            most = self._most(inputs["input_ids"].shape[1], request.sampling.max_tokens)
        if not self._prefix.can_part(inputs) or inputs["input_ids"].shape[1] == 1:
            return None
        return Row(number, inputs, group, most, partial(self._start, request.sampling, inputs["input_ids"], most))

    def _start(self, sampling: Sampling, prompt: torch.Tensor, most: int) -> tuple[Chooser, Reply]:
        chooser = Chooser(self.network, sampling, prompt, most, self.ends)
        return chooser, self._reply(sampling, most, time.perf_counter())

    def _reply(self, sampling: Sampling, most: int, begin: float) -> Reply:
        stop = (*sampling.stop, *(self.network.generation_config.stop_strings or ()))
        return Reply(self.prompter.tokenizer, stop, self.ends, most, begin)

    def inputs(self, conversation: Conversation) -> dict[str, torch.Tensor]:
        """The prompt's tensors on the model's device, pixels in the vision tower's dtype."""
        inputs = self.prompter.encode(conversation)
        device, dtype = self.network.device, self.network.dtype
        return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}

    def logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """What comes after a prompt, [1, vocabulary], read as for an answer."""
        return self._prefix.prefill(inputs, object())

    def _most(self, length: int, wanted: int) -> int:
        """How many tokens an answer to a prompt of `length` may have."""
        if self.context is None:
            return wanted
        if length >= self.context:
            reason = f"{length} tokens; {self.model} reads at most {self.context}"
            raise PromptTooLong("prompt", reason, "llava prompt prints it and counts its tokens")
        return min(wanted, self.context - length)
