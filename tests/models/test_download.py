"""`llava models pull` against a Hub on this machine: what is fetched, what breaks, what goes on."""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Run, Shell
from helpers.homes import home
from helpers.hub import Hub, hub_hash, serving, shard
from helpers.tables import for_each
from helpers.terminal import Open
from typer.testing import Result

from llava_cli import limits
from llava_cli.models.registry import builtin_folder, find

NAME = "owner/tiny-llava"
AGAIN = f"\n  llava models pull {NAME}\n"
HALF = 11 * 2**20
"""Where a connection breaks: most of the weights, past the 10 MB that huggingface_hub writes at once."""


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """What the Hub has: the built-in model, with what real repos have beside it."""
    folder = tmp_path / "repo"
    shutil.copytree(builtin_folder(), folder)
    (folder / "modeling_tiny.py").write_text("raise SystemExit('code of a model was run')")
    (folder / "README.md").write_text("# A model\n")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bytes(2_000_000))
    return folder


@pytest.fixture
def hub(repo: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub({NAME: repo})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub
    shutil.rmtree(home, ignore_errors=True)  # some 10 MB a test


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """`run`, with huggingface_hub silent as in `main`, and its constants, set on import, read anew each time."""
    from huggingface_hub import constants, logging

    logging.set_verbosity(logging.CRITICAL)

    def invoke(*args: str | Path) -> Result:
        importlib.reload(constants)
        return run(*args)

    yield invoke
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    importlib.reload(constants)


def fails(done: Result, code: int, *says: str) -> None:
    """One line about the model and at most one hint, nothing else; `says` is in them."""
    first, *hint = done.stderr.splitlines()
    assert done.exit_code == code, done.stderr
    assert done.stdout == ""
    assert first.startswith("llava: ")
    assert len(hint) <= 1 and all(line.startswith("  ") for line in hint), done.stderr
    for words in says:
        assert words in done.stderr


def test_a_pulled_model_answers_without_the_hub(shell: Shell, hub: Hub, home: Path, drawing: Path) -> None:
    done = shell("models", "pull", NAME)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b""
    where, next_command = done.stderr.decode().splitlines()
    folder = home / "hub/hub/models--owner--tiny-llava/snapshots" / hub.commit
    assert where == f"{NAME} is in {folder}"
    assert next_command == f'  llava ask -m {NAME} img.jpg "what is this?"'
    card = {"README.md"}  # for people; not fetched
    assert {path.name for path in folder.iterdir()} == {path.name for path in builtin_folder().iterdir()} - card
    assert {path.name for path in folder.iterdir()} == hub.files()

    hub.down = True
    asked = shell("ask", "-m", NAME, drawing, "what is this?", "--max-tokens", "2", "--json")
    assert asked.returncode == 0, asked.stderr.decode()
    assert f'"model": "{NAME}"' in asked.stdout.decode()
    assert asked.stderr == b""


def test_a_pulled_model_is_the_default_until_another_is_set(run: Run, hub: Hub, home: Path) -> None:
    assert run("models", "default").stdout == "builtin\n"
    assert run("models", "pull", NAME).exit_code == 0
    assert run("models", "default").stdout == f"{NAME}\n"
    hub.repos["owner/second"] = hub.repos[NAME]
    assert run("models", "pull", "owner/second").exit_code == 0
    assert run("models", "default").stdout == f"{NAME}\n"
    listed = [line.split("\t") for line in run("models").stdout.splitlines()]
    assert [row[:2] + row[3:4] for row in listed if "/" in row[1]] == [
        ["*", NAME, "yes"],
        [" ", "owner/second", "yes"],
    ]
    (home / "config.toml").write_text("# mine\nseed = 7  # lucky\n")
    assert run("models", "default", "owner/second").exit_code == 0
    assert run("models", "default").stdout == "owner/second\n"
    assert (home / "config.toml").read_text() == '# mine\nseed = 7  # lucky\nmodel = "owner/second"\n'


def test_a_broken_pull_says_so_and_the_next_one_goes_on(run: Run, hub: Hub, repo: Path, drawing: Path) -> None:
    hub.breaks_after = HALF
    fails(run("models", "pull", NAME), 69, f"llava: {NAME}: the download broke off (", AGAIN)

    assert run("models", "default").stdout == "builtin\n"
    assert NAME not in run("models").stdout
    asked = run("ask", "-m", NAME, drawing, "what is this?")
    assert (asked.exit_code, asked.stdout) == (69, "")
    assert asked.stderr == f"llava: {NAME}: not on this machine\n  llava models pull {NAME}\n"

    before = len(hub.requests)
    hub.breaks_after, hub.down = None, False
    assert run("models", "pull", NAME).exit_code == 0
    again = [r for r in hub.requests[before:] if r.sent and not r.path.startswith("/api/")]
    assert [r.path.rsplit("/", 1)[1] for r in again] == ["model.safetensors"], "small files were fetched twice"
    assert again[0].begins_at == 10 * 2**20
    assert again[0].sent == (repo / "model.safetensors").stat().st_size - again[0].begins_at
    assert run("models", "default").stdout == f"{NAME}\n"


def test_a_hub_that_cannot_resume_sends_it_all_again(run: Run, hub: Hub) -> None:
    hub.breaks_after = HALF
    assert run("models", "pull", NAME).exit_code == 69
    hub.breaks_after, hub.down, hub.knows_ranges = None, False, False
    assert run("models", "pull", NAME).exit_code == 0
    assert run("models", "default").stdout == f"{NAME}\n"


def test_one_pull_outlives_a_hiccup(shell: Shell, hub: Hub) -> None:
    hub.hiccups_after = HALF
    done = shell("models", "pull", NAME)
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 2
    assert [r.begins_at for r in hub.fetched("model.safetensors")] == [0, 10 * 2**20]


def is_under_way(home: Path) -> bool:
    """Once the first 10 MB are in a file. Meanwhile others come, and go."""
    try:
        return any(part.stat().st_size >= 10 * 2**20 for part in home.rglob("*.incomplete"))
    except FileNotFoundError:
        return False


@for_each("by, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)], own=(repo, home, hub))
def test_an_interrupted_pull_goes_on(run: Run, hub: Hub, home: Path, by: signal.Signals, code: int) -> None:
    hub.hangs_after = HALF
    command = [sys.executable, "-m", "llava_cli", "models", "pull", NAME]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as pulling:
        while not is_under_way(home):
            assert pulling.poll() is None
            hub.go_on.wait(0.02)
        pulling.send_signal(by)
        said = pulling.communicate(timeout=60)[1].decode()
    hub.hangs_after = None
    assert pulling.returncode == code, said
    assert "Traceback" not in said
    assert run("models", "pull", NAME).exit_code == 0
    assert hub.fetched("model.safetensors")[-1].begins_at == 10 * 2**20


def test_pulling_again_fetches_nothing(run: Run, hub: Hub) -> None:
    assert run("models", "pull", NAME).exit_code == 0
    hub.requests.clear()
    assert run("models", "pull", NAME).exit_code == 0
    assert hub.files() == set()


@for_each(
    "file, damage",
    [("model.safetensors", b""), ("config.json", b"{}"), ("tokenizer.json", b"x")],
    own=(repo, home, hub),
)
def test_pulling_again_repairs_damaged_files(
    run: Run, hub: Hub, repo: Path, drawing: Path, file: str, damage: bytes
) -> None:
    assert run("models", "pull", NAME).exit_code == 0
    cache = Path(os.environ["HF_HOME"], "hub/models--owner--tiny-llava/snapshots", hub.commit)
    blob = (cache / file).resolve()
    blob.write_bytes(damage + blob.read_bytes()[len(damage) + 1 :])
    broken = run("ask", "-m", NAME, drawing, "what is this?")
    assert (broken.exit_code, broken.stdout) == (69, "")
    assert broken.stderr.endswith(AGAIN)
    hub.requests.clear()
    assert run("models", "pull", NAME).exit_code == 0
    assert hub.files() == {file}
    assert (cache / file).read_bytes() == (repo / file).read_bytes()


def test_what_arrives_damaged_is_not_kept(run: Run, hub: Hub) -> None:
    hub.garbles = True
    fails(run("models", "pull", NAME), 69, "model.safetensors arrived damaged", AGAIN)
    assert NAME not in run("models").stdout
    hub.garbles = False
    assert run("models", "pull", NAME).exit_code == 0


def test_a_mirror_that_tells_no_hashes(run: Run, hub: Hub) -> None:
    hub.tells_hashes = False
    done = run("models", "pull", NAME)
    assert done.exit_code == 0
    assert len(done.stderr.splitlines()) == 2
    assert run("models", "default").stdout == f"{NAME}\n"
    hub.requests.clear()
    assert run("models", "pull", NAME).exit_code == 0
    assert hub.files() == set()


def test_a_part_that_is_longer_than_the_file_is_thrown_away(run: Run, hub: Hub, home: Path) -> None:
    hub.breaks_after = HALF
    assert run("models", "pull", NAME).exit_code == 69
    (part,) = home.rglob("*.incomplete")
    part.write_bytes(bytes(20_000_000))
    hub.breaks_after, hub.down = None, False
    fails(run("models", "pull", NAME), 69, "model.safetensors arrived damaged", AGAIN)
    assert run("models", "pull", NAME).exit_code == 0


def test_a_terminal_gets_one_bar(hub: Hub, home: Path, terminal: Open) -> None:
    child = terminal("models", "pull", NAME)
    assert child.leave() == 0
    said = child.before or ""
    assert re.search(r"(\d+\.\d)/\1 MB", said)
    assert "model.safetensors" not in said


def test_an_update_that_breaks_leaves_the_old_model_usable(run: Run, hub: Hub, repo: Path) -> None:
    assert run("models", "pull", NAME).exit_code == 0
    weights = repo / "model.safetensors"
    new = weights.read_bytes()[:-1] + b"\x01"
    weights.unlink()
    weights.write_bytes(new)
    hub.commit, hub.breaks_after = "d0d0" * 10, HALF
    assert run("models", "pull", NAME).exit_code == 69
    assert run("models", "default").stdout == f"{NAME}\n"
    hub.breaks_after, hub.down = None, False
    done = run("models", "pull", NAME)
    assert done.stderr.splitlines()[0].endswith(hub.commit)


def test_the_users_token_goes_to_the_hub_alone(run: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert run("models", "pull", NAME).exit_code == 0
    assert {r.token for r in hub.requests if NAME in r.path and "/cdn/" not in r.path} == {"Bearer hf_secret"}
    assert {r.token for r in hub.requests if r.path.startswith("/cdn/")} == {None}


def test_shards_are_pulled(run: Run, hub: Hub, repo: Path) -> None:
    from llava_cli.models.weight_files import check_weights

    shard(repo)
    hub.breaks_after = 1000
    assert run("models", "pull", NAME).exit_code == 69
    assert NAME not in run("models").stdout
    hub.breaks_after, hub.down = None, False
    assert run("models", "pull", NAME).exit_code == 0
    assert len(check_weights(find(NAME))) == 3


# ---------------------------------------------------------------- what cannot be pulled


def test_only_pickles_are_refused_before_any_download(run: Run, hub: Hub, repo: Path) -> None:
    (repo / "model.safetensors").unlink()
    fails(run("models", "pull", NAME), 69, f"llava: {NAME}: ", "safetensors", "pickle")
    assert hub.files() == set()


def test_an_unknown_repo(run: Run, hub: Hub) -> None:
    fails(run("models", "pull", "owner/nothing"), 69, "llava: owner/nothing: the Hub has no such model")


def test_a_gated_repo(run: Run, hub: Hub) -> None:
    hub.gated = True
    fails(run("models", "pull", NAME), 69, f"llava: {NAME}: needs its owner's permission", "hf auth login")
    assert hub.files() == set()


def test_a_hub_that_is_broken(run: Run, hub: Hub) -> None:
    hub.down = True
    fails(
        run("models", "pull", NAME),
        69,
        f"llava: {NAME}: the Hub cannot be reached (",
        "503",
        f"  llava models pull {NAME}",
    )


@for_each(
    "variable, value",
    [("HF_ENDPOINT", "http://127.0.0.1:9"), ("HF_ENDPOINT", "nonsense"), ("HF_HUB_OFFLINE", "1")],
    own=(repo, home, hub),
)
def test_no_hub_at_all(run: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    fails(run("models", "pull", NAME), 69, f"llava: {NAME}: the Hub cannot be reached (", f"  llava models pull {NAME}")


def test_what_answers_is_no_hub(run: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log-in page of a hotel's network answers everything with 200 and HTML."""
    hub.page = b"<html>Welcome! Log in to go online.</html>"
    fails(run("models", "pull", NAME), 69, f"llava: {NAME}: the Hub cannot be reached (")


@for_each("name", ["a/b/c", "owner/na me", "owner/..", "https://huggingface.co/" + NAME], own=(repo, home, hub))
def test_names_that_no_repo_can_have(run: Run, hub: Hub, name: str) -> None:
    fails(run("models", "pull", name), 69, f"llava: {name}: ")


def test_an_unknown_name_gives_close_ones(run: Run) -> None:
    result = run("models", "pull", "llava-1.5-7")
    assert (result.exit_code, result.stdout) == (69, "")
    assert result.stderr.startswith("llava: llava-1.5-7: unknown model\n  did you mean llava-1.5-7b or ")
    assert run("models", "pull", "nosuchname").stderr == (
        "llava: nosuchname: unknown model\n  llava models lists what there is\n"
    )


@pytest.mark.parametrize("name", ["builtin", "repo"])
def test_what_is_here_already_is_not_asked_for(
    run: Run, hub: Hub, repo: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(repo.parent)
    done = run("models", "pull", name)
    assert done.exit_code == 0, done.stderr
    assert f"llava ask -m {name} " in done.stderr
    assert hub.requests == []


# ---------------------------------------------------------------- what a Hub may not say


def everything(folder: Path) -> dict[str, bytes | str]:
    """All that there is, links by what they lead to."""
    found = {
        path: os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes() for path in walk(folder)
    }
    return {str(path.relative_to(folder)): content for path, content in found.items() if content is not False}


def walk(folder: Path) -> Iterator[Path]:
    yield from (Path(where, name) for where, folders, names in os.walk(folder) for name in (*folders, *names))


COMMITS = [
    "../../../../outside",
    "/outside",
    "..",
    "",
    "main",
    "c0ffee",
    "C0FFEE" * 6 + "C0FF",
    "c0ffee" * 6 + "c0f/",
    "c0ffee" * 6 + "c0ff\n",
    "c0ffee" * 6 + "c0ff/../../../../outside",
    "\u0661" * 40,
    None,
    7,
    ["c0ffee" * 6 + "c0ff"],
]


@for_each("commit", COMMITS, own=(repo, home, hub))
def test_a_commit_that_is_none(run: Run, hub: Hub, home: Path, commit: Any) -> None:
    """It would be a part of the path that files are written to."""
    hub.lies = lambda info: {**info, "sha": commit}
    fails(run("models", "pull", NAME), 69, f"llava: {NAME}: the Hub gives no commit for it, but ")
    assert everything(home) == {}


NAMES = [
    "..\\..\\outside.json",
    "C:\\outside.json",
    "c:outside.json",
    "outside.json:stream.json",
    ".hidden.json",
    "..json",
    "a\nb.json",
    "a\0b.json",
    "\x1b[2J.json",
    "\u202egnp.json",
    "CON.json",
    "aux .json",
    "com1.tar.json",
    "LPT\u00b9.json",
    "x" * 300 + ".json",
]


@for_each("file", NAMES, own=(repo, home, hub))
def test_a_name_that_is_none(run: Run, hub: Hub, home: Path, file: str) -> None:
    hub.lies = lambda info: {
        **info,
        "siblings": [*info["siblings"], {"rfilename": file, "size": 1, "blobId": "0" * 40}],
    }
    done = run("models", "pull", NAME)
    fails(done, 69, f"llava: {NAME}: ", "is not a file name")
    assert done.stderr.replace("\n", "").isprintable() and len(done.stderr) < 300
    assert everything(home) == {}


@for_each(
    "file",
    ["../outside.json", "/outside.json", "a/../../outside.json", "onnx/model.safetensors"],
    own=(repo, home, hub),
)
def test_what_is_in_a_folder_is_not_fetched(run: Run, hub: Hub, home: Path, file: str) -> None:
    hub.lies = lambda info: {
        **info,
        "siblings": [*info["siblings"], {"rfilename": file, "size": 1, "blobId": "0" * 40}],
    }
    assert run("models", "pull", NAME).exit_code == 0
    assert not any("outside" in name for name in everything(home.parent))


HASHES = ["../../../outside", "/outside", "", "0" * 39, "0" * 41, "g" * 40, "A" * 40, "0" * 64, 7, ["0" * 40], {}]


@for_each("digest, big", itertools.product(HASHES, [False, True]), own=(repo, home, hub))
def test_a_hash_that_is_none(run: Run, hub: Hub, home: Path, big: bool, digest: Any) -> None:
    if big and digest == "0" * 64:
        digest = "0" * 40

    def lies(info: dict[str, Any]) -> dict[str, Any]:
        for file in info["siblings"]:
            if big and "lfs" in file:
                file["lfs"]["sha256"] = digest
            elif file["rfilename"] == "config.json" and not big:
                file["blobId"] = digest
        return info

    hub.lies = lies
    file = "model.safetensors" if big else "config.json"
    fails(run("models", "pull", NAME), 69, f"llava: {NAME}: {file} has no such hash as ")
    assert everything(home) == {}


SIZES = [-1, -(10**18), 10**18 + 1, 10**400, 1.5, 1e300, "5", True, [], {}]


@for_each("size", SIZES, own=(repo, home, hub))
def test_a_size_that_is_none(run: Run, hub: Hub, home: Path, size: Any) -> None:
    assert limits.HUB_FILE_BYTES == 10**18

    def lies(info: dict[str, Any]) -> dict[str, Any]:
        next(file for file in info["siblings"] if file["rfilename"] == "config.json")["size"] = size
        return info

    hub.lies = lies
    done = run("models", "pull", NAME)
    fails(done, 69, f"llava: {NAME}: config.json cannot have ")
    assert len(done.stderr) < 300
    assert everything(home) == {}


LISTS = {
    "a list": lambda info: [info],
    "nothing": lambda info: None,
    "a number": lambda info: 5,
    "no files": lambda info: {**info, "siblings": None},
    "one file": lambda info: {**info, "siblings": info["siblings"][0]},
}


@for_each("kind", LISTS, own=(repo, home, hub))
def test_a_list_of_files_that_is_none(run: Run, hub: Hub, home: Path, kind: str) -> None:
    hub.lies = LISTS[kind]
    fails(run("models", "pull", NAME), 69, f"llava: {NAME}: the Hub ")
    assert everything(home) == {}


def test_files_that_are_none_are_passed_over(run: Run, hub: Hub) -> None:
    hub.lies = lambda info: {**info, "siblings": [None, 5, "x.json", [], {}, {"rfilename": 5}, *info["siblings"]]}
    assert run("models", "pull", NAME).exit_code == 0


@for_each("status", [200, 404, 500], own=(repo, home, hub))
def test_a_list_of_files_without_an_end(
    run: Run, hub: Hub, home: Path, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it comes with an error, whose words are of interest to nobody."""
    monkeypatch.setattr(limits, "HUB_REPLY_BYTES", 1_000_000)
    hub.endless, hub.endless_status = (NAME,), status
    said = "the Hub's list of its files is larger than 1 MB" if status == 200 else f"({status} "
    fails(run("models", "pull", NAME), 69, f"llava: {NAME}: ", said)
    assert everything(home) == {}


def nested(depth: int) -> Any:
    return functools.reduce(lambda inner, _: [inner], range(depth), 0)


@pytest.mark.parametrize("kind", ["items", "depth"])
def test_a_list_of_files_that_is_too_much(run: Run, hub: Hub, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "JSON_ITEMS", 1000)
    value, said = {
        "items": ([0] * 1000, "more than 1,000 values"),
        "depth": (nested(limits.JSON_DEPTH), "nested deeper than 64 levels"),
    }[kind]
    hub.lies = lambda info: {**info, "x": value}
    fails(run("models", "pull", NAME), 69, f"llava: {NAME}: the Hub's list of its files is {said}")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_file_without_an_end(run: Run, hub: Hub, repo: Path, home: Path, file: str) -> None:
    """No more of it is written than was said to come."""
    hub.endless = (f"/{file}",)
    size = (repo / file).stat().st_size
    fails(run("models", "pull", NAME), 69, f"llava: {NAME}: {file} is larger than the {size:,} bytes", AGAIN)
    assert all(path.stat().st_size == 0 for path in home.rglob("*.incomplete"))
    assert NAME not in run("models").stdout
    hub.endless = ()
    assert run("models", "pull", NAME).exit_code == 0


def test_a_file_without_an_end_that_comes_with_an_error(run: Run, hub: Hub, home: Path) -> None:
    hub.endless, hub.endless_status = ("/config.json",), 500
    fails(run("models", "pull", NAME), 69, f"llava: {NAME}: the download broke off (500 ", AGAIN)


def test_a_file_without_an_end_of_a_mirror_that_tells_no_sizes(
    run: Run, hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "UNSIZED_FILE_BYTES", 20_000_000)
    hub.tells_hashes, hub.endless = False, ("/config.json",)
    fails(run("models", "pull", NAME), 69, f"llava: {NAME}: config.json is larger than the 20,000,000 bytes", AGAIN)
    assert not any(path.is_file() and path.stat().st_size > 1_000_000 for path in walk(home))


@for_each("claim", [0, 1, 5_000_000], own=(repo, home, hub))
def test_a_file_that_is_larger_than_was_said(run: Run, hub: Hub, repo: Path, claim: int) -> None:
    hub.claims["model.safetensors"] = claim
    fails(run("models", "pull", NAME), 69, f"llava: {NAME}: model.safetensors ", AGAIN)
    assert NAME not in run("models").stdout


def test_a_file_that_is_smaller_than_was_said(run: Run, hub: Hub, repo: Path) -> None:
    size = (repo / "model.safetensors").stat().st_size
    hub.claims["model.safetensors"] = size + 5
    said = f"the download broke off ({size:,} of {size + 5:,} bytes came)"
    fails(run("models", "pull", NAME), 69, f"llava: {NAME}: {said}", AGAIN)


def test_what_is_packed_is_not_unpacked(run: Run, hub: Hub) -> None:
    hub.packs = True
    fails(run("models", "pull", NAME), 69, f"llava: {NAME}: the Hub cannot be reached (the response is compressed")


def test_what_comes_with_a_file_says_nothing_of_its_place(run: Run, hub: Hub, home: Path) -> None:
    """Commit and hash are those of the list."""
    hub.headers = {"ETag": '"../../../outside"', "X-Repo-Commit": "../../../outside", "X-Linked-ETag": '"../outside"'}
    for tells in (True, False):
        hub.tells_hashes = tells
        assert run("models", "pull", NAME).exit_code == 0
        assert not any("outside" in name for name in everything(home.parent))
        shutil.rmtree(home / "hub")


def test_the_cache_is_as_other_tools_have_it(run: Run, hub: Hub, home: Path, repo: Path) -> None:
    """Files are links to their bytes, which are named by their hash."""
    from huggingface_hub import try_to_load_from_cache

    assert run("models", "pull", NAME).exit_code == 0
    cache = home / "hub/hub"
    for path in (cache / "models--owner--tiny-llava/snapshots" / hub.commit).iterdir():
        assert re.fullmatch(r"\.\./\.\./blobs/([0-9a-f]{40}|[0-9a-f]{64})", os.readlink(path))
        assert path.read_bytes() == (repo / path.name).read_bytes()
        assert try_to_load_from_cache(NAME, path.name, cache, "main") == str(path)


@for_each("place", ["blobs", "snapshots", "refs", "snapshots/COMMIT", "refs/main"], own=(repo, home, hub))
def test_a_link_planted_in_the_cache_is_not_written_through(run: Run, hub: Hub, home: Path, place: str) -> None:
    cache, outside = home / "hub/hub/models--owner--tiny-llava", home / "outside"
    link = cache / place.replace("COMMIT", hub.commit)
    link.parent.mkdir(parents=True)
    outside.mkdir()
    for name in ("config.json", "main", hub.commit):
        (outside / name).write_text("mine")
    link.symlink_to(outside / "main" if place == "refs/main" else outside)
    before = everything(outside)
    fails(run("models", "pull", NAME), 74, f"llava: {link}: is a link to {outside}")
    assert everything(outside) == before


@for_each("kind", ["file", "part", "lock"], own=(repo, home, hub))
def test_a_link_in_the_place_of_a_file_is_not_written_through(
    run: Run, hub: Hub, home: Path, repo: Path, kind: str
) -> None:
    """Of a file in the cache it is taken away, and what it leads to is left as it is."""
    cache, blob = home / "hub/hub/models--owner--tiny-llava", hub_hash(repo / "config.json")
    link = {
        "file": cache / "snapshots" / hub.commit / "config.json",
        "part": cache / "blobs" / f"{blob}.incomplete",
        "lock": home / "hub/hub/.locks/models--owner--tiny-llava" / f"{blob}.lock",
    }[kind]
    link.parent.mkdir(parents=True)
    (home / "secret").write_text("mine")
    link.symlink_to(home / "secret")
    done = run("models", "pull", NAME)
    if kind == "file":
        assert done.exit_code == 0
    else:
        fails(done, 74, f"llava: {link}: is a link to {home / 'secret'}")
    assert (home / "secret").read_text() == "mine"


def test_a_cache_on_another_disk(run: Run, hub: Hub, home: Path) -> None:
    """The user may have linked a model's folder there."""
    (home / "disk").mkdir()
    (home / "hub/hub").mkdir(parents=True)
    (home / "hub/hub/models--owner--tiny-llava").symlink_to(home / "disk")
    assert run("models", "pull", NAME).exit_code == 0
    assert run("models", "default").stdout == f"{NAME}\n"


# ---------------------------------------------------------------- disks


def test_a_cache_that_is_a_file(run: Run, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file"))
    fails(run("models", "pull", NAME), 74, str(tmp_path / "file"))


@for_each("in_the_way", ["blobs", "snapshots", "refs"], own=(repo, home, hub))
def test_a_file_where_a_folder_should_be(run: Run, hub: Hub, home: Path, in_the_way: str) -> None:
    cache = home / "hub/hub/models--owner--tiny-llava"
    cache.mkdir(parents=True)
    (cache / in_the_way).touch()
    fails(run("models", "pull", NAME), 74, str(cache))


def test_a_list_of_models_that_cannot_be_written(run: Run, hub: Hub, home: Path) -> None:
    (home / "data").touch()
    done = run("models", "pull", NAME)
    assert done.exit_code == 0
    assert done.stderr.endswith(f"\nnot noted as pulled, for nothing can be kept in {home / 'data'}\n")


def test_a_disk_that_fills_up(run: Run, hub: Hub, home: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, limits[1]))
    try:
        done = run("models", "pull", NAME)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    fails(done, 74, str(home), AGAIN)


def test_a_model_that_the_disk_has_no_room_for(run: Run, hub: Hub, home: Path) -> None:
    hub.claims["model.safetensors"] = 10**17
    fails(run("models", "pull", NAME), 74, str(home), "needs 100000000.0 GB")
    assert hub.files() == set()
