"""Pages, moments and regions as people write them."""

from __future__ import annotations

import pytest
from helpers.tables import for_each

from llava_cli import limits
from llava_cli.errors import UsageError
from llava_cli.parts import (
    WHOLE,
    Content,
    Part,
    choose,
    page_numbers,
    parse_every,
    parse_pages,
    parse_region,
    region_box,
    split_reference,
)


@for_each(
    "text, path, part",
    [
        ("doc.pdf#2", "doc.pdf", Part(page=2)),
        ("doc.pdf#page=12", "doc.pdf", Part(page=12)),
        ("clip.mp4#t=12.5", "clip.mp4", Part(time=12.5)),
        ("clip.mp4#t=10000", "clip.mp4", Part(time=10_000.0)),
        ("clip.mp4#t=123456.789", "clip.mp4", Part(time=123_456.789)),
        ("a#b.pdf#3", "a#b.pdf", Part(page=3)),
        ("doc.pdf", "doc.pdf", WHOLE),
        ("doc.pdf#0", "doc.pdf#0", WHOLE),
        ("doc.pdf#t=1e9", "doc.pdf#t=1e9", WHOLE),
        ("#2", "#2", WHOLE),
        ("doc.pdf#-1", "doc.pdf#-1", WHOLE),
    ],
)
def test_a_part_behind_a_name(text: str, path: str, part: Part) -> None:
    assert split_reference(text) == (path, part)
    assert part == WHOLE or str(part) == text.removeprefix(path).replace("page=", "")


@for_each(
    "text, numbers",
    [
        ("1-3", [1, 2, 3]),
        ("2", [2]),
        ("4, 1", [4, 1]),
        ("3-", [3, 4, 5]),
        ("all", [1, 2, 3, 4, 5]),
        ("4-900000000", [4, 5]),
        ("7", []),
    ],
)
def test_pages_of_five(text: str, numbers: list[int]) -> None:
    assert list(page_numbers(parse_pages("--pages", text), 5)) == numbers


@for_each(
    "text, seconds", [("5s", 5), ("500ms", 0.5), ("1m30s", 90), ("2", 2), (0.25, 0.25), ("1h", 3600), ("1.5 min", 90)]
)
def test_times(text: str | float, seconds: float) -> None:
    assert parse_every("--every", text) == seconds


@for_each(
    "parse, values",
    [
        (parse_pages, ["", "0", "3-1", "1,,2", "-2", "one", "1-2-3", None, [1]]),
        (parse_every, ["", "0", "-5s", "5x", "s", "nan", None, f"{limits.FILM_SECONDS * 2:.0f}s"]),
        (parse_region, ["", "1,2,3", "0,0,0,0", "50%,0,40%,10", "-1,0,2,2", "0,0,101%,1", "0,0,1e3,1", None]),
    ],
)
def test_what_is_none_of_them_is_refused_with_an_example(parse: object, values: list[object]) -> None:
    for value in values:
        with pytest.raises(UsageError) as error:
            parse("--flag", value)  # type: ignore[operator]
        assert error.value.thing == "--flag" and error.value.hint.startswith("--")


@for_each(
    "region, box",
    [
        ("60%,0,100%,30%", (60, 0, 100, 15)),
        ("10,20,30,40", (10, 20, 30, 40)),
        ("10,20,3000,4000", (10, 20, 100, 50)),
        ("0,0,50%,10", (0, 0, 50, 10)),
        ("33.3%,0,33.4%,1", (33, 0, 34, 1)),
        ("100,0,200,10", None),
        ("90,0,10%,10", None),
    ],
)
def test_a_region_of_a_picture_of_100_by_50(region: str, box: tuple[int, ...] | None) -> None:
    assert region_box(parse_region("--region", region), 100, 50) == box


def pages(*numbers: int) -> list[Part]:
    return [Part(page=number) for number in numbers]


def times(*seconds: float) -> list[Part]:
    return [Part(time=second) for second in seconds]


@for_each(
    "content, options, parts",
    [
        (Content("picture"), {"pages": "2", "frames": 3}, [WHOLE]),
        (Content("document", 3), {}, pages(1, 2, 3)),
        (Content("document", 3), {"pages": "2-", "frames": 1}, pages(2, 3)),
        (Content("animation", 9, 0.9), {}, [WHOLE]),
        (Content("animation", 9, 0.9), {"pages": "9,1"}, pages(9, 1)),
        (Content("animation", 9, 0.9), {"frames": 3}, pages(2, 5, 8)),
        (Content("animation", 2), {"frames": 30}, pages(1, 2)),
        (Content("animation", 8, 8.0), {"every": 3.0}, pages(1, 4, 7)),
        (Content("film", seconds=8.0), {}, times(1, 3, 5, 7)),
        (Content("film", seconds=12.0), {"every": 5.0}, times(0, 5, 10)),
        (Content("film", seconds=12.0), {"frames": 2, "pages": "1"}, times(3, 9)),
        (Content("film"), {}, times(0)),
    ],
)
def test_what_is_looked_at(content: Content, options: dict[str, object], parts: list[Part]) -> None:
    given: dict[str, object] = {"pages": None, "frames": None, "every": None, **options}
    assert choose(content, most=limits.PAGES, **given).parts == parts  # type: ignore[arg-type]


def test_of_too_many_the_first_are_looked_at_and_the_others_counted() -> None:
    document, film = Content("document", 12), Content("film", seconds=100.0)
    assert choose(document, None, None, None, limits.ASK_PAGES) == (pages(1, 2, 3, 4), 8)
    assert choose(film, None, None, 1.0, 3) == (times(0, 1, 2), 97)
    assert len(choose(film, None, None, None, limits.PAGES).parts) == limits.FILM_FRAMES
    bomb = choose(Content("document", 10**9), None, None, None, limits.PAGES)
    assert len(bomb.parts) == limits.PAGES and bomb.left_out
