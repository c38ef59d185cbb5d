"""Two checkouts of this project side by side: seconds a training step, in turns on the same machine.

python benchmarks/compare_editions.py OTHER_CHECKOUT            writes benchmarks/results/second_edition_vs_first.json
python benchmarks/compare_editions.py OTHER_CHECKOUT --cases demo --rounds 9 --print-only

Each checkout has a process of its own, with its own build of the extension, which trains on from where it is. They take
turns, a block of steps each, and in every round the other one begins: what else the machine does meets both alike. The
ratio is taken round by round; its median is what is claimed. Both train the same recipe from the same seed: that their
rewards are equal at every step shows that the same work was done.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "second_edition_vs_first.json"
DEMO = "demo"
STEPS = 10  # of the demo a turn
LEVER_SECONDS = 1.0  # of a lever's steps a turn, at least one
JOB = ("small_sd3", 4, 1, "fp32")  # network, group, prompts and precision of the lever rows
SIDES = ("first", "second")


def case_names() -> list[str]:
    """The demo's training part, and the lever rows that compile nothing: a compiled block is a compiler's time."""
    from benchmarks.lever_rows import Job
    from benchmarks.levers import levers

    rows = levers(Job(*JOB).recipe)
    return [DEMO, *(lever.name for lever in rows if not lever.recipe.network.compile)]


# ------------------------------------------------------------------------------------- in each checkout


def prepared(case: str) -> tuple[Callable[[], Any], int]:
    """One training step of a case, as this checkout runs it, and how many steps a turn takes."""
    import torch

    from benchmarks.lever_rows import Job
    from benchmarks.levers import levers
    from flowgrpo_fast.recipes import digits, mix_grpo
    from flowgrpo_fast.training.engine import build_engine
    from flowgrpo_fast.training.loop import train_step

    device = torch.device("cpu")
    if case == DEMO:
        engine = build_engine(digits(mix_grpo()), device)
        return lambda: train_step(engine), STEPS
    lever = next(each for each in levers(Job(*JOB).recipe) if each.name == case)
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
        seconds, reports = [], []
        for _ in range(int(line)):
            start = time.perf_counter()
            reports.append(step())
            seconds.append(time.perf_counter() - start)
        phases: dict[str, list[float]] = {}
        for report in reports:
            for name, value in report.seconds.items():
                phases.setdefault(name, []).append(value)
        rewards = [report.metrics["reward"] for report in reports]
        print(json.dumps({"seconds": seconds, "phases": phases, "rewards": rewards}), flush=True)


def package() -> str:
    """Where the package that is measured lies."""
    import flowgrpo_fast

    return str(Path(flowgrpo_fast.__file__).resolve().parents[1])
