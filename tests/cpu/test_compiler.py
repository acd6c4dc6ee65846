"""Compiling kernels: the cache of machine code, and what happens with a kernel that is of no use here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.kernels import ISAS, build_call_with_too_few_arguments, build_nothing, needs_kernels, use_isas

from llava_cli import paths
from llava_cli.engine.cpu import onednn_linear
from llava_cli.engine.cpu.dense_linear import gemv_kernel
from llava_cli.engine.cpu.jit import compiler, decoder_ops, dense_gemv
from llava_cli.engine.cpu.jit.compiler import KernelUnusable, Misfit, addresses
from llava_cli.loader import load_engine
from llava_cli.settings import LoadOptions

pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def no_kernel_was_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_problems", [])


def fails(*args: object) -> str:
    raise RuntimeError("LLVM has no such intrinsic\nand more")


def test_machine_code_is_kept_for_later_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And made again where its file is damaged, or no file can be written."""
    kernel = gemv_kernel(bf16=False)
    compiler._compile(kernel, ISAS[0])
    (file,) = paths.kernel_cache().iterdir()
    whole = file.read_bytes()
    with monkeypatch.context() as cannot_build:
        cannot_build.setattr(dense_gemv, "_DenseGemv", fails)
        compiler._compile(kernel, ISAS[0])
        file.write_bytes(whole[:-100])
        with pytest.raises(KernelUnusable, match=r"dense_gemv\.build cannot be compiled: LLVM has no such intrinsic$"):
            compiler._compile(kernel, ISAS[0])
    compiler._compile(kernel, ISAS[0])
    assert file.read_bytes() == whole
    monkeypatch.setenv("LLAVA_CACHE", str(file))  # not a folder
    compiler._compile(kernel, ISAS[0])


def test_machine_code_that_others_may_have_written_is_not_run(tmp_path: Path) -> None:
    kernel = gemv_kernel(bf16=False)
    compiler._compile(kernel, ISAS[0])
    folder = paths.kernel_cache()
    (file,) = folder.iterdir()
    whole, planted = file.read_bytes(), compiler._digest(b"planted").encode() + b"\nplanted"
    assert (file.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o600, 0o700)

    def check() -> None:
        compiler._compile(kernel, ISAS[0])
        assert (file.read_bytes(), file.is_symlink(), folder.stat().st_mode & 0o777) == (whole, False, 0o700)

    file.write_bytes(planted)
    file.chmod(0o620)
    check()
    (elsewhere := tmp_path / "elsewhere").write_bytes(planted)
    file.unlink()
    file.symlink_to(elsewhere)
    check()
    assert elsewhere.read_bytes() == planted
    file.write_bytes(planted)
    folder.chmod(0o777)
    check()


def test_an_unknown_llvm_compiles_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM ends the process on an intrinsic that it cannot compile."""
    monkeypatch.setattr(compiler, "_TRUSTED_LLVM", ())
    kernel = gemv_kernel(bf16=True)
    compiler._compile(kernel, ISAS[0])
    monkeypatch.setattr(dense_gemv, "build", build_call_with_too_few_arguments)
    with pytest.raises(KernelUnusable, match=r"kernels\.build_call_with_too_few_arguments cannot be compiled by LLVM"):
        compiler._compile(gemv_kernel(bf16=True), ISAS[0])


@pytest.mark.parametrize(
    "build, problem",
    [
        (fails, "test_compiler.fails cannot be compiled: LLVM has no such intrinsic"),
        (build_nothing, "kernels.build_nothing differs from torch by "),
    ],
    ids=["cannot be compiled", "computes something else"],
)
def test_an_unusable_kernel_costs_one_line_and_no_answer(
    build: Callable[..., str], problem: str, monkeypatch: pytest.MonkeyPatch, drawing: Path
) -> None:
    monkeypatch.setattr(decoder_ops, "build_swiglu", build)
    lines: list[str] = []
    engine = load_engine(LoadOptions(model="builtin", precision="fp32", device="cpu"), lines.append)
    (line,) = lines
    assert line.startswith(f"llava: cpu kernels: {problem}")
    assert line.endswith("; transformers computes without them")
    assert engine.ask(str(drawing), "what color is the circle?") == "red"
    assert compiler.supported_isas() == ()
    load_engine(LoadOptions(model="builtin", precision="fp32", device="cpu"), lines.append)
    assert len(lines) == 1


@pytest.mark.parametrize("lacking", ["llvmlite", "OpenMP"])
def test_bitsandbytes_multiplies_where_nothing_can_be_compiled(
    lacking: str, monkeypatch: pytest.MonkeyPatch, drawing: Path
) -> None:
    if lacking == "llvmlite":
        monkeypatch.setitem(sys.modules, "llvmlite", None)
        monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    else:
        monkeypatch.setattr(compiler, "_openmp", lambda: None)
    monkeypatch.setattr(compiler, "_host_isas", compiler._host_isas.__wrapped__)
    monkeypatch.setattr(onednn_linear, "is_fastest_here", lambda: False)
    lines: list[str] = []
    engine = load_engine(LoadOptions(model="builtin", precision="4bit", device="cpu"), lines.append)
    assert lines == []
    assert not hasattr(engine.network, "token_forward")
    assert engine.ask(str(drawing), "what color is the circle?") == "red"
    expected = {"llvmlite": "none: no llvmlite", "OpenMP": "none: torch has no OpenMP threads"}[lacking]
    assert compiler.describe(list) == expected


def test_what_doctor_says(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [gemv_kernel(bf16=True), gemv_kernel(bf16=False)]
    assert compiler.describe(lambda: kernels) == f"{ISAS[0].name}, 2 compiled"
    monkeypatch.setattr(dense_gemv, "build", fails)
    problem = "test_compiler.fails cannot be compiled: LLVM has no such intrinsic"
    assert compiler.describe(lambda: [gemv_kernel(bf16=True)]) == f"none: {problem}"
    use_isas(monkeypatch)
    assert compiler.describe(list).startswith("none: ")


def test_addresses_are_those_of_the_expected_tensors_only() -> None:
    x = torch.zeros(4, 6)
    layout = {"x": (torch.float32, (4, 6))}
    assert addresses({"x": x}, layout) == {"x": x.data_ptr()}
    assert addresses({"x": torch.zeros(4, 12)[:, :6]}, layout, strided=("x",))
    wrong: list[torch.Tensor] = [
        x[:3],
        x[:, :5].contiguous(),
        x.flatten(),
        x[None],
        x.double(),
        x.to(torch.bfloat16),
        torch.zeros(6, 4).t(),
        torch.zeros(1, 6).expand(4, 6),
        torch.zeros(4, 12)[:, ::2],
        torch.zeros(4, 6, device="meta"),
    ]
    for tensor in wrong:
        with pytest.raises(Misfit):
            addresses({"x": tensor}, layout)
    with pytest.raises(Misfit):
        addresses({"x": torch.zeros(4, 12)[:, ::2]}, layout, strided=("x",))
    for names in ({}, {"y": x}, {"x": x, "y": x}):
        with pytest.raises(Misfit):
            addresses(names, layout)
