"""What the docs claim: the snippets run, the numbers stand in a checked-in result, the links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    report.PAGE,
]
README = (ROOT / "README.md").read_text()


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_readme_snippet_runs_and_takes_eight_lines_of_code() -> None:
    snippet = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]
    exec(compile(snippet, "README.md", "exec"), {})


def test_the_readme_recipe_is_the_recipe() -> None:
    from flowgrpo_fast import recipe as parts
    from flowgrpo_fast.recipes.trajectory import mix_grpo

    shown = re.findall(r"```python\n(Recipe\(.*?)```", README, flags=re.DOTALL)[0]
    assert eval(shown, vars(parts)) == mix_grpo()


def test_the_readme_speed_ups_are_the_checked_in_ones() -> None:
    results = report.load("ops", "cpu")
    for line in report.readme_lines(results):
        assert line in README
    headline = report.find(results, "sampling")["speedup_by_median"]["eager"]
    assert f"[{headline:.1f} in the checked-in run]" in README


def test_the_benchmark_page_is_the_checked_in_results() -> None:
    assert report.PAGE.read_text() == report.page(), "run python benchmarks/report.py"
    for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", report.page()):
        assert (report.PAGE.parent / target).exists()


def test_the_benchmarks_in_sentences_are_the_checked_in_ones() -> None:
    text = (ROOT / "docs/benchmarks.md").read_text()
    assert len(text.splitlines()) <= 60
    for line in report.headlines():
        assert f"- {line}\n" in text


def test_the_readme_demo_is_the_checked_in_one() -> None:
    results = json.loads((ROOT / "benchmarks/results/demo_cpu.json").read_text())
    first = results["runs"][0]
    assert first["seed"] == 0
    for number in (f"{100 * first['judge_before']:.1f} %", f"{100 * first['judge_after']:.1f} %"):
        assert number in README
    assert f"takes {first['seconds']:.0f} s" in README
    log = (ROOT / "docs/log.md").read_text()
    results["runs"] += json.loads((ROOT / "benchmarks/results/recipes_cpu.json").read_text())["runs"]
    for run in results["runs"]:
        assert f"{100 * run['judge_after']:.1f}" in log


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
