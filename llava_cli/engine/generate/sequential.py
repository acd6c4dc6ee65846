"""Generation for models that cannot batch: each prompt is read whole, into transformers' own cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llava_cli.engine.forward import Forward
from llava_cli.engine.generate.sequence import Sequence


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
