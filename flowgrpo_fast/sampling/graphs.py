"""One step of a rollout as a CUDA graph, captured once per shape and replayed at every step of every rollout.

The rows of the table live on the device, so stochastic and deterministic steps of a shape are the same graph. Inputs
are static buffers that all shapes share, the smaller ones as leading rows of the largest; outputs live in one memory
pool and are copied out before the next replay. Weights are read where they are: an update in place is seen, as is a
snapshot's, whose own memory the pointers of its capture name.

A step that waits for the device is found out before it is captured: a capture that fails can leave torch's allocator
capturing, and every later one failing. Without a CUDA device, or where a step cannot be captured, the same function
runs on the same buffers, uncaptured.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowgrpo_fast.device import DEVICE
from flowgrpo_fast.ops import FlowStepOutput, Guidance
from flowgrpo_fast.sampling.policy import Policy
from flowgrpo_fast.sampling.step import Ask, StepInput, StepResult, Wanted, row_slices, take_step
from flowgrpo_fast.types import Conditioning, FlowModel

_MOST_LAYOUTS = 8  # say of prompts padded to the longest of a step; the oldest makes room
_WARM_UP = 3  # runs before a capture: workspaces, autotuning, compilation; the last one is watched
_PATIENCE = 60.0  # seconds for rewards in other threads to end before a capture


class _Key(NamedTuple):
    """What steps have in common that are one graph."""

    model: FlowModel  # by itself: two views of one module are two
    rows: int  # of a micro-batch
    fan: int
    repeats: bool  # children of a row are one, copied
    carries_x0: bool
    gives_velocity: bool
    gives_unconditional: bool
    layout: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Static inputs of up to N rows."""

    given: StepInput
    coeffs: Tensor  # [N, 8]

    def rows(self, num_rows: int, fan: int) -> StepInput:
        """The leading rows: views, whose addresses never change."""
        given = self.given
        assert isinstance(given.row, Tensor)
        return StepInput(
            given.latents[:num_rows],
            given.conditioning.rows(slice(num_rows)),
            given.seed[: num_rows * fan],
            given.row[: num_rows * fan],
            None if given.x0_pred is None else given.x0_pred[:num_rows],
        )


@dataclass(slots=True)
class StepGraph:
    """One shape's step on its static buffers: `replay` computes `result` again from what they hold."""

    policy: Policy  # kept alive: the graph names its model's memory
    given: StepInput
    run: Callable[[], StepResult]
    graph: torch.cuda.CUDAGraph | None = None
    result: StepResult | None = None

    def capture(self, pool: Any, side: torch.cuda.Stream) -> None:
        """Records one run, after a few, on a side stream.

        Raises:
            RuntimeError: a run waits for the device, or does what else cannot be captured. Later captures may succeed.
        """
        main = torch.cuda.current_stream(self.given.latents.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP - 1):
                self.run()
            mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                self.run()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # torch's own stream for captures is of whichever device was current first.
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                result = self.run()
        except BaseException:
            _end_allocation(self.given.latents.device, pool)
            raise
        finally:
            torch.cuda.set_stream(main)  # a capture that fails stays on its own
        self.graph, self.result = graph, result

    def replay(self) -> StepResult:
        """The step's outputs, valid until the next replay of any graph of the pool."""
        if self.graph is None:
            return self.run()
        self.graph.replay()
        assert self.result is not None
        return self.result


@dataclass(slots=True)
class Graphs:
    """The captured steps of a run."""

    captured: dict[_Key, StepGraph] = field(default_factory=dict)
    _buffers: dict[tuple[Any, ...], _Buffers] = field(default_factory=dict)
    _now: tuple[_Buffers, tuple[Any, ...]] | None = None
    _pool: Any = None
    _side: torch.cuda.Stream | None = None  # of all captures, as the pool is
    _refused: bool = False

    def begin(self, steps: Sequence[tuple[Policy, Wanted, Ask]], given: StepInput, coeffs: Tensor) -> None:
        """Captures what a rollout needs and has not been captured yet, the largest first.

        Args:
            steps: who is asked, for what, at every step.
            given: the first step's input, for layout.
        """
        carries_x0 = any(wanted.reads_x0 or wanted.gives_x0 for _, wanted, _ in steps)
        num_rows = max(min(ask.rows, ask.num_heads) for _, _, ask in steps)
        num_children = max(min(ask.rows, ask.num_heads) * ask.fan for _, _, ask in steps)
        # A respaced tail makes the table shorter at times: the buffers keep the longest they have seen.
        longest = max([len(coeffs), *(len(b.coeffs) for b in self._buffers.values())])
        policy = steps[0][0]
        layout = (carries_x0, policy.guidance_scale, policy.precision, *_layout(given))
        buffers = self._buffers.get(layout)
        too_small = (
            buffers is None
            or len(buffers.given.latents) < num_rows
            or len(buffers.given.seed) < num_children
            or len(buffers.coeffs) < len(coeffs)
        )
        if buffers is None or too_small:
            self._forget(layout)
            if len(self._buffers) == _MOST_LAYOUTS:
                self._forget(next(iter(self._buffers)))
            buffers = _allocate(given, coeffs.new_zeros(longest, 8), num_rows, num_children, carries_x0)
            self._buffers[layout] = buffers
        buffers.coeffs[: len(coeffs)].copy_(coeffs)
        self._now = buffers, layout
        needed: dict[_Key, tuple[Policy, Wanted]] = {}
        for policy, wanted, ask in steps:
            for part in row_slices(ask.num_heads, ask.rows):
                needed.setdefault(self._key(policy, wanted, part.stop - part.start), (policy, wanted))
        for key, (policy, wanted) in sorted(needed.items(), key=lambda item: -item[0].rows * item[0].fan):
            if key not in self.captured:
                self.captured[key] = self._make(policy, wanted, key, buffers)

    def take_step(self, policy: Policy, given: StepInput, wanted: Wanted) -> StepResult:
        """One step of all rows, micro-batch after micro-batch, as `sampling.step.take_step`."""
        parts = []
        for rows in row_slices(len(given.latents), wanted.rows):
            graph = self.captured[self._key(policy, wanted, rows.stop - rows.start)]
            _fill(graph.given, given, rows, wanted.fan)
            parts.append(_copied(graph.replay()))
        return _joined(parts)

    def _forget(self, layout: tuple[Any, ...]) -> None:
        self._buffers.pop(layout, None)
        self.captured = {key: graph for key, graph in self.captured.items() if key.layout != layout}

    def _key(self, policy: Policy, wanted: Wanted, rows: int) -> _Key:
        assert self._now is not None
        layout = self._now[1]
        return _Key(
            policy.model,
            rows,
            wanted.fan,
            wanted.fan > 1 and not wanted.noisy,
            bool(layout[0]),
            wanted.gives_velocity,
            wanted.gives_unconditional,
            layout,
        )

    def _make(self, policy: Policy, wanted: Wanted, key: _Key, buffers: _Buffers) -> StepGraph:
        given = buffers.rows(key.rows, key.fan)
        # A row of the table without history multiplies the x0 prediction by 0: one graph serves both kinds.
        fixed = replace(wanted, rows=key.rows, reads_x0=key.carries_x0, gives_x0=key.carries_x0)

        @torch.no_grad()
        def run() -> StepResult:
            return take_step(policy, given, buffers.coeffs, fixed)

        graph = StepGraph(policy, given, run)
        if _on_cuda(given) and not self._refused:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._side = self._side or torch.cuda.Stream(given.latents.device)
            try:
                with DEVICE.exclusive(_PATIENCE) as alone:
                    if not alone:
                        raise RuntimeError(f"a reward in another thread did not end within {_PATIENCE:.0f} s")
                    graph.capture(self._pool, self._side)
            except RuntimeError as error:  # the driver's and torch's own are
                self._refused = True
                line = str(_first(error)).strip().splitlines()[0]
                message = f"graphs: a step of {key.rows} rows cannot be captured ({line})"
                warnings.warn(f"{message}; steps are launched one by one", RuntimeWarning, stacklevel=4)
        return graph


def _first(error: BaseException) -> BaseException:
    """What broke a capture, which then broke at its end once more."""
    return error if error.__context__ is None else _first(error.__context__)


def _end_allocation(device: torch.device, pool: Any) -> None:
    """Before torch 2.12 a capture that fails at its end leaves the allocator capturing into its pool."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 12):
        with contextlib.suppress(RuntimeError):  # it had not begun
            torch._C._cuda_endAllocateToPool(device.index, pool)


def _on_cuda(given: StepInput) -> bool:
    return given.latents.is_cuda


def _layout(given: StepInput) -> tuple[Any, ...]:
    """What must agree for two inputs to share buffers."""
    named = [("latents", given.latents), *_tensors(given.conditioning)]
    return tuple((name, tuple(t.shape[1:]), t.dtype, t.device, t.stride(0) == 0) for name, t in named)


def _tensors(conditioning: Conditioning) -> list[tuple[str, Tensor]]:
    own = [(f.name, getattr(conditioning, f.name)) for f in fields(conditioning) if f.name != "extra"]
    return [(name, t) for name, t in own if t is not None] + sorted(conditioning.extra.items())


def _allocate(
    given: StepInput, coeffs: Tensor, num_rows: int, num_children: int, carries_x0: bool
) -> _Buffers:
    def empty(like: Tensor) -> Tensor:
        if like.stride(0) == 0:  # one row stands for all
            return torch.zeros_like(like[:1]).expand(num_rows, *like.shape[1:])
        return like.new_zeros(num_rows, *like.shape[1:])

    conditioning = given.conditioning
    own = {name: empty(t) for name, t in _tensors(replace(conditioning, extra={}))}
    extra = {name: empty(t) for name, t in conditioning.extra.items()}
    latents = empty(given.latents)
    real = torch.float64 if latents.dtype is torch.float64 else torch.float32
    return _Buffers(
        given=StepInput(
            latents=latents,
            conditioning=replace(conditioning, **own, extra=extra),
            seed=given.seed.new_zeros(num_children),
            row=given.seed.new_zeros(num_children),
            x0_pred=torch.zeros_like(latents, dtype=real) if carries_x0 else None,
        ),
        coeffs=coeffs,
    )


def _fill(buffer: StepInput, given: StepInput, rows: slice, fan: int) -> None:
    """Copies one micro-batch into the static inputs."""
    children = slice(rows.start * fan, rows.stop * fan)
    buffer.latents.copy_(given.latents[rows])
    buffer.seed.copy_(given.seed[children])
    assert isinstance(buffer.row, Tensor)
    if isinstance(given.row, Tensor):
        buffer.row.copy_(given.row[children])
    else:
        buffer.row.fill_(given.row)
    if buffer.x0_pred is not None:
        if given.x0_pred is None:
            buffer.x0_pred.zero_()
        else:
            buffer.x0_pred.copy_(given.x0_pred[rows])
    pairs = zip(_tensors(buffer.conditioning), _tensors(given.conditioning), strict=True)
    for (_, static), (_, value) in pairs:
        if static.stride(0) == 0:
            static[:1].copy_(value[:1])
        else:
            static.copy_(value[rows])


def _copied(result: StepResult) -> StepResult:
    out, guidance = result.out, result.guidance
    return StepResult(
        FlowStepOutput(*(None if t is None else t.clone() for t in out)),  # type: ignore[arg-type]
        None if result.velocity is None else result.velocity.clone(),
        None if guidance is None else Guidance(guidance.negative_velocity.clone(), guidance.scale),
        None if result.unconditional is None else result.unconditional.clone(),
    )


def _joined(parts: list[StepResult]) -> StepResult:
    """Micro-batches as one."""
    if len(parts) == 1:
        return parts[0]

    def cat(tensors: list[Tensor | None]) -> Tensor | None:
        return None if tensors[0] is None else torch.cat([t for t in tensors if t is not None])

    velocity = cat([part.velocity for part in parts])
    negative = cat([part.guidance.negative_velocity if part.guidance else None for part in parts])
    first = parts[0].guidance
    columns = zip(*(part.out for part in parts), strict=True)
    out = FlowStepOutput(*(cat(list(column)) for column in columns))  # type: ignore[arg-type]
    guidance = Guidance(negative, first.scale) if negative is not None and first is not None else None
    return StepResult(out, velocity, guidance, cat([part.unconditional for part in parts]))
