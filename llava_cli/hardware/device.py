"""Which device, precision and attention suit this machine."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from llava_cli.errors import UsageError
from llava_cli.hardware import cpu
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
    """Turns "auto" into what is best here if the memory suffices; for a CPU that is named without importing torch.

    Raises `UsageError` for a device that does not exist, or a precision that lacks its library.
    """
    device = _existing_device(device)
    if precision == "auto":
        chosen, why = native_precision(device)
    else:
        chosen, why = precision, "as asked"
        if precision in QUANTIZED and not can_quantize():
            raise UsageError(f"--precision {precision}", "bitsandbytes is missing", INSTALL_BITSANDBYTES)
    return Plan(device, chosen, _attention(device, chosen), why)


INSTALL_BITSANDBYTES = "pip install bitsandbytes"
_GPU_DRIVERS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Where Linux shows that there is a driver of a GPU that torch may use: NVIDIA's, Windows' beneath it, AMD's."""


def can_quantize() -> bool:
    """Whether the library is installed that makes 8 and 4 bits of weights; our kernels multiply what it makes."""
    return importlib.util.find_spec("bitsandbytes") is not None


def likely_device() -> Device:
    """`auto` where there may be a GPU, else `cpu`: a list of names need not wait for torch to find none."""
    return "auto" if sys.platform != "linux" or any(Path(path).exists() for path in _GPU_DRIVERS) else "cpu"


def _existing_device(device: Device) -> Device:
    if device == "cpu":
        return device
    import torch

    available: dict[Device, bool] = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        return next(name for name, is_available in available.items() if is_available)
    if not available[device]:
        raise UsageError(f"--device {device}", "this machine has none", "llava doctor shows what it has")
    return device


def native_precision(device: str) -> tuple[str, str]:
    """The 16 or 32 bits in which a device is fast and exact enough, and why; quantized models compute in them, too."""
    if device == "cpu":  # never fp16: CPUs emulate it, twenty times slower than bf16 or fp32
        if cpu.has_bf16():
            return "bf16", "this CPU has bf16 instructions"
        return "fp32", "this CPU has no bf16 instructions"
    if device == "mps":
        return "fp16", "fp16 is what Apple GPUs are fastest at"
    import torch

    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "this GPU computes in bf16"
    return "fp16", "this GPU has no bf16"


def _attention(device: str, precision: str) -> str:
    """FlashAttention 2 where it is installed and the GPU (Ampere or later) has it, else torch's own."""
    if device != "cuda" or precision == "fp32":
        return "sdpa"
    import torch
    from transformers.utils.import_utils import is_flash_attn_2_available

    if torch.cuda.get_device_capability() >= (8, 0):
        return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    return "sdpa"
