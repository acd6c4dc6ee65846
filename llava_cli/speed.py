"""How long a model's answer takes here: a guess from its sizes, and from what half a second of measuring has found.

The measurement is kept in the user's cache, and is repeated when something changes that it depends on.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from llava_cli import cache_files, limits
from llava_cli._version import __version__
from llava_cli.bounded_json import Bounds, loads
from llava_cli.hardware import cpu
from llava_cli.hardware.device import Plan, choose_plan
from llava_cli.loader import cpu_wing, has_cpu_wing
from llava_cli.models.footprint import BYTES, Sizes, footprint
from llava_cli.models.precision import best_fit, candidates
from llava_cli.models.quiet import quiet
from llava_cli.paths import speed_file
from llava_cli.settings import QUANTIZED

if TYPE_CHECKING:
    import torch

IN_FEATURES = 2048
_TOKENS, _PROMPT_ROWS = 256, 2048
"""The product that stands for a prompt's: long enough that weights count as they do in 600 tokens."""
_ANSWER_BYTES = 64 << 20
"""Weights that stand for an answer's: more than fit in a processor's cache."""
_CALLS, _SECONDS = 3, 0.05
"""How often each layer is called, and for how long, at least. The fastest call counts: all else here slows it down."""
_TEXT_TOKENS = 40
"""Of a question, and of the format around it."""
_OTHER_WORK = 1.2
"""How much longer a pass takes than its matrix products: attention, norms, activation functions."""

_PREPARATION_SECONDS, _STEP_SECONDS = 0.04, 0.0008
"""What the built-in model takes, whose products take no time: for picture and prompt, and for a token."""


@dataclass(frozen=True)
class Speed:
    """Weights that are multiplied in a second."""

    prompt: float
    """Times the tokens that each is multiplied with."""
    answer: float
    """By one token, which takes as long as reading them."""


Speeds = dict[str, Speed]
"""By precision; those that `auto` may take on this machine's CPU."""


@dataclass(frozen=True)
class Outlook:
    """What to expect of a model here."""

    precision: str | None
    """That `auto` takes; None where the model does not fit."""
    memory: int
    """Bytes, in that precision or in the smallest one."""
    first_token_seconds: float | None = None
    """For one photo; None where it is not known: on a GPU, or for a model whose tokens are not."""
    tokens_per_second: float | None = None


def outlook(sizes: Sizes, plans: Sequence[Plan], free: int, speeds: Speeds) -> Outlook:
    """What to expect of a model for which `auto` takes the first of `plans` that fits into `free` bytes."""
    fitting = best_fit(sizes, plans, free)
    memory = footprint(sizes, fitting or plans[-1]).total
    if fitting is None:
        return Outlook(None, memory)
    return Outlook(fitting.precision, memory, *wait(sizes, fitting, speeds))


def wait(sizes: Sizes, plan: Plan, speeds: Speeds) -> tuple[float | None, float | None]:
    """Seconds to the first token of an answer about one photo, and tokens per second; None where they are not known."""
    geometry, picture = sizes.geometry, sizes.picture
    layers, rest = speeds.get(plan.precision), speeds.get(plan.compute_precision)
    patches = (picture.patches or geometry.patches * picture.crops) if picture else 0
    if plan.device != "cpu" or not picture or not patches or not layers or not rest:
        return None, None
    vision = speeds["8bit"] if sizes.packs_vision(plan) else rest
    tokens = picture.tokens + _TEXT_TOKENS
    prompt = geometry.inner * tokens / layers.prompt
    prompt += geometry.vision * patches / vision.prompt
    # A token also reads the keys and values of all before it.
    token = (geometry.inner + geometry.head) / layers.answer + geometry.cache * tokens / rest.answer
    return _PREPARATION_SECONDS + prompt * _OTHER_WORK, 1 / (_STEP_SECONDS + token * _OTHER_WORK)


def duration(seconds: float) -> str:
    """In words, a tenth of a second at least: "0.4 s", "25 s", "3 min", "5.2 h", "12 days"."""
    for unit, size in (("days", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} min" if unit == "min" else f"{rate(seconds / size)} {unit}"
    return f"{rate(max(seconds, 0.1))} s"


def rate(number: float) -> str:
    return f"{number:.1f}" if number < 10 else f"{number:.0f}"


def describe(speeds: Speeds) -> str:
    """What was measured, in a line: of a prompt's products how many, and of an answer's weights how much is read."""
    return "; ".join(
        f"{name} {2 * speed.prompt / 1e9:.0f} GOP/s, {speed.answer * BYTES[name] / 1e9:.0f} GB/s"
        for name, speed in speeds.items()
    )


def speeds() -> Speeds:
    """How fast this machine's CPU is, measured now unless that is known. Only measuring imports torch.

    What is measured beside much other work is not kept.
    """
    key = _key()
    if (kept := _read(key)) is None:
        kept = measure()
        if not _is_busy():
            content = {"key": key, "speeds": {name: asdict(speed) for name, speed in kept.items()}}
            with suppress(OSError):  # without space for it the next command measures again
                cache_files.atomic_write(speed_file(), [json.dumps(content).encode()])
    return kept


def _is_busy() -> bool:
    """Whether other work has kept this machine from measuring itself, which a later command does instead."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1)


def _key() -> list[Any]:
    """What a measurement depends on."""
    variables = [os.environ.get(name, "") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")]
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kernels = has_cpu_wing(choose_plan("cpu", "auto"))
    packages = [_version(package) for package in ("torch", "llvmlite", "bitsandbytes")]
    return [__version__, cpu.cpu_model(), sorted(cpu.cpu_features()), threads, variables, kernels, packages]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _read(key: list[Any]) -> Speeds | None:
    """What was measured under this key; None where nothing was, or the file is damaged or may be another user's."""
    bounds = Bounds(limits.SETTINGS_BYTES, limits.JSON_DEPTH, limits.JSON_ITEMS)
    try:
        content = loads(cache_files.read(speed_file(), bounds.bytes), bounds)
        if content["key"] != key:
            return None
        kept = {
            name: Speed(float(speed["prompt"]), float(speed["answer"])) for name, speed in content["speeds"].items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return kept if all(0 < rate < math.inf for speed in kept.values() for rate in asdict(speed).values()) else None


def measure(plan: Plan | None = None) -> Speeds:
    """Multiplies layers by many tokens and by one: of each precision that `auto` may take on the CPU, and of `plan`."""
    import torch

    from llava_cli.models.weights import nothing_is_fetched

    plans = [*candidates(choose_plan("cpu", "auto")), *([plan] if plan else [])]
    with torch.inference_mode(), quiet(), nothing_is_fetched():
        return {one.precision: _measure(one) for one in plans}


def _measure(plan: Plan) -> Speed:
    import torch

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[plan.compute_precision]
    many, one = (torch.ones(tokens, IN_FEATURES, dtype=dtype) for tokens in (_TOKENS, 1))
    rows = int(_ANSWER_BYTES / BYTES[plan.precision] / IN_FEATURES) // 64 * 64
    prompt = _layer(plan, dtype, _PROMPT_ROWS)
    # bitsandbytes spends its time on turning weights into numbers, wherever they are, and as much on making them.
    answer, rows = (prompt, _PROMPT_ROWS) if _is_slow_to_make(prompt) else (_layer(plan, dtype, rows), rows)
    return Speed(
        _PROMPT_ROWS * IN_FEATURES * _TOKENS / min(_seconds(prompt, many)),
        rows * IN_FEATURES / min(_seconds(answer, one)),
    )


def _is_slow_to_make(layer: object) -> bool:
    return type(layer).__module__.startswith("bitsandbytes")


def _layer(plan: Plan, dtype: torch.dtype, out_features: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A layer as this machine would compute it: by our kernels, by torch or by bitsandbytes."""
    import torch

    if (wing := cpu_wing(plan)) and (layer := wing.sample_layer(plan.precision, dtype, out_features, IN_FEATURES)):
        return layer  # type: ignore[no-any-return]
    weight = torch.full((out_features, IN_FEATURES), 0.01, dtype=dtype)
    if plan.precision not in QUANTIZED:
        return partial(torch.nn.functional.linear, weight=weight)
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    options: dict[str, Any] = {"bias": False, "device": "cpu"}
    if plan.precision == "8bit":
        quantized: Any = Linear8bitLt(IN_FEATURES, out_features, has_fp16_weights=False, **options)
    else:
        quantized = Linear4bit(IN_FEATURES, out_features, compute_dtype=dtype, quant_type="nf4", **options)
    quantized.load_state_dict({"weight": weight})
    return quantized.to("cpu")  # type: ignore[no-any-return]


def _seconds(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Iterator[float]:
    """How long each of some calls takes, after one that allocates and compiles what it needs."""
    layer(x)
    end, calls = time.perf_counter() + _SECONDS, 0
    while calls < _CALLS or time.perf_counter() < end:
        begin = time.perf_counter()
        layer(x)
        yield time.perf_counter() - begin
        calls += 1
