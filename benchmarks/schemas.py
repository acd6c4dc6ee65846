"""Holds answers of tiny models with random weights against random JSON schemas: every finished one has to fit its own.

    python benchmarks/schemas.py [--count 10000] [--seed 0] [--family llava-llama]

Tokens are sampled, so that answers go wherever a schema lets them. Schemas and questions differ in each row of a batch.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers import families
from helpers.engines import picture
from helpers.schemas import random_schema, validator

from llava_cli import Answer, Conversation, LlavaError, Sampling, load
from llava_cli.engine import Request

MAX_TOKENS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", default="llava-llama", choices=families.FAMILIES)
    options = parser.parse_args()
    folder = families.save(options.family, Path(tempfile.mkdtemp()))
    engine = load(str(folder), precision="fp32", device="cpu")
    dice, begin = random.Random(options.seed), time.monotonic()
    pictures = [picture(60, 60, seed) for seed in range(3)]
    asked = []
    for number in range(options.count):
        sampling = Sampling(schema=random_schema(dice), max_tokens=MAX_TOKENS, temperature=1, seed=number)
        question = "".join(chr(dice.randint(97, 122)) for _ in range(dice.randint(1, 20)))
        asked.append(Request(Conversation().ask(question, [dice.choice(pictures)]), sampling))
    found: Counter[str] = Counter()
    for number, answer in engine.answer_many(iter(asked)):
        schema = asked[number].sampling.schema
        assert schema
        if isinstance(answer, LlavaError):
            found[f"refused: {answer.reason}"] += 1
        elif answer.finish_reason == "length":
            found["cut off"] += 1
            assert answer.data is None
        else:
            found["fits" if fits(answer, schema) else "DOES NOT FIT"] += 1
            if not fits(answer, schema):
                print(schema, answer.text, sep="\n")
    print(f"{options.count:,} random schemas, {options.family}, seed {options.seed}, {time.monotonic() - begin:.0f} s")
    for what, count in found.most_common():
        print(f"{count:7,}  {what}")


def fits(answer: Answer, schema: str) -> bool:
    return validator(schema)(answer.data)


if __name__ == "__main__":
    main()
