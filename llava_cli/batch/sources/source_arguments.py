"""The words of `llava batch SOURCE... [QUESTION]`: which of them is the question, and which files the others name."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from glob import glob, has_magic
from itertools import product

from llava_cli import files, limits
from llava_cli.batch.sources.containers.remote_file import is_remote
from llava_cli.batch.sources.listing import STDIN
from llava_cli.batch.sources.parts_of_tasks import file_of
from llava_cli.batch.sources.remote_words import expand_url
from llava_cli.errors import InputMissing, UsageError
from llava_cli.images.reader import SUFFIXES, is_url, local_path
from llava_cli.images.remote_names import is_cloud_url
from llava_cli.parts import WHOLE, split_reference
from llava_cli.untrusted_text import printable

USAGE = 'llava batch photos/ "describe the photo" -o out.jsonl'
_BRACES = re.compile(r"\{(?:(?P<first>[0-9]{1,9})\.\.(?P<last>[0-9]{1,9})|(?P<items>[^{},]*(?:,[^{},]*)+))\}")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def split_question(words: Sequence[str]) -> tuple[list[str], str | None]:
    """The sources, and the question if the last word is one."""
    *sources, last = words
    return (list(words), None) if not sources or _is_source(last) else (sources, last)


def _is_source(word: str) -> bool:
    """Whether a last word exists as a file, or looks like a picture. A question may end in the name of a picture."""
    looks_like_one = word == STDIN or is_url(word) or split_reference(word)[0].lower().endswith(SUFFIXES)
    is_there = os.path.lexists(file_of(word)) or is_cloud_url(word)
    return is_there or (looks_like_one and not re.search(r"\s", word))


def expand(words: Sequence[str]) -> list[str]:
    """Expands `~`, variables and patterns, as a shell does: some shells do not, and none does within quotes or in URLs.

    Raises `InputMissing` for a word that names no file.
    """
    expanded: list[str] = []
    for word in words:
        if not word:
            raise UsageError("SOURCE", "there is none", USAGE)
        for one in [word] if os.path.lexists(word) else expand_braces(word):
            if one == STDIN or os.path.lexists(file_of(one)):
                expanded.append(one)
            else:
                expanded += expand_url(one) if is_remote(one) else _expand_word(one, words)
    return expanded


def expand_braces(word: str) -> list[str]:
    """Expands ranges of numbers and lists in braces, as bash does: `shard-{000..099}.tar`, `{a,b}.zip`.

    Raises `UsageError` for more words than a command line takes.
    """
    pieces: list[Sequence[str]] = []
    end = 0
    for match in _BRACES.finditer(word):
        pieces += [[word[end : match.start()]], _brace_items(match)]
        end = match.end()
    pieces.append([word[end:]])
    if math.prod(map(len, pieces)) > limits.EXPANDED_WORDS:
        raise UsageError(printable(word), f"more than {limits.EXPANDED_WORDS:,} names", USAGE)
    return ["".join(chosen) for chosen in product(*pieces)]


def _brace_items(match: re.Match[str]) -> Sequence[str]:
    """What a pair of braces stands for, at most one more than is allowed; a zero in front keeps a width."""
    if match["items"] is not None:
        return match["items"].split(",")
    first, last = match["first"], match["last"]
    width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
    step = 1 if int(first) <= int(last) else -1
    numbers = range(int(first), int(last) + step, step)[: limits.EXPANDED_WORDS + 1]
    return [f"{number:0{width}}" for number in numbers]


def _expand_word(word: str, words: Sequence[str]) -> list[str]:
    """The files that a word without a file of its name stands for, each with the page that is behind the word."""
    readings = [(word, WHOLE), split_reference(word)]
    if word[:6].lower() == "file:/":  # what is behind "#" in a URL is no part of a name
        readings.reverse()
    for text, part in readings:
        path = os.path.expandvars(os.path.expanduser(local_path(text)))
        if names := sorted(glob(path, recursive=True)) if has_magic(path) else [path] * os.path.lexists(path):
            return [f"{name}{part}" for name in names]
    raise _missing(word, path, words)


def _missing(word: str, path: str, words: Sequence[str]) -> InputMissing:
    """Why a word names no file, and what was probably meant."""
    name, folder, hint = printable(word), os.path.dirname(path), ""
    if _SCHEME.match(word):
        return InputMissing(name, "a URL that is not read", "download it first")
    is_sentence = re.search(r"\s", word) and not folder
    if re.search("[*?]", path) and not is_sentence:
        hint = f"llava batch {files.quoted(folder or '.')} QUESTION takes all pictures below it"
        return InputMissing(name, "no file has a name like that", hint if os.path.isdir(folder or ".") else "")
    if is_sentence and len(words) > 1:
        hint = f"the question comes last: llava batch SOURCE {files.quoted(word)}"
    elif word is not words[0] and not re.search(r"[./\\]", word):
        hint = "a question of several words is in quotes: " + files.quoted(" ".join(words[words.index(word) :]) + " …")
    return InputMissing(name, "no such file or folder", hint)
