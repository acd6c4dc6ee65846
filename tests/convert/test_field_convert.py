"""LLaVA's original format is used, not only named.

kind                          | example                        | own variants                               | right value                         | test
------------------------------|--------------------------------|--------------------------------------------|-------------------------------------|-----
a folder of original code     | llava_llama in .bin            | mistral, qwen, tiles, OneVision; shards;   | tensors and tokens of transformers' | test_equals_the_reference
                              |                                | tower within and beside                    | own, for the same tensors           | test_answers_are_the_references
a tokenizer without pictures  | 32,000 tokens, no <image>      | no <pad> either; embeddings tied; 64 rows  | same answers, new tokens never said | test_tokens_are_added
tokenizer.model alone         | Llama's                        | sentencepiece is not installed             | same ids; the command to install it | test_sentencepiece, test_sentencepiece_is_missing
a projector of one layer      | "linear"                       | not named                                  | same features                       | test_linear_projector
parts of a model              | a projector alone              | a LoRA; neither with its language model    | as the whole; what to give          | test_projector_alone, test_lora, test_parts_are_named
a tower that is elsewhere     | in the Hub's cache             | --vision-tower; nowhere                    | as the whole; where to get it       | test_tower_from_elsewhere, test_tower_is_nowhere
what transformers has not     | mlp3x_gelu                     | tiles in another order, unknown tensors,   | one line that names it, 69          | test_refused
                              |                                | other decoders, start and end tokens       |                                     |
damaged or hostile            | a pickle that runs code        | cut off, shards missing, outside the       | one line that names the file, 69,   | test_damaged
                              |                                | folder, sizes, no tensors                  | nothing is run                      |
the output                    | OUT is there                   | a disk that is full, no such place, stopped| 73, and never half of it            | test_out_is_taken, test_no_half
no such format                | transformers' own              | no folder, no config                       | one line and the next command       | test_not_original
"""  # noqa: E501

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.command import Run
from helpers.homes import home
from helpers.originals import KINDS, Original, change, original, put_weights, read, write
from helpers.tables import for_each
from helpers.vocabularies import encoder, path_of
from PIL import Image
from safetensors.torch import load_file

from llava_cli import load
from llava_cli.conversation import Conversation, Picture
from llava_cli.convert import conversion, output, tokenizer
from llava_cli.loader import load_prompter
from llava_cli.settings import LoadOptions, Sampling


@pytest.fixture
def llama(tmp_path: Path) -> Original:
    return original("llava-llama", tmp_path)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return {name.replace("vision_tower.vision_model.", "vision_tower."): one for name, one in found.items()}


def are_equal(one: Path, other: Path) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def talk() -> Conversation:
    image = Image.linear_gradient("L").resize((300, 200)).convert("RGB")
    image.paste("red", (20, 60, 120, 160))
    return Conversation().ask("what is this?", [Picture("a red square", image, sha256="")])


def answer(folder: Path, template: str | None = None) -> str:
    engine = load(str(folder), precision="fp32", device="cpu", template=template)
    return engine.answer(talk(), Sampling(max_tokens=12)).text


@for_each(
    ("family", "pickled", "with_tower", "shards"),
    [
        *((family, True, True, 1) for family in KINDS),
        *(("llava-llama", *stored) for stored in [(False, False, 1), (True, False, 3), (False, True, 2)]),
    ],
)
def test_equals_the_reference(
    family: str, pickled: bool, with_tower: bool, shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = original(family, tmp_path, pickled, with_tower, shards)
    if shards == 3:
        monkeypatch.setattr(output, "SHARD_BYTES", 200_000)
    conversion.convert(str(made.folder), tmp_path / "out")
    assert are_equal(tmp_path / "out", made.reference)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shards == 3)
    ours, theirs = (read(folder / "config.json") for folder in (tmp_path / "out", made.reference))
    for key in ("model_type", "architectures", "image_token_index", "vision_feature_select_strategy"):
        assert ours.get(key) == theirs.get(key), key
    assert ours["vision_config"]["num_hidden_layers"] == theirs["vision_config"]["num_hidden_layers"]


@for_each("family", KINDS)
def test_answers_are_the_references(family: str, tmp_path: Path, run: Run) -> None:
    made = original(family, tmp_path)
    done = run("models", "convert", made.folder, "-o", out := tmp_path / "out")
    assert done.exit_code == 0
    assert f"llava ask -m {out}" in done.stderr.replace("\n", "") and not done.stdout
    ours, theirs = (
        load(str(folder), precision="fp32", device="cpu", template=template)
        for folder, template in ((out, None), (made.reference, "native"))
    )
    assert ours.prompt(talk()) == theirs.prompt(talk())
    inputs, expected = ours.inputs(talk()), theirs.inputs(talk())
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    sampling = Sampling(max_tokens=12)
    assert ours.answer(talk(), sampling).text == theirs.answer(talk(), sampling).text


def _without_pictures(folder: Path) -> None:
    """Renames the tokens for pictures and filling: they are then words like others."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace("<image>", "<other_i>").replace("<pad>", "<other_p>"))
    change(folder / "tokenizer_config.json", pad_token=None, extra_special_tokens=None)


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_are_added(llama: Original, tied: bool, tmp_path: Path, run: Run) -> None:
    _without_pictures(llama.folder)
    if tied:
        weights = load_file(llama.folder / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        change(llama.folder / "config.json", tie_word_embeddings=True)
        put_weights(llama.folder, weights)
        reference = load_file(llama.reference / "model.safetensors")
        reference["language_model.lm_head.weight"] = reference["language_model.model.embed_tokens.weight"].clone()
        put_weights(llama.reference, reference)
    assert run("models", "convert", llama.folder, "-o", tmp_path / "out").exit_code == 0
    out = tmp_path / "out"
    config, before = read(out / "config.json"), read(llama.folder / "config.json")["vocab_size"]
    assert (config["image_token_index"], config["pad_token_id"]) == (before, before + 1)
    assert config["text_config"]["vocab_size"] == 320  # of 64 rows a multiple
    grown = tensors(out)["language_model.model.embed_tokens.weight"]
    assert torch.equal(grown[:before], tensors(llama.reference)["language_model.model.embed_tokens.weight"])
    assert ("language_model.lm_head.weight" in tensors(out)) != tied
    assert answer(out) == answer(llama.reference, "native")


def test_sentencepiece(llama: Original, tmp_path: Path, run: Run) -> None:
    import sentencepiece

    words = iter([f"what is this number {number}? a red circle, a blue triangle" for number in range(200)])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words,
        model_prefix=str(llama.folder / "tokenizer"),
        vocab_size=295,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (llama.folder / "tokenizer.json").unlink()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    write(llama.folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **special, "legacy": False})
    weights = load_file(llama.folder / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        weights[name] = torch.cat([weights[name], weights[name]])[:295]
    put_weights(llama.folder, weights)
    change(llama.folder / "config.json", vocab_size=295)
    assert run("models", "convert", llama.folder, "-o", tmp_path / "out").exit_code == 0
    out = tmp_path / "out"
    theirs = sentencepiece.SentencePieceProcessor(str(llama.folder / "tokenizer.model"))
    from transformers import AutoTokenizer

    text = "what is this number? é a red circle"
    ours: Any = AutoTokenizer.from_pretrained(out)
    assert ours(text)["input_ids"] == [1, *theirs.encode(text)]
    assert ours.convert_tokens_to_ids(["<image>", "<pad>"]) == [295, 296]
    assert answer(out)


def test_a_real_sentencepiece_model(llama: Original, tmp_path: Path, run: Run) -> None:
    """Mistral's: the converted tokenizer has the ids of sentencepiece, also for two spaces and after an end token."""
    (llama.folder / "tokenizer.json").unlink()
    shutil.copy(path_of("mistral"), llama.folder / "tokenizer.model")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    write(llama.folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **special})
    weights = load_file(llama.folder / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        weights[name] = torch.zeros(32000, weights[name].shape[1])
    put_weights(llama.folder, weights)
    change(llama.folder / "config.json", vocab_size=32000)
    out, encode = tmp_path / "out", encoder("mistral")
    assert run("models", "convert", llama.folder, "-o", out).exit_code == 0
    prompter = load_prompter(LoadOptions(model=str(out), template="native"))
    assert prompter.tokenizer_origin == "its ids are those of tokenizer.json"
    ids = prompter.tokenizer("how many  spaces?</s>USER: <image>\nwhat")["input_ids"]
    parts = [encode(text) for text in ("how many  spaces?", "USER: ", "\nwhat")]
    assert ids == [1, *parts[0], 2, *parts[1], 32000, *parts[2]]


def test_sentencepiece_is_missing(llama: Original, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (llama.folder / "tokenizer.json").rename(llama.folder / "tokenizer.model")
    monkeypatch.setattr(tokenizer, "find_spec", lambda name: None)
    done = run("models", "convert", llama.folder, "-o", tmp_path / "out")
    assert done.exit_code == 69
    assert "its tokenizer.model needs sentencepiece" in done.stderr
    assert "pip install 'llava-cli[convert]'" in done.stderr


@pytest.mark.parametrize("named", [True, False])
def test_linear_projector(llama: Original, named: bool, tmp_path: Path, run: Run) -> None:
    """In transformers a second layer, which changes nothing, stands behind it."""
    weights = load_file(llama.folder / "model.safetensors")
    for part in ("weight", "bias"):
        weights[f"model.mm_projector.{part}"] = weights.pop(f"model.mm_projector.0.{part}")
        del weights[f"model.mm_projector.2.{part}"]
    put_weights(llama.folder, weights)
    change(llama.folder / "config.json", mm_projector_type="linear" if named else None)
    assert run("models", "convert", llama.folder, "-o", tmp_path / "out").exit_code == 0
    out = tmp_path / "out"
    engine = load(str(out), precision="fp32", device="cpu")
    features = torch.randn(1, 5, 64)
    layer = torch.nn.functional.linear
    expected = layer(features, weights["model.mm_projector.weight"], weights["model.mm_projector.bias"])
    with torch.inference_mode():
        assert torch.equal(engine.network.model.multi_modal_projector(features), expected)
    assert engine.answer(talk(), Sampling(max_tokens=4)).text


def _split(made: Original, root: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Takes the language model out of an original folder, into one of its own; returns that, and the rest."""
    weights = load_file(made.folder / "model.safetensors")
    base = {name: weights.pop(name) for name in list(weights) if not name.startswith(("model.mm", "model.vision"))}
    put_weights(root / "base", base)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(made.folder / file, root / "base" / file)
    change(root / "base" / "config.json", model_type="llama", mm_vision_tower=None, mm_projector_type=None)
    (made.folder / "model.safetensors").unlink()
    return root / "base", weights


def test_projector_alone(llama: Original, tmp_path: Path, run: Run) -> None:
    base, rest = _split(llama, tmp_path)
    torch.save({n: t for n, t in rest.items() if "mm_projector" in n}, llama.folder / "mm_projector.bin")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (llama.folder / file).unlink()
    done = run("models", "convert", llama.folder, "--base", base, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert are_equal(tmp_path / "out", llama.reference)


def _lora(made: Original, root: Path, **options: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """Makes a LoRA of an original folder, as its training code saves one: its base, and the deltas by their names."""
    base, rest = _split(made, root)
    generator = torch.Generator().manual_seed(0)
    lora, deltas = {}, {}
    for layer, (name, size) in enumerate([("q_proj", 128), ("v_proj", 64)]):
        module = f"model.layers.{layer}.self_attn.{name}"
        low, high = (torch.randn(shape, generator=generator) * 0.2 for shape in ((4, 64), (size, 4)))
        lora |= {f"base_model.model.{module}.lora_A.weight": low, f"base_model.model.{module}.lora_B.weight": high}
        deltas[f"language_model.{module}.weight"] = high @ low
    torch.save(lora, made.folder / "adapter_model.bin")
    others = {f"base_model.model.{name}": tensor for name, tensor in rest.items()}
    torch.save(others, made.folder / "non_lora_trainables.bin")
    write(made.folder / "adapter_config.json", {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **options})
    return base, deltas


@pytest.mark.parametrize(("options", "scale"), [({}, 2.0), ({"use_rslora": True}, 4.0)])
def test_lora(llama: Original, options: dict[str, Any], scale: float, tmp_path: Path, run: Run) -> None:
    base, deltas = _lora(llama, tmp_path, **options)
    done = run("models", "convert", llama.folder, "--base", base, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    before, after = tensors(llama.reference), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        expected = tensor + scale * deltas[name] if name in deltas else tensor
        torch.testing.assert_close(after[name], expected)


@for_each("part", ["projector", "lora", "dora", "lora of another"], own=(llama,))
def test_parts_are_named(llama: Original, part: str, tmp_path: Path, run: Run) -> None:
    if part == "projector":
        _, rest = _split(llama, tmp_path)
        torch.save(rest, llama.folder / "mm_projector.bin")
        expected, more = "a projector without its language model", ["--base FOLDER"]
        args: list[str | Path] = []
    else:
        base, _ = _lora(llama, tmp_path, use_dora=part == "dora")
        args = [] if part == "lora" else ["--base", base]
        expected, more = "a LoRA without its language model", ["--base FOLDER"]
        if part == "dora":
            expected, more = "not a plain LoRA", []
        if part == "lora of another":
            put_weights(base, {n: t for n, t in load_file(base / "model.safetensors").items() if "layers.1." not in n})
            expected, more = "model.layers.1.self_attn.v_proj matches nothing in the base", []
    done = run("models", "convert", llama.folder, *args, "-o", tmp_path / "out")
    assert done.exit_code == 69
    assert all(words in done.stderr.replace("\n", " ") for words in [expected, *more])
    assert not (tmp_path / "out").exists()


def test_lora_as_a_model(llama: Original, tmp_path: Path, run: Run, drawing: Path) -> None:
    _lora(llama, tmp_path)
    done = run("ask", "-m", llama.folder, drawing, "what?")
    assert done.exit_code == 69
    assert "original format" in done.stderr and "llava models convert" in done.stderr and "--base" in done.stderr


@pytest.mark.parametrize("how", ["in the cache", "given", "beside it"])
def test_tower_from_elsewhere(how: str, home: Path, tmp_path: Path, run: Run) -> None:
    made = original("llava-llama", tmp_path, pickled=True, with_tower=False)
    args: list[str | Path] = []
    if how == "in the cache":
        cache, commit = home / "hub" / "hub" / "models--someone--tower", "0123456789" * 4
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text(commit)
        shutil.copytree(made.tower, cache / "snapshots" / commit)
        change(made.folder / "config.json", mm_vision_tower="someone/tower")
    elif how == "given":
        change(made.folder / "config.json", mm_vision_tower="someone/tower")
        args = ["--vision-tower", made.tower]
    else:
        change(made.folder / "config.json", mm_vision_tower="tower")
        shutil.copytree(made.tower, made.folder / "tower")
    done = run("models", "convert", made.folder, *args, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert are_equal(tmp_path / "out", made.reference)


def test_tower_is_nowhere(tmp_path: Path, run: Run) -> None:
    made = original("llava-llama", tmp_path, with_tower=False)
    change(made.folder / "config.json", mm_vision_tower="openai/clip-vit-large-patch14-336")
    done = run("models", "convert", made.folder, "-o", tmp_path / "out")
    assert done.exit_code == 69
    assert "its vision tower openai/clip-vit-large-patch14-336 is not in it" in done.stderr
    assert "hf download openai/clip-vit-large-patch14-336" in done.stderr


@for_each(
    ("values", "words"),
    [
        ({"mm_projector_type": "mlp3x_gelu"}, "no projector like its mlp3x_gelu"),
        ({"mm_projector_type": ["x\x1b[2J"]}, "no projector like its"),
        ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial"}, "lay out tiles"),
        ({"image_aspect_ratio": "highres"}, "tiles"),
        (
            {"image_aspect_ratio": "highres", "mm_patch_merge_type": "spatial_unpad"},
            "like its highres",
        ),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_vision_select_layer": [-2, -5]}, "mm_vision_select_layer"),
        ({"mm_vision_select_feature": "slicefour_patch"}, "slicefour_patch"),
        ({"model_type": "llava_mpt", "architectures": ["LlavaMptForCausalLM"]}, "llava_mpt models are not converted"),
        ({"mm_vision_tower": None}, "names no mm_vision_tower"),
        ({"model_type": 5, "architectures": 5}, "5 models are not converted"),
        ({"mm_vision_tower": "../../etc"}, "vision tower ../../etc is not known"),
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers of more than"),
        ({"num_hidden_layers": 3}, "lacks 9 tensors"),
        ({"hidden_size": 128}, "by its config"),
        ({"hidden_size": "wide"}, "does not describe a language model"),
    ],
    own=(llama,),
)
def test_refused(llama: Original, values: dict[str, Any], words: str, tmp_path: Path, run: Run) -> None:
    change(llama.folder / "config.json", **values)
    _refused(llama, words, tmp_path, run)


def _refused(made: Original, words: str, root: Path, run: Run) -> None:
    done = run("models", "convert", made.folder, "-o", root / "out")
    assert done.exit_code == 69
    assert words in done.stderr and "Traceback" not in done.stderr and "\x1b" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert not (root / "out").exists() and not list(root.glob(".*"))


class Code:
    """What a pickle of it runs, if anybody lets it."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path(os.environ["LLAVA_DATA"]).with_name("ran")),)


@for_each(
    ("damage", "words"),
    [
        ("code", "pytorch_model.bin is a pickle with more than tensors in it"),
        ("code in a zip", "pytorch_model.bin is a pickle with more than tensors in it"),
        ("cut off", "pytorch_model.bin is damaged or cut off"),
        ("empty", "pytorch_model.bin is damaged or cut off"),
        ("no tensors", "pytorch_model.bin does not hold tensors by name"),
        ("unknown tensor", "no place for its model.vision_resampler.weight"),
        ("shard missing", "pytorch_model-00002-of-00002.bin is missing"),
        ("shard outside", "which is not a weight file"),
        ("no weights", "without its language model"),
        ("tokenizer", "its tokenizer.json cannot be read"),
        ("no tokenizer", "no tokenizer.json in it"),
        ("patches of no size", "cannot be converted"),
        ("a tower of text", "bert is not a vision tower of CLIP or SigLIP"),
        ("pinpoints", "image_grid_pinpoints are not resolutions"),
    ],
    own=(home,),
)
def test_damaged(damage: str, words: str, tmp_path: Path, run: Run, home: Path) -> None:
    pinpoints = damage == "pinpoints"
    made = original(
        "llava-next-vicuna" if pinpoints else "llava-llama", tmp_path, True, shards=1 + damage.startswith("shard")
    )
    file = made.folder / "pytorch_model.bin"
    if damage == "code":
        file.write_bytes(pickle.dumps({"model.norm.weight": Code()}))
    elif damage == "code in a zip":
        torch.save({"model.norm.weight": Code()}, file)
    elif damage == "cut off":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "no tensors":
        torch.save({"model": [torch.ones(2)]}, file)
    elif damage == "unknown tensor":
        torch.save({**torch.load(file), "model.vision_resampler.weight": torch.ones(2)}, file)
    elif damage == "shard missing":
        (made.folder / "pytorch_model-00002-of-00002.bin").unlink()
    elif damage == "shard outside":
        write(made.folder / "pytorch_model.bin.index.json", {"weight_map": {"x": "../tower/pytorch_model.bin"}})
    elif damage == "no weights":
        file.unlink()
    elif damage == "tokenizer":
        (made.folder / "tokenizer.json").write_text('{"added_tokens": [{"content": "a", "id": "1"}], "model": {}}')
    elif damage == "no tokenizer":
        (made.folder / "tokenizer.json").unlink()
    elif damage == "pinpoints":
        change(made.folder / "config.json", image_grid_pinpoints="(1x1,[")
    else:
        text = damage == "a tower of text"
        change(made.tower / "config.json", **({"model_type": "bert"} if text else {"patch_size": 0}))
    _refused(made, words, tmp_path, run)
    assert not (home / "ran").exists()


def test_grid_in_words(tmp_path: Path) -> None:
    made = original("llava-onevision", tmp_path)
    change(made.folder / "config.json", image_grid_pinpoints="(1x1),...,(2x2)")
    conversion.convert(str(made.folder), tmp_path / "out")
    assert read(tmp_path / "out" / "config.json")["image_grid_pinpoints"] == [
        [56, 56],
        [112, 56],
        [56, 112],
        [112, 112],
    ]


def test_shared_memory(llama: Original, tmp_path: Path) -> None:
    """Two names of one tensor, and parts of larger ones, as training code pickles them."""
    weights = load_file(llama.folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.norm.weight"] = torch.arange(128.0)[::2]
    (llama.folder / "model.safetensors").unlink()
    torch.save(weights, llama.folder / "pytorch_model.bin")
    conversion.convert(str(llama.folder), tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert torch.equal(found["language_model.lm_head.weight"], weights["lm_head.weight"])
    assert torch.equal(found["language_model.model.norm.weight"], weights["model.norm.weight"])


@for_each("what", ["a folder", "a file", "a link to nothing", "below a file"], own=(llama,))
def test_out_is_taken(llama: Original, what: str, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    if what == "a folder":
        out.mkdir()
    elif what == "a link to nothing":
        out.symlink_to(tmp_path / "nothing")
    else:
        out.write_text("mine")
    before = os.lstat(out)
    done = run("models", "convert", llama.folder, "-o", out / "deeper" if what == "below a file" else out)
    assert done.exit_code == 73
    assert os.lstat(out).st_mtime_ns == before.st_mtime_ns
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("what", ["full", "full after all", "stopped"])
def test_no_half(llama: Original, what: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "full":
        monkeypatch.setattr(output.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    else:
        error = OSError(28, "No space left on device") if what == "full after all" else KeyboardInterrupt()

        def fail(*args: Any) -> None:
            raise error

        monkeypatch.setattr(output, "_write_shard", fail)
    done = run("models", "convert", llama.folder, "-o", tmp_path / "out")
    assert done.exit_code == (130 if what == "stopped" else 73)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    if what == "full":
        assert "GB are free" in done.stderr


@for_each("what", ["transformers' own", "no folder", "no config", "neither"], own=(llama,))
def test_not_original(llama: Original, what: str, tmp_path: Path, run: Run) -> None:
    folder = llama.reference
    if what == "no folder":
        folder = tmp_path / "nothing"
    elif what != "transformers' own":
        folder = tmp_path / "empty"
        folder.mkdir()
        if what == "neither":
            write(folder / "config.json", {"model_type": "bert"})
    done = run("models", "convert", folder, "-o", tmp_path / "out")
    assert done.exit_code == 69
    expected = {"no folder": "no such folder", "no config": "no config.json", "neither": "a bert model"}
    assert expected.get(what, "not in LLaVA's original format, but a llava model") in done.stderr


def test_named_when_asked(llama: Original, run: Run, drawing: Path) -> None:
    done = run("ask", "-m", llama.folder, drawing, "what?")
    assert done.exit_code == 69
    assert "LLaVA's original format" in done.stderr and "llava models convert" in done.stderr


def test_other_aspect_ratio(llama: Original, tmp_path: Path, run: Run) -> None:
    """Where pictures were not padded in training, the command that comes next says so."""
    change(llama.folder / "config.json", image_aspect_ratio=None)
    done = run("models", "convert", llama.folder, "-o", tmp_path / "out")
    assert done.exit_code == 0 and "--fit crop" in done.stderr


def test_help(run: Run) -> None:
    done = run("models", "convert", "--help")
    assert done.exit_code == 0 and "--vision-tower" in done.stdout and "--base" in done.stdout
