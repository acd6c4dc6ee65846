"""A conversation in progress: its turns, the pictures attached to the next question, and what fits the context."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Generator
from dataclasses import replace

from llava_cli.chat.store import SavedChat, Store
from llava_cli.conversation import Conversation, Picture, Turn, naming_fewer_parts
from llava_cli.engine import Answer, Chunk, Engine
from llava_cli.errors import BadImage, InputMissing, UsageError, printable
from llava_cli.images.reader import open_chosen
from llava_cli.images.region import cut
from llava_cli.parts import parse_region
from llava_cli.settings import Settings

_REGION_EXAMPLE = "/region 0,0,50%,50%"
Window = tuple[int, int]
"""How many of the oldest turns, and how many of the oldest pictures, are left out of the prompt."""


class Chat:
    """Asks an engine about a growing conversation, and saves every turn if there is a store.

    `note` is called with each line for the user that is not part of an answer, `preview` with each attached picture.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        note: Callable[[str], None],
        preview: Callable[[Picture], None],
        store: Store | None = None,
    ) -> None:
        self.engine, self.sampling, self.note, self.preview = engine, settings.sampling, note, preview
        self.picture_options = replace(settings.pictures, pages=None, region=None)
        """How files are opened in this chat; which pages and what of them is said for each file."""
        self.conversation = Conversation(system=settings.system)
        self.attached: list[Picture] = []
        self.last: Answer | None = None
        self._store, self._saved = store, SavedChat()
        self._window: Window = (0, 0)
        self._wholes: dict[str, Picture] = {}
        """The pictures that regions were cut from, by the regions' `identity`."""

    def resume(self, number: int, conversation: Conversation) -> None:
        """Continues a conversation that is chat `number` in the store."""
        self._saved = SavedChat(number, conversation.turns)
        self.conversation = conversation

    def attach(self, picture: Picture) -> None:
        """Attaches a picture to the next question."""
        self.attached.append(picture)
        self.preview(picture)
        pictures = len(self.conversation.pictures) + len(self.attached)
        if pictures == 2 and self.engine.family and (warning := self.engine.family.warning(pictures)):
            self.note(warning)

    def look_at(self, region: str) -> Picture:
        """Attaches a region of the last picture; one that was not asked about yet takes its whole picture's place.

        Regions are those of a whole picture, also where the last one is itself a region. Raises `UsageError` without a
        picture or for what is no region, `BadImage` if the picture has no such place.
        """
        try:
            region = parse_region("/region", region)
        except UsageError as error:
            raise UsageError(error.thing, error.reason, _REGION_EXAMPLE) from None
        if not (pictures := self.attached or self.conversation.pictures):
            raise UsageError("/region", "there is no picture yet", "/image PATH")
        whole = self._whole(pictures[-1])
        part = cut(whole, region)
        if isinstance(part, BadImage):
            raise BadImage(part.thing, part.reason, _REGION_EXAMPLE)
        self._wholes[part.identity] = whole
        del self.attached[-1:]
        self.attach(part)
        return part

    def _whole(self, picture: Picture) -> Picture:
        """The picture that a region was cut from; any other picture itself. Raises `InputMissing` if it is gone."""
        if picture.region is None:
            return picture
        if whole := self._wholes.get(picture.identity):
            return whole
        options = replace(self.picture_options, dpi=picture.dpi or self.picture_options.dpi)
        whole = open_chosen(picture.reference, options, allow_truncated=True).pictures[0]
        if whole.sha256 != picture.sha256:
            raise InputMissing(printable(picture.name), "is not the picture any more: it has changed", "/image PATH")
        return whole

    def ask(self, question: str) -> Generator[Chunk, None, None]:
        """Answers a question about the attached pictures and the conversation so far.

        If the generator is closed early, the part of the answer that was yielded is kept. If nothing was yielded, the
        question is dropped, and its pictures stay attached.
        """
        pictures = self.attached
        for chunk in self._answer(self.conversation.ask(question, pictures)):
            self.attached = []
            yield chunk

    def retry(self) -> Generator[Chunk, None, None]:
        """Asks the last question again; the old answer stays if there is no new one."""
        last = self._last_turn("/retry")
        before = replace(self.conversation, turns=self.conversation.turns[:-1])
        yield from self._answer(before.ask(last.question, last.pictures))

    def undo(self) -> str:
        """Removes the last turn and returns its question; its pictures are attached again."""
        last = self._last_turn("/undo")
        self.conversation = replace(self.conversation, turns=self.conversation.turns[:-1])
        self.attached = [*last.pictures, *self.attached]
        self._window = (0, 0)
        self._save()
        return last.question

    def clear(self) -> None:
        """Begins a new conversation; the old one stays in the store."""
        self.conversation = replace(self.conversation, turns=())
        self.attached, self._saved, self._window, self.last = [], SavedChat(), (0, 0), None

    def set_system(self, text: str | None) -> None:
        """Changes the system text. Raises `UsageError` if the model's chat template has no place for one."""
        changed = replace(self.conversation, system=text)
        self.engine.prompt(changed.ask("?"))
        self.conversation = changed
        self._save()

    def prompt(self) -> str:
        """The prompt string of the conversation."""
        self._last_turn("/prompt")
        return self.engine.prompt(_cut(self.conversation, self._window))

    def _last_turn(self, command: str) -> Turn:
        if not self.conversation.turns:
            raise UsageError(command, "nothing has been said yet")
        return self.conversation.turns[-1]

    def _answer(self, conversation: Conversation) -> Generator[Chunk, None, None]:
        window = self._fitting(conversation)
        texts: list[str] = []
        answer: Answer | None = None
        try:
            with naming_fewer_parts(conversation):
                for chunk in self.engine.stream(_cut(conversation, window), self.sampling):
                    texts.append(chunk.text)
                    answer = chunk.answer
                    yield chunk
        finally:
            if texts:
                self.last = answer or self.last
                self.conversation, self._window = conversation.answered("".join(texts)), window
                self._save()

    def _save(self) -> None:
        if self._store is None:
            return
        before, self._saved = self._saved, self._store.save(self._saved, self.conversation, self.engine.model)
        if before.number and self._saved.number not in (None, before.number):
            self.note(f"chat {before.number} was changed elsewhere: this one goes on as chat {self._saved.number}")

    def _fitting(self, conversation: Conversation) -> Window:
        """The window so far, or one that leaves out more if the context is nearly full.

        The oldest turns are left out first, enough of them that this happens rarely; their pictures move to the turn
        that follows. Only if the pictures alone fill the context, they are left out, too: the oldest first, and never
        those that were attached last.
        """
        turns_out, pictures_out = self._window
        context = self.engine.context
        if context is None:
            return self._window
        limit = context - min(self.sampling.max_tokens, context // 4)

        def tokens(window: Window) -> int:
            return self.engine.count(_cut(conversation, window))

        if tokens(self._window) <= limit:
            return self._window
        last = len(conversation.turns) - 1
        newest = next((turn.pictures for turn in reversed(conversation.turns) if turn.pictures), ())
        while tokens((last, pictures_out)) > limit and len(conversation.pictures) - pictures_out > len(newest):
            pictures_out += 1
        minimum = tokens((last, pictures_out))
        choices = range(turns_out, last + 1)
        goal = (minimum + limit) // 2
        turns_out = choices[bisect_left(choices[:-1], True, key=lambda n: tokens((n, pictures_out)) <= goal)]
        out = [_count(turns_out - self._window[0], "turn"), _count(pictures_out - self._window[1], "picture")]
        if left := " and ".join(filter(None, out)):
            self.note(f"the context of {context} tokens is nearly full: {left} left out of the prompt, the oldest")
        return turns_out, pictures_out


def _cut(conversation: Conversation, window: Window) -> Conversation:
    """The conversation without its oldest turns; their pictures, except for the oldest, move to the next turn."""
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
