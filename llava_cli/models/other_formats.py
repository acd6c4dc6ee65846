"""Folders and files that hold a model in another format than transformers': what each is, and the next command.

Formats are recognized by file names alone, before anything is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from llava_cli.files import quoted
from llava_cli.untrusted_text import one_line


class ModelFormat(NamedTuple):
    """A format of models, recognized by its file names."""

    patterns: tuple[str, ...]
    """Patterns of names in lower case; one file or folder that matches is enough."""
    description: str
    hint: str
    """The next command; {folder} and {file} are paths, the file the one that matched."""


_USE_TRANSFORMERS = "take a checkpoint for transformers (config.json, model.safetensors); llava models lists some"

_FOLDERS = (
    ModelFormat(
        ("*.gguf", "ggml-*.bin"),
        "a model in llama.cpp's format, GGUF",
        "llama-server -m {file} --mmproj MMPROJ; then: llava ask --server http://127.0.0.1:8080/v1",
    ),
    ModelFormat(
        ("modelfile", "manifests"),
        "models of Ollama's",
        "ollama serve; then: llava ask --server http://127.0.0.1:11434/v1 -m NAME",
    ),
    ModelFormat(("*.llamafile",), "a model packed as a program", "{file} --server; then: llava ask --server URL"),
    ModelFormat(
        ("params.json", "consolidated*.safetensors", "tekken.json"),
        "a model in Mistral's own format",
        _USE_TRANSFORMERS,
    ),
    ModelFormat(
        ("global_step*", "zero_pp_rank_*", "mp_rank_*", "zero_to_fp32.py"),
        "a part of a DeepSpeed run, no whole model",
        "python {folder}/zero_to_fp32.py {folder} OUT --safe_serialization",
    ),
    ModelFormat(
        ("*.distcp", "*fsdp_model*", "pytorch_model_fsdp*"),
        "a part of a sharded (FSDP) run, no whole model",
        "accelerate merge-weights {folder} OUT",
    ),
    ModelFormat(("model_index.json",), "a pipeline of diffusers, which makes pictures", "llava models lists others"),
    ModelFormat(
        ("mlc-chat-config.json", "ndarray-cache.json", "tensor-cache.json"),
        "a model compiled by MLC",
        _USE_TRANSFORMERS,
    ),
    ModelFormat(("openvino_*",), "a model exported to OpenVINO", _USE_TRANSFORMERS),
    ModelFormat(("*.onnx", "*.onnx_data", "onnx"), "a model exported to ONNX", _USE_TRANSFORMERS),
    ModelFormat(("*.mlmodel", "*.mlpackage", "*.mlmodelc"), "a model exported to Core ML", _USE_TRANSFORMERS),
    ModelFormat(("*.tflite", "*.task", "*.litertlm"), "a model exported to LiteRT", _USE_TRANSFORMERS),
    ModelFormat(("*.pte",), "a model exported to ExecuTorch", _USE_TRANSFORMERS),
    ModelFormat(("*.engine", "rank[0-9]*.safetensors"), "a model compiled by TensorRT-LLM", _USE_TRANSFORMERS),
    ModelFormat(("tf_model*.h5", "saved_model.pb"), "weights of TensorFlow's", _USE_TRANSFORMERS),
    ModelFormat(("flax_model*.msgpack",), "weights of Flax's", _USE_TRANSFORMERS),
    ModelFormat(("*.nemo",), "a model in NeMo's format", _USE_TRANSFORMERS),
)

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FILES = (
    *_FOLDERS,
    ModelFormat(
        ("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.7z", "*.rar"),
        "an archive",
        "unpack it; -m takes the folder that has config.json",
    ),
    ModelFormat(("*.safetensors", "*.json", *_PICKLES), "one file of a model", "llava ask -m {folder}"),
)
"""Formats of a single file that `-m` may name."""

_UNFINISHED = ("*.incomplete", "*.aria2", "*.part", "*.partial", "*.crdownload", "*.download", "*.opdownload", "*.tmp")
"""Names of downloads that are not complete."""


def describe_folder(names: Iterable[str], folder: str) -> tuple[str, str] | None:
    """What a folder with files of these names holds, in words, and the next command; None if unknown."""
    return _recognize(_FOLDERS, sorted(names), folder)


def describe_file(path: str) -> tuple[str, str] | None:
    """What a file holds, in words, and the next command; None if unknown."""
    return _recognize(_FILES, [os.path.basename(path)], os.path.dirname(path))


def first_unfinished(names: Iterable[str]) -> str | None:
    """The first of these names that belongs to an incomplete download."""
    return next((name for name in sorted(names) if _matches(name, _UNFINISHED)), None)


def _recognize(formats: Iterable[ModelFormat], names: list[str], folder: str) -> tuple[str, str] | None:
    for model_format in formats:
        if name := next((name for name in names if _matches(name, model_format.patterns)), None):
            paths = {"folder": quoted(folder or "."), "file": quoted(os.path.join(folder, name))}
            return f"holds {model_format.description} ({one_line(name)})", model_format.hint.format(**paths)
    return None


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)
