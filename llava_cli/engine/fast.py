"""What a CPU does faster than transformers would let it; `LLAVA_FAST=0` turns all of it off."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llava_cli.engine.attention import NAME, use_plain_attention
from llava_cli.engine.int8 import Products, use_int8_products


def speed_up(model: Any, precision: str) -> None:
    """Gives a model on a CPU the fast ways that suit it."""
    if model.device.type != "cpu" or os.environ.get("LLAVA_FAST") == "0":
        return
    if model.config._attn_implementation == "sdpa":
        use_plain_attention(model)
    if precision == "4bit":
        use_int8_products(model)


@contextmanager
def as_transformers(model: Any) -> Iterator[None]:
    """Within, the model computes as transformers has it: what its answers are compared with."""
    attends = model.config._attn_implementation == NAME
    layers = [layer for layer in model.modules() if isinstance(getattr(layer, "forward", None), Products)]
    ways = [layer.forward for layer in layers]
    if attends:
        model.set_attn_implementation("sdpa")
    for layer, way in zip(layers, ways, strict=True):
        layer.forward = way.few
    try:
        yield
    finally:
        for layer, way in zip(layers, ways, strict=True):
            layer.forward = way
        if attends:
            model.set_attn_implementation(NAME)
