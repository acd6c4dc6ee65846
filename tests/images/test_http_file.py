"""Archives by URL: ranges, servers without them, connections that break off, files that change, what is refused."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from helpers.homes import NOWHERE
from helpers.range_server import Files, serving
from helpers.tables import for_each

from llava_cli import limits
from llava_cli.errors import BadData, InputMissing, LlavaError, SourceLost
from llava_cli.images.http_file import open_url
from llava_cli.images.remote_names import shown, without_secrets

DATA = bytes(i * 7 % 251 for i in range(700_000))


@pytest.fixture
def files() -> Iterator[Files]:
    with serving(Files({"/a.tar": DATA})) as files:
        yield files


@for_each(
    ("ranges", "length", "breaks"),
    [(True, True, []), (True, True, [1, 100_000, 0]), (False, True, [300_000, 400_000]), (False, False, [])],
    own=(files,),
)
def test_from_beginning_to_end(ranges: bool, length: bool, breaks: list[int], files: Files) -> None:
    files.knows_ranges, files.says_length, files.breaks_after = ranges, length, list(breaks)
    file, _ = open_url(f"{files.url}/a.tar", is_forward=True)
    assert not file.seekable()
    assert file.read() == DATA
    assert len(files.requests) == 1 + len(breaks)
    begun = [sum(breaks[:i]) for i in range(len(breaks) + 1)] if ranges else []
    assert [int(wanted[len("bytes=") : -1]) for _, wanted in files.requests][: len(begun)] == begun


def test_from_anywhere(files: Files) -> None:
    file, _ = open_url(f"{files.url}/a.tar", is_forward=False)
    assert file.seekable()
    assert file.seek(0, io.SEEK_END) == len(DATA)
    for place in (600_000, 5, 10, 650_000, 699_990, 0):
        file.seek(place)
        assert file.read(100) == DATA[place : place + 100]
    file.seek(len(DATA) + 5)
    assert file.read(1) == b""


def test_an_empty_file(files: Files) -> None:
    files.files["/a.tar"] = b""
    assert open_url(f"{files.url}/a.tar", is_forward=True)[0].read() == b""


def test_a_server_without_ranges_is_not_seekable(files: Files) -> None:
    files.knows_ranges = False
    assert not open_url(f"{files.url}/a.tar", is_forward=False)[0].seekable()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_changes_while_it_is_read(files: Files, ranges: bool) -> None:
    files.knows_ranges, files.breaks_after = ranges, [300_000]
    file, version = open_url(f"{files.url}/a.tar", is_forward=True)
    file.read(10)
    files.files["/a.tar"] = DATA[::-1]
    with pytest.raises(SourceLost, match="changed while it was read"):
        file.read()
    assert open_url(f"{files.url}/a.tar", is_forward=True)[1] != version


def test_tried_again_and_redirected(files: Files) -> None:
    files.statuses, files.moved["/b.tar"] = [503, 429], "/a.tar"
    assert open_url(f"{files.url}/b.tar", is_forward=True)[0].read() == DATA
    assert len(files.requests) == 4


@for_each(
    ("path", "reason", "kind"),
    [
        ("/none.tar", "it is not there", InputMissing),
        ("/away.tar", "redirects to an address that is not an http", InputMissing),
        ("/round.tar", "more than 5 redirects", InputMissing),
        ("/busy.tar", "its server is busy or failing", InputMissing),
    ],
    own=(files,),
)
def test_what_cannot_be_read(
    path: str, reason: str, kind: type[LlavaError], files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "REMOTE_SECONDS", 0.3)
    files.moved |= {"/away.tar": "file:///etc/passwd", "/round.tar": "/round.tar"}
    files.statuses = [503] * 9 if path == "/busy.tar" else []
    with pytest.raises(kind, match=reason) as raised:
        open_url(f"{files.url.replace('//', '//user:pw@')}{path}?X-Amz-Signature=abc", is_forward=True)
    assert raised.value.thing == f"{files.url}{path}?…"


def test_a_server_that_goes_away(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REMOTE_SECONDS", 0.3)
    files.breaks_after = [300_000]
    file, _ = open_url(f"{files.url}/a.tar", is_forward=True)
    files.statuses = [500] * 9
    with pytest.raises(SourceLost, match="busy or failing"):
        file.read()
    with pytest.raises(InputMissing, match="cannot be reached") as error:
        open_url(f"{NOWHERE}/a.tar", is_forward=True)
    assert error.value.hint == "is this machine online?"


def test_bounds(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REMOTE_BYTES", 300_000)
    file, _ = open_url(f"{files.url}/a.tar", is_forward=True)
    with pytest.raises(BadData, match="larger than"):
        file.read()


def test_a_server_that_stalls_is_asked_again(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REMOTE_STALL_SECONDS", 0.5)
    files.hangs = 1
    assert open_url(f"{files.url}/a.tar", is_forward=True)[0].read() == DATA
    assert len(files.requests) == 2


@for_each(
    ("url", "name", "in_messages"),
    [
        ("https://u:p@h:8/a.tar?sig=x", "https://h:8/a.tar", "https://h:8/a.tar?…"),
        ("HTTP://h/a b.tar#f", "http://h/a b.tar", "http://h/a b.tar"),
        ("s3://bucket/a?b.jpg", "s3://bucket/a?b.jpg", "s3://bucket/a?b.jpg"),
        ("http://[/a.tar", "http://[/a.tar", "http://[/a.tar"),
        ("http://u:p@[/a.tar", "http://…", "http://…"),
        ("photos/", "photos/", "photos/"),
    ],
)
def test_names_without_secrets(url: str, name: str, in_messages: str) -> None:
    assert (without_secrets(url), shown(url)) == (name, in_messages)
