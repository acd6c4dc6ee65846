"""Decoding by CUDA graphs: each shape of a step is captured once, and then launched as a whole.

A 7B's step is some 1,300 kernels. A shape is computed as it is for its first steps, for capturing one takes as long as
a dozen of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llava_cli.engine.gpu.decode_step import DecodeStep, Shape
from llava_cli.engine.gpu.static_attention import REPLACED, Unsupported
from llava_cli.engine.gpu.static_cache import KvArena
from llava_cli.engine.kv_cache import RoomyCache
from llava_cli.errors import is_out_of_memory
from llava_cli.hardware.memory import cards_of, free_memory

if TYPE_CHECKING:
    import torch

LEAST_CAPACITY = 512
"""Tokens of the smallest shape; each next one has twice as many."""
MANY_ROWS, CAPACITY_STEP = 16, 256
"""From so many rows on, capacities are multiples of this instead."""
CAPTURE_AFTER = 12
"""Steps of a shape before it is captured."""
MAX_GRAPHS = 24
"""Captured shapes at a time; each takes some 40 MB."""
ARENA_SHARE = 0.7
"""Of the free memory, how much the static KV cache may take; larger batches are computed without it."""

Replay = Callable[[], object]
Capture = Callable[[DecodeStep], Replay]
"""Computes a step and captures it -> what computes it again."""


class DecodeGraphs:
    """The steps of one model, by their shapes."""

    def __init__(self, model: Any, capture: Capture | None = None) -> None:
        """Without `capture`, which is the device's own, steps are computed as they are."""
        self._model, self._capture, self._arena = model, capture, KvArena()
        self._steps: OrderedDict[Shape, DecodeStep] = OrderedDict()
        self._runs: dict[Shape, int] = {}
        self._replays: dict[Shape, Replay] = {}
        self._is_unsupported = False
        self.problem: str | None = None
        """Why steps are not captured, if that was tried."""

    @property
    def shapes(self) -> int:
        """How many shapes there are steps for."""
        return len(self._steps)

    @property
    def captured(self) -> int:
        """How many shapes are captured."""
        return len(self._replays)

    def __call__(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        cache: RoomyCache,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Reads the last token of each row -> logits [rows, vocabulary] and the likeliest tokens [rows].

        `mask` [rows, cached tokens + 1] is true where a token is; None where there is no padding. Both outputs are
        overwritten by the next call. None where there is no memory for a static cache of this size, or the model's
        attention cannot be computed in one.
        """
        column = cache.get_seq_length()
        shape = _shape(len(tokens), column + 1)
        if self._is_unsupported or not self._make_room(cache, shape):
            return None
        if shape not in self._steps:
            self._steps[shape] = DecodeStep(self._model, self._arena, cache, shape)
        self._steps.move_to_end(shape)
        step = self._steps[shape]
        self._arena.adopt(cache, step.cache)
        step.set_inputs(tokens, positions, column, mask)
        try:
            self._run(step)
        except Unsupported as error:
            self._is_unsupported, self.problem = True, str(error)
            self._forget()
            return None
        cache.extend(1)
        return step.outputs(len(tokens))

    def _make_room(self, cache: RoomyCache, shape: Shape) -> bool:
        if self._arena.fits(cache, shape.rows, shape.capacity):
            return True
        needed = self._arena.bytes_for(cache, shape.rows, shape.capacity)
        if needed > ARENA_SHARE * free_memory(self._model.device.type, cards_of(self._model)):
            self._arena.evict()
            return False
        self._forget()
        self._arena.grow(cache, shape.rows, shape.capacity)
        return True

    def _run(self, step: DecodeStep) -> None:
        shape = step.shape
        if replay := self._replays.get(shape):
            replay()
            return
        self._runs[shape] = self._runs.get(shape, 0) + 1
        if self._capture is None or self.problem or self._runs[shape] < CAPTURE_AFTER:
            step.compute()
            return
        try:
            self._replays[shape] = replay = self._capture(step)
        except Exception as error:
            if isinstance(error, Unsupported) or is_out_of_memory(error):
                raise
            self.problem = f"could not be captured ({error})"
            self._replays.clear()
            step.compute()
            return
        replay()
        if len(self._replays) > MAX_GRAPHS:
            oldest = next(shape for shape in self._steps if shape in self._replays)
            del self._replays[oldest], self._steps[oldest], self._runs[oldest]

    def _forget(self) -> None:
        """Drops what refers to buffers that are about to move."""
        self._steps.clear()
        self._runs.clear()
        self._replays.clear()


def _shape(rows: int, tokens: int) -> Shape:
    """The smallest shape for so many rows and tokens. Of many rows capacity is dear, so it has finer steps."""
    rows = _power_of_two(rows)
    if rows < MANY_ROWS:
        return Shape(rows, max(LEAST_CAPACITY, _power_of_two(tokens)))
    return Shape(rows, -(-tokens // CAPACITY_STEP) * CAPACITY_STEP)


def _power_of_two(number: int) -> int:
    """The least that is not smaller."""
    return 1 << (number - 1).bit_length()


def uses_torchs_attention(model: Any) -> bool:
    """Whether a model's decoder attends as a step does; others, such as those with caps or sinks, keep their own."""
    return model.config.get_text_config()._attn_implementation in REPLACED


def obstacle(model: Any) -> str | None:
    """Why a model's steps cannot be captured, in words; None if nothing is known that prevents it."""
    config = model.config.get_text_config()
    devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
    rope = getattr(config, "rope_parameters", None) or {}
    if len(devices) > 1:
        return "it is spread over several devices"
    if any(type(module).__name__ == "Linear8bitLt" for module in model.modules()):
        return "each layer in 8 bits waits for the host"
    if isinstance(rope, dict) and "dynamic" in (rope.get("rope_type"), *_rope_types(rope)):
        return "its rotary embedding depends on the prompt's length"
    return None


def _rope_types(rope: dict[str, Any]) -> list[Any]:
    """Of a config that has an embedding for each kind of layer."""
    return [part.get("rope_type") for part in rope.values() if isinstance(part, dict)]
