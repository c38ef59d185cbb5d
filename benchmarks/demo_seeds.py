"""Runs whole training jobs, one after another, and writes what each gave.

python benchmarks/demo_seeds.py                                                  the default job, seeds 0 to 4
python benchmarks/demo_seeds.py --recipes flow_grpo dance_grpo --seeds 0 --output results.json
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SHARED = ("model", "date", "device", "versions")
OWN = (
    "recipe",
    "seed",
    "steps",
    "judge_before",
    "judge_after",
    "reward_before",
    "reward_after",
    "ratio_self_test",
)


def run(recipe: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """The summary of one training run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "flowgrpo_fast.cli", "train", recipe, f"seed={seed}", *overrides]
        subprocess.run([*command, "--out", f"{folder}/run"], check=True)
        summary: dict[str, Any] = json.loads(Path(folder, "run/summary.json").read_text())
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["mix_grpo"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=RESULTS / "demo_cpu.json")
    parser.add_argument("overrides", nargs="*", help="field=value, as for `flowgrpo-fast train`")
    arguments = parser.parse_args()
    summaries = [run(r, seed, arguments.overrides) for r in arguments.recipes for seed in arguments.seeds]
    result: dict[str, Any] = {
        "command": f"python benchmarks/demo_seeds.py {shlex.join(sys.argv[1:])}".strip()
    }
    result |= {key: summaries[0][key] for key in SHARED}
    result["runs"] = [{key: s[key] for key in OWN} | {"seconds": s["cost"]["seconds"]} for s in summaries]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    for s in result["runs"]:
        before, after = 100 * s["judge_before"], 100 * s["judge_after"]
        print(f"{s['recipe']:16} seed {s['seed']}: judge {before:.1f} -> {after:.1f} %, {s['seconds']:.0f} s")


if __name__ == "__main__":
    main()
