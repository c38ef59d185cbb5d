"""docs/precision.md against the checked-in results, and these against what the page concludes from them."""

from __future__ import annotations

import json

from benchmarks import effective_update

RESULT = json.loads(effective_update.RESULT.read_text())
PAGE = effective_update.PAGE.read_text()


def test_the_tables_are_the_checked_in_result() -> None:
    assert effective_update.with_tables(PAGE, RESULT) == PAGE, (
        "run python benchmarks/effective_update.py --page"
    )


def test_the_training_runs_are_the_checked_in_ones() -> None:
    for name in ("fp8_rows", "nvfp4"):
        path = effective_update.RESULT.with_name(f"precision_{name}_cpu.json")
        result = json.loads(path.read_text())
        (run,) = result["runs"]
        cells = [f"{100 * run['judge_before']:.1f}", f"{100 * run['judge_after']:.1f}", "0"]
        assert f"| `{name}` | {' | '.join(cells)} | `{result['command']}` |" in PAGE
        assert path.name in PAGE


def test_the_result_supports_what_the_page_says() -> None:
    """One layer: as an earlier simulation found; the adapter beside its layer is exact, the merged one is not."""
    layer = {(r["share"], r["arm"], r["inputs"]): r for r in RESULT["layer"]}
    for key, error, cosine in (
        ((0.001, "merged fp8_rows", "random"), 7.9, 0.13),
        ((0.001, "merged fp8_rows", "aligned"), 1.12, 0.66),
        ((0.01, "merged fp8_rows", "random"), 2.3, 0.40),
        ((0.03, "merged fp8_rows", "random"), 1.1, 0.67),
        ((0.001, "merged bf16", "random"), 1.67, 0.51),
    ):
        assert abs(layer[key]["cosine"] - cosine) < 0.03
        assert abs(layer[key]["error"] / error - 1) < 0.1
    for row in RESULT["modes"]:
        if row["precision"] == "fp32" and not row["arm"].startswith("merged"):
            assert row["cosine"] > 0.9999
            assert row["error"] < 1e-3
    slopes = [row["slope"] for row in RESULT["model"] if row["share"] == 0.03 and row["format"] != "nvfp4"]
    assert all(0.85 < slope < 1.15 for slope in slopes)


def test_a_fresh_measurement_gives_the_checked_in_numbers(monkeypatch) -> None:
    """The weights' table again, at one size of change; other machines round a little differently."""
    monkeypatch.setattr(effective_update, "SHARES", (0.01,))
    old = {(r["arm"], r["inputs"]): r for r in RESULT["layer"] if r["share"] == 0.01}
    for row in effective_update.layer_rows():
        assert abs(row["cosine"] - old[row["arm"], row["inputs"]]["cosine"]) < 0.02
