"""Rows with their pictures as WebDataset shards: tar files whose members `000000012.jpg`, `.txt`, `.json` are a sample.

Members are in the order of the rows and have neither times nor owners: the same rows make the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

from llava_cli import files, limits, regular_files, render
from llava_cli.batch.export.export_job import CHANGED, ELSEWHERE, MISSING, OUTSIDE, Job, Reason, is_elsewhere
from llava_cli.batch.picture_loader import PictureLoader
from llava_cli.batch.report.report import check_output
from llava_cli.batch.report.report_pictures import OutsideRoots, PictureFolders, task_of
from llava_cli.batch.rows import to_line
from llava_cli.batch.tasks import Task
from llava_cli.errors import InputMissing, LlavaError, UsageError
from llava_cli.images import formats
from llava_cli.parts import WHOLE
from llava_cli.untrusted_text import for_page, printable

SHARD_SAMPLES = 10_000
SHARD_BYTES = 1_000_000_000
"""A shard ends with the sample that exceeds one of these."""
UNREADABLE = Reason("the picture cannot be opened")
_ENDINGS = {"jpeg": "jpg", "png": "png", "gif": "gif", "webp": "webp", "tiff": "tif"}
_BLOCK, _RECORD = 512, 10_240
"""Bytes that the members of a tar file, and the file itself, are multiples of."""
Sample = list[tuple[str, bytes]]
"""The names and the contents of its members."""


def export_shards(job: Job) -> None:
    """Writes `out-000000.tar` and so on beside the rows, or `NAME-000000.tar` for `-o NAME`."""
    start = job.output or job.rows.beside("")
    name = start.name.removesuffix(".tar")
    if name in ("", "-") or (job.output and job.output.is_dir()):
        raise UsageError("-o", "names no file", f"-o {files.quoted(start / 'train' if name else 'train')}")

    def shard(number: int) -> Path:
        return start.with_name(f"{name}-{number:06}.tar")

    written = 0
    with render.spinner("writing shards", job.quiet), closing(_Samples(job)) as source:
        samples = iter(source)
        for written, first in enumerate(samples, 1):
            check_output(path := shard(written - 1), job.rows.path)
            with job.writing(path):
                job.outcome.done[files.update(path, _tar(chain([first], samples)), job.force)] += 1
    if not job.quiet:
        render.note(f"{printable(str(shard(0)))}: {source.total:,} samples; {job.outcome.changes('shard')}")
        if shard(written).exists():
            render.note(f"  {printable(shard(written).name)} is left from another export, and no part of this one")


def _tar(samples: Iterator[Sample]) -> Iterator[bytes]:
    """A shard in pieces: as many samples as it takes."""
    size = 0
    for number, sample in enumerate(samples, 1):
        for name, data in sample:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            padded = [member.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % _BLOCK)]
            yield from padded
            size += sum(map(len, padded))
        if number == SHARD_SAMPLES or size > SHARD_BYTES:
            break
    end = 2 * _BLOCK
    yield bytes(end + -(size + end) % _RECORD)


class _Samples:
    """The samples of the rows that have an answer and whose pictures are as they were."""

    def __init__(self, job: Job) -> None:
        self.total = 0
        self._job, self._folders = job, PictureFolders.of(job.rows.path, job.root)
        self._loader = PictureLoader(self._folders.find, self._folders.allow_truncated, dpi=self._folders.dpi)

    def __iter__(self) -> Iterator[Sample]:
        for number, row in self._job.answered_rows():
            picture = self._picture(task_of(row), row.get("sha256"))
            if isinstance(picture, Reason):
                self._job.outcome.leave_out(picture, row["image"])
                continue
            self.total += 1
            ending, data = picture
            key = f"{number:09}"
            caption = for_page(row["answer"].strip()).encode()
            yield [(f"{key}.{ending}", data), (f"{key}.json", to_line(row)), (f"{key}.txt", caption)]

    def _picture(self, task: Task, sha256: Any) -> tuple[str, bytes] | Reason:
        """The ending of a picture's name, and its file; of a page, a frame or a region a PNG of what was looked at."""
        if is_elsewhere(task.image):
            return ELSEWHERE
        try:
            if task.part != WHOLE or task.region:
                ending, (data, digest) = "png", self._looked_at(task)
            else:
                data = self._file(task.image)
                ending, digest = _ending(data, task.image), hashlib.sha256(data).hexdigest()
        except OutsideRoots:
            return OUTSIDE
        except (InputMissing, FileNotFoundError):
            return MISSING
        except (LlavaError, OSError):
            return UNREADABLE
        return (ending, data) if sha256 in (None, digest) else CHANGED

    def _file(self, image: str) -> bytes:
        """Raises a `LlavaError` or an `OSError`."""
        found = self._folders.find(image)
        return found if isinstance(found, bytes) else regular_files.read(found, limits.PICTURE_BYTES)

    def _looked_at(self, task: Task) -> tuple[bytes, str]:
        """A PNG, and the SHA-256 of its file. Raises a `LlavaError`."""
        picture = self._loader.load(task)
        if isinstance(picture, LlavaError):
            raise picture
        data = io.BytesIO()
        picture.image.save(data, "PNG")
        return data.getvalue(), picture.sha256

    def close(self) -> None:
        self._loader.close()
        self._folders.close()


def _ending(data: bytes, image: str) -> str:
    """The ending by which readers know how to decode a picture: by its bytes, else as its name has it."""
    if found := formats.format_of(data, _ENDINGS):
        return _ENDINGS[found]
    ending = re.search(r"\.([a-z0-9]{1,5})$", image.lower())
    return ending[1] if ending else "img"
