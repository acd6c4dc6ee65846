"""Small films that PyAV makes. The color of each frame tells its second and the tenth of it (`time_of`)."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from contextlib import suppress
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

AVAILABLE = find_spec("av") is not None
"""Not on Python 3.10."""
TICKS = 1000
"""Of a second, in which the times of frames are given to encoders that take any."""
KINDS = {
    **dict.fromkeys(("mp4", "mov", "3gp", "matroska", "avi"), "mpeg4"),
    **{"mpegts": "mpeg2video", "mpeg": "mpeg2video", "flv": "flv", "asf": "wmv2", "webm": "libvpx", "f4v": "libx264"},
}
"""Formats of films, as FFmpeg's muxers are called, and an encoder for each."""


class Pipe(io.RawIOBase):
    """An output that cannot be gone back in: a film that is written to it has no length and no index in its header."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.data += data
        return len(data)


def picture(time: float, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """The frame of a time: red says the second, blue its tenth; the left upper quarter is white."""
    second, tenth = divmod(round(time * 10), 10)
    image = Image.new("RGB", size, (second * 20 % 256, 40, tenth * 20))
    image.paste("white", (0, 0, size[0] // 2, size[1] // 2))
    return image


def time_of(image: Image.Image) -> float:
    """The time of the frame that an image is, to a tenth of a second, by its right lower corner."""
    red, _, blue = image.getpixel((image.width - 8, image.height - 8))  # type: ignore[misc]  # RGB
    return round(red / 20) + round(blue / 20) / 10


def film(
    kind: str = "mp4",
    codec: str | None = None,
    *,
    seconds: float = 12,
    rate: int = 10,
    times: Sequence[float] | None = None,
    start: float = 0.0,
    size: tuple[int, int] = (96, 64),
    keyframes: int = 10,
    ratio: Fraction | None = None,
    turn: tuple[float, bool, bool] | None = None,
    color: dict[str, int] | None = None,
    sound: bool = False,
    cover: bool = False,
    pipe: bool = False,
    options: dict[str, str] | None = None,
) -> bytes:
    """A film's file.

    Frames begin at `times`, or `rate` in each of `seconds`, all plus `start`; each of so many `keyframes` is one.
    `ratio` is the shape of a pixel; `turn` degrees, and whether it is mirrored in x and in y; `color` attributes of the
    codec's context. A `cover` is a picture in a stream of its own. `options` are the muxer's.
    """
    import av
    from av.stream import Disposition

    file = Pipe() if pipe else io.BytesIO()
    with av.open(file, "w", format=kind, options=options or {}) as container:
        streams: list[Any] = []
        if times or times is None:
            video = container.add_stream(codec or KINDS[kind], rate=rate)
            video.width, video.height, video.pix_fmt = *size, "yuv420p"
            video.codec_context.gop_size = keyframes
            if not video.codec_context.name.startswith("lib"):  # with their usual quality, tenths could not be told
                video.codec_context.qmin, video.codec_context.qmax = 2, 3
            if kind != "avi" and not video.codec_context.name.startswith("mpeg2"):  # which know only rates
                video.time_base = video.codec_context.time_base = Fraction(1, TICKS)
            if ratio:
                video.codec_context.sample_aspect_ratio = ratio
            if turn:
                video.set_display_rotation(turn[0], hflip=turn[1], vflip=turn[2])
            for name, value in (color or {}).items():
                setattr(video.codec_context, name, value)
            streams.append(video)
        if sound:
            streams.append(container.add_stream("mp2", rate=44100))
        if cover:
            art = container.add_stream("mjpeg", rate=1)
            art.width, art.height, art.pix_fmt, art.disposition = *size, "yuvj420p", Disposition.attached_pic
            container.mux(art.encode(av.VideoFrame.from_image(picture(7, size)).reformat(format="yuvj420p")))
        for stream in streams:
            if stream.type == "audio":
                quiet = av.AudioFrame(format="s16", layout="stereo", samples=1152)
                quiet.sample_rate, quiet.pts = 44100, 0
                container.mux(stream.encode(quiet))
                continue
            for time in times or [number / rate for number in range(round(seconds * rate))]:
                frame = av.VideoFrame.from_image(picture(time, size))
                frame.time_base = stream.codec_context.time_base or Fraction(1, rate)
                frame.pts = round((start + time) / frame.time_base)
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    return bytes(file.data) if isinstance(file, Pipe) else file.getvalue()


def one_of_each() -> list[bytes]:
    """A film of two seconds of each kind."""
    return [film(kind, seconds=2, rate=25) for kind in KINDS]


def peak_memory(processes: Iterable[int]) -> int:
    """The most memory, in bytes, that one of these processes has taken."""
    found = [0]
    for process in processes:
        with suppress(OSError):  # it has just ended
            status = Path(f"/proc/{process}/status").read_text()
            found += [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")]
    return max(found)
