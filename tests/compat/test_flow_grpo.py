"""Flow-GRPO's step function: golden parity, gradients, exact replay, one-line errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from flowgrpo_fast.compat import tables
from flowgrpo_fast.compat.flow_grpo import sde_step_with_logprob

Cases = Callable[[str], list[dict[str, Tensor]]]
Close = Callable[..., None]
WithSchedule = Callable[..., FlowMatchEulerDiscreteScheduler]


def make_scheduler(num_steps: int = 10, shift: float = 3.0) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    return scheduler


def batch(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, 4, 6, 5, generator=generator).to(dtype) for _ in range(2))


def test_signature_is_flow_grpos() -> None:
    parameters = inspect.signature(sde_step_with_logprob).parameters
    assert {name: p.default for name, p in parameters.items() if p.default is not p.empty} == {
        "noise_level": 0.7,
        "prev_sample": None,
        "generator": None,
        "sde_type": "sde",
        "return_sqrt_dt": False,
    }
    assert list(parameters)[:5] == ["self", "model_output", "timestep", "sample", "noise_level"]


def test_golden_step(cases: Cases, close: Close, with_schedule: WithSchedule) -> None:
    for case in cases("flow_grpo_mean"):
        timestep = case["timesteps"][case["idx"]]
        level = float(case["noise_level"])
        out = sde_step_with_logprob(
            with_schedule(case, FlowMatchEulerDiscreteScheduler()),
            case["v"],
            timestep,
            case["x"],
            level,
            case["next"],
            return_sqrt_dt=True,
        )
        prev_sample, log_prob, mean, std, sqrt_dt = out
        assert {t.dtype for t in out} == {torch.float32}
        assert torch.equal(prev_sample, case["next"].float())
        close(mean, case["flow_grpo_mean"], rtol=1e-5, atol=2e-7)
        # bf16 inputs widen exactly, so bf16 cases need no looser bound: the arithmetic is fp32 on both sides.
        close(log_prob, case["flow_grpo_log_prob"], rtol=1e-6, atol=1e-6)
        close(std, case["flow_grpo_std_dev_t"], rtol=1e-6, atol=0)
        shape = (len(timestep), *[1] * (mean.dim() - 1))
        assert std.shape == sqrt_dt.shape == shape
        close(sqrt_dt.flatten() ** 2, -case["sigmas"].diff()[case["idx"]], rtol=1e-5, atol=0)


def test_golden_cps_score(cases: Cases, close: Close, with_schedule: WithSchedule) -> None:
    for case in cases("ff_cps_mean"):
        timestep = case["timesteps"][case["idx"]]
        _, log_prob, mean, std = sde_step_with_logprob(
            with_schedule(case, FlowMatchEulerDiscreteScheduler()),
            case["v"],
            timestep,
            case["x"],
            float(case["noise_level"]),
            case["next"],
            None,
            "cps",
        )
        close(mean, case["ff_cps_mean"], rtol=1e-5, atol=5e-7)
        close(log_prob, case["ff_cps_log_prob"], rtol=1e-6, atol=1e-6)
        close(std, case["ff_cps_std_dev_t"], rtol=1e-6, atol=0)


def test_golden_loss_and_gradient(cases: Cases, close: Close, with_schedule: WithSchedule) -> None:
    for case in cases("loss_grad_v"):
        scheduler, timestep = (
            with_schedule(case, FlowMatchEulerDiscreteScheduler()),
            case["timesteps"][case["idx"]],
        )
        rest = (timestep, case["x"], float(case["noise_level"]), case["next"])
        velocity = case["v"].float().requires_grad_()
        _, log_prob, mean, std = sde_step_with_logprob(scheduler, velocity, *rest)
        with torch.no_grad():
            mean_ref = sde_step_with_logprob(scheduler, case["loss_vref"], *rest)[2]
        ratio = torch.exp(log_prob - case["loss_old_log_prob"])
        loss = torch.maximum(-case["loss_adv"] * ratio, -case["loss_adv"] * ratio.clamp(1 - 1e-4, 1 + 1e-4))
        error = ((mean - mean_ref) ** 2).mean(dim=tuple(range(1, mean.dim())), keepdim=True)
        kl = (error / (2 * std**2)).mean()
        total = loss.mean() + 0.04 * kl
        total.backward()
        # A ratio is a difference of log-probs: one unit in the last place of |log-prob| = 262 is already 3e-5.
        ulp = float(torch.finfo(torch.float32).eps * log_prob.detach().abs().max().clamp(min=1))
        close(ratio, case["loss_ratio"], rtol=0, atol=4 * ulp)
        close(kl, case["loss_kl"], rtol=1e-5, atol=0)
        close(loss.mean(), case["loss_policy_loss"], rtol=1e-6, atol=4 * ulp)
        close(total, case["loss_loss"], rtol=1e-6, atol=4 * ulp)
        scale = float(case["loss_grad_v"].abs().max())
        close(velocity.grad, case["loss_grad_v"], rtol=1e-5 + 4 * ulp, atol=1e-6 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_replay_has_the_bits_of_sampling(sde_type: str, dtype: torch.dtype) -> None:
    scheduler, (x, v) = make_scheduler(), batch(dtype=dtype)
    for t in scheduler.timesteps[:-1]:
        sampled = sde_step_with_logprob(scheduler, v, t[None], x, 0.7, sde_type=sde_type)
        again = sde_step_with_logprob(
            scheduler, v, t.repeat(3), x, 0.7, prev_sample=sampled[0], sde_type=sde_type
        )
        assert sampled[0].dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(sampled[:3], again[:3], strict=True))
        alone = sde_step_with_logprob(
            scheduler, v[1:2], t[None], x[1:2], 0.7, sampled[0][1:2], None, sde_type
        )
        assert torch.equal(alone[1], sampled[1][1:2])


def test_sampling_has_the_mean_and_std_it_reports() -> None:
    scheduler = make_scheduler()
    x, v = torch.full((4, 64, 64), 0.3), torch.full((4, 64, 64), -0.5)
    prev_sample, _, mean, std, sqrt_dt = sde_step_with_logprob(
        scheduler, v, scheduler.timesteps[3:4], x, return_sqrt_dt=True
    )
    noise = (prev_sample - mean) / (std * sqrt_dt)
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.03


def test_generator_decides_the_noise() -> None:
    scheduler, (x, v) = make_scheduler(), batch()
    t = scheduler.timesteps[:1]

    def sample(generator: torch.Generator | list[torch.Generator]) -> Tensor:
        return sde_step_with_logprob(scheduler, v, t, x, generator=generator)[0]

    def of(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    assert torch.equal(sample(of(7)[0]), sample(of(7)[0]))
    assert not torch.equal(sample(of(7)[0]), sample(of(8)[0]))
    # One generator a sample: a sample's noise does not depend on its neighbours.
    assert torch.equal(sample(of(1, 2, 3))[2], sample(of(4, 5, 3))[2])
    with pytest.raises(ValueError, match="list of 2; give one per sample, 3"):
        sample(of(1, 2))


def test_closed_form_gradient_equals_autograd_of_the_formula(close: Close) -> None:
    scheduler, (x, v) = make_scheduler(), batch()
    prev_sample = x + 0.1
    velocity = v.clone().requires_grad_()
    index = torch.tensor([1, 4, 7])
    out = sde_step_with_logprob(scheduler, velocity, scheduler.timesteps[index], x, 0.7, prev_sample)
    (out[1].sum() + (out[2] ** 2).sum()).backward()
    s, t = (scheduler.sigmas[i].double().view(-1, 1, 1, 1) for i in (index, index + 1))
    q, dt, reference = 0.7 * torch.sqrt(s / (1 - s)), t - s, v.double().requires_grad_()
    mean = x * (1 + q**2 / (2 * s) * dt) + reference * (1 + q**2 * (1 - s) / (2 * s)) * dt
    log_prob = torch.distributions.Normal(mean, q * torch.sqrt(-dt)).log_prob(prev_sample.double())
    (log_prob.mean((1, 2, 3)).sum() + (mean**2).sum()).backward()
    close(velocity.grad.double(), reference.grad, rtol=1e-4, atol=1e-7)


def test_zero_noise_samples_an_euler_step(close: Close) -> None:
    scheduler, (x, v) = make_scheduler(), batch()
    t, dt = scheduler.timesteps[2:3], scheduler.sigmas[3] - scheduler.sigmas[2]
    for sde_type in ("sde", "cps"):
        prev_sample, log_prob, mean, std = sde_step_with_logprob(scheduler, v, t, x, 0, sde_type=sde_type)
        close(prev_sample, x + dt * v, rtol=1e-6, atol=1e-6)
        assert torch.equal(prev_sample, mean)
        assert not log_prob.any()
        assert not std.any()


def test_strided_inputs_and_wide_inputs() -> None:
    scheduler, (x, v) = make_scheduler(), batch()
    t = scheduler.timesteps[:1]
    expected = sde_step_with_logprob(scheduler, v, t, x, prev_sample=x)
    strided = sde_step_with_logprob(scheduler, v.mT.contiguous().mT, t, x.double(), prev_sample=x.double())
    assert all(torch.equal(a, b) for a, b in zip(expected, strided, strict=True))


def test_a_new_schedule_makes_a_new_table_and_an_old_one_is_kept() -> None:
    scheduler, (x, v) = make_scheduler(), batch()
    first = sde_step_with_logprob(scheduler, v, scheduler.timesteps[:1], x, prev_sample=x)[1]
    made = len(tables._tables)
    sde_step_with_logprob(scheduler, v, scheduler.timesteps[1:2], x, prev_sample=x)
    assert len(tables._tables) == made
    scheduler.set_timesteps(5)
    second = sde_step_with_logprob(scheduler, v, scheduler.timesteps[:1], x, prev_sample=x)[1]
    scheduler.sigmas[1] = 0.95  # in place: the same tensor, another version
    third = sde_step_with_logprob(scheduler, v, scheduler.timesteps[:1], x, prev_sample=x)[1]
    assert len({float(values[0]) for values in (first, second, third)}) == 3


def test_the_number_of_kept_tables_is_bounded() -> None:
    scheduler, (x, v) = make_scheduler(), batch()
    for step in range(tables._MAX_TABLES + 8):
        sde_step_with_logprob(scheduler, v, scheduler.timesteps[:1], x, 0.1 + 0.01 * step, x)
    assert len(tables._tables) <= tables._MAX_TABLES


def test_steps_read_nothing_back_from_an_accelerator() -> None:
    """The meta device refuses to give numbers, as a captured graph would: the lookup must not ask for one."""
    known = torch.empty(2, 10, device="meta")
    index, found = tables.find_steps(known, torch.empty(3, device="meta"))
    assert index.shape == found.shape == (3,)
    index, found = tables.find_steps(known, torch.empty(3, device="meta"), torch.empty(1, device="meta"))
    assert index.shape == (3,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sde_type": "csp"}, "sde_type is 'csp'; did you mean 'cps'"),
        ({"timestep": torch.tensor([123.0])}, "timestep 123 is not in the schedule .*scheduler.timesteps"),
        ({"timestep": torch.ones(2)}, r"timestep is \[2\]; pass \[1\] .* or \[3\]"),
        (
            {"model_output": torch.zeros(3, 4, 6, 4)},
            r"model_output is \[3, 4, 6, 4\] and sample is \[3, 4, 6, 5\]",
        ),
        (
            {"model_output": torch.zeros(3, 4, 6, 5, dtype=torch.int64)},
            "model_output is torch.int64; pass a float",
        ),
        (
            {"model_output": torch.zeros(3, 4, 6, 5, device="meta")},
            "model_output is on meta and sample on cpu",
        ),
        ({"prev_sample": torch.zeros(1, 4, 6, 5)}, r"prev_sample is \[1, 4, 6, 5\]"),
        (
            {"noise_level": 0.0, "prev_sample": torch.zeros(3, 4, 6, 5)},
            "noise_level is 0, .* no log-prob; pass",
        ),
        ({"noise_level": -0.5}, "noise_level is -0.5; it must be above 0"),
        ({"noise_level": float("nan")}, "noise_level is nan; it must be above 0"),
        ({"noise_level": torch.tensor(0.7)}, "noise_level is a Tensor; pass a Python float"),
        ({"noise_level": 1.5, "sde_type": "cps"}, "noise_level is 1.5; it must be in"),
        ({"self": FlowMatchEulerDiscreteScheduler()}, "1000 sigmas for 1000 timesteps; call set_timesteps"),
    ],
)
def test_bad_input_is_one_line(changes: dict, message: str) -> None:
    scheduler, (x, v) = make_scheduler(), batch()
    arguments = {"self": scheduler, "model_output": v, "timestep": scheduler.timesteps[:1], "sample": x}
    with pytest.raises(ValueError, match=message) as error:
        sde_step_with_logprob(**(arguments | changes))
    assert "\n" not in str(error.value)


@pytest.mark.gpu
def test_a_step_on_cuda_waits_for_nothing_and_replays_exactly() -> None:
    scheduler, (x, v) = make_scheduler(), batch()
    scheduler.set_timesteps(10, device="cuda")
    x, v, host = x.cuda(), v.cuda(), scheduler.timesteps.cpu()
    generator = torch.Generator("cuda").manual_seed(0)
    for step, timesteps in enumerate((scheduler.timesteps, scheduler.timesteps, host)):
        if step == 1:  # the table has been made
            torch.cuda.set_sync_debug_mode("error")
        try:
            new = sde_step_with_logprob(scheduler, v, timesteps[3:4], x, generator=generator)
            again = sde_step_with_logprob(scheduler, v, timesteps[3:4].expand(3), x, prev_sample=new[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(new[1], again[1])
    unknown = sde_step_with_logprob(scheduler, v, torch.full((1,), 123.0, device="cuda"), x, prev_sample=x)
    assert unknown[1].isnan().all()
