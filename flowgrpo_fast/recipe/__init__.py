"""A recipe: one algorithm of the literature as data. Orthogonal frozen parts, validated on construction.

A part says *what*; the rooms below say *how* (`sampling.windows` turns a window into step indices, ...).
Paper numbers live in `recipes.py`; this room holds no algorithm.
"""

from __future__ import annotations

from flowgrpo_fast.recipe.learning import NFT, ClippedRatio, Credit, Loss, Optimizer
from flowgrpo_fast.recipe.network import FullFineTuning, LoRA, Network, Train
from flowgrpo_fast.recipe.rollout import (
    Exploring,
    KeepAll,
    LowPrecision,
    NoScouts,
    Prune,
    Pruning,
    RolloutPrecision,
    Scouts,
    TrainingPrecision,
)
from flowgrpo_fast.recipe.schedule import (
    CPS,
    AllSteps,
    DanceSDE,
    Deterministic,
    DPMSolver2M,
    Dynamics,
    DynamicShift,
    Euler,
    FlowSDE,
    FractionOfSteps,
    FrozenWindow,
    RandomWindow,
    Sigmas,
    SlidingWindow,
    Solver,
    Window,
)
from flowgrpo_fast.recipe.task import Task
from flowgrpo_fast.recipe.whole import Recipe
from flowgrpo_fast.rewards.terms import RewardTerm

__all__ = [
    "CPS",
    "NFT",
    "AllSteps",
    "ClippedRatio",
    "Credit",
    "DPMSolver2M",
    "DanceSDE",
    "Deterministic",
    "DynamicShift",
    "Dynamics",
    "Euler",
    "Exploring",
    "FlowSDE",
    "FractionOfSteps",
    "FrozenWindow",
    "FullFineTuning",
    "KeepAll",
    "LoRA",
    "Loss",
    "LowPrecision",
    "Network",
    "NoScouts",
    "Optimizer",
    "Prune",
    "Pruning",
    "RandomWindow",
    "Recipe",
    "RewardTerm",
    "RolloutPrecision",
    "Scouts",
    "Sigmas",
    "SlidingWindow",
    "Solver",
    "Task",
    "Train",
    "TrainingPrecision",
    "Window",
]
