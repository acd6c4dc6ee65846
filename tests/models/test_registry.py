"""Names of models: what they mean, what is listed, where the Hub's cache is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command import Run
from helpers.homes import home
from helpers.tables import for_each

from llava_cli import files, limits
from llava_cli.models.aliases import ALIASES
from llava_cli.models.registry import builtin_folder, find, record_pulled
from llava_cli.speed import Speed


def on_disk(cache: Path, repo: str, weights: str = "model.safetensors") -> Path:
    """Puts a repo into a Hub cache, as huggingface_hub lays it out."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    shutil.copytree(builtin_folder(), snapshot)
    (snapshot / "model.safetensors").rename(snapshot / weights)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    return snapshot


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second of measuring is for tests of it alone."""
    speeds = dict.fromkeys(("fp32", "bf16", "8bit", "4bit"), Speed(1e11, 1e10))
    monkeypatch.setattr("llava_cli.catalog.speeds", lambda: speeds)


SIZE = f"{sum(f.stat().st_size for f in builtin_folder().iterdir()) / 1e6:.0f} MB"
HUB = "not on this machine (llava-hf/llava-1.5-7b-hf, 14.1 GB)"


def rows(run: Run) -> dict[str, list[str]]:
    result = run("models")
    assert (result.exit_code, result.stderr) == (0, "")
    found = [line.split("\t") for line in result.stdout.splitlines()]
    return {row[1]: row for row in found}


def test_the_list_has_the_built_in_model_and_every_alias(run: Run) -> None:
    found = rows(run)
    assert list(found) == ["builtin", *ALIASES]
    assert {len(row) for row in found.values()} == {9}
    assert found["builtin"][0] == "*"
    assert found["builtin"][2:4] == [SIZE, "yes"]
    assert found["llava-1.5-7b"][2:4] == ["14.1 GB", "-"]
    assert all(row[2].endswith((" GB", " MB")) for name, row in found.items() if name != "builtin")
    assert {row[4] for row in found.values()} <= {"bf16", "fp32", "8bit", "4bit", "no"}
    assert all((row[6] != "-") == (row[7] != "-") == (row[4] != "no") for row in found.values())
    assert run("models", "list").stdout == run("models").stdout


def test_an_alias_is_its_repo_on_disk(run: Run, home: Path) -> None:
    snapshot = on_disk(home / "hub/hub", ALIASES["llava-1.5-7b"].repo)
    assert find("llava-1.5-7b").folder == find("llava-hf/llava-1.5-7b-hf").folder == snapshot
    assert rows(run)["llava-1.5-7b"][3] == "yes"
    assert run("models", "default").stdout == "builtin\n", "what other tools fetched is nobody's choice"


@for_each("name", ["folder", "./folder", "../here/folder", "~/here/folder", "owner/name"], own=(home,))
def test_a_folder_is_itself(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = home / "here" / ("owner/name" if name == "owner/name" else "folder")
    shutil.copytree(builtin_folder(), folder)
    monkeypatch.chdir(home / "here")
    assert find(name).folder.resolve() == folder

    assert run("models", "default", name).exit_code == 0
    monkeypatch.chdir(home)
    chosen = run("models", "default").stdout.strip()
    assert chosen == str(folder), "a default folder is the same one from everywhere"
    assert rows(run)[chosen][:4] == ["*", chosen, SIZE, "yes"]
    assert rows(run)[chosen][5:] == [*rows(run)["builtin"][5:-1], ""], "the same weights"


def test_a_folder_does_not_hide_an_alias(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llava-1.5-7b").mkdir()
    (tmp_path / "builtin").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find("builtin").folder == builtin_folder()
    assert "not on this machine" in run("ask", "-m", "llava-1.5-7b", "x").stderr


@for_each(
    "name, reason, hint",
    [
        ("llava-1.5-7b", HUB, "llava models pull llava-1.5-7b"),
        ("owner/name", "not on this machine", "llava models pull owner/name"),
        ("llava-1.5-7", "unknown model", "did you mean llava-1.5-7b or llava-1.5-13b or llava-1.6-34b?"),
        ("bilt-in", "unknown model", "did you mean builtin?"),
        ("nothing-like-it", "unknown model", "llava models lists what there is"),
        ("./nowhere", "no such folder", ""),
        ("/no/where", "no such folder", ""),
        ("~/nowhere", "no such folder", ""),
        ("x" * 5000, "unknown model", "llava models lists what there is"),
    ],
)
def test_what_is_not_here(run: Run, name: str, reason: str, hint: str) -> None:
    for command in ("ask why? -m", "prompt why? -m", "models default"):
        result = run(*command.split(), name)
        assert (result.exit_code, result.stdout) == (69, "")
        assert result.stderr == f"llava: {name}: {reason}\n" + (f"  {hint}\n" if hint else "")


def test_a_folder_without_a_model_is_no_default(run: Run, tmp_path: Path) -> None:
    result = run("models", "default", tmp_path)
    assert result.exit_code == 69
    assert result.stderr.startswith(f"llava: {tmp_path}: no config.json in it")
    assert run("models", "default").stdout == "builtin\n"


@pytest.mark.parametrize("missing", ["model.safetensors", "model-00001-of-00002.safetensors"])
def test_a_snapshot_without_its_weights_is_not_on_disk(run: Run, home: Path, missing: str) -> None:
    """Other tools fetch a config alone, or are cut off."""
    snapshot = on_disk(home / "hub/hub", "owner/name", "model-00002-of-00002.safetensors")
    if missing != "model.safetensors":
        shards = {"a": missing, "b": "model-00002-of-00002.safetensors"}
        (snapshot / "model.safetensors.index.json").write_text(f'{{"weight_map": {shards}}}'.replace("'", '"'))
    result = run("ask", "-m", "owner/name", "why?")
    assert (result.exit_code, result.stderr) == (
        69,
        "llava: owner/name: not on this machine\n  llava models pull owner/name\n",
    )
    (snapshot / missing).touch()
    assert find("owner/name").folder == snapshot


BAD_REFS = [
    b"../../../outside",
    b"/outside",
    b"",
    b".",
    b"main",
    b"0" * 39,
    b"0" * 41,
    b"0" * 63,
    b"g" * 40,
    b"A" * 40,
    b"0" * 40 + b"/../../../../outside",
    b"0" * 40 + b"\0",
    b"0" * 40 + b"\n" + b"1" * 40,
    b"\xd9\xa0" * 40,  # digits, but not git's
    b"\xff\xfe",
    b"0" * 1000,
]


@for_each("ref", BAD_REFS, own=(home,))
def test_a_ref_that_names_no_commit(run: Run, home: Path, ref: bytes) -> None:
    """It would be a part of the path that a model is loaded from."""
    snapshot = on_disk(home / "hub/hub", "owner/name")
    shutil.copytree(snapshot, home / "outside")
    shutil.copytree(snapshot, home / "hub/hub/models--owner--name/outside")
    path = home / "hub/hub/models--owner--name/refs/main"
    path.write_bytes(ref)
    for command in ("ask why? -m", "prompt why? -m", "models default", "models show"):
        result = run(*command.split(), "owner/name")
        assert (result.exit_code, result.stdout) == (69, "")
        assert result.stderr == f"llava: owner/name: {path} does not contain a commit\n  llava models pull owner/name\n"
    (home / "data").mkdir()
    (home / "data" / "pulled").write_text("owner/name\n")
    assert rows(run)["owner/name"][2:4] == ["", "-"], "the list goes on"
    assert run("models", "default").stdout == "builtin\n"


@for_each("what", ["fifo", "folder", "endless", "link to an endless one"], own=(home,))
def test_a_ref_that_is_no_file(run: Run, home: Path, what: str) -> None:
    path = on_disk(home / "hub/hub", "owner/name").parent.parent / "refs" / "main"
    path.unlink()
    if what == "endless":
        path.write_text("0" * 40)
        os.truncate(path, 1 << 36)
    elif what == "link to an endless one":
        path.symlink_to("/dev/zero")
    else:
        {"fifo": os.mkfifo, "folder": os.mkdir}[what](path)
    result = run("models", "default", "owner/name")
    assert result.stderr == f"llava: owner/name: {path} does not contain a commit\n  llava models pull owner/name\n"


def test_commits_of_both_kinds(run: Run, home: Path) -> None:
    snapshot = on_disk(home / "hub/hub", "owner/name")
    assert len("0" * 40) < limits.COMMIT_BYTES
    for commit in ("0123456789abcdef" * 4, "c0ffee" * 6 + "c0ff"):
        snapshot = snapshot.rename(snapshot.with_name(commit))
        (snapshot.parent.parent / "refs" / "main").write_text(f"{commit}\n")
        assert find("owner/name").folder == snapshot


INDEXES = {
    "no names": '{"weight_map": {"a": 5, "b": null}}',
    "lists": '{"weight_map": {"a": ["x"]}}',
    "deep": '{"weight_map": ' + "[" * 100_000,
    "no map": '{"weight_map": [1]}',
    "number": "1",
    "digits": '{"weight_map": {"a": ' + "1" * 5000 + "}}",
    "too large": '{"weight_map": {"a": "' + "x" * 200_000 + '"}}',
    "out": '{"weight_map": {"a": "../../../../outside"}}',
}


@for_each("kind", INDEXES, own=(home,))
def test_an_index_that_is_odd_does_not_end_the_list(
    run: Run, home: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CONFIG_BYTES", 150_000)
    snapshot = on_disk(home / "hub/hub", ALIASES["llava-1.5-7b"].repo, "other.safetensors")
    (snapshot / "model.safetensors.index.json").write_text(INDEXES[kind])
    assert rows(run)["llava-1.5-7b"][3] == ("-" if kind == "out" else "yes")


def test_what_was_pulled_is_noted_for_its_owner_alone(home: Path) -> None:
    for name in ("owner/one", "owner/two", "owner/one"):
        record_pulled(name)
    path = home / "data" / "pulled"
    assert path.read_text() == "owner/one\nowner/two\n"
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    (home / "secret").write_text("mine\n")
    path.unlink()
    path.symlink_to(home / "secret")
    with pytest.raises(files.IsLink):
        record_pulled("owner/three")
    assert (home / "secret").read_text() == "mine\n"


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\0", b"\x1b[2J/x\n\x07owner/name\n"])
def test_a_list_of_what_was_pulled_that_is_odd(run: Run, home: Path, content: bytes) -> None:
    (home / "data").mkdir()
    (home / "data" / "pulled").write_bytes(content)
    listed = run("models").stdout
    assert all(line.replace("\t", "").isprintable() for line in listed.splitlines())


def test_a_list_of_what_was_pulled_without_an_end(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SETTINGS_BYTES", 100_000)
    (home / "data").mkdir()
    (home / "data" / "pulled").touch()
    os.truncate(home / "data" / "pulled", 1 << 36)
    assert list(rows(run)) == ["builtin", *ALIASES]


@for_each(
    "variables",
    [
        {},
        {"XDG_CACHE_HOME": "HOME/xdg"},
        {"HF_HOME": "HOME/hf", "XDG_CACHE_HOME": "HOME/xdg"},
        {"HF_HOME": "~/hf"},
        {"HF_HOME": "$PLACE/hf", "PLACE": "HOME/place"},
        {"HF_HOME": ""},
        {"HF_HUB_CACHE": "HOME/cache", "HF_HOME": "HOME/hf"},
        {"HF_HUB_CACHE": "~/$PLACE", "PLACE": "place"},
        {"HUGGINGFACE_HUB_CACHE": "HOME/old", "HF_HOME": "HOME/hf"},
        {"HUGGINGFACE_HUB_CACHE": "HOME/old", "HF_HUB_CACHE": "relative"},
    ],
    own=(home,),
)
def test_the_cache_is_where_huggingface_hub_has_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("HOME", str(home)))
    monkeypatch.chdir(home)
    theirs = [sys.executable, "-c", "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"]
    cache = Path(subprocess.run(theirs, capture_output=True, text=True, check=True).stdout.strip())
    snapshot = on_disk(cache, "owner/name")
    assert find("owner/name").folder == snapshot
