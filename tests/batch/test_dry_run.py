"""`llava batch --dry-run`: what it tells of a source and of a run, and that it leaves nothing behind."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from helpers.command import Run
from helpers.faults import Pictures, Told
from helpers.tables import for_each
from helpers.terminal import Open
from PIL import Image

from llava_cli.batch import run as run_module
from llava_cli.batch.dry_run import dry_run as module
from llava_cli.batch.dry_run import estimate
from llava_cli.batch.dry_run.estimate import ENOUGH_SECONDS, measure, sample_of
from llava_cli.batch.dry_run.survey import Survey, new_survey
from llava_cli.batch.sources.source import Source
from llava_cli.batch.tasks import Task
from llava_cli.conversation import Picture
from llava_cli.engine import Answer, Request
from llava_cli.engine.base import always
from llava_cli.errors import BadImage, LlavaError
from llava_cli.settings import Settings

QUESTION = "what is this?"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An engine that costs nothing; the pictures that it is asked about."""
    asked = []

    class Here(Told):
        def say(self, question: str, name: str) -> str:
            asked.append(name)
            return super().say(question, name)

    monkeypatch.setattr(run_module, "open_engine", lambda *_: Here())
    monkeypatch.setattr(run_module, "identify", lambda settings: {"model": "told"})
    return asked


def make(folder: str = "photos", count: int = 6) -> None:
    """Pictures of which the second and the third are equal; a file that is cut off, and two that are no pictures."""
    path = Path(folder)
    path.mkdir()
    for number in range(count):
        Image.new("RGB", (40, 30), (0, 0, 9 * number)).save(path / f"{number:02d}.png")
    (path / "02.png").write_bytes((path / "01.png").read_bytes())
    (path / "cut.png").write_bytes((path / "00.png").read_bytes()[:60])
    (path / "x.jpg").write_bytes(b"no picture")
    (path / "y.jpg").write_bytes(b"nor is this")


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def object_of(run: Run, *words: str, code: int = 0) -> dict[str, Any]:
    result = run("batch", *words, "--dry-run", "--json")
    assert result.exit_code == code, result.stderr
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def test_the_built_in_model(run: Run, here: Path) -> None:
    """With it, all that is told is real; nothing but standard output is written."""
    make()
    before = files_below(here)
    words = ("photos", QUESTION, "--question", "is it red?", "-m", "builtin", "-o", "out.jsonl")
    facts = object_of(run, *words, code=1)
    assert (facts["pictures"], facts["rows"], facts["answerable"]) == (9, 18, 12)
    assert {one["reason"]: one["images"] for one in facts["unreadable"]} == {
        "not an image": ["x.jpg", "y.jpg"],
        "truncated": ["cut.png"],
    }
    assert facts["doubles"] == {"pictures": 1, "rows": 2, "groups": [["01.png", "02.png"]]}
    assert facts["model"].startswith("builtin") and facts["where"] == "cpu"
    assert facts["sample"]["rows"] == 4 and facts["sample"]["errors"] == []
    assert facts["seconds"]["answer"] > 0 and facts["bytes"]["process"] > facts["bytes"]["picture_processes"] > 0
    assert files_below(here) == before

    assert run("batch", *words, "-q").exit_code == 1
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    tokens = [row["answer_tokens"] for row in rows if row["status"] == "ok"]
    assert min(tokens) <= facts["answer_tokens"]["least"] <= facts["answer_tokens"]["most"] <= max(tokens)
    asked = ["ask", "photos/00.png", "-m", "builtin", "--json"]
    prompts = [json.loads(run(*asked, question).stdout)["prompt_tokens"] for question in (QUESTION, "is it red?")]
    assert facts["prompt_tokens"]["total"] == 6 * sum(prompts)


def test_lines_for_a_person(run: Run, told: list[str]) -> None:
    make()
    result = run("batch", "photos", QUESTION, "-o", "out.jsonl", "--dry-run")
    assert result.exit_code == 1 and not Path("out.jsonl").exists() and not Path("out.jsonl.run").exists()
    assert result.stdout.splitlines()[:6] == [
        "pictures    9 in photos",
        "rows        9 to write, 3 of them errors",
        "output      out.jsonl: no rows yet",
        "unreadable  2: not an image: x.jpg, y.jpg",
        "            1: truncated: cut.png",
        "doubles     1 picture (1 row) with bytes of another one: 01.png = 02.png",
    ]
    labels = [line.split()[0] for line in result.stdout.splitlines()[6:]]
    assert labels == ["model", "prompts", "answers", "time", "memory", "sample"]


def test_a_run_that_is_begun(run: Run, told: list[str], here: Path) -> None:
    """What is left, without a lock and without a repair of what is torn."""
    make()
    assert run("batch", "photos", QUESTION, "-q", "-o", "out.jsonl").exit_code == 1
    lines = Path("out.jsonl").read_bytes().splitlines(keepends=True)
    Path("out.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:20])
    Image.new("RGB", (8, 8)).save("photos/new.png")
    Path("photos/05.png").unlink()
    before, words = files_below(here), ("photos", QUESTION, "-o", "out.jsonl")
    written = {"path": "out.jsonl", "rows": 4, "errors": 0, "to_ask_again": 0, "added": 1, "removed": 1}
    facts = object_of(run, *words, code=1)
    assert facts["output"] == {**written, "extend": False} and facts["rows"] == 5
    assert object_of(run, *words, "--extend", code=1)["rows"] == 6
    lines = run("batch", *words, "--dry-run").stdout.splitlines()
    assert lines[2:4] == [
        "output      out.jsonl: 4 rows stay",
        "            1 rows were added to the source since and are left out; --extend takes them in",
    ]
    assert files_below(here) == before


def test_errors_that_are_asked_again(run: Run, told: list[str]) -> None:
    make()
    words = ("photos", QUESTION, "-o", "out.jsonl")
    assert run("batch", *words, "-q").exit_code == 1
    assert run("batch", *words, "--dry-run").stdout.splitlines()[1:3] == [
        "rows        0 to write",
        "output      out.jsonl: 9 rows stay, 3 of them errors",
    ]
    facts = object_of(run, *words, "--retry-errors", code=1)
    assert (facts["rows"], facts["output"]["to_ask_again"], facts["answerable"]) == (3, 3, 0)
    assert "seconds" not in facts  # there is nothing to answer


@for_each(
    "words, expected",
    [
        ("-o out.jsonl --max-tokens 7", "out.jsonl: other settings made its rows: max_tokens was 512, is 7"),
        ("-o photos", "photos: a folder"),
        ("-o away/out.jsonl", "no such file or directory"),
        ("-o a.txt", "it has rows already"),
    ],
    own=(here, told),
)
def test_what_a_run_would_refuse(run: Run, told: list[str], words: str, expected: str) -> None:
    """With the same reason, and the same exit code."""
    make()
    Path("a.txt").write_text("mine")
    run("batch", "photos", QUESTION, "-q", "-o", "out.jsonl")
    results = [run("batch", "photos", QUESTION, *words.split(), *more) for more in ([], ["--dry-run"])]
    assert results[0].exit_code == results[1].exit_code != 0
    assert all(expected in result.stderr for result in results)


def test_options(run: Run, told: list[str]) -> None:
    make()
    result = run("batch", "photos", QUESTION, "--json")
    assert result.exit_code == 2 and "--json: is about --dry-run" in result.stderr
    result = run("batch", "photos", QUESTION, "--dry-run", "--verify", "3")
    assert "what --verify asks again is not in the estimate" in result.stderr


def test_questions_with_fields(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns are looked for, and the sample is asked what the rows will be asked."""
    asked = []

    class Asked(Told):
        def say(self, question: str, name: str) -> str:
            asked.append(question)
            return super().say(question, name)

    monkeypatch.setattr(run_module, "open_engine", lambda *_: Asked())
    make()
    rows = [f"photos/{number:02d}.png,{'Rome' if number % 2 else ''}" for number in range(6)]
    Path("q.csv").write_text("\n".join(["image,city", *rows * 2]))
    words = ["batch", "q.csv", "--template-question", "--dry-run"]
    for output in ([], ["-o", "out.jsonl"]):
        result = run(*words, "in {row.town}?", *output)
        assert result.exit_code == 2 and "{row.town}: no row has such a column" in result.stderr
    sample = object_of(run, *words[1:-1], "in {row.city}?")["sample"]
    assert set(asked) == {"in Rome?"} and [error["type"] for error in sample["errors"]] == ["BadData"]


def test_its_files_are_given_back(run: Run, told: list[str], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    close = Source.close
    monkeypatch.setattr(Source, "close", lambda source: (closed.append(source), close(source)))
    make()
    object_of(run, "photos", QUESTION, code=1)
    assert len(closed) == 1


def test_a_list_on_stdin(run: Run, told: list[str]) -> None:
    make()
    result = run("batch", "-", QUESTION, "--dry-run", input="photos/00.png\nphotos/01.png\nphotos/00.png\n")
    assert result.exit_code == 0 and result.stdout.startswith("pictures    2 in -\nrows        3 to write\n")
    assert set(told) <= {"photos/00.png", "photos/01.png"}


# The sample.


def surveyed(survey: Survey, sizes: Sequence[int], questions: Callable[[int], int] = lambda number: 1) -> None:
    place = 0
    for number in range(len(sizes)):
        for question in range(questions(number)):
            survey.add(place, Task(f"{number}.png", f"{question}?"))
            place += 1
    for number, (task, side) in enumerate(zip(survey.to_open(), sizes, strict=True)):
        image = Image.new("1", (side, 1))
        bad = BadImage(task.image, "broken")
        survey.opened(number, task, bad if side % 10 == 3 else Picture(task.image, image, str(number)))


def test_a_sample_stands_for_its_source() -> None:
    """It has as many of each size as its share, also the first half of it; and all questions of a picture."""
    rng = Random(5)
    sizes = [rng.choice([10] * 60 + [100] * 30 + [1000] * 10) for _ in range(5000)]
    with new_survey() as survey:
        surveyed(survey, sizes)
        sample = survey.spread(200)
        assert len(sample) == 200 == len({number for number, _ in sample})
        for part in (sample, sample[:100]):
            for size in (10, 100, 1000):
                share = sum(sizes[number] == size for number, _ in part) / len(part)
                assert abs(share - sizes.count(size) / len(sizes)) < 0.02
        assert sample == survey.spread(200)
        places = [number for number, _ in survey.heaviest(64)]
        heaviest = max(range(len(sizes) - 63), key=lambda begin: sum(sizes[begin : begin + 64]))
        assert places == list(range(heaviest, heaviest + 64))


def test_a_sample_of_few() -> None:
    with new_survey() as survey:
        surveyed(survey, [10, 13, 20], lambda number: 4)
        assert survey.answerable == 8
        assert [task.image for _, task in survey.spread(8)] == ["0.png"] * 4 + ["2.png"] * 4
        assert len(survey.spread(3)) == 3
        assert [number for number, _ in survey.heaviest(100)] == [0, 1, 2, 3, 8, 9, 10, 11]
        assert [refusal.rows for refusal in survey.refusals()] == [4]


class Batches(Told):
    """Answers in batches of a size as `Scheduler` does, by a clock of its own: no row's time depends on the machine."""

    def __init__(self, size: int, tokens: Callable[[int], int], prompt: float, step: float) -> None:
        self.size, self.tokens, self.costs, self.now = size, tokens, (prompt, step), 100.0

    def most_at_a_time(self, size: int | None = None) -> int:
        return self.size

    def answer_many(
        self,
        requests: Iterable[Request | LlavaError],
        size: int | None = None,
        go_on: Callable[[], bool] = always,
    ) -> Iterator[tuple[int, Answer | LlavaError]]:
        prompt, step = self.costs
        waiting, running = deque(enumerate(requests)), dict[int, int]()
        while waiting or running:
            if len(running) * 2 <= self.size:
                while waiting and len(running) < self.size:
                    number, _ = waiting.popleft()
                    running[number] = self.tokens(number)
                    self.now += prompt
            self.now += step
            for number in [number for number, left in running.items() if left == 1]:
                del running[number]
                yield number, Answer("", "stop", 9, 0, self.tokens(number), 0.0, 0.0)
            running = {number: left - 1 for number, left in running.items()}


@for_each(
    "size, tokens, prompt, step",
    [
        (16, lambda number: 32, 0.5, 0.05),  # all of a batch end together
        (16, lambda number: 2 + number * 7 % 61, 0.5, 0.05),
        (256, lambda number: 9, 0.01, 0.02),
        (256, lambda number: 1 + number * 31 % 97, 0.01, 0.02),
        (16, lambda number: 64, 3.0, 0.4),  # so slow that the sample ends early
        (1, lambda number: 5, 0.1, 0.1),
    ],
)
def test_the_time_of_a_row_in_batches(
    monkeypatch: pytest.MonkeyPatch, size: int, tokens: Callable[[int], int], prompt: float, step: float
) -> None:
    """The sample tells what a whole run takes, by the same clock, within a twelfth."""
    count = 3000
    with new_survey() as survey:
        surveyed(survey, [10] * count)
        engine = Batches(size, tokens, prompt, step)
        monkeypatch.setattr(estimate.time, "monotonic", lambda: engine.now)
        loader: Any = Pictures()
        sample = sample_of(survey, size, lambda number, task: task)
        found = measure(engine, loader, sample, Settings(), None)
        whole = Batches(size, tokens, prompt, step)
        tasks = [BadImage("", "")] * count
        begin = whole.now
        for _ in whole.answer_many(tasks):
            pass
    seconds = whole.now - begin
    assert found.first_seconds + count * found.seconds_per_row == pytest.approx(seconds, rel=1 / 12)
    assert found.rows <= 3 * size + 24 and (found.seconds < 2 * ENOUGH_SECONDS + 50 * size)


def test_stopping(run: Run, told: list[str], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at any stage leaves no file and no process."""
    make()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = files_below(here)
    for stage in ("_open", "_estimate"):
        with monkeypatch.context() as patch:
            patch.setattr(module, stage, stop)
            assert run("batch", "photos", QUESTION, "-o", "out.jsonl", "--dry-run").exit_code == 130
    assert files_below(here) == before


def test_at_a_terminal(told: list[str], terminal: Open) -> None:
    """The facts about the source stand before the model is loaded, and no bar stays."""
    make()
    process = terminal("batch", "photos", QUESTION, "-m", "builtin", "--dry-run")
    assert process.leave() == 1
    last = [line.strip() for line in process.before.splitlines()]
    assert any(line.endswith("with bytes of another one: 01.png = 02.png") for line in last)
    assert last[-1].startswith("sample")
