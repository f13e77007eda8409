"""A GPU that exists only in Python: shapes, devices and storages are real, numbers are not.

Its tensors are torch's fake ones on a PrivateUse1 device, so that what mixes devices raises and the real code runs at the shapes of
an 8B model in seconds. What is on the CPU (token ids, labels) stays real. A dispatch mode counts what a GPU would be asked for.

The device is registered for a whole process, for good: use it in one of its own (``python tests/fake_device``).
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fakegpu"
READS = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero")
UNKNOWN_SIZES = ("aten::nonzero", "aten::masked_select")  # for which the host waits, and which nothing can stand in for here
FUSED = ("silu_backward", "gelu_backward")  # kernels that CUDA has and torch takes apart for a device without them
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view", "lift_fresh", "set_")
LARGE = 2**22  # numbers
_KERNELS = torch.library.Library("aten", "IMPL")


def register_device() -> None:
    """Let torch know the device, in this process and for good, with the fused kernels that CUDA has."""
    _setup_privateuseone_for_python_backend(NAME)
    for name in FUSED:
        _KERNELS.impl(name, _never_called, "PrivateUse1")
    _KERNELS.impl("scaled_dot_product_attention", _attend, "AutogradPrivateUse1")


def _never_called(*arguments: Any) -> Any:
    raise AssertionError("tensors of this device have no numbers")


def _attend(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: Any = None,
    enable_gqa: bool = False,
) -> Any:
    """What CUDA takes without cuDNN: flash attention, and behind a mask the memory-efficient kernel."""
    ops = torch.ops.aten
    if attn_mask is None:
        return ops._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    is_trained = torch.is_grad_enabled() and query.requires_grad
    return ops._scaled_dot_product_efficient_attention(query, key, value, mask, is_trained, dropout_p, is_causal, scale=scale)[0]


@dataclass
class Counts:
    """What a run asked of the device.

    Attributes:
        reads: numbers taken out of it, for each of which the host waits: ``.item()``, ``bool()``, ``torch.equal``.
        to_host, to_device: copies, of a tensor each.
        launches: operations that are kernels there, by name in ``kernels``; views and allocations are none.
        moved: bytes that these read and write at least: their inputs and outputs.
        live, peak: bytes of all storages on the device, now and at most.
    """

    reads: int = 0
    to_host: int = 0
    to_device: int = 0
    launches: int = 0
    moved: int = 0
    live: int = 0
    peak: int = 0
    kernels: Counter[str] = field(default_factory=Counter)


class FakeDevice(TorchDispatchMode):
    """Inside, tensors can be on the device, and ``counts`` tells what was asked of it since ``restart``."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self._fake = FakeTensorMode()
        self._seen: dict[int, weakref.ref[Any]] = {}

    def restart(self) -> None:
        """Count anew; what is there counts as there."""
        live = self.counts.live
        self.counts = Counts(live=live, peak=live)

    def put(self, model: Any, device: str = NAME) -> None:
        """Give a module that was made on torch's meta device tensors of this one, in the shapes and dtypes that it has."""
        for module in model.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    module._parameters[name] = nn.Parameter(torch.empty_like(value, device=device), requires_grad=False)
            for name, value in module._buffers.items():
                if value is not None:
                    module._buffers[name] = torch.empty_like(value, device=device)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name, keywords = function._schema.name, keywords or {}
        if name == "prim::device":  # asked often
            return getattr(arguments[0], "fake_device", None) or function(*arguments)
        tensors = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, torch.Tensor)]
        own = [value for value in tensors if isinstance(value, FakeTensor)]
        target = torch.device(keywords["device"]).type if keywords.get("device") is not None else None
        if not own and target in (None, "cpu", "meta"):
            return function(*arguments, **keywords)
        if name in READS:
            return self._read(name, own[0])
        if name in UNKNOWN_SIZES:
            raise AssertionError(f"{name} on the device: its size is not known without the numbers, for which the host waits")
        if name == "aten::_to_copy" and target == "cpu":
            self.counts.to_host += 1
            return _on_host(own[0].shape, keywords.get("dtype") or own[0].dtype)
        if name == "aten::copy_" and not isinstance(arguments[0], FakeTensor):
            self.counts.to_host += 1
            return arguments[0]
        with self._fake:
            outputs = function(*tree_map(self._as_fake, arguments), **tree_map(self._as_fake, keywords))
        self._count(function, tensors, own, [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, FakeTensor)])
        return outputs

    def _as_fake(self, value: Any) -> Any:
        """What is on the CPU without its numbers: of a single one torch would go on computing with it."""
        is_real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
        return self._fake.from_tensor(value) if is_real else value

    def _read(self, name: str, value: torch.Tensor) -> Any:
        """A number that no branch takes for a fault: 1, or True."""
        self.counts.reads += 1
        if name != "aten::_local_scalar_dense" or value.dtype == torch.bool:
            return True
        return 1.0 if value.dtype.is_floating_point else 1

    def _count(self, function: Any, inputs: list[Any], own: list[Any], outputs: list[Any]) -> None:
        for value in outputs:
            self._watch(value.untyped_storage())
        name = function._schema.name.removeprefix("aten::")
        if name in ("_to_copy", "copy_") and len(own) < len(inputs):
            self.counts.to_device += 1
            return
        is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in function._schema.returns)
        if is_view or name in FREE:
            return
        self.counts.launches += 1
        self.counts.kernels[name] += 1
        self.counts.moved += sum(value.nbytes for value in own) + sum(value.nbytes for value in outputs)

    def _watch(self, storage: Any) -> None:
        """Count a new storage as there until nothing refers to it."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def forget(_: Any) -> None:
            del self._seen[key]
            self.counts.live -= size

        self._seen[key] = weakref.ref(storage, forget)
        self.counts.live += size
        self.counts.peak = max(self.counts.peak, self.counts.live)


def _on_host(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """What a copy gives: ones, of which a large tensor has a single one in memory."""
    return torch.ones(shape, dtype=dtype) if shape.numel() < LARGE else torch.ones((), dtype=dtype).expand(shape)
