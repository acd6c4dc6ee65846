"""Checkpoints that somebody has made to hurt: what they say is bounded, checked, and fetches or runs nothing."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Run, Shell
from helpers.damage import change, put
from helpers.engines import CONVERSATIONS
from helpers.homes import home
from helpers.hub import shard
from helpers.tables import for_each

from llava_cli import Sampling, limits, load, paths
from llava_cli.errors import ModelUnusable
from llava_cli.hardware.device import choose_plan
from llava_cli.models import digests, quantized_cache
from llava_cli.models.checkpoint_files import CONFIG, read_json
from llava_cli.models.fingerprint import fingerprint
from llava_cli.models.precision import recipe
from llava_cli.models.registry import Checkpoint, builtin_folder
from llava_cli.models.untrusted_config import REFUSED, refusal, without_preferences
from llava_cli.models.validate import check_files
from llava_cli.models.weight_files import check_weights
from llava_cli.models.weights import load_config, nothing_is_fetched
from llava_cli.paths import hub_cache
from llava_cli.safetensors_header import BadHeader, read_header


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return shutil.copytree(builtin_folder(), tmp_path / "model")


@pytest.fixture
def checkpoint_of(folder: Path) -> Checkpoint:
    return Checkpoint(str(folder), folder)


def loaded_config(checkpoint: Checkpoint) -> Any:
    return load_config(checkpoint, read_json(checkpoint, CONFIG))


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """What waits for a FIFO, or reads a device, is found out."""

    def late(*args: object) -> None:
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def refused(run: Run, folder: Path, drawing: Path) -> Callable[..., str]:
    """Asks the folder's model, and expects one line that says why not."""

    def check() -> str:
        result = run("ask", "-m", folder, drawing, "what is this?", "--max-tokens", "1")
        first, *hints = result.stderr.splitlines()
        assert (result.exit_code, result.stdout) == (69, ""), result.stderr
        assert first.startswith(f"llava: {folder}: ") and first.isprintable() and len(first) < len(str(folder)) + 300
        assert all(hint.startswith("  ") for hint in hints)
        return first

    return check


# ---------------------------------------------------------------- safetensors headers


def file_of(header: bytes, data: int, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + bytes(data)


def entry(dtype: str = '"F32"', shape: str = "[1]", offsets: str = "[0, 4]") -> str:
    return f'{{"dtype": {dtype}, "shape": {shape}, "data_offsets": {offsets}}}'


def one(**parts: str) -> bytes:
    return f'{{"a": {entry(**parts)}}}'.encode()


RIGHT = [
    (one(), 4),
    (b'{"__metadata__": {"format": "pt"}, "a": ' + entry().encode() + b"}", 4),
    (b"{}", 0),
    (one(shape="[]"), 4),
    (one(shape="[0]", offsets="[0, 0]"), 0),
    (one(dtype='"F4"', shape="[3, 2]", offsets="[0, 3]"), 3),
    (one(offsets="[60, 64]"), 64),
    (b" \n" + one() + b"   ", 4),
]


@for_each("header, data", RIGHT)
def test_a_header_that_adds_up(header: bytes, data: int, tmp_path: Path) -> None:
    (path := tmp_path / "a.safetensors").write_bytes(file_of(header, data))
    for tensor in read_header(path).values():
        assert tensor.end <= path.stat().st_size


TWO = f'{{"a": {entry()}, "b": {{"dtype": "F32", "shape": [1], "data_offsets": %s}}}}'
BAD: dict[str, tuple[bytes, int]] = {
    "another type": (one(dtype='"F33"'), 4),
    "a type that is a number": (one(dtype="5"), 4),
    "a type that is a list": (one(dtype="[]"), 4),
    "no shape": (b'{"a": {"dtype": "F32", "data_offsets": [0, 4]}}', 4),
    "more than a tensor": (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "device": "cuda"}}', 4),
    "a shape that is a number": (one(shape="1"), 4),
    "a shape of truths": (one(shape="[true]"), 4),
    "a shape of fractions": (one(shape="[1.0]"), 4),
    "a shape of words": (one(shape='["1"]'), 4),
    "a shape of nothing": (one(shape="[null]"), 4),
    "a negative shape": (one(shape="[-1]"), 4),
    "twice negative": (one(shape="[-1, -1]"), 4),
    "not a number": (one(shape="[NaN]"), 4),
    "without end": (one(shape="[Infinity]"), 4),
    "larger than its bytes": (one(shape="[2]"), 4),
    "smaller than its bytes": (one(shape="[1]", offsets="[0, 8]"), 8),
    "a size that overflows": (one(shape="[4611686018427387904, 4]", offsets="[0, 0]"), 0),
    "a size that overflows to 4": (one(shape="[4611686018427387905, 4]"), 4),
    "none of too many": (one(shape="[9223372036854775808, 0]", offsets="[0, 0]"), 0),
    "none of many times many": (one(shape="[4294967296, 4294967296, 4294967296, 0]", offsets="[0, 0]"), 0),
    "a number of 5,000 digits": (one(shape=f"[{'9' * 5000}]"), 4),
    "a thousand numbers of 4,000 digits": (one(shape=f"[{', '.join(['9' * 4000] * 1000)}]"), 4),
    "places of truths": (one(shape="[]", offsets="[false, true]", dtype='"U8"'), 1),
    "places of fractions": (one(offsets="[0.0, 4.0]"), 4),
    "one place": (one(offsets="[4]"), 4),
    "three places": (one(offsets="[0, 4, 8]"), 4),
    "places that are an object": (one(offsets='{"begin": 0}'), 4),
    "backwards": (one(offsets="[4, 0]"), 4),
    "negative": (one(offsets="[-4, 0]"), 0),
    "behind the end": (one(offsets="[4, 8]"), 4),
    "far behind the end": (one(offsets="[9223372036854775800, 9223372036854775804]"), 4),
    "twice the same": (TWO.replace("%s", "[0, 4]").encode(), 4),
    "half the same": (TWO.replace("%s", "[2, 6]").encode(), 6),
    "within another": (
        b'{"a": '
        + entry(shape="[2]", offsets="[0, 8]").encode()
        + b', "b": '
        + entry(shape="[0]", offsets="[4, 4]").encode()
        + b"}",
        8,
    ),
    "a name twice": (f'{{"a": {entry()}, "a": {entry(offsets="[4, 8]")}}}'.encode(), 8),
    "a key twice": (b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', 4),
    "metadata that are a list": (b'{"__metadata__": []}', 0),
    "metadata with numbers": (b'{"__metadata__": {"a": 1}}', 0),
    "metadata with objects": (b'{"__metadata__": {"a": {"b": "c"}}}', 0),
    "metadata twice": (b'{"__metadata__": {}, "__metadata__": {}}', 0),
    "no UTF-8": (b'{"\xff": ' + entry().encode() + b"}", 4),
    "UTF-16": (one().decode().encode("utf-16"), 4),
    "a list": (b"[]", 0),
    "nothing": (b"", 0),
    "words behind it": (one() + b"x", 4),
    "a byte too few": (one(), 3),
    "a byte too many": (one(), 5),
    "nested without end": (b"[" * 200_000, 0),
    "nested in an entry": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0),
    "nested in metadata": (b'{"__metadata__": ' + b'{"a":' * 100_000 + b"0" + b"}" * 100_000 + b"}", 0),
}


@for_each("header, data", BAD.values(), ids=BAD)
def test_a_header_that_does_not_add_up(header: bytes, data: int, tmp_path: Path) -> None:
    (path := tmp_path / "a.safetensors").write_bytes(file_of(header, data))
    with pytest.raises(BadHeader):
        read_header(path)


@for_each(
    "name",
    ["nested without end", "a thousand numbers of 4,000 digits", "a name twice", "no UTF-8"],
    own=(folder, refused),
)
def test_the_command_says_in_one_line_that_a_header_is_bad(
    name: str, folder: Path, refused: Callable[..., str]
) -> None:
    put(folder / "model.safetensors", file_of(*BAD[name]))
    assert refused().endswith("model.safetensors is damaged or cut off")


def test_a_header_is_no_longer_deeper_or_fuller_than_it_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path := tmp_path / "a.safetensors").write_bytes(file_of(one(), 4))
    for name, least in (("limits.HEADER_BYTES", len(one())), ("limits.JSON_DEPTH", 3), ("limits.JSON_ITEMS", 8)):
        with monkeypatch.context() as patch:
            patch.setattr(f"llava_cli.{name}", least)
            assert read_header(path)
            patch.setattr(f"llava_cli.{name}", least - 1)
            with pytest.raises(BadHeader):
                read_header(path)
    (path := tmp_path / "b.safetensors").write_bytes(file_of(b"", 0, limits.HEADER_BYTES + 1))
    os.truncate(path, 2 * limits.HEADER_BYTES)
    with pytest.raises(BadHeader):
        read_header(path)


def test_headers_are_read_once(checkpoint_of: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "llava_cli.models.weight_files.read_header", lambda path, read=read_header: reads.append(path) or read(path)
    )
    reads: list[Path] = []
    assert check_weights(checkpoint_of).bytes_per_weight == 2.0
    assert len(reads) == 1


# ---------------------------------------------------------------- JSON, and files that are none


def test_json_is_no_longer_deeper_or_fuller_than_it_may_be(
    folder: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "processor_config.json"):
        for limit, most, words in (
            ("limits.CONFIG_BYTES", 10, "is larger than 10 bytes"),
            ("limits.JSON_DEPTH", 0, "nested deeper than 0 levels"),
            ("limits.JSON_ITEMS", 1, "more than 1 values"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(f"llava_cli.{limit}", most)
                if name != "config.json":  # which is read first
                    whole = (folder / "config.json").read_bytes()
                    patch.setattr("llava_cli.models.validate.read_json", reader(whole, name))
                assert words in refused()


def reader(config: bytes, checked: str) -> Callable[[Checkpoint, str], Any]:
    """Reads as ever, but for a config that is within all limits."""
    return lambda checkpoint, file: read_json(checkpoint, file) if file == checked else json.loads(config)


@for_each(
    "content, name",
    itertools.product(
        [b"[" * 1_000_000, b'{"a":' * 50_000, b"9" * 10_000, b'{"a": "\xff"}', b"{}" + b"\0"],
        ["config.json", "tokenizer_config.json", "model.safetensors.index.json"],
    ),
    own=(folder, refused),
)
def test_json_that_is_none_is_one_line(content: bytes, name: str, folder: Path, refused: Callable[..., str]) -> None:
    if "index" in name:
        (folder / "model.safetensors").unlink()
    put(folder / name, content)
    assert f"{name} cannot be read" in refused()


OUTSIDE = [
    "../other/model.safetensors",
    "{other}",
    "a/../../other/model.safetensors",
    "sub/x.safetensors",
    "..",
    ".",
    "",
]


@for_each(
    "name",
    [*OUTSIDE, "..\\x.safetensors", "x\0.safetensors", "x\n\x1b[2J/y", ".x.safetensors", "pytorch_model.bin"],
    own=(folder, refused),
)
def test_an_index_names_files_of_its_folder_alone(name: str, folder: Path, refused: Callable[..., str]) -> None:
    """Also where there is a whole file at the other place."""
    other = shutil.copytree(builtin_folder(), folder.parent / "other") / "model.safetensors"
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": name.replace("{other}", str(other))}}
    put(folder / "model.safetensors.index.json", json.dumps(index))
    assert "model.safetensors.index.json names " in refused()


def test_shards_are_fine_and_a_whole_file_comes_before_them(folder: Path, run: Run, drawing: Path) -> None:
    question = ("ask", "-m", folder, drawing, "what is this?", "--max-tokens", "4")
    answer = run(*question).stdout
    shutil.copy(folder / "model.safetensors", folder.parent / "whole")
    shard(folder)
    assert run(*question).stdout == answer
    shutil.move(folder.parent / "whole", folder / "model.safetensors")
    for path in folder.glob("model-*.safetensors"):
        path.unlink()
    assert run(*question).stdout == answer  # as transformers has it


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def socket_at(path: Path) -> None:
    path.unlink(missing_ok=True)
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


@for_each(
    "plant, name",
    itertools.product(
        [fifo, device, socket_at],
        [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "chat_template.jinja",
            "added_tokens.json",
            "merges.txt",
            "additional_chat_templates/x.jinja",
        ],
    ),
    own=(folder, checkpoint_of),
)
def test_what_is_no_file_is_refused_and_not_waited_for(
    plant: Callable[[Path], None], name: str, folder: Path, checkpoint_of: Checkpoint
) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    plant(folder / name)
    for look in (check_files, fingerprint):
        with pytest.raises(ModelUnusable, match="is not a regular file"):
            look(checkpoint_of)
    if name == "model.safetensors":
        with pytest.raises(ModelUnusable, match="is not a regular file"):
            check_weights(checkpoint_of)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "chat_template.jinja"])
def test_the_command_does_not_wait_either(name: str, folder: Path, refused: Callable[..., str]) -> None:
    fifo(folder / name)
    assert refused().endswith(f"{name} is not a regular file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_a_folder_in_a_files_place(name: str, folder: Path, refused: Callable[..., str]) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    if name == "generation_config.json":
        check_files(Checkpoint("x", folder))  # as if there were none
    else:
        assert refused().endswith(f"{name} is not a regular file")


def test_links_are_followed_as_in_the_hubs_cache(folder: Path, run: Run, drawing: Path) -> None:
    for path in list(folder.iterdir()):
        shutil.move(path, folder.parent / path.name)
        path.symlink_to(folder.parent / path.name)
    result = run("ask", "-m", folder, drawing, "what is this?", "--max-tokens", "4")
    assert (result.exit_code, result.stderr) == (0, "")


# ---------------------------------------------------------------- what a config may ask for


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A Hub that counts who asks for something."""
    asked: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def count() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    asked.append(connection.recv(1000).decode("latin-1"))

        threading.Thread(target=count, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield asked
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of that name, of a version that transformers takes: there is a file once it has been imported."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION as VERSION

    site, ran = tmp_path / "site", tmp_path / "kernels-imported"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(f"open({str(ran)!r}, 'w')\n__version__ = {VERSION!r}\n")
    (info := site / f"kernels-{VERSION}.dist-info").mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {VERSION}\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    return ran


KERNEL = "kernels-community/evil"
PREFERENCES: dict[str, Any] = {
    "attn_implementation": KERNEL,
    "_attn_implementation": KERNEL,
    "_attn_implementation_internal": KERNEL,
    "experts_implementation": KERNEL,
    "_experts_implementation": KERNEL,
    "use_kernels": True,
    "kernel_config": {"kernel_mapping": {"RMSNorm": f"{KERNEL}:Norm"}},
    "fusion_config": {"patch_embeddings": True},
    "auto_map": {"AutoConfig": f"{KERNEL}--evil.Config"},
    "_name_or_path": KERNEL,
    "name_or_path": KERNEL,
    "_auto_class": "AutoConfig",
    "_from_auto": True,
}


def planted(folder: Path, preferences: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part.update(preferences)
    put(folder / "config.json", json.dumps(config))


def test_preferences_of_a_config_fetch_and_run_nothing(
    folder: Path, shell: Shell, drawing: Path, hub: list[str], kernels: Path
) -> None:
    """At every depth, with a Hub that answers and the package that runs what is there."""
    question = "ask", "-m", folder, drawing, "what color is the circle?"
    plain = shell(*question)
    planted(folder, PREFERENCES)
    done = shell(*question)
    assert (done.returncode, done.stdout, done.stderr) == (0, plain.stdout, b"")
    assert hub == []
    assert not kernels.exists()


@for_each("key", PREFERENCES, own=(folder, checkpoint_of))
def test_each_preference_is_left_out(key: str, folder: Path, checkpoint_of: Checkpoint) -> None:
    plain = loaded_config(checkpoint_of).to_dict()
    planted(folder, {key: PREFERENCES[key]})
    config = loaded_config(checkpoint_of)
    for part in (config, config.text_config, config.vision_config):
        assert part._attn_implementation is None and part._experts_implementation is None
        assert KERNEL not in vars(part).values()
    assert config.to_dict() == plain


def test_attention_by_sub_config_is_left_out(folder: Path, checkpoint_of: Checkpoint) -> None:
    change("config.json", attn_implementation={"": KERNEL, "text_config": KERNEL, "vision_config": KERNEL})(folder)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change("config.json", text_config={**text, "per_layer_config": {"0": {"attn_implementation": KERNEL}}})(folder)
    config = loaded_config(checkpoint_of)
    assert {part._attn_implementation for part in (config, config.text_config, config.vision_config)} == {None}


def test_flash_attention_is_a_preference_too(folder: Path, run: Run, drawing: Path) -> None:
    planted(folder, {"_attn_implementation": "flash_attention_2", "attn_implementation": "flash_attention_2"})
    assert run("ask", "-m", folder, drawing, "what color is the circle?").stdout == "red\n"


def test_a_description_is_what_it_was() -> None:
    content = {
        "a": [1, {"b": None}],
        "c": {"__float__": "Infinity"},
        "_d": 1,
        "model_type": "llava",
        "rope_scaling": {},
    }
    assert without_preferences(content) == {
        "a": [1, {"b": None}],
        "c": float("inf"),
        "model_type": "llava",
        "rope_scaling": {},
    }
    assert without_preferences({"__float__": "1e5"}) == {}


SETTINGS_FILES = ("config.json", "processor_config.json", "tokenizer_config.json", "generation_config.json")


@for_each("key, file", itertools.product(REFUSED, SETTINGS_FILES), own=(folder, refused))
def test_what_would_load_something_else_is_refused_by_name(
    key: str, file: str, folder: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: pytest.fail("reached for the network"))
    for value in ("evil/repo", {"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": "evil/repo"}, ""):
        change(file, **{key: value})(folder)
        said = refused()
        assert f": {file} asks for " in said and said.endswith(f"({key})")


@for_each(
    "config, words",
    [
        (
            {"vision_config": {"model_type": "dpt", "backbone": "evil/repo"}},
            "asks for a backbone from the Hub (backbone)",
        ),
        ({"text_config": {"layers": [{"backbone": "evil/repo"}]}}, "asks for a backbone from the Hub (backbone)"),
        ({"vision_config": {"model_type": "timm_wrapper", "architecture": "hf-hub:evil/repo"}}, "timm"),
        ({"vision_config": {"model_type": "timm_backbone", "backbone": None}}, "timm"),
        ({"transformers_weights": "../other.safetensors"}, "asks for weights of another name"),
        ({"configuration_files": ["../config.5.20.0.json"]}, "asks for another config"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "asks for quantization by fp8; only bitsandbytes' is supported",
        ),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "asks for quantization by mxfp4"),
        ({"quantization_config": {"quant_method": ["x\x1b[2J"]}}, "asks for quantization by ['x\\x1b[2J']"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "asks for quantization by gptq"),
        ({"attribute_map": {"attention": "_attn_implementation"}, "attention": KERNEL}, "sets attribute_map"),
        ({"text_config": {"attribute_map": {}}}, "sets attribute_map"),
        ({"sub_configs": {}}, "sets sub_configs"),
        ({"__class__": "dict"}, "sets __class__"),
        ({"text_config": {"__dict__": {}}}, "sets __dict__"),
        ({"vision_config": {"to_dict": 1}}, "sets to_dict"),
        ({"decoder": {"model_type": "llama"}, "text_encoder": {}}, "its config cannot be loaded"),
        ({"quantization_config": "4bit"}, "does not say how it is quantized"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "in 4 or in 8 bits"),
        ({"quantization_config": {"load_in_4bit": True, "load_in_8bit": True}}, "in 4 or in 8 bits"),
        ({"quantization_config": {"load_in_4bit": True, "llm_int8_skip_modules": ["(a+)+$"]}}, "names of modules"),
        ({"quantization_config": {"load_in_4bit": True, "llm_int8_skip_modules": [".*.*.*.*.*x"]}}, "names of modules"),
        ({"quantization_config": {"load_in_4bit": True, "llm_int8_skip_modules": [1]}}, "names of modules"),
        ({"quantization_config": {"load_in_4bit": True, "llm_int8_skip_modules": "lm_head"}}, "names of modules"),
    ],
    own=(folder, refused),
)
def test_what_a_config_cannot_have(
    config: dict[str, Any], words: str, folder: Path, refused: Callable[..., str]
) -> None:
    change("config.json", **config)(folder)
    assert words in refused()


@for_each(
    "file, part, words",
    [
        (
            "config.json",
            {"text_config": {"num_hidden_layers": 2**40}},
            f"num_hidden_layers of more than {limits.CONFIG_LAYERS:,}",
        ),
        ("config.json", {"vision_config": {"depth": 1e30}}, f"depth of more than {limits.CONFIG_LAYERS:,}"),
        (
            "config.json",
            {"x": [{"encoder_layers": [1, 9**9]}]},
            f"encoder_layers of more than {limits.CONFIG_LAYERS:,}",
        ),
        ("config.json", {"vision_config": {"image_size": 2**31}}, f"image_size of more than {limits.CONFIG_SIDE:,}"),
        (
            "processor_config.json",
            {"image_seq_len": 2**32},
            f"image_seq_len of more than {limits.CONFIG_IMAGE_TOKENS:,}",
        ),
        ("processor_config.json", {"num_additional_image_tokens": 2**32}, "num_additional_image_tokens of more than"),
        ("processor_config.json", {"image_processor": {"crop_size": {"width": 2**31}}}, "width of more than"),
        ("processor_config.json", {"image_grid_pinpoints": [[336, 2**31]]}, "image_grid_pinpoints of more than"),
    ],
    own=(folder, refused),
)
def test_numbers_that_would_take_all_time_or_memory(
    file: str, part: dict[str, Any], words: str, folder: Path, refused: Callable[..., str]
) -> None:
    change(file, **part)(folder)
    assert f"{file} has a {words}" in refused()


def test_sizes_that_are_areas_may_be_as_large_as_pictures() -> None:
    size = {"shortest_edge": 65_536, "longest_edge": 16_777_216}  # Qwen3-VL's
    for kind, most in (
        ("Qwen2VLImageProcessorFast", limits.PICTURE_PIXELS),
        ("CLIPImageProcessor", limits.CONFIG_SIDE),
    ):
        one = {"image_processor_type": kind, "size": {**size, "shortest_edge": most}}
        assert refusal(one) is None
        one["size"]["shortest_edge"] += 1
        assert f"shortest_edge of more than {most:,}" in str(refusal({"image_processor": one}))


def test_what_bitsandbytes_itself_writes_is_known() -> None:
    from transformers import BitsAndBytesConfig

    for options in ({"load_in_4bit": True}, {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "model.x.0"]}):
        assert refusal({"quantization_config": BitsAndBytesConfig(**options).to_dict()}) is None


@pytest.mark.parametrize(
    "name, words",
    [
        ("adapter_config.json", "holds an adapter"),
        ("audio_tokenizer_config.json", "asks for an audio tokenizer"),
        ("shard-00000-model-00001-of-00001.safetensors", "is part of a training run"),
    ],
)
def test_files_that_would_be_loaded_instead(name: str, words: str, folder: Path, refused: Callable[..., str]) -> None:
    put(folder / name, "{}")
    assert f"{name} {words}" in refused()


def test_a_models_own_code_cannot_fetch_anything(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Some types of models ask for kernels from the Hub on their own; a backbone's config does it while it is made."""
    import huggingface_hub
    from transformers.integrations.hub_kernels import get_kernel

    from llava_cli.models.weights import load_config as _  # noqa: F401

    with nothing_is_fetched():
        with pytest.raises(ImportError):
            import kernels  # type: ignore[import-not-found]  # noqa: F401
        with pytest.raises(ImportError):
            get_kernel("kernels-community/rwkv")
        with pytest.raises(Exception, match="offline"):
            huggingface_hub.HfApi(endpoint=os.environ["HF_ENDPOINT"]).model_info("evil/repo")
    assert hub == []
    with pytest.raises(Exception, match=r"(?i)server|connect"):
        huggingface_hub.HfApi(endpoint=os.environ["HF_ENDPOINT"]).model_info("evil/repo")
    assert hub


# ---------------------------------------------------------------- which checkpoint it is


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of each file that is hashed; all files are taken to have been left alone for long."""
    read, names = digests._compute, []
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -60.0)
    monkeypatch.setattr(digests, "_compute", lambda path: names.append(path.name) or read(path))
    return names


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_every_byte_counts(folder: Path, checkpoint_of: Checkpoint, reads: list[str]) -> None:
    """The middle of the weights too, of the same size and the same time."""
    first, path = fingerprint(checkpoint_of), folder / "model.safetensors"
    status = path.stat()
    flip(path, status.st_size // 2)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = fingerprint(checkpoint_of)
    assert second != first
    flip(path, status.st_size // 2)
    assert fingerprint(checkpoint_of) == first
    for name in ("chat_template.jinja", "tokenizer.json", "config.json"):
        flip(folder / name, 20)
        assert fingerprint(checkpoint_of) != first
        flip(folder / name, 20)
    subfolders = "additional_chat_templates/x.jinja", "qformer_tokenizer/tokenizer.json"
    for name in ("tokenizer.model", "vocab.txt", "tekken.tiktoken", "no ending", *subfolders):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
        assert fingerprint(checkpoint_of) != first
        (folder / name).unlink()
    for name in ("pytorch_model.bin", "README.md", ".gitattributes", "onnx/model.onnx_data"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
        assert fingerprint(checkpoint_of) == first


def test_names_and_contents_do_not_run_into_each_other(tmp_path: Path) -> None:
    found = set()
    for number, files in enumerate(
        (
            {"a": "bc"},
            {"ab": "c"},
            {"a": "b", "c": ""},
            {"a 1": "b"},
            {"a": " 1b"},
            {"a": "b", "b": "a"},
            {"b": "b", "a": "a"},
        )
    ):
        (folder := tmp_path / str(number)).mkdir()
        for name, content in files.items():
            (folder / name).write_text(content)
        found.add(fingerprint(Checkpoint("x", folder)))
    assert len(found) == 7


def test_files_are_read_once(folder: Path, checkpoint_of: Checkpoint, reads: list[str]) -> None:
    first = fingerprint(checkpoint_of)
    assert "model.safetensors" in reads
    reads.clear()
    assert fingerprint(checkpoint_of) == first
    assert reads == []
    other = folder.parent / "other"
    os.rename(folder, other)  # a name is not remembered
    assert fingerprint(Checkpoint("x", other)) == first
    assert reads == []
    shutil.copy2(other / "config.json", folder.parent / "config.json")  # the same times, another file
    os.replace(folder.parent / "config.json", other / "config.json")
    assert fingerprint(Checkpoint("x", other)) == first
    assert reads == ["config.json"]


def test_what_has_only_just_changed_is_not_remembered(
    checkpoint_of: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another change in the same tick of the clock would not be seen."""
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 3600.0)
    fingerprint(checkpoint_of)
    assert not digests._cache_file().exists()


def test_what_changes_while_it_is_read_is_not_remembered(
    folder: Path, checkpoint_of: Checkpoint, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, first = folder / "config.json", fingerprint(checkpoint_of)
    whole, real = path.read_bytes(), digests.open_regular

    class Written:
        """A file that somebody else writes to, once, while it is read."""

        def __init__(self, file: Any, write: Callable[[], object]) -> None:
            self._file, self._write, self.fileno = file, write, file.fileno

        def __enter__(self) -> Written:
            return self

        def __exit__(self, *error: object) -> None:
            self._file.close()

        def readinto(self, buffer: Any) -> int:
            self._write()
            self._write = lambda: None
            return int(self._file.readinto(buffer))

    for write in (path.write_bytes, partial(put, path)):  # in place, and anew
        digests._cache_file().unlink()
        now = partial(write, whole + b" ")
        with monkeypatch.context() as patch:
            patch.setattr(
                digests, "open_regular", lambda one, now=now: Written(real(one), now) if one == path else real(one)
            )
            fingerprint(checkpoint_of)
        reads.clear()
        assert fingerprint(checkpoint_of) != first
        assert reads == ["config.json"]


@for_each(
    "trouble",
    ["link", "others write", "others' folder", "damaged", "no digests", "large", "fifo"],
    own=(folder, checkpoint_of, reads),
)
def test_a_memory_that_others_may_have_written_is_not_believed(
    trouble: str,
    folder: Path,
    checkpoint_of: Checkpoint,
    reads: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, file = fingerprint(checkpoint_of), digests._cache_file()
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    lies = json.dumps(dict.fromkeys(json.loads(file.read_text()), "0" * 64))
    if trouble == "link":
        (tmp_path / "lies").write_text(lies)
        file.unlink()
        file.symlink_to(tmp_path / "lies")
    elif trouble == "others write":
        file.write_text(lies)
        file.chmod(0o622)
    elif trouble == "others' folder":
        file.write_text(lies)
        file.parent.chmod(0o777)
    elif trouble == "damaged":
        file.write_text(lies[:-5])
    elif trouble == "no digests":
        file.write_text(lies.replace("0" * 64, "1"))
    elif trouble == "large":
        monkeypatch.setattr("llava_cli.limits.CACHE_FILE_BYTES", 100)
    else:
        file.unlink()
        os.mkfifo(file)
    reads.clear()
    assert fingerprint(checkpoint_of) == first
    assert reads
    monkeypatch.undo()
    assert not file.is_symlink() and file.is_file()
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_without_a_place_for_it_nothing_is_remembered(
    checkpoint_of: Checkpoint, reads: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAVA_CACHE", str(tmp_path / "file"))
    assert fingerprint(checkpoint_of) == fingerprint(checkpoint_of)


def test_so_many_files_are_remembered(
    checkpoint_of: Checkpoint, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "MOST_CACHED", 2)
    fingerprint(checkpoint_of)
    assert len(json.loads(digests._cache_file().read_text())) == 2


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@for_each(
    "place",
    [
        "snapshots/{commit}",
        "models--a--b/snapshots/{commit}",
        "hub/snapshots/{commit}",
        "hub/models--a--b/snapshots/main",
        "hub/models--a--b/snapshots/{commit}x",
        "hub/models--a--b/snapshots/" + "g" * 40,
        "hub/models--a--b/blobs/{commit}",
        "hub/datasets--a--b/snapshots/{commit}",
        "hub/sub/models--a--b/snapshots/{commit}",
    ],
    own=(folder, home, reads),
)
def test_a_commits_name_is_no_proof_outside_the_hubs_cache(
    place: str, folder: Path, home: Path, reads: list[str]
) -> None:
    target = home / "hub" / place.format(commit=COMMIT)
    target.parent.mkdir(parents=True)
    shutil.move(folder, target)
    one = fingerprint(Checkpoint("x", target))
    assert "model.safetensors" in reads
    flip(target / "model.safetensors", 6_000_000)
    assert fingerprint(Checkpoint("x", target)) != one


@pytest.mark.parametrize("commit", [COMMIT, COMMIT + COMMIT[:24]])
def test_in_the_hubs_cache_a_commit_and_sizes_stand_for_the_files(
    commit: str, folder: Path, home: Path, reads: list[str]
) -> None:
    target = hub_cache() / "models--a--b" / "snapshots" / commit
    target.parent.mkdir(parents=True)
    shutil.move(folder, target)
    checkpoint = Checkpoint("a/b", target)
    one = fingerprint(checkpoint)
    assert reads == []
    link = home / "link"
    link.symlink_to(target)
    assert fingerprint(Checkpoint("x", link)) == one
    whole = (target / "model.safetensors").read_bytes()
    (target / "model.safetensors").write_bytes(whole[:-1])  # half replaced
    assert fingerprint(checkpoint) != one
    (target / "model.safetensors").write_bytes(whole)
    for other in (
        hub_cache() / "models--a--b" / "snapshots" / COMMIT[::-1],
        hub_cache() / "models--c" / "snapshots" / commit,
    ):
        shutil.copytree(target, other)
        assert fingerprint(Checkpoint("a/b", other)) != one


def answer(folder: Path) -> str:
    engine = load(str(folder), precision="4bit", device="cpu")
    return engine.answer(CONVERSATIONS["two"], Sampling(max_tokens=12)).text


def test_two_checkpoints_that_differ_in_the_middle_share_no_copy(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of the same name, size and times, with the same first and last bytes."""
    import torch
    from safetensors.torch import load_file, save_file

    one = shutil.copytree(checkpoint("llava-llama"), tmp_path / "1" / "model")
    two = shutil.copytree(one, tmp_path / "2" / "snapshots" / COMMIT / "model")
    weights = load_file(two / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    save_file({**weights, name: torch.flip(weights[name], (0,))}, two / "model.safetensors", {"format": "pt"})
    shutil.copystat(one / "model.safetensors", two / "model.safetensors")
    first = answer(one)
    assert answer(two) != first
    assert len(list(paths.quantized_cache().iterdir())) == 2
    os.environ["LLAVA_FAST"] = "0"
    try:
        assert answer(one) != answer(two)
    finally:
        del os.environ["LLAVA_FAST"]


@for_each("trouble", ["another's", "no label", "others write", "a link", "damaged label", "another how"])
def test_a_copy_says_what_it_was_made_of(
    trouble: str, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = checkpoint("llava-llama")
    first = answer(one)
    (copy,) = paths.quantized_cache().iterdir()
    label = copy / quantized_cache.LABEL
    said = json.loads(label.read_text())
    assert said == {
        "fingerprint": fingerprint(Checkpoint("x", one)),
        "how": recipe(choose_plan("cpu", "4bit"), double_quant=False),
        "format": quantized_cache.FORMAT,
    }
    assert {path.stat().st_mode & 0o077 for path in (copy, *copy.iterdir())} == {0}
    before = (copy / "model.safetensors").stat().st_ino
    if trouble == "another's":  # whose digest begins alike
        label.write_text(json.dumps({**said, "fingerprint": said["fingerprint"][:16] + "0" * 48}))
    elif trouble == "another how":
        label.write_text(json.dumps({**said, "how": "4bit-double-cpu"}))
    elif trouble == "no label":
        label.unlink()
    elif trouble == "damaged label":
        label.write_text("[" * 100_000)
    elif trouble == "others write":
        (copy / "model.safetensors").chmod(0o666)
    else:
        shutil.move(copy / "model.safetensors", tmp_path / "theirs")
        (copy / "model.safetensors").symlink_to(tmp_path / "theirs")
    assert answer(one) == first
    assert json.loads(label.read_text()) == said
    assert (copy / "model.safetensors").stat().st_ino != before
    assert not (copy / "model.safetensors").is_symlink()
