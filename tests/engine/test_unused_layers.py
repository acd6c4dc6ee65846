"""What a vision tower need not compute: the features stay the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.engines import CONVERSATIONS

from llava_cli.engine.local import LocalEngine
from llava_cli.engine.unused_layers import quick_gelu, unused_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quick_gelu_is_equal_to_the_bit(dtype: torch.dtype) -> None:
    from transformers.activations import QuickGELUActivation

    x = 4 * torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(quick_gelu(x), QuickGELUActivation()(x))


@pytest.mark.parametrize(
    "family, unused", [("llava-llama", 1), ("llava-layers", 1), ("llava-full", 0), ("vip-llava", 1), ("smolvlm", 0)]
)
def test_unused_layers_are_not_computed(family: str, unused: int, engines: Callable[[str], LocalEngine]) -> None:
    engine = engines(family)
    network = engine.network
    layers = unused_layers(network)
    assert len(layers) == unused

    def computed() -> int:
        parts = [part for layer in layers for part in layer.modules() if part is not layer]
        calls: list[int] = []
        hooks = [part.register_forward_hook(lambda *_: calls.append(1)) for part in parts]
        with torch.inference_mode():
            network(**engine.inputs(CONVERSATIONS["one"]))
        for hook in hooks:
            hook.remove()
        return len(calls)

    assert computed() == 0
    with engine.patch.undone():
        assert bool(computed()) == bool(unused)
    assert computed() == 0
