"""How many rows a forward takes, and how many trained steps of a sample, where a recipe leaves that to the planner.

A run launches the fewest forwards when each is as large as memory allows. The rollout's forwards and the update's have
equally many rows, so that the first ratio is exactly 1. One step at a time the update fills no more than the samples of
one optimiser step; J steps of them side by side fill J times as many, which the rollout may then take as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from flowgrpo_fast.planner.architectures import Counts
from flowgrpo_fast.planner.memory import plan_memory, usable
from flowgrpo_fast.planner.step import MOST_ITERATIONS
from flowgrpo_fast.recipe import Recipe


def joinable(recipe: Recipe, counts: Counts) -> int:
    """Trained steps that may stand side by side in one forward without a rest; 1 where that cannot be.

    They follow one another, all samples are rows of their own at each, and one network serves all. A rest would go
    through the network in smaller forwards than the rollout's, whose bits a ratio of exactly 1 needs.
    """
    if (
        not recipe.requires.log_probs
        or recipe.machine.replay_rows
        or recipe.topology.stages
        or counts.experts > 1
    ):
        return 1
    num_steps, iterations = recipe.sigmas.num_inference_steps, range(min(recipe.num_steps, MOST_ITERATIONS))
    windows = (recipe.topology.at.steps(num_steps, iteration, recipe.seed) for iteration in iterations)
    if len({(len(window.kept), window.num_trained) for window in windows}) > 1:
        return 1  # iterations differ in how many there are
    plan = recipe.plan(0, counts.sequence)
    alone = [p for p in plan.kept if plan.steps[p].fan == 1 and len(plan.steps[p].parent) == plan.group_size]
    asked = recipe.objective.costs(plan, recipe.num_prompts).rows
    if asked != sum(plan.trained_rows(recipe.num_prompts)) or any(b - a > 1 for a, b in pairwise(alone)):
        return 1  # other points than the transitions, or not all of them
    return max(1, len(alone))


def ways(recipe: Recipe, counts: Counts, num_gpus: int = 1) -> Iterator[Recipe]:
    """The recipe with every setting of its forwards that it accepts, those with the most rows first.

    What the recipe sets by itself stays: rows other than 0, steps other than 0.
    """
    machine, samples = recipe.machine, recipe.rows_per_update
    if machine.rows_per_forward:
        settings = [(machine.rows_per_forward, recipe.steps_per_forward)]
    else:
        steps = recipe.steps_per_forward
        share = max(1, samples * steps // num_gpus)
        settings = [(rows, steps) for rows in range(share, 0, -1) if share % rows == 0]
        apart = machine.steps_per_forward or recipe.optimizer.num_updates == 1
        most = 1 if apart else joinable(recipe, counts)
        # Steps side by side pay where they fill a forward beyond the samples of one optimiser step; the rollout, which
        # fills as large ones, has those of all.
        most_beside = min(most, recipe.optimizer.num_updates)
        wider = [(samples * n // num_gpus, n) for n in range(most_beside, 1, -1) if most % n == 0]
        settings = [*wider, *settings]
    for rows, steps in settings:
        try:
            yield replace(recipe, machine=replace(machine, rows_per_forward=rows, steps_per_forward=steps))
        except ValueError:
            continue  # chunks, candidates or a low precision that such forwards do not go with


def open_ways(recipe: Recipe, counts: Counts, num_gpus: int = 1) -> list[Recipe]:
    """All ways of the recipe, whatever rows it sets now."""
    try:
        free = replace(recipe, machine=replace(recipe.machine, rows_per_forward=0, replay_rows=0))
    except ValueError:  # its chunks are whole forwards of these rows alone
        free = recipe
    return list(ways(free, counts, num_gpus))


def fitting(recipe: Recipe, counts: Counts, capacity: float, num_gpus: int = 1) -> Recipe | None:
    """The recipe with the largest forwards that fit into `capacity` bytes; None where the smallest do not."""
    for way in ways(recipe, counts, num_gpus):
        if plan_memory(counts, way, num_gpus).total <= usable(capacity):
            return way
    return None


def fits_at_all(recipe: Recipe, counts: Counts, capacity: float, num_gpus: int = 1) -> bool:
    """Whether the smallest forwards that the recipe accepts fit."""
    *_, smallest = (None, *ways(recipe, counts, num_gpus))
    if smallest is None:
        return False
    return plan_memory(counts, smallest, num_gpus).total <= usable(capacity)
