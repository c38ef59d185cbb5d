"""The ops on groups behind torch.library, and every bad argument as one line: op, argument, what it was, must be."""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from flowgrpo_fast.ops import (
    Clip,
    best_variance_subset,
    compact,
    group_advantages,
    pareto_fronts,
    reference,
    top_bottom,
)

OPS = torch.ops.flowgrpo_fast
IDS = torch.tensor([0, 1, 0, 1, 1])


def rewards(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_opcheck():
    for aggregate in range(4):
        options = (2, [1.0, 0.5, 2.0], aggregate, aggregate == 1, 1e-4, 5.0, 0.0)
        torch.library.opcheck(OPS.group_advantages, (rewards(5, 3), IDS, *options))
    torch.library.opcheck(OPS.group_advantages, (rewards(5), IDS, 2, None, 3, False, 1e-4, 0.0, 3.0))
    torch.library.opcheck(OPS.best_variance_subset, (rewards(3, 8), 4))
    torch.library.opcheck(OPS.top_bottom, (rewards(3, 8), 2, 3))
    torch.library.opcheck(OPS.pareto_fronts, (rewards(2, 8, 3),))
    for dtype in (torch.bfloat16, torch.float16):
        options = (2, [1.0, 0.5, 2.0], 3, False, 1e-4, 5.0, 0.0)
        torch.library.opcheck(OPS.group_advantages, (rewards(5, 3).to(dtype), IDS, *options))
        torch.library.opcheck(OPS.best_variance_subset, (rewards(3, 8).to(dtype), 4))
        torch.library.opcheck(OPS.top_bottom, (rewards(3, 8).to(dtype), 2, 3))
        torch.library.opcheck(OPS.pareto_fronts, (rewards(2, 8, 3).to(dtype),))
    buffers = [rewards(5, 3), IDS, rewards(5, 2, 2).bfloat16()]
    torch.library.opcheck(OPS.compact, (IDS, buffers))
    torch.library.opcheck(OPS.compact_out, (IDS, buffers, [torch.empty_like(b) for b in buffers]))


def prune(values, latents, out):
    """A step of a trainer: select, gather, credit."""
    chosen = best_variance_subset(values, 4)
    survivors = compact((chosen + 6 * torch.arange(3)[:, None]).flatten(), latents, values.view(-1))
    compact(top_bottom(values, 2, 1)[0], values.T.contiguous(), out=(out,))
    ids = torch.arange(3).repeat_interleave(4)
    advantages = group_advantages(survivors[1], ids, 3, std="batch", clip=Clip(5.0, 3.0))
    return survivors[0], advantages, pareto_fronts(torch.stack([values, -values], 2)), out


@pytest.mark.slow
def test_compiled_equals_eager():
    arguments = rewards(3, 6), rewards(18, 4, 4).bfloat16()
    eager = prune(*arguments, torch.zeros(3, 3))
    compiled = torch.compile(prune, fullgraph=True)(*arguments, torch.zeros(3, 3))
    for left, right in zip(eager, compiled, strict=True):
        assert torch.equal(left, right)


def test_fake_tensors_give_shapes():
    with FakeTensorMode() as mode:
        values, ids = mode.from_tensor(rewards(5, 3)), mode.from_tensor(IDS)
        assert group_advantages(values, ids, 2).shape == (5,)
        assert group_advantages(values, ids, 2, aggregate="separate").shape == (5, 3)
        assert best_variance_subset(values, 2).shape == (5, 2)
        assert top_bottom(values, 2, 1).shape == (5, 3)
        first, second = compact(ids[:2], values, ids)
        assert (first.shape, second.shape, second.dtype) == ((2, 3), (2,), torch.int64)
    (row,) = compact(ids[:2], values)  # also outside the mode a fake tensor reaches no kernel
    assert row.shape == (2, 3)


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_dispatch_modes_see_one_op_each_and_no_sync():
    with Recorder() as recorder:
        prune(rewards(3, 6), rewards(18, 4), torch.zeros(3, 3))
    for op in (
        "group_advantages",
        "best_variance_subset",
        "top_bottom",
        "pareto_fronts",
        "compact",
        "compact_out",
    ):
        assert recorder.seen.count(f"flowgrpo_fast.{op}.default") == 1
    assert not [name for name in recorder.seen if "local_scalar" in name or "nonzero" in name]


def test_references_trace():
    values, ids = rewards(12, 2), torch.arange(4).repeat(3)
    for function, arguments in (
        (reference.group_advantages, (values, ids, 4, [1.0, 2.0], "gdpo")),
        (reference.best_variance_subset, (values.view(3, 8), 4)),
        (reference.pareto_fronts, (values.view(2, 6, 2),)),
    ):
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*arguments), function(*arguments))


ADVANTAGES = {"rewards": rewards(5, 3), "group_id": IDS, "num_groups": 2}
SUBSET, TOP_BOTTOM = (
    {"rewards": rewards(2, 6), "k": 2},
    {"rewards": rewards(2, 6), "num_top": 2, "num_bottom": 2},
)
FRONTS = {"objectives": rewards(2, 6, 3)}

BAD = [
    (group_advantages, ADVANTAGES, {"rewards": [1.0]}, "rewards is a list, must be a torch.Tensor"),
    (
        group_advantages,
        ADVANTAGES,
        {"rewards": rewards(5).int()},
        "rewards has dtype torch.int32, must have float32, bfloat16, float16 or float64",
    ),
    (
        group_advantages,
        ADVANTAGES,
        {"rewards": rewards(5, 3, 1)},
        "rewards has 3 dimension(s), must be [batch] or",
    ),
    (group_advantages, ADVANTAGES, {"rewards": rewards()}, "rewards has 0 dimension(s), must be [batch] or"),
    (group_advantages, ADVANTAGES, {"rewards": rewards(0)}, "rewards is empty: shape [0]"),
    (
        group_advantages,
        ADVANTAGES,
        {"rewards": rewards(5, 17)},
        "rewards has 17 columns, must have at most 16",
    ),
    (group_advantages, ADVANTAGES, {"rewards": rewards(5).to("meta")}, "rewards is on meta"),
    (group_advantages, ADVANTAGES, {"group_id": IDS[:4]}, "group_id has shape [4], must have [5]"),
    (group_advantages, ADVANTAGES, {"group_id": IDS[None]}, "group_id has shape [1, 5], must have [5]"),
    (
        group_advantages,
        ADVANTAGES,
        {"group_id": IDS.int()},
        "group_id has dtype torch.int32, must have torch.int64",
    ),
    (group_advantages, ADVANTAGES, {"group_id": None}, "group_id is a NoneType, must be a torch.Tensor"),
    (group_advantages, ADVANTAGES, {"group_id": IDS - 1}, "group_id is -1 at 0, must be in [0, 2)"),
    (group_advantages, ADVANTAGES, {"num_groups": 1}, "group_id is 1 at 1, must be in [0, 1)"),
    (group_advantages, ADVANTAGES, {"num_groups": 0}, "num_groups is 0, must be at least 1"),
    (group_advantages, ADVANTAGES, {"num_groups": 2.0}, "num_groups is a float, must be an int"),
    (group_advantages, ADVANTAGES, {"weights": [1.0]}, "weights has 1 value(s), must have 3, one a reward"),
    (
        group_advantages,
        ADVANTAGES,
        {"aggregate": "mean"},
        "aggregate is 'mean', must be one of sum, per_objective",
    ),
    (group_advantages, ADVANTAGES, {"std": "none"}, "std is 'none', must be one of group, batch"),
    (
        group_advantages,
        ADVANTAGES,
        {"std": "batch", "aggregate": "gdpo"},
        "std is 'batch', must be 'group' with aggregate='gdpo'",
    ),
    (group_advantages, ADVANTAGES, {"eps": -1.0}, "eps is -1.0, must be at least 0"),
    (group_advantages, ADVANTAGES, {"eps": float("nan")}, "eps is nan, must be at least 0"),
    (group_advantages, ADVANTAGES, {"clip": 0}, "clip.hard is 0, must be positive and finite, or None"),
    (
        group_advantages,
        ADVANTAGES,
        {"clip": Clip(5, -3)},
        "clip.soft is -3, must be positive and finite, or None",
    ),
    (
        best_variance_subset,
        SUBSET,
        {"rewards": rewards(6)},
        "rewards has 1 dimension(s), must be [prompts, candidates]",
    ),
    (
        best_variance_subset,
        SUBSET,
        {"rewards": IDS[None]},
        "rewards has dtype torch.int64, must have float32, bfloat16, float16 or float64",
    ),
    (
        best_variance_subset,
        SUBSET,
        {"rewards": rewards(1, 1025)},
        "rewards has 1025 candidates a prompt, must have at most 1024",
    ),
    (best_variance_subset, SUBSET, {"k": 0}, "k is 0, must be in [1, 6] for that many candidates"),
    (best_variance_subset, SUBSET, {"k": -(2**62)}, f"k is -{2**62}, must be in [1, 6]"),
    (best_variance_subset, SUBSET, {"k": 7}, "k is 7, must be in [1, 6] for that many candidates"),
    (best_variance_subset, SUBSET, {"k": 2.0}, "k is a float, must be an int"),
    (
        top_bottom,
        TOP_BOTTOM,
        {"rewards": rewards(2, 3, 2)},
        "rewards has 3 dimension(s), must be [prompts, candidates]",
    ),
    (top_bottom, TOP_BOTTOM, {"num_top": -1}, "num_top is -1, must be in [0, 6]"),
    (top_bottom, TOP_BOTTOM, {"num_bottom": 7}, "num_bottom is 7, must be in [0, 6]"),
    (top_bottom, TOP_BOTTOM, {"num_top": 5}, "num_top + num_bottom is 7, must be in [1, 6]"),
    (top_bottom, TOP_BOTTOM, {"num_top": 0, "num_bottom": 0}, "num_top + num_bottom is 0, must be in [1, 6]"),
    (top_bottom, TOP_BOTTOM, {"num_bottom": "2"}, "num_bottom is a str, must be an int"),
    (
        pareto_fronts,
        FRONTS,
        {"objectives": rewards(6, 3)},
        "objectives has 2 dimension(s), must be [prompts, candidates,",
    ),
    (
        pareto_fronts,
        FRONTS,
        {"objectives": rewards(1, 65, 2)},
        "objectives has 65 candidates a prompt, must have at most 64",
    ),
    (
        pareto_fronts,
        FRONTS,
        {"objectives": rewards(1, 6, 9)},
        "objectives has 9 objectives, must have at most 8",
    ),
    (
        pareto_fronts,
        FRONTS,
        {"objectives": rewards(1, 6, 2).to(torch.float8_e4m3fn)},
        "objectives has dtype torch.float8_e4m3fn, must have float32, bfloat16, float16 or float64",
    ),
]


@pytest.mark.parametrize(("op", "good", "bad", "message"), BAD, ids=[f"{b[0].__name__} {b[3]}" for b in BAD])
def test_names_the_bad_argument(op, good, bad, message):
    op(**good)
    with pytest.raises(ValueError, match=rf"\A{op.__name__}: [^\n]*{re.escape(message)}[^\n]*\Z"):
        op(**{**good, **bad})


BUFFER = rewards(4, 3)
BAD_COMPACTIONS = [
    ((IDS, [1.0]), {}, "buffers[0] is a list, must be a torch.Tensor"),
    ((IDS,), {}, "buffers has 0 tensor(s), must have 1 to 16"),
    ((IDS, *[BUFFER] * 17), {}, "buffers has 17 tensor(s), must have 1 to 16"),
    ((None, BUFFER), {}, "indices is a NoneType, must be a torch.Tensor"),
    ((IDS.int(), BUFFER), {}, "indices has dtype torch.int32, must have torch.int64"),
    ((IDS[:0], BUFFER), {}, "indices is empty: shape [0]"),
    ((IDS[None], BUFFER), {}, "indices has shape [1, 5], must have [5]"),
    ((IDS + 3, BUFFER), {}, "indices is 4 at 1, must be in [0, 4) for the rows of buffers[0]"),
    ((IDS - 1, BUFFER), {}, "indices is -1 at 0, must be in [0, 4) for the rows of buffers[0]"),
    ((IDS, BUFFER, rewards()), {}, "buffers[1] has 0 dimensions, must be [rows, ...]"),
    ((IDS, rewards(4, 0)), {}, "buffers[0] is empty: shape [4, 0]"),
    ((IDS, BUFFER.to("meta")), {}, "buffers[0] is on meta"),
    ((IDS, BUFFER), {"out": ()}, "out has 0 tensor(s), must have 1, one a buffer"),
    ((IDS, BUFFER), {"out": (None,)}, "out[0] is a NoneType, must be a torch.Tensor"),
    (
        (IDS, BUFFER),
        {"out": (rewards(5, 4),)},
        "out[0] has shape torch.Size([5, 4]) and dtype torch.float32, must have",
    ),
    (
        (IDS, BUFFER),
        {"out": (rewards(4, 3),)},
        "out[0] has shape torch.Size([4, 3]) and dtype torch.float32, must have",
    ),
    (
        (IDS, BUFFER),
        {"out": (rewards(5, 3).half(),)},
        "out[0] has shape torch.Size([5, 3]) and dtype torch.float16",
    ),
    (
        (IDS[:4], BUFFER),
        {"out": (BUFFER,)},
        "out[0] shares memory with another argument, must be memory of its own",
    ),
    ((IDS[:2], IDS), {"out": (IDS[2:4],)}, "out[0] shares memory with another argument"),
]


@pytest.mark.parametrize(
    ("arguments", "options", "message"), BAD_COMPACTIONS, ids=[m for *_, m in BAD_COMPACTIONS]
)
def test_compact_names_the_bad_argument(arguments, options, message):
    with pytest.raises(ValueError, match=rf"\Acompact: [^\n]*{re.escape(message)}[^\n]*\Z"):
        compact(*arguments, **options)


def test_compact_writes_no_row_twice():
    out = rewards(6, 3)
    with pytest.raises(ValueError, match=r"out\[1\] shares memory"):
        compact(IDS, BUFFER, BUFFER, out=(out[:5], out[1:]))


def test_compact_takes_sixteen_buffers():
    buffers = [torch.arange(9) + i for i in range(16)]
    for i, row in enumerate(compact(torch.tensor([8, 2]), *buffers)):
        assert row.tolist() == [8 + i, 2 + i]
