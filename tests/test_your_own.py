"""docs/your_own.md, run: its files and its two commands, in a locale that is not UTF-8."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from flowgrpo_fast.recipe_io import load_recipe

PAGE = (Path(__file__).parents[1] / "docs" / "your_own.md").read_text(encoding="utf-8")
# No flag can be changed here: the commands are run as they stand on the page, and a few more words after them.
LESS = ["num_steps=2", "task.num_eval_samples=4", "task.eval_every=1", "sigmas.num_inference_steps=6"]
PROGRAM = (
    "import shlex, sys; from flowgrpo_fast.cli import main; [main(shlex.split(w)) for w in sys.argv[1:]]"
)


def block(kind: str) -> str:
    found = re.search(rf"```{kind}\n(.*?)```", PAGE, flags=re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("your_own")
    (folder / "my_job.py").write_text(block("python"))
    (folder / "my_prompts.txt").write_text(f"{block('text')}ein roter W\u00fcrfel, red\n", encoding="utf-8")
    lines = block("sh").replace("\\\n", " ").splitlines()
    train, sample = (shlex.split(line)[1:] for line in lines)
    train = [*train[:-2], *LESS, *train[-2:]]
    there = [*sample, "--prompts", "my_prompts.txt", "--out-dir", "three", "--num-samples", "3"]
    del there[there.index("--prompt") : there.index("--prompt") + 2]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "PYTHONSAFEPATH": "1",  # as the installed command: the current folder is not on the path
        "XDG_STATE_HOME": str(folder / "state"),
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    words = [shlex.join(line) for line in (train, sample, there)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr.decode()
    return folder


def test_the_example_takes_about_thirty_lines() -> None:
    assert len([line for line in block("python").splitlines() if line.strip()]) <= 30


def test_it_trains(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "my_run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[1]["ratio_self_test"] == 0
    assert all(row["grad_norm"] > 0 for row in rows[1:])
    (term,) = load_recipe(folder / "my_run").task.rewards
    assert (term.function, term.weight) == ("my_job:colour", 1.0)


def test_it_samples(folder: Path) -> None:
    names = [f"{place:03d}_a_red_square.png" for place in range(4)]
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == names
    pictures = [Image.open(folder / "pictures" / name) for name in names]
    assert all(picture.size == (8, 8) for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_prompts_are_utf8_whatever_the_locale(folder: Path) -> None:
    (found,) = (folder / "three").glob("002_*.png")
    assert Image.open(found).text["prompt"] == "ein roter W\u00fcrfel, red"
