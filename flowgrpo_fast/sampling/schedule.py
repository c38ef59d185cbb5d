"""A recipe's parts resolved for one iteration: sigmas, coefficient table, which steps are kept."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowgrpo_fast.recipe import NFT, DPMSolver2M, Dynamics, Euler, Prune, Recipe, Sigmas, Solver
from flowgrpo_fast.sampling.dynamics import coefficients
from flowgrpo_fast.sampling.sigmas import Array, make_sigmas, resolve_shift, respaced_tail
from flowgrpo_fast.sampling.windows import earliest_end, latest_start, window_steps


@dataclass(frozen=True, slots=True)
class Schedule:
    """One walk from noise to sample. All host data; `coeffs` is copied to the device once per rollout."""

    sigmas: Tensor  # [T+1] fp32
    coeffs: Tensor  # [T, 8] fp32
    kept: tuple[int, ...]  # steps that carry a log-prob
    num_trained: int  # of the kept ones, per sample
    history: tuple[bool, ...]  # [T] steps that read the x0 prediction of the step before
    cuts: dict[int, int] = field(default_factory=dict)  # before this step a group shrinks to this size

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.history)

    def x0_is_read(self, step: int) -> bool:
        """Whether the next step or a cut before it reads this step's x0 prediction."""
        return step + 1 in self.cuts or (step + 1 < self.num_steps and self.history[step + 1])


def resolve_schedule(recipe: Recipe, iteration: int, seq_len: int | None = None) -> Schedule:
    """The schedule of one training iteration: dynamics inside the window, Euler before, the solver after it.

    Without a window the solver walks it all. NFT keeps no step: it learns from finished samples.

    Raises:
        ValueError: the window or the pruning does not fit the schedule.
    """
    window = window_steps(recipe.window, recipe.sigmas.num_inference_steps, iteration, recipe.seed)
    sigmas = make_sigmas(recipe.sigmas, seq_len)
    end = window.stochastic[-1] + 1 if window.stochastic else 0
    solver = recipe.solver
    fewest = len(sigmas) - 1
    if isinstance(solver, DPMSolver2M) and solver.keep < 1:
        first_end = earliest_end(recipe.window, fewest)
        fewest = first_end + _tail_steps(solver, fewest - first_end)
        tail_steps = _tail_steps(solver, len(sigmas) - 1 - end)
        sigmas = respaced_tail(sigmas, end, tail_steps, resolve_shift(recipe.sigmas, seq_len))
    rules: list[Dynamics | Solver] = [
        recipe.dynamics if step in window.stochastic else (Euler() if step < end else solver)
        for step in range(len(sigmas) - 1)
    ]
    kept, num_trained = window.stochastic, window.num_trained
    if isinstance(recipe.loss, NFT):
        kept, num_trained = (), 0
    return _schedule(sigmas, rules, kept, num_trained, _cuts(recipe, fewest))


def ode_schedule(sigmas: Sigmas, seq_len: int | None = None, solver: Solver | None = None) -> Schedule:
    """A deterministic walk, of Euler steps unless said otherwise: for evaluation, sampling and scouts."""
    values = make_sigmas(sigmas, seq_len)
    return _schedule(values, [solver or Euler()] * (len(values) - 1))


def _schedule(
    sigmas: Array,
    rules: list[Dynamics | Solver],
    kept: tuple[int, ...] = (),
    num_trained: int = 0,
    cuts: dict[int, int] | None = None,
) -> Schedule:
    coeffs = coefficients(sigmas, rules)
    return Schedule(
        sigmas=torch.from_numpy(sigmas).float(),
        coeffs=coeffs,
        kept=kept,
        num_trained=num_trained,
        history=tuple((coeffs[:, 4] != 0).tolist()),
        cuts=cuts or {},
    )


def _tail_steps(solver: DPMSolver2M, num_steps: int) -> int:
    """How many of the steps after the window a solver keeps."""
    return max(1, int(num_steps * solver.keep))


def _cuts(recipe: Recipe, fewest: int) -> dict[int, int]:
    """Step -> size of a group from there on. `fewest`: steps of the shortest schedule of all iterations."""
    prune = recipe.prune
    if not isinstance(prune, Prune):
        return {}
    if prune.at[-1] > fewest:
        raise ValueError(
            f"Prune.at is {prune.at}, outside the schedule; with {fewest} steps the last cut is at "
            f"{fewest}, of finished samples"
        )
    start = latest_start(recipe.window, recipe.sigmas.num_inference_steps)
    if recipe.share_start_noise and prune.at[0] < start + 2:
        raise ValueError(
            f"Prune.at is {prune.at}, but share_start_noise makes a group's candidates equal until a stochastic "
            f"step, which may be step {start}; cut no earlier than at {start + 2}"
        )
    return dict(zip(prune.at, (*prune.sizes[1:], recipe.group_size), strict=True))
