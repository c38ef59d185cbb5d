"""Arrays of more than 2^31 elements: what lies at their end is what it is alone.

Their memory is one window mapped again and again, so that it takes up megabytes; only the last window is apart.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

import pytest
import torch

from flowgrpo_fast import _C
from flowgrpo_fast.ops import (
    Fp8Rows,
    Nvfp4,
    compact,
    dequantize_fp8_rows,
    dequantize_nvfp4,
    flow_log_prob,
    flow_step,
    matching,
    merge_lora_quantize_,
    preview,
    quantize_fp8_rows,
    quantize_nvfp4,
)
from flowgrpo_fast.ops._binding import Transition

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does: offsets not run"),
]

WINDOW = 80 << 20  # bytes; does not divide 1 GiB, so that threads a quarter apart write to different places
ELEMENTS = (1 << 31) + (1 << 20)
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000
COLUMNS = 1 << 16
BFLOAT16, FP8 = torch.bfloat16, torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(4, os.cpu_count() or 1))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def vast():
    """Makes tensors whose last window alone has memory of its own; the other windows are the same one."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    mapped = []

    def map_at(address, size, flags, descriptor):
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        found = libc.mmap(address, size, protection, flags, descriptor, 0)
        assert found not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
        return found

    def make(*shape, dtype=BFLOAT16):
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        descriptor = os.memfd_create("window")
        os.ftruncate(descriptor, WINDOW)
        base = map_at(None, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, -1)
        mapped.append((base, size))
        for start in range(0, size - WINDOW, WINDOW):
            map_at(base + start, min(WINDOW, size - WINDOW - start), mmap.MAP_SHARED | MAP_FIXED, descriptor)
        os.close(descriptor)
        memory = (ctypes.c_char * size).from_address(base)
        return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)

    yield make
    for base, size in mapped:
        libc.munmap(base, size)


@pytest.fixture
def samples(vast):
    """``[samples, 16, 64, 64]``: zeros, and a last one that is not."""
    tensor = vast(ELEMENTS >> 16, 16, 64, 64)
    tensor[-1] = torch.randn(16, 64, 64, generator=torch.Generator().manual_seed(0))
    return tensor


COEFFS = torch.tensor([[0.5, 0.9, -0.2, 0.3, 0.0, 11.0, 0.3, 0.0]])


def test_a_late_sample_is_stepped_as_alone(samples, vast):
    transition = (samples, samples, COEFFS, 0, None, None, 1.0, None)
    seed, following, log_prob = torch.arange(len(samples)), vast(*samples.shape), torch.empty(len(samples))
    outputs = (following, log_prob, None, None)
    _C.flow_step(Transition(*transition), seed, outputs, torch.get_num_threads())
    alone = flow_step(samples[-1:], samples[-1:], COEFFS, 0, seed[-1:])
    assert torch.equal(following[-1:], alone.next_latents)
    assert torch.equal(log_prob[-1:], alone.log_prob)
    whole = flow_log_prob(samples, samples, samples, COEFFS, 0)
    assert torch.equal(whole[-1:], flow_log_prob(samples[-1:], samples[-1:], samples[-1:], COEFFS, 0))


def test_noise_of_a_late_element(vast):
    words = vast(1, ELEMENTS, dtype=torch.int64)
    normal = vast(1, ELEMENTS)
    for out in (words, normal):
        _C.philox(torch.tensor([7]), 3, 1, out, torch.get_num_threads())
    for block in (ELEMENTS // 4 - 1, ELEMENTS // 4 - 123_456):
        want = _C.philox4x32((block, 0, 3, 1), (7, 0))
        assert words[0, 4 * block : 4 * block + 4].tolist() == list(want)
        pairs = [*_C.normal_pair(*want[:2]), *_C.normal_pair(*want[2:])]
        assert torch.equal(normal[0, 4 * block : 4 * block + 4], torch.tensor(pairs).to(BFLOAT16))


def test_the_gradient_of_a_late_sample(samples, vast):
    gradient, incoming = vast(*samples.shape), torch.ones(len(samples))
    transition = Transition(samples, samples, COEFFS, 0, None, None, 1.0, None)
    _C.flow_log_prob_backward(transition, samples, (incoming, gradient, None), (), torch.get_num_threads())
    last = samples[-1:]
    leaf = last.clone().requires_grad_()
    flow_log_prob(last, leaf, last, COEFFS, 0).sum().backward()
    assert torch.equal(gradient[-1:], leaf.grad)


def test_the_means_of_a_late_sample(samples, vast):
    target = vast(*samples.shape)
    whole, alone = matching(samples, target), matching(samples[-1:], target[-1:])
    assert torch.equal(whole[0][-1:], alone[0])
    assert alone[0] > 0


def test_a_late_preview_is_as_alone(samples):
    pooled = preview(samples, samples, COEFFS, 0, 8)
    assert torch.equal(pooled[-1:], preview(samples[-1:], samples[-1:], COEFFS, 0, 8))


def test_the_gram_matrix_of_a_late_group(vast):
    pooled, centred = (vast(ELEMENTS >> 16, COLUMNS, dtype=torch.float32) for _ in range(2))
    pooled[-2:] = torch.randn(2, COLUMNS, generator=torch.Generator().manual_seed(1))
    gram, alone = torch.empty(len(pooled) // 2, 2, 2), torch.empty(1, 2, 2)
    _C.gram(pooled, centred, gram, torch.get_num_threads())
    _C.gram(pooled[-2:], torch.empty(2, COLUMNS), alone, 1)
    assert torch.equal(gram[-1:], alone)


def test_late_rows_are_gathered():
    buffer = torch.empty(ELEMENTS >> 12, 1 << 12, dtype=torch.uint8)  # never touched but for its last row
    buffer[-1] = torch.arange(1 << 12) % 251
    indices = torch.tensor([len(buffer) - 1, 5])
    assert torch.equal(compact(indices, buffer)[0], buffer[indices])


def same_bytes(left, right):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_a_late_row_is_quantised_as_alone(samples, vast):
    x, (rows, columns) = samples.view(-1, COLUMNS), (len(samples), COLUMNS)
    lora_a, lora_b = torch.full((1, columns), 0.25), torch.ones(rows, 1)
    fp8 = Fp8Rows(vast(rows, columns, dtype=FP8), torch.empty(rows, 1))
    alone = quantize_fp8_rows(x[-1:])
    same_bytes([t[-1:] for t in quantize_fp8_rows(x, fp8)], alone)
    values = vast(rows, columns)
    _C.dequantize_fp8_rows(fp8.codes.view(torch.uint8), fp8.scale, values, torch.get_num_threads())
    assert torch.equal(values[-1:], dequantize_fp8_rows(*alone))
    merge_lora_quantize_(alone, x[-1:], lora_a, lora_b[-1:])
    same_bytes([t[-1:] for t in merge_lora_quantize_(fp8, x, lora_a, lora_b)], alone)


def test_late_blocks_are_quantised_as_alone(samples, vast):
    x, (rows, columns) = samples.view(-1, COLUMNS), (len(samples), COLUMNS)
    scale = torch.tensor(0.01)
    scales = torch.empty(rows, columns // 16, dtype=torch.uint8).view(FP8)
    nvfp4 = Nvfp4(vast(rows, columns // 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), scales, scale)
    alone = quantize_nvfp4(x[-1:], scale, swizzle=False)
    quantize_nvfp4(x, scale, False, nvfp4)
    same_bytes([t[-1:] for t in nvfp4[:2]], alone[:2])
    values = vast(rows, columns)
    fields = (nvfp4.codes.view(torch.uint8), scales.view(torch.uint8), scale)
    _C.dequantize_nvfp4(fields, values, False, torch.get_num_threads())
    assert torch.equal(values[-1:], dequantize_nvfp4(*alone, swizzle=False))
