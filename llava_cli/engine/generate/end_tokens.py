"""Which tokens end an answer."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from llava_cli.conversation import Conversation
from llava_cli.errors import LlavaError

if TYPE_CHECKING:
    from llava_cli.prompts.prompter import Prompter

_ANSWER, _NEXT_QUESTION = "llava-answer", "llava-question"
_CONTROL_TOKEN = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")


def configured_end_tokens(model: Any) -> frozenset[int]:
    """The end tokens of the generation config or, if it names none, of the decoder's config."""
    configured = model.generation_config.eos_token_id
    return frozenset(_as_list(model.config.get_text_config().eos_token_id if configured is None else configured))


def all_end_tokens(model: Any, prompter: Prompter) -> frozenset[int]:
    """Every token that ends an answer.

    Those of the generation config, as for `generate`; and, unless it has an empty list, the control tokens that the
    configs and the tokenizer call the end, and the one that the chat template puts after an answer. The files of one
    checkpoint disagree about it, and no answer continues after any of them.
    """
    configured = model.generation_config.eos_token_id
    if configured == []:
        return frozenset()
    tokenizer, config = prompter.tokenizer, model.config
    others = [
        *_as_list(getattr(config, "eos_token_id", None)),
        *_as_list(config.get_text_config().eos_token_id),
        *_as_list(tokenizer.eos_token_id),
        *_as_list(_end_of_turn(prompter)),
    ]
    control_tokens = tokenizer.added_tokens_decoder  # a config's default may be any word
    return frozenset(_as_list(configured)).union(token for token in others if token in control_tokens)


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [ids] if isinstance(ids, int) else ids or []


def _end_of_turn(prompter: Prompter) -> int | None:
    """The control token that the template puts between an answer and what follows; None if there is none."""
    conversation = Conversation().ask("llava-example").answered(_ANSWER)
    for example in (conversation.ask(_NEXT_QUESTION), conversation):
        with suppress(LlavaError):  # a template that refuses the example says so when a real question is asked
            _, _, rest = prompter.render(example).partition(_ANSWER)
            if match := _CONTROL_TOKEN.match(rest.lstrip()):
                token: int | None = prompter.tokenizer.get_added_vocab().get(match[0])
                return token
    return None
