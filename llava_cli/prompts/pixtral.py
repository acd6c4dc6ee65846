"""Pixtral's processor, without transformers' dependency on torchvision.

A picture has a row of image tokens for each row of its patches, and a token at the end of each row.
"""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin


class PixtralProcessor(ProcessorMixin):
    """As transformers' `PixtralProcessor`: `input_ids`, `pixel_values` and `image_sizes` (height, width)."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template: str | None = None,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
        **options: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)  # type: ignore[no-untyped-call]
        self.patch_size, self.spatial_merge_size = patch_size, spatial_merge_size
        self.image_token, self.image_break_token, self.image_end_token = image_token, image_break_token, image_end_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)

    def _process_images(self, images: Any, **options: Any) -> Any:
        return super()._process_images(images, **{**options, "patch_size": self._token_side()})

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **options: Any) -> str:
        """The tokens of one picture; transformers calls this for each."""
        height, width = image_inputs["image_sizes"][image_idx]
        row = self.image_token * (int(width) // self._token_side())
        return self.image_break_token.join([row] * (int(height) // self._token_side())) + self.image_end_token

    def _token_side(self) -> int:
        """The side in pixels of the square that one token stands for."""
        return self.patch_size * self.spatial_merge_size
