"""The transition as a diffusers scheduler: any flow pipeline samples with it and leaves log-probabilities behind.

    pipe.scheduler = FlowMatchTransitionScheduler.from_config(pipe.scheduler.config, dynamics="flow_sde")
    with pipe.scheduler.record() as walks:
        images = pipe(prompt).images
    walks[0].log_prob  # one [B] tensor per stochastic step

No step asks the device for a number: the coefficient table is made on the host once per walk, and the step is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from flowgrpo_fast.names import nearest
from flowgrpo_fast.ops import Extras, FlowStepOutput, flow_log_prob, flow_step
from flowgrpo_fast.schedule.dynamics import (
    CPS,
    DanceSDE,
    DPMSolver2M,
    Dynamics,
    Euler,
    FlowSDE,
    Solver,
    coefficients,
)
from flowgrpo_fast.schedule.sigmas import flow_sigmas_grid

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None

STOCHASTIC: dict[str, type[FlowSDE] | type[DanceSDE] | type[CPS]] = {
    "flow_sde": FlowSDE,
    "dance_sde": DanceSDE,
    "cps": CPS,
}
SOLVERS = ("euler", "dpmpp_2m")
_MAX_SEED = 2**63 - 1


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raises ``ValueError`` unless `value` is one of `known`; names the nearest."""
    names = list(known)
    if value not in names:
        raise ValueError(f"{name} is {value!r}; {nearest(str(value), names)}")


def check_same(reference: str, tensor: Tensor, **others: Tensor | None) -> None:
    """Raises ``ValueError`` unless all tensors are floating-point, of the shape and on the device of `tensor`."""
    for name, other in {reference: tensor, **others}.items():
        if other is None:
            continue
        if not isinstance(other, Tensor) or not other.is_floating_point():
            kind = other.dtype if isinstance(other, Tensor) else type(other).__name__
            raise ValueError(f"{name} is {kind}; pass a floating-point tensor")
        if other.shape != tensor.shape or other.dim() == 0:
            raise ValueError(
                f"{name} is {list(other.shape)} and {reference} is {list(tensor.shape)}; "
                "pass one shape [B, ...] for both"
            )
        if other.device != tensor.device:
            raise ValueError(
                f"{name} is on {other.device} and {reference} on {tensor.device}; move one to the other's device"
            )


def to_device(tensor: Tensor, device: str | torch.device | None) -> Tensor:
    """`tensor` on `device` (None = where it is); the host does not wait for a copy to an accelerator."""
    return tensor.to(device=device, non_blocking=tensor.device.type == "cpu")


def draw_seeds(generator: Generators, num_samples: int, device: torch.device) -> Tensor:
    """Noise seeds `[B]` int64 on `device`, one per sample.

    A list gives every sample the next draw of its own generator, as in diffusers. A generator on `device`, or none
    (torch's default one of `device`), costs no copy.

    Raises:
        ValueError: a list whose length is not `num_samples`.
    """
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        return to_device(torch.randint(_MAX_SEED, (num_samples,), generator=generator, device=source), device)
    if len(generator) != num_samples:
        raise ValueError(f"generator is a list of {len(generator)}; give one per sample, {num_samples}")
    draws = [torch.randint(_MAX_SEED, (1,), generator=g, device=g.device) for g in generator]
    return torch.cat([to_device(draw, device) for draw in draws])


class InheritedOptions(ConfigMixin):
    """Lets a scheduler take its parent's options as ``**kwargs`` and still load from a config that holds them.

    Configs of UniPC and DPM-Solver with flow sigmas (Wan, SANA) load too, with their own shift and grid.
    """

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As of diffusers.

        Raises:
            ValueError: the config is of a scheduler whose sigmas are no flow's, or are spaced in a way of its own.
        """
        given = config or {}
        if "beta_schedule" in given:  # every scheduler that can walk a variance-preserving path has one
            _check_flow(given)
            if "shift" not in given:
                kwargs.setdefault("shift", given["flow_shift"])
        made: Any = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        if "algorithm_type" in given or "predict_x0" in given:  # options of DPM-Solver, and of UniPC
            scheduler = made[0] if return_unused_kwargs else made
            scheduler.register_to_config(flow_grid="unipc" if "predict_x0" in given else "dpm")
        return made

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """The parent's schedule, on the grid of the scheduler whose config was loaded."""
        grid = self.config.get("flow_grid")
        if grid and sigmas is None and timesteps is None and num_inference_steps is not None:
            sigmas = flow_sigmas_grid(num_inference_steps, from_one=grid == "unipc").tolist()
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)  # type: ignore[misc]

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        keys = ConfigMixin._get_init_keys(input_class)
        if issubclass(input_class, FlowMatchEulerDiscreteScheduler):
            keys |= ConfigMixin._get_init_keys(FlowMatchEulerDiscreteScheduler)
        return keys


def _check_flow(config: Any) -> None:
    """Raises ``ValueError`` unless a config with betas asks for flow sigmas, evenly spaced and ending at 0."""
    name = config.get("_class_name", "a scheduler")
    if not config.get("use_flow_sigmas") or config.get("prediction_type") != "flow_prediction":
        raise ValueError(
            f"the config is of {name} with prediction_type {config.get('prediction_type')!r}; only flow models have "
            "these steps: pass the config of a flow-matching scheduler, or one with use_flow_sigmas=True"
        )
    other = [n for n in ("karras", "exponential", "beta") if config.get(f"use_{n}_sigmas")]
    if config.get("use_lu_lambdas"):
        other.append("lu")
    if other or config.get("final_sigmas_type", "zero") != "zero":
        raise ValueError(
            f"the config of {name} spaces its sigmas its own way ({', '.join(other) or 'final_sigmas_type'}); "
            "turn that off, or pass sigmas to set_timesteps of a FlowMatchEulerDiscreteScheduler's config"
        )


@dataclass
class TransitionOutput(FlowMatchEulerDiscreteSchedulerOutput):
    """What `FlowMatchTransitionScheduler.step` returns; the names are diffusers'."""

    prev_sample: Tensor  # type: ignore[assignment]  # [B, *S] the next latents, in the dtype of `sample`
    log_prob: Tensor  # [B] fp32; 0 at deterministic steps
    prev_sample_mean: Tensor | None = None  # [B, *S] fp32, with `return_mean`


@dataclass(slots=True, eq=False)
class WalkRecord:
    """The stochastic steps of one walk, in order; entry k of every list belongs to step `step_index[k]`.

    For the velocity that made the step, ``log_prob[k]`` is bit for bit
    ``flow_log_prob(latents[k], velocity, next_latents[k], coeffs, step_index[k])``.
    """

    coeffs: Tensor  # [T, 8] fp32
    seed: Tensor  # [B] int64
    step_index: list[int] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)  # [B, *S], before the step
    next_latents: list[Tensor] = field(default_factory=list)  # [B, *S], after it, as stored
    log_prob: list[Tensor] = field(default_factory=list)  # [B] fp32


@dataclass(frozen=True, slots=True, eq=False)
class _Walk:
    """One walk from a first step on: its table, and the seeds of its noise."""

    coeffs: Tensor  # [T, 8] fp32, on the device of the latents
    stochastic: frozenset[int]
    history: tuple[bool, ...]  # [T] steps that read the x0 prediction of the step before
    seed: Tensor  # [B] int64


class FlowMatchTransitionScheduler(InheritedOptions, FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    r"""`FlowMatchEulerDiscreteScheduler` whose step is `flow_step`: a stochastic set of steps, a solver for the others.

    `set_timesteps` (shift, mu, custom sigmas) is the parent's. A walk begins with the first `step` after it, at step
    0 or at `set_begin_index`; then its seeds are fixed: those of `set_seeds`, else drawn from the `generator` of
    that step, else from torch's default generator. Latents keep the dtype of `sample` (the parent casts them to
    the dtype of the model's output).

    Args:
        dynamics: "flow_sde" (arXiv 2505.05470), "dance_sde" (2505.07818), "cps" (2509.05952), or a deterministic
            "euler", "dpmpp_2m" (2211.01095).
        noise_level: of the stochastic dynamics.
        stochastic_steps: indices of the stochastic steps; None = all but the last. See `set_stochastic_steps`.
        solver: "euler" or "dpmpp_2m", the steps after the stochastic ones; those before are Euler steps.
        variant: "midpoint" or "heun", of dpmpp_2m.
        return_mean: whether `step` returns ``prev_sample_mean``, for one more pass over the latents.
        kwargs: options of `FlowMatchEulerDiscreteScheduler`.

    Raises:
        ValueError: an unknown name (with the nearest known one), or a noise level out of range.
    """

    sigmas: Tensor  # [T+1] fp32, host
    timesteps: Tensor  # [T] fp32
    _step_index: int | None  # type: ignore[assignment]

    def __init__(
        self,
        dynamics: str = "flow_sde",
        noise_level: float = 0.7,
        stochastic_steps: Sequence[int] | None = None,
        solver: str = "euler",
        variant: str = "midpoint",
        return_mean: bool = False,
        **kwargs: Any,
    ) -> None:
        check_choice("dynamics", dynamics, (*STOCHASTIC, *SOLVERS))
        check_choice("solver", solver, SOLVERS)
        if kwargs.get("stochastic_sampling"):
            raise ValueError(
                "stochastic_sampling is True; say dynamics='cps', noise_level=1 for it, and False here"
            )
        super().__init__(**kwargs)
        self.register_to_config(
            dynamics=dynamics,
            noise_level=noise_level,
            solver=solver,
            variant=variant,
            return_mean=return_mean,
        )
        self._dynamics: Dynamics | None = (
            STOCHASTIC[dynamics](noise_level=noise_level) if dynamics in STOCHASTIC else None
        )
        second_order = (solver if dynamics in STOCHASTIC else dynamics) == "dpmpp_2m"
        self._solver: Solver = DPMSolver2M(variant=variant) if second_order else Euler()  # type: ignore[arg-type]
        self._return_mean = return_mean
        self._walk: _Walk | None = None
        self._x0_pred: Tensor | None = None
        self._given_seeds: Tensor | torch.Generator | None = None
        self._walks: list[WalkRecord] | None = None
        self.set_stochastic_steps(stochastic_steps)

    def set_stochastic_steps(self, steps: Iterable[int] | None) -> None:
        """Which steps are stochastic from the next walk on: indices, ``()`` for none, or None for all but the last.

        A moving window: ``SlidingWindow(size=4).steps(num_steps, iteration, seed).stochastic``.
        """
        self._stochastic_steps = None if steps is None else tuple(sorted({int(step) for step in steps}))
        self.register_to_config(
            stochastic_steps=None if steps is None else list(self._stochastic_steps or ())
        )

    def set_seeds(self, seeds: Tensor | Sequence[int] | torch.Generator) -> None:
        """The noise seeds `[B]` (int64) of the next walk, one per sample, or a generator to draw them from; used once.

        Pipelines draw the start noise from their ``generator=`` and give it to no step: without this, the noise of the
        steps comes from torch's default generator.
        """
        if isinstance(seeds, torch.Generator):
            self._given_seeds = seeds
        else:
            self._given_seeds = torch.as_tensor(seeds, dtype=torch.int64)

    @property
    def seeds(self) -> Tensor | None:
        """The noise seeds `[B]` of the walk under way, or of the last one."""
        return None if self._walk is None else self._walk.seed

    @contextmanager
    def record(self) -> Iterator[list[WalkRecord]]:
        """Records the stochastic steps of every walk that begins inside, one `WalkRecord` each."""
        outer, self._walks = self._walks, []
        try:
            yield self._walks
        finally:
            self._walks = outer

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """The parent's schedule: `timesteps` `[T]` on `device`; `sigmas` `[T+1]` stay on the host, which reads them."""
        super().set_timesteps(num_inference_steps, "cpu", sigmas, mu, timesteps)
        self._host_timesteps = self.timesteps
        self.timesteps = to_device(self.timesteps, device)

    def step(  # noqa: PLR0913 (the parent's signature)
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> TransitionOutput | tuple[Tensor, Tensor]:
        """The next latents and their log-probability, without gradient (replay with `flow_log_prob`).

        Args:
            model_output: velocity `[B, *S]`.
            timestep: one of `timesteps`. Only the first step of a walk looks it up, if `set_begin_index` was not
                called and it is on the host; a walk whose timesteps are on the device counts from 0.
            sample: latents `[B, *S]`.
            s_churn, s_tmin, s_tmax, s_noise: unused, as in the parent.
            generator: see the class; read by the first step of a walk.
            per_token_timesteps: not supported.
            return_dict: False gives ``(prev_sample, log_prob)``.

        Raises:
            ValueError: shapes, dtypes or devices that differ; an unknown timestep; a step beyond the schedule.
        """
        check_same("sample", sample, model_output=model_output)
        if per_token_timesteps is not None:
            raise ValueError("per_token_timesteps is given; all elements of a sample must share one timestep")
        if self._step_index is None or self._walk is None:
            first = self._first_index(timestep)
            self._walk, self._step_index = self._begin_walk(first, sample, generator), first
        walk, index = self._walk, self._step_index
        if index >= len(walk.history):
            raise ValueError(f"step {index} of {len(walk.history)}; call set_timesteps before another walk")
        sample, velocity = sample.contiguous(), model_output.contiguous()
        out = flow_step(
            sample,
            velocity,
            walk.coeffs,
            index,
            walk.seed,
            x0_prev=self._x0_pred if walk.history[index] else None,
            return_x0_pred=index + 1 < len(walk.history) and walk.history[index + 1],
        )
        mean = self._mean(sample, velocity, out) if self._return_mean else None
        if self._walks is not None and index in walk.stochastic:
            self._note(index, sample, out)
        self._x0_pred = out.x0_pred
        self._step_index += 1
        if not return_dict:
            return (out.next_latents, out.log_prob)
        return TransitionOutput(out.next_latents, out.log_prob, mean)

    def _first_index(self, timestep: float | Tensor) -> int:
        """Where a walk begins; never a read from the device."""
        if self.begin_index is not None:
            return int(self.begin_index)
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            return 0
        value = float(timestep)
        found = (self._schedule() == value).nonzero().flatten().tolist()
        if isinstance(timestep, int) or not found:
            raise ValueError(
                f"timestep is {timestep!r}; pass one of scheduler.timesteps, "
                f"{self._host_timesteps.tolist()[:3]}... after set_timesteps"
            )
        return int(found[0])

    def _schedule(self) -> Tensor:
        if getattr(self, "num_inference_steps", None) is None:
            raise ValueError("the scheduler has no schedule yet; call set_timesteps first")
        return self._host_timesteps

    def _begin_walk(self, first: int, sample: Tensor, generator: Generators) -> _Walk:
        """Resolves table and seeds, all on the host but for the copies to the device."""
        num_steps = len(self._schedule())
        stochastic = self._resolve_steps(num_steps)
        with torch.inference_mode(False):  # a recorded table is replayed with gradient
            table = coefficients(
                self.sigmas.double().cpu().numpy(), self._rules(stochastic, num_steps, first)
            )
        seed = self._given_seeds
        if isinstance(seed, torch.Generator):
            seed = draw_seeds(seed, len(sample), sample.device)
        elif seed is None and stochastic:
            seed = draw_seeds(generator, len(sample), sample.device)
        elif seed is None:
            seed = torch.zeros(len(sample), dtype=torch.int64)
        if seed.shape != (len(sample),):
            raise ValueError(f"set_seeds got {list(seed.shape)} seeds; give one per sample, {len(sample)}")
        self._given_seeds, self._x0_pred = None, None
        history = tuple((table[:, 4] != 0).tolist())
        coeffs, seed = to_device(table, sample.device), to_device(seed, sample.device)
        walk = _Walk(coeffs, frozenset(stochastic), history, seed)
        if self._walks is not None:
            self._walks.append(WalkRecord(walk.coeffs, walk.seed))
        return walk

    def _resolve_steps(self, num_steps: int) -> tuple[int, ...]:
        if self._dynamics is None:
            return ()
        steps = self._stochastic_steps
        if steps is None:
            return tuple(range(num_steps - 1))
        if steps and not (steps[0] >= 0 and steps[-1] < num_steps - 1):
            raise ValueError(
                f"stochastic_steps is {list(steps)}; with {num_steps} steps give indices in [0, {num_steps - 2}]"
            )
        return steps

    def _rules(self, stochastic: tuple[int, ...], num_steps: int, first: int) -> list[Dynamics | Solver]:
        """Euler before the stochastic steps and where there is no history yet, the solver after them."""
        solver_from = max(stochastic, default=-1) + 1
        rules: list[Dynamics | Solver] = []
        for step in range(num_steps):
            if self._dynamics is not None and step in stochastic:
                rules.append(self._dynamics)
            else:
                rules.append(self._solver if step >= solver_from and step != first else Euler())
        return rules

    def _mean(self, sample: Tensor, velocity: Tensor, out: FlowStepOutput) -> Tensor:
        assert self._walk is not None
        assert self._step_index is not None
        index = self._step_index
        x0_prev = self._x0_pred if self._walk.history[index] else None
        with torch.no_grad():
            replayed = flow_log_prob(
                sample,
                velocity,
                out.next_latents,
                self._walk.coeffs,
                index,
                x0_prev=x0_prev,
                extras=Extras(mean=True),
            )
        assert replayed.mean is not None
        return replayed.mean

    def _note(self, index: int, sample: Tensor, out: FlowStepOutput) -> None:
        assert self._walks is not None
        assert self._walk is not None
        if not self._walks:  # recording began in the middle of a walk
            self._walks.append(WalkRecord(self._walk.coeffs, self._walk.seed))
        record = self._walks[-1]
        record.step_index.append(index)
        record.latents.append(_replayable(sample))
        record.next_latents.append(_replayable(out.next_latents))
        record.log_prob.append(_replayable(out.log_prob))


def _replayable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one made under `torch.inference_mode`, which autograd could not save for a backward."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


# SchedulerMixin too: a saved pipeline is loaded by looking for diffusers' base class in the module of each part.
__all__ = ["FlowMatchTransitionScheduler", "SchedulerMixin", "TransitionOutput", "WalkRecord", "draw_seeds"]
