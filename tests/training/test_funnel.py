"""Pruning, scouts and DiffusionNFT in the loop: what they cost, what they keep, and that they learn and resume."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flowgrpo_fast.sampling.schedule import ode_schedule, resolve_schedule
from flowgrpo_fast.training.explore import explore
from flowgrpo_fast.training.sample import draw, sample

from flowgrpo_fast.recipe import (
    NFT,
    Credit,
    Deterministic,
    DPMSolver2M,
    LowPrecision,
    Optimizer,
    Prune,
    Scouts,
    TrainingPrecision,
)
from flowgrpo_fast.recipes import RECIPES
from flowgrpo_fast.sampling.prune import choose
from flowgrpo_fast.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import evaluate, train, train_step
from flowgrpo_fast.training.update import noised_terms
from tests.conftest import ToyModel

CPU = torch.device("cpu")
FORWARD = {"loss": NFT(), "window": Deterministic(), "credit": Credit(std="batch", drop_zero_variance=False)}


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
    "sol_rl": (96 * 6 + 24 * 10, 3 * 24 * 9, 24 * 9),
    "naive_scaling": (96 * 10, 3 * 24 * 9, 24 * 9),
    "naive_quantized": (96 * 10, 3 * 24 * 9, 24 * 9),
}


# What of it the first of two optimiser steps takes from the rollout: the policy's unconditional half.
REUSED = {"flow_grpo": 24 * 9 // 2, "pro_grpo": 12 * 9 // 2, "pro_grpo_flash": 12 * 9 // 2}


@pytest.mark.parametrize("reuse", [False, True], ids=["", "reused"])
@pytest.mark.parametrize("name", PROMISES)
def test_network_evaluations_are_the_methods_promise(toy_recipe, name, reuse, monkeypatch) -> None:
    recipe = replace(RECIPES[name].make(), num_prompts=2, task=toy_recipe().task, num_steps=2)
    recipe = replace(recipe, reuse_unconditional=reuse)
    if isinstance(recipe.explore, Scouts):  # the toy's layers are too small for a low precision
        recipe = replace(recipe, explore=replace(recipe.explore, precision=TrainingPrecision()))
    engine = build_engine(recipe, CPU)
    train_step(engine)  # the first also tests itself
    spy = Spy(monkeypatch)
    metrics = train_step(engine).metrics
    rollout, update, backward = (2 * count for count in PROMISES[name])
    reused = 2 * reuse * REUSED.get(name, 0)
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
    assert (pro.prune.at, (*pro.prune.sizes, pro.group_size)) == ((5, 7), (48, 24, 12))
    assert (flash.prune.at, (*flash.prune.sizes, flash.group_size)) == ((5, 7), (24, 16, 12))
    assert (pro.loss, pro.credit) == (RECIPES["flow_grpo"].make().loss, RECIPES["flow_grpo"].make().credit)
    assert (nft.group_size, nft.num_prompts, nft.guidance_scale, nft.optimizer.lr) == (24, 48, 1.0, 3e-4)
    assert (nft.loss.beta, nft.loss.kl_beta, nft.credit.clip, nft.optimizer.num_updates) == (1.0, 1e-4, 5, 1)
    assert (nft.loss.old_decay_rate, nft.loss.old_decay_max) == (0.001, 0.5)
    scouts = sol.explore
    assert (scouts.num_scouts, sol.group_size, scouts.num_inference_steps) == (96, 24, 6)
    assert scouts.precision == LowPrecision(format="nvfp4", mode="merged")
    assert (sol.sigmas.num_inference_steps, scouts.select, scouts.regenerate) == (10, "top_bottom", True)


def test_chosen_seeds_are_regenerated_from_exactly_the_scouts_noise(toy_recipe) -> None:
    """Scouts at full steps and precision find the very samples that the rollout then makes."""
    recipe = toy_recipe(**FORWARD, group_size=4, explore=Scouts(num_scouts=12, num_inference_steps=6))
    engine = build_engine(recipe, CPU)
    drawn = draw(recipe, 2, 0, CPU)
    assert len(drawn.seed) == 4 * 12
    explored = explore(engine, drawn)
    assert explored.evaluations == 48 * 6
    schedule = ode_schedule(recipe.sigmas)
    everyone = sample(engine, drawn, schedule)
    regenerated = sample(engine, explored.draws, schedule)
    rows = (explored.draws.seed[:, None] == drawn.seed[None]).int().argmax(1)
    torch.testing.assert_close(regenerated.x0, everyone.x0[rows], rtol=1e-5, atol=1e-6)
    rewards = engine.scorer.terms[0].resolve()(
        engine.model.decode(everyone.x0),
        [engine.prompt_set.prompts[i] for i in drawn.prompt_index[drawn.group_id]],
    )
    assert torch.equal(rows, choose(rewards.view(4, 12), 4, "top_bottom"))
    torch.testing.assert_close(explored.scout_rewards, rewards[rows], rtol=1e-5, atol=1e-6)
    assert train_step(engine).metrics["scout_spearman"] == pytest.approx(1.0)


def test_without_batch_dependent_rounding_regenerated_samples_are_the_scouts_to_the_bit(
    toy_recipe, monkeypatch
) -> None:
    def elementwise(model, latents, sigma, conditioning):
        return latents * (1 + conditioning.prompt_embeds[:, 0]) - sigma[:, None] * latents.sin()

    monkeypatch.setattr(ToyModel, "velocity", elementwise)
    scouts = Scouts(num_scouts=12, num_inference_steps=6)
    recipe = toy_recipe(**FORWARD, group_size=4, explore=scouts, solver=DPMSolver2M())
    kept = replace(recipe, explore=replace(scouts, regenerate=False))
    engine, naive = build_engine(recipe, CPU), build_engine(kept, CPU)
    drawn = draw(recipe, 2, 0, CPU)
    explored, itself = explore(engine, drawn), explore(naive, drawn).finished
    again = sample(engine, explored.draws, resolve_schedule(recipe, 0))
    assert torch.equal(again.x0, itself.x0)
    assert torch.equal(again.draws.start_seed, itself.draws.start_seed)


@pytest.mark.parametrize("select", ["top_bottom", "variance", "random"])
def test_coarse_scouts_are_compared_with_the_full_samples_at_every_step(toy_recipe, select) -> None:
    scouts = Scouts(num_scouts=24, num_inference_steps=2, select=select)
    engine = build_engine(toy_recipe(**FORWARD, explore=scouts), CPU)
    reports = []
    train(engine, reports.append, lambda: False)
    for report in reports:
        assert 0.3 < report.metrics["scout_spearman"] <= 1
        assert 0.5 <= report.metrics["scout_top_overlap"] <= 1
        assert report.metrics["reward_group_std"] > 0
    picked = explore(engine, draw(engine.recipe, 2, 0, CPU)).draws.seed.view(4, 8)
    drawn = draw(engine.recipe, 2, 0, CPU).seed.view(4, 24)
    assert torch.equal(picked, drawn[:, :8]) == (select == "random")


def test_scouts_widen_the_spread_of_rewards(toy_recipe) -> None:
    wide, plain = (
        train_step(build_engine(toy_recipe(**FORWARD, **extra), CPU)).metrics["reward_group_std"]
        for extra in ({"explore": Scouts(num_scouts=48, num_inference_steps=4)}, {})
    )
    assert wide > 1.5 * plain


def test_the_naive_control_trains_on_the_scouts_themselves(toy_recipe) -> None:
    scouts = Scouts(num_scouts=12, num_inference_steps=5, regenerate=False)
    engine = build_engine(toy_recipe(**FORWARD, group_size=4, explore=scouts), CPU)
    explored = explore(engine, draw(engine.recipe, 2, 0, CPU))
    assert explored.finished.x0.shape == (16, 6)
    assert torch.equal(explored.finished.draws.seed, explored.draws.seed)
    report = train_step(engine)
    assert "scout_spearman" not in report.metrics
    assert report.metrics["network_evaluations"] == 48 * 5 + 2 * 16 * 4  # int(0.99 * 5) sigmas


def test_ratio_losses_take_scouts_too(toy_recipe) -> None:
    engine = build_engine(toy_recipe(explore=Scouts(num_scouts=16, num_inference_steps=4)), CPU)
    metrics = train_step(engine).metrics
    assert metrics["ratio_self_test"] == 0.0
    assert -1 <= metrics["scout_spearman"] <= 1


@pytest.mark.parametrize("rows", [0, 8])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_ratio_is_exactly_one_for_survivors(toy_recipe, rows, precision) -> None:
    prune = Prune(at=(2, 3), sizes=(16, 12))
    engine = build_engine(toy_recipe(prune=prune, rows_per_forward=rows, precision=precision), CPU)
    reports = []
    train(engine, reports.append, lambda: False)
    assert [report.metrics["first_ratio_error"] for report in reports] == [0.0] * 4


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.module.parameters()])


def test_the_old_policy_follows_the_schedule_and_gives_the_samples(toy_recipe) -> None:
    part = NFT(old_decay_start=1, old_decay_rate=0.3, old_decay_max=0.5)
    engine = build_engine(toy_recipe(**{**FORWARD, "loss": part}), CPU)
    expected = weights(engine.model)
    assert engine.sampled is engine.old
    for decay in (0.0, 0.3, 0.5, 0.5):
        train_step(engine)
        expected = decay * expected + (1 - decay) * weights(engine.model)
        with engine.old.swapped_in():
            old = weights(engine.model)
        torch.testing.assert_close(old, expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(old, weights(engine.model))


def test_nft_trains_on_each_sigma_at_most_once(toy_recipe, monkeypatch) -> None:
    seen = []

    def spy(engine, batch, rows, turn):
        seen.append((turn, batch.step_position[rows, turn]))
        return noised_terms(engine, batch, rows, turn)

    monkeypatch.setattr("flowgrpo_fast.training.update.noised_terms", spy)
    engine = build_engine(toy_recipe(**{**FORWARD, "loss": NFT(fraction=0.7)}), CPU)
    train_step(engine)
    positions = torch.stack([position for _, position in seen], dim=1)
    assert positions.shape == (32, 4)  # int(0.7 * 6) of the schedule's six sigmas
    assert all(len(set(row)) == 4 for row in positions.tolist())
    assert set(positions.flatten().tolist()) == set(range(6))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_steps": 40},
        {"num_steps": 30, "explore": Scouts(num_scouts=32, num_inference_steps=3)},
        {"num_steps": 40, "loss": NFT(beta=0.1, kl_beta=1e-3)},
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
        {**FORWARD, "loss": NFT(kl_beta=0.01, old_decay_rate=0.2)},
        {**FORWARD, "explore": Scouts(num_scouts=16, num_inference_steps=3)},
        {"prune": Prune(at=(2, 4), sizes=(16, 12))},
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
    if whole.old is not None:
        assert torch.equal(weights(whole.old), weights(resumed.old))
