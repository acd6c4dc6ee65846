"""A vision tower's layers see what transformers' own see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.kernels import needs_kernels

from llava_cli import Conversation, load, open_picture
from llava_cli.engine.cpu.linear_choice import LinearBySize
from llava_cli.engine.cpu.vision_layer import VisionLayer
from llava_cli.engine.local import LocalEngine
from llava_cli.settings import Precision


def vision_layers(engine: LocalEngine) -> list[VisionLayer]:
    forwards = [vars(module).get("forward") for module in engine.network.modules()]
    return [forward for forward in forwards if isinstance(forward, VisionLayer)]


def feature_error(engine: LocalEngine, drawing: Path) -> float:
    """How far features are from those that transformers computes, relative to their norm."""
    inputs = engine.inputs(Conversation().ask("what is this?", [open_picture(str(drawing))]))
    tower = engine.network.model.vision_tower

    def features() -> torch.Tensor:
        with torch.inference_mode():
            pixels = inputs["pixel_values"].flatten(end_dim=-4)
            hidden: torch.Tensor = tower(pixels, output_hidden_states=True).hidden_states[-2]
            return hidden.float()

    ours = features()
    with engine.patch.undone():
        expected = features()
    return float(((ours - expected).norm(dim=-1) / expected.norm(dim=-1)).mean())


@needs_kernels
@pytest.mark.parametrize("precision, bound", [("fp32", 1e-5), ("bf16", 0.02)])
@pytest.mark.parametrize("family", ["llava-llama", "llava-onevision"])
def test_layers_of_clip_and_siglip_see_the_same(
    family: str, precision: Precision, bound: float, checkpoint: Callable[[str], Path], drawing: Path
) -> None:
    engine = load(str(checkpoint(family)), precision=precision, device="cpu")
    assert vision_layers(engine)
    assert feature_error(engine, drawing) < bound


@needs_kernels
@pytest.mark.parametrize("precision", ["4bit", "8bit"])
def test_wide_layers_see_the_same_in_8_bits(precision: Precision, drawing: Path, each_cpu: None) -> None:
    engine = load("builtin", precision=precision, device="cpu")
    layers = vision_layers(engine)
    assert len(layers) == 6
    projections = [part for layer in layers for part in (layer._qkv_proj, layer._out_proj, layer._fc1, layer._fc2)]
    assert {type(projection.fused_linear) for projection in projections} == {LinearBySize}
    assert 0 < feature_error(engine, drawing) < 0.04
