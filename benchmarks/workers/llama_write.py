"""Writes a decoder of Llama's kind for llama.cpp, Q4_0 with random weights: `llama_write.py CONFIG FILE`.

The types are those that llama.cpp's own quantiser gives a Q4_0 file: Q4_0 for all but the output head (Q6_K) and
the norms. Random blocks are written as they are; quantising random numbers would make no others.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf  # type: ignore[import-not-found]
import numpy as np

TYPES = gguf.GGMLQuantizationType
SCALE = 0.003


def q4_0(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Blocks of 32 weights: a scale, and 4 bits for each."""
    blocks = rng.integers(0, 256, (rows, columns // 32, 18), dtype=np.uint8)
    blocks[..., :2] = np.array([SCALE], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def q6_k(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Blocks of 256 weights: 6 bits for each, 16 scales, and a scale for those."""
    blocks = rng.integers(0, 256, (rows, columns // 256, 210), dtype=np.uint8)
    blocks[..., 192:208] = 40
    blocks[..., 208:] = np.array([SCALE / 200], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def main() -> None:
    geometry, path = json.loads(Path(sys.argv[1]).read_text())["text_config"], Path(sys.argv[2])
    width, inner, layers = (geometry[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    heads, words = geometry["num_attention_heads"], geometry["vocab_size"]
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(4096)
    out.add_embedding_length(width)
    out.add_block_count(layers)
    out.add_feed_forward_length(inner)
    out.add_head_count(heads)
    out.add_head_count_kv(heads)
    out.add_rope_dimension_count(width // heads)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_vocab_size(words)
    out.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    out.add_tokenizer_model("llama")
    out.add_token_list(
        ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))] + [f"w{n}" for n in range(259, words)]
    )
    out.add_token_scores([0.0] * words)
    kinds = gguf.TokenType
    out.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256, *[kinds.NORMAL] * (words - 259)]
    )
    rng = np.random.default_rng(0)
    square, up, down = q4_0(rng, width, width), q4_0(rng, inner, width), q4_0(rng, width, inner)
    norm = np.ones(width, np.float32)
    out.add_tensor("token_embd.weight", q4_0(rng, words, width), raw_dtype=TYPES.Q4_0)
    out.add_tensor("output.weight", q6_k(rng, words, width), raw_dtype=TYPES.Q6_K)
    out.add_tensor("output_norm.weight", norm)
    for layer in range(layers):
        weights = {f"attn_{name}": square for name in ("q", "k", "v", "output")}
        for name, weight in {**weights, "ffn_gate": up, "ffn_up": up, "ffn_down": down}.items():
            out.add_tensor(f"blk.{layer}.{name}.weight", weight, raw_dtype=TYPES.Q4_0)
        for name in ("attn_norm", "ffn_norm"):
            out.add_tensor(f"blk.{layer}.{name}.weight", norm)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


if __name__ == "__main__":
    main()
