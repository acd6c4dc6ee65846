"""Frames of films: the ones that a player shows, and nothing else of what a film can do."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import struct
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Run
from helpers.films import KINDS, film, picture, time_of
from helpers.tables import for_each
from PIL import Image

from llava_cli import limits
from llava_cli.conversation import Picture
from llava_cli.errors import BadImage, InputMissing, LlavaError
from llava_cli.images import formats
from llava_cli.images.film_frames import REPLY, Film
from llava_cli.images.resize import Resize
from llava_cli.images.sandbox import Crash, Sandbox
from llava_cli.parts import Content, Part, choose
from llava_cli.sandbox.process import Worker, WorkerLate

av = pytest.importorskip("av", reason="PyAV needs Python 3.11")
TIMES = (2.0, 0.0, 1.55, 1.6, 2.99, 1.21)
"""Forward and back, within a group of frames and beyond it."""
QUESTION = "what is this?"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    one = Sandbox()
    yield one
    one.end()


@pytest.fixture(scope="module")
def clip() -> bytes:
    return film()


def frame(sandbox: Sandbox, file: bytes | Path, time: float | None = None, **options: Any) -> Image.Image:
    """The frame at a time, of a film that has one."""
    found = sandbox.open("clip.mp4", file, part=Part(time=time), **options)
    assert isinstance(found, Picture), found
    return found.image


def refusal(sandbox: Sandbox, file: bytes | Path, time: float = 0.0) -> tuple[str, str]:
    """The reason and the hint with which a film is refused: when it is looked at, or else its frame."""
    found = sandbox.inspect("clip.mp4", file)
    if isinstance(found, Content):
        found = sandbox.open("clip.mp4", file, part=Part(time=time))
    assert isinstance(found, LlavaError), found
    assert type(found) is BadImage
    return found.reason, found.hint


def shown(data: bytes, times: tuple[float, ...]) -> list[Image.Image]:
    """The frames that are shown at some times, by PyAV alone, which reads all of the film from its beginning."""
    with av.open(io.BytesIO(data)) as container:
        origin = (container.start_time or 0) / 1e6
        frames = [(frame.time - origin, frame.to_image()) for frame in container.decode(video=0)]
    return [
        next(image for begin, image in reversed(frames) if begin <= time + 1e-6 or begin == frames[0][0])
        for time in times
    ]


@for_each("kind", KINDS)
def test_each_moment_of_each_format_is_the_frame_that_pyav_decodes(kind: str, sandbox: Sandbox, tmp_path: Path) -> None:
    rate = 25 if kind.startswith("mpeg") else 10
    data = film(kind, rate=rate, seconds=3)
    (file := tmp_path / "film").write_bytes(data)
    content = sandbox.inspect("film", file)
    assert isinstance(content, Content)
    assert content.kind == "film" and abs(content.seconds - 3) < 0.05
    for time in TIMES:
        # A program stream says only now and then what time it is: PyAV counts differently behind a jump.
        nearby = (time, time - 1 / rate, time + 1 / rate) if kind == "mpeg" else (time,)
        expected = shown(data, nearby)
        assert frame(sandbox, file, time).tobytes() in [image.tobytes() for image in expected], time
        assert kind.startswith("mpeg") or time_of(expected[0]) == int(time * 10) / 10


def test_a_film_that_is_bytes_is_as_one_on_disk(clip: bytes, sandbox: Sandbox, tmp_path: Path) -> None:
    (file := tmp_path / "film").write_bytes(clip)
    for time in (5.0, 2.0):
        on_disk, in_memory = (sandbox.open("film", one, part=Part(time=time)) for one in (file, clip))
        assert isinstance(on_disk, Picture)
        assert isinstance(in_memory, Picture)
        assert on_disk == in_memory
        assert on_disk.image.tobytes() == in_memory.image.tobytes()
        assert on_disk.sha256 == hashlib.sha256(clip).hexdigest()
        assert (on_disk.part, on_disk.frames, on_disk.data) == (Part(time=time), 1, None)


def test_a_film_without_a_time_is_its_first_frame(clip: bytes, sandbox: Sandbox) -> None:
    assert time_of(frame(sandbox, clip)) == 0
    assert frame(sandbox, clip, 3, resize=Resize.within(48)).size == (48, 32)


TURNS = {
    "upright": (0, False, False),
    "left": (90, False, False),
    "over": (180, False, False),
    "right": (-90, False, False),
}
TURNS |= {"askew": (30, False, False), "mirrored": (0, True, False), "upside down": (0, False, True)}
TURNS |= {"left, mirrored": (90, True, False)}


@for_each("name", TURNS)
def test_frames_are_upright(name: str, sandbox: Sandbox) -> None:
    """Held against what PyAV says of the turn, and against libavutil's rule of what is done first."""
    degrees, mirrored, upside_down = TURNS[name]
    data = film(seconds=1, turn=(degrees, mirrored, upside_down))
    (expected,) = shown(data, (0.5,))
    with av.open(io.BytesIO(data)) as container:
        counterclockwise = next(container.decode(video=0)).rotation
    if mirrored:
        expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if upside_down:
        expected = expected.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if not (mirrored or upside_down):
        expected = expected.rotate(round(counterclockwise / 90) * 90, expand=True)
    elif degrees:
        expected = expected.transpose(Image.Transpose.ROTATE_270)
    found = frame(sandbox, data, 0.5)
    assert found.size == expected.size
    assert found.tobytes() == expected.tobytes()


@for_each("ratio, size", [(Fraction(2), (192, 64)), (Fraction(1, 2), (96, 128)), (Fraction(10, 11), (96, 70))])
def test_pixels_become_square(ratio: Fraction, size: tuple[int, int], sandbox: Sandbox) -> None:
    data = film(seconds=1, ratio=ratio)
    (expected,) = shown(data, (0.5,))
    assert frame(sandbox, data, 0.5).tobytes() == expected.resize(size).tobytes()


@for_each(
    "options",
    [
        {"color": {"color_range": 2, "colorspace": 1}},  # all levels, BT.709
        {"color": {"color_range": 1, "colorspace": 9}},  # BT.2020
        {"size": (97, 61)},
        {"codec": "libx264", "keyframes": 250},
    ],
)
def test_colors_and_sizes_are_as_pyav_has_them(options: dict[str, Any], sandbox: Sandbox) -> None:
    data = film(seconds=3, **options)
    for time, expected in zip((1.5, 0.5), shown(data, (1.5, 0.5)), strict=True):
        assert frame(sandbox, data, time).tobytes() == expected.tobytes()


def test_levels_are_not_stretched_twice(sandbox: Sandbox) -> None:
    """The same colors, written in the two ranges of levels."""
    narrow, full = (frame(sandbox, film(seconds=1, color={"color_range": value}), 0.5) for value in (1, 2))
    assert time_of(narrow) == time_of(full) == 0.5


UNEVEN = [0, 0.1, 0.2, 1, 2.4, 2.6, 4, 11]
LENGTHS: dict[str, tuple[dict[str, Any], float]] = {
    "usual": ({}, 12),
    "without a length in its header": ({"kind": "matroska", "pipe": True}, 12),
    "in fragments": ({"pipe": True, "options": {"movflags": "frag_keyframe+empty_moov"}}, 12),
    "begins late": ({"kind": "matroska", "start": 3}, 12),
    "a broadcast of a day": ({"kind": "mpegts", "codec": "mpeg2video", "rate": 25, "start": 90_000}, 12),
    "begins before it begins": ({"start": -3}, 9),
    "one frame": ({"times": [0]}, 0.1),
    "uneven": ({"times": UNEVEN}, 11.1),
    "with sound": ({"sound": True}, 12),
    "with a cover": ({"cover": True}, 12),
}


@for_each("name", LENGTHS)
def test_a_film_is_as_long_as_its_frames(name: str, sandbox: Sandbox) -> None:
    options, seconds = LENGTHS[name]
    data = film(**options)
    content = sandbox.inspect("film", data)
    assert isinstance(content, Content)
    assert (content.kind, content.count) == ("film", 0)
    assert content.seconds == pytest.approx(seconds, abs=0.05)
    for part in choose(content, None, 5, None, 10).parts:
        assert part.time is not None
        expected = part.time + (3 if name == "begins before it begins" else 0)
        if name == "uneven":
            expected = max(time for time in UNEVEN if time <= part.time)
        assert abs(time_of(frame(sandbox, data, part.time)) - expected) < 0.11


def with_index_first(clip: bytes) -> bytes:
    """An MP4 whose index (`moov`) is before its frames, as the web has them."""
    at = clip.index(b"moov") - 4
    index, frames = bytearray(clip[at:]), clip.index(b"ftyp") + 24
    places = index.index(b"stco") + 12
    for place in range(places, places + 4 * int.from_bytes(index[places - 4 : places], "big"), 4):
        index[place : place + 4] = (int.from_bytes(index[place : place + 4], "big") + len(index)).to_bytes(4, "big")
    return clip[:frames] + index + clip[frames:at]


def test_a_length_that_a_header_lies_about_is_counted(clip: bytes, sandbox: Sandbox) -> None:
    """An MP4 that says it takes weeks, and one that is cut off."""
    endless = bytearray(clip)
    for box, offset in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)):  # where their durations are
        at = clip.index(box)
        endless[at + offset : at + offset + 4] = (2**31 - 1).to_bytes(4, "big")
    whole = with_index_first(clip)
    for data, least, most in ((bytes(endless), 11.9, 12.1), (whole, 11.9, 12.1), (whole[: len(whole) * 2 // 3], 1, 11)):
        content = sandbox.inspect("film", data)
        assert isinstance(content, Content)
        assert least < content.seconds < most
        for part in choose(content, None, 3, None, 3).parts:
            assert time_of(frame(sandbox, data, part.time)) == pytest.approx(part.time, abs=0.11)


@for_each(
    "frames, every, times",
    [
        (None, 5.0, [0, 5, 10]),
        (None, 6.0, [0, 6]),
        (8, None, [0.75, 2.25, 3.75, 5.25, 6.75, 8.25, 9.75, 11.25]),
        (None, None, [1.5, 4.5, 7.5, 10.5]),
        (None, 100.0, [0]),
    ],
)
def test_chosen_frames_of_twelve_seconds(
    frames: int | None, every: float | None, times: list[float], clip: bytes, sandbox: Sandbox
) -> None:
    content = sandbox.inspect("film", clip)
    assert isinstance(content, Content)
    found = choose(content, None, frames, every, 100)
    assert len(times) == limits.FILM_FRAMES or frames or every
    assert [part.time for part in found.parts] == times
    assert [time_of(frame(sandbox, clip, part.time)) for part in found.parts] == [int(time * 10) / 10 for time in times]


# What is wrong with films.


def with_size(width: int, height: int) -> bytes:
    """An AVI whose header says that its frames, which are not compressed, have another size."""
    data = film("avi", "rawvideo", seconds=0.3)
    at = data.index(b"strf") + 12
    return data[:at] + struct.pack("<II", width, height) + data[at + 8 :]


REPAIR = "copy it again, or: ffmpeg -i clip.mp4 -c copy REPAIRED.mkv"
CONVERT = "ffmpeg -i clip.mp4 clip.mp4.mp4"
LIMIT = "the limit is 50 megapixels"
LIST = "ffprobe clip.mp4 lists what is in it"
BAD: dict[str, tuple[Any, str, str]] = {
    "cut": (lambda clip: clip[:3000], "truncated or damaged", REPAIR),
    "a beginning": (lambda clip: clip[:40], "truncated or damaged", REPAIR),
    "no frame that can be decoded": (
        lambda clip: clip[:48] + bytes(clip.index(b"moov") - 52) + clip[clip.index(b"moov") - 4 :],
        "none of its frames can be decoded",
        REPAIR,
    ),
    "sound": (lambda clip: film(times=[], sound=True), "has sound in it, and no film", LIST),
    "a cover": (lambda clip: film(times=[], sound=True, cover=True), "has a cover picture in it, and no film", LIST),
    "another codec": (lambda clip: film("avi", "asv1", seconds=1), "its codec (asv1) is not supported", CONVERT),
    "large": (lambda clip: with_size(9000, 8000), "too many pixels (9000 x 8000)", LIMIT),
    "narrow": (lambda clip: with_size(9000, 8), "too narrow to see anything (9000 x 8)", ""),
    "narrow pixels": (
        lambda clip: film(seconds=0.2, size=(400, 16), ratio=Fraction(15)),
        "too narrow to see anything (6000 x 16)",
        "",
    ),
    "wide pixels": (
        lambda clip: film(seconds=0.2, size=(1000, 240), ratio=Fraction(240)),
        "too many pixels (240000 x 240)",
        LIMIT,
    ),
}


@for_each("name", BAD)
def test_what_is_no_film_is_named(name: str, clip: bytes, sandbox: Sandbox) -> None:
    make, reason, hint = BAD[name]
    assert refusal(sandbox, make(clip)) == (reason, hint)


def test_there_is_nothing_behind_the_end(clip: bytes, sandbox: Sandbox) -> None:
    assert time_of(frame(sandbox, clip, 12.5)) == 11.9  # where a player stops
    hint = "--frames 4 takes frames from all of it"
    assert refusal(sandbox, clip, 60.0) == ("has no frame at 60 s: its last one is at 11.9 s", hint)
    found = sandbox.open("clip.mp4", clip, part=Part(page=3))
    assert isinstance(found, BadImage)
    assert (found.reason, found.hint) == ("a film has times, not pages", "clip.mp4#t=1.5 is its frame at 1.5 s")


def test_rubbish_in_the_middle_hides_no_more_than_it_hits(clip: bytes, sandbox: Sandbox) -> None:
    at = len(clip) // 2
    damaged = clip[:at] + os.urandom(400) + clip[at + 400 :]
    content = sandbox.inspect("film", damaged)
    assert isinstance(content, Content)
    assert content.seconds == pytest.approx(12, abs=0.2)
    assert [time_of(frame(sandbox, damaged, time)) for time in (0.5, 11.5)] == [0.5, 11.5]


@for_each("kind, name", [("PNG", "picture"), ("GIF", "picture"), ("WEBP", "picture")])
def test_a_picture_under_a_films_name_is_a_picture(kind: str, name: str, sandbox: Sandbox, tmp_path: Path) -> None:
    picture(3).save(tmp_path / "clip.mp4", kind)
    found = sandbox.open("clip.mp4", tmp_path / "clip.mp4")
    assert isinstance(found, Picture)
    assert found.image.size == (96, 64)


@for_each(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{clip}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {clip}\n",
        "<?xml version='1.0'?><MPD><Period><AdaptationSet><BaseURL>{clip}</BaseURL></AdaptationSet></Period></MPD>",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    ],
)
def test_lists_that_name_films_are_none(text: str, clip: bytes, sandbox: Sandbox, tmp_path: Path) -> None:
    """FFmpeg by itself opens what such a file names; here not even where its demuxer is reached."""
    (tmp_path / "film.mp4").write_bytes(clip)
    (file := tmp_path / "list.mp4").write_text(text.format(clip=tmp_path / "film.mp4"))
    assert not formats.is_film(file.read_bytes())
    found = sandbox.open("list.mp4", file)
    assert isinstance(found, BadImage)
    with pytest.raises(BadImage, match="truncated or damaged"):
        Film(io.FileIO(file))


def test_a_film_that_names_another_file_is_not_followed(clip: bytes, sandbox: Sandbox, tmp_path: Path) -> None:
    """An MP4 may say that its frames are in another file (`dref`): they are then not found, wherever it is."""
    (tmp_path / "film.mp4").write_bytes(clip)
    url = f"file://{tmp_path / 'film.mp4'}".encode() + b"\0"
    at = clip.index(b"dref") - 4
    size = int.from_bytes(clip[at : at + 4], "big")
    entry = struct.pack(">I4sI", 12 + len(url), b"url ", 0) + url
    reference = struct.pack(">I4sII", 16 + len(entry), b"dref", 0, 1) + entry
    grown = bytearray(clip[:at] + reference + clip[at + size :])
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
        place = grown.index(box) - 4
        length = int.from_bytes(grown[place : place + 4], "big") + len(reference) - size
        grown[place : place + 4] = length.to_bytes(4, "big")
    blank = bytes(grown[:48]) + bytes(grown.index(b"moov") - 52) + bytes(grown[grown.index(b"moov") - 4 :])
    assert refusal(sandbox, blank)[0] == "none of its frames can be decoded"


def test_a_late_film_is_refused(clip: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(worker: Worker, request: tuple[bytes, ...], most: int, seconds: float) -> bytearray:
        assert seconds == limits.PAGE_SECONDS
        raise WorkerLate("10")

    sandbox = Sandbox()
    hint = "ffmpeg -i clip.mp4 -c copy INDEXED.mkv makes it quicker"
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "ask", late)
        for _ in range(limits.LATE_PAGES):
            assert refusal(sandbox, clip) == ("takes longer than 10 s to find a frame in", hint)
    assert refusal(sandbox, clip) == ("not tried: 3 of its frames took too long", hint)
    assert isinstance(sandbox.inspect("clip.mp4", clip + b"\0"), Content)  # another film
    sandbox.end()


def test_a_film_whose_frames_all_take_too_long_is_given_up(clip: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_late(*_: object) -> bytearray:
        raise WorkerLate("10")

    def late(count: int) -> list[str]:
        with monkeypatch.context() as patch:
            patch.setattr(Worker, "ask", is_late)
            found = [sandbox.open("clip.mp4", clip, part=Part(time=time)) for time in range(count)]
        return [one.reason for one in found if isinstance(one, BadImage)]

    sandbox = Sandbox()
    too_long = "takes longer than 10 s to find a frame in"
    for _ in range(2):
        assert late(limits.LATE_PAGES - 1) == [too_long] * (limits.LATE_PAGES - 1)
        assert time_of(frame(sandbox, clip, 7)) == 7  # one that comes in time begins the count anew
    given_up = f"not tried: {limits.LATE_PAGES} of its frames took too long"
    assert late(limits.LATE_PAGES + 1) == [too_long] * limits.LATE_PAGES + [given_up]
    sandbox.end()


def test_a_film_whose_disk_fails_while_it_is_hashed_is_refused(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (file := tmp_path / "clip.mp4").write_bytes(film(seconds=2))

    def fail(*arguments: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        found = sandbox.open("clip.mp4", file)
    assert isinstance(found, InputMissing)
    assert str(found).startswith("clip.mp4: input/output error")
    assert isinstance(sandbox.open("clip.mp4", file), Picture)  # the disk works again


def test_a_film_of_too_many_bytes_is_refused(
    clip: bytes, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (file := tmp_path / "clip.mp4").write_bytes(clip)
    monkeypatch.setattr(limits, "FILM_BYTES", 1000)
    assert refusal(sandbox, file)[0] == "larger than 0 GB"


@for_each(
    "reply",
    [
        b"",
        REPLY.pack(True, 0, 0, 0, 0, float("nan")),
        REPLY.pack(True, 0, 0, 0, 0, -1.0),
        REPLY.pack(True, 0, 0, 0, 0, float("inf")),
    ],
)
def test_a_length_of_another_form_is_none(reply: bytes, clip: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "ask", lambda *arguments: bytearray(reply))
    assert isinstance(Sandbox().inspect("clip.mp4", clip), Crash)


def test_a_film_is_not_endless(clip: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "ask", lambda *arguments: bytearray(REPLY.pack(True, 0, 0, 0, 0, 1e300)))
    assert Sandbox().inspect("clip.mp4", clip) == Content("film", 0, limits.FILM_SECONDS)


@for_each(
    "reply",
    [
        b"x",
        REPLY.pack(True, 0, 0, 9, 9, 0.0),
        REPLY.pack(True, 4, 4, 0, 9, 0.0) + bytes(48),
        REPLY.pack(True, 4, 4, 2**20, 2**20, 0.0) + bytes(48),
        REPLY.pack(True, 4, 4, 4, 4, 0.0) + bytes(47),
        REPLY.pack(True, 2**20, 2**20, 9, 9, 0.0),
    ],
)
def test_a_frame_of_another_form_is_none(reply: bytes, clip: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "ask", lambda *arguments: bytearray(reply))
    assert isinstance(Sandbox().open("clip.mp4", clip, part=Part(time=1)), Crash)


def test_a_process_that_has_ended_is_replaced(clip: bytes, sandbox: Sandbox) -> None:
    """Its successor has the same open file, whose position is wherever the first one left it."""
    assert time_of(frame(sandbox, clip, 5)) == 5
    before = sandbox.processes
    os.kill(before[-1], signal.SIGKILL)
    while before[-1] in sandbox.processes:
        pass
    assert time_of(frame(sandbox, clip, 7)) == 7
    assert sandbox.processes != before


def test_without_the_extra_it_is_named(clip: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (file := tmp_path / "clip.mp4").write_bytes(clip)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BadImage) as raised:
        Film(io.FileIO(file))
    assert (raised.value.reason, raised.value.hint) == (
        "films need the extra llava-cli[video]",
        "pip install 'llava-cli[video]'",
    )
    monkeypatch.setattr(sys, "version_info", (3, 10, 14))
    with pytest.raises(BadImage) as raised:
        Film(io.FileIO(file))
    assert (raised.value.reason, raised.value.hint) == ("films need Python 3.11 or later", "")


def test_a_server_takes_no_films(clip: bytes) -> None:
    """Its clients are strangers, and FFmpeg has decoders for all kinds of files."""
    sandbox = Sandbox(takes_films=False)
    found = sandbox.open("clip.mp4", clip)
    assert isinstance(found, BadImage)
    assert found.reason == "a video, not an image"
    sandbox.end()


# A batch.


def rows_of(output: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def test_each_frame_of_a_batch_is_a_row(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("clip.mp4").write_bytes(film())
    command = ("batch", "clip.mp4", QUESTION, "--every", "5s", "--max-tokens", "2", "-o", "out.jsonl")
    assert run(*command).exit_code == 0
    whole = Path("out.jsonl").read_bytes()
    assert [(row["image"], row["time"], row["status"]) for row in rows_of(whole)] == [
        ("clip.mp4", time, "ok") for time in (0.0, 5.0, 10.0)
    ]
    Path("out.jsonl").write_bytes(whole[: whole.index(b"\n") + 30])  # killed within its second row
    assert run(*command).exit_code == 0
    assert Path("out.jsonl").read_bytes() == whole


def test_a_folder_of_films_and_pictures(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("set").mkdir()
    Path("set/a.mkv").write_bytes(film("matroska", pipe=True))
    Path("set/b.mov").write_bytes(film(times=[], sound=True))
    picture(1).save("set/c.png")
    Path("set/d.mp4").write_bytes(film(seconds=4))
    found = run("batch", "set", QUESTION, "--frames", "2", "--max-tokens", "2")
    assert found.exit_code == 1
    assert [
        (row["image"], row.get("time"), (row["error"] or {}).get("message")) for row in rows_of(found.stdout_bytes)
    ] == [
        ("a.mkv", 3.0, None),
        ("a.mkv", 9.0, None),
        ("b.mov", None, "has sound in it, and no film"),
        ("c.png", None, None),
        ("d.mp4", 1.0, None),
        ("d.mp4", 3.0, None),
    ]


def test_a_list_names_moments(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("clip.mp4").write_bytes(film())
    found = run("batch", "-", QUESTION, "--max-tokens", "2", input="clip.mp4#t=7.5\nclip.mp4#t=60\n")
    assert found.exit_code == 1
    assert [(row["image"], row["time"], row["status"]) for row in rows_of(found.stdout_bytes)] == [
        ("clip.mp4", 7.5, "ok"),
        ("clip.mp4", 60.0, "error"),
    ]
    assert "is not in the current folder" not in found.stderr
