from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("drop_in_*.py")), ids=lambda path: path.stem)
def test_example_runs_and_its_first_ratio_is_one(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.endswith("max |ratio - 1| 0e+00") for line in lines)
