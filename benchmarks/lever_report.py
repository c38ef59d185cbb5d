"""Training steps lever by lever, as tables and against their targets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]
Result = dict[str, Any]

# Names of the rows.
TRAINER = "the loop trainers write"
EQUAL = "this engine, equal recipe"
COMPILED = "+ blocks compiled"
WINDOW = "+ two stochastic steps, shared start"
NO_KL = "+ no KL"
FAST = "+ no guidance"
SHARED = "+ work of a group shared"
PRUNED = "+ half of the candidates pruned before step 3"
LOW = "+ FP8 outside the window"
WIDE = "no guidance, twice the rows a forward"
JOINED = "no guidance, both trained steps in one forward"  # of as many rows
FLASH = "MixGRPO-Flash"
TRAINER_FAST = "the loop trainers write, fast recipe"

HEADER = ["", "in", "s", "s/image", "x trainers' loop", "by minimum", "of floor", "peak", "launches", "syncs"]
FAST_RECIPES = (FAST, SHARED, FLASH)

INTRODUCTION = """Random weights in the real classes of diffusers, LoRA through peft, a group a forward. The first row
is the loop that trainers write (`benchmarks/trainer_loop.py`) on Flow-GRPO's recipe: ten steps, nine of them trained,
guidance 4.5, a KL; every later row changes one thing more, up to the rows that name a recipe of their own. On a CPU
blocks are compiled in one row alone: to compile them in each would take most of the time.

**in** is the precision of the network's matrix products: fp32 on a CPU that has no bf16 instructions, where torch would
convert on the way.

**s** is the median of a step, **s/image** that by the images that it starts from: on a GPU, GPU-seconds an image.
**x trainers' loop** is the first row's s/image over this row's: of medians, and of minima. **of floor** is the share of
a step's time that the FLOPs of the recipe take at the machine's matrix-product rate. **peak** is, on the CPU, what a
step adds to the process's memory; on a GPU all that torch allocated. A compiled block's launches are counted on a GPU
alone. The target of the equal recipe takes the better of two rows, with this engine's blocks compiled and without; the
trainers' loop is not compiled."""


def targets(result: Result | None, device: str) -> list[list[str]]:
    """The goals of a training step, as lines of `report.judged`."""
    jobs = result["jobs"] if result else []
    if device == "cpu":
        equal = [_best(job, (EQUAL, COMPILED), "speedup") for job in jobs]
        fast = [_best(job, FAST_RECIPES, "speedup") for job in jobs]
        return [
            judged("1.3 times the trainers' loop, equal recipe, compiled or not", equal, 1.3),
            judged("4 times, fast recipe or MixGRPO-Flash against Flow-GRPO", fast, 4),
        ]
    floor = [_best(job, (FAST, SHARED, WINDOW), "over_floor", least=True) for job in jobs]
    low = [
        (f"{job['job']}", row["rollouts"]["speedup"])
        for job in jobs
        for row in job["rows"]
        if "rollouts" in row
    ]
    return [
        judged("at most 1.6 times the floor, fast recipe at 24 images", floor, 1.6, below=True),
        judged("FP8 rollout 1.4 times faster than bf16, both compiled", low, 1.4),
    ]


def judged(name: str, values: list[tuple[str, float] | None], limit: float, below: bool = False) -> list[str]:
    """A target as a line: how many jobs reach it, and the worst."""
    found = [value for value in values if value is not None]
    if not found:
        return [name, "not measured", "-", "-"]
    met = [value for _, value in found if (value <= limit if below else value >= limit)]
    label, worst = (max if below else min)(found, key=lambda pair: pair[1])
    verdict = "met" if len(met) == len(found) else "missed"
    return [name, verdict, f"{len(met)} of {len(found)}", f"{worst:.3g} ({label})"]


def _best(job: Row, names: tuple[str, ...], key: str, least: bool = False) -> tuple[str, float] | None:
    """The best of some rows, with its name; None where none has that number."""
    found = [
        (f"{job['job']}: {row['name'].removeprefix('+ ')}", row[key])
        for row in job["rows"]
        if row["name"] in names and row[key] is not None
    ]
    return (min if least else max)(found, key=lambda pair: pair[1], default=None)


def sections(result: Result) -> Iterator[str | tuple[list[str], list[list[str]]]]:
    """Text and tables of every job."""
    yield INTRODUCTION
    yield f"Command: `{result['command']}`"
    for job in result["jobs"]:
        yield f"### {job['job']}"
        yield "\n".join(f"- {line}" for line in notes(job))
        yield table(job)
    if result["left"]:
        yield f"Not measured, out of time: {', '.join(result['left'])}"


def notes(job: Row) -> list[str]:
    """What else was found, a line each."""
    lines = [job["size"]] if job.get("size") else []
    if "precision_because" in job:
        lines.append(f"measured in {job['precision']}: {job['precision_because']}")
    found = job.get("agreement")
    if found:
        lines.append(
            f"both loops compute the same (fp32, same noise): log-probs differ by at most {found['log_prob']:.1e}, "
            f"finished samples by {found['finished']:.1e} and the gradient of an update by {found['gradient']:.1e} "
            "of their norms"
        )
    equal = {row["name"]: row["speedup"] for row in job["rows"] if row["name"] in (EQUAL, COMPILED)}
    if None not in equal.values() and len(equal) == 2:
        lines.append(
            f"equal recipe: {equal[EQUAL]:.2f} times the trainers' loop, {equal[COMPILED]:.2f} times with this "
            "engine's blocks compiled (theirs are not)"
        )
    errors = [row["ratio_error"] for row in job["rows"] if row["ratio_error"] is not None]
    if errors:
        lines.append(f"first ratio of every row of this engine: |ratio - 1| at most {max(errors):.1e}")
    for row in job["rows"]:
        if "rollouts" in row:
            times = row["rollouts"]
            lines.append(
                f"whole rollout, compiled: {times['training']:.3g} s in the training precision, "
                f"{times['low']:.3g} s in FP8, {times['speedup']:.2f} times faster"
            )
    return lines + [f"not measured, {name}: {why}" for name, why in job["failed"].items()]


def table(job: Row) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a job."""
    return HEADER, [_cells(row) for row in job["rows"]]


def _cells(row: Row) -> list[str]:
    counts = row["counts"] or {}
    return [
        row["name"],
        row.get("precision", "-"),
        f"{row['seconds']:.3g}",
        f"{row['seconds'] / row['images']:.3g}",
        _number(row["speedup"]),
        _number(row["speedup_by_min"]),
        f"{100 * row['floor_s'] / row['seconds']:.0f} %" if row["floor_s"] else "-",
        "-" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e9:.2f} GB",
        *(f"{counts[name]:,}" if name in counts else "-" for name in ("launches", "syncs")),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
