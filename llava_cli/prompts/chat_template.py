"""Chat templates: which one a prompt is made with, and what it takes as a message's content.

Templates are data: the checkpoint's own, a file of `templates/`, or the user's own file. Some take a message's parts,
others its text alone. Which it is, and whether it keeps the order of parts, is seen by rendering an example.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from llava_cli.conversation import Conversation, Picture, Turn
from llava_cli.errors import LlavaError, ModelUnusable, UsageError, brief
from llava_cli.models.families import Family, format_of
from llava_cli.models.registry import builtin_folder
from llava_cli.untrusted_text import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATES = Path(__file__).parent / "templates"
_OWN = "the checkpoint's chat template"

Messages = list[dict[str, Any]]


def named_templates() -> list[str]:
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def read_template(name: str) -> str:
    """The Jinja text of a named template or of a `.jinja` file; `UsageError` where there is none."""
    path = Path(name) if name.endswith(".jinja") else TEMPLATES / f"{name}.jinja"
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such template" if isinstance(error, FileNotFoundError) else brief(error)
        raise UsageError(name, reason, hint()) from None


def is_ours(text: str) -> bool:
    """Whether a template is one that we ship: others are programs of strangers, and run in the sandbox."""
    return text in _our_templates()


@cache
def _our_templates() -> frozenset[str]:
    paths = [*TEMPLATES.glob("*.jinja"), *builtin_folder().glob("*.jinja")]
    return frozenset(path.read_text("utf-8") for path in paths)


def hint() -> str:
    return f"--template takes hub, native, a .jinja file or one of: {', '.join(named_templates())}"


class Choice(NamedTuple):
    """A template, what errors call it, and where it is from, in words."""

    text: str
    name: str
    origin: str


def choose(name: str | None, processor: Any, family: Family | None, vocabulary: Collection[str]) -> Choice | None:
    """The template that a name stands for here: "hub" is the checkpoint's own, "native" that of its family's training.

    Without a name it is the checkpoint's own, else the family's, else the one that the vocabulary was made for; None
    where there is none of them. Raises `UsageError`, or `ModelUnusable` for one of the checkpoint's that is none.
    """
    if name not in (None, "hub", "native"):
        return Choice(read_template(name), f"--template {name}", f"--template {name}")
    if name == "native" and not family:
        raise UsageError("--template native", "the model is of no family that is known", hint())
    native = family.template if family else None
    if name == "native" and native:
        return Choice(read_template(native), f"the {native} format", f"{native}, as in training")
    if own := _own(processor):
        return Choice(own, _OWN, "the checkpoint's own")
    if name == "hub":
        raise UsageError("--template hub", "the checkpoint has none", hint())
    if told := native or format_of(vocabulary):
        why = f"{family.name} models were trained with it" if family and native else "its vocabulary is made for it"
        return Choice(read_template(told), f"the {told} format", f"{told}, for the checkpoint has none: {why}")
    return None


def _own(processor: Any) -> str | None:
    """The checkpoint's template; of several, by name, the default one."""
    found: Any
    for found in (processor.chat_template, processor.tokenizer.chat_template):
        if isinstance(found, list):
            found = {str(one.get("name")): one.get("template") for one in found if isinstance(one, dict)}
        if isinstance(found, dict):
            found = _default(found)
        if isinstance(found, str) and found:
            return found
        if found:
            raise ModelUnusable(_OWN, "is no text", hint())
    return None


def _default(named: dict[str, Any]) -> Any:
    if "default" in named or len(named) == 1:
        return named.get("default", next(iter(named.values())))
    names = one_line(", ".join(named))
    raise ModelUnusable(_OWN, f"there are several ({names}), and none of them is the default", hint())


Render = Callable[[Messages, bool], str]
"""Messages, and whether the beginning of an answer follows -> the prompt. Raises whatever a template raises."""


class ChatTemplate:
    """One template that renders conversations. Errors call it `name`; `hide` makes mere text of what users say."""

    def __init__(self, render: Render, name: str, image_token: str, hide: Callable[[str], str]) -> None:
        self._render, self._name, self._image, self._hide = render, name, image_token, hide
        self._content: Content | None = None

    def render(self, conversation: Conversation) -> str:
        """The prompt, with one image token a picture.

        Raises `UsageError` for what the template does not do, `ModelUnusable` where it does nothing that is of use.
        """
        asks = not conversation.turns or conversation.turns[-1].answer is None
        content = self._content_for(conversation)
        try:
            text = self._render(list(self._messages(conversation, content)), asks)
        except Exception as error:  # `Refused`, Jinja's own errors, and whatever a template raises
            raise self._refusal(conversation, content, brief(error)) from None
        if (found := text.count(self._image)) != len(conversation.pictures):
            raise self._bad(f"it names {found} pictures where the conversation has {len(conversation.pictures)}")
        if any(self._hide(system).strip() not in text for system in conversation.instructions):
            raise UsageError("--system", f"{self._name} leaves it out", "ask without it, or say it in the question")
        return text

    def _content_for(self, conversation: Conversation) -> Content:
        """What messages have for the template. Raises `UsageError` where it changes the order of a turn's texts."""
        if self._content is None:
            self._content = next((one for one in CONTENTS if self._takes(one, _EXAMPLE)), CONTENTS[0])
        if any(_has_pictures_between(turn) for turn in conversation.turns) and not self._takes(self._content, _MIXED):
            words = f"{self._name} puts all pictures of a message before its text"
            raise UsageError("prompt", words, "put the pictures first, or take a --template that keeps their order")
        return self._content

    def _takes(self, content: Content, example: Conversation) -> bool:
        """Whether an example comes out with all of it, in its order, and nothing of how it is written in Python."""
        try:
            text = self._render(list(self._messages(example, content)), True)
        except Exception:
            return False
        expected = [part if isinstance(part, str) else self._image for part in _parts(example.turns[0])]
        places = [text.find(word) for word in expected]
        is_whole = text.count(self._image) == len(example.pictures) and min(places) >= 0
        return is_whole and places == sorted(places) and not any(sign in text for sign in _PYTHON)

    def _messages(self, conversation: Conversation, content: Content) -> Iterator[dict[str, Any]]:
        def says(role: str, *parts: str | Picture) -> dict[str, Any]:
            hidden = [self._hide(part) if isinstance(part, str) else part for part in parts]
            return {"role": role, "content": content(hidden, self._image)}

        if conversation.system is not None:
            yield says("system", conversation.system)
        for turn in conversation.turns:
            if turn.system is not None:
                yield says("system", turn.system)
            if not turn.is_unasked:
                yield says("user", *_parts(turn))
            if turn.answer is not None:
                yield says("assistant", turn.answer)

    def _refusal(self, conversation: Conversation, content: Content, reason: str) -> LlavaError:
        """The error for a conversation that the template does not render: what of it is to blame, if that is seen."""
        if not self._takes(content, _EXAMPLE):
            return self._bad(reason)
        if conversation.system is not None and self._takes(content, Conversation(_EXAMPLE.turns)):
            try:
                self._render(list(self._messages(Conversation(conversation.turns), content)), True)
            except Exception:
                pass
            else:
                return UsageError("--system", f"{self._name} takes none ({reason})", "say it in the question")
        return UsageError("prompt", f"{self._name} refuses it ({reason})", hint())

    def _bad(self, reason: str) -> LlavaError:
        is_users = self._name.startswith("--template")
        return UsageError("--template", reason, hint()) if is_users else ModelUnusable(self._name, reason, hint())


Parts = Iterable["str | Picture"]
Content = Callable[[Parts, str], Any]
"""A message's parts, and the image token -> its content."""


def _as_parts(parts: Parts, image: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]


def _as_text(parts: Parts, image: str) -> str:
    """As LLaVA's own code writes it: each picture on a line of its own."""
    return "\n".join(part if isinstance(part, str) else image for part in parts)


def _as_words(parts: Parts, image: str) -> str:
    """For a template that places the picture itself."""
    return "\n".join(part for part in parts if isinstance(part, str))


CONTENTS: tuple[Content, ...] = (_as_parts, _as_text, _as_words)
"""What templates take, the usual first."""


def _parts(turn: Turn) -> tuple[str | Picture, ...]:
    return turn.parts or (*turn.pictures, turn.question)


def _has_pictures_between(turn: Turn) -> bool:
    """Whether pictures stand between texts, which are then about what is before and behind them.

    Of one text and pictures a template may put the pictures first, as its model was trained.
    """
    return sum(isinstance(part, str) for part in turn.parts) > 1


_PICTURE = Picture("", cast("Image", None), "")  # of which templates see nothing
_EXAMPLE = Conversation((Turn.of([_PICTURE, 'Xq7 "é"']),))
_MIXED = Conversation((Turn.of(["Xq7", _PICTURE, "Zw3"]),))
_PYTHON = ("{'type'", '{"type"', "{&#39;type")
"""How a list of parts begins where a template prints it as it is."""
