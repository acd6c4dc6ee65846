"""What a CPU does faster says what the plain way says, and steps aside where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from test_engine import CONVERSATIONS

from llava_cli import Conversation, Sampling, load
from llava_cli.engine import attention
from llava_cli.engine.attention import NAME, attend
from llava_cli.engine.fast import as_transformers, unused_layers
from llava_cli.engine.int8 import Head, Products
from llava_cli.engine.local import LocalEngine
from llava_cli.engine.nf4 import Kernel, kernel_of

Plainly = Callable[..., LocalEngine]
SAMPLING = Sampling(max_tokens=12)


def logits(engine: LocalEngine, conversation: Conversation) -> torch.Tensor:
    """After the prompt's last token."""
    with torch.inference_mode():
        return engine.network(**engine.inputs(conversation)).logits[0, -1].float()


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Plainly:
    """Loads a model without anything that is ours to make it faster."""

    def get(name: str, precision: str) -> LocalEngine:
        with monkeypatch.context() as patch:
            patch.setenv("LLAVA_FAST", "0")
            return load(name, precision=precision, device="cpu")

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_in_fp32_is_the_same(
    family: str,
    plainly: Plainly,
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


@pytest.mark.parametrize("precision, bound", [("bf16", 0.01), ("4bit", 0.15)])
def test_logits_are_within_bounds(precision: str, bound: float, plainly: Plainly, drawing: Path) -> None:
    """Of their own norm: bf16 rounds to 0.4 %, 8-bit activations to 1.2 % a layer."""
    from llava_cli import open_picture

    talk = Conversation().ask("what is this?", [open_picture(str(drawing))])
    fast = load("builtin", precision=precision, device="cpu")
    one, other = logits(fast, talk), logits(plainly("builtin", precision), talk)
    assert (one - other).norm() < bound * other.norm()
    assert one.argmax() == other.argmax()


def test_prompts_are_read_in_8_bits_only_where_weights_have_4(plainly: Plainly) -> None:
    def ways(engine: LocalEngine) -> set[type]:
        return {type(m.__dict__.get("forward")) for m in engine.network.modules()} - {type(None)}

    assert ways(load("builtin", precision="4bit", device="cpu")) == {Products, Head}
    assert ways(load("builtin", precision="bf16", device="cpu")) == set()
    assert ways(plainly("builtin", "4bit")) == set()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("tokens", [(1, 1), (3,), (2, 40)])
def test_4_bit_kernel_says_what_bitsandbytes_says(tokens: tuple[int, ...], double: bool, bias: bool) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(0)
    options = {"compress_statistics": double, "quant_type": "nf4"}
    layer: Any = Linear4bit(128, 96, bias=bias, compute_dtype=torch.bfloat16, **options).eval()
    weight = torch.randn(96, 128, dtype=torch.bfloat16)
    layer.weight = Params4bit(weight, requires_grad=False, module=layer, **options).to("cpu")  # type: ignore[arg-type]
    with torch.inference_mode():
        kernel = kernel_of(layer)
        if not torch.cpu._is_avx512_bf16_supported():
            assert kernel is None
            return
        assert kernel
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(*tokens, 128, dtype=dtype)
            assert torch.equal(kernel(x), layer(x))
        turned = torch.randn(128, 5, dtype=torch.bfloat16).t()
        assert torch.equal(kernel(turned), layer(turned.contiguous()))


def test_head_in_8_bits() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(128, 500, bias=False, dtype=torch.bfloat16)
    head = Head(plain)
    with torch.inference_mode():
        one, many = (torch.randn(1, n, 128, dtype=torch.bfloat16) for n in (1, 3))
        assert head(one).shape == (1, 1, 500)
        assert (head(one) - plain(one)).norm() < 0.02 * plain(one).norm()
        assert torch.equal(head(many), plain(many))


def test_4_bit_kernel_is_left_where_weights_are_others(monkeypatch: pytest.MonkeyPatch, drawing: Path) -> None:
    from bitsandbytes import cextension

    monkeypatch.setattr(cextension, "lib", object())
    engine = load("builtin", precision="4bit", device="cpu")
    assert not any(
        isinstance(way.few, Kernel) for way in map(vars_forward, engine.network.modules()) if type(way) is Products
    )
    assert engine.ask(str(drawing), "what color is the circle?") == "red"


def vars_forward(module: torch.nn.Module) -> Any:
    """What stands in a layer's place."""
    return vars(module).get("forward")


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
        logits(engines(family), CONVERSATIONS["one"])
        for hook in hooks:
            hook.remove()
        return len(calls)

    assert computed() == 0
    with as_transformers(network):
        assert bool(computed()) == bool(unused)
    assert computed() == 0


def test_no_8_bits_where_memory_is_short(monkeypatch: pytest.MonkeyPatch, drawing: Path) -> None:
    monkeypatch.setattr("llava_cli.engine.int8.free_memory", lambda device: 1_000_000)
    engine = load("builtin", precision="4bit", device="cpu")
    assert not any(isinstance(m.__dict__.get("forward"), Products) for m in engine.network.modules())
    assert engine.ask(str(drawing), "what color is the circle?") == "red"


class Module(torch.nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.is_causal = causal


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", ["none", "true", "numbers"])
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("heads, key_heads", [(4, 4), (6, 2)])
def test_plain_products_are_attention(
    heads: int, key_heads: int, queries: int, mask: str, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against torch's own: keys with room behind them, more rows than fit at a time, padding in one."""
    monkeypatch.setattr(attention, "FEW", 0)
    monkeypatch.setattr(attention, "SCORES", heads * queries * 20 * 2)
    torch.manual_seed(0)
    rows, keys, width = 5, 13, 8
    query = torch.randn(rows, heads, queries, width)
    key, value = (torch.randn(rows, key_heads, 20, width)[:, :, :keys] for _ in range(2))
    seen = torch.ones(rows, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    seen[2, :, :, :4] = False
    given = {"none": None, "true": seen, "numbers": torch.zeros(seen.shape).masked_fill(~seen, -1e9)}[mask]
    by_itself = torch.ones_like(seen).tril(keys - queries) if causal and queries > 1 else None
    key_of, value_of = (part.repeat_interleave(heads // key_heads, 1) for part in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key_of, value_of, attn_mask=by_itself if given is None else seen
    )
    found, _ = attend(Module(causal), query, key, value, given)
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-5)
