"""Coefficient tables for step functions that are handed a timestep: which row it means, and the peers' std and dt.

Tables are made on the host once per (schedule, dynamics, noise level, device) and kept. A timestep finds its row by one
comparison against the whole schedule on the timestep's own device, so no step waits for an accelerator.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowgrpo_fast.compat.scheduler import to_device
from flowgrpo_fast.ops import Extras, flow_log_prob, flow_step
from flowgrpo_fast.schedule.dynamics import CPS, DanceSDE, Euler, FlowSDE, Row
from flowgrpo_fast.schedule.sigmas import Array

_MAX_TABLES = 64
_MAX_TIMESTEP_ERROR = 1e-3  # of a timestep that went through other arithmetic: 1e-6 in sigma
_LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Kind:
    """A dynamics as the peers have it: our row, and what they call its std."""

    # (noise level, sigmas, step) -> the row and the std; None = Euler steps, whatever the noise level
    stochastic: Callable[[float, Array, int], tuple[Row, float]] | None
    # The peers score a residual of this weight even where there is no noise; None = they score nothing there.
    inv_var: float | None = None

    @property
    def is_stochastic(self) -> bool:
        """Whether a noise level says anything."""
        return self.stochastic is not None

    def step(self, noise_level: float, sigmas: Array, step: int) -> tuple[Row, float]:
        """The row of a step of a schedule and the peers' std of it; an Euler step where there is no noise."""
        row, std = Euler().row(sigmas, step, step + 1), 0.0
        if self.stochastic is not None and noise_level != 0:
            row, std = self.stochastic(noise_level, sigmas, step)
        return (row if self.inv_var is None else (*row[:5], self.inv_var, *row[6:])), std


def _flow_sde(noise_level: float, sigmas: Array, step: int) -> tuple[Row, float]:
    rule = FlowSDE(noise_level=noise_level)
    return rule.row(sigmas, step, step + 1), rule.rate(sigmas, step)  # q, without sqrt(-dt)


def _dance_sde(noise_level: float, sigmas: Array, step: int) -> tuple[Row, float]:
    rule = DanceSDE(noise_level=noise_level)
    return rule.row(sigmas, step, step + 1), rule.rate(sigmas, step)  # eta, without sqrt(-dt)


def _cps(noise_level: float, sigmas: Array, step: int) -> tuple[Row, float]:
    row = CPS(noise_level=noise_level).row(sigmas, step, step + 1)
    return row, row[3]  # the noise it adds


FLOW_SDE = Kind(_flow_sde)
DANCE_SDE = Kind(_dance_sde)
COEFFICIENT_PRESERVING = Kind(_cps, inv_var=2.0)  # its score is -mean(residual^2), noise or not
ODE = Kind(None)


class StepRows(NamedTuple):
    """The rows of one call. N is 1 (shared by all samples) or B."""

    coeffs: Tensor  # [R, 8] fp32
    step_index: Tensor  # [N] int64, rows of `coeffs`
    std: Tensor  # [N] fp32, the peers' std_dev_t
    dt: Tensor  # [N] fp32, sigma_next - sigma

    @property
    def op_index(self) -> Tensor:
        """The index as the ops take it: 0-d where all samples share it."""
        return self.step_index[0] if len(self.step_index) == 1 else self.step_index


@dataclass(frozen=True, slots=True, eq=False)
class ScheduleTable:
    """All steps of a schedule under one dynamics. `std` and `dt` end with a NaN, the answer to an unknown timestep."""

    coeffs: Tensor  # [T, 8] fp32, device
    std: Tensor  # [T+1] fp32, device
    dt: Tensor  # [T+1] fp32, device
    timesteps: Tensor  # [2, T] fp32, device: where each step begins and ends
    host_timesteps: Tensor  # [2, T] fp32, host
    owners: tuple[Tensor, ...]  # kept alive, since the cache knows them by id

    def rows(self, timestep: Tensor, timestep_next: Tensor | None = None) -> StepRows:
        """The rows of timesteps `[N]`, on the host or on the device.

        Raises:
            ValueError: a timestep on the host is not in the schedule. One that only a device has seen gives NaN.
        """
        on_host = timestep.device.type == "cpu"
        known = self.host_timesteps if on_host else self.timesteps
        index, found = find_steps(known, timestep, timestep_next)
        if on_host and not bool(found.all()):
            missing = timestep[~found][0].item()
            raise ValueError(
                f"timestep {missing:g} is not in the schedule {_shorten(known[0])}; "
                "pass entries of scheduler.timesteps"
            )
        return self.rows_at(torch.where(found, index, len(self.coeffs)))

    def rows_at(self, index: Tensor) -> StepRows:
        """The rows of step indices `[N]` int64."""
        index = to_device(index, self.coeffs.device)
        return StepRows(self.coeffs, index, self.std.index_select(0, index), self.dt.index_select(0, index))


def find_steps(known: Tensor, timestep: Tensor, timestep_next: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Step index `[N]` int64 of each timestep, and whether there is one `[N]`; a device operation throughout.

    Args:
        known: `[2, T]`, where each step begins and ends.
        timestep: `[N]`, equal to the begin of a step.
        timestep_next: `[N]`, the end of the same step; with it both may be off by rounding.
    """
    if timestep_next is None:
        match = known[0] == timestep[:, None]
    else:
        ends = torch.stack([timestep, timestep_next.to(timestep.device).expand_as(timestep)])
        match = ((known[:, None] - ends[:, :, None]).abs() <= _MAX_TIMESTEP_ERROR).all(0)
    return match.int().argmax(1), match.any(1)


def _shorten(timesteps: Tensor) -> str:
    values = [f"{value:g}" for value in timesteps.tolist()]
    return ", ".join(values if len(values) <= 6 else [*values[:3], "...", values[-1]])


def make_table(
    steps: Sequence[tuple[float, float]], sigma_max: float, kind: Kind, noise_levels: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Coefficients `[R, 8]` and the peers' std `[R]`, fp32 on the host, of steps (sigma, sigma_next).

    Args:
        sigma_max: stands in for sigma = 1 in Flow-SDE's denominator; see `FlowSDE.rate`.
        noise_levels: one a step; 0 makes it an Euler step.

    Raises:
        ValueError: a step that does not fall within [0, 1].
    """
    rows, stds = [], []
    for (sigma, sigma_next), noise_level in zip(steps, noise_levels, strict=True):
        if not 0 <= sigma_next < sigma <= 1:
            raise ValueError(
                f"a step goes from sigma {sigma:g} to {sigma_next:g}; sigmas must fall strictly within [0, 1]"
            )
        # A schedule in which this step is the third: the second entry is the one that stands in for sigma = 1.
        row, std = kind.step(noise_level, np.array([1.0, sigma_max, sigma, sigma_next]), 2)
        rows.append(row)
        stds.append(std)
    coeffs = torch.tensor(rows, dtype=torch.float64).to(torch.float32)
    return coeffs, torch.tensor(stds, dtype=torch.float64).to(torch.float32)


_tables: OrderedDict[tuple[object, ...], ScheduleTable] = OrderedDict()


def schedule_table(
    schedule: tuple[Tensor, Tensor],
    kind: Kind,
    noise_levels: float | tuple[float, ...],
    device: torch.device,
    sigma_max: float | None = None,
) -> ScheduleTable:
    """The table of a schedule ``(sigmas [T+1], timesteps [T])`` on `device`, made once.

    It is known by the identity and version of the two tensors, so `set_timesteps` and in-place edits make a new one; a
    schedule that lies on an accelerator is read from it then, and only then.

    Raises:
        ValueError: no schedule was set, or its sigmas do not fall from at most 1 to at least 0.
    """
    sigmas, timesteps = schedule
    key = (
        id(sigmas),
        _version(sigmas),
        id(timesteps),
        _version(timesteps),
        kind,
        noise_levels,
        device,
        sigma_max,
    )
    table = _tables.get(key)
    if table is None:
        # The table outlives the call: made under inference_mode, it could never be replayed with gradient.
        with torch.inference_mode(False):
            table = _tables[key] = _make(schedule, kind, noise_levels, device, sigma_max)
        if len(_tables) > _MAX_TABLES:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return table


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _make(
    schedule: tuple[Tensor, Tensor],
    kind: Kind,
    noise_levels: float | tuple[float, ...],
    device: torch.device,
    sigma_max: float | None,
) -> ScheduleTable:
    sigmas, timesteps = (tensor.detach().cpu().float() for tensor in schedule)
    num_steps = len(timesteps)
    if len(sigmas) != num_steps + 1:
        raise ValueError(
            f"the scheduler has {len(sigmas)} sigmas for {num_steps} timesteps; call set_timesteps before a step"
        )
    values = sigmas.tolist()
    levels = noise_levels if isinstance(noise_levels, tuple) else (noise_levels,) * num_steps
    coeffs, std = make_table(list(itertools.pairwise(values)), sigma_max or values[1], kind, levels)
    unknown = torch.full((1,), torch.nan)
    last = 1000 * sigmas[-1:]
    host = torch.stack([timesteps, torch.cat([timesteps[1:], last])])
    return ScheduleTable(
        coeffs=coeffs.to(device),
        std=torch.cat([std, unknown]).to(device),
        dt=torch.cat([sigmas.diff(), unknown]).to(device),
        timesteps=host.to(device),
        host_timesteps=host,
        owners=schedule,
    )


def as_timesteps(name: str, timestep: float | Tensor, num_samples: int) -> Tensor:
    """Timesteps as fp32 `[N]`, N = 1 or B, where they lie.

    Raises:
        ValueError: another shape.
    """
    return as_vector(name, timestep, num_samples).float()


def as_vector(name: str, value: float | Tensor, num_samples: int) -> Tensor:
    """A number or one per sample as `[N]`, N = 1 or B; see `as_timesteps`."""
    values = torch.as_tensor(value).detach()
    if values.dim() > 1 or values.numel() not in (1, num_samples):
        raise ValueError(
            f"{name} is {list(values.shape)}; pass [1] for one that all samples share, or [{num_samples}]"
        )
    return values.reshape(-1)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """`[N]` as `[N, 1, ..., 1]`, broadcastable against `like` `[B, *S]`."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def sampled(latents: Tensor, velocity: Tensor, rows: StepRows, seed: Tensor) -> tuple[Tensor, Tensor]:
    """New next latents in the dtype of `latents`, and their log-prob `[B]`; no gradient."""
    out = flow_step(storable(latents), storable(velocity), rows.coeffs, rows.op_index, seed)
    return out.next_latents, out.log_prob


def scored(latents: Tensor, velocity: Tensor, next_latents: Tensor, rows: StepRows) -> tuple[Tensor, Tensor]:
    """Log-prob `[B]` and mean `[B, *S]`, fp32, differentiable in `velocity`."""
    out = flow_log_prob(
        storable(latents.detach()),
        storable(velocity),
        storable(next_latents.detach()),
        rows.coeffs,
        rows.op_index,
        extras=Extras(mean=True),
    )
    assert out.mean is not None
    return out.log_prob, out.mean


def storable(tensor: Tensor) -> Tensor:
    """As the ops take it: contiguous, and no wider than fp32, in which the peers compute."""
    return (tensor if tensor.dtype in _LOW_PRECISION else tensor.float()).contiguous()
