"""Runs the default job for several seeds, one after another, and writes what each gave.

python benchmarks/demo_seeds.py --seeds 0 1 2 3 4 --out benchmarks/results/demo_cpu.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def run(seed: int, overrides: list[str]) -> dict:
    """One whole training run in its own process; its summary."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "flowgrpo_fast.cli", "train", f"seed={seed}", *overrides]
        subprocess.run([*command, "--out", f"{folder}/run"], check=True)
        summary: dict = json.loads(Path(folder, "run/summary.json").read_text())
    return summary


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/demo_cpu.json")
    parser.add_argument("overrides", nargs="*", help="field=value, as for `flowgrpo-fast train`")
    arguments = parser.parse_args()
    summaries = [run(seed, arguments.overrides) for seed in arguments.seeds]
    keys = ("seed", "judge_before", "judge_after", "reward_before", "reward_after", "ratio_self_test", "cost")
    shared = ("recipe", "model", "steps", "date", "device", "versions")
    result = {key: summaries[0][key] for key in shared}
    result["command"] = "python benchmarks/demo_seeds.py " + " ".join(arguments.overrides)
    result["seeds"] = [{key: summary[key] for key in keys} for summary in summaries]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    for summary in summaries:
        print(
            f"seed {summary['seed']}: judge {100 * summary['judge_before']:.1f} -> "
            f"{100 * summary['judge_after']:.1f} %, {summary['cost']['seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
