"""Which pictures a report may open, and their thumbnails."""

from __future__ import annotations

import base64
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_cli import limits
from llava_cli.batch.roots import is_signed, resolve_below
from llava_cli.bounded_json import Bounds, loads
from llava_cli.conversation import Picture
from llava_cli.errors import InputMissing, LlavaError
from llava_cli.images.reader import is_url, local_path
from llava_cli.regular_files import open_regular
from llava_cli.untrusted_text import for_page, printable


class OutsideRoots(InputMissing):
    """A picture is not below a folder whose pictures may be shown."""


@dataclass
class PictureFolders:
    """Where the pictures of a file of rows are, and which may be opened: those below one of the `roots`.

    The rows and the settings beside them may be a stranger's and name any file of this machine. So the roots are the
    folder of the rows, and the one that this user's own run had its pictures in; with `--root` only that folder.
    """

    roots: list[str]
    starts: list[str]
    """Where relative paths may begin."""
    allow_truncated: bool = False
    outside: set[str] = field(default_factory=set)
    """The folders of pictures that were not opened."""

    @classmethod
    def of(cls, rows: Path, root: str | None = None) -> PictureFolders:
        folders = cls([str(rows.parent)], [str(rows.parent)])
        bounds = Bounds(limits.SETTINGS_BYTES, limits.ROW_DEPTH, limits.ROW_ITEMS)
        try:
            with open_regular(Path(f"{rows}.run") / "settings.json", follow=False) as file:
                settings = loads(file.read(bounds.bytes + 1), bounds)
            folders.starts.insert(0, os.fspath(settings["root"]))
            folders.allow_truncated = settings.get("allow_truncated") is True
            if is_signed(rows, settings["root"], settings.get("signed")):
                folders.roots.append(settings["root"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # no settings: the rows are from another machine, or were piped into a file
        if root is not None:
            folders.roots = [root]
            folders.starts.insert(0, root)
        return folders

    def locate(self, image: str) -> str:
        """The real path of a row's picture. Raises `OutsideRoots`."""
        paths = [os.path.join(start, local_path(image)) for start in self.starts]
        allowed = [self._below_roots(path) for path in paths]
        real_path = next((path for path in allowed if path and os.path.lexists(path)), allowed[0])
        if real_path is None:
            self.outside.add(os.path.dirname(os.path.abspath(paths[0])))
            raise OutsideRoots(printable(image), f"outside {printable(self.roots[0])}")
        return real_path

    def find(self, image: str) -> Path:
        """The file of a row's picture. Raises `OutsideRoots`."""
        return Path(self.locate(image))

    def _below_roots(self, path: str) -> str | None:
        return next(filter(None, (resolve_below(path, root) for root in self.roots)), None)


def thumbnail(picture: Picture | LlavaError, row: dict[str, Any]) -> dict[str, str]:
    """`{"thumb": WebP in base64}`, or `{"why": the reason why there is none}`."""
    if isinstance(picture, LlavaError):
        if is_url(row["image"]):
            return {"why": "a URL: not fetched"}
        if isinstance(picture, OutsideRoots):
            return {"why": f"not opened: {picture.reason}"}
        problem = "missing" if isinstance(picture, InputMissing) else "cannot be opened"
        return {"why": f"{problem}: {for_page(picture.reason)}"}
    if row.get("sha256") not in (None, picture.sha256):
        return {"why": "changed since it was asked about"}
    data = io.BytesIO()
    picture.image.save(data, "WEBP", quality=70, method=2)
    return {"thumb": base64.b64encode(data.getvalue()).decode()}
