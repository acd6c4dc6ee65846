"""Answers from a list: how probable a model finds each choice as its whole answer.

The tokens of all choices, in all their spellings, are a tree whose root is the prompt. It is read in one forward pass
over one row of the KV cache, in which each token sees the prompt and its own ancestors (tree attention, arXiv
2305.09781), so nothing is copied and common beginnings are read once.
"""

from __future__ import annotations

import collections.abc
import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from llava_cli.choices import spellings
from llava_cli.engine.base import Answer, Confidence
from llava_cli.engine.generate.confidence import confidence_in, finite
from llava_cli.engine.generate.detokenizer import Detokenizer
from llava_cli.engine.generate.sampler import ForcedTokens
from llava_cli.engine.generate.sequence import Follower, Sequence, Token
from llava_cli.engine.sight import total_variation
from llava_cli.errors import UsageError, printable
from llava_cli.settings import Sampling

if TYPE_CHECKING:
    import torch

ROOT = -1
"""Stands for the end of the prompt, from which all choices go on."""


_HINT = "leave it out, or take another word"


class ChoiceTree:
    """The tokens of choices in all their spellings; a node stands behind its parent, and before its children.

    `tokenize` gives the tokens of texts as answers. Raises `UsageError` for a choice that has none, or another one's.
    """

    def __init__(
        self,
        choices: collections.abc.Sequence[str],
        tokenize: Callable[[list[str]], list[list[int]]],
        end_tokens: Collection[int],
    ) -> None:
        self.choices, self.end_tokens = tuple(choices), sorted(end_tokens)
        self.tokens: list[int] = []
        self.parents: list[int] = []
        """Of each node: its parent's number, or `ROOT`."""
        self.depths: list[int] = []
        """Of each node: how many tokens of an answer it ends."""
        self.ends: list[tuple[int, ...]] = []
        """Of each choice: the nodes that end its spellings."""
        paths = [[tuple(ids) for ids in tokenize(list(spellings(choice))) if ids] for choice in choices]
        owners: dict[tuple[int, ...], str] = {}
        for choice, its_paths in zip(choices, paths, strict=True):
            if not its_paths:
                raise UsageError("--choices", f"this model has no tokens for {printable(repr(choice))}", _HINT)
            if taken := next((owners[path] for path in its_paths if path in owners), None):
                both = f"{printable(repr(taken))} and {printable(repr(choice))}"
                raise UsageError("--choices", f"this model has the same tokens for {both}", _HINT)
            owners.update(dict.fromkeys(its_paths, choice))
        nodes: dict[tuple[int, ...], int] = {}
        # Sorted, a path stands before those that go on from it, and all of those before the next one.
        for path in sorted(path for its_paths in paths for path in its_paths):
            for depth in range(1, len(path) + 1):
                if path[:depth] not in nodes:
                    self.parents.append(nodes.get(path[: depth - 1], ROOT))
                    self.tokens.append(path[depth - 1])
                    self.depths.append(depth)
                    nodes[path[:depth]] = len(nodes)
        self.ends = [tuple(dict.fromkeys(nodes[path] for path in its_paths)) for its_paths in paths]
        self.depth = max(self.depths)

    def __len__(self) -> int:
        return len(self.tokens)

    def ancestors(self, node: int) -> list[int]:
        """A node and those before it, beginning with the first token of the answer."""
        path = []
        while node != ROOT:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def parts(self, most: int) -> Iterator[list[int]]:
        """All nodes in parts of about `most`; before a part's first node, its ancestors are read again."""
        for begin in range(0, len(self), most):
            yield [*self.ancestors(begin)[:-1], *range(begin, min(begin + most, len(self)))]

    def children(self, nodes: collections.abc.Sequence[int]) -> tuple[list[int], list[int]]:
        """The places in `nodes` of parents, and the numbers of their children."""
        places = {node: place for place, node in enumerate(nodes)}
        found = [(places[parent], child) for child, parent in enumerate(self.parents) if parent in places]
        return [place for place, _ in found], [child for _, child in found]


class TreeScores:
    """The log-probabilities of a tree's tokens and of the end of the turn behind them, filled in as it is read."""

    def __init__(self, tree: ChoiceTree) -> None:
        self.tree = tree
        self.tokens = [0.0] * len(tree)
        """Of each node's token, behind its parent."""
        self.ends = [0.0] * len(tree)
        """Of the end of the turn, behind each node."""

    def add(self, nodes: collections.abc.Sequence[int], logits: torch.Tensor) -> None:
        """Takes what was read of nodes (`ROOT` among them): logits [nodes, vocabulary] behind each."""
        import torch

        tree, logits = self.tree, logits.float()
        normalizer = logits.logsumexp(-1)
        places, children = tree.children(nodes)
        following = logits[places, [tree.tokens[child] for child in children]] - normalizer[places]
        ends = logits[:, tree.end_tokens].logsumexp(-1) - normalizer
        values = finite(torch.cat([following, ends]))
        for child, value in zip(children, values, strict=False):
            self.tokens[child] = value
        for node, value in zip(nodes, values[len(children) :], strict=True):
            if node != ROOT:
                self.ends[node] = value

    def path(self, node: int) -> list[float]:
        """The log-probabilities of a spelling's tokens and of the end behind them, by its last node."""
        return [*(self.tokens[one] for one in self.tree.ancestors(node)), self.ends[node]]

    def of_choices(self) -> list[float]:
        """The log-probability of each choice: that the model says exactly one of its spellings, and ends its turn."""
        return [_log_sum([sum(self.path(node)) for node in nodes]) for nodes in self.tree.ends]


def _log_sum(values: collections.abc.Sequence[float]) -> float:
    """log(sum(exp(values))), without underflow."""
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values))


class ChoiceSequence(Sequence):
    """A prompt whose answer is one of the choices of a tree. It is complete once the tree has been read."""

    chooses = True

    def __init__(
        self,
        number: int,
        inputs: dict[str, torch.Tensor],
        tree: ChoiceTree,
        sampling: Sampling,
        tokenizer: Any,
        begin: float,
    ) -> None:
        # The KV cache has to have space for all nodes and the prompt's last token.
        super().__init__(number, inputs, ForcedTokens(()), Detokenizer(tokenizer), (), len(tree) + 1, begin)
        self.tree, self._sampling = tree, sampling
        self.scores: TreeScores | None = None

    @property
    def is_complete(self) -> bool:
        return self.scores is not None

    def restart(self) -> None:
        super().restart()
        self.scores = None

    def choose(self, scores: TreeScores) -> None:
        """Completes the answer with what the model found of the tree."""
        self.scores = scores
        self._first_token = time.perf_counter()

    def finish(self) -> Answer:
        """The likeliest choice, with the probabilities of all."""
        assert self.scores is not None
        path_of, log_probabilities = self.scores.path, self.scores.of_choices()
        everything = _log_sum(log_probabilities)
        order = sorted(range(len(log_probabilities)), key=lambda i: -log_probabilities[i])
        probabilities = {self.tree.choices[i]: math.exp(log_probabilities[i] - everything) for i in order}
        spelling = max(self.tree.ends[order[0]], key=lambda node: sum(path_of(node)))
        likeliest = self.tree.choices[order[0]]
        is_sure = self._sampling.at_least is None or probabilities[likeliest] >= self._sampling.at_least
        text = likeliest if is_sure else self._sampling.otherwise or ""
        if self.on_token:
            self.on_token(Token(text))
        return Answer(
            text=text,
            finish_reason="stop",
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached_tokens,
            answer_tokens=len(path_of(spelling)),
            first_token_seconds=self._first_token - self._begin,
            total_seconds=time.perf_counter() - self._begin,
            probabilities=probabilities,
            answer_probability=math.exp(everything),
            confidence=self._confidence_in(spelling),
        )

    def _confidence_in(self, spelling: int) -> Confidence | None:
        if self.text_of is None or self.scores is None:
            return None
        ids = [*(self.tree.tokens[node] for node in self.tree.ancestors(spelling)), self.tree.end_tokens[0]]
        return confidence_in(self.scores.path(spelling), partial(self.text_of, ids))


class ChoiceReplay(ChoiceSequence, Follower):
    """Chooses once more."""

    def finish(self) -> Answer:
        gray = super().finish()
        assert self.first.probabilities is not None and gray.probabilities is not None
        return replace(self.first, sight=total_variation(self.first.probabilities, gray.probabilities))
