"""Layers that a checkpoint stores in 4 or 8 bits: is there of everything as much as their products read?

Their weights are no matrices that transformers could compare with a config. Nobody else looks either: the kernels of
bitsandbytes, and ours, read as many scales as a layer's shape says that there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llava_cli.engine.cpu.jit import CODES

if TYPE_CHECKING:
    import torch

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Of weights that share a scale, or of scales that do: those that bitsandbytes has kernels for."""
NESTED_CODES = 256
"""What 8 bits of a scale may mean."""


def misfit(model: Any) -> str | None:
    """What is wrong with the first layer that does not have what its shape needs; None where all have."""
    wrong = {"Linear4bit": _wrong_in_4_bits, "Linear8bitLt": _wrong_in_8_bits}
    for name, layer in model.named_modules():
        if look := wrong.get(type(layer).__name__):
            for words in look(layer):
                return f"{name} {words}"
    return None


def leave_unpacked(model: Any) -> None:
    """Keeps bitsandbytes from rearranging layers in 4 bits for a CPU whose rows or columns its arrangement leaves over.

    It would fail in the first forward pass: SigLIP's are 4304 wide, 67 blocks of 64 and a quarter. Its other way is
    slower.
    """
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit":
            blocks = layer.in_features % layer.weight.quant_state.blocksize
            if blocks or layer.out_features % _PACKED_ROWS:
                layer.support_avx512bf16_for_cpu = False


_PACKED_ROWS = 32


def _wrong_in_4_bits(layer: Any) -> Iterator[str]:
    import torch

    weight, state = layer.weight.data, getattr(layer.weight, "quant_state", None)
    if state is None:
        yield "is not stored in 4 bits"
        return
    numbers = layer.in_features * layer.out_features
    if list(state.shape or ()) != [layer.out_features, layer.in_features]:
        yield f"is stored with another shape than [{layer.out_features}, {layer.in_features}]"
    elif weight.nbytes != -(-numbers // 2) or not weight.is_contiguous():
        yield f"has {weight.nbytes:,} bytes of weights, and not {-(-numbers // 2):,}"
    elif state.quant_type not in ("nf4", "fp4") or state.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        yield "is quantized to numbers that are not known"
    elif not _is_block_size(state.blocksize):
        yield "has blocks of a size that is not known"
    else:
        yield from _other_than(state.code, "codes", torch.float32, CODES)
        yield from _wrong_scales(state, -(-numbers // state.blocksize))


def _wrong_scales(state: Any, blocks: int) -> Iterator[str]:
    """Of blocks of weights; they may be quantized themselves."""
    import torch

    if not state.nested:
        yield from _other_than(state.absmax, "scales", torch.float32, blocks)
    elif state.state2.nested or state.state2.dtype != torch.float32 or not _is_block_size(state.state2.blocksize):
        yield "has scales that are quantized in a way that is not known"
    else:
        yield from _other_than(state.absmax, "scales", torch.uint8, blocks)
        yield from _other_than(state.state2.code, "codes of scales", torch.float32, NESTED_CODES)
        yield from _other_than(
            state.state2.absmax, "scales of scales", torch.float32, -(-blocks // state.state2.blocksize)
        )
        yield from _other_than(state.offset, "offsets of scales", torch.float32, 1)


def _wrong_in_8_bits(layer: Any) -> Iterator[str]:
    import torch

    weight, scales = layer.weight.data, getattr(layer.weight, "SCB", None)
    if scales is None:
        yield "is not stored in 8 bits"
    elif weight.shape != (layer.out_features, layer.in_features) or weight.dtype != torch.int8:
        yield f"is stored with another shape than [{layer.out_features}, {layer.in_features}] in 8 bits"
    elif not weight.is_contiguous():
        yield "is not stored row by row"
    else:
        yield from _other_than(scales, "scales", torch.float32, layer.out_features)


def _other_than(tensor: Any, what: str, dtype: torch.dtype, count: int) -> Iterator[str]:
    """What is wrong where that is no list of so many numbers of a type."""
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tensor.ndim > 1 or not tensor.is_contiguous():
        yield f"has {what} that are no {str(dtype).removeprefix('torch.')}"
    elif tensor.numel() != count:
        yield f"has {tensor.numel():,} {what}, and not {count:,}"


def _is_block_size(size: Any) -> bool:
    return type(size) is int and size in BLOCK_SIZES
