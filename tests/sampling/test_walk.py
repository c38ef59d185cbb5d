"""Walks along every topology: a first ratio of exactly 1, noise that is a seed, paths that are each sample's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from flowgrpo_fast.experience.experience import chunks, joined
from flowgrpo_fast.models.digits import DigitsConfig, DigitsModel, DigitsNetwork, prompts
from flowgrpo_fast.ops import Guidance, philox_normal, reference
from flowgrpo_fast.recipe import (
    AllSteps,
    Comb,
    Cuts,
    DPMSolver2M,
    FractionOfSteps,
    FrozenWindow,
    Independent,
    OneStepEach,
    SharedStart,
    SlidingWindow,
    Tree,
)
from flowgrpo_fast.sampling import step
from flowgrpo_fast.sampling.walk import START_NOISE_STREAM, walk
from flowgrpo_fast.schedule.plan import IDLE
from flowgrpo_fast.training.update import update
from flowgrpo_fast.types import Imposed
from tests.conftest import ToyModel
from tests.sampling.walks import batch_of, drawn, learner_of, measured, sampler_of, stacked, uncut

TWO, THREE = FrozenWindow(size=2, start=1), FrozenWindow(size=3, start=1)


def cuts(inner, **changes) -> Cuts:
    return Cuts(inner=inner, **{"steps": (3, 5), "sizes": (16, 12), **changes})


# Groups of 8 but for the tree of three, which has nine leaves.
TOPOLOGIES = {
    "independent": Independent(at=THREE),
    "all steps": Independent(at=AllSteps()),
    "a fraction": Independent(at=FractionOfSteps(fraction=0.6)),
    "shared": SharedStart(at=THREE),
    "shared from the start": SharedStart(at=AllSteps()),
    "shared, no prefix": SharedStart(at=THREE, share_prefix=False),
    "shared, a fraction": SharedStart(at=FractionOfSteps(fraction=0.6)),
    "shared, steps of their own": SharedStart(at=SlidingWindow(size=2, every=1)),
    "tree of 2": Tree(at=THREE, fan=2),
    "tree of 3": Tree(at=TWO, fan=3),
    "comb": Comb(at=TWO, fan=4),
    "comb of one": Comb(at=FrozenWindow(size=1, start=0), fan=8),
    "merged comb": Comb(at=TWO, fan=4, merge=2),
    "long comb": Comb(at=FrozenWindow(size=1, start=1), fan=8, merge=3),
    "one step each": OneStepEach(),
    "one step each, shared": OneStepEach(share_start=True),
    "cuts": cuts(Independent(at=AllSteps())),
    "cuts before and after": cuts(Independent(at=FrozenWindow(size=1, start=3))),
    "cuts of shared": cuts(SharedStart(at=THREE)),
    "cuts of pooled latents": cuts(Independent(at=THREE), score="latents", pool=2),
}
every_topology = pytest.mark.parametrize("name", TOPOLOGIES)


class Elementwise(ToyModel):
    """Its velocity of a row is the same bits in any batch: no matrix product."""

    latent_shape = (1, 4, 4)

    def velocity(self, latents, sigma, conditioning):
        wide = (len(latents), 1, 1, 1)
        wish, level = conditioning.prompt_embeds[:, 0].view(wide), sigma.view(-1, 1, 1, 1).expand(wide)
        return latents * (1 + 0.3 * wish) - level * latents.sin()


@pytest.fixture(scope="module")
def network() -> DigitsModel:
    """A small SD3 transformer for handwritten digits, whose weights say something."""
    torch.manual_seed(0)
    module = DigitsNetwork(DigitsConfig(num_layers=1)).eval()
    module.words.requires_grad_(False)
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return DigitsModel(module)


def fitted(toy_recipe, name, **changes):
    topology = TOPOLOGIES[name]
    size = topology.only_group_size(6) or 8
    return toy_recipe(**{"topology": topology, "group_size": size, **changes})


def score(x0_pred):
    return x0_pred.flatten(1).sum(1)


def walked(recipe, model, words, imposed=None, plan=None):
    draws = drawn(recipe, len(words))
    conditioning = model.encode(words).rows(draws.prompt_index[draws.group_id])
    sampler = sampler_of(model, recipe)
    return walk(sampler, plan or recipe.plan(0), conditioning, draws, score, imposed), conditioning


def conditioned(trajectory, model, words):
    draws = trajectory.draws
    return model.encode(words).rows(draws.prompt_index[draws.group_id])


def is_exact(recipe, model, trajectory) -> int:
    """How many stored edges the update measures; each of them to the rollout's bits."""
    batch, count = batch_of(trajectory, conditioned(trajectory, model, prompts())), 0
    for _, stats in measured(learner_of(model, recipe), batch):
        log_ratio = stats["log_prob"] - stats["old_log_prob"]
        assert log_ratio.requires_grad
        assert torch.equal(log_ratio, torch.zeros_like(log_ratio))
        count += len(log_ratio)
    return count


MACHINES = {
    "fp32": {},
    "bf16, guided": {"precision": "bf16", "guidance_scale": 3.0},
    "guided": {"guidance_scale": 3.0},
    "guided, both halves again": {"guidance_scale": 3.0, "reuse_unconditional": False},
    "small forwards": {"rows_per_forward": 4},
    "bf16, steps side by side": {"precision": "bf16", "steps_per_forward": 3, "rows_per_forward": 4},
    "two optimiser steps": {"precision": "bf16", "updates": 2},
    "part of a group": {"updates": 8},
}


@pytest.mark.parametrize("machine", MACHINES)
@every_topology
def test_the_first_ratio_is_exactly_one(toy_recipe, network, name, machine) -> None:
    changes = dict(MACHINES[machine])
    updates = changes.pop("updates", 1)
    recipe = fitted(toy_recipe, name)
    if "rows_per_forward" in changes and name == "tree of 3":
        changes["rows_per_forward"] = 9
    if updates == 8 and name.startswith(("tree", "comb", "merged", "long")):
        pytest.skip("an optimiser step takes whole trees and combs")
    changes["optimizer"] = replace(recipe.optimizer, num_updates=updates)
    recipe = fitted(toy_recipe, name, **changes)
    trajectory, _ = walked(recipe, network, prompts())
    count = is_exact(recipe, network, trajectory)
    plan, num_samples = trajectory.plan, 4 * recipe.group_size
    if plan.num_trained == len(plan.kept) and all(t.num_heads == num_samples for t in trajectory.transitions):
        assert count == num_samples * plan.num_trained
    assert count > 0


@every_topology
def test_the_update_reports_a_ratio_of_one_and_learns(toy_recipe, network, name) -> None:
    """The first optimiser step's ratios; the second's are those of moved weights."""
    recipe = fitted(toy_recipe, name, precision="bf16", guidance_scale=2.0, rows_per_forward=4)
    if name == "tree of 3":
        recipe = fitted(toy_recipe, name, precision="bf16", guidance_scale=2.0, rows_per_forward=9)
    recipe = replace(recipe, optimizer=replace(recipe.optimizer, num_updates=2))
    before = [p.detach().clone() for p in network.module.parameters()]
    trajectory, _ = walked(recipe, network, prompts())
    batch = batch_of(trajectory, conditioned(trajectory, network, prompts()))
    metrics = update(learner_of(network, recipe), batch)
    assert metrics["first_ratio_error"] == metrics["delta_log_prob_max"] == 0
    assert metrics["grad_norm"] > 0
    with torch.no_grad():  # the network is every test's
        for parameter, value in zip(network.module.parameters(), before, strict=True):
            parameter.copy_(value)


@pytest.mark.parametrize("machine", ["fp32", "bf16, guided"])
@every_topology
def test_the_first_ratio_is_exactly_one_in_chunks(toy_recipe, network, name, machine) -> None:
    rows = 9 if name == "tree of 3" else 4
    recipe = fitted(toy_recipe, name, **MACHINES[machine], prompts_per_chunk=2, rows_per_forward=rows)
    draws, plan, parts = drawn(recipe, 10), recipe.plan(0), []
    for first, chunk in chunks(draws, 2):
        conditioning = network.encode(prompts()).rows(chunk.prompt_index[chunk.group_id])
        own = plan.of_prompts(first, 2)
        parts.append(walk(sampler_of(network, recipe), own, conditioning, chunk, score))
    trajectory = joined(parts, plan)
    assert is_exact(recipe, network, trajectory) > 0
    # Whole or in chunks: the same forwards, so the same bits, but where a forward of rows that are shared and not
    # trained takes prompts of several chunks: a matrix product of another shape rounds otherwise.
    whole, _ = walked(recipe, network, prompts())
    close = {"rtol": 0, "atol": 0}
    if plan.width < plan.num_candidates:
        close = {"rtol": 1e-4, "atol": 1e-4} if machine == "fp32" else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(whole.x0, trajectory.x0, **close)
    assert torch.equal(whole.draws.seed, trajectory.draws.seed)
    for mine, theirs in zip(whole.transitions, trajectory.transitions, strict=True):
        for field in ("row", "samples", "sigma"):
            assert torch.equal(getattr(mine, field), getattr(theirs, field)), field
        for field in ("latents", "next_latents", "log_prob"):
            torch.testing.assert_close(getattr(mine, field), getattr(theirs, field), **close)
        assert mine.offsets.tolist() == theirs.offsets.tolist()
        assert mine.samples_host.tolist() == theirs.samples_host.tolist()


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16", "guidance_scale": 2.0}], ids=str)
def test_imposed_walks_are_scored_by_the_policy_that_is_asked(toy_recipe, network, changes) -> None:
    """Some samples go where others once went; their log-probs are this policy's, and the ratio is 1."""
    recipe = fitted(toy_recipe, "all steps", **changes)
    free, _ = walked(recipe, network, prompts())
    other, _ = walked(replace(recipe, seed=1), network, prompts())
    samples = np.array([3, 17, 18])
    states = [other.transitions[0].latents[samples]]
    states += [kept.next_latents[samples] for kept in other.transitions[:3]]
    trajectory, _ = walked(recipe, network, prompts(), Imposed(samples, tuple(states)))
    assert is_exact(recipe, network, trajectory) == 32 * 5
    own = np.setdiff1d(np.arange(32), samples)
    for place, kept in enumerate(trajectory.transitions):
        assert torch.equal(kept.latents[own], free.transitions[place].latents[own])
        if place < 3:
            assert torch.equal(kept.latents[samples], states[place])
            assert torch.equal(kept.next_latents[samples], states[place + 1])
    after = trajectory.transitions[3]
    assert torch.equal(after.latents[samples], states[3])
    assert not torch.equal(after.next_latents[samples], other.transitions[3].next_latents[samples])


# ------------------------------------------------------------------------------------------ one sample's own path


def own_path(plan, draws, prompt: int, leaf: int, model, conditioning, scale: float, num_candidates: int):
    """A sample's walk alone, by the reference and the same noise: its places, and what it is kept at.

    Follows the plan backwards from the leaf, then forwards a step at a time. Independent of the walk's layouts.
    """
    child, way = leaf, []
    for place in reversed(range(len(plan.steps))):
        taken = plan.steps[place]
        shape = len(draws.prompt_index), len(taken.parent)
        row, kept = (np.broadcast_to(values, shape)[prompt, child] for values in (taken.row, taken.kept))
        way.append((int(row), plan.behind()[place][child][0], bool(kept)))
        child = int(taken.parent[child])
    first = prompt * num_candidates
    x = philox_normal(draws.start_seed[first + leaf][None], model.latent_shape, stream=START_NOISE_STREAM)
    x0_prev, kept_at = None, []
    for row, noise_of, kept in reversed(way):
        if row == IDLE:
            continue
        sigma = plan.coeffs[row, 0].expand(1)
        guidance = None
        velocity = model.velocity(x, sigma, conditioning)
        if scale != 1:
            guidance = Guidance(model.velocity(x, sigma, conditioning.negative()), scale)
        noise = philox_normal(draws.seed[first + noise_of][None], model.latent_shape, step=row)
        history = x0_prev if plan.history[row] else None
        before = x
        x, log_prob, x0_prev = reference.flow_step(
            x, velocity, plan.coeffs, row, noise, guidance, history, torch.float32
        )
        if kept:
            kept_at.append((row, before, x, log_prob))
    return x, kept_at


@pytest.mark.parametrize(
    "changes", [{}, {"guidance_scale": 2.5}, {"solver": DPMSolver2M()}, {"rows_per_forward": 4}], ids=str
)
@every_topology
def test_every_sample_is_its_own_path(toy_recipe, name, changes) -> None:
    """Trees, combs and shared rows against each sample by itself, every stored edge included."""
    if "solver" in changes and name in ("merged comb", "long comb"):
        pytest.skip("refused: the solver would have no step before")
    if "rows_per_forward" in changes and name == "tree of 3":
        changes = {"rows_per_forward": 9}
    recipe, model = fitted(toy_recipe, name, **changes), Elementwise()
    plan = recipe.plan(0)
    draws = drawn(recipe, 2)
    trajectory, conditioning = walked(recipe, model, ["low", "high"])
    whole = uncut(plan)
    num_candidates = whole.num_candidates
    places = [int(torch.nonzero(draws.seed == seed)) for seed in trajectory.draws.seed]
    assert len(places) == 4 * recipe.group_size
    edges = [
        dict(zip(t.samples.flatten().tolist(), range(t.samples.numel()), strict=True))
        for t in trajectory.transitions
    ]
    seen = 0
    for sample, candidate in enumerate(places):
        prompt, leaf = divmod(candidate, num_candidates)
        own = conditioning.rows(torch.tensor([candidate]))
        x0, kept_at = own_path(whole, draws, prompt, leaf, model, own, recipe.guidance_scale, num_candidates)
        torch.testing.assert_close(trajectory.x0[sample][None], x0, rtol=1e-4, atol=1e-5)
        pairs = zip(trajectory.transitions, edges, strict=True)
        found = [(t, where[sample]) for t, where in pairs if sample in where]
        assert len(found) == len(kept_at)
        for (t, flat), (row, before, after, log_prob) in zip(found, kept_at, strict=True):
            edge = flat // t.samples.shape[1]
            assert int(t.row[edge]) == row
            torch.testing.assert_close(t.latents[edge // t.fan][None], before, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(t.next_latents[edge][None], after, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(t.log_prob[edge][None], log_prob, rtol=1e-4, atol=1e-4)
            assert float(t.sigma[edge // t.fan]) == float(plan.coeffs[row, 0])
            seen += 1
    assert seen == sum(t.samples.numel() for t in trajectory.transitions)


@pytest.mark.parametrize("changes", [{}, {"solver": DPMSolver2M(), "guidance_scale": 2.0}], ids=str)
@every_topology
def test_a_sample_is_the_same_to_the_bit_in_any_company(toy_recipe, name, changes) -> None:
    """Other micro-batches, other chunks, other order of prompts, fewer of them: seeds alone say what a sample is."""
    if "solver" in changes and name in ("merged comb", "long comb"):
        changes = {"guidance_scale": 2.0}
    recipe, model = fitted(toy_recipe, name, **changes), Elementwise()
    plan, draws = recipe.plan(0), drawn(recipe, 2)
    encoded = model.encode(["low", "high"])
    conditioning = encoded.rows(draws.prompt_index[draws.group_id])
    sampler = sampler_of(model, recipe)
    whole = walk(sampler, plan, conditioning, draws, score)
    by_seed = dict(zip(whole.draws.seed.tolist(), whole.x0, strict=True))
    for first, size in ((0, 1), (3, 1), (1, 2), (0, 4)):
        for rows in (1, 3, 1000):
            part = draws.of_prompts(first, size)
            alone = walk(
                replace(sampler, forwards=replace(sampler.forwards, rows=rows)),
                plan.of_prompts(first, size),
                encoded.rows(part.prompt_index[part.group_id]),
                part,
                score,
            )
            assert len(alone.x0) == size * recipe.group_size
            for seed, x0 in zip(alone.draws.seed.tolist(), alone.x0, strict=True):
                assert torch.equal(x0, by_seed[seed])


def test_a_walk_recomputed_alone_from_its_seed_is_the_batchs(toy_recipe) -> None:
    """One row: no group, no batch, no cut."""
    recipe, model = fitted(toy_recipe, "cuts"), Elementwise()
    trajectory, _ = walked(recipe, model, ["low", "high"])
    lone = toy_recipe(topology=Independent(at=AllSteps()), group_size=1, num_prompts=1, credit=())
    encoded = model.encode(["low", "high"])
    draws = trajectory.draws
    for sample in range(len(trajectory.x0)):
        prompt = draws.prompt_index[draws.group_id[sample]][None]
        own = replace(
            draws,
            prompt_index=prompt,
            group_id=torch.zeros(1, dtype=torch.int64),
            seed=draws.seed[sample : sample + 1],
            start_seed=draws.start_seed[sample : sample + 1],
        )
        alone = walk(sampler_of(model, lone), lone.plan(0), encoded.rows(prompt), own)
        assert torch.equal(alone.x0[0], trajectory.x0[sample])
        assert torch.equal(stacked(alone, "latents")[0], stacked(trajectory, "latents")[sample])
        assert torch.equal(stacked(alone, "log_prob")[0], stacked(trajectory, "log_prob")[sample])


# ----------------------------------------------------------------------------------------------- what a walk costs


@pytest.mark.parametrize("scale", [1.0, 2.0])
@every_topology
def test_forwards_are_those_the_plan_counts(toy_recipe, name, scale) -> None:
    class Counting(Elementwise):
        rows = 0

        def velocity(self, latents, sigma, conditioning):
            assert len(conditioning.prompt_embeds) == len(latents) == len(sigma)
            Counting.rows += len(latents)
            return super().velocity(latents, sigma, conditioning)

    recipe = fitted(toy_recipe, name, guidance_scale=scale)
    trajectory, _ = walked(recipe, Counting(), ["low", "high"])
    halves = 1 if scale == 1 else 2
    assert trajectory.evaluations == Counting.rows == recipe.plan(0).evaluations(4) * halves


@pytest.mark.parametrize("graphs", [False, True])
@every_topology
def test_nothing_of_a_walk_waits_until_its_end(toy_recipe, name, graphs) -> None:
    from tests.training.test_no_waiting import waited

    recipe, model = fitted(toy_recipe, name, graphs=graphs, guidance_scale=2.0), Elementwise()
    draws, plan = drawn(recipe, 2), recipe.plan(0)
    conditioning = model.encode(["low", "high"]).rows(draws.prompt_index[draws.group_id])
    _, log = waited(lambda: walk(sampler_of(model, recipe), plan, conditioning, draws, score))
    assert log == ["__bool__ check_finite", "_local_scalar_dense check_finite"]


@pytest.mark.parametrize(
    "changes", [{}, {"guidance_scale": 2.0, "precision": "bf16"}, {"rows_per_forward": 4}], ids=str
)
@every_topology
def test_captured_steps_give_the_same_bits(toy_recipe, network, name, changes) -> None:
    """On static buffers, without a device as with one: the same function runs on the same values."""
    if "rows_per_forward" in changes and name == "tree of 3":
        changes = {"rows_per_forward": 9}
    pairs = [
        walked(fitted(toy_recipe, name, **changes, graphs=graphs), network, prompts())[0]
        for graphs in (True, False)
    ]
    captured, plain = pairs
    assert torch.equal(captured.x0, plain.x0)
    assert captured.evaluations == plain.evaluations
    for mine, theirs in zip(captured.transitions, plain.transitions, strict=True):
        for field in ("latents", "next_latents", "log_prob", "row", "samples", "sigma", "unconditional"):
            one, other = getattr(mine, field), getattr(theirs, field)
            assert (one is None and other is None) or torch.equal(one, other), field


def test_children_that_are_alike_are_computed_once(toy_recipe, monkeypatch) -> None:
    """A group that becomes rows of its own by a step of the ODE: one transition, copied."""
    sizes, inner = [], step.flow_step

    def counted(latents, *rest, **named):
        sizes.append(len(latents))
        return inner(latents, *rest, **named)

    monkeypatch.setattr(step, "flow_step", counted)
    # An optimiser step takes a part of a group, so that each member's velocity in the window is its own.
    part = replace(toy_recipe().optimizer, num_updates=8)
    recipe = toy_recipe(topology=SharedStart(at=FrozenWindow(size=3, start=2)), optimizer=part)
    model = Elementwise()
    trajectory, _ = walked(recipe, model, ["low", "high"])
    assert sizes == [4, 4, 32, 32, 32, 32]
    whole = replace(recipe, topology=replace(recipe.topology, share_prefix=False))
    assert torch.equal(trajectory.x0, walked(whole, model, ["low", "high"])[0].x0)
