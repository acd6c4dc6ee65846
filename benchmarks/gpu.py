"""A GPU's figures in one process: `python benchmarks/gpu.py --size 7B --precision bf16 [--results FILE]`.

A LLaVA of real geometry gets random weights on the card itself. Every contender answers the same questions about new
pictures of noise, 64 tokens each, with the same weights: this tool with its captured step, this tool without it, and
transformers' `generate`, which reads one picture at a time, with the cache that it takes by itself and with a static
one. Decoding is held against the card's own limit: the bytes of a token's weights over the bandwidth that a large copy
reached; the first token against the floating-point operations of picture and prompt over what a large product reached.

After `--seconds` no part is begun that is not expected to end in time; what is left out is said. The last table has
each figure that must hold beside its bound. `--device cpu --size tiny` tries the script itself.
"""

from __future__ import annotations

import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as `llava` does, before torch is imported

import argparse
import gc
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gpu_pieces
import torch
from geometry import make_processor, random_llava
from PIL import Image

from llava_cli import Conversation, Picture, Sampling, load
from llava_cli.engine import Answer, Request
from llava_cli.engine.local import LocalEngine
from llava_cli.engine.model_patch import ModelPatch
from llava_cli.prompts.prompter import Prompter

QUESTION = (
    "what is in this picture? and what color is the largest of all the things in it? and what is above it, or below it?"
)
ANSWER_TOKENS, BATCH_TOKENS, REPEATS = 64, 32, 5
COMPILE_SECONDS = 90
LOAD_BYTES = 22e9
"""A 7B's files, and its copy in 4 bits."""
HEAD = "| | first token, ms | of the limit + 10 ms | decode, tokens/s | of the limit |\n|---|---|---|---|---|"
Figures = dict[str, float]


class Bound(NamedTuple):
    """A figure that must hold."""

    name: str
    found: float
    least: float

    def row(self) -> str:
        return (
            f"| {self.name} | {self.found:.2f} | {self.least:.2f} | {'yes' if self.found >= self.least else '**no**'} |"
        )


class Clock:
    """How much time is left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.skipped: list[str] = []

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def has(self, seconds: float, part: str) -> bool:
        """Whether a part that takes so long can be begun."""
        if self.left < seconds:
            self.skipped.append(f"{part} ({seconds:.0f} s of {max(0.0, self.left):.0f})")
        return self.left >= seconds


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises `TimeoutError` in what takes longer."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(max(1, round(seconds)))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


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
    return LocalEngine(size, model, Prompter(processor, fit="pad"), precision, 0.0, patch)


def quantize(model: Any, dtype: torch.dtype) -> None:
    """The decoder's linear layers in nf4, one at a time, as bitsandbytes does it when a checkpoint is loaded."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    how: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
    for module in list(model.get_decoder().modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is torch.nn.Linear:
                with torch.device("meta"):
                    small = Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, **how)
                weight = layer.weight
                small.weight = Params4bit(weight.data, requires_grad=False, **how).to(weight.device)
                setattr(module, name, small)
    gc.collect()


def token_bytes(model: Any) -> int:
    """What is read of the weights to make one token."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    embeddings = model.get_input_embeddings().weight
    weights = [p for p in (*decoder.parameters(), *head.parameters()) if p is not embeddings]
    scales = [state.absmax for p in weights if (state := getattr(p, "quant_state", None))]
    return sum(p.numel() * p.element_size() for p in (*weights, *scales))


def prompt_flops(model: Any, tokens: int) -> float:
    """Of the products that read a picture and a prompt of so many tokens; attention, a few percent, is not counted."""
    vision = sum(p.numel() for p in model.model.vision_tower.parameters() if p.dim() > 1)
    config = model.config.vision_config
    patches = (config.image_size // config.patch_size) ** 2
    decoder = sum(m.in_features * m.out_features for m in model.get_decoder().modules() if hasattr(m, "in_features"))
    return 2.0 * (vision * patches + decoder * tokens)


# ---------------------------------------------------------------- who answers


class TokenTimes:
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


def conversation() -> Conversation:
    return Conversation().ask(QUESTION, [picture()])


def ask_ours(engine: LocalEngine, tokens: int) -> Figures:
    talk = conversation()
    begin = time.perf_counter()
    said = engine.answer(talk, Sampling(max_tokens=tokens))
    assert said.answer_tokens == tokens
    total = time.perf_counter() - begin
    return {"first": said.first_token_seconds, "decode": (tokens - 1) / (total - said.first_token_seconds)}


def ask_generate(engine: LocalEngine, tokens: int, **options: Any) -> Figures:
    talk, clock = conversation(), TokenTimes()
    begin = time.perf_counter()
    inputs = engine.prompter.encode(talk)
    inputs = {
        k: v.to(engine.network.device, engine.network.dtype if v.is_floating_point() else v.dtype)
        for k, v in inputs.items()
    }
    engine.network.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0, streamer=clock, **options)
    times = clock.times[1:]
    assert len(times) == tokens
    decode = (tokens - 1) / max(1e-9, times[-1] - times[0])
    return {"first": times[0] - begin, "decode": decode, "whole": times[-1] - begin}


def median(ask: Callable[[LocalEngine, int], Figures], engine: LocalEngine) -> Figures:
    """Of several answers, after two that warm up."""
    for _ in range(2):
        ask(engine, ANSWER_TOKENS)
    found = [ask(engine, ANSWER_TOKENS) for _ in range(REPEATS)]
    return {name: statistics.median(figures[name] for figures in found) for name in found[0]}


def batch(engine: LocalEngine, rows: int) -> float:
    """Pictures per second, a question about each, twice as many as are answered at a time."""
    asked = [Request(conversation(), Sampling(max_tokens=BATCH_TOKENS)) for _ in range(2 * rows)]
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


def ask_static(engine: LocalEngine, tokens: int) -> Figures:
    return ask_generate(engine, tokens, cache_implementation="static", disable_compile=True)


def ask_compiled(engine: LocalEngine, tokens: int) -> Figures:
    return ask_generate(engine, tokens, cache_implementation="static")


@contextmanager
def cudnn_attention(device: str) -> Iterator[None]:
    """As torch has it by itself: on an H100 and later it may take cuDNN's, which plans anew for each length."""
    if device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        if device == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)


class Report:
    """One model on one device, part by part."""

    def __init__(self, size: str, precision: str, device: str, clock: Clock) -> None:
        self.size, self.precision, self.device, self.clock = size, precision, device, clock
        self.bounds: list[Bound] = []

    def lines(self, batches: list[int], measures_load: bool) -> Iterator[str]:
        card = torch.cuda.get_device_name() if self.device == "cuda" else "a CPU, to try the script"
        yield f"## {self.size} in {self.precision} on {card}\n"
        speed, rate = bandwidth(self.device), matrix_rate(self.device, torch.bfloat16)
        begin = time.perf_counter()
        engine = make_engine(self.size, self.precision, self.device)
        made = time.perf_counter() - begin
        tokens = engine.count(conversation())
        self.limit = speed / token_bytes(engine.network)
        self.first_limit = prompt_flops(engine.network, tokens) / rate
        yield f"torch {torch.__version__}; copies at {speed / 1e9:,.0f} GB/s, products at {rate / 1e12:,.1f} TFLOP/s."
        size, first = token_bytes(engine.network) / 1e9, 1e3 * self.first_limit
        yield f"A token reads {size:.2f} GB: at most {self.limit:,.0f} tokens/s. Picture and prompt, {tokens} tokens,"
        yield f"take at least {first:.1f} ms. The weights were made in {made:.1f} s."
        yield from self._beside_the_bound(engine, tokens)
        yield from self._one_at_a_time(engine)
        if self.clock.has(25, "the pieces of a step"):
            yield from gpu_pieces.lines(engine.network, self.device)
            yield ""
        yield from self._batches(engine, batches)
        if self.clock.has(COMPILE_SECONDS + 30, "generate with a static cache, compiled"):
            yield f"\n{HEAD}"
            with without_graphs(engine.network), engine.patch.undone():
                yield self._try("generate, static cache, compiled", ask_compiled, engine, COMPILE_SECONDS)
        if self.device == "cuda":
            yield f"\nMemory: {torch.cuda.max_memory_reserved() / 1e9:.1f} GB at most."
        if measures_load and self.precision == "bf16" and self.clock.has(100, "loading from a folder"):
            yield from self._load(engine)

    def table(self) -> Iterator[str]:
        """What was left out, and the figures that must hold, as far as they are known."""
        if self.clock.skipped:
            yield f"\nLeft out, for want of time: {', '.join(self.clock.skipped)}."
        yield f"\n| {self.size} {self.precision}: must hold | found | at least | held |\n|---|---|---|---|"
        for bound in self.bounds:
            yield bound.row()

    def _beside_the_bound(self, engine: LocalEngine, tokens: int) -> Iterator[str]:
        """What of the first token no bound has: how fast products of the prompt's own shape are, and the CPU's part."""
        config, dtype = engine.network.config.get_text_config(), torch.bfloat16
        x = torch.randn(tokens, config.hidden_size, device=self.device, dtype=dtype)
        weight = torch.randn(config.hidden_size, config.intermediate_size, device=self.device, dtype=dtype)
        rate = 2 * x.numel() * weight.shape[1] / seconds(lambda: x @ weight, self.device)
        host = statistics.median(
            _seconds(partial(engine.prompter.encode, conversation()), "cpu") for _ in range(REPEATS)
        )
        yield f"Products of the prompt's shape are at {rate / 1e12:,.1f} TFLOP/s; its tokens and pixels take the CPU"
        yield f"{1e3 * host:.1f} ms.\n"

    def _one_at_a_time(self, engine: LocalEngine) -> Iterator[str]:
        from llava_cli.engine.gpu.patch import describe

        yield HEAD
        ours = median(ask_ours, engine)
        yield self._row("llava", ours)
        how = describe(engine.network)
        theirs: list[Figures] = []
        with without_graphs(engine.network):
            yield self._row("llava, kernel by kernel", median(ask_ours, engine))
            with engine.patch.undone():
                theirs.append(median(ask_generate, engine))
                yield self._row("transformers' generate", theirs[0])
                if self.device == "cuda" and self.clock.has(30, "generate with cuDNN's attention"):
                    with cudnn_attention(self.device):
                        theirs.append(median(ask_generate, engine))
                    yield self._row("generate, as torch chooses its attention", theirs[1])
                if self.clock.has(30, "generate with a static cache"):
                    yield self._try("generate, static cache", ask_static, engine, 30)
        yield f"\nTokens are made by a step that is: {how}.\n"
        best = max(figures["decode"] for figures in theirs)
        share = 0.55 if self.precision == "bf16" else 0.0
        self.bounds.append(Bound("decode, times generate's", ours["decode"] / best, 2))
        self.bounds.append(Bound("decode, share of the limit", ours["decode"] / self.limit, share))
        self.bounds.append(
            Bound("first token, limit + 10 ms over it", (self.first_limit + 0.01) / ours["first"], 1 / 1.3)
        )

    def _row(self, name: str, figures: Figures) -> str:
        first = f"{1e3 * figures['first']:.1f} | {figures['first'] / (self.first_limit + 0.01):.2f}"
        return f"| {name} | {first} | {figures['decode']:.1f} | {figures['decode'] / self.limit:.2%} |"

    def _try(self, name: str, ask: Callable[[LocalEngine, int], Figures], engine: LocalEngine, seconds: float) -> str:
        """A contender's row, or why there is none."""
        try:
            with limited(min(seconds, max(1.0, self.clock.left))):
                return self._row(name, median(ask, engine))
        except Exception as error:
            return f"| {name} | {type(error).__name__}: {str(error).partition(chr(10))[0][:80]} | | | |"

    def _batches(self, engine: LocalEngine, batches: list[int]) -> Iterator[str]:
        yield "| pictures at a time | pictures/s | of generate, one at a time |\n|---|---|---|"
        with without_graphs(engine.network), engine.patch.undone():
            alone = 3 / sum(ask_generate(engine, BATCH_TOKENS)["whole"] for _ in range(3))
        yield f"| 1, generate | {alone:.2f} | 1.00 |"
        best = 0.0
        for rows in batches:
            if not self.clock.has(4 * rows / max(alone, best), f"{rows} at a time"):
                continue
            batch(engine, rows)
            found = batch(engine, rows)
            best = max(best, found)
            yield f"| {rows} | {found:.2f} | {found / alone:.2f} |"
        self.bounds.append(Bound("pictures/s of a batch, times generate's", best / alone, 5))

    def _load(self, engine: LocalEngine) -> Iterator[str]:
        """From files in memory, if they have room there: what a start takes apart from the disk.

        The engine's weights are gone after it.
        """
        has_room = os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > LOAD_BYTES
        place = "/dev/shm" if has_room else None
        folder = tempfile.mkdtemp(dir=place)
        os.environ["LLAVA_CACHE"] = f"{folder}/cache"
        try:
            engine.network.save_pretrained(f"{folder}/model", max_shard_size="2GB")
            make_processor().save_pretrained(f"{folder}/model")
            engine.patch.undo()
            engine.network.to("meta")
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()
            yield "\n| loaded from files in memory | s |\n|---|---|"
            for name, precision in (("bf16", "bf16"), ("4bit, the first start", "4bit"), ("4bit, later", "4bit")):
                if self.clock.has(45, f"loading in {name}"):
                    begin = time.perf_counter()
                    load(f"{folder}/model", precision=precision, device=self.device)  # type: ignore[arg-type]
                    wait(self.device)
                    yield f"| {name} | {time.perf_counter() - begin:.1f} |"
                    gc.collect()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="7B")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "4bit"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", default="8,32,128")
    parser.add_argument("--seconds", type=float, default=480, help="how long all of it may take")
    parser.add_argument("--load", action="store_true", help="also measure loading, from files in /dev/shm")
    parser.add_argument("--results", type=Path, help="a file that the section is added to")
    args = parser.parse_args()
    clock = Clock(args.seconds)
    report = Report(args.size, args.precision, args.device, clock)
    batches = [int(rows) for rows in args.batches.split(",")]

    def tell(line: str) -> None:
        print(line, flush=True)
        if args.results:
            with args.results.open("a") as file:
                file.write(line + "\n")

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        for line in report.lines(batches, args.load):
            tell(line)
    finally:  # whatever has ended it
        for line in report.table():
            tell(line)


if __name__ == "__main__":
    main()
