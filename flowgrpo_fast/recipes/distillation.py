"""Methods in which other models teach. Sources and what differs: docs/methods."""

from __future__ import annotations

from dataclasses import replace

from flowgrpo_fast.recipe import Distillation, Optimizer, Recipe, TransitionKL
from flowgrpo_fast.recipes.trajectory import flow_grpo


def flow_opd() -> Recipe:
    """Flow-OPD, SD3.5-M: the student's own samples, each prompt's transitions drawn to its teacher's.

    Of the authors' `mix_opd_8gpu`, in the mode whose gradient their loop follows (docs/methods/distillation.md).
    """
    return replace(
        flow_grpo(),
        name="flow_opd",
        group_size=16,
        num_prompts=16,
        credit=(),
        objective=Distillation(mode="gkd", regularizers=(TransitionKL(beta=0.04),)),
        optimizer=Optimizer(
            lr=1e-4, num_updates=2, partition="shuffled", ema_decay=0.9, ema_every=8, ema_warm_up=True
        ),
    )
