"""Pruning, scouts and DiffusionNFT in the loop: what they cost, what they keep, and that they learn and resume."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowgrpo_fast.recipe import (
    NFT,
    Bound,
    Cuts,
    Deterministic,
    DPMSolver2M,
    FrozenWindow,
    Independent,
    LowPrecision,
    Normalise,
    Optimizer,
    Ramp,
    Scouts,
    TrainingPrecision,
)
from flowgrpo_fast.recipes import RECIPES
from flowgrpo_fast.sampling.prune import choose
from flowgrpo_fast.schedule.topology import ode_plan
from flowgrpo_fast.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.evaluate import evaluate
from flowgrpo_fast.training.loop import train, train_step
from tests.conftest import ToyModel
from tests.training.steps import CPU, drawn, sampled, snapshot_weights, weights

FORWARD = {
    "objective": NFT(),
    "topology": Independent(at=Deterministic()),
    "credit": (Normalise(std="batch"), Bound()),
}


def cuts(steps: tuple[int, ...], sizes: tuple[int, ...]) -> Cuts:
    return Cuts(inner=Independent(at=FrozenWindow(size=3, start=1)), steps=steps, sizes=sizes)


class ScoutScores:
    """Sees the scouts' rewards on their way to the choice."""

    def __init__(self, monkeypatch) -> None:
        def spy(scores, size, select):
            self.rewards = scores.flatten()
            return choose(scores, size, select)

        monkeypatch.setattr("flowgrpo_fast.experience.scouts.choose", spy)


def explored(engine, draws=None, step: int = 0):
    """The samples that scouts leave."""
    draws = drawn(engine.recipe, step) if draws is None else draws
    return engine.recipe.experience.collect(engine.stage, draws, step).samples


class Spy:
    """Counts the rows that go through any copy of a model."""

    def __init__(self, monkeypatch) -> None:
        self.rows, self.with_gradient = 0, 0
        plain = ToyModel.velocity

        def velocity(model, latents, sigma, conditioning):
            self.rows += len(latents)
            self.with_gradient += len(latents) * torch.is_grad_enabled()
            return plain(model, latents, sigma, conditioning)

        monkeypatch.setattr(ToyModel, "velocity", velocity)


# Per prompt, with the papers' group sizes: rollout (and scouts), then the update's forwards; then its backwards.
PROMISES = {
    "flow_grpo": (2 * 24 * 10, 2 * 2 * 24 * 9, 24 * 9),  # guidance doubles, the KL's reference doubles again
    "pro_grpo": (2 * (48 * 5 + 24 * 2 + 12 * 3), 2 * 2 * 12 * 9, 12 * 9),
    "pro_grpo_flash": (2 * (24 * 5 + 16 * 2 + 12 * 3), 2 * 2 * 12 * 9, 12 * 9),
    "diffusion_nft": (24 * 10, 3 * 24 * 9, 24 * 9),  # new, old, reference
    "sol_rl": (96 * 6 + 24 * 10, 3 * 24 * 6, 24 * 6),  # 60 % of the sigmas
    "naive_scaling": (96 * 10, 3 * 24 * 9, 24 * 9),
    "naive_quantized": (96 * 10, 3 * 24 * 9, 24 * 9),
    "tree_grpo": (2 * (1 + 2 + 4 + 8 + 16 * 6), 2 * (1 + 2 + 4 + 8), 1 + 2 + 4 + 8),  # a row for each node
    # The first step's row is asked in each of three updates; the loss joins steps: each is measured twice.
    "gcpo": (1 + 12 * 16, 2 * (3 + 12 * 15), 3 + 12 * 15),
    "op_grpo": (2 * 24 * 10, 2 * 2 * 24 * 6, 24 * 6),  # a stored trajectory costs what a fresh one does
    "awm": (24 * 14, 3 * 24 * 6, 24 * 6),  # new, start, followed
}


# What of it the first of two optimiser steps takes from the rollout where the policy's unconditional half is constant;
# else that half goes back through the network as well.
REUSED = {
    "flow_grpo": 24 * 9 // 2,
    "pro_grpo": 12 * 9 // 2,
    "pro_grpo_flash": 12 * 9 // 2,
    "tree_grpo": (1 + 2 + 4 + 8) / 2,  # one of two updates
    "op_grpo": 24 * 6 // 2,
}


@pytest.mark.parametrize(
    ("constant", "reuse"), [(False, True), (True, False), (True, True)], ids=["", "constant", "reused"]
)
@pytest.mark.parametrize("name", PROMISES)
def test_network_evaluations_are_the_methods_promise(toy_recipe, name, constant, reuse, monkeypatch) -> None:
    recipe = replace(RECIPES[name].make(), num_prompts=2, task=toy_recipe().task, num_steps=2)
    assert recipe.unconditional_gradient == (name in REUSED)
    recipe = replace(
        recipe,
        machine=replace(recipe.machine, reuse_unconditional=reuse),
        unconditional_gradient=recipe.unconditional_gradient and not constant,
    )
    if isinstance(recipe.experience, Scouts):  # the toy's layers are too small for a low precision
        recipe = replace(recipe, experience=replace(recipe.experience, precision=TrainingPrecision()))
    engine = build_engine(recipe, CPU)
    train_step(engine)  # the first also tests itself
    spy = Spy(monkeypatch)
    metrics = train_step(engine).metrics
    rollout, update, backward = (2 * count for count in PROMISES[name])
    reused = 2 * (constant and reuse) * REUSED.get(name, 0)
    backward *= 2 if recipe.unconditional_gradient else 1
    assert spy.rows == metrics["network_evaluations"] == rollout + update - reused
    assert spy.with_gradient == metrics["network_backwards"] == backward


def test_each_method_spends_less_than_what_it_replaces() -> None:
    total = {name: rollout + update for name, (rollout, update, _) in PROMISES.items()}
    assert total["pro_grpo_flash"] < total["pro_grpo"] < total["flow_grpo"]
    assert total["diffusion_nft"] < total["flow_grpo"]
    assert total["sol_rl"] < total["naive_scaling"]


def test_published_numbers() -> None:
    pro, flash, nft, sol = (
        RECIPES[n].make() for n in ("pro_grpo", "pro_grpo_flash", "diffusion_nft", "sol_rl")
    )
    assert (pro.topology.steps, (*pro.topology.sizes, pro.group_size)) == ((5, 7), (48, 24, 12))
    assert (flash.topology.steps, (*flash.topology.sizes, flash.group_size)) == ((5, 7), (24, 16, 12))
    flow = RECIPES["flow_grpo"].make()
    assert (pro.objective, pro.credit) == (flow.objective, flow.credit)
    assert (nft.group_size, nft.num_prompts, nft.guidance_scale, nft.optimizer.lr) == (24, 48, 1.0, 3e-4)
    bound = nft.credit[1].limit
    assert (nft.objective.beta, nft.objective.kl_beta, bound, nft.optimizer.num_updates) == (1.0, 1e-4, 5, 1)
    assert (nft.objective.old.rate, nft.objective.old.most) == (0.001, 0.5)
    scouts = sol.experience
    assert (scouts.num_scouts, sol.group_size, scouts.num_inference_steps) == (96, 24, 6)
    assert scouts.precision == LowPrecision(format="nvfp4", mode="merged")
    assert (sol.sigmas.num_inference_steps, scouts.select, scouts.regenerate) == (10, "top_bottom", True)


def test_chosen_seeds_are_regenerated_from_exactly_the_scouts_noise(toy_recipe, monkeypatch) -> None:
    """Scouts at full steps and precision find the very samples that the rollout then makes."""
    recipe = toy_recipe(**FORWARD, group_size=4, experience=Scouts(num_scouts=12, num_inference_steps=6))
    engine = build_engine(recipe, CPU)
    draws, seen = drawn(recipe), ScoutScores(monkeypatch)
    assert len(draws.seed) == 4 * 12
    regenerated = explored(engine, draws)
    assert regenerated.evaluations == 48 * 6 + 16 * 6
    everyone = sampled(engine, draws, plan=ode_plan(recipe.sigmas.grid(None), group_size=12))
    rows = (regenerated.draws.seed[:, None] == draws.seed[None]).int().argmax(1)
    torch.testing.assert_close(regenerated.x0, everyone.x0[rows], rtol=1e-5, atol=1e-6)
    rewards = engine.stage.scorer.terms[0].resolve()(
        engine.model.decode(everyone.x0),
        [engine.prompts.prompts[i] for i in draws.prompt_index[draws.group_id]],
    )
    assert torch.equal(rows, choose(rewards.view(4, 12), 4, "top_bottom"))
    torch.testing.assert_close(seen.rewards, rewards, rtol=1e-5, atol=1e-6)
    assert train_step(engine).metrics["scout_spearman"] == pytest.approx(1.0)


def test_without_batch_dependent_rounding_regenerated_samples_are_the_scouts_to_the_bit(
    toy_recipe, monkeypatch
) -> None:
    def elementwise(model, latents, sigma, conditioning):
        return latents * (1 + conditioning.prompt_embeds[:, 0]) - sigma[:, None] * latents.sin()

    monkeypatch.setattr(ToyModel, "velocity", elementwise)
    scouts = Scouts(num_scouts=12, num_inference_steps=6)
    recipe = toy_recipe(**FORWARD, group_size=4, experience=scouts, solver=DPMSolver2M())
    kept = replace(recipe, experience=replace(scouts, regenerate=False))
    engine, naive = build_engine(recipe, CPU), build_engine(kept, CPU)
    again, itself = explored(engine), explored(naive)
    assert torch.equal(again.x0, itself.x0)
    assert torch.equal(again.draws.start_seed, itself.draws.start_seed)


@pytest.mark.parametrize("select", ["top_bottom", "variance", "random"])
def test_coarse_scouts_are_compared_with_the_full_samples_at_every_step(toy_recipe, select) -> None:
    scouts = Scouts(num_scouts=24, num_inference_steps=2, select=select)
    engine = build_engine(toy_recipe(**FORWARD, experience=scouts), CPU)
    reports = []
    train(engine, reports.append, lambda: False)
    for report in reports:
        assert 0.3 < report.metrics["scout_spearman"] <= 1
        assert 0.5 <= report.metrics["scout_top_overlap"] <= 1
        assert report.metrics["reward_group_std"] > 0
    picked = explored(engine).draws.seed.view(4, 8)
    everyone = drawn(engine.recipe).seed.view(4, 24)
    assert torch.equal(picked, everyone[:, :8]) == (select == "random")


def test_scouts_widen_the_spread_of_rewards(toy_recipe) -> None:
    wide, plain = (
        train_step(build_engine(toy_recipe(**FORWARD, **extra), CPU)).metrics["reward_group_std"]
        for extra in ({"experience": Scouts(num_scouts=48, num_inference_steps=4)}, {})
    )
    assert wide > 1.5 * plain


def test_the_naive_control_trains_on_the_scouts_themselves(toy_recipe, monkeypatch) -> None:
    scouts = Scouts(num_scouts=12, num_inference_steps=5, regenerate=False)
    engine, seen = (
        build_engine(toy_recipe(**FORWARD, group_size=4, experience=scouts), CPU),
        ScoutScores(monkeypatch),
    )
    samples, draws = explored(engine), drawn(engine.recipe)
    assert samples.x0.shape == (16, 6)
    assert torch.equal(samples.draws.seed, draws.seed[choose(seen.rewards.view(4, 12), 4, "top_bottom")])
    assert samples.transitions == ()
    report = train_step(engine)
    assert "scout_spearman" not in report.metrics
    assert report.metrics["network_evaluations"] == 48 * 5 + 2 * 16 * 4  # int(0.99 * 5) sigmas


def test_ratio_losses_take_scouts_too(toy_recipe) -> None:
    engine = build_engine(toy_recipe(experience=Scouts(num_scouts=16, num_inference_steps=4)), CPU)
    metrics = train_step(engine).metrics
    assert metrics["ratio_self_test"] == 0.0
    assert -1 <= metrics["scout_spearman"] <= 1


@pytest.mark.parametrize("rows", [0, 8])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_ratio_is_exactly_one_for_survivors(toy_recipe, rows, precision) -> None:
    recipe = toy_recipe(topology=cuts((2, 3), (16, 12)), rows_per_forward=rows, precision=precision)
    engine = build_engine(recipe, CPU)
    reports = []
    train(engine, reports.append, lambda: False)
    assert [report.metrics["first_ratio_error"] for report in reports] == [0.0] * 4


def test_the_old_policy_follows_the_schedule_and_gives_the_samples(toy_recipe) -> None:
    part = NFT(old=Ramp(start=1, rate=0.3, most=0.5))
    engine = build_engine(toy_recipe(**{**FORWARD, "objective": part}), CPU)
    expected, follower = weights(engine.model), engine.learner.snapshots["old"]
    assert engine.sampled is engine.stage.sampler.policy.model is follower
    for decay in (0.0, 0.3, 0.5, 0.5):
        train_step(engine)
        expected = decay * expected + (1 - decay) * weights(engine.model)
        with follower.swapped_in():
            old = weights(engine.model)
        torch.testing.assert_close(old, expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(old, weights(engine.model))


def test_nft_trains_on_each_sigma_at_most_once(toy_recipe, monkeypatch) -> None:
    seen = []

    measure = NFT.measure

    def spy(part, point, evaluator):
        seen.append(point.step)
        return measure(part, point, evaluator)

    monkeypatch.setattr(NFT, "measure", spy)
    engine = build_engine(toy_recipe(**{**FORWARD, "objective": NFT(fraction=0.7)}), CPU)
    train_step(engine)
    positions = torch.stack(seen, dim=1)
    assert positions.shape == (32, 4)  # int(0.7 * 6) of the schedule's six sigmas
    assert all(len(set(row)) == 4 for row in positions.tolist())
    assert set(positions.flatten().tolist()) == set(range(6))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_steps": 40},
        {"num_steps": 30, "experience": Scouts(num_scouts=32, num_inference_steps=3)},
        {"num_steps": 40, "objective": NFT(beta=0.1, kl_beta=1e-3)},
    ],
    ids=str,
)
def test_nft_raises_reward_and_judge(toy_recipe, changes) -> None:
    engine = build_engine(toy_recipe(**{**FORWARD, "optimizer": Optimizer(lr=1e-2), **changes}), CPU)
    before = evaluate(engine).metrics
    train(engine, lambda report: None, lambda: False)
    after = evaluate(engine).metrics
    assert after["eval/reward"] > before["eval/reward"] + 0.15
    assert after["eval/judge"] >= 0.9 > before["eval/judge"]


@pytest.mark.parametrize(
    "changes",
    [
        {**FORWARD, "objective": NFT(kl_beta=0.01, old=Ramp(rate=0.2))},
        {**FORWARD, "experience": Scouts(num_scouts=16, num_inference_steps=3)},
        {"topology": cuts((2, 4), (16, 12))},
    ],
    ids=["nft", "scouts", "prune"],
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(toy_recipe, tmp_path, changes) -> None:
    recipe = toy_recipe(**changes)
    whole, half = build_engine(recipe, CPU), build_engine(recipe, CPU)
    train(whole, lambda report: None, lambda: False)
    train(half, lambda report: None, lambda: half.step >= 2)
    save_checkpoint(half, tmp_path)
    resumed = build_engine(recipe, CPU)
    load_checkpoint(resumed, latest_checkpoint(tmp_path))
    train(resumed, lambda report: None, lambda: False)
    assert torch.equal(weights(whole.model), weights(resumed.model))
    for name in whole.learner.snapshots:
        assert torch.equal(snapshot_weights(whole, name), snapshot_weights(resumed, name))
