"""What `llava models` lists: the models that have a name or were pulled, and what to expect of each here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_cli.errors import LlavaError
from llava_cli.hardware.device import INSTALL_BITSANDBYTES, Plan, can_quantize, choose_plan, likely_device
from llava_cli.hardware.memory import free_memory
from llava_cli.loader import find_checkpoint
from llava_cli.models.aliases import ALIASES
from llava_cli.models.checkpoint_files import CONFIG, read_json
from llava_cli.models.families import family_named
from llava_cli.models.footprint import Sizes, footprint, sizes_of
from llava_cli.models.precision import gigabytes, plans_for, with_kept_copies
from llava_cli.models.registry import (
    BUILTIN,
    Checkpoint,
    builtin_folder,
    default_name,
    is_folder,
    on_disk,
    pulled,
)
from llava_cli.models.weight_files import check_weights
from llava_cli.paths import expand_user
from llava_cli.settings import QUANTIZED, LoadOptions
from llava_cli.speed import Outlook, Speeds, outlook, speeds


@dataclass(frozen=True)
class Machine:
    """What models run on here."""

    plan: Plan
    """The best one, for a model that fits."""
    free: int
    """Bytes of its memory."""
    speeds: Speeds
    """Of its CPU, if models run on that."""

    @classmethod
    def here(cls) -> Machine:
        """Measures the CPU unless it has been measured. Imports torch for that, or where there may be a GPU."""
        plan = choose_plan(likely_device(), "auto")
        return cls(plan, free_memory(plan.device), speeds() if plan.device == "cpu" else {})


def outlook_on(machine: Machine, sizes: Sizes) -> Outlook:
    return outlook(sizes, plans_for(sizes, machine.plan), machine.free, machine.speeds)


def memory_on(machine: Machine, sizes: Sizes) -> dict[str, int]:
    """Bytes by precision: in the best that this machine computes in, and in fewer bits."""
    precisions = [sizes.stored] if sizes.stored else [machine.plan.precision, *QUANTIZED]
    plans = [replace(machine.plan, precision=precision) for precision in precisions]
    return {plan.precision: footprint(sizes, plan).total for plan in plans}


@dataclass(frozen=True)
class Entry:
    """A model in the list."""

    name: str
    is_default: bool
    bytes: int | None
    """On disk, or of its download; None where neither is known."""
    on_disk: bool
    outlook: Outlook | None
    """None where a checkpoint's weights cannot be read."""
    note: str = ""

    def as_object(self) -> dict[str, Any]:
        """What `--json` prints."""
        expected = self.outlook
        return {
            "model": self.name,
            "default": self.is_default,
            "bytes": self.bytes,
            "on_disk": self.on_disk,
            "auto": expected and expected.precision,
            "memory": expected and expected.memory,
            "first_token_seconds": expected and _rounded(expected.first_token_seconds),
            "tokens_per_second": expected and _rounded(expected.tokens_per_second),
            "note": self.note,
        }


def _rounded(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.3g}")


def entries(options: LoadOptions, machine: Machine) -> Iterator[Entry]:
    """The built-in model, those that have a name, and others that were pulled or are the default."""
    default = default_name(options)

    def entry(name: str, size: int | None, is_here: bool, sizes: Sizes | None = None, note: str = "") -> Entry:
        if is_here:
            sizes = sizes_here(name, machine, options) or sizes
        return Entry(name, name == default, size, is_here, outlook_on(machine, sizes) if sizes else None, note)

    yield entry(BUILTIN, folder_size(builtin_folder()), True, note="demonstration: drawings of shapes")
    for name, alias in ALIASES.items():
        yield entry(name, alias.bytes, on_disk(name) is not None, sizes_of_alias(name), alias.note)
    for name in dict.fromkeys([*pulled(), default]):
        if name not in ALIASES and name != BUILTIN:
            folder = expand_user(name) if is_folder(name) else on_disk(name)
            if folder and os.path.isdir(folder):
                yield entry(name, folder_size(folder), True)
            else:
                yield entry(name, None, False)


def notes(machine: Machine, found: Iterable[Entry]) -> Iterator[str]:
    """What the list leaves open, in a line each."""
    if any(entry.outlook and entry.outlook.precision is None for entry in found):
        free = f"the {gigabytes(machine.free)} that are free"
        smaller = f"{machine.plan.precision} does not fit in {free}, 8 and 4 bits take less: {INSTALL_BITSANDBYTES}"
        yield f"no: {f'not even 4 bits fit in {free}' if can_quantize() else smaller}"
    if machine.plan.device != "cpu":
        yield f"first token, tokens/s: not guessed for {machine.plan.device}, where nothing has been measured"


def sizes_of_alias(name: str) -> Sizes:
    alias = ALIASES[name]
    family = family_named(alias.family)
    return Sizes(alias.geometry, family.picture, model_type=family.model_type)


def sizes_here(name: str, machine: Machine, options: LoadOptions) -> Sizes | None:
    """The sizes of a model on disk, with its adapter and its quantized copies; None where they cannot be read."""
    try:
        checkpoint = find_checkpoint(LoadOptions(model=name))
        sizes = sizes_on_disk(checkpoint)
        return sizes and with_kept_copies(sizes, checkpoint, machine.plan, options)
    except LlavaError:
        return None


def sizes_on_disk(checkpoint: Checkpoint) -> Sizes | None:
    """The sizes of a checkpoint, from the headers of its weights; None where they cannot be read."""
    try:
        return sizes_of(checkpoint, check_weights(checkpoint), read_json(checkpoint, CONFIG))
    except LlavaError:
        return None


def folder_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.exists())
