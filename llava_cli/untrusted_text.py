"""Text from outside, made fit for where it is shown: a terminal, one line, a page, a line of JSON.

Names of files and models, answers, messages of servers and libraries: whoever wrote them may have put orders to a
terminal in them, or marks that turn the direction of the text around them. What is merely invisible is left in an
answer: emoji are joined by it (U+200D) and colored by it (U+FE0F), and Persian is spelled with it (U+200C).

Every pattern here consumes whatever it has looked at, so that no text takes more than time proportional to its length.
"""

from __future__ import annotations

import codecs
import re

from llava_cli import limits

# Marks that turn the direction of text. Arabic and Hebrew do without them, for letters have a direction.
_TURNS = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"
_CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0, DEL and C1, without tab and newline
_MOST = limits.SEQUENCE_CHARACTERS  # bounds what is held back of a stream, too

# ECMA-48's sequences, each as far as it goes. Groups 1, 3 and 5 are their content, 2, 4 and 6 what ends them.
_ORDERS = re.compile(
    rf"(?:\x1b\[|\x9b)([ -?]{{0,{_MOST}}})([@-~])?"  # CSI: colors, the cursor, reports
    # OSC, DCS, SOS, PM, APC: titles, links, the clipboard. BEL or ST ends them, CAN and SUB call them off.
    rf"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])([^\x07\x18\x1a\x1b\x9c]{{0,{_MOST}}})(?:(\x07|\x1b\\|[\x18\x1a\x9c])|\x1b\Z)?"
    rf"|\x1b+(?=\x1b)|\x1b([ -/]{{0,{_MOST}}})([0-~])?"  # ESC: character sets, a reset
    rf"|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x8f\x91-\x97\x99\x9a\x9c{_TURNS}]+"
)
_CONTROL_CHARACTERS = re.compile(f"[{_CONTROLS}{_TURNS}]+")
_HIDDEN = re.compile(f"[{_CONTROLS}{_TURNS}\u2028\u2029\ud800-\udfff\ufeff]")
_NOT_PLAIN = re.compile(f"[\x7f-\x9f{_TURNS}\u2028\u2029\ud800-\udfff]")


class TerminalText:
    """Takes out of a stream of text whatever a terminal would obey, the same however it is split into chunks.

    A sequence that does not end is no order: its content is shown, without a control character.
    """

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> str:
        """What of the text so far may be shown and was not before."""
        text, self._held = self._held + text, ""

        def shown(found: re.Match[str]) -> str:
            if _is_unfinished(found) and found.end() == len(text):
                self._held = found[0]
                return ""
            return _content(found)

        return _ORDERS.sub(shown, text)

    def end(self) -> str:
        """The rest."""
        rest, self._held = for_terminal(self._held), ""
        return rest


def for_terminal(text: str) -> str:
    """A whole text without what a terminal would obey."""
    return _ORDERS.sub(_content, text)


def _is_unfinished(found: re.Match[str]) -> bool:
    return found.lastindex in (1, 3, 5)


def _content(found: re.Match[str]) -> str:
    """What is shown in the place of a sequence: nothing, unless it has no end."""
    return _CONTROL_CHARACTERS.sub("", found[found.lastindex or 0]) if _is_unfinished(found) else ""


def decoded(data: bytes) -> str:
    """A text in the encoding that its mark (BOM) says, else in UTF-8; what is none of it is U+FFFD."""
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if is_utf16 else "utf-8-sig", "replace")


def printable(name: str) -> str:
    """A name in one line: control, undecodable and direction-turning characters are escaped."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


def one_line(text: str, most: int | None = None) -> str:
    """The first line of what somebody else says, printable and not longer than `most` (`NAME_CHARACTERS`)."""
    most = limits.NAME_CHARACTERS if most is None else most
    line = printable((text.strip()[: most + 1].splitlines() or [""])[0])
    return line if len(line) <= most else line[: most - 1] + "…"


def for_page(text: str) -> str:
    """Text as a page shows it: what would be hidden, or turn the text around it, is spelled out."""
    return _HIDDEN.sub(_escaped, text.replace("\r\n", "\n"))


def for_json_line(text: str) -> str:
    """JSON text in one line for every reader: what a terminal obeys, or others take for an end of line, is escaped."""
    return _NOT_PLAIN.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
