"""Products in 8 bits by oneDNN, and which layers get them."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from helpers.kernels import needs_kernels
from helpers.linear_layers import eight_bits, four_bits
from torch.nn.functional import linear

from llava_cli import load
from llava_cli.engine.cpu import onednn_linear
from llava_cli.engine.cpu.linear_choice import fused_linear
from llava_cli.engine.cpu.onednn_linear import OneDnnInt8Linear, dequantized_rows, fuse_int8, quantize_to_int8
from llava_cli.engine.cpu.packed_weights import PackedWeightStore
from llava_cli.engine.cpu.projection import Projection
from llava_cli.engine.cpu.quantized_linear import QuantizedLinear, Workspace, fused_bias


@pytest.mark.parametrize("biases", [(False,), (True, False, True)])
def test_weights_in_4_bits_are_multiplied_in_8(biases: tuple[bool, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [four_bits(32 * (i + 2), bias) for i, bias in enumerate(biases)]
    x = torch.randn(2, 40, 128, dtype=dtype)
    x[0, 0] = 0
    before = x.clone()
    with torch.inference_mode():
        out = OneDnnInt8Linear(**quantize_to_int8(layers), bias=fused_bias(layers))(x)
        expected = torch.cat([layer(before) for layer in layers], -1)
    assert (out - expected).norm() < 0.02 * expected.norm()
    assert torch.equal(out[0, 0].bfloat16(), expected[0, 0].bfloat16())  # the biases
    assert torch.equal(x, before)


@pytest.mark.parametrize("biases", [(True,), (False, False, False), (True, False)])
def test_weights_in_8_bits_are_used_as_they_are(biases: tuple[bool, ...]) -> None:
    """And what bitsandbytes makes of them stays the same."""
    for shape in ((1,), (3,), (80,)):
        torch.manual_seed(0)
        layers = [eight_bits(32 * (i + 2), bias) for i, bias in enumerate(biases)]
        x = torch.randn(*shape, 128, dtype=torch.bfloat16)
        with torch.inference_mode():
            exact = linear(x.float(), torch.cat(list(dequantized_rows(layers))), fused_bias(layers))
            product = OneDnnInt8Linear(**fuse_int8(layers), bias=fused_bias(layers))
            expected = torch.cat([layer(x) for layer in layers], -1)
            out, bound_out = product(x), torch.empty_like(expected)
            for launch in Projection(layers, lambda _, product=product: product).bind(
                x[None], bound_out[None], Workspace()
            ):
                launch()
        assert (out - exact).norm() < 0.02 * exact.norm()
        assert (out - expected).norm() < 0.02 * expected.norm()
        assert torch.equal(bound_out, out)


def test_threads_do_not_share_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread computes everything while another has its sums, and nothing else yet."""
    torch.manual_seed(0)
    one, two = (OneDnnInt8Linear(**quantize_to_int8([torch.nn.Linear(128, 64, bias=False)])) for _ in range(2))
    x, multiply = torch.randn(40, 128), torch._int_mm
    with torch.inference_mode():
        expected = one(x)

        def overtaken(*args: Any, **options: Any) -> torch.Tensor:
            sums = multiply(*args, **options)
            monkeypatch.setattr(torch, "_int_mm", multiply)
            other = Thread(target=two, args=(x,))
            other.start()
            other.join()
            return sums

        monkeypatch.setattr(torch, "_int_mm", overtaken)
        assert torch.equal(one(x), expected)


@needs_kernels
def test_layers_of_other_shapes_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_linear, "is_fastest_here", lambda: False)
    for make in (four_bits, eight_bits):
        assert fused_linear([make(24, False)], "layer", True, PackedWeightStore()) is None
        assert fused_linear([make(32, False)], "layer", False, PackedWeightStore()) is None  # in memory twice
        assert isinstance(fused_linear([make(32, False)], "layer", True, PackedWeightStore()), QuantizedLinear)


@needs_kernels
def test_no_copies_in_8_bits_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, drawing: Path, each_cpu: None
) -> None:
    monkeypatch.setattr("llava_cli.engine.cpu.onednn_linear.free_memory", lambda device: 1_000_000)
    engine = load("builtin", precision="4bit", device="cpu")
    layers = vars(engine.network.get_decoder())["forward"]._layers
    projections = [projection for layer in layers for projection in (layer.qkv_proj, layer.down_proj)]
    assert {type(projection.fused_linear) for projection in projections} == {QuantizedLinear}
    assert engine.ask(str(drawing), "what color is the circle?") == "red"
