"""How far from full precision a real decoder is in each precision: `python benchmarks/fidelity.py CACHE`.

Decoder and text are those of `real_decoder.py`; CACHE is where they are kept. Of each window of 512 tokens the first
80 are a prompt, and the others are predicted: at once by transformers (`plain`: `LLAVA_FAST=0`), one by one by our
kernels, sixteen windows side by side. Perplexity is e to the mean of -log p(token); divergence is the mean over
tokens of KL(fp32 || this), in nats. Ratios are to `plain` in the same precision. "Head" is what the output head that a
single conversation has does to perplexity, on every eighth token. llama.cpp gives the states before its output head,
which are multiplied by the head in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from peers import made
from real_decoder import checkpoint, windows, write_gguf

WINDOW, PROMPT, ROWS, WINDOWS = 512, 80, 16, 48
HEAD_EVERY = 8
"""Of how many tokens one is predicted by the head for one token, too."""
Head = Callable[[torch.Tensor], torch.Tensor]
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
    """fp32's log-probabilities of the tokens behind a window's prompt."""

    def __init__(self, cache: Path, tokens: torch.Tensor) -> None:
        self._states = torch.from_numpy(np.load(reference_path(cache, tokens), mmap_mode="c"))
        self._head, self._targets = fp32_head(cache), tokens[:, PROMPT:]

    def __call__(self, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        """-> log p of all tokens [steps, vocabulary], and the tokens that come [steps]"""
        return self._head(self._states[window]).log_softmax(-1), self._targets[window]


class Score:
    """Sums up how far logits are from fp32's."""

    def __init__(self) -> None:
        self._sums, self._count = torch.zeros(3, dtype=torch.float64), 0

    def add(self, reference: torch.Tensor, targets: torch.Tensor, logits: torch.Tensor) -> None:
        """Logits [steps, vocabulary]; the others are a `Reference`'s of these."""
        log_p = logits.float().log_softmax(-1)
        self._sums[0] -= log_p.gather(1, targets[:, None]).sum().item()
        self._sums[1] += (reference.exp() * (reference - log_p)).sum().item()
        self._sums[2] += (log_p.argmax(-1) == reference.argmax(-1)).sum().item()
        self._count += len(targets)

    @property
    def figures(self) -> Figures:
        loss, divergence, same = (self._sums / self._count).tolist()
        return Figures(float(np.exp(loss)), divergence, same)


def score(states: torch.Tensor, head: Head, reference: Reference, has_head_for_one: bool) -> Figures:
    """Of a decoder's states [windows, steps, hidden_size] and its output head."""
    score, head_of_several, head_of_one = (Score() for _ in range(3))
    for window, state in enumerate(states):
        (log_p, targets), logits, some = reference(window), head(state), slice(None, None, HEAD_EVERY)
        score.add(log_p, targets, logits)
        if has_head_for_one:
            head_of_several.add(log_p[some], targets[some], logits[some])
            head_of_one.add(log_p[some], targets[some], torch.cat([head(one[None]) for one in state[some]]))
    if not has_head_for_one:
        return score.figures
    return replace(score.figures, head=head_of_one.figures.perplexity / head_of_several.figures.perplexity)


def write_reference(cache: Path, tokens: torch.Tensor) -> None:
    """The decoder's states in fp32 before its output head, and that."""
    if not (path := reference_path(cache, tokens)).exists():
        model = load_model(cache, Case("plain", "fp32"))
        with torch.inference_mode():
            states = states_at_once(model, tokens)
        np.save(cache / "head.npy", model.lm_head.weight.detach().numpy())
        np.save(path, states.numpy())


def reference_path(cache: Path, tokens: torch.Tensor) -> Path:
    return cache / f"reference-{len(tokens)}x{tokens.shape[1]}-{PROMPT}.npy"


def fp32_head(cache: Path) -> Head:
    weight = torch.from_numpy(np.load(cache / "head.npy", mmap_mode="c"))
    return lambda x: x @ weight.t()


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
        features = compiler._features(compiler.supported_isas()[0])
        compiler._features = lambda isa: features
    compiler._host_isas = lambda: ((isa,), "")


def states_at_once(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """[windows, steps, hidden_size], a window at a time, by transformers."""
    decoder = model.get_decoder()
    return torch.cat([decoder(input_ids=window[None]).last_hidden_state[:, STEPS] for window in tokens])


def states_one_by_one(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The same as we decode: prompts first, then a token of each of many windows at a time."""
    from llava_cli.engine.kv_cache import RoomyCache

    decoder, embed, parts = model.get_decoder(), model.get_input_embeddings(), []
    for part in tokens.split(ROWS):
        kv_cache, states = RoomyCache(), []
        for new in part[:, : WINDOW - 1].split([PROMPT, *[1] * (WINDOW - 1 - PROMPT)], dim=1):
            output = decoder(inputs_embeds=embed(new), past_key_values=kv_cache, use_cache=True)
            states.append(output.last_hidden_state[:, -1:])
        parts.append(torch.cat(states, 1))
    return torch.cat(parts)


def states_of_llama(cache: Path, precision: str, tokens: torch.Tensor) -> torch.Tensor:
    import xllamacpp  # type: ignore[import-untyped]

    params = xllamacpp.CommonParams()
    params.model.path = str(made(cache / f"{precision}.gguf", lambda part: write_gguf(cache, precision, part)))
    params.embedding, params.embd_normalize = True, -1
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
    params.n_ctx = params.n_batch = params.n_ubatch = WINDOW
    params.n_parallel, params.verbosity = 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server, windows = xllamacpp.Server(params), []
    for window in tokens:
        # Not `handle_embeddings`, which answers in OpenAI's format, where a text has one vector.
        body = json.dumps({"content": window.tolist(), "embd_normalize": -1}).encode()
        request = Request(f"{server.listening_address}/embedding", body, {"Content-Type": "application/json"})
        with urlopen(request) as answer:
            windows.append(torch.tensor(json.load(answer)[0]["embedding"])[STEPS])
    return torch.stack(windows)


def run(cache: Path, case: Case, tokens: torch.Tensor) -> Figures:
    reference = Reference(cache, tokens)
    if case.who == "llama.cpp":
        states = states_of_llama(cache, case.precision, tokens)
        return score(states, fp32_head(cache), reference, has_head_for_one=False)
    model, is_ours = load_model(cache, case), case.who == "ours"
    states = (states_one_by_one if is_ours else states_at_once)(model, tokens)
    return score(states, model.lm_head, reference, has_head_for_one=is_ours)


def cases() -> Iterator[Case]:
    """In the order of the table. CPUs with AVX2 alone have no bf16, so models compute in fp32 there."""
    isas = isa_names()
    yield from (Case(who, precision) for precision in ("fp32", "bf16") for who in ("plain", "ours"))
    for precision in ("8bit", "4bit"):
        for compute in ("bf16", "fp32"):
            yield Case("plain", precision, compute)
            kernels = [isa for isa in isas if isa == "avx512vnni" or compute == "fp32"]
            if precision == "8bit":  # whose integers are the same with all of them
                kernels = [isa for isa in kernels if isa != "avxvnni"]
            yield from (Case("ours", precision, compute, isa) for isa in kernels)
    yield from (Case("llama.cpp", precision) for precision in ("Q8_0", "Q4_0"))


def measure(cache: Path, case: Case, tokens: torch.Tensor) -> None:
    """In a process of its own: prints the figures as JSON."""
    with torch.inference_mode():
        print(json.dumps(asdict(run(cache, case, tokens))), flush=True)


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
    parser.add_argument("--only", default="", help="a regular expression for the names of cases")
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
        if re.search(args.only, case.name):
            figures = run_measurement(args.cache, case, args.windows)
            plain.setdefault((case.precision, case.compute), figures)
            print(figures.row(case.name, plain[case.precision, case.compute]), flush=True)


if __name__ == "__main__":
    main()
