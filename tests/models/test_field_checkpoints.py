"""Checkpoints as people have them: of any age, of other tools, half of them, or not quite of one model.

Right is what transformers answers for the sound checkpoint, or one line with the next command, before a weight is read.

| kind | example | own variants | right | test |
|---|---|---|---|---|
| a processor's copy of what the model knows | no `num_additional_image_tokens` | each of the copies of each \
family absent or wrong; one of the two files alone; files of 4.31; other sizes | the sound answer | `test_facts` |
| a processor that does not fit | | what cannot be put right | refused at load | `test_tokens_that_are_no_features` |
| foreign formats | original LLaVA, GGUF, MLX | 20 others, as a folder and as a file | named, next command | \
`test_formats`, `test_formats_of_files`, `test_original_format`, `test_quantized_by_others` |
| a folder beside the checkpoint | one level too high | two levels, several, the Hub's cache | named | \
`test_one_folder_too_high` |
| half a checkpoint | `checkpoint-N` | with and without the rest beside it; unfinished downloads; git-lfs, pages | \
where the rest is | `test_a_trainers_checkpoint`, `test_unfinished`, `test_what_stands_in_a_files_place` |
| a config of another size | original with a processor | no text part, many layers, a wide vocabulary | refused from \
the headers | `test_a_config_of_another_size` |
| chat templates | content as text; lists of names; none | by `+`, `trim`, `~`; in each file; roles; vocabularies | \
transformers' prompt, or refused by name | `test_templates_*` |
| the order of parts | text, picture, text | each way of writing messages | kept, or refused | `test_order_*` |
| Pixtral as `llava` | loses its break tokens | named in each file, or in none; batches of shapes | transformers' \
own | `test_pixtral_*`, and the families of other tests |
| weights | an index of shards that are gone | old names, no metadata, tied, no index, leftovers of bitsandbytes | \
the sound answer, or named | `test_weights_*` |
| the image token | another id in the config | no such token, none of the model's | both ids and files | \
`test_image_token` |
| FlashAttention in a config | at the top | in each part, in each spelling | the sound answer | `test_flash_attention` |
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import families
from helpers.command import Run
from helpers.tables import for_each
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_cli.conversation import Conversation, Picture, Turn
from llava_cli.errors import UsageError
from llava_cli.loader import load_prompter
from llava_cli.settings import LoadOptions

Checkpoint = Callable[[str], Path]
Copy = Callable[[str], Path]
Damage = Callable[[Path], object]
QUESTION = "what is this?"


# ---------------------------------------------------------------- what is done to a checkpoint


def change(file: str, **values: Any) -> Damage:
    """Sets keys of a JSON file; None takes one out."""

    def damage(folder: Path) -> None:
        found = {**json.loads((folder / file).read_text()), **values}
        write(file, json.dumps({key: value for key, value in found.items() if value is not None}))(folder)

    return damage


def inner(part: str, **values: Any) -> Damage:
    """The same of a part of config.json."""

    def damage(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())
        change("config.json", **{part: {**found[part], **values}})(folder)

    return damage


def write(file: str, content: bytes | str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def drop(*files: str) -> Damage:
    return lambda folder: [(folder / file).unlink() for file in files]


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any], metadata: dict[str, str] | None = None) -> Damage:
    """Weights after an edit: of the dict in place, or into another one."""

    def damage(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        found = edit(found) or found
        (folder / "model.safetensors").unlink()
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "model.safetensors", metadata)

    return damage


def as_of_transformers_4(folder: Path) -> None:
    """The processor in two files, and the template in a third."""
    processor = json.loads((folder / PROCESSOR).read_text())
    pictures = processor.pop("image_processor")
    pictures["image_processor_type"] = pictures["image_processor_type"].removesuffix("Pil")
    pictures["processor_class"] = processor["processor_class"]
    write(PICTURES, json.dumps(pictures))(folder)
    write(PROCESSOR, json.dumps(processor))(folder)
    template = (folder / "chat_template.jinja").read_text()
    write("chat_template.json", json.dumps({"chat_template": template}))(folder)
    (folder / "chat_template.jinja").unlink()
    change("tokenizer_config.json", processor_class=processor["processor_class"])(folder)


def template(content: Any, file: str = "tokenizer_config.json") -> Damage:
    """Another chat template, in the file that is named; None for none at all."""

    def damage(folder: Path) -> None:
        (folder / "chat_template.json").unlink()
        if content is None:
            return
        if file.endswith(".jinja"):
            write(file, content)(folder)
        elif (folder / file).exists():
            change(file, chat_template=content)(folder)
        else:
            write(file, json.dumps({"chat_template": content}))(folder)

    return damage


PROCESSOR, PICTURES = "processor_config.json", "preprocessor_config.json"


@pytest.fixture
def copy(checkpoint: Checkpoint, tmp_path: Path) -> Copy:
    """A family's checkpoint to change, with the files that transformers 4 wrote."""

    def get(family: str) -> Path:
        folder = shutil.copytree(checkpoint(family), tmp_path / family)
        as_of_transformers_4(folder)
        return folder

    return get


@pytest.fixture(scope="module")
def sound(checkpoint: Checkpoint) -> dict[str, str]:
    """What families' sound checkpoints answer, remembered."""
    return {}


@pytest.fixture
def answers(run: Run, drawing: Path, checkpoint: Checkpoint, sound: dict[str, str]) -> Callable[[Path, str], None]:
    """Expects of a folder the answer of its family's sound checkpoint."""

    def ask(folder: Path) -> str:
        result = run("ask", "-m", folder, drawing, QUESTION, "--max-tokens", "6", "-p", "fp32", "-q")
        assert result.exit_code == 0, result.stderr
        return result.stdout

    def check(folder: Path, family: str) -> None:
        if family not in sound:
            sound[family] = ask(checkpoint(family))
        assert ask(folder) == sound[family]

    return check


@pytest.fixture
def refused(run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Expects one line and hints, before a weight is read, alike of all commands: the lines."""

    def check(name: object, *commands: str, code: int = 69) -> list[str]:
        monkeypatch.setattr("llava_cli.models.weights.load_model", None)
        found = []
        for command in commands or ("ask", "prompt"):
            result = run(command, "-m", str(name), drawing, QUESTION)
            assert (result.exit_code, result.stdout) == (code, ""), result.stderr
            first, *hints = result.stderr.splitlines()
            assert first.startswith("llava: ")
            assert hints and all(hint.startswith("  ") for hint in hints), result.stderr
            found = [first.removeprefix(f"llava: {name}: "), *(hint.strip() for hint in hints)]
        return found

    return check


# ---------------------------------------------------------------- the processor and the model

FACTS: dict[str, tuple[str, Damage]] = {
    "no class token": ("llava-llama", change(PROCESSOR, num_additional_image_tokens=None)),
    "no copies at all": (
        "llava-llama",
        change(PROCESSOR, num_additional_image_tokens=None, patch_size=None, vision_feature_select_strategy=None),
    ),
    "one class token too many": ("llava-interleave", change(PROCESSOR, num_additional_image_tokens=1)),
    "other patches": ("llava-llama", change(PROCESSOR, patch_size=16)),
    "another strategy": ("llava-llama", change(PROCESSOR, vision_feature_select_strategy="full")),
    "another strategy than full": ("llava-full", change(PROCESSOR, vision_feature_select_strategy="default")),
    "no processor_config.json": ("llava-llama", drop(PROCESSOR)),
    "no type of images": (
        "llava-llama",
        both(drop(PROCESSOR), change(PICTURES, image_processor_type=None, processor_class=None)),
    ),
    "files of 4.31": (
        "llava-llama",
        both(
            drop(PROCESSOR),
            change(
                PICTURES,
                image_processor_type=None,
                processor_class=None,
                feature_extractor_type="CLIPFeatureExtractor",
                size=families.SIDE,
                crop_size=families.SIDE,
            ),
        ),
    ),
    "a larger crop": (
        "llava-llama",
        change(PICTURES, size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84}),
    ),
    "a smaller square": ("llava-interleave", change(PICTURES, size={"height": 28, "width": 28})),
    "ViP without a class token": ("vip-llava", change(PROCESSOR, num_additional_image_tokens=None)),
    "NeXT without copies": (
        "llava-next-vicuna",
        change(PROCESSOR, num_additional_image_tokens=None, patch_size=None, vision_feature_select_strategy=None),
    ),
    "NeXT with other tiles": ("llava-next-vicuna", change(PICTURES, image_grid_pinpoints=[[56, 56], [56, 168]])),
    "NeXT with a larger crop": (
        "llava-next-vicuna",
        change(PICTURES, size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84}),
    ),
    "OneVision with fewer tokens": (
        "llava-onevision",
        change(PROCESSOR, num_image_tokens=9, vision_feature_select_strategy=None),
    ),
    "OneVision with other tiles": (
        "llava-onevision",
        both(change(PICTURES, image_grid_pinpoints=[[56, 56]]), change(PROCESSOR, vision_aspect_ratio="anyres_max_1")),
    ),
    "Idefics with more tokens": ("smolvlm", change(PROCESSOR, image_seq_len=7)),
    "SmolVLM with larger tiles": ("smolvlm2", change(PICTURES, max_image_size={"longest_edge": 112})),
    "Pixtral with other patches": ("pixtral", change(PROCESSOR, patch_size=16)),
    "Pixtral larger than its table": ("pixtral", change(PICTURES, size={"longest_edge": 1024})),
}


@for_each("family, damage", FACTS.values(), ids=FACTS, own=(copy, answers))
def test_facts(family: str, damage: Damage, copy: Copy, answers: Callable[[Path, str], None]) -> None:
    folder = copy(family)
    damage(folder)
    answers(folder, family)


def test_a_tower_that_is_not_known_is_asked_itself(copy: Copy) -> None:
    """DINOv2's has a class token, of which no table says so."""
    folder = copy("llava-llama")
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    change("config.json", vision_config={"model_type": "dinov2", **vision})(folder)
    change(PROCESSOR, num_additional_image_tokens=None)(folder)
    assert load_prompter(LoadOptions(model=str(folder))).processor.num_additional_image_tokens == 1


def test_tokens_that_are_no_features(copy: Copy, refused: Callable[..., list[str]]) -> None:
    folder = copy("llava-llama")
    change(PICTURES, do_center_crop=False, do_resize=False)(folder)
    assert refused(folder, "ask")[0].startswith("its processor does not fit its vision tower (Input image size")


def test_a_processor_that_counts_in_another_way(
    copy: Copy, refused: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlavaProcessor

    monkeypatch.setattr(LlavaProcessor, "replace_image_token", lambda self, *inputs, **options: 15 * self.image_token)
    words = "a picture has 15 tokens in its prompts, 16 features from its vision tower"
    assert refused(copy("llava-llama"), "ask")[0] == words


def test_doctor_agrees(copy: Copy, run: Run) -> None:
    folder = copy("llava-llama")
    change(PROCESSOR, num_additional_image_tokens=None, patch_size=None)(folder)
    result = run("doctor", folder, "-p", "fp32")
    assert (result.exit_code, "BAD" in result.stdout) == (0, False)


# ---------------------------------------------------------------- foreign formats

FORMATS: dict[str, tuple[list[str], str, str]] = {
    "GGUF": (["llava-v1.5-7b-Q4_K.gguf", "mmproj-model-f16.gguf"], "llama.cpp's format, GGUF", "llama-server -m"),
    "GGUF in capitals": (["MODEL.GGUF"], "llama.cpp's format, GGUF", "llama-server -m"),
    "Ollama": (["Modelfile"], "models of Ollama's", "ollama serve"),
    "Mistral": (["params.json", "consolidated.safetensors", "tekken.json"], "Mistral's own format", "transformers"),
    "DeepSpeed": (["global_step100/zero_pp_rank_0", "zero_to_fp32.py"], "DeepSpeed", "zero_to_fp32.py"),
    "FSDP": (["__0_0.distcp", "__1_0.distcp"], "sharded (FSDP)", "accelerate merge-weights"),
    "FSDP of accelerate": (["pytorch_model_fsdp_0/.metadata"], "sharded (FSDP)", "accelerate merge-weights"),
    "diffusers": (["model_index.json", "unet/config.json"], "pipeline of diffusers", "llava models"),
    "MLC": (["mlc-chat-config.json"], "compiled by MLC", "transformers"),
    "OpenVINO": (["openvino_language_model.xml"], "exported to OpenVINO", "transformers"),
    "ONNX": (["onnx/decoder_model_merged.onnx"], "exported to ONNX", "transformers"),
    "Core ML": (["model.mlpackage/Manifest.json"], "exported to Core ML", "transformers"),
    "LiteRT": (["model.tflite"], "exported to LiteRT", "transformers"),
    "TensorRT": (["rank0.engine"], "compiled by TensorRT-LLM", "transformers"),
    "TensorFlow": (["tf_model.h5"], "weights of TensorFlow's", "transformers"),
    "Flax": (["flax_model.msgpack"], "weights of Flax's", "transformers"),
    "NeMo": (["llava.nemo"], "NeMo's format", "transformers"),
}


@for_each(
    "files, words, hint, with_config",
    [(*form, with_config) for form in FORMATS.values() for with_config in (False, True)],
    own=(copy, refused),
)
def test_formats(
    files: list[str], words: str, hint: str, with_config: bool, copy: Copy, refused: Callable[..., list[str]]
) -> None:
    """Of a folder without a config, and of one that has all but weights for transformers."""
    folder = copy("llava-llama")
    for file in folder.iterdir():
        if not with_config or file.name == "model.safetensors":
            file.unlink()
    for name in files:
        write(name, b"x")(folder)
    found, command = refused(folder, "ask")
    assert words in found
    assert hint in command


@for_each(
    "name, is_path",
    itertools.product(
        ["a.gguf", "model.safetensors", "pytorch_model.bin", "config.json", "llava.tar.gz"], [True, False]
    ),
    own=(refused,),
)
def test_formats_of_files(
    name: str, is_path: bool, tmp_path: Path, refused: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file as `-m`, by its path and by its name in the current folder."""
    write(name, b"x")(tmp_path)
    monkeypatch.chdir(tmp_path)
    what = {"a.gguf": "llama.cpp's format", "llava.tar.gz": "an archive"}.get(name, "one file of a model")
    found, _ = refused(tmp_path / name if is_path else name)
    assert what in found
    assert name in found


ORIGINAL = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu"}


@for_each(
    "kind, has_processor",
    itertools.product(["llava_llama", "llava_mistral", "llava_qwen", "llava_mpt", "llava", "bunny"], [True, False]),
    own=(copy, refused),
)
def test_original_format(kind: str, has_processor: bool, copy: Copy, refused: Callable[..., list[str]]) -> None:
    """`llava` made a random 7B in memory."""
    folder = copy("llava-llama")
    write("config.json", json.dumps({"model_type": kind, "architectures": ["X"], **ORIGINAL}))(folder)
    if not has_processor:
        drop(PROCESSOR, PICTURES)(folder)
    found, command = refused(folder)
    assert found.startswith("is in LLaVA's original format")
    assert command.startswith(f"llava models convert {folder} -o ")


MLX_BITS = {"group_size": 64, "bits": 4}
BY_OTHERS: dict[str, tuple[Damage, str]] = {
    "GPTQ": (change("config.json", quantization_config={"quant_method": "gptq", "bits": 4}), "quantization by gptq"),
    "AWQ": (change("config.json", quantization_config={"quant_method": "awq"}), "quantization by awq"),
    "FP8": (change("config.json", quantization_config={"quant_method": "fp8"}), "quantization by fp8"),
    "compressed-tensors, inside": (
        inner("text_config", quantization_config={"quant_method": "compressed-tensors"}),
        "quantization by compressed-tensors",
    ),
    "MLX": (change("config.json", quantization=MLX_BITS), "MLX has quantized it"),
    "MLX, twice": (
        change("config.json", quantization=MLX_BITS, quantization_config=MLX_BITS),
        "MLX has quantized it",
    ),
}


@for_each("damage, words", BY_OTHERS.values(), ids=BY_OTHERS, own=(copy, refused))
def test_quantized_by_others(damage: Damage, words: str, copy: Copy, refused: Callable[..., list[str]]) -> None:
    folder = copy("llava-llama")
    damage(folder)
    found, command = refused(folder)
    assert words in found
    assert "unquantized" in command


def test_weights_of_mlx(copy: Copy, run: Run, drawing: Path) -> None:
    folder = copy("llava-llama")

    def transposed(found: dict[str, torch.Tensor]) -> None:
        found.update({name: w.permute(0, 2, 3, 1) for name, w in found.items() if "patch_embedding" in name})

    tensors(transposed, {"format": "mlx"})(folder)
    result = run("ask", "-m", folder, drawing, QUESTION)
    assert (result.exit_code, "its weights are in MLX's format" in result.stderr) == (69, True)


@pytest.mark.parametrize("kind, words", [("llama", "they read text alone"), ("clip", "they write no text")])
def test_models_of_another_kind(kind: str, words: str, copy: Copy, refused: Callable[..., list[str]]) -> None:
    folder = copy("llava-llama")
    change("config.json", model_type=kind)(folder)
    assert words in refused(folder)[0]


# ---------------------------------------------------------------- folders

BELOW = {
    "one": (["llava-tuned"], "holds one: llava-tuned"),
    "two further down": (["a/b"], "holds one: a/b"),
    "steps of a trainer": (
        [f"checkpoint-{n}" for n in (1000, 250, 500, 750)],
        "holds 4: checkpoint-500, checkpoint-750, checkpoint-1000 and 1 more",
    ),
    "the Hub's cache of a model": (["snapshots/0123abcd"], "holds one: snapshots/0123abcd"),
    "the Hub's cache": (["models--x--y/snapshots/0123abcd"], "holds one: models--x--y/snapshots/0123abcd"),
}


@for_each("folders, words", BELOW.values(), ids=BELOW, own=(refused,))
def test_one_folder_too_high(folders: list[str], words: str, tmp_path: Path, refused: Callable[..., list[str]]) -> None:
    for name in folders:
        write(f"top/{name}/config.json", "{}")(tmp_path)
    found, command = refused(tmp_path / "top")
    assert words in found
    assert command.startswith(f"llava ask -m {tmp_path / 'top'}/")
    assert command.endswith("checkpoint-1000" if len(folders) > 1 else folders[0])


THE_REST = (PROCESSOR, PICTURES, "chat_template.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("sign", ["trainer_state.json", "training_args.bin", "optimizer.pt"])
def test_a_trainers_checkpoint(sign: str, copy: Copy, refused: Callable[..., list[str]]) -> None:
    folder = copy("llava-llama")
    both(drop(*THE_REST), write(sign, b"{}"))(folder)
    found, command = refused(folder)
    assert found == "no processor_config.json or preprocessor_config.json: a trainer's checkpoint"
    assert command.startswith("cp MODEL/")


def test_a_trainers_checkpoint_beside_the_rest(copy: Copy, refused: Callable[..., list[str]]) -> None:
    """The command that is named makes it whole."""
    parent = copy("llava-llama")
    folder = parent / "checkpoint-100"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        shutil.move(parent / name, folder / name)
    found, command = refused(folder, "ask")
    assert f"{parent} has it" in found
    program, *files, target = command.split()
    assert (program, Path(target)) == ("cp", folder)
    assert {Path(file).name for file in files} >= set(THE_REST)
    for file in files:
        shutil.copy(file, target)
    assert (
        load_prompter(LoadOptions(model=str(folder))).render(Conversation().ask(QUESTION))
        == f"USER: {QUESTION} ASSISTANT:"
    )


UNFINISHED: dict[str, tuple[Damage, str]] = {
    "the Hub's": (
        both(
            drop("model.safetensors"),
            write(".cache/huggingface/download/model.safetensors.abc.incomplete", b"x"),
        ),
        "model.safetensors is missing, and model.safetensors.abc.incomplete is of a download",
    ),
    "a browser's": (
        both(drop("tokenizer.json"), write("tokenizer.json.crdownload", b"x")),
        "no tokenizer.json, and tokenizer.json.crdownload is of a download",
    ),
    "aria2's, of full size": (
        write("model.safetensors.aria2", b"x"),
        "the download of model.safetensors has not ended",
    ),
}


@pytest.mark.parametrize("damage, words", UNFINISHED.values(), ids=UNFINISHED)
def test_unfinished(damage: Damage, words: str, copy: Copy, refused: Callable[..., list[str]]) -> None:
    folder = copy("llava-llama")
    damage(folder)
    assert words in refused(folder, "ask")[0]


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12769008\n"


@for_each(
    "file, content, words, command",
    [
        (file, *what)
        for file in ("model.safetensors", "tokenizer.json", "config.json")
        for what in (
            (LFS, "a pointer of git-lfs", "git -C"),
            ("\n<!DOCTYPE html><html>", "a web page", "llava models pull"),
        )
    ],
    own=(copy, refused),
)
def test_what_stands_in_a_files_place(
    file: str, content: str, words: str, command: str, copy: Copy, refused: Callable[..., list[str]]
) -> None:
    folder = copy("llava-llama")
    write(file, content)(folder)
    found, hint = refused(folder)
    assert found.startswith(f"{file} is {words}")
    assert hint.startswith(command)


# ---------------------------------------------------------------- sizes

SIZES: dict[str, tuple[Damage, str]] = {
    "no text part": (change("config.json", text_config=None), "config.json describes 6,7"),
    "layers": (
        inner("text_config", num_hidden_layers=300, hidden_size=8192, intermediate_size=28672),
        "config.json describes ",
    ),
    "a wide vocabulary": (inner("text_config", vocab_size=50_000_000), "config.json describes "),
}


@pytest.mark.parametrize("damage, words", SIZES.values(), ids=SIZES)
def test_a_config_of_another_size(damage: Damage, words: str, copy: Copy, refused: Callable[..., list[str]]) -> None:
    """From the headers: nothing of that size is ever made."""
    folder = copy("llava-llama")
    damage(folder)
    assert refused(folder, "ask")[0].startswith(words)


def test_a_vocabulary_that_is_a_little_larger(copy: Copy, run: Run, drawing: Path) -> None:
    folder = copy("llava-llama")
    inner("text_config", vocab_size=320)(folder)
    result = run("ask", "-m", folder, drawing, QUESTION)
    assert result.exit_code == 69
    rows = len(families.tokenizer())
    assert f"is [{rows}, 64] in its files, and [320, 64] by its config.json" in result.stderr


# ---------------------------------------------------------------- chat templates

AS_TEXT = {
    "+": "{{ m['role'] | upper + ': ' + m['content'] + ' ' }}",
    "trim": "{{ m['role'] | upper }}: {{ m['content'] | trim }}{{ ' ' }}",
    "~": "{{ m['role'] | upper ~ ': ' ~ m['content'] ~ ' ' }}",
    "strip": "{{ m['role'] | upper }}: {{ m['content'].strip() }}{{ ' ' }}",
    "printed": "{{ m['role'] | upper }}: {{ m['content'] }}{{ ' ' }}",
    "its own picture": "{{ m['role'] | upper }}: {% if m['role'] == 'user' %}<image>\n{% endif %}{{ m['content'] }} ",
}


@for_each("body", AS_TEXT.values(), ids=AS_TEXT, own=(copy,))
def test_templates_that_take_text(body: str, copy: Copy, run: Run, drawing: Path) -> None:
    folder = copy("llava-llama")
    template(f"{{% for m in messages %}}{body}{{% endfor %}}{{% if add_generation_prompt %}}ASSISTANT:{{% endif %}}")(
        folder
    )
    result = run("prompt", "-m", folder, drawing, QUESTION)
    assert result.stdout == f"USER: <image>\n{QUESTION} ASSISTANT:\n"
    if "picture" not in body and "<image>" not in body:
        assert run("prompt", "-m", folder, QUESTION).stdout == f"USER: {QUESTION} ASSISTANT:\n"  # no list, either


NAMES = [{"name": "default", "template": families.VICUNA}, {"name": "tool_use", "template": "x"}]


@for_each(
    "file, names",
    itertools.product(
        ["tokenizer_config.json", "chat_template.json", PROCESSOR],
        [NAMES, {one["name"]: one["template"] for one in NAMES}, NAMES[:1]],
    ),
    own=(copy,),
)
def test_templates_by_name(file: str, names: Any, copy: Copy, run: Run, drawing: Path) -> None:
    folder = copy("llava-llama")
    template(names, file)(folder)
    result = run("prompt", "-m", folder, drawing, QUESTION)
    if result.exit_code:  # what transformers itself does not load
        assert result.stderr.startswith(f"llava: {folder}: its processor cannot be loaded")
    else:
        assert result.stdout == f"USER: <image>\n{QUESTION} ASSISTANT:\n"


def test_templates_of_which_none_is_the_default(copy: Copy, run: Run, drawing: Path) -> None:
    folder = copy("llava-llama")
    template([{"name": "a", "template": families.VICUNA}, {"name": "b", "template": "x"}])(folder)
    result = run("prompt", "-m", folder, drawing, QUESTION)
    assert (result.exit_code, "there are several (a, b)" in result.stderr) == (69, True)
    assert run("prompt", "-m", folder, drawing, QUESTION, "--template", "llava-1.5").exit_code == 0


def test_templates_that_name_no_picture(copy: Copy, run: Run, drawing: Path) -> None:
    folder = copy("llava-llama")
    template("{% for m in messages %}{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}{% endfor %}")(
        folder
    )
    result = run("ask", "-m", folder, drawing, QUESTION)
    assert (result.exit_code, "--template takes" in result.stderr) == (69, True)


STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endfor %}"
)


def test_templates_that_refuse_roles(copy: Copy, run: Run, drawing: Path) -> None:
    folder = copy("llava-llama")
    template(STRICT)(folder)
    result = run("prompt", "-m", folder, drawing, QUESTION, "--system", "Be brief.")
    assert result.exit_code == 2
    assert result.stderr.startswith(
        "llava: --system: the checkpoint's chat template takes none (System role not supported)"
    )
    greeted = Conversation((Turn("", answer="Hello!", is_unasked=True),)).ask("who?")
    with pytest.raises(UsageError, match=r"refuses it \(roles must alternate\)"):
        load_prompter(LoadOptions(model=str(folder))).render(greeted)


def test_templates_that_leave_out_what_the_system_says(copy: Copy, run: Run, drawing: Path) -> None:
    folder = copy("llava-llama")
    template(families.VICUNA.replace("for m in messages", "for m in messages if m['role'] != 'system'"))(folder)
    result = run("prompt", "-m", folder, drawing, QUESTION, "--system", "Be brief.")
    assert (result.exit_code, "--system: the checkpoint's chat template leaves it out" in result.stderr) == (2, True)


VOCABULARIES = {
    "Llama 3": (["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|start_header_id|>user"),
    "ChatML": (["<|im_start|>", "<|im_end|>"], "<|im_start|>user\n<image>\n"),
    "Gemma": (["<start_of_turn>", "<end_of_turn>"], "<start_of_turn>user\n<image>\n"),
    "Phi-3": (["<|user|>", "<|assistant|>", "<|end|>"], "<|user|>\n<image>\n"),
    "Mistral 3": (["[INST]", "[/INST]"], "[INST] <image>\n"),
    "Vicuna": ([], "USER: <image>\n"),
}


@for_each(
    "family, words, begin",
    [
        *(("llava-llama", *vocabulary) for vocabulary in VOCABULARIES.values()),
        *((family, *VOCABULARIES["ChatML"]) for family in ("vip-llava", "llava-next-vicuna")),
    ],
    own=(copy,),
)
def test_templates_are_told_from_the_vocabulary(family: str, words: list[str], begin: str, copy: Copy) -> None:
    folder = copy(family)
    template(None)(folder)
    families.tokenizer(extra=("<unk>", *words)).save_pretrained(folder)
    prompter = load_prompter(LoadOptions(model=str(folder)))
    text = prompter.render(Conversation().ask(QUESTION, [picture(60, 40)]))
    assert begin in text
    assert ("USER:" in text) == (not words)
    assert "because the checkpoint has none" in prompter.template_origin


def test_templates_of_a_vocabulary_that_is_not_known(copy: Copy, run: Run, drawing: Path) -> None:
    """Never Vicuna's words, where nothing speaks for them."""
    folder = copy("llava-llama")
    template(None)(folder)
    families.tokenizer("<bos>", "<eos>").save_pretrained(folder)
    result = run("prompt", "-m", folder, drawing, QUESTION)
    assert (result.exit_code, "the checkpoint's chat template: there is none" in result.stderr) == (69, True)
    assert "--template takes" in result.stderr


# ---------------------------------------------------------------- the order of texts and pictures


def picture(width: int, height: int) -> Picture:
    return Picture("a", Image.new("RGB", (width, height)), "")


MIXED = Conversation((Turn.of(["one", picture(60, 40), "two", picture(40, 60)]),))
TEXT_FIRST = Conversation((Turn.of(["one", picture(60, 40), picture(40, 60)]),))
IN_ORDER = (
    "{% for m in messages %}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
    "{% endfor %}"
)


@pytest.mark.parametrize(
    "text, expected",
    [
        (IN_ORDER, "one<image>two<image>"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "one\n<image>\ntwo\n<image>"),
    ],
)
def test_order_is_kept(text: str, expected: str, copy: Copy) -> None:
    folder = copy("llava-llama")
    template(text)(folder)
    prompter = load_prompter(LoadOptions(model=str(folder)))
    assert prompter.render(MIXED) == expected
    assert prompter.render(TEXT_FIRST) == expected.replace("two", "").replace("\n\n", "\n")


@for_each("name", [None, "hub", "native", "llava-1.5"], own=(copy,))
def test_order_that_is_not_kept_is_refused(name: str | None, copy: Copy) -> None:
    prompter = load_prompter(LoadOptions(model=str(copy("llava-llama")), template=name))
    with pytest.raises(UsageError, match="puts all pictures of a message before its text"):
        prompter.render(MIXED)
    asked = Conversation().ask("one", MIXED.pictures)
    assert prompter.render(TEXT_FIRST) == prompter.render(asked)  # which is how such a model was trained
    assert prompter.render(asked).count("<image>") == 2


LATER = Conversation((Turn("one", answer="a"), Turn("two", system="Be brief.")), "Be kind.")


def test_a_later_system_text_has_its_place_or_is_refused(copy: Copy) -> None:
    folder = str(copy("llava-llama"))
    native = load_prompter(LoadOptions(model=folder, template="native")).render(LATER)
    assert native == "Be kind. USER: one ASSISTANT: a</s>Be brief. USER: two ASSISTANT:"
    with pytest.raises(UsageError, match="leaves it out"):
        load_prompter(LoadOptions(model=folder, template="gemma")).render(LATER)


def test_order_of_a_turn() -> None:
    one = picture(60, 40)
    assert Turn.of([one, "a", "b"]) == Turn("a\nb", (one,))
    assert Turn.of([one]) == Turn("", (one,))
    turn = Turn.of(["a", "b", one, "c"], "d")
    assert (turn.question, turn.pictures, turn.answer, turn.parts) == ("a\nb\nc", (one,), "d", ("a\nb", one, "c"))


# ---------------------------------------------------------------- Pixtral

NAMED: dict[str, Damage] = {
    "in all files": both(),
    "for pictures alone": both(
        change(PROCESSOR, processor_class=None), change("tokenizer_config.json", processor_class=None)
    ),
    "by the tokenizer alone": both(change(PROCESSOR, processor_class=None), change(PICTURES, processor_class=None)),
    "nowhere": both(*(change(file, processor_class=None) for file in (PROCESSOR, PICTURES, "tokenizer_config.json"))),
}


@for_each("damage", NAMED.values(), ids=NAMED, own=(copy,))
def test_pixtral_has_its_break_tokens(damage: Damage, copy: Copy) -> None:
    folder = copy("pixtral")
    damage(folder)
    prompter = load_prompter(LoadOptions(model=str(folder)))
    ids = prompter.encode(Conversation().ask("x", [picture(60, 40)]))["input_ids"][0].tolist()
    words = prompter.tokenizer.convert_ids_to_tokens(ids)
    row = ["[IMG]"] * 5  # of 60 pixels
    assert words == ["<s>", "[INST]", *row, "[IMG_BREAK]", *row, "[IMG_BREAK]", *row, "[IMG_END]", "x", "[/INST]"]


def test_pixtral_in_a_batch_of_shapes(checkpoint: Checkpoint, run: Run, tmp_path: Path) -> None:
    shapes = {"a": (60, 40), "b": (40, 90), "c": (112, 112), "d": (300, 30)}
    for name, size in shapes.items():
        Image.radial_gradient("L").resize(size).convert("RGB").save(tmp_path / f"{name}.png")
    options = ("-m", checkpoint("pixtral"), QUESTION, "--max-tokens", "6", "-p", "fp32")
    result = run("batch", tmp_path, *options, "-o", tmp_path / "rows.jsonl", "-q")
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == len(shapes)
    for row in rows:
        assert run("ask", tmp_path / row["image"], *options).stdout == row["answer"] + "\n"


def test_a_processor_of_another_class_is_not_taken(copy: Copy, answers: Callable[[Path, str], None]) -> None:
    folder = copy("llava-llama")
    change(PROCESSOR, processor_class="CLIPProcessor")(folder)
    answers(folder, "llava-llama")


# ---------------------------------------------------------------- weights


WEIGHTS: dict[str, Damage] = {
    "an index of shards that are gone": write(
        "model.safetensors.index.json", json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    ),
    "no metadata": tensors(lambda found: None, None),
    "names of transformers 4.52": tensors(
        lambda found: {
            (name if name.startswith(("lm_head", "model.")) else f"model.{name}")
            .replace("model.language_model.lm_head", "lm_head")
            .replace("model.language_model.model.", "model.language_model."): tensor
            for name, tensor in found.items()
        },
        {"format": "pt"},
    ),
    "names of transformers 4.36": tensors(
        lambda found: {
            f"language_model.{name}"
            if name == "lm_head.weight"
            else name.replace("model.language_model.", "language_model.model.")
            .replace("model.vision_tower.", "vision_tower.")
            .replace("model.multi_modal", "multi_modal"): tensor
            for name, tensor in found.items()
        },
        {"format": "pt"},
    ),
}


@for_each("damage", WEIGHTS.values(), ids=WEIGHTS, own=(copy, answers))
def test_weights_that_answer(damage: Damage, copy: Copy, answers: Callable[[Path, str], None]) -> None:
    folder = copy("llava-llama")
    damage(folder)
    answers(folder, "llava-llama")


def test_weights_in_the_hubs_cache_beside_an_index(checkpoint: Checkpoint, home: Path, run: Run, drawing: Path) -> None:
    commit = "0" * 40
    cache = home / "hub" / "hub" / "models--x--y"
    folder = shutil.copytree(checkpoint("llava-llama"), cache / "snapshots" / commit)
    write("refs/main", commit)(cache)
    WEIGHTS["an index of shards that are gone"](folder)
    assert run("ask", "-m", "x/y", drawing, QUESTION, "--max-tokens", "1").exit_code == 0


BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}


@for_each("bits, part", itertools.product(["load_in_4bit", "load_in_8bit"], [None, "text_config"]), own=(copy, answers))
def test_weights_that_only_the_config_calls_quantized(
    bits: str, part: str | None, copy: Copy, run: Run, drawing: Path, answers: Callable[[Path, str], None]
) -> None:
    folder = copy("llava-llama")
    values = {"quantization_config": {**BITSANDBYTES, bits: True}}
    (inner(part, **values) if part else change("config.json", **values))(folder)
    answers(folder, "llava-llama")
    said = run("ask", "-m", folder, drawing, QUESTION, "--max-tokens", "1", "-p", "fp32").stderr
    assert "config.json says that bitsandbytes has quantized its weights; they are not" in said
    checks = run("doctor", folder, "-p", "fp32")
    assert (checks.exit_code, "says that bitsandbytes" in checks.stdout) == (0, True)


LACKS: dict[str, tuple[Damage, str]] = {
    "a head": (
        tensors(lambda found: {name: one for name, one in found.items() if "lm_head" not in name}),
        "lacks 1 tensors, lm_head.weight first",
    ),
    "the index": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors"),
        "model.safetensors is missing, and of the shards (model-00001-of-00002.safetensors …) model.safetensors.index",
    ),
    "all but a pickle": (
        both(drop("model.safetensors"), write("pytorch_model-00001-of-00002.bin", b"x"), write("optimizer.pt", b"x")),
        "pytorch_model-00001-of-00002.bin is a pickle, which is never loaded",
    ),
}


@pytest.mark.parametrize("damage, words", LACKS.values(), ids=LACKS)
def test_weights_that_are_not_all_there(damage: Damage, words: str, copy: Copy, run: Run, drawing: Path) -> None:
    folder = copy("llava-llama")
    damage(folder)
    result = run("ask", "-m", folder, drawing, QUESTION)
    assert (result.exit_code, result.stdout) == (69, "")
    assert words in result.stderr


# ---------------------------------------------------------------- tokens, and attention

TOKENS: dict[str, tuple[Damage, str]] = {
    "another token": (
        change("config.json", image_token_index=255),
        r"config\.json has 255 .* the tokenizer has \d+ for",
    ),
    "none of the tokenizer": (
        change("config.json", image_token_index=32000),
        r"config\.json has 32000 for the image token \(which the tokenizer does not have\), the tokenizer has",
    ),
    "none of the model": (
        inner("text_config", vocab_size=200),
        r"config\.json has 200 tokens \(vocab_size\), and \d+ for",
    ),
}


@pytest.mark.parametrize("damage, words", TOKENS.values(), ids=TOKENS)
def test_image_token(damage: Damage, words: str, copy: Copy, refused: Callable[..., list[str]], run: Run) -> None:
    folder = copy("llava-llama")
    damage(folder)
    assert re.search(words, refused(folder)[0])
    assert re.search(words, run("doctor", folder).stdout)


FLASH: dict[str, Damage] = {
    "at the top": change("config.json", attn_implementation="flash_attention_2"),
    "as transformers keeps it": change("config.json", _attn_implementation="flash_attention_2"),
    "as it was once": change("config.json", _flash_attn_2_enabled=True, use_flash_attention_2=True),
    "in the language model": inner("text_config", attn_implementation="flash_attention_3"),
    "in the tower": inner("vision_config", _attn_implementation="flash_attention_2"),
    "for each part": change(
        "config.json", attn_implementation={"text_config": "flash_attention_2", "vision_config": "flash_attention_2"}
    ),
}


@for_each("damage", FLASH.values(), ids=FLASH, own=(copy, answers))
def test_flash_attention(damage: Damage, copy: Copy, answers: Callable[[Path, str], None]) -> None:
    folder = copy("llava-llama")
    damage(folder)
    answers(folder, "llava-llama")
