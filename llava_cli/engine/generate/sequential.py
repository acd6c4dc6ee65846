"""Generation for models that cannot batch: each prompt is read whole, into transformers' own cache.

They are those that nobody has tried in a batch, and Mllama (Llama 3.2 Vision): its layers of cross-attention keep a
picture's keys instead of tokens', and a mask [tokens, pictures, tiles] says who sees them, so rows, parts of a prompt
and a cut cache would each need code of their own. What a model wants besides its tokens, such as that mask, is prepared
by the model itself, in the steps in which its `generate` does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any

from llava_cli.engine.generate.confidence import token_log_probabilities
from llava_cli.engine.generate.sequence import Sequence

if TYPE_CHECKING:
    import torch


class LonePrompt:
    """One prompt, read by a model as its `generate` reads it; a call reads what is new and returns logits."""

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor]) -> None:
        import torch
        from transformers import DynamicCache

        options: dict[str, Any] = {name: value.to(model.device) for name, value in inputs.items()}
        self._model, self._ids = model, options.pop("input_ids")
        options = {"attention_mask": torch.ones_like(self._ids), **options}
        options["position_ids"] = model._prepare_position_ids_for_generation(self._ids, dict(options))
        options["past_key_values"] = DynamicCache(config=model.config.get_text_config(decoder=True))
        self._options: dict[str, Any] = {**options, "use_cache": True, "logits_to_keep": 1}

    @property
    def device(self) -> torch.device:
        device: torch.device = self._model.device
        return device

    def fork(self) -> LonePrompt:
        """Another reading of the same tokens, which goes on by itself from here."""
        other = copy(self)
        other._options = {**self._options, "past_key_values": deepcopy(self._options["past_key_values"])}
        return other

    def __call__(self, token: torch.Tensor | None = None) -> torch.Tensor:
        """Reads the prompt, or the next token [1, 1] of its answer -> logits [1, vocabulary] after it."""
        import torch

        with torch.inference_mode():
            if token is not None:
                self._ids = torch.cat([self._ids, token], dim=1)
            inputs = self._model.prepare_inputs_for_generation(
                self._ids,
                next_sequence_length=None if token is None else 1,
                is_first_iteration=token is None,
                **self._options,
            )
            output = self._model(**inputs, return_dict=True)
            self._options = self._model._update_model_kwargs_for_generation(
                output, self._options, is_encoder_decoder=False
            )
            logits: torch.Tensor = output.logits[:, -1]
            return logits


def generate_alone(model: Any, sequence: Sequence) -> Iterator[None]:
    """Appends a token to the sequence each time it is advanced, until the answer is complete."""
    read = LonePrompt(model, sequence.inputs)
    if sequence.chooses:
        from llava_cli.engine.generate.choice_pass import choose_alone

        choose_alone(read, sequence)
        yield
        return
    token = None
    while True:
        logits = read(token)
        token = sequence.sampler(logits).view(1, 1)
        if sequence.records:
            sequence.record(token_log_probabilities(logits, token[0])[0])
        sequence.append(int(token), logits[0])
        yield
        if sequence.is_complete:
            return
