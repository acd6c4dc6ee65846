"""How far from full precision a real decoder is in each precision: `python benchmarks/fidelity.py CACHE`.

Decoder and text are those of `real_decoder.py`; CACHE is where they are kept. Of each window of 512 tokens the first
128 are a prompt, and the others are predicted: at once by transformers (`plain`: `LLAVA_FAST=0`), one by one by our
kernels, eighteen windows side by side. Perplexity is e to the mean of -log p(token); divergence is the mean over tokens
of KL(fp32 || this), in nats. Ratios are to `plain` in the same precision. "Head" is what the output head that a single
conversation has does to perplexity, on every eighth token. llama.cpp gives the states before its output head, which are
multiplied by the head in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from peers import made
from real_decoder import checkpoint, windows, write_gguf

WINDOW, PROMPT, ROWS, WINDOWS = 512, 128, 18, 54
HEAD_EVERY = 8
"""Of how many tokens one is predicted by the head for one token, too."""
STEPS = slice(PROMPT - 1, WINDOW - 1)
"""The tokens of a window behind which a token is predicted."""


@dataclass(frozen=True)
class Case:
    """One way to compute: `ours`, transformers as it is (`plain`), or llama.cpp."""

    who: str
    precision: str
    compute: str = ""
    """What activations are in, of a quantized model."""
    isa: str = ""
    """Of our kernels."""

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.who, self.precision, self.compute, self.isa) if part)


@dataclass
class Figures:
    """What is told of a case."""

    perplexity: float
    divergence: float
    same_token: float
    """Share of tokens of which the likeliest is fp32's."""
    head: float | None = None
    """Perplexity with the output head for one token, of that with the head for several."""

    def row(self, name: str, plain: Figures | None) -> str:
        """A line of the table, with ratios to the same precision without our kernels."""
        perplexity, divergence = f"{self.perplexity:.3f}", f"{self.divergence:.5f}"
        if plain and plain is not self:
            perplexity += f" ({self.perplexity / plain.perplexity - 1:+.2%})"
            divergence += f" ({self.divergence / plain.divergence:.3f})" if plain.divergence else ""
        head = f"{self.head - 1:+.3%}" if self.head else "-"
        return f"| {name} | {perplexity} | {divergence} | {self.same_token:.2%} | {head} |"


# ---------------------------------------------------------------- scores


class Reference:
    """fp32's log-probabilities of the tokens behind the prompts of windows."""

    def __init__(self, cache: Path, tokens: torch.Tensor) -> None:
        self._states = torch.from_numpy(np.load(reference_path(cache, tokens), mmap_mode="c"))
        self._head = torch.from_numpy(np.load(cache / "head.npy", mmap_mode="c"))
        self._targets = tokens[:, PROMPT:]

    def __call__(self, rows: slice, steps: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """-> log p of all tokens [rows * steps, vocabulary], and the tokens that come [rows * steps]"""
        states, targets = self._states[rows, steps].flatten(0, 1), self._targets[rows, steps].flatten()
        return (states @ self._head.t()).log_softmax(-1), targets


class Score:
    """Sums up how far logits are from fp32's."""

    def __init__(self) -> None:
        self._sums, self._count = torch.zeros(3, dtype=torch.float64), 0

    def add(self, reference: torch.Tensor, targets: torch.Tensor, logits: torch.Tensor) -> None:
        """Logits [rows, steps, vocabulary]; the others are a `Reference`'s of these."""
        log_p = logits.flatten(0, 1).float().log_softmax(-1)
        self._sums[0] -= log_p.gather(1, targets[:, None]).sum().item()
        self._sums[1] += (reference.exp() * (reference - log_p)).sum().item()
        self._sums[2] += (log_p.argmax(-1) == reference.argmax(-1)).sum().item()
        self._count += len(targets)

    @property
    def figures(self) -> Figures:
        loss, divergence, same = (self._sums / self._count).tolist()
        return Figures(float(np.exp(loss)), divergence, same)


def write_reference(cache: Path, tokens: torch.Tensor) -> None:
    """The decoder's states in fp32 before its output head [windows, predicted tokens, hidden_size]."""
    if (path := reference_path(cache, tokens)).exists():
        return
    model = load_model(cache, Case("plain", "fp32"))
    with torch.inference_mode():
        states = [model.get_decoder()(input_ids=row[None]).last_hidden_state[0, STEPS] for row in tokens]
    np.save(cache / "head.npy", model.lm_head.weight.detach().numpy())
    np.save(path, torch.stack(states).numpy())


def reference_path(cache: Path, tokens: torch.Tensor) -> Path:
    return cache / f"reference-{len(tokens)}x{tokens.shape[1]}.npy"


# ---------------------------------------------------------------- who is measured


def load_model(cache: Path, case: Case) -> Any:
    """transformers' model, accelerated as the case says; the environment has LLAVA_FAST already."""
    from llava_cli import load
    from llava_cli.hardware import device

    if case.compute:
        device.native_precision = lambda device: (case.compute, "as measured")
    if case.isa:
        use_isa(case.isa)
    return load(str(checkpoint(cache)), precision=case.precision, device="cpu").network  # type: ignore[arg-type]


def isa_names() -> list[str]:
    """The instruction sets whose kernels this CPU can run, the best first."""
    from llava_cli.engine.cpu.jit import compiler

    names = [isa.name for isa in compiler.supported_isas()]
    return ["avx512vnni", "avxvnni", *names[1:]] if names[:1] == ["avx512vnni"] and "avxvnni" not in names else names


def use_isa(name: str) -> None:
    """Makes this a CPU with this instruction set alone. AVX-512's VNNI has AVX's in another encoding."""
    from llava_cli.engine.cpu.jit import compiler
    from llava_cli.engine.cpu.jit.builder import ISA_TIERS

    (isa,) = (isa for isa in ISA_TIERS if isa.name == name)
    if isa not in compiler.supported_isas():
        isa = replace(isa, required_features=("avx2", "fma", "f16c", "avx512vl", "avx512_vnni"))
    compiler._host_isas = lambda: ((isa,), "")  # type: ignore[assignment]


def run_plain(cache: Path, case: Case, tokens: torch.Tensor) -> Figures:
    model, reference, score = load_model(cache, case), Reference(cache, tokens), Score()
    for i, row in enumerate(tokens):
        states = model.get_decoder()(input_ids=row[None]).last_hidden_state[:, STEPS]
        score.add(*reference(slice(i, i + 1), slice(None)), model.lm_head(states))
    return score.figures


def run_ours(cache: Path, case: Case, tokens: torch.Tensor) -> Figures:
    from llava_cli.engine.kv_cache import RoomyCache

    model = load_model(cache, case)
    decoder, embed, head = model.get_decoder(), model.get_input_embeddings(), model.lm_head
    reference, (score, head_of_several, head_of_one) = Reference(cache, tokens), (Score() for _ in range(3))
    for begin in range(0, len(tokens), ROWS):
        rows, kv_cache = slice(begin, begin + ROWS), RoomyCache()
        part = tokens[rows]
        for step in range(WINDOW - PROMPT):
            new = part[:, :PROMPT] if not step else part[:, PROMPT + step - 1, None]
            output = decoder(inputs_embeds=embed(new), past_key_values=kv_cache, use_cache=True)
            state, truth = output.last_hidden_state[:, -1:], reference(rows, slice(step, step + 1))
            logits = head(state)
            score.add(*truth, logits)
            if step % HEAD_EVERY == 0:
                head_of_several.add(*truth, logits)
                head_of_one.add(*truth, torch.cat([head(row[None]) for row in state]))
    ratio = head_of_one.figures.perplexity / head_of_several.figures.perplexity
    return replace(score.figures, head=ratio)


def run_llama(cache: Path, case: Case, tokens: torch.Tensor) -> Figures:
    import xllamacpp  # type: ignore[import-untyped]

    gguf = made(cache / f"{case.precision}.gguf", lambda part: write_gguf(cache, case.precision, part))
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.embedding, params.embd_normalize = True, -1
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
    params.n_ctx = params.n_batch = params.n_ubatch = WINDOW
    params.n_parallel, params.verbosity = 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server, head = xllamacpp.Server(params), torch.from_numpy(np.load(cache / "head.npy"))
    reference, score = Reference(cache, tokens), Score()
    for i, row in enumerate(tokens):
        # Not `handle_embeddings`, which answers in OpenAI's format, where a text has one vector.
        body = json.dumps({"content": row.tolist(), "embd_normalize": -1}).encode()
        request = Request(f"{server.listening_address}/embedding", body, {"Content-Type": "application/json"})
        with urlopen(request) as answer:
            states = torch.tensor(json.load(answer)[0]["embedding"])
        score.add(*reference(slice(i, i + 1), slice(None)), (states[STEPS] @ head.t())[None])
    return score.figures


RUNS = {"plain": run_plain, "ours": run_ours, "llama.cpp": run_llama}


def cases() -> Iterator[Case]:
    """In the order of the table. CPUs with AVX2 alone have no bf16, so models compute in fp32 there."""
    isas = isa_names()
    yield from (Case(who, precision) for precision in ("fp32", "bf16") for who in ("plain", "ours"))
    for precision in ("8bit", "4bit"):
        for compute in ("bf16", "fp32"):
            yield Case("plain", precision, compute)
            kernels = [isa for isa in isas if isa == "avx512vnni" or compute == "fp32"]
            yield from (Case("ours", precision, compute, isa) for isa in kernels)
    yield from (Case("llama.cpp", precision) for precision in ("Q8_0", "Q4_0"))


def measure(cache: Path, case: Case, tokens: torch.Tensor) -> None:
    """In a process of its own: prints the figures as JSON."""
    with torch.inference_mode():
        print(json.dumps(asdict(RUNS[case.who](cache, case, tokens))), flush=True)


def run_measurement(cache: Path, case: Case, count: int) -> Figures:
    """Starts that process. Each dtype has quantized copies of its own, which remember in what they compute."""
    environment = {"LLAVA_FAST": str(int(case.who != "plain")), "LLAVA_CACHE": str(cache / f"copies-{case.compute}")}
    command = [sys.executable, __file__, str(cache), "--windows", str(count), "--case", json.dumps(asdict(case))]
    output = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, check=True).stdout
    return Figures(**json.loads(output.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cache", type=Path)
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--only", default="", help="cases with this in their names")
    parser.add_argument("--case", type=json.loads)
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    tokens = windows(args.cache, args.windows, WINDOW)
    if args.case:
        measure(args.cache, Case(**args.case), tokens)
        return
    os.environ["LLAVA_FAST"] = "0"
    write_reference(args.cache, tokens)
    print(f"{args.windows * (WINDOW - PROMPT):,} tokens\n")
    print("| | perplexity | divergence | same token | head |\n|---|---|---|---|---|", flush=True)
    plain: dict[tuple[str, str], Figures] = {}
    for case in cases():
        if args.only in case.name:
            figures = run_measurement(args.cache, case, args.windows)
            plain.setdefault((case.precision, case.compute), figures)
            print(figures.row(case.name, plain[case.precision, case.compute]), flush=True)


if __name__ == "__main__":
    main()
