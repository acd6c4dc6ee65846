"""A LLaVA checkpoint with CLIP's vision tower and Llama's decoder, written as the two GGUF files of llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

Tensors = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


def write(checkpoint: Path, folder: Path) -> tuple[Path, Path]:
    """The built-in checkpoint as llama.cpp's two files: the language model and the vision tower with its projector."""
    tensors = {name: tensor.astype(np.float32) for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    model, mmproj = folder / "model.gguf", folder / "mmproj.gguf"
    _write_language_model(checkpoint, tensors, model)
    _write_vision(checkpoint, tensors, mmproj)
    return model, mmproj


def _write_language_model(checkpoint: Path, tensors: Tensors, path: Path) -> None:
    import gguf  # type: ignore[import-not-found]

    config = _json(checkpoint / "config.json")["text_config"]
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(layers)
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(config["num_key_value_heads"])
    out.add_rope_dimension_count(config["head_dim"])
    out.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_file_type(gguf.LlamaFileType.ALL_F32)

    tokenizer = _json(checkpoint / "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    kinds = gguf.TokenType
    out.add_tokenizer_model("gpt2")  # byte-level BPE
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens)
    out.add_token_types([kinds.CONTROL if token in special else kinds.NORMAL for token in tokens])
    out.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    out.add_bos_token_id(config["bos_token_id"])
    out.add_eos_token_id(config["eos_token_id"])
    out.add_pad_token_id(config["pad_token_id"])
    out.add_add_bos_token(True)
    # The server has put a marker `<__media_…__>` before the text for each picture, and shows templates text alone.
    template = (checkpoint / "chat_template.jinja").read_text("utf-8")
    out.add_chat_template(template.replace("{{ c.text }}", r"{{ c.text | replace('__>', '__>\n') }}"))

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    rotated = {"q_proj.weight": heads, "k_proj.weight": config["num_key_value_heads"]}
    for name, tensor in tensors.items():
        if name.startswith("language_model."):
            if parts := rotated.get(".".join(name.split(".")[-2:])):  # halves of a head -> pairs
                tensor = tensor.reshape(parts, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
            out.add_tensor(names.get_name(name.removeprefix("language_model."), (".weight",)), tensor)
    _close(out)


def _write_vision(checkpoint: Path, tensors: Tensors, path: Path) -> None:
    import gguf

    model = _json(checkpoint / "config.json")
    config, processor = model["vision_config"], _json(checkpoint / "processor_config.json")["image_processor"]
    layers = config["num_hidden_layers"]
    out = gguf.GGUFWriter(path, "clip")
    out.add_type(gguf.GGUFType.MMPROJ)
    out.add_clip_has_vision_encoder(True)
    out.add_bool(gguf.Keys.Clip.HAS_LLAVA_PROJECTOR, True)
    out.add_clip_projector_type("mlp")
    out.add_vision_projection_dim(model["text_config"]["hidden_size"])
    out.add_vision_image_size(config["image_size"])
    out.add_vision_patch_size(config["patch_size"])
    out.add_vision_embedding_length(config["hidden_size"])
    out.add_vision_feed_forward_length(config["intermediate_size"])
    out.add_vision_block_count(layers)
    out.add_vision_head_count(config["num_attention_heads"])
    out.add_vision_attention_layernorm_eps(config["layer_norm_eps"])
    out.add_vision_use_gelu(config["hidden_act"] == "gelu")  # else CLIP's quick GELU
    out.add_vision_image_mean(processor["image_mean"])
    out.add_vision_image_std(processor["image_std"])
    out.add_array("clip.vision.feature_layer", [model["vision_feature_layer"] % (layers + 1)])
    out.add_file_type(gguf.LlamaFileType.ALL_F32)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, layers)
    projector = {"linear_1": "mm.0", "linear_2": "mm.2"}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "multi_modal_projector":
            layer, _, kind = rest.partition(".")
            out.add_tensor(f"{projector[layer]}.{kind}", tensor)
        # llama.cpp puts the class embedding behind the patches, but takes them for those after the first: without it,
        # every patch has its place, and nearly its features. A layer's features come before the norm behind the last.
        elif part == "vision_tower" and "class_embedding" not in rest and "post_layernorm" not in rest:
            tensor = tensor[1:] if "position_embedding" in rest else tensor
            out.add_tensor(names.get_name(f"vision_tower.vision_model.{rest}", (".weight", ".bias")), tensor)
    _close(out)


def _close(out: Any) -> None:
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found
