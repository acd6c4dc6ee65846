"""What every engine does. Streaming is the primitive; a whole answer joins what it yields."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from llava_cli.conversation import Conversation, Picture
from llava_cli.errors import DeviceLost, LlavaError, ServerFailed
from llava_cli.images.reader import Source, open_pictures
from llava_cli.models.families import Family
from llava_cli.settings import Sampling

if TYPE_CHECKING:
    from llava_cli.checking import Check
    from llava_cli.images.resize import Resize

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Confidence:
    """How probable a model found the tokens of its own answer, the end among them, before any option changed that."""

    mean: float
    """The geometric mean of their probabilities."""
    lowest: float
    lowest_token: str
    """The text of the least probable one."""


BLIND = 0.01
"""The sight below which an answer does not depend on the picture.

That is an answer hardly 1 % more probable than with a gray one, or choices of which 1 % of the probability moves. Where
the built-in model needs no picture, sight is below 0.001, in 4 bits too (`benchmarks/sight.py`).
"""


@dataclass(frozen=True)
class Answer:
    """A whole answer and what it took."""

    text: str
    finish_reason: FinishReason
    """"stop": the model or a stop text ended it; "length": `max_tokens` or the context did."""
    prompt_tokens: int
    """0 if a server does not report it."""
    cached_tokens: int
    """How many of them the engine had read for an earlier answer, and did not read again."""
    answer_tokens: int
    first_token_seconds: float
    """From the conversation to the first token: pictures, prompt and prefill."""
    total_seconds: float
    probabilities: dict[str, float] | None = None
    """Of each choice, the likeliest first; they add up to 1."""
    answer_probability: float | None = None
    """Of all choices together, as answers among all that the model could give."""
    data: Any = None
    """The object that a complete answer with a schema is."""
    confidence: Confidence | None = None
    sight: float | None = None
    """How far the answer depends on the picture: how much its log-probability falls, in nats, with a gray one in its
    place; with choices, how far their distribution changes (total variation distance, 0 to 1)."""

    @property
    def is_blind(self) -> bool:
        """Whether its sight is known, and says that the model did not look."""
        return self.sight is not None and self.sight < BLIND

    def details(self) -> dict[str, Any]:
        """What was asked for besides the text, as JSON has it; nothing that was not asked for."""
        details = {
            "probabilities": self.probabilities and {k: round(p, 6) for k, p in self.probabilities.items()},
            "answer_probability": self.answer_probability and round(self.answer_probability, 6),
            "data": self.data,
            "confidence": self.confidence and _rounded(asdict(self.confidence)),
            "sight": None if self.sight is None else round(self.sight, 4) + 0.0,  # no -0.0
        }
        return {name: value for name, value in details.items() if value is not None}


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}


@dataclass(frozen=True)
class Chunk:
    """Text that is certain, in order; the last chunk has the whole `Answer`."""

    text: str
    answer: Answer | None = None


@dataclass(frozen=True)
class Request:
    """A conversation whose last question is to be answered, among others."""

    conversation: Conversation
    sampling: Sampling


def always() -> bool:
    """The default of `go_on`: never stops."""
    return True


class Engine(ABC):
    """A loaded model. It never prints."""

    model: str
    precision: str
    device: str
    """Both empty where only a server knows."""
    load_seconds: float = 0.0
    has_new_copy: bool = False
    """Whether loading it has made a quantized copy: the next time takes less time and memory."""
    where: str = ""
    """What answers, where that is not this process."""
    decoding: str = ""
    """How tokens are made, where there is a choice: on a GPU."""
    family: Family | None = None
    """What the model was trained with, where that is known."""
    context: int | None = None
    """How many tokens prompt and answer may have in all; None where that is not known."""
    picture_resize: Resize | None = None
    """What becomes of every picture's size before the model sees it, which whoever opens pictures for this engine alone
    may do; None where that depends on the picture, or is not known."""

    @abstractmethod
    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Chunk]:
        """Answers the conversation's last question.

        A conversation that goes on from the one answered before costs only what is new in it. One answer at
        a time: the next one ends an unfinished one.
        Raises `PromptTooLong` where it does not fit the model's context, `OutOfMemory` where it does
        not fit this machine.
        """

    @abstractmethod
    def prompt(self, conversation: Conversation) -> str:
        """The string that the model reads, as its family's format has it."""

    @abstractmethod
    def count(self, conversation: Conversation) -> int:
        """How many tokens the conversation's prompt has."""

    @abstractmethod
    def peak_memory(self) -> int:
        """The most bytes that this process (on a GPU: the device) has held."""

    def check_options(self, sampling: Sampling) -> None:  # noqa: B027  (most have all options)
        """Raises `UsageError` for an option that this engine has nothing like."""

    def most_at_a_time(self, size: int | None = None) -> int:
        """How many requests of `answer_many` are answered at a time, at most, where it gets this `size`."""
        return 1

    def answer(self, conversation: Conversation, sampling: Sampling | None = None) -> Answer:
        """The whole answer to the conversation's last question."""
        *_, last = self.stream(conversation, sampling or Sampling())
        assert last.answer is not None
        return last.answer

    def answer_many(
        self,
        requests: Iterable[Request | LlavaError],
        size: int | None = None,
        go_on: Callable[[], bool] = always,
    ) -> Iterator[tuple[int, Answer | LlavaError]]:
        """Answers many conversations, up to `size` at a time (None: as many as suit the memory).

        Yields a request's number, counted from 0, and its answer or what prevents one, in the order in which they
        get done; an error that stands in a request's place is passed on. Requests are drawn as they are needed;
        once `go_on()` is false, no more of them are begun.
        """
        for number, request in enumerate(requests):
            if not go_on():
                return
            yield number, request if isinstance(request, LlavaError) else self._outcome(request)

    def _outcome(self, request: Request) -> Answer | LlavaError:
        try:
            return self.answer(request.conversation, request.sampling)
        except DeviceLost:
            raise
        except LlavaError as error:
            return error

    def ask(self, images: Source | Sequence[Source], question: str, system: str | None = None, **sampling: Any) -> str:
        """The answer to one question about one or more pictures: paths, URLs, a file's bytes, Pillow's images.

        Of a file with several pictures, `doc.pdf#2` names one, and `open_pictures` chooses others than the first ones.
        Keywords are the fields of `Sampling`: `engine.ask("img.jpg", "what is this?", max_tokens=20)`.
        """
        unset = frozenset(Sampling.names()) - sampling.keys()
        conversation = Conversation(system=system).ask(question, _pictures_from(images))
        return self.answer(conversation, Sampling(**sampling, unset=unset)).text

    def check(
        self, images: Source | Sequence[Source], statement: str, at_least: float = 0.5, system: str | None = None
    ) -> Check:
        """Whether a statement about one or more pictures, as in `ask`, is true: `at_least` as probable as that.

        Raises `UsageError` unless 0.5 <= `at_least` <= 1, and `ServerFailed` where a server does not tell.
        """
        from llava_cli.checking import SAMPLING, YES, Check, check_threshold, question_about

        check_threshold(at_least)
        conversation = Conversation(system=system).ask(question_about(statement, self.model), _pictures_from(images))
        answer = self.answer(conversation, SAMPLING)
        if answer.probabilities is None:
            reason = "does not tell how probable yes and no are"
            raise ServerFailed(self.where or self.model, reason, "ask a model that is loaded here")
        return Check(statement, answer.probabilities[YES], at_least, answer.answer_probability)


def _pictures_from(images: Source | Sequence[Source]) -> list[Picture]:
    several = isinstance(images, Sequence) and not isinstance(images, (str, bytes))
    sources: Sequence[Source] = images if several else [images]  # type: ignore[assignment,list-item]
    return [picture for source in sources for picture in open_pictures(source)]
