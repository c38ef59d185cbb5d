"""Several rewards of the same samples: their sum, wherever they run, and nobody sees what another did to its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowgrpo_fast.recipe import (
    NFT,
    Cuts,
    Deterministic,
    FrozenWindow,
    Independent,
    Normalise,
    Prompts,
    RewardTerm,
    Scouts,
)
from flowgrpo_fast.rewards.scoring import Scorer, collect, require_all
from flowgrpo_fast.rewards.terms import Seen
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.evaluate import evaluate
from flowgrpo_fast.training.loop import train_step
from flowgrpo_fast.types import PromptSet, Scores
from tests.rewards import functions
from tests.rewards.own_reward import OwnReward
from tests.training.steps import gathered

CPU = torch.device("cpu")
HERE = "tests.rewards.functions"
PROMPTS = PromptSet(("a", "bb", "ccc", "dddd"), tuple({"count": n, "list": [n]} for n in range(4)))
GROUP = torch.tensor([0, 0, 1, 1])
X0 = torch.rand(4, 1, 2, 3, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def term(function: str, **changes) -> RewardTerm:
    return RewardTerm(function=f"{HERE}:{function}", **changes)


def decode(latents: torch.Tensor) -> torch.Tensor:
    return latents.float().sigmoid()


@pytest.fixture
def scorer():
    made = []

    def make(*terms, decode=decode) -> Scorer:
        made.append(Scorer(terms, decode, CPU))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_the_total_is_the_weighted_sum(scorer) -> None:
    terms = (
        term("mean", weight=0.3),
        term("length", weight=-2.0),
        term("everything", takes="record", name="all"),
    )
    made = scorer(*terms)
    scores = made.start(X0, PROMPTS, GROUP, 2).result()
    images = decode(X0)
    base = X0.float().flatten(1).sum(1) + GROUP
    keep = torch.tensor([True, True, False, True])
    expected = torch.zeros(4) + 0.3 * images.flatten(1).mean(1)
    expected = expected + -2.0 * torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = torch.where(keep, expected + 1.0 * base, 0.0)
    assert torch.equal(scores.total, expected)
    assert list(scores.objectives) == ["mean", "length", "all/style", "all/text"]
    assert torch.equal(scores.objectives["all/style"], torch.where(keep, base + 1, 0.0))
    assert made.owners(scores) == (terms[0], terms[1], terms[2], terms[2])
    assert torch.equal(scores.signals["all/map"], (images[:, 0] > 0.5).float())
    assert torch.equal(scores.valid, keep)


@pytest.mark.parametrize("where", ["thread", "process"])
@pytest.mark.parametrize(("name", "takes"), [("several", "metadata"), ("everything", "record")])
def test_elsewhere_is_as_here(scorer, where, name, takes) -> None:
    here, there = (
        scorer(term(name, takes=takes, where=place)).start(X0, PROMPTS, GROUP, 2).result()
        for place in ("here", where)
    )
    assert torch.equal(here.total, there.total)
    for mine, theirs in ((here.objectives, there.objectives), (here.signals, there.signals)):
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        assert mine or name == "several"
    assert (here.valid is None) == (there.valid is None) == (name == "several")
    assert here.valid is None or torch.equal(here.valid, there.valid)


PLACES = [
    ("here",) * 3,
    ("thread", "here", "thread"),
    ("here", "process", "here"),
    ("process", "thread", "here"),
]


@pytest.mark.parametrize("places", PLACES, ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_nobody_sees_what_another_wrote(scorer, places, given) -> None:
    """The first and the last write to all they get; the one between, the samples and the run do not notice."""
    names = ("vandal", "everything", "vandal")
    terms = [
        term(function, takes="record", where=where, name=f"n{i}")
        for i, (function, where) in enumerate(zip(names, places, strict=True))
    ]
    made, x0, group = scorer(*terms), X0.clone(), GROUP.clone()
    asked = PROMPTS.rows(torch.arange(4))
    images = decode(x0)
    shown = images.clone()
    one = made.score(images, asked, group, 2, x0) if given else made.start(x0, asked, group, 2).result()
    for name in ("n0", "n2"):
        assert torch.equal(one.objectives[name], shown.flatten(1).mean(1))
    alone = scorer(term("everything", takes="record", name="n1")).start(X0, PROMPTS, GROUP, 2).result()
    assert all(torch.equal(one.objectives[k], v) for k, v in alone.objectives.items())
    assert all(torch.equal(one.signals[k], v) for k, v in alone.signals.items())
    assert torch.equal(x0, X0)
    assert torch.equal(group, GROUP)
    assert torch.equal(images, shown)
    assert asked == PROMPTS
    assert [entry["count"] for entry in PROMPTS.metadata] == [0, 1, 2, 3]


def test_images_are_copied_only_for_company(scorer) -> None:
    """One reward gets the decoder's own memory, unless that is the samples'; of several the last one does."""
    decoded, shown = [], []

    def kept(latents):
        decoded.append(decode(latents))
        return decoded[-1]

    def look(seen: Seen):
        shown.append(seen.images)
        return [0.0] * len(seen)

    own = OwnReward(function=look, whole=True)
    scorer(own, decode=kept).start(X0, PROMPTS, GROUP, 2).result()
    assert shown[-1].data_ptr() == decoded[-1].data_ptr()
    scorer(own, replace(own, objective="b"), decode=kept).start(X0, PROMPTS, GROUP, 2).result()
    assert [s.data_ptr() == decoded[-1].data_ptr() for s in shown[-2:]] == [False, True]
    identity = X0.float()
    scorer(own, decode=lambda x: x.view(4, 1, 6, 1)).start(identity, PROMPTS, GROUP, 2).result()
    assert shown[-1].data_ptr() != identity.data_ptr()
    assert len(decoded) == 2


def test_samples_without_a_score_are_told_apart(scorer) -> None:
    made = scorer(term("holes", takes="record"), term("mean", weight=2.0))
    first, second = (made.start(X0, PROMPTS, GROUP, 2) for _ in range(2))
    both = collect([first, second])
    mean = decode(X0).flatten(1).mean(1)
    keep = torch.tensor([True, False] * 2)
    assert torch.equal(both.valid, keep.repeat(2))
    assert torch.equal(both.total, torch.where(keep, mean + 2.0 * mean, 0.0).repeat(2))
    assert torch.equal(both.objectives["holes"], torch.where(keep, mean, 0.0).repeat(2))
    with pytest.raises(ValueError, match=r"the rewards gave 4 of 8 samples no score, sample 1 first"):
        require_all(both)
    some = Scores(torch.ones(2), valid=torch.tensor([True, False]))
    assert Scores.joined([Scores(torch.zeros(2)), some]).valid.tolist() == [True, True, True, False]
    assert Scores.joined([Scores(torch.zeros(2)), Scores(torch.zeros(1))]).valid is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_named(scorer, bad) -> None:
    def returns(scores):
        made = scorer(OwnReward(function=lambda images, prompts: scores))
        return made.start(X0, PROMPTS, GROUP, 2).result()

    numbers = torch.tensor([0.0, 0.0, bad, 0.0])
    with pytest.raises(ValueError, match=rf"^reward 'own' of sample 2 is {bad}$"):
        returns(numbers)
    with pytest.raises(ValueError, match=rf"^reward 'own' of sample 2 is {bad}$"):
        returns(Scores(torch.zeros(4), {"x": numbers}))
    returns(Scores(numbers, valid=torch.tensor([True, True, False, True])))


def test_gradient_of_the_sum(scorer) -> None:
    made = scorer(
        term("smooth", differentiable=True, weight=0.5),
        term("length"),
        term("smooth", differentiable=True, name="again", weight=2.0),
    )
    images = decode(X0).requires_grad_()
    seen = Seen(images, list(PROMPTS.prompts), [{}] * 4, None, GROUP, None, 2)
    total = made.with_gradient(seen)
    torch.testing.assert_close(total, 2.5 * images.square().flatten(1).sum(1))
    total.sum().backward()
    torch.testing.assert_close(images.grad, 2.5 * 2 * images.detach())
    with pytest.raises(ValueError, match=r"no reward of 'tests.*:length' has a gradient"):
        scorer(term("length")).with_gradient(seen)


def test_group_wise_rewards_get_whole_groups(scorer) -> None:
    made = scorer(term("win_rate", takes="record", group_wise=True))
    scores = made.start(X0, PROMPTS, GROUP, 2).result()
    mean = decode(X0).flatten(1).mean(1).view(2, 2)
    assert torch.equal(scores.total.view(2, 2), (mean > mean.flip(1)).float())
    with pytest.raises(AssertionError, match=r"groups of \[2, 1\] samples"):
        made.start(X0[:3], PROMPTS.rows(torch.arange(3)), GROUP[:3], 2)


@pytest.mark.parametrize("where", ["here", "process"])
@pytest.mark.parametrize(
    "changes",
    [
        {"prompts_per_chunk": 1},
        {
            "prompts_per_chunk": 2,
            "topology": Cuts(inner=Independent(at=FrozenWindow(size=3, start=1)), steps=(3,), sizes=(16,)),
        },
        {
            "objective": NFT(),
            "topology": Independent(at=Deterministic()),
            "experience": Scouts(num_scouts=16, num_inference_steps=4),
            "prompts_per_chunk": 2,
        },
    ],
    ids=str,
)
def test_so_they_do_in_training(toy_recipe, where, changes, monkeypatch) -> None:
    """In chunks, previews and scouts: as many samples of each prompt as there are, compared with each other."""
    sizes = []
    compare = functions.win_rate

    def spied(seen: Seen):
        sizes.append(torch.bincount(seen.group, minlength=seen.num_groups).tolist())
        assert all(
            len({p for p, g in zip(seen.prompts, seen.group, strict=True) if g == n}) == 1 for n in seen.group
        )
        return compare(seen)

    monkeypatch.setattr(functions, "win_rate", spied)
    recipe = toy_recipe(**{"rows_per_forward": 8, **changes})
    reward = term("win_rate", takes="record", group_wise=True, where=where)
    recipe = replace(recipe, task=replace(recipe.task, rewards=(reward,)))
    engine = build_engine(recipe, CPU)
    try:
        metrics = train_step(engine).metrics
        # Of distinct values, the mean share of a group of 8 that one beats is a half.
        assert metrics["reward"] == pytest.approx(0.5)
        if where == "here":
            assert {size for call in sizes for size in call} == {8, 16} - (
                {16} if len(changes) == 1 else set()
            )
            sizes.clear()
            evaluate(engine)
            assert sizes == [[8, 8]]
    finally:
        engine.close()


def test_a_reward_with_several_objectives_is_credited_by_each(toy_recipe) -> None:
    """Per objective, each counts with its reward's weight: as two rewards of that weight do."""
    recipe = toy_recipe(credit=(Normalise(aggregate="per_objective"), *toy_recipe().credit[1:]))
    engines = [build_engine(recipe, CPU) for _ in range(2)]

    def bright(images, prompts):
        return images.flatten(1).mean(1)

    def sharp(images, prompts):
        return images.flatten(1).std(1)

    def both(images, prompts):
        named = {"bright": bright(images, prompts), "sharp": sharp(images, prompts)}
        return Scores(named["bright"] + named["sharp"], named)

    engines[0].stage.scorer.terms = (OwnReward(function=both, objective="both", weight=0.5),)
    engines[1].stage.scorer.terms = tuple(
        OwnReward(function=f, objective=f.__name__, label=f.__name__, weight=0.5) for f in (bright, sharp)
    )
    one, two = (train_step(engine).metrics for engine in engines)
    assert one["reward/both/bright"] == two["reward/bright"]
    assert one["grad_norm"] == two["grad_norm"]


def test_samples_without_a_score_are_left_out(toy_recipe) -> None:
    """Of credit, loss and metrics: numbers are those of the others alone."""
    recipe = toy_recipe()
    reward = term("holes", takes="record")
    engine = build_engine(replace(recipe, task=replace(recipe.task, rewards=(reward,))), CPU)
    batch = gathered(engine)
    assert batch.credit.weight.tolist() == [1.0, 0.0] * 16
    assert batch.live.tolist() == [True, False] * 16
    rewards = engine.model.decode(batch.samples.x0).flatten(1).mean(1)[::2].view(4, 4).double()
    z = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=0, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch.credit.advantages[::2], z.flatten().float(), rtol=1e-5, atol=1e-6)
    metrics = train_step(engine).metrics
    assert metrics["unscored"] == 0.5
    assert metrics["reward"] == pytest.approx(float(rewards.mean()), rel=1e-5)
    assert metrics["reward/holes"] == metrics["reward"]
    spread = float(rewards.std(1, correction=0).mean())
    assert metrics["reward_group_std"] == pytest.approx(spread, rel=1e-4)
    assert metrics["ratio_self_test"] == metrics["first_ratio_error"] == 0.0


def test_samples_without_a_score_stop_who_cannot_do_without_one(toy_recipe) -> None:
    cut = Cuts(inner=Independent(at=FrozenWindow(size=3, start=1)), steps=(3,), sizes=(16,))
    recipe = toy_recipe(topology=cut, num_prompts=2)
    reward = term("holes", takes="record")
    engine = build_engine(replace(recipe, task=replace(recipe.task, rewards=(reward,))), CPU)
    with pytest.raises(
        ValueError, match=r"gave 16 of 32 samples no score, sample 1 first; here every sample"
    ):
        train_step(engine)


def test_metadata_and_source_images_reach_the_reward(toy_recipe, tmp_path) -> None:
    lines = ['{"prompt": "low", "goal": 3}', '{"prompt": "high", "goal": [4]}']
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    recipe = toy_recipe()
    recipe = replace(recipe, data=Prompts(path=str(tmp_path / "set.jsonl")))
    engine, goals = build_engine(recipe, CPU), []

    def look(seen: Seen):
        goals.extend((p, entry["goal"]) for p, entry in zip(seen.prompts, seen.metadata, strict=True))
        return seen.images.flatten(1).mean(1)

    engine.stage.scorer.terms = (OwnReward(function=look, whole=True),)
    train_step(engine)
    assert len(goals) == 32
    assert all(goal == (3 if prompt == "low" else [4]) for prompt, goal in goals)
    assert {prompt for prompt, _ in goals} == {"low", "high"}
