"""`llava calibrate`, and batches that keep what it promises: the mathematics on made rows, the rest as users run it."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers.command import Run
from helpers.faults import Told
from helpers.peer import say, serving
from helpers.servers import in_thread
from helpers.tables import for_each
from PIL import Image, ImageDraw

from llava_cli import limits
from llava_cli.batch import run as module
from llava_cli.batch.calibration.calibrate import Labelled, calibration_error, fit, fit_temperature, scored
from llava_cli.batch.calibration.calibration import (
    DELTA,
    THRESHOLDS,
    Calibration,
    Level,
    parse_error,
    rows_needed,
    sharpened,
    upper_bound,
)
from llava_cli.batch.judged_engine import MAX_BEHIND, JudgedEngine, Promise
from llava_cli.batch.rows import to_line
from llava_cli.conversation import Conversation, Picture
from llava_cli.engine import Answer, Engine, Request
from llava_cli.engine.local import LocalEngine
from llava_cli.errors import BadData, LlavaError, ModelUnusable, ServerFailed
from llava_cli.images.reader import open_picture
from llava_cli.settings import Sampling, Settings

CHOICES = ("sunny", "cloudy", "rain")
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def softmax(values: list[float]) -> list[float]:
    parts = [math.exp(value - max(values)) for value in values]
    return [part / sum(parts) for part in parts]


def labelled(count: int, spread: float, temperature: float = 1.0, seed: int = 0) -> Labelled:
    """Rows of a model whose probabilities would be true at this temperature, and are as wide apart as `spread`."""
    random, found = Random(seed), Labelled(CHOICES, {"m"})
    for _ in range(count):
        logits = [random.gauss(0, spread) for _ in CHOICES]
        truth, told = softmax(logits), softmax([temperature * logit for logit in logits])
        found.probabilities.append({choice: round(p, 6) for choice, p in zip(CHOICES, told, strict=True)})
        found.labels.append(random.choices(range(len(CHOICES)), truth)[0])
    return found


def row(probabilities: Any, expected: Any = "sunny", number: int = 0, **more: Any) -> Row:
    best = max(probabilities, key=probabilities.get) if isinstance(probabilities, dict) else "sunny"
    return {
        "image": f"{number}.png",
        "question": "the weather?",
        "answer": best,
        "status": "ok",
        "error": None,
        "model": "m",
        "finish_reason": "stop",
        "answer_tokens": 1,
        "sha256": None,
        "probabilities": probabilities,
        **({} if expected is None else {"expected": expected}),
        **more,
    }


def write(rows: list[Row], name: str = "labelled.jsonl") -> Path:
    Path(name).write_bytes(b"".join(map(to_line, rows)))
    return Path(name)


def written(found: Labelled) -> Path:
    pairs = zip(found.probabilities, found.labels, strict=True)
    return write([row(p, CHOICES[label], number) for number, (p, label) in enumerate(pairs)])


# The mathematics.


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_is_the_one_that_made_the_probabilities(temperature: float) -> None:
    """And what it gives are probabilities: where it says 0.8, 80 of 100 are right."""
    found = labelled(4000, 1.5, temperature)
    calibration = fit(found, {})
    assert calibration.temperature == pytest.approx(temperature, rel=0.1)
    other = labelled(4000, 1.5, temperature, seed=1)
    before, after = (calibration_error(*scored(one, other)) for one in (fit_nothing(), calibration))
    assert after < 0.025
    assert temperature == 1 or before > 2 * after


def fit_nothing() -> Calibration:
    return Calibration({}, CHOICES, 1, 1.0, (Level(0, 1, 0),))


def test_the_likelihood_has_its_maximum_at_the_temperature() -> None:
    found = labelled(500, 1.5, 1.7)
    logs = np.log(np.array([list(p.values()) for p in found.probabilities]).clip(5e-7))
    labels = np.array(found.labels)

    def likelihood(temperature: float) -> float:
        scaled = logs / temperature
        return float((scaled[np.arange(len(labels)), labels] - np.logaddexp.reduce(scaled, axis=1)).mean())

    best = fit_temperature(logs, labels)
    assert likelihood(best) >= max(likelihood(best * 0.99), likelihood(best * 1.01))


@for_each(
    "labels, expected",
    [([0, 0, 0], 1.0), ([1, 1, 1], 20.0), ([-1, -1, -1], 1.0), ([], 1.0), ([0, 0, 1], None)],
    ids=["all right", "all wrong", "none among the choices", "no rows", "some right"],
)
def test_temperatures_of_degenerate_rows(labels: list[int], expected: float | None) -> None:
    logs = np.log(np.array([[0.9, 0.1], [1.0, 5e-7], [0.6, 0.4]])[: len(labels)].reshape(-1, 2))
    found = fit_temperature(logs, np.array(labels, dtype=np.int64))
    assert 0.05 <= found <= 20 and (expected is None or found == pytest.approx(expected, rel=1e-3))


@for_each(
    "probabilities",
    [
        {"a": 0.9, "b": 0.1},
        {"a": 1.0, "b": 0.0},
        {"a": 0.5, "b": 0.5},
        {"a": 0.4, "b": 0.3, "c": 0.3},
        {"a": 0.999999, "b": 0.000001, "c": 0.0},
    ],
)
def test_a_temperature_keeps_the_order_and_the_sum(probabilities: dict[str, float]) -> None:
    for temperature in (0.05, 0.5, 1.0, 3.0, 20.0):
        found = sharpened(probabilities, temperature)
        assert list(found) == list(probabilities)
        assert sorted(found.values(), reverse=True) == list(found.values())
        assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    assert sharpened(probabilities, 1.0) == pytest.approx(probabilities, abs=1e-6)


@for_each("wrong, answered", [(0, 1), (0, 300), (3, 10), (7, 1000), (500, 1000), (4999, 5000), (90_000, 100_000)])
def test_the_bound_is_clopper_and_pearsons(wrong: int, answered: int) -> None:
    """The tail of the binomial at the bound, summed term by term, is the wished probability."""
    delta = DELTA / len(THRESHOLDS)
    bound = upper_bound(wrong, answered, delta)
    terms = [
        math.lgamma(answered + 1) - math.lgamma(k + 1) - math.lgamma(answered - k + 1)
        + k * math.log(bound) + (answered - k) * math.log1p(-bound)
        for k in range(wrong + 1)
    ]  # fmt: skip
    assert sum(map(math.exp, terms)) == pytest.approx(delta, rel=1e-6)
    assert upper_bound(wrong + 1, answered, delta) >= bound >= wrong / answered


def test_a_bound_of_nothing_and_of_nothing_right() -> None:
    assert upper_bound(0, 0, 0.05) == upper_bound(5, 5, 0.05) == 1.0


def test_enough_rows_are_just_enough() -> None:
    for error in (0.01, 0.02, 0.05, 0.5):
        needed = rows_needed(error)
        enough, few = (upper_bound(0, count, DELTA / len(THRESHOLDS)) for count in (needed, needed - 1))
        assert enough <= error < few


def test_the_promise_holds_for_other_rows() -> None:
    """Of 20 draws of labelled rows hardly one breaks it."""
    other = labelled(4000, 6, 2.0, seed=999)
    broken = answered = 0
    for seed in range(20):
        calibration = fit(labelled(1500, 6, 2.0, seed=seed), {})
        scores, right = scored(calibration, other)
        try:
            reached = scores >= calibration.threshold(0.05)
        except BadData:
            continue
        answered += reached.mean()
        broken += (~right[reached]).mean() > 0.05
    assert broken <= 1
    assert answered / 20 > 0.5


def test_a_lower_error_answers_no_more() -> None:
    calibration = fit(labelled(3000, 6, 2.0), {})
    thresholds = [calibration.threshold(error) for error in (0.2, 0.1, 0.05, 0.03)]
    assert thresholds == sorted(thresholds)
    for threshold, error in zip(thresholds, (0.2, 0.1, 0.05, 0.03), strict=True):
        (level,) = (one for one in calibration.levels if one.threshold == threshold)
        assert level.wrong / level.answered < calibration.at_most(level) <= error


@for_each(
    "text, expected",
    [
        *(("2%", 0.02), ("0.02", 0.02), ("0.5%", 0.005)),
        *(
            (text, None)
            for text in ("1e-320", "1e-300", "0.0009%", "2", "0", "0%", "100%", "nan", "nan%", "-1%", "two", "", "%")
        ),
    ],
)
def test_errors_as_people_write_them(text: str, expected: float | None) -> None:
    assert parse_error(text) == pytest.approx(expected)


# The command.


def test_a_table_a_file_and_a_plot(run: Run, here: Path) -> None:
    written(labelled(2000, 6, 2.0))
    result = run("calibrate", "labelled.jsonl", "-o", "weather.cal.json", "--plot", "weather.svg")
    assert result.exit_code == 0, result.stderr
    table = [line.split("\t") for line in result.stdout.splitlines()]
    assert table[0][:3] == ["0", "2000", "100.00%"]
    for _, answered, share, wrong, error, most in table:
        assert float(share[:-1]) == pytest.approx(int(answered) / 20, abs=0.01)
        assert float(error[:-1]) == pytest.approx(100 * int(wrong) / int(answered), abs=0.01)
        assert float(most[:-1]) > float(error[:-1])
    assert "2,000 rows · temperature 1." in result.stderr
    assert "llava batch … --choices" in result.stderr
    calibration = Calibration.read(here / "weather.cal.json")
    assert calibration.made_with == {"model": "m"} and set(calibration.choices) == set(CHOICES)
    assert [level.threshold for level in calibration.levels] == list(THRESHOLDS)
    picture = ElementTree.fromstring(Path("weather.svg").read_text())
    assert picture.tag.endswith("svg")
    drawn = [one for one in picture.iter() if one.tag.endswith("circle")]
    assert len(drawn) == sum(level.answered > 0 for level in calibration.levels)


def test_quiet_is_the_table_alone(run: Run) -> None:
    written(labelled(100, 2))
    result = run("calibrate", "-q", "labelled.jsonl")
    assert result.exit_code == 0 and result.stderr == "" and result.stdout
    assert Path("labelled.cal.json").exists()


def test_rows_that_nothing_is_learned_from_are_counted(run: Run) -> None:
    sure, failed = {"sunny": 0.9, "rain": 0.1}, {"answer": None, "status": "error", "error": {"type": "BadImage"}}
    rows = [
        row(sure),
        row(sure, None),
        row(None),
        row(sure, ["SUNNY.", "cloudy"]),
        row(sure, "snow"),
        row(sure) | failed,
    ]
    with write(rows).open("a") as file:
        file.write('{"image": "a batch is running')
    result = run("calibrate", "labelled.jsonl")
    assert result.exit_code == 0, result.stderr
    assert "3 rows · temperature" in result.stderr
    for what in ("without a right answer", "without choices", "failed", "not whole", "counted as wrong"):
        assert f"1 row {what}" in result.stderr
    assert result.stdout.splitlines()[-1].split("\t")[1:4] == ["3", "100.00%", "1"]
    assert "297" not in result.stderr and "for --max-error 5% 117 rows are needed" in result.stderr


def test_of_equals_the_models_own_choice_counts(run: Run) -> None:
    """It is the first of a row, whatever the order of the rows before."""
    write(
        [row({"sunny": 0.9, "rain": 0.1}), row({"rain": 0.5, "sunny": 0.5}, "rain"), row({"rain": 0.5, "sunny": 0.5})]
    )
    table = run("calibrate", "labelled.jsonl").stdout.splitlines()
    assert table[0].split("\t")[1:4] == ["3", "100.00%", "1"]


@for_each(
    "last, reason",
    [
        ({"probabilities": {"sunny": "0.9", "rain": 0.1}}, "'probabilities' are none"),
        ({"probabilities": {"sunny": math.nan, "rain": 0.1}}, "'probabilities' are none"),
        ({"probabilities": {"sunny": 1.5, "rain": -0.5}}, "'probabilities' are none"),
        ({"probabilities": {"sunny": True, "rain": False}}, "'probabilities' are none"),
        ({"probabilities": {"sunny": 0.2, "rain": 0.1}}, "'probabilities' are none"),
        ({"probabilities": {"sunny": 1.0}}, "'probabilities' are none"),
        ({"probabilities": [0.9, 0.1]}, "'probabilities' are none"),
        ({"probabilities": {"sunny": 0.9, "snow": 0.1}}, "has other choices than the rows before"),
        ({"expected": 7}, "'expected' is no text"),
        ({"expected": ["sunny", None]}, "'expected' is no text"),
        ({"threshold": 0.9}, "its probabilities are calibrated already"),
        ({"image": None}, "not a row of llava batch"),
    ],
)
def test_a_strangers_rows(last: Row, reason: str, run: Run) -> None:
    good = row({"sunny": 0.9, "rain": 0.1})
    lines = [json.dumps(good), json.dumps(good | last)]
    Path("labelled.jsonl").write_text("".join(f"{line}\n" for line in lines))
    result = run("calibrate", "labelled.jsonl")
    assert result.exit_code == 65
    assert result.stderr.splitlines()[0] == f"llava: labelled.jsonl, line 2: {reason}"
    assert not Path("labelled.cal.json").exists()


def test_nothing_to_learn_from(run: Run) -> None:
    write([row({"sunny": 0.9, "rain": 0.1}, None)])
    for name, reason in (("labelled.jsonl", "1 without a right answer"), ("empty.jsonl", "it is empty")):
        Path("empty.jsonl").touch()
        result = run("calibrate", name)
        assert result.exit_code == 65
        assert f"no row has probabilities and a right answer ({reason})" in result.stderr
    assert run("calibrate", "none.jsonl").exit_code == 66
    assert run("calibrate", "labelled.jsonl", "-o", "labelled.jsonl").exit_code == 2
    result = run("calibrate", "labelled.jsonl", "--plot", "no/such.svg")
    assert result.exit_code == 73 and "give another file to --plot" in result.stderr
    for source in (".", "/", "", ".."):
        result = run("calibrate", source)
        assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (66, "", 2)
    result = run("calibrate", "labelled.jsonl", "-o", "one.json", "--plot", "./one.json")
    assert result.exit_code == 2 and result.stderr.startswith("llava: --plot: one.json is the calibration")
    assert not Path("one.json").exists()


def test_more_rows_than_fit_in_memory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CALIBRATION_ROWS", 2)
    write([row({"sunny": 0.9, "rain": 0.1})] * 3)
    result = run("calibrate", "labelled.jsonl")
    assert result.exit_code == 65 and "labelled.jsonl, line 3: more than 2 rows" in result.stderr


def test_rows_of_two_models(run: Run) -> None:
    sure = {"sunny": 0.9, "rain": 0.1}
    write([row(sure), row(sure, model="other")])
    result = run("calibrate", "labelled.jsonl")
    assert result.exit_code == 65 and "rows of several models: m, other" in result.stderr


SOUND: Row = {
    "made_with": {"model": "m"},
    "choices": ["sunny", "rain"],
    "rows": 1000,
    "temperature": 1.5,
    "levels": [{"threshold": 0.0, "answered": 1000, "wrong": 30}, {"threshold": 0.9, "answered": 600, "wrong": 0}],
}


def test_a_calibration_belongs_to_its_server(run: Run, here: Path) -> None:
    """Also where a model has the same name elsewhere, and here."""
    written(labelled(20, 2))
    asked = {"model": "m", "server": "http://gpu/v1", "system": None, "choices": list(CHOICES)}
    Path("labelled.jsonl.run").mkdir()
    Path("labelled.jsonl.run/settings.json").write_text(json.dumps(asked))
    assert run("calibrate", "labelled.jsonl").exit_code == 0
    calibration = Calibration.read(here / "labelled.cal.json")
    calibration.check(asked)
    local = {name: value for name, value in asked.items() if name != "server"}
    for other in (local, asked | {"server": "http://other/v1"}):
        with pytest.raises(BadData, match='server was "http://gpu/v1", is'):
            calibration.check(other)
    del asked["server"]
    Path("labelled.jsonl.run/settings.json").write_text(json.dumps(asked))
    assert run("calibrate", "labelled.jsonl").exit_code == 0
    with pytest.raises(BadData, match='server was null, is "http://gpu/v1"'):
        Calibration.read(here / "labelled.cal.json").check(local | {"server": "http://gpu/v1"})


@for_each(
    "damage",
    [
        {"rows": 999},
        {"rows": "1000"},
        {"rows": 10**9},
        {"temperature": 0},
        {"temperature": math.nan},
        {"temperature": True},
        {"choices": ["sunny"]},
        {"choices": [1, 2]},
        {"choices": 7},
        {"levels": []},
        {"levels": [{"threshold": 0.0, "answered": 5, "wrong": 6}]},
        {"levels": [{"threshold": 2.0, "answered": 5, "wrong": 1}]},
        {"levels": [{"threshold": 0.0}]},
        {"levels": 7},
        {"levels": SOUND["levels"] * limits.CALIBRATION_LEVELS},
        {"made_with": []},
        {"made_with": {"root": "/"}},
        {"more": 1},
    ],
)
def test_a_file_that_is_no_calibration(damage: Row) -> None:
    Path("good.json").write_text(json.dumps(SOUND))
    assert Calibration.read(Path("good.json")).threshold(0.01) == 0.9
    Path("bad.json").write_text(json.dumps(SOUND | damage))
    with pytest.raises(BadData, match=r"bad.json: not a calibration"):
        Calibration.read(Path("bad.json"))


# Batches. The engine says of each picture what the picture's name says: `0.7-sunny-3.png` is sunny with 0.7.


class Weather(Told):
    model = "small"

    def answer(self, conversation: Conversation, sampling: Sampling | None = None) -> Answer:
        name = conversation.turns[-1].pictures[0].name
        p, best, *_ = name.removesuffix(".png").split("-")
        assert sampling
        rest = [choice for choice in sampling.choices if choice != best]
        probabilities = {best: float(p), **{choice: (1 - float(p)) / len(rest) for choice in rest}}
        text = best if sampling.at_least is None or float(p) >= sampling.at_least else str(sampling.otherwise)
        return Answer(text, "stop", 5, 0, 1, 0.0, 0.0, probabilities, 0.9)


class Larger(Weather):
    """It says `rain` of everything but of what has `bad` or `gone` in its name."""

    model, where = "large", "http://large/v1"

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.together: threading.Barrier | threading.Event = threading.Barrier(1)

    def answer(self, conversation: Conversation, sampling: Sampling | None = None) -> Answer:
        name = conversation.turns[-1].pictures[0].name
        self.asked.append(name)
        self.together.wait(60)
        if "bad" in name:
            raise ServerFailed("large", "answers with nothing")
        if "gone" in name:
            raise ModelUnusable("large", "the key is wrong")
        return Answer("rain", "stop", 5, 0, 1, 0.0, 0.0, {"rain": 0.9, "sunny": 0.1}, 0.9)


def promise(threshold: float, temperature: float = 1.0) -> Promise:
    return Promise(Calibration({}, ("sunny", "rain"), 1000, temperature, (Level(0.0, 1000, 10),), "cal"), threshold)


def request(name: str, **sampling: Any) -> Request:
    shown = Picture(name, Image.new("RGB", (2, 2)), "")
    return Request(Conversation().ask("?", [shown]), Sampling(**{"choices": ("sunny", "rain"), **sampling}))


def test_calibrated_probabilities_and_what_is_below_the_threshold() -> None:
    engine = JudgedEngine(Weather(), promise(0.6, 2.0))
    names = ("0.9-rain", "0.6-rain", "0.692308-sunny")  # calibrated: 0.75, 0.55, 0.6
    found = [engine.answer(one.conversation, one.sampling) for one in map(request, names)]
    assert [answer.text for answer in found] == ["rain", "unsure", "sunny"]
    assert [answer.details()["probabilities"] for answer in found] == [
        {"rain": 0.75, "sunny": 0.25},
        {"rain": pytest.approx(0.550510), "sunny": pytest.approx(0.449490)},
        {"sunny": 0.6, "rain": 0.4},
    ]
    assert all(answer.details()["threshold"] == 0.6 and answer.answer_probability == 0.9 for answer in found)
    asked = request("0.5-rain", otherwise="who knows", at_least=0.0)
    assert engine.answer(asked.conversation, asked.sampling).text == "who knows"
    many = dict(engine.answer_many(map(request, names)))
    assert [many[number].text for number in range(3)] == ["rain", "unsure", "sunny"]  # type: ignore[union-attr]


def test_a_server_that_tells_no_probabilities() -> None:
    class Silent(Weather):
        def answer(self, conversation: Conversation, sampling: Sampling | None = None) -> Answer:
            return replace(super().answer(conversation, sampling), probabilities=None)

    ((_, outcome),) = JudgedEngine(Silent(), promise(0.5)).answer_many([request("0.9-rain")])
    assert isinstance(outcome, ServerFailed)
    assert str(outcome).endswith("does not tell how probable the choices are")
    assert str(outcome.hint) == "leave --calibration out"
    judge = JudgedEngine(Told(), promise(0.5))
    ((_, outcome),) = judge.answer_many([request("0.9-rain", choices=(), regex="a")])
    assert isinstance(outcome, BadData)  # it was a row's own form that has none


def test_other_choices_than_the_calibrations() -> None:
    asked = request("0.9-rain", choices=("rain", "snow"))
    ((_, outcome),) = JudgedEngine(Weather(), promise(0.5)).answer_many([asked])
    assert isinstance(outcome, BadData) and "other choices" in str(outcome)


def test_a_larger_model_is_asked_about_what_is_open_several_at_a_time() -> None:
    larger = Larger()
    larger.together = threading.Barrier(3)  # which fails unless three are asked at a time
    names = ["0.9-rain", "0.5-sunny-1", "0.5-sunny-bad", "0.95-sunny", "0.5-sunny-3"]
    missing: list[Any] = [LlavaError("b.png", "missing")]
    engine = JudgedEngine(Weather(), promise(0.6), larger, concurrency=3)
    outcomes = dict(engine.answer_many([*map(request, names), *missing]))
    assert sorted(larger.asked) == ["0.5-sunny-1", "0.5-sunny-3", "0.5-sunny-bad"]
    assert [getattr(outcomes[number], "text", "none") for number in range(6)] == [
        *("rain", "rain", "unsure", "sunny", "rain", "none")
    ]
    details = [outcomes[number].details().get("escalated") for number in range(5)]  # type: ignore[union-attr]
    said = {"model": "large", "answer": "rain", "probabilities": {"rain": 0.9, "sunny": 0.1}, "answer_probability": 0.9}
    failed = {"model": "large", "error": {"type": "ServerFailed", "message": "answers with nothing"}}
    assert details == [None, said, failed, None, said]


def test_a_larger_model_that_is_gone_is_not_asked_again() -> None:
    larger = Larger()
    names = ["0.5-sunny-gone", "0.5-rain-1", "0.5-rain-2"]
    outcomes = dict(JudgedEngine(Weather(), promise(0.6), larger).answer_many(map(request, names)))
    assert larger.asked == ["0.5-sunny-gone"]
    assert all(answer.text == "unsure" and "error" in answer.escalated for answer in outcomes.values())  # type: ignore[union-attr]


def test_rows_do_not_pile_up_behind_the_larger_model() -> None:
    """It is waited for before so many requests are drawn that the runner would wait for the answer in turn."""
    larger, order = Larger(), list[int]()
    larger.together = threading.Event()

    def requests() -> Iterator[Request]:
        yield request("0.5-sunny")
        for number in range(1, 2 * MAX_BEHIND):
            if number == MAX_BEHIND + 1:
                larger.together.set()  # type: ignore[union-attr]
            assert number <= MAX_BEHIND + 1 or 0 in order
            yield request(f"0.9-rain-{number}")

    for number, _ in JudgedEngine(Weather(), promise(0.6), larger).answer_many(requests()):
        order.append(number)
    assert sorted(order) == list(range(2 * MAX_BEHIND))


@pytest.fixture
def weather(monkeypatch: pytest.MonkeyPatch) -> Larger:
    """Runs answer with `Weather`; what they escalate to is returned."""
    larger = Larger()

    def opened(settings: Settings, *tell: Any) -> Engine:
        return larger if settings.remote.server == "http://large/v1" else Weather()

    monkeypatch.setattr(module, "open_engine", opened)
    return larger


def pictures(*names: str) -> None:
    """Questions about pictures with these names; `0.7-sunny-3=rain` has `rain` as its right answer."""
    lines = []
    for name in names:
        image, _, answer = name.partition("=")
        Image.new("RGB", (2, 2)).save(f"{image}.png")
        lines.append({"image": f"{image}.png", "question": "the weather?", **({"answer": answer} if answer else {})})
    Path("questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def rows_of(name: str) -> list[Row]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


WEATHER = ("batch", "questions.jsonl", "--choices", "sunny,rain", "-m", "builtin", "-p", "fp32")


@pytest.fixture
def calibrated(run: Run, weather: Larger) -> Path:
    """A calibration of 400 rows of `Weather`: of those with 0.95 none is wrong, of those with 0.6 each fourth."""
    names = [f"0.{'95' if n % 2 else '6'}-sunny-{n}={'rain' if n % 8 == 0 else 'sunny'}" for n in range(400)]
    pictures(*names)
    assert run(*WEATHER, "-o", "labelled.jsonl").exit_code == 0
    result = run("calibrate", "labelled.jsonl", "-o", "cal.json")
    assert result.exit_code == 0, result.stderr
    return Path("cal.json")


PROMISED = (*WEATHER, "--calibration", "cal.json", "--max-error", "5%")


def test_a_run_that_keeps_a_promise(calibrated: Path, run: Run) -> None:
    calibration = Calibration.read(calibrated)
    assert calibration.choices == ("sunny", "rain") and calibration.made_with["model"] == "builtin"
    assert calibration.made_with["checkpoint"] and calibration.made_with["precision"] == "fp32"
    pictures("0.95-rain-a=rain", "0.6-sunny-b=sunny", "0.95-sunny-c=rain", "0.6-rain-d")
    result = run(*PROMISED, "-o", "out.jsonl")
    assert result.exit_code == 0, result.stderr
    assert "1 of 2 right, 50.00%" in result.stderr and "flagged: unsure 2" in result.stderr
    rows = rows_of("out.jsonl")
    assert [(row["answer"], row.get("guess"), row.get("right"), row.get("flags")) for row in rows] == [
        ("rain", None, True, None),
        ("unsure", "sunny", None, ["unsure"]),
        ("sunny", None, False, None),
        ("unsure", "rain", None, ["unsure"]),
    ]
    threshold = calibration.threshold(0.05)
    assert all(row["threshold"] == threshold and row["answer_probability"] == 0.9 for row in rows)
    assert rows[0]["probabilities"] == calibration.calibrated({"rain": 0.95, "sunny": 0.05})
    saved = json.loads(Path("out.jsonl.run/settings.json").read_text())
    assert saved["calibration"] == {"temperature": calibration.temperature, "threshold": threshold}
    assert run(*PROMISED, "-o", "out.jsonl").exit_code == 0  # resumed
    for other in ((*PROMISED[:-1], "30%"), WEATHER):
        result = run(*other, "-o", "out.jsonl")
        assert result.exit_code == 65 and "calibration was" in result.stderr
    result = run("calibrate", "out.jsonl")
    assert result.exit_code == 65 and "line 1: its probabilities are calibrated already" in result.stderr
    assert run(*PROMISED, "--verify", "4").stderr.count("0 differ") == 1
    (word,) = {row["answer"] for row in map(json.loads, run(*PROMISED, "--or", "?").stdout.splitlines())} - {*CHOICES}
    assert word == "?"


@for_each(
    "more, code, words",
    [
        (("--choices", "sunny,snow"), 65, "cal.json: made with the choices sunny,rain"),
        (("-p", "bf16"), 65, 'cal.json: made with another model or other settings: precision was "fp32", is "bf16"'),
        (("--system", "be brief"), 65, 'system was null, is "be brief"'),
        (("--max-error", "0.1%"), 65, "cal.json: 400 labelled rows are too few for --max-error 0.1%"),
        (("--max-error", "2"), 2, "--max-error: '2' is no part of all from 0.001% on: 2% or 0.02"),
        (("--or", "x", "--at-least", "0.5"), 2, "--at-least: --max-error 5% decides that"),
        (("--or", "sunny"), 2, "--or: 'sunny' is one of the choices"),
        (("--escalate-model", "x"), 2, "--escalate-model: there is no --escalate"),
        (("--calibration", "none.json"), 66, "none.json: no such file or directory"),
        (("--calibration", "questions.jsonl"), 65, "questions.jsonl: not a calibration"),
    ],
)
def test_what_does_not_fit(more: tuple[str, ...], code: int, words: str, calibrated: Path, run: Run) -> None:
    """It is one line and a hint."""
    pictures("0.95-rain")
    result = run(*PROMISED, *more)
    assert result.exit_code == code and not result.stdout
    line, hint = result.stderr.splitlines()
    assert words in line and line.startswith("llava: ") and hint.startswith("  ")


@for_each(
    "words, reason",
    [
        (("--max-error", "2%", "--choices", "sunny,rain"), "--max-error: there is no --calibration to tell"),
        (("--calibration", "cal.json"), "--calibration: is about choices, and there are none"),
        (("--escalate", "http://large/v1", "--choices", "sunny,rain"), "--escalate: nothing can stay unsure"),
        (("--escalate", "", "--choices", "a,b", "--or", "c", "--at-least", "1"), "--escalate: the URL is empty"),
        (
            ("--calibration", "cal.json", "--choices", "sunny,rain", "--or", "c", "--at-least", "0.9"),
            "--at-least: is about probabilities as the model has them, and --calibration gives others",
        ),
    ],
)
def test_options_that_need_others(words: tuple[str, ...], reason: str, run: Run) -> None:
    Path("cal.json").write_text(json.dumps(SOUND))
    pictures("0.95-rain")
    result = run("batch", "questions.jsonl", *words)
    assert result.exit_code == 2 and reason in result.stderr


def test_what_nobody_can_promise(calibrated: Path, run: Run) -> None:
    names = [f"0.9-sunny-{n}={'rain' if n % 4 == 0 else 'sunny'}" for n in range(600)]
    Path("labelled.jsonl").unlink()
    pictures(*names)
    assert run(*WEATHER, "-o", "bad.jsonl").exit_code == 0
    assert run("calibrate", "bad.jsonl", "-o", "cal.json").exit_code == 0
    result = run(*PROMISED)
    assert result.exit_code == 65
    assert "cal.json: no threshold is known to keep --max-error 5%" in result.stderr
    possible = result.stderr.partition("  --max-error ")[2].partition(";")[0]
    assert run(*PROMISED[:-1], possible).exit_code == 0
    assert Calibration.read(Path("cal.json")).temperature == pytest.approx(math.log(9) / math.log(3), abs=1e-3)


def test_what_stays_unsure_is_escalated(calibrated: Path, run: Run, weather: Larger) -> None:
    pictures("0.95-sunny-a", "0.6-sunny-b=rain", "0.6-sunny-bad=rain", "0.95-rain-d", "0.6-rain-e=sunny")
    words = (*PROMISED, "--escalate", "http://large/v1", "-o", "out.jsonl")
    result = run(*words)
    assert result.exit_code == 1  # one could not be asked
    assert "3 escalated, of which failed: ServerFailed 1 · flagged: unsure 1" in result.stderr
    rows = rows_of("out.jsonl")
    assert [row["image"] for row in rows] == [f"{name}.png" for name in
        ("0.95-sunny-a", "0.6-sunny-b", "0.6-sunny-bad", "0.95-rain-d", "0.6-rain-e")]  # fmt: skip
    assert [row["answer"] for row in rows] == ["sunny", "rain", "unsure", "rain", "rain"]
    assert [row.get("right") for row in rows] == [None, True, None, None, False]
    assert [row.get("escalated", {}).get("answer") for row in rows] == [None, "rain", None, None, "rain"]
    assert rows[2]["escalated"]["error"] == {"type": "ServerFailed", "message": "answers with nothing"}
    assert rows[2]["guess"] == "sunny" and {row["model"] for row in rows} == {"small"}
    assert sorted(weather.asked) == ["0.6-rain-e.png", "0.6-sunny-b.png", "0.6-sunny-bad.png"]
    assert run(*words).exit_code == 1 and len(weather.asked) == 3  # nothing left to do
    assert run(*words, "--retry-errors").exit_code == 1
    assert weather.asked[3:] == ["0.6-sunny-bad.png"] and rows_of("out.jsonl") == rows
    saved = json.loads(Path("out.jsonl.run/settings.json").read_text())
    assert saved["escalate"] == "large at http://large/v1"


def test_what_at_least_leaves_open_is_escalated(run: Run, weather: Larger) -> None:
    pictures("0.95-sunny-a", "0.6-sunny-b")
    words = ("--or", "who knows", "--at-least", "0.8")
    assert [row["answer"] for row in map(json.loads, run(*WEATHER, *words).stdout.splitlines())] == [
        "sunny",
        "who knows",
    ]
    result = run(*WEATHER, *words, "--escalate", "http://large/v1")
    assert [json.loads(line)["answer"] for line in result.stdout.splitlines()] == ["sunny", "rain"]
    assert weather.asked == ["0.6-sunny-b.png"]


def test_escalation_to_llava_serve(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engines: Callable[[str], LocalEngine]
) -> None:
    """Over HTTP, with probabilities; whatever `--or` says, it chooses."""
    real = module.open_engine
    monkeypatch.setattr(module, "open_engine", lambda s, *tell: real(s, *tell) if s.remote.server else Weather())
    pictures("0.99-sunny-a", *(f"0.6-sunny-{number}" for number in range(6)), "0.99-rain-b")
    Path("cal.json").write_text(json.dumps(SOUND | {"made_with": {"model": "builtin"}}))
    larger = engines("llava-llama")
    with in_thread(larger, tmp_path) as server:
        url = f"http://127.0.0.1:{server.port}"
        words = (*WEATHER, "--calibration", "cal.json", "--max-error", "1%", "--or", "who knows", "--escalate", url)
        result = run(*words, "-o", "out.jsonl")
        assert result.exit_code == 0, result.stderr
        assert server.metric("llava_requests_total") == 6
    first, *asked, last = rows_of("out.jsonl")
    assert "escalated" not in {**first, **last} and "6 escalated" in result.stderr
    for row in asked:
        question = Conversation().ask(row["question"], [open_picture(row["image"])])
        alone = larger.answer(question, Sampling(choices=("sunny", "rain"), max_tokens=512))
        assert row["answer"] == row["escalated"]["answer"] == alone.text
        assert row["escalated"]["probabilities"] == pytest.approx(alone.probabilities, abs=1e-5)
        assert row["escalated"]["model"] == larger.model and row["probabilities"]["sunny"] < row["threshold"]


def test_no_larger_model_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said in this option's words, before a model is loaded."""
    Path("cal.json").write_text(json.dumps(SOUND))
    pictures("0.95-rain")
    with serving() as peer:
        peer.models = say(200, {"data": [{"id": "one"}, {"id": "two"}]})
        result = run(*PROMISED, "--escalate", peer.url)
        assert result.exit_code == 69
        assert "several models" in result.stderr and "--escalate-model NAME asks for one of one, two" in result.stderr
        peer.models = say(401, {})
        monkeypatch.setenv("LLAVA_API_KEY", "secret")
        result = run(*PROMISED, "--escalate", peer.url)
        assert result.exit_code == 69 and "LLAVA_ESCALATE_KEY=…" in result.stderr
        assert not any("Authorization" in headers for headers in peer.headers)  # which is another server's


def test_the_built_in_model_is_calibrated_and_keeps_its_promise(run: Run, here: Path) -> None:
    colors, shapes = ("red", "green", "blue", "yellow", "black"), ("circle", "rectangle")
    lines = []
    for color in colors:
        for shape in shapes:
            image = Image.new("RGB", (96, 96), "white")
            pen = ImageDraw.Draw(image)
            (pen.ellipse if shape == "circle" else pen.rectangle)((20, 24, 70, 74), fill=color)
            image.save(name := f"{color}-{shape}.png")
            asked = {f"is there a {other} shape?": other == color for other in colors}
            asked |= {f"is there a {other}?": other == shape for other in shapes}
            asked |= {f"is there a {other} {shape}?": other == color for other in colors}
            lines += [{"image": name, "question": q, "answer": "yes" if is_so else "no"} for q, is_so in asked.items()]
    Path("questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("batch", "questions.jsonl", "-m", "builtin", "-p", "fp32", "-q")
    chosen = ("--choices", "yes,no", "-o", "labelled.jsonl")
    assert run(*words, *chosen).exit_code == 0
    rows = rows_of("labelled.jsonl")
    assert len(rows) == 120 and all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5) for row in rows)
    result = run("calibrate", "labelled.jsonl", "-o", "cal.json")
    assert result.exit_code == 0, result.stderr
    right = sum(row["right"] for row in rows)
    assert right >= 117  # a free answer is hardly ever wrong about so much
    assert result.stdout.splitlines()[0].split("\t")[1:4] == ["120", "100.00%", str(120 - right)]
    calibration = Calibration.read(here / "cal.json")
    error = f"{math.ceil(1000 * min(map(calibration.at_most, calibration.levels))) / 10}%"
    promised = ("--choices", "yes,no", "--calibration", "cal.json", "--max-error", error, "-o", "out.jsonl")
    assert run(*words, *promised).exit_code == 0
    threshold = calibration.threshold(parse_error(error) or 0)
    for row, before in zip(rows_of("out.jsonl"), rows, strict=True):
        assert row["probabilities"] == calibration.calibrated(before["probabilities"])
        assert row["threshold"] == threshold
        is_sure = max(row["probabilities"].values()) >= threshold
        assert row["answer"] == (before["answer"] if is_sure else "unsure")
