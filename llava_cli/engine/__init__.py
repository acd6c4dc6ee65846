"""Engines turn conversations into answers; `base` says how, `local` does it with transformers."""

from llava_cli.engine.base import Answer, Chunk, Engine, Request

__all__ = ["Answer", "Chunk", "Engine", "Request"]
