"""One regular expression for many words: the same matches as the words one by one, at any number of them."""

from __future__ import annotations

import random
import re

from llava_cli.prompts.trie_regex import any_of


def test_it_finds_what_the_longest_alternative_finds() -> None:
    rng = random.Random(1)
    for _ in range(3000):
        words = {"".join(rng.choices("ab<|.", k=rng.randrange(1, 6))) for _ in range(rng.randrange(9))}
        text = "".join(rng.choices("ab<|.", k=20))
        plain = "|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)"
        found = [[m.span() for m in re.finditer(pattern, text)] for pattern in (any_of(words), plain)]
        assert found[0] == found[1], (words, text)


def test_a_text_that_almost_matches_each_of_many_words() -> None:
    """With one alternative after the other this takes a minute."""
    words = [f"<|reserved_{number:05}|>" for number in range(20_000)]
    assert not re.search(any_of(words), "<|reserved_0" * 100_000)
