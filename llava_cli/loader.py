"""Settings -> Engine. The only place that loads a model.

A checkpoint is judged from its files before a weight is read: a folder that is no LLaVA, lacks a
shard or holds pickles is refused at once, by name. safetensors only; code of a checkpoint is never run.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cli.errors import LlavaError, ModelUnusable, OutOfMemory
from llava_cli.registry import ALIASES, Checkpoint, default_name, find
from llava_cli.settings import Settings

if TYPE_CHECKING:
    from llava_cli.engine.local import LocalEngine
    from llava_cli.machine import Plan
    from llava_cli.prompt import Prompter


def load(model: str | None = None, **options: Any) -> LocalEngine:
    """Loads a model: `load("llava-1.5-7b", precision="4bit")`.

    `model` is an alias, a Hub repo that is on disk, or a folder; None is the default model. Options
    are the fields of `Settings`. Raises `ModelUnusable`, `OutOfMemory` or `UsageError`.
    """
    return load_engine(Settings.resolve(model=model, **options))


def load_engine(settings: Settings) -> LocalEngine:
    """The engine that the settings ask for."""
    begin = time.perf_counter()
    checkpoint = find(default_name(settings))
    weights = check(checkpoint)
    from llava_cli.engine.local import LocalEngine, memory_errors
    from llava_cli.machine import plan

    how = plan(settings.device, settings.precision)
    with quiet(), memory_errors(checkpoint.name):
        prompter = load_prompter(settings, checkpoint)
        model = _load_model(checkpoint, how, weights)
    return LocalEngine(checkpoint.name, model, prompter, how.precision, time.perf_counter() - begin)


def load_prompter(settings: Settings, checkpoint: Checkpoint | None = None) -> Prompter:
    """Processor, tokenizer and template alone: what `llava prompt` needs."""
    checkpoint = checkpoint or find(default_name(settings))
    kind = check_files(checkpoint)
    from llava_cli.prompt import Prompter, read_template

    template = read_template(settings.template) if settings.template else None
    with quiet(), _damage(checkpoint, "processor"):
        # PIL's resizing everywhere: torchvision's differs, and pixels should not depend on what is installed.
        processor = _processor_class(kind).from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False, backend="pil"
        )
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ModelUnusable(checkpoint.name, "its processor does not take pictures and text")
    return Prompter(processor, template, settings.fit)


def _processor_class(kind: str) -> Any:
    """A model type's processor class, less its part for videos: we have none, and it needs torchvision."""
    import transformers
    from transformers.models.auto import processing_auto

    whole: Any = getattr(transformers, processing_auto.PROCESSOR_MAPPING_NAMES[kind])  # type: ignore[attr-defined]
    parts = [part for part in whole.get_attributes() if part != "video_processor"]
    if len(parts) == len(whole.get_attributes()):
        return whole
    return type(whole.__name__, (whole,), {"get_attributes": classmethod(lambda cls: parts)})


def _load_model(checkpoint: Checkpoint, how: Plan, weights: list[Path]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from llava_cli.machine import BYTES_PER_WEIGHT, free_memory

    stored = sum(path.stat().st_size for path in weights)
    parameters = stored / _stored_bytes(weights[0])
    needed, free = parameters * BYTES_PER_WEIGHT[how.precision], free_memory(how.device)
    if needed > free:
        smaller = parameters * BYTES_PER_WEIGHT["4bit"] <= free and how.precision != "4bit"
        hint = f"llava ask -m {checkpoint.name} -p 4bit" if smaller else "llava models lists what fits this machine"
        raise OutOfMemory(checkpoint.name, f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free", hint)
    dtypes = {"fp32": torch.float32, "fp16": torch.float16}
    options: dict[str, Any] = {
        "dtype": dtypes.get(how.precision, torch.bfloat16),
        "attn_implementation": how.attention,
        "use_safetensors": True,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    with _damage(checkpoint, "weights"):
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
        if how.precision in ("8bit", "4bit"):
            options["quantization_config"] = _quantization(how.precision, config)
        # accelerate spreads what does not fit one GPU over all of them.
        spread = how.device == "cuda" and needed * 1.2 > torch.cuda.mem_get_info()[0]
        options["device_map"] = "auto" if spread else {"": how.device}
        options |= {"config": config, "output_loading_info": True}
        loaded: Any = AutoModelForImageTextToText.from_pretrained(checkpoint.folder, **options)
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        # transformers would go on with random numbers in their place.
        raise ModelUnusable(
            checkpoint.name, f"lacks {len(missing)} tensors, {missing[0]} first", _again(checkpoint.name)
        )
    return model.eval()


def _quantization(precision: str, config: Any) -> Any:
    """bitsandbytes on the language model's inner layers alone.

    The vision tower, the projector and the output head lose more than they save; naming modules drops
    transformers' own list of exceptions, so all of them are named here, from the model's own structure.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(config)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    inner = {name for name, _ in decoder.named_modules(prefix=_name_of(model, decoder))}
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    kept = [n for n in linear if n not in inner or model.get_submodule(n) is head]
    if precision == "4bit":  # bitsandbytes' CPU kernels take whole blocks of 64 weights a row
        kept += [n for n in linear if model.get_submodule(n).in_features % 64]
    return BitsAndBytesConfig(
        load_in_8bit=precision == "8bit",
        load_in_4bit=precision == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=kept,
    )


def _name_of(model: Any, module: Any) -> str:
    return next(str(name) for name, m in model.named_modules() if m is module)


# ---------------------------------------------------------------- judging a folder before loading it


def check(checkpoint: Checkpoint) -> list[Path]:
    """The weight files of a checkpoint that looks whole; `ModelUnusable` names what is wrong with it."""
    check_files(checkpoint)
    weights = _weights(checkpoint)
    for path in weights:
        _check_shard(checkpoint, path)
    return weights


def check_files(checkpoint: Checkpoint) -> str:
    """Config and processor: there, readable, of a model that takes pictures and text. Returns its type."""
    name, folder = checkpoint.name, checkpoint.folder
    config = _read_json(checkpoint, "config.json")
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ModelUnusable(name, "its config.json names no model type", "llava models lists others")
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        if "auto_map" in config:
            raise ModelUnusable(name, "needs its own code, which is never run", "llava models lists others")
        reason = f"is a {kind} model, which does not answer questions about pictures"
        raise ModelUnusable(name, reason, "llava models lists others")
    if (folder / "generation_config.json").exists():
        _read_json(checkpoint, "generation_config.json")  # transformers ignores a damaged one, end tokens and all
    if not any((folder / f).exists() for f in ("processor_config.json", "preprocessor_config.json")):
        raise ModelUnusable(name, "no processor_config.json or preprocessor_config.json", _again(name))
    if not any((folder / f).exists() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelUnusable(name, "no tokenizer.json", _again(name))
    return kind


def _weights(checkpoint: Checkpoint) -> list[Path]:
    name, folder = checkpoint.name, checkpoint.folder
    if (folder / "model.safetensors.index.json").exists():
        shards = _read_json(checkpoint, "model.safetensors.index.json").get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(s, str) for s in shards.values()):
            raise ModelUnusable(name, "model.safetensors.index.json is damaged", _again(name))
        paths = [folder / shard for shard in sorted(set(shards.values()))]
    else:
        paths = [folder / "model.safetensors"]
    for path in paths:
        if not path.exists():
            pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
            if pickles and len(paths) == 1:
                hint = "convert it to safetensors, or take another model"
                raise ModelUnusable(name, f"{pickles[0].name} is a pickle, which is never loaded", hint)
            raise ModelUnusable(name, f"{path.name} is missing", _again(name))
    return paths


def _check_shard(checkpoint: Checkpoint, path: Path) -> None:
    """Reads a safetensors file's header and compares it with the file's length."""
    try:
        header, length = _header(path)
        end = max((tensor["data_offsets"][1] for k, tensor in header.items() if k != "__metadata__"), default=0)
        whole = path.stat().st_size == 8 + length + end
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ModelUnusable(checkpoint.name, f"{path.name} is damaged or cut off", _again(checkpoint.name))


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON at the front of a safetensors file, and its length in bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > 100_000_000:
            raise ValueError("no safetensors header")
        return json.loads(file.read(length)), length


def _stored_bytes(path: Path) -> float:
    """Bytes a weight takes in the file."""
    kinds = {t.get("dtype") for k, t in _header(path)[0].items() if k != "__metadata__"}
    return 4.0 if kinds == {"F32"} else 2.0


def _read_json(checkpoint: Checkpoint, file: str) -> dict[str, Any]:
    try:
        found = json.loads((checkpoint.folder / file).read_text("utf-8"))
    except FileNotFoundError:
        raise ModelUnusable(
            checkpoint.name, f"no {file} in it: not a checkpoint", "llava models lists what there is"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelUnusable(checkpoint.name, f"{file} cannot be read ({error})", _again(checkpoint.name)) from None
    if not isinstance(found, dict):
        raise ModelUnusable(checkpoint.name, f"{file} is damaged", _again(checkpoint.name))
    return found


def _again(name: str) -> str:
    return f"llava models pull {name}" if name in ALIASES or ("/" in name and not Path(name).exists()) else ""


@contextmanager
def _damage(checkpoint: Checkpoint, part: str) -> Iterator[None]:
    """Translates whatever transformers raises over a checkpoint's files."""
    try:
        yield
    except (LlavaError, MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        if "memory" in str(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelUnusable(
            checkpoint.name, f"its {part} cannot be loaded ({reason})", _again(checkpoint.name)
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' warnings and progress bars off the user's terminal while it loads."""
    from transformers.utils import logging as log

    bars, level = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    noisy = logging.getLogger("bitsandbytes")
    before = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        noisy.setLevel(before)
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
