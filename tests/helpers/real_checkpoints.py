"""Folders that are real checkpoints in all but their weights: their small files and their real vocabularies.

The files are those of the models on the Hub, as far as two sources agree on them; where there is one alone, or none, a
comment says so. Ids of tokens and sizes of vocabularies are in the models' config.json and in transformers' conversion
scripts, templates in transformers' tests and its documentation. Sizes that no prompt depends on are tiny, so that a
model with random weights can be made of them too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from helpers import vocabularies
from helpers.families import CHATML, MISTRAL, SMOL, VICUNA, VIP, YI

Part = str | tuple[str]
"""Of a prompt: text, or a special token, which is a tuple of one."""
Turns = Sequence[tuple[str, str]]
"""Questions and answers; the last answer is missing, and each {} in a question is a picture."""


@dataclass(frozen=True)
class Format:
    """A prompt format as its authors' code has it: what stands around a question and an answer."""

    before: tuple[Part, ...]
    """Of the first question."""
    middle: tuple[Part, ...]
    """After a question."""
    after: tuple[Part, ...]
    """Between an answer and the next question."""
    answer: str = ""
    """Before an answer."""
    picture: tuple[Part, ...] = (("<image>",), "\n")
    lead: str = ""
    """Before the text of a question."""
    lead_alone: str | None = None
    """Where it has no picture; None: the same."""
    final: str = ""
    """Behind the last question's `middle`."""

    def parts(self, turns: Turns) -> list[Part]:
        """The prompt of a conversation, with neighboring texts joined."""
        found: list[Part] = [*self.before]
        for number, (question, answer) in enumerate(turns):
            found += self.after if number else ()
            lead = self.lead if "{}" in question or self.lead_alone is None else self.lead_alone
            found += [*self.picture * question.count("{}"), lead + question.replace("{}", ""), *self.middle]
            found += [self.answer + answer if number < len(turns) - 1 else self.final]
        joined: list[Part] = []
        for part in found:
            if joined and isinstance(part, str) and isinstance(joined[-1], str):
                joined[-1] += part
            elif part:
                joined.append(part)
        return joined


def _vicuna(system: str) -> Format:
    return Format((f"{system} USER: ",), (" ASSISTANT:",), (("</s>",), "USER: "), " ")


def _chatml(system: str, end: str, **more: Any) -> Format:
    start, stop = ("<|im_start|>",), ("<|im_end|>",)
    first: tuple[Part, ...] = (start, f"system\n{system}", stop, end) if system else ()
    begin: tuple[Part, ...] = (start, "user\n")
    return Format((*first, *begin), (stop, end, start, "assistant\n"), (stop, end, *begin), **more)


def _onevision(end: str) -> Format:
    start, stop = ("<|im_start|>",), ("<|im_end|>",)
    middle, after = (stop, end, start, "assistant"), (stop, end, start, "user ")
    return Format((start, "user "), middle, after, answer=" \n", picture=(("<image>",),), lead="\n", final="\n")


def _llama3(system: str) -> Format:
    def head(role: str) -> tuple[Part, ...]:
        return ("<|start_header_id|>",), role, ("<|end_header_id|>",), "\n\n"

    eot = ("<|eot_id|>",)
    return Format((*head("system"), system, eot, *head("user")), (eot, *head("assistant")), (eot, *head("user")))


def _tiles(rows: int, columns: int, has_tokens: bool) -> tuple[Part, ...]:
    """A picture of SmolVLM's: each tile behind its place, which is a token in the smaller models, and all of it."""
    fake, image = ("<fake_token_around_image>",), ("<image>",)

    def place(name: str) -> Part:
        return (name,) if has_tokens else name

    found: list[Part] = []
    for row in range(1, rows + 1):
        for column in range(1, columns + 1):
            found += [fake, place(f"<row_{row}_col_{column}>"), image]
        found.append("\n")
    return (*found, "\n", fake, place("<global-img>"), image, fake)


def _smolvlm(has_tokens: bool) -> Format:
    end = ("<end_of_utterance>",)
    return Format(
        (("<|im_start|>",), "User:"),
        (end, "\nAssistant:"),
        (end, "\nUser:"),
        answer=" ",
        picture=_tiles(3, 4, has_tokens),
        lead_alone=" ",
    )


V1 = _vicuna(
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VIP_V1 = _vicuna(
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
HUB_VICUNA = Format(("USER: ",), (" ASSISTANT:",), (" USER: ",), " ")
HUB_VIP = Format(("###Human: ",), ("###Assistant:",), ("###Human: ",), " ")
INST = Format(("[INST] ",), (" [/INST]",), (" ", ("</s>",), "[INST] "), " ")
HUB_INST = Format(("[INST] ",), (" [/INST]",), (("</s>",), " [INST] "), " ")
# Mistral's later vocabularies have [INST] as a token.
INST_V3 = Format((("[INST]",), " "), (" ", ("[/INST]",)), (" ", ("</s>",), ("[INST]",), " "), " ")
HUB_INST_V3 = Format((("[INST]",), " "), (" ", ("[/INST]",)), (("</s>",), " ", ("[INST]",), " "), " ")
YI_DIRECT, HUB_YI = _chatml("Answer the questions.", ""), _chatml("", "")
QWEN_1_5, HUB_QWEN = _chatml("You are a helpful assistant.", "\n"), _chatml("", "\n")
HUB_ONEVISION, HUB_INTERLEAVE = _onevision(""), _onevision("\n")
LLAMA_3 = _llama3(
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_ROW = ("[IMG]",)
PIXTRAL = Format(
    (("<s>",), ("[INST]",)),
    (("[/INST]",),),
    (("</s>",), ("[INST]",)),
    picture=(_ROW, ("[IMG_BREAK]",), _ROW, ("[IMG_BREAK]",), _ROW, ("[IMG_END]",)),
)
"""Pixtral's, for pictures of three rows of patches."""
HUB_PIXTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST]' }}"
    "{% for chunk in message['content'] %}{% if chunk['type'] == 'text' %}{{ chunk['text'] }}"
    "{% elif chunk['type'] == 'image' %}{{ '[IMG]' }}{% endif %}{% endfor %}{{ '[/INST]' }}{% else %}"
    "{% for chunk in message['content'] %}{{ chunk['text'] }}{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
)
_ONEVISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Of the templates like OneVision's, this one alone has the 699 bytes of the file on the Hub.
_INTERLEAVE = _ONEVISION.replace("'<|im_end|>'", "'<|im_end|>' + '\n'")
_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 64,
}
_SIGLIP = _CLIP | {"model_type": "siglip_vision_model", "image_size": 384, "vision_use_head": False}
_PIXTRAL = {key: _CLIP[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
_PIXTRAL |= {"model_type": "pixtral", "num_hidden_layers": 1, "head_dim": 32, "image_size": 1024, "patch_size": 16}
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-05,
}
_NEXT_GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_ONEVISION_GRID = [[384 * height, 384 * width] for height in range(1, 7) for width in range(1, 7)]
_CLIP_PIXELS = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}
_SIGLIP_PIXELS = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 384, "width": 384},
}
_PIXELS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": _CLIP_PIXELS,
    "SiglipImageProcessor": _SIGLIP_PIXELS,
    "LlavaNextImageProcessor": _CLIP_PIXELS
    | {"aspect_ratio_setting": "anyres", "do_pad": True, "image_grid_pinpoints": _NEXT_GRID},
    "LlavaOnevisionImageProcessor": _SIGLIP_PIXELS | {"do_pad": True, "image_grid_pinpoints": _ONEVISION_GRID},
    "PixtralImageProcessor": {key: value for key, value in _CLIP_PIXELS.items() if "crop" not in key}
    | {"patch_size": {"height": 16, "width": 16}, "size": {"longest_edge": 1024}},
    "Idefics3ImageProcessor": _SIGLIP_PIXELS | {"do_image_splitting": True, "do_pad": True},
}
_PROCESSORS = {
    "llava": "LlavaProcessor",
    "vipllava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
    "idefics3": "Idefics3Processor",
}
_TOWERS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": _CLIP,
    "LlavaNextImageProcessor": _CLIP,
    "SiglipImageProcessor": _SIGLIP,
    "LlavaOnevisionImageProcessor": _SIGLIP,
    "PixtralImageProcessor": _PIXTRAL,
    "Idefics3ImageProcessor": _PIXTRAL | {"model_type": "idefics3_vision"},
}
_DEFAULT = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
_FULL = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}


@dataclass(frozen=True)
class Real:
    """A checkpoint: its vocabulary, its added tokens in their order, its formats, and what its configs say."""

    vocabulary: str
    backbone: str
    model_type: str
    vocab_size: int
    native: Format
    hub: Format | None
    """That of its own template; None if it has none, or the native one."""
    template: str
    ends: str
    added: tuple[str, ...] = ("<image>", "<pad>")
    pixels: str = "CLIPImageProcessor"
    config: dict[str, Any] = field(default_factory=lambda: _DEFAULT)
    words: dict[str, Any] = field(default_factory=dict)
    """Of `tokenizer_config.json`."""
    image: str = "<image>"
    side: int = 0
    """Of a tile in pixels; 0 if it is the tower's own."""
    patch: int = 0

    def expected(self, turns: Turns, native: bool) -> list[int]:
        """The ids by the vocabulary's own library: each text between special tokens by itself, one id a picture."""
        ids, encode = self.ids(), vocabularies.encoder(self.vocabulary)
        form = self.native if native else self.hub
        assert form
        begin = {"llama": [1], "mistral": [1], "mistral-v3": [1], "llama3": [128000]}.get(self.vocabulary, [])
        found = [encode(part) if isinstance(part, str) else [ids[part[0]]] for part in form.parts(turns)]
        return [*begin, *(number for part in found for number in part)]

    def ids(self) -> dict[str, int]:
        return vocabularies.special_ids(self.vocabulary, self.added)


_LLAMA = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False}
_LLAMA |= {"bos_token": "<s>", "unk_token": "<unk>", "use_default_system_prompt": False, "sp_model_kwargs": {}}
# Only LLaVA 1.5's `legacy` has a source; no id depends on it where the file's own pipeline is used.
_MISTRAL = _LLAMA | {"legacy": True}
# That Yi has no BOS is in llama.cpp's issue 3966, too; the rest of its file has no source but the vocabulary.
_YI = _LLAMA | {"add_bos_token": False, "bos_token": "<|startoftext|>", "pad_token": "<unk>"}
# As xtuner's converter leaves it: Llama's class has put <unk> before <image>.
_LLAMA3 = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<|begin_of_text|>", "unk_token": "<unk>"}
_QWEN = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "unk_token": None, "add_prefix_space": False}
_QWEN |= {"pad_token": "<|endoftext|>", "errors": "replace", "split_special_tokens": False}
# The ids of SmolVLM's tokens have two sources, the names of the reserved ones none; they are in no prompt.
_SMOL = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "unk_token": "<|endoftext|>"}
_SMOL |= {"pad_token": "<|im_end|>", "add_prefix_space": False, "truncation_side": "left"}
_PLACES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
_RESERVED = tuple(f"<|reserved_special_token_{i}|>" for i in range(88))
_CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
_NEXT = {"pixels": "LlavaNextImageProcessor"}

REAL = {
    "llava-hf/llava-1.5-7b-hf": Real(
        "llama", "llama", "llava", 32064, V1, HUB_VICUNA, VICUNA, "</s>", words=_LLAMA | {"pad_token": "<pad>"}
    ),
    "llava-hf/bakLlava-v1-hf": Real(  # its card asks in this form; what its template is, has no source
        "mistral", "mistral", "llava", 32064, V1, HUB_VICUNA, VICUNA, "</s>", words=_MISTRAL | {"pad_token": "<pad>"}
    ),
    "llava-hf/vip-llava-7b-hf": Real(
        "llama",
        "llama",
        "vipllava",
        32064,
        VIP_V1,
        HUB_VIP,
        VIP,
        "</s>",
        config={"vision_feature_layers": [-2, -3, 1]},
        words=_LLAMA | {"pad_token": "<pad>"},
    ),
    "llava-hf/llava-v1.6-vicuna-7b-hf": Real(
        "llama",
        "llama",
        "llava_next",
        32064,
        V1,
        HUB_VICUNA,
        VICUNA,
        "</s>",
        ("<image>",),
        words=_LLAMA | {"pad_token": "<unk>"},
        **_NEXT,
    ),
    "llava-hf/llava-v1.6-mistral-7b-hf": Real(
        "mistral",
        "mistral",
        "llava_next",
        32064,
        INST,
        HUB_INST,
        MISTRAL,
        "</s>",
        words=_MISTRAL | {"pad_token": "<pad>"},
        **_NEXT,
    ),
    "a fine-tuned Mistral 0.3": Real(
        "mistral-v3",
        "mistral",
        "llava_next",
        32832,
        INST_V3,
        HUB_INST_V3,
        MISTRAL,
        "</s>",
        words=_MISTRAL | {"pad_token": "<pad>"},
        **_NEXT,
    ),
    "llava-hf/llava-v1.6-34b-hf": Real(
        "yi", "llama", "llava_next", 64064, YI_DIRECT, HUB_YI, YI, "<|im_end|>", ("<image>",), words=_YI, **_NEXT
    ),
    "xtuner/llava-llama-3-8b-v1_1-transformers": Real(
        "llama3",
        "llama",
        "llava",
        128320,
        LLAMA_3,
        None,
        "",
        "<|eot_id|>",
        ("<unk>", "<image>", "<pad>"),
        words=_LLAMA3 | {"pad_token": "<pad>"},
    ),
    "llava-hf/llava-next-72b-hf": Real(  # its card has this form; what its template is, has no source
        "qwen", "qwen2", "llava_next", 152064, QWEN_1_5, HUB_QWEN, CHATML, "<|im_end|>", _CHAT, words=_QWEN, **_NEXT
    ),
    "llava-hf/llava-interleave-qwen-0.5b-hf": Real(
        "qwen",
        "qwen2",
        "llava",
        152000,
        QWEN_1_5,
        HUB_INTERLEAVE,
        _INTERLEAVE,
        "<|im_end|>",
        _CHAT,
        "SiglipImageProcessor",
        _FULL,
        _QWEN,
    ),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": Real(
        "qwen",
        "qwen2",
        "llava_onevision",
        152000,
        QWEN_1_5,
        HUB_ONEVISION,
        _ONEVISION,
        "<|im_end|>",
        (*_CHAT, "<video>"),
        "LlavaOnevisionImageProcessor",
        _FULL,
        _QWEN,
    ),
    "mistral-community/pixtral-12b": Real(  # as mistral-common has it; how its file splits words, has no second source
        "pixtral",
        "mistral",
        "llava",
        131072,
        PIXTRAL,
        None,
        HUB_PIXTRAL,
        "</s>",
        (),
        "PixtralImageProcessor",
        _FULL | {"image_seq_length": 1},
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "unk_token": "<unk>"},
        image="[IMG]",
    ),
    "HuggingFaceTB/SmolVLM-Instruct": Real(
        "smollm2",
        "llama",
        "idefics3",
        49155,
        _smolvlm(has_tokens=False),
        None,
        SMOL,
        "<end_of_utterance>",
        ("<fake_token_around_image>", "<image>", "<end_of_utterance>"),
        "Idefics3ImageProcessor",
        {"scale_factor": 3},
        _SMOL,
        side=384,
        patch=14,
    ),
    "HuggingFaceTB/SmolVLM-256M-Instruct": Real(
        "smollm2",
        "llama",
        "idefics3",
        49280,
        _smolvlm(has_tokens=True),
        None,
        SMOL,
        "<end_of_utterance>",
        ("<global-img>", *_PLACES, "<fake_token_around_image>", "<image>", *_RESERVED, "<end_of_utterance>"),
        "Idefics3ImageProcessor",
        {"scale_factor": 4},
        _SMOL,
        side=512,
        patch=16,
    ),
}
"""Each by its name on the Hub."""


def save(name: str, folder: Path, weights: bool = False, words: dict[str, Any] | None = None) -> Path:
    """Writes the checkpoint's files into a folder.

    `weights` makes random ones, too. `words` changes options of `tokenizer_config.json`.
    """
    real = REAL[name]
    contents = _files(replace(real, words=real.words | (words or {})))
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in contents.items():
        (folder / file).write_text(json.dumps(content, indent=2))
    (folder / "tokenizer.json").write_text(vocabularies.tokenizer_json(real.vocabulary, real.added))
    if real.template:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": real.template}))
    if weights:
        import torch
        from transformers import AutoConfig, AutoModelForImageTextToText

        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(folder)
        AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def _files(real: Real) -> dict[str, dict[str, Any]]:
    grids = {"llava_next": _NEXT_GRID, "llava_onevision": _ONEVISION_GRID}
    ids = real.ids()
    processor = "PixtralProcessor" if real.image == "[IMG]" else _PROCESSORS[real.model_type]
    ends = {"eos_token_id": ids[real.ends], "vocab_size": real.vocab_size}
    config = {
        "model_type": real.model_type,
        "ignore_index": -100,
        "image_token_id" if real.model_type == "idefics3" else "image_token_index": ids[real.image],
        "projector_hidden_act": "gelu",
        "text_config": {"model_type": real.backbone, "max_position_embeddings": 32768, **_TINY, **ends},
        "vision_config": _TOWERS[real.pixels]
        | ({"image_size": real.side, "patch_size": real.patch} if real.side else {}),
        **({"image_grid_pinpoints": grids[real.model_type]} if real.model_type in grids else {}),
        **({"video_token_index": ids["<video>"], "vision_aspect_ratio": "anyres_max_9"} if "<video>" in ids else {}),
        **real.config,
    }
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    known = {str(number): {"content": token, **flags, "special": True} for token, number in ids.items()}
    words = {"added_tokens_decoder": known, "clean_up_tokenization_spaces": False, "eos_token": real.ends}
    sizes = {"size": {"longest_edge": 4 * real.side}, "max_image_size": {"longest_edge": real.side}}
    return {
        "config.json": config,
        "processor_config.json": {"processor_class": processor, **_processor_options(real)},
        "preprocessor_config.json": _PIXELS[real.pixels]
        | {"image_processor_type": real.pixels, "processor_class": processor}
        | (sizes if real.side else {}),
        "tokenizer_config.json": words
        | {"model_max_length": 1000000000000000019884624838656, "processor_class": processor, **real.words},
    }


def _processor_options(real: Real) -> dict[str, Any]:
    """What `processor_config.json` says besides its class."""
    if real.model_type == "idefics3":
        return {"image_seq_len": (real.side // real.patch // real.config["scale_factor"]) ** 2}
    options: dict[str, Any] = {"image_token": real.image}
    if real.image == "[IMG]":
        return options | {"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]", "patch_size": 16}
    options["vision_feature_select_strategy"] = real.config.get("vision_feature_select_strategy", "default")
    if real.model_type == "llava_onevision":
        return options | {"num_image_tokens": 729, "video_token": "<video>"}
    return options | {"patch_size": 14, "num_additional_image_tokens": int(_TOWERS[real.pixels] is _CLIP)}
