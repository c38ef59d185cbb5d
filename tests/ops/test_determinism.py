"""The same bits alone, in any batch, in any order, on any number of threads, on any instruction set."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowgrpo_fast import _C
from flowgrpo_fast.ops import Extras, Guidance, build_info, flow_log_prob, flow_step, philox_normal

ROOT = Path(__file__).resolve().parents[2]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def run(case, rows):
    """Everything the ops compute for some rows of a case."""
    guidance = Guidance(case.guidance.negative_velocity[rows].contiguous(), case.guidance.scale)
    latents, velocity, x0_prev = case.latents[rows], case.velocity[rows].requires_grad_(), case.x0_prev[rows]
    step, seed = case.step_index[rows], case.seed[rows]
    out = flow_step(
        latents, velocity.detach(), case.coeffs, step, seed, guidance, x0_prev, return_x0_pred=True
    )
    replay = (latents, velocity, out.next_latents, case.coeffs, step, guidance, x0_prev)
    log_prob = flow_log_prob(*replay)
    (grad,) = torch.autograd.grad(log_prob.sum(), velocity)
    results = [*out, log_prob.detach(), grad, philox_normal(seed, latents.shape[1:], step, 1)]
    for axis in (1, -1):
        extra = flow_log_prob(*replay, Extras(True, latents, guidance.negative_velocity, axis))
        total = extra.log_prob.sum() + extra.drift.sum() + extra.log_prob_map.square().sum()
        results += [value.detach() for value in extra] + [*torch.autograd.grad(total, velocity)]
        alone = flow_log_prob(*replay, Extras(map_axis=axis))
        assert_same((alone.log_prob, alone.log_prob_map), (log_prob, extra.log_prob_map))
    return results


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


@pytest.mark.witness
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(7, 3, 41), (5, 16, 33, 33)], ids=str)
def test_a_sample_does_not_see_its_batch(case, shape, dtype, device):
    c = case(shape, dtype, guided=True, history=True, device=device)
    whole = run(c, torch.arange(shape[0]))
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(3))
    assert_same(run(c, order), [t[order] for t in whole])
    assert_same(run(c, order[:3]), [t[order[:3]] for t in whole])
    for row in range(shape[0]):
        assert_same(run(c, torch.tensor([row])), [t[row : row + 1] for t in whole])


@pytest.mark.parametrize("shape", [(6, 16, 33, 33), (1, 300_001)], ids=str)
def test_thread_count_changes_nothing(case, shape):
    c = case(shape, guided=True, history=True)
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 3, 4, 7):
            torch.set_num_threads(num_threads)
            results += [run(c, torch.arange(shape[0])) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(results[0], other)


def test_flushing_subnormals_changes_nothing(case):
    c = case((2, 5000), torch.float16, guided=True, history=True)
    rows = torch.arange(2)
    expected = run(c, rows)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        assert_same(expected, run(c, rows))
    finally:
        torch.set_flush_denormal(False)


DIGEST = """
import sys, torch
sys.path[:0] = {path!r}
from conftest import make_case
from test_determinism import digest
print(digest(make_case))
"""


def digest(make_case):
    """One hash over the results for every dtype and awkward shapes."""
    sha = hashlib.sha256()
    for dtype in FLOATS:
        for shape in ((3, 41), (3, 16, 20, 21), (2, 4096), (2, 8195)):
            case = make_case(shape, dtype, guided=True, history=True)
            for tensor in run(case, torch.arange(shape[0])):
                sha.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def run_with_isa(isa, code):
    environment = {**os.environ, "FLOWGRPO_FAST_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", build_info()["isas"])
def test_every_instruction_set_gives_the_same_bits(case, isa):
    code = DIGEST.format(path=[str(Path(__file__).parent), *sys.path])
    result = run_with_isa(isa, code)
    if "must be one of" in result.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == digest(case)


def test_unknown_instruction_set_is_one_clear_line():
    result = run_with_isa("sse9", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import flowgrpo_fast.ops")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: FLOWGRPO_FAST_ISA is 'sse9', must be one of: baseline")


def test_works_after_a_fork():
    # The pool's threads stay behind in the parent; the child starts its own. torch's OpenMP pool would hang there, so
    # the child calls no torch op.
    seed, out = torch.arange(4), torch.empty(4, 1 << 15)
    _C.philox(seed, 0, 0, out, 2)
    expected = out.numpy().tobytes()
    out.zero_()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        _C.philox(seed, 0, 0, out, 2)
        os._exit(0 if out.numpy().tobytes() == expected else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 20, 20), (2, 100, 12)], ids=str)
def test_bits_do_not_depend_on_what_else_is_asked_for(case, dtype, shape):
    """Whole tiles of one dtype are replayed in registers, the others in scratch; asking for the mean forbids it."""
    c = case(shape, dtype)
    other, axis = c.latents.neg(), 1 if len(shape) == 4 else -1
    c.velocity.requires_grad_()
    for asked in ({}, {"reference_velocity": other}, {"map_axis": axis}):
        results = []
        for with_mean in (False, True):
            extras = Extras(with_mean, **asked)
            out = flow_log_prob(c.latents, c.velocity, c.next_latents, c.coeffs, c.step_index, extras=extras)
            values = [value for value in (out.log_prob, out.drift, out.log_prob_map) if value is not None]
            total = sum(
                (value * torch.arange(1.0, value.numel() + 1).view(value.shape)).sum() for value in values
            )
            if out.mean is not None:
                total = total + (0 * out.mean).sum()
            results.append([*values, *torch.autograd.grad(total, c.velocity)])
        for plain, general in zip(*results, strict=True):
            assert torch.equal(plain, general)
