"""Answers questions about pictures with LLaVA models on this machine.

    from llava_cli import check, load

    engine = load("llava-1.5-7b", precision="4bit")
    print(engine.ask("img.jpg", "what is this?"))

    if engine.check("page.png", "the Save button is visible", at_least=0.9):
        ...

`load` returns an `Engine`; `check` alone takes the user's own model, and loads it once. `Conversation`, `Sampling`,
`open_picture` and `open_pictures` are for what `ask` does not cover: several turns, streaming, prepared pictures, pages
and frames. Importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llava_cli._version import __version__ as __version__

if TYPE_CHECKING:
    from llava_cli.checking import Check
    from llava_cli.conversation import Conversation, Picture, Turn
    from llava_cli.engine import Answer, Chunk, Engine
    from llava_cli.errors import LlavaError
    from llava_cli.images.reader import open_picture, open_pictures
    from llava_cli.loader import load
    from llava_cli.settings import Sampling

_MODULES = {
    "Answer": "engine",
    "Check": "checking",
    "Chunk": "engine",
    "Conversation": "conversation",
    "Engine": "engine",
    "LlavaError": "errors",
    "Picture": "conversation",
    "Sampling": "settings",
    "Turn": "conversation",
    "check": "loader",
    "load": "loader",
    "open_picture": "images.reader",
    "open_pictures": "images.reader",
}

__all__ = [
    "Answer",
    "Check",
    "Chunk",
    "Conversation",
    "Engine",
    "LlavaError",
    "Picture",
    "Sampling",
    "Turn",
    "check",
    "load",
    "open_picture",
    "open_pictures",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
