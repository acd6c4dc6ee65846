"""A conversation in progress: what was said, what is attached to the next question, what fits the model."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Generator
from dataclasses import replace

from llava_cli.chat.store import Kept, Store
from llava_cli.conversation import Conversation, Picture, Turn
from llava_cli.engine import Answer, Chunk, Engine
from llava_cli.errors import UsageError
from llava_cli.settings import Settings

Window = tuple[int, int]
"""How many of the oldest turns, and of their pictures, the prompt leaves out."""


class Chat:
    """Asks an engine about a growing conversation and keeps every turn in the store, where there is one.

    `note` is called with each line that the person should read besides the answers, `preview` with each
    picture that is attached.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        note: Callable[[str], None],
        preview: Callable[[Picture], None],
        store: Store | None = None,
    ) -> None:
        self.engine, self.settings, self.note, self.preview = engine, settings, note, preview
        self.conversation = Conversation(system=settings.system)
        self.attached: list[Picture] = []
        self.last: Answer | None = None
        self._store, self._kept = store, Kept()
        self._window: Window = (0, 0)

    def resume(self, number: int, conversation: Conversation) -> None:
        """Goes on with a conversation that the store knows as `number`."""
        self._kept = Kept(number, conversation.turns)
        self.conversation = conversation

    def attach(self, picture: Picture) -> None:
        """Goes with the next question."""
        self.attached.append(picture)
        self.preview(picture)
        pictures = len(self.conversation.pictures) + len(self.attached)
        if pictures == 2 and self.engine.family and (words := self.engine.family.doubt(pictures)):
            self.note(words)

    def ask(self, question: str) -> Generator[Chunk, None, None]:
        """Answers about the conversation so far and the attached pictures.

        Closed early it keeps what was said; a turn in which nothing was is forgotten, and its pictures stay
        attached.
        """
        pictures = self.attached
        for chunk in self._answer(self.conversation.ask(question, pictures)):
            self.attached = []
            yield chunk

    def retry(self) -> Generator[Chunk, None, None]:
        """Asks the last question again; where nothing comes of it, the old answer stays."""
        last = self._last_turn("/retry")
        before = replace(self.conversation, turns=self.conversation.turns[:-1])
        yield from self._answer(before.ask(last.question, last.pictures))

    def undo(self) -> str:
        """Takes back the last turn and returns its question; its pictures are attached again."""
        last = self._last_turn("/undo")
        self.conversation = replace(self.conversation, turns=self.conversation.turns[:-1])
        self.attached = [*last.pictures, *self.attached]
        self._window = (0, 0)
        self._save()
        return last.question

    def clear(self) -> None:
        """Begins a new conversation; the old one stays in the store as it is."""
        self.conversation = replace(self.conversation, turns=())
        self.attached, self._kept, self._window, self.last = [], Kept(), (0, 0), None

    def set_system(self, text: str | None) -> None:
        """Changes the system text. Raises `UsageError` where the model's format has no place for one."""
        changed = replace(self.conversation, system=text)
        self.engine.prompt(changed.ask("?"))
        self.conversation = changed
        self._save()

    def prompt(self) -> str:
        """The conversation's string, as the model reads it."""
        self._last_turn("/prompt")
        return self.engine.prompt(_cut(self.conversation, self._window))

    def _last_turn(self, command: str) -> Turn:
        if not self.conversation.turns:
            raise UsageError(command, "nothing has been said yet")
        return self.conversation.turns[-1]

    def _answer(self, asked: Conversation) -> Generator[Chunk, None, None]:
        window = self._fitting(asked)
        said: list[str] = []
        answer: Answer | None = None
        try:
            for chunk in self.engine.stream(_cut(asked, window), self.settings):
                said.append(chunk.text)
                answer = chunk.answer
                yield chunk
        finally:
            if said:
                self.last = answer or self.last
                self.conversation, self._window = asked.answered("".join(said)), window
                self._save()

    def _save(self) -> None:
        if self._store is None:
            return
        before, self._kept = self._kept, self._store.keep(self._kept, self.conversation, self.engine.model)
        if before.number and self._kept.number not in (None, before.number):
            self.note(f"chat {before.number} was changed elsewhere: this one goes on as chat {self._kept.number}")

    def _fitting(self, asked: Conversation) -> Window:
        """The window that was, or a smaller one where the context is nearly full.

        The oldest turns go first, enough of them that this happens rarely; their pictures move on to the next
        turn. Only where pictures alone fill the context they go too, the oldest first, and never those
        that were attached last.
        """
        turns_out, pictures_out = self._window
        context = self.engine.context
        if context is None:
            return self._window
        most = context - min(self.settings.max_tokens, context // 4)

        def tokens(window: Window) -> int:
            return self.engine.count(_cut(asked, window))

        if tokens(self._window) <= most:
            return self._window
        last = len(asked.turns) - 1
        newest = next((turn.pictures for turn in reversed(asked.turns) if turn.pictures), ())
        while tokens((last, pictures_out)) > most and len(asked.pictures) - pictures_out > len(newest):
            pictures_out += 1
        least = tokens((last, pictures_out))
        choices = range(turns_out, last + 1)
        goal = (least + most) // 2
        turns_out = choices[bisect_left(choices[:-1], True, key=lambda n: tokens((n, pictures_out)) <= goal)]
        out = [_count(turns_out - self._window[0], "turn"), _count(pictures_out - self._window[1], "picture")]
        if left := " and ".join(filter(None, out)):
            self.note(f"the context of {context} tokens is nearly full: {left} left out of the prompt, the oldest")
        return turns_out, pictures_out


def _cut(conversation: Conversation, window: Window) -> Conversation:
    """The conversation without its oldest turns; their pictures, but for the oldest, are the next turn's."""
    first, pictures_out = window
    turns = list(conversation.turns)
    if first:
        carried = tuple(picture for turn in turns[: first + 1] for picture in turn.pictures)
        turns = [replace(turns[first], pictures=carried), *turns[first + 1 :]]
    for i, turn in enumerate(turns):
        drop = min(pictures_out, len(turn.pictures))
        turns[i], pictures_out = replace(turn, pictures=turn.pictures[drop:]), pictures_out - drop
    return replace(conversation, turns=tuple(turns))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number > 1)}" if number else ""
