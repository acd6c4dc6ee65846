"""Opens pictures from a path, a URL or stdin: their bytes are read here, and decoded in the sandbox.

Only regular files are read, up to a limit of bytes. A file may have several pictures: pages or frames.
"""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, Union

from llava_cli import limits, regular_files
from llava_cli.conversation import Picture
from llava_cli.errors import BadImage, InputMissing, LlavaError, PromptTooLong, UsageError, printable
from llava_cli.images import formats
from llava_cli.images.local_file import read_path, shown_name
from llava_cli.images.region import cut
from llava_cli.images.remote_names import is_cloud_url
from llava_cli.images.sandbox import SandboxPool
from llava_cli.parts import WHOLE, Chosen, Content, Part, choose, split_reference
from llava_cli.settings import PictureOptions

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

Source = Union[str, os.PathLike[str], bytes, "PillowImage", Picture]
"""A path, a URL, a file's bytes, Pillow's image, or a picture that is open."""
SUFFIXES = (*formats.SINGLE_SUFFIXES, *formats.SUFFIXES_OF_SEVERAL)
"""Suffixes of pictures: of those that we open, and of some others, whose error says what they are."""
CLIPBOARD, SCREEN = "clipboard", "screen"
"""The names of pictures that were on the clipboard, or are of the screen."""
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Modes of Pillow's images that PNG has."""


def is_url(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


def local_path(source: str) -> str:
    """The path in a `file:` URL, as file managers and browsers write it (RFC 8089); any other source unchanged.

    Raises `InputMissing` for a URL of another machine.
    """
    if source[:6].lower() != "file:/" or os.path.lexists(source):
        return source
    from urllib.parse import unquote

    match = re.fullmatch(r"(?://([^/?#]*))?([^?#]*)([?#].*)?", source[5:], re.DOTALL)
    assert match  # each part may be empty
    host, path, suffix = match[1] or "", unquote(match[2], errors="surrogateescape"), match[3]
    if host.lower() not in ("", "localhost", "127.0.0.1"):
        raise InputMissing(printable(source), f"a file of another machine ({printable(host)})")
    if suffix and os.path.lexists(path + suffix):  # "?" or "#" in a name, not escaped, as people type it
        path += suffix
    return path[1:] if re.match(r"/[A-Za-z]:/", path) and os.name == "nt" else path


def looks_like_picture(text: str) -> bool:
    """Whether an argument is meant as a picture: it exists, is "-" or a URL, or has a picture's suffix."""
    if text == "-" or is_url(text) or is_cloud_url(text) or text[:6].lower() == "file:/":
        return True
    return any(os.path.lexists(path) or path.lower().endswith(SUFFIXES) for path in (text, split_reference(text)[0]))


def split_source(source: str) -> tuple[str, Part]:
    """`doc.pdf#2` -> its path, or URL, and the part; a file that is really called so is one without a part."""
    path = local_path(source)
    reference, part = split_reference(source)
    if part == WHOLE:
        return path, WHOLE
    base = local_path(reference)
    return (path, WHOLE) if path != base and os.path.lexists(path) else (base, part)


class Opened(NamedTuple):
    """The pictures of a file that were chosen, in order."""

    pictures: list[Picture]
    notes: tuple[str, ...] = ()
    """What is left out although the user did not choose that, a line for each file."""


def open_picture(source: str, allow_truncated: bool = False, public: bool = False) -> Picture:
    """Opens a path, the URL of a file or of an object in a bucket, or "-" for stdin.

    With `public` neither a URL of a private network nor one of a bucket, which takes this user's credentials.

    `doc.pdf#2` is its second page; of a file with several pictures without that, it is the first one.
    Raises `InputMissing` if it cannot be read, and `BadImage` if it is not a picture that we take.
    """
    path, part = split_source(source)
    return _ok(sandbox_pool().open(path, _file(path, public), allow_truncated, part=part))


def open_pictures(source: Source, allow_truncated: bool = False, **which: Any) -> list[Picture]:
    """The pictures of a path, a URL, a file's bytes or an image of Pillow: `open_pictures("invoice.pdf", pages="1-3")`.

    Keywords are the fields of `PictureOptions`: `pages`, `frames`, `every`, `dpi`, `region`. Without them it is one
    picture, or the first pages of a document, or some frames of a film, with a warning if that is not all.
    Raises as `open_picture`, and `UsageError` for a keyword's value.
    """
    options = PictureOptions(**which)
    if isinstance(source, Picture):
        return [_region_of(source, options.region)]
    if isinstance(source, (str, os.PathLike)):
        opened = open_chosen(os.fspath(source), options, allow_truncated)
    else:
        data = source if isinstance(source, bytes) else as_png(source)
        opened = open_file("picture", data, options, allow_truncated)
    for note in opened.notes:
        warnings.warn(note, stacklevel=2)
    return opened.pictures


def open_chosen(source: str, options: PictureOptions, allow_truncated: bool = False) -> Opened:
    """The pictures of a source of `open_picture` that the options choose. Raises as `open_file`."""
    path, part = split_source(source)
    return open_file(path, _file(path), options, allow_truncated, part)


def open_file(
    name: str, file: bytes | Path, options: PictureOptions, allow_truncated: bool = False, part: Part = WHOLE
) -> Opened:
    """The pictures of a file that the options choose, or its `part`; `file` is its bytes or its resolved path.

    Raises `BadImage` if it has none of them or is not what we take, and `PromptTooLong` if they are too many.
    """
    pool = sandbox_pool()
    parts, note = ([part], "") if part != WHOLE else _choose_parts(name, file, options)
    pictures = [_ok(pool.open(name, file, allow_truncated, part=one, dpi=options.dpi)) for one in parts]
    first = pictures[0]
    if parts == [WHOLE] and first.frames > 1 and first.format != "JPEG":  # a JPEG's others are previews
        note = f"{printable(name)}: the first of {first.frames} frames; --frames {min(first.frames, 4)} takes more"
    return Opened([_region_of(picture, options.region) for picture in pictures], (note,) if note else ())


def _choose_parts(name: str, file: bytes | Path, options: PictureOptions) -> tuple[list[Part], str]:
    """The parts of a file that are looked at, and the note of what is left out of it."""
    if not (options.pages or options.frames or options.every or formats.has_several(_head(file))):
        return [WHOLE], ""
    content = _ok(sandbox_pool().inspect(name, file))
    if content == Content("document") and not options.pages:
        return [WHOLE], ""
    is_chosen = content.kind != "document" or options.pages
    most = limits.QUESTION_PICTURES if is_chosen else limits.ASK_PAGES
    chosen = choose(content, options.pages, options.frames, options.every, most)
    shown, count = shown_name(name), f"{content.count} page{'s' * (content.count > 1)}"
    if not chosen.parts:
        last = f"--pages 1-{content.count}" if content.count > 1 else "--pages 1"
        raise BadImage(shown, f"{count}, and --pages {options.pages} names none of them", last)
    if is_chosen and chosen.left_out:
        number = len(chosen.parts) + chosen.left_out
        hint = "--pages 1-4" if chosen.parts[0].time is None else "--frames 4"
        raise PromptTooLong(shown, f"{number:,} pictures; a question has at most {most}", hint)
    return chosen.parts, _left_out(shown, content, chosen, options)


_OTHER_OPTIONS = {"document": ("frames", "every"), "film": ("pages",)}
"""The options that are about other kinds of files."""


def _left_out(shown: str, content: Content, chosen: Chosen, options: PictureOptions) -> str:
    """The note of what the user did not choose to leave out of a file."""
    if chosen.left_out:
        count, taken = content.count, len(chosen.parts)
        more = f"1-{count} takes all" if count <= limits.QUESTION_PICTURES else f"{taken + 1}-{2 * taken} takes others"
        return f"{shown}: pages 1 to {taken} of {count:,}; --pages {more}"
    for option in _OTHER_OPTIONS.get(content.kind, ()):
        if getattr(options, option):
            return f"{shown}: a {content.kind}, where --{option} chooses nothing"
    if content.kind == "film" and not (options.frames or options.every):
        return f"{shown}: {len(chosen.parts)} frames of {content.seconds:.0f} s; --frames or --every takes others"
    if content.kind in ("document", "animation") and options.pages:
        named = [int(number) for number in re.findall("[0-9]+", options.pages)]
        if max(named) > content.count:
            word = "page" if content.kind == "document" else "frame"
            pages = f"{content.count:,} {word}{'s' * (content.count != 1)}"
            return f"{shown}: {pages}; --pages {options.pages} goes beyond that"
    return ""


def _region_of(picture: Picture, region: str | None) -> Picture:
    return _ok(cut(picture, region)) if region else picture


Result = TypeVar("Result", Picture, Content)


def _ok(result: Result | LlavaError) -> Result:
    if isinstance(result, LlavaError):
        raise result
    return result


def _file(path: str, public: bool = False) -> bytes | Path:
    """A source's bytes; for a film on this disk its path, since it may be larger than all memory."""
    if path != "-" and not is_url(path) and not is_cloud_url(path):
        try:
            with regular_files.open_regular(path) as file:
                if formats.is_film(file.read(formats.HEAD_BYTES)):
                    return Path(os.path.realpath(path))
        except (OSError, ValueError):
            pass  # `read` says what is wrong
    return read(path, public)


def _head(file: bytes | Path) -> bytes:
    """The beginning of a file; a path is that of a film."""
    if isinstance(file, bytes):
        return file[: formats.HEAD_BYTES]
    with regular_files.open_regular(file) as opened:
        return opened.read(formats.HEAD_BYTES)


def as_png(image: PillowImage) -> bytes:
    """A file of Pillow's image, since the only way to a picture is a file's: RGB, on white. It is upright."""
    from PIL import Image, ImageOps

    if not isinstance(image, Image.Image):
        reason = f"{type(image).__name__} is neither a path, nor a file's bytes, nor an image of Pillow"
        raise UsageError("picture", reason, "PIL.Image.fromarray(…) makes an image of an array")
    upright = ImageOps.exif_transpose(image)
    if upright.mode not in _PNG_MODES:
        upright = upright.convert("RGB")
    file = io.BytesIO()
    upright.save(file, "PNG")
    return file.getvalue()


def start_sandbox() -> None:
    """Starts a process that decodes pictures before `open_picture` needs it. Raises `WorkerDied`."""
    sandbox_pool().start_one()


@cache
def sandbox_pool() -> SandboxPool:
    return SandboxPool()


def read(source: str, public: bool = False, follow: bool = True) -> bytes:
    """The bytes of a source of `open_picture`; with `follow` false not those of a symbolic link's target.

    Raises `InputMissing`, or `BadImage` if they are too many.
    """
    if source == "-":
        return _read_stdin()
    if is_url(source):
        from llava_cli.images.fetch import fetch

        return fetch(source, public)
    if is_cloud_url(source) and not public:
        from llava_cli.images.cloud import Cloud

        return Cloud(source).read(source)
    return read_path(source, follow)


def _read_stdin() -> bytes:
    try:
        return sys.stdin.buffer.read(limits.PICTURE_BYTES + 1)
    except (AttributeError, OSError):  # sys.stdin is None if it was closed
        raise InputMissing("-", "stdin cannot be read") from None
