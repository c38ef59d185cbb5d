"""The diffusers scheduler: golden walks, recorded log-probs, seeds, windows, one-line errors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowgrpo_fast.compat import FlowMatchTransitionScheduler
from flowgrpo_fast.ops import flow_log_prob
from flowgrpo_fast.schedule.windows import SlidingWindow


def make_scheduler(num_steps: int = 8, **options) -> FlowMatchTransitionScheduler:
    scheduler = FlowMatchTransitionScheduler(**({"shift": 3.0} | options))
    scheduler.set_timesteps(num_steps)
    return scheduler


def walk(scheduler, latents: Tensor, field: Callable[[Tensor, Tensor], Tensor], **options) -> list[Tensor]:
    """All states of a walk over the scheduler's timesteps."""
    states = [latents]
    for index, t in enumerate(scheduler.timesteps):
        velocity = field(states[-1], scheduler.sigmas[index])
        states.append(scheduler.step(velocity, t, states[-1], return_dict=False, **options)[0])
    return states


def toy_field(latents: Tensor, sigma: Tensor) -> Tensor:
    return torch.tanh(latents) * (1 + sigma).to(latents.dtype)


def start(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_images_to_images_start_in_the_middle() -> None:
    scheduler = make_scheduler(dynamics="dpmpp_2m")
    full = walk(scheduler, start(), toy_field)
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(3)
    first = scheduler.step(toy_field(full[3], scheduler.sigmas[3]), scheduler.timesteps[3], full[3])
    dt = scheduler.sigmas[4] - scheduler.sigmas[3]  # no history yet: an Euler step
    torch.testing.assert_close(first.prev_sample, full[3] + dt * toy_field(full[3], scheduler.sigmas[3]))
    scheduler.set_timesteps(8)
    scheduler.step(start(), scheduler.timesteps[5], start())  # found by its timestep, on the host
    assert scheduler.step_index == 6


@pytest.mark.parametrize(
    ("key", "schedule", "options"),
    [
        ("ode_euler", "ode_sigmas", {"dynamics": "euler"}),
        ("dpm2m_midpoint", "dpm2m_sigmas", {"dynamics": "dpmpp_2m"}),
        ("dpm2m_heun", "dpm2m_sigmas", {"dynamics": "dpmpp_2m", "variant": "heun"}),
    ],
)
def test_golden_walk(golden: dict[str, np.ndarray], key: str, schedule: str, options: dict) -> None:
    matrix = torch.from_numpy(golden["ode_field"])

    def field(latents: Tensor, sigma: Tensor) -> Tensor:
        return (torch.tanh(latents.double() @ matrix) * (1 + sigma)).float()

    scheduler = FlowMatchTransitionScheduler(shift=1.0, **options)
    scheduler.set_timesteps(sigmas=golden[schedule][:-1].tolist())
    assert torch.equal(scheduler.sigmas, torch.from_numpy(golden[schedule]))
    states = walk(scheduler, torch.from_numpy(golden[key][0]), field)
    torch.testing.assert_close(torch.stack(states), torch.from_numpy(golden[key]), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"use_dynamic_shifting": True}, {"use_karras_sigmas": True}])
def test_set_timesteps_is_the_parents(options: dict) -> None:
    ours = FlowMatchTransitionScheduler(shift=3.0, **options)
    parent = FlowMatchEulerDiscreteScheduler(shift=3.0, **options)
    mu = {"mu": 0.8} if "use_dynamic_shifting" in options else {}
    for arguments in ({"num_inference_steps": 7}, {"sigmas": [1.0, 0.7, 0.4]}):
        ours.set_timesteps(**arguments, **mu)
        parent.set_timesteps(**arguments, **mu)
        assert torch.equal(ours.sigmas, parent.sigmas)
        assert torch.equal(ours.timesteps, parent.timesteps)
    given = ours.timesteps.tolist()
    ours.set_timesteps(timesteps=given, sigmas=[1.0, 0.7, 0.4], **mu)
    parent.set_timesteps(timesteps=given, sigmas=[1.0, 0.7, 0.4], **mu)
    assert torch.equal(ours.timesteps, parent.timesteps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_keep_their_dtype_and_log_probs_are_of_the_stored_value(dtype: torch.dtype) -> None:
    scheduler = make_scheduler(return_mean=True)
    with scheduler.record() as walks:
        states = walk(scheduler, start(dtype), toy_field)
    assert {state.dtype for state in states} == {dtype}
    record = walks[0]
    assert record.step_index == list(range(7))  # all but the last
    for k, step in enumerate(record.step_index):
        velocity = toy_field(record.latents[k], scheduler.sigmas[step])
        replayed = flow_log_prob(record.latents[k], velocity, record.next_latents[k], record.coeffs, step)
        assert torch.equal(replayed, record.log_prob[k])


class NumbersRead(TorchDispatchMode):
    """Counts operations that would make the host wait for an accelerator."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "_to_copy")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{"solver": "dpmpp_2m", "stochastic_steps": [1, 2]}, {"dynamics": "cps"}])
def test_no_step_reads_a_number(options: dict) -> None:
    scheduler, x = make_scheduler(return_mean=True, **options), start()
    scheduler.step(x, scheduler.timesteps[0], x)  # makes the table
    with NumbersRead() as numbers:
        for t in scheduler.timesteps.unbind()[1:]:
            x = scheduler.step(x, t, x).prev_sample
    assert numbers.count == 0
    assert x.isfinite().all()


def test_output_record_and_tuple() -> None:
    scheduler, x = make_scheduler(return_mean=True), start()
    out = scheduler.step(x, scheduler.timesteps[0], x)
    assert torch.equal(out[0], out.prev_sample)
    assert out.prev_sample_mean.dtype == torch.float32
    std = torch.rsqrt(scheduler._walk.coeffs[0, 5])
    torch.testing.assert_close(
        ((out.prev_sample - out.prev_sample_mean) / std).std(), torch.tensor(1.0), rtol=0.1, atol=0
    )
    prev_sample, log_prob = scheduler.step(x, scheduler.timesteps[1], x, return_dict=False)
    assert (prev_sample.shape, log_prob.shape) == (x.shape, (3,))
    assert make_scheduler().step(x, 1000.0, x).prev_sample_mean is None


def test_seeds_make_a_sample_independent_of_its_batch() -> None:
    scheduler, x = make_scheduler(), start()
    scheduler.set_seeds([5, 6, 7])
    together = walk(scheduler, x, toy_field)[-1]
    scheduler.set_timesteps(8)
    scheduler.set_seeds(torch.tensor([7]))
    assert torch.equal(walk(scheduler, x[2:], toy_field)[-1], together[2:])
    scheduler.set_timesteps(8)  # given seeds are used once
    assert not torch.equal(walk(scheduler, x[2:], toy_field)[-1], together[2:])


def test_generator_fixes_the_seeds_of_a_walk() -> None:
    scheduler, x = make_scheduler(), start()
    results = []
    for seed in (1, 1, 2):
        scheduler.set_timesteps(8)
        results.append(walk(scheduler, x, toy_field, generator=torch.Generator().manual_seed(seed))[-1])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_deterministic_walk_draws_nothing() -> None:
    state = torch.random.get_rng_state()
    walk(make_scheduler(dynamics="euler"), start(), toy_field)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_window_moves_between_walks() -> None:
    scheduler = make_scheduler(num_steps=10)
    for iteration in (0, 25, 50):
        steps = SlidingWindow(size=3, every=25).steps(10, iteration, seed=0).stochastic
        scheduler.set_stochastic_steps(steps)
        scheduler.set_timesteps(10)
        with scheduler.record() as walks:
            walk(scheduler, start(), toy_field)
        assert tuple(walks[0].step_index) == steps
        assert scheduler.config.stochastic_steps == list(steps)


def test_recording_may_begin_inside_a_walk_and_ends_with_its_block() -> None:
    scheduler, x = make_scheduler(), start()
    scheduler.step(x, scheduler.timesteps[0], x)
    with scheduler.record() as walks:
        scheduler.step(x, scheduler.timesteps[1], x)
    scheduler.step(x, scheduler.timesteps[2], x)
    assert [record.step_index for record in walks] == [[1]]


def test_round_trip_of_the_config(tmp_path) -> None:
    plain = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    options = {"dynamics": "cps", "noise_level": 0.5, "stochastic_steps": [0, 2], "solver": "dpmpp_2m"}
    scheduler = FlowMatchTransitionScheduler.from_config(plain.config, **options)
    scheduler.save_pretrained(tmp_path)
    loads = FlowMatchTransitionScheduler
    for loaded in (loads.from_pretrained(tmp_path), loads.from_config(scheduler.config)):
        assert {name: loaded.config[name] for name in options} == options
        assert (loaded.config.shift, loaded.config.use_dynamic_shifting) == (3.0, True)
        loaded.set_timesteps(8, mu=0.7)
        scheduler.set_timesteps(8, mu=0.7)
        loaded.set_seeds([1, 2, 3])
        scheduler.set_seeds([1, 2, 3])
        assert torch.equal(walk(loaded, start(), toy_field)[-1], walk(scheduler, start(), toy_field)[-1])
    back = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    assert back.config.shift == 3.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamics": "flow_sd"}, "dynamics is 'flow_sd'; did you mean 'flow_sde'"),
        ({"solver": "dpmpp_3m"}, "solver is 'dpmpp_3m'; did you mean 'dpmpp_2m'"),
        ({"dynamics": "dpmpp_2m", "variant": "heuns"}, "variant is 'heuns'; it must be 'midpoint' or 'heun'"),
        ({"noise_level": 0.0}, "noise_level is 0.0; it must be above 0"),
        ({"dynamics": "cps", "noise_level": 1.5}, "noise_level is 1.5; it must be in"),
        (
            {"stochastic_steps": [2, 7]},
            r"stochastic_steps is \[2, 7\]; with 8 steps give indices in \[0, 6\]",
        ),
        ({"stochastic_sampling": True}, "stochastic_sampling is True; say dynamics='cps', noise_level=1"),
        ({"invert_sigmas": True}, "sigmas must fall strictly"),
    ],
)
def test_bad_options_are_one_line(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        walk(make_scheduler(**options), start(), toy_field)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestep": 123.0}, r"timestep is 123.0; pass one of scheduler.timesteps, \[1000.0"),
        ({"timestep": 0}, "timestep is 0; pass one of scheduler.timesteps"),
        (
            {"model_output": torch.zeros(3, 4, 8, 7)},
            r"model_output is \[3, 4, 8, 7\] and sample is \[3, 4, 8, 8\]",
        ),
        (
            {"model_output": torch.zeros(3, 4, 8, 8).long()},
            "model_output is torch.int64; pass a floating-point",
        ),
        (
            {"model_output": torch.zeros(3, 4, 8, 8, device="meta")},
            "model_output is on meta and sample on cpu",
        ),
        ({"per_token_timesteps": torch.zeros(3, 4)}, "per_token_timesteps is given; .* share one timestep"),
        ({"generator": [torch.Generator()] * 2}, "generator is a list of 2; give one per sample, 3"),
    ],
)
def test_bad_input_is_one_line(changes: dict, message: str) -> None:
    scheduler, x = make_scheduler(), start()
    arguments = {"model_output": x, "timestep": scheduler.timesteps[0], "sample": x}
    with pytest.raises(ValueError, match=message) as error:
        scheduler.step(**(arguments | changes))
    assert "\n" not in str(error.value)
    scheduler.step(**arguments)  # the walk is not spoilt: it begins now
    assert scheduler.step_index == 1


def test_misuse_in_time_is_one_line() -> None:
    x = start()
    with pytest.raises(ValueError, match="no schedule yet; call set_timesteps first"):
        FlowMatchTransitionScheduler().step(x, 1000.0, x)
    scheduler = make_scheduler()
    walk(scheduler, x, toy_field)
    with pytest.raises(ValueError, match="step 8 of 8; call set_timesteps before another walk"):
        scheduler.step(x, scheduler.timesteps[0], x)
    scheduler.set_timesteps(8)
    scheduler.set_seeds([1, 2])
    for _ in range(2):  # and the old walk is not taken up again
        with pytest.raises(ValueError, match=r"set_seeds got \[2\] seeds; give one per sample, 3"):
            scheduler.step(x, scheduler.timesteps[0], x)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"solver": "dpmpp_2m", "stochastic_steps": [1, 2]}, {"dynamics": "cps"}])
def test_a_walk_on_cuda_waits_for_nothing(options: dict) -> None:
    scheduler, x = make_scheduler(**options), start().cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scheduler.set_timesteps(8, device="cuda")
        for t in scheduler.timesteps.unbind():
            x = scheduler.step(x, t, x, return_dict=False)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()
