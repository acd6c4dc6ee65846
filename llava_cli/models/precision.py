"""The precision of a model on this machine: what `auto` takes where the best one does not fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from llava_cli.errors import OutOfMemory
from llava_cli.files import quoted
from llava_cli.hardware import memory
from llava_cli.hardware.device import INSTALL_BITSANDBYTES, Plan, can_quantize, native_precision
from llava_cli.models.checkpoint_files import CONFIG, read_json
from llava_cli.models.families import PictureCost, picture_cost
from llava_cli.models.footprint import footprint
from llava_cli.models.geometry import Geometry
from llava_cli.models.registry import BUILTIN, Checkpoint
from llava_cli.models.weight_files import Weights
from llava_cli.settings import QUANTIZED, LoadOptions

OTHER_MODELS = "llava models lists what fits this machine"
_WORDS = {"8bit": "8 bits", "4bit": "4 bits"}


def candidates(plan: Plan) -> list[Plan]:
    """What `auto` may take on a plan's device: the best first, which loses least."""
    native, why = native_precision(plan.device)
    smaller = QUANTIZED if can_quantize() else ()
    return [
        replace(plan, precision=native, why=why),
        *(replace(plan, precision=precision, why="what fits in memory") for precision in smaller),
    ]


def best_fit(geometry: Geometry, plans: Iterable[Plan], picture: PictureCost | None, free: int) -> Plan | None:
    """The first of the plans that takes at most `free` bytes; None where none does."""
    return next((plan for plan in plans if footprint(geometry, plan, picture).total <= free), None)


def fit_to_memory(
    checkpoint: Checkpoint, weights: Weights, plan: Plan, options: LoadOptions, hint: Callable[[str], None]
) -> Plan:
    """The plan, with a smaller precision where `auto` has chosen one that does not fit; `hint` gets a line about it.

    Raises `OutOfMemory` where none fits. What is stored quantized has only one precision, and the built-in model fits.
    """
    if options.precision != "auto" or weights.are_quantized or checkpoint.name == BUILTIN:
        return plan
    picture, free = picture_of(checkpoint, weights.geometry), memory.free_memory(plan.device)
    best = footprint(weights.geometry, plan, picture).total
    needs = f"{plan.precision} takes {gigabytes(best)} and {gigabytes(free)} are free"
    if fitting := best_fit(weights.geometry, candidates(plan), picture, free):
        if fitting.precision != plan.precision:
            size = gigabytes(footprint(weights.geometry, fitting, picture).total)
            words = f"in {_WORDS[fitting.precision]} ({size}): {needs}"
            hint(f"llava: {checkpoint.name}: {words}; -p {plan.precision} overrides this")
        return fitting
    if not can_quantize():
        reason = f"{needs}; 8 and 4 bits take less, and bitsandbytes is missing"
        raise OutOfMemory(checkpoint.name, reason, INSTALL_BITSANDBYTES)
    smallest = candidates(plan)[-1]
    least = footprint(weights.geometry, smallest, picture)
    reason = f"needs {gigabytes(least.total)} even in 4 bits, {gigabytes(free)} are free"
    tried = f"llava ask -m {quoted(checkpoint.name)} -p {smallest.precision} tries it; {OTHER_MODELS}"
    raise OutOfMemory(checkpoint.name, reason, tried if least.weights <= free else OTHER_MODELS)


def picture_of(checkpoint: Checkpoint, geometry: Geometry) -> PictureCost | None:
    """What a photo is for a checkpoint; None where its config names no known family."""
    config = read_json(checkpoint, CONFIG)
    text = config.get("text_config")
    picture = picture_cost(str(config.get("model_type")), str(text.get("model_type") if isinstance(text, dict) else ""))
    # A family that sees one image has as many tokens as its tower has patches, which tuned checkpoints may change.
    follows = picture and picture.crops == 1 and not picture.patches
    return picture._replace(tokens=geometry.patches) if picture and follows else picture


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
