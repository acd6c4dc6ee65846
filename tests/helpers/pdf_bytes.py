"""Small PDFs, whole and hostile, written by hand (ISO 32000-1)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

A4 = (595, 842)
"""Width and height in points."""
_PADDING = bytes.fromhex("28bf4e5e4e758a4164004e56fffa01082e2e00b6d0683e802f0ca9fe6453697a")


def pdf(*objects: bytes, trailer: bytes = b"") -> bytes:
    """A file of these objects, numbered from 1; the first one is the catalog."""
    data, places = bytearray(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n"), []
    for number, body in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    data += b"xref\n0 %d\n0000000000 65535 f \n%strailer\n" % (len(objects) + 1, table)
    end = len(data) - data.rindex(b"xref\n0 ")
    data += b"<</Size %d/Root 1 0 R%s>>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, trailer, len(data) - end)
    return bytes(data)


def stream(content: bytes, entries: bytes = b"") -> bytes:
    return b"<<%s/Length %d>>stream\n%s\nendstream" % (entries, len(content), content)


def pages_pdf(*contents: bytes, box: Sequence[float] = A4, page: bytes = b"", catalog: bytes = b"") -> bytes:
    """A page for each content stream, with the font /F1; `page` and `catalog` are further entries of theirs."""
    kids = b" ".join(b"%d 0 R" % (4 + 2 * number) for number in range(len(contents)))
    objects = [
        b"<</Type/Catalog/Pages 2 0 R%s>>" % catalog,
        b"<</Type/Pages/Kids[%s]/Count %d>>" % (kids, len(contents)),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    size = b"/MediaBox[0 0 %f %f]" % tuple(box)
    for number, content in enumerate(contents):
        resources = b"/Resources<</Font<</F1 3 0 R>>>>"
        objects.append(b"<</Type/Page/Parent 2 0 R/Contents %d 0 R%s%s%s>>" % (5 + 2 * number, size, resources, page))
        objects.append(stream(content))
    return pdf(*objects)


def text(words: str, size: int = 12, at: tuple[int, int] = (72, 720)) -> bytes:
    """The content of a page with one line of text."""
    return b"BT /F1 %d Tf %d %d Td (%s) Tj ET" % (size, *at, words.encode("ascii"))


def text_pdf(*lines: str) -> bytes:
    """A page for each line."""
    return pages_pdf(*map(text, lines))


def form_pdf() -> bytes:
    """A page with a form's field, filled in with red, and an annotation, a blue square."""
    red, blue = b"1 0 0 rg 0 0 100 50 re f", b"0 0 1 rg 0 0 100 50 re f"
    appearance = b"/Type/XObject/Subtype/Form/BBox[0 0 100 50]"
    return pdf(
        b"<</Type/Catalog/Pages 2 0 R/AcroForm<</Fields[4 0 R]>>>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 300]/Annots[4 0 R 6 0 R]>>",
        b"<</Type/Annot/Subtype/Widget/FT/Tx/T(a)/Rect[20 20 120 70]/F 4/AP<</N 5 0 R>>>>",
        stream(red, appearance),
        b"<</Type/Annot/Subtype/Square/Rect[200 200 250 250]/F 4/AP<</N 7 0 R>>>>",
        stream(blue, appearance),
    )


def nested_forms_pdf(depth: int = 30, times: int = 10) -> bytes:
    """A page that draws a form, each of which draws the next one so often."""
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 99 99]/Contents 4 0 R/Resources<</XObject<</F 5 0 R>>>>>>",
        stream(b"/F Do"),
    ]
    for number in range(5, 5 + depth):
        entries = b"/Type/XObject/Subtype/Form/BBox[0 0 99 99]/Resources<</XObject<</F %d 0 R>>>>" % (number + 1)
        objects.append(stream(b"/F Do " * times, entries))
    return pdf(*objects, stream(b"0 0 9 9 re f", b"/Type/XObject/Subtype/Form/BBox[0 0 99 99]"))


def many_pages_pdf(count: int, fanout: int = 1000) -> bytes:
    """A tree of so many pages, a power of `fanout`, that are all the same one: a small file."""
    objects = [b"<</Type/Catalog/Pages 2 0 R>>"]
    while count > 1:
        count_of_kid = count // fanout
        kids = b"%d 0 R " % (len(objects) + 2) * fanout
        objects.append(b"<</Type/Pages/Kids[%s]/Count %d>>" % (kids, count))
        count = count_of_kid
    return pdf(*objects, b"<</Type/Page/MediaBox[0 0 99 99]>>")


def encrypted_pdf(user_password: bytes, line: str = "secret") -> bytes:
    """A page in RC4 with 40 bits (algorithms 2 to 4 of ISO 32000-1, 7.6.3)."""
    identity = b"0123456789abcdef"
    owner = _rc4(hashlib.md5((user_password + _PADDING)[:32]).digest()[:5], (user_password + _PADDING)[:32])
    rights = (-4).to_bytes(4, "little", signed=True)
    key = hashlib.md5((user_password + _PADDING)[:32] + owner + rights + identity).digest()[:5]
    content = text(line)
    key_of_object = hashlib.md5(key + (4).to_bytes(3, "little") + bytes(2)).digest()[:10]
    standard = b"/Filter/Standard/V 1/R 2/P -4/O<%s>/U<%s>" % (owner.hex().encode(), _rc4(key, _PADDING).hex().encode())
    return pdf(
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        stream(_rc4(key_of_object, content)),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
        trailer=b"/ID[<%s><%s>]/Encrypt<<%s>>" % (identity.hex().encode(), identity.hex().encode(), standard),
    )


def _rc4(key: bytes, data: bytes) -> bytes:
    state, j = list(range(256)), 0
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    found, i, j = bytearray(), 0, 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        found.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(found)
