"""The update: gradients of any loss, however the batch is cut, and whole updates, against loops written out in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowgrpo_fast.ops import philox_normal
from flowgrpo_fast.recipe import (
    NFT,
    AllSteps,
    Bound,
    ChunkRatio,
    Clip,
    Comb,
    Cuts,
    Deterministic,
    DropIdle,
    FractionOfSteps,
    FrozenWindow,
    Independent,
    Normalise,
    OneStepEach,
    Optimizer,
    PolicyGradient,
    SharedStart,
    TransitionKL,
    Tree,
    TreeBackup,
    VelocityKL,
)
from flowgrpo_fast.recipes import RECIPES
from flowgrpo_fast.training.engine import Engine, build_engine
from flowgrpo_fast.training.learner import Counts, Learner, networks
from flowgrpo_fast.training.loop import train_step
from flowgrpo_fast.training.update import Tally, accumulate, update
from flowgrpo_fast.types import Batch
from tests.training.own_parts import ByElement, ByElementCredit, GroupCoupled
from tests.training.steps import CPU, gathered, weights

WINDOW = FrozenWindow(size=3, start=1)
KL = PolicyGradient(
    trust=Clip(range=0.05), regularizers=(TransitionKL(beta=0.1), VelocityKL(beta=0.2, to="start"))
)


@pytest.fixture
def wide(toy_recipe) -> Callable[..., Engine]:
    """Engines of the toy job in fp64; keywords replace fields."""

    def make(**changes: Any) -> Engine:
        recipe = toy_recipe(**changes)
        task = replace(recipe.task, model="tests.training.own_parts:load_wide", judge="")
        return build_engine(replace(recipe, task=task), CPU)

    return make


def moved(engine: Engine, size: float = 0.02) -> None:
    """Other weights than those that sampled, and than the snapshots': no ratio is 1, no distance 0."""
    generator = torch.Generator().manual_seed(3)
    for parameter in engine.learner.parameters:
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += size * noise.to(parameter.dtype)


def in_fp64(batch: Batch) -> Batch:
    """The same numbers, of which everything is then computed in fp64."""
    names = ("latents", "next_latents", "log_prob", "sigma")
    transitions = tuple(
        replace(t, **{name: getattr(t, name).double() for name in names}, unconditional=None)
        for t in batch.samples.transitions
    )
    samples = replace(batch.samples, x0=batch.samples.x0.double(), transitions=transitions)
    credit = replace(
        batch.credit, advantages=batch.credit.advantages.double(), weight=batch.credit.weight.double()
    )
    return replace(batch, samples=samples, credit=credit)


def gradient(learner: Learner, batch: Batch) -> Tensor:
    """Of one optimiser step on the whole batch, as one vector."""
    accumulate(learner, batch, Tally())
    found = torch.cat([p.grad.flatten().clone() for p in learner.parameters])
    learner.optimizer.zero_grad(set_to_none=True)
    return found


def at_once(learner: Learner, batch: Batch) -> Tensor:
    """The same gradient by autograd on the loss of all samples and points at once."""
    objective, evaluator = learner.objective, networks(learner, batch, Counts())
    points = objective.points(batch)
    num, credit = len(batch), batch.credit
    imported = torch.ones(num) if batch.samples.weight is None else batch.samples.weight
    found = []
    for point in points:
        stats = objective.measure(point, evaluator.at(point))
        edge = torch.full((num,), -1)  # which edge of the point each sample takes; -1 = none
        edge[point.samples] = torch.arange(len(point.samples))[:, None]
        found.append((point, stats, edge))
    if objective.couples:
        tables = {name: torch.stack([s[name][edge] for _, s, edge in found], 1) for name in found[0][1]}
        per_sample = objective.loss(tables, credit.advantages).loss
        loss = (per_sample * credit.weight * imported).sum() / credit.weight.sum()
    else:
        loss = torch.zeros((), dtype=torch.float64)
        wide = credit.weight if credit.weight.ndim > 1 else credit.weight[:, None].expand(-1, len(found))
        for column, (point, stats, edge) in enumerate(found):
            first = point.samples[:, 0]
            values = credit.advantages
            if values.ndim > 1:
                worth = values[first, min(column, values.shape[1] - 1)]
            else:  # the mean over the samples behind an edge that weigh anything
                behind = credit.weight.amax(1) if credit.weight.ndim > 1 else credit.weight
                behind = behind[point.samples]
                worth = (values[point.samples] * behind).sum(1) / behind.sum(1).clamp_min(1e-9)
            per_edge = objective.loss(stats, worth).loss
            per_edge = per_edge.flatten(1).mean(1) if per_edge.ndim > 1 else per_edge
            here = edge >= 0
            loss = loss + (per_edge[edge[here]] * (wide[:, column] * imported)[here]).sum()
        loss = loss / (wide.sum() * points.per_sample / len(found))
    grads = torch.autograd.grad(loss, learner.parameters)
    return torch.cat([g.flatten() for g in grads])


def idle_group(batch: Batch) -> Batch:
    """The second group teaches nothing."""
    weight = batch.credit.weight.clone()
    weight[8:16] = 0
    live = weight if weight.ndim == 1 else weight.amax(1)
    return replace(batch, credit=replace(batch.credit, weight=weight), live=(live > 0).numpy(), counted=None)


def holes(batch: Batch) -> Batch:
    """Every third sample has no score, in groups of which others have."""
    weight = batch.credit.weight.clone()
    weight[::3] = 0
    live = weight if weight.ndim == 1 else weight.amax(1)
    return replace(batch, credit=replace(batch.credit, weight=weight), live=(live > 0).numpy(), counted=None)


def imported(batch: Batch) -> Batch:
    """Every third sample is another policy's."""
    weight = torch.where(torch.arange(len(batch)) % 3 == 0, 1.7, 1.0).double()
    return replace(batch, samples=replace(batch.samples, weight=weight))


CHANGES = {"": lambda batch: batch, "idle group": idle_group, "holes": holes, "imported": imported}
CHUNKS = ChunkRatio(sizes=(1, 2), trust=Clip(range=0.05), regularizers=(TransitionKL(beta=0.1),))
CREDIT = (Normalise(), Bound())
TREE = Tree(at=FrozenWindow(size=3, start=1), fan=2)  # 8 leaves
COMB = Comb(at=FrozenWindow(size=4, start=1), fan=2)  # 8 branches
CASES = {
    "separable": {"objective": KL},
    "guided": {"objective": KL, "guidance_scale": 2.0},
    "shared start": {"objective": KL, "topology": SharedStart(at=WINDOW)},
    "tree": {"objective": KL, "topology": TREE},
    "tree, credit of each edge": {"objective": KL, "topology": TREE, "credit": (*CREDIT, TreeBackup())},
    "comb": {"objective": KL, "topology": COMB},
    "one step each": {"objective": KL, "topology": OneStepEach(at=WINDOW)},
    "steps of one's own": {"objective": KL, "topology": Independent(at=FractionOfSteps(fraction=0.6))},
    "survivors": {"objective": KL, "topology": Cuts(inner=Independent(at=WINDOW), steps=(3,), sizes=(16,))},
    "chunks": {"objective": CHUNKS},
    "chunks, shared start": {"objective": CHUNKS, "topology": SharedStart(at=WINDOW)},
    "chunks, guided": {"objective": CHUNKS, "guidance_scale": 2.0},
    "chunks, tree": {"objective": CHUNKS, "topology": TREE},
    "group": {"objective": GroupCoupled()},
    "group, tree": {"objective": GroupCoupled(), "topology": TREE},
    "elements": {"objective": ByElement(), "credit": (*CREDIT, ByElementCredit())},
    "forward process": {"objective": NFT(kl_beta=0.1), "topology": Independent(at=Deterministic())},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("case", CASES)
def test_micro_batches_of_any_size_give_the_gradient_of_the_whole(wide, case, change, monkeypatch) -> None:
    engine = wide(**{"credit": CREDIT, **CASES[case]})
    learner = engine.learner
    batch = change(in_fp64(gathered(engine)))
    moved(engine)
    expected = at_once(learner, batch)
    assert expected.dtype == torch.float64
    assert expected.norm() > 1e-6
    for rows in (1, 3, 8, 12, 32, 500):
        monkeypatch.setattr(Learner, "rows_at", lambda self, point, rows=rows: rows)
        found = gradient(learner, batch)
        assert (found - expected).norm() <= 1e-9 * expected.norm(), rows


@pytest.mark.parametrize("case", ["separable", "chunks", "group", "elements", "forward process"])
def test_several_steps_a_forward_are_the_same_gradient(wide, case) -> None:
    engine = wide(**{"credit": CREDIT, **CASES[case]}, rows_per_forward=8)
    learner = engine.learner
    batch = in_fp64(gathered(engine))
    moved(engine)
    expected = gradient(learner, batch)
    for steps in (2, 3):
        learner.steps_per_forward = steps
        found = gradient(learner, batch)
        assert (found - expected).norm() <= 1e-9 * expected.norm(), steps


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("changes", [{}, {"rows_per_forward": 8}, {"objective": CHUNKS}], ids=str)
def test_the_ratio_is_exactly_one_whatever_stands_side_by_side(toy_recipe, steps, precision, changes) -> None:
    """A forward has as many rows as the rollout's, only of several steps: the same shapes, the same bits."""
    engine = build_engine(toy_recipe(steps_per_forward=steps, precision=precision, **changes), CPU)
    for step in range(2):
        metrics = train_step(engine).metrics
        assert metrics["first_ratio_error"] == 0.0
        if step == 0:
            assert metrics["ratio_self_test"] == 0.0


def test_steps_side_by_side_are_one_forward(toy_recipe, monkeypatch) -> None:
    from tests.conftest import ToyModel

    sizes: list[int] = []
    plain = ToyModel.velocity

    def spy(model, latents, sigma, conditioning):
        if torch.is_grad_enabled():
            sizes.append(len(latents))
        return plain(model, latents, sigma, conditioning)

    monkeypatch.setattr(ToyModel, "velocity", spy)
    for steps, expected in ((1, 12), (2, 12), (3, 12)):  # 32 samples at 3 steps, 8 rows a forward
        sizes.clear()
        engine = build_engine(toy_recipe(steps_per_forward=steps, rows_per_forward=8), CPU)
        batch = gathered(engine)
        sizes.clear()
        update(engine.learner, batch)
        assert sum(sizes) == 96
        assert len(sizes) == expected
        assert set(sizes) == {8}


# ------------------------------------------------------------------------------ whole updates, written out


def guided(model: Any, x: Tensor, sigma: Tensor, conditioning: Any, scale: float) -> Tensor:
    """Classifier-free guidance in fp64; the unconditional half carries no gradient."""
    velocity = model.velocity(x, sigma, conditioning)
    if scale == 1:
        return velocity
    negative = model.velocity(x, sigma, conditioning.negative()).detach()
    return negative + scale * (velocity - negative)


def ratio_loss(recipe: Any, model: Any, start: Any, batch: Batch, rows: slice) -> Tensor:
    """Clipped ratios and Flow-GRPO's KL, of the samples `rows`: the papers' formulas, sample by step."""
    samples, advantages, live = batch.samples, batch.credit.advantages, batch.credit.weight
    (beta,) = [part.beta for part in recipe.objective.regularizers] or [0.0]
    clip, total, num_steps = recipe.objective.trust.range, torch.zeros((), dtype=torch.float64), 0
    for kept in samples.transitions:
        num_steps += 1
        row = samples.plan.steps[kept.place].step
        sigma, a, b, c, _, inv_var, log_norm, _ = samples.coeffs[row].double()
        minus_dt = samples.plan.sigmas[row].double() - samples.plan.sigmas[row + 1].double()
        x = kept.latents.repeat_interleave(kept.fan, 0)[rows]
        cond = batch.conditioning.rows(rows)
        levels = sigma.expand(len(x))
        v = guided(model, x, levels, cond, recipe.guidance_scale)
        mean = a * x + b * v
        log_prob = -0.5 * inv_var * (kept.next_latents[rows] - mean).square().mean(1) + log_norm
        ratio = torch.exp(log_prob - kept.log_prob[rows])
        own = advantages[rows]
        loss = torch.maximum(-own * ratio, -own * ratio.clamp(1 - clip, 1 + clip))
        if beta:
            with torch.no_grad():
                reference = a * x + b * guided(start, x, levels, cond, recipe.guidance_scale)
            loss = loss + beta * (mean - reference).square().mean(1) / (2 * c**2 / minus_dt)
        total = total + (loss * live[rows]).sum()
    return total / (live[rows].sum() * num_steps)


def nft_loss(recipe: Any, model: Any, start: Any, batch: Batch, rows: slice) -> Tensor:
    """DiffusionNFT, arXiv 2509.16117; the old policy is the start here."""
    part, samples = recipe.objective, batch.samples
    sigmas = samples.plan.sigmas.double()
    num_steps = len(sigmas) - 1
    taken = batch.choices.taken(num_steps, max(1, int(part.fraction * num_steps)))[rows]
    x0, good = samples.x0[rows], (batch.credit.advantages[rows] / 5).clamp(-1, 1) / 2 + 0.5
    live, cond = batch.credit.weight[rows], batch.conditioning.rows(rows)
    total = torch.zeros((), dtype=torch.float64)
    for turn in range(taken.shape[1]):
        step = torch.from_numpy(np.ascontiguousarray(taken[:, turn]))
        sigma = sigmas[step]
        noise = philox_normal(samples.draws.seed[rows].contiguous(), (6,), step=step, stream=2).double()
        x = (1 - sigma[:, None]) * x0 + sigma[:, None] * noise
        v = model.velocity(x, sigma, cond)
        with torch.no_grad():
            old = start.velocity(x, sigma, cond)
        errors = []
        for implicit in ((1 - part.beta) * old + part.beta * v, (1 + part.beta) * old - part.beta * v):
            gap = x - sigma[:, None] * implicit - x0
            errors.append(gap.square().mean(1) / gap.detach().abs().mean(1).clamp_min(1e-5))
        loss = 5 / part.beta * (good * errors[0] + (1 - good) * errors[1])
        loss = loss + part.kl_beta * (v - old).square().mean(1)
        total = total + (loss * live).sum()
    return total / (live.sum() * taken.shape[1])


@pytest.mark.parametrize(
    ("name", "written_out"),
    [("mix_grpo", ratio_loss), ("flow_grpo", ratio_loss), ("diffusion_nft", nft_loss)],
)
def test_a_whole_update_is_the_loop_written_out(toy_recipe, name, written_out) -> None:
    """Every optimiser step of a named recipe's update: gradient, clip and AdamW, in fp64 PyTorch.

    With whole groups an optimiser step and idle ones left out; `test_whole_update.py` has the recipes' own meanings.
    """
    paper = RECIPES[name].make()
    credit = tuple(DropIdle() if isinstance(step, DropIdle) else step for step in paper.credit)
    paper = replace(paper, credit=credit, unconditional_gradient=False)
    task = replace(toy_recipe().task, model="tests.training.own_parts:load_wide", judge="")
    optimizer = replace(paper.optimizer, max_grad_norm=0.1, partition="groups")  # low enough to be met
    recipe = replace(paper, num_prompts=4, task=task, optimizer=optimizer)
    engine = build_engine(recipe, CPU)
    batch = in_fp64(gathered(engine))
    start = copy.deepcopy(engine.model)
    moved(engine, 1e-4 if name == "flow_grpo" else 1e-3)
    model = copy.deepcopy(engine.model)
    part = recipe.optimizer
    theirs = torch.optim.AdamW(
        model.module.parameters(), lr=part.lr, betas=part.betas, weight_decay=part.weight_decay
    )
    norms = []
    for rows in batch.shares(part.num_updates):
        theirs.zero_grad()
        written_out(recipe, model, start, batch, rows).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.module.parameters(), part.max_grad_norm)))
        theirs.step()
    before = weights(engine)
    metrics = update(engine.learner, batch)
    assert metrics["grad_norm"] == pytest.approx(float(np.mean(norms)), rel=1e-6)
    change, expected = weights(engine) - before, weights(model) - before
    assert expected.norm() > 0
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_a_share_without_live_samples_is_no_optimiser_step(wide) -> None:
    engine = wide(optimizer=Optimizer(lr=1e-2, num_updates=4))
    batch = in_fp64(gathered(engine))
    alone = replace(
        batch.credit, weight=torch.zeros(32, dtype=torch.float64).index_fill_(0, torch.arange(8, 16), 1.0)
    )
    update(engine.learner, replace(batch, credit=alone, live=(alone.weight > 0).numpy(), counted=None))
    assert engine.learner.num_updates == 1


def test_all_steps_of_a_window_count_alike(wide) -> None:
    """The loss is a mean over samples and trained steps: a batch twice over has the same gradient."""
    engine = wide(topology=Independent(at=AllSteps()))
    batch = in_fp64(gathered(engine))
    moved(engine)
    half = batch.of_samples(slice(0, 16))
    other = batch.of_samples(slice(16, 32))
    alive = [part.credit.weight.sum() for part in (half, other)]
    parts = [gradient(engine.learner, part) for part in (half, other)]
    mixed = (parts[0] * alive[0] + parts[1] * alive[1]) / sum(alive)
    torch.testing.assert_close(gradient(engine.learner, batch), mixed, rtol=1e-9, atol=1e-12)
