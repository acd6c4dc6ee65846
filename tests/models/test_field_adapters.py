"""PEFT adapters are used, not only named.

kind                        | example                      | own variants                                    | right value                         | test
----------------------------|------------------------------|-------------------------------------------------|-------------------------------------|-----
--adapter FOLDER            | LoRA                         | rsLoRA, DoRA, biases, whole modules, patterns,  | PEFT's own answers, not merged      | test_answers_are_pefts
                            |                              | the tower, embeddings, LoHa, LoKr, IA3; tied    |                                     |
names of older transformers | language_model.model.layers  | vision_model, lm_head; pickled; other families  | as with today's names               | test_older_names, test_families
-m ADAPTER                  | its base is a folder         | beside it; in the Hub's cache, also by another's| as --adapter                        | test_adapter_as_a_model, test_base_is_found
                            |                              | path of it, or by its quantized copy's name     |                                     |
its base is not here        | a repo                       | an alias, a path that is gone, none             | which one, and the next command     | test_base_is_not_here
quantized                   | -p 4bit                      | 8bit; a copy is there of the plain model        | merged first, with its own copy     | test_quantized
                            | weights stored in 4 bits     | 8 bits                                          | 69, one line                        | test_stored_quantized
commands and settings       | ask                          | batch, chat, prompt, doctor; LLAVA_ADAPTER,     | the same model everywhere           | test_commands, test_settings
                            |                              | the config file, a server's                     |                                     |
what answers depend on      | a batch is gone on with      | another adapter; the same one, retrained        | 65                                  | test_resumed_with_another, test_fingerprint
not merged exactly          | PiSSA                        | prompt tuning, aLoRA, unknown options, regular  | refused by name                     | test_refused
                            |                              | expressions                                     |                                     |
another base, or damaged    | other sizes                  | no such layer, a half missing, cut off, pickles | the tensor or file is named         | test_refused, test_damaged
which folder                | no such folder               | one too high, not one, both whole and adapter   | one line and the next command       | test_wrong_folder
PEFT is not installed       | --adapter                    |                                                 | pip install 'llava-cli[adapters]'   | test_peft_is_missing
"""  # noqa: E501

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import families
from helpers.command import Run, Shell
from helpers.homes import home
from helpers.originals import change, read, write
from helpers.tables import for_each
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from llava_cli import load
from llava_cli.catalog import sizes_on_disk
from llava_cli.conversation import Conversation, Picture
from llava_cli.hardware import cpu, memory
from llava_cli.hardware.device import Plan, native_precision
from llava_cli.loader import engine_identity, find_checkpoint
from llava_cli.models.fingerprint import fingerprint
from llava_cli.models.footprint import Sizes, footprint
from llava_cli.models.registry import Checkpoint
from llava_cli.settings import LoadOptions, Sampling

Lora = peft.LoraConfig
METHODS: dict[str, Any] = {
    "lora": Lora(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    "rslora": Lora(r=4, lora_alpha=16, use_rslora=True, target_modules=["linear_1", "fc1", "up_proj"]),
    "dora": Lora(r=4, lora_alpha=16, use_dora=True, target_modules=["q_proj", "down_proj"]),
    "biases": Lora(r=4, lora_alpha=16, bias="all", target_modules=["fc1", "q_proj", "linear_2"]),
    "its biases": Lora(r=4, lora_alpha=16, bias="lora_only", target_modules=["fc1", "linear_2"]),
    "whole": Lora(r=4, target_modules=["q_proj"], modules_to_save=["multi_modal_projector", "lm_head"]),
    "embeddings": Lora(r=4, lora_alpha=16, target_modules=["embed_tokens", "lm_head"]),
    "patterns": Lora(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 2, "layers.0.self_attn.q_proj": 8},
        alpha_pattern={"layers.1.self_attn.q_proj": 3, r"^model.language_model.layers.0.mlp.up_proj": 5},
    ),
    "expression": Lora(r=4, lora_alpha=16, target_modules=r".*language_model.*\.(q_proj|k_proj)"),
    "all": Lora(r=4, lora_alpha=16, target_modules="all-linear"),
    "convolution": Lora(r=4, lora_alpha=16, target_modules=["patch_embedding"]),
    "loha": peft.LoHaConfig(r=4, alpha=8, target_modules=["q_proj", "fc1"], rank_pattern={"fc1": 2}),
    "lokr": peft.LoKrConfig(r=4, alpha=8, target_modules=["q_proj", "fc1"]),
    "lokr whole": peft.LoKrConfig(r=32, decompose_both=True, decompose_factor=4, target_modules=["q_proj"]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
TOKENS = 12
COMPUTE = native_precision("cpu")[0]
"""What quantized models compute in on this machine."""
Made = Callable[..., Path]


def trained(base: Path, folder: Path, config: Any, seed: int = 1) -> Any:
    """PEFT's model over a base, with numbers as of training, whose adapter it has saved in a folder."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if weight.requires_grad:
                    weight.copy_(torch.randn_like(weight) * 0.2 + ("ia3_" in name))
        adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.fixture
def base(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llava-llama")


@pytest.fixture
def lora(base: Path, tmp_path: Path) -> Path:
    trained(base, tmp_path / "lora", METHODS["lora"])
    return tmp_path / "lora"


def talk() -> Conversation:
    image = Image.linear_gradient("L").resize((300, 200)).convert("RGB")
    image.paste("red", (20, 60, 120, 160))
    return Conversation().ask("what is this?", [Picture("a red square", image, sha256="")])


def answer(folder: Path | str | None, adapter: Path | None = None, precision: Any = "fp32") -> str:
    engine = load(folder and str(folder), precision=precision, device="cpu", adapter=adapter and str(adapter))
    return engine.answer(talk(), Sampling(max_tokens=TOKENS)).text


def is_as_peft(base: Path, adapter: Path, theirs: Any) -> None:
    """Asserts that the merged model's logits and greedy tokens are those of PEFT's, which is not merged."""
    engine = load(str(base), precision="fp32", device="cpu", adapter=str(adapter))
    inputs = engine.inputs(talk())
    with torch.inference_mode():
        logits = theirs(**inputs).logits[:, -1]
        tokens = theirs.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert (engine.logits(inputs) - logits).abs().max() < 1e-4 * logits.abs().max()
    expected = engine.prompter.tokenizer.decode(tokens, skip_special_tokens=True)
    assert engine.answer(talk(), Sampling(max_tokens=TOKENS)).text.strip() == expected.strip()


@for_each("method", METHODS, own=(base,))
def test_answers_are_pefts(base: Path, method: str, tmp_path: Path) -> None:
    is_as_peft(base, tmp_path / "adapter", trained(base, tmp_path / "adapter", METHODS[method]))


@for_each("family", ["llava-next-mistral", "llava-onevision", "vip-llava", "smolvlm"])
def test_families(checkpoint: Callable[[str], Path], family: str, tmp_path: Path) -> None:
    config = Lora(r=4, lora_alpha=16, target_modules=r".*\.(q_proj|down_proj|fc1)")
    is_as_peft(checkpoint(family), tmp_path / "adapter", trained(checkpoint(family), tmp_path / "adapter", config))


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_tied(module: str, tmp_path: Path) -> None:
    """Of embeddings that are the head, too, the one that was trained is changed alone."""
    base = families.save("llava-llama", tmp_path / "base", tied=True)
    config = Lora(r=4, target_modules=["q_proj"], modules_to_save=[module])
    is_as_peft(base, tmp_path / "adapter", trained(base, tmp_path / "adapter", config))


def _with_older_names(adapter: Path) -> None:
    """As transformers 4 called modules."""
    weights = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        name = name.replace("model.model.language_model.", "model.language_model.model.")
        name = name.replace("model.model.vision_tower.", "model.vision_tower.vision_model.")
        name = name.replace("model.model.multi_modal_projector.", "model.multi_modal_projector.")
        weights[name.replace("base_model.model.lm_head", "base_model.model.language_model.lm_head")] = tensor
    save_file(weights, adapter / "adapter_model.safetensors")


def _pickled(adapter: Path) -> None:
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize("pickled", [False, True])
def test_older_names(base: Path, pickled: bool, tmp_path: Path) -> None:
    config = Lora(r=4, target_modules=["q_proj", "fc1", "linear_2"], modules_to_save=["lm_head"])
    theirs = trained(base, adapter := tmp_path / "adapter", config)
    _with_older_names(adapter)
    assert any(".language_model.model.layers" in name for name in load_file(adapter / "adapter_model.safetensors"))
    if pickled:
        _pickled(adapter)
    is_as_peft(base, adapter, theirs)


# Its base.


def _cached(home: Path, base: Path, repo: str) -> Path:
    """Puts a base into the Hub's cache."""
    cache, commit = home / "hub" / "hub" / f"models--{repo.replace('/', '--')}", "0123456789" * 4
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    shutil.copytree(base, folder := cache / "snapshots" / commit)
    return folder


@for_each(
    "named, by_option",
    itertools.product(
        [
            "FOLDER",
            "base",
            "somewhere/that/is/gone/base",
            "/nowhere/base",
            "llava-hf/llava-1.5-7b-hf",
            "/root/.cache/huggingface/hub/models--llava-hf--llava-1.5-7b-hf/snapshots/0123",
            "unsloth/llava-1.5-7b-hf-bnb-4bit",
            "unsloth/llava-1.5-7b-hf-unsloth-bnb-4bit",
            "/mnt/models/llava-1.5-7b-hf",
        ],
        [False, True],
    ),
    own=(base, lora, home),
)
def test_base_is_found(named: str, by_option: bool, base: Path, lora: Path, home: Path) -> None:
    if named == "FOLDER":
        expected, named = base, str(base)
    elif "llava-1.5" in named:
        expected = _cached(home, base, "llava-hf/llava-1.5-7b-hf")
    else:
        expected = shutil.copytree(base, lora.parent / "base")
    change(lora / "adapter_config.json", base_model_name_or_path=named)
    found = find_checkpoint(LoadOptions(adapter=str(lora)) if by_option else LoadOptions(model=str(lora)))
    assert (found.folder.resolve(), found.adapter) == (expected, lora)


def test_adapter_as_a_model(base: Path, lora: Path) -> None:
    assert answer(base, lora) == answer(None, lora) == answer(lora) != answer(base)


@for_each(
    ("named", "words", "hint"),
    [
        ("llava-hf/llava-1.5-7b-hf", "an adapter of llava-hf/llava-1.5-7b-hf, which", "llava models pull llava-1.5-7b"),
        ("someone/theirs", "an adapter of someone/theirs, which", "llava models pull someone/theirs"),
        ("unsloth/llava-1.5-7b-hf-bnb-4bit", "an adapter of unsloth/", "llava models pull llava-1.5-7b"),
        ("/gone/away", "an adapter of /gone/away, which is not", "llava ask -m BASE --adapter"),
        ("../../up", "an adapter of ../../up, which is not", "llava ask -m BASE --adapter"),
        (None, "does not name its base model", "llava ask -m BASE --adapter"),
        (["list"], "does not name its base model", "llava ask -m BASE --adapter"),
        ("/models--" * 100_000, "does not name its base model", "llava ask -m BASE --adapter"),
        ("/etc/\0/x", "which is not on this machine", "llava ask -m BASE --adapter"),
        ("\x1b[2Jx/y", "\\x1b", "llava ask -m BASE --adapter"),
    ],
    own=(base, lora),
)
def test_base_is_not_here(named: Any, words: str, hint: str, lora: Path, run: Run, drawing: Path) -> None:
    change(lora / "adapter_config.json", base_model_name_or_path=named)
    for option in ("-m", "--adapter"):
        done = run("ask", option, lora, drawing, "what?")
        assert done.exit_code == 69
        assert words in done.stderr and hint in done.stderr and "\x1b" not in done.stderr
        assert len(done.stderr.splitlines()) == 2


# Quantized.


@pytest.mark.parametrize("precision", ["4bit", "8bit"])
def test_quantized(precision: str, base: Path, lora: Path, tmp_path: Path) -> None:
    """As the merged model is when it is saved and quantized, and however often it is loaded."""
    engine = load(str(base), precision=COMPUTE, device="cpu", adapter=str(lora))
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=engine.network.dtype)
    merged = peft.PeftModel.from_pretrained(model, lora, autocast_adapter_dtype=True).merge_and_unload()
    merged.save_pretrained(shutil.copytree(base, tmp_path / "merged"))
    plain = answer(base, precision=precision)
    first, again = answer(base, lora, precision), answer(base, lora, precision)
    assert first == again == answer(tmp_path / "merged", precision=precision) != plain
    assert answer(base, precision=precision) == plain
    assert engine.precision == COMPUTE


def test_tied_and_quantized(tmp_path: Path) -> None:
    base = families.save("llava-llama", tmp_path / "base", tied=True)
    trained(base, tmp_path / "adapter", Lora(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    engine = load(str(base), precision="4bit", device="cpu", adapter=str(tmp_path / "adapter"))
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    head, embeddings = engine.network.get_output_embeddings().weight, engine.network.get_input_embeddings().weight
    assert torch.equal(head, found.to(head.dtype)) and not torch.equal(head, embeddings)


@pytest.mark.parametrize("precision", ["4bit", "8bit"])
def test_stored_quantized(precision: str, base: Path, lora: Path, tmp_path: Path, run: Run, drawing: Path) -> None:
    options = {"load_in_4bit": precision == "4bit", "load_in_8bit": precision == "8bit", "quant_method": "bitsandbytes"}
    stored = AutoModelForImageTextToText.from_pretrained(base, quantization_config=_bitsandbytes(precision))
    stored.save_pretrained(shutil.copytree(base, tmp_path / "stored"))
    assert options["quant_method"] in read(tmp_path / "stored" / "config.json")["quantization_config"]["quant_method"]
    done = run("ask", "-m", tmp_path / "stored", "--adapter", lora, drawing, "what?")
    assert done.exit_code == 69
    assert "stored quantized: an adapter cannot be merged" in done.stderr and "-p 4bit --adapter" in done.stderr


@pytest.mark.parametrize("by_option", [True, False])
def test_auto_with_little_memory(
    by_option: bool, base: Path, lora: Path, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter is merged in 32 bits, so that fewer save nothing until there is a copy; no line promises otherwise."""
    monkeypatch.setattr(cpu, "cpu_features", lambda: frozenset({"avx2", "fma", "f16c"}))
    for beside_weights in ("_ACTIVATIONS", "_CACHE_HOLES"):  # which are most of a tiny model's memory
        monkeypatch.setattr(f"llava_cli.models.footprint.{beside_weights}", 0)
    sizes = sizes_on_disk(Checkpoint("", base, lora))
    assert sizes is not None
    model = ["-m", base, "--adapter", lora] if by_option else ["-m", lora]
    ask = ["ask", *model, drawing, "what?", "--max-tokens", "1", "--json"]

    def leave(sizes: Sizes, precision: str, spare: int) -> None:
        free = footprint(sizes, Plan("cpu", precision, "sdpa", "")).total + spare
        monkeypatch.setattr(memory, "free_memory", lambda device: free)

    leave(sizes, "fp32", -1)
    done = run(*ask)
    assert (done.exit_code, done.stdout) == (71, "")
    assert done.stderr.startswith(f"llava: {model[1]}: with its adapter to merge, needs 0.6 GB, 0.6 GB are free\n")
    assert f"  llava ask {' '.join(map(str, model))} -p fp32 tries it; llava models" in done.stderr
    assert run(*ask, "-p", "fp32").exit_code == run(*ask, "-p", "4bit").exit_code == 0
    leave(replace(sizes, kept=frozenset({"4bit"})), "4bit", 0)
    done = run(*ask)
    assert (done.exit_code, json.loads(done.stdout)["precision"]) == (0, "4bit")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"llava: {model[1]}: in 4 bits (0.6 GB): fp32 takes ") and line.endswith("overrides this")


def _bitsandbytes(precision: str) -> Any:
    from transformers import BitsAndBytesConfig

    options = {
        f"load_in_{precision}": True,
        "llm_int8_skip_modules": ["lm_head", "vision_tower", "multi_modal_projector"],
    }
    return BitsAndBytesConfig(**options)  # type: ignore[arg-type]


# Commands, settings, identity.


def test_commands(base: Path, lora: Path, run: Run, drawing: Path, tmp_path: Path) -> None:
    model = ["-m", base, "--adapter", lora]
    sampling = ["-p", "fp32", "--device", "cpu", "--max-tokens", str(TOKENS)]
    asked = run("ask", *model, *sampling, drawing, "what?")
    plain = run("ask", "-m", base, *sampling, drawing, "what?")
    assert asked.exit_code == 0 and asked.stdout != plain.stdout
    as_json = json.loads(run("ask", *model, *sampling, "--json", drawing, "what?").stdout)
    done = run("batch", *model, *sampling, drawing.parent, "what?", "-o", rows := tmp_path / "rows.jsonl")
    assert done.exit_code == 0, done.stderr
    assert json.loads(rows.read_text().splitlines()[-1])["answer"] == as_json["answer"]
    chat = run("chat", *model, *sampling, "--no-save", drawing, input="what?\n")
    assert chat.exit_code == 0 and chat.stdout.strip() == asked.stdout.strip()
    prompts = [run("prompt", *some, drawing, "what?").stdout for some in (model, ["-m", base], ["-m", lora])]
    assert prompts[0] == prompts[1] == prompts[2] != ""
    checked = run("doctor", base, "--adapter", lora, "-p", "fp32")
    assert checked.exit_code == 0, checked.stdout
    assert run("doctor", lora, "-p", "fp32").exit_code == 0


@pytest.mark.parametrize("how", ["variable", "file", "default model"])
def test_settings(
    how: str, base: Path, lora: Path, home: Path, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = ["-p", "fp32", "--device", "cpu", "--max-tokens", str(TOKENS)]
    expected = run("ask", "-m", base, "--adapter", lora, *sampling, drawing, "what?").stdout
    model: list[str | Path] = ["-m", base]
    if how == "variable":
        monkeypatch.setenv("LLAVA_ADAPTER", str(lora))
    elif how == "file":
        (home / "config.toml").write_text(f"adapter = '{lora}'\n")
    else:
        assert run("models", "default", lora).exit_code == 0
        assert str(lora) in (home / "config.toml").read_text()
        model = []
    assert run("ask", *model, *sampling, drawing, "what?").stdout == expected


def test_server_decides(lora: Path, run: Run, drawing: Path) -> None:
    done = run("ask", "--server", "http://127.0.0.1:9/v1", "--adapter", lora, drawing, "what?")
    assert done.exit_code == 2 and "--adapter" in done.stderr


def test_show(lora: Path, run: Run) -> None:
    done = run("models", "show", lora)
    assert done.exit_code == 0 and "llava-1.5" in done.stdout


def test_resumed_with_another(base: Path, lora: Path, run: Run, drawing: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    trained(base, other, METHODS["lora"], seed=2)
    words = [
        "batch",
        "-m",
        base,
        "-p",
        "fp32",
        "--max-tokens",
        "2",
        drawing.parent,
        "what?",
        "-o",
        tmp_path / "rows.jsonl",
    ]
    assert run(*words, "--adapter", lora).exit_code == 0
    assert run(*words, "--adapter", lora).exit_code == 0
    for more in (["--adapter", other], []):
        done = run(*words, *more)
        assert done.exit_code == 65, done.stderr


def test_fingerprint(base: Path, lora: Path) -> None:
    def now() -> str:
        return fingerprint(find_checkpoint(LoadOptions(model=str(base), adapter=str(lora))))

    found = {fingerprint(find_checkpoint(LoadOptions(model=str(base)))), now()}
    change(lora / "adapter_config.json", lora_alpha=5)
    found.add(now())
    weights = load_file(lora / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, lora / "adapter_model.safetensors")
    found.add(now())
    _pickled(lora)
    found.add(now())
    assert len(found) == 5
    with_it, without = (engine_identity(LoadOptions(model=str(base), adapter=one)) for one in (str(lora), None))
    assert with_it != without


# What cannot be.


def _tensors(adapter: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    edit(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")


FIRST = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


@for_each(
    ("values", "words"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "has the type PROMPT_TUNING; supported are LORA"),
        ({"peft_type": ["LORA"]}, "has the type"),
        ({"peft_type": None}, "has the type None"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "has init_lora_weights olora"),
        ({"init_lora_weights": {"a": 1}}, "has init_lora_weights"),
        ({"alora_invocation_tokens": [1, 2]}, "sets alora_invocation_tokens"),
        ({"trainable_token_indices": [1]}, "sets trainable_token_indices"),
        ({"target_parameters": ["x"]}, "sets target_parameters"),
        ({"layer_replication": [[0, 2]]}, "sets layer_replication"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "sets auto_map"),
        ({"from_the_future": 3}, "sets from_the_future"),
        ({"lora_alpha": "much"}, "has a lora_alpha that is not a number"),
        ({"lora_alpha": math.inf}, "has a lora_alpha that is not a number"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "regular expression in its alpha_pattern"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern that does not map names to numbers"),
        ({"r": 16}, "lora_A.weight is 4 x 64, in"),
        ({"r": 0}, "cannot be merged"),
        ({"use_dora": True}, "lacks 12 tensors"),
        (lambda its: its.pop(f"{FIRST}.lora_B.weight"), "lacks 1 tensors"),
        (lambda its: its.update({f"{FIRST}.lora_A.weight": torch.ones(4, 80)}), "is 4 x 80, in"),
        (lambda its: its.update({f"{FIRST}.lora_C.weight": torch.ones(4)}), "lora_C.weight matches nothing in"),
        (lambda its: its.update({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}),
         "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight matches nothing in"),
        (lambda its: its.update({FIRST.replace("0", "7") + ".lora_A.weight": torch.ones(4, 64)}), "layers.7"),
        (lambda its: its.update({"base_model.model.lm_head.weight": torch.ones(300, 64)}), "lm_head.weight is 300"),
        (lambda its: its.update({"anything": torch.ones(3)}), "anything matches nothing in"),
        (lambda its: its[f"{FIRST}.lora_A.weight"].fill_(math.nan), "values that are not numbers"),
    ], own=(base, lora))  # fmt: skip
def test_refused(values: Any, words: str, base: Path, lora: Path, run: Run, drawing: Path) -> None:
    if callable(values):
        _tensors(lora, values)
    else:
        write(lora / "adapter_config.json", {**read(lora / "adapter_config.json"), **values})
    done = run("ask", "-m", base, "--adapter", lora, "-p", "fp32", drawing, "what?")
    assert done.exit_code == 69
    assert words in done.stderr and "Traceback" not in done.stderr and not done.stdout
    assert len(done.stderr.splitlines()) <= 2


def test_for_another_family(checkpoint: Callable[[str], Path], lora: Path, run: Run, drawing: Path) -> None:
    done = run("ask", "-m", checkpoint("smolvlm"), "--adapter", lora, "-p", "fp32", drawing, "what?")
    assert done.exit_code == 69
    assert "matches nothing in" in done.stderr and "it was trained on" in done.stderr


class Code:
    """What a pickle of it runs, if anybody lets it."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path(os.environ["LLAVA_DATA"]).with_name("ran")),)


@for_each(
    ("damage", "words"),
    [
        ("cut off", "adapter_model.safetensors is damaged or cut off"),
        ("no tensors", "no adapter_model.safetensors in it"),
        ("code", "adapter_model.bin is a pickle with more than tensors in it"),
        ("half a pickle", "adapter_model.bin is damaged or cut off"),
        ("no config", "adapter_config.json cannot be read"),
        ("a list", "adapter_config.json is damaged"),
        ("deep", "adapter_config.json cannot be read"),
    ],
    own=(base, lora, home),
)
def test_damaged(damage: str, words: str, base: Path, lora: Path, run: Run, drawing: Path, home: Path) -> None:
    file = lora / "adapter_model.safetensors"
    if damage == "cut off":
        os.truncate(file, file.stat().st_size - 10)
    elif damage == "no tensors":
        file.unlink()
    elif damage == "code":
        file.unlink()
        (lora / "adapter_model.bin").write_bytes(pickle.dumps({"x": Code()}, 2))
    elif damage == "half a pickle":
        _pickled(lora)
        os.truncate(lora / "adapter_model.bin", 1000)
    else:
        texts = {"no config": "{", "a list": "[]", "deep": "[" * 100_000}
        (lora / "adapter_config.json").write_text(texts[damage])
    done = run("ask", "-m", base, "--adapter", lora, "-p", "fp32", drawing, "what?")
    assert done.exit_code == 69
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not (home / "ran").exists()


@for_each(
    ("what", "code", "words"),
    [
        ("gone", 66, "no such folder"),
        ("one too high", 69, "checkpoint-100"),
        ("one too high as a model", 69, "llava ask -m"),
        ("no adapter", 69, "no adapter_config.json in it"),
        ("whole, too", 69, "holds an adapter, and other files a whole model"),
        ("two", 2, "is an adapter itself"),
    ],
    own=(base, lora),
)
def test_wrong_folder(
    what: str, code: int, words: str, base: Path, lora: Path, tmp_path: Path, run: Run, drawing: Path
) -> None:
    args: list[str | Path] = ["-m", base, "--adapter"]
    if what == "gone":
        args += [tmp_path / "gone"]
    elif what.startswith("one too high"):
        for step in ("checkpoint-100", "checkpoint-20"):
            shutil.copytree(lora, tmp_path / "run" / step)
        args = ["-m", tmp_path / "run"] if "model" in what else [*args, tmp_path / "run"]
    elif what == "no adapter":
        args += [base]
    elif what == "whole, too":
        shutil.copytree(base, lora, dirs_exist_ok=True)
        args = ["-m", lora]
    else:
        args = ["-m", lora, "--adapter", lora]
    done = run("ask", *args, drawing, "what?")
    assert done.exit_code == code
    assert words in done.stderr and len(done.stderr.splitlines()) == 2


def test_adapter_of_a_folder_with_both(base: Path, lora: Path) -> None:
    expected = answer(base, lora)
    shutil.copytree(base, lora, dirs_exist_ok=True)
    assert answer(base, lora) == expected


def test_peft_is_missing(base: Path, lora: Path, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "peft" else there(name, *more))
    done = run("ask", "-m", base, "--adapter", lora, drawing, "what?")
    assert done.exit_code == 69
    assert "adapters need PEFT, which is not installed" in done.stderr
    assert "pip install 'llava-cli[adapters]'" in done.stderr


def test_peft_is_imported_for_adapters_alone(base: Path, drawing: Path, shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "peft.py").write_text("raise SystemExit('peft was imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "hook")}
    done = shell("ask", "-m", base, "-p", "fp32", "--max-tokens", "2", drawing, "what?", env=environment)
    assert done.returncode == 0, done.stderr
