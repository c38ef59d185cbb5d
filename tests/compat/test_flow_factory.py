"""Flow-Factory's scheduler: golden parity, its modes, exact replay, one-line errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from flowgrpo_fast.compat.flow_factory import FlowMatchEulerDiscreteSDEScheduler, SDESchedulerOutput

Cases = Callable[[str], list[dict[str, Tensor]]]
DYNAMICS = {"Flow-SDE": "flow_sde", "Dance-SDE": "dance_sde", "CPS": "cps"}


def make_scheduler(num_steps: int = 10, **options) -> FlowMatchEulerDiscreteSDEScheduler:
    scheduler = FlowMatchEulerDiscreteSDEScheduler(**({"shift": 3.0} | options))
    scheduler.set_timesteps(num_steps)
    return scheduler


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, 16, 8, generator=generator).to(dtype) for _ in range(2))


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("by_ends", [False, True])
def test_golden_step(
    cases: Cases, close: Callable, with_schedule: Callable, dynamics: str, by_ends: bool
) -> None:
    key = f"ff_{DYNAMICS[dynamics]}_"
    for case in cases(key + "mean"):
        scheduler = with_schedule(case, FlowMatchEulerDiscreteSDEScheduler(dynamics_type=dynamics))
        index = case["idx"]
        out = scheduler.step(
            case["v"],
            case["timesteps"][index],
            case["x"],
            next_latents=case["next"],
            timestep_next=1000 * case["sigmas"][index + 1] if by_ends else None,
            noise_level=float(case["noise_level"]),
        )
        # Near 0 a mean is a difference of terms up to 4, each rounded to fp32: a few units of 2.4e-7.
        close(out.next_latents_mean, case[key + "mean"], rtol=1e-5, atol=5e-7)
        # bf16 inputs widen exactly, so bf16 cases need no looser bound: the arithmetic is fp32 on both sides.
        close(out.log_prob, case[key + "log_prob"], rtol=1e-6, atol=1e-6)
        close(out.std_dev_t, case[key + "std_dev_t"], rtol=1e-6, atol=0)
        close(out.dt, case["sigmas"].diff()[index], rtol=1e-6, atol=0)
        assert out.std_dev_t.shape == out.dt.shape == (len(index), *[1] * (case["x"].dim() - 1))
        assert out.next_latents is case["next"]


def test_signatures_are_flow_factorys() -> None:
    step = inspect.signature(FlowMatchEulerDiscreteSDEScheduler.step).parameters
    assert list(step)[1:] == [
        "noise_pred",
        "timestep",
        "latents",
        "next_latents",
        "timestep_next",
        "generator",
        "noise_level",
        "compute_log_prob",
        "return_dict",
        "return_kwargs",
        "dynamics_type",
        "sigma_max",
    ]
    init = inspect.signature(FlowMatchEulerDiscreteSDEScheduler.__init__).parameters
    defaults = {name: p.default for name, p in init.items() if p.default is not p.empty}
    assert defaults == {
        "noise_level": 0.7,
        "sde_steps": None,
        "num_sde_steps": None,
        "seed": 42,
        "dynamics_type": "Flow-SDE",
    }


def test_output_record_and_tuple_order() -> None:
    scheduler, (x, v) = make_scheduler(), batch()
    t = scheduler.timesteps[2]
    out = scheduler.step(v, t, x, generator=torch.Generator().manual_seed(1))
    values = scheduler.step(v, t, x, generator=torch.Generator().manual_seed(1), return_dict=False)
    order = ("next_latents", "next_latents_mean", "noise_pred", "log_prob", "std_dev_t", "dt")
    assert isinstance(out, SDESchedulerOutput)
    assert all(torch.equal(getattr(out, name), value) for name, value in zip(order, values, strict=True))
    some = scheduler.step(v, t, x, return_kwargs=["next_latents", "dt"])
    assert {name for name, value in some.to_dict().items() if value is not None} == {"next_latents", "dt"}
    assert scheduler.step(v, t, x, compute_log_prob=False).log_prob is None
    assert SDESchedulerOutput.from_dict({"dt": x, "other": 1}).dt is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_new_samples_are_scored_as_stored(dynamics: str, dtype: torch.dtype) -> None:
    scheduler, (x, v) = make_scheduler(dynamics_type=dynamics), batch(dtype)
    for index, t in enumerate(scheduler.timesteps[:-1]):
        with torch.no_grad():
            out = scheduler.step(v, t, x, return_kwargs=["next_latents", "log_prob"])
        assert out.next_latents.dtype == dtype
        replayed = scheduler.step(v, t.repeat(3), x, out.next_latents, noise_level=0.7)
        assert torch.equal(replayed.log_prob, out.log_prob)
        by_index = scheduler.step(v, index, x, out.next_latents)
        assert torch.equal(by_index.log_prob, out.log_prob)


def test_gradient_reaches_the_prediction_through_log_prob_and_mean() -> None:
    scheduler, (x, v) = make_scheduler(), batch()
    v.requires_grad_()
    out = scheduler.step(v, scheduler.timesteps[:1], x, next_latents=x)
    (out.log_prob.sum() + out.next_latents_mean.sum()).backward()
    assert v.grad.abs().min() > 0


def test_steps_outside_the_stochastic_set_are_euler_steps() -> None:
    scheduler, (x, v) = make_scheduler(sde_steps=[1, 2, 5], num_sde_steps=2), batch()
    stochastic = scheduler.current_sde_steps.tolist()
    assert len(stochastic) == 2
    assert set(stochastic) <= {1, 2, 5}
    for index, t in enumerate(scheduler.timesteps):
        out = scheduler.step(v, t, x)
        assert bool(out.std_dev_t.any()) == (index in stochastic)
        if index not in stochastic:
            assert torch.equal(out.next_latents, out.next_latents_mean)
            torch.testing.assert_close(out.next_latents, x + out.dt * v)
            assert not out.log_prob.any()


def test_one_batch_may_hold_stochastic_and_euler_steps() -> None:
    scheduler, (x, v) = make_scheduler(sde_steps=[0, 1]), batch()
    out = scheduler.step(v, scheduler.timesteps[[0, 4, 1]], x)
    assert (out.std_dev_t.flatten() > 0).tolist() == [True, False, True]
    assert (out.log_prob != 0).tolist() == [True, False, True]


def test_modes() -> None:
    scheduler, (x, v) = make_scheduler(), batch()
    t = scheduler.timesteps[3]
    assert not scheduler.is_eval
    scheduler.eval()
    assert scheduler.is_eval
    assert not scheduler.step(v, t, x).std_dev_t.any()
    assert not scheduler.step(v, t, x, noise_level=0.5).std_dev_t.any()
    scheduler.rollout()
    assert not scheduler.is_eval
    assert scheduler.step(v, t, x).std_dev_t.all()
    scheduler.train(mode=False)
    assert scheduler.is_eval
    assert not make_scheduler(dynamics_type="ODE").step(v, t, x).std_dev_t.any()
    assert not make_scheduler().step(v, t, x, dynamics_type="ODE").log_prob.any()


def test_step_sets() -> None:
    scheduler = make_scheduler()
    assert scheduler.sde_steps.tolist() == list(range(9))
    assert scheduler.num_sde_steps == 9
    scheduler = make_scheduler(num_sde_steps=3)
    first = scheduler.current_sde_steps
    assert torch.equal(first, scheduler.current_sde_steps)
    drawn = set()
    for seed in range(8):
        scheduler.set_seed(seed)
        drawn.add(tuple(scheduler.current_sde_steps.tolist()))
    assert len(drawn) > 1
    steps = scheduler.train_timesteps
    assert torch.equal(scheduler.get_train_timesteps(), scheduler.timesteps[steps])
    assert torch.equal(scheduler.get_train_sigmas(), scheduler.sigmas[steps])


def test_noise_levels() -> None:
    scheduler = make_scheduler(sde_steps=[1, 2], noise_level=0.5)
    expected = [0.0, 0.5, 0.5] + [0.0] * 7
    assert scheduler.get_noise_levels().tolist() == expected
    assert scheduler.get_noise_level_for_timestep(scheduler.timesteps).tolist() == expected
    assert scheduler.get_noise_level_for_timestep(float(scheduler.timesteps[1])) == 0.5
    assert scheduler.get_noise_level_for_timestep(scheduler.timesteps[3]) == 0.0
    assert scheduler.get_noise_level_for_sigma(scheduler.sigmas[:-1]).tolist() == expected
    assert scheduler.get_noise_level_for_sigma(float(scheduler.sigmas[2])) == 0.5
    with pytest.raises(ValueError, match=r"sigma 0.123 is not in the schedule"):
        scheduler.get_noise_level_for_sigma(0.123)


def test_ends_off_the_schedule_and_levels_per_sample() -> None:
    scheduler, (x, v) = make_scheduler(), batch()
    t, t_next = scheduler.timesteps[2], scheduler.timesteps[3]
    on = scheduler.step(v, t, x, x, noise_level=0.7)
    levels = scheduler.step(v, t, x, x, noise_level=torch.tensor([0.7, 0.3, 0.7], dtype=torch.float64))
    assert torch.equal(levels.log_prob[[0, 2]], on.log_prob[[0, 2]])
    assert levels.log_prob[1] != on.log_prob[1]
    twice = scheduler.step(v, t, x, x, timestep_next=scheduler.timesteps[4], noise_level=0.7)
    torch.testing.assert_close(
        twice.dt.flatten(), (scheduler.timesteps[4] - t)[None] / 1000, rtol=1e-5, atol=0
    )
    nearly = scheduler.step(v, float(t) + 1e-4, x, x, timestep_next=float(t_next), noise_level=0.7)
    assert torch.equal(nearly.log_prob, on.log_prob)
    with pytest.raises(ValueError, match="no step of the schedule; pass noise_level"):
        scheduler.step(v, 500.5, x, timestep_next=400.5)


def test_sigma_max_replaces_the_stand_in_for_sigma_one() -> None:
    scheduler, (x, v) = make_scheduler(), batch()
    out = scheduler.step(v, scheduler.timesteps[0], x, noise_level=0.7, sigma_max=0.99)
    assert float(out.std_dev_t) == pytest.approx(0.7 * (1 / 0.01) ** 0.5, rel=1e-6)


def test_config_round_trip(tmp_path) -> None:
    plain = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler = FlowMatchEulerDiscreteSDEScheduler(dynamics_type="CPS", sde_steps=[1, 2], **plain.config)
    assert scheduler.config.shift == 3.0
    scheduler.save_pretrained(tmp_path)
    loaded = FlowMatchEulerDiscreteSDEScheduler.from_pretrained(tmp_path)
    assert loaded.config.use_dynamic_shifting
    assert loaded.dynamics_type == "CPS"
    assert loaded.sde_steps.tolist() == [1, 2]
    converted = FlowMatchEulerDiscreteSDEScheduler.from_config(plain.config, noise_level=0.9)
    assert (converted.config.shift, converted.noise_level) == (3.0, 0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamics_type": "Flow-ODE"}, "dynamics_type is 'Flow-ODE'; did you mean 'Flow-SDE'"),
        ({"noise_level": -1.0}, "noise_level is -1.0; it must be at least 0"),
        ({"sde_steps": [3, 12]}, r"sde_steps is \[3, 12\]; with 10 steps give indices in \[0, 9\]"),
    ],
)
def test_bad_options_are_one_line(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_scheduler(**options).get_noise_levels()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dynamics_type": "cps"}, "dynamics_type is 'cps'"),
        ({"timestep": 123.0}, "timestep 123 is not in the schedule"),
        ({"timestep": 10}, r"timestep is \[10\]; integers are step indices, and must be in \[0, 9\]"),
        ({"noise_pred": torch.zeros(3, 16, 7)}, r"noise_pred is \[3, 16, 7\] and latents is \[3, 16, 8\]"),
        ({"next_latents": torch.zeros(1, 16, 8)}, r"next_latents is \[1, 16, 8\]"),
        ({"noise_level": torch.ones(2)}, r"noise_level is \[2\]; pass \[1\] .* or \[3\]"),
        ({"noise_level": -0.1}, "noise_level is -0.1; it must be at least 0"),
        ({"return_kwargs": ["logprob"]}, "return_kwargs entry is 'logprob'; did you mean 'log_prob'"),
        (
            {"timestep_next": 999.0, "timestep": 500.0, "noise_level": 0.7},
            "from sigma 0.5 to 0.999; sigmas must fall",
        ),
    ],
)
def test_bad_input_is_one_line(changes: dict, message: str) -> None:
    scheduler, (x, v) = make_scheduler(), batch()
    arguments = {"noise_pred": v, "timestep": scheduler.timesteps[0], "latents": x}
    with pytest.raises(ValueError, match=message) as error:
        scheduler.step(**(arguments | changes))
    assert "\n" not in str(error.value)
