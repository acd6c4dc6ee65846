"""`-t NAME -P lang=de`: a saved prompt in the place of the question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llava_cli.cli.arguments import conversation_from
from llava_cli.cli.options import is_given, settings_of
from llava_cli.conversation import Conversation
from llava_cli.errors import UsageError
from llava_cli.files import quoted
from llava_cli.images.reader import looks_like_picture
from llava_cli.settings import OPTIONS, Settings

if TYPE_CHECKING:
    from llava_cli.prompts.question_fields import QuestionFields
    from llava_cli.prompts.saved_prompts import SavedPrompt

PromptOpt = Annotated[
    str | None, typer.Option("-t", "--prompt", metavar="NAME", help="Ask a saved prompt; `llava prompts` lists them.")
]
ParamOpt = Annotated[
    list[str] | None,
    typer.Option("-P", "--param", metavar="NAME=VALUE", help="With -t: what stands for {NAME} in it; repeatable."),
]


class NamedQuestion:
    """The question that -t names, with its options in the place of those that are not given."""

    def __init__(self, context: typer.Context, name: str, words: Sequence[str]) -> None:
        """Raises `UsageError` if there is no such prompt, or a parameter is missing or unknown."""
        from llava_cli.prompts.question_fields import QuestionFields, parse_parameters
        from llava_cli.prompts.saved_prompts import find

        self.saved: SavedPrompt = find(name)
        _add_options(context, self.saved)
        self.fields: QuestionFields = QuestionFields({**self.saved.parameters, **parse_parameters(words)})
        self.fields.check(self.saved.text, is_saved=True)
        self.fields.check_parameters([self.saved.text])
        self.fields.check_complete(name, self.saved.text)

    def asked(self, conversation: Conversation) -> Conversation:
        """A conversation whose only question is the prompt, with its fields filled in from the first picture.

        Raises `BadData` for a field that the picture has not.
        """
        from llava_cli.prompts.question_fields import path_of

        first = conversation.pictures[0] if conversation.pictures else None
        text = self.fields.fill(self.saved.text, first, path_of(first) if first else "")
        self.fields.close()
        return Conversation(system=conversation.system).ask(text, conversation.pictures)


def conversation_about(
    context: typer.Context, args: list[str] | None, name: str | None, parameters: list[str] | None, **options: Any
) -> tuple[Settings, Conversation]:
    """The settings of a command, and what it asks: its last word, or the prompt that -t names.

    `options` are those of `conversation_from`, and errors, too.
    """
    words = args or []
    question = words[-1] if words and not looks_like_picture(words[-1]) else None
    named = named_question(context, name, parameters, question)
    settings = settings_of(context)
    if not named:
        return settings, conversation_from(words, settings, **options)
    return settings, named.asked(conversation_from([*words, named.saved.text], settings, **options))


def named_question(
    context: typer.Context, name: str | None, words: Sequence[str] | None, question: str | None
) -> NamedQuestion | None:
    """The question that -t names; None without it. Raises `UsageError` if `question`, another one, is given, too."""
    if name is None:
        if words:
            raise UsageError(f"-P {words[0]}", "there is no prompt to fill in", "-t NAME names a saved one")
        return None
    if question is not None:
        raise UsageError(f"-t {name}", "there is another question already", "give one of them")
    return NamedQuestion(context, name, words or ())


def refuse_form(name: str, words: Sequence[str]) -> None:
    """Raises `UsageError` if a saved prompt says what form its answers have, or there is no such prompt."""
    from llava_cli.prompts.saved_prompts import OF_FORM, find

    if form := next((key for key in OF_FORM if key in find(name).options), None):
        reason = f"it has {OPTIONS[form].flag}, and a check is answered with yes or no"
        asked = " ".join(map(quoted, ["llava", "ask", *words, "-t", name]))
        raise UsageError(f"-t {name}", reason, asked)


def _add_options(context: typer.Context, saved: SavedPrompt) -> None:
    """Gives a command the options of a saved prompt that it knows and that its line does not have."""
    from llava_cli.prompts.saved_prompts import OF_FORM

    is_form_given = any(is_given(context, key) for key in OF_FORM)
    for key, value in saved.options.items():
        if key in context.params and not (is_form_given if key in OF_FORM else is_given(context, key)):
            context.params[key] = list(value) if isinstance(value, tuple) else value
