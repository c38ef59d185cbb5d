from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowgrpo_fast.ops import flow_log_prob, flow_step, philox_normal, reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Shapes of models ([B, C, H, W], video [B, C, F, H, W], packed [B, L, C]) and of edges: one element, one sample, tails
# around a tile (256) and a chunk (4096).
SHAPES = [
    (1, 1),
    (2, 3),
    (1, 255),
    (3, 256),
    (2, 257),
    (2, 4095),
    (2, 4097),
    (3, 16, 12, 10),
    (2, 16, 2, 6, 6),
    (2, 64, 16),
    (2, 9000),
]


def check_against_reference(case, **options):
    step = case.step_index
    out = flow_step(
        case.latents,
        case.velocity,
        case.coeffs,
        step,
        case.seed,
        case.guidance,
        case.x0_prev,
        return_x0_pred=True,
    )
    noise = philox_normal(case.seed, case.latents.shape[1:], step)
    exact_next, _, exact_x0 = reference.flow_step(
        case.latents, case.velocity, case.coeffs, step, noise, case.guidance, case.x0_prev, torch.float64
    )
    # The log-probability is judged on the value the kernel stored, which rounding may have put one step away.
    exact_log_prob, _ = reference.flow_log_prob(
        case.latents,
        case.velocity,
        out.next_latents,
        case.coeffs,
        step,
        case.guidance,
        case.x0_prev,
        torch.float64,
    )
    eps = torch.finfo(case.latents.dtype).eps
    assert out.next_latents.dtype == case.latents.dtype
    assert out.next_latents.shape == case.latents.shape
    torch.testing.assert_close(out.next_latents.double(), exact_next.double(), rtol=1.01 * eps, atol=4e-6)
    torch.testing.assert_close(out.x0_pred.double(), exact_x0, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(out.log_prob.double(), exact_log_prob, rtol=2e-6, atol=2e-6)


@pytest.mark.witness
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_float64_reference(case, shape, dtype, device):
    check_against_reference(case(shape, dtype, device=device))


@pytest.mark.witness
@pytest.mark.parametrize("velocity_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("history", [False, True], ids=["first_order", "second_order"])
def test_matches_reference_in_every_combination(case, dtype, velocity_dtype, guided, history, device):
    check_against_reference(case((2, 4, 9, 31), dtype, velocity_dtype, guided, history, device))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple),
    dtype=st.sampled_from(FLOATS),
    guided=st.booleans(),
    history=st.booleans(),
)
def test_matches_reference_on_any_shape(case, shape, dtype, guided, history):
    check_against_reference(case(shape, dtype, guided=guided, history=history))


@pytest.mark.witness
def test_float64_is_computed_in_double(case, device):
    c = case((2, 3, 50), torch.float64, guided=True, history=True, device=device)
    out = flow_step(c.latents, c.velocity, c.coeffs, c.step_index, c.seed, c.guidance, c.x0_prev, True)
    noise = philox_normal(c.seed, (3, 50), c.step_index)
    expected = reference.flow_step(
        c.latents, c.velocity, c.coeffs, c.step_index, noise, c.guidance, c.x0_prev, torch.float64
    )
    for got, want in zip((out.next_latents, out.log_prob, out.x0_pred), expected, strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


@pytest.mark.witness
def test_step_index_forms_agree(case, device):
    c = case((3, 100), device=device)
    per_sample = torch.full((3,), 2, device=device)
    outputs = [
        flow_step(c.latents, c.velocity, c.coeffs, s, c.seed) for s in (2, torch.tensor(2), per_sample)
    ]
    for other in outputs[1:]:
        assert torch.equal(outputs[0].next_latents, other.next_latents)
        assert torch.equal(outputs[0].log_prob, other.log_prob)
    assert outputs[0].x0_pred is None


@pytest.mark.witness
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_replay_is_bit_equal(case, dtype, device):
    c = case((3, 16, 20, 20), dtype, guided=True, history=True, device=device)
    out = flow_step(c.latents, c.velocity, c.coeffs, c.step_index, c.seed, c.guidance, c.x0_prev)
    replayed = flow_log_prob(
        c.latents, c.velocity, out.next_latents, c.coeffs, c.step_index, c.guidance, c.x0_prev
    )
    assert torch.equal(out.log_prob, replayed)


@pytest.mark.witness
def test_deterministic_row_is_the_mean(case, device):
    c = case((2, 300), device=device)
    c.coeffs[:, 3] = c.coeffs[:, 4] = c.coeffs[:, 5] = 0  # c, d, inv_var
    out = flow_step(c.latents, c.velocity, c.coeffs, 1, c.seed)
    mean = reference.transition_mean(c.latents, c.velocity, c.coeffs, 1)
    assert torch.equal(out.next_latents, mean)
    assert torch.equal(out.log_prob, c.coeffs[1, 6].expand(2))


@pytest.mark.witness
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 255, 256, 4096, 5000])
@pytest.mark.parametrize("deterministic", [False, True])
def test_non_finite_velocity_shows_in_its_log_prob(case, bad, where, deterministic, device):
    c = case((3, 5001), device=device)
    if deterministic:
        c.coeffs[:, 3] = c.coeffs[:, 5] = 0  # c and inv_var
    c.velocity[1, where] = bad
    out = flow_step(c.latents, c.velocity, c.coeffs, 1, c.seed)
    replayed = flow_log_prob(c.latents, c.velocity, out.next_latents, c.coeffs, 1)
    finite = [True, False, True]
    assert out.log_prob.isfinite().tolist() == finite
    assert replayed.isfinite().tolist() == finite


def test_no_gradient_flows(case):
    c = case((2, 30))
    out = flow_step(c.latents, c.velocity.requires_grad_(), c.coeffs, 1, c.seed)
    assert not out.next_latents.requires_grad
    assert not out.log_prob.requires_grad
