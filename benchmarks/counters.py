"""What a call does, counted rather than timed: kernel launches, bytes moved and host syncs. Needs no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Kernels that one call of an op of this package launches on CUDA; `tests/ops/test_gpu_cases.py` holds it against a GPU.
KERNELS = {
    "flow_step": 2,  # the step, then the ordered sum of its partial sums
    "flow_log_prob": 2,
    "flow_log_prob_backward": 1,
    "philox": 1,
}
_NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "_unsafe_view",
}
_SYNCS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim"}
_OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_"}
_GATHERS = {
    "index",
    "index_select",
    "gather",
    "embedding",
}  # read as much of their first operand as they give


class Counter(TorchDispatchMode):
    """Counts what runs inside it.

    A launch is an ATen op that is neither a view nor an allocation, or a kernel of ours (`KERNELS`); a device with
    every tensor on it is assumed, so scalars count too. Bytes are the operands read and the results written, a
    broadcast operand once. A sync is an op that gives the host a number, or copies from a device to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.bytes = 0
        self.syncs = 0
        self.ours: list[str] = []  # the ops of this package, in order
        self.others: list[str] = []  # every other op that launches

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        namespace, _, name = function._schema.name.partition("::")
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if namespace == "flowgrpo_fast":
            if name not in KERNELS:
                raise ValueError(
                    f"benchmarks/counters.py: KERNELS does not say how many kernels {name!r} launches"
                )
            self.ours.append(name)
            self.launches += KERNELS[name]
        elif name in _SYNCS or _to_host(name, args, outputs):
            self.syncs += 1
        elif name in _NO_KERNEL or _is_view(function):
            return result
        else:
            self.others.append(name)
            self.launches += 1
        self.bytes += sum(map(_touched, _operands(name, args, kwargs, outputs)))
        return result

    def as_dict(self) -> dict[str, int]:
        """The three counts."""
        return {"launches": self.launches, "bytes": self.bytes, "syncs": self.syncs}


def count(run: Callable[[], Any]) -> Counter:
    """The counts of one call; a first, uncounted one makes what is made once."""
    run()
    with Counter() as counter:
        run()
    return counter


def _is_view(function: Any) -> bool:
    returned = [value.alias_info for value in function._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def _to_host(name: str, args: tuple[Any, ...], outputs: list[Tensor]) -> bool:
    if name not in ("_to_copy", "copy_") or not outputs or outputs[0].device.type != "cpu":
        return False
    return any(isinstance(leaf, Tensor) and leaf.device.type != "cpu" for leaf in tree_leaves(args))


def _operands(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]
) -> Iterator[Tensor]:
    """Tensors read and tensors written; one that is both comes twice."""
    read = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    first = args[0] if args else None
    if name in _OVERWRITES or name in _GATHERS:
        read.pop(id(first), None)
    yield from read.values()
    yield from outputs
    if name in _GATHERS:
        yield from outputs


def _touched(tensor: Tensor) -> int:
    elements = 1
    for extent, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= extent if stride or not extent else 1
    return elements * tensor.element_size()
