from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flowgrpo_fast.sampling.sampler import check_finite, replay, rollout
from flowgrpo_fast.sampling.schedule import resolve_schedule
from flowgrpo_fast.training.sample import draw

from flowgrpo_fast.ops import philox_normal
from flowgrpo_fast.recipe import CPS, AllSteps, DanceSDE, DPMSolver2M, FlowSDE
from tests.conftest import ToyModel

CPU = torch.device("cpu")


def run(recipe, model=None, step: int = 0):
    model = model or ToyModel()
    draws = draw(recipe, 2, step, CPU)
    conditioning = model.encode(["low", "high"]).rows(draws.prompt_index[draws.group_id])
    schedule = resolve_schedule(recipe, step)
    return model, conditioning, rollout(model, conditioning, draws, schedule, recipe), schedule


@pytest.mark.parametrize("dynamics", [FlowSDE(), DanceSDE(), CPS()])
@pytest.mark.parametrize("solver", [None, DPMSolver2M(keep=0.5)])
def test_rollout_equals_a_plain_fp64_walk(toy_recipe, dynamics, solver) -> None:
    recipe = toy_recipe(dynamics=dynamics, **({"solver": solver} if solver else {}))
    model, conditioning, trajectory, schedule = run(recipe)
    model.module.double()
    wide = replace(conditioning, prompt_embeds=conditioning.prompt_embeds.double(), pooled_prompt_embeds=None)
    coeffs = schedule.coeffs.double()
    x = philox_normal(trajectory.draws.start_seed, (6,), stream=1).double()
    x0_prev, kept = None, 0
    for step in range(schedule.num_steps):
        sigma = coeffs[step, 0].expand(len(x))
        with torch.no_grad():
            velocity = model.velocity(x, sigma, wide)
        sigma_, a, b, c, d, inv_var, log_norm, _ = coeffs[step]
        mean = a * x + b * velocity + (d * x0_prev if x0_prev is not None else 0)
        x0_prev = x - sigma_ * velocity
        following = mean + c * philox_normal(trajectory.draws.seed, (6,), step=step).double()
        if step in schedule.kept:
            torch.testing.assert_close(trajectory.latents[:, kept].double(), x, rtol=1e-5, atol=1e-5)
            log_prob = -0.5 * inv_var * (following - mean).square().mean(1) + log_norm
            torch.testing.assert_close(trajectory.log_prob[:, kept].double(), log_prob, rtol=1e-4, atol=1e-5)
            kept += 1
        x = following
    torch.testing.assert_close(trajectory.x0.double(), x, rtol=1e-4, atol=1e-4)
    assert kept == trajectory.log_prob.shape[1] == 3


def test_a_sample_does_not_depend_on_who_else_is_in_its_group(toy_recipe) -> None:
    """Noise is a seed: any rows of the draws, alone, give the same starts and step noise."""
    recipe = toy_recipe(num_prompts=2)
    model, conditioning, whole, schedule = run(recipe)
    some = torch.tensor([3, 11, 5])
    draws = replace(
        whole.draws,
        group_id=torch.arange(3),
        seed=whole.draws.seed[some],
        start_seed=whole.draws.start_seed[some],
    )
    part = rollout(model, conditioning.rows(some), draws, schedule, recipe)
    torch.testing.assert_close(part.x0, whole.x0[some], rtol=1e-5, atol=1e-6)  # the model's own matmuls
    torch.testing.assert_close(part.log_prob, whole.log_prob[some], rtol=1e-5, atol=1e-6)


def test_shared_start_noise_is_one_start_per_group(toy_recipe) -> None:
    shared = run(toy_recipe(share_start_noise=True, window=AllSteps()))[2].latents[:, 0].view(4, 8, 6)
    own = run(toy_recipe(share_start_noise=False, window=AllSteps()))[2].latents[:, 0].view(4, 8, 6)
    assert torch.equal(shared, shared[:, :1].expand_as(shared))
    assert len(own.flatten(0, 1).unique(dim=0)) == 32
    assert len(shared[:, 0].unique(dim=0)) == 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
@pytest.mark.parametrize("rows", [0, 8])
def test_replay_gives_the_rollout_log_prob_to_the_bit(toy_recipe, precision, guidance_scale, rows) -> None:
    recipe = toy_recipe(precision=precision, guidance_scale=guidance_scale, rows_per_forward=rows)
    model, conditioning, trajectory, _ = run(recipe)
    size = recipe.rollout_rows
    for first in range(0, 32, size):
        part = slice(first, first + size)
        for position in range(3):
            log_prob, *_ = replay(
                model,
                trajectory,
                conditioning.rows(torch.arange(first, first + size)),
                part,
                torch.full((size,), position),
                recipe,
            )
            assert log_prob.requires_grad
            assert torch.equal(log_prob.detach(), trajectory.log_prob[part, position])


def test_guidance_mixes_the_two_halves(toy_recipe) -> None:
    recipe = toy_recipe(guidance_scale=2.5)
    _, conditioning, trajectory, schedule = run(recipe)

    class Guided(ToyModel):
        def velocity(self, latents, sigma, rows):
            positive, negative = (ToyModel.velocity(self, latents, sigma, r) for r in (rows, rows.negative()))
            return negative + 2.5 * (positive - negative)

    plain = rollout(Guided(), conditioning, trajectory.draws, schedule, toy_recipe())
    torch.testing.assert_close(plain.x0, trajectory.x0, rtol=1e-5, atol=1e-5)


def test_a_bad_velocity_names_step_and_sample(toy_recipe) -> None:
    class Broken(ToyModel):
        calls = 0

        def velocity(self, latents, sigma, conditioning):
            velocity = super().velocity(latents, sigma, conditioning)
            Broken.calls += 1
            if Broken.calls == 6:  # the last, deterministic step
                velocity = velocity.index_fill(0, torch.tensor([7]), float("inf"))
            return velocity

    with pytest.raises(ValueError, match="NaN or infinite at step 5, sample 7 "):
        run(toy_recipe(), Broken())


def test_check_finite_names_the_first_step() -> None:
    log_prob = torch.zeros(4, 6)
    check_finite(log_prob)
    log_prob[3, 2] = log_prob[1, 4] = float("nan")
    with pytest.raises(ValueError, match=r"step 2, sample 3 \(2 of 4 samples"):
        check_finite(log_prob)
