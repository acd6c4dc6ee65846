"""Asks from Python instead of the shell: `python examples/library.py [IMAGE]`. Runs offline."""

from __future__ import annotations

import sys
from pathlib import Path

from llava_cli import Conversation, Sampling, load, open_picture

image = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "shapes.png")
engine = load("builtin")

# One question.
print(engine.ask(image, "what is this?"))

# A conversation, streamed.
conversation = Conversation().ask("how many shapes are there?", [open_picture(image)])
conversation = conversation.answered(engine.answer(conversation).text)
for chunk in engine.stream(conversation.ask("where is the star?"), Sampling(max_tokens=20)):
    print(chunk.text, end="", flush=True)
print()
