"""Which device, precision and attention suit this machine."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from llava_cli.errors import UsageError
from llava_cli.settings import QUANTIZED, Device, Precision


@dataclass(frozen=True)
class Plan:
    """How a model is run here, and why its precision was chosen."""

    device: str
    precision: str
    attention: str
    why: str

    @property
    def compute_precision(self) -> str:
        """What activations are in: the model's precision, or that in which a quantized one computes."""
        return native_precision(self.device)[0] if self.precision in QUANTIZED else self.precision


def choose_plan(device: Device, precision: Precision) -> Plan:
    """Turns "auto" into what is best here. Raises `UsageError` for a device that does not exist."""
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    available: dict[Device, bool] = {"cuda": cuda, "mps": mps, "cpu": True}
    if device == "auto":
        device = next(name for name, is_available in available.items() if is_available)
    elif not available[device]:
        raise UsageError(f"--device {device}", "this machine has none", "llava doctor shows what it has")
    if precision == "auto":
        chosen, why = native_precision(device)
    else:
        chosen, why = precision, "as asked"
        if precision in QUANTIZED and importlib.util.find_spec("bitsandbytes") is None:
            raise UsageError(f"--precision {precision}", "bitsandbytes is missing", "pip install bitsandbytes")
    return Plan(device, chosen, _attention(device, chosen), why)


def native_precision(device: str) -> tuple[str, str]:
    """The 16 or 32 bits in which a device is fast and exact enough, and why; quantized models compute in them, too."""
    import torch

    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU computes in bf16"
        return "fp16", "this GPU has no bf16"
    if device == "mps":
        return "fp16", "fp16 is what Apple GPUs are fastest at"
    # Never fp16 here: CPUs emulate it, twenty times slower than bf16 or fp32.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if any(getattr(torch.cpu, check, bool)() for check in checks) or _arm_has_bf16():
        return "bf16", "this CPU has bf16 instructions"
    return "fp32", "this CPU has no bf16 instructions"


def _arm_has_bf16() -> bool:
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
