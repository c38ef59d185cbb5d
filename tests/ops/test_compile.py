"""The ops behind torch.library: opcheck, torch.compile, fake tensors, dispatch modes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from flowgrpo_fast.ops import Extras, flow_log_prob, flow_step, philox_normal
from flowgrpo_fast.ops._binding import Transition

OPS = torch.ops.flowgrpo_fast
FLOATS = (torch.float32, torch.bfloat16, torch.float64)


def flat_transition(c, per_sample=True):
    negative, scale = c.guidance or (None, 1.0)
    return Transition(
        c.latents, c.velocity, c.coeffs, 2, c.step_index if per_sample else None, negative, scale, c.x0_prev
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("extra", [False, True], ids=["plain", "everything"])
def test_opcheck(case, dtype, extra):
    c = case((2, 3, 20), dtype, guided=extra, history=extra)
    transition = flat_transition(c, per_sample=extra)
    torch.library.opcheck(OPS.flow_step, (*transition, c.seed, extra))
    torch.library.opcheck(OPS.philox, (c.seed, [3, 20], 2, None, 1, dtype))
    c.velocity.requires_grad_()
    if extra:
        c.guidance.negative_velocity.requires_grad_()
    torch.library.opcheck(OPS.flow_log_prob, (*transition, c.next_latents))
    reference = (c.next_latents.neg(), c.latents.clone() if extra else None)
    torch.library.opcheck(OPS.flow_log_prob_extras, (*transition, c.next_latents, extra, *reference, 2))
    torch.library.opcheck(OPS.flow_log_prob_extras, (*transition, c.next_latents, True, None, None, 0))


def test_opcheck_of_the_backward(case):
    c = case((2, 3, 20), guided=True, history=True)
    incoming = (torch.ones(2), torch.ones(2, 3, 20), torch.ones(2), torch.ones(2, 20))
    for needed in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            OPS.flow_log_prob_backward,
            (*flat_transition(c), c.next_latents, *incoming, c.velocity.neg(), None, 1, *needed),
        )


@pytest.mark.slow
def test_compiled_rollout_and_replay_equal_eager(case):
    c = case((2, 4, 8, 8), torch.bfloat16, torch.float32, guided=True, history=True)
    weight = torch.full((), 0.7, requires_grad=True)

    def step(latents, velocity, coeffs, seed, index):
        noise = philox_normal(seed, latents.shape[1:], 0, 1)
        out = flow_step(latents, velocity * weight.detach(), coeffs, index, seed, c.guidance, c.x0_prev, True)
        return out.next_latents, out.log_prob, out.x0_pred + 0 * noise

    def replay(latents, velocity, following, coeffs, index):
        extras = Extras(True, c.velocity.neg(), c.guidance.negative_velocity, -1)
        log_prob, mean, drift, log_prob_map = flow_log_prob(
            latents, velocity * weight, following, coeffs, index, c.guidance, c.x0_prev, extras
        )
        total = log_prob.exp().sum() + mean.square().sum() + drift.sum() + log_prob_map.square().sum()
        return log_prob, mean, drift, log_prob_map, total

    eager = step(c.latents, c.velocity, c.coeffs, c.seed, 2)
    compiled = torch.compile(step, fullgraph=True)(c.latents, c.velocity, c.coeffs, c.seed, 2)
    for left, right in zip(eager, compiled, strict=True):
        assert torch.equal(left, right)

    results = []
    for function in (replay, torch.compile(replay, fullgraph=True)):
        *outputs, total = function(c.latents, c.velocity, eager[0], c.coeffs, c.step_index)
        (grad,) = torch.autograd.grad(total, weight)
        results.append((outputs, grad))
    for left, right in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(left, right)
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.slow
def test_compile_without_mean_and_with_changing_step(case):
    c = case((2, 4, 8, 8))

    @torch.compile(fullgraph=True)
    def replay(velocity, index):
        return flow_log_prob(c.latents, velocity, c.next_latents, c.coeffs, index)

    for index in range(4):
        velocity = c.velocity.clone().requires_grad_()
        expected = flow_log_prob(c.latents, velocity, c.next_latents, c.coeffs, index)
        (want,) = torch.autograd.grad(expected.sum(), velocity)
        (got,) = torch.autograd.grad(replay(velocity, index).sum(), velocity)
        assert torch.equal(want, got)


def test_fake_tensors_give_shapes(case):
    c = case((2, 3, 20), torch.bfloat16)
    with FakeTensorMode() as mode:
        latents, velocity = mode.from_tensor(c.latents), mode.from_tensor(c.velocity)
        coeffs, seed = mode.from_tensor(c.coeffs), mode.from_tensor(c.seed)
        out = flow_step(latents, velocity, coeffs, 1, seed, return_x0_pred=True)
    assert (out.next_latents.shape, out.next_latents.dtype) == (c.latents.shape, torch.bfloat16)
    assert (out.log_prob.shape, out.log_prob.dtype) == ((2,), torch.float32)
    assert (out.x0_pred.shape, out.x0_pred.dtype) == (c.latents.shape, torch.float32)


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_dispatch_modes_see_one_op_and_no_sync(case):
    c = case((2, 3, 20))
    with Recorder() as recorder:
        flow_step(c.latents, c.velocity, c.coeffs, 1, c.seed)
        log_prob = flow_log_prob(
            c.latents, c.velocity.requires_grad_(), c.next_latents, c.coeffs, c.step_index
        )
        log_prob.sum().backward()
    assert recorder.seen.count("flowgrpo_fast.flow_step.default") == 1
    assert recorder.seen.count("flowgrpo_fast.flow_log_prob.default") == 1
    assert recorder.seen.count("flowgrpo_fast.flow_log_prob_backward.default") == 1
    assert not [name for name in recorder.seen if "local_scalar" in name or "nonzero" in name]


def test_parameters_go_straight_to_the_kernel(case):
    c = case((2, 3, 20))
    velocity = torch.nn.Parameter(c.velocity)
    log_prob = flow_log_prob(c.latents, velocity, c.next_latents, c.coeffs, 0)
    assert "flow_log_prob" in type(log_prob.grad_fn).__name__
