"""Output: answers, JSON, tables and notes. The only module that imports rich, and only to draw on a terminal."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class NodeProgress:
    """What a node of a cluster does."""

    node: str
    workers: int
    pictures_per_second: float


@dataclass(frozen=True)
class Progress:
    """How far a run is; rates are of now on a cluster, and since the start on one machine."""

    rows: int = 0
    failed: int = 0
    pictures: int = 0
    tokens: int = 0
    pictures_per_second: float = 0.0
    tokens_per_second: float = 0.0
    seconds: float = 0.0
    nodes: tuple[NodeProgress, ...] | None = None
    """Of a cluster."""


@contextmanager
def counting(
    total: int | None, read: Callable[[], Progress], quiet: bool = False, as_json: bool = False
) -> Iterator[None]:
    """Shows on stderr how far a run is, while its block runs: a bar if that is a terminal, or lines of JSON.

    `read` is called from another thread.
    """
    if as_json:
        with _each_second(lambda: _show_progress_line(total, read())):
            yield
    elif quiet or not sys.stderr.isatty():
        yield
    else:
        with _progress_bar(total, read):
            yield


def _show_progress_line(total: int | None, progress: Progress) -> None:
    found = {"rows": progress.rows, "total": total, **asdict(progress)}
    if progress.nodes is None:
        del found["nodes"]
    line = for_json_line(json.dumps(_rounded(found)))
    with suppress(OSError):  # who reads it is gone
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def _rounded(value: Any) -> Any:
    """A value of JSON whose numbers have three decimals at most."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return round(value, 3) if isinstance(value, float) else value


@contextmanager
def _each_second(do: Callable[[], None]) -> Iterator[None]:
    """Does something each second while its block runs, and once more at the end."""
    is_over = threading.Event()

    def go_on() -> None:
        while not is_over.wait(1.0):
            do()

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        do()


@contextmanager
def _progress_bar(total: int | None, read: Callable[[], Progress]) -> Iterator[None]:
    from rich.console import Console, Group, RenderableType
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    is_cluster, console = read().nodes is not None, Console(stderr=True)
    words = TextColumn("left" if is_cluster else "{task.description}")
    bar = Bar(BarColumn(None if is_cluster else 40), MofNCompleteColumn(), words, TimeRemainingColumn())
    bar.expand = is_cluster
    task = bar.add_task("", total=total)

    def draw() -> RenderableType:
        progress = read()
        rates = f"{progress.pictures_per_second:.1f} pictures/s · {progress.tokens_per_second:.1f} tokens/s"
        text = f"{progress.failed} failed · {rates}"
        bar.update(task, completed=progress.rows, description=f"{text} · left")
        if progress.nodes is None:
            return bar
        nodes = _node_lines(progress.nodes, console.width, console.height - 4)
        return Group(bar, text, nodes if progress.nodes else "  no worker is ready yet")

    with Live(get_renderable=draw, console=console):
        yield


_NODE_COUNTS = 34
"""Columns of a terminal for what is said behind a node's name."""


def _node_lines(nodes: Sequence[NodeProgress], width: int, most: int) -> Any:
    """A line for each node; the last one is about all others where there are too many for the screen."""
    from rich.table import Table
    from rich.text import Text

    shown = len(nodes) if len(nodes) <= most else max(0, most - 1)
    lines = [(each.node, each.workers, each.pictures_per_second) for each in nodes[:shown]]
    if others := nodes[shown:]:
        rate = sum(each.pictures_per_second for each in others)
        lines.append((f"{len(others)} more nodes", sum(each.workers for each in others), rate))
    drawn = Table.grid(padding=(0, 2))
    drawn.add_column(no_wrap=True, overflow="ellipsis", max_width=width - _NODE_COUNTS)
    for _ in range(2):
        drawn.add_column(justify="right", no_wrap=True)
    for name, workers, rate in lines:
        count = "1 worker " if workers == 1 else f"{workers} workers"
        drawn.add_row(Text(f"  {printable(name)}"), count, f"{rate:.1f} pictures/s")
    return drawn


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
