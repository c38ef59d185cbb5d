"""Rows against the published formulas, written out independently here in fp64, and against recorded trainers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flowgrpo_fast.ops import Extras, flow_log_prob, flow_step
from flowgrpo_fast.schedule.dynamics import CPS, DanceSDE, DPMSolver2M, Euler, FlowSDE, coefficients
from flowgrpo_fast.schedule.sigmas import Sigmas

SIGMAS = Sigmas(num_inference_steps=10, shift=3.0).grid()


def apply_row(row, x, v, x0_prev=0.0):
    _, a, b, _, d, *_ = row
    return a * x + b * v + d * x0_prev


@pytest.mark.parametrize("step", range(9))
def test_rows_equal_the_published_formulas(step: int) -> None:
    rng = np.random.default_rng(step)
    x, v = rng.normal(size=(2, 1000))
    s, t = SIGMAS[step], SIGMAS[step + 1]
    dt = t - s
    x0, x1 = x - s * v, x + (1 - s) * v

    row = FlowSDE(noise_level=0.7).row(SIGMAS, step, step + 1)
    q = 0.7 * math.sqrt(s / (1 - (SIGMAS[1] if s == 1 else s)))
    mean = x * (1 + q**2 / (2 * s) * dt) + v * (1 + q**2 * (1 - s) / (2 * s)) * dt
    np.testing.assert_allclose(apply_row(row, x, v), mean, atol=1e-13)
    assert row[3] == pytest.approx(q * math.sqrt(-dt), rel=1e-14)
    assert row[5] == pytest.approx(1 / (q**2 * -dt), rel=1e-13)
    assert row[6] == pytest.approx(-math.log(q * math.sqrt(-dt)) - 0.5 * math.log(2 * math.pi), rel=1e-13)

    row = DanceSDE(noise_level=0.3).row(SIGMAS, step, step + 1)
    score = -(x - (1 - s) * x0) / s**2
    np.testing.assert_allclose(apply_row(row, x, v), x + v * dt - 0.5 * 0.3**2 * score * dt, atol=1e-13)
    assert row[3] == pytest.approx(0.3 * math.sqrt(-dt), rel=1e-14)

    row = CPS(noise_level=0.8).row(SIGMAS, step, step + 1)
    c = t * math.sin(0.8 * math.pi / 2)
    np.testing.assert_allclose(apply_row(row, x, v), (1 - t) * x0 + math.sqrt(t**2 - c**2) * x1, atol=1e-13)
    assert row[3:7] == (pytest.approx(c, rel=1e-14), 0.0, 2.0, 0.0)

    row = Euler().row(SIGMAS, step, step + 1)
    np.testing.assert_allclose(apply_row(row, x, v), x + dt * v, atol=1e-15)
    assert row[3:] == (0.0, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("variant", ["midpoint", "heun"])
def test_second_order_rows_equal_the_published_update(variant: str) -> None:
    rng = np.random.default_rng(0)
    x, v, m1 = rng.normal(size=(3, 1000))
    step = 4
    before, s, t = SIGMAS[step - 1 : step + 2]
    m0 = x - s * v
    lam = lambda sigma: math.log((1 - sigma) / sigma)  # noqa: E731
    h = lam(t) - lam(s)
    difference = (m0 - m1) / ((lam(s) - lam(before)) / h)
    alpha = 1 - t
    second = {"midpoint": -0.5 * alpha * (math.exp(-h) - 1), "heun": alpha * ((math.exp(-h) - 1) / h + 1)}
    expected = t / s * x - alpha * (math.exp(-h) - 1) * m0 + second[variant] * difference
    row = DPMSolver2M(variant=variant).row(SIGMAS, step, step + 1)
    np.testing.assert_allclose(apply_row(row, x, v, m1), expected, atol=1e-12)


def test_deterministic_limits_are_euler() -> None:
    for step in (0, 1, 9):  # no history, history at sigma = 1, last step to 0
        row = DPMSolver2M().row(SIGMAS, step, step + 1)
        assert row == Euler().row(SIGMAS, step, step + 1)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun"])
def test_solvers_agree_with_diffusers(golden, solver: str) -> None:
    """Golden: the field tanh(x A) (1 + sigma), walked by diffusers' own schedulers."""
    field = torch.from_numpy(golden["ode_field"])
    states = golden["ode_euler"] if solver == "euler" else golden[f"dpm2m_{solver}"]
    sigmas = golden["ode_sigmas" if solver == "euler" else "dpm2m_sigmas"].astype(np.float64)
    rule = Euler() if solver == "euler" else DPMSolver2M(variant=solver)
    coeffs = coefficients(sigmas, [rule] * (len(sigmas) - 1))
    x = torch.from_numpy(golden["ode_x_init"])
    seed = torch.zeros(len(x), dtype=torch.int64)
    x0_prev = None
    np.testing.assert_allclose(x, states[0], rtol=1e-6)
    for step in range(len(sigmas) - 1):
        velocity = (torch.tanh(x.double() @ field) * (1 + sigmas[step])).float()
        history = x0_prev if coeffs[step, 4] != 0 else None
        out = flow_step(x, velocity, coeffs, step, seed, x0_prev=history, return_x0_pred=True)
        x, x0_prev = out.next_latents, out.x0_pred
        np.testing.assert_allclose(x, states[step + 1], rtol=2e-4, atol=2e-5, err_msg=f"state {step + 1}")
        assert torch.equal(out.log_prob, torch.zeros(len(x)))


@pytest.mark.parametrize(
    ("prefix", "make"),
    [
        ("flow_grpo", lambda n: FlowSDE(noise_level=n)),
        ("ff_flow_sde", lambda n: FlowSDE(noise_level=n)),
        ("ff_dance_sde", lambda n: DanceSDE(noise_level=n)),
        ("ff_cps", lambda n: CPS(noise_level=n)),
    ],
)
def test_recorded_trainers(golden, prefix: str, make) -> None:
    for case in ("c0", "c1", "c2"):
        if f"{case}_{prefix}_mean" not in golden:
            continue
        rule = make(float(golden[f"{case}_noise_level"]))
        sigmas = golden[f"{case}_sigmas"].astype(np.float64)
        coeffs = coefficients(sigmas, [rule] * (len(sigmas) - 1))
        x, v, following = (torch.from_numpy(golden[f"{case}_{k}"]) for k in ("x", "v", "next"))
        index = torch.from_numpy(golden[f"{case}_idx"])
        log_prob, mean = flow_log_prob(x, v, following, coeffs, index, extras=Extras(mean=True))[:2]
        np.testing.assert_allclose(mean, golden[f"{case}_{prefix}_mean"], rtol=1e-5, atol=2e-6)
        recorded = golden[f"{case}_{prefix}_log_prob"]
        np.testing.assert_allclose(log_prob, recorded, rtol=2e-6, atol=1e-6)


def test_golden_noise_rates(golden) -> None:
    sigmas = golden["c0_sigmas"].astype(np.float64)
    rule = FlowSDE(noise_level=float(golden["c0_noise_level"]))
    rates = [rule.rate(sigmas, int(i)) for i in golden["c0_idx"]]
    np.testing.assert_allclose(rates, golden["c0_flow_grpo_std_dev_t"], rtol=2e-6)


@pytest.mark.parametrize(
    ("sigmas", "count", "message"),
    [
        ([1.0, 0.5, 0.0], 1, "1 rules for 2 steps"),
        ([1.0, 1.0, 0.0], 2, "must fall strictly"),
        ([1.5, 0.5, 0.0], 2, "must fall strictly"),
        ([0.0, 0.5, 1.0], 2, "must fall strictly"),
    ],
)
def test_bad_schedules(sigmas, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        coefficients(np.array(sigmas), [Euler()] * count)


@pytest.mark.parametrize(
    ("name", "rule"),
    [("flow", FlowSDE(noise_level=0.7)), ("dance", DanceSDE(noise_level=0.3)), ("cps", CPS(noise_level=0.8))],
)
def test_worked_rows(methods, name: str, rule) -> None:
    case = methods["transition_rows"]
    sigmas = np.array(case["inputs"]["sigmas"])
    for step, wanted in enumerate(case["expected"][name]):
        row = rule.row(sigmas, step, step + 1)
        np.testing.assert_allclose((row[1], row[2], row[3]), wanted, rtol=1e-12)


def test_a_merged_row_is_one_step_over_several(methods) -> None:
    """E-GRPO's: the rate is that of where the step begins, the time is all of it."""
    case = methods["e_grpo_merged_row"]
    sigmas, start, count = (
        np.array(case["inputs"]["sigmas"]),
        case["inputs"]["index"],
        case["inputs"]["m"],
    )
    row = FlowSDE(noise_level=0.7).row(sigmas, start, start + count)
    expected = case["expected"]
    np.testing.assert_allclose(row[1:4], (expected["a"], expected["b"], expected["s"]), rtol=1e-12)
    entropy = 0.5 * math.log(2 * math.pi * math.e * row[3] ** 2)
    assert entropy == pytest.approx(expected["entropy_per_dim"], rel=1e-12)
    for rule in (FlowSDE(), DanceSDE(), CPS(), Euler()):
        through = np.array([*sigmas[: start + 1], *sigmas[start + count :]])
        assert rule.row(sigmas, start, start + count) == rule.row(through, start, start + 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowSDE(noise_level=0), "FlowSDE.noise_level is 0; it must be above 0"),
        (lambda: DanceSDE(noise_level=-0.1), "DanceSDE.noise_level is -0.1; it must be above 0"),
        (lambda: CPS(noise_level=1.5), r"CPS.noise_level is 1.5; it must be in \(0, 1\]"),
        (lambda: DPMSolver2M(keep=0), r"DPMSolver2M.keep is 0; it must be in \(0, 1\]"),
        (
            lambda: DPMSolver2M(variant="heuns"),
            "DPMSolver2M.variant is 'heuns'; it must be 'midpoint' or 'heun'",
        ),
    ],
)
def test_refusals_name_value_and_remedy(make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
