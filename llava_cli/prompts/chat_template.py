"""Chat templates: which one makes the prompt, and which form of message content it takes.

Templates are data: the checkpoint's own, a file in `templates/`, or the user's. Some take a message's parts, others its
text alone. Which form a template takes, and whether it keeps the order of parts, is found out by rendering an example.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from llava_cli.conversation import Conversation, Picture, Turn
from llava_cli.errors import LlavaError, ModelUnusable, UsageError, message_line
from llava_cli.models.families import Family, template_for
from llava_cli.models.registry import builtin_folder
from llava_cli.untrusted_text import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATES = Path(__file__).parent / "templates"
_CHECKPOINT_TEMPLATE = "the checkpoint's chat template"

Messages = list[dict[str, Any]]


def named_templates() -> list[str]:
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def read_template(name: str) -> str:
    """The Jinja text of a named template or of a `.jinja` file. Raises `UsageError` if there is none."""
    path = Path(name) if name.endswith(".jinja") else TEMPLATES / f"{name}.jinja"
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such template" if isinstance(error, FileNotFoundError) else message_line(error)
        raise UsageError(name, reason, template_hint()) from None


def is_shipped(text: str) -> bool:
    """Whether we ship this template: others are programs of strangers, and run in the sandbox."""
    return text in _shipped_templates()


@cache
def _shipped_templates() -> frozenset[str]:
    paths = [*TEMPLATES.glob("*.jinja"), *builtin_folder().glob("*.jinja")]
    return frozenset(path.read_text("utf-8") for path in paths)


def template_hint() -> str:
    return f"--template takes hub, native, a .jinja file or one of: {', '.join(named_templates())}"


class TemplateChoice(NamedTuple):
    """A template, what errors call it, and where it is from, in words."""

    text: str
    name: str
    origin: str


def choose_template(
    name: str | None, processor: Any, family: Family | None, vocabulary: Collection[str]
) -> TemplateChoice | None:
    """The template that a name selects: "hub" is the checkpoint's own, "native" that of its family's training.

    Without a name it is the checkpoint's own, else the family's, else the one that the vocabulary is made for; None if
    there is none of them. Raises `UsageError`, and `ModelUnusable` if the checkpoint's own is not a template.
    """
    if name not in (None, "hub", "native"):
        return TemplateChoice(read_template(name), f"--template {name}", f"--template {name}")
    if name == "native" and not family:
        raise UsageError("--template native", "the model's family is not known", template_hint())
    native = family.template if family else None
    if name == "native" and native:
        return TemplateChoice(read_template(native), f"the {native} format", f"{native}, as in training")
    if text := _checkpoint_template(processor):
        return TemplateChoice(text, _CHECKPOINT_TEMPLATE, "the checkpoint's own")
    if name == "hub":
        raise UsageError("--template hub", "the checkpoint has none", template_hint())
    if fallback := native or template_for(vocabulary):
        why = f"{family.name} models were trained with it" if family and native else "its vocabulary is made for it"
        origin = f"{fallback}, because the checkpoint has none: {why}"
        return TemplateChoice(read_template(fallback), f"the {fallback} format", origin)
    return None


def _checkpoint_template(processor: Any) -> str | None:
    """The checkpoint's template; of several named ones the default."""
    template: Any
    for template in (processor.chat_template, processor.tokenizer.chat_template):
        if isinstance(template, list):
            template = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
        if isinstance(template, dict):
            template = _default_template(template)
        if isinstance(template, str) and template:
            return template
        if template:
            raise ModelUnusable(_CHECKPOINT_TEMPLATE, "is not text", template_hint())
    return None


def _default_template(templates: dict[str, Any]) -> Any:
    if "default" in templates or len(templates) == 1:
        return templates.get("default", next(iter(templates.values())))
    names = one_line(", ".join(templates))
    reason = f"there are several ({names}), and none of them is the default"
    raise ModelUnusable(_CHECKPOINT_TEMPLATE, reason, template_hint())


Render = Callable[[Messages, bool], str]
"""Renders messages, with or without the beginning of an answer. Raises whatever a template raises."""


class ChatTemplate:
    """A template that renders conversations. Errors call it `name`; `hide` replaces special tokens in users' text."""

    def __init__(self, render: Render, name: str, image_token: str, hide: Callable[[str], str]) -> None:
        self._render, self._name, self._image_token, self._hide = render, name, image_token, hide
        self._content_form: ContentForm | None = None

    def render(self, conversation: Conversation) -> str:
        """The prompt, with one image token per picture.

        Raises `UsageError` for what the template does not support, `ModelUnusable` if it cannot be used at all.
        """
        wants_answer = not conversation.turns or conversation.turns[-1].answer is None
        form = self._form_for(conversation)
        try:
            text = self._render(list(self._messages(conversation, form)), wants_answer)
        except Exception as error:  # `TextRefused`, Jinja's own errors, and whatever a template raises
            raise self._refusal(conversation, form, message_line(error)) from None
        if (count := text.count(self._image_token)) != len(conversation.pictures):
            raise self._unusable(f"it names {count} pictures where the conversation has {len(conversation.pictures)}")
        if any(self._hide(system).strip() not in text for system in conversation.instructions):
            raise UsageError("--system", f"{self._name} leaves it out", "ask without it, or say it in the question")
        return text

    def _form_for(self, conversation: Conversation) -> ContentForm:
        """The form of content that the template takes. Raises `UsageError` if it would reorder a turn's texts."""
        if self._content_form is None:
            form = next((form for form in CONTENT_FORMS if self._accepts(form, _EXAMPLE)), CONTENT_FORMS[0])
            self._content_form = form
        needs_order = any(_is_interleaved(turn) for turn in conversation.turns)
        if needs_order and not self._accepts(self._content_form, _INTERLEAVED_EXAMPLE):
            words = f"{self._name} puts all pictures of a message before its text"
            raise UsageError("prompt", words, "put the pictures first, or take a --template that keeps their order")
        return self._content_form

    def _accepts(self, form: ContentForm, example: Conversation) -> bool:
        """Whether all parts of an example are rendered in their order, and not as Python or JSON."""
        try:
            text = self._render(list(self._messages(example, form)), True)
        except Exception:
            return False
        expected = [part if isinstance(part, str) else self._image_token for part in _parts(example.turns[0])]
        positions = [text.find(word) for word in expected]
        is_complete = text.count(self._image_token) == len(example.pictures) and min(positions) >= 0
        is_ordered = positions == sorted(positions)
        return is_complete and is_ordered and not any(mark in text for mark in _PRINTED_PARTS)

    def _messages(self, conversation: Conversation, form: ContentForm) -> Iterator[dict[str, Any]]:
        def message(role: str, *parts: str | Picture) -> dict[str, Any]:
            hidden = [self._hide(part) if isinstance(part, str) else part for part in parts]
            return {"role": role, "content": form(hidden, self._image_token)}

        if conversation.system is not None:
            yield message("system", conversation.system)
        for turn in conversation.turns:
            if turn.system is not None:
                yield message("system", turn.system)
            if not turn.is_unasked:
                yield message("user", *_parts(turn))
            if turn.answer is not None:
                yield message("assistant", turn.answer)

    def _refusal(self, conversation: Conversation, form: ContentForm, reason: str) -> LlavaError:
        """The error for a conversation that the template fails to render: is the system text the cause?"""
        if not self._accepts(form, _EXAMPLE):
            return self._unusable(reason)
        if conversation.system is not None and self._accepts(form, Conversation(_EXAMPLE.turns)):
            try:
                self._render(list(self._messages(Conversation(conversation.turns), form)), True)
            except Exception:
                pass
            else:
                return UsageError("--system", f"{self._name} takes none ({reason})", "say it in the question")
        return UsageError("prompt", f"{self._name} refuses it ({reason})", template_hint())

    def _unusable(self, reason: str) -> LlavaError:
        if self._name.startswith("--template"):
            return UsageError("--template", reason, template_hint())
        return ModelUnusable(self._name, reason, template_hint())


Parts = Iterable["str | Picture"]
ContentForm = Callable[[Parts, str], Any]
"""Turns a message's parts into its content, with the given image token."""


def _typed_parts(parts: Parts, image_token: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]


def _text_with_image_tokens(parts: Parts, image_token: str) -> str:
    """As in LLaVA's own code: each picture on a line of its own."""
    return "\n".join(part if isinstance(part, str) else image_token for part in parts)


def _text_alone(parts: Parts, image_token: str) -> str:
    """For a template that adds the image token itself."""
    return "\n".join(part for part in parts if isinstance(part, str))


CONTENT_FORMS: tuple[ContentForm, ...] = (_typed_parts, _text_with_image_tokens, _text_alone)
"""The forms of content that templates take, the most common first."""


def _parts(turn: Turn) -> tuple[str | Picture, ...]:
    return turn.parts or (*turn.pictures, turn.question)


def _is_interleaved(turn: Turn) -> bool:
    """Whether a turn has several texts, so that it matters which pictures are between them.

    With one text, a template may put the pictures first, as in its model's training.
    """
    return sum(isinstance(part, str) for part in turn.parts) > 1


_PICTURE = Picture("", cast("Image", None), "")  # templates never see its pixels
_EXAMPLE = Conversation((Turn.of([_PICTURE, 'Xq7 "é"']),))
_INTERLEAVED_EXAMPLE = Conversation((Turn.of(["Xq7", _PICTURE, "Zw3"]),))
_PRINTED_PARTS = ("{'type'", '{"type"', "{&#39;type")
"""The beginning of a list of parts that a template prints as it is."""
