"""Which device, precision and attention suit this machine."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from llava_cli.errors import UsageError
from llava_cli.hardware import cpu
from llava_cli.settings import QUANTIZED, Attention, Device, Precision


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


def choose_plan(device: Device, precision: Precision, attention: Attention = "auto") -> Plan:
    """Turns "auto" into what is best here if the memory suffices; for a CPU that is named without importing torch.

    Raises `UsageError` for a device that does not exist, or a precision or attention that lacks its library.
    """
    device = _existing_device(device)
    if precision == "auto":
        chosen, why = native_precision(device)
    else:
        chosen, why = precision, "as asked"
        if precision in QUANTIZED and not can_quantize():
            raise UsageError(f"--precision {precision}", "bitsandbytes is missing", INSTALL_BITSANDBYTES)
    return Plan(device, chosen, _flash_attention(device, chosen) if attention == "flash" else "sdpa", why)


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


def _flash_attention(device: str, precision: str) -> str:
    """transformers' name for FlashAttention 2. Raises `UsageError` where it cannot be had.

    Prompts are read no faster with it than by torch's own, which has the same kernel; and for a batch's padded rows it
    copies all keys and values for each token.
    """
    option, hint = "--attention flash", "--attention sdpa is torch's own"
    if device != "cuda":
        raise UsageError(option, "only NVIDIA's GPUs have it", hint)
    if precision == "fp32":
        raise UsageError(option, "it computes in 16 bits, and not in fp32", hint)
    import torch
    from transformers.utils.import_utils import is_flash_attn_2_available

    if torch.cuda.get_device_capability() < (8, 0):
        raise UsageError(option, "this GPU is older than Ampere, and lacks it", hint)
    if not is_flash_attn_2_available():
        raise UsageError(option, "flash-attn is not installed", "pip install flash-attn")
    return "flash_attention_2"
