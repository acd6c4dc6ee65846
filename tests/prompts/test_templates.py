"""Golden prompts: what each family was trained with and what the Hub's templates make, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import copy
from pathlib import Path

import pytest
from helpers.command import Run
from helpers.tables import for_each
from PIL import Image

from llava_cli import Conversation
from llava_cli.conversation import Picture
from llava_cli.hardware.device import native_precision
from llava_cli.loader import load_prompter
from llava_cli.models.aliases import ALIASES
from llava_cli.models.families import FAMILIES
from llava_cli.prompts.chat_template import named_templates
from llava_cli.prompts.prompter import Prompter
from llava_cli.settings import LoadOptions

Checkpoint = Callable[[str], Path]

DOT = Picture("dot.png", Image.new("RGB", (40, 40), "red"), sha256="")
ONE = Conversation().ask("Q1", [DOT])
TWO = ONE.answered("A1").ask("Q2")
THREE = TWO.answered("A2").ask("Q3", [DOT, DOT])
SYSTEM = Conversation(system="S").ask("Q1", [DOT])

V1 = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
HUMAN = V1.replace("user", "human")
LLAMA3 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


def vicuna(system: str) -> dict[str, Conversation]:
    first = "USER: <image>\nQ1 ASSISTANT:"
    return {
        f"{system} {first}": ONE,
        f"{system} {first} A1</s>USER: Q2 ASSISTANT:": TWO,
        f"{system} {first} A1</s>USER: Q2 ASSISTANT: A2</s>USER: <image>\n<image>\nQ3 ASSISTANT:": THREE,
        f"S {first}": SYSTEM,
    }


def chatml(system: str, end: str) -> dict[str, Conversation]:
    def says(role: str, text: str) -> str:
        return f"<|im_start|>{role}\n{text}<|im_end|>{end}"

    head, first = says("system", system), says("user", "<image>\nQ1")
    ask = "<|im_start|>assistant\n"
    later = says("assistant", "A1") + says("user", "Q2")
    last = says("assistant", "A2") + says("user", "<image>\n<image>\nQ3")
    return {
        head + first + ask: ONE,
        head + first + later + ask: TWO,
        head + first + later + last + ask: THREE,
        says("system", "S") + first + ask: SYSTEM,
    }


def llama3(role: str, text: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"


ASK_LLAMA3 = "<|start_header_id|>assistant<|end_header_id|>\n\n"
HEAD_LLAMA3 = llama3("system", LLAMA3) + llama3("user", "<image>\nQ1")
LATER_LLAMA3 = llama3("assistant", "A1") + llama3("user", "Q2")

NATIVE: dict[str, dict[str, Conversation]] = {
    "paligemma": {"<image>Q1": ONE},
    "llava-1.5": vicuna(V1),
    "vip-llava": vicuna(HUMAN),
    "llava-1.6-34b": chatml("Answer the questions.", ""),
    "qwen": chatml("You are a helpful assistant.", "\n"),
    "mistral": {
        "[INST] <image>\nQ1 [/INST]": ONE,
        "[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST]": TWO,
        "[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST] A2 </s>[INST] <image>\n<image>\nQ3 [/INST]": THREE,
        "[INST] <<SYS>>\nS\n<</SYS>>\n\n<image>\nQ1 [/INST]": SYSTEM,
    },
    "llama3": {
        HEAD_LLAMA3 + ASK_LLAMA3: ONE,
        HEAD_LLAMA3 + LATER_LLAMA3 + ASK_LLAMA3: TWO,
        HEAD_LLAMA3
        + LATER_LLAMA3
        + llama3("assistant", "A2")
        + llama3("user", "<image>\n<image>\nQ3")
        + ASK_LLAMA3: THREE,
        llama3("system", "S") + llama3("user", "<image>\nQ1") + ASK_LLAMA3: SYSTEM,
    },
    "llava-v0": {
        f"{HUMAN}###Human: <image>\nQ1###Assistant:": ONE,
        f"{HUMAN}###Human: <image>\nQ1###Assistant: A1###Human: Q2###Assistant:": TWO,
        f"{HUMAN}###Human: <image>\nQ1###Assistant: A1###Human: Q2###Assistant: A2"
        "###Human: <image>\n<image>\nQ3###Assistant:": THREE,
        "S###Human: <image>\nQ1###Assistant:": SYSTEM,
    },
    "gemma": {
        "<start_of_turn>user\n<image>\nQ1<end_of_turn>\n<start_of_turn>model\n": ONE,
        "<start_of_turn>user\n<image>\nQ1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\n": TWO,
        "<start_of_turn>user\nS\n\n<image>\nQ1<end_of_turn>\n<start_of_turn>model\n": SYSTEM,
    },
    "phi3": {
        "<|user|>\n<image>\nQ1<|end|>\n<|assistant|>\n": ONE,
        "<|user|>\n<image>\nQ1<|end|>\n<|assistant|>\nA1<|end|>\n<|user|>\nQ2<|end|>\n<|assistant|>\n": TWO,
        "<|system|>\nS<|end|>\n<|user|>\n<image>\nQ1<|end|>\n<|assistant|>\n": SYSTEM,
    },
    "transformers-4.37": {
        "USER: <image>\nQ1ASSISTANT:": ONE,
        "USER: <image>\nQ1ASSISTANT: A1USER: Q2ASSISTANT:": TWO,
        "USER: <image>\nQ1ASSISTANT: A1USER: Q2ASSISTANT: A2USER: <image>\n<image>\nQ3ASSISTANT:": THREE,
        "S USER: <image>\nQ1ASSISTANT:": SYSTEM,
    },
}

HUB: dict[str, dict[str, Conversation]] = {
    "llava-llama": {
        "USER: <image>\nQ1 ASSISTANT:": ONE,
        "USER: <image>\nQ1 ASSISTANT: A1 USER: Q2 ASSISTANT:": TWO,
    },
    "llava-next-vicuna": {
        "USER: <image>\nQ1 ASSISTANT:": ONE,
        "USER: <image>\nQ1 ASSISTANT: A1 USER: Q2 ASSISTANT:": TWO,
    },
    "llava-next-mistral": {
        "[INST] <image>\nQ1 [/INST]": ONE,
        "[INST] <image>\nQ1 [/INST] A1</s> [INST] Q2 [/INST]": TWO,
    },
    "llava-mistral": {"[INST] <image>\nQ1 [/INST]": ONE},
    "vip-llava": {"###Human: <image>\nQ1###Assistant:": ONE},
    "llava-onevision": {"<|im_start|>user <image>\nQ1<|im_end|><|im_start|>assistant\n": ONE},
}

NAMELESS = {
    "builtin",
    "llava-llama3",
    "pixtral",
    "internvl3.5",
    "paligemma",
    "paligemma2",
    "mistral-3",
    "aya-vision",
    "llama-3.2-vision",
    "idefics2",
    "glm-4v",
    "glm-4.6v",
    "glm-4.5v",
    "glm-ocr",
    "qwen3-vl-moe",
    "qwen3.5",
    "qwen3.5-moe",
    "exaone-4.5",
    "gemma-4",
    "ovis2",
    "lighton-ocr",
    "qianfan-ocr",
    "paddleocr-vl",
    "hunyuan-vl",
    "deepseek-vl",
    "janus",
    "llava-next-video",
}
"""Families without a model that has a short name."""
TRAINED = {
    "llava-llama": ("llava-1.5", "<s>"),
    "llava-mistral": ("bakllava", "<s>"),
    "llava-interleave": ("llava-interleave", None),
    "vip-llava": ("vip-llava", "<s>"),
    "llava-next-vicuna": ("llava-1.6-vicuna", "<s>"),
    "llava-next-mistral": ("llava-1.6-mistral", "<s>"),
    "llava-next-34b": ("llava-1.6-34b", "<|startoftext|>"),
    "llava-next-llama3": ("llava-next-llama3", "<|begin_of_text|>"),
    "llava-next-qwen": ("llava-next-qwen", None),
    "llava-onevision": ("llava-onevision", None),
}
"""Fixtures: the family that each is, and what its prompts begin with."""


@for_each("name, golden, talk", [(n, p, t) for n, prompts in NATIVE.items() for p, t in prompts.items()])
def test_named_formats_byte_for_byte(name: str, golden: str, talk: Conversation) -> None:
    assert load_prompter(LoadOptions(model="builtin", template=name)).render(talk) == golden


def test_every_named_format_has_its_goldens() -> None:
    assert set(NATIVE) == set(named_templates())
    assert {family.template for family in FAMILIES} <= {*NATIVE, None}
    assert {alias.family for alias in ALIASES.values()} == {one.name for one in FAMILIES} - NAMELESS


@for_each("family, golden, talk", [(f, p, t) for f, prompts in HUB.items() for p, t in prompts.items()])
def test_the_checkpoint_s_own_format_is_the_default(
    family: str, golden: str, talk: Conversation, checkpoint: Checkpoint
) -> None:
    folder = str(checkpoint(family))
    assert load_prompter(LoadOptions(model=folder)).render(talk) == golden
    assert load_prompter(LoadOptions(model=folder, template="hub")).render(talk) == golden


@for_each("fixture, name, begin", [(f, *found) for f, found in TRAINED.items()])
def test_native_is_known_from_the_config_and_the_vocabulary(
    fixture: str, name: str, begin: str | None, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "some-name-of-no-meaning"
    folder.symlink_to(checkpoint(fixture))
    prompter = load_prompter(LoadOptions(model=str(folder), template="native"))
    assert prompter.family is not None
    assert prompter.family.name == name
    for golden, talk in NATIVE[str(prompter.family.template)].items():
        assert prompter.render(talk) == golden
        read = tokens(prompter, talk)
        if begin:
            assert (read[0], read.count(begin)) == (begin, 1)
            read = read[1:]
        # All of it, the special tokens as one each: pictures are the only thing that the processor adds to.
        assert text_of(prompter, read) == golden.replace("<image>", "")
        for special in ("</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>"):
            if special in prompter.tokenizer.get_added_vocab():
                assert read.count(special) == golden.count(special)


def tokens(prompter: Prompter, talk: Conversation) -> list[str]:
    ids = prompter.encode(talk)["input_ids"][0].tolist()
    found: list[str] = prompter.tokenizer.convert_ids_to_tokens(ids)
    return found


def text_of(prompter: Prompter, read: list[str]) -> str:
    words = [token for token in read if token != "<image>"]
    text: str = prompter.tokenizer.convert_tokens_to_string(words)
    return text


SPECIAL = ["<image>", "</s>", "<s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<pad>", "[INST]"]


@for_each("fixture", TRAINED)
def test_control_tokens_in_a_question_stay_text(fixture: str, checkpoint: Checkpoint) -> None:
    prompter = load_prompter(LoadOptions(model=str(checkpoint(fixture)), template="native"))
    plain = tokens(prompter, ONE)
    for word in SPECIAL:
        said = tokens(prompter, Conversation().ask(f"Q1{word}", [DOT]))
        assert said.count("<image>") == plain.count("<image>")
        for special in prompter.tokenizer.get_added_vocab():
            assert said.count(special) == plain.count(special), (word, special)
        assert text_of(prompter, said) == text_of(prompter, plain).replace("Q1", f"Q1{word}")


def test_a_token_that_is_not_marked_as_special_stays_text_too(checkpoint: Checkpoint) -> None:
    from tokenizers import AddedToken

    prompter = load_prompter(LoadOptions(model=str(checkpoint("llava-llama"))))
    prompter.tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    processor = copy(prompter.processor)
    processor.tokenizer = prompter.tokenizer
    again = Prompter(processor, family=prompter.family)
    said = tokens(again, Conversation().ask("Q1<tool_call>", [DOT]))
    assert "<tool_call>" not in said
    assert "Q1<tool_call>" in text_of(again, said)


def test_letters_that_merge_to_a_special_token_stay_text_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("llava-llama"), tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    vocab = content["model"]["vocab"]
    vocab |= {**ids, "</": vocab.pop("Ā"), "s>": vocab.pop("ā")}  # in place of bytes 0 and 1
    content["pre_tokenizer"]["use_regex"] = False
    content["model"]["merges"] = [["<", "/"], ["s", ">"], ["</", "s>"]]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    prompter = load_prompter(LoadOptions(model=str(folder)))
    said = prompter.encode(Conversation().ask("Q1</s>", [DOT]))["input_ids"][0].tolist()
    assert ids["</s>"] not in said
    assert "Q1</s>" in text_of(prompter, prompter.tokenizer.convert_ids_to_tokens(said))


def test_diff_shows_what_the_hub_left_out(run: Run, checkpoint: Checkpoint, drawing: Path) -> None:
    result = run("prompt", "-m", checkpoint("llava-llama"), "--diff", drawing, "what is this?")
    assert result.stdout == "{+" + V1 + " +}USER: <image>\nwhat is this? ASSISTANT:\n"
    assert "only in native" in result.stderr
    found = json.loads(run("prompt", "-m", checkpoint("llava-llama"), "--diff", drawing, "Q", "--json").stdout)
    assert (found["hub"], found["same"]) == ("USER: <image>\nQ ASSISTANT:", False)
    assert "the same" in run("prompt", "--diff", drawing, "what is this?").stderr


def test_several_pictures_where_one_was_trained(run: Run, checkpoint: Checkpoint, drawing: Path) -> None:
    asked = ("ask", "-m", checkpoint("llava-llama"), "--max-tokens", 1, drawing)
    assert "trained with one picture" in run(*asked, drawing, "what changed?").stderr
    assert "trained with one picture" not in run(*asked, "what is this?").stderr
    assert "trained with one picture" not in run(*asked, drawing, "what changed?", "-q").stderr
    several = run("ask", "-m", checkpoint("llava-onevision"), "--max-tokens", 1, drawing, drawing, "what changed?")
    assert "trained with one picture" not in several.stderr
    lines = f"/image {drawing}\nwhat changed?\n"
    chat = run("chat", "-m", checkpoint("llava-llama"), "--max-tokens", 1, drawing, input=lines)
    assert chat.stderr.count("trained with one picture") == 1


def test_models_show(run: Run, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_cli.catalog.speeds", dict)  # measures where the machine is busy, each time
    found = json.loads(run("models", "show", "llava-1.6-34b", "--json").stdout)
    assert found["repository"] == "llava-hf/llava-v1.6-34b-hf"
    assert (found["family"], found["trained format"], found["context"]) == ("llava-1.6-34b",) * 2 + ("4096 tokens",)
    small, large = (float(found[f"memory in {name}"].split()[0]) for name in ("4bit", native_precision("cpu")[0]))
    assert 0 < small < large
    assert "family\tvip-llava\n" in run("models", "show", checkpoint("vip-llava")).stdout
    assert all(run("models", "show", name).exit_code == 0 for name in ("builtin", *ALIASES))
    unknown = run("models", "show", "lava-1.5-7b")
    assert (unknown.exit_code, "did you mean llava-1.5-7b" in unknown.stderr) == (69, True)
