"""Single methods on the digits against Flow-GRPO: one JSON a run, and a table of all that there are.

python benchmarks/digits_methods.py flow_grpo awm leap_align --seeds 0 1 2
python benchmarks/digits_methods.py flow_opd --seeds 0 1 2                 trains its two teachers first
python benchmarks/digits_methods.py --table                                what results/digits_methods holds

Runs are short, to be made on a small machine: 30 steps of 5 prompts, unless overridden. The trained weights are judged,
not their moving average. A network evaluation is one row of one forward, whatever it was for.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # run as a script
    sys.path.insert(0, str(ROOT))

from benchmarks.digits_recipes import BASE, FAIR, RESULTS, reached, run  # noqa: E402
from flowgrpo_fast.models.digits import prompts  # noqa: E402
from flowgrpo_fast.monitor.cost import device_name  # noqa: E402
from flowgrpo_fast.recipe_io import override  # noqa: E402
from flowgrpo_fast.recipes import RECIPES, digits  # noqa: E402
from flowgrpo_fast.training.checkpoint import save_checkpoint  # noqa: E402
from flowgrpo_fast.training.engine import build_engine  # noqa: E402
from flowgrpo_fast.training.evaluate import evaluate  # noqa: E402
from flowgrpo_fast.training.loop import train  # noqa: E402

FOLDER = RESULTS / "digits_methods"
SHORT = ("num_steps=30", "num_prompts=5")
# What a method needs besides: one sample a prompt, and so more of them; steps until as many network evaluations are
# spent as Flow-GRPO's (100 800), where they are cheaper; whole trees in an optimiser step.
OWN = {
    "leap_align": ("num_prompts=30",),
    "tree_grpo": ("num_prompts=4", "num_steps=200", "task.eval_every=20"),
    "op_grpo": ("num_steps=38",),
}

HALVES = {"even": 0, "odd": 1}  # data sets of the distillation: the first digit of each
TEACHERS_STEPS = 20


def teachers(folder: Path, seed: int) -> tuple[list[str], dict[str, Any]]:
    """Trains one teacher for the even digits and one for the odd ones, each by MixGRPO on its own prompts alone.

    Returns the student's overrides, and how each teacher does on both halves.
    """
    by_half = {half: prompts()[first::2] for half, first in HALVES.items()}
    known: dict[str, Any] = {}
    found = {}
    for half, own in by_half.items():
        (folder / f"{half}.txt").write_text("\n".join(own) + "\n")
        changes = [f"seed={seed}", *FAIR, f"num_steps={TEACHERS_STEPS}", "num_prompts=5"]
        recipe = override(
            digits(RECIPES["mix_grpo"].make()), [*changes, f"data.path={folder / half}.txt", "task.judge="]
        )
        with closing(build_engine(recipe, torch.device("cpu"))) as engine:
            train(engine, lambda report: None, lambda: False)
            found[half] = save_checkpoint(engine, folder / half)
            trained = engine.model.module.state_dict()
        whole = override(digits(RECIPES["mix_grpo"].make()), changes)
        with closing(build_engine(whole, torch.device("cpu"))) as engine:
            engine.model.module.load_state_dict(trained)
            look = evaluate(engine)
        assert look.correct is not None
        known[half] = {
            "steps": TEACHERS_STEPS,
            "reward": round(look.metrics["eval/reward"], 4),
            "judge": round(look.metrics["eval/judge"], 4),
        }
        for other, theirs in by_half.items():
            right = [
                bool(c) for c, prompt in zip(look.correct, look.prompts, strict=True) if prompt in theirs
            ]
            known[half][f"judge/{other}"] = round(sum(right) / len(right), 4)
    lines = [json.dumps({"prompt": p, "dataset": half}) for half, own in by_half.items() for p in own]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    loaded = {half: {"is": "Loaded", "path": str(path)} for half, path in found.items()}
    return [f"data.path={folder}/prompts.jsonl", f"objective.teachers={json.dumps(loaded)}"], {
        "teachers": known
    }


# Made before a method can run, in a folder for it: further overrides, and what the result should say besides.
PREPARED: dict[str, Callable[[Path, int], tuple[list[str], dict[str, Any]]]] = {"flow_opd": teachers}


def measure(name: str, seed: int, overrides: Sequence[str], label: str) -> dict[str, Any]:
    """One run, as it is written to its file."""
    changes = [*SHORT, *OWN.get(name, ()), *overrides]
    with tempfile.TemporaryDirectory() as folder:
        more, known = PREPARED[name](Path(folder), seed) if name in PREPARED else ([], {})
        result = run(name, seed, [*changes, *more])
    first, last = result["curve"][0], result["curve"][-1]
    words = [name, "--seeds", str(seed), *(["--label", label] if label != name else []), *overrides]
    return {
        "command": f"python benchmarks/digits_methods.py {shlex.join(words)}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": device_name(torch.device("cpu")),
        "versions": {package: version(package) for package in ("flowgrpo-fast", "torch", "diffusers")},
        "recipe": name,
        "label": label,
        "seed": seed,
        "overrides": [*FAIR, *changes],
        "before": {key: first[key] for key in ("reward", "judge")},
        "after": {key: last[key] for key in ("reward", "judge")},
        "network_evaluations": last["network_evaluations"],
        "network_backwards": last["network_backwards"],
        "seconds": result["seconds"],
        **known,
        "curve": result["curve"],
    }


def results(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """All runs that there are, Flow-GRPO's first."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*_seed*.json"))]
    return sorted(runs, key=lambda r: (r["label"] != BASE, r["label"], r["seed"]))


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over seeds, and what was spent until Flow-GRPO's last reward at the same seed, or how often."""
    targets = {r["seed"]: r["after"]["reward"] for r in runs if r["label"] == BASE}
    lines = [
        "| method | seeds | reward before, after | judge before, after, % | evaluations + backwards, all "
        "| evaluations + backwards to Flow-GRPO's last reward |",
        "|---|---|---|---|---|---|",
    ]
    for label in dict.fromkeys(r["label"] for r in runs):
        own = [r for r in runs if r["label"] == label]

        def mean(read: Callable[[dict[str, Any]], float], among: list[dict[str, Any]] = own) -> float:
            return sum(map(read, among)) / len(among)

        reward, judge = (
            [mean(lambda r, when=when, key=key: r[when][key]) for when in ("before", "after")]  # type: ignore[misc]
            for key in ("reward", "judge")
        )
        compared = [r for r in own if r["seed"] in targets]
        points = [p for r in compared if (p := reached(r["curve"], targets[r["seed"]])) is not None]
        spent = "-"
        if points:
            spent = " + ".join(
                f"{mean(lambda p, key=key: p[key], points) / 1e3:.1f}k"  # type: ignore[misc]
                for key in ("network_evaluations", "network_backwards")
            )
        spent += "" if len(points) == len(compared) else f" ({len(points)} of {len(compared)} seeds)"
        lines.append(
            f"| `{label}` | {len(own)} | {reward[0]:.3f}, {reward[1]:.3f} "
            f"| {100 * judge[0]:.1f}, {100 * judge[1]:.1f} "
            f"| {mean(lambda r: r['network_evaluations']) / 1e3:.1f}k + "
            f"{mean(lambda r: r['network_backwards']) / 1e3:.1f}k | {spent} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("words", nargs="*", help="recipes, and field=value as for `flowgrpo-fast train`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--label", default="", help="of a variant's files, instead of the recipe's name")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--table", action="store_true", help="print the table of all results alone")
    arguments = parser.parse_intermixed_args()
    overrides = [word for word in arguments.words if "=" in word]
    names = [word for word in arguments.words if "=" not in word]
    torch.set_num_threads(1)  # the network is small: threads only wait for each other
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        for seed in arguments.seeds:
            label = arguments.label or name
            result = measure(name, seed, overrides, label)
            (arguments.folder / f"{label}_seed{seed}.json").write_text(json.dumps(result, indent=2) + "\n")
            print(
                f"{label} seed {seed}: {result['before']} -> {result['after']}, {result['seconds']} s",
                file=sys.stderr,
            )
    print(table(results(arguments.folder)))


if __name__ == "__main__":
    main()
