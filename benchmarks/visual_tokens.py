"""What fewer visual tokens cost and save: `python benchmarks/visual_tokens.py`. Writes `visual_tokens.svg` beside it.

- How often the built-in model is right with 64, 32, 16 and 8 of a picture's 64 tokens: the most diverse ones
  (`--visual-tokens`), and as many drawn at random. About easy-VQA's test half, 9,673 questions about one shape each,
  which the plot shows, and about drawings of up to five shapes by the generator, 200 questions of each kind.
- How long a prompt waits for its first token with 576, 192, 128 and 64 of a picture's 576: random weights with
  LLaVA-1.5's geometry, the decoder scaled to 1B, 4-bit. In turns, median of `--runs`, ratios turn by turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from geometry import loaded
from PIL import Image

from llava_cli import Conversation, Sampling, load, open_picture
from llava_cli.conversation import Picture
from llava_cli.engine import Answer, Request, visual_tokens
from llava_cli.engine.local import LocalEngine
from llava_cli.prompts.prompter import Prompter

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "builtin"))
import questions
import samples
from batches import easy_vqa

Choose = Callable[[torch.Tensor, int], torch.Tensor]
COUNTS, ALL = (8, 16, 32, 64), 64
TIMED = (576, 192, 128, 64)
PARTS = ("easy-vqa", "drawings", "speed")
QUESTION = "what is in this picture?"
BLIND = 67.0
"""Per cent of easy-VQA's test half that are right without looking."""


def at_random(seed: int) -> Choose:
    """A stand-in for `most_diverse`. Which picture gets which tokens depends on the order in which they are read."""
    random = torch.Generator().manual_seed(seed)

    def choose(features: torch.Tensor, count: int) -> torch.Tensor:
        order = torch.rand(features.shape[:2], generator=random).argsort(1)
        return order[:, :count].sort(dim=1).values

    return choose


Asked = list[tuple[Picture, str, str]]
"""A picture, a question about it, and the right answer."""


def easy() -> Asked:
    asked = []
    for path, turns in easy_vqa("test"):
        shown = open_picture(str(path))
        asked += [(shown, question, answer) for _, question, answer in turns]
    return asked


def drawings(each: int = 200) -> Asked:
    """The questions of `benchmarks/builtin.py` that are asked alone."""
    asked: Asked = []
    for kind in [kind for kind in questions.KINDS if kind != "number"]:
        number, until = 0, len(asked) + each
        while len(asked) < until:
            number += 1
            rng = Random(f"test/{kind}/{number}")
            drawn = samples.drawing(rng, 0, most=5, crowded=0, numbers=0)
            if found := questions.question(drawn.scene, kind, rng):
                asked.append((Picture(kind, drawn.image.convert("RGB"), sha256=""), *found))
    return asked


def accuracy(asked: Asked, count: int, choose: Choose) -> float:
    """Per cent of the answers that are right to the letter."""
    engine = load("builtin", visual_tokens=count)
    visual_tokens.most_diverse, before = choose, visual_tokens.most_diverse
    begin = time.perf_counter()
    try:
        requests = (
            Request(Conversation().ask(question, [shown]), Sampling(max_tokens=32)) for shown, question, _ in asked
        )
        right = sum(
            isinstance(answer, Answer) and answer.text == asked[number][2]
            for number, answer in engine.answer_many(requests)
        )
    finally:
        visual_tokens.most_diverse = before
    share = 100 * right / len(asked)
    print(f"  {count} tokens: {right} right, {share:.2f} %, {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    return share


def run_accuracy(name: str, asked: Asked, seed: int) -> dict[str, list[float]]:
    """Prints a line for each number of tokens -> per cent right, by the way they are chosen, in the order of COUNTS."""
    whole = accuracy(asked, ALL, visual_tokens.most_diverse)  # all of them: nothing is chosen
    found = {"diversity": visual_tokens.most_diverse, "random": at_random(seed)}
    shares = {
        way: [accuracy(asked, count, choose) if count < ALL else whole for count in COUNTS]
        for way, choose in found.items()
    }
    print(f"built-in model, {name}, {len(asked)} questions, right:")
    print("  tokens a picture   by diversity   at random")
    for count, *row in sorted(zip(COUNTS, *shares.values(), strict=True), reverse=True):
        print(f"  {count:16d}   {row[0]:10.2f} %   {row[1]:7.2f} %", flush=True)
    return shares


def run_speed(runs: int) -> None:
    one = loaded("1B", "4bit")
    network, noise = one.network, torch.randint(0, 256, (480, 640, 3), dtype=torch.uint8)
    talk = Conversation().ask(QUESTION, [Picture("noise", Image.fromarray(noise.numpy()), sha256="")])
    whole = network.base_model.get_image_features
    tokens = {}

    def wait(count: int) -> float:
        """Seconds to the first token, of an engine that has read nothing yet."""
        network.base_model.get_image_features = whole
        visual_tokens.choose_tokens(network, count)
        prompter = Prompter(one.prompter.processor, visual_tokens=count)
        answer = LocalEngine("1B", network, prompter, "4bit", 0).answer(talk, Sampling(max_tokens=1))
        tokens[count] = answer.prompt_tokens
        return answer.first_token_seconds

    for count in TIMED:
        wait(count)  # the first pass is slow
    seconds = [{count: wait(count) for count in TIMED} for _ in range(runs)]
    print(f"1B, 4-bit, one picture, time to the first token, median of {runs}:")
    print("  tokens a picture   prompt   seconds   of 576's")
    for count in TIMED:
        took = statistics.median(turn[count] for turn in seconds)
        ratio = statistics.median(turn[count] / turn[TIMED[0]] for turn in seconds)
        print(f"  {count:16d}   {tokens[count]:6d}   {took:7.2f}   {ratio:8.2f}", flush=True)


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 70, 610, 64, 340
LOWEST, HIGHEST = 50, 100
COLORS = {"diversity": "#0b6e4f", "random": "#b3541e"}
NAMES = {"diversity": "the most diverse", "random": "at random"}


def plot(shares: dict[str, list[float]]) -> str:
    """The shares as an SVG: tokens a picture, on a scale of doublings, against per cent right."""

    def x(number: int) -> float:
        return LEFT + 30 + number * (RIGHT - LEFT - 60) / (len(COUNTS) - 1)

    def y(share: float) -> float:
        return BOTTOM - (share - LOWEST) * (BOTTOM - TOP) / (HIGHEST - LOWEST)

    def text(x: float, y: float, words: object, more: str = 'text-anchor="middle"') -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{words}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"',
        ' font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(WIDTH / 2, 26, "easy-VQA with the built-in model", 'text-anchor="middle" font-size="16"'),
    ]
    for share in range(LOWEST, HIGHEST + 1, 10):
        parts.append(f'<path d="M{LEFT} {y(share):.1f}H{RIGHT}" stroke="#ddd"/>')
        parts.append(text(LEFT - 8, y(share) + 4, share, 'text-anchor="end"'))
    parts.append(f'<path d="M{LEFT} {y(BLIND):.1f}H{RIGHT}" stroke="#888" stroke-dasharray="5 4"/>')
    parts.append(text(RIGHT, y(BLIND) - 6, "without looking", 'text-anchor="end" fill="#666"'))
    parts.append(f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#333"/>')
    parts += [text(x(number), BOTTOM + 20, count) for number, count in enumerate(COUNTS)]
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 44, "visual tokens a picture"))
    parts.append(
        text(0, 0, "right, %", f'text-anchor="middle" transform="translate(24 {(TOP + BOTTOM) / 2}) rotate(-90)"')
    )
    for line, way in (1, "random"), (0, "diversity"):  # the upper one covers the other where they meet
        row, color = shares[way], COLORS[way]
        points = [(x(number), y(share)) for number, share in enumerate(row)]
        drawn = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{color}" stroke-width="2.5"/>')
        for (a, b), share, count in zip(points, row, COUNTS, strict=True):
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{color}"/>')
            if count < ALL or not line:
                parts.append(text(a, b + (-10, 20)[line], f"{share:.2f}", f'text-anchor="middle" fill="{color}"'))
        at = BOTTOM - 46 + 22 * line
        parts.append(f'<path d="M{RIGHT - 150} {at}h26" stroke="{color}" stroke-width="2.5"/>')
        parts.append(text(RIGHT - 116, at + 4, NAMES[way], ""))
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the tokens at random")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them where none is named"
    )
    args = parser.parse_args()
    parts = args.parts or PARTS
    if "easy-vqa" in parts:
        shares = run_accuracy("easy-VQA's test half", easy(), args.seed)
        Path(__file__).with_suffix(".svg").write_text(plot(shares), "utf-8")
    if "drawings" in parts:
        run_accuracy("drawings of up to five shapes", drawings(), args.seed)
    if "speed" in parts:
        run_speed(args.runs)


if __name__ == "__main__":
    main()
