"""Which pictures a report may open, and their thumbnails."""

from __future__ import annotations

import base64
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llava_cli import limits
from llava_cli.batch.roots import is_signed, resolve, resolve_below
from llava_cli.batch.sources.containers import open_container
from llava_cli.batch.sources.containers.container import Container
from llava_cli.batch.tasks import Task, is_valid
from llava_cli.bounded_json import Bounds, loads
from llava_cli.conversation import Picture
from llava_cli.errors import InputMissing, LlavaError, UsageError
from llava_cli.images.reader import is_url, local_path
from llava_cli.regular_files import open_regular
from llava_cli.settings import OPTIONS, PictureOptions
from llava_cli.untrusted_text import for_page, printable


class OutsideRoots(InputMissing):
    """A picture is not below a folder whose pictures may be shown."""


@dataclass
class PictureFolders:
    """Where the pictures of a file of rows are, and which may be opened: those below one of the `roots`.

    The rows and the settings beside them may be a stranger's and name any file of this machine. So the roots are the
    folder of the rows, and the one that this user's own run had its pictures in; with `--root` only that folder.
    A root may be an archive or a table, and a path may lead through one (`archive.zip/a.jpg`). Nothing is fetched.
    """

    roots: list[str]
    starts: list[str]
    """Where relative paths may begin."""
    allow_truncated: bool = False
    dpi: int = PictureOptions.dpi
    """Of pages, as they were drawn for the run."""
    outside: set[str] = field(default_factory=set)
    """The folders of pictures that were not opened."""
    _containers: dict[str, Container | None] = field(default_factory=dict)
    """By their real paths; None for a file that is no container."""

    @classmethod
    def of(cls, rows: Path, root: str | None = None) -> PictureFolders:
        folders = cls([str(rows.parent)], [str(rows.parent)])
        bounds = Bounds(limits.SETTINGS_BYTES, limits.ROW_DEPTH, limits.ROW_ITEMS)
        try:
            with open_regular(Path(f"{rows}.run") / "settings.json", follow=False) as file:
                settings = loads(file.read(bounds.bytes + 1), bounds)
            folders.starts.insert(0, os.fspath(settings["root"]))
            folders.allow_truncated = settings.get("allow_truncated") is True
            if "dpi" in settings:
                folders.dpi = OPTIONS["dpi"].convert("dpi", settings["dpi"])
            if is_signed(rows, settings["root"], settings.get("signed")):
                folders.roots.append(settings["root"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, UsageError):
            pass  # no settings: the rows are from another machine, or were piped into a file
        if root is not None:
            folders.roots = [root]
            folders.starts.insert(0, root)
        return folders

    def locate(self, image: str) -> str:
        """The real path of a row's picture, whether it is there or not. Raises `OutsideRoots`."""
        return resolve(self._path(image))

    def beside(self, image: str) -> Path:
        """The path of a row's picture in its real folder, in which files may be written that belong to the picture.

        The picture itself may be a link. Raises `OutsideRoots`.
        """
        folder, name = os.path.split(os.path.abspath(self._path(image)))
        if not self._is_below_roots(folder):
            raise self._outside(image, folder)
        return Path(resolve(folder)) / name

    def is_in_file(self, image: str) -> bool:
        """Whether a picture's path leads through a file, an archive or a table. Raises `OutsideRoots`."""
        return _file_above(self.locate(image)) is not None

    def find(self, image: str) -> bytes | Path:
        """A row's picture: its file, or its bytes in an archive or a table.

        Raises `OutsideRoots`, or as `open_container` and `Container.read`.
        """
        path = self.locate(image)
        file = _file_above(path)
        container = self._container(file) if file else None
        if file is None or container is None:
            return Path(path)
        found = container.read(Path(path).relative_to(file).as_posix())
        if isinstance(found, Path) and not self._is_below_roots(str(found)):
            raise self._outside(image, str(found.parent))
        return found

    def link(self, task: Task, page: Path) -> str | None:
        """A relative URL of the file of a task's picture, for an HTML page in a folder; None if it has no file."""
        if self.is_in_file(task.image):
            return None
        path = self.locate(task.image)
        relative = os.path.relpath(path, os.path.realpath(page.parent)).replace(os.sep, "/")
        fragment = "" if task.time is None else f"#t={decimal(task.time)}"
        return quote(os.fsencode(relative)) + (fragment if task.page is None else f"#page={task.page}")

    def close(self) -> None:
        """Closes the archives and tables."""
        for container in filter(None, self._containers.values()):
            container.close()
        self._containers.clear()

    def _path(self, image: str) -> str:
        """Where a picture is, or would be if it was there; its real path is below a root. Raises `OutsideRoots`."""
        paths = [os.path.join(start, local_path(image)) for start in self.starts]
        allowed = [path for path in paths if self._is_below_roots(path)]
        is_there = (os.path.lexists, lambda path: _file_above(resolve(path)) is not None)
        found = next((path for test in is_there for path in allowed if test(path)), paths[0])
        if found not in allowed:
            raise self._outside(image, os.path.dirname(os.path.abspath(found)))
        return found

    def _outside(self, image: str, folder: str) -> OutsideRoots:
        self.outside.add(folder)
        return OutsideRoots(printable(image), f"outside {printable(self.roots[0])}")

    def _container(self, file: str) -> Container | None:
        if file not in self._containers:
            self._containers[file] = open_container(file)
        return self._containers[file]

    def _is_below_roots(self, path: str) -> bool:
        return any(resolve_below(path, root) is not None for root in self.roots)


def _file_above(path: str) -> str | None:
    """The file that an absolute path leads through as if it were a folder; None if there is none."""
    above = next((str(parent) for parent in Path(path).parents if os.path.lexists(parent)), "")
    return above if os.path.isfile(above) else None


def decimal(seconds: float) -> str:
    """To the millisecond: `12.5`, `3`."""
    return f"{seconds:.3f}".rstrip("0").rstrip(".")


def task_of(row: dict[str, Any]) -> Task:
    """The picture that a row is about; what it says of its page, time or region counts where it can be true."""
    place = {name: value for name in ("page", "time", "region") if is_valid(name, value := row.get(name))}
    return Task(row["image"], row["question"], **place)


def thumbnail(picture: Picture | LlavaError, row: dict[str, Any], side: int) -> dict[str, str]:
    """`{"thumb": WebP in base64}` of at most `side` pixels, or `{"why": the reason why there is none}`."""
    if isinstance(picture, LlavaError):
        if is_url(row["image"]):
            return {"why": "a URL: not fetched"}
        if isinstance(picture, OutsideRoots):
            return {"why": f"not opened: {picture.reason}"}
        problem = "missing" if isinstance(picture, InputMissing) else "cannot be opened"
        return {"why": f"{problem}: {for_page(picture.reason)}"}
    if row.get("sha256") not in (None, picture.sha256):
        return {"why": "changed since it was asked about"}
    picture.image.thumbnail((side, side))  # a region is cut from the whole picture
    data = io.BytesIO()
    picture.image.save(data, "WEBP", quality=70, method=2)
    return {"thumb": base64.b64encode(data.getvalue()).decode()}
