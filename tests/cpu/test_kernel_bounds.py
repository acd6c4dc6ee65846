"""Nothing that is compiled reads or writes beyond a tensor, whatever a checkpoint or the cache has in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Shell
from helpers.engines import CONVERSATIONS
from helpers.linear_layers import Module, eight_bits, four_bits, sixteen_bits
from safetensors import safe_open
from safetensors.torch import save_file

from llava_cli import Sampling, load
from llava_cli.engine.cpu import attention, vision_layer
from llava_cli.engine.cpu.attention import OneToken, attend
from llava_cli.engine.cpu.decoder import suits
from llava_cli.engine.cpu.decoder_passes import _Buffers, _turn
from llava_cli.engine.cpu.dense_linear import Plain
from llava_cli.engine.cpu.jit import compiler
from llava_cli.engine.cpu.jit.compiler import Misfit, addresses, kinds_here
from llava_cli.engine.cpu.packed_weights import Arranged, _write
from llava_cli.engine.cpu.quantized_linear import Room, Tiled, in_tiles, layout_in_tiles
from llava_cli.errors import ModelUnusable
from llava_cli.models import quantized_cache
from llava_cli.models.registry import quantised_cache
from llava_cli.models.stored_quantization import misfit
from llava_cli.safetensors_header import read_header

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors], object]
LAYER = "q_proj"
compiles = pytest.mark.skipif(not kinds_here(), reason="nothing can be compiled for this CPU")


# ---------------------------------------------------------------- checkpoints that are stored quantized


@pytest.fixture
def stored(checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A checkpoint that others have quantized: `stored("4bit", double=True)` -> its folder."""

    def get(precision: Any, double: bool = False) -> Path:
        with monkeypatch.context() as patch:
            patch.setenv("LLAVA_DOUBLE_QUANT", "yes" if double else "no")
            load(str(checkpoint("llava-llama")), precision=precision, device="cpu")
        (copy,) = quantised_cache().iterdir()
        folder = tmp_path / "stored"
        shutil.copytree(checkpoint("llava-llama"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
        kept = shutil.ignore_patterns("arranged-*", quantized_cache.LABEL)
        shutil.copytree(copy, folder, ignore=kept, dirs_exist_ok=True)
        shutil.rmtree(copy)
        return folder

    return get


def change(folder: Path, edit: Edit) -> None:
    """Edits the tensors of the first layer, by their names behind that of its weight."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    prefix = next(name for name in sorted(tensors) if name.endswith(f"{LAYER}.weight"))
    its = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
    scales = prefix.removesuffix("weight") + "SCB"
    if scales in tensors:
        its["SCB"] = tensors.pop(scales)
    edit(its)
    named = {scales if name == "SCB" else prefix + name: tensor.contiguous() for name, tensor in its.items()}
    path.unlink()
    save_file({**tensors, **named}, path, {"format": "pt"})


def shorter(name: str, by: int = 1) -> Edit:
    return lambda its: its.update({name: its[name].flatten()[:-by].clone()})


def of_type(name: str, dtype: torch.dtype) -> Edit:
    return lambda its: its.update({name: its[name].to(dtype)})


def state(**values: Any) -> Edit:
    """Changes what a layer's packed JSON says."""

    def edit(its: Tensors) -> None:
        name = next(name for name in its if "quant_state" in name)
        said = {**json.loads(bytes(its[name].tolist())), **values}
        its[name] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    return edit


HOSTILE: dict[str, tuple[Edit, bool]] = {
    "no scales at all": (lambda its: its.update({".absmax": its[".absmax"][:0]}), False),
    "a scale too few": (shorter(".absmax"), False),
    "half the scales": (shorter(".absmax", 64), False),
    "a scale too many": (lambda its: its.update({".absmax": torch.ones(129)}), False),
    "scales in 16 bits": (of_type(".absmax", torch.float16), False),
    "scales in 8 bits without more": (of_type(".absmax", torch.uint8), False),
    "scales in rows": (lambda its: its.update({".absmax": its[".absmax"].view(2, -1)}), False),
    "a code too few": (shorter(".quant_map"), False),
    "no codes": (lambda its: its.update({".quant_map": its[".quant_map"][:0]}), False),
    "codes in 16 bits": (of_type(".quant_map", torch.bfloat16), False),
    "codes of 8 bits": (lambda its: its.update({".quant_map": torch.rand(256)}), False),
    "a byte too few": (shorter(""), False),
    "a byte": (lambda its: its.update({"": its[""][:1].clone()}), False),
    "twice the bytes": (lambda its: its.update({"": its[""].repeat(2, 1)}), False),
    "transposed": (state(shape=[64, 128]), False),
    "in one dimension": (state(shape=[8192]), False),
    "in three": (state(shape=[1, 128, 64]), False),
    "larger": (state(shape=[1 << 20, 1 << 20]), False),
    "without a shape": (state(shape=None), False),
    "negative": (state(shape=[-128, -64]), False),
    "blocks of 0": (state(blocksize=0), False),
    "blocks of -64": (state(blocksize=-64), False),
    "blocks of 63": (state(blocksize=63), False),
    "blocks of a fraction": (state(blocksize=64.0), False),
    "blocks of a word": (state(blocksize="64"), False),
    "blocks of true": (state(blocksize=True), False),
    "larger blocks than there are scales for": (state(blocksize=32), False),
    "smaller blocks than there are scales for": (state(blocksize=4096), False),
    "blocks of 2^40": (state(blocksize=1 << 40), False),
    "another type": (state(dtype="int8"), False),
    "a function as type": (state(dtype="load"), False),
    "another kind": (state(quant_type="nf5"), False),
    "deep": (lambda its: its.update({".quant_state.bitsandbytes__nf4": _bytes(b"[" * 100_000)}), False),
    "plain weights": (lambda its: (its.clear(), its.update({"": torch.rand(128, 64)})), False),
    "a scale of scales too few": (shorter(".nested_absmax"), True),
    "a code of scales too few": (shorter(".nested_quant_map"), True),
    "codes of scales of 4 bits": (lambda its: its.update({".nested_quant_map": torch.rand(16)}), True),
    "a quantized scale too few": (shorter(".absmax"), True),
    "quantized scales in 32 bits": (of_type(".absmax", torch.float32), True),
    "scales of scales in 16 bits": (of_type(".nested_absmax", torch.float16), True),
    "blocks of scales of 0": (state(nested_blocksize=0), True),
    "blocks of scales of 64": (state(nested_blocksize=64), True),
    "another type of scales": (state(nested_dtype="int32"), True),
}


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@pytest.mark.parametrize("edit, double", HOSTILE.values(), ids=HOSTILE)
def test_a_layer_in_4_bits_that_lacks_something_is_refused(
    edit: Edit, double: bool, stored: Callable[..., Path]
) -> None:
    change(folder := stored("4bit", double), edit)
    with pytest.raises(ModelUnusable) as refused:
        load(str(folder), device="cpu")
    assert (refused.value.thing, refused.value.exit_code) == (str(folder), 69)
    assert len(refused.value.reason.splitlines()) == 1 and len(refused.value.reason) < 300


HOSTILE_8: dict[str, Edit] = {
    "a scale too few": shorter("SCB"),
    "one scale": lambda its: its.update(SCB=its["SCB"][:1].clone()),
    "no scale": lambda its: its.pop("SCB"),
    "scales in 16 bits": of_type("SCB", torch.float16),
    "scales in a column": lambda its: its.update(SCB=its["SCB"][:, None]),
    "a row too few": lambda its: its.update({"": its[""][:-1].clone()}),
    "a column too few": lambda its: its.update({"": its[""][:, :-1].clone()}),
    "in one dimension": lambda its: its.update({"": its[""].flatten()}),
    "plain weights": lambda its: (its.clear(), its.update({"": torch.rand(128, 64)})),
}


@pytest.mark.parametrize("edit", HOSTILE_8.values(), ids=HOSTILE_8)
def test_a_layer_in_8_bits_that_lacks_something_is_refused(edit: Edit, stored: Callable[..., Path]) -> None:
    change(folder := stored("8bit"), edit)
    with pytest.raises(ModelUnusable):
        load(str(folder), device="cpu")


@pytest.mark.parametrize("precision, double", [("4bit", False), ("4bit", True), ("8bit", False)])
def test_what_others_have_quantized_rightly_is_loaded(
    precision: str, double: bool, stored: Callable[..., Path]
) -> None:
    engine = load(str(stored(precision, double)), device="cpu")
    assert (engine.precision, misfit(engine.network)) == (precision, None)
    assert engine.answer(CONVERSATIONS["one"], Sampling(max_tokens=3)).answer_tokens == 3


@pytest.mark.parametrize(
    "precision, name", [("4bit", ".absmax"), ("8bit", "SCB")], ids=["absmax without end", "SCB without end"]
)
@pytest.mark.parametrize("fast", ["1", "0"])
def test_the_command_refuses_it_in_one_line(
    precision: str, name: str, fast: str, stored: Callable[..., Path], shell: Shell, drawing: Path, monkeypatch: Any
) -> None:
    """As a process of its own, which would end with a signal: without a check one scale is read as 128."""
    change(folder := stored(precision), lambda its: its.update({name: its[name][:1].clone()}))
    monkeypatch.setenv("LLAVA_FAST", fast)
    done = shell("ask", "-m", folder, drawing, "what is this?")
    first, *hints = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout, hints) == (69, b"", [])
    assert first.startswith(f"llava: {folder}: damaged: model.language_model.layers.0.self_attn.{LAYER} has 1 scales")


# ---------------------------------------------------------------- weights that the cache has arranged


def said(folder: Path) -> str:
    engine = load(str(folder), precision="4bit", device="cpu")
    return engine.answer(CONVERSATIONS["two"], Sampling(max_tokens=12)).text


def rewrite(path: Path, edit: Edit) -> None:
    """With a header that adds up."""
    tensors = {
        name: torch.zeros(its.shape, dtype={"U8": torch.uint8, "I8": torch.int8, "F16": torch.float16}.get(its.dtype))
        for name, its in read_header(path).items()
    }
    edit(tensors)
    _write(tensors, path)


ARRANGED: dict[str, Edit] = {
    "shorter": lambda its: its.update({name: tensor[:-1].clone() for name, tensor in its.items()}),
    "empty": lambda its: its.update({name: tensor[:0].clone() for name, tensor in its.items()}),
    "another type": lambda its: its.update({name: tensor.half() for name, tensor in its.items()}),
    "a tensor too few": lambda its: its.popitem(),
    "a tensor too many": lambda its: its.update(more=torch.zeros(3)),
    "flat": lambda its: its.update({name: tensor.flatten() for name, tensor in its.items()}),
}


@compiles
@pytest.mark.parametrize("edit", ARRANGED.values(), ids=ARRANGED)
def test_arranged_weights_of_another_layout_are_made_again(edit: Edit, checkpoint: Callable[[str], Path]) -> None:
    first = said(checkpoint("llava-llama"))
    files = list(quantised_cache().rglob("arranged-*/*.safetensors"))
    whole = {path: path.read_bytes() for path in files}
    assert whole
    for path in files:
        rewrite(path, edit)
    assert said(checkpoint("llava-llama")) == first
    assert {path: path.read_bytes() for path in files} == whole


def test_arranged_weights_that_others_may_have_written_are_made_again(tmp_path: Path) -> None:
    made = {"whole": torch.arange(15, dtype=torch.int8).view(3, 5), "scale": torch.rand(3)}
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in made.items()}

    def again() -> None:
        tensors = Arranged(tmp_path)("layer", layout, lambda: made)
        assert all(torch.equal(tensors[name], made[name]) for name in made)

    again()
    (path,) = tmp_path.rglob("*.safetensors")
    assert path.stat().st_mode & 0o777 == 0o600
    theirs = tmp_path / "theirs"
    _write({**made, "scale": torch.zeros(3)}, theirs)
    for plant in (lambda: path.write_bytes(theirs.read_bytes()) and path.chmod(0o666), lambda: path.symlink_to(theirs)):
        path.unlink()
        plant()
        again()
        assert not path.is_symlink() and path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(theirs.read_bytes())
    path.parent.chmod(0o777)
    again()
    assert path.parent.stat().st_mode & 0o777 == 0o700


# ---------------------------------------------------------------- what kernels get the addresses of


def test_an_address_is_given_of_what_was_expected_alone() -> None:
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


@compiles
@pytest.mark.parametrize("make", [four_bits, partial(four_bits, double=True), eight_bits, sixteen_bits])
def test_products_of_tiles_check_their_weights(make: Any) -> None:
    layer = make(32, True)
    right = in_tiles([layer])
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in right.items()} == layout_in_tiles([layer])
    Tiled(**right)
    for name, tensor in right.items():
        # Codes become whole numbers of 8 bits, whatever they were.
        for wrong in (tensor[:-1], tensor[:0], tensor.flatten()[1:], *([] if name == "codes" else [tensor.double()])):
            with pytest.raises(ValueError):
                Tiled(**{**right, name: wrong})
    with pytest.raises(Misfit):
        Tiled(**right, bias=torch.zeros(31))
    product, x, out = Tiled(**right), torch.zeros(3, 128), torch.zeros(3, 32)
    product.bound(x, out, Room())
    for wrong_x, wrong_out in ((x, out[:, :31]), (x, out.double()), (x, torch.zeros(3, 64)[:, ::2]), (x.double(), out)):
        with pytest.raises(Misfit):
            product.bound(wrong_x, wrong_out, Room())


@compiles
def test_products_of_plain_layers_check_what_they_are_given() -> None:
    product = Plain.of(torch.nn.Linear(128, 8, dtype=torch.bfloat16))
    assert product
    x, out = torch.zeros(3, 128, dtype=torch.bfloat16), torch.zeros(3, 8, dtype=torch.bfloat16)
    product.bound(x, out)
    for wrong in ((x[:, :64], out), (x.float(), out), (x, out[:2]), (x, out.float()), (x, out.t().contiguous().t())):
        with pytest.raises(Misfit):
            product.bound(*wrong)


@compiles
def test_attention_of_one_token_checks_keys_values_and_mask() -> None:
    query, out = torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 16)
    keys = torch.zeros(2, 2, 20, 16)
    attending = OneToken(query, out, 0.3)
    attending(keys, keys.clone(), 20, torch.ones(2, 20, dtype=torch.bool))
    seen = torch.ones(2, 20, dtype=torch.bool)
    for wrong in (
        (keys, keys, 21, None),
        (keys[:1], keys[:1], 20, None),
        (keys[:, :1].contiguous(), keys[:, :1].contiguous(), 20, None),
        (keys, keys[:, :, :10].contiguous(), 10, None),
        (keys[..., :8].contiguous(), keys[..., :8].contiguous(), 20, None),
        (keys, keys.bfloat16(), 20, None),
        (keys[:, :, ::2], keys[:, :, ::2], 10, None),
        (keys, keys.clone(), 20, seen[:, :19]),
        (keys, keys.clone(), 20, seen[:1]),
        (keys, keys.clone(), 20, seen.float()),
    ):
        with pytest.raises(Misfit):
            attending(*wrong)
    for wrong_query in (query[:1], query.bfloat16(), query[..., :8], query.view(2, -1)):
        with pytest.raises(Misfit):
            OneToken(wrong_query, out, 0.3)
    angles = torch.zeros(2, 8), torch.zeros(2, 7)
    with pytest.raises(Misfit):
        OneToken(torch.zeros(2, 10 * 16), out, 0.3, angles)


@compiles
@pytest.mark.parametrize("queries", [1, 7])
def test_heads_that_do_not_share_keys_evenly_are_not_ours(queries: int) -> None:
    """Six heads of queries and four of keys: the last ones would read keys that there are none of."""
    query, key = torch.randn(1, 6, queries, 16), torch.randn(1, 4, 9, 16)
    with pytest.raises(RuntimeError):
        attend(Module(False), query, key, key, None)


@compiles
def test_attention_of_many_tokens_checks_its_mask() -> None:
    query, key = torch.randn(2, 4, 7, 16), torch.randn(2, 4, 9, 16)
    for shape in ((2, 1, 7, 9), (1, 1, 7, 9), (2, 1, 1, 9), (1, 1, 1, 9)):
        attention._of_many(torch.zeros(2, 7, 4, 16), query, key, key, torch.ones(shape, dtype=torch.bool), 1.0, False)
    for shape in ((2, 1, 7, 5), (2, 1, 3, 9), (3, 1, 7, 9), (2, 1, 7, 100)):
        with pytest.raises((Misfit, RuntimeError)):
            attention._of_many(
                torch.zeros(2, 7, 4, 16), query, key, key, torch.ones(shape, dtype=torch.bool), 1.0, False
            )
    for out in (torch.zeros(2, 7, 4, 8), torch.zeros(1, 7, 4, 16), torch.zeros(2, 7, 4, 16).bfloat16()):
        with pytest.raises(Misfit):
            attention._of_many(out, query, key, key, None, 1.0, False)
    with pytest.raises(Misfit):
        attention._of_many(torch.zeros(2, 7, 4, 16), query, key, key.bfloat16(), None, 1.0, False)


@compiles
def test_a_decoders_kernels_check_norms_and_cache(engines: Callable[[str], Any]) -> None:
    decoder = engines("llava-llama").network.get_decoder()
    way = vars(decoder)["forward"]
    layer = way._layers[0]
    buffers = _Buffers(layer, (2, 3), torch.float32)
    for weight in (torch.ones(63), torch.ones(64).bfloat16(), torch.ones(128)[::2]):
        norm = type(decoder.norm)(64)
        norm.weight.data = weight
        with pytest.raises(Misfit):
            buffers.norm(norm)
    heads, width = layer.heads[1], layer.width
    right = torch.zeros(2, heads, 5, width)
    _turn(buffers, layer, right, right.clone(), 2)
    for keys, begin in (
        (right, 3),
        (right[:1], 2),
        (right[:, :1].contiguous(), 2),
        (right[..., :16].contiguous(), 2),
        (right.bfloat16(), 2),
        (torch.zeros(2, heads, 10, width)[:, :, ::2], 2),
    ):
        with pytest.raises(Misfit):
            _turn(buffers, layer, keys, keys, begin)


@compiles
def test_a_towers_kernels_check_norms(engines: Callable[[str], Any]) -> None:
    network = engines("llava-llama").network
    way = next(
        way for layer in network.modules() if isinstance(way := vars(layer).get("forward"), vision_layer.TowerLayer)
    )
    x = torch.zeros(1, 5, 64)
    norm = torch.nn.LayerNorm(64)
    way._norm(norm, x, torch.zeros_like(x))
    for part, tensor in (("weight", torch.ones(63)), ("bias", torch.ones(64).bfloat16()), ("bias", torch.ones(8))):
        wrong = torch.nn.LayerNorm(64)
        getattr(wrong, part).data = tensor
        with pytest.raises(Misfit):
            way._norm(wrong, x, torch.zeros_like(x))
    for out in (torch.zeros(1, 4, 64), torch.zeros(1, 5, 32), x.bfloat16()):
        with pytest.raises(Misfit):
            way._norm(norm, x, out)


@compiles
def test_heads_that_do_not_share_keys_evenly_are_no_decoder_of_ours() -> None:
    from transformers import LlamaConfig, LlamaModel

    for key_heads, ours in ((3, True), (4, False)):
        config = LlamaConfig(
            hidden_size=192,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=6,
            num_key_value_heads=key_heads,
            head_dim=32,
        )
        with torch.device("meta"):
            assert suits(LlamaModel(config)) == ours


# ---------------------------------------------------------------- machine code


@compiles
def test_machine_code_that_others_may_have_written_is_not_run(tmp_path: Path) -> None:
    folder, made = compiler.kernel_cache(), []

    def make() -> bytes:
        made.append(b"right")
        return b"right"

    def got() -> bytes:
        return compiler._kept("name", make)

    assert (got(), got(), len(made)) == (b"right", b"right", 1)
    (path,) = folder.iterdir()
    assert (path.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o600, 0o700)
    evil = compiler._digest(b"evil").encode() + b"\nevil"
    (theirs := tmp_path / "theirs").write_bytes(evil)
    path.write_bytes(evil)
    path.chmod(0o620)
    assert (got(), len(made)) == (b"right", 2)
    path.unlink()
    path.symlink_to(theirs)
    assert (got(), len(made)) == (b"right", 3)
    assert theirs.read_bytes() == evil
    path.write_bytes(evil)
    folder.chmod(0o777)
    assert (got(), len(made), folder.stat().st_mode & 0o777) == (b"right", 4, 0o700)
