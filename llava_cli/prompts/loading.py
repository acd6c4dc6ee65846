"""A checkpoint's files -> its prompter. Nothing of a stranger's is used before it has gone through the sandbox."""

from __future__ import annotations

from typing import Any

from llava_cli.errors import ModelUnusable
from llava_cli.models.checkpoint_files import CONFIG, Configs, tokenizer_hint
from llava_cli.models.families import Family, family_named, recognize
from llava_cli.models.registry import BUILTIN, Checkpoint
from llava_cli.models.validate import check_visual_tokens
from llava_cli.prompts.processor import embedded_tokens, load_processor
from llava_cli.prompts.prompter import Prompter
from llava_cli.prompts.sandbox import TextRefused, TextSandbox
from llava_cli.prompts.tokenizer_check import hold_to_file
from llava_cli.settings import LoadOptions


def load_prompter(
    checkpoint: Checkpoint,
    configs: Configs,
    config: Any,
    options: LoadOptions,
    sandbox: TextSandbox | None,
) -> Prompter:
    """The prompter of a checkpoint with these files and this config of transformers'; `sandbox` is its own.

    Where transformers' tokenizer differs from its own file, the file's is used. Raises `ModelUnusable` or `UsageError`.
    """
    if options.visual_tokens:
        check_visual_tokens(checkpoint, configs[CONFIG], options.visual_tokens)
    if sandbox:
        try:
            sandbox.check_tokenizer()
        except TextRefused as error:
            file = sandbox.tokenizer.name if sandbox.tokenizer else "tokenizer"
            raise ModelUnusable(checkpoint.name, f"its {file} {error}", tokenizer_hint(checkpoint)) from None
    processor = load_processor(checkpoint, configs, config)
    origin = "ours"
    if sandbox:
        image_token = getattr(processor, "image_token", None) or ""
        processor.tokenizer, origin = hold_to_file(checkpoint, processor.tokenizer, image_token, sandbox)
    prompter = Prompter(
        processor,
        options.template,
        options.fit,
        _family(checkpoint, config, processor.tokenizer),
        options.visual_tokens,
        sandbox,
        context=getattr(config.get_text_config(), "max_position_embeddings", None),
        vocab_size=embedded_tokens(config),
    )
    prompter.tokenizer_origin = origin
    return prompter


def _family(checkpoint: Checkpoint, config: Any, tokenizer: Any) -> Family | None:
    if checkpoint.name == BUILTIN:
        return family_named(BUILTIN)
    vocabulary = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return recognize(config.model_type, config.get_text_config().model_type, vocabulary)
