"""The built-in model before it has learned anything: tokenizer, processor, geometry."""

from __future__ import annotations

from functools import cache
from random import Random

import samples
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

SIDE, PATCH = 64, 8
GRID = SIDE // PATCH
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %} "
    "{% elif m.role == 'user' %}USER: "
    "{% for c in m.content if c.type == 'image' %}<image>\n{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}"
    "{% else %} ASSISTANT:{% for c in m.content if c.type == 'text' %} {{ c.text }}{% endfor %}{{ eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def image_processor() -> LlavaImageProcessorPil:
    """Pads to a square of grey and resizes, so that the whole of any picture is seen."""
    half = [0.5, 0.5, 0.5]
    size = {"height": SIDE, "width": SIDE}
    return LlavaImageProcessorPil(
        do_pad=True, do_center_crop=False, size=size, crop_size=size, image_mean=half, image_std=half
    )


@cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 640 tokens, trained on what the generator asks."""
    rng, lines = Random(0), []
    for _ in range(6000):
        lines += [f"USER: \n{q} ASSISTANT: {a}" for _, q, a in samples.drawing(rng, 9).turns]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=640, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def make_processor() -> LlavaProcessor:
    return LlavaProcessor(
        image_processor(),
        make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """CLIP tower 6 x 192 on 8 x 8 patches, two-layer projector, Llama decoder 4 x 256."""
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=192,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        initializer_range=0.05,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=GRID * GRID,
        tie_word_embeddings=True,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    model.set_attn_implementation("eager")  # torch's fused attention is slower backwards at this size
    return model


def pixels(images: list[Image.Image], processor: LlavaImageProcessorPil) -> torch.Tensor:
    """Pictures -> float [n, 3, 64, 64], exactly as the command prepares them."""
    return processor(images, return_tensors="pt").pixel_values
