"""What a call does, counted rather than timed: kernel launches, bytes moved and host syncs. Needs no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The most kernels that one call of an op of this package launches on CUDA; tests/ops/test_gpu_cases.py counts them.
KERNELS = {
    "flow_step": 2,  # the step, then the ordered sum of its partial sums
    "flow_log_prob": 2,
    "flow_log_prob_backward": 1,
    "flow_log_prob_extras": 4,  # one more each for the sum of the drift and for the map
    "philox": 1,
    "group_advantages": 3,  # one, and one each for the batch's std and for GDPO's second normalisation
    "best_variance_subset": 1,
    "top_bottom": 1,
    "pareto_fronts": 1,
    "compact": 1,
    "compact_out": 1,
    "matching": 2,  # the partial sums, then the ordered sum of each mean
    "matching_backward": 1,
    "preview": 3,  # one, and two for the Gram matrices
    "quantize_fp8_rows": 1,  # with a LoRA, too
    "quantize_nvfp4": 3,  # two for the global scale where it is not given
    "dequantize_fp8_rows": 1,
    "dequantize_nvfp4": 1,
}
# The same of an op around one of torch's products: NVFP4 quantises in three; FP8 blocks pad, quantise, lay out scales.
PRODUCTS = {"scaled_mm": 4}
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
# Position of the operand of which no more is read than is written.
_GATHERED = {"index": 0, "index_select": 0, "gather": 0, "embedding": 0, "compact": 1, "compact_out": 1}


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
        if namespace == "flowgrpo_fast":
            kernels = KERNELS.get(name) or PRODUCTS.get(name)
            if kernels is None:
                raise ValueError(
                    f"benchmarks/counters.py: KERNELS does not say how many kernels {name!r} launches"
                )
            self.ours.append(name)
            self.launches += kernels
        elif name in _SYNCS or _to_host(name, args, result):
            self.syncs += 1
        elif name in _NO_KERNEL or _is_view(function):
            return result
        else:
            self.others.append(name)
            self.launches += 1
        self.bytes += _bytes(function._schema, name, (args, kwargs), result)
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


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _to_host(name: str, args: tuple[Any, ...], result: Any) -> bool:
    given = _tensors(result)
    if name not in ("_to_copy", "copy_") or not given or given[0].device.type != "cpu":
        return False
    return any(tensor.device.type != "cpu" for tensor in _tensors(args))


def _bytes(schema: Any, name: str, call: tuple[tuple[Any, ...], dict[str, Any]], result: Any) -> int:
    """Operands read, each once however often it is given, and results and changed operands written."""
    args, kwargs = call
    is_ours = schema.name.startswith("flowgrpo_fast::")  # what our ops change, they write and do not read
    read: dict[int, Tensor] = {}
    written: list[Tensor] = []
    for position, argument in enumerate(schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if changed:
            written += _tensors(value)
        overwritten = changed and (name in _OVERWRITES or is_ours or argument.name == "out")
        if not overwritten and _GATHERED.get(name) != position:
            read |= {id(tensor): tensor for tensor in _tensors(value)}
    if all(returned.alias_info is None for returned in schema.returns):
        written += _tensors(result)
    gathered = written if name in _GATHERED else []
    return sum(map(_touched, [*read.values(), *written, *gathered]))


def _touched(tensor: Tensor) -> int:
    elements = 1
    for extent, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= extent if stride or not extent else 1
    return elements * tensor.element_size()
