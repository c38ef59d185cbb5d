"""Arrays of more than 2^31 elements on a GPU: what lies at their end is what it is alone, see test_large_offsets."""

from __future__ import annotations

import pytest
import torch

from flowgrpo_fast import _C
from flowgrpo_fast.ops import (
    Fp8Rows,
    build_info,
    dequantize_fp8_rows,
    flow_log_prob,
    flow_step,
    matching,
    philox_normal,
    quantize_fp8_rows,
)

COEFFS = torch.tensor([[0.5, 0.9, -0.2, 0.3, 0.0, 11.0, 0.3, 0.0]])
SAMPLE = (16, 64, 64)
SAMPLES = (1 << 15) + 16  # of 2^16 elements: 2^31 and some more
COLUMNS = 1 << 16
NEEDED = 14 << 30  # bytes: three arrays of bfloat16 at a time

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not build_info()["cuda_archs"], reason="built without CUDA: GPU code not run"),
]


@pytest.fixture
def samples():
    """``[samples, 16, 64, 64]`` bfloat16: zeros, and a last one that is not."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < NEEDED:
        pytest.skip(f"{free >> 30} GiB free, {NEEDED >> 30} needed: offsets beyond 2^31 not run")
    tensor = torch.zeros(SAMPLES, *SAMPLE, dtype=torch.bfloat16, device="cuda")
    tensor[-1] = torch.randn(SAMPLE, generator=torch.Generator().manual_seed(0))
    return tensor


def test_a_late_sample_is_stepped_and_replayed_as_alone(samples):
    coeffs, seed, last = COEFFS.cuda(), torch.arange(SAMPLES, device="cuda"), samples[-1:]
    whole, alone = (flow_step(x, x, coeffs, 0, s) for x, s in ((samples, seed), (last, seed[-1:])))
    assert torch.equal(whole.next_latents[-1:], alone.next_latents)
    assert torch.equal(whole.log_prob[-1:], alone.log_prob)
    log_prob = flow_log_prob(samples, samples, whole.next_latents, coeffs, 0)
    assert torch.equal(log_prob[-1:], alone.log_prob)


def test_the_gradient_of_a_late_sample(samples):
    coeffs, last = COEFFS.cuda(), samples[-1:]
    gradients = []
    for x in (samples, last):
        velocity = x.detach().requires_grad_()
        flow_log_prob(x, velocity, x, coeffs, 0).sum().backward()
        gradients.append(velocity.grad[-1:])
    assert torch.equal(*gradients)
    assert gradients[0].any()


def test_the_means_of_a_late_sample(samples):
    target = samples.roll(1, 0)
    whole, alone = matching(samples, target), matching(samples[-1:], target[-1:])
    assert torch.equal(whole.error[-1:], alone.error)
    assert alone.error > 0


def test_noise_of_a_late_element(samples):
    elements = samples.numel()
    del samples
    normal = philox_normal(torch.tensor([7], device="cuda"), (elements,), 3, 1, torch.bfloat16)
    for block in (elements // 4 - 1, elements // 4 - 123_456):
        words = _C.philox4x32((block, 0, 3, 1), (7, 0))
        pairs = [*_C.normal_pair(*words[:2]), *_C.normal_pair(*words[2:])]
        assert torch.equal(normal[0, 4 * block : 4 * block + 4].cpu(), torch.tensor(pairs).to(torch.bfloat16))


def test_a_late_row_is_quantised_as_alone(samples):
    rows = samples.view(-1, COLUMNS)
    whole, alone = quantize_fp8_rows(rows), quantize_fp8_rows(rows[-1:])
    for ours, want in zip(whole, alone, strict=True):
        assert torch.equal(ours[-1:].view(torch.uint8), want.view(torch.uint8))
    last = Fp8Rows(whole.codes[-1:], whole.scale[-1:])
    assert torch.equal(dequantize_fp8_rows(*whole)[-1:], dequantize_fp8_rows(*last))
