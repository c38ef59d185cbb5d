"""Performance without a GPU: what a call launches, moves and waits for, counted and held to what is stated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.cases import Size
from benchmarks.counters import KERNELS, PRODUCTS, Counter, count
from benchmarks.loops import SyntheticModel, rollout_case, synthetic_recipe
from benchmarks.suite import Maker, requests
from flowgrpo_fast.precision.formats import SCALED_MM

CPU = torch.device("cpu")
COUNTED = Size("counted x24", 24, (16, 16, 16))  # a coefficient table is no part of its bytes: large enough
REQUESTS = requests(((COUNTED, torch.float32), (COUNTED, torch.bfloat16)))
LATENT_SIZED = 1 << 18
SMALL = 1024  # bytes of a seed and an index a sample
ANY_LAUNCHES = 4  # of PyTorch's around ours: the loss's sum and its gradient


@pytest.fixture(scope="module")
def made():
    return Maker(CPU)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request.name)
def test_our_calls_never_wait_and_touch_their_data_once(made, request_):
    case = made(request_)
    ours, eager = (count(case.contenders[name]) for name in ("ours", "eager"))
    assert ours.syncs == 0
    assert ours.ours, "ours calls no op of this package"
    assert len(ours.others) <= ANY_LAUNCHES, ours.others
    assert ours.launches <= sum(KERNELS[name] for name in ours.ours) + ANY_LAUNCHES
    if case.bytes >= LATENT_SIZED:  # eager mathematics on rewards goes to numpy, where nobody counts
        assert ours.launches <= max(eager.launches - 1, 1)  # torch.randn is one launch, too
        assert ours.bytes <= eager.bytes + SMALL
    backward = any(name.endswith("_backward") for name in ours.ours)
    if backward:  # the inputs once for the value and once for the gradient, and nothing saved in between
        assert ours.bytes <= 2 * case.bytes
    else:
        assert ours.bytes == pytest.approx(case.bytes, rel=0.02, abs=SMALL)


@pytest.mark.parametrize(
    ("operation", "launches", "times_the_bytes"),
    [("sampling", 69, 9.6), ("replay", 66, 7.6), ("replay_and_backward", 77, 10.2)],
)
def test_what_the_unfused_transition_costs(made, operation, launches, times_the_bytes):
    """Two look-ups a sample and the first sigma wait for the device: 2 B + 1 syncs."""
    request = next(r for r in REQUESTS if r.operation == operation and r.dtype is torch.float32)
    case = made(request)
    eager = count(case.contenders["eager"])
    assert eager.syncs == 2 * COUNTED.batch + 1
    assert eager.launches == pytest.approx(launches, rel=0.1)
    assert eager.bytes / case.bytes == pytest.approx(times_the_bytes, rel=0.1)


def test_a_rollout_waits_once_and_the_trainers_loop_at_every_step():
    class Small(SyntheticModel):
        latent_shape = (16, 8, 8)

    model, recipe = Small(CPU), replace(synthetic_recipe(), group_size=6)
    case = rollout_case("small", model, model.encode([""]), recipe, CPU)
    ours, eager = (count(case.contenders[name]) for name in ("ours", "eager"))
    stochastic = recipe.sigmas.num_inference_steps - 1
    assert ours.syncs == 1  # the check that no velocity was NaN, after the last step
    assert eager.syncs >= stochastic * (2 * recipe.group_size + 1)
    assert eager.launches > 4.5 * ours.launches
    assert eager.bytes > 1.5 * ours.bytes


def test_every_op_and_nothing_else_states_its_kernels():
    schemas = [s.name.partition("::") for s in torch._C._jit_get_all_schemas()]
    names = {name for space, _, name in schemas if space == "flowgrpo_fast"}
    assert SCALED_MM.overloadpacket.__name__ in PRODUCTS
    assert names == {*KERNELS, *PRODUCTS}


def test_every_op_is_measured(made):
    """The counts above are held for every kernel's op, then."""
    called = set()
    for request in REQUESTS:
        called |= set(count(made(request).contenders["ours"]).ours)
    assert called == set(KERNELS)


def test_the_rules_of_counting():
    x, y = torch.ones(4, 8), torch.ones(8)
    with Counter() as counter:
        x.view(8, 4).t().expand(3, 4, 8)
        torch.empty_like(x)
    assert counter.as_dict() == {"launches": 0, "bytes": 0, "syncs": 0}
    with Counter() as counter:
        x + y.expand(4, 8)  # a broadcast operand is read once
    assert counter.as_dict() == {"launches": 1, "bytes": 128 + 32 + 128, "syncs": 0}
    with Counter() as counter:
        x.copy_(y)  # overwritten, not read
        x.mul_(2)  # read and written
    assert counter.as_dict() == {"launches": 2, "bytes": (32 + 128) + (128 + 128), "syncs": 0}
    with Counter() as counter:
        x[torch.tensor([1, 1])]  # two rows of it and their indices
    assert counter.bytes == 64 + 16 + 64
    with Counter() as counter:
        torch.add(x, x, out=x.new_empty(4, 8))  # one operand, given twice
    assert counter.as_dict() == {"launches": 1, "bytes": 256, "syncs": 0}
    with Counter() as counter:
        bool(x.sum() > 3)
        x.nonzero()
    assert counter.syncs == 2


def test_an_op_without_a_stated_number_of_kernels_is_named(monkeypatch, case):
    from benchmarks import counters
    from flowgrpo_fast.ops import flow_step

    monkeypatch.delitem(counters.KERNELS, "flow_step")
    c = case((2, 8))
    with (
        pytest.raises(ValueError, match="KERNELS does not say how many kernels 'flow_step' launches"),
        Counter(),
    ):
        flow_step(c.latents, c.velocity, c.coeffs, 0, c.seed)
