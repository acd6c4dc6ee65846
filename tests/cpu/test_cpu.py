"""What a CPU does faster says what the plain way says, and steps aside where it cannot."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from types import FunctionType
from typing import Any

import pytest
import torch
from helpers.engines import CONVERSATIONS
from helpers.families import FAMILIES
from helpers.linear_layers import Module, eight_bits, four_bits, sixteen_bits

from llava_cli import Conversation, Sampling, load, open_picture
from llava_cli.engine.cpu import attention, decoder, decoder_passes, onednn_linear, quantized_linear
from llava_cli.engine.cpu import dense_linear as plain
from llava_cli.engine.cpu import patch as fast
from llava_cli.engine.cpu import vision_layer as tower
from llava_cli.engine.cpu.attention import NAME, OneToken, attend
from llava_cli.engine.cpu.decoder import Decoder, Group, suits
from llava_cli.engine.cpu.decoder_passes import Step, bound
from llava_cli.engine.cpu.dense_linear import Plain
from llava_cli.engine.cpu.jit import FEW, chain, compiler
from llava_cli.engine.cpu.jit.builder import KINDS, Kind
from llava_cli.engine.cpu.jit.compiler import kinds_here
from llava_cli.engine.cpu.lm_head import Head
from llava_cli.engine.cpu.onednn_linear import Products, as_they_are, weights_of, whole_numbers
from llava_cli.engine.cpu.packed_weights import Arranged
from llava_cli.engine.cpu.patch import Joined, _quick_gelu, as_transformers, joined, unused_layers
from llava_cli.engine.cpu.quantized_linear import Room, Tiled, in_tiles, joined_bias
from llava_cli.engine.cpu.vision_layer import TowerLayer
from llava_cli.engine.forward import Forward
from llava_cli.engine.kv_cache import ROOM, RoomyCache
from llava_cli.engine.local import LocalEngine
from llava_cli.models.registry import kernel_cache
from llava_cli.settings import Precision

Plainly = Callable[..., LocalEngine]
SAMPLING = Sampling(max_tokens=12)
COMPILED = attention, decoder, fast, onednn_linear, decoder_passes, plain, quantized_linear, tower
"""Where kernels are used."""


def logits(engine: LocalEngine, conversation: Conversation) -> torch.Tensor:
    """After the prompt's last token."""
    return engine.logits(engine.inputs(conversation))[0].float()


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Plainly:
    """Loads a model without anything that is ours to make it faster."""

    def get(name: str, precision: str) -> LocalEngine:
        with monkeypatch.context() as patch:
            patch.setenv("LLAVA_FAST", "0")
            return load(name, precision=precision, device="cpu")

    return get


@pytest.fixture(params=["ours", "torch's"])
def either_attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many tokens."""
    monkeypatch.setattr(attention, "_torchs_is_faster", lambda dtype, keys: request.param == "torch's")


@pytest.fixture(params=["this CPU", "another CPU", "AMX"])
def each_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the best instructions that it has, with those that any has, and with the products that suit AMX."""
    if request.param == "another CPU":
        for module in COMPILED:
            monkeypatch.setattr(module, "kinds_here", lambda: kinds_here()[-1:])
    monkeypatch.setattr(onednn_linear, "suits_here", lambda: request.param == "AMX")


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_in_fp32_is_the_same(
    family: str,
    plainly: Plainly,
    either_attention: None,
    engines: Callable[[str], LocalEngine],
    checkpoint: Callable[[str], Path],
) -> None:
    fast, plain = engines(family), plainly(str(checkpoint(family)), "fp32")
    assert NAME in (fast.network.config._attn_implementation, fast.network.config.text_config._attn_implementation)
    assert plain.network.config._attn_implementation != NAME
    for conversation in (CONVERSATIONS["two"], CONVERSATIONS["turns"]):
        assert (
            fast.answer(conversation, Sampling(max_tokens=12)).text
            == plain.answer(conversation, Sampling(max_tokens=12)).text
        )


@pytest.mark.parametrize("precision, bound", [("bf16", 0.01), ("4bit", 0.15), ("8bit", 0.15)])
def test_logits_are_within_bounds(
    precision: str, bound: float, plainly: Plainly, drawing: Path, either_attention: None, each_cpu: None
) -> None:
    """Of their own norm: bf16 rounds to 0.4 %, 8-bit activations to 1.2 % a layer."""
    from llava_cli import open_picture

    talk = Conversation().ask("what is this?", [open_picture(str(drawing))])
    fast = load("builtin", precision=precision, device="cpu")
    one, other = logits(fast, talk), logits(plainly("builtin", precision), talk)
    assert (one - other).norm() < bound * other.norm()
    assert one.argmax() == other.argmax()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of rows of each step that is taken."""
    steps: list[int] = []
    take = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda self, x, *args: steps.append(len(x)) or take(self, x, *args))
    return steps


@pytest.mark.parametrize("precision, bound", [("fp32", 1e-5), ("bf16", 0.08), ("4bit", 0.25), ("8bit", 0.25)])
@pytest.mark.parametrize("family", ["llava-llama", "llava-next-mistral", "llava-onevision", "smolvlm"])
def test_a_step_says_what_reading_all_says(
    family: str,
    precision: Any,
    bound: float,
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    either_attention: None,
    each_cpu: None,
) -> None:
    """One token behind others, far enough for the cache to move. With such weights bf16 is 4 to 7 % off fp32 itself."""
    steps = counted(monkeypatch)
    engine = load(str(checkpoint(family)), precision=precision, device="cpu")
    torch.manual_seed(0)
    ids = torch.randint(3, 40, (1, ROOM + 25))
    engine.logits({"input_ids": ids[:, :20]})
    for end in range(21, ids.shape[1] + 1):
        found = engine.logits({"input_ids": ids[:, :end]})
    assert len(steps) == ids.shape[1] - 20
    engine.logits({"input_ids": ids[:, 1:]})  # lets go of the others
    expected = engine.logits({"input_ids": ids})
    assert len(steps) == ids.shape[1] - 20
    assert (found - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("precision, bound", [("fp32", 1e-5), ("bf16", 0.03), ("4bit", 0.1), ("8bit", 0.1)])
def test_a_step_of_several_rows_says_what_reading_all_says(
    precision: Precision,
    bound: float,
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    each_cpu: None,
) -> None:
    """Of different lengths, so that padding stands on the left of some."""
    engine = load(str(checkpoint("llava-llama")), precision=precision, device="cpu")
    forward, steps = Forward(engine.network), counted(monkeypatch)
    torch.manual_seed(0)
    ids, mask = torch.randint(3, 40, (5, 30)), torch.ones(5, 30, dtype=torch.bool)
    for row in range(1, 5):
        mask[row, : 3 * row] = False
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = RoomyCache()
    forward({"input_ids": ids[:, :20]}, cache, mask[:, :20], positions[:, :20])
    for end in range(21, 31):
        inputs = {"input_ids": ids[:, end - 1 : end]}
        found = forward(inputs, cache, mask[:, :end], positions[:, end - 1 : end])
    assert steps == [5] * 10
    expected = forward({"input_ids": ids}, RoomyCache(), mask, positions)
    assert (found - expected).norm() < bound * expected.norm()
    alone = torch.cat([engine.logits({"input_ids": ids[row : row + 1, 3 * row :]}) for row in range(5)])
    assert (found - alone).norm() < bound * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clips_activation_is_the_same_to_the_bit(dtype: torch.dtype) -> None:
    from transformers.activations import QuickGELUActivation

    x = 4 * torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(_quick_gelu(x), QuickGELUActivation()(x))


def test_a_decoder_of_another_kind_stays_as_it_is(plainly: Plainly) -> None:
    layers = plainly("builtin", "fp32").network.get_decoder()
    assert suits(layers)
    layers.config.hidden_act = "gelu"
    assert not suits(layers)
    assert not suits(torch.nn.Linear(1, 1))


def test_what_is_faster_is_there_for_what_it_suits(plainly: Plainly, monkeypatch: pytest.MonkeyPatch) -> None:
    def ways(engine: LocalEngine) -> set[type]:
        return {type(vars(m)["forward"]) for m in engine.network.modules() if "forward" in vars(m)}

    monkeypatch.setattr(Head, "LARGE", 0)
    four = load("builtin", precision="4bit", device="cpu")
    assert ways(four) == {Decoder, TowerLayer, Head, FunctionType}
    for precision in ("bf16", "fp32"):
        assert ways(load("builtin", precision=precision, device="cpu")) == {Decoder, TowerLayer, Plain, FunctionType}
    assert ways(plainly("builtin", "4bit")) == set()
    for amx in (True, False):
        monkeypatch.setattr(onednn_linear, "suits_here", lambda amx=amx: amx)
        assert ways(load("builtin", precision="8bit", device="cpu")) == {Decoder, TowerLayer, Head, FunctionType}
    monkeypatch.undo()
    assert ways(load("builtin", precision="4bit", device="cpu")) == {Decoder, TowerLayer, Plain, FunctionType}
    for module in COMPILED:
        monkeypatch.setattr(module, "kinds_here", lambda: ())
    assert ways(load("builtin", precision="fp32", device="cpu")) == {FunctionType}


def test_machine_code_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """For later processes, and made anew where its file is not whole, or nothing can be written."""
    make, written = partial(compiler._compile, chain.write, kinds_here()[0], False), chain._Chain
    make()
    (file,) = kernel_cache().iterdir()
    whole = file.read_bytes()
    monkeypatch.setattr(chain, "_Chain", None)
    make()
    file.write_bytes(whole[:-100])
    with pytest.raises(TypeError):
        make()
    monkeypatch.setattr(chain, "_Chain", written)
    make()
    assert file.read_bytes() == whole
    monkeypatch.setenv("LLAVA_CACHE", str(file))  # no folder
    make()


@contextmanager
def of_kind(number: int) -> Iterator[Kind]:
    """Within, that kind of this CPU's instructions, counted from the best, is the best."""
    kinds = kinds_here()
    if number >= len(kinds):
        pytest.skip("this CPU does not have so many kinds of instructions")
    with pytest.MonkeyPatch.context() as patch:
        for module in COMPILED:
            patch.setattr(module, "kinds_here", lambda: kinds[number:])
        yield kinds[number]


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("biases", [(True,), (False, False, False), (True, False)])
@pytest.mark.parametrize("make", [four_bits, partial(four_bits, double=True), eight_bits, sixteen_bits])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_of_tiles(kind: int, make: Any, biases: tuple[bool, ...], dtype: torch.dtype) -> None:
    """Each token by itself: one that is large takes nothing from the others, and one of zeros gives the bias."""
    torch.manual_seed(0)
    layers = [make(80 * (i + 1), bias) for i, bias in enumerate(biases)]
    with torch.inference_mode(), of_kind(kind) as its:
        product = Tiled(**in_tiles(layers), bias=joined_bias(layers))
        weights, bias = torch.cat(list(weights_of(layers))), joined_bias(layers)
        for shape in ((1, 1), (3,), (2, 40), (19,)):
            x = torch.randn(*shape, 128).mul_(torch.logspace(-2, 3, shape[-1])[:, None]).to(dtype)
            x.view(-1, 128)[1:2] = 0
            found = product(x)
            expected = torch.nn.functional.linear(x.float(), weights, None if bias is None else bias.float())
            assert found.dtype == dtype
            error = (found.float() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_(min=1e-6)
            assert error.max() < (0.012 if its.vnni else 0.02)
            out = torch.empty_like(found)
            for kernel in product.bound(x.view(-1, 128), out.view(-1, out.shape[-1]), Room()):
                kernel()
            assert torch.equal(out, found)
            assert torch.equal(product(x.mT.contiguous().mT), found)


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("make", [four_bits, eight_bits])
def test_products_of_tiles_do_not_overflow(kind: int, make: Any) -> None:
    """Where AVX2 adds the products of two neighbours in 16 bits."""
    with torch.inference_mode(), of_kind(kind):
        weight = torch.ones(32, 128).copysign(torch.arange(-16, 16)[:, None])
        product = Tiled(**in_tiles([make(32, False, weight)]))
        for x in (torch.ones(1, 128), torch.ones(3, 128), -torch.ones(10, 128)):
            assert torch.allclose(product(x), x @ weight.t(), rtol=1e-3)


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("make", [four_bits, eight_bits])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(wrong: float, dtype: torch.dtype, make: Any, kind: int) -> None:
    x = torch.ones(3, 128, dtype=dtype)
    x[1, 70] = wrong
    with torch.inference_mode(), of_kind(kind):
        found = Tiled(**in_tiles([make(32, True)]))(x)
    assert not found[1].isfinite().any()
    assert found[::2].isfinite().all()


@pytest.mark.parametrize("inputs", [100, 4304])
def test_products_of_tiles_where_columns_are_no_whole_blocks(inputs: int) -> None:
    """As in SigLIP's tower."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(inputs, 48)
    assert quantized_linear.suits([layer])
    with torch.inference_mode():
        x = torch.randn(2, 1500, inputs)
        found, expected = Tiled(**in_tiles([layer]), bias=layer.bias)(x), layer(x)
    assert (found - expected).norm() < 0.012 * expected.norm()


@pytest.mark.parametrize("options", [{"blocksize": 128}, {"quant_storage": torch.bfloat16}, {"quant_type": "fp4"}])
def test_products_of_tiles_with_weights_that_others_have_quantised(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = four_bits(32, False, **options)
    assert quantized_linear.suits([layer])
    with torch.inference_mode():
        x = torch.randn(7, 128)
        found, expected = Tiled(**in_tiles([layer]))(x), x @ next(weights_of([layer])).t()
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_products_of_tiles_of_several_threads() -> None:
    """Each has its own room for what it is given."""
    torch.manual_seed(0)
    product, inputs = Tiled(**in_tiles([sixteen_bits(512, False)])), torch.randn(8, 40, 128)
    expected = [product(x) for x in inputs]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(20):
            found = list(threads.map(product, inputs))
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_layers_of_other_shapes_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_linear, "suits_here", lambda: False)
    for make in (four_bits, eight_bits):
        assert joined([make(24, False)], "layer", True, Arranged()) is None
        assert joined([make(32, False)], "layer", False, Arranged()) is None  # it would be in memory twice
        assert isinstance(joined([make(32, False)], "layer", True, Arranged()), Tiled)


@pytest.mark.parametrize("biases", [(False,), (True, False, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_in_8_bits(biases: tuple[bool, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [four_bits(32 * (i + 2), bias) for i, bias in enumerate(biases)]
    x = torch.randn(2, 40, 128, dtype=dtype)
    x[0, 0] = 0
    given = x.clone()
    with torch.inference_mode():
        found = Products(**whole_numbers(layers), bias=joined_bias(layers))(x)
        expected = torch.cat([layer(given) for layer in layers], -1)
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert torch.equal(found[0, 0].bfloat16(), expected[0, 0].bfloat16())  # the biases
    assert torch.equal(x, given)


def test_products_in_8_bits_of_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is computed whole while another one has its sums, and nothing else yet."""
    torch.manual_seed(0)
    one, two = (Products(**whole_numbers([torch.nn.Linear(128, 64, bias=False)])) for _ in range(2))
    x, multiply = torch.randn(40, 128), torch._int_mm
    with torch.inference_mode():
        expected = one(x)

        def overtaken(*args: Any, **options: Any) -> torch.Tensor:
            sums = multiply(*args, **options)
            monkeypatch.setattr(torch, "_int_mm", multiply)
            other = Thread(target=two, args=(x,))
            other.start()
            other.join()
            return sums

        monkeypatch.setattr(torch, "_int_mm", overtaken)
        assert torch.equal(one(x), expected)


@pytest.mark.parametrize("biases", [(True,), (False, False, False), (True, False)])
@pytest.mark.parametrize("tokens", [(1,), (3,), (80,)])
def test_products_of_8_bits_are_bitsandbytes(biases: tuple[bool, ...], tokens: tuple[int, ...]) -> None:
    """Whose weights they take as they are: what it makes of them stays the same."""
    torch.manual_seed(0)
    layers = [eight_bits(32 * (i + 2), bias) for i, bias in enumerate(biases)]
    x = torch.randn(*tokens, 128, dtype=torch.bfloat16)
    with torch.inference_mode():
        exact = torch.nn.functional.linear(x.float(), torch.cat(list(weights_of(layers))), joined_bias(layers))
        products = Products(**as_they_are(layers), bias=joined_bias(layers))
        expected = torch.cat([layer(x) for layer in layers], -1)
        found, out = products(x), torch.empty_like(expected)
        for call in bound(Group(layers, lambda _: products), x[None], out[None], Room()):
            call()
    assert (found - exact).norm() < 0.02 * exact.norm()
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert torch.equal(out, found)


@pytest.mark.parametrize("bound, in_8_bits", [(0.15, False), (0.03, True)])
def test_head_is_exact_about_the_likeliest(bound: float, in_8_bits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Head, "LARGE", 0)
    torch.manual_seed(0)
    plain = torch.nn.Linear(128, 9600, bias=False, dtype=torch.bfloat16)
    head = Head.of(plain, Arranged(), in_8_bits)
    assert head
    with torch.inference_mode():
        one, many = (torch.randn(1, n, 128, dtype=torch.bfloat16) for n in (1, 3))
        found, exact = head(one)[0, 0], torch.nn.functional.linear(one.float(), plain.weight.float())[0, 0]
        assert (found - exact).norm() < bound * exact.norm()
        best, numbers = exact.topk(10)
        assert torch.equal(found.topk(10).indices, numbers)
        assert torch.allclose(found[numbers], best)
        assert torch.equal(head(many), plain(many))


@pytest.mark.parametrize(
    "other",
    [
        torch.nn.Linear(128, 500, bias=False, dtype=torch.bfloat16),
        torch.nn.Linear(96, 512, bias=False, dtype=torch.bfloat16),
        torch.nn.Linear(128, 512, dtype=torch.bfloat16),
        torch.nn.Identity(),
    ],
)
def test_other_heads_stay_as_they_are(other: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Head, "LARGE", 0)
    assert Head.of(other, Arranged(), in_8_bits=False) is None


@pytest.mark.parametrize("lacking", ["llvmlite", "OpenMP"])
def test_bitsandbytes_multiplies_where_nothing_can_be_compiled(
    lacking: str, monkeypatch: pytest.MonkeyPatch, drawing: Path
) -> None:
    if lacking == "llvmlite":
        monkeypatch.setitem(sys.modules, "llvmlite", None)
        monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    else:
        monkeypatch.setattr(compiler, "_openmp", lambda: None)
    for module in COMPILED:
        monkeypatch.setattr(module, "kinds_here", kinds_here.__wrapped__)
    monkeypatch.setattr(onednn_linear, "suits_here", lambda: False)
    engine = load("builtin", precision="4bit", device="cpu")
    assert not any(isinstance(vars(m).get("forward"), (Tiled, Head)) for m in engine.network.modules())
    assert engine.ask(str(drawing), "what color is the circle?") == "red"


@pytest.mark.parametrize(
    "family, unused", [("llava-llama", 1), ("llava-layers", 1), ("llava-full", 0), ("vip-llava", 1), ("smolvlm", 0)]
)
def test_vision_layers_that_nobody_sees_are_not_computed(
    family: str, unused: int, engines: Callable[[str], LocalEngine]
) -> None:
    """That the features stay the same is in the texts above, which are plain transformers' to the letter."""
    network = engines(family).network
    layers = unused_layers(network)
    assert len(layers) == unused

    def computed() -> int:
        norms = [part for layer in layers for part in layer.modules() if part is not layer]
        calls: list[int] = []
        hooks = [norm.register_forward_hook(lambda *_: calls.append(1)) for norm in norms]
        with torch.inference_mode():
            network(**engines(family).inputs(CONVERSATIONS["one"]))
        for hook in hooks:
            hook.remove()
        return len(calls)

    assert computed() == 0
    with as_transformers(network):
        assert bool(computed()) == bool(unused)
    assert computed() == 0


@pytest.mark.parametrize("precision", ["4bit", "8bit"])
def test_a_wide_vision_tower_sees_the_same_in_8_bits(
    precision: Precision, drawing: Path, monkeypatch: pytest.MonkeyPatch, each_cpu: None
) -> None:
    engine = load("builtin", precision=precision, device="cpu")
    ways = [vars(layer).get("forward") for layer in engine.network.modules()]
    layers = [way for way in ways if isinstance(way, TowerLayer)]
    assert len(layers) == 6
    assert {type(group.joined) for way in layers for group in (way._sources, way._out, way._first, way._second)} == {
        Joined
    }
    assert 0 < off(engine, drawing) < 0.04


@pytest.mark.parametrize("precision, bound", [("fp32", 1e-5), ("bf16", 0.02)])
@pytest.mark.parametrize("family", ["llava-llama", "llava-onevision"])
def test_towers_of_clip_and_siglip_see_the_same(
    family: str, precision: Precision, bound: float, checkpoint: Callable[[str], Path], drawing: Path, each_cpu: None
) -> None:
    engine = load(str(checkpoint(family)), precision=precision, device="cpu")
    assert any(isinstance(vars(layer).get("forward"), TowerLayer) for layer in engine.network.modules())
    assert off(engine, drawing) < bound


def off(engine: LocalEngine, drawing: Path) -> float:
    """How far features are off those that transformers finds, of their own norm."""
    inputs = engine.inputs(Conversation().ask("what is this?", [open_picture(str(drawing))]))
    tower = engine.network.model.vision_tower

    def features() -> torch.Tensor:
        with torch.inference_mode():
            pixels = inputs["pixel_values"].flatten(end_dim=-4)
            found: torch.Tensor = tower(pixels, output_hidden_states=True).hidden_states[-2]
            return found.float()

    found = features()
    with as_transformers(engine.network):
        expected = features()
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).mean())


def test_no_copies_in_8_bits_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, drawing: Path, each_cpu: None
) -> None:
    monkeypatch.setattr("llava_cli.engine.cpu.onednn_linear.free_memory", lambda device: 1_000_000)
    engine = load("builtin", precision="4bit", device="cpu")
    groups = [
        group
        for layer in vars(engine.network.get_decoder())["forward"]._layers
        for group in (layer.sources, layer.down)
    ]
    assert {type(group.joined) for group in groups} == {Tiled}
    assert engine.ask(str(drawing), "what color is the circle?") == "red"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", ["none", "true", "numbers", "one for all"])
@pytest.mark.parametrize("queries", [1, 13, 7])
@pytest.mark.parametrize("heads, key_heads, width", [(4, 4, 8), (4, 4, 16), (6, 2, 80)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 0.004)])
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_our_attention_is_torchs(
    kind: int,
    dtype: torch.dtype,
    bound: float,
    heads: int,
    key_heads: int,
    width: int,
    queries: int,
    mask: str,
    causal: bool,
    either_attention: None,
) -> None:
    """With room behind keys, and padding in one row; compiled where heads suit."""
    torch.manual_seed(0)
    rows, keys = 5, 13
    query = torch.randn(rows, heads, queries, width).to(dtype)
    key, value = (torch.randn(rows, key_heads, 20, width)[:, :, :keys].to(dtype) for _ in range(2))
    shown = torch.ones(rows, 1, 1, keys, dtype=torch.bool)
    shown[2, :, :, :4] = False
    earlier = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    seen = shown & earlier
    given = {
        "none": None,
        "true": seen,
        "numbers": torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -1e9),
        "one for all": shown,
    }[mask]
    by_itself = earlier if causal and queries > 1 else torch.ones_like(earlier)
    exact = {"none": by_itself.expand(rows, 1, -1, -1), "one for all": shown & by_itself}.get(mask, seen)
    key_of, value_of = (part.float().repeat_interleave(heads // key_heads, 1) for part in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query.float(), key_of, value_of, attn_mask=exact)
    with of_kind(kind):
        found, _ = attend(Module(causal, heads // key_heads), query, key, value, given)
    # A query that sees nothing, padding itself, may find anything but what is no number.
    sees, found = exact.any(-1).expand(rows, heads, -1), found.transpose(1, 2).float()
    assert found.isfinite().all()
    assert (found - expected)[sees].norm() < bound * expected[sees].norm()


@pytest.mark.parametrize("rows, heads, key_heads, tokens, width", [(2, 4, 4, 65, 32), (1, 8, 2, 130, 64)])
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_attention_of_many_tokens(kind: int, rows: int, heads: int, key_heads: int, tokens: int, width: int) -> None:
    """As projections make them, token by token, with threads; of keys that share a register with what comes later."""
    torch.manual_seed(0)
    query = torch.randn(rows, tokens, heads, width).transpose(1, 2)
    key, value = (torch.randn(rows, tokens, key_heads, width).transpose(1, 2) for _ in range(2))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    with of_kind(kind):
        found, _ = attend(Module(True), query, key, value, None)
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 0.004)])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    "shape, room, tokens",
    [
        ((1, 4, 1, 64), 40, 33),
        ((3, 2, 4, 32), 64, 64),
        ((2, 2, 3, 128), 700, 661),
        ((1, 2, 1, 80), 19, 1),
        ((1, 1, 3, 256), 9, 7),
    ],
)
def test_attention_of_one_token(
    shape: tuple[int, ...], room: int, tokens: int, masked: bool, dtype: torch.dtype, bound: float, kind: int
) -> None:
    """Padding stands before tokens, and between them."""
    torch.manual_seed(0)
    with of_kind(kind):
        query, (rows, heads, _, width) = torch.randn(shape).to(dtype), shape
        keys, values = (torch.randn(rows, heads, room, width).to(dtype) for _ in range(2))
        seen = torch.rand(rows, tokens) > 0.3
        seen[:, -1], seen[0, : tokens // 2] = True, False
        out = torch.empty_like(query)
        OneToken(query, out, 0.3)(keys, values, tokens, seen if masked else None)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.float(),
        keys[:, :, :tokens].float(),
        values[:, :, :tokens].float(),
        attn_mask=seen[:, None, None] if masked else None,
        scale=0.3,
    )
    assert (out.float() - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 0.004)])
@pytest.mark.parametrize("inputs, outputs", [(64, 4), (128, 100), (1024, 512)])
def test_a_plain_layer_for_few_tokens(
    inputs: int, outputs: int, dtype: torch.dtype, bound: float, bias: bool, kind: int
) -> None:
    """What becomes of one is the same to the bit whatever stands beside it."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(inputs, outputs, bias, dtype=dtype)
    with torch.inference_mode(), of_kind(kind):
        product = Plain.of(layer)
        assert product
        few, many = (torch.randn(1, tokens, inputs, dtype=dtype) for tokens in (FEW - 1, FEW + 1))
        found, exact = product(few), few.float() @ layer.weight.float().t() + (layer.bias.float() if bias else 0)
        assert (found - exact).norm() < bound * exact.norm()
        assert torch.equal(product(few[:, 5:6]), found[:, 5:6])
        assert torch.equal(product(many), layer(many))


def test_other_layers_are_not_plain() -> None:
    linear = partial(torch.nn.Linear, dtype=torch.bfloat16)
    for layer in (linear(64, 6), linear(60, 4), linear(64, 4).half()):
        assert Plain.of(layer) is None
    assert Plain.of(four_bits(32, False)) is None


def test_attention_of_one_token_of_what_is_not_in_one_piece() -> None:
    torch.manual_seed(0)
    query = torch.randn(3, 4, 7, 16)[:, :, -1:]  # the last of a prompt's
    both = torch.randn(3, 9, 4, 32).transpose(1, 2)
    key, value = both[..., :16], both[..., 16:]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    assert torch.allclose(attend(Module(True), query, key, value, None)[0], expected, atol=1e-5)
    wide = torch.randn(3, 4, 9, 32)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, wide).transpose(1, 2)
    assert torch.allclose(attend(Module(True), query, key, wide, None)[0], expected, atol=1e-5)


def test_a_step_where_nothing_can_be_compiled(monkeypatch: pytest.MonkeyPatch, drawing: Path) -> None:
    for module in COMPILED:
        monkeypatch.setattr(module, "kinds_here", lambda: ())
    for precision in ("fp32", "bf16", "8bit"):
        engine = load("builtin", precision=precision, device="cpu")
        assert engine.ask(str(drawing), "what color is the circle?") == "red"
