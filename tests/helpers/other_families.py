"""Tiny checkpoints with random weights of families other than LLaVA's, saved as the real ones are.

The geometry is small; classes, processors, special tokens and the form of the templates are the families' own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from helpers.families import PATCH, SIDE, language_config, named_tokenizer, pixtral_config, siglip_config, still
from transformers import (
    AyaVisionConfig,
    AyaVisionProcessor,
    Cohere2Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4vConfig,
    Glm4vProcessor,
    Idefics2Config,
    Idefics2Processor,
    InternVLConfig,
    InternVLProcessor,
    Mistral3Config,
    MistralConfig,
    MllamaConfig,
    MllamaProcessor,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLProcessor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_cli.prompts.pixtral import PixtralProcessor

Made = tuple[Any, Any]
"""(config, processor)"""


def _template(begin: str, end: str, image: str, bos: str = "", assistant: str = "assistant") -> str:
    """A chat template of messages that begin with their role and have each picture where it stands."""
    role = f"('{assistant}' if m['role'] == 'assistant' else m['role'])"
    return (
        f"{bos}{{% for m in messages %}}{{{{ '{begin}'.replace('ROLE', {role}) }}}}"
        "{% for c in m['content'] %}"
        f"{{% if c['type'] == 'image' %}}{{{{ '{image}' }}}}{{% else %}}{{{{ c['text'] }}}}{{% endif %}}"
        f"{{% endfor %}}{{{{ '{end}' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{begin}'.replace('ROLE', '{assistant}') }}}}{{% endif %}}"
    )


def _chatml(image: str) -> str:
    return _template("<|im_start|>ROLE\\n", "<|im_end|>\\n", image)


def _words(bos: str | None, eos: str, *special: str, pad: str = "<pad>", **named: str) -> PreTrainedTokenizerFast:
    """A tokenizer with these special tokens, some of which have names of their own."""
    return named_tokenizer(bos, eos, pad, (*special, *named.values()), named)


_QWEN = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_VISION = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def _qwen_vl(config: Any, processor: Any, vision: dict[str, Any], **more: Any) -> Made:
    words = _words(None, "<|im_end|>", *_QWEN, pad="<|endoftext|>")
    to_id = words.convert_tokens_to_ids
    made = config(
        text_config={
            **language_config(words, Qwen2Config).to_dict(),
            "model_type": f"{config.model_type}_text",
            "num_attention_heads": 2,  # so that a head has 32 dimensions, by either of their configs
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        },
        vision_config={**_QWEN_VISION, **vision},
        image_token_id=to_id("<|image_pad|>"),
        video_token_id=to_id("<|video_pad|>"),
        vision_start_token_id=to_id("<|vision_start|>"),
        vision_end_token_id=to_id("<|vision_end|>"),
        **more,
    )
    size = {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 12 * (2 * PATCH) ** 2}
    pixels = Qwen2VLImageProcessorPil(size=size, patch_size=PATCH)
    template = _chatml("<|vision_start|><|image_pad|><|vision_end|>")
    return made, still(processor)(image_processor=pixels, tokenizer=words, chat_template=template)


_qwen2_vl = partial(_qwen_vl, Qwen2VLConfig, Qwen2VLProcessor, {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2})
_qwen2_5_vl = partial(
    _qwen_vl,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    {
        "hidden_size": 64,
        "intermediate_size": 96,
        "out_hidden_size": 64,
        "window_size": 4 * PATCH,
        "fullatt_block_indexes": [1],
    },
)
_qwen3_vl = partial(
    _qwen_vl,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    {
        "hidden_size": 64,
        "intermediate_size": 96,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    },
)


def _gemma3(**more: Any) -> Made:
    words = _words(
        "<bos>",
        "<end_of_turn>",
        "<start_of_turn>",
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    language = language_config(
        words, Gemma3TextConfig, query_pre_attn_scalar=32, sliding_window=24, sliding_window_pattern=2
    )
    language.layer_types = ["sliding_attention", "full_attention"]
    made = Gemma3Config(
        text_config=language,
        vision_config=siglip_config(),
        mm_tokens_per_image=4,
        initializer_range=language.initializer_range,
        image_token_index=words.image_token_id,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
        **more,
    )
    pixels = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    template = _template(
        "<start_of_turn>ROLE\\n", "<end_of_turn>\\n", "<start_of_image>", "{{ bos_token }}", assistant="model"
    )
    return made, Gemma3Processor(pixels, words, chat_template=template, image_seq_length=4)


def _paligemma(language: Any = GemmaConfig, **more: Any) -> Made:
    words = _words("<bos>", "<eos>", image_token="<image>")
    pixels = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    pixels.image_seq_length = (SIDE // PATCH) ** 2
    processor = PaliGemmaProcessor(pixels, words)
    made = PaliGemmaConfig(
        text_config=language_config(words, language),
        vision_config=siglip_config(projection_dim=64),
        image_token_index=words.image_token_id,
        projection_dim=64,
        hidden_size=64,
        **more,
    )
    return made, processor


def _internvl(language: Any = Qwen2Config, **more: Any) -> Made:
    words = _words(
        None,
        "<|im_end|>",
        "<|im_start|>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = InternVLConfig(
        text_config=language_config(words, language),
        vision_config={**vision, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
        image_token_id=words.context_image_token_id,
        image_seq_length=(SIDE // PATCH // 2) ** 2,
        **more,
    )
    pixels = GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=4)
    processor = still(InternVLProcessor)(
        pixels, words, image_seq_length=made.image_seq_length, chat_template=_chatml("<IMG_CONTEXT>\\n")
    )
    return made, processor


def _aya(**more: Any) -> Made:
    tiles = tuple(f"TILE_{number}" for number in range(1, 5))
    words = _words(
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|>",
        "<|START_OF_IMG|>",
        "<|END_OF_IMG|>",
        "<|IMG_PATCH|>",
        "<|IMG_LINE_BREAK|>",
        "TILE_GLOBAL",
        *tiles,
        image_token="<image>",
    )
    language = language_config(words, Cohere2Config, sliding_window=24)
    language.layer_types = ["sliding_attention", "full_attention"]
    made = AyaVisionConfig(
        text_config=language,
        vision_config=siglip_config(),
        image_token_index=words.convert_tokens_to_ids("<|IMG_PATCH|>"),
        **more,
    )
    pixels = GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=4)
    template = _template(
        "<|START_OF_TURN_TOKEN|>ROLE ", "<|END_OF_TURN_TOKEN|>", "<image>", "{{ bos_token }}", assistant="chatbot"
    )
    processor = AyaVisionProcessor(
        pixels, words, patch_size=PATCH, img_size=SIDE, downsample_factor=2, chat_template=template
    )
    return made, processor


def _mistral3(**more: Any) -> Made:
    words = _words("<s>", "</s>", "<unk>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    made = Mistral3Config(
        vision_config=pixtral_config(4 * SIDE),
        text_config=language_config(words, MistralConfig),
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        **more,
    )
    size = {"longest_edge": 2 * SIDE}
    pixels = PixtralImageProcessorPil(size=size, patch_size={"height": 2 * PATCH, "width": 2 * PATCH})
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' }}"
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '[IMG]' }}{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{{ '[/INST]' }}{% else %}"
        "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    return made, PixtralProcessor(pixels, words, patch_size=PATCH, spatial_merge_size=2, chat_template=template)


def _mllama(**more: Any) -> Made:
    words = _words(
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|python_tag|>",
        pad="<|finetune_right_pad_id|>",
        image_token="<|image|>",
    )
    # The image token is the last: it has an embedding, and the head does not know it.
    assert words.image_token_id == len(words) - 1
    language = {
        "vocab_size": len(words) - 1,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "cross_attention_layers": [1, 3],
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        "initializer_range": 0.3,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_global_layers": 2,
        "attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "intermediate_layers_indices": [0, 1],
        "vision_output_dim": 192,
    }
    made = MllamaConfig(text_config=language, vision_config=vision, image_token_index=words.image_token_id, **more)
    pixels = MllamaImageProcessorPil(size={"height": SIDE, "width": SIDE}, max_image_tiles=4)
    template = _template("<|start_header_id|>ROLE<|end_header_id|>\\n\\n", "<|eot_id|>", "<|image|>", "{{ bos_token }}")
    return made, MllamaProcessor(pixels, words, chat_template=template)


def _idefics2(**more: Any) -> Made:
    words = _words(
        "<s>",
        "<end_of_utterance>",
        "<unk>",
        image_token="<image>",
        image_boundary_token="<fake_token_around_image>",
    )
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    perceiver = {
        "hidden_size": 64,
        "resampler_n_latents": 4,
        "resampler_depth": 2,
        "resampler_n_heads": 2,
        "resampler_head_dim": 32,
        "num_key_value_heads": 1,
    }
    made = Idefics2Config(
        text_config=language_config(words, MistralConfig),
        vision_config={**vision, "image_size": 2 * SIDE, "patch_size": PATCH},
        perceiver_config=perceiver,
        image_token_id=words.image_token_id,
        **more,
    )
    pixels = Idefics2ImageProcessorPil(size={"shortest_edge": SIDE, "longest_edge": 2 * SIDE})
    template = _template("ROLE: ", "<end_of_utterance>\\n", "<image>")
    return made, Idefics2Processor(pixels, words, image_seq_len=4, chat_template=template)


def _glm4v(**more: Any) -> Made:
    words = _words(
        None,
        "<|user|>",
        "[gMASK]",
        "<sop>",
        "<|assistant|>",
        "<|begin_of_image|>",
        "<|end_of_image|>",
        "<|begin_of_video|>",
        "<|end_of_video|>",
        pad="<|endoftext|>",
        image_token="<|image|>",
        video_token="<|video|>",
    )
    to_id = words.convert_tokens_to_ids
    made = Glm4vConfig(
        text_config={
            **language_config(words, Qwen2Config).to_dict(),
            "model_type": "glm4v_text",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
                "partial_rotary_factor": 0.5,
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 2,
            "image_size": 4 * PATCH,
            "patch_size": PATCH,
            "out_hidden_size": 64,
            "intermediate_size": 96,
        },
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
        image_start_token_id=to_id("<|begin_of_image|>"),
        image_end_token_id=to_id("<|end_of_image|>"),
        video_start_token_id=to_id("<|begin_of_video|>"),
        video_end_token_id=to_id("<|end_of_video|>"),
        **more,
    )
    size = {"shortest_edge": 2 * (2 * PATCH) ** 2, "longest_edge": 24 * (2 * PATCH) ** 2}
    pixels = Glm4vImageProcessorPil(size=size, patch_size=PATCH)
    template = _template("<|ROLE|>\\n", "", "<|begin_of_image|><|image|><|end_of_image|>", "[gMASK]<sop>")
    return made, still(Glm4vProcessor)(image_processor=pixels, tokenizer=words, chat_template=template)


OTHERS: dict[str, Callable[..., Made]] = {
    "qwen2-vl": _qwen2_vl,
    "qwen2.5-vl": _qwen2_5_vl,
    "qwen3-vl": _qwen3_vl,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "paligemma2": partial(_paligemma, Gemma2Config),
    "internvl": _internvl,
    "internvl3.5": partial(_internvl, Qwen3Config),
    "aya-vision": _aya,
    "mistral3": _mistral3,
    "mllama": _mllama,
    "idefics2": _idefics2,
    "glm4v": _glm4v,
}
"""Each makes (config, processor); keywords are options of the config."""
