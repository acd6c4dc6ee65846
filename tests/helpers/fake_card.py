"""A GPU that is none: tensors that say they are on a `card:0`, and have their values in the host's memory.

It minds what a GPU minds: an operation on tensors of both devices raises, unless it copies, as torch's would; single
numbers may go along. What makes the host wait for the device is counted. It is one of torch's backends in Python, for
the thread that is within `on_card`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "card"
ALIASES = {"_local_scalar_dense": "item", "is_nonzero": "item", "_to_copy": "to"}
"""In inference mode torch calls some operations by the names of those that they consist of."""
WAITS = ("item", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "multinomial")
"""Operations for which the host needs a value or a shape that only the device knows; the last looks for such within."""
INDEXING = ("index", "index_put_", "_index_put_impl_")
"""With a mask among the indices they wait for how much is true in it. Indices may be in the host's memory."""
COPIES = ("copy_", "to", *INDEXING)
"""Operations that take tensors of the host's memory."""
waits: Counter[str] = Counter()
"""By operation, since somebody cleared it."""


class CardTensor(torch.Tensor):
    """A tensor on the card."""

    host: torch.Tensor
    """Its values."""

    @staticmethod
    def __new__(cls: type[CardTensor], host: torch.Tensor) -> CardTensor:
        with torch.inference_mode(False):  # a view of a tensor from outside of it must not be of its kind
            tensor: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, host.shape, host.stride(), host.storage_offset(), dtype=host.dtype, device=torch.device(NAME, 0)
            )
        tensor.host = host
        return tensor  # type: ignore[no-any-return]

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"on {NAME}: {self.host}"

    def __format__(self, form: str) -> str:
        return format(self.item(), form) if self.dim() == 0 else repr(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:  # which chooses a kernel by the device
            _mind_devices(func.__name__, (args, kwargs))
            return CardTensor(func(*_on_host(args), **_on_host(kwargs)))
        if func is torch.Tensor.tolist:
            waits["tolist"] += 1
            return args[0].host.tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _on_host(args: Any) -> Any:
    def host(x: Any) -> Any:
        if isinstance(x, torch.device):
            return torch.device("cpu") if x.type == NAME else x
        return x.host if isinstance(x, CardTensor) else x

    return tree_map(host, args)


def _mind_devices(name: str, args: Any) -> None:
    tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
    places = {isinstance(x, CardTensor) for x in tensors if x.dim() or isinstance(x, CardTensor)}
    if len(places) > 1 and name not in COPIES:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {NAME}:0 and cpu")


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Computes in the host's memory; what comes out is on the card if the tensors are, or else the `device` is."""
    name, device = func.overloadpacket.__name__, kwargs.get("device")
    name = ALIASES.get(name, name)
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, CardTensor)]
    is_on_card = goes_to_card = bool(given)
    if device is not None:
        goes_to_card = torch.device(device).type == NAME
    if is_on_card:
        _mind_devices(name, (args, kwargs))
        has_mask = name in INDEXING and any(x.dtype == torch.bool for x in tree_leaves(args[1]) if x is not None)
        goes_to_host = not goes_to_card or (name == "copy_" and not isinstance(args[0], CardTensor))
        if name in WAITS or has_mask or goes_to_host:
            waits[name] += 1
    out = func(*_on_host(args), **_on_host(kwargs))
    wrappers = {id(x.host): x for x in given}  # an operation in place returns what it was given

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or (name == "copy_" and x is args[0]):
            return x
        if id(x) in wrappers:
            return wrappers[id(x)]
        return CardTensor(x.clone() if args and x is args[0] else x)

    return tree_map(wrapped, out) if goes_to_card else out


class _NewTensors(TorchDispatchMode):
    """Makes tensors on the card where they are asked for there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, dict(kwargs or {}))


@cache
def _register() -> None:
    """Makes the device known to torch, once; whoever looks for a GPU does not find it."""

    class Hooks(torch._C._acc.PrivateUse1Hooks):  # type: ignore[name-defined, misc]
        def is_available(self) -> bool:
            return False

        def has_primary_context(self, index: int) -> bool:
            return False

        def is_built(self) -> bool:
            return False

    backend_registration._setup_privateuseone_for_python_backend(NAME, hook=Hooks())


@contextmanager
def on_card(model: torch.nn.Module) -> Iterator[None]:
    """Within, a model's weights are on the card, and this thread can make tensors there."""
    _register()
    before = []
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            before.append((module, name, weight))
            setattr(module, name, torch.nn.Parameter(CardTensor(weight.detach()), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            before.append((module, name, buffer))
            setattr(module, name, CardTensor(buffer))
    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(…, device=)` asks for its copy where we can see it
    try:
        with _NewTensors():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
        for module, name, tensor in before:
            setattr(module, name, tensor)
