"""The residuals of velocity predictions against their definitions in float64, written out here."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrpo_fast.ops import (
    ImplicitMatching,
    Matching,
    build_info,
    implicit_matching,
    matching,
    reference,
)

ROOT = Path(__file__).resolve().parents[2]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DIFFERENTIABLE = {"error", "old_drift", "positive", "negative", "reference_drift"}
# Samples that fill neither a tile (256), a chunk (4096) nor a group of eight, and those that do.
SHAPES = [
    (1, 1),
    (2, 257),
    (2, 4097),
    (2, 16, 12, 10),
    (2, 8, 2, 6, 8),
    (2, 64, 16),
    (2, 5, 3, 5),
    (3, 41, 13),
]
# Where the weights repeat.
REPEATED = {
    "none": lambda shape: shape,
    "channels first": lambda shape: (shape[0], 1, *shape[2:]),
    "channels last": lambda shape: (*shape[:-1], 1),
    "positions": lambda shape: (*shape[:2], *[1] * (len(shape) - 2)),
    "batch": lambda shape: (1, *shape[1:]),
    "batch and channels": lambda shape: (1, 1, *shape[2:]),
    "everything": lambda shape: (shape[0], *[1] * (len(shape) - 1)),
}


def make(shape, dtypes=(torch.float32,), old=True, other=True, weight=None, device="cpu"):
    """Arguments of the op; `dtypes` are those of velocity, target, old and reference velocity, in turn."""
    generator = torch.Generator().manual_seed(sum(shape) + 7 * len(shape))
    real = torch.float64 if dtypes[0] is torch.float64 else torch.float32

    def normal(place):
        dtype = dtypes[place % len(dtypes)]
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    arguments = {"velocity": normal(0), "target": normal(1)}
    if old:
        arguments["old_velocity"] = normal(2)
    if other:
        arguments["reference_velocity"] = normal(3)
    if weight is not None:
        values = torch.rand(REPEATED[weight](shape), generator=generator, dtype=torch.float64) + 0.1
        arguments["weight"] = values.to(real).to(device)
    return arguments


def exact_means(arguments, beta=None):
    """Every mean in float64, from its definition: those of `matching`, or with a beta of `implicit_matching`."""
    tensors = {name: value.double() for name, value in arguments.items()}
    velocity, target = tensors["velocity"], tensors["target"]
    old, other = tensors.get("old_velocity"), tensors.get("reference_velocity")
    weight = tensors.get("weight", torch.ones((), dtype=torch.float64, device=velocity.device))
    if beta is None:
        differences = {"error": velocity - target}
        if old is not None:
            differences |= {"old_error": old - target, "old_drift": velocity - old}
        if other is not None:
            differences |= {"reference_drift": velocity - other, "reference_error": other - target}
    else:
        differences = {
            "positive": (1 - beta) * old + beta * velocity - target,
            "negative": (1 + beta) * old - beta * velocity - target,
        }
        if other is not None:
            differences["reference_drift"] = velocity - other
    axes = tuple(range(1, velocity.ndim))
    means = {}
    for name, difference in differences.items():
        means[name] = (weight * difference**2).mean(axes)
        if f"{name}_abs" in Matching._fields + ImplicitMatching._fields:
            means[f"{name}_abs"] = (weight * difference.abs()).mean(axes).detach()
    return means


def op_means(arguments, beta=None):
    """Every mean of the op, of the one or with a beta of the other, without those not asked for."""
    means = matching(**arguments) if beta is None else implicit_matching(**arguments, beta=beta)
    return {name: mean for name, mean in means._asdict().items() if mean is not None}


def with_gradient(velocity, means):
    """The means, and the gradient of a fixed function of those that have one."""
    total = 0
    for place, mean in enumerate(means.values()):
        if mean.requires_grad:
            factors = torch.linspace(-1, 2 + place, mean.numel(), dtype=torch.float64)
            total = total + (factors.to(mean) * mean).sum()
    (gradient,) = torch.autograd.grad(total, velocity)
    return {name: mean.detach() for name, mean in means.items()}, gradient


def run(arguments, beta=None):
    velocity = arguments["velocity"].detach().clone().requires_grad_()
    return with_gradient(velocity, op_means({**arguments, "velocity": velocity}, beta))


def check_one(arguments, beta):
    means, gradient = run(arguments, beta)
    exact = {name: value.double() for name, value in arguments.items()}
    exact["velocity"].requires_grad_()
    wanted, wanted_gradient = with_gradient(exact["velocity"], exact_means(exact, beta))
    assert list(means) == list(wanted)
    for name, mean in means.items():
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean.double(), wanted[name], rtol=2e-6, atol=1e-7)
    eps = torch.finfo(gradient.dtype).eps
    assert gradient.dtype == arguments["velocity"].dtype
    scale = float(wanted_gradient.abs().max())
    floor = max(2e-6 * scale, 6e-8)  # float16's smallest step
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=max(eps, 4e-6), atol=floor)


def check(arguments, beta=0.3):
    """Both ops, where there is an old velocity."""
    check_one(arguments, None)
    if "old_velocity" in arguments:
        check_one(arguments, beta)


@pytest.mark.witness
@pytest.mark.parametrize("weight", [None, *REPEATED], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64_definitions(shape, weight, device):
    check(make(shape, weight=weight, device=device))


@pytest.mark.witness
@pytest.mark.parametrize("given", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(3, 41, 13), (2, 8, 12, 10)], ids=str)
def test_matches_with_and_without_each_velocity(shape, dtype, given, device):
    check(make(shape, (dtype,), *given, weight="channels last", device=device))


@pytest.mark.witness
@pytest.mark.parametrize("turn", range(3))
def test_dtypes_mix(turn, device):
    dtypes = FLOATS[turn:] + FLOATS[:turn]
    check(make((2, 4, 9, 31), (*dtypes, dtypes[1]), weight="channels first", device=device))


@pytest.mark.witness
@pytest.mark.parametrize("weight", [None, *REPEATED], ids=str)
@pytest.mark.parametrize("given", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_float64_is_computed_in_double(given, weight, device):
    arguments = make((2, 4, 9, 31), (torch.float64,), *given, weight=weight, device=device)
    for beta in (None, 0.3) if "old_velocity" in arguments else (None,):
        means, gradient = run(arguments, beta)
        velocity = arguments["velocity"].detach().clone().requires_grad_()
        wanted, exact = with_gradient(velocity, exact_means({**arguments, "velocity": velocity}, beta))
        assert {mean.dtype for mean in means.values()} == {torch.float64}
        for name, mean in means.items():
            torch.testing.assert_close(mean, wanted[name], rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, exact, rtol=1e-12, atol=1e-15)


@pytest.mark.witness
@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0, 2.5])
def test_any_beta(beta, device):
    check(make((2, 4, 9, 31), device=device), beta)


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple),
    dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 4),
    old=st.booleans(),
    other=st.booleans(),
    weight=st.sampled_from([None, *REPEATED]),
    beta=st.sampled_from([1.0, 0.1]),
)
def test_matches_on_any_shape(shape, dtypes, old, other, weight, beta):
    check(make(shape, dtypes, old, other, weight), beta)


@pytest.mark.parametrize("shape", [(2, 6000, 3), (1, 3, 70, 67), (2, 7, 5, 300)], ids=str)
@pytest.mark.parametrize("weight", REPEATED)
def test_weights_across_chunks(shape, weight):
    check(make(shape, weight=weight))


@pytest.mark.parametrize("weight", [None, *REPEATED], ids=str)
def test_reference_is_the_definition(weight):
    arguments = make((2, 5, 3, 4), (torch.float64,), weight=weight)
    for means, exact, fields in (
        (reference.matching(**arguments, dtype=torch.float64), exact_means(arguments), Matching._fields),
        (
            reference.implicit_matching(**arguments, beta=0.3, dtype=torch.float64),
            exact_means(arguments, 0.3),
            ImplicitMatching._fields,
        ),
    ):
        assert means.keys() == exact.keys() == set(fields)
        for name, mean in means.items():
            torch.testing.assert_close(mean, exact[name], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("beta", [None, 1.0, 0.3])
@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 11)], ids=str)
def test_gradcheck(shape, other, beta):
    arguments = make(shape, (torch.float64,), True, other, weight="channels first")
    velocity = arguments.pop("velocity").requires_grad_()

    def op(velocity):
        means = op_means({"velocity": velocity, **arguments}, beta)
        return tuple(mean for mean in means.values() if mean.requires_grad)

    assert torch.autograd.gradcheck(op, (velocity,))


BETAS = pytest.mark.parametrize("beta", [None, 0.3], ids=["matching", "implicit"])


@BETAS
def test_only_means_of_the_velocity_s_squares_are_differentiable(beta):
    arguments = make((2, 3, 11))
    arguments["velocity"].requires_grad_()
    means = op_means(arguments, beta)
    assert {name for name, mean in means.items() if mean.requires_grad} == DIFFERENTIABLE & set(means)
    with torch.no_grad():
        assert not any(mean.requires_grad for mean in op_means(arguments, beta).values())


@BETAS
def test_all_but_the_velocity_are_constants(beta):
    arguments = {name: value.requires_grad_() for name, value in make((2, 3, 11), weight="none").items()}
    sum(mean.sum() for mean in op_means(arguments, beta).values() if mean.requires_grad).backward()
    assert {name for name, value in arguments.items() if value.grad is not None} == {"velocity"}


@BETAS
def test_gradients_of_single_outputs_add_up(beta):
    arguments = make((2, 6, 7, 9), weight="channels first")
    velocity = arguments["velocity"].requires_grad_()
    chosen = [mean.square().sum() for mean in op_means(arguments, beta).values() if mean.requires_grad]
    single = [torch.autograd.grad(total, velocity, retain_graph=True)[0] for total in chosen]
    (together,) = torch.autograd.grad(sum(chosen), velocity)
    torch.testing.assert_close(together, sum(single), rtol=1e-5, atol=1e-6 * float(together.abs().max()))


def test_equal_velocities_have_no_drift_and_equal_errors():
    arguments = make((2, 5000), (torch.bfloat16,), old=False, other=False)
    same = arguments["velocity"].clone()
    means = matching(**arguments, old_velocity=same, reference_velocity=same)
    implicit = implicit_matching(**arguments, old_velocity=same, beta=0.7)
    assert torch.equal(means.old_drift, torch.zeros(2))
    assert torch.equal(means.reference_drift, torch.zeros(2))
    for error in (means.old_error, means.reference_error, implicit.positive, implicit.negative):
        assert torch.equal(error, means.error)
    for absolute in (means.old_error_abs, implicit.positive_abs, implicit.negative_abs):
        assert torch.equal(absolute, means.error_abs)


def test_the_whole_step_s_positive_is_the_velocity():
    arguments = make((2, 7, 33, 31), other=False)
    implicit, means = implicit_matching(**arguments, beta=1.0), matching(**arguments)
    assert torch.equal(implicit.positive, means.error)
    assert torch.equal(implicit.positive_abs, means.error_abs)


def test_means_do_not_depend_on_what_else_is_asked_for():
    arguments = make((3, 16, 20, 21))
    whole = op_means(arguments)
    for missing in (["old_velocity"], ["reference_velocity"], ["old_velocity", "reference_velocity"]):
        part = op_means({name: value for name, value in arguments.items() if name not in missing})
        assert len(part) < len(whole)
        assert all(torch.equal(mean, whole[name]) for name, mean in part.items())
    assert torch.equal(op_means(arguments, 0.3)["reference_drift"], whole["reference_drift"])


@BETAS
def test_a_weight_of_one_changes_no_bit(beta):
    arguments = make((2, 7, 33, 31), (torch.bfloat16,))
    for shape in ((2, 7, 33, 31), (2, 1, 33, 31), (1, 1, 1, 1), (2, 7, 33, 1)):
        means, gradient = run({**arguments, "weight": torch.ones(shape)}, beta)
        plain, plain_gradient = run(arguments, beta)
        assert torch.equal(gradient, plain_gradient)
        assert all(torch.equal(means[name], plain[name]) for name in plain)


def test_backward_is_not_differentiable_again():
    arguments = make((2, 40))
    velocity = arguments["velocity"].requires_grad_()
    (grad,) = torch.autograd.grad(matching(**arguments).error.square().sum(), velocity, create_graph=True)
    with pytest.raises(ValueError, match="must be differentiated once only"):
        grad.sum().backward()


# The same bits alone, in any batch, on any number of threads, instruction set and device.


def everything(arguments, rows):
    """All results of both ops for some rows of the arguments."""
    chosen = {name: value[rows] for name, value in arguments.items()}
    results = []
    for beta in (None, 0.3):
        means, gradient = run(chosen, beta)
        results += [*means.values(), gradient]
    return results


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


@pytest.mark.witness
@BETAS
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("shape", "weight"), [((7, 3, 41), "channels last"), ((5, 16, 33, 33), "channels first")]
)
def test_a_sample_does_not_see_its_batch(shape, weight, dtype, beta, device):
    arguments = make(shape, (dtype,), weight=weight, device=device)

    def results(rows):
        chosen = {name: value[rows] for name, value in arguments.items()}
        velocity = chosen["velocity"].requires_grad_()
        means = op_means(chosen, beta)
        total = sum(mean.sum() for mean in means.values() if mean.requires_grad)
        return [*(mean.detach() for mean in means.values()), torch.autograd.grad(total, velocity)[0]]

    whole = results(torch.arange(shape[0]))
    for rows in (torch.tensor([2]), torch.tensor([4, 0, 3]), torch.tensor([1, 2, 3, 4, 0])):
        assert_same(results(rows), [result[rows] for result in whole])


@pytest.mark.parametrize("shape", [(6, 16, 33, 33), (1, 300_001)], ids=str)
def test_thread_count_changes_nothing(shape):
    arguments = make(shape, weight="none")
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 3, 7):
            torch.set_num_threads(num_threads)
            results.append(everything(arguments, torch.arange(shape[0])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(results[0], other)


def test_flushing_subnormals_changes_nothing():
    arguments = make((2, 5000), (torch.float16,), weight="none")
    expected = everything(arguments, torch.arange(2))
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        assert_same(expected, everything(arguments, torch.arange(2)))
    finally:
        torch.set_flush_denormal(False)


def digest():
    """One hash over the results for every dtype and awkward shapes."""
    sha = hashlib.sha256()
    for dtype in (*FLOATS, torch.float64):
        for shape in ((3, 41), (3, 16, 20, 21), (2, 4096), (2, 8195)):
            for tensor in everything(make(shape, (dtype,), weight="channels last"), torch.arange(shape[0])):
                sha.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize("isa", build_info()["isas"])
def test_every_instruction_set_gives_the_same_bits(isa):
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
        "from test_matching import digest; print(digest())"
    )
    environment = {**os.environ, "FLOWGRPO_FAST_ISA": isa}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if "must be one of" in result.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == digest()


@pytest.mark.witness
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("weight", [None, "channels first", "channels last", "none"], ids=str)
def test_gradients_have_the_cpu_s_bits(dtype, weight, device):
    for shape in ((2, 8, 12, 10), (2, 5, 3, 5)):
        arguments = make(shape, (dtype,), weight=weight)
        there = {name: value.to(device) for name, value in arguments.items()}
        for beta in (None, 0.3):
            assert torch.equal(run(there, beta)[1].cpu(), run(arguments, beta)[1])
