"""Tiny checkpoints with random weights of families other than LLaVA's, saved as the real ones are.

The geometry is small; classes, processors, special tokens and the form of the templates are the families' own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from helpers.families import (
    GRID,
    PATCH,
    SIDE,
    VICUNA,
    clip_config,
    language_config,
    named_tokenizer,
    pixtral_config,
    siglip_config,
    still,
)
from transformers import (
    AyaVisionConfig,
    AyaVisionProcessor,
    Cohere2Config,
    DeepseekVLConfig,
    DeepseekVLProcessor,
    Exaone4_5_Config,
    Exaone4_5_Processor,
    Gemma2Config,
    Gemma3Config,
    Gemma3Processor,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4Processor,
    Gemma4TextConfig,
    GemmaConfig,
    Glm4vConfig,
    Glm4vMoeConfig,
    Glm4vProcessor,
    Glm46VConfig,
    Glm46VProcessor,
    GlmOcrConfig,
    HunYuanVLConfig,
    HunYuanVLProcessor,
    Idefics2Config,
    Idefics2Processor,
    InternVLConfig,
    InternVLProcessor,
    JanusConfig,
    JanusProcessor,
    LightOnOcrConfig,
    LightOnOcrProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoProcessor,
    Mistral3Config,
    MistralConfig,
    MllamaConfig,
    MllamaProcessor,
    Ovis2Config,
    Ovis2Processor,
    PaddleOCRVLConfig,
    PaddleOCRVLProcessor,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    QianfanOCRConfig,
    QianfanOCRProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLProcessor,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    Qwen3VLProcessor,
)
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.hunyuan_vl.image_processing_pil_hunyuan_vl import HunYuanVLImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_cli.prompts.pixtral import PixtralProcessor
from llava_cli.prompts.processor import without_videos

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


def _qwen_vl(
    config: Any, processor: Any, vision: dict[str, Any], text: dict[str, Any] | None = None, **more: Any
) -> Made:
    words = _words(None, "<|im_end|>", *_QWEN, pad="<|endoftext|>")
    to_id = words.convert_tokens_to_ids
    made = config(
        text_config={
            **language_config(words, Qwen2Config).to_dict(),
            "model_type": f"{config.model_type}_text",
            "num_attention_heads": 2,  # so that a head has 32 dimensions, by either of their configs
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            **(text or {}),
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
_QWEN3_VISION = {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 64, "num_position_embeddings": 16}
_DEEPSTACK = {**_QWEN3_VISION, "deepstack_visual_indexes": [0, 1]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GATED_DELTA = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.25,
    },
}
_exaone4_5 = partial(
    _qwen_vl,
    Exaone4_5_Config,
    Exaone4_5_Processor,
    {
        "hidden_size": 64,
        "intermediate_size": 96,
        "out_hidden_size": 64,
        "window_size": 4 * PATCH,
        "fullatt_block_indexes": [1],
        "num_key_value_heads": 1,
    },
    {
        "model_type": "exaone4",
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
)
_qwen3_vl = partial(_qwen_vl, Qwen3VLConfig, Qwen3VLProcessor, _DEEPSTACK)
_qwen3_vl_moe = partial(_qwen_vl, Qwen3VLMoeConfig, Qwen3VLProcessor, _DEEPSTACK, _EXPERTS)
_qwen3_5 = partial(_qwen_vl, Qwen3_5Config, Qwen3VLProcessor, _QWEN3_VISION, _GATED_DELTA)
_qwen3_5_moe = partial(
    _qwen_vl,
    Qwen3_5MoeConfig,
    Qwen3VLProcessor,
    _QWEN3_VISION,
    {**_GATED_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 32},
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


def _glm(config: Any, processor: Any, pixels: Any, text: dict[str, Any], **more: Any) -> Made:
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
    made = config(
        text_config={
            **language_config(words, Qwen2Config).to_dict(),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
                "partial_rotary_factor": 0.5,
            },
            **text,
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
    template = _template("<|ROLE|>\\n", "", "<|begin_of_image|><|image|><|end_of_image|>", "[gMASK]<sop>")
    return made, still(processor)(
        image_processor=pixels(size=size, patch_size=PATCH), tokenizer=words, chat_template=template
    )


_glm4v = partial(_glm, Glm4vConfig, Glm4vProcessor, Glm4vImageProcessorPil, {"model_type": "glm4v_text"})
_glm46v = partial(_glm, Glm46VConfig, Glm46VProcessor, Glm46VImageProcessorPil, {"model_type": "glm4v_text"})
_glm4v_moe = partial(
    _glm,
    Glm4vMoeConfig,
    Glm4vProcessor,
    Glm4vImageProcessorPil,
    {"model_type": "glm4v_moe_text", "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
)
_glm_ocr = partial(
    _glm,
    GlmOcrConfig,
    Glm46VProcessor,
    Glm46VImageProcessorPil,
    {
        "model_type": "glm_ocr_text",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
    },
)


def _ovis2(**more: Any) -> Made:
    indicators = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    # "<image>" itself is no token, as in the original.
    words = _words(None, "<|im_end|>", "<|im_start|>", "<IMG_ATOM>", *indicators, pad="<|endoftext|>")
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = Ovis2Config(
        text_config=language_config(words, Qwen2Config),
        hidden_size=64,
        vocab_size=len(words),
        image_token_id=words.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=words.convert_tokens_to_ids(list(indicators)),
        vision_config={**vision, "image_size": SIDE, "patch_size": PATCH, "vocab_size": 69, "hidden_stride": 2},
        **more,
    )
    pixels = Ovis2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=4)
    return made, Ovis2Processor(pixels, words, image_seq_length=4, chat_template=_chatml("<image>\\n"))


def _lighton_ocr(**more: Any) -> Made:
    words = _words(
        None,
        "<|im_end|>",
        "<|im_start|>",
        pad="<|endoftext|>",
        image_token="<|image_pad|>",
        image_break_token="<|vision_pad|>",
        image_end_token="<|vision_end|>",
    )
    made = LightOnOcrConfig(
        vision_config=pixtral_config(4 * SIDE),
        text_config=language_config(words, Qwen3Config),
        image_token_id=words.image_token_id,
        spatial_merge_size=2,
        **more,
    )
    patch = {"height": 2 * PATCH, "width": 2 * PATCH}
    pixels = PixtralImageProcessorPil(size={"longest_edge": 2 * SIDE}, patch_size=patch)
    template = _chatml("<|image_pad|>")
    return made, LightOnOcrProcessor(pixels, words, patch_size=PATCH, spatial_merge_size=2, chat_template=template)


_DEEPSEEK = _template("ROLE: ", "\\n\\n", "<image_placeholder>", "{{ bos_token }}")


def _deepseek_vl(**more: Any) -> Made:
    words = _words("<s>", "</s>", image_token="<image_placeholder>")
    made = DeepseekVLConfig(
        text_config=language_config(words), vision_config=siglip_config(), image_token_id=words.image_token_id, **more
    )
    pixels = DeepseekVLImageProcessorPil(size={"height": SIDE, "width": SIDE}, min_size=14)
    tokens = (SIDE // PATCH) ** 2
    return made, DeepseekVLProcessor(pixels, words, chat_template=_DEEPSEEK, num_image_tokens=tokens)


def _janus(**more: Any) -> Made:
    words = _words(
        "<s>",
        "</s>",
        image_token="<image_placeholder>",
        boi_token="<begin_of_image>",
        eoi_token="<end_of_image>",
    )
    tokens = (SIDE // PATCH) ** 2
    made = JanusConfig(
        text_config=language_config(words),
        image_token_id=words.image_token_id,
        vision_config={
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
            "mlp_ratio": 1.5,
            "projection_dim": 64,
            "num_image_tokens": tokens,
        },
        vq_config={  # of what it draws with
            "num_embeddings": 32,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": 64,
            "image_token_embed_dim": 64,
        },
        **more,
    )
    pixels = JanusImageProcessorPil(size={"height": SIDE, "width": SIDE}, min_size=14)
    return made, JanusProcessor(pixels, words, chat_template=_DEEPSEEK, num_image_tokens=tokens)


def _gemma4(**more: Any) -> Made:
    words = _words(
        "<bos>",
        "<turn|>",
        "<|turn>",
        "<|video|>",
        image_token="<|image|>",
        boi_token="<|image>",
        eoi_token="<image|>",
        audio_token="<|audio|>",
        boa_token="<|audio>",
        eoa_token="<audio|>",
    )
    made = Gemma4Config(
        text_config=language_config(
            words,
            Gemma4TextConfig,
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention"],
            global_head_dim=32,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=len(words),
        ),
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "patch_size": 4,
            "position_embedding_size": 256,
        },
        audio_config=None,
        image_token_id=words.image_token_id,
        boi_token_id=words.boi_token_id,
        eoi_token_id=words.eoi_token_id,
        video_token_id=words.convert_tokens_to_ids("<|video|>"),
        audio_token_id=words.audio_token_id,
        boa_token_id=words.boa_token_id,
        eoa_token_index=words.eoa_token_id,
        **more,
    )
    template = _template("<|turn>ROLE\\n", "<turn|>\\n", "<|image|>", "{{ bos_token }}", assistant="model")
    return made, without_videos(Gemma4Processor)(
        Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70),
        words,
        video_processor=None,
        chat_template=template,
        image_seq_length=70,
    )


def _llava_next_video(**more: Any) -> Made:
    words = _words("<s>", "</s>", "<unk>", image_token="<image>", video_token="<video>")
    made = LlavaNextVideoConfig(
        vision_config=clip_config(),
        text_config=language_config(words),
        image_token_index=words.image_token_id,
        video_token_index=words.video_token_id,
        image_grid_pinpoints=GRID,
        **more,
    )
    crop = {"height": SIDE, "width": SIDE}
    return made, without_videos(LlavaNextVideoProcessor)(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size=crop, image_grid_pinpoints=GRID
        ),
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy=made.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )


def _qianfan_ocr(**more: Any) -> Made:
    words = _words(
        None,
        "<|im_end|>",
        "<|im_start|>",
        "<image>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
    )
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = QianfanOCRConfig(
        text_config=language_config(words, Qwen3Config),
        vision_config={**vision, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
        image_token_id=words.context_image_token_id,
        image_seq_length=(SIDE // PATCH // 2) ** 2,
        **more,
    )
    pixels = GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=4)
    template = _chatml("<image>\\n")
    return made, QianfanOCRProcessor(pixels, words, image_seq_length=made.image_seq_length, chat_template=template)


def _paddleocr_vl(**more: Any) -> Made:
    words = _words(
        "<s>",
        "</s>",
        "<|IMAGE_START|>",
        "<|IMAGE_END|>",
        image_token="<|IMAGE_PLACEHOLDER|>",
        video_token="<|video_pad|>",
    )
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = PaddleOCRVLConfig(
        text_config={
            **language_config(words, Qwen2Config).to_dict(),
            "model_type": "paddleocr_vl_text",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        },
        vision_config={**vision, "image_size": 4 * PATCH, "patch_size": PATCH},
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
        vision_start_token_id=words.convert_tokens_to_ids("<|IMAGE_START|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|IMAGE_END|>"),
        **more,
    )
    size = {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 12 * (2 * PATCH) ** 2}
    pixels = PaddleOCRVLImageProcessorPil(size=size, patch_size=PATCH)
    image = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    template = _template("ROLE: ", "\\n", image, "{{ bos_token }}")
    return made, PaddleOCRVLProcessor(pixels, words, chat_template=template)


def _hunyuan_vl(**more: Any) -> Made:
    words = _words(
        "<s>",
        "</s>",
        "<newline>",
        image_token="<image>",
        image_start_token="<im_start>",
        image_end_token="<im_end>",
    )
    made = HunYuanVLConfig(
        text_config={
            **language_config(words, Qwen2Config).to_dict(),
            "model_type": "hunyuan_vl_text",
            "rope_parameters": {
                "rope_type": "xdrope",
                "rope_theta": 10000.0,
                "xdrope_section": [4, 4, 4, 4],
                "alpha": 1.0,
                "factor": 1.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "out_hidden_size": 64,
            "text_hidden_size": 64,
            "patch_size": PATCH,
            "max_image_size": 8 * PATCH,
            "min_image_size": 2 * PATCH,
            "img_max_token_num": 64,
        },
        image_token_id=words.image_token_id,
        im_start_id=words.image_start_token_id,
        im_end_id=words.image_end_token_id,
        im_newline_id=words.convert_tokens_to_ids("<newline>"),
        **more,
    )
    size = {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 12 * (2 * PATCH) ** 2}
    pixels = HunYuanVLImageProcessorPil(size=size, patch_size=PATCH)
    template = _template("ROLE: ", "\\n", "<im_start><image><im_end>", "{{ bos_token }}")
    return made, HunYuanVLProcessor(pixels, words, chat_template=template)


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
    "qwen3-vl-moe": _qwen3_vl_moe,
    "qwen3.5": _qwen3_5,
    "qwen3.5-moe": _qwen3_5_moe,
    "exaone4.5": _exaone4_5,
    "glm4.6v": _glm46v,
    "glm4v-moe": _glm4v_moe,
    "glm-ocr": _glm_ocr,
    "gemma4": _gemma4,
    "ovis2": _ovis2,
    "lighton-ocr": _lighton_ocr,
    "qianfan-ocr": _qianfan_ocr,
    "paddleocr-vl": _paddleocr_vl,
    "hunyuan-vl": _hunyuan_vl,
    "deepseek-vl": _deepseek_vl,
    "janus": _janus,
    "llava-next-video": _llava_next_video,
}
"""Each makes (config, processor); keywords are options of the config."""
