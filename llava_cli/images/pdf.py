"""Draws the pages of a PDF with PDFium, as a viewer shows them: with annotations and forms, on white.

Runs in the sandbox (`images/sandbox.py`), where no fonts of the system can be read: a font that is not in the file is
replaced by one that PDFium brings along, so a page looks the same on every machine.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from llava_cli import limits
from llava_cli.errors import BadImage
from llava_cli.images.decode import TOO_NARROW, Decoded, no_such_part
from llava_cli.images.unsupported import DAMAGED_PDF
from llava_cli.parts import Content

if TYPE_CHECKING:
    from pypdfium2 import PdfPage

EXTRA = "pip install 'llava-cli[pdf]'"
DECRYPT = "qpdf --decrypt --password=PASSWORD {name} {name}.pdf"
HINTS = (EXTRA, DECRYPT)
"""Hints that a `BadImage` from this module may have, beside those of `decode` and `unsupported`."""
_POINTS_PER_INCH = 72
_ERRORS = {4: ("needs a password", DECRYPT), 5: ("is encrypted in a way that PDFium does not know", DECRYPT)}
"""What PDFium's error codes mean (`FPDF_ERR_PASSWORD`, `FPDF_ERR_SECURITY`); all others mean that it is damaged."""


class PdfFile:
    """A PDF whose pages are drawn one by one."""

    def __init__(self, data: bytes) -> None:
        """Raises `BadImage`, also if pypdfium2 is not installed."""
        try:
            from pypdfium2 import PdfDocument, PdfiumError
        except ImportError:
            raise BadImage("", "PDF needs the extra llava-cli[pdf]", EXTRA) from None
        try:
            self._document = PdfDocument(data)
        except PdfiumError as error:
            raise BadImage("", *_ERRORS.get(error.err_code or 0, DAMAGED_PDF)) from None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._document.init_forms()
        if not len(self._document):
            raise BadImage("", "a PDF without pages")

    def content(self) -> Content:
        return Content("document", len(self._document))

    def picture(self, page: int | None, dpi: int, allow_truncated: bool = False) -> Decoded:
        """A page, from 1, with `dpi` dots an inch; the first one if none is named. Raises `BadImage`."""
        from pypdfium2 import PdfiumError

        count = len(self._document)
        if page is not None and page > count:
            raise no_such_part("page", page, count)
        try:
            opened = self._document[(page or 1) - 1]
        except PdfiumError:
            raise BadImage("", "a damaged page", DAMAGED_PDF.hint) from None
        try:
            image = _drawn(opened, dpi)
            return Decoded(image, count, truncated=False, format="", plain=False, size=image.size)
        finally:
            opened.close()

    def close(self) -> None:
        """Frees what PDFium holds."""
        self._document.close()


def _drawn(page: PdfPage, dpi: int) -> Any:
    """A page in RGB. Raises `BadImage` for one of no use."""
    sides = page.get_size()
    if not min(sides) > 0 or max(sides) > limits.PICTURE_ASPECT * min(sides):
        raise BadImage("", TOO_NARROW.format(*(round(side) for side in sides)))
    bitmap = page.render(scale=min(dpi / _POINTS_PER_INCH, limits.PAGE_SIDE / max(sides)), rev_byteorder=True)
    try:
        return bitmap.to_pil().convert("RGB")
    finally:
        bitmap.close()
