"""A checkpoint's generation config: how its author wants tokens to be chosen.

What changes which tokens come is done as transformers' `generate` does it, by its own logits processors
(`engine.decode`), or refused by name before a weight is read. Two things are the user's: whether tokens are sampled and
at which temperature (`--temperature`, which is 0 unless it is set, whatever `do_sample` says), and how long an answer
may be (`--max-tokens`). The user's `--top-p` goes before the checkpoint's. All other settings are about speed, about
beams, or about what `generate` returns beside tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llava_cli.errors import ModelUnusable, model_errors
from llava_cli.models.checkpoint_files import CONFIG, Configs, pull_command
from llava_cli.models.registry import Checkpoint
from llava_cli.settings import Sampling

FILE = "generation_config.json"


def _is_set(value: Any) -> bool:
    return value not in (None, False)


REFUSED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "num_beams": ("beam search", lambda value: value not in (None, 1)),
    "penalty_alpha": ("contrastive search", lambda value: value not in (None, 0)),
    "dola_layers": ("decoding by contrasting layers", _is_set),
    "guidance_scale": ("classifier-free guidance", lambda value: value not in (None, 1)),
    "constraints": ("words that must occur", _is_set),
    "force_words_ids": ("words that must occur", _is_set),
    "watermarking_config": ("a watermark", _is_set),
    "token_healing": ("token healing", _is_set),
    "is_assistant": ("drafts for another model", _is_set),
}
"""What changes tokens and is not done: its name, and whether a value asks for it."""

HONORED = (
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "min_length",
    "min_new_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "remove_invalid_values",
    "renormalize_logits",
    "stop_strings",
)
WHEN_SAMPLING = ("top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
USERS = ("do_sample", "temperature", "max_length", "max_new_tokens", "max_time")


def load_generation_config(checkpoint: Checkpoint, configs: Configs) -> Any:
    """transformers' config of how a checkpoint's tokens are chosen.

    Where it has no file for that, config.json may say it, or in it the language model's part, as transformers once
    wrote them. Raises `ModelUnusable` for what is not done, or cannot be read.
    """
    from transformers import GenerationConfig

    file, settings = _settings(configs)
    with model_errors(checkpoint.name, f"{file} is not a generation config", _hint(checkpoint, file)):
        for name, (words, asks) in REFUSED.items():
            if asks(settings.get(name)):
                raise ModelUnusable(
                    checkpoint.name,
                    f"{file} asks for {words} ({name}), which is not done",
                    f"delete {name} from {file} to have the likeliest token each time",
                )
        settings["eos_token_id"] = _ids(settings.get("eos_token_id"))
        settings["stop_strings"] = _texts(settings.get("stop_strings"))
        return GenerationConfig(**{name: settings.get(name) for name in (*HONORED, *WHEN_SAMPLING, *USERS, *_TOKENS)})


_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _settings(configs: Configs) -> tuple[str, dict[str, Any]]:
    """The file that says how tokens are chosen, and what it says."""
    if FILE in configs:
        return FILE, dict(configs[FILE])
    config = configs[CONFIG]
    text = config.get("text_config")
    outer = {key: value for key, value in config.items() if value is not None}
    return CONFIG, {**(text if isinstance(text, dict) else {}), **outer}


def _ids(value: Any) -> list[int] | None:
    """Token ids, of which there may be one alone."""
    ids = [value] if isinstance(value, int) else value
    if ids is not None and not (isinstance(ids, list) and all(isinstance(one, int) for one in ids)):
        raise ValueError("eos_token_id is no token id or list of them")
    return ids


def _texts(value: Any) -> list[str] | None:
    texts = [value] if isinstance(value, str) else value
    if texts is not None and not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        raise ValueError("stop_strings is no text or list of them")
    return texts


def _hint(checkpoint: Checkpoint, file: str) -> str:
    return pull_command(checkpoint.name) or f"repair {file}" + " or delete it" * (file == FILE)


def check_generation_config(checkpoint: Checkpoint, configs: Configs, config: Any, empty: Any) -> None:
    """Raises `ModelUnusable` where a generation config cannot be done as it is, by choosing a token once.

    `empty` is the model without numbers, which gets it.
    """
    import torch

    from llava_cli.engine.generate.end_tokens import configured_end_tokens
    from llava_cli.engine.generate.sampler import Sampler

    empty.generation_config = config
    ids, (file, _) = torch.ones(1, 8, dtype=torch.long), _settings(configs)
    with model_errors(checkpoint.name, f"{file} is not a generation config", _hint(checkpoint, file)):
        logits = torch.zeros(1, empty.config.get_text_config().vocab_size)
        for sampling in (Sampling(), Sampling(temperature=1.0, seed=0, unset=frozenset({"top_p"}))):
            Sampler(empty, sampling, ids, 8, configured_end_tokens(empty))(logits)


def summary(config: Any) -> str:
    """What a generation config asks for, and what is done with it."""

    def said(names: tuple[str, ...]) -> list[str]:
        defaults = type(config)._get_default_generation_params()
        values = {name: getattr(config, name) for name in names}
        return [f"{name} {value}" for name, value in values.items() if value not in (None, defaults.get(name))]

    parts = [
        (said(HONORED), "applied"),
        (said(WHEN_SAMPLING), "applied where --temperature samples"),
        (said(USERS), "left to --temperature and --max-tokens"),
    ]
    return "; ".join(f"{', '.join(names)}: {done}" for names, done in parts if names) or "asks for nothing"
