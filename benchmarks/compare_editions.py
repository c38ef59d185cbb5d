"""Two checkouts of this project side by side: seconds a training step, in turns on the same machine.

python benchmarks/compare_editions.py OTHER_CHECKOUT            writes benchmarks/results/second_edition_vs_first.json
python benchmarks/compare_editions.py OTHER_CHECKOUT --cases demo --rounds 9 --print-only

Each checkout has a process of its own, with its own build of the extension, which trains on from where it is. They take
turns, a block of steps each, and in every round the other one begins: what else the machine does meets both alike. The
ratio is taken round by round; its median is what is claimed. Both train the same recipe from the same seed: that their
rewards are equal at every step shows that the same work was done.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMPILED = "+ blocks compiled"
# Rows of the second edition alone.
NEW = ("no guidance, twice the rows a forward", "no guidance, both trained steps in one forward")
RESULT = ROOT / "benchmarks" / "results" / "second_edition_vs_first.json"
DEMO = "demo"
STEPS = 10  # of the demo a turn
LEVER_SECONDS = 1.0  # of a lever's steps a turn, at least one
# Network, group, prompts and precision of the lever rows: so small that what is around the network shows.
JOB = ("tiny_sd3", 4, 2, "fp32")
SIDES = ("first", "second")


def case_names() -> list[str]:
    """The demo's training part, and the lever rows of both that compile nothing: else a compiler would be timed."""
    from benchmarks.lever_rows import Job

    rows = Job(*JOB, compiles=False).levers
    return [DEMO, *(row.name for row in rows if row.name not in (*NEW, COMPILED))]


# ------------------------------------------------------------------------------------- in each checkout


def prepared(case: str) -> tuple[Callable[[], Any], int]:
    """One training step of a case, as this checkout runs it, and how many steps a turn takes."""
    import torch

    from benchmarks.lever_rows import Job
    from benchmarks.levers import levers
    from flowgrpo_fast.recipes import RECIPES, digits
    from flowgrpo_fast.training.engine import build_engine
    from flowgrpo_fast.training.loop import train_step

    device = torch.device("cpu")
    torch.manual_seed(0)  # the loop that trainers write draws its noise from torch's generator
    if case == DEMO:
        engine = build_engine(digits(RECIPES["mix_grpo"].make()), device)
        return lambda: train_step(engine), STEPS
    lever = next(each for each in levers(Job(*JOB).recipe) if each.name == case)
    recipe = replace(lever.recipe, network=replace(lever.recipe.network, compile=False))
    lever = replace(lever, recipe=recipe)
    step = lever.step(lever.engine(device))
    step()
    start = time.perf_counter()
    step()
    return step, max(1, round(LEVER_SECONDS / (time.perf_counter() - start)))


def serve(case: str, threads: int) -> None:
    """Answers every line of standard input with a turn: seconds by step, by phase, and rewards, as a line of JSON."""
    import torch

    torch.set_num_threads(threads)
    step, num_steps = prepared(case)
    print(json.dumps({"num_steps": num_steps, "package": package()}), flush=True)
    for line in sys.stdin:
        seconds, cpu_seconds, reports = [], [], []
        for _ in range(int(line)):
            start, cpu_start = time.perf_counter(), time.process_time()
            reports.append(step())
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
        phases: dict[str, list[float]] = {}
        for report in reports:
            for name, value in report.seconds.items():
                phases.setdefault(name, []).append(value)
        rewards = [report.metrics["reward"] for report in reports]
        answer = {"seconds": seconds, "cpu_seconds": cpu_seconds, "phases": phases, "rewards": rewards}
        print(json.dumps(answer), flush=True)


def package() -> str:
    """Where the package that is measured lies."""
    import flowgrpo_fast

    return str(Path(flowgrpo_fast.__file__).resolve().parents[1])


# ---------------------------------------------------------------------------------------- side by side


class Side:
    """One checkout at one case, waiting for its turns."""

    def __init__(self, checkout: Path, case: str, threads: int) -> None:
        # Its own package and benchmarks are found first; this file is the only thing that both share.
        command = [sys.executable, str(Path(__file__).resolve()), str(checkout), "--serve", case]
        command += ["--threads", str(threads)]
        self.process = subprocess.Popen(
            command,
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        about = self._read()
        assert Path(about["package"]) == checkout, (
            f"{about['package']} was measured in the place of {checkout}"
        )
        self.num_steps: int = about["num_steps"]
        self.turns: list[dict[str, Any]] = []

    def turn(self, num_steps: int) -> None:
        """A block of steps."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{num_steps}\n")
        self.process.stdin.flush()
        self.turns.append(self._read())

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"error: a checkout ended with status {self.process.wait()} instead of an answer")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Its standard input ends, and so does it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compared(other: Path, case: str, rounds: int, threads: int) -> dict[str, Any]:
    """A case in turns: this checkout is the second, the other the first."""
    sides = {name: Side(path, case, threads) for name, path in zip(SIDES, (other, ROOT), strict=True)}
    num_steps = min(side.num_steps for side in sides.values())
    for number in range(rounds + 1):  # the first round warms both up
        for name in SIDES if number % 2 else SIDES[::-1]:
            sides[name].turn(num_steps)
    for side in sides.values():
        side.end()
    found: dict[str, Any] = {"case": case, "steps_a_turn": num_steps, "turns": rounds}
    for clock in ("seconds", "cpu_seconds"):
        by_turn = {
            name: [statistics.median(turn[clock]) for turn in side.turns[1:]] for name, side in sides.items()
        }
        ratios = [second / first for first, second in zip(*(by_turn[name] for name in SIDES), strict=True)]
        found[clock] = {name: spread(values) for name, values in by_turn.items()}
        found[f"{clock}_ratio"] = spread(ratios)
    rewards = [[reward for turn in sides[name].turns for reward in turn["rewards"]] for name in SIDES]
    found["equal_rewards"] = rewards[0] == rewards[1]
    found["phases"] = {
        name: {
            phase: rounded(statistics.median(s for turn in side.turns[1:] for s in turn["phases"][phase]))
            for phase in side.turns[-1]["phases"]
        }
        for name, side in sides.items()
    }
    return found


def sentence(found: dict[str, Any]) -> str:
    """A case as a line."""
    first, second = (found["seconds"][name]["median"] for name in SIDES)
    wall, cpu = (
        "{median:.3f} ({min:.3f} to {max:.3f})".format(**found[f"{clock}_ratio"])
        for clock in ("seconds", "cpu_seconds")
    )
    same = "" if found["equal_rewards"] else "; rewards differ"
    return f"{found['case']}: {first:.4g} -> {second:.4g} s a step, ratio {wall}, of CPU time {cpu}{same}"


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {
        "median": rounded(statistics.median(values)),
        "min": rounded(min(values)),
        "max": rounded(max(values)),
    }


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def revision(checkout: Path) -> str:
    """The commit that a checkout is at."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short=10", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("other", type=Path, help="a checkout of the edition to compare with, built")
    parser.add_argument("--cases", nargs="+", help=f"{DEMO}, or names of lever rows; all of them otherwise")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each checkout")
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--print-only", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.threads)
        return
    if str(ROOT) not in sys.path:  # run as a script
        sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks.rows import cpu_model, load

    other = arguments.other.resolve()
    names = arguments.cases or case_names()
    command = ["python", "benchmarks/compare_editions.py", "OTHER_CHECKOUT"]
    command += ["--threads", str(arguments.threads), "--rounds", str(arguments.rounds)]
    command += ["--cases", *arguments.cases] if arguments.cases else []
    result: dict[str, Any] = {
        "command": shlex.join(command),
        "date": datetime.date.today().isoformat(),
        "device": cpu_model(),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "first": revision(other),
        "second": revision(ROOT),
        "lever_job": f"{JOB[0]} x{JOB[1] * JOB[2]}, {JOB[3]}",
        "load_before": load(),
        "cases": [],
    }
    for name in names:
        found = compared(other, name, arguments.rounds, arguments.threads)
        result["cases"].append(found)
        result["load_after"] = load()
        print(sentence(found), flush=True)
        if not arguments.print_only:
            RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
