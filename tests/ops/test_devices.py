"""Every tensor of every op on another device than the others: named, before anything runs. Without a GPU: the bindings
are called as the ops call them, with one CPU tensor that says it is on the first CUDA device."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import recorded_calls
import torch

from flowgrpo_fast import _C
from flowgrpo_fast.ops import (
    Extras,
    Guidance,
    best_variance_subset,
    compact,
    dequantize_fp8_rows,
    dequantize_nvfp4,
    flow_log_prob,
    flow_step,
    group_advantages,
    implicit_matching,
    matching,
    merge_lora_quantize_,
    pareto_fronts,
    philox_normal,
    preview,
    quantize_fp8_rows,
    quantize_nvfp4,
    top_bottom,
)

_view = recorded_calls.view_function(torch.Tensor.__dlpack_c_exchange_api__)


class OnCuda:
    """A CPU tensor that says otherwise."""

    device = "cuda:0"

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _view_on_cuda(value: OnCuda, out: recorded_calls.TensorView) -> None:
    assert _view(value.tensor, ctypes.byref(out)) == 0
    out.device_type = recorded_calls.CUDA


OnCuda.__dlpack_c_exchange_api__ = recorded_calls.capsule_of(_view_on_cuda)


class Spy:
    """Stands for `_C` and keeps the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls.append((name, arguments))
            return getattr(_C, name)(*arguments)

        return call


def number_of_tensors(value: Any) -> int:
    if isinstance(value, (tuple, list)):
        return sum(map(number_of_tensors, value))
    return isinstance(value, torch.Tensor)


def with_one_moved(value: Any, which: int) -> Any:
    """The arguments, with the tensor of that number on CUDA."""
    if isinstance(value, (tuple, list)):
        items, seen = [], 0
        for item in value:
            items.append(with_one_moved(item, which - seen))
            seen += number_of_tensors(item)
        return tuple(items)
    return OnCuda(value) if isinstance(value, torch.Tensor) and which == 0 else value


def states(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 4, 6), generator=torch.Generator().manual_seed(0))


COEFFS, STEPS, SEED = torch.rand(5, 8), torch.tensor([0, 1]), torch.tensor([3, 4])
MATRIX, LORA = states(4, 32), (states(4, 32), states(3, 32), states(4, 3))
IDS, REWARDS = torch.tensor([0, 1, 0, 1]), states(4, 2)
GUIDANCE = Guidance(states(), 2.0)


def replay() -> None:
    velocity, negative = states().requires_grad_(), states().requires_grad_()
    extras = Extras(True, states(), states(), 1)
    out = flow_log_prob(
        states(), velocity, states(), COEFFS, STEPS, Guidance(negative, 2.0), states(), extras=extras
    )
    sum(value.sum() for value in out).backward()


def residuals() -> None:
    velocity = states().requires_grad_()
    out = matching(
        velocity, states(), old_velocity=states(), reference_velocity=states(), weight=states(2, 1, 6)
    )
    (out.error + out.old_drift + out.reference_drift).sum().backward()


def implicit_residuals() -> None:
    velocity = states().requires_grad_()
    out = implicit_matching(velocity, states(), states(), 0.5)
    (out.positive + out.negative).sum().backward()


TRANSITION = "latents velocity coeffs step_index guidance.negative_velocity "
MATCHING = "velocity target old_velocity "
LORA_NAMES = "weight lora_a lora_b "

# What makes the calls, and of each the op and its tensors; the first one says where it runs.
CALLS: list[tuple[Callable[[], Any], list[tuple[str, str]]]] = [
    (
        lambda: flow_step(states(), states(), COEFFS, STEPS, SEED, GUIDANCE, states(), return_x0_pred=True),
        [("flow_step", TRANSITION + "x0_prev seed next_latents log_prob x0_pred")],
    ),
    (
        replay,
        [
            (
                "flow_log_prob",
                TRANSITION + "x0_prev next_latents log_prob mean extras.reference_velocity "
                "extras.reference_negative drift log_prob_map",
            ),
            (
                "flow_log_prob_backward",
                TRANSITION + "x0_prev next_latents grad_log_prob grad_velocity grad_negative grad_mean "
                "extras.reference_velocity extras.reference_negative grad_drift grad_map",
            ),
        ],
    ),
    (
        lambda: preview(
            states(2, 3, 4, 6),
            states(2, 3, 4, 6),
            COEFFS,
            STEPS,
            2,
            Guidance(states(2, 3, 4, 6), 2.0),
            None,
            2,
        ),
        [("preview", TRANSITION + "pooled"), ("preview", "pooled workspace gram")],
    ),
    (lambda: philox_normal(SEED, (4,), STEPS), [("philox", "seed step out")]),
    (lambda: philox_normal(SEED, (4,), STEPS[0]), [("philox", "seed step out")]),
    (
        residuals,
        [
            ("matching", MATCHING + "reference_velocity weight" + 7 * " means"),
            (
                "matching_backward",
                MATCHING
                + "reference_velocity weight grad_error grad_old_drift grad_reference_drift grad_velocity",
            ),
        ],
    ),
    (
        implicit_residuals,
        [
            ("implicit_matching", MATCHING + 4 * " means"),
            ("matching_backward", MATCHING + "grad_positive grad_negative grad_velocity"),
        ],
    ),
    (lambda: group_advantages(REWARDS, IDS), [("group_advantages", "rewards group_id advantages")]),
    (lambda: best_variance_subset(REWARDS, 1), [("best_variance_subset", "rewards indices")]),
    (lambda: top_bottom(REWARDS, 1, 1), [("top_bottom", "rewards indices")]),
    (lambda: pareto_fronts(states(2, 3, 2)), [("pareto_fronts", "objectives fronts")]),
    (lambda: compact(STEPS, REWARDS, IDS), [("compact", "indices buffers[0] buffers[1] out[0] out[1]")]),
    (lambda: quantize_fp8_rows(MATRIX), [("quantize_fp8_rows", "x codes scale")]),
    (lambda: quantize_nvfp4(MATRIX), [("quantize_nvfp4", "x codes scales global_scale")]),
    (
        lambda: merge_lora_quantize_(quantize_fp8_rows(MATRIX), *LORA),
        [("quantize_fp8_rows", "x codes scale"), ("merge_lora_quantize_", LORA_NAMES + "codes scale")],
    ),
    (
        lambda: merge_lora_quantize_(quantize_nvfp4(MATRIX), *LORA, global_scale=torch.tensor(0.1)),
        [
            ("quantize_nvfp4", "x codes scales global_scale"),
            ("merge_lora_quantize_", LORA_NAMES + "codes scales global_scale"),
        ],
    ),
    (
        lambda: dequantize_fp8_rows(*quantize_fp8_rows(MATRIX)),
        [("quantize_fp8_rows", "x codes scale"), ("dequantize_fp8_rows", "codes scale out")],
    ),
    (
        lambda: dequantize_nvfp4(*quantize_nvfp4(MATRIX)),
        [
            ("quantize_nvfp4", "x codes scales global_scale"),
            ("dequantize_nvfp4", "codes scales global_scale out"),
        ],
    ),
]


@pytest.mark.parametrize(("make", "expected"), CALLS, ids=[calls[-1][0] for _, calls in CALLS])
def test_a_tensor_elsewhere_is_named(monkeypatch, make, expected):
    spy = Spy()
    for name, module in list(sys.modules.items()):
        if name.startswith("flowgrpo_fast.ops.") and hasattr(module, "_C"):
            monkeypatch.setattr(module, "_C", spy)
    make()
    assert len(spy.calls) == len(expected)
    for (function, arguments), (op, names) in zip(spy.calls, expected, strict=True):
        first, *others = names.split()
        assert number_of_tensors(arguments) == 1 + len(others)
        places = [(first, "[^ ]+ is on cpu, must be on cuda:0"), *((name, "") for name in others)]
        for which, (name, other) in enumerate(places):
            wrong = other or rf"{re.escape(name)} is on cuda:0, must be on cpu"
            with pytest.raises(ValueError, match=rf"\A{op}: {wrong} as {first} is\Z"):
                getattr(_C, function)(*with_one_moved(arguments, which))


class Vast:
    """Says it has that many elements on a GPU; nobody may look at them."""

    def __init__(self, elements: int) -> None:
        self.shape = (ctypes.c_int64 * 2)(1, elements)


def _view_of_vast(value: Vast, out: recorded_calls.TensorView) -> None:
    assert _view(states(1), ctypes.byref(out)) == 0
    out.device_type, out.ndim, out.strides = recorded_calls.CUDA, 2, None
    out.shape = ctypes.cast(value.shape, ctypes.POINTER(ctypes.c_int64))


Vast.__dlpack_c_exchange_api__ = recorded_calls.capsule_of(_view_of_vast)


def test_more_blocks_than_a_launch_has(host_module):
    message = r"\Aflowgrpo_fast: philox_kernel has 8589934592 blocks, must have at most 2147483647: split the batch\Z"
    with pytest.raises(ValueError, match=message):
        host_module.philox(OnCuda(SEED[:1]), 0, 0, Vast(1 << 45), 1)


def test_a_row_of_more_columns_than_a_preview_counts(host_module):
    row = Vast(1 << 32)  # in 32 bits: none
    fields = (row, row, OnCuda(COEFFS), 0, None, None, 1.0, None)
    message = r"\Aflowgrpo_fast: preview_kernel has 4294967296 columns, must have at most 2147483647"
    with pytest.raises(ValueError, match=message):
        host_module.preview(fields, (1, 1, 1, 1 << 32, 1), (1, 1, 1), row, 1)


def test_every_op_is_among_them():
    ours = {name for name in vars(_C) if not name.startswith("_")}
    called = set()
    for _, calls in CALLS:
        called |= {"gram" if names.startswith("pooled") else op for op, names in calls}
    aliases = {"implicit_matching", "merge_lora_quantize_"}
    assert called - aliases == ours - {"build_info", "philox4x32", "normal_pair", "weight_place"}
