"""Checks layers that a checkpoint stores in 4 or 8 bits: does each have as many bytes, scales and codes as are read?

Their packed weights have no shape that transformers could compare with a config, and the kernels, bitsandbytes' and
ours, read as many scales as a layer's shape implies. So nothing else would notice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights that share a scale, or scales that share one: the sizes that bitsandbytes has kernels for."""
CODES = 16
"""Values that 4 bits can stand for."""
NESTED_CODES = 256
"""Values that a scale in 8 bits can stand for."""
_PACKED_ROWS = 32
"""bitsandbytes' arrangement for a CPU has whole groups of so many rows."""


def misfit(model: Any) -> str | None:
    """What is wrong with the first layer that does not have what its shape needs; None where all have."""
    checks = {"Linear4bit": _problems_in_4_bits, "Linear8bitLt": _problems_in_8_bits}
    for name, layer in model.named_modules():
        if check := checks.get(type(layer).__name__):
            for problem in check(layer):
                return f"{name} {problem}"
    return None


def leave_unpacked(model: Any) -> None:
    """Keeps bitsandbytes from rearranging 4-bit layers for a CPU where rows or columns do not fill its arrangement.

    That would fail in the first forward pass: SigLIP's layers have 4304 columns, 67 blocks of 64 and a quarter.
    Without it bitsandbytes is slower.
    """
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit":
            partial_block = layer.in_features % layer.weight.quant_state.blocksize
            if partial_block or layer.out_features % _PACKED_ROWS:
                layer.support_avx512bf16_for_cpu = False


def _problems_in_4_bits(layer: Any) -> Iterator[str]:
    import torch

    weight, state = layer.weight.data, getattr(layer.weight, "quant_state", None)
    if state is None:
        yield "is not stored in 4 bits"
        return
    size = layer.in_features * layer.out_features
    if list(state.shape or ()) != [layer.out_features, layer.in_features]:
        yield f"is stored with another shape than [{layer.out_features}, {layer.in_features}]"
    elif weight.nbytes != -(-size // 2) or not weight.is_contiguous():
        yield f"has {weight.nbytes:,} bytes of weights, and not {-(-size // 2):,}"
    elif state.quant_type not in ("nf4", "fp4") or state.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        yield "is quantized to numbers that are not known"
    elif not _is_block_size(state.blocksize):
        yield "has blocks of a size that is not known"
    else:
        yield from _list_problems(state.code, "codes", torch.float32, CODES)
        yield from _scale_problems(state, -(-size // state.blocksize))


def _scale_problems(state: Any, blocks: int) -> Iterator[str]:
    """The scales of blocks of weights may be quantized themselves."""
    import torch

    if not state.nested:
        yield from _list_problems(state.absmax, "scales", torch.float32, blocks)
    elif state.state2.nested or state.state2.dtype != torch.float32 or not _is_block_size(state.state2.blocksize):
        yield "has scales that are quantized in a way that is not known"
    else:
        yield from _list_problems(state.absmax, "scales", torch.uint8, blocks)
        yield from _list_problems(state.state2.code, "codes of scales", torch.float32, NESTED_CODES)
        yield from _list_problems(
            state.state2.absmax, "scales of scales", torch.float32, -(-blocks // state.state2.blocksize)
        )
        yield from _list_problems(state.offset, "offsets of scales", torch.float32, 1)


def _problems_in_8_bits(layer: Any) -> Iterator[str]:
    import torch

    weight, scales = layer.weight.data, getattr(layer.weight, "SCB", None)
    if scales is None:
        yield "is not stored in 8 bits"
    elif weight.shape != (layer.out_features, layer.in_features) or weight.dtype != torch.int8:
        yield f"is stored with another shape than [{layer.out_features}, {layer.in_features}] in 8 bits"
    elif not weight.is_contiguous():
        yield "is not stored row by row"
    else:
        yield from _list_problems(scales, "scales", torch.float32, layer.out_features)


def _list_problems(tensor: Any, what: str, dtype: torch.dtype, count: int) -> Iterator[str]:
    """What is wrong with a tensor that should be a list of `count` numbers of a dtype."""
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tensor.ndim > 1 or not tensor.is_contiguous():
        yield f"has {what} that are no {str(dtype).removeprefix('torch.')}"
    elif tensor.numel() != count:
        yield f"has {tensor.numel():,} {what}, and not {count:,}"


def _is_block_size(size: Any) -> bool:
    return type(size) is int and size in BLOCK_SIZES
