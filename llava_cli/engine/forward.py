"""One model's forward pass: over a prompt, over part of it, or over one more token of each answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llava_cli.hardware.allocator import empty_device_cache

if TYPE_CHECKING:
    import torch


class Forward:
    """Reads new tokens into a KV cache -> logits after each row's last token [rows, vocabulary]."""

    def __init__(self, model: Any) -> None:
        self.model, self._device = model, model.device
        self._embed, self._head = model.get_input_embeddings(), model.get_output_embeddings()

    def __call__(
        self,
        inputs: dict[str, Any],
        cache: Any,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`inputs` [rows, tokens] as a processor makes them, without what the cache holds already.

        `mask` [rows, columns] is true where a token is, of the cache's too, and `positions` [rows, tokens] are theirs;
        without them there is no padding. All may be in the host's memory.
        """
        import torch

        with torch.inference_mode():
            mask = None if mask is None else mask.to(self._device, non_blocking=True)
            inputs = {name: value.to(self._device, non_blocking=True) for name, value in inputs.items()}
            decoder = getattr(self.model, "token_forward", None)
            if len(inputs) == inputs["input_ids"].shape[1] == 1 and self._head and decoder:
                # Skips what the model does around its decoder, which takes as long as a small decoder itself.
                x = self._embed(inputs["input_ids"])
                out = decoder(inputs_embeds=x, attention_mask=mask, position_ids=positions, past_key_values=cache)
                logits: torch.Tensor = self._head(out.last_hidden_state)
            else:
                rows = {"attention_mask": None if mask is None else mask.long(), "position_ids": positions}
                logits = self.model(**rows | inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            return logits[:, -1]

    def tree(self, ids: torch.Tensor, cache: Any, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Reads tokens that need not follow each other -> logits behind each [rows, tokens, vocabulary].

        `ids` and `positions` are [rows, tokens].
        `mask` [rows, tokens, columns] is true for the tokens that each one sees, of the cache's too, itself among them.
        """
        import torch

        with torch.inference_mode():
            # A lone token of each row is read as in a decode step.
            mask = mask[:, 0].long() if ids.shape[1] == 1 else mask[:, None]
            ids, mask, positions = (tensor.to(self._device) for tensor in (ids, mask, positions))
            options = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            if self._head and (decoder := getattr(self.model, "token_forward", None)):
                hidden = decoder(inputs_embeds=self._embed(ids), **options).last_hidden_state
                logits: torch.Tensor = self._head(hidden)
            else:
                logits = self.model(input_ids=ids, use_cache=True, **options).logits
            return logits

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], cache: Any, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads one more token of each row -> logits [rows, vocabulary] in fp32, and the likeliest tokens [rows].

        Until the next call: a GPU's captured step overwrites them.
        """
        import torch

        graphs = getattr(self.model, "decode_graphs", None)
        if graphs and (outputs := graphs(tokens, positions, cache, mask)):
            logits, likeliest = outputs
            return logits, likeliest
        ids, places = torch.tensor([tokens, positions], device=self._device).unsqueeze(-1)
        logits = self({"input_ids": ids}, cache, mask, places).float()
        return logits, logits.argmax(-1)


def release_memory(model: Any) -> None:
    """Frees what decoding keeps for later steps, and what torch keeps of a device's memory, where that has run out."""
    if graphs := getattr(model, "decode_graphs", None):
        graphs.release()
    empty_device_cache(model.device.type)
