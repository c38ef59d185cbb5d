"""Work and memory of one forward, counted on the meta device: shapes only, nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flowgrpo_fast.precision.formats import SCALED_MM

_aten = torch.ops.aten
_PRODUCTS = (_aten.bmm, _aten.baddbmm)
# What selective checkpointing keeps, beside attention.
_KEPT = (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.convolution)


def _scaled_mm_flops(x: list[int], *other: Any, out_shape: list[int], **rest: Any) -> int:
    return 2 * math.prod(out_shape) * x[-1]


# torch counts the product that came before this one.
_LOW_PRECISION = dict.fromkeys((_aten._scaled_mm_v2, SCALED_MM.overloadpacket), _scaled_mm_flops)


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs of one forward of one row; a multiply and an add are two."""

    linear: float = 0.0  # products with weights: linear layers and convolutions
    attention: float = 0.0  # softmax attention
    products: float = 0.0  # other products of two activations, as in linear attention
    adapted: float = 0.0  # the part of `linear` in layers that carry an adapter

    @property
    def forward(self) -> float:
        """All of it."""
        return self.linear + self.attention + self.products

    def backward(self, trained_share: float = 0.0) -> float:
        """Gradients of the activations, and of `trained_share` of the weights (0: adapters alone; 1: all).

        A linear layer's backward costs its forward once for each; flash attention, which computes its scores again,
        2.5 times its forward.
        """
        return (1 + trained_share) * self.linear + 2.5 * self.attention + 2 * self.products


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes that one row of a forward keeps for its backward, in eager mode, without fused blocks."""

    all: float  # no checkpointing
    selective: float  # outputs of linear layers and attention, and each block's inputs
    full: float  # each block's inputs
    block: float  # of the largest block alone: what exists besides while it is computed again

    def kept(self, checkpointing: str) -> float:
        """At most at once, with checkpointing "none", "selective" or "full"."""
        return {"none": self.all, "selective": self.selective + self.block, "full": self.full + self.block}[
            checkpointing
        ]


class _Attention(TorchFunctionMode):
    """Counts scaled dot-product attention; on the meta device stands in for a flash kernel.

    Elsewhere the real function runs, and what `counter` saw of its inside is taken off again.
    """

    def __init__(self, counter: FlopCounterMode | None = None) -> None:
        super().__init__()
        self.flops, self.inside, self._counter = 0.0, 0.0, counter
        self.kept: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value")
        query, key, value = (kwargs[n] if n in kwargs else args[i] for i, n in enumerate(names))
        scores = math.prod(query.shape[:-1]) * key.shape[-2]
        self.flops += 2 * scores * (query.shape[-1] + value.shape[-1])
        if query.is_meta:
            output: Tensor = _FlashStandIn.apply(query, key, value)
            self.kept.append(output)
            return output
        before = self._counter.get_total_flops() if self._counter else 0
        output = func(*args, **kwargs)
        self.inside += self._counter.get_total_flops() - before if self._counter else 0
        return output


class _FlashStandIn(torch.autograd.Function):
    """Saves for backward what flash attention does: its inputs, its output, one fp32 per query and head."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        context.save_for_backward(query, key, value, output, logsumexp)
        return output

    @staticmethod
    def backward(context: Any, *grad_outputs: Any) -> Any:
        raise RuntimeError("shapes alone were computed; there is nothing to differentiate")


@torch.no_grad()
def count_work(call: Callable[[], Any], adapted: Mapping[str, nn.Linear] | None = None) -> Work:
    """FLOPs of everything `call` runs, on any device; `adapted`: the layers that carry an adapter."""
    in_adapted = [0.0]

    def add(layer: Any, inputs: Any, output: Tensor) -> None:
        in_adapted[0] += 2.0 * output.numel() * layer.in_features

    handles = [layer.register_forward_hook(add) for layer in (adapted or {}).values()]
    counter = FlopCounterMode(display=False, custom_mapping=_LOW_PRECISION)
    attention = _Attention(counter)
    try:
        with counter, attention:
            call()
    finally:
        for handle in handles:
            handle.remove()
    by_op = counter.get_flop_counts().get("Global", {})
    products = sum(float(flops) for op, flops in by_op.items() if op in _PRODUCTS)
    total = float(sum(by_op.values())) - attention.inside
    products = min(products, total)  # attention that decomposes on this device was products, too
    return Work(total - products, attention.flops, products, in_adapted[0])


def adapted_layers(module: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Linear]:
    """Linear layers whose name ends like one of `targets`, as peft matches them."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and any(name == end or name.endswith(f".{end}") for end in targets)
    }


class _Products(TorchDispatchMode):
    """Collects the results of matrix products while `inside` says so."""

    def __init__(self, inside: Callable[[], bool]) -> None:
        super().__init__()
        self.results: list[Tensor] = []
        self._inside = inside

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _KEPT and self._inside():
            self.results.append(result)
        return result


@dataclass(slots=True)
class _Ledger:
    """Distinct storages, kept alive so that none is counted twice."""

    seen: dict[int, Tensor] = field(default_factory=dict)

    def add(self, tensor: Tensor) -> float:
        """Bytes of the tensor's storage, 0 if it is known."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.seen:
            return 0.0
        self.seen[storage._cdata] = tensor
        return float(storage.nbytes())


def count_activations(module: nn.Module, call: Callable[[], Any], blocks: list[nn.Module]) -> Activations:
    """Bytes saved for backward by `call`, a forward of `module` on the meta device; `blocks` may be checkpointed."""
    saved, products, boundaries = _Ledger(), _Ledger(), _Ledger()
    for ledger in (saved, products, boundaries):
        for parameter in module.parameters():
            ledger.add(parameter)
    outside, inside, inputs = 0.0, [0.0], 0.0
    depth = [0]
    attention, matrices = _Attention(), _Products(lambda: depth[0] > 0)

    def pack(tensor: Tensor) -> Tensor:
        nonlocal outside
        size = saved.add(tensor)
        if depth[0]:
            inside[-1] += size
        else:
            outside += size
        return tensor

    def enter(block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        nonlocal inputs
        depth[0] += 1
        inside.append(0.0)
        inputs += sum(boundaries.add(t) for t in (*arguments, *keywords.values()) if isinstance(t, Tensor))

    def leave(block: nn.Module, arguments: Any, output: Any) -> None:
        depth[0] -= 1

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    try:
        with matrices, attention, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            call()
    finally:
        for handle in handles:
            handle.remove()
    heavy = sum(products.add(result) for result in (*matrices.results, *attention.kept))
    return Activations(
        all=outside + sum(inside),
        selective=outside + inputs + heavy,
        full=outside + inputs,
        block=max(inside),
    )


@contextmanager
def adapters(layers: Mapping[str, nn.Linear], rank: int) -> Iterator[None]:
    """Low-rank adapters beside `layers` for the time of the context, in the layers' dtype."""

    def add(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        down = layer.weight.new_empty(rank, layer.in_features).requires_grad_()
        up = layer.weight.new_empty(layer.out_features, rank).requires_grad_()
        return output + F.linear(F.linear(inputs[0], down), up) * 2.0

    handles = [layer.register_forward_hook(add) for layer in layers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
