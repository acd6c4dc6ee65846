"""Makes text from outside safe to show: on a terminal, in one line, on a page, in a line of JSON.

Names of files and models, answers, messages of servers and libraries: whoever wrote them may have put control sequences
for a terminal in them, or marks that turn the direction of the text around them. Characters that are merely invisible
stay in an answer: emoji are joined (U+200D) and colored (U+FE0F) by them, and Persian is spelled with them (U+200C).

Each pattern consumes whatever it has looked at, so that every text takes time proportional to its length.
"""

from __future__ import annotations

import codecs
import re

from llava_cli import limits

# Marks that turn the direction of text. Arabic and Hebrew do without them, since letters have a direction.
_DIRECTION = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"
_MAX = limits.SEQUENCE_CHARACTERS  # also bounds how much of a stream is held back

# The sequences of ECMA-48. Groups 1, 3 and 5 are their content; 2, 4 and 6 are their ends.
_SEQUENCE = re.compile(
    rf"(?:\x1b\[|\x9b)([ -?]{{0,{_MAX}}})([@-~])?"  # CSI: colors, the cursor, reports
    # OSC, DCS, SOS, PM, APC: titles, links, the clipboard. BEL or ST ends them, CAN and SUB cancel them.
    rf"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])([^\x07\x18\x1a\x1b\x9c]{{0,{_MAX}}})(?:(\x07|\x1b\\|[\x18\x1a\x9c])|\x1b\Z)?"
    rf"|\x1b+(?=\x1b)|\x1b([ -/]{{0,{_MAX}}})([0-~])?"  # ESC: character sets, a reset
    rf"|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x8f\x91-\x97\x99\x9a\x9c{_DIRECTION}]+"
)
# Controls but tab and newline, direction marks, other line separators, lone surrogates and the byte-order mark.
_UNSAFE = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{_DIRECTION}\u2028\u2029\ud800-\udfff\ufeff]")


class TerminalText:
    """Removes from a stream of text whatever a terminal would obey, however the stream is split into chunks.

    A sequence without an end is not obeyed: its content is shown, without control characters.
    """

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> str:
        """The next part of the text that is safe to show."""
        text, self._held = self._held + text, ""

        def replacement(match: re.Match[str]) -> str:
            if _is_unfinished(match) and match.end() == len(text):
                self._held = match[0]
                return ""
            return _content(match)

        return _SEQUENCE.sub(replacement, text)

    def end(self) -> str:
        """The rest."""
        rest, self._held = for_terminal(self._held), ""
        return rest


def for_terminal(text: str) -> str:
    """A whole text without what a terminal would obey."""
    return _SEQUENCE.sub(_content, text)


def _is_unfinished(match: re.Match[str]) -> bool:
    return match.lastindex in (1, 3, 5)


def _content(match: re.Match[str]) -> str:
    """What replaces a sequence: nothing, or its content if it has no end."""
    return _UNSAFE.sub("", match[match.lastindex or 0]) if _is_unfinished(match) else ""


def decoded(data: bytes) -> str:
    """Text in the encoding of its byte-order mark, or UTF-8; bytes that do not fit become U+FFFD."""
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if is_utf16 else "utf-8-sig", "replace")


def printable(name: str) -> str:
    """A name in one line: control, undecodable and direction-turning characters are escaped."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


def one_line(text: str, most: int | None = None) -> str:
    """The first line of a text, printable, cut off after `most` characters (`limits.NAME_CHARACTERS` unless given)."""
    most = limits.NAME_CHARACTERS if most is None else most
    line = printable((text.strip()[: most + 1].splitlines() or [""])[0])
    return line if len(line) <= most else line[: most - 1] + "…"


def for_page(text: str) -> str:
    """Text for a page, with `\\uXXXX` in the place of what is hidden or turns the text around it."""
    return _UNSAFE.sub(_escaped, text.replace("\r\n", "\n"))


def for_json_line(text: str) -> str:
    """JSON text that every reader and terminal takes for one line: what is unsafe is escaped."""
    return _UNSAFE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"
