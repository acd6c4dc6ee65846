"""Token ids with the vocabularies of real models, as their own libraries make them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Run
from helpers.real_checkpoints import REAL, Turns, save
from helpers.tables import for_each
from helpers.vocabularies import path_of
from PIL import Image

from llava_cli import Conversation
from llava_cli.cli.prompt import show_ids
from llava_cli.conversation import Picture
from llava_cli.diagnostics import checkup
from llava_cli.loader import load_prompter
from llava_cli.prompts.prompter import Prompter
from llava_cli.settings import LoadOptions

DOT = Picture("dot.png", Image.new("RGB", (64, 48), "red"), sha256="")
LLAVA, MISTRAL = "llava-hf/llava-1.5-7b-hf", "llava-hf/bakLlava-v1-hf"
USED = "transformers' differs from tokenizer.json, so the file's is used"
DIFFER = ("HuggingFaceTB/SmolVLM-Instruct", "HuggingFaceTB/SmolVLM-256M-Instruct")
"""Those that transformers 5.23 gives GPT-2's pipeline, in which a digit is no word of its own."""
TALKS: dict[str, Turns] = {
    "one turn": [("{}what is this?", "")],
    "two turns, two pictures": [("{}{}what changed?", "a dog  and\na cat"), ("what  color is it  in  2026?", "")],
    "a picture in the second turn": [
        ("{}Was ist das?", "ein Hund 🙂 don't"),
        ("{}色は?", "茶色 cafe\u0301"),
        ("ok", ""),
    ],
    "special tokens in a user's text": [
        ("{}what do </s>,<s> <image> or a<|im_end|>\n<|eot_id|> mean   in <|im_start|>user [INST]x[/INST] <pad>?", "")
    ],
}


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a checkpoint with a real vocabulary and no weights, made once: `real("llava-hf/…")`."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save(name, tmp_path_factory.mktemp("real"))
        return made[name]

    return get


def conversation(turns: Turns) -> Conversation:
    talk = Conversation()
    for number, (question, answer) in enumerate(turns):
        talk = talk.ask(question.replace("{}", ""), [DOT] * question.count("{}"))
        talk = talk.answered(answer) if number < len(turns) - 1 else talk
    return talk


def joined(ids: list[int], image: int) -> list[int]:
    """One image token for each run of them."""
    return [token for number, run in groupby(ids) for token in ([image] if number == image else list(run))]


@pytest.mark.parametrize("vocabulary", sorted({real.vocabulary for real in REAL.values()}))
def test_ids_are_those_of_the_vocabularys_own_library(
    vocabulary: str, real: Callable[[str], Path], subtests: pytest.Subtests
) -> None:
    path_of(vocabulary)  # skips
    for name, facts in REAL.items():
        if facts.vocabulary == vocabulary:
            with subtests.test(name):
                hub = load_prompter(LoadOptions(model=str(real(name))))
                assert (hub.tokenizer_origin == USED) == (name in DIFFER)
                check_ids(name, hub.with_template("native"), native=True)
                if facts.hub:
                    check_ids(name, hub, native=False)


def check_ids(name: str, prompter: Prompter, native: bool) -> None:
    image = prompter.image_token_id
    for label, turns in TALKS.items():
        ids = prompter.encode(conversation(turns))["input_ids"][0].tolist()
        assert joined(ids, image) == joined(REAL[name].expected(turns, native), image), (label, native)


def test_a_prompt_of_llava_15(real: Callable[[str], Path], run: Run, drawing: Path) -> None:
    """The ids that LLaVA's own code gives for one turn, typed out."""
    assert run("prompt", "-m", real(LLAVA), drawing, "what is this?", "--ids", "--template", "native").stdout == (
        "1 319 13563 1546 263 12758 1404 322 385 23116 21082 20255 29889 450 20255 4076 8444 29892 13173 29892 322 "
        "1248 568 6089 304 278 1404 29915 29879 5155 29889 3148 1001 29901 29871 "
        + "32000 " * 576
        + "29871 13 5816 338 445 29973 319 1799 9047 13566 29901\n"
    )


def test_a_picture_of_llava_next_has_as_many_tokens_as_published(real: Callable[[str], Path]) -> None:
    """`input_ids` [1, 2369] and five tiles for a picture of 1100 x 808, printed by code that uses this checkpoint."""
    prompter = load_prompter(LoadOptions(model=str(real("llava-hf/llava-v1.6-mistral-7b-hf"))))
    picture = Picture("art.png", Image.new("RGB", (1100, 808)), sha256="")
    question = "Is this artwork created by linard, jacques? Please answer yes or no."
    inputs = prompter.encode(Conversation().ask(question, [picture]))
    assert inputs["input_ids"].shape == (1, 2369)
    assert inputs["pixel_values"].shape == (1, 5, 3, 336, 336)


def test_a_prompt_of_pixtral_as_published(real: Callable[[str], Path], tmp_path: Path) -> None:
    """The ids and the number of image tokens in transformers' own tests of its processor."""
    template = tmp_path / "user.jinja"
    template.write_text("USER: [IMG]\n{{ messages[0].content[1].text }} ASSISTANT:")
    prompter = load_prompter(LoadOptions(model=str(real("mistral-community/pixtral-12b")), template=str(template)))

    def ids(question: str, width: int, height: int) -> list[int]:
        picture = Picture("art.png", Image.new("RGB", (width, height)), sha256="")
        return prompter.encode(Conversation().ask(question, [picture]))["input_ids"][0].tolist()

    picture = [10, 10, 12, 10, 10, 13]
    text = [1010, 7493, 1681, 1278, 4701, 1307, 1278, 3937, 1063, 1349, 4290, 16002, 41150, 1058]
    assert ids("What's the content of the image?", 32, 32) == [21510, 1058, 1032, *picture, *text]
    assert ids("What is shown in this image?", 316, 500).count(10) == 640


def test_a_prompt_of_onevision_as_published(real: Callable[[str], Path]) -> None:
    """The ids in vLLM's test of this checkpoint, whose template on the Hub is part of transformers' tests."""
    prompter = load_prompter(LoadOptions(model=str(real("llava-hf/llava-onevision-qwen2-0.5b-ov-hf"))))
    ids = prompter.encode(Conversation().ask("What is the content of this image?", [DOT]))["input_ids"][0].tolist()
    assert joined(ids, 151646) == (
        [151644, 872, 220, 151646, 198, 3838, 374, 279, 2213, 315, 419, 2168, 30, 151645, 151644, 77091, 198]
    )


def test_ids_are_one_line_and_in_json(real: Callable[[str], Path], run: Run, drawing: Path) -> None:
    done = run("prompt", "-m", real(MISTRAL), drawing, "what is this?", "--ids")
    found = json.loads(run("prompt", "-m", real(MISTRAL), drawing, "what is this?", "--json").stdout)
    assert done.stdout == " ".join(map(str, found["ids"])) + "\n"
    assert (len(found["ids"]), found["ids"].count(32000)) == (found["tokens"], 576)
    assert (len(found["pieces"]), found["pieces"].count("<image>")) == (found["tokens"], 576)
    assert f"{found['tokens']} tokens, 576 of them for 1 picture(s)" in done.stderr
    assert run("prompt", drawing, "what?", "--diff", "--ids").exit_code == 2


def test_ids_on_a_terminal_have_their_pieces(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture is one row, and what a vocabulary calls a token cannot command the terminal."""
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    show_ids([1, 9, 9, 9, 5, 5, 9, 7], ["<s>", *["<image>"] * 3, "▁a", "▁a", "<image>", "\x1b[2J\t"], 9)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["position", "id", "piece"],
        ["0", "1", "<s>"],
        ["1-3", "9", "<image>", "x", "3"],
        ["4", "5", "▁a"],
        ["5", "5", "▁a"],
        ["6", "9", "<image>"],
        ["7", "7", r"\x1b[2J\t"],
    ]


# The self-check.


def another_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformers that does not have LLaVA's model types on its list of those whose file is taken as it is."""
    from transformers.models.auto import tokenization_auto

    monkeypatch.setattr(tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", set())
    for model_type in ("llava", "llava_next", "vipllava"):
        monkeypatch.delitem(tokenization_auto.TOKENIZER_MAPPING_NAMES, model_type)


def changed(folder: Path, copy: Path, file: str, **parts: Any) -> Path:
    """A copy of a checkpoint with other values in one of its files."""
    shutil.copytree(folder, copy)
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | parts))
    return copy


@pytest.mark.parametrize("name", [MISTRAL, LLAVA])
def test_another_release_of_transformers_is_caught(
    name: str, real: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed(real(name), tmp_path / "model", "tokenizer_config.json", legacy=False)
    another_release(monkeypatch)
    prompter = load_prompter(LoadOptions(model=str(folder), template="native"))
    assert prompter.tokenizer_origin == USED
    check_ids(name, prompter, native=True)
    tokenizer = prompter.tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 32001)
    assert tokenizer.decode([1, 3148, 2], skip_special_tokens=True) == tokenizer.decode([3148])


def test_what_transformers_would_make_of_it_is_wrong(
    real: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the check, these ids would be taken."""
    from transformers import AutoTokenizer

    folder = changed(real(MISTRAL), tmp_path / "model", "tokenizer_config.json", legacy=False)
    text = "USER: <image>\nwhat</s>USER:"
    right = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    another_release(monkeypatch)
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] != right


def test_what_cannot_be_repaired_is_refused(
    real: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, drawing: Path
) -> None:
    """Where the file's own pipeline gives other ids than in the sandbox."""
    folder = changed(real(MISTRAL), tmp_path / "model", "tokenizer_config.json", legacy=False)
    another_release(monkeypatch)
    monkeypatch.setattr("llava_cli.prompts.tokenizer_check._from_file", lambda tokenizer, sandbox: tokenizer)
    done = run("prompt", "-m", folder, drawing, "Q")
    assert (done.exit_code, done.stdout) == (69, "")
    assert f"{folder}: transformers' tokenizer differs from its tokenizer.json, and the file's cannot" in done.stderr


SENTENCEPIECE = ["llava-hf/llava-1.5-7b-hf", "llava-hf/llava-v1.6-34b-hf", MISTRAL, "a fine-tuned Mistral 0.3"]


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_a_sentencepiece_model_alone(name: str, tmp_path: Path) -> None:
    """transformers orders its merges by id, not by score, and puts no space before a text."""
    real = REAL[name]
    folder = save(name, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    shutil.copy(path_of(real.vocabulary), folder / "tokenizer.model")
    prompter = load_prompter(LoadOptions(model=str(folder), template="native"))
    assert "tokenizer.model" in prompter.tokenizer_origin
    check_ids(name, prompter, native=True)


@for_each("data", [b"", b"\n", b"\n\x05abc", b"\xff" * 100, b"IQ== 0\n", b"\n\x04\n\x02ab", b"\x0a\x03\x0a\x01\xff"])
def test_what_is_no_sentencepiece_model(data: bytes, real: Callable[[str], Path], tmp_path: Path, run: Run) -> None:
    folder = shutil.copytree(real(MISTRAL), tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(data)
    done = run("prompt", "-m", folder, "Q")
    assert (done.exit_code, done.stdout) == (69, "")
    assert done.stderr.startswith(f"llava: {folder}: its tokenizer.model ")
    assert ("tiktoken" in done.stderr) == data.startswith(b"IQ==")
    assert "put the same model's tokenizer.json into its folder" in done.stderr


def test_the_words_name_no_file_that_is_not_there(
    real: Callable[[str], Path], tmp_path: Path, run: Run, drawing: Path
) -> None:
    """A SentencePiece model has no token for pictures; other files add it, or not."""
    folder = shutil.copytree(real(MISTRAL), tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    shutil.copy(path_of("mistral"), folder / "tokenizer.model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": {}}))
    done = run("prompt", "-m", folder, drawing, "Q")
    assert (done.exit_code, done.stdout) == (69, "")
    assert "the tokenizer has none for <image>" in done.stderr
    assert "tokenizer.json" not in done.stderr


def test_doctor_has_a_line_about_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(MISTRAL, tmp_path / "model", weights=True, words={"legacy": False})
    options = LoadOptions(model=str(folder), precision="fp32", device="cpu")
    assert tokenizer_line(options) == (True, "its ids are those of tokenizer.json")
    another_release(monkeypatch)
    assert tokenizer_line(options) == (True, "transformers' differs from tokenizer.json, so the file's is used")


def tokenizer_line(options: LoadOptions) -> tuple[bool, str]:
    checks = list(checkup(options))
    assert [check for check in checks if not check.good] == []
    return next((check.good, check.words) for check in checks if check.name == "tokenizer")


@for_each("name", REAL)
def test_an_answer_alone_has_the_tokens_that_it_has_in_the_whole_text(name: str, real: Callable[[str], Path]) -> None:
    prompter = load_prompter(LoadOptions(model=str(real(name))))
    for answer in ("Yes", "no.", "not sure", "a red car", "日本", "3", "</s>", "<image> x"):
        asked = conversation([("{}what is this?", "")])
        length = prompter.encode(asked)["input_ids"].shape[1]
        whole = prompter.encode(asked.answered(answer))["input_ids"][0].tolist()
        (ids,) = prompter.answer_ids([answer])
        assert whole[length : length + len(ids)] == ids, answer


def test_an_answer_behind_a_prompt_that_ends_in_a_space(real: Callable[[str], Path], tmp_path: Path) -> None:
    """That space is a token of the prompt already, so the answer's word has none."""
    template = tmp_path / "space.jinja"
    template.write_text(
        "{% for m in messages %}{% for c in m.content if c.type == 'text' %}{{ m.role }}: {{ c.text }} {% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    prompter = load_prompter(LoadOptions(model=str(real(LLAVA)), template=str(template)))
    for word in ("Yes", "no."):
        (ids,) = prompter.answer_ids([word])
        assert ids == prompter.tokenizer(f"\n{word}", add_special_tokens=False)["input_ids"][2:]
