"""What `llava doctor` finds out: what this machine can do, and whether a checkpoint works on it as in transformers."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_cli.catalog import sizes_on_disk
from llava_cli.conversation import Conversation, Picture
from llava_cli.engine.generate.generation_config import summary
from llava_cli.errors import LlavaError, model_errors
from llava_cli.hardware.device import Plan
from llava_cli.images.sandbox import Sandbox
from llava_cli.loader import cpu_wing, find_checkpoint, load_engine
from llava_cli.models.checkpoint_files import CONFIG, read_json
from llava_cli.models.footprint import Sizes, footprint
from llava_cli.models.precision import candidates, gigabytes
from llava_cli.models.registry import BUILTIN
from llava_cli.models.validate import check_files
from llava_cli.models.weight_files import check_weights
from llava_cli.prompts.processor import image_token_id
from llava_cli.sandbox.confine import LAYERS
from llava_cli.settings import LoadOptions, Sampling, is_fast
from llava_cli.speed import describe, duration, rate, speeds, wait
from llava_cli.untrusted_text import one_line

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.local import LocalEngine

BOUNDS = {"fp32": 1e-3, "bf16": 0.06, "fp16": 0.03, "8bit": 0.1, "4bit": 0.2}
"""How far logits may be from transformers' own, as a share of their norm: what rounding alone can do."""

_COPIED = 1 << 30
"""Bytes that a measuring copy reads and writes."""


def machine_facts(options: LoadOptions) -> dict[str, str]:
    """What this machine is and has, and how a model would be run on it."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import psutil
    import torch

    from llava_cli.hardware.device import choose_plan
    from llava_cli.hardware.memory import free_memory
    from llava_cli.models.registry import default_name, find
    from llava_cli.models.weights import load_config

    builtin = find(BUILTIN)
    plan, memory = choose_plan(options.device, options.precision, options.attention), psutil.virtual_memory()
    facts = {
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cpu": f"{psutil.cpu_count(logical=False) or psutil.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "memory": f"{memory.total / 1e9:.1f} GB, {free_memory('cpu') / 1e9:.1f} GB free",
    }
    for i in range(torch.cuda.device_count()):
        facts[f"gpu {i}"] = _card(i)
    if options.precision == "auto":
        others = " or ".join(one.precision for one in candidates(plan)[1:])
        plan = replace(plan, why=f"{plan.why}; {others} where that does not fit" if others else plan.why)
    facts |= {"device": plan.device, "precision": f"{plan.precision} ({plan.why})", "attention": plan.attention}
    facts["cpu kernels"] = _cpu_kernels(plan, load_config(builtin, read_json(builtin, CONFIG)))
    if plan.device == "cpu":
        facts["speed"] = describe(speeds())
    facts["picture sandbox"] = _sandbox()
    facts["default model"] = default_name(options)
    for package in ("torch", "transformers", "bitsandbytes", "accelerate", "llvmlite", "pillow"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "missing"
    return facts


def _card(index: int) -> str:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
    words = f"{torch.cuda.get_device_name(index)}, compute capability {capability}, {total / 1e9:.1f} GB"
    rate = copy_rate(torch.device("cuda", index)) / 1e9 if free > 2 * _COPIED else 0
    return f"{words}, {free / 1e9:.1f} GB free" + (f", copies at {rate:,.0f} GB/s" if rate else "")


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a device reads and writes, from a few copies: what decoding is bound by."""
    import torch

    source = torch.empty(_COPIED // 2, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), math.inf
    for _ in range(5):
        begin = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return _COPIED / best


def _cpu_kernels(plan: Plan, config: Any) -> str:
    """The compiled kernels that a model with this config uses: "avx2, 9 compiled", or "none" and why."""
    if wing := cpu_wing(plan):
        return str(wing.describe_kernels(config, plan))
    if plan.device != "cpu":
        return f"none: the model runs on {plan.device}"
    return "none: not installed" if is_fast() else "none: LLAVA_FAST=0"


def _sandbox() -> str:
    """Which layers of the sandbox for decoding pictures this system provides."""
    sandbox = Sandbox()
    try:
        layers = sandbox.layers()
    except LlavaError as error:
        return f"{error.reason}: no picture can be opened"
    finally:
        sandbox.end()
    if missing := [name for name in LAYERS if name not in layers]:
        return f"{', '.join(layers) or 'a process of its own'}; this system has no {', '.join(missing)}"
    return f"no files, no network, no processes ({', '.join(layers)})"


class Check(NamedTuple):
    """One thing that was looked at."""

    name: str
    good: bool
    words: str


def checkup(options: LoadOptions) -> Iterator[Check]:
    """Each check as it is done; the first that makes the next ones impossible is the last."""
    try:
        checkpoint = find_checkpoint(options)
        kind, weights = check_files(checkpoint)[CONFIG]["model_type"], check_weights(checkpoint)
        size = sum(path.stat().st_size for path in weights) / 1e9
        yield Check("files", True, f"{kind}, {len(weights)} weight file(s), {size:.2f} GB, whole")
        notes: list[str] = []
        engine = load_engine(options, notes.append, notes.append)
        about_checkpoint = f"llava: {checkpoint.name}: "
        for note in notes:
            if note.startswith(about_checkpoint):
                yield Check("note", True, note.removeprefix(about_checkpoint))
        yield Check(
            "family", True, engine.family.name if engine.family else "not known; what it was trained with neither"
        )
    except LlavaError as error:
        yield Check("load", False, f"{error}; {error.hint}" if error.hint else str(error))
        return
    precision = _stored_precision if weights.are_quantized else _precision
    for name, look in (
        ("tokenizer", _tokenizer),
        ("template", _template),
        ("generation", _generation),
        ("end tokens", _end_tokens),
        ("image tokens", _image_tokens),
        ("precision", precision),
        ("memory", partial(_memory, sizes=sizes_on_disk(checkpoint))),
        ("cpu kernels", _kernels),
        ("forward pass", _forward),
        ("answer", _answer),
    ):
        try:
            with model_errors(engine.model, "fails"):  # whatever a damaged or unusual checkpoint makes of it
                good, words = look(engine)
        except LlavaError as error:
            good, words = False, error.reason
        yield Check(name, good, words)


def _talk() -> Conversation:
    """A question about a picture that is not square and of no one color."""
    from PIL import Image

    image = Image.linear_gradient("L").resize((320, 200)).convert("RGB")
    image.paste("red", (20, 60, 120, 160))
    return Conversation().ask("what is this?", [Picture("a red square", image, sha256="")])


def _tokenizer(engine: LocalEngine) -> tuple[bool, str]:
    """What was found when it was loaded; one that is wrong is refused there."""
    return True, engine.prompter.tokenizer_origin


def _template(engine: LocalEngine) -> tuple[bool, str]:
    talk = _talk()
    first = engine.prompt(talk)
    if engine.family and engine.family.turns == "one":
        return "what is this?" in first, f"its one turn renders: {engine.prompter.template_origin}"
    later = engine.prompt(talk.answered("a square").ask("what color?"))
    words = f"one turn and two render: {engine.prompter.template_origin}"
    return first != later and "what is this?" in first and "what color?" in later, words


def _image_tokens(engine: LocalEngine) -> tuple[bool, str]:
    inputs = engine.inputs(_talk())
    _, tokens = engine.prompter.count(inputs)
    known, image = image_token_id(engine.prompter.processor), getattr(engine.network.config, "image_token_id", None)
    word = engine.prompter.tokenizer.convert_ids_to_tokens(known)
    if not hasattr(engine.network, "get_image_features"):  # of Mllama, whose decoder attends to pictures elsewhere
        return tokens > 0 and image == known, f"{tokens} in the prompt; {word!r} is token {known}"
    features = _features(engine.network, inputs)
    words = f"{tokens} in the prompt, {features} features from the vision tower"
    if image is not None:
        words += f"; {word!r} is token {known}"
    if image not in (None, known):
        words += f", and {image} by config.json"
    return tokens == features > 0 and image in (None, known), words


def _features(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    """How many feature vectors the model makes of the pictures."""
    import torch

    takes = signature(model.get_image_features).parameters
    with torch.inference_mode():
        out = model.get_image_features(**{name: value for name, value in inputs.items() if name in takes})
    found = getattr(out, "pooler_output", out)
    parts = found if isinstance(found, (list, tuple)) else [found]
    return sum(part.numel() // part.shape[-1] for part in parts)


def _generation(engine: LocalEngine) -> tuple[bool, str]:
    return True, summary(engine.network.generation_config)


def _end_tokens(engine: LocalEngine) -> tuple[bool, str]:
    tokenizer = engine.prompter.tokenizer
    ends = {token: tokenizer.convert_ids_to_tokens(token) for token in sorted(engine.end_tokens)}
    words = ", ".join(f"{token} {one_line(str(word))}" for token, word in ends.items())
    return bool(ends), words or "none: answers end at --max-tokens"


def _stored_precision(engine: LocalEngine) -> tuple[bool, str]:
    """Of weights that are stored quantized: which layers are is their author's choice, down to the vision tower's."""
    counts = Counter(type(layer).__name__ for layer in engine.network.modules())
    right = counts[_KINDS[engine.precision]]
    wrong = sum(counts[kind] for kind in _KINDS.values()) - right
    return right > 0 == wrong, f"{right} layers are stored in {engine.precision}"


_KINDS = {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}
"""bitsandbytes' layers, by the names of their classes."""


def _precision(engine: LocalEngine) -> tuple[bool, str]:
    import torch

    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    wanted, model = _KINDS.get(engine.precision), engine.network
    quantised = [name for name, layer in model.named_modules() if type(layer).__name__ in _KINDS.values()]
    if not wanted:
        plain = {p.dtype for p in model.parameters()} == {dtypes.get(engine.precision)}
        return plain and not quantised, f"all weights are {engine.precision}"
    inner = {id(layer) for layer in model.get_decoder().modules()} - {id(model.get_output_embeddings())}
    right = all(
        type(model.get_submodule(name)).__name__ == wanted and id(model.get_submodule(name)) in inner
        for name in quantised
    )
    others = next(model.get_output_embeddings().parameters()).dtype.itemsize * 8
    words = f"{len(quantised)} layers of the language model in {engine.precision}; the others in {others} bits"
    return bool(quantised) and right, words


def _memory(engine: LocalEngine, sizes: Sizes | None) -> tuple[bool, str]:
    """What a model takes here and how long an answer should take; the line `answer` says how long one took."""
    if sizes is None:
        return True, "not known"
    plan = _plan(engine)
    words = f"takes {gigabytes(footprint(sizes, plan).total)} beside a photo"
    seconds, per_second = wait(sizes, plan, speeds() if plan.device == "cpu" else {})
    if seconds is not None and per_second is not None:
        words += f"; about {duration(seconds)} to the first token of an answer, then {rate(per_second)} tokens/s"
    return True, words


def _kernels(engine: LocalEngine) -> tuple[bool, str]:
    """Without kernels a model is slower, not wrong."""
    return True, _cpu_kernels(_plan(engine), engine.network.config)


def _plan(engine: LocalEngine) -> Plan:
    return Plan(engine.device, engine.precision, attention="", why="")


def _forward(engine: LocalEngine) -> tuple[bool, str]:
    import torch

    inputs, model = engine.inputs(_talk()), engine.network
    ours = engine.logits(inputs).float()
    with torch.inference_mode(), engine.patch.undone():
        theirs = model(**inputs, logits_to_keep=1).logits[:, -1].float()
    far, bound = float((ours - theirs).norm() / theirs.norm()), BOUNDS[engine.precision]
    return far <= bound, f"logits are {far:.2%} of their norm from transformers' ({bound:.1%} at most)"


def _answer(engine: LocalEngine) -> tuple[bool, str]:
    answer = engine.answer(_talk(), Sampling(max_tokens=16))
    words = f"{answer.text!r}, first token after {answer.first_token_seconds:.2f} s"
    return bool(answer.text), f"{words}; {engine.decoding}" if engine.decoding else words
