"""Fits of any recipe to a job of another size."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

from flowgrpo_fast.recipe import Recipe


def digits(recipe: Recipe) -> Recipe:
    """Fits a paper's recipe to the default job: a 0.4 M-parameter model with 64-pixel latents on a CPU.

    A mean log-prob over 64 elements moves a thousand times further per update than one over 65 536, and a small
    network trained whole wants a larger step than a LoRA: clip range and learning rate follow. `eps` is of the
    size of a reward difference worth learning from: once nearly every sample is right, a z-score with a tiny eps
    would blow the last bits up to full-size advantages, and the digits collapse (docs/log.md). The method
    (dynamics, window, solver, credit, KL) stays the paper's.
    """
    sigmas = replace(recipe.sigmas, num_inference_steps=10, shift=1.0, spacing="linear")
    topology = with_field(recipe.topology, "at.every", 5)
    only = topology.only_group_size(sigmas.num_inference_steps)
    # A range that is wider than that is meant never to act.
    objective = with_field(recipe.objective, "trust.range", lambda own: max(own, 0.002))
    # A schedule of ten steps has nine that may be stochastic.
    objective = with_field(objective, "sizes", (2, 3, 4))
    return replace(
        recipe,
        sigmas=sigmas,
        topology=topology,
        guidance_scale=1.0,
        group_size=only or (recipe.group_size if topology.stages or not recipe.credit else 24),
        num_prompts=10 if recipe.group_size > 1 else 60,  # near the paper's batch where samples stand alone
        credit=tuple(with_field(step, "eps", 0.3) for step in recipe.credit),
        objective=objective,
        optimizer=replace(recipe.optimizer, lr=1e-4, num_updates=2),
        num_steps=60,
    )


def with_field(part: Any, path: str, value: Any) -> Any:
    """The part with a nested field changed, to a value or by a function; the part itself where it has no such field."""
    name, _, rest = path.partition(".")
    if name not in {f.name for f in dataclasses.fields(part)}:
        return part
    old = getattr(part, name)
    if rest:
        return replace(part, **{name: with_field(old, rest, value)})
    return replace(part, **{name: value(old) if callable(value) else value})
