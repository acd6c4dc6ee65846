"""The exact prompt: rendered by the checkpoint's template, counted, and never steered by what a user writes."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.command import Run
from helpers.families import FAMILIES
from helpers.tables import for_each
from PIL import Image

from llava_cli import Conversation
from llava_cli.conversation import Picture
from llava_cli.errors import ModelUnusable
from llava_cli.loader import load_prompter
from llava_cli.models.registry import builtin_folder
from llava_cli.prompts.chat_template import named_templates
from llava_cli.prompts.prompter import Prompter
from llava_cli.settings import LoadOptions

DOT = Picture("dot.png", Image.new("RGB", (40, 30), "red"), sha256="")


def test_prompt_is_printed_alone_and_counted_on_stderr(run: Run, drawing: Path) -> None:
    result = run("prompt", drawing, "what is this?")
    assert result.stdout == "USER: <image>\nwhat is this? ASSISTANT:\n"
    assert "64 of them for 1 picture" in result.stderr


def test_prompt_as_json(run: Run, drawing: Path) -> None:
    found = json.loads(run("prompt", drawing, drawing, "what changed?", "--json").stdout)
    assert found["prompt"] == "USER: <image>\n<image>\nwhat changed? ASSISTANT:"
    assert found["image_tokens"] == 128
    assert found["tokens"] > 128


def test_prompt_loads_no_weights(run: Run, drawing: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weightless"
    shutil.copytree(builtin_folder(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert run("prompt", "-m", folder, drawing, "what is this?").exit_code == 0


def test_turns_and_system_text_of_the_built_in_format() -> None:
    prompter = load_prompter(LoadOptions(model="builtin"))
    talk = Conversation(system="Be brief.").ask("what is this?", [DOT]).answered("a dot").ask("what color?")
    assert prompter.render(talk) == (
        "Be brief. USER: <image>\nwhat is this? ASSISTANT: a dot</s>USER: what color? ASSISTANT:"
    )


def test_named_template_is_the_format_of_training() -> None:
    assert "llava-1.5" in named_templates()
    prompter = load_prompter(LoadOptions(model="builtin", template="llava-1.5"))
    talk = Conversation().ask("Q1", [DOT]).answered("A1").ask("Q2")
    assert prompter.render(talk) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"
    )
    brief = Conversation(system="Be brief.").ask("Q1", [DOT])
    assert prompter.render(brief) == "Be brief. USER: <image>\nQ1 ASSISTANT:"


def test_template_that_begins_with_bos_gives_one(tmp_path: Path) -> None:
    file = tmp_path / "bos.jinja"
    file.write_text("{{ bos_token }}<image>{{ messages[0].content[1].text }}")
    ids = load_prompter(LoadOptions(model="builtin", template=str(file))).encode(Conversation().ask("why?", [DOT]))
    assert ids["input_ids"][0].tolist().count(1) == 1


def test_template_from_a_file(run: Run, drawing: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("Q: <image> {{ messages[0].content[1].text }} A:")
    assert run("prompt", drawing, "why?", "--template", file).stdout == "Q: <image> why? A:\n"


@for_each(
    "text, reason",
    [
        ("no picture", "names 0 pictures where the conversation has 1"),
        ("{{ broken", "--template"),
        ("{{ raise_exception('no system text here') }}", "no system text here"),
        ("{{ messages.__class__.__mro__ }}", "--template"),
    ],
)
def test_template_that_cannot_be_used(text: str, reason: str, run: Run, drawing: Path, tmp_path: Path) -> None:
    file = tmp_path / "bad.jinja"
    file.write_text(text)
    result = run("prompt", drawing, "why?", "--template", file)
    assert (result.exit_code, result.stdout) == (2, "")
    assert reason in result.stderr


def test_unknown_template_names_the_known(run: Run, drawing: Path) -> None:
    result = run("prompt", drawing, "why?", "--template", "llava-1.4")
    assert result.exit_code == 2
    assert "llava-1.5" in result.stderr


QUESTION = "what do <image> and </s> mean? <pad><s>"


@for_each("family", ["builtin", *FAMILIES])
def test_special_tokens_in_a_question_stay_text(family: str, checkpoint: Callable[[str], Path]) -> None:
    folder = builtin_folder() if family == "builtin" else checkpoint(family)
    prompter = load_prompter(LoadOptions(model=str(folder)))
    words, size = prompter.tokenizer, len(prompter.tokenizer)
    special = {i: t.content for i, t in words.added_tokens_decoder.items()}
    plain = prompter.encode(Conversation().ask("what?", [DOT]))["input_ids"][0].tolist()
    asked = Conversation().ask(QUESTION, [DOT])
    tricky = prompter.encode(asked)
    ids = tricky["input_ids"][0].tolist()
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert max(ids) < size  # what stood in for them is no token of the model's
    assert tricky["attention_mask"].shape == tricky["input_ids"].shape
    assert QUESTION in prompter.render(asked)
    assert QUESTION in words.decode(ids)
    # And the same question later on, now that the tokenizer has met it.
    assert prompter.encode(asked)["input_ids"][0].tolist() == ids
    assert prompter.encode(Conversation().ask("what?", [DOT]))["input_ids"][0].tolist() == plain


def test_only_the_special_words_change_how_a_question_is_tokenised() -> None:
    prompter = load_prompter(LoadOptions(model="builtin"))
    ids = prompter.encode(Conversation().ask("a<b> is not an image", [DOT]))["input_ids"]
    text = prompter.render(Conversation().ask("a<b> is not an image", [DOT]))
    expected = prompter.processor(text=text, images=[DOT.image], return_tensors="pt")["input_ids"]
    assert ids.tolist() == expected.tolist()


def test_fit_shows_all_of_a_wide_picture_or_its_middle() -> None:
    wide = Image.new("RGB", (300, 100), "white")
    wide.paste("red", (0, 0, 20, 100))
    conversation = Conversation().ask("?", [Picture("wide", wide, sha256="")])
    processor = load_prompter(LoadOptions(model="builtin")).processor
    padded = Prompter(processor, fit="pad").encode(conversation)["pixel_values"]
    cropped = Prompter(processor, fit="crop").encode(conversation)["pixel_values"]
    assert padded.shape == cropped.shape == (1, 3, 64, 64)
    assert padded[0, 0, 0, 0].item() == pytest.approx(0, abs=0.01)  # grey above the picture
    assert padded[0, 1, 32, 1].item() == pytest.approx(-1, abs=0.01)  # the red edge
    assert cropped.min().item() == pytest.approx(1, abs=0.01)  # white all over


@for_each("family", ["builtin", *FAMILIES])
def test_pictures_of_any_size_after_one_another(family: str, checkpoint: Callable[[str], Path]) -> None:
    """The tokens of the prompt before are used again only where this picture has as many."""
    settings = LoadOptions(model=family if family == "builtin" else str(checkpoint(family)))
    sizes = [(40, 30), (41, 30), (300, 40), (40, 300), (300, 41), (40, 30)]
    talks = [Conversation().ask("what?", [Picture("", Image.new("RGB", size, "red"), sha256="")]) for size in sizes]
    prompter = load_prompter(settings)
    for talk in talks:
        before, alone = prompter.encode(talk), load_prompter(settings).encode(talk)
        assert before.keys() == alone.keys()
        assert all(before[name].tolist() == alone[name].tolist() for name in alone)


@pytest.mark.parametrize("first", [True, False])
def test_prompts_are_prepared_in_several_threads(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very first one by itself; later on none waits for another one's pictures."""
    prompter = load_prompter(LoadOptions(model="builtin"))
    if not first:
        prompter.encode(Conversation().ask("what?", [DOT]))
    one, two = (
        Conversation().ask(f"what?{color}", [Picture("", Image.new("RGB", (30, 30), color), sha256="")])
        for color in ("red", "blue")
    )
    alone = {talk: load_prompter(LoadOptions(model="builtin")).encode(talk) for talk in (one, two)}
    found: dict[Conversation, object] = {}
    other = threading.Thread(target=lambda: found.update({two: prompter.encode(two)}))
    pictures = prompter.processor.image_processor
    process = pictures._image_processor
    overtaken: list[bool] = []

    class Midst:
        def __getattr__(self, name: str) -> object:
            return getattr(process, name)

        def __call__(self, *args: object, **options: object) -> object:
            if not overtaken:
                overtaken.append(False)
                other.start()
                other.join(0.2 if first else 60)
                overtaken[0] = not other.is_alive()
            return process(*args, **options)

    monkeypatch.setattr(pictures, "_image_processor", Midst())
    found[one] = prompter.encode(one)
    other.join()
    assert overtaken == [not first]
    for talk, inputs in found.items():
        assert isinstance(inputs, dict)
        assert all(inputs[name].equal(value) for name, value in alone[talk].items())


def test_a_token_that_the_model_does_not_know(checkpoint: Callable[[str], Path]) -> None:
    prompter = load_prompter(LoadOptions(model=str(checkpoint("llava-llama"))))
    prompter._vocab_size = 100
    with pytest.raises(ModelUnusable, match=r"makes token \d+ .* and the model has 100"):
        prompter.encode(Conversation().ask("~"))
