"""Sampling: schedules, dynamics as coefficient tables, windows, the sampler and its replay."""

from flowgrpo_fast.sampling.dynamics import coefficients
from flowgrpo_fast.sampling.sampler import replay, rollout
from flowgrpo_fast.sampling.schedule import Schedule, ode_schedule, resolve_schedule
from flowgrpo_fast.sampling.sigmas import make_sigmas, shift_sigmas
from flowgrpo_fast.sampling.windows import window_steps

__all__ = [
    "Schedule",
    "coefficients",
    "make_sigmas",
    "ode_schedule",
    "replay",
    "resolve_schedule",
    "rollout",
    "shift_sigmas",
    "window_steps",
]
