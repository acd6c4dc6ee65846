"""A chat that reads only what is new says what one that reads everything says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.engines import SAMPLING, ours, picture, reference, same
from helpers.families import FAMILIES

from llava_cli import Conversation, Sampling, load
from llava_cli.engine.local import LocalEngine
from llava_cli.errors import LlavaError

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
    from llava_cli.engine.kv_cache import RoomyLayer

    engine = engines("llava-llama")
    first = Conversation().ask("what is this?", [picture(60, 60)])
    said = same(engine, engines("llava-llama"), first).text
    talk = first.answered(said).ask("and now?")
    calls, hold = 0, RoomyLayer._hold

    def torn(self: RoomyLayer, name: str, rows: int, tokens: int) -> None:
        """Ctrl-C once its keys have grown and its values have not."""
        nonlocal calls
        calls += name == "values"
        if calls == len(engine._prefix._cache.layers) * step + layer + 1:
            raise KeyboardInterrupt
        hold(self, name, rows, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(RoomyLayer, "_hold", torn)
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


def test_ctrl_c_between_the_cuts_of_two_layers(engines: Callable[[str], LocalEngine]) -> None:
    class Torn(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield self[0]
            raise KeyboardInterrupt

    engine, one = engines("llava-llama"), picture(60, 60)
    talk = Conversation().ask("what is this?", [one]).answered("a cat").ask("and what is on it?")
    same(engine, engines("llava-llama"), talk)
    whole = engine._prefix._cache.layers
    engine._prefix._cache.layers = Torn(whole)
    shorter = Conversation().ask("what is this?", [one]).answered("a dog").ask("really?")
    with pytest.raises(KeyboardInterrupt):
        engine.answer(shorter, SAMPLING)
    engine._prefix._cache.layers = whole
    assert same(engine, engines("llava-llama"), talk).cached_tokens > 0


def test_answer_that_another_has_overtaken_says_so(engines: Callable[[str], LocalEngine]) -> None:
    engine, talk = engines("llava-llama"), Conversation().ask("what is this?", [picture(60, 60)])
    overtaken = engine.stream(talk, Sampling(max_tokens=40))
    next(overtaken)
    same(engine, engines("llava-llama"), talk)
    with pytest.raises(LlavaError, match="another answer was begun"):
        list(overtaken)
