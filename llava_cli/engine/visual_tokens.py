"""Fewer visual tokens: of each picture's features only the most diverse, chosen without any training.

The method is DivPrune's (arXiv 2503.02175): a max-min diversity problem, solved greedily.
"""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def choose_tokens(model: Any, count: int) -> None:
    """Lets a model see `count` features of each picture, as many as its prompts then have to have image tokens.

    For models that make one list of features of a picture, and equally long ones of all pictures.
    """
    import torch

    inner = model.base_model
    every = inner.get_image_features

    @wraps(every)
    def chosen(*args: Any, **options: Any) -> Any:
        out = every(*args, **options)
        found = out.pooler_output  # a tensor, or a list with one for each picture
        features = found if isinstance(found, torch.Tensor) else torch.stack(list(found))
        if count < features.shape[1]:
            pictures = torch.arange(len(features), device=features.device)[:, None]
            features = features[pictures, most_diverse(features, count)]
            out.pooler_output = features if isinstance(found, torch.Tensor) else list(features)
        return out

    inner.get_image_features = chosen


def most_diverse(features: torch.Tensor, count: int) -> torch.Tensor:
    """features [pictures, tokens, width] -> which `count` of each picture's tokens, ascending [pictures, count].

    First the token whose smallest distance to the others is largest, then, again and again, the one whose smallest
    distance to those chosen is largest. A distance is 1 less the cosine, in float32 whatever the features are in.
    """
    import torch
    from torch.nn.functional import normalize

    directions = normalize(features.float(), dim=-1)
    distances = 1 - directions @ directions.transpose(1, 2)  # [pictures, tokens, tokens]
    pictures, own = torch.arange(len(features), device=features.device), distances.diagonal(dim1=1, dim2=2)
    own.fill_(torch.inf)
    chosen = [distances.amin(2).argmax(1)]
    own.fill_(-torch.inf)  # those chosen are nearer to themselves than any other is: none is chosen twice
    nearest = distances[pictures, chosen[0]]
    while len(chosen) < count:
        chosen.append(nearest.argmax(1))
        nearest = torch.minimum(nearest, distances[pictures, chosen[-1]])
    return torch.stack(chosen, dim=1).sort(dim=1).values
