"""The CUDA kernels against the CPU's and the reference. Skipped, saying so, where there is no CUDA device."""

from __future__ import annotations

import pytest
import torch

from flowgrpo_fast.ops import (
    Extras,
    build_info,
    flow_log_prob,
    flow_step,
    philox_normal,
    philox_uint32,
    preview,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not build_info()["cuda_archs"], reason="built without CUDA: GPU code not run"),
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [
    (1, 1),
    (3, 41),
    (2, 4097),
    (3, 16, 64, 64),
    (2, 16, 3, 10, 10),
]  # both the vector and the element path


def on_cpu(case):
    moved = {
        name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in vars(case).items()
    }
    if case.guidance is not None:
        moved["guidance"] = case.guidance._replace(negative_velocity=case.guidance.negative_velocity.cpu())
    return type(case)(**moved)


def step(c, step_index=None):
    index = c.step_index if step_index is None else step_index
    return flow_step(
        c.latents, c.velocity, c.coeffs, index, c.seed, c.guidance, c.x0_prev, return_x0_pred=True
    )


@pytest.mark.parametrize("shape", [(1,), (257,), (4096,), (16, 9, 9)], ids=str)
def test_noise_is_the_same_integers_and_the_same_bits(shape):
    seed = torch.tensor([5, -7, (1 << 40) + 3])
    words = philox_uint32(seed.cuda(), shape, 3, 1)
    assert torch.equal(words.cpu(), philox_uint32(seed, shape, 3, 1))
    assert torch.equal(philox_normal(seed.cuda(), shape, 3, 1).cpu(), philox_normal(seed, shape, 3, 1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("extra", [False, True], ids=["plain", "everything"])
def test_step_is_bit_equal_to_the_cpu(case, shape, dtype, extra):
    c = case(shape, dtype, guided=extra, history=extra, device="cuda")
    device, host = step(c), step(on_cpu(c))
    assert torch.equal(device.next_latents.cpu(), host.next_latents)
    assert torch.equal(device.x0_pred.cpu(), host.x0_pred)
    torch.testing.assert_close(device.log_prob.cpu(), host.log_prob, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_replay_gives_the_bits_of_the_step_and_the_gradient_of_the_cpu(case, shape, dtype):
    gradients = []
    device = case(shape, dtype, guided=True, history=True, device="cuda")
    for c in (device, on_cpu(device)):
        out, velocity = step(c), c.velocity.requires_grad_()
        rest = (out.next_latents, c.coeffs, c.step_index, c.guidance, c.x0_prev)
        log_prob, mean, _, _ = flow_log_prob(c.latents, velocity, *rest, extras=Extras(mean=True))
        assert torch.equal(log_prob.detach(), out.log_prob)
        gradients.append(torch.autograd.grad(log_prob.sum() + mean.square().sum(), velocity)[0].cpu())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("shape", "grid"), [((4, 16, 64, 64), None), ((4, 2025, 64), (45, 45))], ids=str)
def test_preview_is_bit_equal_to_the_cpu(case, shape, grid, dtype):
    c = case(shape, dtype, guided=True, device="cuda")
    pool = 8 if grid is None else 5
    device, host = (
        preview(v.latents, v.velocity, v.coeffs, v.step_index, pool, v.guidance, grid) for v in (c, on_cpu(c))
    )
    assert torch.equal(device.cpu(), host)


def test_a_sample_does_not_see_its_batch(case):
    c = case((5, 16, 33, 33), device="cuda")
    whole = step(c)
    for row in range(5):
        part = flow_step(
            *(t[row : row + 1] for t in (c.latents, c.velocity)),
            c.coeffs,
            *(t[row : row + 1] for t in (c.step_index, c.seed)),
        )
        assert torch.equal(part.next_latents, whole.next_latents[row : row + 1])
        assert torch.equal(part.log_prob, whole.log_prob[row : row + 1])


def test_unaligned_arrays_take_the_element_path(case):
    c = case((2, 4096), device="cuda")
    aligned = step(c)
    shifted = torch.empty(2 * 4096 + 1, device="cuda")[1:].view(2, 4096).copy_(c.latents)
    other = flow_step(shifted, c.velocity, c.coeffs, c.step_index, c.seed)
    assert torch.equal(other.next_latents, aligned.next_latents)
    torch.testing.assert_close(other.log_prob, aligned.log_prob, rtol=1e-6, atol=1e-6)


def test_graph_replay_with_the_step_on_the_device(case):
    c = case((4, 16, 32, 32), device="cuda")
    index = torch.zeros((), dtype=torch.int64, device="cuda")
    step(c, index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(c, index)
        index += 1
    index.zero_()
    for number in range(len(c.coeffs)):
        graph.replay()
        eager = step(c, number)
        assert torch.equal(captured.next_latents, eager.next_latents)
        assert torch.equal(captured.log_prob, eager.log_prob)


@pytest.mark.parametrize("bad", [-1, 5, 1 << 40])
def test_step_outside_the_table_gives_nan(case, bad):
    c = case((2, 300), device="cuda")
    out = step(c, torch.full((2,), bad, device="cuda"))
    assert out.log_prob.isnan().all()
    with pytest.raises(ValueError, match="step_index is"):
        step(c, bad)


def test_other_device_is_named(case):
    c = case((2, 300), device="cuda")
    with pytest.raises(ValueError, match="velocity is on cpu, must be on cuda:0 as latents is"):
        flow_step(c.latents, c.velocity.cpu(), c.coeffs, 0, c.seed)
