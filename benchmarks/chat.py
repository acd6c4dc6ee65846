"""What a kept KV cache saves: `python benchmarks/chat.py`. Time to the first token of a chat's third turn.

One model, two engines in turn: one has answered the turns before and reads what is new; the other reads
the whole prompt, as tools do that keep nothing. Random weights with LLaVA-1.5's geometry, the decoder
scaled to 1B: CLIP-L/336, 576 image tokens, 22 layers x 2048.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from geometry import DECODERS, random_llava
from PIL import Image

from llava_cli import Conversation, Sampling
from llava_cli.conversation import Picture
from llava_cli.engine.local import LocalEngine
from llava_cli.prompts.prompter import Prompter

QUESTIONS = ("what is in this picture?", "what color is the largest of them?", "and what is to the left of it?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1B", choices=DECODERS)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    model, processor = random_llava(args.size, dtype)
    noise = torch.randint(0, 256, (480, 640, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    photo = Picture("noise", Image.fromarray(noise.numpy()), sha256="")
    sampling = Sampling(max_tokens=24)

    def engine() -> LocalEngine:
        return LocalEngine(args.size, model, Prompter(processor), args.precision, 0)

    engine().answer(Conversation().ask(QUESTIONS[0], [photo]), Sampling(max_tokens=2))  # the first pass is slow
    kept_seconds, whole_seconds = [], []
    for _ in range(args.runs):
        kept, talk = engine(), Conversation().ask(QUESTIONS[0], [photo])
        for question in QUESTIONS[1:]:
            talk = talk.answered(kept.answer(talk, sampling).text).ask(question)
        answer, whole = kept.answer(talk, sampling), engine().answer(talk, sampling)
        kept_seconds.append(answer.first_token_seconds)
        whole_seconds.append(whole.first_token_seconds)
    keeps, reads = statistics.median(kept_seconds), statistics.median(whole_seconds)
    print(f"{args.size} {args.precision}, third turn, {answer.prompt_tokens} tokens, median of {args.runs} runs:")
    print(f"  reading what is new: {keeps:.3f} s ({answer.prompt_tokens - answer.cached_tokens} tokens)")
    print(f"  reading everything:  {reads:.3f} s")
    print(f"  ratio: {keeps / reads:.3f}")


if __name__ == "__main__":
    main()
