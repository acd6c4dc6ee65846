"""A chat that reads only what is new says what one that reads everything says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.engines import SAMPLING, ours, picture, reference, same
from helpers.families import FAMILIES

from llava_cli import Conversation, Sampling, load
from llava_cli.engine import Request
from llava_cli.engine.forward import Forward
from llava_cli.engine.generate.prompt_cache import CachedPrompt, shared_prefix
from llava_cli.engine.kv_cache import RoomyCache, RoomyLayer
from llava_cli.engine.local import LocalEngine
from llava_cli.errors import LlavaError, OutOfMemory

Get = Callable[[str], Path]


@pytest.fixture
def engines(engines: Callable[[str], LocalEngine]) -> Callable[[str], LocalEngine]:
    """Each time a new engine, that has read nothing yet, over the model that is loaded once."""

    def get(family: str) -> LocalEngine:
        one = engines(family)
        return LocalEngine(one.model, one.network, one.prompter, one.precision, 0)

    return get


AFRESH = ("llava-onevision", "smolvlm", "smolvlm2")


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_and_a_second_picture(family: str, engines: Callable[[str], LocalEngine]) -> None:
    engine = engines(family)
    talk = Conversation().ask("what is this?", [picture(60, 60, 1)])
    read = 0
    for question, pictures in [("a?", []), ("b?", []), ("and this?", [picture(90, 50, 2)]), ("c?", [])]:
        answer = same(engine, engines(family), talk)
        joined = len(talk.turns[-1].pictures) == 1 < len(talk.turns)
        # With a second picture theirs looks at the first one in another way: they read everything again.
        assert answer.cached_tokens >= min(read, 1) or (joined and family in AFRESH)
        read = answer.prompt_tokens
        talk = talk.answered(answer.text).ask(question, pictures)
    answer = same(engine, engines(family), talk)
    ids = engine.prompter.encode(talk)["input_ids"][0].tolist()
    image = engine.prompter.tokenizer.convert_tokens_to_ids(engine.prompter.image_token)
    assert image in ids[: answer.cached_tokens]
    assert image not in ids[answer.cached_tokens :]  # neither picture is read again


def test_undo_and_other_pictures(engines: Callable[[str], LocalEngine]) -> None:
    for family in ("llava-llama", "llava-next-vicuna", "llava-onevision"):
        engine = engines(family)
        one, two = picture(60, 60, 1), picture(60, 60, 2)
        for talk in (
            Conversation().ask("what is this?", [one]).answered("a cat").ask("and this?", [two]),
            Conversation().ask("what is this?", [one]).answered("a cat").ask("what color?"),  # the second is gone
            Conversation().ask("what is this?", [two]).answered("a cat").ask("what color?"),  # another, as large
            Conversation().ask("what is this?"),
            Conversation().ask("what is this?", [one, two]),
            Conversation().ask("what is this?", [two, one]),
            Conversation().ask("what is this?", [two]),
        ):
            same(engine, engines(family), talk)


def test_same_question_again_reads_its_last_token_alone(engines: Callable[[str], LocalEngine]) -> None:
    engine, talk = engines("llava-llama"), Conversation().ask("what is this?", [picture(60, 60)])
    same(engine, engines("llava-llama"), talk)
    answer = same(engine, engines("llava-llama"), talk)
    assert answer.cached_tokens == answer.prompt_tokens - 1


@pytest.mark.parametrize("after", [0, 1, 5])
def test_answer_broken_off_between_tokens(after: int, engines: Callable[[str], LocalEngine]) -> None:
    engine, talk = engines("llava-llama"), Conversation().ask("what is this?", [picture(60, 60)])
    chunks = engine.stream(talk, SAMPLING)
    said = "".join(next(chunks).text for _ in range(after))
    chunks.close()  # type: ignore[attr-defined]
    same(engine, engines("llava-llama"), talk.answered(said).ask("go on"))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("step", [0, 1, 4])
def test_ctrl_c_in_the_midst_of_a_forward_pass(
    step: int, layer: int, engines: Callable[[str], LocalEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines("llava-llama")
    first = Conversation().ask("what is this?", [picture(60, 60)])
    said = same(engine, engines("llava-llama"), first).text
    talk = first.answered(said).ask("and now?")
    calls, set_size, layers = 0, RoomyLayer._set_size, engine.network.config.text_config.num_hidden_layers

    def torn(self: RoomyLayer, name: str, rows: int, tokens: int) -> None:
        """Ctrl-C once its keys have grown and its values have not."""
        nonlocal calls
        calls += name == "values"
        if calls == layers * step + layer + 1:
            raise KeyboardInterrupt
        set_size(self, name, rows, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(RoomyLayer, "_set_size", torn)
        with pytest.raises(KeyboardInterrupt):
            engine.answer(talk, SAMPLING)
    answer = same(engine, engines("llava-llama"), talk)
    assert answer.cached_tokens > 0


def test_sliding_window_hides_what_the_cache_keeps(checkpoint: Get, tmp_path: Path) -> None:
    folder = tmp_path / "sliding"
    shutil.copytree(checkpoint("llava-mistral"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["sliding_window"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    engine, fresh, wide = (load(str(f), precision="fp32") for f in (folder, folder, checkpoint("llava-mistral")))
    first = Conversation().ask("what is this?", [picture(60, 60)])
    assert ours(fresh, first, Sampling()) == reference(fresh, folder, first, do_sample=False)
    assert ours(fresh, first, Sampling()) != ours(wide, first, Sampling())
    talk = first.answered(same(engine, fresh, first).text).ask("and now?")
    again = LocalEngine(fresh.model, fresh.network, fresh.prompter, fresh.precision, 0)
    assert same(engine, again, talk).cached_tokens > 8


def test_ctrl_c_between_the_cuts_of_two_layers(
    engines: Callable[[str], LocalEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, one = engines("llava-llama"), picture(60, 60)
    talk = Conversation().ask("what is this?", [one]).answered("a cat").ask("and what is on it?")
    same(engine, engines("llava-llama"), talk)
    truncate, calls = RoomyLayer.truncate, list[int]()

    def interrupted(self: RoomyLayer, length: int) -> None:
        calls.append(length)
        if len(calls) == 2:
            raise KeyboardInterrupt
        truncate(self, length)

    shorter = Conversation().ask("what is this?", [one]).answered("a dog").ask("really?")
    with monkeypatch.context() as patch:
        patch.setattr(RoomyLayer, "truncate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.answer(shorter, SAMPLING)
    assert same(engine, engines("llava-llama"), talk).cached_tokens > 0


def test_answer_that_another_has_overtaken_says_so(engines: Callable[[str], LocalEngine]) -> None:
    engine, talk = engines("llava-llama"), Conversation().ask("what is this?", [picture(60, 60)])
    overtaken = engine.stream(talk, Sampling(max_tokens=40))
    next(overtaken)
    same(engine, engines("llava-llama"), talk)
    with pytest.raises(LlavaError, match="another answer was begun"):
        list(overtaken)


def test_an_answer_for_which_memory_runs_out_leaves_nothing_in_it(
    engines: Callable[[str], LocalEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, talk = engines("llava-llama"), Conversation().ask("what is this?", [picture(60, 60)])
    before = engine.answer(talk, SAMPLING)

    def none(self: Forward, *args: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(Forward, "__call__", none)
        with pytest.raises(OutOfMemory):
            engine.answer(talk, SAMPLING)
    after = engine.answer(talk, SAMPLING)
    assert (after.text, after.cached_tokens) == (before.text, 0)


IMAGE = 9


@pytest.mark.parametrize(
    ("cached", "cached_images", "asked", "images", "expected"),
    [
        ([1, 2, 3], "", [1, 2, 3, 4], "", (3, 0)),
        ([1, 2, 3], "", [1, 2, 3], "", (2, 0)),  # the last token has to be read for its logits
        ([1, 2], "", [1, IMAGE, 3], "a", (1, 0)),
        ([1, IMAGE, IMAGE, 2], "a", [1, IMAGE, IMAGE, 3], "a", (3, 1)),
        ([1, IMAGE, IMAGE, 2], "a", [1, IMAGE, IMAGE, 2, 3], "b", (0, 0)),
        ([1, IMAGE, IMAGE, 2], "a", [1, IMAGE, 2, 3], "a", (2, 1)),
        ([1, IMAGE, 2, IMAGE, IMAGE], "ab", [1, IMAGE, 2, IMAGE, 3, IMAGE, 4], "abc", (0, 0)),  # within the pictures
        ([1, IMAGE, 2], "a", [1, IMAGE, 2, IMAGE, 4], "ab", (3, 1)),
        ([1, IMAGE, 2, IMAGE, 3], "ab", [1, IMAGE, 2, 4], "a", (3, 1)),
        ([1, IMAGE, 2, IMAGE, 3], "ab", [1, IMAGE, 2, IMAGE, 3, 5], "ac", (0, 0)),
    ],
)
def test_a_shared_prefix_never_ends_within_the_pictures(
    cached: list[int],
    cached_images: str,
    asked: list[int],
    images: str,
    expected: tuple[int, int],
    engines: Callable[[str], LocalEngine],
) -> None:
    sequence = engines("llava-llama").prepare(0, Request(Conversation().ask("?"), SAMPLING))
    sequence.ids, sequence.images = asked, tuple(images)
    sequence.inputs = {**sequence.inputs, "pixel_values": torch.zeros(len(images), 1)}
    prompt = CachedPrompt(cached, tuple(cached_images), RoomyCache())
    assert shared_prefix(prompt, sequence, IMAGE) == expected
