"""The report of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from flowgrpo_fast.json_files import check_links, write_whole
from flowgrpo_fast.monitor import figures
from flowgrpo_fast.monitor.metrics import Record, read_metrics

_GRIDS = 6  # looks that a report shows
_LARGE = 400_000  # bytes of a grid that a report holds as PNG
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 860px; margin: 2.5rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem }
.sub { color: #616e7c; margin-top: 0 } svg { width: 100%; height: auto }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: .8rem; margin: 1.4rem 0 }
.tile { border: 1px solid #e4e7eb; border-radius: 8px; padding: .7rem .9rem }
.tile b { display: block; font-size: 1.25rem; white-space: nowrap } .tile span { color: #616e7c; font-size: .82rem }
.looks img { max-width: 100%; border: 1px solid #e4e7eb } .looks figure { margin-bottom: 1.6rem }
figure { margin: 0 } figcaption { color: #616e7c; font-size: .85rem }
table { border-collapse: collapse; font-size: .9rem } td, th { padding: .2rem .9rem .2rem 0; text-align: left }
pre { background: #f5f7fa; padding: 1rem; border-radius: 8px; overflow-x: auto; font-size: .8rem }
"""


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` from `recipe.json`, `metrics.jsonl`, `summary.json` and `samples/`.

    Raises:
        ValueError: the folder holds no run.
    """
    records = read_metrics(run_dir)
    if not records or not (run_dir / "summary.json").exists():
        raise ValueError(f"{str(run_dir)!r} holds no run; give a folder that `flowgrpo-fast train` made")
    check_links(run_dir)
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    recipe = (run_dir / "recipe.json").read_text(encoding="utf-8")
    body = "\n".join(
        (
            _head(summary),
            _tiles(summary),
            _samples(run_dir, summary),
            _curves_title(summary),
            figures.svg(figures.curves_figure(records)),
            "<h2>Each reward, and the diversity of the samples</h2>",
            "<p class=sub>On the evaluation samples. Diversity: standard deviation over the samples of one "
            "prompt, mean over pixels and prompts; a fall shows a collapse that rewards do not see.</p>",
            figures.svg(figures.objectives_figure(records)),
            _ratio(records, summary),
            _time(records, summary),
            _changes(run_dir),
            f"<h2>Recipe</h2><details><summary>recipe.json</summary><pre>{html.escape(recipe)}</pre></details>",
        )
    )
    path = run_dir / "report.html"
    title = html.escape(f"{summary['recipe']} on {summary['model']}")
    write_whole(
        path,
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<style>{_STYLE}</style><body>{body}</body></html>\n",
    )
    return path


def write_figures(run_dir: Path, out: Path) -> list[Path]:
    """`before_after.png` and `curves.png` of a run, as the docs show them."""
    records = read_metrics(run_dir)
    grids = sample_grids(run_dir)
    if not records or len(grids) < 2:
        raise ValueError(f"{str(run_dir)!r} holds no finished run; give a folder that `train` made")
    out.mkdir(parents=True, exist_ok=True)
    titles = (_title(records, grids[0]), _title(records, grids[-1]))
    pictures = {
        "before_after.png": figures.before_after_figure(grids[0], grids[-1], titles),
        "curves.png": figures.curves_figure(records),
    }
    for name, figure in pictures.items():
        figure.savefig(out / name, dpi=110)
    return [out / name for name in pictures]


def _title(records: list[Record], grid: Path) -> str:
    step = _step_of(grid)
    judge = next((r["eval/judge"] for r in records if r["step"] == step and "eval/judge" in r), None)
    when = "before" if step == 0 else f"after {step} steps"
    return when if judge is None else f"{when}: the judge reads {100 * judge:.1f} % right"


def _head(summary: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    facts = [html.escape(str(fact)) for fact in (summary["date"], summary["device"], versions)]
    seed, steps = html.escape(str(summary["seed"])), html.escape(str(summary["steps"]))
    title = html.escape(f"{summary['recipe']} on {summary['model']}")
    return f"<h1>{title}</h1><p class=sub>{' &middot; '.join(facts)}<br>seed {seed}, {steps} steps</p>"


def _curves_title(summary: dict[str, Any]) -> str:
    if summary.get("judge_after") is None:
        return "<h2>Reward</h2>"
    return (
        "<h2>Reward and judge</h2>"
        "<p class=sub>The judge is one that training never sees, on the right axis.</p>"
    )


def _tiles(summary: dict[str, Any]) -> str:
    tiles = []
    if summary.get("judge_after") is not None:
        before, after = 100 * summary["judge_before"], 100 * summary["judge_after"]
        tiles.append((f"{before:.1f} &rarr; {after:.1f} %", "judge: samples read right"))
    tiles.append((f"{summary['reward_before']:+.3f} &rarr; {summary['reward_after']:+.3f}", "reward"))
    if summary.get("ratio_self_test") is not None:
        tiles.append((f"{summary['ratio_self_test']:.2g}", "max |ratio &minus; 1| before the first update"))
    tiles.append((f"{summary['cost']['seconds']:.0f} s", "wall time"))
    if "gpu_hours" in summary["cost"]:
        tiles.append((f"{summary['cost']['gpu_hours']:.3f}", "GPU-hours"))
    else:
        tiles.append((f"{summary['cost']['cpu_core_hours']:.3f}", "CPU core-hours"))
    cells = "".join(f"<div class=tile><b>{value}</b><span>{label}</span></div>" for value, label in tiles)
    return f"<div class=tiles>{cells}</div>"


def _samples(run_dir: Path, summary: dict[str, Any]) -> str:
    grids = sample_grids(run_dir)
    if not grids:
        return ""
    # From the first to the last, evenly: a report stays small enough for a browser.
    last = len(grids) - 1
    shown = sorted({round(place * last / (_GRIDS - 1)) for place in range(_GRIDS)})
    cells = "".join(
        f"<figure><figcaption>step {_step_of(grids[place])}</figcaption>"
        f"<img src='{_data_uri(grids[place])}' alt='samples'></figure>"
        for place in shown
    )
    note = "The same prompts and start noise at every step; the reward of each sample is under it."
    if summary.get("judge_after") is not None:
        note += " Red frame: the judge reads something else."
    return (
        f"<h2>Before and after</h2><p class=sub>{note} Samples in full size are in samples/.</p>"
        f"<div class=looks>{cells}</div>"
    )


def sample_grids(run_dir: Path) -> list[Path]:
    """The grids of a run's evaluations, by step."""
    return sorted((path for path in (run_dir / "samples").glob("step_*.png")), key=_step_of)


def _step_of(grid: Path) -> int:
    digits = grid.stem.removeprefix("step_")
    return int(digits) if digits.isascii() and digits.isdecimal() else -1


def _ratio(records: list[Record], summary: dict[str, Any]) -> str:
    measured = [record["first_ratio_error"] for record in records if "first_ratio_error" in record]
    value = summary.get("ratio_self_test")
    if value is None and not measured:
        return ""  # of a method without a ratio
    text = "not measured" if value is None else f"{value:.3g}"
    figure = figures.ratio_figure(records)
    clipped = [record["clip_fraction"] for record in records if "clip_fraction" in record]
    if figure is not None:
        below = figures.svg(figure)
    else:
        below = f"<p>Before each step's first update: {max(measured, default=0.0):.3g} at every step"
        below += f"; clipped ratios {100 * clipped[0]:.3g} %.</p>" if clipped else ".</p>"
    return (
        "<h2>Importance ratio</h2>"
        "<p class=sub>Self-test before the first update, on the real model and batch: "
        f"max |ratio &minus; 1| = {text}.</p>{below}"
    )


def _time(records: list[Record], summary: dict[str, Any]) -> str:
    seconds: dict[str, float] = {}
    for record in records:
        for name, value in record.items():
            if name.startswith("seconds/"):
                phase = name.removeprefix("seconds/")
                seconds[phase] = seconds.get(phase, 0.0) + value
    cost = "".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{value:.4g}</td></tr>"
        for name, value in summary["cost"].items()
    )
    chart = figures.svg(figures.time_figure(seconds)) if seconds else ""
    ratios = sorted(record["time_over_floor"] for record in records if "time_over_floor" in record)
    if ratios:  # of the steps, the median
        cost += f"<tr><td>time over the floor of its FLOPs</td><td>{ratios[len(ratios) // 2]:.3g}</td></tr>"
    return f"<h2>Time and cost</h2>{chart}<table>{cost}</table>"


def _changes(run_dir: Path) -> str:
    """Where a resume changed the recipe."""
    file = run_dir / "resumed.json"
    entries = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    rows = "".join(
        f"<tr><td>from step {entry['step'] + 1}</td><td>{html.escape(name)}</td>"
        f"<td>{html.escape(json.dumps(old))} &rarr; {html.escape(json.dumps(new))}</td></tr>"
        for entry in entries
        for name, (old, new) in entry["changed"].items()
    )
    return f"<h2>Changed on the way</h2><table>{rows}</table>" if rows else ""


def _data_uri(path: Path) -> str:
    """A grid as it is, or, where that is much, as a photograph is kept."""
    data, kind = path.read_bytes(), "png"
    if len(data) > _LARGE:
        buffer = io.BytesIO()
        Image.open(path).convert("RGB").save(buffer, "WEBP", quality=88)
        data, kind = buffer.getvalue(), "webp"
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()
