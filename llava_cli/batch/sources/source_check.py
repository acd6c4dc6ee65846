"""Finds what is wrong with a source before a model is loaded or a file is written."""

from __future__ import annotations

import os
import stat
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

from llava_cli import files
from llava_cli.batch.sources.containers.remote_file import is_archive
from llava_cli.batch.sources.listing import STDIN
from llava_cli.batch.sources.parts_of_tasks import file_of
from llava_cli.batch.sources.source import Source
from llava_cli.batch.sources.source_arguments import USAGE
from llava_cli.batch.sources.source_kinds import ContainerSource, PictureSource
from llava_cli.errors import UsageError
from llava_cli.images.reader import SUFFIXES, is_url
from llava_cli.images.remote_names import shown
from llava_cli.untrusted_text import printable


def check_source(source: Source, allow_urls: bool = False, output: Path | None = None) -> None:
    """Raises a `LlavaError` if the source cannot be read, has no questions, or is the output itself."""
    for url in filter(is_url, () if allow_urls else source.words):
        hint = f"--allow-urls fetches a picture; a list: curl -L {files.quoted(shown(url))} | llava batch - …"
        raise UsageError(shown(url), "a URL", "--allow-urls fetches it" if is_archive(url) else hint)
    if output is not None and _reads(source, output):
        raise UsageError("-o", f"{printable(str(output))} is a SOURCE", "give another file to -o")
    if source.words.count(STDIN) > 1:
        raise UsageError(STDIN, "it is there twice, and stdin is read once", USAGE)
    if source.is_stdin and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError(STDIN, "no paths on stdin", 'find . -name "*.jpg" | llava batch - "what is this?"')
    if any(not question.strip() for question in source.questions):
        raise UsageError("QUESTION", "it is empty", USAGE)
    if any(isinstance(one, PictureSource) and one.word == STDIN for one in source.each):
        raise UsageError(STDIN, "a picture on stdin, not a list of them", "llava ask - QUESTION takes one")
    if not source.questions and not all(one.has_questions for one in source.each):
        raise UsageError("QUESTION", "there is none", _question_hint(source))
    if source.root is not None and not any(one.takes_root for one in source.each):
        raise UsageError("--root", "is about lists, questions files and tables of paths", USAGE)
    _check_names(source)
    for one in source.each:
        one.begin()


def _check_names(source: Source) -> None:
    """Raises `UsageError` for two URLs that have the same name where what is secret is left out."""
    names = {
        one.word: one.start if isinstance(one, ContainerSource) else one.image
        for one in source.each
        if isinstance(one, (ContainerSource, PictureSource))
    }
    twice = next((name for name, count in Counter(names.values()).items() if count > 1 and is_url(name)), None)
    if twice:
        raise UsageError(printable(twice), "two URLs differ only behind `?`", "give one at a time")


def _reads(source: Source, output: Path) -> bool:
    """Whether the output is one of the source's files."""
    for word in source.words:
        with suppress(OSError, ValueError, AttributeError):  # a new output, a URL, or a stdin that is no file
            status = os.fstat(sys.stdin.fileno()) if word == STDIN else os.stat(file_of(word))
            if stat.S_ISREG(status.st_mode) and os.path.samestat(status, os.stat(output)):
                return True
    return False


def _question_hint(source: Source) -> str:
    if len(source.words) > 1 and not source.words[-1].lower().endswith(SUFFIXES):
        return f"the last word is a file or folder; --question {files.quoted(source.words[-1])} asks it"
    first = files.quoted(source.words[0])
    return f'llava batch {first}{" …" * (len(source.words) > 1)} "what is this?"'
