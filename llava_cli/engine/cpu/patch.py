"""What is done faster than transformers would do it; `LLAVA_FAST=0` turns all of it off."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from llava_cli.engine.cpu import onednn_linear, quantized_linear
from llava_cli.engine.cpu import vision_layer as tower
from llava_cli.engine.cpu.attention import has_amx, use_our_attention, use_torchs_attention, uses_our_attention
from llava_cli.engine.cpu.decoder import Decoder, Product, suits
from llava_cli.engine.cpu.dense_linear import Plain
from llava_cli.engine.cpu.jit import BLOCK, WIDTH
from llava_cli.engine.cpu.jit.compiler import ahead, kinds_here
from llava_cli.engine.cpu.lm_head import Head
from llava_cli.engine.cpu.onednn_linear import (
    TOKENS,
    Products,
    as_they_are,
    has_room,
    layout_of_whole_numbers,
    whole_numbers,
)
from llava_cli.engine.cpu.quantized_linear import Room, Tiled, copied, in_tiles, joined_bias, layout_in_tiles
from llava_cli.engine.cpu.vision_layer import ACTIVATIONS, TowerLayer

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.cpu.packed_weights import Arranged


def compile_ahead(config: Any, precision: str, bf16: bool) -> None:
    """Begins to compile what a model of such a config wants on a CPU, while its weights are read."""
    if os.environ.get("LLAVA_FAST") == "0" or not (kinds := kinds_here()):
        return
    from llava_cli.engine.cpu.jit import chain, decode_attention, dense_gemv, prefill_attention, vision_ops
    from llava_cli.engine.cpu.jit import decoder_ops as layer
    from llava_cli.engine.cpu.jit import quantized_gemm as tiled

    wanted: list[tuple[Any, ...]] = []
    seeing, decoder = getattr(config, "vision_config", None), config.get_text_config()
    if not (bf16 and has_amx()):
        wanted += [
            (prefill_attention.write, bf16, width, width**-0.5) for width in {_width(seeing), _width(decoder)} - {0}
        ]
    if width := _width(decoder):
        wanted += [(decode_attention.write, bf16, width, width**-0.5, turns) for turns in (True, False)]
    if epsilon := getattr(decoder, "rms_norm_eps", None):
        wanted += [(layer.write_norm, bf16, epsilon), (chain.write, False)]
        wanted += [(write, bf16) for write in (layer.write_turn, layer.write_gate)]
    if gelu := ACTIVATIONS.get(getattr(seeing, "hidden_act", "")):
        epsilon = getattr(seeing, "layer_norm_eps", 1e-5)
        wanted += [(vision_ops.write_norm, bf16, epsilon, adds) for adds in (False, True)]
        wanted.append((vision_ops.write_gelu, bf16, *gelu))
    wanted.append((dense_gemv.write, bf16))
    for bits in {"4bit": (4, 8), "8bit": (8,)}.get(precision, ()):  # a wide vision tower has 8
        wanted.append((tiled.write, bf16, bits))
    for write, *numbers in wanted:
        ahead(write, kinds[0], *numbers)


def _width(config: Any) -> int:
    """Of a head; 0 where there are none, or none that suit kernels."""
    size, heads, width = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads", "head_dim"))
    if not width and isinstance(size, int) and isinstance(heads, int):
        width = size // heads
    return width if isinstance(width, int) and width % WIDTH == 0 else 0


def speed_up(model: Any, arranged: Arranged) -> None:
    """Gives a model the fast ways that suit it; what it takes to arrange weights for them is kept in `arranged`."""
    import torch

    if os.environ.get("LLAVA_FAST") == "0":
        return
    for layer in (unused := unused_layers(model)):
        layer.forward = _passed_on
    if model.device.type != "cpu":
        return
    for activation in model.modules():
        if type(activation).__name__ == "QuickGELUActivation":
            activation.forward = _quick_gelu
    use_our_attention(model)
    used = [layer for layer in model.modules() if layer not in unused and _is_fast_tower_layer(layer)]
    layers = {layer: name for name, layer in model.named_modules() if type(layer).__name__ in _QUANTISED}
    seeing = wide_vision_layers(model) if layers else {}
    copies = [*layers, *seeing] if onednn_linear.suits_here() or not arranged.kept else seeing
    room, in_8_bits = has_room(copies), any(layer.weight.dtype == torch.int8 for layer in layers)

    def join(some: list[Any]) -> Product | None:
        return joined(some, layers[some[0]], room, arranged) if all(layer in layers for layer in some) else None

    def join_seeing(some: list[Any]) -> Product | None:
        return in_8_bits_of(some, seeing[some[0]], arranged) if room and all(one in seeing for one in some) else None

    decoder, output = model.get_decoder(), model.get_output_embeddings()
    with torch.inference_mode():
        if suits(decoder) and uses_our_attention(decoder):
            vars(decoder)["forward"] = Decoder(decoder, join)
        else:
            for layer in layers:
                vars(layer)["forward"] = join([layer]) or layer.forward
        for layer in used:
            vars(layer)["forward"] = TowerLayer(layer, join_seeing)
        for layer in seeing if not used else ():
            vars(layer)["forward"] = join_seeing([layer]) or layer.forward
        if head := (Head.of(output, arranged, in_8_bits) if layers else None) or Plain.of(output):
            vars(output)["forward"] = head


def _is_fast_tower_layer(layer: Any) -> bool:
    return tower.suits(layer) and uses_our_attention(layer.self_attn)


_QUANTISED = ("Linear4bit", "Linear8bitLt")
"""bitsandbytes' layers, by the names of their classes."""
WIDE = 128
"""Inputs and outputs, at least, of a layer of the vision tower that is worth it: CLIP-L/336 takes 0.7 s for a picture
in 8 bits, 2.8 in bf16 without AMX. Features are 1.7 % off with random weights, where bf16 has them off by 1.3 %; with
the built-in model's trained ones 1.6 % and 0.7 %, and as many answers are right."""
LET_GO_FROM = 64
"""Tokens after which weights in 8 bits are let go that stand in a file and serve many tokens alone: a 7B's are 6.5 GB.
The next product finds them in the system's cache, for 3 % of the time of 620 tokens."""


def joined(layers: list[Any], name: str, room: bool, arranged: Arranged) -> Product | None:
    """The product of quantised layers that multiply the same input; None where nothing is better than themselves.

    `room` is there for copies of their weights in 8 bits, or for such that cannot be kept in files.
    """
    import torch

    bias, have_8_bits = joined_bias(layers), layers[0].weight.dtype == torch.int8
    if have_8_bits and onednn_linear.suits_here():
        return Products(**as_they_are(layers), bias=bias)
    few: Product | None = None
    if quantized_linear.suits(layers) and layers[0].in_features % BLOCK == 0 and (room or arranged.kept):
        few = Tiled(**arranged(f"{name}-tiles", layout_in_tiles(layers), partial(in_tiles, layers)), bias=bias)
    if not (room and onednn_linear.suits_here()):
        return few
    numbers = arranged(f"{name}-8", layout_of_whole_numbers(layers), partial(whole_numbers, layers))
    few = few or partial(_each, [layer.forward for layer in layers])
    return Joined(few, Products(**numbers, bias=bias), numbers.let_go)


def _each(products: list[Product], x: torch.Tensor) -> torch.Tensor:
    """What several layers make of one input, side by side."""
    import torch

    return torch.cat([product(x) for product in products], -1)


def in_8_bits_of(layers: list[Any], name: str, arranged: Arranged) -> Product | None:
    """The product in 8 bits of layers that have more, for many tokens; None without one."""
    in_tiles_here = not onednn_linear.suits_here()
    if in_tiles_here and not quantized_linear.suits(layers):
        return None
    name = f"{name}-{len(layers)}" if len(layers) > 1 else name
    if in_tiles_here:
        numbers = arranged(f"{name}-tiles", layout_in_tiles(layers), partial(in_tiles, layers))
    else:
        numbers = arranged(f"{name}-8", layout_of_whole_numbers(layers), partial(whole_numbers, layers))
    many: Product = (Tiled if in_tiles_here else Products)(**numbers, bias=joined_bias(layers))
    return Joined(partial(_each, [layer.forward for layer in layers]), many, numbers.let_go)


class Joined:
    """One product for few tokens, and one for many, after which `let_go` takes out of memory what it multiplied by."""

    def __init__(self, few: Product, many: Product, let_go: Callable[[], None]) -> None:
        self.few, self.many, self._let_go = few, many, let_go

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product, lets_go = self._product(x)
        out = product(x)
        if lets_go:
            self._let_go()
        return out

    def bound(self, x: torch.Tensor, out: torch.Tensor, room: Room) -> list[Callable[[], object]]:
        """What writes to `out` [rows, tokens, outputs] what becomes of `x` [rows, tokens, inputs] at that time."""
        product, lets_go = self._product(x)
        calls: list[Callable[[], object]] = [partial(copied, product, x, out)]
        if isinstance(product, Tiled):
            calls = product.bound(x, out, room)
        return [*calls, self._let_go] if lets_go else calls

    def _product(self, x: torch.Tensor) -> tuple[Product, bool]:
        """The one for so many tokens, and whether its weights are let go then: not at each step of a batch."""
        tokens = x.numel() // x.shape[-1]
        many = tokens >= TOKENS
        return self.many if many else self.few, many and tokens >= LET_GO_FROM and x.shape[-2] > 1


def wide_vision_layers(model: Any) -> dict[Any, str]:
    """The vision tower's linear layers that are worth computing in 8 bits, and their names."""
    unused = {part for layer in unused_layers(model) for part in layer.modules()}
    return {
        layer: name
        for name, layer in model.named_modules()
        if ".vision_tower." in name and type(layer).__name__ == "Linear" and layer not in unused
        if min(layer.in_features, layer.out_features) >= WIDE
    }


def unused_layers(model: Any) -> list[Any]:
    """The vision tower's layers behind the last one that the language model gets to see: with LLaVA the very last."""
    config, tower = model.config, getattr(model.model, "vision_tower", None)
    taken = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", None))
    if taken is None or tower is None:
        return []
    count = config.vision_config.num_hidden_layers
    stacks = [stack for stack in tower.modules() if type(stack).__name__ == "ModuleList" and len(stack) == count]
    # Number 0 is what goes into the first layer.
    last = max(count + 1 + number if number < 0 else number for number in _listed(taken))
    return [layer for stack in stacks for layer in stack[last:]]


def _listed(taken: int | list[int]) -> list[int]:
    return [taken] if isinstance(taken, int) else taken


def _passed_on(hidden_states: Any, *args: Any, **options: Any) -> Any:
    """In a layer's place: the list of all layers' outputs keeps its length."""
    return hidden_states


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """CLIP's activation, a tenth of a batch's time: the same numbers with one new tensor instead of three."""
    return (x * 1.702).sigmoid_().mul_(x)


@contextmanager
def as_transformers(model: Any) -> Iterator[None]:
    """Within, the model computes as transformers has it: what its answers are compared with."""
    ways = {layer: vars(layer)["forward"] for layer in model.modules() if "forward" in vars(layer)}
    if attends := any(uses_our_attention(part) for part in model.modules() if hasattr(part, "config")):
        use_torchs_attention(model)
    own = _passed_on, _quick_gelu
    ours = [
        layer
        for layer, way in ways.items()
        if way in own or isinstance(way, (Decoder, TowerLayer, Joined, Tiled, Products, Plain, Head))
    ]
    for layer in ours:
        del layer.forward
    try:
        yield
    finally:
        for layer in ours:
            layer.forward = ways[layer]
        if attends:
            use_our_attention(model)
