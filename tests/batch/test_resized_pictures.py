"""What a batch makes of pictures that are resized where they are decoded, and what has to see them whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Run
from helpers.faults import Told
from PIL import Image

from llava_cli import Sampling
from llava_cli.batch import run as module
from llava_cli.batch.judged_engine import JudgedEngine
from llava_cli.conversation import Conversation
from llava_cli.engine import Chunk
from llava_cli.engine.sight import unseen
from llava_cli.images.resize import Resize

QUESTION = "what is this?"
Size = tuple[int, int]


class Seeing(Told):
    """Keeps the sizes of pictures that it is asked about: of their pixels, and in their files."""

    picture_resize = Resize(8, 8, "pad")

    def __init__(self) -> None:
        self.seen: list[tuple[Size, Size]] = []

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Chunk]:
        if sampling.sight:
            (gray,) = unseen(conversation).pictures
            self.seen.append((gray.image.size, gray.size))
        (picture,) = conversation.pictures
        self.seen.append((picture.image.size, picture.size))
        yield from super().stream(conversation, sampling)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Seeing:
    """Answers about `a.png` in this folder."""
    found = Seeing()
    monkeypatch.setattr(module, "open_engine", lambda *_: found)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("a.png")
    return found


def rows(run: Run, *words: str) -> list[dict[str, Any]]:
    result = run("batch", *words, "-q")
    assert result.exit_code == 0, result.stderr + result.stdout
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_region_is_cut_from_the_whole_picture(engine: Seeing, run: Run) -> None:
    lines = [{"image": "a.png", "question": "q", "region": region} for region in (None, "0,0,50%,50%", None)]
    Path("asked.jsonl").write_text("\n".join(json.dumps({k: v for k, v in line.items() if v}) for line in lines))
    assert len(rows(run, "asked.jsonl")) == 3
    whole = (8, 8), (40, 30)
    assert engine.seen == [whole, ((20, 15), (20, 15)), whole]


def test_questions_tell_the_size_in_the_file(engine: Seeing, run: Run) -> None:
    (row,) = rows(run, "a.png", "{width} x {height}", "--template-question")
    assert (row["asked"], engine.seen) == ("40 x 30", [((8, 8), (40, 30))])


def test_the_gray_picture_beside_it_is_as_large_as_its_file_says(engine: Seeing, run: Run) -> None:
    rows(run, "a.png", QUESTION, "--sight", "1")
    assert engine.seen == [((40, 30), (40, 30)), ((8, 8), (40, 30))]


def test_verifying_and_a_dry_run_see_what_a_run_sees(engine: Seeing, run: Run) -> None:
    rows(run, "a.png", QUESTION, "--verify", "1")
    assert engine.seen == [((8, 8), (40, 30))] * 2
    engine.seen.clear()
    Image.new("RGB", (1500, 1200)).save("large.png")
    told = json.loads(run("batch", "large.png", QUESTION, "-o", "out.jsonl", "--dry-run", "--json").stdout)
    assert {*engine.seen} == {((8, 8), (1500, 1200))}
    (size,) = (one for one in told["sizes"] if one["pictures"])
    assert size["prompt_tokens"] == 5
    assert size["size"] == "up to 4 megapixels"


def test_a_larger_model_sees_the_whole_picture(engine: Seeing) -> None:
    assert JudgedEngine(engine).picture_resize == Seeing.picture_resize
    assert JudgedEngine(engine, larger=Told()).picture_resize is None
