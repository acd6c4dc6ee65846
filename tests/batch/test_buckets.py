"""Buckets as SOURCEs, from a real S3 server on this machine: rows as of a folder, resumed, and what goes wrong."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pytest
from helpers import data_sets, range_server, s3
from helpers.command import Run
from helpers.faults import Told
from helpers.pdf_bytes import pages_pdf
from helpers.tables import for_each
from PIL import Image
from pyarrow import parquet

from llava_cli import limits, open_picture
from llava_cli.batch import run as module
from llava_cli.batch.sources.containers.bucket import Bucket, split_pattern
from llava_cli.batch.sources.remote_words import expand_url
from llava_cli.batch.sources.source_arguments import expand, split_question
from llava_cli.errors import InputMissing, LlavaError, UsageError
from llava_cli.images import cloud
from llava_cli.images.reader import looks_like_picture
from llava_cli.images.remote_errors import Patience

QUESTION = "what is this?"
Row = dict[str, Any]


def picture(number: int, kind: str = "PNG") -> bytes:
    Image.new("RGB", (8, 6), (number % 256, number // 256, 99)).save(file := io.BytesIO(), kind)
    return file.getvalue()


PHOTOS = {f"photos/{folder}/{n:02}.png": picture(n) for folder in ("b", "a", "é") for n in range(4)} | {
    "photos/a.png": picture(50),
    "photos/a-b.jpg": picture(51, "JPEG"),
    "photos/with #? spaces.png": picture(52),
    "photos/broken.png": b"\x89PNG\r\n\x1a\nnothing",
    "photos/empty.png": b"",
    "photos/notes.txt": b"no picture",
    "photos/without an ending": picture(53),
    "photos/.hidden.png": picture(54),
    "photos/pages.tif": picture(55, "TIFF"),
    "photos/__MACOSX/x.png": picture(56),
}
MANY = 120


@pytest.fixture(scope="module")
def server() -> Iterator[s3.Server]:
    with pytest.MonkeyPatch.context() as patch, s3.serving() as server:
        for name in s3.PROXIES:
            patch.delenv(name, raising=False)
        s3.forget()
        server.fill("album", PHOTOS)
        server.fill("many", {f"{n:04}.png": picture(n) for n in range(MANY)})
        yield server


@pytest.fixture(autouse=True)
def environment(server: s3.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder to stand in, credentials, and a model that says anything."""
    monkeypatch.setattr(module, "open_engine", lambda *_: Told())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in s3.PROXIES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {**s3.ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}.items():
        monkeypatch.setenv(name, value)
    server.requests.clear()
    cloud.file_system.cache_clear()
    yield
    server.faults.clear()
    server.always.clear()


def rows_of(text: str) -> list[Row]:
    return [json.loads(line) for line in text.splitlines()]


def written(name: str = "out.jsonl") -> list[Row]:
    return rows_of(Path(name).read_text())


def put_on_disk(objects: dict[str, bytes]) -> None:
    for name, data in objects.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(data)


def test_rows_are_those_of_the_folder(run: Run, server: s3.Server) -> None:
    """But for the picture without an ending, which a folder finds by its first bytes."""
    put_on_disk(PHOTOS)
    Path("photos/without an ending").unlink()
    folder = run("batch", "photos/", QUESTION)
    bucket = run("batch", "s3://album/photos/", QUESTION)
    assert rows_of(bucket.stdout) == rows_of(folder.stdout)
    assert len(rows_of(bucket.stdout)) == len(PHOTOS) - 4
    note = "s3://album/photos/: 2 files are no pictures (1 .txt, 1 without ending), 1 hidden name, 1 folder of the"
    assert note in bucket.stderr
    assert "GET /album/photos/notes.txt" not in server.requests
    without_slash = run("batch", "s3://album/photos", QUESTION, "-q")
    assert without_slash.stdout == bucket.stdout


def test_many_objects_and_a_run_that_was_killed(run: Run, server: s3.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several pages; the rest of the rows is the same, whatever was added meanwhile."""
    monkeypatch.setattr(cloud, "PAGE_KEYS", 50)
    whole = run("batch", "s3://many/", QUESTION, "-o", "whole.jsonl", "-q")
    assert whole.exit_code == 0
    lines = Path("whole.jsonl").read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["image"] for line in lines] == [f"{n:04}.png" for n in range(MANY)]
    settings = json.loads(Path("whole.jsonl.run/settings.json").read_text())
    assert settings["root"] == "s3://many/"
    Path("whole.jsonl").write_bytes(b"".join(lines[:100]) + lines[100][:20])
    server.client.put_object(Bucket="many", Key="0000-new.png", Body=picture(7))
    try:
        resumed = run("batch", "s3://many/", QUESTION, "-o", "whole.jsonl")
        assert "1 rows were added to the source since and are left out" in resumed.stderr
        assert Path("whole.jsonl").read_bytes() == b"".join(lines)
        run("batch", "s3://many/", QUESTION, "-o", "whole.jsonl", "--extend")
        assert [row["image"] for row in written("whole.jsonl")][-1] == "0000-new.png"
    finally:
        server.client.delete_object(Bucket="many", Key="0000-new.png")
    secret = s3.SECRETS["AWS_SECRET_ACCESS_KEY"]
    assert all(secret not in path.read_text() for path in Path().rglob("*") if path.is_file())


def test_a_large_bucket_is_listed_in_ranges(run: Run, server: s3.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are the same, whatever the names are."""
    names = ("", "!", "a", "a/b/", "é", "漢/", "😀", "\U0010ffff", "~", " ", "%41+")
    objects = {f"{name}{n}.png": picture(n) for name in names for n in range(4)}
    server.fill("strange", {**objects, "a/": b"", "z.txt": b""})
    once = run("batch", "s3://strange/", QUESTION)
    requests = server.requests.count("GET /strange")
    monkeypatch.setattr(cloud, "PAGE_KEYS", 3)
    assert run("batch", "s3://strange/", QUESTION).stdout == once.stdout
    assert len(rows_of(once.stdout)) == len(objects)
    assert requests == 1
    assert server.requests.count("GET /strange") - requests > len(objects) // 3


def test_what_is_wrong_with_one_object_is_said_in_its_row(run: Run, server: s3.Server) -> None:
    """All attempts of it together have a bound; what is transient is tried again."""
    server.fill("wrong", {f"{name}.png": picture(n) for n, name in enumerate("abcdef")})
    run("batch", "s3://wrong/", QUESTION, "-o", "out.jsonl", "-q")
    before = written()
    Path("out.jsonl").write_bytes(b"")
    server.client.delete_object(Bucket="wrong", Key="a.png")
    server.client.put_object(Bucket="wrong", Key="b.png", Body=picture(99))
    server.always["/wrong/c.png"] = 403, "AccessDenied"
    server.always["/wrong/d.png"] = 403, "InvalidObjectState"
    server.faults["/wrong/e.png"] = [(503, "SlowDown"), (0, ""), (500, "InternalError")]
    resumed = run("batch", "s3://wrong/", QUESTION, "-o", "out.jsonl")
    rows = written()
    messages = ["it is not there", None, "access denied", "archived: it has to be restored first", None, None]
    assert [(row["error"] or {}).get("message") for row in rows] == messages
    assert resumed.exit_code == 1
    assert "1 rows are about what is no longer in it" in resumed.stderr
    assert rows[4:] == before[4:]
    assert rows[1]["sha256"] not in (None, before[1]["sha256"])
    server.always.clear()
    run("batch", "s3://wrong/", QUESTION, "-o", "out.jsonl", "--retry-errors", "-q")
    assert [row["status"] for row in written()] == ["error", *["ok"] * 5]


def test_objects_that_are_too_large_or_busy_for_too_long(
    run: Run, server: s3.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "REMOTE_SECONDS", 0.5)
    monkeypatch.setattr(limits, "PICTURE_BYTES", 5_000_000)
    server.fill("large", {"a.png": bytes(5_000_001), "b.png": picture(1)})
    server.always["/large/b.png"] = 503, "SlowDown"
    large, busy = rows_of(run("batch", "s3://large/", QUESTION).stdout)
    assert large["error"] == {"type": "BadImage", "message": "larger than 5 MB"}
    assert busy["error"]["message"] == "its server is busy or failing"


def test_a_server_that_goes_away_ends_the_run_which_is_resumed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row says of a picture what is only true of the network."""
    monkeypatch.setattr(limits, "REMOTE_SECONDS", 0.5)
    with s3.serving() as away:
        away.fill("going", {f"{n:03}.png": picture(n) for n in range(60)})
        away.stops_at = "/going/030.png"
        monkeypatch.setenv("AWS_ENDPOINT_URL", away.url)
        stopped = run("batch", "s3://going/", QUESTION, "-o", "out.jsonl")
    assert stopped.exit_code == 66
    said = "llava: s3://going/: its server cannot be reached\n"
    assert stopped.stderr.endswith(said + f"  {AWAY}; the same command resumes\n")
    assert all(row["status"] == "ok" for row in written())
    assert len(written()) < 60


AWAY = "is this machine online? AWS_ENDPOINT_URL names another server for s3://"
SIGN_IN = "aws configure, or export AWS_PROFILE=NAME; for a public bucket: export FSSPEC_S3_ANON=true"


@for_each(
    ("url", "variables", "answer", "reason", "hint"),
    [
        ("s3://nobody/", {}, None, "there is no such bucket", ""),
        ("s3://album/none/", {}, None, "no pictures in it", "--include takes others by name"),
        ("s3://album/", {}, (403, "AccessDenied"), "access denied", SIGN_IN),
        ("s3://album/", {}, (403, "ExpiredToken"), "the credentials for it have expired", SIGN_IN),
        ("s3://album/", {"AWS_SECRET_ACCESS_KEY": ""}, None, "no credentials for it were found", SIGN_IN),
        ("s3://album/", {"AWS_PROFILE": "nobody"}, None, "AWS_PROFILE names no profile", "aws configure list-profiles"),
        ("s3://album/", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, None, "its server cannot be reached", AWAY),
        ("s3://album/none.tar", {}, None, "it is not there", ""),
        ("s3://album/*.tar", {}, None, "no object has a name like that", ""),
    ],
)
def test_what_is_wrong_with_all_is_said_in_one_line(
    url: str,
    variables: dict[str, str],
    answer: tuple[int, str] | None,
    reason: str,
    hint: str,
    run: Run,
    server: s3.Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cloud.file_system.cache_clear()
    monkeypatch.setattr(limits, "REMOTE_SECONDS", 0.3)
    for name, value in variables.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    server.always = {"/album": answer} if answer else {}
    result = run("batch", url, QUESTION, "-o", "out.jsonl")
    assert (result.exit_code, result.stderr) == (66, f"llava: {url}: {reason}\n" + (f"  {hint}\n" if hint else ""))


def test_patterns_braces_and_single_pictures(run: Run, server: s3.Server) -> None:
    def images(*words: str) -> list[str]:
        return [row["image"] for row in rows_of(run("batch", *words, QUESTION).stdout)]

    assert images("s3://album/photos/*/01.png") == ["a/01.png", "b/01.png", "é/01.png"]
    assert images("s3://album/photos/{a,b}/0{1..2}.png") == [
        f"s3://album/photos/{folder}/0{n}.png" for folder in "ab" for n in (1, 2)
    ]
    assert images("s3://album/photos/a/01.png", "s3://album/photos/b/") == [
        "s3://album/photos/a/01.png",
        *(f"s3://album/photos/b/0{n}.png" for n in range(4)),
    ]
    assert images("s3://album/photos/", "--include", "a*.jpg") == ["a-b.jpg"]


@for_each(
    ("pattern", "start", "matches", "others"),
    [
        ("s3://b/a/*.jpg", "s3://b/a/", ["x.jpg", ".jpg"], ["y/x.jpg", "x.jpgs", "xjpg"]),
        ("s3://b/a-*/**/?.jpg", "s3://b/", ["a-1/x.jpg", "a-1/y/z/x.jpg"], ["a-1/xx.jpg", "a/x.jpg"]),
        ("s3://b/**", "s3://b/", ["x", "y/x\n"], []),
    ],
)
def test_patterns(pattern: str, start: str, matches: list[str], others: list[str]) -> None:
    found, expression = split_pattern(pattern)
    assert found == start
    assert expression
    assert [name for name in (*matches, *others) if expression.fullmatch(name)] == matches


def archives() -> dict[str, bytes]:
    """Two shards of WebDataset, a zip and a table, of two pictures each."""
    made = {f"shard-{shard:03}.tar": tar_of(10 * shard) for shard in range(2)}
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for n in range(2):
            archive.writestr(f"in/{n}.png", picture(40 + n))
    table = pyarrow.table(
        {"image": [{"bytes": picture(60 + n), "path": f"{n}.png"} for n in range(2)], "label": ["a", "b"]}
    )
    parquet.write_table(table, of_table := io.BytesIO())
    return {**made, "all.zip": file.getvalue(), "train-0.parquet": of_table.getvalue()}


def tar_of(first: int) -> bytes:
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as tar:
        for n in range(2):
            for name, data in ((f"{n}.png", picture(first + n)), (f"{n}.json", b'{"caption": "red"}')):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def test_archives_in_buckets_and_at_urls_are_as_on_disk(run: Run, server: s3.Server) -> None:
    """Named by what the user typed, without what might be secret."""
    put_on_disk(archives())
    server.fill("shards", archives())
    with range_server.serving(range_server.Files({f"/{name}": data for name, data in archives().items()})) as web:
        for names in ("shard-{000..001}.tar", "all.zip", "shard-001.tar", "train-0.parquet"):
            starts = {"": [], "s3://shards/": [], f"{web.url}/": ["--allow-urls"]}
            found = [rows_of(run("batch", start + names, QUESTION, *more).stdout) for start, more in starts.items()]
            assert [len(rows) for rows in found] == [4 if "{" in names else 2] * 3
            for start, rows in zip(starts, found, strict=True):
                for row, local in zip(rows, found[0], strict=True):
                    assert row["sha256"] == local["sha256"]
                    assert row["image"] == (start if "{" in names else "") + local["image"]
        assert [row["image"] for row in rows_of(run("batch", "s3://shards/*.tar", QUESTION).stdout)] == [
            f"s3://shards/shard-00{shard}.tar/{n}.png" for shard in range(2) for n in range(2)
        ]
        refused = run("batch", f"{web.url}/all.zip", QUESTION)
        assert (refused.exit_code, refused.stderr) == (
            2,
            f"llava: {web.url}/all.zip: a URL\n  --allow-urls fetches it\n",
        )
        signed = web.url.replace("//", "//user:hunter2@") + "/all.zip?X-Amz-Signature=abcdef"
        run("batch", signed, QUESTION, "-o", "out.jsonl", "--allow-urls")
        run("batch", signed, "s3://shards/all.zip", QUESTION, "-o", "two.jsonl", "--allow-urls")
        same = run("batch", signed, signed + "0", QUESTION, "--allow-urls")
        assert "two URLs differ only behind `?`" in same.stderr
    assert written("two.jsonl")[0]["image"] == f"{web.url}/all.zip/in/0.png"
    for path in Path().glob("*.jsonl*/**/*"):
        assert not path.is_file() or not any(word in path.read_text() for word in ("hunter2", "abcdef"))


def test_a_page_of_a_document_in_a_bucket(run: Run, server: s3.Server) -> None:
    server.fill("papers", {"doc.pdf": pages_pdf(b"", b"", b""), "doc.pdf#1": picture(1)})
    for word, pages in (("doc.pdf#2", [2]), ("doc.pdf", [1, 2, 3])):
        rows = rows_of(run("batch", f"s3://papers/{word}", QUESTION).stdout)
        assert [(row["status"], row["image"], row["page"]) for row in rows] == [
            ("ok", "s3://papers/doc.pdf", page) for page in pages
        ]


def test_an_archive_that_is_replaced_or_breaks_ends_the_run(run: Run, server: s3.Server) -> None:
    server.fill("replaced", {"all.zip": archives()["all.zip"]})
    run("batch", "s3://replaced/all.zip", QUESTION, "-o", "out.jsonl", "-q")
    assert len(written()) == 2
    server.client.put_object(Bucket="replaced", Key="all.zip", Body=b"PK\5\6" + bytes(18))
    empty = run("batch", "s3://replaced/all.zip", QUESTION, "-o", "other.jsonl")
    assert "s3://replaced/all.zip: no pictures in it" in empty.stderr
    server.client.put_object(Bucket="replaced", Key="all.zip", Body=b"text")
    text = run("batch", "s3://replaced/all.zip", QUESTION)
    assert (text.exit_code, text.stderr) == (65, "llava: s3://replaced/all.zip: neither an archive nor a table\n")


def test_one_picture_of_a_bucket_is_opened() -> None:
    assert open_picture("s3://album/photos/a.png").image.getpixel((0, 0)) == (50, 0, 99)
    with pytest.raises(InputMissing, match=r"s3://album/photos/none\.png: it is not there"):
        open_picture("s3://album/photos/none.png")
    assert looks_like_picture("s3://album/photos/without an ending")


def test_objects_in_lists_are_not_read(run: Run, server: s3.Server) -> None:
    """Their author must not choose among all that this user can read."""
    Path("q.jsonl").write_text(json.dumps({"image": "s3://album/photos/a.png", "question": QUESTION}) + "\n")
    Path("list.txt").write_text("s3://album/photos/a.png\n")
    for words in (["q.jsonl"], ["list.txt", QUESTION], ["q.jsonl", "--allow-urls"]):
        (row,) = rows_of(run("batch", *words).stdout)
        assert row["status"] == "error"
        assert row["error"]["message"] == "a bucket's objects in a list are not read"
    assert server.requests == []


def test_words() -> None:
    for url in ("s3://bucket/my photos", "GS://bucket", "hf://datasets/a/b", "az://c/what is this?"):
        assert split_question(["a.png", url]) == (["a.png", url], None)
    assert expand(["s3://b/{08..10}.zip"]) == ["s3://b/08.zip", "s3://b/09.zip", "s3://b/10.zip"]
    with pytest.raises(UsageError, match="a list in a bucket is not read") as raised:
        expand_url("s3://b/q.jsonl")
    assert raised.value.hint == "aws s3 cp s3://b/q.jsonl - | llava batch - …"


@for_each(
    ("url", "package"),
    [("gs://b/", "gcsfs"), ("az://b/", "adlfs"), ("s3://b/", "s3fs"), ("hf://b/", "huggingface_hub")],
)
def test_what_is_not_installed_is_named(url: str, package: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    find = cloud.importlib.util.find_spec
    monkeypatch.setattr(cloud.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    for words in (["batch", url, QUESTION], ["ask", url + "a.png", QUESTION]):
        result = run(*words)
        hint = "  pip install 'llava-cli[cloud]'\n"
        assert result.exit_code == 2
        assert result.stderr.endswith(f": needs {package}, which is not installed\n{hint}")


def test_other_services_are_listed_folder_by_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what all of fsspec's file systems have, here with the one that keeps files in memory."""
    files = fsspec.filesystem("memory", skip_instance_cache=True)
    for name, data in PHOTOS.items():
        files.pipe_file(f"/album/{name}", data)
    monkeypatch.setattr(cloud, "file_system", lambda protocol: files)
    service = cloud.Service("memory", "fsspec", "")
    monkeypatch.setitem(cloud.SERVICES, "gs", service)
    bucket = Bucket("gs:///album/photos")
    names = [entry.name for entry in bucket.entries()]
    taken = [name.removeprefix("photos/") for name in PHOTOS if name.endswith((".png", ".jpg", ".tif"))]
    assert names == sorted((n for n in taken if n[0] not in "._"), key=os.fsencode)
    assert bucket.read("with #? spaces.png") == PHOTOS["photos/with #? spaces.png"]
    with pytest.raises(InputMissing, match=r"none\.png: it is not there"):
        bucket.read("none.png")


def test_nothing_is_imported_unless_a_bucket_is_named() -> None:
    imports = "import sys; from llava_cli.batch import run; from llava_cli.batch.sources import source"
    code = f"{imports}; print([m for m in sys.modules if 'fsspec' in m])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_errors_of_all_libraries_are_one_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """By codes, classes and statuses, as botocore, Google's, Azure's and Hugging Face's libraries have them."""
    monkeypatch.setattr(limits, "REMOTE_SECONDS", 0.0)

    def error(name: str, **attributes: object) -> Exception:
        return type(name, (Exception,), attributes)("https://h/?X-Amz-Signature=secret")

    response = type("Response", (), {"status_code": 429})()
    table = {
        "access denied": error("HttpError", code=403),
        "it is not there": error("BlobError", status_code=404),
        "the credentials for it are refused": error("HttpResponseError", error_code="AuthenticationFailed"),
        "its server is busy or failing": error("HfHubHTTPError", response=response),
        "its server answers 418": error("Odd", status=418),
        "its server cannot be reached": error("ClientConnectorError"),
        "its server does not answer, or broke off": TimeoutError("secret"),
        "it cannot be read (Strange)": error("Strange"),
    }
    for reason, problem in table.items():

        def fail(problem: Exception = problem) -> None:
            raise problem

        with pytest.raises(LlavaError) as raised:
            Patience("s3://b/").call(fail, "a.png")
        assert raised.value.reason == reason
        assert "secret" not in str(raised.value) + raised.value.hint


def hub_at(url: str) -> cloud.Service:
    return cloud.Service("hf", "huggingface_hub", "hf auth login", {"endpoint": url})


def test_a_data_set_is_its_pictures_and_its_archives(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"README.md": b"", "train/cat/0.png": picture(1), "train/1.jpg": picture(2, "JPEG")}
    shards = {f"data/{name}": data for name, data in archives().items()}
    for contents, images in (
        (files, ["train/1.jpg", "train/cat/0.png"]),
        (shards, [f"hf://datasets/me/set/data/{image}" for image in SHARDED]),
        ({**files, **shards}, [f"hf://datasets/me/set/{i}" for i in ("train/1.jpg", "train/cat/0.png")]),
    ):
        with data_sets.serving("me/set", contents) as url:
            cloud.file_system.cache_clear()
            monkeypatch.setitem(cloud.SERVICES, "hf", hub_at(url))
            result = run("batch", "hf://datasets/me/set", QUESTION)
            rows = rows_of(result.stdout)
            assert [row["image"] for row in rows][: len(images)] == images, result.stderr
            assert all(row["status"] == "ok" for row in rows), rows
    with data_sets.serving("me/set", files) as url:
        cloud.file_system.cache_clear()
        monkeypatch.setitem(cloud.SERVICES, "hf", hub_at(url))
        missing = run("batch", "hf://datasets/me/other", QUESTION)
        assert (missing.exit_code, missing.stdout) == (66, "")
        assert missing.stderr == "llava: hf://datasets/me/other/: no such data set, or a private one\n  hf auth login\n"


SHARDED = [
    "all.zip/in/0.png",
    "all.zip/in/1.png",
    *(f"shard-00{shard}.tar/{n}.png" for shard in range(2) for n in range(2)),
]
