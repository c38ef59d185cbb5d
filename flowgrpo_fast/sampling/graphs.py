"""One step of a rollout as a CUDA graph, captured once per shape and replayed at every step of every rollout.

The step's index lives on the device, so stochastic and deterministic steps of a shape are the same graph. Inputs are
static buffers that all shapes share, the smaller ones as leading rows of the largest; outputs live in one memory pool
and are copied out before the next replay. Weights are read where they are: an update in place is seen, as is a
snapshot's, whose own memory the pointers of its capture name.

Without a CUDA device, or where a capture failed, the same function runs on the same buffers, uncaptured.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from flowgrpo_fast.ops import FlowStepOutput, Guidance
from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.sampling.step import Launch, StepInput, StepResult, row_slices, take_step
from flowgrpo_fast.types import Conditioning, FlowModel

_MOST_LAYOUTS = 8  # say of prompts padded to the longest of a step; the oldest makes room
_WARM_UP = 3  # runs before a capture: workspaces, autotuning, compilation

# The model, rows of a micro-batch, what a row becomes, whether x0, velocity and unconditional half come out, layout.
_Key = tuple[FlowModel, int, int, bool, bool, bool, tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Static inputs of up to N rows."""

    given: StepInput
    coeffs: Tensor  # [T, 8]
    step: Tensor  # [] int64

    def rows(self, num_rows: int, num_samples: int) -> StepInput:
        """The leading rows: views, whose addresses never change."""
        given = self.given
        return StepInput(
            given.latents[:num_rows],
            given.conditioning.rows(slice(num_rows)),
            given.seed[:num_samples],
            None if given.x0_pred is None else given.x0_pred[:num_rows],
        )


@dataclass(slots=True)
class StepGraph:
    """One shape's step on its static buffers: `replay` computes `result` again from what they hold."""

    model: FlowModel  # kept alive: the graph names its memory
    given: StepInput
    run: Callable[[], StepResult]
    graph: torch.cuda.CUDAGraph | None = None
    result: StepResult | None = None

    def capture(self, pool: Any, side: torch.cuda.Stream) -> None:
        """Records one run, after a few, on a side stream. Other threads, say rewards, may use the device meanwhile."""
        main = torch.cuda.current_stream(self.given.latents.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self.run()
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # torch's own stream for captures is of whichever device was current first.
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                result = self.run()
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

    def begin(
        self,
        models: Sequence[FlowModel],
        shapes: Sequence[Launch],
        given: StepInput,
        coeffs: Tensor,
        recipe: Recipe,
    ) -> None:
        """Captures what a rollout needs and has not been captured yet, the largest first.

        Args:
            models, shapes: one a step.
            given: the first step's input, for layout.
        """
        carries_x0 = any(shape.reads_x0 or shape.gives_x0 for shape in shapes)
        num_rows = max(min(shape.rows, shape.num_rows) for shape in shapes)
        num_samples = max(min(shape.rows, shape.num_rows) * shape.size for shape in shapes)
        table = max(len(coeffs), recipe.sigmas.num_inference_steps)  # a respaced tail is shorter at times
        layout = (carries_x0, table, recipe.guidance_scale, recipe.precision, *_layout(given))
        buffers = self._buffers.get(layout)
        too_small = (
            buffers is None or len(buffers.given.latents) < num_rows or len(buffers.given.seed) < num_samples
        )
        if buffers is None or too_small:
            self._forget(layout)
            if len(self._buffers) == _MOST_LAYOUTS:
                self._forget(next(iter(self._buffers)))
            buffers = _allocate(given, coeffs.new_zeros(table, 8), num_rows, num_samples, carries_x0)
            self._buffers[layout] = buffers
        buffers.coeffs[: len(coeffs)].copy_(coeffs)
        self._now = buffers, layout
        wanted: dict[_Key, tuple[FlowModel, Launch, int]] = {}
        for model, shape in zip(models, shapes, strict=True):
            for part in row_slices(shape.num_rows, shape.rows):
                rows = part.stop - part.start
                wanted.setdefault(self._key(model, shape, rows), (model, shape, rows))
        for key, (model, shape, rows) in sorted(
            wanted.items(), key=lambda item: -item[1][2] * item[1][1].size
        ):
            if key not in self.captured:
                self.captured[key] = self._make(model, shape, rows, buffers, recipe)

    def take_step(self, model: FlowModel, given: StepInput, shape: Launch) -> StepResult:
        """One step of all rows, micro-batch after micro-batch, as `sampling.step.take_step`."""
        assert self._now is not None
        self._now[0].step.fill_(shape.step)
        parts = []
        for rows in row_slices(shape.num_rows, shape.rows):
            graph = self.captured[self._key(model, shape, rows.stop - rows.start)]
            _fill(graph.given, given, rows, shape.size)
            parts.append(_copied(graph.replay()))
        return _joined(parts)

    def _forget(self, layout: tuple[Any, ...]) -> None:
        self._buffers.pop(layout, None)
        self.captured = {key: graph for key, graph in self.captured.items() if key[-1] != layout}

    def _key(self, model: FlowModel, shape: Launch, rows: int) -> _Key:
        assert self._now is not None
        layout = self._now[1]
        return (
            model,
            rows,
            shape.size,
            bool(layout[0]),
            shape.gives_velocity,
            shape.gives_unconditional,
            layout,
        )

    def _make(
        self, model: FlowModel, shape: Launch, rows: int, buffers: _Buffers, recipe: Recipe
    ) -> StepGraph:
        given = buffers.rows(rows, rows * shape.size)
        carries_x0 = given.x0_pred is not None
        # A row of the table without history multiplies the x0 prediction by 0: one graph serves both kinds.
        fixed = replace(shape, num_rows=rows, rows=rows, reads_x0=carries_x0, gives_x0=carries_x0)

        @torch.no_grad()
        def run() -> StepResult:
            return take_step(model, given, buffers.coeffs, buffers.step, fixed, recipe)

        graph = StepGraph(model, given, run)
        if _on_cuda(given) and not self._refused:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._side = self._side or torch.cuda.Stream(given.latents.device)
            try:
                graph.capture(self._pool, self._side)
            except RuntimeError as error:  # the driver's and torch's own are
                self._refused = True
                line = str(_first(error)).strip().splitlines()[0]
                message = f"graphs: a step of {rows} rows cannot be captured ({line}); steps are launched one by one"
                warnings.warn(message, RuntimeWarning, stacklevel=4)
        return graph


def _first(error: BaseException) -> BaseException:
    """What broke a capture, which then broke at its end once more."""
    return error if error.__context__ is None else _first(error.__context__)


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
    given: StepInput, coeffs: Tensor, num_rows: int, num_samples: int, carries_x0: bool
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
            seed=given.seed.new_zeros(num_samples),
            x0_pred=torch.zeros_like(latents, dtype=real) if carries_x0 else None,
        ),
        coeffs=coeffs,
        step=torch.zeros((), dtype=torch.int64, device=coeffs.device),
    )


def _fill(buffer: StepInput, given: StepInput, rows: slice, size: int) -> None:
    """Copies one micro-batch into the static inputs."""
    buffer.latents.copy_(given.latents[rows])
    buffer.seed.copy_(given.seed[rows.start * size : rows.stop * size])
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
    return StepResult(out, velocity, guidance)
