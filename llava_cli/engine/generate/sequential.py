"""Generation for models that cannot batch: each prompt is read whole, into transformers' own cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from llava_cli.engine.forward import Forward
from llava_cli.engine.generate.sequence import PER_IMAGE_INPUTS, SHARED_INPUTS, Sequence
from llava_cli.engine.kv_cache import plain_cache

_BATCHABLE_INPUTS = {"input_ids", "attention_mask", *PER_IMAGE_INPUTS, *SHARED_INPUTS}


def can_batch(model: Any, inputs: Collection[str]) -> bool:
    """Whether prompts with inputs of these names can be read in parts, and beside others.

    Other inputs say something about every token or bring positions of their own; other caches cannot be cut.
    """
    return _BATCHABLE_INPUTS.issuperset(inputs) and plain_cache(model)


def generate_alone(model: Any, sequence: Sequence) -> Iterator[None]:
    """Appends a token to the sequence each time it is advanced, until the answer is complete."""
    import torch
    from transformers import DynamicCache

    forward, cache = Forward(model), DynamicCache(config=model.config)
    inputs = sequence.inputs
    while True:
        logits = forward(inputs, cache)
        token = int(sequence.sampler(logits))
        sequence.append(token, logits[0])
        yield
        if sequence.is_complete:
            return
        inputs = {"input_ids": torch.tensor([[token]], device=model.device)}
