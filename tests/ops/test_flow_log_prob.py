from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowgrpo_fast.ops import Guidance, flow_log_prob, reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (2, 257), (2, 4097), (3, 16, 12, 10), (2, 16, 2, 6, 6), (2, 64, 16)]


def gradients(case, dtype, op):
    """log_prob, mean and the gradients of a fixed function of both, from one implementation."""
    velocity = case.velocity.detach().to(dtype or case.velocity.dtype).requires_grad_()
    guidance, leaves = None, [velocity]
    if case.guidance is not None:
        negative = case.guidance.negative_velocity.detach().to(velocity.dtype).requires_grad_()
        guidance = Guidance(negative, case.guidance.scale)
        leaves.append(negative)
    log_prob, mean = op(velocity, guidance)
    weight = torch.linspace(-1, 2, log_prob.numel()).to(log_prob.dtype)
    total = (weight * log_prob).sum() + (mean * mean.detach().sin()).sum()
    return log_prob.detach(), mean.detach(), torch.autograd.grad(total, leaves)


def check_against_reference(case):
    rest = (case.coeffs, case.step_index)
    log_prob, mean, grads = gradients(
        case,
        None,
        lambda v, g: flow_log_prob(
            case.latents, v, case.next_latents, *rest, g, case.x0_prev, return_mean=True
        ),
    )
    exact_log_prob, exact_mean, exact_grads = gradients(
        case,
        torch.float64,
        lambda v, g: reference.flow_log_prob(
            case.latents, v, case.next_latents, *rest, g, case.x0_prev, torch.float64
        ),
    )
    torch.testing.assert_close(log_prob.double(), exact_log_prob, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=4e-6)
    eps = torch.finfo(case.velocity.dtype).eps
    for got, want in zip(grads, exact_grads, strict=True):
        assert got.dtype == case.velocity.dtype
        torch.testing.assert_close(got.double(), want, rtol=max(2 * eps, 2e-5), atol=max(eps, 4e-6))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_float64_reference(case, shape, dtype):
    check_against_reference(case(shape, dtype))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    guided=st.booleans(),
    history=st.booleans(),
)
def test_matches_reference_on_any_shape(case, shape, dtypes, guided, history):
    check_against_reference(case(shape, *dtypes, guided=guided, history=history))


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 11)], ids=str)
def test_gradcheck(case, shape, guided):
    c = case(shape, torch.float64, guided=guided, history=True)
    negative = c.guidance.negative_velocity.requires_grad_() if guided else None

    def op(velocity, negative):
        guidance = Guidance(negative, 4.5) if guided else None
        return flow_log_prob(
            c.latents, velocity, c.next_latents, c.coeffs, c.step_index, guidance, c.x0_prev, return_mean=True
        )

    assert torch.autograd.gradcheck(op, (c.velocity.requires_grad_(), negative))


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
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_inference_without_grad_keeps_no_graph(case):
    c = case((2, 40))
    with torch.no_grad():
        log_prob = flow_log_prob(c.latents, c.velocity.requires_grad_(), c.next_latents, c.coeffs, 0)
    assert not log_prob.requires_grad
