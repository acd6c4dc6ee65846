"""A GPU's figures in one process: `python benchmarks/gpu.py --size 7B --precision bf16 [--results FILE]`.

A LLaVA of real geometry gets random weights on the card itself; nothing is downloaded or written. Every contender
answers the same questions about new pictures of noise, 64 tokens each, with the same weights: this tool with its
captured step, this tool without it, and transformers' `generate`, which reads one picture at a time. Decoding is held
against the card's own limit: the bytes of a token's weights over the bandwidth that a large copy reached; the first
token against the floating-point operations of picture and prompt over what a large product reached.

`--device cpu --size tiny` tries the script itself.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from geometry import random_llava
from PIL import Image

from llava_cli import Conversation, Picture, Sampling
from llava_cli.engine import Answer, Request
from llava_cli.engine.local import LocalEngine
from llava_cli.engine.model_patch import ModelPatch
from llava_cli.prompts.prompter import Prompter

QUESTION = (
    "what is in this picture? and what color is the largest of all the things in it? and what is above it, or below it?"
)
ANSWER_TOKENS, BATCH_TOKENS, REPEATS = 64, 32, 5
Figures = dict[str, float]


# ---------------------------------------------------------------- the card


def seconds(work: Callable[[], object], device: str) -> float:
    """How long the device takes for it, at best of three."""
    return min(_seconds(work, device) for _ in range(3))


def _seconds(work: Callable[[], object], device: str) -> float:
    wait(device)
    begin = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begin


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def bandwidth(device: str) -> float:
    """Bytes per second of a large copy, read and written."""
    size = 1 << 31 if device == "cuda" else 1 << 27
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large product."""
    side = 8192 if device == "cuda" else 512
    x = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / seconds(lambda: x @ x, device)


# ---------------------------------------------------------------- the model


def make_engine(size: str, precision: str, device: str) -> LocalEngine:
    from llava_cli.engine.gpu import patch as gpu
    from llava_cli.engine.gpu.decode_graphs import DecodeGraphs
    from llava_cli.engine.unused_layers import simplify_vision_tower

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model, processor = random_llava(size, dtype)
    if precision == "4bit":
        quantize(model, dtype)
    patch = ModelPatch()
    simplify_vision_tower(model, patch)
    if device == "cuda":
        gpu.accelerate(model, patch)
    else:
        patch.set_attribute(model, "decode_graphs", DecodeGraphs(model))
    return LocalEngine(size, model, Prompter(processor), precision, 0.0, patch)


def quantize(model: Any, dtype: torch.dtype) -> None:
    """The decoder's linear layers in nf4, one at a time, as bitsandbytes does it when a checkpoint is loaded."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for module in list(model.get_decoder().modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is torch.nn.Linear:
                weight, device = layer.weight.data, layer.weight.device
                with torch.device("meta"):
                    small = Linear4bit(
                        layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
                    )
                small.weight = Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4").to(device)
                setattr(module, name, small)
    gc.collect()


def token_bytes(model: Any) -> int:
    """What is read of the weights to make one token."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    embeddings = model.get_input_embeddings().weight
    weights = [p for p in (*decoder.parameters(), *head.parameters()) if p is not embeddings]
    return sum(p.numel() * p.element_size() for p in weights)


def prompt_flops(model: Any, tokens: int) -> float:
    """Of the products that read a picture and a prompt of so many tokens; attention, a few percent, is not counted."""
    vision = sum(p.numel() for p in model.model.vision_tower.parameters() if p.dim() > 1)
    config = model.config.vision_config
    patches = (config.image_size // config.patch_size) ** 2
    decoder = sum(m.in_features * m.out_features for m in model.get_decoder().modules() if hasattr(m, "in_features"))
    return 2.0 * (vision * patches + decoder * tokens)


# ---------------------------------------------------------------- who answers


class Clock:
    """A streamer of transformers': when each token came. `generate` shows it the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


_seeds = iter(range(1 << 30))


def picture() -> Picture:
    """A photo's worth of noise that nobody has seen before."""
    seed = torch.Generator().manual_seed(next(_seeds))
    pixels = torch.randint(0, 256, (480, 640, 3), dtype=torch.uint8, generator=seed)
    return Picture("noise", Image.fromarray(pixels.numpy()), sha256="")


def ask_ours(engine: LocalEngine, tokens: int) -> Figures:
    begin = time.perf_counter()
    said = engine.answer(Conversation().ask(QUESTION, [picture()]), Sampling(max_tokens=tokens))
    assert said.answer_tokens == tokens
    total = time.perf_counter() - begin
    return {"first": said.first_token_seconds, "decode": (tokens - 1) / (total - said.first_token_seconds)}


def ask_generate(engine: LocalEngine, tokens: int, **options: Any) -> Figures:
    clock, begin = Clock(), time.perf_counter()
    inputs = engine.prompter.encode(Conversation().ask(QUESTION, [picture()]))
    inputs = {
        k: v.to(engine.network.device, engine.network.dtype if v.is_floating_point() else v.dtype)
        for k, v in inputs.items()
    }
    engine.network.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0, streamer=clock, **options)
    times = clock.times[1:]
    assert len(times) == tokens
    return {"first": times[0] - begin, "decode": (tokens - 1) / max(1e-9, times[-1] - times[0])}


def median(ask: Callable[[LocalEngine, int], Figures], engine: LocalEngine) -> Figures:
    """Of several answers, after two that warm up."""
    for _ in range(2):
        ask(engine, ANSWER_TOKENS)
    found = [ask(engine, ANSWER_TOKENS) for _ in range(REPEATS)]
    return {name: statistics.median(figures[name] for figures in found) for name in found[0]}


def batch(engine: LocalEngine, rows: int) -> float:
    """Pictures per second, a question about each, twice as many as are answered at a time."""
    asked = [
        Request(Conversation().ask(QUESTION, [picture()]), Sampling(max_tokens=BATCH_TOKENS)) for _ in range(2 * rows)
    ]
    begin = time.perf_counter()
    said = [answer for _, answer in engine.answer_many(iter(asked), rows)]
    assert all(isinstance(answer, Answer) and answer.answer_tokens == BATCH_TOKENS for answer in said)
    return len(asked) / (time.perf_counter() - begin)


@contextmanager
def without_graphs(model: Any) -> Iterator[None]:
    graphs, model.decode_graphs = model.decode_graphs, None
    try:
        yield
    finally:
        model.decode_graphs = graphs


# ---------------------------------------------------------------- the table


def report(size: str, precision: str, device: str, batches: list[int]) -> Iterator[str]:
    from llava_cli.engine.gpu.patch import describe

    card = torch.cuda.get_device_name() if device == "cuda" else "a CPU, to try the script"
    yield f"## {size} in {precision} on {card}\n"
    speed, rate = bandwidth(device), matrix_rate(device, torch.bfloat16)
    begin = time.perf_counter()
    engine = make_engine(size, precision, device)
    model = engine.network
    made = time.perf_counter() - begin
    tokens = engine.count(Conversation().ask(QUESTION, [picture()]))
    limit = speed / token_bytes(model)
    first_limit = prompt_flops(model, tokens) / rate
    size_read, floor = token_bytes(model) / 1e9, 1e3 * first_limit
    yield f"torch {torch.__version__}; copies at {speed / 1e9:,.0f} GB/s, products at {rate / 1e12:,.1f} TFLOP/s."
    yield f"A token reads {size_read:.2f} GB: at most {limit:,.0f} tokens/s. Picture and prompt, {tokens} tokens,"
    yield f"take at least {floor:.1f} ms. The weights were made in {made:.1f} s.\n"
    yield "| | first token, ms | of the limit + 10 ms | decode, tokens/s | of the limit |\n|---|---|---|---|---|"

    def row(name: str, figures: Figures) -> str:
        first = f"{1e3 * figures['first']:.1f} | {figures['first'] / (first_limit + 0.01):.2f}"
        return f"| {name} | {first} | {figures['decode']:.1f} | {figures['decode'] / limit:.2%} |"

    yield row("llava", median(ask_ours, engine))
    how = describe(model)
    with without_graphs(model):
        yield row("llava, kernel by kernel", median(ask_ours, engine))
        with engine.patch.undone():
            yield row("transformers' generate", median(ask_generate, engine))
    yield f"\nTokens are made by a step that is: {how}.\n"
    yield "| pictures at a time | pictures/s | of generate, one at a time |\n|---|---|---|"
    with without_graphs(model), engine.patch.undone():
        begin = time.perf_counter()
        for _ in range(3):
            ask_generate(engine, BATCH_TOKENS)
        alone = 3 / (time.perf_counter() - begin)
    yield f"| 1, generate | {alone:.2f} | 1.00 |"
    for rows in batches:
        batch(engine, rows)
        found = batch(engine, rows)
        yield f"| {rows} | {found:.2f} | {found / alone:.2f} |"
    if device == "cuda":
        yield f"\nMemory: {torch.cuda.max_memory_reserved() / 1e9:.1f} GB at most.\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="7B")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "4bit"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", default="8,32,128")
    parser.add_argument("--results", type=Path, help="a file that the section is added to")
    args = parser.parse_args()
    batches = [int(rows) for rows in args.batches.split(",")]
    for line in report(args.size, args.precision, args.device, batches):
        print(line, flush=True)
        if args.results:
            with args.results.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
