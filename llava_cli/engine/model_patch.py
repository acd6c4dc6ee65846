"""What was replaced in a model to make it faster, and how to undo it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Action = Callable[[], object]


class ModelPatch:
    """Changes to a model, in the order in which they were made, each of which can be undone and redone."""

    def __init__(self) -> None:
        self._changes: list[tuple[Action, Action]] = []
        self.replaced_modules: list[Any] = []
        """Those with another `forward`."""

    def apply(self, do: Action, undo: Action) -> None:
        """Makes a change and keeps how to take it back."""
        do()
        self._changes.append((do, undo))

    def set_attribute(self, module: Any, name: str, value: Any) -> None:
        """Gives a module an attribute of its own, which hides its class's."""
        attributes = vars(module)
        had, before = name in attributes, attributes.get(name)
        self.apply(
            lambda: attributes.update({name: value}),
            lambda: attributes.update({name: before}) if had else attributes.pop(name),
        )

    def replace_forward(self, module: Any, forward: Callable[..., Any]) -> None:
        self.set_attribute(module, "forward", forward)
        self.replaced_modules.append(module)

    def undo(self) -> None:
        for _, undo in reversed(self._changes):
            undo()

    def redo(self) -> None:
        for do, _ in self._changes:
            do()

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Within, the model computes as transformers wrote it: what its answers are compared with."""
        self.undo()
        try:
            yield
        finally:
            self.redo()
