"""The engine over a transformers model on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from llava_cli.conversation import Conversation
from llava_cli.engine.base import Answer, Chunk, Engine, Request, always
from llava_cli.engine.forward import release_memory
from llava_cli.engine.generate.batch import Batch, can_batch
from llava_cli.engine.generate.detokenizer import Detokenizer, text_of
from llava_cli.engine.generate.end_tokens import all_end_tokens
from llava_cli.engine.generate.picture_inputs import count_pictures
from llava_cli.engine.generate.prefetch import Prefetcher
from llava_cli.engine.generate.prompt_cache import PromptCache
from llava_cli.engine.generate.sampler import Sampler
from llava_cli.engine.generate.scheduler import Scheduler
from llava_cli.engine.generate.sequence import Follower, Replay, Sequence, Token
from llava_cli.engine.generate.sequential import LonePrompt, generate_alone
from llava_cli.engine.model_patch import ModelPatch
from llava_cli.errors import DeviceLost, LlavaError, ModelUnusable, PromptTooLong, is_out_of_memory, model_errors
from llava_cli.hardware import memory
from llava_cli.prompts.prompter import Prompter
from llava_cli.settings import Sampling

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.generate.choices import ChoiceSequence, ChoiceTree
    from llava_cli.engine.generate.constraint import Grammars

MAX_TREES = 64
"""Lists of choices whose tokens are kept."""
GATHER_SECONDS = 0.05
"""How long an idle model waits for one more prompt before it begins with those that are there."""


class LocalEngine(Engine):
    """One transformers model, its `network`, with its prompter. The loader makes it."""

    def __init__(
        self,
        name: str,
        model: Any,
        prompter: Prompter,
        precision: str,
        load_seconds: float,
        patch: ModelPatch | None = None,
    ) -> None:
        self.patch = patch or ModelPatch()
        self.model, self.precision, self.device = name, precision, model.device.type
        self.load_seconds = load_seconds
        self.prompter, self.family = prompter, prompter.family
        self.picture_resize = prompter.image_processor.picture_resize
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.network = model
        self._trees: dict[tuple[str, ...], ChoiceTree] = {}
        self._last_prompt = PromptCache(None, getattr(model.config, "image_token_id", None))
        self._streamed: Batch | None = None

    @property
    def decoding(self) -> str:  # type: ignore[override]
        if self.device != "cuda":
            return ""
        from llava_cli.engine.gpu.patch import describe

        return describe(self.network)

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """The ids of the tokens that end an answer; they are found by rendering a prompt."""
        return all_end_tokens(self.network, self.prompter)

    @cached_property
    def grammars(self) -> Grammars:
        """What says which of its tokens may come next, in an answer of a given form."""
        from llava_cli.engine.generate.constraint import Grammars
        from llava_cli.engine.generate.token_bytes import token_bytes

        return Grammars(token_bytes(self.prompter.tokenizer), self.end_tokens)

    def prepare_form(self, sampling: Sampling) -> None:
        """Reads what an answer's form needs, once for all its answers.

        Raises `UsageError` for a form that no answer of this model can have.
        """
        if sampling.choices:
            self._choice_tree(sampling.choices)
        elif sampling.grammar_option:
            self.grammars.constraint(sampling)

    def _choice_tree(self, choices: tuple[str, ...]) -> ChoiceTree:
        """The tokens of choices; the last ones that were asked for are kept."""
        if not self.end_tokens:
            reason = "has no token that ends an answer, so nobody can say how probable a whole one is"
            raise ModelUnusable(self.model, reason, "ask without --choices")
        if tree := self._trees.get(choices):
            return tree
        from llava_cli.engine.generate.choices import ChoiceTree

        tree = ChoiceTree(choices, self.prompter.answer_ids, self.end_tokens)
        self._trees = {**dict(list(self._trees.items())[-MAX_TREES:]), choices: tree}  # a server's threads share it
        return tree

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Chunk]:
        pieces: list[str] = []

        def show(token: Token) -> None:
            pieces.append(token.text)

        with model_errors(self.model, "fails while answering"):
            request = Request(conversation, sampling)
            sequence = self._sequence(0, request, show)
            steps = self._batch_of_one(sequence) if self.can_batch(sequence) else self._alone(sequence)
            for answer in steps:
                if text := "".join(pieces):
                    pieces.clear()
                if answer and (replay := self._replay_of(sequence, request)):
                    yield Chunk(text)
                    replay.follow(sequence, answer)
                    yield Chunk("", self._replayed(replay))
                elif answer:
                    yield Chunk(text, answer)
                elif text:
                    yield Chunk(text)

    def _batch_of_one(self, sequence: Sequence) -> Iterator[Answer | None]:
        """Generates a token at a time, and yields the answer after the last one."""
        if self._streamed and self._streamed.sequences:
            self._streamed.remove(self._streamed.sequences[0])
        self._streamed = batch = Batch(self.network, self._last_prompt)
        try:
            batch.join([sequence])
            while not batch.step():
                yield None
                if self._streamed is not batch:
                    raise RuntimeError("another answer was begun before this one was complete")
            yield sequence.finish()
        except Exception as error:
            if is_out_of_memory(error):
                self._streamed = None
                self._last_prompt.clear()
                release_memory(self.network)
            raise
        finally:
            if self._streamed is batch and batch.sequences:  # it was not completed, and may be continued from
                batch.remove(sequence)

    def _replayed(self, replay: Follower) -> Answer:
        """Its answer; the first one without sight where memory does not suffice. The prompt cache stays as it is."""
        try:
            if self.can_batch(replay):
                batch = Batch(self.network)
                batch.join([replay])
                while not batch.step():
                    pass
            else:
                for _ in generate_alone(self.network, replay):
                    pass
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            return replay.finish()
        release_memory(self.network)
        return replay.first

    def _alone(self, sequence: Sequence) -> Iterator[Answer | None]:
        for _ in generate_alone(self.network, sequence):
            yield sequence.finish() if sequence.is_complete else None

    def most_at_a_time(self, size: int | None = None) -> int:
        return Scheduler(self.network, size).most_rows

    def answer_many(
        self,
        requests: Iterable[Request | LlavaError],
        size: int | None = None,
        go_on: Callable[[], bool] = always,
    ) -> Iterator[tuple[int, Answer | LlavaError]]:
        scheduler = Scheduler(self.network, size)
        source = Prefetcher(self._prepare_all(requests), scheduler.prefetch)
        try:
            while True:
                if not (admit := go_on()):
                    scheduler.drop_new()
                while admit and scheduler.free_slots:
                    if (item := source.get(0 if scheduler.running else GATHER_SECONDS)) is None:
                        break
                    if isinstance(item, Sequence):
                        scheduler.add(item)
                    else:
                        yield item[0], item[1] if isinstance(item[1], LlavaError) else self._outcome(item[1])
                if not scheduler.running and not scheduler.waiting:
                    if not admit or source.is_exhausted:
                        return
                    continue
                with model_errors(self.model, "fails while answering"):
                    outcomes = scheduler.step()
                yield from outcomes
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
            return sum(torch.cuda.max_memory_reserved(i) for i in range(torch.cuda.device_count()))
        if self.device == "mps":
            return torch.mps.driver_allocated_memory()
        return memory.peak_memory()

    def _prepare_all(
        self, requests: Iterable[Request | LlavaError]
    ) -> Iterator[Sequence | tuple[int, Request | LlavaError]]:
        """Each request ready for a batch; as it is if it cannot be batched, or what is wrong with it."""
        for number, request in enumerate(requests):
            if isinstance(request, LlavaError):
                yield number, request
                continue
            try:
                sequence = self.prepare(number, request)
                yield sequence if self.can_batch(sequence) else (number, request)
            except DeviceLost:
                raise
            except LlavaError as error:
                yield number, error

    def prepare(
        self,
        number: int,
        request: Request,
        on_token: Callable[[Token], None] | None = None,
        top_logprobs: int | None = None,
    ) -> Sequence:
        """A request's prompt, tokenized. Raises `PromptTooLong` if it does not fit the model's context."""
        with model_errors(self.model, "fails while reading the prompt"):
            sequence = self._sequence(number, request, on_token, top_logprobs)
            sequence.replay = self._replay_of(sequence, request)
            return sequence

    def can_batch(self, sequence: Sequence) -> bool:
        """Whether a prompt can be read in parts, and beside others; else its model reads each one by itself."""
        return len(sequence.prompt) > 1 and can_batch(self.network, sequence.inputs)

    def _sequence(
        self,
        number: int,
        request: Request,
        on_token: Callable[[Token], None] | None = None,
        top_logprobs: int | None = None,
    ) -> Sequence:
        begin = time.perf_counter()
        sequence = self._sequence_of(number, self._encode(request.conversation), request.sampling, begin)
        sequence.images = tuple(picture.identity for picture in request.conversation.pictures)
        sequence.on_token, sequence.top_logprobs = on_token, top_logprobs
        return sequence

    def _replay_of(self, sequence: Sequence, request: Request) -> Follower | None:
        """What is to be answered after a sequence to know its sight; None if nobody asks, or there are no pictures."""
        if not request.sampling.sight or not request.conversation.pictures:
            return None
        from llava_cli.engine.sight import unseen

        conversation = unseen(request.conversation)
        inputs, tokenizer = self._encode(conversation), self.prompter.tokenizer
        replay: Follower
        if sequence.chooses:
            from llava_cli.engine.generate.choices import ChoiceReplay

            tree = self._choice_tree(request.sampling.choices)
            replay = ChoiceReplay(sequence.number, inputs, tree, request.sampling, tokenizer, 0.0)
        else:
            replay = Replay(sequence.number, inputs, Detokenizer(tokenizer))
        replay.images = tuple(picture.identity for picture in conversation.pictures)
        return replay

    def _sequence_of(self, number: int, inputs: dict[str, torch.Tensor], sampling: Sampling, begin: float) -> Sequence:
        if sampling.choices:
            return self._choice_sequence(number, inputs, sampling, begin)
        prompt = inputs["input_ids"].to(self.network.device)
        max_tokens = self._max_tokens(prompt.shape[1], sampling.max_tokens)
        constraint = self.grammars.constraint(sampling) if sampling.grammar_option else None
        sampler = Sampler(self.network, sampling, prompt, max_tokens, self.end_tokens, constraint)
        stop = (*sampling.stop, *(self.network.generation_config.stop_strings or ()))
        detokenizer = constraint or Detokenizer(self.prompter.tokenizer, stop)
        sequence = Sequence(number, inputs, sampler, detokenizer, self.end_tokens, max_tokens, begin)
        sequence.constraint = constraint
        sequence.text_of = partial(text_of, self.prompter.tokenizer) if sampling.confidence else None
        sequence.records = sampling.confidence or sampling.sight
        return sequence

    def _choice_sequence(
        self, number: int, inputs: dict[str, torch.Tensor], sampling: Sampling, begin: float
    ) -> ChoiceSequence:
        from llava_cli.engine.generate.choices import ChoiceSequence

        tree, length = self._choice_tree(sampling.choices), inputs["input_ids"].shape[1]
        if self._max_tokens(length, tree.depth + 1) <= tree.depth:
            reason = f"{length} tokens, and {tree.depth} of a choice; {self.model} reads at most {self.context}"
            raise PromptTooLong("prompt", reason, "llava prompt prints it and counts its tokens")
        sequence = ChoiceSequence(number, inputs, tree, sampling, self.prompter.tokenizer, begin)
        sequence.text_of = partial(text_of, self.prompter.tokenizer) if sampling.confidence else None
        return sequence

    def inputs(self, conversation: Conversation) -> dict[str, torch.Tensor]:
        """The prompt's tensors on the model's device, pixels in the vision tower's dtype."""
        return {name: value.to(self.network.device) for name, value in self._encode(conversation).items()}

    def _encode(self, conversation: Conversation) -> dict[str, torch.Tensor]:
        """The same in the host's memory: they go to the device when they are read, and many may wait for that."""
        dtype = self.network.dtype
        encoded = self.prompter.encode(conversation)
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in encoded.items()}

    def logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits [1, vocabulary] after a prompt, which is read as for an answer."""
        if not can_batch(self.network, inputs):
            return LonePrompt(self.network, inputs)()
        sequence, batch = self._sequence_of(0, inputs, Sampling(), 0.0), Batch(self.network, self._last_prompt)
        sequence.images = tuple(uuid4().hex for _ in range(count_pictures(inputs)))  # whose pictures is not known
        batch.join([sequence])
        logits = batch.logits
        batch.remove(sequence)
        assert logits is not None  # a lone prompt is read whole
        return logits

    def _max_tokens(self, length: int, requested: int) -> int:
        """How many tokens the answer to a prompt of `length` tokens may have."""
        if self.context is None:
            return requested
        if length >= self.context:
            reason = f"{length} tokens; {self.model} reads at most {self.context}"
            raise PromptTooLong("prompt", reason, "llava prompt prints it and counts its tokens")
        return min(requested, self.context - length)
