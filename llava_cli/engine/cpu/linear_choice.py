"""Which implementation multiplies a layer's weights: by what they are, this CPU, and the number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from llava_cli.engine.cpu import onednn_linear, quantized_linear
from llava_cli.engine.cpu.jit import BLOCK, Launch
from llava_cli.engine.cpu.onednn_linear import OneDnnInt8Linear, fuse_int8, int8_layout, quantize_to_int8
from llava_cli.engine.cpu.projection import Linear
from llava_cli.engine.cpu.quantized_linear import (
    QuantizedLinear,
    Workspace,
    copy_result,
    fused_bias,
    layout_of,
    pack_weights,
)

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.cpu.packed_weights import PackedTensors, PackedWeightStore

QUANTIZED_LAYERS = ("Linear4bit", "Linear8bitLt")
"""bitsandbytes' layers, by the names of their classes."""
MIN_VISION_FEATURES = 128
"""Inputs and outputs that a layer of the vision tower must have to be computed in 8 bits. With them CLIP-L/336 takes
0.7 s for an image, and 2.8 s in bf16 without AMX. Its features are off by 1.7 % with random weights, where bf16 is off
by 1.3 %; with the built-in model's trained ones by 1.6 % and 0.7 %, and as many answers are right."""
RELEASE_MIN_TOKENS = 64
"""Tokens from which weights in 8 bits that come from a file and serve only many tokens leave memory again: a 7B's are
6.5 GB. The next product finds them in the system's cache, for 3 % of the time of 620 tokens."""


def fused_linear(layers: list[Any], name: str, fits_in_memory: bool, store: PackedWeightStore) -> Linear | None:
    """One function for quantized layers that share an input; None where they are best left alone.

    `fits_in_memory` says whether there is memory for copies in 8 bits, and for packed weights that no file can hold.
    """
    import torch

    bias, have_8_bits = fused_bias(layers), layers[0].weight.dtype == torch.int8
    if have_8_bits and onednn_linear.is_fastest_here():
        return OneDnnInt8Linear(**fuse_int8(layers), bias=bias)
    few: Linear | None = None
    whole_blocks = layers[0].in_features % BLOCK == 0
    if quantized_linear.suits(layers) and whole_blocks and (fits_in_memory or store.on_disk):
        few = QuantizedLinear(**_packed(layers, name, store), bias=bias)
    if not (fits_in_memory and onednn_linear.is_fastest_here()):
        return few
    tensors = _in_8_bits(layers, name, store)
    few = few or partial(_side_by_side, [layer.forward for layer in layers])
    return LinearBySize(few, OneDnnInt8Linear(**tensors, bias=bias), tensors.release_pages)


def int8_linear(layers: list[Any], name: str, store: PackedWeightStore) -> Linear | None:
    """One function for unquantized layers that share an input, which has 8 bits for many tokens; None without one."""
    onednn = onednn_linear.is_fastest_here()
    if not onednn and not quantized_linear.suits(layers):
        return None
    name = f"{name}-{len(layers)}" if len(layers) > 1 else name
    tensors = _in_8_bits(layers, name, store) if onednn else _packed(layers, name, store)
    many: Linear = (OneDnnInt8Linear if onednn else QuantizedLinear)(**tensors, bias=fused_bias(layers))
    return LinearBySize(partial(_side_by_side, [layer.forward for layer in layers]), many, tensors.release_pages)


def _packed(layers: list[Any], name: str, store: PackedWeightStore) -> PackedTensors:
    return store.load_or_pack(f"{name}-tiles", layout_of(layers), partial(pack_weights, layers))


def _in_8_bits(layers: list[Any], name: str, store: PackedWeightStore) -> PackedTensors:
    return store.load_or_pack(f"{name}-8", int8_layout(layers), partial(quantize_to_int8, layers))


def _side_by_side(linears: list[Linear], x: torch.Tensor) -> torch.Tensor:
    """[..., in_features] -> the outputs of all [..., out_features]"""
    import torch

    return torch.cat([linear(x) for linear in linears], -1)


class LinearBySize:
    """One implementation for few tokens, and one for many, after which `release_pages` frees its weights' memory."""

    def __init__(self, few: Linear, many: Linear, release_pages: Callable[[], None]) -> None:
        self._few, self._many, self._release_pages = few, many, release_pages

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        linear, releases = self._choose(x)
        out = linear(x)
        if releases:
            self._release_pages()
        return out

    def bind(self, x: torch.Tensor, out: torch.Tensor, workspace: Workspace) -> list[Launch]:
        """What computes x [rows, tokens, in_features] -> out [rows, tokens, out_features]."""
        linear, releases = self._choose(x)
        launches: list[Launch] = [partial(copy_result, linear, x, out)]
        if isinstance(linear, QuantizedLinear):
            launches = linear.bind(x, out, workspace)
        return [*launches, self._release_pages] if releases else launches

    def _choose(self, x: torch.Tensor) -> tuple[Linear, bool]:
        """The implementation for x [..., tokens, in_features], and whether its weights leave memory afterwards.

        They stay for the steps of a batch, each of which has one token a row.
        """
        tokens = x.numel() // x.shape[-1]
        is_many = tokens >= onednn_linear.MIN_TOKENS
        releases = is_many and tokens >= RELEASE_MIN_TOKENS and x.shape[-2] > 1
        return self._many if is_many else self._few, releases


def wide_vision_layers(model: Any, unused: set[Any]) -> dict[Any, str]:
    """The vision tower's linear layers that are worth computing in 8 bits, and their names."""
    return {
        layer: name
        for name, layer in model.named_modules()
        if ".vision_tower." in name and type(layer).__name__ == "Linear" and layer not in unused
        if min(layer.in_features, layer.out_features) >= MIN_VISION_FEATURES
    }
