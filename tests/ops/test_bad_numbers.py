"""What is no number, or one out of reach: one line that names the argument, before anything is allocated or read."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

from flowgrpo_fast import _C
from flowgrpo_fast.ops import (
    Clip,
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
    philox_uint32,
    preview,
    quantize_fp8_rows,
    quantize_nvfp4,
    top_bottom,
)
from flowgrpo_fast.ops._binding import Transition

HUGE = (1 << 40, 1 << 63, 1 << 200, -(1 << 63) - 1)
NOT_NUMBERS = ("2", None, [2.0], 2j, torch.ones(()))
NOT_BOOLS = ("2", None, [True], 1, torch.ones(2))
NOT_INTS = (*NOT_NUMBERS[:4], 2.0, torch.ones(()))

ZEROS, SEED, IDS = torch.zeros(2, 4, 6), torch.tensor([3, 4]), torch.tensor([0, 1, 0, 1, 1])
STEP = {"latents": ZEROS, "velocity": ZEROS, "coeffs": torch.zeros(5, 8), "step_index": 1}
REPLAY = {**STEP, "next_latents": ZEROS}
PACKED = {
    **STEP,
    "latents": torch.zeros(2, 24, 1),
    "velocity": torch.zeros(2, 24, 1),
    "pool": 2,
    "grid": (4, 6),
}
NOISE = {"seed": SEED, "shape": (4,)}
ADVANTAGES = {"rewards": torch.ones(5, 3), "group_id": IDS, "num_groups": 2}
SUBSET = {"rewards": torch.ones(2, 6), "k": 2}
BOTH_ENDS = {"rewards": torch.ones(2, 6), "num_top": 2, "num_bottom": 2}
IMPLICIT = {"velocity": ZEROS, "target": ZEROS, "old_velocity": ZEROS, "beta": 0.5}
WEIGHT = torch.ones(4, 16)
MERGE = {
    "out": quantize_fp8_rows(WEIGHT),
    "weight": WEIGHT,
    "lora_a": torch.ones(2, 16),
    "lora_b": torch.ones(4, 2),
}
COMPACTION = {"indices": SEED, "buffers": torch.ones(5, 3)}


def gathered(indices, buffers, **options):
    return compact(indices, buffers, **options)


gathered.__name__ = "compact"


def guided(op, values):
    """Rows whose bad argument is the scale of a guidance."""
    return [(op, "guidance", Guidance(ZEROS, value), "guidance.scale") for value in values]


def clips(values):
    return [
        (group_advantages, "clip", value, name)
        for bad in values
        for value, name in ((bad, "clip.hard"), (Clip(bad), "clip.hard"), (Clip(None, bad), "clip.soft"))
    ]


def rows(op, argument, values, name=None):
    return [(op, argument, value, name or argument) for value in values]


GOOD = {
    flow_step: {**STEP, "seed": SEED},
    flow_log_prob: REPLAY,
    preview: PACKED,
    philox_normal: NOISE,
    philox_uint32: NOISE,
    group_advantages: ADVANTAGES,
    best_variance_subset: SUBSET,
    top_bottom: BOTH_ENDS,
    implicit_matching: IMPLICIT,
    merge_lora_quantize_: MERGE,
    gathered: COMPACTION,
    matching: {"velocity": ZEROS, "target": ZEROS},
    pareto_fronts: {"objectives": torch.ones(2, 6, 3)},
    quantize_fp8_rows: {"x": WEIGHT},
    quantize_nvfp4: {"x": WEIGHT},
    dequantize_fp8_rows: quantize_fp8_rows(WEIGHT)._asdict(),
    dequantize_nvfp4: quantize_nvfp4(WEIGHT)._asdict(),
}


def nested(op, arguments):
    """Rows of tensors without a shape: of each argument that is a tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this layout is a prototype
        value = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    places = {"buffers": "buffers[0]"}
    return [
        (op, name, value, places.get(name, name))
        for name, good in arguments.items()
        if isinstance(good, torch.Tensor)
    ]


BAD = [
    *rows(flow_step, "step_index", [*NOT_INTS[:5], *HUGE]),
    *guided(flow_step, NOT_NUMBERS),
    *rows(flow_step, "guidance", [Guidance(ZEROS, 10**400)], "guidance.scale"),
    *rows(flow_log_prob, "step_index", HUGE),
    *guided(flow_log_prob, NOT_NUMBERS),
    *rows(
        flow_log_prob, "extras", [Extras(map_axis=axis) for axis in (1.0, "1", 1 << 63)], "extras.map_axis"
    ),
    *rows(preview, "step_index", HUGE),
    *rows(preview, "guidance", [Guidance(PACKED["latents"], "2")], "guidance.scale"),
    *rows(preview, "pool", ["2", 2.0, None, (2.0, 2.0), (1 << 63, 1), (-2, -2), (2, "2"), (), torch.ones(2)]),
    *rows(
        preview,
        "grid",
        [(-4, -6), (-1, -4, 6), (4.0, 6.0), ("4", 6), 24, "46", (1 << 63, 1), (0, 24), (0, 0)],
    ),
    *rows(preview, "group_size", [2.0, "2", torch.ones(()), *HUGE, -1]),
    *(
        row
        for op in (philox_normal, philox_uint32)
        for row in (
            *rows(op, "step", [*NOT_INTS[:5], *HUGE]),
            *rows(op, "step", [torch.tensor([-1, 0]), torch.tensor([0, 1 << 32]), torch.tensor(-1)]),
            *rows(op, "stream", [0.5, "1", None, *HUGE, -1]),
            *rows(op, "shape", [4, (-1,), (4, 0), (2.0,), "4", None, (1 << 63,), torch.ones(2)]),
        )
    ),
    *rows(group_advantages, "num_groups", [*NOT_INTS[:2], *NOT_INTS[3:], *HUGE, (1 << 24) + 1]),
    *rows(group_advantages, "weights", [2.0, "abc", 3, [1.0, "2", 3.0], [1.0, None, 3.0], [2j] * 3]),
    *rows(group_advantages, "eps", [*NOT_NUMBERS, -1.0, float("nan"), 10**400]),
    *clips(["5", 2j, [5.0]]),
    *rows(group_advantages, "clip", [(1.0,), (1.0, 2.0, 3.0), ()]),
    *rows(best_variance_subset, "k", [*NOT_INTS, *HUGE]),
    *rows(top_bottom, "num_top", [*NOT_INTS, *HUGE]),
    *rows(top_bottom, "num_bottom", [*NOT_INTS, *HUGE]),
    *rows(implicit_matching, "beta", [*NOT_NUMBERS, 10**400]),
    *rows(merge_lora_quantize_, "lora_scale", [*NOT_NUMBERS, 10**400]),
    *rows(group_advantages, "aggregate", [0, None, torch.ones(2), ["sum"]]),
    *rows(group_advantages, "std", [0, None, torch.ones(2), ["batch"]]),
    *rows(flow_step, "return_x0_pred", NOT_BOOLS),
    *rows(flow_log_prob, "extras", [Extras(mean=value) for value in NOT_BOOLS], "extras.mean"),
    *rows(quantize_nvfp4, "swizzle", NOT_BOOLS),
    *rows(merge_lora_quantize_, "swizzle", NOT_BOOLS),
    *rows(dequantize_nvfp4, "swizzle", NOT_BOOLS),
    *(
        row
        for op in (philox_normal, dequantize_fp8_rows, dequantize_nvfp4)
        for row in rows(op, "dtype", ["float32", None, 2, torch.ones(2, 2), torch.int64, torch.float8_e4m3fn])
    ),
    *(row for op, arguments in GOOD.items() for row in nested(op, arguments)),
    *rows(gathered, "out", [torch.ones(2, 3), 5, "out", MERGE["lora_a"]]),
]
BAD = [row for row in BAD if row[1:3] != ("num_groups", None)]  # which is the default


@pytest.mark.parametrize("op", GOOD, ids=lambda op: op.__name__)
def test_the_good_arguments_are_good(op):
    op(**GOOD[op])


def text(value):
    return re.sub(r"\s+", " ", f"{value}")[:30]


@pytest.mark.parametrize(
    ("op", "argument", "value", "name"),
    BAD,
    ids=[f"{op.__name__}-{name}-{text(value)}" for op, _, value, name in BAD],
)
def test_names_the_bad_number(op, argument, value, name):
    # The bindings call both ops on noise "philox".
    family = "philox" if op.__name__.startswith("philox") else op.__name__
    with pytest.raises(
        ValueError, match=rf"\A{family}[a-z0-9_]*: {re.escape(name)}[ \[][^\n]*, must [^\n]*\Z"
    ):
        op(**{**GOOD[op], argument: value})


@pytest.mark.parametrize(
    "shape", [(1, 1, -4, -6, 1), (-1, 1, 4, -6, 1), (1, 1, 1 << 32, 1 << 32, 24), (0, 1, 4, 6, 1)]
)
def test_the_binding_of_the_preview_takes_no_other_shape(shape):
    latents, guard = PACKED["latents"], torch.full((64,), 7.0)
    transition = Transition(latents, latents, PACKED["coeffs"], 1, None, None, 1.0, None)
    pooled = guard[20:32].view(2, 6)
    with pytest.raises(ValueError, match=r"\Apreview: grid is [^\n]*, must be made of whole cells"):
        _C.preview(transition, shape, (1, 2, 2), pooled, 1)
    with pytest.raises(ValueError, match=r"\Apreview: grid is [^\n]*, must be made of whole cells"):
        _C.preview(transition, (1, 1, 4, 6, 1), (1, -2, -2), pooled, 1)
    assert (guard == 7).all()


@pytest.mark.parametrize("ndim", [0, 1])
def test_extras_blame_latents_without_a_batch(ndim):
    latents = torch.zeros((6,) * ndim)
    for extras in (Extras(), Extras(map_axis=1), Extras(map_axis=-1)):
        with pytest.raises(ValueError, match=rf"\Aflow_log_prob: latents has {ndim} dimension\(s\), must be"):
            flow_log_prob(latents, latents, latents, torch.zeros(5, 8), 1, extras=extras)


def test_numbers_of_other_types_are_numbers():
    numpy = pytest.importorskip("numpy")
    assert best_variance_subset(SUBSET["rewards"], numpy.int64(2)).shape == (2, 2)
    weights = numpy.ones(3, dtype=numpy.float32)
    like = group_advantages(**ADVANTAGES, weights=weights, eps=numpy.float32(0.5), clip=numpy.float64(5))
    assert torch.equal(like, group_advantages(**ADVANTAGES, eps=0.5, clip=5))
    flow_step(**GOOD[flow_step], guidance=Guidance(ZEROS, numpy.float32(2)))
