"""Holds answers of tiny models with random weights against random JSON schemas: every finished one has to fit its own.

    python benchmarks/schemas.py [--count 10000] [--seed 0] [--family llava-llama]
    python benchmarks/schemas.py --speed MODEL [--precision 4bit]

Tokens are sampled, so that answers go wherever a schema lets them. Schemas and questions differ in each row of a batch.

With `--speed`, how much longer a token takes with a schema: answers with and without one alternate in one process, and
the median of all tokens counts. What the schema alone costs is timed too, with Qwen's 151,000 words. It is CPU time of
this process, which other work on the machine hardly changes if OMP_NUM_THREADS is 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers import families, vocabularies
from helpers.engines import picture
from helpers.schemas import random_schema, validator
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llava_cli import Answer, Conversation, LlavaError, Sampling, load
from llava_cli.engine import Request
from llava_cli.engine.generate.batch import Batch
from llava_cli.engine.generate.constraint import Grammars
from llava_cli.engine.generate.prompt_cache import PromptCache
from llava_cli.engine.generate.token_bytes import token_bytes
from llava_cli.engine.local import LocalEngine

MAX_TOKENS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", default="llava-llama", choices=families.FAMILIES)
    parser.add_argument("--speed", metavar="MODEL")
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    if options.speed:
        measure_speed(load(options.speed, precision=options.precision))
        measure_masks()
    else:
        check_answers(options)


def check_answers(options: argparse.Namespace) -> None:
    """Prints how many of the answers fit, and each that does not."""
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


def measure_speed(engine: LocalEngine, tokens: int = 64, repeats: int = 8) -> None:
    conversation = Conversation().ask("what is this?", [picture(336, 336)])
    texts = {"type": "array", "items": {"type": "string", "pattern": "^[a-z ]*$"}, "minItems": tokens}  # never complete
    schema = {"type": "object", "properties": {"texts": texts}, "required": ["texts"]}
    kinds = {"without": Sampling(max_tokens=tokens), "with": Sampling(max_tokens=tokens, schema=schema)}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    prompt_cache = PromptCache(None, getattr(engine.network.config, "image_token_id", None))
    for repeat in range(repeats + 1):
        for kind, sampling in kinds.items():
            sequence, batch = engine.prepare(0, Request(conversation, sampling)), Batch(engine.network, prompt_cache)
            batch.join([sequence])
            batch.step()
            while batch.sequences:
                begin = time.process_time()
                batch.step()
                seconds[kind] += [time.process_time() - begin] * (repeat > 0)  # the first one warms up
    without, with_one = (1000 * median(seconds[kind]) for kind in kinds)
    print(
        f"{engine.model}, {engine.precision}: {without:.2f} ms of CPU time a token, {with_one:.2f} ms with a schema",
        end="",
    )
    print(f" ({100 * (with_one / without - 1):+.1f} %)")


def measure_masks(steps: int = 1000) -> None:
    core = Tokenizer.from_str(vocabularies.tokenizer_json("qwen", ("<|im_end|>",)))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    begin = time.process_time()
    grammars = Grammars(token_bytes(tokenizer), [tokenizer.eos_token_id])
    print(f"{len(tokenizer):,} words: read in {time.process_time() - begin:.2f} s", end="")
    sampling = Sampling(schema="shop, total float, date, items [name, price float]")
    one, logits, seconds = grammars.constraint(sampling), torch.randn(8, 1, len(tokenizer)), []
    for step in range(steps):
        begin = time.process_time()
        masked = one.mask(logits[step % 8])
        middle = time.process_time()
        token = int(masked.argmax())
        end = time.process_time()
        one.append(token)
        seconds.append(middle - begin + time.process_time() - end)
        if one.stopped:
            one = grammars.constraint(sampling)
    print(f", then {1000 * median(seconds):.2f} ms a token")


if __name__ == "__main__":
    main()
