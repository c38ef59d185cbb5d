from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.cases import Size
from benchmarks.cases.flow import cases as flow_cases
from flowgrpo_fast.ops import Extras, Guidance, flow_log_prob, flow_step, reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# (2, 5, 3, 5) and (3, 41, 13): positions and channels that fill neither a tile nor a group of eight.
SHAPES = [
    (1, 1),
    (2, 257),
    (2, 4097),
    (3, 16, 12, 10),
    (2, 16, 2, 6, 6),
    (2, 64, 16),
    (2, 5, 3, 5),
    (3, 41, 13),
]


def extras_of(case, axis=1):
    """All extras, the reference made of what the case has: neither its dtype nor its values are the velocity's."""
    negative = None if case.guidance is None else case.latents.flip(0).contiguous()
    return Extras(True, case.next_latents.neg(), negative, axis)


def reference_outputs(case, velocity, guidance, extras):
    """log_prob, mean, drift and map in float64."""
    rest = (case.coeffs, case.step_index)
    log_prob, mean = reference.flow_log_prob(
        case.latents, velocity, case.next_latents, *rest, guidance, case.x0_prev, torch.float64
    )
    other = reference.guided_velocity(
        extras.reference_velocity,
        None if guidance is None else Guidance(extras.reference_negative, guidance.scale),
        torch.float64,
    )
    mixed = reference.guided_velocity(velocity, guidance, torch.float64)
    drift = reference.flow_drift(mixed, other, *rest, torch.float64)
    log_prob_map = reference.flow_log_prob_map(case.next_latents, mean, *rest, extras.map_axis, torch.float64)
    return log_prob, mean, drift, log_prob_map


def gradients(case, dtype, op):
    """All outputs, and the gradients of a fixed function of them, from one implementation."""
    velocity = case.velocity.detach().to(dtype or case.velocity.dtype).requires_grad_()
    guidance, leaves = None, [velocity]
    if case.guidance is not None:
        negative = case.guidance.negative_velocity.detach().to(velocity.dtype).requires_grad_()
        guidance = Guidance(negative, case.guidance.scale)
        leaves.append(negative)
    outputs = op(velocity, guidance)
    total = 0
    for place, output in enumerate(outputs):
        weight = torch.linspace(-1, 2 + place, output.numel(), device=output.device, dtype=torch.float64)
        total = total + (weight.to(output.dtype).view_as(output) * output).sum()
    return [output.detach() for output in outputs], torch.autograd.grad(total, leaves)


def check_against_reference(case, axis=1):
    extras = extras_of(case, axis)
    rest = (case.coeffs, case.step_index)
    outputs, grads = gradients(
        case,
        None,
        lambda v, g: flow_log_prob(case.latents, v, case.next_latents, *rest, g, case.x0_prev, extras),
    )
    exact_outputs, exact_grads = gradients(
        case, torch.float64, lambda v, g: reference_outputs(case, v, g, extras)
    )
    bounds = ((2e-6, 2e-6), (1e-6, 4e-6), (2e-6, 2e-6), (4e-6, 4e-6))  # relative, absolute
    for got, want, (rtol, atol) in zip(outputs, exact_outputs, bounds, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)
    eps = torch.finfo(case.velocity.dtype).eps
    for got, want in zip(grads, exact_grads, strict=True):
        assert got.dtype == case.velocity.dtype
        torch.testing.assert_close(got.double(), want, rtol=max(2 * eps, 2e-5), atol=max(eps, 4e-5))


@pytest.mark.witness
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_float64_reference(case, shape, dtype, axis, device):
    check_against_reference(case(shape, dtype, device=device), axis)


@pytest.mark.witness
@pytest.mark.parametrize("velocity_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference_with_guidance_and_history(case, dtype, velocity_dtype, device):
    check_against_reference(case((2, 4, 9, 31), dtype, velocity_dtype, True, True, device))


@pytest.mark.witness
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_matches_reference_without_extras(case, dtype, device):
    c = case((2, 4, 9, 31), dtype, guided=True, history=True, device=device)
    rest = (c.next_latents, c.coeffs, c.step_index)
    (got,), grads = gradients(c, None, lambda v, g: [flow_log_prob(c.latents, v, *rest, g, c.x0_prev)])
    (want,), exact_grads = gradients(
        c, torch.float64, lambda v, g: reference_outputs(c, v, g, extras_of(c))[:1]
    )
    assert got.dtype == dtype
    for left, right in zip([got, *grads], [want, *exact_grads], strict=True):
        bound = {"rtol": 1e-13, "atol": 1e-15} if dtype is torch.float64 else {"rtol": 2e-5, "atol": 4e-6}
        torch.testing.assert_close(left.double(), right, **bound)


@pytest.mark.witness
@pytest.mark.parametrize("axis", [1, -1])
def test_float64_is_computed_in_double(case, axis, device):
    c = case((2, 4, 9, 31), torch.float64, guided=True, history=True, device=device)
    extras = extras_of(c, axis)
    rest = (c.next_latents, c.coeffs, c.step_index)
    outputs, grads = gradients(c, None, lambda v, g: flow_log_prob(c.latents, v, *rest, g, c.x0_prev, extras))
    exact, exact_grads = gradients(c, torch.float64, lambda v, g: reference_outputs(c, v, g, extras))
    for got, want in zip([*outputs, *grads], [*exact, *exact_grads], strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    guided=st.booleans(),
    history=st.booleans(),
    axis=st.sampled_from([1, -1]),
)
def test_matches_reference_on_any_shape(case, shape, dtypes, guided, history, axis):
    check_against_reference(case(shape, *dtypes, guided=guided, history=history), axis)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 11)], ids=str)
@pytest.mark.parametrize("axis", [1, -1, None])
def test_gradcheck(case, shape, guided, axis):
    """With all extras, and without: two ops."""
    c = case(shape, torch.float64, guided=guided, history=True)
    negative = c.guidance.negative_velocity.requires_grad_() if guided else None
    extras = None if axis is None else extras_of(c, axis)

    def op(velocity, negative):
        guidance = Guidance(negative, 4.5) if guided else None
        return flow_log_prob(
            c.latents, velocity, c.next_latents, c.coeffs, c.step_index, guidance, c.x0_prev, extras
        )

    assert torch.autograd.gradcheck(op, (c.velocity.requires_grad_(), negative))


WANTED = [
    Extras(),
    Extras(mean=True),
    Extras(reference_velocity=torch.ones(3, 16, 20, 20)),
    Extras(map_axis=1),
    Extras(map_axis=-1),
    Extras(True, torch.ones(3, 16, 20, 20), None, 1),
]


@pytest.mark.witness
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("extras", WANTED, ids=["none", "mean", "drift", "map", "last_axis_map", "all"])
def test_log_prob_is_the_step_s_whatever_else_is_asked_for(case, dtype, extras, device):
    c = case((3, 16, 20, 20), dtype, guided=True, history=True, device=device)
    if extras.reference_velocity is not None:
        extras = extras._replace(reference_velocity=extras.reference_velocity.to(device))
    out = flow_step(c.latents, c.velocity, c.coeffs, c.step_index, c.seed, c.guidance, c.x0_prev)
    rest = (out.next_latents, c.coeffs, c.step_index, c.guidance, c.x0_prev)
    replayed = flow_log_prob(c.latents, c.velocity, *rest, extras)
    assert torch.equal(replayed.log_prob, out.log_prob)
    given = (True, extras.mean, extras.reference_velocity is not None, extras.map_axis is not None)
    assert [value is not None for value in replayed] == list(given)
    if extras.map_axis is not None:
        mean = replayed.log_prob_map.double().flatten(1).mean(1)
        torch.testing.assert_close(mean, replayed.log_prob.double(), rtol=2e-6, atol=2e-6)


def test_drift_of_the_same_velocity_is_zero(case):
    c = case((2, 5000), torch.bfloat16, guided=True)
    same = Extras(reference_velocity=c.velocity, reference_negative=c.guidance.negative_velocity)
    out = flow_log_prob(c.latents, c.velocity, c.next_latents, c.coeffs, c.step_index, c.guidance, None, same)
    assert torch.equal(out.drift, torch.zeros(2))


def test_reference_may_be_guided_already(case):
    c = case((2, 4, 9, 9), guided=True)
    rest = (c.next_latents, c.coeffs, c.step_index, c.guidance, None)
    halves = extras_of(c)
    mixed = reference.guided_velocity(
        halves.reference_velocity, Guidance(halves.reference_negative, 4.5), torch.float32
    )
    left = flow_log_prob(c.latents, c.velocity, *rest, halves).drift
    right = flow_log_prob(c.latents, c.velocity, *rest, Extras(reference_velocity=mixed)).drift
    assert torch.equal(left, right)


def test_gradients_of_single_outputs_add_up(case):
    """One backward of all outputs is the sum of the backwards of each."""
    c = case((2, 6, 7, 9), guided=True, history=True)
    velocity = c.velocity.requires_grad_()
    rest = (c.next_latents, c.coeffs, c.step_index, c.guidance, c.x0_prev)
    single = []
    for place in range(4):
        out = flow_log_prob(c.latents, velocity, *rest, extras_of(c))
        single.append(torch.autograd.grad(out[place].square().sum(), velocity)[0])
    out = flow_log_prob(c.latents, velocity, *rest, extras_of(c))
    (together,) = torch.autograd.grad(sum(value.square().sum() for value in out), velocity)
    torch.testing.assert_close(together, sum(single), rtol=1e-5, atol=1e-5 * float(together.abs().max()))


def test_gradient_is_the_closed_form(case):
    c = case((2, 700))
    log_prob = flow_log_prob(c.latents, c.velocity.requires_grad_(), c.next_latents, c.coeffs, 3)
    log_prob.sum().backward()
    _, mean = reference.flow_log_prob(c.latents, c.velocity.detach(), c.next_latents, c.coeffs, 3)
    b, inv_var = c.coeffs[3, 2], c.coeffs[3, 5]
    torch.testing.assert_close(
        c.velocity.grad, inv_var * b / 700 * (c.next_latents - mean), rtol=1e-5, atol=1e-9
    )


def test_only_the_negative_needs_a_gradient(case):
    c = case((2, 40), guided=True)
    negative = c.guidance.negative_velocity.requires_grad_()
    flow_log_prob(c.latents, c.velocity, c.next_latents, c.coeffs, 0, c.guidance).sum().backward()
    assert c.velocity.grad is None
    assert negative.grad.abs().max() > 0


def test_backward_is_not_differentiable_again(case):
    c = case((2, 40))
    log_prob = flow_log_prob(c.latents, c.velocity.requires_grad_(), c.next_latents, c.coeffs, 0)
    (grad,) = torch.autograd.grad(log_prob.square().sum(), c.velocity, create_graph=True)
    with pytest.raises(ValueError, match="must be differentiated once only"):
        grad.sum().backward()


def test_inference_without_grad_keeps_no_graph(case):
    c = case((2, 40))
    with torch.no_grad():
        log_prob = flow_log_prob(c.latents, c.velocity.requires_grad_(), c.next_latents, c.coeffs, 0)
    assert not log_prob.requires_grad


@pytest.mark.slow
def test_the_contenders_of_the_benchmark_agree(benchmark_sample):
    for case in flow_cases(Size("toy", 4, benchmark_sample), torch.float32, torch.device("cpu")):
        outputs = {name: run() for name, run in case.contenders.items()}
        if case.operation in ("sampling", "noise"):  # each contender draws its own
            continue
        for name in ("eager", "compiled"):
            torch.testing.assert_close(outputs[name], outputs["ours"], rtol=1e-4, atol=2e-6)
