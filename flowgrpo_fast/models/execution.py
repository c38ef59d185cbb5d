"""How a transformer runs: gradient checkpointing, attention backend, and one compiled block for all of a run."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flowgrpo_fast.models.loading import one_line
from flowgrpo_fast.models.network import Network
from flowgrpo_fast.precision.formats import SCALED_MM

_aten = torch.ops.aten
# What "selective" keeps: matrix products, convolutions and attention; norms and element-wise steps are computed again.
_KEPT = {
    _aten.convolution.default,
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_mm.default,  # FP8 and FP4 products
    _aten._scaled_mm_v2.default,
    SCALED_MM,
}
_KEPT_ELSEWHERE = ("flash_attn", "sageattention")  # in the names of other packages' attention kernels
# diffusers' names for torch's own kernels, for families whose attention does not go through its dispatcher.
_NATIVE = {
    "native": None,
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_math": SDPBackend.MATH,
}
_MIN_RECOMPILES = 64  # shapes x gradient or not x adapter or not x kinds of block


def set_checkpointing(transformer: Any, mode: str) -> None:
    """ "none", "selective" (recompute all but matrix products and attention) or "full" (recompute each block)."""
    if mode != "none":
        transformer.enable_gradient_checkpointing(functools.partial(_checkpointed, mode == "selective"))


def _checkpointed(selective: bool, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """One call of a block of which little or nothing is kept for the backward."""
    if selective:
        kwargs["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    # There is no dropout, so there is no random state to put back.
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in _KEPT or any(name in getattr(op, "namespace", "") for name in _KEPT_ELSEWHERE)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def set_attention(transformer: Any, name: str) -> None:
    """Attention through the backend that diffusers calls `name`; empty = its default.

    diffusers remembers the choice: a model that is loaded later in the same process and names none gets it, too.

    Raises:
        ValueError: no such backend, or not on this machine or for this family.
    """
    if not name:
        return
    processors = [getattr(module, "processor", None) for module in transformer.modules()]
    if any(hasattr(processor, "_attention_backend") for processor in processors):
        try:
            transformer.set_attention_backend(name)
        except (ValueError, RuntimeError, ImportError) as error:
            raise ValueError(f"Network.attention is {name!r}: {one_line(error)}") from error
    elif name not in _NATIVE:
        raise ValueError(
            f"Network.attention is {name!r}; {type(transformer).__name__} takes {', '.join(_NATIVE)}"
        )
    elif _NATIVE[name] is not None:
        # Each module by itself: a checkpointed block runs again in the backward.
        for module in transformer.modules():
            if getattr(module, "processor", None) is not None:
                module.forward = functools.partial(_with_kernel, _NATIVE[name], type(module).forward, module)


def check_kernel(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Tries one of torch's own kernels on a small attention, before anything is loaded; other backends are passed over.

    Raises:
        ValueError: the device has no such kernel for this dtype.
    """
    kernel = _NATIVE.get(name)
    if kernel is None:
        return
    x = torch.zeros(1, 1, 128, 64, device=device, dtype=dtype)
    try:
        with sdpa_kernel(kernel), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why each kernel is passed over
            functional.scaled_dot_product_attention(x, x, x)
    except RuntimeError as error:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"Network.attention is {name!r}, a kernel that {device} lacks for {kind}; leave it empty for the default"
        ) from error


def _with_kernel(kernel: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with sdpa_kernel(kernel):
        return forward(*args, **kwargs)


def compile_blocks(
    transformer: nn.Module, names: Sequence[str], streams: Sequence[str], selective: bool = False
) -> int:
    """Compiles every block of the named classes, in place; returns how many.

    Blocks of one class share their code, so the compiler runs once per kind, not once per block. Rollout and replay
    run the very same artefact: compiled without gradient a block is fused in another way, and in bf16 the first
    ratio is then off by 1e-4. So a block always runs with gradient, and what it saved is dropped at once where
    nobody asked for one.

    Args:
        streams: names of the block's arguments that carry a gradient in the update.
        selective: checkpoint inside of what is compiled; from outside a compiled block is one piece.
    """
    blocks = [module for module in transformer.modules() if type(module).__name__ in names]
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _MIN_RECOMPILES)
    for block in blocks:
        order = tuple(inspect.signature(block.forward).parameters)
        call = block._call_impl
        run = functools.partial(_checkpointed, True, call) if selective else call
        compiled = torch.compile(run, fullgraph=True, dynamic=False)
        # Where nn.Module.compile puts it: a copy of the module leaves it behind and is compiled by itself.
        block._compiled_call_impl = functools.partial(_with_gradient, compiled, order, tuple(streams))
    return len(blocks)


def _with_gradient(
    compiled: Callable[..., Any], order: tuple[str, ...], streams: tuple[str, ...], *args: Any, **kwargs: Any
) -> Any:
    """One call of a compiled block; outside of the update its result is detached."""
    arguments = {**dict(zip(order, args, strict=False)), **kwargs}
    asked = torch.is_grad_enabled()
    with torch.enable_grad():
        for name in streams:
            value = arguments.get(name)
            if value is not None and not value.requires_grad:
                arguments[name] = value.detach().requires_grad_()
        out = compiled(**arguments)
    return out if asked else _detached(out)


def _detached(out: Any) -> Any:
    if isinstance(out, tuple):
        return tuple(_detached(part) for part in out)
    return None if out is None else out.detach()


def prepare(transformer: Any, network: Network, blocks: Sequence[str], streams: Sequence[str]) -> None:
    """All of the above as the run file says."""
    inside = network.compile and network.checkpointing == "selective"
    set_checkpointing(transformer, "none" if inside else network.checkpointing)
    set_attention(transformer, network.attention)
    if network.compile:
        compile_blocks(transformer, blocks, streams, selective=inside)
