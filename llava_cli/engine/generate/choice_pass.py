"""Reads trees of choices behind prompts: in one pass, or node by node where a model cannot do it otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llava_cli.engine.forward import Forward
from llava_cli.engine.generate.choices import ROOT, ChoiceSequence, TreeScores
from llava_cli.engine.kv_cache import RoomyCache

if TYPE_CHECKING:
    import torch

PASS_LOGITS = 1 << 26
"""Logits that one forward pass makes at most, 256 MB in fp32: more rows, or more nodes, are read in several."""
_TREE_ATTENTION = ("sdpa", "llava")
"""Implementations of attention that take any boolean mask of queries and keys."""


def read_trees(
    forward: Forward,
    sequences: Sequence[ChoiceSequence],
    cache: RoomyCache,
    mask: torch.Tensor | None,
    root_logits: torch.Tensor | None,
) -> None:
    """Completes sequences, of which `cache` has one row each; what it holds afterwards is what it held before.

    It holds their prompts, but for the last token unless there are `root_logits` [rows, vocabulary]. `mask` [rows,
    columns] is true where a token is; None is everywhere.
    """
    config = forward.model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    end = cache.get_seq_length() + 1 + max(sequence.tree.depth for sequence in sequences)
    takes_masks = config._attn_implementation in _TREE_ATTENTION and (window is None or end <= window)
    scores = [TreeScores(sequence.tree) for sequence in sequences]
    if root_logits is not None:
        for one, row in zip(scores, root_logits, strict=True):
            one.add([ROOT], row[None])
    if takes_masks:
        most = max(1, PASS_LOGITS // (config.vocab_size * len(sequences)))
        parts = [list(sequence.tree.parts(most)) for sequence in sequences]
        for number in range(max(map(len, parts))):
            nodes = [its_parts[number] if number < len(its_parts) else [] for its_parts in parts]
            if root_logits is None:  # what is read here leaves the cache again, so each part needs the last token
                nodes = [[ROOT, *its_nodes] for its_nodes in nodes]
            _read_nodes(forward, sequences, nodes, scores, cache, mask)
    else:
        for row, (sequence, one) in enumerate(zip(sequences, scores, strict=True)):
            columns = slice(0, cache.get_seq_length()) if mask is None else mask[row]
            _read_stepwise(forward, sequence, one, cache.copy_row(row, columns), root_logits is None)
    for sequence, one in zip(sequences, scores, strict=True):
        sequence.choose(one)


def _read_nodes(
    forward: Forward,
    sequences: Sequence[ChoiceSequence],
    nodes: Sequence[Sequence[int]],
    scores: Sequence[TreeScores],
    cache: RoomyCache,
    mask: torch.Tensor | None,
) -> None:
    """One forward pass over nodes of each sequence's tree, of which each sees its prompt and its ancestors."""
    import torch

    rows, width, columns = len(sequences), max(map(len, nodes)), cache.get_seq_length()
    ids, positions = torch.zeros(2, rows, width, dtype=torch.long)
    sees = torch.eye(width, dtype=torch.bool).repeat(rows, 1, 1)  # what stands in for missing nodes sees itself
    for row, (sequence, its_nodes) in enumerate(zip(sequences, nodes, strict=True)):
        tree, places = sequence.tree, {node: place for place, node in enumerate(its_nodes)}
        last = len(sequence.prompt) - 1
        for place, node in enumerate(its_nodes):
            ids[row, place] = sequence.prompt[last] if node == ROOT else tree.tokens[node]
            positions[row, place] = last + sequence.positions.delta + (0 if node == ROOT else tree.depths[node])
            parent = places.get(ROOT if node == ROOT else tree.parents[node], place)
            sees[row, place] |= sees[row, parent]
    prompt = torch.ones(rows, columns, dtype=torch.bool) if mask is None else mask.cpu()
    whole = torch.cat([prompt[:, None].expand(-1, width, -1), sees], dim=-1)
    logits = forward.tree(ids, cache, whole, positions)
    cache.truncate(columns)
    for one, its_nodes, its_logits in zip(scores, nodes, logits, strict=True):
        if its_nodes:
            one.add(its_nodes, its_logits[: len(its_nodes)])


def _read_stepwise(
    forward: Forward, sequence: ChoiceSequence, scores: TreeScores, cache: RoomyCache, reads_last: bool
) -> None:
    """Reads one node after another with the model's own mask into `cache`, which has one row without padding."""
    last = len(sequence.prompt) - 1

    def read(token: int, place: int) -> torch.Tensor:
        cache.truncate(place)
        logits, _ = forward.decode([token], [place + sequence.positions.delta], cache, None)
        return logits

    if reads_last:
        scores.add([ROOT], read(sequence.prompt[last], last))
    tree = sequence.tree
    for node, (token, depth) in enumerate(zip(tree.tokens, tree.depths, strict=True)):
        scores.add([node], read(token, last + depth))


def choose_alone(prompt: Any, sequence: Any) -> None:
    """Completes a `ChoiceSequence` behind a `LonePrompt`, whose own cache is copied at each fork of the tree."""
    import torch

    tree, scores = sequence.tree, TreeScores(sequence.tree)
    scores.add([ROOT], prompt())
    read = {ROOT: prompt}
    children = {node: tree.parents.count(node) for node in {*tree.parents}}
    for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
        children[parent] -= 1
        behind = read[parent].fork() if children[parent] else read.pop(parent)
        scores.add([node], behind(torch.tensor([[token]], device=behind.device)))
        if node in children:
            read[node] = behind
    sequence.choose(scores)
