"""Tiny checkpoints with random weights, one of each family, saved as the real ones are.

The geometry is small; classes, processors, special tokens and templates are the families' own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMProcessor,
    VipLlavaConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from llava_cli.prompts.pixtral import PixtralProcessor

# SmolVLM's processor asks for it also where there are no videos.
processing_smolvlm.num2words = processing_smolvlm.num2words or str

PATCH, SIDE = 14, 56
_FULL = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
GRID = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]

VICUNA = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{{ ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ ' ' + c['text'] + '</s> ' }}{% endfor %}"
    "{% endif %}{% endfor %}"
)
VIP = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '###Human: ' }}{% elif m['role'] == 'assistant' %}"
    "{{ '###Assistant: ' }}{% endif %}{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '###Assistant:' }}{% endif %}"
)


def _headed(begin: str, head: str, end: str) -> str:
    """A template of messages that stand between a head with their role and an end."""
    return (
        f"{{% for m in messages %}}{{{{ '{begin}' + m['role'] + '{head}' }}}}"
        "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
        "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}"
        f"{{{{ '{end}' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{begin}assistant{head}' }}}}{{% endif %}}"
    )


CHATML = _headed("<|im_start|>", "\\n", "<|im_end|>\\n")
YI = _headed("<|im_start|>", "\\n", "<|im_end|>")
LLAMA3 = _headed("<|start_header_id|>", "<|end_header_id|>\\n\\n", "<|eot_id|>")
ONEVISION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ '\n' + c['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PIXTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '[IMG]' }}{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{{ '[/INST]' }}{% else %}"
    "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
)
SMOL = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def tokenizer(
    bos: str | None = "<s>", eos: str = "</s>", pad: str = "<pad>", extra: tuple[str, ...] = ("<unk>",)
) -> PreTrainedTokenizerFast:
    """Byte-level: every byte is a token, and the special ones of the family besides."""
    return named_tokenizer(bos, eos, pad, ("<image>", *extra), {"image_token": "<image>"})


def named_tokenizer(
    bos: str | None, eos: str, pad: str, special: tuple[str, ...], names: dict[str, str]
) -> PreTrainedTokenizerFast:
    """As `tokenizer`, with other special tokens, some of which are attributes with these names."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokens = [t for t in (pad, bos, eos, *special) if t]
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token="<unk>" if "<unk>" in special else None,
        padding_side="left",
        extra_special_tokens=names,
    )


Words = Callable[[], PreTrainedTokenizerFast]
_yi = partial(tokenizer, "<|startoftext|>", "<|im_end|>", extra=("<unk>", "<|endoftext|>", "<|im_start|>"))
_llama3 = partial(
    tokenizer,
    "<|begin_of_text|>",
    "<|eot_id|>",
    extra=("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
)
_qwen = partial(tokenizer, None, "<|im_end|>", "<|endoftext|>", extra=("<|im_start|>", "<video>"))
_TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
_smol = partial(
    tokenizer,
    None,
    "<end_of_utterance>",
    "<|im_end|>",
    extra=("<|im_start|>", "<fake_token_around_image>", "<global-img>", *_TILES),
)


def language_config(words: PreTrainedTokenizerFast, kind: Callable[..., Any] = LlamaConfig, **more: Any) -> Any:
    return kind(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        initializer_range=0.3,
        **more,
    )


def clip_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=64,
    )


def siglip_config(**more: Any) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
        **more,
    )


def _llava(
    text: Callable[..., Any], template: str, words: Words = tokenizer, siglip: bool = False, **config: Any
) -> tuple[Any, Any]:
    made_words = words()
    config = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", **config}
    strategy, cls = config["vision_feature_select_strategy"], int(not siglip)
    made = LlavaConfig(
        vision_config=siglip_config() if siglip else clip_config(),
        text_config=language_config(made_words, text),
        image_token_index=made_words.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2 + (cls if strategy == "full" else cls - 1),
        **config,
    )
    pixels = (
        SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
        if siglip
        else CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    )
    processor = LlavaProcessor(
        pixels,
        made_words,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=cls,
        chat_template=template,
    )
    return made, processor


def _vip(**config: Any) -> tuple[Any, Any]:
    _, processor = _llava(LlamaConfig, VIP)
    config = {"vision_feature_layers": [-2, -3, 1], **config}
    made = VipLlavaConfig(
        vision_config=clip_config(),
        text_config=language_config(processor.tokenizer),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        **config,
    )
    return made, processor


def _next(text: Callable[..., Any], template: str, words: Words = tokenizer, **config: Any) -> tuple[Any, Any]:
    made_words = words()
    made = LlavaNextConfig(
        vision_config=clip_config(),
        text_config=language_config(made_words, text),
        image_token_index=made_words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=GRID,
        **config,
    )
    pixels = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=GRID
    )
    processor = LlavaNextProcessor(
        pixels,
        made_words,
        patch_size=PATCH,
        vision_feature_select_strategy=made.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=template,
    )
    return made, processor


def still(kind: Any) -> Any:
    """A processor class less its part for videos, which needs torchvision."""
    parts = classmethod(lambda cls: ["image_processor", "tokenizer"])
    # SmolVLM's asks its part for videos how many frames it takes, also where there are none.
    videos = SimpleNamespace(num_frames=1, fps=1)
    return type(kind.__name__, (kind,), {"get_attributes": parts, "video_processor": videos})


def _onevision(**config: Any) -> tuple[Any, Any]:
    words = _qwen()
    made = LlavaOnevisionConfig(
        vision_config=siglip_config(),
        text_config=language_config(words, Qwen2Config),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=GRID,
        **config,
    )
    pixels = LlavaOnevisionImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=GRID)
    processor = still(LlavaOnevisionProcessor)(
        image_processor=pixels,
        tokenizer=words,
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION,
    )
    return made, processor


def pixtral_config(image_size: int) -> PixtralVisionConfig:
    return PixtralVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=32,
        image_size=image_size,
        patch_size=PATCH,
    )


def _pixtral(**config: Any) -> tuple[Any, Any]:
    words = tokenizer(extra=("<unk>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"))
    made = LlavaConfig(
        vision_config=pixtral_config(2 * SIDE),
        text_config=language_config(words, MistralConfig),
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
        image_seq_length=1,
        **{**_FULL, **config},
    )
    pixels = PixtralImageProcessorPil(size={"longest_edge": 2 * SIDE}, patch_size={"height": PATCH, "width": PATCH})
    return made, PixtralProcessor(pixels, words, patch_size=PATCH, chat_template=PIXTRAL)


def _smolvlm(kind: Any = Idefics3Config, **config: Any) -> tuple[Any, Any]:
    words = _smol()
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
    made = kind(
        vision_config={**vision, "image_size": SIDE, "patch_size": PATCH},
        text_config=language_config(words),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
        **config,
    )
    size = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    tokens = (SIDE // PATCH // made.scale_factor) ** 2
    options = {"tokenizer": words, "image_seq_len": tokens, "chat_template": SMOL}
    if kind is Idefics3Config:
        return made, Idefics3Processor(Idefics3ImageProcessorPil(**size), **options)
    return made, still(SmolVLMProcessor)(SmolVLMImageProcessorPil(**size), video_processor=None, **options)


FAMILIES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "llava-llama": partial(_llava, LlamaConfig, VICUNA),
    "llava-mistral": partial(_llava, MistralConfig, MISTRAL),
    "llava-full": partial(_llava, LlamaConfig, VICUNA, **_FULL),
    "llava-layers": partial(_llava, LlamaConfig, VICUNA, vision_feature_layer=[-2, 1]),
    "llava-interleave": partial(_llava, Qwen2Config, CHATML, _qwen, siglip=True, **_FULL),
    "vip-llava": _vip,
    "llava-next-vicuna": partial(_next, LlamaConfig, VICUNA),
    "llava-next-mistral": partial(_next, MistralConfig, MISTRAL),
    "llava-next-34b": partial(_next, LlamaConfig, YI, _yi),
    "llava-next-llama3": partial(_next, LlamaConfig, LLAMA3, _llama3),
    "llava-next-qwen": partial(_next, Qwen2Config, CHATML, _qwen),
    "llava-onevision": _onevision,
    "pixtral": _pixtral,
    "smolvlm": _smolvlm,
    "smolvlm2": partial(_smolvlm, SmolVLMConfig),
}
"""Each makes (config, processor); keywords are options of the config."""


def save(family: str, folder: Path, tied: bool = False, shard: str = "5GB", **config: Any) -> Path:
    """Writes the family's tiny checkpoint into a folder, the same one each time.

    `tied` makes one tensor of embeddings and head, `shard` is the largest that a file may be, and `config` changes
    options of the family's config.
    """
    return save_made(FAMILIES[family], folder, tied, shard, **config)


def save_made(
    make: Callable[..., tuple[Any, Any]], folder: Path, tied: bool = False, shard: str = "5GB", **config: Any
) -> Path:
    """As `save`, of what `make` makes."""
    torch.manual_seed(0)
    made, processor = make(**config)
    made.tie_word_embeddings = made.text_config.tie_word_embeddings = tied
    model = AutoModelForImageTextToText.from_config(made)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.any() and not name.endswith("bias"):  # gates and projectors, behind which nothing is seen
                torch.nn.init.normal_(weight, std=0.3)
        # So that its answers do not soon end, and show no pictures.
        head = model.get_output_embeddings().weight
        head[[token for token in (made.text_config.eos_token_id, made.image_token_id) if token < len(head)]] = 0
    model.save_pretrained(folder, max_shard_size=shard)
    processor.save_pretrained(folder)
    return folder


def processor_of(family: str, folder: Path) -> Any:
    """The family's processor as transformers itself reads it from a folder."""
    return processor_like(FAMILIES[family]()[1], folder)


def processor_like(made: Any, folder: Path) -> Any:
    """A processor of the same class as another, as transformers itself reads it from a folder."""
    videos = {"video_processor": None} if "video_processor" in vars(type(made)) else {}
    return type(made).from_pretrained(folder, backend="pil", **videos)
