"""The model that ships: right about pictures it never saw, modest about what it does not know."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.command import Run
from helpers.tables import for_each
from PIL import Image, ImageDraw

from llava_cli import Conversation, load, open_picture
from llava_cli.engine.local import LocalEngine
from llava_cli.models.registry import builtin_folder

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return load("builtin")


def test_it_is_a_small_llava_in_safetensors() -> None:
    files = {f.name: f.stat().st_size for f in builtin_folder().iterdir() if f.is_file()}
    assert sum(files.values()) <= 16_000_000
    config = json.loads((builtin_folder() / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["vision_config"]["model_type"] == "clip_vision_model"
    assert config["text_config"]["model_type"] == "llama"
    assert config["dtype"] == "float16"
    assert {"README.md", "model.safetensors", "processor_config.json", "chat_template.jinja"} <= set(files)


QUESTIONS = [
    ("what is this?", "a red circle and a blue triangle on a white background"),
    ("what color is the circle?", "red"),
    ("What colour is the triangle", "blue"),
    ("what is the blue shape?", "triangle"),
    ("how many shapes are there?", "2"),
    ("how many red shapes are there?", "1"),
    ("is there a star?", "no"),
    ("is there a red circle in the picture?", "yes"),
    ("is the red circle left of the blue triangle?", "yes"),
    ("where is the circle?", "left"),
    ("what color is the background?", "white"),
]


@for_each("question, answer", QUESTIONS)
def test_answers_about_a_drawing(question: str, answer: str, run: Run, drawing: Path) -> None:
    assert run("ask", drawing, question, "-q").stdout == f"{answer}\n"


def test_answers_in_a_conversation(engine: LocalEngine, drawing: Path) -> None:
    talk, pictures = Conversation(), [open_picture(str(drawing))]
    for question, answer in QUESTIONS:
        talk = talk.ask(question, pictures)
        said = engine.answer(talk).text
        assert said == answer
        talk, pictures = talk.answered(said), []


@for_each("size", [(64, 64), (900, 900), (640, 300), (300, 640)])
def test_any_size_and_aspect(size: tuple[int, int], engine: LocalEngine, tmp_path: Path) -> None:
    image = Image.new("RGB", size, "white")
    side = min(size) // 4
    ImageDraw.Draw(image).rectangle((10, 10, 10 + side, 10 + side), fill="purple")
    image.save(tmp_path / "p.png")
    assert engine.ask(str(tmp_path / "p.png"), "what color is the rectangle?") == "purple"
    assert engine.ask(str(tmp_path / "p.png"), "where is the rectangle?") == "top left"


def test_declines_what_it_does_not_know(engine: LocalEngine, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    assert "only knows drawings" in engine.ask(str(tmp_path / "noise.png"), "what is this?")


def test_precisions_agree(drawing: Path) -> None:
    said = {
        p: load("builtin", precision=p).ask(str(drawing), "what is this?") for p in ("fp32", "bf16", "8bit", "4bit")
    }
    assert set(said.values()) == {QUESTIONS[0][1]}


def test_card_states_what_was_measured() -> None:
    card = (builtin_folder() / "README.md").read_text("utf-8")
    assert re.search(r"easy-VQA.*\d\d\.\d", card)
    assert re.search(r"declined.*\d\d", card, re.I)
    assert re.search(r"nobody chose declined.*\d\d", card)
    assert "padded square that it sees" in card
