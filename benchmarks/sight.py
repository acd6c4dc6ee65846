"""What sight and confidence tell of the built-in model's answers: `python benchmarks/sight.py`.

Questions are about drawings by the model's own generator with seeds that training never used: of up to five shapes,
which is what it is for, of six to nine, and of numbers; and easy-VQA's test half. Two questions are asked of a score:

- Does it tell wrong answers from right ones? The area under the ROC curve (AUC) is the probability that a right answer
  has the higher score of the two, 0.5 by chance. Besides the sight that the package tells, in nats, there are other
  measures of the same two log-probabilities, confidence alone, and pictures that are not mid-gray.
- Does it tell answers that were made without looking? These are what the model says about the gray picture, as an
  answer about the real one; and those that need no picture, to questions about no drawing at all.

An answer is right when it is the expected one to the letter.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from llava_cli import Answer, Conversation, Sampling, load
from llava_cli.conversation import Picture
from llava_cli.engine import Request
from llava_cli.engine.base import BLIND
from llava_cli.engine.generate.batch import Batch
from llava_cli.engine.generate.detokenizer import Detokenizer
from llava_cli.engine.generate.sequence import Replay, Sequence
from llava_cli.engine.local import LocalEngine
from llava_cli.engine.sight import GRAY

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "builtin"))
import questions
import samples
from batches import easy_vqa
from scenes import COLORS

KINDS = [kind for kind in questions.KINDS if kind != "number"]
SETS: dict[str, dict[str, Any]] = {
    "up to five shapes": {"kinds": KINDS, "most": 5, "crowded": 0, "numbers": 0},
    "six to nine shapes": {"kinds": KINDS, "least": 6, "most": 9, "crowded": 0, "numbers": 0},
    "numbers": {"kinds": ["number"], "numbers": 1},
}
OFF_TOPIC = ["what is the capital of france?", "tell me a joke.", "is the man happy?", "what year is it?"]
ROWS = 64
"""Questions at a time."""
MID_GRAY = "mid-gray"
"""What the package shows."""


class Asked(NamedTuple):
    image: Image.Image
    question: str
    answer: str


def drawings(name: str, count: int, scene: dict[str, Any]) -> Iterator[Asked]:
    """`scene` are options of the generator, and the kinds of questions."""
    scene = dict(scene)
    kinds, number = scene.pop("kinds"), 0
    while count:
        number += 1
        rng = Random(f"sight/{name}/{number}")
        drawn = samples.drawing(rng, 0, **scene)
        if drawn.scene and (found := questions.question(drawn.scene, rng.choice(kinds), rng)):
            count -= 1
            yield Asked(drawn.image, *found)


def from_easy_vqa(count: int) -> Iterator[Asked]:
    every = [(path, question, answer) for path, turns in easy_vqa("test") for _, question, answer in turns]
    for path, question, answer in Random(0).sample(every, min(count, len(every))):
        yield Asked(Image.open(path).convert("RGB"), question, answer)


def others(size: tuple[int, int], rng: Random) -> dict[str, Image.Image]:
    """What is shown in a picture's place."""
    width, height = size
    noise = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    colors = {MID_GRAY: GRAY, "CLIP's mean color": (122, 116, 104), "black": (0, 0, 0), "white": (255, 255, 255)}
    return {**{name: Image.new("RGB", size, color) for name, color in colors.items()}, "noise": Image.fromarray(noise)}


@dataclass
class Scored:
    """An answer, and the log-probabilities of its tokens about the picture and about each of the `others`."""

    is_right: bool
    seen: np.ndarray
    unseen: dict[str, np.ndarray]

    def total(self, other: str = MID_GRAY) -> float:
        """The sight that the package tells."""
        return float(self.seen.sum() - self.unseen[other].sum())


MEASURES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "the log-probability falls by, nats": lambda seen, unseen: seen.sum() - unseen.sum(),
    "a token": lambda seen, unseen: seen.mean() - unseen.mean(),
    "of the first token": lambda seen, unseen: seen[0] - unseen[0],
    "of the token where it falls least": lambda seen, unseen: (seen - unseen).min(),
    "the probability falls by": lambda seen, unseen: math.exp(seen.sum()) - math.exp(unseen.sum()),
    "the mean probability of a token falls by": lambda seen, unseen: math.exp(seen.mean()) - math.exp(unseen.mean()),
    "share of the surprise that the picture takes away": lambda seen, unseen: 1 - seen.sum() / min(unseen.sum(), -1e-9),
}


class Scorer:
    """Asks the model, and how probable it finds the tokens of its answers about other pictures."""

    def __init__(self, engine: LocalEngine) -> None:
        self.engine = engine

    def __call__(self, asked: list[Asked], seed: int = 0) -> list[Scored]:
        scored: list[Scored] = []
        for begin in range(0, len(asked), ROWS):
            some = asked[begin : begin + ROWS]
            answered = self.answers(some)
            shown = [others(one.image.size, Random(f"{seed}/{begin + i}")) for i, one in enumerate(some)]
            unseen = {name: self.about(answered, some, [images[name] for images in shown]) for name in shown[0]}
            for number, (one, sequence) in enumerate(zip(some, answered, strict=True)):
                seen = np.array(sequence.log_probabilities())
                of_others = {name: rows[number] for name, rows in unseen.items()}
                scored.append(Scored(sequence.finish().text == one.answer, seen, of_others))
        return scored

    def answers(self, asked: list[Asked]) -> list[Sequence]:
        requests = [Request(talk(one.image, one.question), Sampling(confidence=True)) for one in asked]
        return self._run([self.engine.prepare(number, request) for number, request in enumerate(requests)])

    def about(self, answered: list[Sequence], asked: list[Asked], images: list[Image.Image]) -> list[np.ndarray]:
        """The log-probabilities of the answers' tokens about other pictures."""
        replays: list[Sequence] = []
        for sequence, one, image in zip(answered, asked, images, strict=True):
            inputs = self.engine.inputs(talk(image, one.question))
            replays.append(replay := Replay(0, inputs, Detokenizer(self.engine.prompter.tokenizer)))
            replay.images = (f"{id(image)}",)
            replay.follow(sequence, sequence.finish())
        return [np.array(replay.log_probabilities()) for replay in self._run(replays)]

    def _run(self, sequences: list[Sequence]) -> list[Sequence]:
        batch = Batch(self.engine.network)
        batch.join(sequences)
        while batch.sequences:
            batch.step()
        return sequences


def talk(image: Image.Image, question: str) -> Conversation:
    return Conversation().ask(question, [Picture("", image, sha256="")])


def area(scores: list[float], is_higher: list[bool]) -> float:
    """Under the ROC curve: the probability that one of the higher class has the higher score; ties count half."""
    high = np.array([score for score, higher in zip(scores, is_higher, strict=True) if higher])
    low = np.array([score for score, higher in zip(scores, is_higher, strict=True) if not higher])
    wins = (high[:, None] > low).sum() + (high[:, None] == low).sum() / 2
    return float(wins / (len(high) * len(low))) if len(high) and len(low) else math.nan


def shown(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:.2f}"


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def print_areas(found: dict[str, list[Scored]]) -> None:
    columns = {**found, "all drawings": [one for name in SETS for one in found[name]]}
    row("AUC of wrong against right answers", *(f"{name}" for name in columns))
    row(*["---"] * (len(columns) + 1))
    row("wrong answers", *(f"{sum(not one.is_right for one in rows)} of {len(rows)}" for rows in columns.values()))

    def areas(label: str, score: Callable[[Scored], float]) -> None:
        cells = (area([score(one) for one in rows], [one.is_right for one in rows]) for rows in columns.values())
        row(label, *map(shown, cells))

    areas("confidence, mean", lambda one: float(one.seen.mean()))
    areas("confidence, lowest", lambda one: float(one.seen.min()))
    for label, measure in MEASURES.items():
        areas(f"sight: {label}", lambda one, measure=measure: measure(one.seen, one.unseen[MID_GRAY]))  # type: ignore[misc]
    for other in others((1, 1), Random(0)):
        if other != MID_GRAY:
            areas(f"sight in nats, with {other}", lambda one, other=other: one.total(other))  # type: ignore[misc]


def print_blind(scorer: Scorer, asked: list[Asked], scored: list[Scored]) -> None:
    """Of answers to the gray picture as answers about the real one, and of answers that need no picture."""
    guesses: list[float] = []
    for begin in range(0, len(asked), ROWS):
        some = asked[begin : begin + ROWS]
        gray = [Asked(Image.new("RGB", one.image.size, GRAY), one.question, one.answer) for one in some]
        said = scorer.answers(gray)
        about_real = scorer.about(said, some, [one.image for one in some])
        guesses += [
            float(real.sum()) - sum(guess.log_probabilities()) for real, guess in zip(about_real, said, strict=True)
        ]
    seen = [one.total() for one in scored]
    needless = [Asked(one.image, question, "") for one in asked[:25] for question in OFF_TOPIC]
    declined = [one.total() for one in scorer(needless)]
    is_seen = [True] * len(seen) + [False] * len(guesses)
    print(f"\nAUC of answers about the picture against those to a gray one: {area(seen + guesses, is_seen):.3f}")
    for label, sights in (
        ("right answers about the picture", [s for s, one in zip(seen, scored, strict=True) if one.is_right]),
        ("wrong answers about the picture", [s for s, one in zip(seen, scored, strict=True) if not one.is_right]),
        ("answers to a gray picture", guesses),
        ("questions that need no picture", declined),
    ):
        blind = sum(sight < BLIND for sight in sights)
        tenth, half, most = np.quantile(sights, [0.1, 0.5, 1])
        print(
            f"{label}: {blind} of {len(sights)} blind; a tenth is below {tenth:.4f} nats, half below {half:.4f}, "
            f"all below {most:.4f}"
        )


def print_choices(engine: LocalEngine, count: int) -> None:
    """Of answers from a list about six to nine shapes: sight is how far the distribution of the choices moves."""
    listed = {"yes/no": ("yes", "no"), "color of": tuple(COLORS)}
    scene = SETS["six to nine shapes"]
    print()
    row("AUC of wrong against right choices", "wrong", "probability", "sight")
    row("---", "---", "---", "---")
    for kind, choices in listed.items():
        asked = list(drawings("six to nine shapes", count, {**scene, "kinds": [kind]}))
        sampling = Sampling(choices=choices, sight=True)
        answers = dict(engine.answer_many(Request(talk(one.image, one.question), sampling) for one in asked))
        found = [answer for _, answer in sorted(answers.items()) if isinstance(answer, Answer)]
        right = [answer.text == one.answer for answer, one in zip(found, asked, strict=True)]
        scores = (
            [max((answer.probabilities or {"": 0.0}).values()) for answer in found],
            [a.sight or 0.0 for a in found],
        )
        row(kind, f"{right.count(False)} of {len(right)}", *(shown(area(score, right)) for score in scores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--each", type=int, default=600, help="questions of each set")
    args = parser.parse_args()
    scorer = Scorer(load(args.model, precision=args.precision))
    asked = {name: list(drawings(name, args.each, scene)) for name, scene in SETS.items()} | {
        "easy-VQA": list(from_easy_vqa(args.each))
    }
    found = {name: scorer(some) for name, some in asked.items()}
    print_areas(found)
    some = next(iter(SETS))
    print_blind(scorer, asked[some], found[some])
    print_choices(scorer.engine, args.each)


if __name__ == "__main__":
    main()
