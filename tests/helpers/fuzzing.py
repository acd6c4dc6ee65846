"""Hostile input by the thousand, reproducible: how it is made, and what must not come of it.

A `Boundary` is one place where bytes of strangers come in. It makes inputs from a seeded generator, valid ones that
were mutated, and checks what comes of each: a result, or one of the errors that the product has for it. `test_fuzz.py`
tries a few of each boundary, `benchmarks/fuzz.py` thousands.
"""

from __future__ import annotations

import base64
import copy
import gc
import gzip
import http.client
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any, ClassVar
from unittest.mock import patch

import pillow_heif
import psutil
from helpers import films
from helpers.pdf_bytes import encrypted_pdf, form_pdf, many_pages_pdf, nested_forms_pdf, text_pdf
from helpers.servers import Server, begin
from PIL import ExifTags, Image

from llava_cli import limits
from llava_cli.batch.journal import Journal
from llava_cli.batch.picture_loader import PictureLoader
from llava_cli.batch.report.report_page import page_fields
from llava_cli.batch.report.report_rows import RowsFile
from llava_cli.batch.sources.source import Source
from llava_cli.batch.tasks import Task
from llava_cli.bounded_http import Deadline, Response
from llava_cli.conversation import Conversation, Picture
from llava_cli.engine.base import Request
from llava_cli.engine.remote import remote_engine
from llava_cli.engine.remote.image_urls import portable_url
from llava_cli.engine.remote.local_socket import UnixHTTPConnection
from llava_cli.engine.remote.openai_client import OpenAIClient
from llava_cli.engine.remote.openai_response import RetryableError, connection_errors
from llava_cli.errors import LlavaError, model_errors
from llava_cli.hardware.allocator import trim_heap
from llava_cli.images import reader
from llava_cli.images.fetch import fetch
from llava_cli.images.sandbox import Crash, Sandbox
from llava_cli.models.registry import Checkpoint, builtin_folder
from llava_cli.models.validate import check_files
from llava_cli.models.weight_files import check_weights
from llava_cli.parts import Content, Part, choose
from llava_cli.prompts.chat_template import TEMPLATES
from llava_cli.prompts.question_fields import QuestionFields
from llava_cli.prompts.sandbox import TextRefused, TextSandbox
from llava_cli.safetensors_header import read_header
from llava_cli.settings import LoadOptions, Sampling
from llava_cli.untrusted_text import TerminalText, for_json_line, for_page, for_terminal, one_line, printable

QUESTION = "what is this?"
INTEGERS = (0, 1, 2, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**53 + 1, 2**63, 2**64 - 1)


def _words(text: str) -> list[str]:
    return text.split(" ")


# Mutations of bytes.


def _flip(rng: Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _overwrite(rng: Random, data: bytearray) -> None:
    """Puts a number at which programs fail where a length or a size may be."""
    at, width = rng.randrange(len(data)), rng.choice((1, 2, 4, 8))
    number = rng.choice(INTEGERS) % (1 << 8 * width)
    data[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))


def _truncate(rng: Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def _delete(rng: Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice((1, 4, 64, 1024))]


def _repeat(rng: Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    data[at:at] = data[at : at + rng.choice((1, 4, 64))] * rng.choice((1, 2, 16, 256))


def _insert(rng: Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    data[at:at] = rng.randbytes(rng.choice((1, 4, 64)))


_BYTE_MUTATIONS = (_flip, _flip, _overwrite, _overwrite, _truncate, _delete, _repeat, _insert)


def mutate(rng: Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Some bytes changed, or the beginning of the one and the end of another."""
    if others and rng.random() < 0.1:
        other = rng.choice(others)
        return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if changed:
            rng.choice(_BYTE_MUTATIONS)(rng, changed)
    return bytes(changed)


# Mutations of JSON values.

_TEXTS = (
    *("", " ", "\0", "\ud800", "\x1b]0;title\x07\x1b[2J", "\u202eright to left", "one\ntwo\r\nthree", "\U0001f600é"),
    *_words("../../etc/passwd /dev/zero http://127.0.0.1:9/x {{''.__class__}} (a+)+$ <image> null 1e999"),
)
_NUMBERS = (0, 1, -1, 0.5, -0.0, 1e308, float("inf"), float("nan"), 10**30, -(2**63), *INTEGERS)


def hostile(rng: Random) -> Any:
    """A JSON value that nobody expects where it stands."""
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: rng.choice((None, True, False)),
        lambda: rng.choice(_NUMBERS),
        lambda: rng.choice(_TEXTS),
        lambda: rng.choice(("a", "[", "é", "<image>")) * rng.choice((100, 10_000, 100_000)),
        lambda: rng.choice(([], {}, [None], [[]], {"": ""}, {"type": None})),
        lambda: [rng.choice((0, "", None, {}))] * rng.choice((2, 100, 60_000)),
        lambda: _nested(rng.choice((2, 20, 70, 200)), rng.random() < 0.5),
    )
    return rng.choice(kinds)()


def _nested(depth: int, is_list: bool) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value] if is_list else {"a": value}
    return value


def _alike(rng: Random, value: Any) -> Any:
    """Another value of the same kind, which gets further than what is of none that is expected."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return rng.choice((*_NUMBERS, value + 1, -value, value * 1000))
    if isinstance(value, str):
        return rng.choice((*_TEXTS, value * 2, value[1:], value + "\u202e"))
    if isinstance(value, list):
        return rng.choice((value * 2, value[1:], value[::-1]))
    return hostile(rng)


def mutate_json(rng: Random, value: Any, names: Sequence[str] = ()) -> Any:
    """A copy with some of its parts changed, gone, somewhere else, or new under one of `names`."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not value or not isinstance(value, (dict, list)):
            return hostile(rng)
        inside, key = _place(rng, value)
        what = rng.random()
        if what < 0.2:
            inside[key] = hostile(rng)
        elif what < 0.6:
            inside[key] = _alike(rng, inside[key])
        elif what < 0.67:
            del inside[key]
        elif what < 0.8:
            other, at = _place(rng, value)
            inside[key] = copy.deepcopy(other[at])
        elif what < 0.87:
            inside[key] = rng.choice(([inside[key]], {"a": inside[key]}, str(inside[key])[:1000]))
        elif isinstance(inside, dict):
            inside[rng.choice((*names, "", "a", "__class__"))] = hostile(rng)
        else:
            inside.insert(key, hostile(rng))
    return value


def _place(rng: Random, value: Any) -> tuple[Any, Any]:
    """Somewhere in a value: a list or object, and an index or key of it. What is near the root comes up more often."""
    while True:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        part = value[key]
        if not part or not isinstance(part, (dict, list)) or rng.random() < 0.3:
            return value, key
        value = part


def to_json(rng: Random, value: Any) -> bytes:
    """A value as JSON, now and then as something else."""
    if rng.random() < 0.01:
        return rng.choice((b"[", b'{"a":')) * rng.choice((100, 100_000))
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7)
    data = text.encode("utf-8", "surrogatepass")
    what = rng.random()
    if what < 0.06:
        return mutate(rng, data)
    if what < 0.08:
        return text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")), "surrogatepass")
    if what < 0.12 and text[:1] == "{":
        return b'{"model": 1, "' + rng.choice(("messages", "type", "a")).encode() + b'": [], ' + data[1:]  # names twice
    return data


# Boundaries.


class Boundary:
    """A place where strangers' bytes come in."""

    name: ClassVar[str]
    seconds: ClassVar[float]
    """That one input may take at most."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()

    def make(self, rng: Random) -> bytes:
        """The next input."""
        raise NotImplementedError

    def check(self, data: bytes) -> str:
        """What came of an input, in a word. Raises whatever must not."""
        raise NotImplementedError

    def processes(self) -> list[int]:
        """Those that may not grow."""
        return [os.getpid()]

    def notes(self) -> list[str]:
        """What else was measured."""
        return []

    def limit(self, **values: float) -> None:
        """Sets some of the product's limits, until the end, so that small inputs reach them."""
        for name, value in values.items():
            self._stack.enter_context(patch.object(limits, name, value))

    def close(self) -> None:
        self._stack.close()


def inputs(boundary: Boundary, seed: object, numbers: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """The inputs of these numbers, the same ones each time."""
    for number in numbers:
        yield number, boundary.make(Random(f"{seed}/{boundary.name}/{number}"))


def attempt(boundary: Boundary, data: bytes) -> str:
    """What came of an input, in a word. Raises `AssertionError` for what must not, also for a panic of Rust's."""
    begin = time.perf_counter()
    try:
        outcome = boundary.check(data)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__} ({str(error)[:200]!r}) at {data[:80]!r}") from error
    seconds = time.perf_counter() - begin
    assert seconds < boundary.seconds, f"{seconds:.1f} s for {data[:80]!r}"
    return outcome


@dataclass(frozen=True)
class Footprint:
    """What a process holds."""

    memory: int
    descriptors: int
    threads: int
    children: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        gc.collect()
        trim_heap()  # else what glibc keeps of this process's largest moment counts as growth
        process = psutil.Process(pid)
        return cls(process.memory_info().rss, process.num_fds(), process.num_threads(), len(process.children()))

    def growth(self, now: Footprint) -> list[str]:
        """What has grown by more than comes and goes with sandboxed processes."""
        most = {"memory": 40_000_000, "descriptors": 16, "threads": 8, "children": 4}
        pairs = ((name, getattr(self, name), getattr(now, name)) for name in most)
        return [f"{name} grew from {old:,} to {new:,}" for name, old, new in pairs if new - old > most[name]]


def refused(error: Exception, *words: str) -> str:
    """The class of an error, whose words are seen to fit one line of a terminal each."""
    for word in (str(error), *words):
        assert word.isprintable(), word
    return type(error).__name__


def outcome(do: Callable[[], Any]) -> str:
    """What comes of a call: "fine", or the class of the product's error."""
    try:
        do()
    except LlavaError as error:
        return refused(error, error.thing, error.hint)
    return "fine"


# Pictures.


def _drawing(mode: str = "RGB") -> Image.Image:
    return Image.linear_gradient("L").resize((40, 30)).convert(mode)


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def _pictures() -> list[bytes]:
    """One of each form that a decoder has a way of its own for."""
    rgb, exif, frames = _drawing(), Image.Exif(), [_drawing(), _drawing().rotate(90)]
    exif[274] = 6  # the orientation
    made = [
        *(_encoded(_drawing(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        _encoded(rgb.convert("L").convert("I;16"), "PNG", transparency=7),
        _encoded(rgb.convert("P"), "PNG", transparency=b"\0\x80"),
        _encoded(rgb, "PNG", save_all=True, append_images=frames, exif=exif),
        _encoded(rgb, "JPEG", exif=exif),
        _encoded(rgb, "JPEG", progressive=True, comment=b"words"),
        _encoded(rgb.convert("CMYK"), "JPEG"),
        _encoded(rgb, "MPO", save_all=True, append_images=frames),
        _encoded(rgb.convert("P"), "GIF", save_all=True, append_images=frames, transparency=3),
        _encoded(rgb, "WEBP", lossless=True, exif=exif),
        _encoded(rgb.convert("RGBA"), "WEBP", save_all=True, append_images=frames),
        _encoded(rgb, "BMP"),
        _encoded(rgb.convert("1"), "BMP"),
    ]
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
        made.append(_encoded(rgb, "HEIF", exif=exif.tobytes()))
    return made


def _png_chunks(rng: Random, data: bytes) -> bytes:
    """One chunk of a PNG mutated, moved or doubled, with the checksum that it then has."""
    chunks, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += size + 12
    number = rng.randrange(len(chunks))
    kind, body = chunks[number]
    if body and rng.random() < 0.7:
        chunks[number] = kind, mutate(rng, body)
    else:
        kind = rng.choice((kind, b"acTL", b"fcTL", b"zTXt", b"iCCP", b"PLTE"))
        chunks.insert(rng.randrange(len(chunks)), (kind, body))
    framed = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return data[:8] + b"".join(framed)


def _jpeg_segments(rng: Random, data: bytes) -> bytes:
    """A segment of a JPEG that holds no pixels, put in front, mutated."""
    kinds = (
        *(b"JFIF\0\1\1\0\0\1\0\1\0\0", b"Adobe\0d\0\0\0\0\1", b"ICC_PROFILE\0\1\1abc", b"MPF\0MM\0*\0\0\0\x08"),
        *(b"Photoshop 3.0\x008BIM\4\4\0\0\0\0\0\3abc\0", b"Exif\0\0MM\0*\0\0\0\x08", b"words"),
    )
    body = mutate(rng, rng.choice(kinds))[:65_000]
    marker = rng.choice((0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE))
    return data[:2] + struct.pack(">HH", 0xFF00 | marker, len(body) + 2) + body + data[2:]


_PILLOW = """
import sys, warnings
from PIL import Image
warnings.simplefilter("ignore")
for line in sys.stdin:
    try:
        with Image.open(line[:-1], formats=("JPEG", "PNG", "WEBP", "GIF", "BMP")) as image:
            image.load()
        print("opens", flush=True)
    except Exception:
        print("fails", flush=True)
"""
_BROKEN = ("damaged", "truncated", "truncated or damaged", "not an image")
"""Reasons that would be wrong for what Pillow opens."""


class Pictures(Boundary):
    """A picture's file, decoded in the sandbox as `ask` and `batch` have it, and by Pillow alone."""

    name, seconds = "pictures", 12.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.limit(DECODE_SECONDS=10.0)
        self._seeds = _pictures()
        reader.sandbox_pool.cache_clear()  # those would have been made with another limit
        self._stack.callback(lambda: reader.sandbox_pool().close())
        self._batch = PictureLoader()
        self._stack.callback(self._batch.close)
        self._pillow = self._pillow_process()
        self._more = 0

    def _pillow_process(self) -> subprocess.Popen[str]:
        command, pipe = [sys.executable, "-c", _PILLOW], subprocess.PIPE
        process = subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        self._stack.callback(process.communicate)  # which closes its stdin, and so ends it
        return process

    def _opens(self, file: Path) -> bool:
        """Whether Pillow opens a file."""
        assert self._pillow.stdin and self._pillow.stdout
        self._pillow.stdin.write(f"{file}\n")
        self._pillow.stdin.flush()
        return self._pillow.stdout.readline() == "opens\n"

    def notes(self) -> list[str]:
        return [f"{self._more} answered that Pillow alone refuses"]

    def make(self, rng: Random) -> bytes:
        data = rng.choice(self._seeds)
        what = rng.random()
        if what < 0.1:
            return data[: rng.choice((2, 4, 8, 12, 24))] + rng.randbytes(rng.choice((0, 10, 1000)))
        if data.startswith(b"\x89PNG") and what < 0.6:
            return _png_chunks(rng, data)
        if data.startswith(b"\xff\xd8") and what < 0.4:
            return _jpeg_segments(rng, data)
        return mutate(rng, data, self._seeds)

    def check(self, data: bytes) -> str:
        (file := self.folder / "picture").write_bytes(data)
        opens, by_batch = self._opens(file), self._batch.load(Task(str(file), QUESTION))
        try:
            picture = reader.open_picture(str(file))
        except LlavaError as error:
            assert not isinstance(error, Crash), str(error)
            assert isinstance(by_batch, LlavaError), f"batch opens what ask does not: {error}"
            assert by_batch.reason == error.reason
            assert not (opens and error.reason in _BROKEN), f"Pillow opens it, and it is said to be {error.reason}"
            if error.reason == "truncated":
                return outcome(lambda: reader.open_picture(str(file), allow_truncated=True))
            return refused(error, error.thing, error.hint)
        assert isinstance(by_batch, Picture) and by_batch.image.tobytes() == picture.image.tobytes()
        assert picture.image.mode == "RGB"
        assert picture.image.width * picture.image.height <= limits.PICTURE_PIXELS
        self._more += not opens
        return "fine" if opens else "fine, though not for Pillow"


def _documents() -> dict[str, list[bytes]]:
    """Good files of several pages or frames by their kind."""
    frames = [Image.new("RGB", (48, 32), color) for color in ("red", "green", "blue")]
    frames += [_drawing().resize((48, 32))]

    def several(kind: str, **options: Any) -> bytes:
        return _encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)

    tiffs = ({}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}, {"big_tiff": True})
    found = {
        "PDF": [
            text_pdf("one", "two"),
            form_pdf(),
            encrypted_pdf(b""),
            nested_forms_pdf(3, 3),
            many_pages_pdf(100, 10),
        ],
        "TIFF": [several("TIFF", **options) for options in tiffs],
        "GIF": [several("GIF", duration=100), several("GIF", disposal=2)],
        "WEBP": [several("WEBP", duration=100), several("WEBP", lossless=True)],
        "APNG": [several("PNG", duration=100), several("PNG", default_image=True)],
        "AVIF": [several("AVIF", duration=100), _encoded(frames[0], "AVIF")],
        "HEIC": [several("HEIF"), _encoded(_drawing(), "HEIF")],
    }
    if find_spec("pillow_jxl"):
        import pillow_jxl  # noqa: F401  (a plugin of Pillow)

        found["JPEG XL"] = [_encoded(_drawing(), "JXL"), _encoded(_drawing(), "JXL", lossless=True)]
    return found


class Documents(Boundary):
    """A file of several pages or frames: what it contains, its first page, its last one, and one that it has not."""

    name, seconds = "documents", 12.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.limit(DECODE_SECONDS=10.0)
        pillow_heif.register_heif_opener()
        self._seeds, self._kind = _documents(), ""
        self._sandbox = Sandbox()
        self._stack.callback(self._sandbox.end)
        self._most: dict[str, tuple[int, float, float]] = {}
        """By kind: how many there were, the most seconds of a request, and the most memory of a process."""

    def make(self, rng: Random) -> bytes:
        self._kind = rng.choice(list(self._seeds))
        seeds = self._seeds[self._kind]
        return mutate(rng, rng.choice(seeds), seeds)

    def check(self, data: bytes) -> str:
        content = self._timed(lambda: self._sandbox.inspect("file", data))
        count = content.count if isinstance(content, Content) else 1
        found = [
            self._timed(lambda page=page: self._sandbox.open("file", data, part=Part(page), dpi=72))
            for page in (1, count)
        ]
        whole = self._timed(lambda: self._sandbox.open("file", data, dpi=72))
        none = self._timed(lambda: self._sandbox.open("file", data, part=Part(count + 1)))
        assert isinstance(none, LlavaError), "a page that is not there"
        for one in (content, *found, whole, none):
            if isinstance(one, LlavaError):
                assert not isinstance(one, Crash), str(one)
                refused(one, one.thing, one.hint)
        assert not isinstance(whole, Picture) or isinstance(content, Content), "opened, though it contains nothing"
        return "/".join("fine" if isinstance(one, Picture) else "refused" for one in (whole, *found))

    def _timed(self, do: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        outcome = do()
        count, seconds, memory = self._most.get(self._kind, (0, 0.0, 0.0))
        seconds, memory = max(seconds, time.perf_counter() - begin), max(memory, *map(_peak, self._sandbox.processes))
        self._most[self._kind] = count + 1, seconds, memory
        return outcome

    def notes(self) -> list[str]:
        return [
            f"{kind}: {count} requests, at most {s:.1f} s and {mb:.0f} MB"
            for kind, (count, s, mb) in self._most.items()
        ]


def _peak(pid: int) -> float:
    """The most memory that a process has had, in MB; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) / 1000
    except (OSError, IndexError):
        return 0.0


# Checkpoints.


class Headers(Boundary):
    """A file of weights, judged by its header."""

    name, seconds = "safetensors headers", 3.0
    _HEADER: ClassVar[dict[str, Any]] = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "a.bias": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "b": {"dtype": "U8", "shape": [0, 7], "data_offsets": [32, 32]},
    }

    def make(self, rng: Random) -> bytes:
        header = self._HEADER if rng.random() < 0.1 else mutate_json(rng, self._HEADER, ("dtype", "shape", "a.bias"))
        text = to_json(rng, header)
        length = len(text) if rng.random() < 0.9 else rng.choice(INTEGERS)
        data = length.to_bytes(8, "little") + text + bytes(rng.choice((32, 32, 32, 0, 24, 1000)))
        return mutate(rng, data) if rng.random() < 0.1 else data

    def check(self, data: bytes) -> str:
        (file := self.folder / "model.safetensors").write_bytes(data)

        def judge() -> None:
            check_weights(Checkpoint("fuzzed", self.folder))
            assert all(8 < one.begin <= one.end <= len(data) for one in read_header(file).values())

        return outcome(judge)


class Checkpoints(Boundary):
    """The JSON files of a checkpoint, as far as to the tokens and pixels of a question."""

    name, seconds = "checkpoints", 20.0
    _CONFIGS = _words("config config config config processor_config processor_config tokenizer_config")
    _FILES = (*_CONFIGS, "tokenizer", "generation_config", "model.safetensors.index")
    FAMILIES = ("llava-llama", "llava-next-mistral", "llava-interleave", "llava-onevision", "smolvlm")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from helpers import families

        self.limit(TOKENIZE_SECONDS=2.0, TEMPLATE_SECONDS=2.0)
        self._names: set[str] = {"auto_map", "quantization_config", "attn_implementation", "attribute_map"}
        for family in self.FAMILIES:
            config, processor = families.FAMILIES[family]()
            config.save_pretrained(folder / family)
            processor.save_pretrained(folder / family)
            (folder / family / "generation_config.json").write_text('{"eos_token_id": 2, "do_sample": true}')
            (folder / family / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
            index = {"metadata": {"total_size": 2}, "weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
            (folder / family / "model.safetensors.index.json").write_text(json.dumps(index))
            self._names |= set(json.loads((folder / family / "config.json").read_text()))
        self._sorted = sorted(self._names)

    def make(self, rng: Random) -> bytes:
        file = f"{rng.choice(self.FAMILIES)}/{rng.choice(self._FILES)}.json"
        content = json.loads((self.folder / file).read_text())
        return file.encode() + b"\n" + to_json(rng, mutate_json(rng, content, self._sorted))

    def check(self, data: bytes) -> str:
        from llava_cli.loader import load_prompter
        from llava_cli.models.weights import load_config

        name, _, content = data.partition(b"\n")
        family, _, file = name.decode().partition("/")
        model = self.folder / "fuzzed"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(self.folder / family, model)
        (model / file).write_bytes(content)
        if file == "model.safetensors.index.json":
            (model / "model.safetensors").rename(model / "other.safetensors")
        checkpoint = Checkpoint(str(model), model)

        def read() -> None:
            configs = check_files(checkpoint)
            check_weights(checkpoint)
            load_config(checkpoint, configs["config.json"])
            prompter = load_prompter(LoadOptions(model=str(model)))
            talk = Conversation().ask(QUESTION, [Picture("a.png", _drawing(), "")])
            prompter.render(talk)
            with model_errors("fuzzed", "fails while reading the prompt"):  # as the engine has it
                prompter.encode(talk)

        return outcome(read)


def _tokenizers() -> list[Any]:
    """Files of tokenizers, with every kind of part."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    letters = {chr(97 + i): i for i in range(26)}
    bpe = Tokenizer(models.BPE({**letters, "th": 26, "the": 27}, [("t", "h"), ("th", "e")], unk_token="a"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex("a+"), "b")])
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\s"), "isolated")
    bpe.decoder = decoders.Sequence([decoders.Replace("_", " "), decoders.Fuse()])
    bpe.add_special_tokens(["<image>", "</s>"])
    bpe.post_processor = processors.TemplateProcessing("<image> $A", None, [("<image>", 28)])
    words = Tokenizer(models.WordPiece({"[UNK]": 0, **{k: v + 1 for k, v in letters.items()}}, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece()
    pieces = Tokenizer(models.Unigram([("<unk>", 0.0), *((letter, -1.0) for letter in letters)], 0, True))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    level = Tokenizer(models.BPE({letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    level.pre_tokenizer, level.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    level.enable_padding(length=8)
    level.enable_truncation(4)
    return [json.loads(one.to_str()) for one in (bpe, words, pieces, level)]


class Tokenizers(Boundary):
    """A tokenizer's file, and a text that it is tokenized with, in the sandbox."""

    name, seconds = "tokenizers", 8.0
    _TEXT = "what's this? the thé \U0001f600 <image></s> " + "a" * 200 + "\n\t\u202e\ufeff"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.limit(TOKENIZE_SECONDS=1.0)
        self._seeds = [*_tokenizers(), json.loads((builtin_folder() / "tokenizer.json").read_text())]
        self._worker = TextSandbox(None)._worker
        self._stack.callback(self._worker.end)

    def make(self, rng: Random) -> bytes:
        names = ("pattern", "content", "byte_fallback", "dropout", "unk_token", "decoders", "normalizers")
        return to_json(rng, mutate_json(rng, rng.choice(self._seeds), names))

    def check(self, data: bytes) -> str:
        (file := self.folder / "tokenizer.json").write_bytes(data)
        sandbox = TextSandbox(file)
        sandbox._worker = self._worker  # one process for all: 0.3 s less for each
        try:
            sandbox.check_tokenizer()
            assert sandbox.count(self._TEXT) >= 0
        except TextRefused as error:
            assert len(str(error)) <= limits.NAME_CHARACTERS
            return refused(error)
        return "fine"


_ATOMS = _words(
    "messages m x ns loop bos_token eos_token tools add_generation_prompt true none range namespace dict lipsum cycler "
    "joiner raise_exception strftime_now self caller 0 1 -1 3.5 10**6 2**63 10**9 '' 'a' '%s%x' '{0.__class__}' [] {}"
)
_ATTRIBUTES = _words(
    "role content text items keys append pop update split join strip format format_map ljust center encode replace "
    "translate v index cycle changed __class__ __mro__ __subclasses__ __globals__ __init__ __builtins__ gi_frame"
)
_ODDS = (
    *("{% break %}", "{% continue %}", "{% raw %}{{", "{#", "{%", "{{ ", "\ud800", "\x1b[2J", "{% extends 'a' %}"),
    *("{% include messages %}", "{% import '/etc/passwd' as x %}", "{% from 'a' import x %}"),
)
_OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "not in", "and", "or")


def expression(rng: Random, depth: int) -> str:
    """An expression of Jinja's grammar."""
    from jinja2.filters import FILTERS
    from jinja2.tests import TESTS

    if depth == 0 or rng.random() < 0.2:
        return rng.choice(_ATOMS)
    part = partial(expression, rng, depth - 1)
    attribute, filtered = rng.choice(_ATTRIBUTES), rng.choice((*FILTERS, "tojson", "length"))
    forms: tuple[Callable[[], str], ...] = (
        lambda: f"{part()}.{attribute}",
        lambda: f"{part()}[{part()}]",
        lambda: f"{part()}[{part()}:{part()}]",
        lambda: f"({part()} | {filtered})",
        lambda: f"({part()} | {filtered}({part()}))",
        lambda: f"({part()} is {rng.choice(tuple(TESTS))})",
        lambda: f"({part()} {rng.choice(_OPERATORS)} {part()})",
        lambda: f"{part()}({part()})",
        lambda: f"{part()}.{attribute}({part()}, {part()})",
        lambda: f"({part()} if {part()} else {part()})",
        lambda: f"[{part()}, {part()}]",
        lambda: f"{{{part()}: {part()}}}",
    )
    return rng.choice(forms)()


def template(rng: Random, depth: int) -> str:
    """A program of Jinja's."""
    part, value = partial(template, rng, depth - 1), partial(expression, rng, rng.randrange(4))
    forms: tuple[Callable[[], str], ...] = (
        lambda: f"{{{{ {value()} }}}}",
        lambda: f"words{part()}{part()}" if depth else "words",
        lambda: f"{{% for m in messages %}}{part()}{{% endfor %}}",
        lambda: f"{{% for x in {value()} %}}{part()}{{% else %}}{part()}{{% endfor %}}",
        lambda: f"{{% for x in {value()} recursive %}}{{{{ loop({value()}) }}}}{{% endfor %}}",
        lambda: f"{{%- if {value()} -%}}{part()}{{% elif {value()} %}}{part()}{{% endif %}}",
        lambda: f"{{% set x = {value()} %}}{part()}",
        lambda: (
            f"{{% set ns = namespace(v={value()}) %}}{{% for x in range(9) %}}{{% set ns.v = {value()} %}}"
            f"{part()}{{% endfor %}}{{{{ ns.v }}}}"
        ),
        lambda: f"{{% macro f(x, y={value()}) %}}{part()}{{{{ f(x) }}}}{{% endmacro %}}{{{{ f({value()}) }}}}",
        lambda: (
            f"{{% macro f(x) %}}{{{{ caller(x) }}}}{{% endmacro %}}{{% call(x) f({value()}) %}}{part()}{{% endcall %}}"
        ),
        lambda: f"{{% with x = {value()} %}}{part()}{{% endwith %}}",
        lambda: f"{{% filter upper %}}{part()}{{% endfilter %}}",
        lambda: f"{{% generation %}}{part()}{{% endgeneration %}}",
        lambda: f"{{% block b %}}{part()}{{{{ self.b() }}}}{{% endblock %}}",
        lambda: rng.choice((*("",) * 30, *_ODDS)),
    )
    return rng.choice(forms[:2] if depth == 0 else forms)()


class Templates(Boundary):
    """A chat template, rendered in the sandbox."""

    name, seconds = "chat templates", 3.0
    _MESSAGES = (
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what's \U0001f600?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": 'a "quote"'}]},
        {"role": "user", "content": [{"type": "text", "text": "and <b>this</b>?"}]},
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.limit(TEMPLATE_SECONDS=0.3)
        self._seeds = [file.read_bytes() for file in TEMPLATES.glob("*.jinja")]
        self._seeds.sort()
        self._sandbox = TextSandbox(None)
        self._stack.callback(self._sandbox.end)

    def make(self, rng: Random) -> bytes:
        if rng.random() < 0.3:
            return mutate(rng, rng.choice(self._seeds), self._seeds)
        return template(rng, rng.randrange(1, 5)).encode("utf-8", "surrogatepass")

    def check(self, data: bytes) -> str:
        text = data.decode("utf-8", "surrogateescape")
        try:
            prompt = self._sandbox.render(text, self._MESSAGES, True, {"bos_token": "<s>", "eos_token": "</s>"})
        except TextRefused as error:
            assert len(str(error)) <= limits.NAME_CHARACTERS
            return refused(error)
        assert len(prompt) <= limits.PROMPT_CHARACTERS
        return "fine"


class Questions(Boundary):
    """A question with fields, filled in for a picture whose EXIF was mutated."""

    name, seconds = "questions with fields", 4.0
    _FIELDS = ("name", "exif.Model", "exif['UserComment']", "row.items", "row['a b']", "page", "date", "lang")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.limit(QUESTION_SECONDS=0.3, EXIF_SECONDS=2.0)
        self._fields = QuestionFields({"lang": "{name}"})
        self._stack.callback(self._fields.close)
        self._seeds = [_with_exif(form) for form in ("JPEG", "PNG", "WEBP", "TIFF")]
        self._whole = Image.new("RGB", (2, 2))

    def make(self, rng: Random) -> bytes:
        text = template(rng, rng.randrange(1, 4)).replace("{{", "{").replace("}}", "}")
        text += "".join(f"{{{rng.choice(self._FIELDS)} or {expression(rng, 1)}}}" for _ in range(rng.randrange(3)))
        return text.encode("utf-8", "surrogatepass") + b"\0" + mutate(rng, rng.choice(self._seeds), self._seeds)

    def check(self, data: bytes) -> str:
        text, _, file = data.partition(b"\0")
        picture = Picture("a.jpg", self._whole, "", file=file)
        row = {"items": ["{name}", 1.5, None], "a b": "\x1b[2J{% x %}\ud800", "": {"a": {}}}
        question = text.decode("utf-8", "surrogatepass")
        try:
            self._fields.check(question, is_saved=True)
            filled = self._fields.fill(question, picture, "a.jpg", "", row)
        except LlavaError as error:
            return refused(error, error.thing, error.hint)
        assert 0 < len(filled) <= limits.TEXT_CHARACTERS
        return "fine"


def _with_exif(form: str) -> bytes:
    """A picture's file with EXIF of all kinds."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Model] = "Pixel 9"
    exif[ExifTags.Base.XPTitle] = "title".encode("utf-16-le")
    more, where = exif.get_ifd(ExifTags.IFD.Exif), exif.get_ifd(ExifTags.IFD.GPSInfo)
    more.update({0x9003: "2024:08:17 12:00:00", 0x829D: 2.8, 0x9286: b"ASCII\0\0\0text", 0x927C: bytes(range(256))})
    where.update({1: "S", 2: (38.0, 30.0, 36.0)})
    Image.new("RGB", (9, 7), "red").save(file, form, exif=exif)
    return file.getvalue()


# The server.

_STATUSES = {200, 400, 403, 404, 405, 408, 411, 413, 415, 422, 429, 431, 499, 501, 503}
"""That a request of any form may be answered with: 501 for encodings that HTTP leaves to servers; never with 500."""


def watch_health(port: int) -> None:
    """Asks for /health every 20 ms until stdin ends; prints the slowest answer, and how late this process was."""
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    slowest = late = 0.0
    while True:
        begin = time.perf_counter()
        if ended.wait(0.02):
            break
        asked = time.perf_counter()
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b'{"status":"ok"}'
        slowest, late = max(slowest, time.perf_counter() - asked), max(late, asked - begin - 0.02)
    print(json.dumps([slowest, late]))


class Served(Boundary):
    """A real `llava serve` with the built-in model, whose health another process watches."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.server: Server = begin(folder, "--idle", "1h")  # should nobody be left to end it
        self._stack.callback(self._end)
        words = [sys.executable, "-m", "helpers.fuzzing", str(self.server.port)]
        folder = Path(__file__).parents[1]
        self._watcher = subprocess.Popen(words, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.slowest = self.late = 0.0
        """Seconds of the slowest answer to /health, and by how much its watcher was late, once `notes` are there."""

    def processes(self) -> list[int]:
        return [os.getpid(), self.server.process.pid]

    def notes(self) -> list[str]:
        said = self._watcher.communicate()[0]
        assert said, "/health was not answered"
        self.slowest, self.late = json.loads(said)
        return [f"slowest /health {self.slowest:.3f} s (its watcher was late by {self.late:.3f} s at most)"]

    def check_alive(self) -> None:
        assert self.server.process.poll() is None, f"the server ended with {self.server.process.returncode}"

    def _end(self) -> None:
        for process in (self._watcher, self.server.process):
            process.kill()
            process.communicate()


def check_answer(status: int, kind: str, body: bytes) -> None:
    """Raises unless that is an answer, or an error, of OpenAI's shape."""
    assert status in _STATUSES, (status, body[:300])
    if kind.startswith("text/event-stream"):
        events = [line.partition(b"data: ")[2] for line in body.split(b"\n\n") if line]
        said = [json.loads(event) for event in events if event != b"[DONE]"]
        assert events[-1] == b"[DONE]" or "error" in said[-1], body[-300:]
        return
    said = json.loads(body)
    if status == 200:
        assert isinstance(said, dict)
    else:
        assert said["error"].keys() == {"message", "type", "param", "code"}, said
        assert isinstance(said["error"]["message"], str)


def _uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


class Requests(Served):
    """Bodies of requests, over TCP and over the user's own socket."""

    name, seconds = "request bodies", 30.0
    _NAMES = _words(
        "tools response_format n stop logit_bias temperature top_p seed max_completion_tokens logprobs top_logprobs "
        "stream stream_options content image_url url text role model"
    )
    _URIS = _words(
        "data: data:, data:;base64, data:image/png;base64,%%% data:image/png,raw file:///etc/passwd http://[::1 "
        "http://127.0.0.1:9/x.png DATA:image/png;BASE64,AAAA data:image/png;base64,AA==AA== data:a/b;c=d;base64,==== "
        "data:image/svg+xml;base64,PHN2Zz48L3N2Zz4= data:image/png;base64,\ud800"
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._pictures = _pictures()
        picture, few = self._pictures[4], {"max_tokens": 2}
        shown = {"type": "image_url", "image_url": {"url": _uri(picture)}}
        asked = {"role": "user", "content": [shown, {"type": "text", "text": QUESTION}]}
        talk = [{"role": "system", "content": "Be brief."}, asked, {"role": "assistant", "content": "a box"}, asked]
        self._seeds: list[dict[str, Any]] = [
            {"model": "builtin", "messages": [asked], **few},
            {"messages": talk, "stream": True, "stream_options": {"include_usage": True}, **few},
            {"messages": [{"role": "user", "content": QUESTION}], "temperature": 1.5, "seed": 7, "stop": ["a"], **few},
            {"messages": [asked], "logprobs": True, "top_logprobs": 3, "n": 1, "top_p": 0.9, **few},
        ]

    def make(self, rng: Random) -> bytes:
        body = rng.choice(self._seeds)
        if rng.random() < 0.7:
            body = mutate_json(rng, body, self._NAMES)
        if rng.random() < 0.3:
            uri = _uri(mutate(rng, rng.choice(self._pictures), self._pictures))
            shown = {"type": "image_url", "image_url": {"url": rng.choice((uri, rng.choice(self._URIS)))}}
            body = {**self._seeds[0], "messages": [{"role": "user", "content": [shown] * rng.choice((1, 1, 3, 65))}]}
        return to_json(rng, body)

    def check(self, data: bytes) -> str:
        way = zlib.crc32(data) % 16
        path = "/llava/prompt" if way < 4 else "/v1/chat/completions"
        own = UnixHTTPConnection(self.server.socket, self.seconds)
        outside = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=self.seconds)
        with closing(own if way < 8 else outside) as connection:
            connection.request("POST", path, data, {"Content-Type": "application/json"})
            if way == 15:  # whoever asked has gone
                return "left"
            answer = connection.getresponse()
            check_answer(answer.status, answer.getheader("Content-Type", ""), answer.read())
        self.check_alive()
        return str(answer.status)


class _Bytes(socket.socket):
    """What a connection has received, for `http.client`."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def makefile(self, *words: Any, **options: Any) -> Any:
        return self._file


class Heads(Served):
    """Request lines, headers and their framing, over TCP as they are."""

    name, seconds = "request heads", 5.0
    _LINES = (
        b"Host: llava.example|Host: 127.0.0.1|Host:|Content-Length: 0|Content-Length: -1|Content-Length: 1, 2|"
        b"Content-Length: 99999999999999999999|Content-Length: +5|Content-Length: \xb2|Transfer-Encoding: chunked|"
        b"Transfer-Encoding: gzip, chunked|Transfer-Encoding: xchunked|Expect: 100-continue|Upgrade: websocket|"
        b"Connection: upgrade|Upgrade: h2c|Origin: null|Origin: http://evil.example|Authorization: Bearer \xff|"
        b"Content-Type: text/plain|Content-Type: multipart/form-data|Content-Type: application/json; charset=utf-16|"
        b"X-Forwarded-For: 1.2.3.4|no colon|: no name|A B: space|X: \0|X: \x1b[2J|\xff\xfe: x| folded"
    ).split(b"|")
    _BODY = b'{"messages": []}'

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        end = b"\r\nHost: localhost\r\nConnection: close"
        json_body = b"POST /v1/chat/completions HTTP/1.1" + end + b"\r\nContent-Type: application/json\r\n"
        whole = json_body + b"Content-Length: %d\r\n\r\n" % len(self._BODY) + self._BODY
        chunked = json_body + b"Transfer-Encoding: chunked\r\n\r\n8\r\n" + self._BODY[:8] + b"\r\n"
        chunked += b"%x;name=value\r\n" % len(self._BODY[8:]) + self._BODY[8:] + b"\r\n0\r\nTrailer: x\r\n\r\n"
        kept = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        self._seeds = [
            b"GET /health HTTP/1.1" + end + b"\r\n\r\n",
            b"GET /v1/models/%2e%2e%2f%00%ff HTTP/1.1" + end + b"\r\n\r\n",
            b"HEAD /v1/models HTTP/1.1" + end + b"\r\n\r\n",
            b"OPTIONS * HTTP/1.1" + end + b"\r\n\r\n",
            b"GET http://evil.example/llava HTTP/1.1" + end + b"\r\n\r\n",
            b"PUT /metrics?x=%zz#y HTTP/1.0" + end + b"\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            whole,
            chunked,
            kept + kept + whole,
            kept + chunked + kept,
        ]

    def make(self, rng: Random) -> bytes:
        data = rng.choice(self._seeds)
        if rng.random() < 0.7:
            lines = data.split(b"\r\n")
            for _ in range(rng.choice((1, 1, 2, 3))):
                lines.insert(rng.randrange(1, len(lines)), rng.choice(self._LINES))
            data = rng.choice((b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r")).join(lines)
        if rng.random() < 0.04:
            data = data.replace(b"\r\n", b"\r\n" + rng.choice((b"X: y\r\n" * 20_000, b"X: " + b"a" * 70_000)), 1)
        return mutate(rng, data, self._seeds) if rng.random() < 0.5 else data

    def check(self, data: bytes) -> str:
        got, is_whole = self._exchange(data)
        self.check_alive()
        if not got or not is_whole:
            return "nothing" if not got else "broken off"
        answer = http.client.HTTPResponse(_Bytes(got), method=data.partition(b" ")[0].decode("latin-1"))
        answer.begin()
        body, kind = answer.read(), answer.getheader("Content-Type", "")
        if answer.status == 204 or data.startswith(b"HEAD") or kind.startswith("text/plain"):  # of /metrics
            assert answer.status in (_STATUSES | {204}), answer.status
        else:
            check_answer(answer.status, kind, body)
        rest = answer.fp.read() if answer.fp else b""
        assert not rest or rest.startswith(b"HTTP/1.1 "), rest[:100]
        return str(answer.status)

    def _exchange(self, data: bytes) -> tuple[bytes, bool]:
        """What comes back, and whether the server ended it."""
        got = bytearray()
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=self.seconds) as connection:
            try:
                connection.sendall(data)
                connection.settimeout(0.15)  # it may wait for more, which does not come
                while piece := connection.recv(65_536):
                    got += piece
            except OSError:  # also where it was refused before all was sent
                return bytes(got), False
        return bytes(got), True


class Films(Boundary):
    """A film's file: its length, and frames from all of it."""

    name, seconds = "films", 45.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.limit(PAGE_SECONDS=10.0)
        self._seeds = films.one_of_each()
        self._sandbox = Sandbox()
        self._stack.callback(self._sandbox.end)
        self._most_memory, self._most_seconds = 0, 0.0

    def make(self, rng: Random) -> bytes:
        return mutate(rng, rng.choice(self._seeds), self._seeds)

    def check(self, data: bytes) -> str:
        (file := self.folder / "film").write_bytes(data)
        content = self._timed(lambda: self._sandbox.inspect("film", file))
        if isinstance(content, LlavaError):
            return self._refused(content)
        parts = choose(content, None, 3, None, 3).parts
        pictures = [self._timed(lambda part=part: self._sandbox.open("film", file, part=part)) for part in parts]
        self._most_memory = max(self._most_memory, films.peak_memory(self._sandbox.processes))
        for picture in pictures:
            if isinstance(picture, LlavaError):
                return self._refused(picture)
            assert picture.image.width * picture.image.height <= limits.PICTURE_PIXELS
        return "fine" if content.kind == "film" else "fine, no film"

    def _timed(self, work: Callable[[], Any]) -> Any:
        begin = time.monotonic()
        found = work()
        self._most_seconds = max(self._most_seconds, time.monotonic() - begin)
        return found

    def _refused(self, error: LlavaError) -> str:
        assert "{name}" not in error.hint
        return refused(error, error.thing, error.hint)

    def notes(self) -> list[str]:
        return [f"at most {self._most_seconds:.1f} s a call, and {self._most_memory / 1e6:.0f} MB in the process"]


# Other servers.


_MESSAGE = {"role": "assistant", "content": "a red circle"}
_USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
_ANSWER = {"choices": [{"index": 0, "message": _MESSAGE, "finish_reason": "stop"}], "usage": _USAGE}
_EVENTS = (
    *({"choices": [{"delta": {"content": word}, "finish_reason": None}]} for word in ("a ", "red", None)),
    {"choices": [{"delta": {}, "finish_reason": "stop"}]},
    {"choices": [], "usage": _USAGE},
)
_ERROR = {"error": {"message": "no\x1b[2J", "type": "invalid_request_error", "param": None, "code": "invalid_image"}}
_NAMES = _words("error choices delta content message usage finish_reason code type text detail")


def _events(rng: Random) -> bytes:
    """A stream of server-sent events."""
    events = [mutate_json(rng, event, _NAMES) if rng.random() < 0.1 else event for event in _EVENTS]
    lines = [b"data: " + to_json(rng, event) for event in events] + [b"data: [DONE]"] * (rng.random() < 0.9)
    if rng.random() < 0.2:
        odd = (b": hello", b"event: x", b"data:", b"data: [DONE]", b"<html>", b"\xff", b"id: 1", b"data: \xff")
        lines.insert(rng.randrange(len(lines)), rng.choice(odd))
    return b"".join(line + rng.choice((b"\n\n", b"\n\n", b"\r\n\r\n", b"\r", b"\n")) for line in lines)


def reply(rng: Random) -> bytes:
    """What a server sends back, status line and all: an answer, a stream or an error, most with something odd."""
    status = rng.choice((*(200,) * 12, 400, 401, 404, 413, 429, 500, 503, 302, 204, 100, 999))
    content = _ANSWER if status == 200 else _ERROR
    content = mutate_json(rng, content, _NAMES) if rng.random() < 0.5 else content
    body = _events(rng) if rng.random() < 0.5 else to_json(rng, content)
    headers = [b"Content-Type: application/json"]
    what = rng.random()
    if what < 0.05:
        body = gzip.compress(body)
        headers.append(b"Content-Encoding: gzip")
    elif what < 0.1:
        body = b"data: " + b"a" * rng.choice((100, 50_000, 90_000)) + body  # a line, or an answer, without end
    elif what < 0.15:
        headers.append(rng.choice((b"Retry-After: 1e9", b"Retry-After: x", b"Location: http://evil/\x1b[2J", b"X: y")))
    if rng.random() < 0.3:
        odd = (b"ffffffffffff", b"-1", b"0", b"x", b"1" * 5000)
        size = b"%x" % len(body) if rng.random() < 0.8 else rng.choice(odd)
        body = size + b"\r\n" + body + b"\r\n0\r\n\r\n"
        headers.append(b"Transfer-Encoding: chunked")
    elif rng.random() < 0.7:
        headers.append(b"Content-Length: %d" % (len(body) if rng.random() < 0.9 else rng.choice(INTEGERS)))
    data = b"HTTP/1.1 %d OK\r\n" % status + b"\r\n".join(headers) + b"\r\n\r\n" + body
    return mutate(rng, data) if rng.random() < 0.2 else data


class Answers(Boundary):
    """What an OpenAI-compatible server answers, streamed or not."""

    name, seconds = "answers", 4.0
    _MOST = 150_000
    """What a pair of sockets holds that nobody reads yet."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.limit(REPLY_BYTES=80_000, REPLY_LINE_BYTES=40_000, REPLY_ERROR_BYTES=10_000, REPLY_ITEMS=20_000)
        self.limit(REPLY_SECONDS=2.0)
        self._data = b""
        self._client = OpenAIClient("server", self._post, portable_url)

    def make(self, rng: Random) -> bytes:
        return reply(rng)[: self._MOST]

    def check(self, data: bytes) -> str:
        self._data, talk = data, Conversation().ask(QUESTION)
        whole = self._try(lambda: self._client.complete(Request(talk, Sampling())))
        return f"{whole}/{self._try(lambda: list(self._client.stream(talk, Sampling())))}"

    def _post(self, path: str, body: dict[str, Any]) -> Response:
        here, there = socket.socketpair()
        with there:
            there.setblocking(False)
            there.sendall(self._data)
        deadline = Deadline(limits.REPLY_SECONDS)
        with connection_errors("does not answer", deadline):
            try:
                return Response(here, deadline, "POST")
            except BaseException:
                here.close()
                raise

    @staticmethod
    def _try(ask: Callable[[], Any]) -> str:
        try:
            return outcome(ask)
        except RetryableError as error:
            return refused(error)


class OtherServers(Boundary):
    """`--server`, and a picture by URL, at a server that sends anything."""

    name, seconds = "other servers", 8.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.limit(REPLY_BYTES=80_000, REPLY_LINE_BYTES=40_000, REPLY_ERROR_BYTES=10_000, REPLY_SECONDS=2.0)
        self.limit(FETCH_BYTES=50_000, FETCH_SECONDS=2.0)
        for name, value in (("MAX_ATTEMPTS", 2), ("FIRST_DELAY", 0.0), ("MAX_RETRY_AFTER", 0.0)):
            self._stack.enter_context(patch.object(remote_engine, name, value))
        self._listening = self._stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._reply = b""
        threading.Thread(target=self._serve, daemon=True).start()

    def make(self, rng: Random) -> bytes:
        return reply(rng)

    def check(self, data: bytes) -> str:
        self._reply = data

        def ask() -> None:
            model = None if len(data) % 8 == 0 else "m"  # it asks for a list of models first, in any case
            remote_engine.RemoteEngine(self._url, None, model, 1, lambda line: None).answer(
                Conversation().ask(QUESTION)
            )

        return f"{outcome(ask)}/{outcome(lambda: fetch(f'{self._url}/x.png'))}"

    def _serve(self) -> None:
        """Answers each connection with the same bytes, whatever it asks."""
        with suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                with connection, suppress(OSError):
                    connection.settimeout(2)
                    connection.recv(65_536)
                    connection.sendall(self._reply)


# Files of rows.


class Rows(Boundary):
    """Files of questions and of rows, and what a run keeps beside its output."""

    name, seconds = "rows", 5.0
    _QUESTIONS: ClassVar[list[dict[str, Any]]] = [
        {"image": "a.png", "question": QUESTION, "id": 1, "system": "Be brief.", "max_tokens": 5, "answer": ["a", 2]},
        {"image": "b.png", "question": QUESTION, "answer": True},
    ]
    _ROW: ClassVar[dict[str, Any]] = {
        **{"image": "a.png", "question": QUESTION, "answer": "a box", "status": "ok", "error": None, "id": 1},
        **dict.fromkeys(("model", "finish_reason", "sha256"), "stop"),
        **{"answer_tokens": 2, "flags": ["empty"], "right": True},
    }
    _SETTINGS: ClassVar[dict[str, Any]] = {"model": "m", "max_tokens": 5}

    def make(self, rng: Random) -> bytes:
        failed = {**self._ROW, "answer": None, "status": "error", "error": {"type": "BadImage", "message": "damaged"}}
        seeds, lines = (*self._QUESTIONS, self._ROW, failed, self._SETTINGS), []
        for _ in range(rng.choice((1, 2, 5))):
            line = rng.choice(seeds)
            if rng.random() < 0.6:
                line = mutate_json(rng, line, ("image", "question", "path_b64", "truncated", "frames", "expected"))
            lines.append(to_json(rng, line))
        data = rng.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(lines) + rng.choice((b"\n", b""))
        return mutate(rng, data) if rng.random() < 0.2 else data

    def check(self, data: bytes) -> str:
        names = ("out.jsonl", "manifest", "settings.json")
        calls = [partial(self._questions, data), partial(self._report, data)]
        return "/".join(map(outcome, [*calls, *(partial(self._run, name, data) for name in names)]))

    def _questions(self, data: bytes) -> None:
        (file := self.folder / "questions.jsonl").write_bytes(data)
        for task in Source([str(file)], [QUESTION]).tasks():
            assert Task.from_line(task.to_line()) == task

    def _report(self, data: bytes) -> None:
        (file := self.folder / "rows.jsonl").write_bytes(data)
        rows = RowsFile(file)
        rows.check()
        for number, row in rows:
            json.dumps(page_fields(number, row)).encode("ascii")

    def _run(self, damaged: str, data: bytes) -> None:
        """Goes on with a run, one of whose files was put there by somebody else."""
        output = self.folder / "out.jsonl"
        shutil.rmtree(f"{output}.run", ignore_errors=True)
        output.unlink(missing_ok=True)
        tasks = [Task("a.png", QUESTION, 1), Task("b.png", QUESTION)]
        for is_damaged in (False, True):
            if is_damaged:
                (output if damaged == "out.jsonl" else Path(f"{output}.run", damaged)).write_bytes(data)
            journal = Journal(output)
            try:
                journal.lock()
                journal.begin(self._SETTINGS, tasks)
                journal.check(lambda task, row: None, repair=len(data) % 2 == 0)
                if not is_damaged:
                    journal.append(self._ROW)
                list(journal.tasks())
                list(journal.tasks_to_redo())
            finally:
                journal.close()


# Text on its way to a terminal.


class Texts(Boundary):
    """Names, answers and messages, cleaned."""

    name, seconds = "texts", 2.0
    _PIECES = (
        *_words("\x1b[ \x1b] \x1bP \x1b_ \x1b^ \x1bX \x9b \x9d \x90 \x1b\\ \x9c \x07 \x18 \x1b \x1b( 0;"),
        *_words("52;c;YQ== words \n \r \t \b \x7f \0 \xa0 \u202e \u2066 \u061c \u200d \ufe0f \u2028 \ud800 \udc80"),
        *_words("31m 8;;http://x \ufeff \U0001f469 é \\ \" < ' a"),
        " ",
    )

    def make(self, rng: Random) -> bytes:
        count, times = rng.choice((5, 20, 100)), (1,) * 20 + (2, 5000)
        text = "".join(rng.choice(self._PIECES) * rng.choice(times) for _ in range(count))
        return text[:100_000].encode("utf-8", "surrogatepass")

    def check(self, data: bytes) -> str:
        text = data.decode("utf-8", "surrogatepass")
        shown, stream, rng = for_terminal(text), TerminalText(), Random(len(text))
        pieces, at = [], 0
        while at < len(text):
            size = rng.choice((1, 7, 5000))
            pieces.append(stream.push(text[at : at + size]))
            at += size
        assert "".join([*pieces, stream.end()]) == shown
        assert not any(
            (c < " " and c not in "\t\n") or "\x7f" <= c <= "\x9f" or c in "\u202e\u2066\u061c" for c in shown
        )
        assert for_terminal(shown) == shown
        assert printable(text).isprintable()
        assert one_line(text).isprintable()
        assert len(one_line(text)) <= limits.NAME_CHARACTERS
        for_page(text).encode()
        assert _joined(json.loads(for_json_line(json.dumps(text, ensure_ascii=False)))) == _joined(text)
        return "fine"


def _joined(text: str) -> str:
    """With halves of a surrogate pair that stand side by side as the one character that JSON takes them for."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


BOUNDARIES: tuple[type[Boundary], ...] = (
    Requests,
    Heads,
    Pictures,
    Documents,
    *([Films] if films.AVAILABLE else []),
    Headers,
    Checkpoints,
    Tokenizers,
    Templates,
    Questions,
    Answers,
    OtherServers,
    Rows,
    Texts,
)

if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        watch_health(int(sys.argv[1]))
