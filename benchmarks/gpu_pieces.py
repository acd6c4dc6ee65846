"""What a decode step of one row consists of, each piece by itself, and what could take its place.

Every piece is what all layers do of it, captured as one graph with its inputs in place, as the step is. So their times
add up to the step's, and a replacement's gain is the difference of two lines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

COLUMNS = 1024
"""Of the KV cache, the capacity in which a prompt with a picture and its answer are."""
REPLAYS, REPEATS = 20, 3
Piece = Callable[[], object]


def lines(model: Any, device: str) -> Iterator[str]:
    """A table of the pieces, in ms, with the step's total in its last line."""
    yield "\n| piece of a step, all layers | ms |\n|---|---|"
    for name, make in PIECES.items():
        try:
            with torch.inference_mode():
                yield f"| {name} | {1e3 * seconds(make(model), device):.3f} |"
        except Exception as error:  # one that this device or this torch has not, or no memory for
            yield f"| {name} | {type(error).__name__}: {str(error).partition(chr(10))[0][:90]} |"
        if device == "cuda":
            torch.cuda.empty_cache()
    if device == "cuda":
        yield from kernels(model)


def seconds(piece: Piece, device: str) -> float:
    """The device's time for a piece, at best; on a GPU of its graph."""
    if device != "cuda":
        return min(_host_seconds(piece) for _ in range(REPEATS))
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        piece()
        piece()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        piece()
    graph.replay()
    return min(_replay_seconds(graph) for _ in range(REPEATS))


def _replay_seconds(graph: Any) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()  # type: ignore[no-untyped-call]
    for _ in range(REPLAYS):
        graph.replay()
    end.record()  # type: ignore[no-untyped-call]
    end.synchronize()  # type: ignore[no-untyped-call]
    return float(begin.elapsed_time(end)) / 1e3 / REPLAYS  # type: ignore[no-untyped-call]


def _host_seconds(piece: Piece) -> float:
    begin = time.perf_counter()
    piece()
    return time.perf_counter() - begin


def layers_of(model: Any) -> Any:
    return model.get_decoder().layers


def row(model: Any, width: int) -> torch.Tensor:
    return torch.randn(1, 1, width, device=model.device, dtype=model.dtype)


def products(model: Any) -> Piece:
    """The seven linear layers of each layer, as they are."""
    x = {size: row(model, size) for layer in layers_of(model) for size in _inputs(layer)}
    linear = [m for layer in layers_of(model) for m in layer.modules() if hasattr(m, "in_features")]
    return lambda: [m(x[m.in_features]) for m in linear]


def _inputs(layer: Any) -> list[int]:
    return [m.in_features for m in layer.modules() if hasattr(m, "in_features")]


def joined_products(model: Any) -> Piece:
    """Queries, keys and values as one product, gate and up as another; only of weights in 16 bits."""
    weights = []
    for layer in layers_of(model):
        attention, mlp = layer.self_attn, layer.mlp
        for parts in (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        ):
            if any(type(part) is not torch.nn.Linear for part in parts):
                raise TypeError("its weights are quantized")
            weights.append(torch.cat([part.weight for part in parts]) if len(parts) > 1 else parts[0].weight)
    x = {weight.shape[1]: row(model, weight.shape[1]) for weight in weights}
    return lambda: [functional.linear(x[weight.shape[1]], weight) for weight in weights]


def head(model: Any) -> Piece:
    """The output head, in fp32 after it, and the largest logit."""
    layer = model.get_output_embeddings()
    x = row(model, layer.in_features)
    return lambda: layer(x).float().argmax(-1)


def norms(model: Any) -> Piece:
    found = [m for layer in layers_of(model) for m in (layer.input_layernorm, layer.post_attention_layernorm)]
    x = row(model, found[0].weight.shape[0])
    return lambda: [m(x) for m in found]


def torchs_norms(model: Any) -> Piece:
    """The same by `torch.nn.functional.rms_norm`: one kernel each."""
    found = [m for layer in layers_of(model) for m in (layer.input_layernorm, layer.post_attention_layernorm)]
    x = row(model, found[0].weight.shape[0])
    return lambda: [functional.rms_norm(x, m.weight.shape, m.weight, m.variance_epsilon) for m in found]


def _attention_inputs(model: Any) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """A query [1, heads, 1, head_dim], each layer's keys and values [1, kv_heads, columns, head_dim], and a bias."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads, head_dim = config.num_key_value_heads or heads, config.hidden_size // heads
    options: dict[str, Any] = {"device": model.device, "dtype": model.dtype}
    cache = [
        (torch.randn(1, kv_heads, COLUMNS, head_dim, **options), torch.randn(1, kv_heads, COLUMNS, head_dim, **options))
        for _ in layers_of(model)
    ]
    bias = torch.zeros(1, 1, 1, COLUMNS, **options)
    bias[..., 700:] = -torch.inf
    return torch.randn(1, heads, 1, head_dim, **options), cache, bias


def attention(model: Any) -> Piece:
    """torch's, with a bias over all columns, as the step has it."""
    query, cache, bias = _attention_inputs(model)
    sdpa = functional.scaled_dot_product_attention
    return lambda: [sdpa(query, keys, values, attn_mask=bias, enable_gqa=True) for keys, values in cache]


def cudnns_attention(model: Any) -> Piece:
    """cuDNN's; for a capacity that stays it needs one plan."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query, cache, bias = _attention_inputs(model)

    def compute() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            for keys, values in cache:
                functional.scaled_dot_product_attention(query, keys, values, attn_mask=bias, enable_gqa=True)

    return compute


def attention_by_products(model: Any) -> Piece:
    """Scores, softmax and sum as three operations: reads keys and values with all of the card."""
    query, cache, bias = _attention_inputs(model)
    scale = query.shape[-1] ** -0.5

    def compute() -> None:
        for keys, values in cache:
            grouped = query.reshape(1, keys.shape[1], -1, query.shape[-1])
            scores = (grouped @ keys.transpose(2, 3)) * scale + bias
            scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values

    return compute


def flash_attention(model: Any) -> Piece:
    """FlashAttention's kernel for a KV cache, which writes the new token, too; where flash-attn is installed."""
    from flash_attn import flash_attn_with_kvcache

    query, cache, _ = _attention_inputs(model)
    rows = [(keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()) for keys, values in cache]
    new = [keys[:, :1].contiguous() for keys, _ in rows]
    lengths = torch.full((1,), 700, dtype=torch.int32, device=model.device)
    asked = query.transpose(1, 2).contiguous()
    return lambda: [
        flash_attn_with_kvcache(asked, keys, values, k=k, v=k, cache_seqlens=lengths)
        for (keys, values), k in zip(rows, new, strict=True)
    ]


def writing(model: Any) -> Piece:
    """A token's keys and values into the cache of each layer."""
    _, cache, _ = _attention_inputs(model)
    column = torch.tensor([700], device=model.device)
    return lambda: [x.index_copy_(2, column, x[:, :, :1].clone()) for layer in cache for x in layer]


def angles(model: Any) -> Piece:
    """Rotary embeddings of queries and keys, and the table for one position."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, cache, _ = _attention_inputs(model)
    key = cache[0][0][:, :, :1].clone()
    embedding, x = model.get_decoder().rotary_emb, row(model, 8)
    position = torch.tensor([[700]], device=model.device)

    def compute() -> None:
        cosines, sines = embedding(x, position)
        for _ in cache:
            apply_rotary_pos_emb(query, key, cosines, sines)

    return compute


def activation(model: Any) -> Piece:
    """silu(gate) * up, and the two additions to the residual stream."""
    config = model.config.get_text_config()
    gate, up, x = (
        row(model, config.intermediate_size),
        row(model, config.intermediate_size),
        row(model, config.hidden_size),
    )
    return lambda: [(functional.silu(gate) * up, x + x, x + x) for _ in layers_of(model)]


PIECES: dict[str, Callable[[Any], Piece]] = {
    "products": products,
    "products, joined": joined_products,
    "output head": head,
    "norms": norms,
    "norms by F.rms_norm": torchs_norms,
    "angles": angles,
    "attention": attention,
    "attention, cuDNN's": cudnns_attention,
    "attention by products": attention_by_products,
    "attention, FlashAttention's": flash_attention,
    "keys and values written": writing,
    "activation and residuals": activation,
}


def kernels(model: Any) -> Iterator[str]:
    """The kernels that a captured step spends most time in."""
    graphs = getattr(model, "decode_graphs", None)
    shapes = graphs._shapes if graphs else {}
    replay = next((known.replay for shape, known in shapes.items() if known.replay and shape.rows == 1), None)
    if not replay:
        return
    yield f"| the whole step, captured | {1e3 * _host_seconds(lambda: (replay(), torch.cuda.synchronize())):.3f} |"  # type: ignore[func-returns-value]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(8):
            replay()
        torch.cuda.synchronize()
    found = sorted(profile.key_averages(), key=lambda kernel: -kernel.self_device_time_total)[:12]
    yield "\n| kernel | times a step | ms a step |\n|---|---|---|"
    for kernel in found:
        yield f"| {kernel.key[:70]} | {kernel.count / 8:.0f} | {kernel.self_device_time_total / 8e3:.3f} |"
