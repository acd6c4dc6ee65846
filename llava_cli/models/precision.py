"""The precision of a model on this machine: what `auto` takes where the best one does not fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import cast, get_args

from llava_cli.errors import OutOfMemory
from llava_cli.files import quoted
from llava_cli.hardware import memory
from llava_cli.hardware.device import INSTALL_BITSANDBYTES, Plan, can_quantize, choose_plan, native_precision
from llava_cli.models import quantized_cache
from llava_cli.models.checkpoint_files import is_adapter
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


def plans_for(sizes: Sizes, plan: Plan) -> list[Plan]:
    """`candidates`, or the one plan of what is stored quantized."""
    return [replace(plan, precision=sizes.stored, why="as stored")] if sizes.stored else candidates(plan)


def best_fit(sizes: Sizes, plans: Iterable[Plan], free: int) -> Plan | None:
    """The first of the plans that takes at most `free` bytes; None where none does."""
    return next((plan for plan in plans if footprint(sizes, plan).total <= free), None)


def with_kept_copies(sizes: Sizes, checkpoint: Checkpoint, plan: Plan, options: LoadOptions) -> Sizes:
    """The sizes, with the precisions of which there is a quantized copy of this checkpoint for the plan's device."""
    kept = {
        one.precision
        for one in candidates(plan)
        if one.precision in QUANTIZED and quantized_cache.is_kept(checkpoint, recipe(one, options.double_quant))
    }
    return replace(sizes, kept=frozenset(kept))


def recipe(plan: Plan, double_quant: bool) -> str:
    """What a quantized copy depends on besides the weights that it is made of.

    A copy in other bits than those that a CPU computes in would be in memory, not mapped.
    """
    wide = "-fp32" if plan.compute_precision == "fp32" else ""
    return f"{plan.precision}{'-double' * (double_quant and plan.precision == '4bit')}-{plan.device}{wide}"


def fit_to_memory(checkpoint: Checkpoint, sizes: Sizes, plan: Plan, options: LoadOptions, hint: Hint) -> Plan:
    """The plan, with a smaller precision where `auto` has chosen one that does not fit; `hint` gets a line about it.

    It has to fit from its next start on: one that quantizes, or merges an adapter, takes more than those that find a
    copy. Raises `OutOfMemory` where none fits. The built-in model does.
    """
    if options.precision != "auto" or checkpoint.name == BUILTIN:
        return plan
    if footprint(sizes, plan).total <= (free := memory.free_memory(plan.device)):
        return plan
    if not sizes.stored:
        sizes = with_kept_copies(sizes, checkpoint, plan, options)
    plans = plans_for(sizes, plan)
    if (fitting := best_fit(sizes, plans, free)) is None:
        raise _too_large(checkpoint, sizes, plans, free)
    words = f"in {_WORDS[fitting.precision]} ({_size(sizes, fitting)}): {_need(sizes, plan, free)}"
    hint(f"llava: {checkpoint.name}: {words}; -p {plan.precision} overrides this")
    return fitting


def _too_large(checkpoint: Checkpoint, sizes: Sizes, plans: list[Plan], free: int) -> OutOfMemory:
    smallest = min(plans, key=lambda plan: footprint(sizes, plan).total)
    is_only = sizes.stored or sizes.has_adapter
    if not is_only and not can_quantize():
        reason = f"{_need(sizes, smallest, free)}; 8 and 4 bits take less, and bitsandbytes is missing"
        return OutOfMemory(checkpoint.name, reason, INSTALL_BITSANDBYTES)
    needs = "with its adapter to merge, needs" if sizes.has_adapter else "needs"
    even = f" even in {_WORDS[smallest.precision]}" if smallest.precision in _WORDS and not is_only else ""
    reason = f"{needs} {_size(sizes, smallest)}{even}, {gigabytes(free)} are free"
    named = f"-m {quoted(checkpoint.name)}{_adapter_option(checkpoint)} -p {smallest.precision}"
    tried = f"llava ask {named} tries it; {OTHER_MODELS}"
    return OutOfMemory(checkpoint.name, reason, tried if footprint(sizes, smallest).weights <= free else OTHER_MODELS)


def _adapter_option(checkpoint: Checkpoint) -> str:
    """Empty where the model's name is the adapter's."""
    adapter = checkpoint.adapter
    return f" --adapter {quoted(adapter)}" if adapter and not is_adapter(checkpoint.name) else ""


def _need(sizes: Sizes, plan: Plan, free: int) -> str:
    return f"{plan.precision} takes {_size(sizes, plan)} and {gigabytes(free)} are free"


def _size(sizes: Sizes, plan: Plan) -> str:
    return gigabytes(footprint(sizes, plan).total)


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
    if checkpoint.name == BUILTIN:
        return "auto"
    if sizes.stored:
        return cast(Precision, sizes.stored)
    if saved not in get_args(Precision):
        saved = (
            serving() or fit_to_memory(checkpoint, sizes, choose_plan(options.device, "auto"), options, hint).precision
        )
    return cast(Precision, saved)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
