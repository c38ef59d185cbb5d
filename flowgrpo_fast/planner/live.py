"""The plan of a run that is about to start or under way: does it fit, and how far is it from its floor."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from flowgrpo_fast.planner.architectures import Architecture, Counts, architecture, count, count_model
from flowgrpo_fast.planner.devices import recognised_gpu
from flowgrpo_fast.planner.forwards import fitting, open_ways
from flowgrpo_fast.planner.memory import Memory, plan_memory
from flowgrpo_fast.planner.step import plan_step
from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.training.engine import Engine

_MEASURING = 0.25  # seconds of matrix products, after the first
_SIDE = {"cpu": 768, "cuda": 8192}
_OWN_CONTEXT = 0.5e9  # bytes CUDA takes to answer; a plan leaves room for them itself
_NO_HOST_MEMORY = "DefaultCPUAllocator: "  # a CPU says it by a plain RuntimeError
_OUTSIDE = ("evaluation", "self_test")  # phases of a step that are no part of the recipe


@dataclass(frozen=True, slots=True)
class Floor:
    """The least one training step can take on this device."""

    seconds: float
    flops: float  # of the step, rewards left out
    rate: float  # FLOP/s
    origin: str  # of the rate

    def over(self, phases: dict[str, float]) -> float:
        """Measured time of a step's phases over the floor."""
        return sum(s for name, s in phases.items() if name not in _OUTSIDE) / self.seconds

    def __str__(self) -> str:
        """As a run announces it."""
        return (
            f"floor {self.seconds:.3g} s a step: {_scaled(self.flops)}FLOP, rewards left out, "
            f"at {_scaled(self.rate)}FLOP/s {self.origin}"
        )


def _scaled(value: float) -> str:
    for unit, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= unit:
            return f"{value / unit:.3g} {prefix}"
    return f"{value / 1e6:.3g} M"


def floor_of(engine: Engine) -> Floor | None:
    """The floor of a step, from one counted velocity call; None for a model whose operations cannot be counted."""
    recipe, precision = engine.recipe, engine.recipe.machine.precision
    try:
        with torch.autocast(engine.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            counts = count_model(engine.model, engine.stage.conditioning, engine.device, engine.seq_len)
        pipeline = _known_pipeline(recipe)
        if pipeline is not None and not counts.forward.attention:  # a kernel that the counter cannot see into
            counts = replace(counts, forward=count(pipeline, recipe.network).forward)
    except Exception:
        return None  # whatever a model of the user's own does under a counter
    step = plan_step(counts, recipe)
    if not counts.forward.forward:
        return None
    gpu = recognised_gpu(torch.cuda.get_device_name(engine.device)) if engine.device.type == "cuda" else None
    if gpu is not None and precision == "bf16":
        return Floor(step.floor(gpu), step.total, gpu.rate(), f"(bf16 on a {gpu.name})")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rate = measured_rate(engine.device, dtype)
    return Floor(step.seconds(rate), step.total, rate, f"(measured here, {precision})")


def measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products on this device as it is now, the best of a quarter of a second."""
    side = _SIDE.get(device.type, 1024)
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    best, spent = float("inf"), 0.0
    torch.mm(left, right)
    while spent < _MEASURING:
        _wait(device)
        start = time.perf_counter()
        torch.mm(left, right)
        _wait(device)
        best = min(best, time.perf_counter() - start)
        spent += time.perf_counter() - start
    return 2.0 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------------- memory


def memory_of(device: torch.device) -> float | None:
    """Bytes a device has for this run: what others left; None for the CPU, whose memory nobody reserves."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return float(min(total, free + _OWN_CONTEXT))


def _known_pipeline(recipe: Recipe) -> Architecture | None:
    """The architecture of a recipe's network; None for one that the planner does not know."""
    try:
        return architecture(recipe.network.path) if recipe.network.path else None
    except ValueError:
        return None


def planned_counts(recipe: Recipe) -> Counts | None:
    """What the network of a recipe costs; None for one that the planner does not know, or cannot count."""
    try:
        pipeline = _known_pipeline(recipe)
        return None if pipeline is None else count(pipeline, recipe.network)
    except Exception:
        return None  # a configuration that the planner misreads is no reason not to train


def planned_memory(recipe: Recipe) -> Memory | None:
    """The memory of a run, where its network is one the planner knows and can count."""
    counts = planned_counts(recipe)
    return None if counts is None else plan_memory(counts, recipe)


def with_forwards(recipe: Recipe, capacity: float | None) -> Recipe:
    """The recipe with what it leaves open of its forwards: the largest that fit into `capacity` bytes.

    As it stands where they cannot be known: on a CPU (None), for a network that cannot be planned, or where nothing
    fits.
    """
    counts = planned_counts(recipe) if capacity is not None else None
    if counts is None or capacity is None:
        return recipe
    return fitting(recipe, counts, capacity) or recipe


def check_memory(recipe: Recipe, device: torch.device, capacity: float | None) -> None:
    """Refuses a run that cannot fit, before anything is loaded; `capacity` None: nothing to compare with.

    Raises:
        ValueError: names the largest part and the setting that shrinks it.
    """
    counts = planned_counts(recipe) if capacity is not None else None
    if counts is None or capacity is None:
        return
    choices = [way.machine.rows_per_forward for way in open_ways(recipe, counts)]
    there = f"{device} ({capacity / 1e9:.0f} GB free)"
    refusal = plan_memory(counts, recipe).refusal(capacity, there, choices)
    if refusal:
        raise ValueError(refusal)


@contextmanager
def out_of_memory_in_one_line(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Turns the device's out-of-memory error into one line that names what to change."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and _NO_HOST_MEMORY not in str(error):
            raise
        memory = planned_memory(recipe)
        rows = recipe.machine.replay_rows or recipe.rollout_rows
        advice = f"lower machine.rows_per_forward (now {rows})"
        if memory is not None:
            largest = memory.parts[0]
            advice = (
                f"the largest part is {largest.name}, about {largest.bytes / 1e9:.1f} GB: {largest.remedy}"
            )
        # What was asked for; the rest is statistics.
        reason = ". ".join(str(error).split(". ")[:2]).rstrip(".")
        raise ValueError(f"out of memory on {device}: {reason}; {advice}") from error
