"""The precision of a model on this machine: what `auto` takes where the best one does not fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import cast, get_args

from llava_cli.errors import OutOfMemory
from llava_cli.files import quoted
from llava_cli.hardware import memory
from llava_cli.hardware.device import INSTALL_BITSANDBYTES, Plan, can_quantize, choose_plan, native_precision
from llava_cli.models.footprint import Sizes, footprint
from llava_cli.models.registry import BUILTIN, Checkpoint
from llava_cli.settings import QUANTIZED, LoadOptions, Precision

OTHER_MODELS = "llava models lists what fits this machine"
_WORDS = {"8bit": "8 bits", "4bit": "4 bits"}
Hint = Callable[[str], None]


def candidates(plan: Plan) -> list[Plan]:
    """What `auto` may take on a plan's device: the best first, which loses least."""
    native, why = native_precision(plan.device)
    smaller = QUANTIZED if can_quantize() else ()
    return [
        replace(plan, precision=native, why=why),
        *(replace(plan, precision=precision, why="what fits in memory") for precision in smaller),
    ]


def best_fit(sizes: Sizes, plans: Iterable[Plan], free: int) -> Plan | None:
    """The first of the plans that takes at most `free` bytes; None where none does."""
    return next((plan for plan in plans if footprint(sizes, plan).total <= free), None)


def fit_to_memory(checkpoint: Checkpoint, sizes: Sizes, plan: Plan, options: LoadOptions, hint: Hint) -> Plan:
    """The plan, with a smaller precision where `auto` has chosen one that does not fit; `hint` gets a line about it.

    Raises `OutOfMemory` where none fits. What is stored quantized has only one precision, and the built-in model fits.
    """
    if options.precision != "auto" or sizes.stored or checkpoint.name == BUILTIN:
        return plan
    free, best = memory.free_memory(plan.device), footprint(sizes, plan).total
    needs = f"{plan.precision} takes {gigabytes(best)} and {gigabytes(free)} are free"
    if fitting := best_fit(sizes, candidates(plan), free):
        if fitting.precision != plan.precision:
            words = f"in {_WORDS[fitting.precision]} ({gigabytes(footprint(sizes, fitting).total)}): {needs}"
            hint(f"llava: {checkpoint.name}: {words}; -p {plan.precision} overrides this")
        return fitting
    if not can_quantize():
        reason = f"{needs}; 8 and 4 bits take less, and bitsandbytes is missing"
        raise OutOfMemory(checkpoint.name, reason, INSTALL_BITSANDBYTES)
    smallest = candidates(plan)[-1]
    least = footprint(sizes, smallest)
    reason = f"needs {gigabytes(least.total)} even in 4 bits, {gigabytes(free)} are free"
    tried = f"llava ask -m {quoted(checkpoint.name)} -p {smallest.precision} tries it; {OTHER_MODELS}"
    raise OutOfMemory(checkpoint.name, reason, tried if least.weights <= free else OTHER_MODELS)


def one_precision(
    checkpoint: Checkpoint,
    sizes: Sizes,
    options: LoadOptions,
    saved: str | None,
    serving: Callable[[], str | None],
    hint: Hint,
) -> Precision:
    """What `auto` stands for in a long run, all of whose answers are in one precision.

    That is the precision that the run was `saved` with; else that of the user's server which is `serving` this model;
    else what fits in memory now, about which `hint` gets a line. Raises `OutOfMemory` where nothing fits.
    """
    if checkpoint.name == BUILTIN or sizes.stored:
        return "auto"
    if saved not in get_args(Precision):
        saved = (
            serving() or fit_to_memory(checkpoint, sizes, choose_plan(options.device, "auto"), options, hint).precision
        )
    return cast(Precision, saved)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
