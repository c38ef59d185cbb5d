"""A plan as tables and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flowgrpo_fast.planner.architectures import Counts, architecture, count
from flowgrpo_fast.planner.devices import GPUS, Gpu
from flowgrpo_fast.planner.forwards import open_ways
from flowgrpo_fast.planner.levers import Lever, levers
from flowgrpo_fast.planner.memory import Memory, plan_memory, usable
from flowgrpo_fast.planner.step import Execution, StepFlops, as_dict, plan_step
from flowgrpo_fast.recipe import Recipe

Titled: TypeAlias = tuple[str, Table]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything `flowgrpo-fast plan` knows."""

    recipe: Recipe
    counts: Counts
    step: StepFlops
    memory: Memory
    levers: list[Lever]
    gpu: Gpu
    num_gpus: int

    ways: list[tuple[Recipe, float]]  # every size of forward the recipe may have, the largest first; bytes

    def largest(self, gpu: Gpu) -> Recipe | None:
        """The recipe with the largest forwards that GPU holds; None where not even the smallest fit."""
        return next((way for way, needed in self.ways if needed <= usable(gpu.memory)), None)

    @property
    def forwards(self) -> str:
        """Rows and steps of a forward on `gpu`, as assignments, and who chose them."""
        machine, way = self.recipe.machine, self.largest(self.gpu)
        if machine.rows_per_forward:
            rows, steps, why = machine.rows_per_forward, self.recipe.steps_per_forward, "as the recipe says"
        elif way is None:
            return f"no forward fits into a {self.gpu.name}"
        else:
            rows, steps = way.machine.rows_per_forward, way.machine.steps_per_forward
            samples = max(1, self.recipe.rows_per_update // self.num_gpus)
            why = f"chosen at the start of a run, the most that fit; an update has {samples} samples"
        return f"machine.rows_per_forward={rows} machine.steps_per_forward={steps} ({why})"


def make_plan(
    model: str, recipe: Recipe, gpu: Gpu, num_gpus: int = 1, execution: Execution | None = None
) -> Plan:
    """Plans one step of a recipe on a published model or a pipeline's folder.

    Raises:
        ValueError: an unknown model, a size it does not run at, or a recipe that does not fit its schedule.
    """
    if num_gpus < 1:
        raise ValueError(f"--gpus is {num_gpus}; it must be at least 1")
    pipeline = architecture(model)
    counts = count(pipeline, recipe.network)

    def again(other: Recipe) -> Counts:
        return count(pipeline, other.network)

    return Plan(
        recipe=recipe,
        counts=counts,
        step=plan_step(counts, recipe, execution),
        memory=plan_memory(counts, recipe, num_gpus),
        levers=levers(counts, recipe, gpu, execution, again, num_gpus),
        gpu=gpu,
        num_gpus=num_gpus,
        ways=[(way, plan_memory(counts, way, num_gpus).total) for way in open_ways(recipe, counts, num_gpus)],
    )


def show(plan: Plan, console: Console) -> None:
    """Prints the tables."""
    recipe, counts, work = plan.recipe, plan.counts, plan.counts.forward
    kind = "LoRA" if counts.trained_share == 0 else "full"
    console.print(
        f"[bold]{escape(recipe.name)}[/] on {escape(counts.name)}, {counts.size}: {recipe.num_prompts} prompts x "
        f"{recipe.group_size} samples, {recipe.sigmas.num_inference_steps} steps, {recipe.machine.precision}, "
        f"{kind} ({counts.trained / 1e6:,.1f} of {counts.parameters / 1e6:,.0f} M parameters)\n"
        f"one forward of one row: {work.forward / 1e12:.2f} TFLOP, {work.linear / 1e12:.2f} in weights and "
        f"{(work.forward - work.linear) / 1e12:.2f} in attention; backward "
        f"{work.backward(counts.trained_share) / 1e12:.2f}\n"
        f"forwards: {plan.forwards}",
        highlight=False,
    )
    for title, table in (_work(plan), _gpus(plan), _memory(plan), _levers(plan)):
        console.print(f"\n[bold]{title}[/]", highlight=False)
        console.print(table)
    console.print()
    console.print(
        "Floors: bf16 matrix work at 800 and FP8 at 1400 TFLOP/s on an H100, other GPUs at the same shares of their "
        f"dense peaks. Text is encoded once ({counts.text / 1e12:.2f} TFLOP a prompt, "
        f"{counts.text_parameters * 2 / 1e9:.1f} GB of encoders that leave before the first step). A reward is one "
        "ViT-H/14 tower. Activations are those of eager mode.",
        style="dim",
        highlight=False,
    )


def _table(*columns: str, words: tuple[str, ...] = ()) -> Table:
    """Numbers to the right; the first column and those of `words` to the left."""
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        justify: Literal["left", "right"] = "left" if index == 0 or column in words else "right"
        # Folded: a setting that is cut off cannot be typed.
        table.add_column(column, justify=justify, overflow="fold")
    return table


def _work(plan: Plan) -> Titled:
    table = _table("phase", "PFLOP", "GPU-seconds", "share")
    phases = plan.step.phases(plan.gpu)
    whole = plan.step.floor(plan.gpu)
    for name, (flops, seconds) in phases.items():
        share = f"{100 * seconds / whole:.0f} %" if flops else "encoded once"
        table.add_row(name, f"{flops / 1e15:.4g}", f"{seconds:.4g}", share)
    table.add_row("[bold]step", f"{plan.step.total / 1e15:.4g}", f"{whole:.4g}", "", style="bold")
    return f"Work of a step, floor on {plan.gpu.name}", table


def _gpus(plan: Plan) -> Titled:
    columns = ("GPU", "GPU-seconds", f"seconds on {plan.num_gpus}", "ms a sample", "largest micro-batch")
    table = _table(*columns)
    for gpu in GPUS.values():
        seconds = plan.step.floor(gpu)
        way = plan.largest(gpu)
        most = plan.ways[0][0].rollout_rows if plan.ways else 0
        fits = f"{way.rollout_rows} of {most}" if way else "does not fit"
        each = 1e3 * seconds / plan.step.samples
        style = "bold" if gpu is plan.gpu else ""
        table.add_row(
            gpu.name, f"{seconds:.4g}", f"{seconds / plan.num_gpus:.4g}", f"{each:.4g}", fits, style=style
        )
    return "Floor by GPU", table


def _memory(plan: Plan) -> Titled:
    way = plan.largest(plan.gpu)
    rows = way.rollout_rows if way else 1
    memory = replace(plan.memory, rows=min(rows, plan.memory.rows))
    title = f"Memory of one {plan.gpu.name} at the {memory.heaviest.name}, micro-batch {memory.rows}"
    if plan.recipe.machine.rows_per_forward > memory.rows and way:
        title += (
            f" (the recipe sets {plan.memory.rows}, which do not fit: set machine.rows_per_forward={rows})"
        )
    table = _table("part", "GB", "shrinks with", words=("shrinks with",))
    for part in memory.parts:
        table.add_row(part.name, f"{part.bytes / 1e9:.3g}", part.remedy)
    room = usable(plan.gpu.memory)
    table.add_row("[bold]together", f"{memory.total / 1e9:.3g}", f"of {room / 1e9:.3g} usable", style="bold")
    return title, table


def _levers(plan: Plan) -> Titled:
    table = _table(
        "lever", "saves GPU-seconds", "of the step", "exact", "setting", words=("exact", "setting")
    )
    for lever in plan.levers:
        setting = "in use" if lever.in_use else lever.setting
        exact = "yes" if lever.exact else "no"
        row = (lever.name, f"{lever.saves:.4g}", f"{100 * lever.share:.0f} %", exact, setting)
        table.add_row(*row, style="dim" if lever.in_use else "")
    return "Levers, each alone", table


def to_json(plan: Plan) -> dict[str, Any]:
    """The whole plan as plain values; FLOPs, seconds and bytes."""
    counts = asdict(plan.counts)
    return {
        "recipe": plan.recipe.name,
        "model": plan.counts.name,
        "num_gpus": plan.num_gpus,
        "counts": counts,
        "forwards": plan.forwards,
        "step_flops": as_dict(plan.step),
        "floors": {
            name: {
                "gpu_seconds": plan.step.floor(gpu),
                "seconds": plan.step.floor(gpu) / plan.num_gpus,
                "largest_micro_batch": way.rollout_rows if (way := plan.largest(gpu)) else 0,
                "bf16_flops_a_second": gpu.rate(),
                "source": gpu.source,
            }
            for name, gpu in GPUS.items()
        },
        "memory": {
            "micro_batch": plan.memory.rows,
            "fixed_bytes": {part.name: part.bytes for part in plan.memory.fixed},
            "phases": {
                phase.name: {
                    "fixed_bytes": {part.name: part.bytes for part in phase.fixed},
                    "bytes_each_row": {part.name: part.bytes for part in phase.each_row},
                }
                for phase in plan.memory.phases
            },
        },
        "levers": [asdict(lever) for lever in plan.levers],
    }
