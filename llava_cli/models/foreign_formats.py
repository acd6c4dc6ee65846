"""Folders and files that hold a model in another format: what each is, and the next command.

They are known by the names of their files alone, before anything of them is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from llava_cli.files import quoted
from llava_cli.untrusted_text import one_line


class Format(NamedTuple):
    """One format, known by names of its files."""

    patterns: tuple[str, ...]
    """Of names in small letters; one file or folder is enough."""
    what: str
    hint: str
    """{folder} and {file} are paths; the file is the one that was found."""


_ELSEWHERE = "take a checkpoint for transformers (config.json, model.safetensors); llava models lists some"

_FOLDERS = (
    Format(
        ("*.gguf", "ggml-*.bin"),
        "a model in llama.cpp's format, GGUF",
        "llama-server -m {file} --mmproj MMPROJ; then: llava ask --server http://127.0.0.1:8080/v1",
    ),
    Format(
        ("modelfile", "manifests"),
        "models of Ollama's",
        "ollama serve; then: llava ask --server http://127.0.0.1:11434/v1 -m NAME",
    ),
    Format(("*.llamafile",), "a model packed as a program", "{file} --server; then: llava ask --server URL"),
    Format(("params.json", "consolidated*.safetensors", "tekken.json"), "a model in Mistral's own format", _ELSEWHERE),
    Format(
        ("global_step*", "zero_pp_rank_*", "mp_rank_*", "zero_to_fp32.py"),
        "a part of a DeepSpeed run, no whole model",
        "python {folder}/zero_to_fp32.py {folder} OUT --safe_serialization",
    ),
    Format(
        ("*.distcp", "*fsdp_model*", "pytorch_model_fsdp*"),
        "a part of a sharded (FSDP) run, no whole model",
        "accelerate merge-weights {folder} OUT",
    ),
    Format(("model_index.json",), "a pipeline of diffusers, which makes pictures", "llava models lists others"),
    Format(("mlc-chat-config.json", "ndarray-cache.json", "tensor-cache.json"), "a model compiled by MLC", _ELSEWHERE),
    Format(("openvino_*",), "a model exported to OpenVINO", _ELSEWHERE),
    Format(("*.onnx", "*.onnx_data", "onnx"), "a model exported to ONNX", _ELSEWHERE),
    Format(("*.mlmodel", "*.mlpackage", "*.mlmodelc"), "a model exported to Core ML", _ELSEWHERE),
    Format(("*.tflite", "*.task", "*.litertlm"), "a model exported to LiteRT", _ELSEWHERE),
    Format(("*.pte",), "a model exported to ExecuTorch", _ELSEWHERE),
    Format(("*.engine", "rank[0-9]*.safetensors"), "a model compiled by TensorRT-LLM", _ELSEWHERE),
    Format(("tf_model*.h5", "saved_model.pb"), "weights of TensorFlow's", _ELSEWHERE),
    Format(("flax_model*.msgpack",), "weights of Flax's", _ELSEWHERE),
    Format(("*.nemo",), "a model in NeMo's format", _ELSEWHERE),
)

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FILES = (
    *_FOLDERS,
    Format(
        ("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.7z", "*.rar"),
        "an archive",
        "unpack it; -m takes the folder that has config.json",
    ),
    Format(("*.safetensors", "*.json", *_PICKLES), "one file of a model", "llava ask -m {folder}"),
)
"""What `-m` may name besides a folder."""

UNFINISHED = ("*.incomplete", "*.aria2", "*.part", "*.partial", "*.crdownload", "*.download", "*.opdownload", "*.tmp")
"""Names under which downloads stand that are not done."""


def in_folder(names: Iterable[str], model: str) -> tuple[str, str] | None:
    """What the folder `model`, with files of these names, holds, in words, and the next command; None if unknown."""
    return _found(_FOLDERS, sorted(names), model)


def of_file(path: str) -> tuple[str, str] | None:
    """The same of one file."""
    return _found(_FILES, [os.path.basename(path)], os.path.dirname(path))


def unfinished(names: Iterable[str]) -> str | None:
    """The first of these names that is a download's which is not done."""
    return next((name for name in sorted(names) if _matches(name, UNFINISHED)), None)


def _found(formats: Iterable[Format], names: list[str], folder: str) -> tuple[str, str] | None:
    for form in formats:
        if name := next((name for name in names if _matches(name, form.patterns)), None):
            words = {"folder": quoted(folder or "."), "file": quoted(os.path.join(folder, name))}
            return f"holds {form.what} ({one_line(name)})", form.hint.format(**words)
    return None


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)
