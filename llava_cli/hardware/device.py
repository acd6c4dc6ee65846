"""What this machine is, and what suits it: device, precision, attention."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from llava_cli.errors import LlavaError, UsageError
from llava_cli.hardware.memory import free_memory
from llava_cli.images.sandbox import Sandbox
from llava_cli.sandbox.confine import LAYERS
from llava_cli.settings import QUANTISED, Device, Precision, Settings


@dataclass(frozen=True)
class Plan:
    """How a model will be run here, and why."""

    device: str
    precision: str
    attention: str
    why: str


def plan(device: Device, precision: Precision) -> Plan:
    """Turns "auto" into what is best here. Raises `UsageError` for a device that is not there."""
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    here: dict[Device, bool] = {"cuda": cuda, "mps": mps, "cpu": True}
    if device == "auto":
        device = next(name for name, there in here.items() if there)
    elif not here[device]:
        raise UsageError(f"--device {device}", "this machine has none", "llava doctor shows what it has")
    if precision == "auto":
        chosen, why = native(device)
    else:
        chosen, why = precision, "as asked"
        if precision in QUANTISED and importlib.util.find_spec("bitsandbytes") is None:
            raise UsageError(f"--precision {precision}", "bitsandbytes is missing", "pip install bitsandbytes")
    return Plan(device, chosen, _attention(device, chosen), why)


def native(device: str) -> tuple[str, str]:
    """The 16 or 32 bits that a device is fast and exact enough in, and why: what quantised models compute in too."""
    import torch

    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU computes in bf16"
        return "fp16", "this GPU has no bf16"
    if device == "mps":
        return "fp16", "fp16 is what Apple GPUs are fastest at"
    # Never fp16 here: CPUs emulate it, twenty times slower than bf16 or fp32.
    asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if any(getattr(torch.cpu, ask, bool)() for ask in asks) or _arm_bf16():
        return "bf16", "this CPU has bf16 instructions"
    return "fp32", "this CPU has no bf16 instructions"


def _arm_bf16() -> bool:
    try:
        return " bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _attention(device: str, precision: str) -> str:
    """FlashAttention 2 where it is installed and the GPU (Ampere or later) has it, else torch's own."""
    import torch
    from transformers.utils.import_utils import is_flash_attn_2_available

    if device == "cuda" and precision != "fp32" and torch.cuda.get_device_capability() >= (8, 0):
        return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    return "sdpa"


def _sandbox() -> str:
    """What this system gives of the sandbox that pictures are decoded in."""
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


def report(settings: Settings) -> dict[str, str]:
    """What `llava doctor` prints."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import psutil
    import torch

    from llava_cli.models.registry import default_name

    how = plan(settings.device, settings.precision)
    memory = psutil.virtual_memory()
    found = {
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cpu": f"{psutil.cpu_count(logical=False) or psutil.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "memory": f"{memory.total / 1e9:.1f} GB, {free_memory('cpu') / 1e9:.1f} GB free",
    }
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        found[f"gpu {i}"] = f"{torch.cuda.get_device_name(i)}, {total / 1e9:.1f} GB, {free / 1e9:.1f} GB free"
    found |= {"device": how.device, "precision": f"{how.precision} ({how.why})", "attention": how.attention}
    found["picture sandbox"] = _sandbox()
    found["default model"] = default_name(settings)
    for package in ("torch", "transformers", "bitsandbytes", "accelerate", "llvmlite", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found
