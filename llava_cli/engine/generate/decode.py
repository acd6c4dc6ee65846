"""The token loop: prefill what is new of the prompt, then one forward pass a token over the KV cache."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from llava_cli.conversation import Conversation
from llava_cli.engine.generate.prefix import PrefixCache
from llava_cli.errors import LlavaError
from llava_cli.settings import Sampling

if TYPE_CHECKING:
    import torch

    from llava_cli.prompts.prompter import Prompter

COLDEST = 1e-5
"""Temperatures up to it are greedy: logits divided by less may be infinite, and only ties would be drawn by lot."""


def decode(
    prefix: PrefixCache,
    inputs: dict[str, torch.Tensor],
    sampling: Sampling,
    most: int,
    ends: Collection[int] | None = None,
) -> Iterator[int]:
    """Yields at most `most` token ids; one of `ends` (None: what the model's config has) is the last where it comes.

    `inputs` is one prompt as its processor makes it: `input_ids` [1, tokens], `pixel_values`, … on
    the model's device. Greedy decoding gives the tokens of transformers' `generate(do_sample=False)`.
    """
    import torch

    ids = inputs["input_ids"]
    ends = asked_end_tokens(prefix.model) if ends is None else ends
    choose = Chooser(prefix.model, sampling, ids, most, ends)
    reader = object()  # this answer, for the prefix to know it by
    logits = prefix.prefill(inputs, reader)
    for number in range(1, most + 1):
        token = choose(ids, logits)
        yield (last := int(token))
        if last in ends or number == most:
            return
        ids = torch.cat([ids, token.view(1, 1).to(ids.device)], dim=1)
        logits = prefix.step(last, reader)


def asked_end_tokens(model: Any) -> frozenset[int]:
    """The ids that end an answer by the generation config, else by the decoder's own config."""
    asked = model.generation_config.eos_token_id
    return frozenset(_listed(model.config.get_text_config().eos_token_id if asked is None else asked))


def end_tokens(model: Any, prompter: Prompter) -> frozenset[int]:
    """The ids that end an answer.

    Those of the generation config, as for `generate`; and, unless it says that there are none, the control tokens that
    the configs and the tokenizer call the end, and the one that the chat template puts after an answer: files of one
    checkpoint disagree about it, and no answer goes on behind any of them.
    """
    asked = model.generation_config.eos_token_id
    if asked == []:
        return frozenset()
    tokenizer, config = prompter.tokenizer, model.config
    others = [
        *_listed(getattr(config, "eos_token_id", None)),
        *_listed(config.get_text_config().eos_token_id),
        *_listed(tokenizer.eos_token_id),
        *_listed(_end_of_turn(prompter)),
    ]
    control = tokenizer.added_tokens_decoder  # a config's default may be any word
    return frozenset(_listed(asked)).union(token for token in others if token in control)


def _listed(ids: int | list[int] | None) -> list[int]:
    return [ids] if isinstance(ids, int) else ids or []


_ANSWER, _NEXT = "llava-answer", "llava-question"
_CONTROL = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")


def _end_of_turn(prompter: Prompter) -> int | None:
    """The control token that a template puts between an answer and what follows it; None where there is none."""
    talk = Conversation().ask("llava-example").answered(_ANSWER)
    for example in (talk.ask(_NEXT), talk):
        with suppress(LlavaError):  # whoever asks something is told
            _, _, behind = prompter.render(example).partition(_ANSWER)
            if found := _CONTROL.match(behind.lstrip()):
                token: int | None = prompter.tokenizer.get_added_vocab().get(found[0])
                return token
    return None


class Chooser:
    """Picks the tokens of one answer as `generate` does, through transformers' logits processors.

    The answer to `prompt` [1, tokens] may have `most` tokens, and one of `ends` ends it.
    """

    def __init__(self, model: Any, sampling: Sampling, prompt: torch.Tensor, most: int, ends: Collection[int]) -> None:
        import torch

        is_sampled = sampling.temperature > COLDEST
        self._processors = _logits_processors(model, sampling if is_sampled else None, prompt, most, ends)
        self._random: torch.Generator | None = None
        if is_sampled:
            self._random = torch.Generator(prompt.device)
            if sampling.seed is None:
                self._random.seed()
            else:
                self._random.manual_seed(sampling.seed)

    @property
    def greedy(self) -> bool:
        """Whether it takes the likeliest token, whatever came before."""
        return self._random is None and not self._processors

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """ids [1, tokens so far], logits [1, vocabulary] -> the next token id, a scalar."""
        import torch

        with torch.inference_mode():
            scores: torch.Tensor = self._processors(ids, logits.float())
            if self._random is None:
                return scores.argmax()
            return torch.multinomial(scores.softmax(-1), 1, generator=self._random)[0, 0]


def _logits_processors(
    model: Any, sampling: Sampling | None, prompt: torch.Tensor, most: int, ends: Collection[int]
) -> Any:
    """Those that the checkpoint's generation config asks for and, where tokens are sampled, the user.

    `model.generation_config` is only read. The user's temperature goes for the checkpoint's; so does a top-p that the
    user has set. What is as transformers has it for every model, nobody has asked for.
    """
    import torch

    config, length = SimpleNamespace(**vars(model.generation_config)), prompt.shape[1]
    config.do_sample = sampling is not None
    if sampling:
        config.temperature = float(sampling.temperature)
        config.top_p = config.top_p if "top_p" in sampling.unset else sampling.top_p
        config.top_k = None if config.top_k == _USUAL_TOP_K else config.top_k
    config.max_length = length + most
    if config.min_new_tokens is not None:
        config.min_length = length + config.min_new_tokens
    config._eos_token_tensor = torch.tensor(sorted(ends), device=prompt.device) if ends else None
    return model._get_logits_processor(config, length, encoder_input_ids=prompt, device=prompt.device)


_USUAL_TOP_K = 50
