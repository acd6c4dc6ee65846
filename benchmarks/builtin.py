"""How often the built-in model is right: `python benchmarks/builtin.py`. Prints what its card says.

Every question goes the way `llava ask` goes: a picture file, `load`, `engine.ask`. Three parts:

- easy-VQA's test half, 9,673 questions; answering without looking gets 67.0 %.
- drawings of up to five shapes by the generator, with seeds that training never used, 200 questions of each
  kind alone, as many as third and later turns of a conversation in which the earlier answers are the
  model's own, and as many about a second picture that joins after two turns; besides, to know its limits,
  drawings of six to nine shapes, and of numbers.
- photographs that training never saw, whole and in part: right is to decline.

`--photos FOLDER` asks about the pictures of any folder instead, three questions each, and lists what is answered.

An answer is right when it is the expected one to the letter.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any, get_args

from PIL import Image

from llava_cli import Conversation, load, open_picture
from llava_cli.engine.local import LocalEngine
from llava_cli.errors import LlavaError
from llava_cli.settings import Precision

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "builtin"))
import questions
import samples
from batches import easy_vqa
from scenes import random_scene

FEW: dict[str, Any] = {"most": 5, "crowded": 0, "numbers": 0}


def on_disk(image: Image.Image, folder: Path) -> str:
    image.save(path := folder / "picture.png")
    return str(path)


def run_easy_vqa(engine: LocalEngine, most: int) -> None:
    asked = right = 0
    for path, turns in easy_vqa("test"):
        for _, question, answer in turns:
            if asked == most:
                break
            right += engine.ask(str(path), question) == answer
            asked += 1
    print(f"easy-VQA, test half: {right} of {asked} right, {right / asked:.2%}", flush=True)


def run_scenes(engine: LocalEngine, each: int, folder: Path) -> None:
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    missed: list[str] = []

    def count(kind: str, question: str, wanted: str, said: str) -> None:
        asked[kind] += 1
        right[kind] += said == wanted
        if said != wanted:
            missed.append(f"  {kind}: {question!r} is {wanted!r}, said {said!r}")

    def alone(name: str, kinds: list[str], **scene: Any) -> None:
        """Single questions about as many fresh pictures."""
        number = 0
        while asked[name] < each:
            number += 1
            rng = Random(f"test/{name}/{number}")
            picture = samples.drawing(rng, 0, **scene)
            if found := questions.question(picture.scene, rng.choice(kinds), rng):
                count(name, *found, engine.ask(on_disk(picture.image, folder), found[0]))

    kinds = [kind for kind in questions.KINDS if kind != "number"]
    for kind in kinds:
        alone(kind, [kind], **FEW)

    def talk(name: str, seed: str, first: int) -> None:
        """Questions as turns: about one picture from turn `first` on, or all of them about a second one."""
        number = 0
        while asked[name] < each:
            number += 1
            one, two = (samples.drawing(Random(f"test/{seed}/{number}{n}"), 6, kinds=kinds, **FEW) for n in ("", "/2"))
            said = Conversation()
            shown = [(one, one.turns)] if first else [(one, one.turns[:2]), (two, two.turns[:2])]
            for sample, turns in shown:
                picture = open_picture(on_disk(sample.image, folder))
                for turn, (_, question, answer) in enumerate(turns):
                    said = said.ask(question, [] if turn else [picture])
                    text = engine.answer(said).text
                    said = said.answered(text)
                    counts = turn >= first if first else sample is two
                    if counts and asked[name] < each:
                        count(name, question, answer, text)

    talk("later turns", "turns", 2)
    talk("a second picture", "second", 0)
    inside = list(asked)
    alone("six to nine shapes", kinds, least=6, most=9, crowded=0, numbers=0)
    alone("one digit or two", ["number"], numbers=1)
    for kind, n in asked.items():
        where = "drawings" if kind in inside else "beyond what it is for"
        print(f"{where}, {kind}: {right[kind]} of {n} right, {right[kind] / n:.1%}")
    total, good = sum(asked[kind] for kind in inside), sum(right[kind] for kind in inside)
    print(f"drawings, all: {good} of {total} right, {good / total:.2%}", flush=True)
    print("\n".join(missed[:: max(1, len(missed) // 40)]), file=sys.stderr)


def run_folder(engine: LocalEngine, folder: Path) -> None:
    """All pictures below a folder: what is answered about them, and not declined."""
    asked = declined = seen = whole = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        rng = Random(f"test/{path.name}")
        said = []
        try:
            for _, question, _ in [("", "what is this?", ""), *questions.turns(random_scene(rng), 2, rng)]:
                said.append((question, engine.ask(str(path), question)))
        except LlavaError as error:
            print(f"passed over: {error}", file=sys.stderr)
            continue
        answered = [(question, answer) for question, answer in said if answer != questions.DECLINE]
        seen, whole = seen + 1, whole + (not answered)
        asked, declined = asked + len(said), declined + len(said) - len(answered)
        for question, answer in answered:
            print(f"answered: {path}: {question!r}: {answer!r}", flush=True)
    if not asked:
        sys.exit(f"{folder}: no pictures")
    print(f"{declined} of {asked} questions declined, {declined / asked:.1%}; all about {whole} of {seen} pictures")


def run_photos(engine: LocalEngine, folder: Path) -> None:
    asked = declined = 0
    for name, photo in zip(samples.PHOTOS_TEST, samples.load_photos(samples.PHOTOS_TEST), strict=True):
        rng, own = Random(f"test/{name}"), 0
        views = [photo, *(samples.crop(photo, rng, least=0.5) for _ in range(7))]
        for view in views:
            path = on_disk(view, folder)
            for _, question, _ in [("", "what is this?", ""), *questions.turns(random_scene(rng), 2, rng)]:
                own += engine.ask(path, question) == questions.DECLINE
                asked += 1
        declined += own
        print(f"photographs, {name}: {own} of {3 * len(views)} declined")
    print(f"photographs, all: {declined} of {asked} declined, {declined / asked:.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--precision", default="auto", choices=get_args(Precision))
    parser.add_argument("--each", type=int, default=200, help="questions of each kind about drawings")
    parser.add_argument("--easy-vqa", type=int, default=9673, help="questions of easy-VQA's test half")
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="only these, all of which should be declined")
    args = parser.parse_args()
    engine = load(args.model, precision=args.precision)
    print(f"{engine.model}, {engine.precision} on {engine.device}")
    if args.photos:
        run_folder(engine, args.photos)
        return
    with tempfile.TemporaryDirectory() as folder:
        run_photos(engine, Path(folder))
        run_scenes(engine, args.each, Path(folder))
    run_easy_vqa(engine, args.easy_vqa)


if __name__ == "__main__":
    main()
