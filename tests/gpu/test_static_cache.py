"""Keys and values in buffers that stay in place, and on other devices than the model's first one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from helpers.tables import for_each

from llava_cli.engine.gpu.decode_graphs import obstacle
from llava_cli.engine.gpu.decode_step import DecodeStep, Shape
from llava_cli.engine.gpu.static_cache import KvArena
from llava_cli.engine.kv_cache import RoomyCache

HEADS, HEAD_DIM, LAYERS = 2, 4, 3


def filled(rows: int, tokens: int, device: str = "cpu") -> RoomyCache:
    cache = RoomyCache()
    for layer in range(LAYERS):
        x = torch.arange(rows * HEADS * tokens * HEAD_DIM, dtype=torch.float32).view(rows, HEADS, tokens, HEAD_DIM)
        cache.update(x.to(device) + layer, -x.to(device) - layer, layer)
    return cache


def content(cache: RoomyCache) -> list[torch.Tensor]:
    layers: list[Any] = cache.layers
    return [x.clone() for layer in layers for x in (layer.keys, layer.values)]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(some, others, strict=True))


def test_a_cache_moves_from_shape_to_shape_and_out_again() -> None:
    arena, column = KvArena(), torch.zeros(1, dtype=torch.long)
    cache, other = filled(2, 7), filled(1, 5)
    before, others = content(cache), content(other)
    arena.grow(cache, 4, 16)
    assert arena.fits(cache, 1, 64) and not arena.fits(cache, 4, 17)
    for rows, capacity in ((4, 16), (2, 32), (2, 8)):
        static = arena.layers(cache, rows, capacity, column)
        arena.adopt(cache, static)
        assert equal(content(cache), before)
        assert cache.layers[0].keys.data_ptr() == static.layers[0].keys.data_ptr()  # type: ignore[union-attr]
    arena.adopt(other, arena.layers(other, 1, 16, column))
    assert equal(content(cache), before)
    assert equal(content(other), others)
    arena.grow(other, 8, 16)
    assert equal(content(other), others)


def test_growing_takes_room_for_what_is_moved_out_meanwhile() -> None:
    arena, cache = KvArena(), filled(2, 7)
    token = cache.nbytes_of_token
    assert arena.bytes_to_grow(cache, 2, 16) == 32 * token
    arena.grow(cache, 2, 16)
    assert arena.bytes_to_grow(cache, 4, 16) == 32 * token
    arena.adopt(cache, arena.layers(cache, 2, 16, torch.zeros(1, dtype=torch.long)))
    assert cache.nbytes_of_tokens == 14 * token
    assert arena.bytes_to_grow(cache, 4, 16) == (32 + 14) * token


def test_a_dead_cache_is_not_moved_out() -> None:
    arena = KvArena()
    cache = filled(1, 3)
    arena.grow(cache, 1, 16)
    arena.adopt(cache, arena.layers(cache, 1, 16, torch.zeros(1, dtype=torch.long)))
    del cache
    arena.evict()


def test_rows_are_chosen_where_the_layers_are() -> None:
    """With several cards a layer may be on another one than the indices that choose its rows."""
    cache = filled(3, 4, "meta")
    cache.batch_select_indices(torch.tensor([0, 2, 2, 1]))
    assert {x.device.type for x in content(cache)} == {"meta"}
    assert {tuple(x.shape) for x in content(cache)} == {(4, HEADS, 4, HEAD_DIM)}


def test_what_rows_see_follows_what_the_batch_says() -> None:
    """Although it is only written where a step has not left it so, and the batch changes its mask in place."""
    cache, arena = filled(3, 4), KvArena()
    arena.grow(cache, 4, 16)
    model = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(get_text_config=dict))
    step = DecodeStep(model, arena, cache, Shape(4, 16))
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()

    def seen(mask: torch.Tensor | None, rows: int, column: int) -> torch.Tensor:
        step.set_inputs([1] * rows, [5] * rows, column, mask)
        step._mask.index_fill_(3, step._column, True)  # as the step does itself
        return step._mask[:rows, 0, 0, : column + 1]

    def grown(mask: torch.Tensor) -> torch.Tensor:
        return torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)

    assert torch.equal(seen(mask, 3, 4), mask)
    mask = grown(mask)
    assert torch.equal(seen(mask, 3, 5), mask)
    mask[0] = mask[2]
    mask = grown(mask)
    assert torch.equal(seen(mask, 3, 6), mask)
    assert seen(None, 3, 7).all() and seen(None, 3, 8).all()
    mask = grown(grown(grown(mask)))
    assert torch.equal(seen(mask, 3, 9), mask)
    assert torch.equal(seen(mask[:2], 2, 9), mask[:2])
    assert step._mask[3].sum() == 2  # nobody's row sees one column, and the new one


@for_each(
    "placed, rope, layer, words",
    [
        ({"": "cuda"}, None, torch.nn.Linear, None),
        ({"": 0}, {"rope_type": "llama3"}, torch.nn.Linear, None),
        ({"model": 0, "lm_head": 1}, None, torch.nn.Linear, "it is spread over several devices"),
        ({}, None, Linear8bitLt, "each layer in 8 bits waits for the host"),
        ({}, {"rope_type": "dynamic"}, torch.nn.Linear, "its rotary embedding depends on the prompt's length"),
        (
            {},
            {"full_attention": {"rope_type": "dynamic"}},
            torch.nn.Linear,
            "its rotary embedding depends on the prompt's length",
        ),
    ],
)
def test_what_cannot_be_captured(placed: dict[str, Any], rope: object, layer: type[Any], words: str | None) -> None:
    model = torch.nn.Sequential(layer(64, 64, bias=False))
    text = SimpleNamespace(rope_parameters=rope)
    model.config, model.hf_device_map = SimpleNamespace(get_text_config=lambda: text), placed  # type: ignore[assignment]
    assert obstacle(model) == words
