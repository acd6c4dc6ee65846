"""What other people's data sets call our keys, and the jq filters that rename them."""

from __future__ import annotations

import re
from typing import Any

from llava_cli.untrusted_text import one_line

KEY_CHARACTERS = 100
"""How much of a key is looked at."""
_SYNONYMS = {
    "image": "img pic picture photo file filename filepath path imagepath imagefile imagename imageurl imgpath imgurl"
    " imgname url uri images imageid",
    "question": "text prompt query instruction q input caption userprompt conversations messages conversation",
    "id": "questionid qid uid uuid",
    "answer": "answers label gold goldanswer groundtruth gt expected target reference",
    "system": "systemprompt systemmessage",
    "choices": "options option candidates classes answerchoices answeroptions multiplechoices",
    "schema": "jsonschema outputschema responseschema responseformat",
    "regex": "regexp pattern",
    "page": "pagenumber pagenum pageno",
    "time": "timestamp timesec timeseconds second seconds",
    "region": "bbox box boundingbox crop roi",
    "max_tokens": "maxnewtokens maxlength maxcompletiontokens",
}
"""Our key -> synonyms in lower case, without the characters between their words."""
_JQ_VALUES = {
    "conversations": '({path}[0].value | sub("\\\\s*<image>\\\\s*"; ""))',
    "conversation": '({path}[0].value | sub("\\\\s*<image>\\\\s*"; ""))',
    "messages": "{path}[0].content",
    "images": "{path}[0]",
    "imageid": '"\\({path}).jpg"',
}
"""Synonym -> the jq expression for its value, where that is not plain text."""


def _normalized(key: str) -> str:
    return re.sub(r"[\W_]", "", key[:KEY_CHARACTERS]).lower()


_KEYS = {synonym: key for key, synonyms in _SYNONYMS.items() for synonym in (_normalized(key), *synonyms.split())}


def meant_key(key: str) -> str | None:
    """The key of ours that another one probably means."""
    return _KEYS.get(_normalized(key))


def shown(key: str) -> str:
    """A key of a stranger's file, for messages."""
    return repr(one_line(key, 40))


def jq_value(key: str) -> str:
    """The jq expression for the text of a question or a picture's path under another key."""
    return _JQ_VALUES.get(_normalized(key), "{path}").format(path=jq_path(key))


def jq_path(key: str) -> str:
    return f".{key}" if re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", key) else f'.["{one_line(key, 40)}"]'


def has_rows(value: Any) -> bool:
    """Whether a value is a list of objects."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)
