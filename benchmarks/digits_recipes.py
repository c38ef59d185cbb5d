"""Recipes on the digits: reward against network evaluations, at several seeds each.

python benchmarks/digits_recipes.py                                                      all five, seeds 0 to 2
python benchmarks/digits_recipes.py --recipes flow_grpo pro_grpo --seeds 0 --output results.json
python benchmarks/digits_recipes.py --join a.json b.json --output results.json           parts run side by side

A network evaluation is one row of one forward: rollout, pruned candidates, scouts (in whatever precision), replay, old
policy and reference; a backward is counted apart. The trained weights are judged, not their moving average. The target
of each seed is Flow-GRPO's own reward at its last step, where it is nearly at its ceiling, or a share of its gain.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch

from flowgrpo_fast.monitor.cost import device_name
from flowgrpo_fast.recipe_io import override
from flowgrpo_fast.recipes import RECIPES, digits
from flowgrpo_fast.training.engine import Engine, build_engine
from flowgrpo_fast.training.evaluate import evaluate
from flowgrpo_fast.training.loop import StepReport, train

RESULTS = Path(__file__).parent / "results"
BASE = "flow_grpo"
FAIR = ["optimizer.ema_decay=0", "task.eval_every=5"]  # the averages lag behind by different numbers of steps
SHARES = (1.0, 0.99, 0.9)
NAMES = [BASE, "pro_grpo", "pro_grpo_flash", "diffusion_nft", "sol_rl"]


def look(engine: Engine, evaluations: float, backwards: float) -> dict[str, float]:
    """One point of a curve."""
    metrics = evaluate(engine).metrics
    return {
        "step": engine.step,
        "network_evaluations": evaluations,
        "network_backwards": backwards,
        "reward": round(metrics["eval/reward"], 4),
        "judge": round(metrics["eval/judge"], 4),
    }


def run(name: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """The curve of one run, with a look every `task.eval_every` steps."""
    recipe = override(digits(RECIPES[name].make()), [f"seed={seed}", *FAIR, *overrides])
    engine = build_engine(recipe, torch.device("cpu"))
    spent = {"network_evaluations": 0.0, "network_backwards": 0.0}
    scouts: dict[str, list[float]] = {}
    curve, start = [look(engine, 0.0, 0.0)], time.perf_counter()

    def on_step(report: StepReport) -> None:
        for key in spent:
            spent[key] += report.metrics[key]
        for key in ("scout_spearman", "scout_top_overlap"):
            if key in report.metrics:
                scouts.setdefault(key, []).append(report.metrics[key])
        if engine.step % recipe.task.eval_every == 0 or engine.step == recipe.num_steps:
            curve.append(look(engine, *spent.values()))

    train(engine, on_step, lambda: False)
    seconds = time.perf_counter() - start
    means = {key: round(sum(values) / len(values), 4) for key, values in scouts.items()}
    return {"recipe": name, "seed": seed, "seconds": round(seconds, 1), **means, "curve": curve}


def reached(curve: list[dict[str, float]], target: float) -> dict[str, float] | None:
    """The first point of a curve at or above a reward; None if it stays below."""
    return next((point for point in curve if point["reward"] >= target), None)


def compare(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each run spent until a share of Flow-GRPO's gain at the same seed, and by which factor that is less."""
    bases = {r["seed"]: r["curve"] for r in runs if r["recipe"] == BASE}
    rows = []
    for share, r in product(SHARES, runs):
        base = bases.get(r["seed"])
        if base is None:
            continue
        start, end = base[0]["reward"], base[-1]["reward"]
        target = round(start + share * (end - start), 4)
        point, own = reached(r["curve"], target), reached(base, target)
        row = {"share": share, "recipe": r["recipe"], "seed": r["seed"], "target": target}
        for key in ("network_evaluations", "network_backwards"):
            row[key] = point[key] if point else None
            row[f"fewer_{key}"] = round(own[key] / point[key], 2) if own and point else None
        rows.append(row | {"last": r["curve"][-1]["reward"]})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: evaluations until each share of Flow-GRPO's gain, the mean of all seeds, or how many got there."""
    lines = [
        "| recipe | " + " | ".join(f"{share:.0%} of the gain" for share in SHARES) + " | last reward |",
        "|---|" + "---|" * (len(SHARES) + 1),
    ]
    for name in dict.fromkeys(row["recipe"] for row in rows):
        cells = []
        for share in SHARES:
            own = [row for row in rows if row["recipe"] == name and row["share"] == share]
            there = [row for row in own if row["network_evaluations"]]
            if len(there) < len(own):
                cells.append(f"{len(there)} of {len(own)} seeds")
                continue
            spent, back, fewer = (
                sum(row[key] for row in own) / len(own)
                for key in ("network_evaluations", "network_backwards", "fewer_network_evaluations")
            )
            cells.append(f"{spent / 1e3:.0f}k + {back / 1e3:.0f}k ({fewer:.1f}x)")
        lasts = ", ".join(
            f"{row['last']:.3f}" for row in rows if (row["recipe"], row["share"]) == (name, 1.0)
        )
        lines.append(f"| `{name}` | " + " | ".join(cells) + f" | {lasts} |")
    return "\n".join(lines)


def arguments_without_output(words: list[str]) -> list[str]:
    """What was asked for, not where it went."""
    return [w for i, w in enumerate(words) if w != "--output" and words[max(i - 1, 0)] != "--output"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=NAMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--join", type=Path, nargs="+", default=[])
    parser.add_argument("--output", type=Path, default=RESULTS / "digits_recipes_cpu.json")
    parser.add_argument("overrides", nargs="*", help="field=value, as for `flowgrpo-fast train`")
    arguments = parser.parse_args()
    parts = [json.loads(path.read_text()) for path in arguments.join]
    runs = [r for part in parts for r in part["runs"]]
    if not parts:
        runs = [run(n, seed, arguments.overrides) for n in arguments.recipes for seed in arguments.seeds]
    result = {
        "command": [part["command"] for part in parts]
        or f"python benchmarks/digits_recipes.py {shlex.join(arguments_without_output(sys.argv[1:]))}".strip(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": device_name(torch.device("cpu")),
        "versions": {name: version(name) for name in ("flowgrpo-fast", "torch", "diffusers")},
        "until_flow_grpo": compare(runs),
        "runs": runs,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result["until_flow_grpo"]))


if __name__ == "__main__":
    main()
