"""Pictures of a run: curves as SVG or PNG, sample grids as PNG. No global pyplot state."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from flowgrpo_fast.monitor.metrics import Record

INK, BLUE, ORANGE, GREEN, GREY = "#1f2933", "#2563eb", "#d97706", "#15803d", "#9aa5b1"
_CELL, _GAP = 32, 4  # pixels of a grid cell, between cells


def series(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was recorded."""
    pairs = [(int(r["step"]), float(r[name])) for r in records if name in r]
    return [step for step, _ in pairs], [value for _, value in pairs]


def curves_figure(records: Sequence[Record]) -> Figure:
    """Training reward on the left axis, the independent judge's reading on the right."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    left = _axes(figure, "training step", "reward (mean of the rollout)")
    steps, values = series(records, "reward")
    left.plot(steps, values, color=BLUE, linewidth=1.6)
    left.yaxis.label.set_color(BLUE)
    steps, values = series(records, "eval/judge")
    if steps:
        right = left.twinx()
        right.plot(steps, [100 * v for v in values], color=ORANGE, linewidth=1.8, marker="o", markersize=3)
        right.set_ylabel("independent judge: right, %", color=ORANGE)
        right.set_ylim(min(50.0, 100 * min(values) - 5), 101)
        right.spines[["top", "left"]].set_visible(False)
    return figure


def objectives_figure(records: Sequence[Record]) -> Figure:
    """Each reward by itself and the samples' diversity, on the fixed evaluation samples."""
    names = sorted({k for r in records for k in r if k.startswith("eval/")} - {"eval/judge", "eval/reward"})
    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    for index, name in enumerate(names):
        axes = _axes(figure, "training step", name.removeprefix("eval/"), (1, len(names), index + 1))
        axes.plot(*series(records, name), color=GREEN, linewidth=1.6, marker="o", markersize=2.5)
    return figure


def ratio_figure(records: Sequence[Record]) -> Figure:
    """max |ratio - 1| before each step's first update, and the share of clipped ratios."""
    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    left = _axes(figure, "training step", "max |ratio - 1| on policy", (1, 2, 1))
    steps, errors = series(records, "first_ratio_error")
    left.plot(steps, errors, color=BLUE, linewidth=1.6)
    left.set_ylim(0, max([1e-6, *(1.1 * error for error in errors)]))
    right = _axes(figure, "training step", "clipped ratios, %", (1, 2, 2))
    steps, values = series(records, "clip_fraction")
    right.plot(steps, [100 * v for v in values], color=GREY, linewidth=1.6)
    right.set_ylim(0, max([1.0, *(110 * v for v in values)]))
    return figure


def time_figure(seconds: dict[str, float]) -> Figure:
    """One bar: where the wall time went."""
    figure = Figure(figsize=(7.2, 1.5), layout="constrained")
    axes = figure.add_subplot()
    total, left = sum(seconds.values()), 0.0
    colours = (BLUE, GREEN, GREY, ORANGE, "#7c3aed", "#0e7490", "#be185d")
    for (name, value), colour in zip(
        sorted(seconds.items(), key=lambda item: -item[1]), colours, strict=False
    ):
        axes.barh(0, value, left=left, color=colour, label=f"{name} {100 * value / total:.0f} %")
        left += value
    axes.set_xlim(0, total)
    axes.set_yticks([])
    axes.set_xlabel("seconds")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8)
    return figure


def before_after_figure(before: Path, after: Path, titles: tuple[str, str]) -> Figure:
    """Two sample grids side by side: the same prompts, the same start noise."""
    figure = Figure(figsize=(9.6, 4.3), layout="constrained")
    for index, (path, title) in enumerate(zip((before, after), titles, strict=True)):
        axes = figure.add_subplot(1, 2, index + 1)
        axes.imshow(np.asarray(Image.open(path)))
        axes.set_title(title, fontsize=10, color=INK)
        axes.set_axis_off()
    return figure


def _axes(figure: Figure, xlabel: str, ylabel: str, place: tuple[int, int, int] = (1, 1, 1)) -> Axes:
    axes = figure.add_subplot(*place)
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def svg(figure: Figure) -> str:
    """The figure as an inline SVG element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def sample_grid(
    images: Tensor, prompts: Sequence[str], correct: Tensor | None, rows: int = 10, columns: int = 12
) -> Image.Image:
    """A grid of samples, one row per prompt, a red frame where the judge reads something else.

    Args:
        images: `[N, C, H, W]` in [0, 1], C = 1 or 3; of videos `[N, F, C, H, W]` the middle frame is shown.
        correct: `[N]` bool, or None for no frames.
    """
    if images.ndim == 5:
        images = images[:, images.shape[1] // 2]
    side = _CELL + _GAP
    shown = list(dict.fromkeys(prompts))[:rows]
    canvas = Image.new("RGB", (columns * side + _GAP, len(shown) * side + _GAP), "white")
    for row, prompt in enumerate(shown):
        members = [i for i, other in enumerate(prompts) if other == prompt][:columns]
        for column, index in enumerate(members):
            x, y = column * side + _GAP, row * side + _GAP
            if correct is not None and not bool(correct[index]):
                frame = (x - 2, y - 2, x + _CELL + 2, y + _CELL + 2)
                canvas.paste((220, 38, 38), frame)
            canvas.paste(_picture(images[index]), (x, y))
    return canvas


def _picture(image: Tensor) -> Image.Image:
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    array = pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()
    return Image.fromarray(array).resize((_CELL, _CELL), Image.Resampling.NEAREST)
