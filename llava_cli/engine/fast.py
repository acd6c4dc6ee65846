"""What is done faster than transformers would do it; `LLAVA_FAST=0` turns all of it off."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from llava_cli.engine import int8, packed
from llava_cli.engine.attention import NAME, use_plain_attention
from llava_cli.engine.decoder import Decoder, Product, suits
from llava_cli.engine.head import Head
from llava_cli.engine.int8 import TOKENS, Products, as_they_are, has_room, whole_numbers
from llava_cli.engine.nf4 import Kernel, each, in_kernel_order, is_arranged, joined_bias
from llava_cli.engine.packed import Packed, in_pairs

if TYPE_CHECKING:
    import torch

    from llava_cli.arranged import Arranged


def speed_up(model: Any, arranged: Arranged) -> None:
    """Gives a model the fast ways that suit it; what it takes to arrange weights for them is kept in `arranged`."""
    import torch

    if os.environ.get("LLAVA_FAST") == "0":
        return
    for layer in unused_layers(model):
        layer.forward = _passed_on
    if model.device.type != "cpu":
        return
    for activation in model.modules():
        if type(activation).__name__ == "QuickGELUActivation":
            activation.forward = _quick_gelu
    if attends := model.config._attn_implementation == "sdpa":
        use_plain_attention(model)
    layers = {layer: name for name, layer in model.named_modules() if type(layer).__name__ in _quantised_kinds()}
    seeing = wide_vision_layers(model)
    in_8_bits = bool(layers) and (packed.suits_here() or int8.suits_here()) and has_room([*layers, *seeing])
    have_8_bits = any(layer.weight.dtype == torch.int8 for layer in layers)

    def join(some: list[Any]) -> Product | None:
        if not all(layer in layers for layer in some):
            return None
        return Joined.of(some, layers[some[0]], in_8_bits, arranged)

    decoder, output = model.get_decoder(), model.get_output_embeddings()
    with torch.inference_mode():
        if attends and suits(decoder):
            vars(decoder)["forward"] = Decoder(decoder, join)
        else:
            for layer in layers:
                vars(layer)["forward"] = join([layer]) or layer.forward
        if in_8_bits:
            for layer, name in seeing.items():
                vars(layer)["forward"] = Joined.for_many(layer, name, arranged)
        if layers and (head := Head.of(output, arranged, have_8_bits)):
            vars(output)["forward"] = head
    packed.finish()


def _quantised_kinds() -> set[str]:
    """The names of bitsandbytes' layers that there are faster products for on this CPU."""
    return {"Linear4bit", "Linear8bitLt"} if packed.suits_here() or int8.suits_here() else {"Linear4bit"}


WIDE = 512
"""Inputs and outputs, at least, of a layer of the vision tower that is worth it: CLIP-L/336 takes 1.0 s for a picture
in 8 bits, 2.8 in bf16 without AMX; the built-in model's, 192 wide, 14 ms and not 7. Features are 1.7 % off with random
weights, where bf16 has them off by 1.3 %; with the built-in model's trained ones 1.6 % and 0.7 %, and as many answers
are right."""
LET_GO_FROM = 64
"""Tokens after which weights in 8 bits are let go that stand in a file: a 7B takes 5.3 GB, not 11.5. The next product
finds them in the system's cache, for 3 % of the time of 620 tokens; it would be 15 % of a chat's turn of 16."""


class Joined:
    """Quantised layers that multiply the same input: one way for few tokens, and one for many.

    After those of a prompt `let_go` takes out of memory what the latter multiplies by.
    """

    def __init__(self, few: Product, many: Product, let_go: Callable[[], None] | None = None) -> None:
        self.few, self.many, self._let_go = few, many, let_go

    @classmethod
    def of(cls, layers: list[Any], name: str, in_8_bits: bool, arranged: Arranged) -> Joined | None:
        """None where there is nothing better than the layers themselves."""
        import torch

        bias, many, few, let_go = joined_bias(layers), None, None, None
        if in_8_bits and packed.suits_here():
            both = Packed(**arranged(f"{name}-rows", partial(in_pairs, layers)), bias=bias)
            return cls(both, both)
        if layers[0].weight.dtype == torch.int8:
            if not int8.suits_here():
                return None
            products = Products(**as_they_are(layers), bias=bias)
            return cls(products, products)
        # Before bitsandbytes arranges the weights: it then has lost how to make numbers of them.
        if in_8_bits:
            numbers = arranged(f"{name}-8", partial(whole_numbers, layers))
            many, let_go = Products(**numbers, bias=bias), numbers.let_go
        if tensors := arranged(f"{name}-4", partial(in_kernel_order, layers)):
            few = Kernel(**tensors, bias=bias)
            parts = torch.split(tensors["weights"], [layer.out_features for layer in layers])
            for layer, its in zip(layers, parts, strict=True):
                if is_arranged(layer):
                    layer.weight.data = its  # not twice
        if not many and not few:
            return None
        plain: Product = few or partial(each, layers)
        return cls(plain, many or plain, let_go)

    @classmethod
    def for_many(cls, layer: Any, name: str, arranged: Arranged) -> Joined:
        """A layer that has no quantised weights, with products in 8 bits for many tokens."""
        if packed.suits_here():
            return cls(layer.forward, Packed(**arranged(f"{name}-rows", partial(in_pairs, [layer])), bias=layer.bias))
        numbers = arranged(f"{name}-8", partial(whole_numbers, [layer]))
        return cls(layer.forward, Products(**numbers, bias=layer.bias), numbers.let_go)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.numel() // x.shape[-1]
        if tokens < TOKENS:
            return self.few(x)
        out = self.many(x)
        if self._let_go and tokens >= LET_GO_FROM and x.shape[-2] > 1:  # and not at each step of a batch
            self._let_go()
        return out


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
    attends = model.config._attn_implementation == NAME
    ways = {layer: vars(layer)["forward"] for layer in model.modules() if "forward" in vars(layer)}
    if attends:
        model.set_attn_implementation("sdpa")
    own = _passed_on, _quick_gelu
    ours = [layer for layer, way in ways.items() if way in own or isinstance(way, (Decoder, Joined, Head))]
    for layer in ours:
        del layer.forward
    try:
        yield
    finally:
        for layer in ours:
            layer.forward = ways[layer]
        if attends:
            model.set_attn_implementation(NAME)
