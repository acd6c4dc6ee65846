"""Pixels: a picture that was resized where it was decoded is for the model what its processor would have made of it."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.families import FAMILIES, processor_of, save
from helpers.picture_bytes import encoded, noise
from helpers.tables import for_each
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_cli.conversation import Conversation, Picture
from llava_cli.images.resize import Resize, pack, unpack
from llava_cli.images.sandbox import Sandbox
from llava_cli.loader import load_engine, load_prompter
from llava_cli.prompts.image_processor import ImageProcessor
from llava_cli.settings import Fit, LoadOptions, Sampling

SIZES = ((1, 1), (2, 1), (33, 32), (60, 40), (40, 60), (640, 481), (1000, 7), (7, 900), (7200, 40))
SQUARE = {"height": 32, "width": 32}
CLIP: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}


def assert_equal(ours: Any, theirs: Any) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(value))


CLIPS_MEAN, GRAY = (122, 116, 104), (127, 127, 127)
BLACK = {"do_normalize": False, "image_mean": None}


@for_each(
    ("processor", "mode", "resize"),
    [
        (CLIPImageProcessorPil(**CLIP), "pad", Resize(32, 32, "pad", 3, CLIPS_MEAN)),
        (CLIPImageProcessorPil(**CLIP), "crop", Resize(32, 32, "crop")),
        (CLIPImageProcessorPil(**CLIP), "auto", Resize(32, 32, "shortest_edge")),
        (CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=SQUARE), "auto", Resize(40, 40, "shortest_edge")),
        (CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=SQUARE), "crop", Resize(40, 40, "crop")),
        (CLIPImageProcessorPil(**CLIP, resample=2), "pad", Resize(32, 32, "pad", 2, CLIPS_MEAN)),
        (CLIPImageProcessorPil(**CLIP, do_resize=False, do_center_crop=False), "pad", None),
        (CLIPImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}, crop_size=SQUARE), "pad", None),
        (CLIPImageProcessorPil(**CLIP, do_normalize=False, image_mean=[300.0, 0.1, 0.1]), "pad", None),
        (LlavaImageProcessorPil(**CLIP, do_pad=True), "auto", Resize(32, 32, "pad", 3, CLIPS_MEAN)),
        (
            LlavaImageProcessorPil(**CLIP, do_pad=True, image_mean=[0.2, 0.9, 0.4]),
            "auto",
            Resize(32, 32, "pad", 3, (51, 229, 102)),
        ),
        (LlavaImageProcessorPil(**CLIP, do_pad=True, **BLACK), "auto", Resize(32, 32, "pad")),
        (LlavaImageProcessorPil(**CLIP, do_pad=True, **BLACK), "pad", Resize(32, 32, "pad", 3, GRAY)),
        (LlavaImageProcessorPil(**CLIP, do_pad=True), "crop", Resize(32, 32, "crop")),
        (LlavaImageProcessorPil(**CLIP), "auto", Resize(32, 32, "shortest_edge")),
        (SiglipImageProcessorPil(size=SQUARE), "auto", Resize(32, 32, "stretch")),
        (SiglipImageProcessorPil(size=SQUARE, image_mean=0.5, image_std=0.5), "auto", Resize(32, 32, "stretch")),
        (SiglipImageProcessorPil(size=SQUARE), "pad", Resize(32, 32, "pad", 3, GRAY)),
        (SiglipImageProcessorPil(size={"height": 48, "width": 32}), "auto", Resize(32, 48, "stretch")),
        (SiglipImageProcessorPil(size={"height": 48, "width": 32}), "crop", None),
    ],
)
def test_pixels_are_those_of_transformers_processor(processor: Any, mode: Fit, resize: Resize | None) -> None:
    ours = ImageProcessor(processor, mode)
    found = ours.picture_resize
    assert found == resize
    for size in SIZES:
        image = noise(*size)
        theirs = processor([[ours.fit(image)]], return_tensors="pt")
        assert_equal(ours([image], return_tensors="pt"), theirs)
        if found:
            assert_equal(ours([found(image.copy())], return_tensors="pt"), theirs)


@for_each(
    ("processor", "mode", "options"),
    [
        (SiglipImageProcessorPil(size={"height": 7100, "width": 7100}), "auto", ()),  # more than a process may send
        (CLIPImageProcessorPil(**CLIP), "pad", ("resample",)),
        (SimpleNamespace(image_mean=0.5), "auto", ()),
    ],
)
def test_where_too_little_is_known_pictures_are_left_to_the_processor(processor: Any, mode: Fit, options: Any) -> None:
    assert ImageProcessor(processor, mode, options).picture_resize is None


@for_each("family", [*FAMILIES])
def test_every_familys_pixels_are_those_of_its_processor(family: str, tmp_path: Path) -> None:
    processor = processor_of(family, save(family, tmp_path)).image_processor
    for mode in ("auto", "pad", "crop"):
        ours = ImageProcessor(processor, mode)  # type: ignore[arg-type]
        for size in ((60, 40), (45, 80)):
            image = noise(*size)
            assert_equal(ours([image], return_tensors="pt"), processor([[ours.fit(image)]], return_tensors="pt"))


@pytest.fixture(scope="module")
def sandbox() -> Any:
    sandbox = Sandbox()
    yield sandbox
    sandbox.end()


@for_each(
    "resize",
    [
        Resize.within(20),
        Resize(32, 24, "stretch", 2),
        Resize(32, 32, "shortest_edge"),
        Resize(32, 32, "pad", 3, (122, 116, 104)),
        Resize(32, 32, "crop"),
        None,
    ],
)
def test_the_process_that_decodes_resizes(resize: Resize | None, sandbox: Sandbox) -> None:
    image = noise(70, 50)
    picture = sandbox.open("a.png", encoded(image, "PNG"), resize=resize)
    assert isinstance(picture, Picture)
    wanted = resize(image.copy()) if resize else image
    assert (picture.image.size, picture.image.tobytes()) == (wanted.size, wanted.tobytes())
    assert picture.size == (70, 50)
    assert unpack(pack(resize)) == resize


def test_a_square_of_the_right_size_is_left_alone() -> None:
    image = Image.new("RGB", (32, 32), "red")
    for shape in ("stretch", "pad", "crop"):
        assert Resize(32, 32, shape)(image) is image  # type: ignore[arg-type]


@for_each("error", [None, ValueError])
def test_pictures_of_the_first_question_are_processed_ahead(
    error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, and with the same result; what goes wrong is told when the question is asked."""
    pictures = [Picture("a.png", noise(70, 50), sha256=""), Picture("b.png", noise(20, 50), sha256="")]
    conversation = Conversation().ask("what changed?", pictures)
    wanted = load_prompter(LoadOptions(model="builtin")).encode(conversation)
    prompter, calls = load_prompter(LoadOptions(model="builtin")), []
    prompter.encode_example()
    process = ImageProcessor._process

    def counted(self: ImageProcessor, images: list[Image.Image], options: dict[str, Any]) -> Any:
        calls.append(threading.current_thread())
        if error and len(calls) == 1:
            raise error("no pixels")
        return process(self, images, options)

    monkeypatch.setattr(ImageProcessor, "_process", counted)
    prompter.prepare(pictures)
    assert_equal(prompter.encode(conversation), wanted)
    assert calls[0] is not threading.main_thread()
    assert len(calls) == (2 if error else 1)


def test_the_loader_begins_with_the_first_questions_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, process = [], ImageProcessor._process

    def counted(self: ImageProcessor, images: list[Image.Image], options: dict[str, Any]) -> Any:
        calls.append((threading.current_thread() is threading.main_thread(), images[0].size))
        return process(self, images, options)

    monkeypatch.setattr(ImageProcessor, "_process", counted)
    pictures = [Picture("a.png", noise(70, 50), sha256="")]
    engine = load_engine(LoadOptions(model="builtin"), pictures=pictures)
    engine.answer(Conversation().ask("what is this?", pictures), Sampling(max_tokens=1))
    assert [call for call in calls if call[1] == (70, 50)] == [(False, (70, 50))]
