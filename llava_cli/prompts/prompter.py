"""Turns a conversation into the prompt string and then into token ids, through the checkpoint's own processor."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llava_cli import limits
from llava_cli.conversation import Conversation, Picture
from llava_cli.errors import LlavaError, ModelUnusable, PromptTooLong
from llava_cli.models.families import Family
from llava_cli.prompts.chat_template import ChatTemplate, Messages, choose_template, is_shipped, template_hint
from llava_cli.prompts.image_processor import ImageProcessor, ProcessedImages
from llava_cli.prompts.processor import image_placeholder, image_token_id
from llava_cli.prompts.sandbox import (
    PIECE_CHARACTERS,
    CheckedTokenizer,
    TextRefused,
    TextSandbox,
    exceeds,
    tokenizer_errors,
)
from llava_cli.prompts.special_tokens import SpecialTokens
from llava_cli.settings import Fit

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

LARGE_PIXELS = 16_000_000
"""Prompts with more pixels in their pictures than this are processed one at a time: each pixel takes 10 bytes."""


class Prompter:
    """Renders and tokenizes conversations for one checkpoint.

    `processor` is the checkpoint's transformers processor, `family` what it was trained with, if known. `template`
    names the format, as in `chat_template.choose_template`. With `fit` "pad" or "crop" every picture is made square
    before processing; "auto" does what the family was trained with. `visual_tokens` is the maximum of image tokens per
    picture (None: all), for models that have equally many for each. `sandbox` renders the checkpoint's template and
    tokenizes texts first; None if both are trusted. `context` is the number of tokens that the model reads,
    `vocab_size` the number that it knows. What a user writes stays text: special tokens in it ("<image>", "</s>")
    become neither control tokens nor pictures.
    """

    def __init__(
        self,
        processor: Any,
        template: str | None = None,
        fit: Fit = "auto",
        family: Family | None = None,
        visual_tokens: int | None = None,
        sandbox: TextSandbox | None = None,
        context: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.processor, self.tokenizer = copy(processor), processor.tokenizer  # a copy, whose parts are replaced below
        self._sandbox, self._context, self._vocab_size = sandbox, context, vocab_size
        if sandbox and sandbox.tokenizer:
            self.processor.tokenizer = CheckedTokenizer(processor.tokenizer, sandbox)
        fit = family.fit if family and family.fit and fit == "auto" else fit
        options = getattr(processor.tokenizer, "init_kwargs", {})  # which transformers hands on to the image processor
        self.image_processor = ImageProcessor(processor.image_processor, fit, options)
        self.processor.image_processor = self.image_processor
        self._lock = threading.Lock()  # a tokenizer serves one thread at a time
        self._large_lock = threading.Lock()
        self._preparing: threading.Thread | None = None
        self.family = family
        self.template_origin = "none"
        """Where the chat template is from, in words."""
        self.tokenizer_origin = ""
        """Where the ids of tokens are from, in words."""
        self.visual_tokens = visual_tokens
        self.image_token = image_placeholder(processor)
        self._template = self._load_template(template)
        self._special_tokens = SpecialTokens(self.tokenizer, self.image_token)
        self.processor.tokenizer = _PromptTokenizer(self.processor.tokenizer, self._special_tokens)

    def with_template(self, name: str | None) -> Prompter:
        """A prompter that shares everything with this one but the format, as in `chat_template.choose_template`."""
        other = copy(self)
        other._template = other._load_template(name)
        other.__dict__.pop("_before_answer", None)
        return other

    def render(self, conversation: Conversation) -> str:
        """The prompt with one image token per picture, without BOS, which the tokenizer adds.

        Raises `UsageError` if the template cannot render the conversation.
        """
        return self._special_tokens.show(self._render(conversation))

    def encode(self, conversation: Conversation) -> dict[str, torch.Tensor]:
        """The model's inputs: `input_ids` [1, tokens] with expanded image tokens, `pixel_values`, …"""
        if self._preparing:
            self._preparing.join()
        images = [picture.image for picture in conversation.pictures]
        processed = self._processed(images)
        with self._lock:
            if processed:
                self.image_processor.last = processed
            return self._encode(conversation, images)

    def prepare(self, pictures: Sequence[Picture]) -> None:
        """Begins to process the pictures of the first question, in a thread that `encode` waits for."""
        if not pictures:
            return
        if self.image_processor.options is None:
            # After it nothing is left to import: two threads that do may wait for each other. Some refuse it.
            with suppress(AttributeError, KeyError, TypeError, ValueError):
                self.encode_example()
        if self.image_processor.options is None:
            return
        images = [picture.image for picture in pictures]

        def process() -> None:
            with suppress(Exception):  # which `encode` comes upon, too
                self.image_processor.last = self._processed(images)

        self._preparing = threading.Thread(target=process, daemon=True)
        self._preparing.start()

    def _processed(self, images: list[Image]) -> ProcessedImages | None:
        """Outside the lock, so that small pictures do not wait for others; large ones take turns because of memory."""
        is_large = sum(image.width * image.height for image in images) > LARGE_PIXELS
        with self._large_lock if is_large else nullcontext():
            return self.image_processor.process(images) if images else None

    def answer_ids(self, texts: list[str]) -> list[list[int]]:
        """The tokens of texts as answers, without what ends them: as the template puts an answer behind a prompt.

        Each is tokenized together with what stands before it, since its first letters may merge with that; where the
        prompt's last character would be another token then (a space), behind a line break, which merges with nothing.
        """
        end, between = self._before_answer
        with self._lock:
            heads = [(head, self._plain_ids(head)) for head in (end, "\n")]
            return [self._behind(heads, between + self._special_tokens.hide(text)) for text in texts]

    def _behind(self, heads: list[tuple[str, list[int]]], text: str) -> list[int]:
        """The ids of a text behind the first of these heads, with their ids, whose ids stay what they are."""
        for head, head_ids in heads:
            ids = self._plain_ids(head + text)
            if head_ids and ids[: len(head_ids)] == head_ids:
                return ids[len(head_ids) :]
        return self._plain_ids(text)

    @cached_property
    def _before_answer(self) -> tuple[str, str]:
        """The end of each prompt, and what the template puts between it and an answer, such as a space."""
        question, answer = "llava-example", "llava-answer"
        asked = Conversation().ask(question)
        try:
            prompt, whole = self._render(asked), self._render(asked.answered(answer))
        except LlavaError:  # a template that refuses the example says so when a real question is asked
            return "", ""
        end, before = prompt.rpartition(question)[2], whole.partition(answer)[0]
        return end, before.removeprefix(prompt) if before.startswith(prompt) else ""

    def _plain_ids(self, text: str) -> list[int]:
        ids: list[int] = self.processor.tokenizer([text], add_special_tokens=False)["input_ids"][0] if text else []
        self._check_ids(max(ids, default=0))
        return ids

    def _check_ids(self, highest: int) -> None:
        """Raises `ModelUnusable` where the model does not know the highest of some tokens."""
        if self._vocab_size and highest >= self._vocab_size:
            reason = f"makes token {highest} of a prompt, and the model has {self._vocab_size}"
            raise ModelUnusable("the checkpoint's tokenizer", reason, "take tokenizer and config of one model")

    def encode_example(self) -> dict[str, torch.Tensor]:
        """The model's inputs for an image token and a picture that is not square; leaves the image cache empty."""
        from PIL import Image

        with self._lock:
            images = [Image.new("RGB", (60, 40))]
            inputs = dict(self.processor(text=self.image_token, images=images, return_tensors="pt"))
            self.image_processor.last = None
            return inputs

    def count(self, inputs: dict[str, torch.Tensor]) -> tuple[int, int]:
        """The number of tokens, and how many of them are image tokens."""
        ids = inputs["input_ids"]
        return ids.shape[1], int((ids == self.image_token_id).sum())

    def _encode(self, conversation: Conversation, images: list[Image]) -> dict[str, torch.Tensor]:
        text = self._render(conversation)
        self._check_length(text)
        # A template that begins with BOS has added it already.
        options = {"add_special_tokens": False} if text.startswith(self.tokenizer.bos_token or "\0") else {}
        inputs = dict(self.processor(text=text, images=images or None, return_tensors="pt", **options))
        inputs.pop("labels", None)  # PaliGemma's, for training
        self._check_ids(int(inputs["input_ids"].max()))
        if images and self.visual_tokens:
            inputs = self._limit_image_tokens(inputs, len(images), self.visual_tokens)
        return inputs

    @property
    def image_token_id(self) -> int:
        return image_token_id(self.processor)

    def _load_template(self, name: str | None) -> ChatTemplate | None:
        """The template that `name` selects here; None if there is none at all."""
        vocabulary = {*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens}
        choice = choose_template(name, self.processor, self.family, vocabulary)
        if choice is None:
            return None
        self.template_origin = choice.origin
        sandbox = None if is_shipped(choice.text) else self._sandbox

        def render(messages: Messages, add_generation_prompt: bool) -> str:
            if len(choice.text) > limits.TEMPLATE_CHARACTERS:
                raise TextRefused(f"longer than {limits.TEMPLATE_CHARACTERS:,} characters")
            if sandbox:
                tokens = self.tokenizer.special_tokens_map
                return sandbox.render(choice.text, messages, add_generation_prompt, tokens)
            options: dict[str, Any] = {"chat_template": choice.text, "add_generation_prompt": add_generation_prompt}
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))

        return ChatTemplate(render, choice.name, self.image_token, lambda text: self._special_tokens.hide(text))

    def _render(self, conversation: Conversation) -> str:
        """The prompt, with stand-ins for special tokens that are mere text."""
        if not self._template:
            raise ModelUnusable("the checkpoint's chat template", "there is none", template_hint())
        return self._template.render(conversation)

    def _check_length(self, text: str) -> None:
        """Raises `PromptTooLong` for a prompt that is certainly too long, before all of it is tokenized."""
        if self._context is None or len(text) <= PIECE_CHARACTERS:
            return
        if self._sandbox and self._sandbox.tokenizer:
            with tokenizer_errors():
                too_long = self._sandbox.count(text, self._context) > self._context
        else:
            too_long = exceeds(lambda part: self.tokenizer.encode(part), text, self._context)
        if too_long:
            reason = f"more than {self._context} tokens, which is all that the model reads"
            raise PromptTooLong("prompt", reason, "llava prompt prints it and counts its tokens")

    def _limit_image_tokens(self, inputs: dict[str, torch.Tensor], pictures: int, most: int) -> dict[str, torch.Tensor]:
        """Keeps the first `most` image tokens of each picture; all pictures have equally many."""
        is_image = inputs["input_ids"] == self.image_token_id
        per_picture = int(is_image.sum()) // pictures
        keep = ~is_image | ((is_image.cumsum(1) - 1) % per_picture < most)
        return {k: v[keep].view(1, -1) if v.shape == is_image.shape else v for k, v in inputs.items()}


class _PromptTokenizer:
    """A tokenizer as a processor calls it, for prompts in which some special tokens are mere text."""

    def __init__(self, tokenizer: Any, special_tokens: SpecialTokens) -> None:
        self._tokenizer, self._special_tokens = tokenizer, special_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        texts = [text] if isinstance(text, str) else text
        if len(texts) == 1 and self._special_tokens.are_in(texts[0]):
            return self._special_tokens.tokenize(self._tokenizer, texts[0], **options)
        return self._tokenizer(text, **options)
