"""A recipe's parts resolved for one iteration: sigmas, coefficient table, which steps are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowgrpo_fast.recipe import DPMSolver2M, Dynamics, Euler, Recipe, Sigmas, Solver
from flowgrpo_fast.sampling.dynamics import coefficients
from flowgrpo_fast.sampling.sigmas import make_sigmas, resolve_shift, respaced_tail
from flowgrpo_fast.sampling.windows import window_steps


@dataclass(frozen=True, slots=True)
class Schedule:
    """One walk from noise to sample. All host data; `coeffs` is copied to the device once per rollout."""

    sigmas: Tensor  # [T+1] fp32
    coeffs: Tensor  # [T, 8] fp32
    kept: tuple[int, ...]  # steps that carry a log-prob
    num_trained: int  # of the kept ones, per sample
    history: tuple[bool, ...]  # [T] steps that read the x0 prediction of the step before

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.history)


def resolve_schedule(recipe: Recipe, iteration: int, seq_len: int | None = None) -> Schedule:
    """The schedule of one training iteration: dynamics inside the window, Euler before, the solver after it.

    Raises:
        ValueError: the window does not fit the schedule.
    """
    window = window_steps(recipe.window, recipe.sigmas.num_inference_steps, iteration, recipe.seed)
    sigmas = make_sigmas(recipe.sigmas, seq_len)
    end = window.stochastic[-1] + 1
    solver = recipe.solver
    if isinstance(solver, DPMSolver2M) and solver.keep < 1:
        num_tail = max(1, int((len(sigmas) - 1 - end) * solver.keep))
        sigmas = respaced_tail(sigmas, end, num_tail, resolve_shift(recipe.sigmas, seq_len))
    rules: list[Dynamics | Solver] = [
        recipe.dynamics if step in window.stochastic else (Euler() if step < end else solver)
        for step in range(len(sigmas) - 1)
    ]
    coeffs = coefficients(sigmas, rules)
    return Schedule(
        sigmas=torch.from_numpy(sigmas).float(),
        coeffs=coeffs,
        kept=window.stochastic,
        num_trained=window.num_trained,
        history=tuple((coeffs[:, 4] != 0).tolist()),
    )


def ode_schedule(sigmas: Sigmas, seq_len: int | None = None) -> Schedule:
    """The deterministic Euler walk, for evaluation and sampling."""
    values = make_sigmas(sigmas, seq_len)
    num_steps = len(values) - 1
    return Schedule(
        sigmas=torch.from_numpy(values).float(),
        coeffs=coefficients(values, [Euler()] * num_steps),
        kept=(),
        num_trained=0,
        history=(False,) * num_steps,
    )
