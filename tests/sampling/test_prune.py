"""Pruning: who survives is right, survivors are what they would have been alone, and the batch really shrinks."""

from __future__ import annotations

import weakref
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowgrpo_fast.models.digits import shipped
from flowgrpo_fast.objectives.snapshots import Ramp
from flowgrpo_fast.recipe import (
    NFT,
    AllSteps,
    Cuts,
    Deterministic,
    DPMSolver2M,
    FrozenWindow,
    Independent,
    PolicyGradient,
    RandomWindow,
    Scouts,
    SharedStart,
    SlidingWindow,
    Tree,
)
from flowgrpo_fast.sampling import walk as module
from flowgrpo_fast.sampling.prune import check_cells, choose, spread_subset
from flowgrpo_fast.sampling.walk import walk
from flowgrpo_fast.training.snapshots import Snapshot
from tests.conftest import ToyModel
from tests.sampling.walks import drawn, sampler_of, stacked, uncut

FIRST_THREE = FrozenWindow(size=3, start=1)


def funnel(at=FIRST_THREE, steps=(2, 4), sizes=(12, 8), shares: bool = False, **changes) -> Cuts:
    """To the toy recipe's groups: give it group_size=4."""
    inner = SharedStart(at=at) if shares else Independent(at=at)
    return Cuts(inner=inner, steps=steps, sizes=sizes, **changes)


class Elementwise(ToyModel):
    """Its velocity is exact whatever the batch: no matrix product."""

    def velocity(self, latents, sigma, conditioning):
        return latents * (1 + conditioning.prompt_embeds[:, 0]) - sigma[:, None] * latents.sin()


class Images(Elementwise):
    latent_shape = (2, 4, 4)

    def velocity(self, latents, sigma, conditioning):
        flat = super().velocity(latents.flatten(1), sigma, conditioning)
        return flat.view_as(latents)

    def decode(self, latents):
        return torch.sigmoid(latents.float()[:, :1])


class Packed(Images):
    """The same latents as tokens of four channels."""

    latent_shape = (8, 4)
    latent_grid = (2, 4)


def first(x0_pred):
    """A score that needs no decoder."""
    return x0_pred.flatten(1)[:, 0].contiguous()


def run(recipe, model=None, score=first, cuts: bool = True):
    model = model or ToyModel()
    draws = drawn(recipe, 2)
    conditioning = model.encode(["low", "high"]).rows(draws.prompt_index[draws.group_id])
    plan = recipe.plan(0)
    plan = plan if cuts else uncut(plan)
    return walk(sampler_of(model, recipe), plan, conditioning, draws, score=score), draws


def rows_of(part, whole):
    """Where the survivors' seeds are among all."""
    found = part.draws.seed[:, None] == whole.draws.seed[None]
    assert (found.sum(1) == 1).all()
    return found.int().argmax(1)


CHANGES = [
    {"topology": funnel(AllSteps())},
    {"topology": funnel(FrozenWindow(size=2, start=0))},  # cuts after the window
    {"topology": funnel(FrozenWindow(size=3, start=2))},  # before and inside it
    {"topology": funnel(FrozenWindow(size=1, start=4))},
    {
        "topology": funnel(FrozenWindow(size=2, start=0)),
        "solver": DPMSolver2M(),
    },  # history crosses both cuts
    {"topology": funnel(Deterministic()), "solver": DPMSolver2M(), "objective": NFT()},
    {"guidance_scale": 2.5},
    {"rows_per_forward": 8},
    {"topology": funnel(steps=(3, 6), shares=True)},  # the last cut: finished samples
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("score", ["reward", "latents"])
def test_survivors_are_bit_for_bit_the_same_seeds_unpruned(toy_recipe, changes, score) -> None:
    """A model without batch-dependent rounding shows it: noise, kept steps, log-probs and samples are equal."""
    recipe = toy_recipe(**{"group_size": 4, "topology": funnel(), **changes})
    recipe = replace(recipe, topology=replace(recipe.topology, score=score, pool=2))
    part, _ = run(recipe, Images())
    whole, _ = run(recipe, Images(), cuts=False)
    assert (len(whole.x0), len(part.x0)) == (48, 16)
    rows = rows_of(part, whole)
    assert rows.tolist() == sorted(rows.tolist())
    assert torch.equal(part.x0, whole.x0[rows])
    assert len(part.transitions) == len(whole.transitions) == len(recipe.plan(0).kept)
    for name in ("latents", "next_latents", "log_prob") if part.transitions else ():
        assert torch.equal(stacked(part, name), stacked(whole, name)[rows]), name
    for name in ("group_id", "start_seed"):
        assert torch.equal(getattr(part.draws, name), getattr(whole.draws, name)[rows])
    assert part.draws.group_id.tolist() == [g for g in range(4) for _ in range(4)]


@pytest.mark.parametrize("rows", [0, 60])
def test_with_a_real_transformer_survivors_differ_by_its_rounding_at_most(rows) -> None:
    """diffusers' SD3 transformer in the digits' configuration: 0 at equal micro-batches, else a few ulp."""
    from flowgrpo_fast.recipes import digits
    from flowgrpo_fast.recipes.trajectory import pro_grpo

    recipe = replace(digits(pro_grpo()), num_prompts=5, seed=3)
    recipe = replace(recipe, machine=replace(recipe.machine, rows_per_forward=rows and 30))
    model = shipped()
    draws = drawn(recipe, 5)
    prompts = ["a handwritten zero", "a handwritten one", "a handwritten two", "a handwritten six"]
    conditioning = model.encode([*prompts, "a handwritten nine"]).rows(draws.prompt_index[draws.group_id])
    plan, sampler = recipe.plan(0), sampler_of(model, recipe)
    part = walk(sampler, plan, conditioning, draws, score=first)
    whole = walk(sampler, uncut(plan), conditioning, draws)
    rows = rows_of(part, whole)
    assert len(rows) == 60
    start = [stacked(trajectory, "latents")[:, 0] for trajectory in (part, whole)]
    assert torch.equal(start[0], start[1][rows])  # start noise
    assert (part.x0 - whole.x0[rows]).abs().max() <= 2e-5
    log_prob = [stacked(trajectory, "log_prob") for trajectory in (part, whole)]
    assert (log_prob[0] - log_prob[1][rows]).abs().max() <= 2e-5


@pytest.mark.parametrize(
    ("model", "pool", "message"),
    [
        (Images(), 3, r"^Cuts.pool is 3; it must divide the latents' height and width, 4 x 4: set 1, say$"),
        (Packed(), 4, r"^Cuts.pool is 4; .* height and width, 2 x 4: set 2, say$"),
        (
            ToyModel(),
            1,
            r"^Cuts.score is 'latents', but the model's are \[6\], which have no height and width",
        ),
    ],
)
def test_cells_that_do_not_tile_are_refused_beforehand(toy_recipe, model, pool, message) -> None:
    def plan(**changes):
        return toy_recipe(group_size=4, topology=funnel(**changes)).plan(0)

    with pytest.raises(ValueError, match=message):
        check_cells(plan(score="latents", pool=pool), model)
    check_cells(plan(score="reward", pool=pool), model)
    check_cells(plan(score="latents", pool=2), Packed())


def test_packed_latents_are_pooled_on_the_models_grid(toy_recipe) -> None:
    """Without a grid a packed layout is refused; with it, survivors are as elsewhere, behind a snapshot too."""
    recipe = toy_recipe(group_size=4, topology=funnel(score="latents", pool=2))

    class Unpacked(Packed):
        latent_grid = None

    packed, _ = run(recipe, Packed())
    behind, _ = run(recipe, Snapshot(Packed()))
    assert torch.equal(packed.x0, behind.x0)
    whole, _ = run(recipe, Packed(), cuts=False)
    assert torch.equal(packed.x0, whole.x0[rows_of(packed, whole)])
    with pytest.raises(ValueError, match=r"preview: latents has shape \[48, 8, 4\]"):
        run(recipe, Unpacked())


class Counting(ToyModel):
    def __init__(self) -> None:
        super().__init__()
        self.sizes = []

    def velocity(self, latents, sigma, conditioning):
        assert len(conditioning.prompt_embeds) == len(latents)
        self.sizes.append(len(latents))
        return super().velocity(latents, sigma, conditioning)


def test_the_batch_shrinks_and_micro_batches_stay_full(toy_recipe) -> None:
    recipe = toy_recipe(group_size=4, topology=funnel(), rows_per_forward=16)
    model = Counting()
    trajectory, _ = run(recipe, model)
    # 4 prompts: 48, 48, 32, 32, 16, 16 rows in forwards of 16; every one is full although groups shrink to 4
    assert model.sizes == [16] * (3 + 3 + 2 + 2 + 1 + 1)
    assert trajectory.evaluations == sum(model.sizes) == 4 * (12 * 2 + 8 * 2 + 4 * 2)
    guided, _ = run(replace(recipe, guidance_scale=2.0))
    assert guided.evaluations == 2 * trajectory.evaluations


def test_a_cut_frees_what_the_others_held(toy_recipe, monkeypatch) -> None:
    """Until the next one at the latest; the planner counts both sides of a cut."""
    made, make = [], module._transitions

    def transitions(*arguments):
        kept = make(*arguments)
        made.extend(weakref.ref(tensor) for tensor in (kept.latents, kept.next_latents))
        return kept

    alive = []

    def score(x0_pred):
        alive.append([ref() is not None for ref in made])
        return first(x0_pred)

    monkeypatch.setattr(module, "_transitions", transitions)
    run(toy_recipe(group_size=4, topology=funnel(AllSteps())), score=score)
    # Two kept steps before the first cut; at the second they are gone, and two more have been kept since.
    assert alive == [[True] * 4, [False] * 4 + [True] * 4]


@pytest.mark.parametrize("select", ["variance", "top_bottom"])
def test_the_right_candidates_survive(toy_recipe, select) -> None:
    recipe = toy_recipe(group_size=4, topology=funnel(steps=(3,), sizes=(9,), select=select), num_prompts=6)
    seen = []

    def score(x0_pred):
        seen.append(x0_pred.clone())
        return first(x0_pred)

    part, _ = run(recipe, score=score)
    whole, _ = run(recipe, cuts=False)
    (x0_pred,) = seen
    scores = first(x0_pred).view(6, 9).double().numpy()
    for group, survivors in enumerate(rows_of(part, whole).view(6, 4).numpy() % 9):
        values = scores[group]
        if select == "variance":
            best = max(combinations(range(9), 4), key=lambda c: values[list(c)].var())
            assert values[survivors].var() == pytest.approx(values[list(best)].var(), rel=1e-6)
        else:
            order = np.argsort(values)
            assert set(survivors) == {*order[:2], *order[-2:]}


def test_the_preview_is_what_the_step_before_the_cut_predicts(toy_recipe) -> None:
    recipe = toy_recipe(group_size=4, topology=funnel(AllSteps(), steps=(3,), sizes=(8,)), guidance_scale=1.0)
    seen = []
    run(recipe, score=lambda x0: seen.append(x0) or first(x0))
    whole, draws = run(recipe, cuts=False)
    latents, sigma = stacked(whole, "latents")[:, 2], whole.coeffs[2, 0]
    model = ToyModel()
    rows = model.encode(["low", "high"]).rows(draws.prompt_index[draws.group_id])
    with torch.no_grad():
        expected = latents - sigma * model.velocity(latents, sigma.expand(len(latents)), rows)
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-6)


def total_variance(features, rows):
    return features[list(rows)].var(axis=0).sum()


def test_spread_is_the_farthest_pair_and_never_far_from_the_best_subset() -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(40):
        features = rng.normal(size=(2, 9, 5))
        gram = torch.from_numpy(np.einsum("pif,pjf->pij", features, features))
        for size in (1, 2, 4, 8, 9):
            chosen = spread_subset(gram, size).numpy()
            for group, rows in zip(features, chosen, strict=True):
                assert len(set(rows)) == size
                best = max(total_variance(group, c) for c in combinations(range(9), size))
                if size == 2:
                    assert total_variance(group, rows) == pytest.approx(best)
                elif size > 2:
                    shares.append(total_variance(group, rows) / best)
    assert min(shares) > 0.8
    assert np.mean(shares) > 0.97


def test_spread_keeps_what_differs_and_drops_copies() -> None:
    features = torch.tensor([[[0.0, 0], [0, 0], [0, 0], [5, 0], [0, 5], [0, 0]]])
    gram = features @ features.transpose(1, 2)
    assert sorted(spread_subset(gram, 3)[0].tolist())[1:] == [3, 4]
    assert sorted(spread_subset(torch.zeros(1, 4, 4), 4)[0].tolist()) == [
        0,
        1,
        2,
        3,
    ]  # all equal: all distinct rows


def test_random_is_the_first_and_odd_ones_go_to_the_best() -> None:
    scores = torch.tensor([[3.0, 1, 2, 5, 4], [1, 2, 3, 4, 5]])
    assert choose(scores, 2, "random").tolist() == [0, 1, 5, 6]
    assert choose(scores, 3, "top_bottom").tolist() == [1, 3, 4, 5, 8, 9]


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("score", ["latents", "reward"])
def test_nothing_between_the_first_and_the_last_step_waits_for_the_device(toy_recipe, score) -> None:
    """Latents as scores: no host sync at all; rewards: none but what a reward function itself asks."""
    recipe = toy_recipe(group_size=4, topology=funnel(score=score, pool=2))
    with Recorder() as recorder:
        run(recipe, Images())
    last = max(i for i, name in enumerate(recorder.seen) if "flow_step" in name)
    waits = ("local_scalar", "nonzero", "is_nonzero", "masked_select", "unique")
    assert not [name for name in recorder.seen[:last] if any(wait in name for wait in waits)]
    assert len([name for name in recorder.seen if "compact" in name]) == 2  # one launch a cut


def test_a_broken_candidate_stops_the_run_even_if_it_is_pruned(toy_recipe) -> None:
    class Broken(ToyModel):
        calls = 0

        def velocity(self, latents, sigma, conditioning):
            velocity = super().velocity(latents, sigma, conditioning)
            Broken.calls += 1
            if Broken.calls == 1:
                velocity = velocity.index_fill(0, torch.tensor([5]), float("nan"))
            return velocity

    with pytest.raises(ValueError, match="NaN or infinite at step 0, sample 5 "):
        run(toy_recipe(group_size=4, topology=funnel()), Broken())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"topology": funnel(steps=(7,), sizes=(12,))},
            r"Cuts.steps is \(7,\), outside the schedule; with 6 steps",
        ),
        ({"topology": funnel(steps=(2,), sizes=(12,), shares=True)}, "cut no earlier than at 3"),
        (
            {"topology": funnel(RandomWindow(size=2, low=0, high=5), (4,), (12,), shares=True)},
            "may be step 3; cut no earlier than at 5",
        ),
        (
            {"topology": funnel(SlidingWindow(size=1), (4,), (12,), shares=True)},
            "may be step 4; cut no earlier than at 6",
        ),
        (  # what fits this iteration's window, but not those of all others
            {
                "topology": funnel(RandomWindow(size=1, low=0, high=5), (5,), (12,)),
                "solver": DPMSolver2M(keep=0.4),
            },
            r"Cuts.steps is \(5,\), outside the schedule; with 2 steps",
        ),
        (
            {
                "topology": funnel(SlidingWindow(size=1), (2,), (12,), shares=True),
                "solver": DPMSolver2M(keep=0.2),
            },
            "may be step 4; cut no earlier than at 6",
        ),
        (  # a tree's samples share the transitions that a cut would take apart
            {"topology": Cuts(inner=Tree(at=FrozenWindow(size=3)), steps=(5,), sizes=(8,))},
            "share what a cut would take apart; cut Independent or SharedStart",
        ),
    ],
)
def test_cuts_that_do_not_fit_the_schedule(toy_recipe, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(toy_recipe(group_size=4, **changes))


def test_a_cut_needs_its_score(toy_recipe) -> None:
    recipe = toy_recipe(group_size=4, topology=funnel())
    with pytest.raises(ValueError, match="the rollout was given no score"):
        run(recipe, score=None)
    with pytest.raises(ValueError, match=r"scores have shape \[3\], must be \[48\]"):
        run(recipe, score=lambda x0: torch.zeros(3))
    with pytest.raises(ValueError, match=r"preview: latents has shape \[48, 6\]"):
        run(replace(recipe, topology=funnel(score="latents")))
    with pytest.raises(ValueError, match=r"pool is \[1, 3, 3\], must divide the grid"):
        run(replace(recipe, topology=funnel(score="latents", pool=3)), Images())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: Cuts(steps=(0,), sizes=(9,)), r"Cuts.steps is \(0,\); its steps must rise, from 1"),
        (lambda r: Cuts(steps=(3, 3), sizes=(9, 8)), "must rise"),
        (lambda r: Cuts(steps=(3, 4), sizes=(8, 9)), "must fall"),
        (lambda r: Cuts(steps=(3, 4), sizes=(9,)), "names 2 steps and Cuts.sizes 1 sizes"),
        (lambda r: Cuts(score="latents", select="top_bottom"), "needs score='reward'"),
        (lambda r: Cuts(pool=0), "Cuts.pool is 0"),
        (lambda r: Cuts(sizes=(1025,)), "takes at most 1024 of a prompt"),
        (lambda r: Scouts(num_scouts=1025), r"num_scouts is 1025; it must be in \[2, 1024\]"),
        (lambda r: r(topology=Cuts(sizes=(8,))), "ends at 8; it must be above group_size = 8"),
        (
            lambda r: r(topology=Cuts(), experience=Scouts(num_inference_steps=4)),
            "both choose who is trained",
        ),
        (lambda r: r(experience=Scouts(num_scouts=8)), "num_scouts is 8; it must be above group_size = 8"),
        (lambda r: Scouts(num_inference_steps=1), "num_inference_steps is 1; it must be at least 2"),
        (lambda r: r(experience=Scouts(num_inference_steps=7)), "at most the 6 steps of a full sample"),
        (
            lambda r: r(experience=Scouts(), topology=SharedStart(at=FIRST_THREE)),
            "scouts differ in nothing but theirs",
        ),
        (
            lambda r: r(experience=Scouts(regenerate=False)),
            "PolicyGradient needs log-probs, which the samples of Scouts have not",
        ),
        (
            lambda r: r(topology=Independent(at=Deterministic())),
            "the window Deterministic has no stochastic step",
        ),
        (lambda r: r(topology=SharedStart(at=Deterministic()), objective=NFT()), "would all be equal"),
        (lambda r: r(objective=NFT(), guidance_scale=4.5), "NFT samples and trains without guidance"),
        (lambda r: NFT(beta=0.0), "NFT.beta is 0.0"),
        (lambda r: NFT(fraction=1.5), "NFT.fraction is 1.5"),
        (lambda r: Ramp(most=1.0), r"must be in \[0, 1\)"),
        (lambda r: NFT(kl_beta=-1.0), "NFT.kl_beta is -1.0"),
    ],
)
def test_parts_that_cannot_be(toy_recipe, make, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(toy_recipe)
    assert "\n" not in str(caught.value)


def test_ratio_recipes_still_take_scouts_and_nft_still_prunes(toy_recipe) -> None:
    toy_recipe(experience=Scouts(num_inference_steps=4), objective=PolicyGradient())
    toy_recipe(group_size=4, topology=funnel(Deterministic()), objective=NFT())
