"""Flow-Factory's SDE scheduler over our op: its constructor, its step, its modes, its conventions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from flowgrpo_fast.compat.scheduler import (
    Generators,
    InheritedOptions,
    check_choice,
    check_same,
    draw_seeds,
    to_device,
)
from flowgrpo_fast.compat.tables import (
    COEFFICIENT_PRESERVING,
    DANCE_SDE,
    FLOW_SDE,
    ODE,
    Kind,
    StepRows,
    as_timesteps,
    as_vector,
    find_steps,
    make_table,
    per_sample,
    sampled,
    schedule_table,
    scored,
)

# SchedulerMixin too: a saved pipeline is loaded by looking for diffusers' base class in the module of each part.
__all__ = ["FlowMatchEulerDiscreteSDEScheduler", "SDESchedulerMixin", "SDESchedulerOutput", "SchedulerMixin"]

_KINDS: dict[str, Kind] = {
    "Flow-SDE": FLOW_SDE,
    "Dance-SDE": DANCE_SDE,
    "CPS": COEFFICIENT_PRESERVING,
    "ODE": ODE,
}
_FIELDS = ("next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob", "noise_pred")  # of the record
# What comes back without return_dict.
_TUPLE = ("next_latents", "next_latents_mean", "noise_pred", "log_prob", "std_dev_t", "dt")


@dataclass
class SDESchedulerOutput(BaseOutput):
    """What a step returns; a field that was not asked for is None. N is 1 or B."""

    next_latents: Tensor | None = None  # [B, *S], as stored
    next_latents_mean: Tensor | None = None  # [B, *S] fp32
    std_dev_t: Tensor | None = None  # [N, 1, ...] fp32
    dt: Tensor | None = None  # [N, 1, ...] fp32, negative
    log_prob: Tensor | None = None  # [B] fp32
    noise_pred: Tensor | None = None  # [B, *S] fp32

    def to_dict(self) -> dict[str, Any]:
        """All fields by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SDESchedulerOutput:
        """From a dict that may hold other keys too."""
        return cls(**{name: data[name] for name in _FIELDS if name in data})


class SDESchedulerMixin:
    """Modes and the set of stochastic steps, over a scheduler's `timesteps` and `sigmas`."""

    timesteps: Tensor  # [T]
    sigmas: Tensor  # [T+1]
    noise_level: float
    seed: int
    dynamics_type: str
    _sde_steps: tuple[int, ...] | None
    _num_sde_steps: int | None
    _is_eval: bool = False

    @property
    def is_eval(self) -> bool:
        """Whether steps are deterministic."""
        return self._is_eval

    def eval(self) -> None:
        """Deterministic steps from now on: noise level 0."""
        self._is_eval = True

    def train(self, mode: bool = True) -> None:
        """Stochastic steps from now on; `mode` False is `eval`."""
        self._is_eval = not mode

    def rollout(self, mode: bool = True) -> None:
        """The same as `train`."""
        self.train(mode)

    def set_seed(self, seed: int) -> None:
        """The seed that picks `current_sde_steps`."""
        self.seed = seed

    @property
    def sde_steps(self) -> Tensor:
        """Indices of the steps that may be stochastic, int64; all but the last unless given."""
        steps = range(len(self.timesteps) - 1) if self._sde_steps is None else self._sde_steps
        return torch.tensor(list(steps), dtype=torch.int64)

    @property
    def num_sde_steps(self) -> int:
        """How many of them are stochastic at a time; all unless given."""
        return len(self.sde_steps) if self._num_sde_steps is None else self._num_sde_steps

    @property
    def current_sde_steps(self) -> Tensor:
        """Indices of the stochastic steps, int64: `num_sde_steps` of `sde_steps` picked by `seed`, the same every time.

        Raises:
            ValueError: a step outside the schedule.
        """
        steps, num_steps = self.sde_steps, len(self.timesteps)
        if len(steps) and (int(steps.min()) < 0 or int(steps.max()) >= num_steps):
            raise ValueError(
                f"sde_steps is {steps.tolist()}; with {num_steps} steps give indices in [0, {num_steps - 1}]"
            )
        if self.num_sde_steps >= len(steps):
            return steps
        order = torch.randperm(len(steps), generator=torch.Generator().manual_seed(self.seed))
        return steps[order[: self.num_sde_steps]]

    @property
    def train_timesteps(self) -> Tensor:
        """Indices of the steps to train on: `current_sde_steps`."""
        return self.current_sde_steps

    def get_train_timesteps(self) -> Tensor:
        """Timesteps of the steps to train on, on the schedule's device."""
        return self.timesteps[self.train_timesteps.to(self.timesteps.device)]

    def get_train_sigmas(self) -> Tensor:
        """Sigmas of the steps to train on, on the schedule's device."""
        return self.sigmas[self.train_timesteps.to(self.sigmas.device)]

    def get_noise_levels(self) -> Tensor:
        """Noise level of every step `[T]` fp32: `noise_level` at the stochastic ones, else 0."""
        return torch.tensor(self._noise_levels()).to(self.timesteps.device)

    def get_noise_level_for_timestep(self, timestep: float | Tensor) -> float | Tensor:
        """Noise level at a timestep (a number in, a float out) or at several `[N]` (a tensor of their dtype)."""
        return self._noise_level_at("timestep", timestep, self.timesteps)

    def get_noise_level_for_sigma(self, sigma: float | Tensor) -> float | Tensor:
        """Noise level at a sigma (a number in, a float out) or at several `[N]` (a tensor of their dtype)."""
        return self._noise_level_at("sigma", sigma, self.sigmas[:-1])

    def _noise_levels(self) -> tuple[float, ...]:
        stochastic = set(self.current_sde_steps.tolist())
        return tuple(float(self.noise_level) if i in stochastic else 0.0 for i in range(len(self.timesteps)))

    def _noise_level_at(self, name: str, value: float | Tensor, schedule: Tensor) -> float | Tensor:
        """Of entries of a schedule `[T]`; on a device an unknown one gives NaN, on the host a ``ValueError``."""
        given = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else schedule.dtype)
        known = schedule.to(given.device)
        index, found = find_steps(known[None], given.reshape(-1))
        if given.device.type == "cpu" and not bool(found.all()):
            missing = given.reshape(-1)[~found][0].item()
            raise ValueError(f"{name} {missing:g} is not in the schedule; pass entries of scheduler.{name}s")
        levels = to_device(torch.tensor(self._noise_levels()), given.device).index_select(0, index)
        levels = torch.where(found, levels, torch.nan).to(given.dtype).reshape(given.shape)
        return levels if isinstance(value, Tensor) and value.dim() else float(levels)


class _Step(NamedTuple):
    """Where a step begins and ends, and how it moves, as `step` was told."""

    timestep: float | Tensor
    timestep_next: float | Tensor | None
    noise_level: float | Tensor | None
    kind: Kind
    sigma_max: float | None


class FlowMatchEulerDiscreteSDEScheduler(  # type: ignore[misc]
    SDESchedulerMixin, InheritedOptions, FlowMatchEulerDiscreteScheduler
):
    """Flow-Factory's scheduler.

    Args:
        noise_level: at least 0.
        sde_steps: indices of the steps that may be stochastic; None = all but the last.
        num_sde_steps: how many of them are at a time, picked by `seed`; None = all.
        seed: see `set_seed`.
        dynamics_type: "Flow-SDE", "Dance-SDE", "CPS" or "ODE".
        kwargs: options of `FlowMatchEulerDiscreteScheduler`.

    Raises:
        ValueError: an unknown `dynamics_type` (with the nearest known one) or a negative `noise_level`.
    """

    def __init__(
        self,
        noise_level: float = 0.7,
        sde_steps: int | Sequence[int] | Tensor | None = None,
        num_sde_steps: int | None = None,
        seed: int = 42,
        dynamics_type: str = "Flow-SDE",
        **kwargs: Any,
    ) -> None:
        check_choice("dynamics_type", dynamics_type, _KINDS)
        _check_level(noise_level)
        super().__init__(**kwargs)
        self.noise_level, self.seed, self.dynamics_type = noise_level, seed, dynamics_type
        steps = None if sde_steps is None else torch.as_tensor(sde_steps, dtype=torch.int64).reshape(-1)
        self._sde_steps = None if steps is None else tuple(steps.tolist())
        self._num_sde_steps = num_sde_steps
        self._is_eval = False
        self.register_to_config(
            noise_level=noise_level,
            sde_steps=None if self._sde_steps is None else list(self._sde_steps),
            num_sde_steps=num_sde_steps,
            seed=seed,
            dynamics_type=dynamics_type,
        )

    def step(  # type: ignore[override]  # noqa: PLR0913 (Flow-Factory's signature)
        self,
        noise_pred: Tensor,
        timestep: float | Tensor,
        latents: Tensor,
        next_latents: Tensor | None = None,
        timestep_next: float | Tensor | None = None,
        generator: Generators = None,
        noise_level: float | Tensor | None = None,
        compute_log_prob: bool = True,
        return_dict: bool = True,
        return_kwargs: Sequence[str] = _FIELDS,
        dynamics_type: str | None = None,
        sigma_max: float | None = None,
    ) -> SDESchedulerOutput | tuple[Tensor | None, ...]:
        """Samples a step, or scores one that was taken; differentiable in `noise_pred` through log-prob and mean.

        A new sample is rounded to the dtype of `latents` before it is scored, so a stored one scores the same bits.

        Args:
            noise_pred: velocity `[B, *S]`.
            timestep: entries of `timesteps`, `[]`, `[1]` or `[B]`; integers are step indices.
            latents: `[B, *S]`.
            next_latents: `[B, *S]` to score; None samples them.
            timestep_next: where the step ends. On the host both need not be in the schedule then; on a device they
                must be the ends of one of its steps, else the outputs are NaN.
            generator: one or a list of B, from which noise seeds are drawn; None = torch's default.
            noise_level: a number, or `[]`, `[1]`, `[B]` (read on the host). None = the scheduler's at the
                `current_sde_steps`, 0 elsewhere. 0 is an Euler step, with log-prob 0.
            compute_log_prob: False leaves ``log_prob`` None.
            return_dict: False gives ``(next_latents, next_latents_mean, noise_pred, log_prob, std_dev_t, dt)``.
            return_kwargs: the fields to return in the output record.
            dynamics_type: instead of the scheduler's.
            sigma_max: stands in for sigma = 1 in Flow-SDE's denominator; None = ``sigmas[1]``.

        Returns:
            ``std_dev_t`` is the noise rate without sqrt(-dt) for "Flow-SDE" and "Dance-SDE", the whole std for "CPS",
            0 for "ODE".

        Raises:
            ValueError: unknown names, shapes or devices that differ, a timestep on the host outside the schedule.
        """
        kind = _KINDS[self._resolve_dynamics(dynamics_type)]
        check_same("latents", latents, noise_pred=noise_pred, next_latents=next_latents)
        rows = self._rows(_Step(timestep, timestep_next, noise_level, kind, sigma_max), latents)
        wants_mean = not return_dict or "next_latents_mean" in return_kwargs
        log_prob = mean = None
        if next_latents is None:
            seed = draw_seeds(generator, len(latents), latents.device)
            next_latents, log_prob = sampled(latents.detach(), noise_pred.detach(), rows, seed)
        if wants_mean or (compute_log_prob and (log_prob is None or torch.is_grad_enabled())):
            log_prob, mean = scored(latents, noise_pred, next_latents, rows)
        std, dt = per_sample(rows.std, latents), per_sample(rows.dt, latents)
        values = (next_latents, mean, noise_pred.float(), log_prob if compute_log_prob else None, std, dt)
        return _select(values, return_kwargs) if return_dict else values

    def _resolve_dynamics(self, dynamics_type: str | None) -> str:
        name = self.dynamics_type if dynamics_type is None else dynamics_type
        check_choice("dynamics_type", name, _KINDS)
        return "ODE" if self.is_eval else name

    def _rows(self, step: _Step, latents: Tensor) -> StepRows:
        """Of the schedule's table where that has them; of a table for this call alone where it does not."""
        level = step.noise_level
        if isinstance(level, Tensor) and step.kind.is_stochastic:
            return self._rows_of_this_call(step, latents)
        if level is None or isinstance(level, Tensor):
            levels: float | tuple[float, ...] = 0.0 if not step.kind.is_stochastic else self._noise_levels()
        else:
            levels = float(level)
        for value in levels if isinstance(levels, tuple) else (levels,):
            _check_level(value)
        table = schedule_table(
            (self.sigmas, self.timesteps), step.kind, levels, latents.device, step.sigma_max
        )
        if _is_index(step.timestep):
            return table.rows_at(self._checked_index(step.timestep, len(latents)))
        timestep = as_timesteps("timestep", step.timestep, len(latents))
        if step.timestep_next is None:
            return table.rows(timestep)
        timestep_next = as_timesteps("timestep_next", step.timestep_next, len(latents))
        if timestep.device.type == "cpu" and timestep_next.device.type == "cpu":
            _, found = find_steps(table.host_timesteps, timestep, timestep_next)
            if not bool(found.all()):
                return self._rows_of_this_call(step, latents)
        return table.rows(timestep, timestep_next)

    def _rows_of_this_call(self, step: _Step, latents: Tensor) -> StepRows:
        """A table made on the host, a row per timestep given: noise levels per sample, steps off the schedule."""
        num_samples = len(latents)
        if step.noise_level is None and step.kind.is_stochastic:
            raise ValueError(
                "timestep and timestep_next are no step of the schedule; pass noise_level with them"
            )
        level = 0.0 if step.noise_level is None else step.noise_level
        begins, ends = self._ends(step, num_samples)
        levels = (
            as_vector("noise_level", level, num_samples).tolist()
            if isinstance(level, Tensor)
            else [float(level)]
        )
        num_rows = max(len(begins), len(ends), len(levels))
        begins, ends, levels = (v * num_rows if len(v) == 1 else v for v in (begins, ends, levels))
        for value in levels:
            _check_level(value)
        sigma_max = step.sigma_max or float(self.sigmas[1])
        coeffs, std = make_table(list(zip(begins, ends, strict=True)), sigma_max, step.kind, levels)
        dt = torch.tensor(ends) - torch.tensor(begins)
        return StepRows(*(to_device(v, latents.device) for v in (coeffs, torch.arange(num_rows), std, dt)))

    def _ends(self, step: _Step, num_samples: int) -> tuple[list[float], list[float]]:
        """Sigmas at which the step begins and ends, one or one per sample, read on the host."""
        if _is_index(step.timestep):
            index = self._checked_index(step.timestep, num_samples)
        else:
            timestep = as_timesteps("timestep", step.timestep, num_samples).cpu()
            if step.timestep_next is not None:
                end = as_timesteps("timestep_next", step.timestep_next, num_samples).cpu()
                return (timestep / 1000).tolist(), (end / 1000).tolist()
            table = schedule_table((self.sigmas, self.timesteps), ODE, 0.0, torch.device("cpu"))
            index = table.rows(timestep).step_index
        sigmas = self.sigmas.cpu()
        return sigmas[index].tolist(), sigmas[index + 1].tolist()

    def _checked_index(self, timestep: float | Tensor, num_samples: int) -> Tensor:
        """Integers as step indices `[N]` int64, on the host."""
        index = as_vector("timestep", timestep, num_samples).long().cpu()
        last = len(self.timesteps) - 1
        if int(index.min()) < 0 or int(index.max()) > last:
            raise ValueError(
                f"timestep is {index.tolist()}; integers are step indices, and must be in [0, {last}]"
            )
        return index


def _select(values: Sequence[Tensor | None], names: Sequence[str]) -> SDESchedulerOutput:
    for name in names:
        check_choice("return_kwargs entry", name, _TUPLE)
    by_name = dict(zip(_TUPLE, values, strict=True))
    return SDESchedulerOutput.from_dict({name: by_name[name] for name in names})


def _is_index(timestep: float | Tensor) -> bool:
    return isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point())


def _check_level(noise_level: float) -> None:
    if not noise_level >= 0:
        raise ValueError(f"noise_level is {noise_level}; it must be at least 0")
