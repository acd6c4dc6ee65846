"""Output: answers, JSON, tables and notes. The only module that imports rich, and only to draw on a terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from llava_cli.conversation import Conversation
from llava_cli.engine import Answer, Chunk, Engine
from llava_cli.errors import LlavaError, printable
from llava_cli.models.families import Family
from llava_cli.models.registry import BUILTIN
from llava_cli.settings import LoadOptions
from llava_cli.untrusted_text import TerminalText, for_json_line, for_terminal


def show(chunks: Iterable[Chunk]) -> Answer:
    """Writes an answer to stdout as it comes: safe text on a terminal, unchanged text in a pipe."""
    global _mid_line
    safe = TerminalText() if sys.stdout.isatty() else None
    has_begun, answer = False, None
    try:
        for chunk in chunks:
            has_begun, answer = True, chunk.answer
            _mid_line = safe is not None
            sys.stdout.write(safe.push(chunk.text) if safe else chunk.text)
            sys.stdout.flush()
    finally:
        _mid_line = False
        if has_begun:  # also after Ctrl-C: the shell's prompt belongs on its own line
            sys.stdout.write((safe.end() if safe else "") + "\n")
            sys.stdout.flush()
    assert answer is not None
    return answer


def answer_object(answer: Answer, conversation: Conversation, engine: Engine) -> dict[str, Any]:
    """The object that `--json` prints."""
    return {
        "answer": answer.text,
        "question": conversation.turns[-1].question,
        "images": [picture.reference for picture in conversation.pictures],
        "region": next((picture.region for picture in conversation.pictures), None),  # --region is about all of them
        "model": engine.model,
        "precision": engine.precision or None,
        "device": engine.device or None,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "answer_tokens": answer.answer_tokens,
        **answer.details(),
        "seconds": {
            "load": round(engine.load_seconds, 4),
            "first_token": round(answer.first_token_seconds, 4),
            "total": round(answer.total_seconds, 4),
        },
    }


_BAR = 20
"""Columns of a probability of 1."""
_SHOWN_CHOICES = 10
_LITTLE = 0.5


def note_details(answer: Answer, quiet: bool = False) -> None:
    """Notes what was asked for besides an answer's text, bars for choices if stderr is a terminal, and what warns."""
    if line := confidence_line(answer):
        note(line)
    if quiet:
        return
    if sys.stderr.isatty():
        for line in _bars(answer.probabilities or {}):
            note(line)
    if answer.answer_probability is not None:
        note_answer_probability(answer.answer_probability)


def note_answer_probability(mass: float) -> None:
    """Notes that a model would rather have said something else than any of the choices."""
    if mass < _LITTLE:
        note(f"llava: {mass:.1%} of this model's answers are among the choices: the question may not fit them")


def _bars(probabilities: Mapping[str, float]) -> Iterator[str]:
    shown = list(probabilities.items())[:_SHOWN_CHOICES]
    width = max((len(printable(choice)) for choice, _ in shown), default=0)
    for choice, probability in shown:
        yield f"  {printable(choice):{width}} {probability:6.1%} {'█' * round(probability * _BAR)}".rstrip()
    if more := len(probabilities) - len(shown):
        yield f"  and {more} less probable"


def show_json(value: Any) -> None:
    # ASCII if stdout cannot write all letters, and on a terminal, where some change the direction of text.
    ascii_only = sys.stdout.isatty() or "utf" not in (sys.stdout.encoding or "").lower()
    sys.stdout.write(for_json_line(json.dumps(value, ensure_ascii=ascii_only)) + "\n")
    sys.stdout.flush()


def confidence_line(answer: Answer) -> str:
    """What is told about an answer besides its text, in one line; empty where nobody asked."""
    parts = []
    if sure := answer.confidence:
        token = json.dumps(sure.lowest_token, ensure_ascii=False)
        parts.append(f"confidence {sure.mean:.2f}, lowest {sure.lowest:.2f} at {token}")
    if answer.sight is not None:
        parts.append(f"sight {answer.sight:.2f}" + (": blind" if answer.is_blind else ""))
    return printable(" · ".join(parts))


def stats(answer: Answer, engine: Engine) -> str:
    """Times, speed and memory of an answer, in one line."""
    decoding = answer.total_seconds - answer.first_token_seconds
    speed = (
        f"{(answer.answer_tokens - 1) / decoding:.1f} tokens/s" if answer.answer_tokens > 1 and decoding else "1 token"
    )
    if answer.probabilities:
        speed = f"{len(answer.probabilities)} choices"
    source = engine.where or f"load {engine.load_seconds:.2f} s"
    prompt = f" of {answer.prompt_tokens}" if answer.prompt_tokens else ""
    memory = engine.peak_memory()
    parts = (
        " ".join(filter(None, (engine.model, engine.precision, engine.device))),
        source,
        f"first token {answer.first_token_seconds:.2f} s{prompt}",
        speed,
        engine.decoding,
        f"peak {memory / 1e9:.2f} GB" if memory else "",
    )
    return printable(" · ".join(filter(None, parts)))


def say(text: str) -> None:
    """Prints to stdout what a person asked to see, safe on a terminal."""
    print(for_terminal(text) if sys.stdout.isatty() else text, flush=True)


def write_file(chunks: Iterable[bytes]) -> None:
    """Writes a file's content to stdout: as text that is safe on a terminal, unchanged in a pipe."""
    for chunk in chunks:
        if sys.stdout.isatty():
            sys.stdout.write(for_terminal(chunk.decode("utf-8", "replace")))
        else:
            sys.stdout.buffer.write(chunk)
    sys.stdout.flush()


_mid_line = False
"""Whether the terminal's cursor is after a part of an answer."""


def note(text: str) -> None:
    """Prints lines for a person to stderr, safe on a terminal also when stderr is a log that is read there."""
    print("\n" * (_mid_line and sys.stderr.isatty()) + for_terminal(text), file=sys.stderr, flush=True)


def notes(quiet: bool) -> Callable[[str], None]:
    """`note`, or with `-q` a function that prints nothing."""
    return (lambda text: None) if quiet else note


def note_demo_model(options: LoadOptions, model: str) -> None:
    """Notes that the built-in model is only a demonstration, unless the user chose it."""
    if options.model is None and model == BUILTIN:
        note("demonstration model: knows only drawings of colored shapes. A real one: llava models pull llava-1.5-7b")


def note_picture_count(family: Family | None, conversation: Conversation) -> None:
    """Notes that a conversation has more pictures than its model's family was trained with."""
    if family and (words := family.warning(len(conversation.pictures))):
        note(words)


def show_checks(checks: Iterable[tuple[str, bool, str]], as_json: bool) -> bool:
    """Prints each check (name, good, words) as it is done, colored on a terminal. Returns whether all are good."""
    done, remaining = [], iter(checks)
    while True:
        with spinner("checking", quiet=as_json):  # disappears before the line is printed
            check = next(remaining, None)
        if check is None:
            break
        done.append(check)
        if not as_json:
            _show_check(*check)
    if as_json:
        show_json([{"check": name, "good": good, "words": words} for name, good, words in done])
    return all(good for _, good, _ in done)


def _show_check(name: str, good: bool, words: str) -> None:
    if not sys.stdout.isatty():
        print("ok" if good else "BAD", name, printable(words), sep="\t", flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    mark = Text("ok " if good else "BAD", "green" if good else "bold red")
    Console().print(mark, Text(f"{name:12}"), Text(printable(words)), soft_wrap=True)


def show_error(error: LlavaError) -> None:
    """Prints `llava: THING: reason`, then the next command to type."""
    note(printable(f"llava: {error}"))
    if error.hint:
        note(f"  {printable(error.hint)}")


@contextmanager
def spinner(words: str, quiet: bool = False) -> Iterator[None]:
    """Shows a spinner on stderr while its block runs, if stderr is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(words):
        yield


@contextmanager
def progress(words: str) -> Iterator[Any]:
    """A progress bar of bytes on stderr, if that is a terminal: yields a function of (done, total)."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(printable(words), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


NodeSpeed = tuple[str, int, float]
"""A machine of a cluster: its name, its workers, and pictures/s."""


@contextmanager
def counting(total: int | None, quiet: bool = False, as_json: bool = False) -> Iterator[Callable[..., None]]:
    """A progress bar of rows on stderr, if that is a terminal; with `as_json`, lines of JSON, at most one a second.

    Yields `show(done, failed, pictures, tokens, nodes=())`, whose `nodes` are `NodeSpeed`s.
    """
    if as_json:
        lines = _JsonProgress(total)
        try:
            yield lines.show
        finally:
            lines.end()
        return
    if quiet or not sys.stderr.isatty():
        yield lambda done, failed, pictures, tokens, nodes=(): None
        return
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Bar(Progress):
        nodes: Sequence[NodeSpeed] = ()

        def get_renderables(self) -> Iterable[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            for name, workers, speed in self.nodes:
                yield Text(f"  {printable(name)} · {workers} worker{'s' * (workers > 1)} · {speed:.1f} pictures/s")

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    begin = time.monotonic()
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)

        def show(done: int, failed: int, pictures: int, tokens: int, nodes: Sequence[NodeSpeed] = ()) -> None:
            seconds = max(time.monotonic() - begin, 1e-6)
            words = f"{failed} failed · {pictures / seconds:.1f} pictures/s · {tokens / seconds:.1f} tokens/s · left"
            bar.nodes = nodes
            bar.update(task, completed=done, description=words)

        yield show


class _JsonProgress:
    """The progress of rows for programs: a line of JSON on stderr when one is due, and one at the end."""

    def __init__(self, total: int | None) -> None:
        self._total, self._begin = total, time.monotonic()
        self._shown, self._now = self._begin, (0, 0, 0, 0)
        self._nodes: Sequence[NodeSpeed] = ()

    def show(self, done: int, failed: int, pictures: int, tokens: int, nodes: Sequence[NodeSpeed] = ()) -> None:
        self._now, self._nodes = (done, failed, pictures, tokens), nodes
        if time.monotonic() - self._shown >= 1:
            self.end()

    def end(self) -> None:
        self._shown = time.monotonic()
        seconds = max(self._shown - self._begin, 1e-6)
        done, failed, pictures, tokens = self._now
        facts: dict[str, Any] = {
            "rows": done,
            "total": self._total,
            "failed": failed,
            "pictures": pictures,
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "pictures_per_second": round(pictures / seconds, 3),
            "tokens_per_second": round(tokens / seconds, 3),
        }
        if self._nodes:
            names = ("node", "workers", "pictures_per_second")
            facts["nodes"] = [dict(zip(names, (*node[:2], round(node[2], 3)), strict=True)) for node in self._nodes]
        note(json.dumps(facts))


@contextmanager
def counted(words: str, total: int | None = None, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A progress bar of things on stderr, if that is a terminal: yields a function of how many are done."""
    if quiet or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(words, total=total)
        yield lambda done: bar.update(task, completed=done)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], optional: int = 0) -> None:
    """Prints a table: drawn on a terminal, tab-separated in a pipe. No cell can add a column or a row.

    The last `optional` columns are left out where a terminal is too narrow for them.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(row))
        return
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    widths = [max(map(cell_len, column)) for column in zip(columns, *rows, strict=True)]
    shown = len(columns) - (optional if sum(widths) + 2 * len(widths) - 2 > console.width else 0)
    drawn = Table(*columns[:shown], box=None, pad_edge=False, header_style="bold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row[:shown]))
    console.print(drawn)


def plain_streams() -> None:
    """Lets every answer and file name be printed, whatever the locale."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def close_stdout() -> None:
    """Discards what is still buffered for a reader that has gone, so that Python does not complain at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
