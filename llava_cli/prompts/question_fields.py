"""Questions with fields: `{name}`, `{exif.Model}`, `{row.city}`, and the parameters of saved prompts.

Values come from strangers (file names, EXIF, cells of tables). They are text and numbers without control characters;
braces in them mean nothing.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from llava_cli.conversation import Picture
from llava_cli.errors import BadData, UsageError
from llava_cli.images import exif, formats
from llava_cli.images.local_file import read_path
from llava_cli.images.reader import is_url, local_path
from llava_cli.parts import WHOLE, split_reference
from llava_cli.prompts.question_template import FieldMissing, TemplateRefused, TemplateSandbox, Used
from llava_cli.untrusted_text import for_terminal, one_line, printable

FIELDS = {
    "name": ("the file's name", "beach.jpg"),
    "stem": ("the file's name without its ending", "beach"),
    "folder": ("the name of the folder that it is in", "2024"),
    "path": ("its path or URL, as SOURCE has it", "holidays/2024/beach.jpg"),
    "page": ("which page of a document or frame of an animation it is, from 1", "3"),
    "time": ("when in a film it is, in seconds", "12.5"),
    "date": ("when it was taken: the camera's date, else that of the file's last change", "2024-08-17"),
    "exif.Model": ("what the camera wrote, by the names of EXIF: `exif.FNumber`, `exif.GPSLatitude`, …", "Pixel 9"),
    "width": ("of the picture, in pixels", "4032"),
    "height": ("of the picture, in pixels", "3024"),
    "row.city": ('a column of the source\'s row; also `row["any column"]`', "Lisbon"),
}
"""Fields, each with what it is and an example."""
NAMES = tuple(dict.fromkeys(field.partition(".")[0] for field in FIELDS))
_WITH_EXIF = frozenset({"exif", "date"})
_WITHOUT_EXIF = (".pdf", *formats.FILM_SUFFIXES)
"""Files that may be large, and have no EXIF."""
_KEY = re.compile(r"[^\W\d]\w{0,63}")


class QuestionFields:
    """Fills in questions. `parameters` are values of more fields, by name; all pictures have the same ones."""

    def __init__(self, parameters: Mapping[str, str]) -> None:
        """Raises `UsageError` for a parameter with the name of a field."""
        for name in parameters:
            if name in NAMES:
                raise UsageError(f"-P {name}", "every picture has a field of that name", "call the parameter otherwise")
        self.parameters = {name: _clean(value) for name, value in parameters.items()}
        self._templates, self._exif = TemplateSandbox(), exif.ExifReader()

    def __reduce__(self) -> tuple[type[QuestionFields], tuple[dict[str, str]]]:
        """In another process it has processes of its own."""
        return type(self), (dict(self.parameters),)

    def used(self, template: str) -> Used:
        """What a template uses. Raises `UsageError` if it is none."""
        try:
            return self._templates.inspect(template)
        except TemplateRefused as error:
            raise UsageError("QUESTION", f"as a template: {error}", _syntax_hint(template, str(error))) from None

    def check(self, template: str, is_saved: bool = False) -> Used:
        """What a template uses; a saved one may have parameters, by any names.

        Raises `UsageError` if it is none, or uses what there is not.
        """
        used = self.used(template)
        known = (*NAMES, *self.parameters)
        for name in () if is_saved else sorted(used.names.difference(known)):
            close = get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean {{{close[0]}}}?" if close else f"the fields are: {', '.join(FIELDS)}"
            raise UsageError(f"{{{one_line(name, 40)}}}", "there is no such field", hint)
        for name in sorted(used.members.get("exif", frozenset()) - exif.names()):
            hint = _meant("exif", name, exif.names())
            raise UsageError(f"{{exif.{one_line(name, 40)}}}", "EXIF has no such value", hint)
        return used

    def missing(self, template: str) -> list[str]:
        """The parameters that a saved template needs and that are not there. Raises as `used`."""
        used = self.used(template)
        return sorted(used.names.difference(NAMES, self.parameters, used.optional))

    def check_complete(self, prompt: str, template: str) -> None:
        """Raises `UsageError` for a parameter that the saved `prompt` needs and that is not there."""
        for name in self.missing(template):
            shown, close = one_line(name, 40), get_close_matches(name, NAMES, 1, 0.6)
            meant = f"; or is it the field {{{close[0]}}} that is meant?" if close else ""
            raise UsageError(printable(prompt), f"{{{shown}}} is not given", f"-P {shown}=…{meant}")

    def check_parameters(self, templates: Iterable[str]) -> None:
        """Raises `UsageError` for a parameter that none of the templates uses."""
        names = {name for template in templates for name in self.used(template).names}
        for name in sorted(self.parameters.keys() - names):
            own = sorted(names.difference(NAMES))
            close = get_close_matches(name, own, 1, 0.5)
            hint = f"did you mean {close[0]}?" if close else f"it has: {', '.join(own)}" if own else "it has none"
            raise UsageError(f"-P {printable(name)}", "the prompt has no such parameter", hint)

    def fill(
        self,
        template: str,
        picture: Picture | None,
        path: str = "",
        folder: str = "",
        row: Mapping[str, Any] | None = None,
    ) -> str:
        """The question about a picture at `path`, which may be relative to `folder`; `row` is what its source says.

        Raises `BadData` for a field that has no value, and for a template that cannot be filled in.
        """
        names = self.used(template).names
        thing = printable(path) or "QUESTION"
        values: dict[str, Any] = {"exif": {}, "row": {}, **self.parameters}
        if picture:
            values |= _path_fields(path, folder) | _picture_fields(picture)
        if picture and names & _WITH_EXIF:
            values |= self._exif_fields(picture, path)
        if row:
            values["row"] = _cleaned(row)
        try:
            text = self._templates.render(template, {name: value for name, value in values.items() if name in names})
        except FieldMissing as error:
            hint = f"{{{error} or 'unknown'}} says what is asked then"
            raise BadData(thing, f"it has no {{{error}}}", hint) from None
        except TemplateRefused as error:
            raise BadData(thing, f"its question cannot be filled in: {error}") from None
        if not text.strip():
            raise BadData(thing, "nothing is left of its question")
        return text

    def close(self) -> None:
        """Ends its processes."""
        self._templates.close()
        self._exif.close()

    def _exif_fields(self, picture: Picture, path: str) -> dict[str, Any]:
        file = picture.file or _file_at(path) or picture.data or b""
        found: dict[str, Any] = {}
        if not path.lower().endswith(_WITHOUT_EXIF):
            found = _cleaned(self._exif.read(path, file if isinstance(file, bytes) else read_path(str(file))))
        date = _date(found.get("DateTimeOriginal")) or _date(found.get("DateTime")) or _last_change(file)
        return {"exif": found, **({"date": date} if date else {})}


def parse_parameters(words: Iterable[str]) -> dict[str, str]:
    """`lang=de` -> its name and value. Raises `UsageError`."""
    found = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not _KEY.fullmatch(name):
            raise UsageError("-P", f"{printable(word)!r} is not NAME=VALUE", "-P lang=de")
        found[name] = value
    return found


def columns_hint(name: str, columns: Collection[str]) -> str:
    """The columns that there are, or the one that was probably meant."""
    return _meant("row", name, columns) or f"the columns are: {', '.join(one_line(one, 40) for one in columns)}"


def fields_in(text: str) -> list[str]:
    """The fields that a question without a template has in braces, as if it were one."""
    return [f for f in re.findall(r"\{ ?([a-z]+)(?:[.\[][^{}]*)? ?\}", text) if f in NAMES]


def _meant(group: str, name: str, known: Collection[str]) -> str:
    close = get_close_matches(name, known, 1, 0.5)
    if not close:
        return ""
    is_word = _KEY.fullmatch(close[0])
    shown = one_line(close[0], 40)
    return f"did you mean {{{group}.{shown}}}?" if is_word else f'did you mean {{{group}["{shown}"]}}?'


def _syntax_hint(template: str, reason: str) -> str:
    if not reason.startswith(("expected", "unexpected", "line")):
        return ""
    if re.search(r"\{\{\s*\w", template):
        return "one brace on each side: {name}; {% raw %}…{% endraw %} around what is no field"
    return "{% raw %}…{% endraw %} around braces that are text"


def _path_fields(path: str, folder: str) -> dict[str, str]:
    """`name`, `stem`, `folder` and `path`; none for a picture on stdin."""
    if path in ("", "-"):
        return {}
    pure = PurePosixPath(unquote(urlsplit(path).path) if is_url(path) else local_path(path))
    parent = pure.parent.name
    full = os.path.join(folder, pure)
    if parent in ("", "..") and not is_url(path) and os.path.lexists(full):
        parent = os.path.basename(os.path.dirname(os.path.abspath(full)))
    found = {"name": pure.name, "stem": pure.stem, "folder": parent, "path": path}
    return {name: _clean(value) for name, value in found.items() if value}


def _picture_fields(picture: Picture) -> dict[str, Any]:
    width, height = picture.size
    found = {"page": picture.part.page, "time": picture.part.time, "width": width, "height": height}
    return {name: _cleaned(value) for name, value in found.items() if value is not None}


def _file_at(path: str) -> Path | None:
    """The file at a path that a user has typed; None for stdin and for URLs."""
    found = Path(local_path(path))
    return found if path != "-" and found.is_file() else None


def path_of(picture: Picture) -> str:
    """The path that a user has typed, without the part of the file behind it."""
    return picture.name if picture.part == WHOLE else split_reference(picture.name)[0]


def _date(value: Any) -> str | None:
    """`2024:08:17 12:00:00`, as EXIF has it -> `2024-08-17`; None for what is no date."""
    text = value if isinstance(value, str) else ""
    match = re.match(r"([12]\d{3})[:-](0[1-9]|1[0-2])[:-](0[1-9]|[12]\d|3[01])\b", text)
    return "-".join(match.groups()) if match else None


def _last_change(file: bytes | Path) -> str | None:
    """The day on which a file was last changed, here; None for bytes."""
    try:
        return time.strftime("%Y-%m-%d", time.localtime(os.stat(file).st_mtime)) if isinstance(file, Path) else None
    except OSError:
        return None


def _cleaned(value: Any) -> Any:
    """A value without control characters; of an object only what has a value."""
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {_clean(str(name)): _cleaned(one) for name, one in value.items() if one not in (None, "")}
    if isinstance(value, (list, tuple)):
        return [_cleaned(one) for one in value]
    return value if isinstance(value, (int, float)) or value is None else _clean(str(value))


def _clean(text: str) -> str:
    """A text without control sequences and with U+FFFD for what is not UTF-8."""
    return for_terminal(re.sub("[\ud800-\udfff]", "\ufffd", text))
