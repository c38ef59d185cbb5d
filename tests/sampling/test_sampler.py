from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from flowgrpo_fast.ops import philox_normal
from flowgrpo_fast.recipe import (
    CPS,
    AllSteps,
    DanceSDE,
    DPMSolver2M,
    FlowSDE,
    FrozenWindow,
    Independent,
    SharedStart,
)
from flowgrpo_fast.sampling.policy import Policy
from flowgrpo_fast.sampling.walk import check_finite, walk
from flowgrpo_fast.schedule.topology import ode_plan
from flowgrpo_fast.types import FlowModel
from tests.conftest import ToyModel
from tests.sampling.walks import batch_of, drawn, learner_of, measured, sampler_of, stacked


def run(recipe, model=None, step: int = 0):
    model = model or ToyModel()
    draws = drawn(recipe, 2, step)
    conditioning = model.encode(["low", "high"]).rows(draws.prompt_index[draws.group_id])
    plan = recipe.plan(step)
    return model, conditioning, walk(sampler_of(model, recipe), plan, conditioning, draws), plan


@pytest.mark.parametrize("dynamics", [FlowSDE(), DanceSDE(), CPS()])
@pytest.mark.parametrize("solver", [None, DPMSolver2M(keep=0.5)])
def test_rollout_equals_a_plain_fp64_walk(toy_recipe, dynamics, solver) -> None:
    recipe = toy_recipe(dynamics=dynamics, **({"solver": solver} if solver else {}))
    model, conditioning, trajectory, plan = run(recipe)
    model.module.double()
    wide = replace(conditioning, prompt_embeds=conditioning.prompt_embeds.double(), pooled_prompt_embeds=None)
    coeffs = plan.coeffs.double()
    x = philox_normal(trajectory.draws.start_seed, (6,), stream=1).double()
    x0_prev, kept = None, 0
    for step in range(len(plan.steps)):
        sigma = coeffs[step, 0].expand(len(x))
        with torch.no_grad():
            velocity = model.velocity(x, sigma, wide)
        sigma_, a, b, c, d, inv_var, log_norm, _ = coeffs[step]
        mean = a * x + b * velocity + (d * x0_prev if x0_prev is not None else 0)
        x0_prev = x - sigma_ * velocity
        following = mean + c * philox_normal(trajectory.draws.seed, (6,), step=step).double()
        if step in plan.kept:
            transition = trajectory.transitions[kept]
            torch.testing.assert_close(transition.latents.double(), x, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(transition.next_latents.double(), following, rtol=1e-5, atol=1e-5)
            assert transition.row.tolist() == [step] * len(x)
            log_prob = -0.5 * inv_var * (following - mean).square().mean(1) + log_norm
            torch.testing.assert_close(transition.log_prob.double(), log_prob, rtol=1e-4, atol=1e-5)
            kept += 1
        x = following
    torch.testing.assert_close(trajectory.x0.double(), x, rtol=1e-4, atol=1e-4)
    assert kept == len(trajectory.transitions) == 3


def test_a_sample_does_not_depend_on_who_else_is_in_its_group(toy_recipe) -> None:
    """Noise is a seed: any rows of the draws, alone, give the same starts and step noise."""
    recipe, recipe_alone = toy_recipe(num_prompts=2), toy_recipe(num_prompts=3, group_size=1, credit=())
    model, conditioning, whole, plan = run(recipe)
    some = torch.tensor([3, 11, 5])
    draws = replace(
        whole.draws,
        prompt_index=whole.draws.prompt_index[whole.draws.group_id[some]],
        group_id=torch.arange(3),
        seed=whole.draws.seed[some],
        start_seed=whole.draws.start_seed[some],
    )
    alone = recipe_alone.plan(0)
    part = walk(sampler_of(model, recipe), alone, conditioning.rows(some), draws)
    torch.testing.assert_close(part.x0, whole.x0[some], rtol=1e-5, atol=1e-6)  # the model's own matmuls
    theirs = stacked(whole, "log_prob")[some]
    torch.testing.assert_close(stacked(part, "log_prob"), theirs, rtol=1e-5, atol=1e-6)
    assert len(plan.steps) == len(alone.steps)


def test_shared_start_noise_is_one_start_per_group(toy_recipe) -> None:
    shared = run(toy_recipe(topology=SharedStart(at=AllSteps())))[2]
    own = run(toy_recipe(topology=Independent(at=AllSteps())))[2]
    shared, own = (stacked(trajectory, "latents")[:, 0].view(4, 8, 6) for trajectory in (shared, own))
    assert torch.equal(shared, shared[:, :1].expand_as(shared))
    assert len(own.flatten(0, 1).unique(dim=0)) == 32
    assert len(shared[:, 0].unique(dim=0)) == 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
@pytest.mark.parametrize("rows", [0, 8])
def test_replay_gives_the_rollout_log_prob_to_the_bit(toy_recipe, precision, guidance_scale, rows) -> None:
    recipe = toy_recipe(precision=precision, guidance_scale=guidance_scale, rows_per_forward=rows)
    model, conditioning, trajectory, _ = run(recipe)
    samples = []
    for point, stats in measured(learner_of(model, recipe), batch_of(trajectory, conditioning)):
        assert point.num_heads == recipe.rollout_rows == (rows or 32)
        samples += [(point.place, int(sample)) for sample in point.samples[:, 0]]
        assert stats["log_prob"].requires_grad
        assert torch.equal(stats["log_prob"].detach(), point.log_prob)
        index = point.samples[:, 0]
        assert torch.equal(point.log_prob, trajectory.transitions[point.place - 1].log_prob[index])
    assert samples == [(place, sample) for place in (1, 2, 3) for sample in range(32)]


def test_guidance_mixes_the_two_halves(toy_recipe) -> None:
    recipe = toy_recipe(guidance_scale=2.5)
    _, conditioning, trajectory, plan = run(recipe)

    class Guided(ToyModel):
        def velocity(self, latents, sigma, rows):
            positive, negative = (ToyModel.velocity(self, latents, sigma, r) for r in (rows, rows.negative()))
            return negative + 2.5 * (positive - negative)

    plain = walk(sampler_of(Guided(), toy_recipe()), plan, conditioning, trajectory.draws)
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
    plan = ode_plan(np.linspace(1, 0, 7), group_size=4)
    log_prob = torch.zeros(4, 6)
    check_finite(plan, 1, [(step, None, log_prob[:, step]) for step in range(6)])
    log_prob[3, 2] = log_prob[1, 4] = float("nan")
    with pytest.raises(ValueError, match=r"step 2, sample 3 \(2 of 4 samples"):
        check_finite(plan, 1, [(step, None, log_prob[:, step]) for step in range(6)])


def test_a_bad_row_that_samples_share_hits_all_of_them(toy_recipe) -> None:
    """Before the first stochastic step a prompt is one row; the third prompt's breaks."""

    class Broken(ToyModel):
        def velocity(self, latents, sigma, conditioning):
            velocity = super().velocity(latents, sigma, conditioning)
            return velocity.index_fill(0, torch.tensor([2]), float("nan")) if len(latents) == 4 else velocity

    with pytest.raises(ValueError, match=r"step 0, sample 16 \(8 of 32 samples are hit\)"):
        run(toy_recipe(topology=SharedStart(at=FrozenWindow(size=3, start=1))), Broken())


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0, -2.0])
def test_guidance_of_at_most_1_is_none(scale: float) -> None:
    """As in the pipelines; the velocity with the prompt is what counts."""
    assert Policy(FlowModel(), scale).halves == 1
    assert Policy(FlowModel(), 1.01).halves == 2
