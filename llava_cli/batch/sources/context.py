"""What a source says of a picture besides its question: within bounds, as JSON, for the fields of a question."""

from __future__ import annotations

import json
from typing import Any

from llava_cli import limits
from llava_cli.bounded_json import Bounds, loads

_BOUNDS = Bounds(limits.CONTEXT_BYTES, limits.ROW_DEPTH - 2, limits.ROW_ITEMS)
"""Two levels less than a line of rows may have, in which it stands."""


def bounded_context(values: dict[str, Any]) -> dict[str, Any] | None:
    """Those of the values that JSON has, in their order, as long as they are within the bounds; None if there are none.

    NaN and infinities, which JSON lacks, are left out.
    """
    context, left = {}, limits.CONTEXT_BYTES
    for name, value in values.items():
        if value is None:
            continue
        try:
            data = json.dumps({name: value}, allow_nan=False).encode()
            if len(data) > left:
                continue
            if isinstance(value, (dict, list)):
                loads(data, _BOUNDS)
        except (TypeError, ValueError, RecursionError):
            continue
        left -= len(data)
        context[name] = value
    return context or None
