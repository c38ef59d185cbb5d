"""What comes of a stage of the GPU check, and how it is read from what the stage has written."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NEEDED = {  # import name: what goes without it
    "pybind11": "the build",
    "ninja": "the build",
    "pytest": "every test",
    "hypothesis": "tests with generated shapes",
    "numpy": "rollout, training, their tests and benchmarks",
    "diffusers": "the digits model, the scheduler, the rollout and train-step benchmarks",
    "safetensors": "checkpoints and the digits model",
    "transformers": "what diffusers loads with it",
    "peft": "LoRA",
    "PIL": "sample grids",
    "matplotlib": "figures",
    "sklearn": "the digits' data and judge",
    "scipy": "tests of distributions",
    "pynvml": "the energy of a run",
    "xdist": "tests side by side",
    "pytest_benchmark": "pytest benchmarks/ (the measurements here do without)",
    "triton": "torch.compile on the GPU, so the speed-ups over it",
    "rich": "coloured tables",
    "tyro": "the command line and its tests",
    "ml_dtypes": "comparisons of the low-precision codes",
}


@dataclass
class Stage:
    """What came of one stage."""

    name: str
    status: str = "passed"  # passed | failed | timed out | skipped
    seconds: float = 0.0
    detail: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


def read_tests(junit: Path) -> Callable[[Stage, str], None]:
    """Counts of a JUnit report. A file that cannot be imported for a missing package counts as skipped, by name."""

    def read(stage: Stage, text: str) -> None:
        passed, skips, failed, lacking = 0, 0, [], {}
        for case in ElementTree.parse(junit).iter("testcase") if junit.exists() else ():
            name = f"{case.get('classname')}::{case.get('name')}"
            problem = next((child for child in case if child.tag in ("failure", "error")), None)
            said = "" if problem is None else (problem.get("message") or "") + (problem.text or "")
            package = re.search(r"No module named '(\w+)", said)
            if package and package[1] in NEEDED:
                lacking[name] = f"needs {package[1]}"
            elif problem is not None:
                failed.append(name)
            elif case.find("skipped") is not None:
                skips += 1
            else:
                passed += 1
        if not junit.exists():  # which is written at the end, and the stage was stopped before
            passed, failed, skips = read_lines(text)
        counts = {"passed": passed, "failed": len(failed), "skipped": skips + len(lacking)}
        stage.numbers = counts | {"failed_tests": failed[:50], "skipped_for_packages": lacking}
        if stage.status == "failed" and lacking and passed and not failed:
            stage.status, stage.detail = "passed", f"{len(lacking)} files skipped for missing packages"
        if stage.status == "passed" and not passed:
            stage.status, stage.detail = "failed", "no test ran"

    return read


def read_lines(text: str) -> tuple[int, list[str], int]:
    """Tests passed, failed by name, and skipped, of pytest's lines: alone, or from workers."""
    outcomes = "PASSED|FAILED|ERROR|SKIPPED"
    alone = re.findall(rf"^(\S+::.*?) ({outcomes})\b", text, re.MULTILINE)
    workers = re.findall(rf"^\[gw\d+\].*?({outcomes}) (\S+::.*?) *$", text, re.MULTILINE)
    found = [*alone, *((name, outcome) for outcome, name in workers)]
    failed = [name for name, outcome in found if outcome in ("FAILED", "ERROR")]
    counts = [sum(outcome == each for _, outcome in found) for each in ("PASSED", "SKIPPED")]
    return counts[0], failed, counts[1]


def read_sanitizer(stage: Stage, text: str) -> None:
    """The errors compute-sanitizer counted; where it was stopped before it could, those it named and what had run."""
    found = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", text)
    stage.numbers = {"errors": sum(int(a or b) for a, b in found) if found else None}
    if stage.status == "timed out":
        named = re.findall(r"^=+ (?:Invalid|Misaligned|Error:|Program hit|Potential)", text, re.MULTILINE)
        ran = len(re.findall(r"^(?:ok  |DIFF|FAIL) ", text, re.MULTILINE))
        stage.numbers = {"errors": len(named), "lines": ran}
        stage.detail += f", after {ran} lines of the smoke test and {len(named)} errors"
    elif "Device not supported" in text:
        stage.status, stage.detail = "skipped", "compute-sanitizer: device not supported"
    elif stage.status == "passed" and (not found or stage.numbers["errors"]):
        stage.status, stage.detail = "failed", "compute-sanitizer found errors, or gave no summary"


def read_levers(folder: Path) -> Callable[[Stage, str], None]:
    """Rows measured, failed and left; a stage that is stopped keeps what it has written. One row at least passes."""

    def read(stage: Stage, _: str) -> None:
        path = folder / "levers_cuda.json"
        result = json.loads(path.read_text()) if path.exists() else {"jobs": [], "left": []}
        rows = sum(len(job["rows"]) for job in result["jobs"])
        failed = {
            f"{job['job']}, {name}": why for job in result["jobs"] for name, why in job["failed"].items()
        }
        stage.numbers = {"rows": rows, "left": len(result["left"]), "failed_rows": failed}
        if stage.status == "timed out" and rows:
            stage.status, stage.detail = "passed", f"{stage.detail}, after {rows} rows"
        elif stage.status == "passed" and not rows:
            stage.status, stage.detail = "failed", "no row was measured"

    return read
