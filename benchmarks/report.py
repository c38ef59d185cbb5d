"""Writes benchmarks/results/README.md and a plot from the checked-in results; prints the lines that docs quote.

python benchmarks/report.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script
    sys.path.insert(0, str(ROOT))

from benchmarks import lever_report  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGE = RESULTS / "README.md"
EDITIONS = RESULTS / "second_edition_vs_first.json"
PLOT = ROOT / "docs" / "images" / "benchmarks.svg"

Row = dict[str, Any]
Result = dict[str, Any]

LARGE = {"cpu": 16e6, "cuda": 100e6}  # bytes from which bandwidth is asked for
# Arithmetic is their roof: the normals', and the adapter's matrix product.
COMPUTE_BOUND = ("sampling", "sampling_with_guidance", "noise", "merge_lora_fp8", "merge_lora_nvfp4")
NOISE = "noise"
IMAGE_GROUPS = ("SD3.5 512 x24", "SD3.5 512 x12", "FLUX 720 x24", "FLUX 720 x12")
README = {
    "sampling": "sampling: noise, step, log-prob",
    "replay": "replay: log-prob",
    "replay_and_backward": "replay with gradient",
}
HEADER = [
    "operation",
    "size",
    "dtype",
    "ours",
    "GB/s",
    "of copy",
    "x eager",
    "x compiled",
    "launches",
    "syncs",
]

INTRODUCTION = """# Measured

Written by `python benchmarks/report.py` from the JSON files beside this page; do not edit. What it says in sentences:
[docs/benchmarks.md](../../docs/benchmarks.md).

    make benchmarks                                    # measures everything, then writes this page
    make levers                                        # the training step of a transformer lever by lever alone
    flowgrpo-fast bench ops                            # the same table on the terminal; the other levels likewise
    pytest benchmarks/ --benchmark-group-by=group      # with pytest-benchmark; -k narrows, --benchmark-compare compares
    make gpu-check                                     # on a machine with a GPU: builds, tests and measures there

**ours** is the median time of a call. **eager** is unfused PyTorch written the way published trainers write it,
**compiled** is `torch.compile` of our plain PyTorch reference at exactly this size; all of them and a copy of as many
bytes run in turns in one process. **GB/s** counts the least a call has to move (every input read once, every output
written once); **of copy** is its share of torch's copy of 512 MiB just before and after, more than 100 % where the data
stays in a cache; **of equal** is the time of the copy of as many bytes over the op's, in a cache or not like the op.
**launches** (CUDA kernels) and **syncs** (the host waiting for a number) are counted, not timed: ours, then
eager's. What eager does in numpy, on tensors of the CPU, nobody counts. The compiled noise is the same Philox in
int64; eager's is torch.randn. On CUDA `make gpu-check` compiles one size alone, SD3.5 512 x24 in bfloat16: the rows
that have a number under **x compiled**. Targets of bandwidth count a forward and its backward as the two calls they
are, and leave out what arithmetic bounds: drawing normals, and the adapters' matrix product.
"""


def load(level: str, device: str) -> Result | None:
    """A checked-in result, or None where there is none."""
    path = RESULTS / f"{level}_{device}.json"
    return json.loads(path.read_text()) if path.exists() else None


def unmeasured(result: Result) -> list[str]:
    """What is missing from a result, a line a case that failed and one for all that time ran out for."""
    lines = [f"not measured, {name}: {why}" for name, why in (result.get("failed") or {}).items()]
    left = result.get("left")
    return lines + ([f"not measured, out of time: {', '.join(left)}"] if left else [])


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a result."""
    return HEADER, [cells(row) for row in result["rows"]]


def cells(row: Row) -> list[str]:
    """A row as text; "-" where a row has no such number."""
    speedup, counts = row["speedup_by_median"], row.get("counts") or {}
    count = {
        name: " / ".join(f"{counts[who][name]:,}" for who in ("ours", "eager") if who in counts) or "-"
        for name in ("launches", "syncs")
    }
    return [
        row["operation"],
        row["size"],
        row["dtype"],
        milliseconds(row["median_ms"]["ours"]),
        "-" if row["gbps"] is None else f"{row['gbps']:.1f}",
        percent(row["share_of_copy"]),
        percent(row["share_of_equal_copy"]),
        f"{speedup['eager']:.1f}" if "eager" in speedup else "-",
        f"{speedup['compiled']:.1f}" if "compiled" in speedup else "-",
        count["launches"],
        count["syncs"],
    ]


def percent(share: float | None) -> str:
    """A share, where there is one."""
    return "-" if share is None else f"{100 * share:.0f} %"


def milliseconds(value: float) -> str:
    """Three digits, in us below a millisecond."""
    return f"{value:.3g} ms" if value >= 1 else f"{1e3 * value:.3g} us"


def markdown(header: list[str], lines: list[list[str]], labels: int = 3) -> str:
    """A table; all but the first columns, the labels, to the right."""
    rule = ["---" if number < labels else "---:" for number in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines])


def described(machine: Row) -> str:
    """The machine in a sentence."""
    found = machine["copy_gbps"]
    copy = "{} GB/s ({} to {})".format(*found) if found else "not measured"
    return (
        f"{machine['device']}, {machine['threads']} of {machine['cores']} cores ({machine['isa']}), torch "
        f"{machine['torch']}, {machine['date']}; copy of 512 MiB: {copy}; load: "
        f"{machine['load_before']} and {machine['load_after']}"
    )


def judged(name: str, values: list[tuple[str, float]], limit: float, below: bool = False) -> list[str]:
    """A target as a line of a table: how many rows reach it, and the rows that do not."""
    if not values:
        return [name, "not measured", "-", "-"]
    met = [label for label, value in values if (value <= limit if below else value >= limit)]
    worst = (max if below else min)(values, key=lambda pair: pair[1])
    verdict = "met" if len(met) == len(values) else "missed"
    return [name, verdict, f"{len(met)} of {len(values)}", f"{worst[1]:.3g} ({worst[0]})"]


def targets(ops: Result | None, device: str) -> list[list[str]]:
    """The goals of a device against its rows."""
    rows = ops["rows"] if ops else []
    label = {id(row): f"{row['operation']}, {row['size']}, {row['dtype']}" for row in rows}

    def ratios(baseline: str) -> list[tuple[str, float]]:
        return [
            (label[id(row)], row["speedup_by_median"][baseline])
            for row in rows
            if baseline in row["speedup_by_median"]
        ]

    large = [
        row
        for row in rows
        if row["bytes"] >= LARGE[device] and (device == "cuda" or row["operation"] not in COMPUTE_BOUND)
    ]
    share, equal = (
        [(label[id(row)], 100 * row[key] * passes(row)) for row in large if row[key] is not None]
        for key in ("share_of_copy", "share_of_equal_copy")
    )
    if device == "cuda":
        image = [
            (label[id(row)], row["graph_us"])
            for row in rows
            if row["size"] in IMAGE_GROUPS and row.get("graph_us") is not None
        ]
        overhead = [
            (name, times["ours"]) for name, times in ((ops or {}).get("call_overhead_us") or {}).items()
        ]
        return [
            judged("85 % of the large copy's bandwidth from 100 MB", share, 85),
            judged("the same, of a copy of as many bytes in turns", equal, 85),
            judged("at most 10 us of GPU time for image groups", image, 10, below=True),
            judged("at most 3 us of host time for an eager call", overhead, 3, below=True),
        ]
    noise = [
        (label[id(row)], row["speedup_by_median"]["eager"])
        for row in rows
        if row["operation"].startswith(NOISE)
    ]
    return [
        judged("5 times faster than unfused eager", ratios("eager"), 5),
        judged("the same, of rows whose eager moves 5 times the bytes", moving(rows, label), 5),
        judged("never slower than torch.compile", ratios("compiled"), 1),
        judged("70 % of the large copy's bandwidth from 16 MB (memory-bound)", share, 70),
        judged("the same, of a copy of as many bytes in turns", equal, 70),
        judged("noise 6 times faster than torch.randn", noise, 6),
    ]


def passes(row: Row) -> float:
    """A forward and its backward are two calls: what both have to move over what one call of all would."""
    both = row["operation"].endswith("_and_backward")
    moved: float = row["counts"]["ours"]["bytes"] / row["bytes"] if both else 1.0
    return moved


def moving(rows: list[Row], label: dict[int, str]) -> list[tuple[str, float]]:
    """Speed-ups over eager where eager moves at least five times our bytes: elsewhere memory itself forbids five."""
    return [
        (label[id(row)], row["speedup_by_median"]["eager"])
        for row in rows
        if "eager" in row["speedup_by_median"]
        and row["counts"]["eager"]["bytes"] >= max(1, 5 * row["counts"]["ours"]["bytes"])
    ]


def page() -> str:
    """The whole of benchmarks/results/README.md."""
    return "\n\n".join(part.strip() for part in [INTRODUCTION, *sections()]) + "\n"


def sections() -> Iterator[str]:
    """Targets, then every level on every device."""
    for device, title in (("cpu", "CPU"), ("cuda", "GPU")):
        ops = load("ops", device)
        lines = targets(ops, device) + lever_report.targets(load("levers", device), device)
        yield f"## Targets on the {title}"
        yield markdown(["target", "", "rows", "worst"], lines, labels=4)
    if load("ops", "cpu"):
        yield f"![Speed-ups and share of copy bandwidth](../../docs/images/{PLOT.name})"
    for level, title in (("ops", "Ops"), ("rollout", "Rollout"), ("train_step", "Training step")):
        for device in ("cpu", "cuda"):
            result = load(level, device)
            yield f"## {title}, {device.upper()}"
            if result is None:
                yield "Not measured."
                continue
            yield described(result["machine"])
            if unmeasured(result):
                yield "\n".join(f"- {line}" for line in unmeasured(result))
            yield from level_sections(level, result)
    for device in ("cpu", "cuda"):
        result = load("levers", device)
        yield f"## Training step lever by lever, {device.upper()}"
        if result is None:
            yield "Not measured."
            continue
        yield described(result["machine"])
        for part in lever_report.sections(result):
            yield part if isinstance(part, str) else markdown(*part, labels=1)
    yield from editions()


def editions() -> Iterator[str]:
    """This edition against the one before, where both have been measured in turns."""
    if not EDITIONS.exists():
        return
    result = json.loads(EDITIONS.read_text())
    yield "## The second edition against the first"
    yield (
        f"{result['device']}, {result['threads']} of {result['cores']} cores, torch {result['torch']}, "
        f"{result['date']}, commits {result['first']} and {result['second']}; load: {result['load_before']} and "
        f"{result['load_after']}. Lever rows: {result['lever_job']}, nothing compiled. Command: `{result['command']}`"
    )
    yield (
        "Medians of turns, in brackets their range; ratios are second over first, round by round: below 1 the second "
        "edition is faster. Rewards were equal at every step where the last column says so."
    )
    lines = []
    for case in result["cases"]:
        cells = [case["case"], str(case["turns"])]
        for name in ("first", "second"):
            cells.append("{median:.3g} ({min:.3g} to {max:.3g})".format(**case["seconds"][name]))
        for clock in ("seconds", "cpu_seconds"):
            cells.append("{median:.2f} ({min:.2f} to {max:.2f})".format(**case[f"{clock}_ratio"]))
        lines.append([*cells, "yes" if case["equal_rewards"] else "no"])
    header = [
        "",
        "turns",
        "first, s a step",
        "second, s a step",
        "ratio",
        "ratio of CPU time",
        "equal rewards",
    ]
    yield markdown(header, lines, labels=1)


def level_sections(level: str, result: Result) -> Iterator[str]:
    """The tables of one result."""
    header, lines = table(result)
    if level != "ops":
        yield markdown(header, lines)
        above = [line for row in result["rows"] for line in above_network(row)]
        if above:
            yield "Above the network alone (a rollout's time less that of its forward passes):"
            yield markdown(["rollout", "contender", "ms"], above, labels=2)
        return
    for operation in dict.fromkeys(row["operation"] for row in result["rows"]):
        yield markdown(header, [line for line in lines if line[0] == operation])
    overhead = result.get("call_overhead_us")
    if overhead:
        yield "What a call costs before it moves data (us; toy size):"
        names = ["ours", "eager", "compiled"]
        rows = [
            [operation, *(f"{times[name]:.3g}" if name in times else "-" for name in names)]
            for operation, times in overhead.items()
        ]
        yield markdown(["operation", *names], rows, labels=1)


def above_network(row: Row) -> Iterator[list[str]]:
    """What each contender takes above the forward passes."""
    times = row["median_ms"]
    if "network" in times:
        for name in ("ours", "eager", "compiled"):
            yield [row["size"], name, f"{times[name] - times['network']:.1f}"]


def readme_lines(ops: Result) -> list[str]:
    """The README's table of the flagship size."""
    lines = []
    for operation, label in README.items():
        row = find(ops, operation)
        median, least = row["speedup_by_median"], row["speedup_by_min"]
        pairs = [f"{median[name]:.1f} ({least[name]:.1f})" for name in ("eager", "compiled")]
        lines.append(f"| {label} | {row['median_ms']['ours']:.2f} ms | {' | '.join(pairs)} |")
    return lines


def headlines() -> list[str]:
    """What docs/benchmarks.md claims, a sentence a claim, from the checked-in results."""
    ops, rollout, step, levers = (load(level, "cpu") for level in ("ops", "rollout", "train_step", "levers"))
    assert ops
    assert rollout
    assert step
    assert levers
    sampling, replay = (find(ops, name)["speedup_by_median"] for name in ("sampling", "replay"))
    synthetic = next(row for row in rollout["rows"] if row["size"].startswith("synthetic"))
    (digits,) = step["rows"]
    lines = [
        f"A sampling step (noise, transition, log-prob) is {sampling['eager']:.1f} times faster than unfused eager "
        "PyTorch.",
        f"It is {sampling['compiled']:.1f} times faster than `torch.compile` of the same mathematics.",
        f"A replayed log-prob is {replay['eager']:.1f} times faster than eager.",
        f"It is {replay['compiled']:.1f} times faster than `torch.compile`.",
        f"A rollout of 24 SD3.5-sized samples waits for the device {synthetic['counts']['ours']['syncs']} time, the "
        f"loop trainers write {synthetic['counts']['eager']['syncs']} times.",
        f"A training step of the digits is {digits['speedup_by_median']['eager']:.2f} times faster than that loop.",
    ]
    (job,) = levers["jobs"]
    speedup = {row["name"]: row["speedup"] for row in job["rows"]}
    launches = {row["name"]: row["counts"]["launches"] for row in job["rows"] if row["counts"]}
    lines += [
        f"A training step of a small SD3 is {speedup[lever_report.EQUAL]:.2f} times faster than that loop on the equal "
        "recipe.",
        f"It is {speedup[lever_report.COMPILED]:.2f} times faster with this engine's blocks compiled.",
        f"It is {speedup[lever_report.SHARED]:.2f} times faster with the fast recipe and the work of a group shared.",
        f"With twice the rows a forward, of both trained steps, it launches {launches[lever_report.JOINED]:,} kernels, "
        f"without {launches[lever_report.FAST]:,}.",
    ]
    if EDITIONS.exists():
        ratios = {
            case["case"]: case["seconds_ratio"]["median"]
            for case in json.loads(EDITIONS.read_text())["cases"]
        }
        demo = ratios.pop("demo")
        lines += [
            f"A training step of the demo takes {demo:.3f} times the seconds that it took in the first edition.",
            f"That of a tiny SD3, where the network hides least, takes {min(ratios.values()):.2f} to "
            f"{max(ratios.values()):.2f} times them, lever by lever.",
        ]
    return lines


def find(ops: Result, operation: str, size: str = "SD3.5 512 x24", dtype: str = "float32") -> Row:
    """The row of an operation."""
    wanted = (operation, size, dtype)
    return next(row for row in ops["rows"] if (row["operation"], row["size"], row["dtype"]) == wanted)


def plot(ops: Result) -> None:
    """Speed-up over both baselines and share of copy bandwidth of the flagship size, an operation a line."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "flowgrpo_fast"
    from matplotlib import pyplot

    rows = [row for row in ops["rows"] if row["dtype"] == "float32" and row["size"] == "SD3.5 512 x24"]
    rows = rows or ops["rows"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 1.2 + 0.32 * len(rows)), sharey=True)
    for offset, name in ((-0.2, "eager"), (0.2, "compiled")):
        values = [row["speedup_by_median"].get(name, 0) for row in rows]
        left.barh([y + offset for y in range(len(rows))], values, 0.38, label=f"over {name}")
    left.set_xscale("log")
    left.axvline(1, color="black", linewidth=0.8)
    left.set(xlabel="times faster", yticks=range(len(rows)))
    left.set_yticklabels([row["operation"] for row in rows], fontsize=8)
    left.invert_yaxis()
    left.legend(fontsize=7)
    right.barh(range(len(rows)), [100 * (row["share_of_copy"] or 0) for row in rows], 0.6, color="tab:green")
    right.axvline(100, color="black", linewidth=0.8)
    right.set(xlabel="% of the large copy's bandwidth (above 100: cached)")
    figure.suptitle(f"{rows[0]['size']} float32, {ops['machine']['device']}", fontsize=9)
    figure.tight_layout()
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    PAGE.write_text(page())
    ops = load("ops", "cpu")
    if ops is None:
        sys.exit("no benchmarks/results/ops_cpu.json; run python benchmarks/measure.py")
    plot(ops)
    print(
        f"wrote {PAGE} and {PLOT}; the lines of README and docs are\n"
        + "\n".join([*readme_lines(ops), *headlines()])
    )


if __name__ == "__main__":
    main()
