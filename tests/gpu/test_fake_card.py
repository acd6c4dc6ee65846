"""The engine on a device that minds which tensors are on it, and counts what the host waits for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from helpers import fake_card
from helpers.engines import CONVERSATIONS, ours, requests
from helpers.families import FAMILIES
from helpers.static_steps import Recorder, stepping
from torch.utils import backend_registration

from llava_cli import Sampling
from llava_cli.engine.base import Answer, Request
from llava_cli.engine.generate.scheduler import Scheduler
from llava_cli.engine.gpu import decode_graphs
from llava_cli.engine.local import LocalEngine

Engines = Callable[[str], LocalEngine]
if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch has no backends in Python", allow_module_level=True)


def answers(engine: LocalEngine, asked: list[Request], size: int) -> list[str]:
    """As `answer_many` gives them, in one thread."""
    scheduler = Scheduler(engine.network, size)
    for number, request in enumerate(asked):
        scheduler.add(engine.prepare(number, request))
    found: dict[int, str] = {}
    while scheduler.running or scheduler.waiting:
        for number, answer in scheduler.step():
            assert isinstance(answer, Answer)
            found[number] = answer.text
    return [found[number] for number in sorted(found)]


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_where_it_is_needed(family: str, engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, rows that join and leave, steps that are captured and replayed: the tokens are those of a CPU."""
    monkeypatch.setattr(decode_graphs, "CAPTURE_AFTER", 2)
    engine, capture = engines(family), Recorder()
    asked = [
        Request(request.conversation, Sampling(max_tokens=3 + number % 5))
        for number, request in enumerate(requests()[:6])
    ]
    with engine.patch.undone():
        alone, together = ours(engine, CONVERSATIONS["two"], Sampling(), 8), answers(engine, asked, 3)
    with stepping(engine, capture) as graphs, fake_card.on_card(engine.network):
        assert ours(engine, CONVERSATIONS["two"], Sampling(), 8) == alone
        assert answers(engine, asked, 3) == together
        assert capture.replayed > 0
        assert graphs.problem is None


TRANSFORMERS_OWN = {
    "llava-llama": {"item": 2},
    "llava-next-mistral": {"item": 2, "tolist": 3},
    "llava-onevision": {"item": 4, "tolist": 3},
    "pixtral": {"item": 4, "tolist": 1},
    "smolvlm": {"item": 2, "index": 2, "tolist": 1},
}
"""Waits within its models for a prompt with one picture: its sizes, whether there are as many features as image tokens,
and how many there are, for the words of an error that is not raised."""
POSITION, LOOK = {"item": 1}, {"tolist": 1}
"""Ours: for a prompt's last position, and for a step's tokens."""


@pytest.mark.parametrize("family", TRANSFORMERS_OWN)
def test_what_the_host_waits_for(family: str, engines: Engines) -> None:
    engine = engines(family)
    with stepping(engine), fake_card.on_card(engine.network):
        scheduler = Scheduler(engine.network, 1)
        scheduler.add(engine.prepare(0, Request(CONVERSATIONS["one"], Sampling(max_tokens=9))))
        fake_card.waits.clear()
        scheduler.step()
        assert fake_card.waits == Counter(TRANSFORMERS_OWN[family]) + Counter(POSITION) + Counter(LOOK)
        for _ in range(3):
            fake_card.waits.clear()
            scheduler.step()
            assert fake_card.waits == LOOK


@pytest.mark.parametrize("is_sampled", [False, True])
@pytest.mark.parametrize("is_static", [True, False])
def test_a_step_of_padded_rows_waits_for_its_tokens_alone(
    is_static: bool, is_sampled: bool, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain path once more, in transformers, which looks for padding."""
    engine = engines("llava-llama")
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda *device: generator())  # the card has none
    sampling = Sampling(max_tokens=9, temperature=float(is_sampled), seed=1)
    with stepping(engine) as graphs, fake_card.on_card(engine.network):
        graphs._is_unsupported = not is_static
        scheduler = Scheduler(engine.network, 3)
        for number, request in enumerate(requests(sampling)[:3]):
            scheduler.add(engine.prepare(number, request))
        for step in range(4):
            fake_card.waits.clear()
            scheduler.step()
            if step:
                assert fake_card.waits == (LOOK if is_static else {**LOOK, "item": 1})


def test_it_minds_devices_and_counts_waits(engines: Engines) -> None:
    with fake_card.on_card(torch.nn.Linear(1, 1)):
        x = torch.arange(3, device=fake_card.NAME)
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
        fake_card.waits.clear()
        assert (x + 1)[1:].tolist() == [2, 3]
        assert (x.sum() + torch.tensor(1)).item() == 4
        assert x[x > 0].shape == (2,)
        assert x.cpu().device.type == "cpu"
        assert fake_card.waits == {"tolist": 1, "item": 1, "index": 1, "to": 1}
