"""What a dry run has found, in lines for a person; from the object that `--json` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from llava_cli.speed import duration, rate

_SHOWN_REASONS, _SHOWN_NAMES, _SHOWN_GROUPS = 5, 3, 3
_LABEL = 12
"""Columns of the first word of a line."""
_LITTLE = 0.1
"""Tokens by size of the pictures are told where their means differ by this part."""


def lines_of_source(facts: dict[str, Any]) -> Iterator[str]:
    """What there is to do."""
    errors = facts["rows"] - facts["answerable"]
    yield _line("pictures", f"{facts['pictures']:,} in {facts['source']}")
    yield _line("rows", f"{facts['rows']:,} to write" + (f", {errors:,} of them errors" if errors else ""))
    yield from _lines_of_output(facts["output"])
    yield from _lines_of_unreadable(facts["unreadable"])
    doubles = facts["doubles"]
    if doubles["pictures"]:
        groups = [_some(group, " = ") for group in doubles["groups"]]
        words = f"{_count(doubles['pictures'], 'picture')} ({_count(doubles['rows'], 'row')}) with bytes of another one"
        yield _line("doubles", f"{words}: {_some(groups, '; ', _SHOWN_GROUPS)}")


def _lines_of_output(output: dict[str, Any] | None) -> Iterator[str]:
    if output is None:
        return
    if not output["rows"]:
        yield _line("output", f"{output['path']}: no rows yet")
    else:
        errors = f", {output['errors']:,} of them errors" if output["errors"] else ""
        again = f"; {output['to_ask_again']:,} more are asked again" if output["to_ask_again"] else ""
        yield _line("output", f"{output['path']}: {output['rows'] - output['to_ask_again']:,} rows stay{errors}{again}")
    if output["added"]:
        action = "are taken in" if output["extend"] else "are left out; --extend takes them in"
        yield _line("", f"{output['added']:,} rows were added to the source since and {action}")
    if output["removed"]:
        yield _line("", f"{output['removed']:,} rows are about what is no longer in it")


def _lines_of_unreadable(unreadable: Sequence[dict[str, Any]]) -> Iterator[str]:
    label = "unreadable"
    for one in unreadable[:_SHOWN_REASONS]:
        yield _line(label, f"{one['pictures']:,}: {one['reason']}: {_some(one['images'], ', ')}")
        label = ""
    if more := unreadable[_SHOWN_REASONS:]:
        yield _line("", f"{sum(one['pictures'] for one in more):,} for {len(more):,} more reasons; --json has all")


def lines_of_estimate(facts: dict[str, Any]) -> Iterator[str]:
    """What it takes."""
    where = f" at {facts['where']}" if "://" in facts["where"] else f" on {facts['where']}"
    yield _line("model", facts["model"] + where)
    yield _line("prompts", _tokens(facts, "prompt_tokens"))
    cut_off = f"; {facts['cut_off']:.0%} are cut off, see --max-tokens" if facts["cut_off"] else ""
    yield _line("answers", _tokens(facts, "answer_tokens") + cut_off)
    seconds, size = facts["seconds"], facts["bytes"]
    parts = [f"{rate(facts['rows_per_second'])} rows/s"] if facts["rows_per_second"] else []
    parts += [f"{duration(seconds['load'])} to load the model"] if seconds["load"] else []
    yield _line("time", f"about {duration(seconds['total'])}: {', '.join(parts)}; begun now, it ends {_end(seconds)}")
    if facts["new_copy"]:
        yield _line("", "loading is not in it: just now it has made the quantized copy, which the run only reads")
    both = size["process"] + size["picture_processes"]
    parts = [f"{_bytes(size['process'])} in one process", f"{_bytes(size['picture_processes'])} in those for pictures"]
    gpu = f"; {_bytes(size['gpu'])} on the GPU" if size["gpu"] else ""
    yield _line("memory", f"about {_bytes(both)} at most: {' and '.join(parts)}{gpu}")
    sample = facts["sample"]
    yield _line("sample", f"{_count(sample['rows'], 'row')} answered in {duration(sample['seconds'])}")
    for error in sample["errors"][:_SHOWN_REASONS]:
        yield _line("", f"{error['rows']:,} of them failed: {error['type']}: {error['reason']}")


def _tokens(facts: dict[str, Any], name: str) -> str:
    tokens = facts[name]
    if tokens is None:
        return "not told by the server"
    span = f" ({tokens['least']:,} to {tokens['most']:,})" if tokens["least"] < tokens["most"] else ""
    words = f"about {rate(tokens['mean'])} tokens each{span}, {_rounded(tokens['total'])} in all"
    means = {one["size"]: one[name] for one in facts["sizes"] if one[name]}
    if means and max(means.values()) > (1 + _LITTLE) * min(means.values()) and name == "prompt_tokens":
        words += "; " + ", ".join(f"{size} {rate(mean)}" for size, mean in means.items())
    return words


def _end(seconds: dict[str, float]) -> str:
    now = datetime.now()
    end = now + timedelta(seconds=seconds["total"])
    return f"about {end:%H:%M}" if end - now < timedelta(hours=20) else f"about {end:%Y-%m-%d %H:%M}"


def _line(label: str, words: str) -> str:
    return f"{label:{_LABEL}}{words}"


def _some(names: Sequence[str], between: str, most: int = _SHOWN_NAMES) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return between.join(names[:most]) + more


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def _rounded(number: int) -> str:
    return f"{number / 1e6:.1f} million" if number >= 1_000_000 else f"{number:,}"


def _bytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
