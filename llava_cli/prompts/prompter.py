"""A conversation -> the exact prompt string -> token ids, through the checkpoint's own processor."""

from __future__ import annotations

import re
import threading
from contextlib import nullcontext
from copy import copy
from typing import TYPE_CHECKING, Any

from llava_cli import limits
from llava_cli.conversation import Conversation
from llava_cli.errors import ModelUnusable, PromptTooLong
from llava_cli.images.reader import reduce, square
from llava_cli.models.families import Family
from llava_cli.prompts.chat_template import ChatTemplate, Messages, choose, hint, is_ours
from llava_cli.prompts.sandbox import PIECE, Refused, RehearsedTokenizer, TextSandbox, are_more, tokenizer_errors
from llava_cli.prompts.trie_regex import any_of
from llava_cli.settings import Fit

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from PIL.Image import Image

_OURS = "\U000f0000"
"""The first character of a private-use plane, where no tokenizer has words."""
LARGE = 16_000_000
"""Pixels of a prompt, more than which are processed one prompt at a time: 10 bytes each, and 0.2 s for 16 million."""


class Prompter:
    """Renders and tokenises conversations for one checkpoint.

    `processor` is the checkpoint's transformers processor, `family` what it was trained with, if that is known.
    `template` names the format, as `chat_template.choose` takes it. `fit` "pad" or "crop" makes every picture square
    before the processor sees it, "auto" does what the family was trained with. `visual_tokens` is how many image tokens
    a picture has at most, of a model that has as many for each picture; None for all. A checkpoint's template is
    rendered, and texts are tokenized first, in `sandbox`; None where both are trusted. `context` is how many tokens the
    model reads, `vocabulary` how many it knows. What a user writes stays text: special tokens in it ("<image>", "</s>")
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
        vocabulary: int | None = None,
    ) -> None:
        # A copy, for what it remembers is this prompter's alone.
        self.processor, self.tokenizer = copy(processor), processor.tokenizer
        self._sandbox, self._context, self._vocabulary = sandbox, context, vocabulary
        if sandbox and sandbox.tokenizer:
            self.processor.tokenizer = RehearsedTokenizer(processor.tokenizer, sandbox)
        self.processor.image_processor = _Once(processor.image_processor)
        self._lock = threading.Lock()  # a tokenizer serves one thread at a time
        self._large = threading.Lock()
        self._views: dict[int, tuple[Image, Image]] = {}
        # The last prompt with pictures: its text, their layout, the model's inputs.
        self._last: tuple[str, list[object], dict[str, torch.Tensor]] | None = None
        self.family = family
        self.origin = "none"
        """Where the chat template is from, in words."""
        self.fit: Fit = family.fit if family and family.fit and fit == "auto" else fit
        self.visual_tokens = visual_tokens
        self.image_token: str = getattr(processor, "image_token", None) or "<image>"
        self._template = self._template_of(template)
        # Those that are not marked as special are control tokens too, but for runs of spaces.
        added = {
            t.content for t in self.tokenizer.added_tokens_decoder.values() if t.content.strip() and t.content < _OURS
        }
        words = sorted(added | {self.image_token})
        if len(words) > limits.ADDED_TOKENS:
            reason = f"it has more than {limits.ADDED_TOKENS:,} added tokens"
            raise ModelUnusable("the checkpoint's tokenizer", reason, "llava models lists others")
        # Each special token has a stand-in, a private-use character, for the places where it is only text. They
        # are added here, for later on other threads use the tokenizer.
        self._stand_in = {word: chr(ord(_OURS) + i) for i, word in enumerate(words)}
        self.tokenizer.add_tokens(list(self._stand_in.values()))
        try:
            self._special = re.compile(any_of(words))
        except RecursionError:
            reason = "too many of its special tokens are beginnings of each other"
            raise ModelUnusable("the checkpoint's tokenizer", reason) from None

    def render(self, conversation: Conversation) -> str:
        """The prompt, with one image token a picture; BOS is the tokenizer's and not in it.

        Raises `UsageError` where the template cannot render the conversation.
        """
        return self._reveal(self._render(conversation))

    def encode(self, conversation: Conversation) -> dict[str, torch.Tensor]:
        """The model's inputs: `input_ids` [1, tokens] with image tokens expanded, `pixel_values`, …"""
        pictures = [picture.image for picture in conversation.pictures]
        # Who has small pictures should not wait for large ones. Those take memory, and their turns.
        large = sum(image.width * image.height for image in pictures) > LARGE
        with self._large if large else nullcontext():
            images = self._views_of(pictures)
            processed = self.processor.image_processor.ahead(images) if images else None
        with self._lock:
            if processed:
                self.processor.image_processor.last = processed
            return self._encode(conversation, images)

    def rehearse(self) -> dict[str, torch.Tensor]:
        """The model's inputs for a picture alone, that is not square; nothing is remembered of it."""
        from PIL import Image

        with self._lock:
            picture = self._view(Image.new("RGB", (60, 40)))
            inputs = dict(self.processor(text=self.image_token, images=[picture], return_tensors="pt"))
            self.processor.image_processor.last = None
            return inputs

    def _encode(self, conversation: Conversation, images: list[Image]) -> dict[str, torch.Tensor]:
        text = self._render(conversation)
        if images and self._last and self._last[0] == text:
            # A batch asks one thing about many pictures: of all that the processor does, only pixels are new.
            seen = self.processor.image_processor.again(images)
            if self._layout(images, seen) == self._last[1]:
                return {name: seen.get(name, value) for name, value in self._last[2].items()}
        self._check_length(text)
        stand_ins = set(self._stand_in.values()) & set(text)
        # A template that begins with BOS has placed it already.
        options = {"add_special_tokens": False} if text.startswith(self.tokenizer.bos_token or "\0") else {}
        inputs = dict(self.processor(text=text, images=images or None, return_tensors="pt", **options))
        inputs = self._spell_out(inputs, stand_ins) if stand_ins else inputs
        if self._vocabulary and (highest := int(inputs["input_ids"].max())) >= self._vocabulary:
            reason = f"makes token {highest} of a prompt, and the model has {self._vocabulary}"
            raise ModelUnusable("the checkpoint's tokenizer", reason, "take tokenizer and config of one model")
        if images and self.visual_tokens:
            inputs = self._shorten(inputs, len(images), self.visual_tokens)
        self._last = (
            (text, self._layout(images, self.processor.image_processor.again(images)), inputs) if images else None
        )
        return dict(inputs)

    def _layout(self, images: list[Image], seen: Mapping[str, Any]) -> list[object]:
        """What a prompt's tokens can depend on of its pictures: all that is known of them but the pixels."""
        from transformers import ProcessorMixin

        # A processor that does not leave the text to transformers might look at more.
        usual = type(self.processor).__call__ is ProcessorMixin.__call__
        count: object = len(images) if usual else [image.size for image in images]
        return [count, *((name, _known(value)) for name, value in seen.items())]

    def count(self, inputs: dict[str, torch.Tensor]) -> tuple[int, int]:
        """How many tokens there are, and how many of them stand for pictures."""
        ids = inputs["input_ids"]
        return ids.shape[1], int((ids == self.tokenizer.convert_tokens_to_ids(self.image_token)).sum())

    def _views_of(self, images: list[Image]) -> list[Image]:
        """The pictures that the processor gets, the same objects for the same pictures as in the last prompt."""
        views = {id(image): self._views.get(id(image)) or (image, self._view(image)) for image in images}
        self._views = views
        return [views[id(image)][1] for image in images]

    def _view(self, image: Image) -> Image:
        mean = getattr(self.processor.image_processor, "image_mean", None) or (0.5, 0.5, 0.5)
        red, green, blue = (int(255 * m) for m in mean)
        return reduce(image) if self.fit == "auto" else square(image, self.fit, (red, green, blue))

    def _template_of(self, name: str | None) -> ChatTemplate | None:
        """The template that `name` stands for here; None where there is none at all."""
        vocabulary = {*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens}
        if (chosen := choose(name, self.processor, self.family, vocabulary)) is None:
            return None
        text, called, self.origin = chosen
        sandbox = None if is_ours(text) else self._sandbox

        def render(messages: Messages, asks: bool) -> str:
            if len(text) > limits.TEMPLATE_CHARACTERS:
                raise Refused(f"longer than {limits.TEMPLATE_CHARACTERS:,} characters")
            if sandbox:
                return sandbox.render(text, messages, asks, self.tokenizer.special_tokens_map)
            options: dict[str, Any] = {"chat_template": text, "add_generation_prompt": asks, "tokenize": False}
            return str(self.tokenizer.apply_chat_template(messages, **options))

        return ChatTemplate(render, called, self.image_token, self._hide)

    def _render(self, conversation: Conversation) -> str:
        if not self._template:
            raise ModelUnusable("the checkpoint's chat template", "there is none", hint())
        return self._template.render(conversation)

    def _check_length(self, text: str) -> None:
        """Raises `PromptTooLong` where a prompt is that for certain, before all of it is tokenized."""
        if self._context is None or len(text) <= PIECE:
            return
        if self._sandbox and self._sandbox.tokenizer:
            with tokenizer_errors():
                too_long = self._sandbox.count(text, self._context) > self._context
        else:
            too_long = are_more(lambda part: self.tokenizer.encode(part), text, self._context)
        if too_long:
            reason = f"more than {self._context} tokens, which is all that the model reads"
            raise PromptTooLong("prompt", reason, "llava prompt prints it and counts its tokens")

    def _hide(self, text: str) -> str:
        return self._special.sub(lambda found: self._stand_in[found[0]], text)

    def _reveal(self, text: str) -> str:
        return text.translate({ord(stand_in): word for word, stand_in in self._stand_in.items()})

    def _spell_out(self, inputs: dict[str, torch.Tensor], stand_ins: set[str]) -> dict[str, torch.Tensor]:
        """Puts the tokens of "<image>" as mere text where its stand-in is."""
        import torch

        words = {self.tokenizer.convert_tokens_to_ids(s): w for w, s in self._stand_in.items() if s in stand_ins}
        spelled = {i: self._as_text(word) for i, word in words.items()}
        lengths = torch.tensor([len(spelled.get(i, [i])) for i in inputs["input_ids"][0].tolist()])
        shape = inputs["input_ids"].shape
        ids = [token for i in inputs["input_ids"][0].tolist() for token in spelled.get(i, [i])]
        grown = {k: v.repeat_interleave(lengths, dim=1) for k, v in inputs.items() if v.shape == shape}
        return {**inputs, **grown, "input_ids": torch.tensor([ids])}

    def _shorten(self, inputs: dict[str, torch.Tensor], pictures: int, most: int) -> dict[str, torch.Tensor]:
        """Leaves the first `most` image tokens of each picture; all pictures have equally many."""
        image = inputs["input_ids"] == self.tokenizer.convert_tokens_to_ids(self.image_token)
        each = int(image.sum()) // pictures
        kept = ~image | ((image.cumsum(1) - 1) % each < most)
        return {k: v[kept].view(1, -1) if v.shape == image.shape else v for k, v in inputs.items()}

    def _as_text(self, word: str) -> list[int]:
        """A control token's word as the tokens of mere text."""

        def tokens(text: str) -> list[int]:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            return ids

        whole = tokens(word)
        # Tokens that are not marked as special are found all the same: then its first letter is apart.
        return whole if self.tokenizer.convert_tokens_to_ids(word) not in whole else tokens(word[0]) + tokens(word[1:])


def _known(value: Any) -> object:
    """What is not pixels, and of pixels how many there are."""
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    return value.shape if value.is_floating_point() else value.tolist()


Processed = tuple[list["Image"], dict[str, Any], dict[str, Any]]
"""Pictures, the options that they were processed with, and what came of them."""


class _Once:
    """An image processor that does not process again what the last prompt had: a chat repeats its pictures."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.last: Processed | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def ahead(self, images: list[Image]) -> Processed | None:
        """These pictures, processed as the last ones were, to be the `last` ones; None as long as there were none."""
        if (last := self.last) is None or same_images(last[0], images):
            return last
        return self._processed(images, last[1])

    def again(self, images: list[Image]) -> Any:
        """As the last ones were processed."""
        assert self.last is not None
        return self(images, **self.last[1])

    def __call__(self, images: list[Image], **options: Any) -> Any:
        from transformers import BatchFeature

        images = images[0] if isinstance(images[0], list) else images
        if self.last is None or not same_images(self.last[0], images) or self.last[1] != options:
            self.last = self._processed(images, options)
        return BatchFeature(dict(self.last[2]))  # a copy: some processors take things out of it

    def _processed(self, images: list[Image], options: dict[str, Any]) -> Processed:
        # In a list of their own: several pictures of one prompt, which OneVision's does not cut into tiles.
        return images, options, dict(self._inner([images], **options))


def same_images(before: list[Image], now: list[Image]) -> bool:
    """Whether these are the very same pictures, in the same order."""
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))
