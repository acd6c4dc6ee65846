"""What replaces transformers' own layers on a CPU: what there is for which model, and that it can be undone."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import FunctionType

import pytest
import torch
from helpers.command import Run
from helpers.engines import CONVERSATIONS
from helpers.kernels import needs_kernels, use_isas

from llava_cli import load
from llava_cli.engine.cpu import onednn_linear, patch
from llava_cli.engine.cpu.decoder import Decoder
from llava_cli.engine.cpu.dense_linear import DenseGemv
from llava_cli.engine.cpu.jit import compiler, prefill_attention
from llava_cli.engine.cpu.jit.builder import IsaTier
from llava_cli.engine.cpu.jit.compiler import Kernel
from llava_cli.engine.cpu.jit.compiler import Run as Code
from llava_cli.engine.cpu.lm_head import LmHead
from llava_cli.engine.cpu.vision_layer import VisionLayer
from llava_cli.engine.local import LocalEngine
from llava_cli.settings import Precision


def forwards(engine: LocalEngine) -> set[type]:
    """The types of what stands in for modules' own `forward`s; plain functions serve every device."""
    return {type(vars(m)["forward"]) for m in engine.network.modules() if "forward" in vars(m)}


@needs_kernels
def test_each_model_gets_what_suits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LmHead, "MIN_WEIGHTS", 0)
    four = load("builtin", precision="4bit", device="cpu")
    assert forwards(four) == {Decoder, VisionLayer, LmHead, FunctionType}
    for precision in ("bf16", "fp32"):
        engine = load("builtin", precision=precision, device="cpu")
        assert forwards(engine) == {Decoder, VisionLayer, DenseGemv, FunctionType}
    for amx in (True, False):
        monkeypatch.setattr(onednn_linear, "is_fastest_here", lambda amx=amx: amx)
        assert forwards(load("builtin", precision="8bit", device="cpu")) == {Decoder, VisionLayer, LmHead, FunctionType}
    monkeypatch.undo()
    assert forwards(load("builtin", precision="4bit", device="cpu")) == {Decoder, VisionLayer, DenseGemv, FunctionType}
    use_isas(monkeypatch)
    assert forwards(load("builtin", precision="fp32", device="cpu")) == {FunctionType}
    monkeypatch.setenv("LLAVA_FAST", "0")
    assert forwards(load("builtin", precision="4bit", device="cpu")) == set()


@pytest.mark.parametrize("precision", ["fp32", "4bit"])
def test_all_of_it_can_be_undone_and_redone(precision: Precision, checkpoint: Callable[[str], Path]) -> None:
    engine = load(str(checkpoint("llava-llama")), precision=precision, device="cpu")
    network, inputs = engine.network, engine.inputs(CONVERSATIONS["one"])

    def state() -> tuple[set[type], str, bool]:
        implementation = network.config.text_config._attn_implementation
        return forwards(engine), implementation, hasattr(network, "token_forward")

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return network(**inputs).logits[:, -1].float()

    patched, ours = state(), logits()
    with engine.patch.undone():
        assert state() == (set(), "sdpa", False)
        theirs = logits()
    assert state() == patched
    assert torch.equal(logits(), ours)
    assert (ours - theirs).norm() < 0.15 * theirs.norm()


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16", "8bit", "4bit"])
def test_all_kernels_are_compiled_before_the_first_answer(
    precision: Precision, monkeypatch: pytest.MonkeyPatch, drawing: Path
) -> None:
    """While weights are read: what a layer launches later is in the list of what is compiled ahead."""
    listed: list[Kernel] = []
    used: set[str] = set()
    list_kernels, compile_async = patch._kernels, compiler._compile_async

    def list_and_record(*args: object) -> list[Kernel]:
        listed[:] = list_kernels(*args)  # type: ignore[arg-type]
        return listed

    def compile_and_record(kernel: Kernel, isa: IsaTier) -> Future[Code]:
        used.add(f"{kernel.name}{kernel.constants}")
        return compile_async(kernel, isa)

    monkeypatch.setattr(patch, "_kernels", list_and_record)
    engine = load("builtin", precision=precision, device="cpu")
    monkeypatch.setattr(compiler, "_compile_async", compile_and_record)
    assert engine.ask(str(drawing), "what color is the circle?") == "red"
    assert used
    assert used <= {f"{kernel.name}{kernel.constants}" for kernel in listed}


@needs_kernels
def test_doctor_finds_a_kernel_that_is_wrong(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = prefill_attention.prefill_attention
    wrong = lambda *args: right(*args[:-2], 1.5 * args[-2], args[-1])  # noqa: E731
    monkeypatch.setattr(prefill_attention, "prefill_attention", wrong)
    monkeypatch.setattr(prefill_attention, "_self_test", lambda kernel, code: ())
    checks = json.loads(run("doctor", "builtin", "-p", "fp32", "--device", "cpu", "--json").stdout)
    assert [check["check"] for check in checks if not check["good"]] == ["forward pass"]
