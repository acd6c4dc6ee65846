"""Decoding by CUDA graphs: each shape of a step is captured once, and then launched as a whole.

A 7B's step is some 1,300 kernels. A shape is computed as it is for its first steps, for capturing one takes as long as
a dozen of them.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_cli.engine.gpu.decode_step import DecodeStep, Shape
from llava_cli.engine.gpu.static_attention import REPLACED, Unsupported
from llava_cli.engine.gpu.static_cache import KvArena
from llava_cli.engine.kv_cache import RoomyCache
from llava_cli.errors import is_out_of_memory, message_line
from llava_cli.hardware.memory import cards_of, free_memory

if TYPE_CHECKING:
    import torch

LEAST_CAPACITY = 512
"""Tokens of the smallest shape; each next one has twice as many."""
MANY_ROWS, CAPACITY_STEP = 16, 256
"""From so many rows on, capacities are multiples of this instead."""
CAPTURE_AFTER = 12
"""Steps of a shape before it is captured."""
MAX_SHAPES = 24
"""Shapes at a time; each takes some 40 MB once it is captured."""
ARENA_SHARE = 0.7
"""Of the free memory, how much the static KV cache may take; larger batches are computed without it."""

Replay = Callable[[], object]
Capture = Callable[[DecodeStep], Replay]
"""Computes a step and captures it -> what computes it again."""


@dataclass
class _KnownShape:
    """The step of a shape."""

    step: DecodeStep
    may_be_captured: bool
    runs: int = 0
    """How often it was computed."""
    replay: Replay | None = None
    """Computes it once it is captured."""


class DecodeGraphs:
    """The steps of one model, by their shapes."""

    def __init__(self, model: Any, capture: Capture | None = None) -> None:
        """Without `capture`, which is the device's own, steps are computed as they are."""
        self._model, self._capture, self._arena = model, capture, KvArena()
        self._shapes: OrderedDict[Shape, _KnownShape] = OrderedDict()  # least recently used first
        self._is_unsupported = False
        self._refused: tuple[weakref.ref[RoomyCache], Shape] | None = None
        """What there was no memory for the last time."""
        self.problem: str | None = None
        """Why steps are not captured, if that was tried."""

    @property
    def shapes(self) -> int:
        """How many shapes there are steps for."""
        return len(self._shapes)

    @property
    def captured(self) -> int:
        """How many shapes are captured."""
        return sum(known.replay is not None for known in self._shapes.values())

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
        if self._is_unsupported or not (known := self._known(cache, _shape(len(tokens), column + 1))):
            return None
        step = known.step
        self._arena.adopt(cache, step.cache)
        step.set_inputs(tokens, positions, column, mask)
        try:
            self._run(known)
        except Unsupported as error:
            self._is_unsupported, self.problem = True, str(error)
            self.release()
            return None
        cache.extend(1)  # on the host, while the device computes
        return step.outputs(len(tokens))

    def release(self) -> None:
        """Frees all that is kept for the next steps."""
        self._refused = None
        self._shapes.clear()
        self._arena.release()

    def _known(self, cache: RoomyCache, shape: Shape) -> _KnownShape | None:
        """A shape's step, made where there is none yet; None where there is no memory for it."""
        if shape not in self._shapes:
            if not self._make_room(cache, shape):
                return None
            step = DecodeStep(self._model, self._arena, cache, shape)
            self._shapes[shape] = _KnownShape(step, self._capture is not None)
            if len(self._shapes) > MAX_SHAPES:
                self._shapes.popitem(last=False)
        self._shapes.move_to_end(shape)
        return self._shapes[shape]

    def _make_room(self, cache: RoomyCache, shape: Shape) -> bool:
        if self._arena.fits(cache, shape.rows, shape.capacity):
            return True
        wanted = weakref.ref(cache), shape
        if wanted == self._refused:
            return False
        needed = self._arena.bytes_to_grow(cache, shape.rows, shape.capacity)
        if needed > ARENA_SHARE * free_memory(self._model.device.type, cards_of(self._model)):
            self._arena.evict()
            self._refused = wanted
            return False
        self._shapes.clear()  # they refer to the buffers that are about to go
        self._arena.grow(cache, shape.rows, shape.capacity)
        return True

    def _run(self, known: _KnownShape) -> None:
        known.runs += 1
        is_due = known.may_be_captured and not known.replay and known.runs >= CAPTURE_AFTER
        if is_due and not self.problem:
            self._try_to_capture(known)
        (known.replay or known.step.compute)()

    def _try_to_capture(self, known: _KnownShape) -> None:
        """Where it fails, nothing but the outputs' buffers has changed, and the step is computed as before."""
        assert self._capture
        try:
            known.replay = self._capture(known.step)
        except Unsupported:
            raise
        except Exception as error:
            known.may_be_captured = False
            # Memory that runs out in a capture ends it, and torch tells of that. Another shape may need less.
            if not any(is_out_of_memory(one) for one in (error, error.__context__) if one):
                self.problem = f"could not be captured ({message_line(error)})"
                for other in self._shapes.values():
                    other.replay = None


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
