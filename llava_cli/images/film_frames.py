"""The sandboxed job that finds and decodes the frames of one film, with FFmpeg's libraries through PyAV.

The film is the file that the process may read (`sandbox/confine.py: FILE`). A request is `REQUEST`. A reply is `REPLY`
and the frame's pixels, RGB, 3 bytes each; none where the film's length was asked for. If there is no such frame, the
reply has the reason as UTF-8, and the index of a hint in `HINTS` in place of the width.

The time of a film is 0 where the first of its streams begins. The frame at a time is the last one that begins no later,
as in a player.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from io import FileIO
from typing import TYPE_CHECKING, Any

from llava_cli import limits
from llava_cli.errors import BadImage
from llava_cli.images import formats
from llava_cli.images.resize import PACKED_BYTES, resized
from llava_cli.sandbox.confine import FILE

if TYPE_CHECKING:
    from av import Packet, VideoFrame, VideoStream
    from PIL.Image import Image

REQUEST = struct.Struct(f"<d{PACKED_BYTES}s")
"""The time of a frame in seconds, or NaN for the film's length; a `Resize`."""
REPLY = struct.Struct("<?IIIId")
"""Whether it is what was asked for; width and height of the pixels, and of the frame before it was resized; the film's
length in seconds."""
_EXTRA = "pip install 'llava-cli[video]'"
_CONVERT = "ffmpeg -i {name} {name}.mp4"
_FEWER_PIXELS = f"the limit is {limits.PICTURE_PIXELS // 1_000_000} megapixels"
_REPAIR = "copy it again, or: ffmpeg -i {name} -c copy REPAIRED.mkv"
_LIST = "ffprobe {name} lists what is in it"
_SPREAD = "--frames 4 takes frames from all of it"
HINTS = ("", _EXTRA, _CONVERT, _FEWER_PIXELS, _REPAIR, _LIST, _SPREAD)
"""Every hint that a `BadImage` from this module may have."""
_DECODERS = frozenset(
    {
        *("libdav1d", "vp8", "vp9", "h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4", "h263", "flv", "theora"),
        *("msmpeg4v1", "msmpeg4v2", "msmpeg4", "wmv1", "wmv2", "wmv3", "vc1", "vp6", "vp6a", "vp6f"),
        *("mjpeg", "prores", "dnxhd", "dvvideo", "ffv1", "huffyuv", "rawvideo", "qtrle", "svq1", "svq3", "cinepak"),
    }
)
"""FFmpeg's decoders that are used: those of what cameras, phones, recorders and the web make, of some hundreds."""
_STEPS_BACK = (0.0, 2.0, 8.0, 32.0)
"""Seconds before a time: from which places, in turn, decoding towards it is tried, before it begins at the beginning.
Some films have no index, and others a wrong one."""
_FIRST_REACH = 1.0
_ROUNDING = 2e-6
"""Seconds by which a time may be too early because it was rounded: where a film begins is known in microseconds."""
_GRACE = 1.0
"""Seconds behind the end of the last frame in which it still counts as shown."""


def prepare() -> None:
    """Imports everything that decoding may need: after this no file can be opened."""
    import_module("PIL.ImageFile")
    with suppress(ImportError):  # the extra is not installed, which `Film` says
        for name in ("av", "av.stream", "av.subtitles.stream"):
            import_module(name)


_film: Film | None = None


def answer(request: bytes) -> tuple[bytes, ...]:
    """The parts of a reply."""
    global _film
    seconds, packed = REQUEST.unpack(request)
    try:
        if _film is None:
            _film = Film(FileIO(FILE, closefd=False))
        if math.isnan(seconds):
            return (REPLY.pack(True, 0, 0, 0, 0, _film.length()),)
        image = _film.picture(seconds)
    except MemoryError:
        return _refusal("takes too much memory to decode", "")
    except BadImage as error:
        return _refusal(error.reason, error.hint)
    size = image.size
    image = resized(image, packed)  # here, because sending a large picture takes long
    return REPLY.pack(True, *image.size, *size, 0.0), image.tobytes()


def _refusal(reason: str, hint: str) -> tuple[bytes, ...]:
    return REPLY.pack(False, HINTS.index(hint), 0, 0, 0, 0.0), reason.encode()


class Film:
    """A film that is open. Frames are found fastest in the order of their times.

    All methods raise `BadImage` for what the film does not have. A damaged film makes PyAV raise anything, so all
    exceptions of its calls count as damage, except `MemoryError`.
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._reach = _FIRST_REACH
        """How many seconds are decoded rather than jumped over: about as many as there are between keyframes."""
        self._open()

    def _open(self) -> None:
        """Opens the film, at its beginning."""
        try:
            import av
        except ImportError:
            if sys.version_info < (3, 11):
                raise BadImage("", "films need Python 3.11 or later") from None
            raise BadImage("", "films need the extra llava-cli[video]", _EXTRA) from None
        self._file.seek(0)
        demuxer = formats.FILM_DEMUXERS[formats.film_format(self._file.read(formats.MAGIC_BYTES)) or "mp4"]
        self._file.seek(0)
        try:
            self._container = av.open(
                self._file,
                mode="r",
                format=demuxer,  # not guessed: a playlist, which names other files, is no film
                io_open=_open_nothing,
                container_options={"format_whitelist": demuxer, "codec_whitelist": ",".join(_DECODERS)},
                metadata_errors="ignore",
            )
        except MemoryError:
            raise
        except Exception:
            raise BadImage("", "truncated or damaged", _REPAIR) from None
        self._stream = self._choose_stream()
        self._tick = float(self._stream.time_base or 1e-6)
        first, start = self._stream.start_time, self._container.start_time
        self._first = -math.inf if first is None else first * self._tick
        self._origin = max(self._first, 0.0) if start is None else start / 1e6
        """The stream's time, in seconds, at which the film's time is 0."""
        self._begin()

    def _choose_stream(self) -> VideoStream:
        """The stream that players show. Only its packets are read from here on."""
        from av.stream import Discard, Disposition

        streams = list(self._container.streams.video)
        covers = Disposition.attached_pic | Disposition.timed_thumbnails
        films = [stream for stream in streams if not stream.disposition & covers]
        if not films:
            found = "a cover picture" if streams else "sound" if self._container.streams.audio else "nothing"
            raise BadImage("", f"has {found} in it, and no film", _LIST)
        chosen = max(films, key=lambda stream: bool(stream.disposition & Disposition.default))
        for stream in self._container.streams:
            if stream is not chosen:
                stream.discard = Discard.all
        decoder = chosen.codec_context
        if decoder is None or decoder.name not in _DECODERS:
            name = decoder.codec.canonical_name if decoder else "unknown"
            raise BadImage("", f"its codec ({name}) is not supported", _CONVERT)
        _check_size(decoder.width, decoder.height)
        decoder.options = {"max_pixels": str(limits.PICTURE_PIXELS)}
        decoder.thread_type, decoder.thread_count = "NONE", 1  # some users' sandboxes have no other threads
        return chosen

    def _begin(self) -> None:
        """Decodes from where the file is read now."""
        self._frames = self._decoded()
        self._shown: VideoFrame | None = None
        self._next: VideoFrame | None = next(self._frames, None)

    def _packets(self) -> Iterator[Packet[VideoStream] | None]:
        """The packets from here on, and None, for which a decoder gives what it still has."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                yield next(packets)
            except MemoryError:
                raise
            except Exception:  # also at the end
                break
        yield None

    def _decoded(self) -> Iterator[VideoFrame]:
        """The frames from here on that have a time."""
        for packet in self._packets():
            try:
                frames = self._stream.decode(packet)
            except MemoryError:
                raise
            except Exception:  # as players do: what is behind the damage may be whole
                continue
            yield from (frame for frame in frames if frame.time is not None)

    def picture(self, seconds: float) -> Image:
        """The frame that is shown at a time: upright, with square pixels, RGB."""
        frame = self._frame(seconds)
        ratio = float(self._stream.sample_aspect_ratio or 1) or 1.0
        # Made larger in one direction rather than smaller in the other: no pixel is lost.
        size = round(frame.width * max(ratio, 1)), round(frame.height / min(ratio, 1))
        _check_size(*size)
        try:
            image: Image = frame.to_image(threads=1)
        except MemoryError:
            raise
        except Exception:
            raise BadImage("", f"its colors ({frame.format.name}) are not supported", _CONVERT) from None
        return _upright(image if image.size == size else image.resize(size), frame)

    def _frame(self, seconds: float) -> VideoFrame:
        """The frame that is shown at a time."""
        time = self._origin + seconds + _ROUNDING
        if not self._is_near(time):
            self._jump(time)
        while self._next and (self._shown is None or self._time_of(self._next) <= time):
            self._shown, self._next = self._next, next(self._frames, None)
        if self._shown is None:
            raise BadImage("", "none of its frames can be decoded", _REPAIR)
        last = self._time_of(self._shown) - self._origin
        if self._next is None and seconds > last + self._duration(self._shown) + _GRACE:
            raise BadImage("", f"has no frame at {seconds:g} s: its last one is at {last:g} s", _SPREAD)
        return self._shown

    def _is_near(self, time: float) -> bool:
        """Whether decoding from here on is quicker than from a keyframe before `time`."""
        shown = self._time_of(self._shown) if self._shown else math.inf
        if not shown <= time <= shown + self._reach:
            return False
        index = self._stream.index_entries
        place = index.search_timestamp(int(time / self._tick))
        return place < 0 or index[place].timestamp * self._tick <= shown

    def _jump(self, time: float) -> None:
        """Begins to decode at a keyframe before `time`, or at the beginning of the film."""
        for seconds in _STEPS_BACK:
            if self._seek(time - seconds):
                self._begin()
                if self._next and self._time_of(self._next) <= max(time, self._first + _ROUNDING):
                    self._reach = max(self._reach, time - self._time_of(self._next))
                    return
        self._open()

    def _seek(self, time: float) -> bool:
        """Goes on reading at the keyframe before a time of the stream; returns whether that is possible."""
        try:
            self._container.seek(int(time / self._tick), stream=self._stream)
        except MemoryError:
            raise
        except Exception:
            return False
        return True

    def _time_of(self, frame: VideoFrame) -> float:
        """When a frame begins, in seconds of its stream's time."""
        return frame.time or 0.0

    def _duration(self, frame: VideoFrame | Packet[VideoStream]) -> float:
        """How long a frame is shown, in seconds: as it says, or as long as most."""
        rate = float(self._stream.average_rate or self._stream.guessed_rate or 0)
        return frame.duration * self._tick if frame.duration else 1 / rate if rate > 0 else 0.0

    def length(self) -> float:
        """The time at which the last frame ends, in seconds.

        It is taken from the last packets, not from the file's header: that of a film that is cut off, that was recorded
        by a program that crashed, or that wants to be endless says anything. Where the last packets cannot be found,
        all are read.
        """
        end = None
        for seconds in _STEPS_BACK:
            if end is None and self._seek(self._stated_end() - seconds):
                end = self._last_end()
        if end is None:
            self._open()
            end = self._last_end()
        self._begin()
        return max(0.0, round((end or 0.0) - self._origin, 6))

    def _stated_end(self) -> float:
        """Where the film ends by its header, in the time of its stream."""
        if self._stream.duration is not None:
            return max(self._first, 0.0) + self._stream.duration * self._tick
        return self._origin + (self._container.duration or 0) / 1e6

    def _last_end(self) -> float | None:
        """Where the last frame ends whose packet is found from here on, in the time of the stream."""
        ends = (
            packet.pts * self._tick + self._duration(packet)
            for packet in self._packets()
            if packet and packet.pts is not None
        )
        return max(ends, default=None)


def _check_size(width: int, height: int) -> None:
    """Raises `BadImage` for a frame that is too large, or too narrow."""
    if width * height > limits.PICTURE_PIXELS:
        raise BadImage("", f"too many pixels ({width} x {height})", _FEWER_PIXELS)
    if max(width, height) > limits.PICTURE_ASPECT * min(width, height):
        raise BadImage("", f"too narrow to see anything ({width} x {height})")


def _open_nothing(url: str, flags: int, options: dict[str, str]) -> Any:
    """In place of what opens the files that a film names."""
    raise PermissionError


_TURNS = {
    (False, True, True): None,
    (False, False, False): "ROTATE_180",
    (False, False, True): "FLIP_LEFT_RIGHT",
    (False, True, False): "FLIP_TOP_BOTTOM",
    (True, True, False): "ROTATE_270",  # which Pillow counts counterclockwise
    (True, False, True): "ROTATE_90",
    (True, True, True): "TRANSPOSE",
    (True, False, False): "TRANSVERSE",
}
"""Pillow's names by a display matrix: whether it swaps width and height, and the signs of its two larger numbers."""


def _upright(image: Image, frame: VideoFrame) -> Image:
    """The image, turned as the frame's display matrix (`libavutil/display.h`) says, by multiples of 90 degrees."""
    from PIL.Image import Transpose

    side_data: Any = frame.side_data
    try:
        matrix = struct.unpack("=9i", bytes(side_data["DISPLAYMATRIX"]))
    except (KeyError, ValueError, struct.error):  # there is none, or one that is not of this form
        return image
    a, b, _, c, d = matrix[:5]  # a point (x, y) goes to (a x + c y, b x + d y)
    swaps = abs(b) > abs(a)
    turn = _TURNS[(True, b > 0, c > 0) if swaps else (False, a > 0, d > 0)]
    return image.transpose(Transpose[turn]) if turn else image
