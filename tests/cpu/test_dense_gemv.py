"""OneDnnInt8Linear of few tokens with dense weights: the kernel against its reference, and what it refuses."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from helpers.kernels import TOLERANCE, needs_kernels
from helpers.linear_layers import four_bits

from llava_cli.engine.cpu.dense_linear import DenseGemv
from llava_cli.engine.cpu.jit import MAX_DECODE_ROWS
from llava_cli.engine.cpu.jit.builder import IsaTier
from llava_cli.engine.cpu.jit.compiler import Misfit
from llava_cli.engine.cpu.jit.dense_gemv import reference


def test_it_equals_the_reference(dtype: torch.dtype, isa: IsaTier) -> None:
    """What becomes of a token is the same to the bit whatever stands beside it; many tokens are torch's."""
    torch.manual_seed(0)
    for (columns, rows), bias in itertools.product([(64, 4), (128, 100), (1024, 512)], [True, False]):
        layer = torch.nn.Linear(columns, rows, bias, dtype=dtype)
        with torch.inference_mode():
            product = DenseGemv.for_layer(layer)
            assert product
            few, many = (torch.randn(1, MAX_DECODE_ROWS + more, columns, dtype=dtype) for more in (-1, 1))
            out, expected = product(few), reference(few[0], layer.weight, layer.bias)[None].float()
            assert (out.float() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
            assert torch.equal(product(few[:, 5:6]), out[:, 5:6])
            assert torch.equal(product(many), layer(many))


def test_layers_of_other_shapes_and_types_have_no_kernel() -> None:
    linear = partial(torch.nn.Linear, dtype=torch.bfloat16)
    for layer in (linear(64, 6), linear(60, 4), linear(64, 4).half()):
        assert DenseGemv.for_layer(layer) is None
    assert DenseGemv.for_layer(four_bits(32, False)) is None


@needs_kernels
def test_buffers_are_checked() -> None:
    product = DenseGemv.for_layer(torch.nn.Linear(128, 8, dtype=torch.bfloat16))
    assert product
    x, out = torch.zeros(3, 128, dtype=torch.bfloat16), torch.zeros(3, 8, dtype=torch.bfloat16)
    product.bind(x, out)
    for wrong in ((x[:, :64], out), (x.float(), out), (x, out[:2]), (x, out.float()), (x, out.t().contiguous().t())):
        with pytest.raises(Misfit):
            product.bind(*wrong)
