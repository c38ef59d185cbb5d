"""The forwards that a planner chooses: as large as fit, the same first ratio, fewer of them; and what `plan` prints."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from flowgrpo_fast.planner import live
from flowgrpo_fast.planner import show as show_module
from flowgrpo_fast.planner.architectures import Counts, architecture
from flowgrpo_fast.planner.counting import Activations, Work
from flowgrpo_fast.planner.devices import GPUS
from flowgrpo_fast.planner.forwards import fits_at_all, fitting, joinable, open_ways, ways
from flowgrpo_fast.planner.live import with_forwards
from flowgrpo_fast.planner.memory import plan_memory, usable
from flowgrpo_fast.planner.published import PUBLISHED
from flowgrpo_fast.planner.show import make_plan, show, to_json
from flowgrpo_fast.planner.step import plan_step
from flowgrpo_fast.recipe import (
    Comb,
    Cuts,
    FractionOfSteps,
    FrozenWindow,
    Independent,
    LowPrecision,
    Network,
    Optimizer,
    Recipe,
    SharedStart,
    Sigmas,
    Tree,
)
from flowgrpo_fast.recipe_io import override
from flowgrpo_fast.recipes import RECIPES
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import train_step
from tests.conftest import with_changes
from tests.golden.golden_cases import make

CPU = torch.device("cpu")
COUNTS = Counts(
    name="simple",
    size="",
    forward=Work(linear=8.0, attention=2.0),
    trained_share=0.0,
    decode=3.0,
    text=5.0,
    reward=7.0,
    parameters=10**9,
    linear_parameters=8 * 10**8,
    trained=10**7,
    latent_elements=10**4,
    activations=Activations(all=1e9, selective=0.5e9, full=0.25e9, block=0.1e9),
)


def recipe(**changes) -> Recipe:
    """24 samples in two optimiser steps of 12, at four trained steps of six."""
    base = Recipe(
        name="small",
        sigmas=Sigmas(num_inference_steps=6, shift=1.0),
        topology=Independent(at=FrozenWindow(size=4)),
        group_size=6,
        num_prompts=4,
        optimizer=Optimizer(num_updates=2),
    )
    return with_changes(base, **changes)


def settings(of: Recipe, counts: Counts = COUNTS, num_gpus: int = 1) -> list[tuple[int, int]]:
    found = (way.machine for way in ways(of, counts, num_gpus))
    return [(machine.rows_per_forward, machine.steps_per_forward) for machine in found]


def test_the_ways_are_divisors_and_whole_steps_side_by_side() -> None:
    one = [(12, 1), (6, 1), (4, 1), (3, 1), (2, 1), (1, 1)]
    assert settings(recipe()) == [
        (24, 2),
        *one,
    ]  # four steps side by side would need 48 samples in the rollout
    assert settings(recipe(steps_per_forward=1)) == one
    assert settings(recipe(rows_per_forward=4)) == [(4, 1)]
    assert settings(recipe(rows_per_forward=24, steps_per_forward=4)) == [(24, 4)]
    assert settings(recipe(), num_gpus=2) == [(12, 2), (6, 1), (3, 1), (2, 1), (1, 1)]
    # One optimiser step takes all samples at once as it is.
    assert settings(recipe(optimizer=Optimizer()))[0] == (24, 1)
    # Three steps leave a rest beside two.
    assert settings(recipe(topology=Independent(at=FrozenWindow(size=3)))) == one
    # Chunks are whole forwards.
    chunked = recipe(prompts_per_chunk=1, rows_per_forward=6)
    assert [way.machine.rows_per_forward for way in open_ways(chunked, COUNTS)] == [6]


@pytest.mark.parametrize(
    ("changes", "counts", "steps"),
    [
        ({}, COUNTS, 4),
        ({}, replace(COUNTS, experts=2), 1),
        ({"replay_rows": 4}, COUNTS, 1),
        ({"topology": Independent(at=FractionOfSteps(fraction=0.5))}, COUNTS, 1),
        ({"topology": Cuts(steps=(3,), sizes=(12,))}, COUNTS, 1),
        ({"topology": Tree(at=FrozenWindow(size=2)), "group_size": 4}, COUNTS, 1),
        ({"topology": Comb(at=FrozenWindow(size=3))}, COUNTS, 1),
        ({"topology": SharedStart(at=FrozenWindow(size=3)), "optimizer": Optimizer()}, COUNTS, 2),
        ({"objective": make("diffusion_nft").objective}, COUNTS, 1),
    ],
    ids=str,
)
def test_only_steps_at_which_every_sample_stands_alone_are_joined(changes, counts, steps) -> None:
    assert joinable(recipe(**changes), counts) == steps


def test_a_low_precision_that_shares_the_base_takes_one_step_at_a_time() -> None:
    shared = recipe(rollout_precision=LowPrecision(format="fp8_tensor", mode="shared_base"))
    assert all(steps == 1 for _, steps in settings(shared))


def test_the_largest_forwards_that_fit() -> None:
    def chosen(capacity: float, **changes) -> tuple[int, int] | None:
        found = fitting(recipe(**changes), COUNTS, capacity)
        return None if found is None else (found.machine.rows_per_forward, found.machine.steps_per_forward)

    everything = plan_memory(COUNTS, recipe(rows_per_forward=24, steps_per_forward=2)).total / 0.95 + 1.5e9
    assert chosen(everything * (1 + 1e-9)) == (24, 2)
    assert chosen(everything * (1 - 1e-9)) == (12, 1)
    assert chosen(everything / 2, rows_per_forward=24, steps_per_forward=2) is None
    assert chosen(1e9) is None


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("flow_cps", "fp32"),
        ("flow_cps", "bf16"),
        ("gcpo", "fp32"),
        ("op_grpo", "fp32"),
        ("flow_grpo", "bf16"),
    ],
)
def test_every_way_keeps_the_first_ratio_at_1(name, precision) -> None:
    """And the larger the forwards, the fewer there are; the gradient's norm is the same but for rounding."""
    small = override(make(name), [f"machine.precision={precision}"])
    found, evaluations = [], set()
    every = list(ways(small, COUNTS))
    for way in (*every[:2], every[-2]):
        engine, calls = build_engine(way, CPU), [0]

        def count_one(*_: object, calls: list[int] = calls) -> None:
            calls[0] += 1

        engine.model.module.register_forward_pre_hook(count_one)
        metrics = train_step(engine).metrics
        engine.close()
        assert metrics["first_ratio_error"] == metrics["ratio_self_test"] == 0.0
        evaluations.add(metrics["network_evaluations"])
        found.append(calls[0])
    assert len(evaluations) == 1
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_a_run_starts_with_what_was_chosen(monkeypatch) -> None:
    monkeypatch.setattr(live, "planned_counts", lambda recipe: COUNTS)
    assert with_forwards(recipe(), None) == recipe()  # a CPU's memory is nobody's
    assert with_forwards(recipe(), 1e9) == recipe()  # nothing fits: refused in the next line of the launch
    machine = with_forwards(recipe(), 80e9).machine
    assert (machine.rows_per_forward, machine.steps_per_forward) == (24, 2)
    kept = recipe(rows_per_forward=6, steps_per_forward=1)
    assert with_forwards(kept, 80e9) == kept
    monkeypatch.setattr(live, "planned_counts", lambda recipe: None)
    assert with_forwards(recipe(), 80e9) == recipe()  # the digits, a model of the user's own


# ------------------------------------------------------------------- what is printed can be typed (issue: never broken)

VARIANTS = (
    "",
    "network.train=FullFineTuning network.checkpointing=full",
    "machine.rows_per_forward=1 machine.steps_per_forward=1",
)


@pytest.fixture
def one_count(monkeypatch):
    """Every family's counts without its network: a forward, and memory of the published size."""

    def counted(pipeline, network: Network) -> Counts:
        whole = network.train.trains_every_weight
        return replace(
            COUNTS,
            name=pipeline.name,
            trained_share=float(whole),
            trained=10**9 if whole else 10**7,
            sequence=1024,
            experts=sum(name.startswith("transformer") for name in pipeline.networks),
        )

    monkeypatch.setattr("flowgrpo_fast.planner.show.count", counted)


def check_printed(model: str, asked: Recipe, gpu: str) -> int:
    """Types everything that a plan prints: each setting is accepted, and fits where the recipe fits."""
    plan = make_plan(model, asked, GPUS[gpu])
    text = io.StringIO()
    show(plan, Console(file=text, width=400))
    chosen = plan.largest(GPUS[gpu])
    room = GPUS[gpu].memory
    fits = fits_at_all(asked, plan.counts, room)
    checked = 0
    for lever in to_json(plan)["levers"]:
        if lever["setting"] == "always":
            continue
        changed = override(asked, lever["setting"].split())
        assert changed != asked
        checked += 1
        if not lever["in_use"]:
            counts = show_module.count(architecture(model), changed.network)
            saved = plan.step.floor(plan.gpu) - plan_step(counts, changed).floor(plan.gpu)
            assert saved == pytest.approx(lever["saves"], rel=1e-6), lever
            assert fits_at_all(changed, counts, room) or not fits, lever
    for setting in re.findall(r"set ([a-z_.]+=[\w.]+)", text.getvalue()):
        assert override(asked, [setting]) != asked
        checked += 1
    line = next(line for line in text.getvalue().splitlines() if line.startswith("forwards:"))
    assignments = re.findall(r"machine\.\w+=\d+", line)
    if chosen is None and not asked.machine.rows_per_forward:
        assert not assignments
    else:
        typed = override(asked, assignments)
        assert plan_memory(plan.counts, typed).total <= usable(room) or not fits
    return checked


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_plan_prints_can_be_typed(name, one_count) -> None:
    """On one family's pipeline each: what a recipe accepts does not depend on whose network it trains."""
    paper = RECIPES[name].make()
    paper = replace(paper, machine=replace(paper.machine, precision="bf16"))
    models = list(PUBLISHED)
    for index, variant in enumerate(VARIANTS):
        turn = list(RECIPES).index(name) + index
        gpu = ("4090", "b200")[turn % 2]
        check_printed(models[turn % len(models)], override(paper, variant.split()), gpu)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd3.5-medium", "wan2.2-a14b", "sana-1.6b"])
def test_what_a_plan_prints_of_a_published_network_can_be_typed(model) -> None:
    assert check_printed(model, override(RECIPES["flow_grpo"].make(), ["machine.precision=bf16"]), "h100") > 4
