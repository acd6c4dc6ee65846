"""Folders that are no usable model: refused in one line, before anything is loaded or answered."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Run, Shell
from helpers.damage import Damage, change, put
from helpers.hub import shard
from helpers.tables import for_each
from safetensors.torch import load_file, save_file
from transformers.models.auto import modeling_auto
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from typer.testing import Result

from llava_cli.errors import ModelUnusable
from llava_cli.models.families import TESTED, UNSUPPORTED
from llava_cli.models.registry import Checkpoint, builtin_folder
from llava_cli.models.weights import load_config

Refused = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint to damage: the built-in one's files, by links that `put` replaces."""
    return shutil.copytree(builtin_folder(), tmp_path / "model")


@pytest.fixture
def refused(run: Run, folder: Path, drawing: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Asks the folder's model and expects one line, hints at most, and silence otherwise."""

    def check(code: int = 69, thing: object = folder) -> Result:
        result = run("ask", "-m", folder, drawing, "what is this?", "--max-tokens", "1")
        first, *hints = result.stderr.splitlines()
        assert (result.exit_code, result.stdout) == (code, ""), result.stderr
        assert first.startswith(f"llava: {thing}: ")
        assert len(first) < len(str(folder)) + 500
        assert all(hint.startswith("  ") for hint in hints), result.stderr
        assert "llava models pull" not in result.stderr, "a folder cannot be pulled"
        assert capfd.readouterr() == ("", ""), "a library printed something"
        return result

    return check


def drop(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name: str, content: bytes | str) -> Damage:
    return lambda folder: put(folder / name, content)


def cut(name: str, size: int) -> Damage:
    return lambda folder: put(folder / name, (folder / name).read_bytes()[:size])


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def header(tensors: Any, data: int = 0, length: int | None = None) -> Damage:
    """A model.safetensors with this header and so many bytes of (sparse) data."""

    def damage(folder: Path) -> None:
        text = json.dumps(tensors).encode()
        put(folder / "model.safetensors", (len(text) if length is None else length).to_bytes(8, "little") + text)
        os.truncate(folder / "model.safetensors", 8 + len(text) + data)

    return damage


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """A valid model.safetensors whose tensors were edited."""

    def damage(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        edit(found)
        (folder / "model.safetensors").unlink()
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return damage


INDEX = "model.safetensors.index.json"
CODE = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForImageTextToText": "evil.Model"}


REFUSED_TYPES = ("llama4", "florence2", "diffusion_gemma", "gemma3n", "blip-2", "mistral4")


def test_model_types_that_need_torchvision_are_refused_by_name() -> None:
    """As transformers' own list has it, which may grow."""
    kinds: Any = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    processors: Any = IMAGE_PROCESSOR_MAPPING_NAMES
    for kind in kinds:
        backends = processors.get(kind) or {}
        assert "torchvision" not in backends or "pil" in backends or kind in UNSUPPORTED, kind
    assert not UNSUPPORTED.keys() & TESTED
    assert kinds.keys() >= TESTED  # of which nobody asks that list


def test_a_text_config_of_a_type_that_has_none(tmp_path: Path) -> None:
    content = {"model_type": "chameleon", "text_config": {"hidden_size": 64}}
    with pytest.raises(ModelUnusable, match="its config cannot be loaded"):
        load_config(Checkpoint("model", tmp_path), content)


def test_the_folder_itself_is_fine(run: Run, folder: Path, drawing: Path) -> None:
    result = run("ask", "-m", folder, drawing, "what is this?", "--max-tokens", "1")
    assert (result.exit_code, result.stderr) == (0, "")


CONFIGS: dict[str, tuple[Damage, str]] = {
    "no config": (drop("config.json"), "no config.json in it: not a checkpoint"),
    "empty config": (write("config.json", ""), "config.json cannot be read"),
    "config cut off": (write("config.json", "{"), "config.json cannot be read"),
    "config in UTF-16": (write("config.json", "{}".encode("utf-16")), "config.json cannot be read"),
    "config nested too deep": (write("config.json", "[" * 100_000), "config.json cannot be read"),
    "config is a list": (write("config.json", "[]"), "config.json is damaged"),
    "config says nothing": (write("config.json", "{}"), "config.json names no model type"),
    "text model": (
        change("config.json", model_type="llama"),
        "llama models do not load as picture-and-text models",
    ),
    **{kind: (change("config.json", model_type=kind), f"{kind} models {UNSUPPORTED[kind]}") for kind in REFUSED_TYPES},
    "new model": (change("config.json", model_type="brandnew"), "brandnew models do not load"),
    "type is a list": (change("config.json", model_type=["llava"]), "config.json"),
    "type is an object": (change("config.json", model_type={"llava": 1}), "config.json"),
    "remote code": (change("config.json", model_type="brandnew", auto_map=CODE), "its own code, which is never run"),
    "text config is a number": (change("config.json", text_config=5), ""),
    "text config of no model": (change("config.json", text_config={"model_type": "nothing"}), ""),
    "width is a word": (
        change("config.json", vision_config={"model_type": "clip_vision_model", "hidden_size": "x"}),
        "",
    ),
    "generation config cut off": (write("generation_config.json", "{"), "generation_config.json"),
    "no processor": (drop("processor_config.json"), "no processor_config.json or preprocessor_config.json"),
    "processor cut off": (write("processor_config.json", "{"), "processor"),
    "processor is a list": (write("processor_config.json", "[]"), "processor"),
    "processor says nothing": (write("processor_config.json", "{}"), "processor"),
    "unknown image processor": (
        change("processor_config.json", image_processor={"image_processor_type": "Nothing"}),
        "processor",
    ),
    "no tokenizer": (drop("tokenizer.json"), "no tokenizer.json"),
    "empty tokenizer": (write("tokenizer.json", ""), "processor"),
    "tokenizer says nothing": (write("tokenizer.json", "{}"), "processor"),
    "tokenizer cut off": (cut("tokenizer.json", 10_000), "processor"),
    "tokenizer config cut off": (write("tokenizer_config.json", "{"), "processor"),
}


@for_each("damage, reason", CONFIGS.values(), ids=CONFIGS, own=(folder, refused))
def test_config_processor_and_tokenizer(folder: Path, refused: Refused, damage: Damage, reason: str) -> None:
    damage(folder)
    assert reason in refused().stderr


def tensor(**values: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **values}}


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12769008\n"
CUT_OFF = "model.safetensors is damaged or cut off"
WEIGHTS: dict[str, tuple[Damage, str]] = {
    "none": (drop("model.safetensors"), "model.safetensors is missing"),
    "empty": (write("model.safetensors", ""), CUT_OFF),
    "three bytes": (write("model.safetensors", b"\x08\0\0"), CUT_OFF),
    "garbage": (write("model.safetensors", bytes(range(256)) * 20), CUT_OFF),
    "a pointer of git-lfs": (write("model.safetensors", LFS), "model.safetensors is a pointer of git-lfs"),
    "a length alone": (cut("model.safetensors", 8), CUT_OFF),
    "half a header": (cut("model.safetensors", 2000), CUT_OFF),
    "half the data": (cut("model.safetensors", 6_000_000), CUT_OFF),
    "all but a byte": (cut("model.safetensors", -1), CUT_OFF),
    "header of 8 EB": (header({}, length=2**63), CUT_OFF),
    "header of 99 MB": (header({}, length=99_000_000), CUT_OFF),
    "header is a list": (header([]), CUT_OFF),
    "tensor is a number": (header({"a": 1}), CUT_OFF),
    "place is a word": (header(tensor(data_offsets=[0, "x"]), data=4), CUT_OFF),
    "shape and size differ": (header(tensor(shape=[9]), data=4), ""),
    "unknown number format": (header(tensor(dtype="F99"), data=4), ""),
    "no number format": (header({"a": {"shape": [1], "data_offsets": [0, 4]}}, data=4), ""),
    "no tensors": (header({}), ""),
    "a pickle": (
        both(drop("model.safetensors"), write("pytorch_model.bin", b"cos\nsystem\n(S'touch ran'\ntR.")),
        "pytorch_model.bin is a pickle, which is never loaded",
    ),
    "an older pickle": (
        both(drop("model.safetensors"), write("consolidated.00.pth", b"x")),
        "consolidated.00.pth is a pickle, which is never loaded",
    ),
}


@for_each("damage, reason", WEIGHTS.values(), ids=WEIGHTS, own=(folder, refused))
def test_weights(folder: Path, refused: Refused, damage: Damage, reason: str) -> None:
    damage(folder)
    assert reason in refused().stderr


WORDS = "language_model.model.embed_tokens.weight"
MISFITS: dict[str, Damage] = {
    "no words": tensors(lambda found: found.pop(WORDS)),
    "no projector": tensors(lambda found: [found.pop(n) for n in list(found) if "multi_modal_projector" in n]),
    "no vision tower": tensors(lambda found: [found.pop(n) for n in list(found) if "vision_tower" in n]),
    "other names": tensors(lambda found: [found.update({f"old.{n}": found.pop(n)}) for n in list(found)]),
    "narrow words": tensors(lambda found: found.update({WORDS: torch.zeros(640, 8)})),
    "one row too many": tensors(lambda found: found.update({WORDS: torch.zeros(641, 256)})),
    "one layer too few": lambda folder: change("config.json", text_config=text_config(folder, num_hidden_layers=5))(
        folder
    ),
}


def text_config(folder: Path, **values: Any) -> dict[str, Any]:
    return {**json.loads((folder / "config.json").read_text())["text_config"], **values}


@for_each("damage", MISFITS.values(), ids=MISFITS, own=(folder, refused))
def test_tensors_that_are_not_the_models_never_become_random_ones(
    folder: Path, refused: Refused, damage: Damage
) -> None:
    damage(folder)
    refused()


def test_tensors_that_the_model_does_not_need_are_left_alone(run: Run, folder: Path, drawing: Path) -> None:
    tensors(lambda found: found.update({"some.position_ids": torch.arange(3)}))(folder)
    result = run("ask", "-m", folder, drawing, "what is this?", "--max-tokens", "1")
    assert (result.exit_code, result.stderr) == (0, "")


def test_a_pickle_beside_safetensors_is_not_opened(run: Run, folder: Path, drawing: Path) -> None:
    put(folder / "pytorch_model.bin", b"not even a pickle")
    assert run("ask", "-m", folder, drawing, "what is this?", "--max-tokens", "1").exit_code == 0


# ---------------------------------------------------------------- shards


def test_shards_answer_as_the_whole_does(run: Run, folder: Path, drawing: Path) -> None:
    question = ("ask", "-m", folder, drawing, "what is this?", "--max-tokens", "8")
    whole = run(*question)
    shard(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert (run(*question).stdout, run(*question).stderr) == (whole.stdout, "")


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def reindex(edit: Callable[[dict[str, str]], object]) -> Damage:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        edit(index["weight_map"])
        put(folder / INDEX, json.dumps(index))

    return damage


INDEX_DAMAGED = f"{INDEX} is damaged"
SHARDS: dict[str, tuple[Damage, str]] = {
    "missing": (lambda folder: first_shard(folder).unlink(), "model-00001-of-00003.safetensors is missing"),
    "cut off": (lambda folder: cut(first_shard(folder).name, 5000)(folder), "is damaged or cut off"),
    "empty": (lambda folder: put(first_shard(folder), b""), "is damaged or cut off"),
    "one too many named": (
        reindex(lambda names: names.update(x="model-9.safetensors")),
        "model-9.safetensors is missing",
    ),
    "a pickle named": (reindex(lambda names: names.update(x="model-9.bin")), "model-9.bin"),
    "outside the folder": (reindex(lambda names: names.update(x="../no.safetensors")), "no.safetensors"),
    "a number named": (reindex(lambda names: names.update(x=5)), INDEX_DAMAGED),
    "nothing named": (reindex(lambda names: names.update(dict.fromkeys(names))), INDEX_DAMAGED),
    "no tensors named": (reindex(lambda names: names.clear()), INDEX_DAMAGED),
    "index cut off": (write(INDEX, "{"), f"{INDEX} cannot be read"),
    "index is a list": (write(INDEX, "[]"), INDEX_DAMAGED),
    "index has a list": (write(INDEX, '{"weight_map": []}'), INDEX_DAMAGED),
    "no index": (drop(INDEX), "model.safetensors is missing"),
}


@for_each("damage, reason", SHARDS.values(), ids=SHARDS, own=(folder, refused))
def test_damaged_shards(folder: Path, refused: Refused, damage: Damage, reason: str) -> None:
    shard(folder)
    damage(folder)
    assert reason in refused().stderr


# ---------------------------------------------------------------- memory


def of_size(size: int) -> Damage:
    name, shape = "language_model.model.layers.0.mlp.up_proj.weight", [size // 2000, 1000]
    return header({name: {"dtype": "F16", "shape": shape, "data_offsets": [0, size]}}, data=size)


def test_too_large_for_this_machine(folder: Path, refused: Refused) -> None:
    of_size(8 * 10**12)(folder)
    said = refused(71).stderr
    assert "needs 3050." in said and " GB even in 4 bits, " in said and " GB are free\n  " in said


def test_too_large_at_this_precision(folder: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_cli.hardware.memory.free_memory", lambda device, cards=None: 10**10)
    monkeypatch.setenv("LLAVA_PRECISION", "bf16")
    of_size(2 * 10**10)(folder)
    said = refused(71).stderr
    assert "needs 20." in said and ", 10.0 GB are free\n" in said
    assert f"\n  llava ask -m {folder} -p 4bit\n" in said


# ---------------------------------------------------------------- templates and code


TEMPLATES: dict[str, str] = {
    "no end": "{% for m in messages %}",
    "unknown function": "{{ nothing() }}",
    "its own error": "{{ raise_exception('no system prompt here') }}",
    "reaches for Python": "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "endless": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "drops the picture": "{{ messages[0].content[1].text }}",
    "one picture too many": "<image><image>{{ messages[0].content[1].text }}",
}


@for_each("template", TEMPLATES.values(), ids=TEMPLATES, own=(folder, refused))
def test_templates(folder: Path, refused: Refused, template: str) -> None:
    put(folder / "chat_template.jinja", template)
    assert "--template" in refused(69, "the checkpoint's chat template").stderr


def test_a_template_that_is_no_text(folder: Path, refused: Refused) -> None:
    put(folder / "chat_template.jinja", b"\xff\xfe")
    refused()


def test_no_template_but_a_family_that_has_one(folder: Path, run: Run, drawing: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    result = run("prompt", "-m", folder, drawing, "what is this?")
    assert result.stdout.endswith("user's questions. USER: <image>\nwhat is this? ASSISTANT:\n")
    assert run("prompt", "-m", folder, drawing, "what?", "--template", "hub").exit_code == 2


def test_no_template_and_no_family(folder: Path, run: Run, drawing: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["model_type"] = "gpt_neox"
    (folder / "config.json").write_text(json.dumps(config))
    result = run("prompt", "-m", folder, drawing, "what is this?")
    assert (result.exit_code, "--template" in result.stderr) == (69, True)
    assert run("prompt", "-m", folder, drawing, "what?", "--template", "native").exit_code == 2
    assert run("prompt", "-m", folder, drawing, "what?", "--template", "qwen").exit_code == 0


@for_each(
    "damage",
    [
        change("config.json", model_type="evil", auto_map=CODE),
        change("config.json", auto_map=CODE),
        change("processor_config.json", processor_class="Evil", auto_map={"AutoProcessor": "evil.Processor"}),
        change(
            "processor_config.json",
            image_processor={"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Processor"}},
        ),
        both(
            drop("processor_config.json"),
            write(
                "preprocessor_config.json",
                '{"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Processor"}}',
            ),
        ),
        change(
            "tokenizer_config.json",
            tokenizer_class="Evil",
            auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
        ),
    ],
    ids=["config", "known type", "processor", "image processor", "old image processor", "tokenizer"],
    own=(folder,),
)
def test_code_of_a_checkpoint_is_never_run_nor_offered(
    run: Run, folder: Path, drawing: Path, tmp_path: Path, damage: Damage
) -> None:
    damage(folder)
    put(folder / "evil.py", f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    done = run("ask", "-m", folder, drawing, "what is this?", "--max-tokens", "1", input="y\ny\ny\n")
    assert not (tmp_path / "ran").exists(), "code of the checkpoint was run"
    assert "custom code" not in done.stdout and "[y/N]" not in done.stderr
    if done.exit_code:
        first, *hints = done.stderr.splitlines()
        assert (done.exit_code, done.stdout) == (69, ""), done.stderr
        assert first.startswith(f"llava: {folder}: ")
        assert all(hint.startswith("  ") for hint in hints)
    else:
        assert done.stderr == ""


@pytest.mark.parametrize(
    "damage",
    [drop("config.json"), cut("tokenizer.json", 10_000), cut("model.safetensors", -1)],
    ids=["no config", "tokenizer cut off", "weights cut off"],
)
def test_a_process_of_its_own_says_no_more(shell: Shell, folder: Path, drawing: Path, damage: Damage) -> None:
    """The same through `main`, where libraries print to a terminal of their own."""
    damage(folder)
    done = shell("ask", "-m", folder, drawing, "what is this?")
    first, *hints = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout) == (69, b"")
    assert first.startswith(f"llava: {folder}: ")
    assert all(hint.startswith("  ") for hint in hints)
