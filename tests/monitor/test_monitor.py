from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from flowgrpo_fast.monitor import cost
from flowgrpo_fast.monitor.cost import CostMeter, device_name
from flowgrpo_fast.monitor.figures import sample_grid, series, svg, time_figure
from flowgrpo_fast.monitor.metrics import MetricsLog, make_tracker, read_metrics
from flowgrpo_fast.monitor.progress import TrainingProgress
from flowgrpo_fast.monitor.report import write_report

RECORDS = [{"step": s, "reward": 0.1 * s, "seconds_step": 0.5, "first_ratio_error": 0.0} for s in range(1, 5)]


def test_metrics_survive_a_torn_line_and_a_resume_drops_what_was_undone(tmp_path) -> None:
    log = MetricsLog(tmp_path)
    for record in RECORDS:
        log.write(record)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    assert read_metrics(tmp_path) == RECORDS
    MetricsLog(tmp_path, last_step=2)
    assert read_metrics(tmp_path) == RECORDS[:2]


def test_a_full_disk_is_one_line(tmp_path) -> None:
    log = MetricsLog(tmp_path)
    log._path = Path("/dev/full")
    with pytest.raises(ValueError, match=r"cannot write '/dev/full': No space left on device; .* --resume"):
        log.write(RECORDS[0])


def test_the_tracker_gets_every_scalar(tmp_path) -> None:
    class Memory:
        seen, closed = [], False

        def log(self, step, values):
            self.seen.append((step, values))

        def close(self):
            self.closed = True

    tracker = Memory()
    log = MetricsLog(tmp_path, tracker=tracker)
    log.write({"step": 3, "reward": 0.5, "note": "text"})
    log.close()
    assert tracker.seen == [(3, {"step": 3.0, "reward": 0.5})]
    assert tracker.closed


def test_a_tracker_that_is_not_installed_says_how(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install 'flowgrpo-fast\[trackers\]'"):
        make_tracker("wandb", tmp_path, {})
    assert make_tracker("none", tmp_path, {}) is None


def test_the_bar_shows_reward_judge_ratio_and_seconds() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    with TrainingProgress(console, 4) as progress:
        progress.show({**RECORDS[0], "eval/judge": 0.725})
        progress.show(RECORDS[1])
    text = console.file.getvalue()
    for part in ("reward +0.200", "judge 72.5 %", "|ratio-1| 0.0e+00", "0.50 s/step", "2/4"):
        assert part in text


def test_without_a_terminal_lines_take_the_bars_place() -> None:
    console = Console(file=io.StringIO(), width=140)
    with TrainingProgress(console, 4, plain_every=2) as progress:
        for record in RECORDS[:3]:
            progress.show(record)
        evaluated = {"seconds_step": 0.75, "seconds/evaluation": 0.25}  # which is no part of a step's time
        progress.show({**RECORDS[3], **evaluated})
    lines = console.file.getvalue().strip().splitlines()
    assert all("0.50 s/step" in line for line in lines)
    assert [line.split("reward")[0].strip() for line in lines] == ["step    2/4", "step    4/4"]


def test_cost_counts_from_where_the_run_was(monkeypatch) -> None:
    clock = iter([100.0, 100.0 + 1800])
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    read = CostMeter(torch.device("cpu"), earlier_seconds=3600).read()
    assert read["seconds"] == 3600 + 1800
    assert read["cpu_core_hours"] == pytest.approx(1.5 * torch.get_num_threads())
    assert "cores" in device_name(torch.device("cpu"))


def test_the_grid_frames_what_the_judge_misread() -> None:
    images = torch.zeros(4, 1, 8, 8)
    images[1] = 1.0
    grid = sample_grid(images, ["a", "a", "b", "b"], torch.tensor([True, False, True, True]), columns=2)
    assert grid.size == (2 * 36 + 4, 2 * 36 + 4)
    assert grid.getpixel((20, 20)) == (0, 0, 0)
    assert grid.getpixel((36 + 20, 20)) == (255, 255, 255)
    assert grid.getpixel((36 + 3, 20)) == (220, 38, 38)
    assert grid.getpixel((3, 20)) == (255, 255, 255)


def test_series_and_figures() -> None:
    assert series([*RECORDS, {"step": 9}], "reward") == ([1, 2, 3, 4], pytest.approx([0.1, 0.2, 0.3, 0.4]))
    assert svg(time_figure({"rollout": 2.0, "update": 1.0})).startswith("<svg")


def test_a_report_needs_a_run(tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(RECORDS[0]) + "\n")
    with pytest.raises(ValueError, match="holds no run"):
        write_report(tmp_path)
