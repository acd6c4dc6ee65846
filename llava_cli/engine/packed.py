"""Products in 8 bits on a CPU without bf16 and VNNI instructions: one kernel, FBGEMM's, for few tokens and for many.

There bitsandbytes makes numbers of all weights again for every product, and a 1B in 4 bits takes minutes for a prompt.
FBGEMM, which is part of torch, needs AVX2 alone: 0.2 ms for a token and 50 for 620 of 2048 by 5632 weights, where
products in fp32 take 2.0 and 115. Activations are in 8 bits per token, weights in nearly 8 per output channel; the
error is 1.4 % of a product's norm.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any

from llava_cli.engine.int8 import weights_of

if TYPE_CHECKING:
    import torch


@cache
def suits_here() -> bool:
    """Whether this is a CPU for it: AVX2 or better, but no bf16, in whose absence there is no kernel for 4 bits."""
    import torch

    able = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    has_fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
    return able and has_fbgemm and not torch.cpu._is_avx512_bf16_supported()


def in_pairs(layers: list[Any]) -> dict[str, torch.Tensor]:
    """What `Packed` multiplies by: weights in 8 bits [outputs of all, inputs], and what one of each is worth [outputs].

    AVX2 adds two neighbours' products with activations of up to 255 in 16 bits, and what is more is cut off: no two
    neighbours are more than 128 together.
    """
    import torch
    from torch.nn.functional import pad

    outputs, inputs = sum(layer.out_features for layer in layers), layers[0].in_features
    whole, scale, begin = torch.empty(outputs, inputs, dtype=torch.int8), torch.empty(outputs), 0
    for rows in weights_of(layers):
        end = begin + len(rows)
        pairs = pad(rows.abs(), (0, inputs % 2)).view(len(rows), -1, 2).sum(2)
        scale[begin:end] = its = pairs.amax(1).clamp_(min=1e-12).div_(127)  # and 1 more where both are rounded up
        whole[begin:end] = (rows / its[:, None]).round_().to(torch.int8)
        begin = end
    return {"whole": whole, "scale": scale}


@cache
def _threads() -> ThreadPoolExecutor:
    """Packing takes 8 ms a million weights and one thread: 50 s at 7B."""
    import torch

    return ThreadPoolExecutor(torch.get_num_threads())


def finish() -> None:
    """Waits until all weights are packed."""
    _threads().shutdown()
    _threads.cache_clear()


def _pack(whole: torch.Tensor, scale: torch.Tensor) -> Any:
    import torch

    torch.backends.quantized.engine = "fbgemm"
    begin = torch.zeros(len(scale), dtype=torch.long)
    rows = torch._make_per_channel_quantized_tensor(whole, scale.double(), begin, 0)
    return torch.ops.quantized.linear_prepack(rows, None)


class Packed:
    """Linear layers side by side: x [..., inputs] -> [..., outputs of all].

    `whole` [outputs, inputs] are the weights in int8, `scale` [outputs] is what one of each row is worth.
    """

    def __init__(self, whole: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._packing = _threads().submit(_pack, whole, scale)
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        weights = self._packing.result()
        tokens = x.reshape(-1, x.shape[-1]).float()
        if len(tokens) == 1:
            out = torch.ops.quantized.linear_dynamic(tokens, weights)
        else:  # which has one scale for all of its input: tokens are made equally large before, and not after
            size = tokens.abs().amax(-1, keepdim=True).clamp_(min=1e-12)
            out = torch.ops.quantized.linear_dynamic(tokens / size, weights).mul_(size)
        if self._bias is not None:
            out.add_(self._bias)
        found: torch.Tensor = out.view(*x.shape[:-1], -1).to(x.dtype)
        return found
