"""Curves of a run as SVG or PNG. No global pyplot state."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.ticker import MaxNLocator
from PIL import Image

from flowgrpo_fast.monitor.metrics import Record

INK, BLUE, ORANGE, GREEN, GREY = "#1f2933", "#2563eb", "#d97706", "#15803d", "#9aa5b1"
_PHASES = {
    "rollout": BLUE,
    "update": GREEN,
    "reward": ORANGE,
    "evaluation": GREY,
    "self_test": "#7c3aed",
    "credit": "#0f766e",
}
_OTHERS = ("#0e7490", "#be185d", "#4d7c0f", "#9f1239", "#1e40af")
# Under the rewards of the main chart, where they are recorded.
_BELOW = {"loss": "loss", "kl": "KL", "grad_norm": "gradient norm", "lr": "learning rate"}
_ACROSS, _FEW = 3, 40  # small charts in a row; points up to which a curve shows each


def series(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was recorded."""
    pairs = [(int(r["step"]), float(r[name])) for r in records if name in r]
    return [step for step, _ in pairs], [value for _, value in pairs]


def curves_figure(records: Sequence[Record]) -> Figure:
    """The main chart: reward in training and in evaluations, a judge where there is one, and below what moves it."""
    below = [name for name in _BELOW if series(records, name)[0]]
    figure = Figure(figsize=(7.2, 4.6 if below else 3.2), layout="constrained")
    grid = figure.add_gridspec(2 if below else 1, max(1, len(below)), height_ratios=[2, 1][: 1 + bool(below)])
    left = _axes(figure, "training step", "reward", grid[0, :])
    for name, label, colour in (("reward", "training", BLUE), ("eval/reward", "evaluation", GREEN)):
        _line(left, *series(records, name), colour, label)
    left.legend(frameon=False, fontsize=8, loc="best")
    steps, values = series(records, "eval/judge")
    if steps:
        right = left.twinx()
        right.plot(steps, [100 * v for v in values], color=ORANGE, linewidth=1.8, marker="o", markersize=3)
        right.set_ylabel("independent judge: right, %", color=ORANGE)
        right.set_ylim(min(50.0, 100 * min(values) - 5), 101)
        right.spines[["top", "left"]].set_visible(False)
    for column, name in enumerate(below):
        _panel(figure, grid[1, column], _BELOW[name], *series(records, name), GREY)
    return figure


def objectives_figure(records: Sequence[Record]) -> Figure:
    """Each reward by itself and the samples' diversity, on the fixed evaluation samples."""
    names = sorted({k for r in records for k in r if k.startswith("eval/")} - {"eval/judge", "eval/reward"})
    rows = -(-len(names) // _ACROSS)
    figure = Figure(figsize=(7.2, 2.3 * max(1, rows)), layout="constrained")
    grid = figure.add_gridspec(max(1, rows), min(_ACROSS, max(1, len(names))))
    for index, name in enumerate(names):
        place = grid[index // _ACROSS, index % _ACROSS]
        _panel(figure, place, name.removeprefix("eval/"), *series(records, name), GREEN)
    return figure


def ratio_figure(records: Sequence[Record]) -> Figure | None:
    """max |ratio - 1| before each step's first update, and the share of clipped ratios; None if both never change."""
    shown = {"first_ratio_error": "max |ratio - 1| on policy", "clip_fraction": "clipped ratios, share"}
    if all(len(set(series(records, name)[1])) <= 1 for name in shown):
        return None
    figure = Figure(figsize=(7.2, 2.3), layout="constrained")
    grid = figure.add_gridspec(1, 2)
    for place, (name, label) in enumerate(shown.items()):
        _panel(figure, grid[0, place], label, *series(records, name), BLUE)
    return figure


def time_figure(seconds: dict[str, float]) -> Figure:
    """One bar: where the wall time went. A phase has one colour in every run."""
    figure = Figure(figsize=(7.2, 1.5), layout="constrained")
    axes = figure.add_subplot()
    total, left = sum(seconds.values()), 0.0
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        label = f"{name.replace('_', ' ')} {100 * value / total:.0f} %"
        axes.barh(0, value, left=left, color=phase_colour(name), label=label)
        left += value
    axes.set_xlim(0, total)
    axes.set_yticks([])
    axes.set_xlabel("seconds")
    axes.spines[["top", "right", "left"]].set_visible(False)
    legend = axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def phase_colour(name: str) -> str:
    """The colour of a phase of a step: its own, whatever other phases a run has."""
    return _PHASES.get(name) or _OTHERS[zlib.crc32(name.encode()) % len(_OTHERS)]


def before_after_figure(before: Path, after: Path, titles: tuple[str, str]) -> Figure:
    """Two sample grids side by side: the same prompts, the same start noise."""
    figure = Figure(figsize=(9.6, 4.3), layout="constrained")
    for index, (path, title) in enumerate(zip((before, after), titles, strict=True)):
        axes = figure.add_subplot(1, 2, index + 1)
        axes.imshow(np.asarray(Image.open(path)))
        axes.set_title(title, fontsize=10, color=INK)
        axes.set_axis_off()
    return figure


def _axes(figure: Figure, xlabel: str, ylabel: str, place: SubplotSpec) -> Axes:
    axes = figure.add_subplot(place)
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))  # there are no half steps
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _line(axes: Axes, steps: list[int], values: list[float], colour: str, label: str = "") -> None:
    """A curve; where there are few values, each is a point."""
    marker = "o" if len(steps) <= _FEW else ""
    axes.plot(steps, values, color=colour, linewidth=1.6, marker=marker, markersize=2.5, label=label)


def _panel(
    figure: Figure, place: SubplotSpec, name: str, steps: list[int], values: list[float], colour: str
) -> None:
    """A small chart of one metric; one that never changes is a number, which tells more than a flat line."""
    if len(set(values)) > 1:
        axes = _axes(figure, "training step", "", place)
        axes.set_title(
            name, fontsize=9, color=INK, parse_math=False, loc="right"
        )  # a power of ten is at the left
        axes.yaxis.get_offset_text().set_fontsize(7)
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_fontsize(8)
        _line(axes, steps, values, colour)
        return
    axes = figure.add_subplot(place)
    axes.set_axis_off()
    axes.set_title(name, fontsize=9, color=INK, parse_math=False)
    text = f"{values[0]:.3g}" if values else "-"
    axes.text(0.5, 0.55, text, ha="center", va="center", fontsize=16, color=INK, transform=axes.transAxes)
    note = "at every step" if len(values) > 1 else ""
    axes.text(0.5, 0.3, note, ha="center", va="center", fontsize=8, color=GREY, transform=axes.transAxes)


def svg(figure: Figure) -> str:
    """The figure as an inline SVG element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
