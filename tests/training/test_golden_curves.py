"""Every named recipe, and machinery beside them, still learns as recorded in tests/golden/curves, to the bit.

The curves are trained in a process of its own, with arithmetic that is the same on every x86-64. Where it is not
(another torch, another architecture), numbers are compared to 1e-4 (coarsely in low precision and after
a selection) and checksums not at all; a warning says so.
Record again: tests/golden/record_curves.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest

from flowgrpo_fast.recipes import RECIPES
from tests.golden.golden_cases import NAMES, make
from tests.golden.record_curves import CURVES, PORTABLE, Curve, from_text, header_of, to_text

RECORDER = CURVES.parent / "record_curves.py"
TOLERANCE = 1e-4  # relative to the largest value of the quantity in the curve
# Where numbers are rounded coarsely or candidates chosen, a last bit may become a step of the format or another sample.
COARSE_TOLERANCE = 0.3
# Compared across arithmetics; counts of clipped samples and sums that cancel out are not numbers to compare so.
CLOSE = (
    "reward",
    "grad_norm",
    "ratio_mean",
    "ratio_max",
    "kl",
    "positive_loss",
    "negative_loss",
    "network_evaluations",
    "network_backwards",
    "window_start",
)


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    """The folder of the curves of today, and what was printed while they were trained."""
    chosen = [
        item.callspec.params["name"]
        for item in request.session.items
        if item.fspath == request.node.fspath
        and "name" in getattr(getattr(item, "callspec", None), "params", {})
    ]
    folder = tmp_path_factory.mktemp("curves")
    command = [sys.executable, str(RECORDER), "--out", str(folder), *chosen]
    result = subprocess.run(command, env={**os.environ, **PORTABLE}, capture_output=True, text=True)
    return folder, result.stderr


def differences(name: str, recorded: Curve, new: Curve, exact: bool) -> list[str]:
    """A line for each number that differs, in the order of the steps."""
    lines = []
    if len(recorded.steps) != len(new.steps):
        lines.append(f"{name}: {len(recorded.steps)} steps are recorded, {len(new.steps)} were trained")
    largest = {key: max(abs(step.get(key, 0.0)) for step in recorded.steps) for key in quantities(recorded)}
    for number, (before, after) in enumerate(zip(recorded.steps, new.steps, strict=False), 1):
        for key in sorted(before.keys() | after.keys()):
            old, now = before.get(key), after.get(key)
            if old is None or now is None:
                lines.append(f"{name}, step {number}: {key} recorded {old}, now {now}")
                continue
            allowed = 0.0 if exact else tolerance(name) * largest[key]
            compared = exact or key.startswith(CLOSE)
            if compared and repr(old) != repr(now) and not abs(now - old) <= allowed:
                relative = abs(now - old) / abs(old) if old else float("inf")
                lines.append(
                    f"{name}, step {number}: {key} recorded {old!r}, now {now!r}, relative difference {relative:.2g}"
                )
    if exact:
        lines += [
            f"{name}: sha256 of {key} recorded {recorded.checksums.get(key)}, now {new.checksums.get(key)}"
            for key in sorted(recorded.checksums.keys() | new.checksums.keys())
            if recorded.checksums.get(key) != new.checksums.get(key)
        ]
    return lines


def tolerance(name: str) -> float:
    """Between arithmetics that differ in last bits."""
    text = repr(make(name))
    coarse = any(part in text for part in ("LowPrecision(", "'bf16'", "=Prune(", "=Scouts("))
    return COARSE_TOLERANCE if coarse else TOLERANCE


def quantities(curve: Curve) -> set[str]:
    return {key for step in curve.steps for key in step}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_learns_as_recorded(name, trained) -> None:
    folder, printed = trained
    file = CURVES / f"{name}.txt"
    assert file.exists(), f"no curve of {name} is recorded: run {RECORDER.name} {name}"
    assert (folder / file.name).exists(), f"{name} did not train:\n{printed}"
    recorded, header = from_text(file.read_text())
    new, header_now = from_text((folder / file.name).read_text())
    assert header["recipe"] == header_now["recipe"], f"the case {name} changed since its curve was recorded"
    exact = header["arithmetic"] == header_now["arithmetic"]
    if not exact:
        warnings.warn(
            f"golden curves compared to {tolerance(name):g} only, without checksums: this arithmetic is not the "
            f"recorded one ({header_now['arithmetic']}; recorded {header['arithmetic']})",
            stacklevel=1,
        )
    found = differences(name, recorded, new, exact)
    more = f"\n... and {len(found) - 12} more" if len(found) > 12 else ""
    assert not found, "\n".join(found[:12]) + more


def test_every_recipe_has_a_curve_and_every_curve_a_case() -> None:
    files = {path.stem for path in CURVES.glob("*.txt")}
    assert files == set(NAMES), f"run {RECORDER.name}, or delete what no case is called any more"
    assert set(RECIPES) <= files


def test_a_file_reads_back_to_the_bit_and_a_last_bit_is_seen() -> None:
    curve, header = from_text((CURVES / "flow_grpo.txt").read_text())
    assert header == header_of("flow_grpo", header["arithmetic"])
    assert from_text(to_text(curve, header)) == (curve, header)
    reward = curve.steps[2]["reward"]
    steps = [dict(step) for step in curve.steps]
    steps[2]["reward"] = reward * (1 + 2**-23)
    other = replace(curve, steps=tuple(steps))
    [line] = differences("flow_grpo", curve, other, exact=True)
    assert line.startswith(f"flow_grpo, step 3: reward recorded {reward!r}, now ")
    assert line.endswith("relative difference 1.2e-07")
    assert not differences("flow_grpo", curve, other, exact=False)
    steps[2]["reward"] = reward * (1 + 1e-2)
    assert differences("flow_grpo", curve, other, exact=False)
