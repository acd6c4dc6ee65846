"""Holds the tokenizer that transformers made of a checkpoint against the checkpoint's own file.

For model types that are not on a list of its own, transformers builds a tokenizer anew from the file's vocabulary, with
the pipeline that it has for the class that the checkpoint names. Where that splits text otherwise, the model reads
tokens that it was not trained with, most of all after pictures and end tokens, and only answers worse.
"""

from __future__ import annotations

from typing import Any

from llava_cli.errors import ModelUnusable, plain_message
from llava_cli.models.checkpoint_files import tokenizer_hint
from llava_cli.models.registry import Checkpoint
from llava_cli.prompts.sandbox import TextRefused, TextSandbox
from llava_cli.untrusted_text import one_line

_PROBES = (
    "A chat.  What is\n{image}\nthis? In 2026:\tdon't, cafe\u0301, 色.{end}USER: {image}{image}and this?{end}\n",
    " {image} What  are {end} these  12  or 345 x2?! I'LL  say\n\n\n  myXMLFile's \"ﬁ²\u00a0Å\", a/b:\r\n {image}  ",
    "{image}\n  {end}\t{image}\n\n{end}",
)
"""What pipelines differ in: spaces, digits and letters beside special tokens, Unicode's forms, and where a text begins
and ends."""
_OF_FILES = ("vocab_file", "tokenizer_file", "vocab", "merges", "tokenizer_object", "backend", "name_or_path")
"""Options of a tokenizer that say what it is built of."""
_HARMFUL = ("split_special_tokens",)
"""Options with which no special token is one."""


def hold_to_file(checkpoint: Checkpoint, tokenizer: Any, image_token: str, sandbox: TextSandbox) -> tuple[Any, str]:
    """A tokenizer whose ids are those of the checkpoint's file, and in words where they are from.

    It is the given one, or the file's own pipeline where that differs. Raises `ModelUnusable` if both fail.
    """
    if sandbox.tokenizer is None:
        return tokenizer, "as transformers builds it"
    file = sandbox.tokenizer.name
    try:
        if _is_as_in_file(tokenizer, image_token, sandbox):
            return tokenizer, f"its ids are those of {file}"
        rebuilt = _from_file(tokenizer, sandbox)
        if _is_as_in_file(rebuilt, image_token, sandbox):
            return rebuilt, f"transformers' differs from {file}, so the file's is used"
        reason = f"transformers' tokenizer differs from its {file}, and the file's cannot be used either"
    except TextRefused as error:
        reason = f"its {file} {error}"
    except Exception as error:
        reason = f"its {file} does not make a tokenizer ({one_line(plain_message(error))})"
    raise ModelUnusable(checkpoint.name, reason, tokenizer_hint(checkpoint))


def _is_as_in_file(tokenizer: Any, image_token: str, sandbox: TextSandbox) -> bool:
    """Whether the ids of the probes are those by the file; special tokens may be from other files."""
    assert sandbox.tokenizer
    has_bos = sandbox.tokenizer.suffix == ".json"  # otherwise tokenizer_config.json says whether there is one
    special = {image_token, tokenizer.eos_token}
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content in special]
    for probe in _PROBES:
        text = probe.format(image=image_token, end=tokenizer.eos_token or "")
        ids, added_ids = sandbox.encode(text, added, special_tokens=has_bos)
        own = {number: int(tokenizer.convert_tokens_to_ids(word)) for word, number in added_ids.items()}
        if [own.get(number, number) for number in ids] != tokenizer(text, add_special_tokens=has_bos)["input_ids"]:
            return False
    return True


def _from_file(tokenizer: Any, sandbox: TextSandbox) -> Any:
    """A tokenizer with the options of the given one and the pipeline of the file."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    options = {key: value for key, value in tokenizer.init_kwargs.items() if key not in (*_OF_FILES, *_HARMFUL)}
    pipeline = Tokenizer.from_buffer(sandbox.tokenizer_json())
    rebuilt: Any = PreTrainedTokenizerFast(tokenizer_object=pipeline, **options)
    rebuilt.chat_template = tokenizer.chat_template
    return rebuilt
