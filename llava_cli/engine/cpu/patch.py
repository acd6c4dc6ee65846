"""What a CPU does faster than transformers would; the only way into this package.

    compile_ahead(config, plan)                  # before weights are read: starts compiling, and returns at once
    problem = accelerate(model, store, patch)    # replaces what can be faster; `patch.undo()` takes all of it back

A kernel that cannot be compiled here, or disagrees with torch, is a `problem`: nothing that is compiled is used then.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from llava_cli.engine.cpu import attention, decoder, onednn_linear, vision_layer
from llava_cli.engine.cpu.dense_linear import DenseGemv, gemv_kernel
from llava_cli.engine.cpu.jit import compiler
from llava_cli.engine.cpu.jit.compiler import Kernel
from llava_cli.engine.cpu.linear_choice import QUANTIZED_LAYERS, fused_linear, int8_linear, wide_vision_layers
from llava_cli.engine.cpu.lm_head import LmHead
from llava_cli.engine.cpu.packed_weights import PackedWeightStore
from llava_cli.engine.cpu.projection import Linear
from llava_cli.engine.cpu.quantized_linear import gemm_kernel
from llava_cli.engine.cpu.sample_layers import sample_layer

if TYPE_CHECKING:
    from llava_cli.engine.model_patch import ModelPatch
    from llava_cli.hardware.device import Plan

__all__ = ["PackedWeightStore", "accelerate", "compile_ahead", "describe_kernels", "sample_layer"]

_BITS = {"4bit": (4, 8), "8bit": (8,)}
"""Bits of the quantized weights that a model of a precision has: the vision tower's get 8."""


def compile_ahead(config: Any, plan: Plan) -> None:
    """Starts compiling the kernels of a model with this config, while its weights are read."""
    if compiler.supported_isas():
        for kernel in _kernels(config, plan.precision, plan.compute_precision == "bf16"):
            kernel.compile_async()


def describe_kernels(config: Any, plan: Plan) -> str:
    """The kernels of a model with this config: "avx2, 9 compiled", or "none: " and why."""
    return compiler.describe(lambda: _kernels(config, plan.precision, plan.compute_precision == "bf16"))


def _kernels(config: Any, precision: str, bf16: bool) -> list[Kernel]:
    """What the layers of a model with this config launch."""
    vision, text = getattr(config, "vision_config", None), config.get_text_config()
    kernels = [
        *attention.kernels(vision, bf16),
        *attention.kernels(text, bf16, decodes=True),
        *decoder.kernels(text, bf16),
        gemv_kernel(bf16),
        *(gemm_kernel(bits, bf16) for bits in _BITS.get(precision, ())),
    ]
    return list(dict.fromkeys(kernels))


def accelerate(model: Any, store: PackedWeightStore, patch: ModelPatch) -> str | None:
    """Replaces what can be computed faster, in `patch`; packed weights come from `store`, or are kept in it.

    What `patch` replaced before, unused layers, is left as it is. Returns what is wrong with a kernel, if anything is.
    """
    import torch

    layers = {layer: name for name, layer in model.named_modules() if type(layer).__name__ in QUANTIZED_LAYERS}
    in_8_bits = any(layer.weight.dtype == torch.int8 for layer in layers)
    precision = "8bit" if in_8_bits else "4bit" if layers else ""
    problem = None
    if compiler.supported_isas():
        problem = compiler.find_problem(_kernels(model.config, precision, model.dtype == torch.bfloat16))
    patch.apply(partial(attention.use_our_attention, model), partial(attention.use_torchs_attention, model))
    skipped = {part for module in patch.replaced_modules for part in module.modules()}
    vision_layers = [layer for layer in model.modules() if layer not in skipped and _suits_vision_layer(layer)]
    wide_layers = wide_vision_layers(model, skipped) if layers else {}
    needs_copies = onednn_linear.is_fastest_here() or not store.on_disk
    fits = onednn_linear.fits_in_memory([*layers, *wide_layers] if needs_copies else wide_layers)

    def fuse(group: list[Any]) -> Linear | None:
        return fused_linear(group, layers[group[0]], fits, store) if all(layer in layers for layer in group) else None

    def fuse_vision(group: list[Any]) -> Linear | None:
        is_wide = all(layer in wide_layers for layer in group)
        return int8_linear(group, wide_layers[group[0]], store) if fits and is_wide else None

    text_decoder, head = model.get_decoder(), model.get_output_embeddings()
    with torch.inference_mode():
        if decoder.suits(text_decoder) and attention.uses_our_attention(text_decoder):
            replacement = decoder.Decoder(text_decoder, fuse)
            patch.replace_forward(text_decoder, replacement)
            patch.set_attribute(model, "token_forward", replacement)
        else:
            for layer in layers:
                _replace(layer, fuse([layer]), patch)
        for layer in vision_layers:
            patch.replace_forward(layer, vision_layer.VisionLayer(layer, fuse_vision))
        for layer in wide_layers if not vision_layers else ():
            _replace(layer, fuse_vision([layer]), patch)
        lm_head = LmHead.for_head(head, store) if layers else None
        if lm_head:
            patch.set_attribute(model, "largest_logits", lm_head.largest_logits)
        _replace(head, lm_head or DenseGemv.for_layer(head), patch)
    return problem


def _replace(layer: Any, linear: Linear | None, patch: ModelPatch) -> None:
    if linear:
        patch.replace_forward(layer, linear)


def _suits_vision_layer(layer: Any) -> bool:
    return vision_layer.suits(layer) and attention.uses_our_attention(layer.self_attn)
