from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from flowgrpo_fast.monitor import cost
from flowgrpo_fast.monitor.cost import CostMeter, device_name
from flowgrpo_fast.monitor.figures import (
    curves_figure,
    phase_colour,
    ratio_figure,
    series,
    svg,
    time_figure,
)
from flowgrpo_fast.monitor.metrics import MetricsLog, Picture, make_tracker, read_metrics
from flowgrpo_fast.monitor.pictures import picture_of, sample_grid, save_picture, save_samples
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


CAPTION = 3 * 14 + 4  # three lines of a prompt, and a gap
RED = (220, 38, 38)


def test_the_grid_frames_what_the_judge_misread() -> None:
    images = torch.zeros(4, 1, 8, 8)
    images[1] = 1.0
    grid = sample_grid(images, ["a", "a", "b", "b"], correct=torch.tensor([True, False, True, True]))
    assert grid.size == (
        4 * 104 + 8,
        96 + CAPTION + 8 + 8,
    )  # 8 pixels shown as 96; two prompts fit into a row
    assert grid.getpixel((20, 20)) == (0, 0, 0)
    assert grid.getpixel((104 + 20, 20)) == (255, 255, 255)
    assert grid.getpixel((104 + 6, 20)) == RED
    assert grid.getpixel((6, 20)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("size", "cell"),
    [
        ((8, 8), (96, 96)),
        ((8, 4), (96, 48)),
        ((100, 60), (100, 60)),
        ((848, 480), (256, 145)),
        ((512, 512), (256, 256)),
    ],
)
def test_small_samples_grow_by_whole_factors_and_large_ones_shrink(size, cell) -> None:
    width, height = size
    images = torch.zeros(1, 3, height, width)
    images[..., : height // 2, :] = 1.0
    grid = np.asarray(sample_grid(images, ["a"], torch.zeros(1)))
    assert grid.shape == (cell[1] + CAPTION + 14 + 16, cell[0] + 16, 3)
    inside = grid[8 : 8 + cell[1], 8 : 8 + cell[0], 0]
    assert (inside[: cell[1] // 2 - 4] == 255).all()  # Lanczos rings near an edge
    assert (inside[cell[1] // 2 + 4 :] == 0).all()


def test_a_large_set_of_prompts_fills_the_grid_and_a_caption_is_under_each() -> None:
    images, prompts = torch.ones(300, 1, 8, 8), [f"prompt {i}" for i in range(300)]
    grid = np.asarray(sample_grid(images, prompts, torch.arange(300.0)))
    step = 96 + CAPTION + 14 + 8
    assert grid.shape == (10 * step + 8, 12 * 104 + 8, 3)
    for row in range(10):
        for column in range(12):
            below = grid[row * step + 8 + 96 : (row + 1) * step + 8, column * 104 + 8 : (column + 1) * 104]
            assert (below < 128).any()


def test_a_caption_stays_in_its_cell() -> None:
    for prompt in ("x" * 500, "word " * 100, "\u00fcber [red]x[/] \n $a_b$", "", " "):
        grid = np.asarray(sample_grid(torch.ones(1, 1, 8, 8), [prompt]))
        assert grid.shape[:2] == (96 + CAPTION + 16, 112)
        assert (grid[:, 8 + 96 + 1 :] == 255).all()


def test_samples_are_saved_in_full_size_with_prompt_and_reward(tmp_path) -> None:
    images = torch.rand(2, 3, 40, 24, generator=torch.Generator().manual_seed(0))
    prompts = ["../../a <b> \u00fc", "\u043a"]
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "001.png").symlink_to(tmp_path / "precious")
    paths = save_samples(images, prompts, tmp_path / "samples", torch.tensor([0.5, -1.0]))
    assert [path.name for path in paths] == ["000_a_b.png", "001.png"]
    assert (tmp_path / "precious").read_text() == "precious"
    for image, prompt, reward, path in zip(images, prompts, ("0.5", "-1"), paths, strict=True):
        found = Image.open(path)
        pixels = torch.from_numpy(np.asarray(found).copy()).permute(2, 0, 1)
        torch.testing.assert_close(pixels / 255, image, rtol=0, atol=0.5 / 255 + 1e-6)
        assert (found.text["prompt"], found.text["reward"]) == (prompt, reward)


def test_videos_are_saved_whole(tmp_path, monkeypatch) -> None:
    video = torch.linspace(0, 1, 5).view(1, 5, 1, 1, 1).expand(1, 5, 3, 32, 48)
    monkeypatch.setattr("flowgrpo_fast.monitor.pictures.find_spec", lambda name: None)
    (path,) = save_samples(video, ["a wave"], tmp_path)
    found = Image.open(path)
    assert (path.name, found.size, found.n_frames) == ("000_a_wave.webp", (48, 32), 5)
    for frame in range(5):
        found.seek(frame)
        assert abs(float(np.asarray(found.convert("RGB")).mean()) - 255 * frame / 4) < 4
    assert sample_grid(video, ["a wave"]).getpixel((20, 20)) == (128, 128, 128)  # the middle frame
    calls = []
    monkeypatch.setattr("flowgrpo_fast.monitor.pictures.find_spec", lambda name: object())
    monkeypatch.setattr(
        "flowgrpo_fast.monitor.pictures.export_to_video",
        lambda frames, path, **settings: calls.append((len(frames), frames[0].size, path, settings["fps"])),
    )
    (path,) = save_samples(video, ["a wave"], tmp_path)
    assert calls == [(5, (48, 32), str(path), 16)]
    assert path.name == "000_a_wave.mp4"


def test_trackers_get_pictures_and_text_and_keep_the_id(tmp_path, monkeypatch) -> None:
    grid = Picture(picture_of(torch.zeros(1, 4, 6)), "step 3")
    samples = [Picture(picture_of(torch.ones(3, 4, 4)), "a [red] cat [+0.500]")]
    logged, begun = [], []
    fake = SimpleNamespace(
        init=lambda **settings: begun.append(settings),
        log=lambda values, step: logged.append((step, values)),
        Image=lambda image, caption: (image.size, caption),
        finish=lambda: logged.append("finished"),
    )
    for package in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, package, fake)
        for _ in range(2):  # the second time as after a resume
            tracker = make_tracker(package, tmp_path, {"seed": 0})
            log = MetricsLog(tmp_path, tracker=tracker)
            log.show(3, grid, samples)
            log.close()
    shown = {"samples": ((6, 4), "step 3"), "sample/000": ((4, 4), "a [red] cat [+0.500]")}
    assert logged == [(3, shown), "finished"] * 4
    assert begun[0]["id"] == begun[1]["id"] == (tmp_path / "tracker_id").read_text().strip()
    assert len(begun[0]["id"]) >= 8
    assert all(settings["resume"] == "allow" for settings in begun)
    assert "id" not in begun[2]

    class Writer:
        def __init__(self, folder):
            self.seen = seen

        def add_image(self, name, pixels, step, dataformats):
            self.seen.append((name, pixels.shape, step, dataformats))

        def add_text(self, name, text, step):
            self.seen.append((name, text, step))

    seen: list = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    make_tracker("tensorboard", tmp_path, {}).show(3, grid, samples)
    assert seen == [
        ("samples", (4, 6, 3), 3, "HWC"),
        ("sample/000", (4, 4, 3), 3, "HWC"),
        ("samples", "    000  a [red] cat [+0.500]", 3),
    ]


MANY = [
    {"step": s, "reward": 0.1 * s, "loss": -0.01 * s, "kl": 0.0, "grad_norm": 1.0 / (s + 1), "lr": 1e-4}
    | ({"eval/reward": 0.2 * s} if s % 2 == 0 else {})
    for s in range(4)
]


def test_the_main_chart_shows_what_moves_the_reward_and_no_judge_without_one() -> None:
    figure = curves_figure(MANY)
    titles = [
        axes.get_title(loc) for axes in figure.axes for loc in ("center", "right") if axes.get_title(loc)
    ]
    assert titles == ["loss", "KL", "gradient norm", "learning rate"]
    main, loss, kl, _, rate = figure.axes
    assert [line.get_label() for line in main.lines] == ["training", "evaluation"]
    assert main.lines[1].get_xdata().tolist() == [0, 2]
    assert len(loss.lines) == 1
    assert [(len(axes.lines), axes.texts[0].get_text()) for axes in (kl, rate)] == [(0, "0"), (0, "0.0001")]
    assert "judge" not in svg(figure)
    judged = curves_figure([{**record, "eval/judge": 0.5} for record in MANY])
    assert "independent judge: right, %" in [axes.get_ylabel() for axes in judged.axes]
    for axes in (main, loss):
        figure.draw_without_rendering()
        assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_a_ratio_that_never_changes_is_no_chart() -> None:
    assert ratio_figure(RECORDS) is None
    moving = [{**record, "clip_fraction": 0.1 * record["step"]} for record in RECORDS]
    assert ratio_figure(moving) is not None


def test_a_phase_has_one_colour_in_every_run() -> None:
    def colours(seconds):
        return {
            patch.get_label().split(" ")[0]: patch[0].get_facecolor()
            for patch in time_figure(seconds).axes[0].containers
        }

    first = colours({"rollout": 2.0, "update": 1.0, "mine": 0.1})
    second = colours({"rollout": 1.0, "update": 2.0, "reward": 4.0, "mine": 9.0})
    assert {name: second[name] for name in first} == first
    known = ("rollout", "update", "reward", "evaluation", "credit", "self_test")
    assert len({phase_colour(name) for name in known}) == len(known)


def test_every_field_of_a_report_is_text(tmp_path) -> None:
    """Of a run folder from elsewhere: no name in it becomes markup."""
    evil = "<img src=x onerror=alert(1)>&\"'$\\frac$"
    records = [
        {
            "step": s,
            "reward": 0.1 * s,
            "seconds_step": 0.5,
            f"seconds/{evil}": 1.0 + s,
            f"eval/{evil}": 1.0 * s,
        }
        for s in range(3)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "recipe.json").write_text(json.dumps({"name": evil}))
    text = ("recipe", "model", "seed", "steps", "date", "device")
    summary = dict.fromkeys(text, evil) | {"versions": {evil: evil}, "cost": {"seconds": 1, evil: 2.0}}
    summary |= {
        "cost": {"seconds": 1.0, "gpu_hours": 1.0, evil: 2.0},
        "reward_before": 0.0,
        "reward_after": 1.0,
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "samples").mkdir()
    for step in (2, 10, 1_000_000):
        save_picture(
            sample_grid(torch.rand(2, 1, 8, 8), [evil] * 2), tmp_path / "samples" / f"step_{step:06d}.png"
        )
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<img src=x" not in page
    assert page.count("&lt;img src=x") >= 8
    shown = re.findall(r"<figcaption>step (\d+)", page)
    assert shown == ["2", "10", "1000000"]
    assert "judge" not in page


def test_series_and_figures() -> None:
    assert series([*RECORDS, {"step": 9}], "reward") == ([1, 2, 3, 4], pytest.approx([0.1, 0.2, 0.3, 0.4]))
    assert svg(time_figure({"rollout": 2.0, "update": 1.0})).startswith("<svg")


def test_a_report_needs_a_run(tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(RECORDS[0]) + "\n")
    with pytest.raises(ValueError, match="holds no run"):
        write_report(tmp_path)
