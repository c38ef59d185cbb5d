"""The ops on residuals behind torch.library, their arguments, and elements far away."""

from __future__ import annotations

import mmap
import re
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import Size
from benchmarks.cases.matching import cases as matching_cases
from flowgrpo_fast import _C
from flowgrpo_fast.ops import implicit_matching, matching

OPS = torch.ops.flowgrpo_fast
NAMES = ("velocity", "target", "old_velocity", "reference_velocity")


def make(shape=(2, 3, 20), dtypes=(torch.float32,), weighted=True):
    """Arguments of both ops; `dtypes` are those of the velocities and the target, in turn."""
    generator = torch.Generator().manual_seed(5)
    arguments = {
        name: torch.randn(shape, generator=generator).to(dtypes[place % len(dtypes)])
        for place, name in enumerate(NAMES)
    }
    if weighted:
        real = torch.float64 if dtypes[0] is torch.float64 else torch.float32
        arguments["weight"] = torch.rand((shape[0], 1, *shape[2:]), generator=generator, dtype=real)
    return arguments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("velocities", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_opcheck(dtype, velocities):
    arguments = make(dtypes=(dtype,), weighted=velocities[0])
    arguments["velocity"].requires_grad_()
    flat = [arguments.get(name) for name in (*NAMES, "weight")]
    flat[2:4] = (velocity if wanted else None for velocity, wanted in zip(flat[2:4], velocities, strict=True))
    real = torch.float64 if dtype is torch.float64 else torch.float32
    one = torch.ones(2, dtype=real)
    for beta in (None, 0.3) if velocities[0] else (None,):
        torch.library.opcheck(OPS.matching, (*flat, beta))
    detached = [flat[0].detach(), *flat[1:]]
    drift = one if velocities[1] else None
    torch.library.opcheck(OPS.matching_backward, (*detached, None, one, None, None, None, drift))
    if velocities[0]:
        torch.library.opcheck(OPS.matching_backward, (*detached, None, None, one, None, None, drift))
        torch.library.opcheck(OPS.matching_backward, (*detached, 0.3, None, None, one, one, None))


def test_fake_tensors_give_shapes():
    arguments = make(dtypes=(torch.bfloat16,))
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(value) for name, value in arguments.items()}
        means = [*matching(**fakes), *implicit_matching(**fakes, beta=0.3)]
    assert {(mean.shape, mean.dtype) for mean in means} == {((2,), torch.float32)}


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_dispatch_modes_see_one_op_each_way_and_no_sync():
    arguments = make()
    arguments["velocity"].requires_grad_()
    with Recorder() as recorder:
        means = implicit_matching(**arguments, beta=0.3)
        (means.positive / means.positive_abs + means.reference_drift).sum().backward()
    assert recorder.seen.count("flowgrpo_fast.matching.default") == 1
    assert recorder.seen.count("flowgrpo_fast.matching_backward.default") == 1
    assert not [name for name in recorder.seen if "local_scalar" in name or "nonzero" in name]


@pytest.mark.slow
def test_compiles():
    arguments = make((2, 4, 8, 8), (torch.bfloat16, torch.float32))
    velocity = arguments.pop("velocity").requires_grad_()

    def loss(velocity):
        errors = matching(velocity, **arguments)
        means = implicit_matching(velocity, **arguments, beta=0.1)
        total = (means.positive / means.positive_abs + means.negative / means.negative_abs).sum()
        return [*errors, *means], total + means.reference_drift.sum() + (
            errors.error - errors.old_error
        ).exp().sum()

    eager, eager_total = loss(velocity)
    means, total = torch.compile(loss, fullgraph=True)(velocity)
    assert all(torch.equal(left, right) for left, right in zip(means, eager, strict=True))
    left, right = (torch.autograd.grad(value, velocity)[0] for value in (total, eager_total))
    torch.testing.assert_close(left, right)


GOOD = {name: torch.zeros(2, 4, 6) for name in NAMES}


def transposed():
    return torch.zeros(2, 6, 4).transpose(1, 2)


BAD = [
    ({"velocity": [1.0]}, "velocity is a list, must be a torch.Tensor"),
    ({"velocity": torch.zeros(6)}, "velocity has 1 dimension(s), must be [batch, ...]"),
    ({"velocity": torch.zeros(())}, "velocity has 0 dimension(s), must be [batch, ...]"),
    (
        {"velocity": torch.zeros(0, 4, 6)},
        "velocity is empty: shape [0, 4, 6], must have at least one element",
    ),
    ({"velocity": torch.zeros(2, 4, 6).int()}, "velocity has dtype torch.int32, must have float32"),
    (
        {"velocity": torch.zeros(2, 4, 6, device="meta")},
        "velocity is on meta with layout torch.strided, must be",
    ),
    ({"target": None}, "target is a NoneType, must be a torch.Tensor"),
    ({"target": torch.zeros(2, 4, 5)}, "target has shape [2, 4, 5], must have [2, 4, 6] as velocity has"),
    (
        {"target": torch.zeros(2, 4, 6).double()},
        "target has dtype torch.float64, must have float32, bfloat16",
    ),
    ({"old_velocity": 0.0}, "old_velocity is a float, must be a torch.Tensor"),
    ({"old_velocity": torch.zeros(1, 4, 6)}, "old_velocity has shape [1, 4, 6], must have [2, 4, 6]"),
    (
        {"reference_velocity": torch.zeros(2, 4, 6).to(torch.float8_e4m3fn)},
        "reference_velocity has dtype torch.flo",
    ),
    ({"reference_velocity": torch.zeros(2, 24)}, "reference_velocity has shape [2, 24], must have [2, 4, 6]"),
    ({"weight": 2.0}, "weight is a float, must be a torch.Tensor"),
    ({"weight": torch.zeros(2, 4, 6).half()}, "weight has dtype torch.float16, must have torch.float32"),
    ({"weight": torch.zeros(2, 4, 6).double()}, "weight has dtype torch.float64, must have torch.float32"),
    (
        {"weight": torch.zeros(2, 4)},
        "weight has shape [2, 4], must have [2, 4, 6] with 1 in place of the batch",
    ),
    ({"weight": torch.zeros(2, 2, 6)}, "weight has shape [2, 2, 6], must have [2, 4, 6] with 1 in place of"),
    ({"weight": torch.zeros(3, 1, 6)}, "weight has shape [3, 1, 6], must have [2, 4, 6] with 1 in place of"),
]


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize(("bad", "message"), BAD, ids=[message for _, message in BAD])
def test_names_the_bad_argument(bad, message, needs_grad):
    arguments = {**GOOD, **bad}
    if needs_grad and "target" not in bad:
        arguments["target"] = torch.zeros(2, 4, 6, requires_grad=True)
    for op, options in ((matching, {}), (implicit_matching, {"beta": 0.3})):
        with pytest.raises(ValueError, match=rf"\A{op.__name__}: [^\n]*{re.escape(message)}[^\n]*\Z"):
            op(**arguments, **options)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"beta": "1"}, "beta is a str, must be a number"),
        ({"beta": torch.ones(2)}, "beta is a Tensor, must be a number"),
        ({"beta": None}, "beta is a NoneType, must be a number"),
        ({"old_velocity": None}, "old_velocity is a NoneType, must be a torch.Tensor"),
    ],
)
def test_implicit_matching_names_the_bad_argument(bad, message):
    with pytest.raises(ValueError, match=rf"\Aimplicit_matching: {re.escape(message)}\Z"):
        implicit_matching(**{**GOOD, "beta": 0.3, **bad})


def test_names_axes_of_a_weight_that_are_not_neighbours():
    velocity = torch.zeros(2, 3, 4, 5)
    message = "weight has shape [2, 1, 4, 1], must have [2, 3, 4, 5] with 1 in place of the batch or of neighbouring"
    with pytest.raises(ValueError, match=re.escape(message)):
        matching(velocity, velocity, weight=torch.zeros(2, 1, 4, 1))
    matching(torch.zeros(2, 3, 1, 5), torch.zeros(2, 3, 1, 5), weight=torch.zeros(2, 1, 1, 1))


@given(element=st.integers(0, 2**40), shared=st.integers(1, 2**33), inner=st.integers(1, 2**29))
def test_weight_places_far_away(element, shared, inner):
    outer, rest = divmod(element, shared * inner)
    assert _C.weight_place(element, shared, inner) == outer * inner + rest % inner


@pytest.mark.parametrize(
    ("shared", "inner", "name"), [(0, 1, "shared"), (1, 0, "inner"), (1 << 40, 1 << 40, "shared")]
)
def test_weight_places_of_nothing(shared, inner, name):
    with pytest.raises(ValueError, match=rf"\Aweight_place: {name} is \d+, must be"):
        _C.weight_place(3, shared, inner)


def untouched_zeros(shape, dtype):
    """Zeros that take no memory: pages of a private mapping that are only read are all the same page."""
    count = torch.Size(shape).numel() * dtype.itemsize
    pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs private anonymous mappings")
def test_elements_beyond_2_31():
    shape = (1, (1 << 20) + 1, 1 << 11)
    velocity, target = (untouched_zeros(shape, torch.bfloat16) for _ in range(2))
    velocity[0, -1, -3:] = 3.0
    target[0, 0, 0] = 5.0
    weight = torch.ones(1, shape[1], 1)
    weight[0, -1] = 7.0
    means = matching(velocity, target, weight=weight)
    elements = velocity.numel()
    torch.testing.assert_close(means.error, torch.tensor([(3 * 7 * 9 + 25) / elements]))
    torch.testing.assert_close(means.error_abs, torch.tensor([(3 * 7 * 3 + 5) / elements]))


@pytest.mark.slow
def test_the_contenders_of_the_benchmark_agree(benchmark_sample):
    for case in matching_cases(Size("toy", 4, benchmark_sample), torch.float32, torch.device("cpu")):
        ours = case.contenders["ours"]()
        for name in ("eager", "compiled"):
            torch.testing.assert_close(case.contenders[name](), ours, rtol=1e-4, atol=1e-6)
