"""XMP files (ISO 16684-1) with a description, for a picture that has none in it.

A file that is there already is a stranger's: it is read within bounds and without entities, and keeps every byte but
those of its description.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

from llava_cli import limits

_RDF, _DC = "http://www.w3.org/1999/02/22-rdf-syntax-ns#", "http://purl.org/dc/elements/1.1/"
_LANGUAGE = "http://www.w3.org/XML/1998/namespace lang"
_ROOT, _SUBJECT, _DESCRIPTION = f"{_RDF} RDF", f"{_RDF} Description", f"{_DC} description"
_ITEM, _ABOUT = f"{_RDF} li", f"{_RDF} about"
_UNUSUAL = "its description has an unusual form"
DEFAULT = "x-default"
"""The language of a text that is for all readers."""


class NotMergeable(ValueError):
    """A file is no XMP that a description can be put into; the message says why."""


class OtherDescription(ValueError):
    """A file has another description."""


def new_packet(text: str) -> bytes:
    """An XMP file with nothing but a description."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">\n'
        f' <rdf:RDF xmlns:rdf="{_RDF}">\n'
        f"{_subject(text, '')}"
        " </rdf:RDF>\n"
        "</x:xmpmeta>\n"
        '<?xpacket end="w"?>\n'
    ).encode()


def merged(packet: bytes, text: str, replace: bool = False) -> bytes:
    """An XMP file with a description; the same bytes if it has this one already.

    Raises `OtherDescription` if it has another, unless that may be replaced, or `NotMergeable`.
    """
    found = _read(packet)
    if found.description is not None:
        if found.text == text:
            return packet
        if found.text.strip() and not replace:
            raise OtherDescription
        start, end = found.description
        return packet[:start] + escape(text).encode() + packet[end:]
    if found.end is None:
        raise NotMergeable("no XMP")
    return packet[: found.end] + _subject(text, found.about).encode() + packet[found.end :]


def _subject(text: str, about: str) -> str:
    """A node with a description. A file may have several with the same `about`, which belong together."""
    return (
        f'  <rdf:Description xmlns:rdf="{_RDF}" xmlns:dc="{_DC}" rdf:about={quoteattr(about)}>\n'
        f'   <dc:description><rdf:Alt><rdf:li xml:lang="{DEFAULT}">{escape(text)}</rdf:li></rdf:Alt></dc:description>\n'
        "  </rdf:Description>\n"
    )


@dataclass
class _Found:
    """What a packet has, by the places of bytes in it."""

    about: str = ""
    end: int | None = None
    """Of what is in `rdf:RDF`: where another node can be put."""
    description: tuple[int, int] | None = None
    """Of the description's text in the default language, or else of its first one."""
    text: str = ""
    is_default: bool = False
    path: list[str] = field(default_factory=list)
    """The elements that are open."""


def _read(packet: bytes) -> _Found:
    """Raises `NotMergeable`."""
    if packet[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise NotMergeable("not in UTF-8")
    parser, found = expat.ParserCreate(namespace_separator=" "), _Found()
    parser.buffer_text = True
    begin, text = 0, ""

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal begin, text
        found.path.append(name)
        if len(found.path) > limits.SIDECAR_DEPTH:
            raise NotMergeable(f"nested deeper than {limits.SIDECAR_DEPTH} levels")
        if name == _SUBJECT and found.path[-2:-1] == [_ROOT]:
            found.about = attributes.get(_ABOUT, found.about)
            if _DESCRIPTION in attributes:
                raise NotMergeable(_UNUSUAL)
        if _is_description(found.path) and attributes:
            raise NotMergeable(_UNUSUAL)
        if _is_item(found.path):
            begin, text = _behind_tag(packet, parser.CurrentByteIndex), ""
            found.is_default = attributes.get(_LANGUAGE) == DEFAULT

    def end(name: str) -> None:
        place = parser.CurrentByteIndex
        is_empty = packet[place : place + 2] != b"</"
        if _is_item(found.path):
            if is_empty:
                raise NotMergeable(_UNUSUAL)
            if found.description is None or found.is_default:
                found.description, found.text = (begin, place), text
        elif _is_description(found.path) and found.description is None:
            raise NotMergeable(_UNUSUAL)
        elif name == _ROOT and not is_empty:
            found.end = place
        found.path.pop()

    def characters(data: str) -> None:
        nonlocal text
        text += data

    def doctype(*declared: object) -> None:
        raise NotMergeable("it declares a document type")

    def declaration(version: str, encoding: str | None, standalone: int) -> None:
        if (encoding or "utf-8").lower() not in ("utf-8", "us-ascii", "ascii"):
            raise NotMergeable("not in UTF-8")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = characters, doctype
    parser.XmlDeclHandler = declaration
    try:
        parser.Parse(packet, True)
    except expat.ExpatError:
        raise NotMergeable("no XML") from None
    return found


def _is_description(path: list[str]) -> bool:
    """Whether the innermost of the open elements is a description of the file itself, not of something in it."""
    return path[-3:] == [_ROOT, _SUBJECT, _DESCRIPTION]


def _is_item(path: list[str]) -> bool:
    return path[-1] == _ITEM and _is_description(path[:-2])


def _behind_tag(packet: bytes, start: int) -> int:
    """The end of the tag that begins at `start`; a `>` in the value of an attribute does not end it."""
    quote = b""
    for place in range(start, len(packet)):
        byte = packet[place : place + 1]
        if quote:
            quote = b"" if byte == quote else quote
        elif byte in (b'"', b"'"):
            quote = byte
        elif byte == b">":
            return place + 1
    return len(packet)
