"""Flag, else environment, else config file, else default; and who is named when a value does not fit."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Run
from helpers.faults import give_away
from helpers.homes import home
from helpers.tables import for_each

from llava_cli import limits
from llava_cli.errors import UsageError
from llava_cli.settings import LoadOptions, Sampling, Settings, set_default_model

Configure = Callable[[str], Path]


@pytest.fixture
def configure(home: Path) -> Configure:
    def write(text: str) -> Path:
        (home / "config.toml").write_text(text, "utf-8")
        return home / "config.toml"

    return write


@for_each(
    "field, default, in_file, in_environment, flag",
    [
        ("model", None, ('"a"', "a"), ("b", "b"), "c"),
        ("precision", "auto", ('"fp32"', "fp32"), ("bf16", "bf16"), "4bit"),
        ("device", "auto", ('"cpu"', "cpu"), ("cuda", "cuda"), "mps"),
        ("template", None, ('"a"', "a"), ("b.jinja", "b.jinja"), "c"),
        ("fit", "auto", ('"pad"', "pad"), ("crop", "crop"), "auto"),
        ("visual_tokens", None, ("64", 64), ("32", 32), 8),
        ("system", None, ('"Be brief."', "Be brief."), ("Rhyme.", "Rhyme."), ""),
        ("max_tokens", 512, ("1", 1), ("2", 2), 3),
        ("temperature", 0.0, ("1", 1.0), ("0.5", 0.5), 0.0),
        ("top_p", 1.0, ("0.9", 0.9), ("1", 1.0), 0.5),
        ("seed", None, ("0", 0), ("-1", -1), 0),
        ("stop", (), ('["\\n", "."]', ("\n", ".")), ("END", ("END",)), ["x", "y"]),
        ("stop", (), ('"one"', ("one",)), ("END", ("END",)), ["x"]),
    ],
    own=(home, configure),
)
def test_the_nearer_source_wins(
    monkeypatch: pytest.MonkeyPatch,
    configure: Configure,
    field: str,
    default: Any,
    in_file: tuple[str, Any],
    in_environment: tuple[str, Any],
    flag: Any,
) -> None:
    def found(**flags: Any) -> Any:
        settings = Settings.resolve(**flags)
        group = next(one for one in (settings, settings.load, settings.sampling) if field in one.names())
        value = getattr(group, field)
        assert type(value) is not int or not isinstance(default, float), "a float field holds a float"
        return value

    variable = f"LLAVA_{field.upper()}"
    assert found() == default
    configure(f"{field} = {in_file[0]}\n")
    assert found() == found(**{field: None}) == in_file[1]
    monkeypatch.setenv(variable, in_environment[0])
    assert found() == in_environment[1]
    assert found(**{field: flag}) == (tuple(flag) if isinstance(flag, list) else flag)
    monkeypatch.setenv(variable, "")
    assert found() == in_file[1], "an empty variable is none"


@pytest.mark.parametrize("nothing", [None, []])
def test_a_flag_that_was_not_given_leaves_the_stops(configure: Configure, nothing: Any) -> None:
    configure('stop = ["."]')
    assert Settings.resolve(stop=nothing).sampling.stop == (".",)


BAD = [
    ("precision", '"fp8"', "'fp8' is not one of auto, fp32, bf16, fp16, 8bit, 4bit"),
    ("device", '"tpu"', "'tpu' is not one of auto, cpu, cuda, mps"),
    ("fit", '"squash"', "'squash' is not one of auto, pad, crop"),
    ("max_tokens", '"many"', "'many' is not a whole number"),
    ("max_tokens", "0", "0 is not between 1 and 1000000"),
    ("max_tokens", "1.5", "1.5 is not a whole number"),
    ("temperature", '"hot"', "'hot' is not a number"),
    ("temperature", "-1", "-1.0 is not between 0 and 10"),
    ("temperature", "nan", "nan is not between 0 and 10"),
    ("temperature", "inf", "inf is not between 0 and 10"),
    ("top_p", "0", "0.0 is not between 0.0001 and 1"),
    ("top_p", "2", "2.0 is not between 0.0001 and 1"),
    ("seed", '"x"', "'x' is not a whole number"),
    ("visual_tokens", "0", "0 is not between 1 and 1000000"),
]


@for_each("field, value, reason", BAD)
def test_a_bad_variable_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, field: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(f"LLAVA_{field.upper()}", value.strip('"'))
    result = run("ask", "why?")
    quoted = reason.replace("1.5", "'1.5'") if value == "1.5" else reason
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"llava: LLAVA_{field.upper()}: {quoted}\n"


@for_each(
    "field, value, reason",
    [
        *BAD,
        ("max_tokens", "inf", "inf is not a whole number"),
        ("temperature", f"1{'0' * 400}", f"1{'0' * 400} is not a number"),
        ("max_tokens", "true", "True is not a whole number"),
        ("max_tokens", "[1]", "[1] is not a whole number"),
        ("seed", "1979-05-27", "datetime.date(1979, 5, 27) is not a whole number"),
        ("temperature", "false", "False is not a number"),
        ("model", "1", "1 is not text"),
        ("system", '["a"]', "['a'] is not text"),
        ("stop", "1", "1 is not text or a list of texts"),
        ("stop", '["a", 2]', "['a', 2] is not text or a list of texts"),
        ("precision", "16", "16 is not one of auto, fp32, bf16, fp16, 8bit, 4bit"),
        ("precision", '["fp32"]', "['fp32'] is not one of auto, fp32, bf16, fp16, 8bit, 4bit"),
    ],
    own=(home, configure),
)
def test_a_bad_key_is_named(run: Run, configure: Configure, field: str, value: str, reason: str) -> None:
    path = configure(f"{field} = {value}\n")
    result = run("ask", "why?")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"llava: {path}: {field}: {reason}\n"


@for_each(
    "flag, value, reason",
    [
        ("--max-tokens", "0", "0 is not between 1 and 1000000"),
        ("--temperature", "-1", "-1.0 is not between 0 and 10"),
        ("--temperature", "nan", "nan is not between 0 and 10"),
        ("--top-p", "1.5", "1.5 is not between 0.0001 and 1"),
        ("--visual-tokens", "0", "0 is not between 1 and 1000000"),
        ("--visual-tokens", "half", "not a valid int"),
        ("--precision", "fp8", "fp8"),
        ("--device", "tpu", "tpu"),
        ("--fit", "squash", "squash"),
        ("--max-tokens", "many", "not a valid int"),
        ("--seed", "x", "not a valid int"),
        ("--seed", "18446744073709551616", "18446744073709551616 is not between"),
    ],
)
def test_a_bad_flag_is_named(shell: Any, flag: str, value: str, reason: str) -> None:
    done = shell("ask", flag, value, "why?")
    said = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout) == (2, b"")
    assert said[0].startswith("llava") and flag in said[0] and reason in said[0]
    assert all(line.startswith("  ") for line in said[1:])


@pytest.mark.parametrize(
    "flag, variable", [("--max-tokens", "LLAVA_MAX_TOKENS"), ("--temperature", "LLAVA_TEMPERATURE")]
)
def test_a_good_flag_does_not_hide_a_bad_variable(
    run: Run, monkeypatch: pytest.MonkeyPatch, flag: str, variable: str
) -> None:
    monkeypatch.setenv(variable, "nonsense")
    assert run("ask", flag, "1", "why?").stderr.startswith(f"llava: {variable}: ")


def test_an_unknown_key_is_named(run: Run, configure: Configure) -> None:
    path = configure("max-tokens = 3\n")
    result = run("ask", "why?")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(
        f"llava: {path}: unknown key 'max-tokens'\n  the keys are: max_tokens, temperature, "
    )


@for_each(
    "damage, command",
    itertools.product(
        [b"model = \n", b"[", b"model = 'a'\nmodel = 'b'\n", b"\xff\xfe", b"\x00"],
        ["ask why?", "models", "models default", "models default builtin", "doctor"],
    ),
    own=(home,),
)
def test_a_config_that_is_no_toml(run: Run, home: Path, damage: bytes, command: str) -> None:
    path = home / "config.toml"
    path.write_bytes(damage)
    result = run(*command.split())
    assert (result.exit_code, result.stdout) == (2, "")
    first, hint = result.stderr.splitlines()
    assert first.startswith(f"llava: {path}: ")
    assert hint == "  repair or delete that file"
    assert path.read_bytes() == damage


def test_a_config_that_cannot_be_read_or_written(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = home / "config.toml"
    path.mkdir()
    result = run("ask", "why?")
    assert (result.exit_code, result.stderr) == (2, f"llava: {path}: is a directory\n  repair or delete that file\n")
    (home / "file").touch()
    monkeypatch.setenv("LLAVA_CONFIG", str(home / "file" / "config.toml"))
    result = run("models", "default", "builtin")
    assert result.exit_code == 74
    assert result.stderr.startswith(f"llava: {home / 'file'}")


def test_setting_the_default_keeps_the_rest_of_the_file(home: Path, configure: Configure) -> None:
    path = configure("# nothing yet\n")
    set_default_model("new")
    assert path.read_text() == '# nothing yet\nmodel = "new"\n'
    text = '# mine\n\nseed = 7 # lucky\nmodel    = "old"  # why\nstop = [\n  "a",\n]\n'
    path = configure(text)
    set_default_model("new")
    assert path.read_text() == text.replace('"old"', '"new"')
    assert [p.name for p in home.iterdir()] == ["config.toml"], "no leftovers"


def test_setting_the_default_makes_the_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_CONFIG", str(home / "a" / "b" / "config.toml"))
    set_default_model("ünï/côdé")
    assert Settings.resolve().load.model == "ünï/côdé"


@for_each("before, mask", itertools.product([0o600, 0o640, 0o644, 0o400], [0, 0o022, 0o077]), own=(home, configure))
def test_setting_the_default_keeps_who_may_read(mask: int, before: int, run: Run, configure: Configure) -> None:
    """There may be a key in it."""
    path = configure('api_key = "secret"\n')
    path.chmod(before)
    umask = os.umask(mask)
    try:
        assert run("models", "default", "builtin").exit_code == 0
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == before
    assert path.read_text() == 'api_key = "secret"\nmodel = "builtin"\n'


@pytest.mark.parametrize("mask", [0, 0o022])
def test_a_new_config_is_its_owners_alone(mask: int, run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_CONFIG", str(home / "new" / "config.toml"))
    umask = os.umask(mask)
    try:
        assert run("models", "default", "builtin").exit_code == 0
    finally:
        os.umask(umask)
    assert (home / "new" / "config.toml").stat().st_mode & 0o777 == 0o600
    assert (home / "new").stat().st_mode & 0o777 == 0o700


@for_each("there, where", itertools.product([True, False], ["file", "folder"]), own=(home,))
def test_setting_the_default_writes_through_a_link_of_ones_own(
    where: str, there: bool, run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many keep their config files in one folder and link to them, or to the folder."""
    kept = home / "dotfiles" / "config.toml"
    kept.parent.mkdir()
    link = home / ("config.toml" if where == "file" else "link")
    link.symlink_to(kept if where == "file" else "dotfiles")
    monkeypatch.setenv("LLAVA_CONFIG", str(link if where == "file" else link / "config.toml"))
    if there:
        kept.write_text("seed = 1\n")
        kept.chmod(0o600)
    assert run("models", "default", "builtin").exit_code == 0
    assert link.is_symlink()
    assert kept.read_text() == ("seed = 1\n" if there else "") + 'model = "builtin"\n'
    assert kept.stat().st_mode & 0o777 == 0o600
    assert os.listdir(kept.parent) == ["config.toml"]


@pytest.mark.parametrize("whose", ["link", "target"])
def test_setting_the_default_writes_through_no_link_of_another_user(
    whose: str, run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = home / "secret.toml"
    kept.write_text("seed = 1\n")
    (home / "config.toml").symlink_to(kept)
    give_away(home / "config.toml" if whose == "link" else kept, monkeypatch)
    result = run("models", "default", "builtin")
    assert (result.exit_code, result.stdout) == (74, "")
    assert result.stderr.splitlines() == [
        f"llava: {home / 'config.toml'}: is a link to {kept}, which is another user's",
        "  LLAVA_CONFIG=FILE names another file",
    ]
    assert kept.read_text() == "seed = 1\n"


@pytest.mark.parametrize("planted", ["config.toml.new", ".config.toml.new"])
def test_nothing_is_written_through_what_is_beside_the_config(planted: str, home: Path, configure: Configure) -> None:
    configure("seed = 1\n")
    (home / "secret").write_text("mine")
    (home / planted).symlink_to("secret")
    set_default_model("new")
    assert (home / "secret").read_text() == "mine"
    assert (home / "config.toml").read_text() == 'seed = 1\nmodel = "new"\n'


ODD = {
    "depth": "stop = " + "[" * 5000,
    "tables": "stop = " + '{"a" = ' * 5000,
    "names": "a." * 5000 + "a = 1",
    "twice": "[a]\nb = 1\n[a.b]\nc = 1",
    "twice inside": "stop = {x = 1, x = 2}",
    "digits": "seed = 0x" + "f" * 5000,
    "more digits": 'system = "x"\nmodel = 0x' + "f" * 5000,
    "digits in a list": "stop = [0x" + "f" * 5000 + "]",
    "digits for a word": "fit = 0x" + "f" * 5000,
    "digits for yes": "double_quant = 0x" + "f" * 5000,
    "orders": '"\\u001b[2J\\n" = 1\n"\\u001b[2J\\n" = 2',
}


@for_each("kind", ODD, own=(home, configure))
def test_a_config_that_is_odd(kind: str, run: Run, configure: Configure) -> None:
    """One line, whatever a parser makes of it."""
    path = configure(ODD[kind])
    result = run("ask", "why?")
    assert (result.exit_code, result.stdout) == (2, "")
    first, *hint = result.stderr.splitlines()
    assert first.startswith(f"llava: {path}: ") and first.isprintable() and len(first) < 400
    assert len(hint) <= 1


def test_a_config_without_an_end(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many GB, of which no more is read than it may have."""
    monkeypatch.setattr(limits, "SETTINGS_BYTES", 100_000)
    (home / "config.toml").touch()
    os.truncate(home / "config.toml", 1 << 36)
    for path in (str(home / "config.toml"), "/dev/zero"):
        monkeypatch.setenv("LLAVA_CONFIG", path)
        result = run("ask", "why?")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == f"llava: {path}: larger than 100,000 bytes\n  repair or delete that file\n"


def test_no_config_at_all(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_CONFIG", "/dev/null")
    assert run("models", "default").stdout == "builtin\n"


def test_the_config_is_in_the_users_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAVA_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "xdg"))
    set_default_model("new")
    assert [p.name for p in home.rglob("config.toml")] == ["config.toml"]
    assert Settings.resolve().load.model == "new"


def test_the_file_reaches_an_answer(run: Run, configure: Configure, drawing: Path) -> None:
    configure('max_tokens = 2\nprecision = "fp32"\n')
    found = json.loads(run("ask", drawing, "what is this?", "--json").stdout)
    assert (found["precision"], found["answer_tokens"] <= 2) == ("fp32", True)


def test_settings_made_by_hand_are_judged_too() -> None:
    with pytest.raises(UsageError, match="precision: 'fp8' is not one of"):
        LoadOptions(precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="max_tokens: 0 is not between"):
        Sampling(max_tokens=0)
