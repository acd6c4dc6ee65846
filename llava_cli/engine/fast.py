"""What is done faster than transformers would do it; `LLAVA_FAST=0` turns all of it off."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llava_cli.engine.attention import NAME, use_plain_attention
from llava_cli.engine.int8 import Head, Products, use_int8_products
from llava_cli.engine.nf4 import Kernel, kernel_of


def speed_up(model: Any, precision: str) -> None:
    """Gives a model the fast ways that suit it."""
    import torch

    if os.environ.get("LLAVA_FAST") == "0":
        return
    for layer in unused_layers(model):
        layer.forward = _passed_on
    if model.device.type != "cpu":
        return
    if model.config._attn_implementation == "sdpa":
        use_plain_attention(model)
    if precision == "4bit":
        use_int8_products(model)
        _use_kernels(model)
        head = model.get_output_embeddings()
        if type(head) is torch.nn.Linear and head.bias is None and head.weight.dtype == torch.bfloat16:
            vars(head)["forward"] = Head(head)


def _use_kernels(model: Any) -> None:
    """For few tokens; those of `Products` stay for many."""
    import torch
    from bitsandbytes.nn.modules import Linear4bit

    with torch.inference_mode():
        for layer in model.modules():
            if isinstance(layer, Linear4bit) and (kernel := kernel_of(layer)):
                way: Any = layer.forward
                if isinstance(way, Products):
                    way.few = kernel
                else:
                    vars(layer)["forward"] = kernel


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


@contextmanager
def as_transformers(model: Any) -> Iterator[None]:
    """Within, the model computes as transformers has it: what its answers are compared with."""
    attends = model.config._attn_implementation == NAME
    ways = {layer: vars(layer)["forward"] for layer in model.modules() if "forward" in vars(layer)}
    if attends:
        model.set_attn_implementation("sdpa")
    ours = [layer for layer, way in ways.items() if way is _passed_on or isinstance(way, (Products, Kernel, Head))]
    for layer in ours:
        del layer.forward
    try:
        yield
    finally:
        for layer in ours:
            layer.forward = ways[layer]
        if attends:
            model.set_attn_implementation(NAME)
