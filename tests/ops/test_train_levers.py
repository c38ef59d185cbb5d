"""The training step lever by lever: both loops compute the same, every row runs, and the page says what was found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import lever_report, lever_rows, rows, trainer_loop
from benchmarks.agreement import agreement
from benchmarks.lever_report import (
    COMPILED,
    EQUAL,
    FAST,
    FLASH,
    JOINED,
    LOW,
    NO_KL,
    PRUNED,
    SHARED,
    TRAINER,
    TRAINER_FAST,
    WIDE,
    WINDOW,
)
from benchmarks.lever_rows import (
    CPU_SIZES,
    GPU_JOBS,
    TINY_JOBS,
    compare,
    measure_levers,
    one_by_one,
    rollouts,
)
from benchmarks.networks import SCALES
from flowgrpo_fast.planner.live import floor_of
from flowgrpo_fast.planner.published import PUBLISHED
from flowgrpo_fast.recipe import TransitionKL
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import train_step

CPU = torch.device("cpu")
SD3, FLUX = TINY_JOBS


def rows_of(job):
    return {lever.name: lever for lever in job.levers}


@pytest.fixture
def one_round(monkeypatch):
    monkeypatch.setattr(lever_rows, "_peak_elsewhere", lambda job, name: 10**9)
    torch.compiler.set_stance("force_eager")  # what is compiled is the business of tests/models
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("job", TINY_JOBS, ids=str)
@pytest.mark.parametrize("name", [TRAINER, WINDOW])
def test_both_loops_compute_the_same(job, name):
    """Same weights, noise and rewards: rollout, log-probs, advantages and the gradient of one update."""
    found = agreement(rows_of(job)[name].recipe, CPU)
    assert found["latents"] < 1e-5
    assert found["finished"] < 1e-5
    assert found["log_prob"] < 1e-5
    assert found["advantages"] < 1e-5
    assert found["gradient"] < 1e-4
    assert found["gradient_cosine"] > 1 - 1e-8
    assert found["gradient_norm"] > 1e-6


def test_the_kl_is_part_of_what_agrees():
    """With a weight so large that the policy's own gradient vanishes beside it."""
    recipe = rows_of(SD3)[TRAINER].recipe
    plain = agreement(recipe, CPU)["gradient_norm"]
    objective = replace(recipe.objective, regularizers=(TransitionKL(beta=1e3),))
    heavy = agreement(replace(recipe, objective=objective), CPU)
    assert heavy["gradient_norm"] > 100 * plain
    assert heavy["gradient"] < 1e-4


def test_the_trainers_loop_wastes_what_it_is_said_to_waste():
    """Twice the rows in one forward, with gradient; fp32 weights; a look-up per sample."""
    engine = build_engine(rows_of(SD3)[TRAINER].recipe, CPU)
    trainer, rows = trainer_loop.Trainer(engine), []
    engine.model.module.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append((len(kwargs["hidden_states"]), torch.is_grad_enabled())),
        with_kwargs=True,
    )
    report = trainer.step()
    forwards = 2 * 10 + 2 * 9 + 2 * 9  # two micro-batches of a group: rollout, update, start weights
    assert len(rows) == forwards
    assert {count for count, _ in rows} == {2 * SD3.group_size}
    assert sum(with_gradient for _, with_gradient in rows) == 2 * 9
    assert {p.dtype for p in engine.model.module.parameters()} == {torch.float32}
    assert report.metrics["ratio"] == pytest.approx(1, abs=1e-5)
    assert set(report.seconds) == {"rollout", "reward", "update"}


def test_a_bf16_network_has_a_floor():
    """Its weights take no fp32 latents: it is counted under autocast, as it runs, to the same FLOPs."""
    recipe = rows_of(SD3)[EQUAL].recipe
    machines = [replace(recipe.machine, precision=precision) for precision in ("bf16", "fp32")]
    half, full = (floor_of(build_engine(replace(recipe, machine=m), CPU)) for m in machines)
    assert half.flops == full.flops > 0


def test_levers_change_one_thing_each():
    chain = [TRAINER, EQUAL, COMPILED, WINDOW, NO_KL, FAST, SHARED, PRUNED, LOW]
    rows = rows_of(SD3)
    assert list(rows) == [*chain, WIDE, JOINED, FLASH, TRAINER_FAST]
    assert rows[TRAINER].recipe == rows[EQUAL].recipe
    assert rows[TRAINER_FAST].recipe == rows[FAST].recipe
    assert rows[FAST].recipe.guidance_scale == 1
    assert rows[PRUNED].images == rows[FAST].images == 8
    assert NO_KL not in rows_of(FLUX)
    assert [name for name, row in rows.items() if not row.recipe.network.compile] == [TRAINER, EQUAL]
    alone = rows_of(replace(SD3, compiles=False))
    assert list(alone) == list(rows)
    assert [name for name, row in alone.items() if row.recipe.network.compile] == [COMPILED]


def test_joined_steps_are_fewer_larger_forwards_of_the_update():
    """Both trained steps of half of the samples in one forward of as many rows as the rollout's."""
    rows = rows_of(replace(SD3, compiles=False))
    fast, wide, joined = rows[FAST].recipe, rows[WIDE].recipe, rows[JOINED].recipe
    assert replace(joined, machine=fast.machine) == replace(wide, machine=fast.machine) == fast
    assert [recipe.machine.rows_per_forward for recipe in (fast, wide, joined)] == [4, 8, 8]
    sizes = []
    for recipe in (fast, wide, joined):
        engine, calls = build_engine(recipe, CPU), []
        engine.model.module.register_forward_pre_hook(
            lambda module, args, kwargs, calls=calls: calls.append(
                (len(kwargs["hidden_states"]), torch.is_grad_enabled())
            ),
            with_kwargs=True,
        )
        assert train_step(engine).metrics["ratio_self_test"] == 0
        calls.clear()
        report = train_step(engine)
        assert report.metrics["first_ratio_error"] == 0
        sizes.append([rows for rows, with_gradient in calls if with_gradient])
    assert sizes == [[4] * 4, [8] * 2, [8] * 2]


def test_a_job_whose_forwards_take_all_has_nothing_to_join():
    assert JOINED not in rows_of(replace(SD3, num_prompts=1))
    assert all(JOINED in rows_of(job) for job in (*GPU_JOBS, *TINY_JOBS))
    for size in CPU_SIZES:
        assert JOINED in rows_of(lever_rows.Job(*size, precision="fp32"))


@pytest.mark.slow
def test_every_row_runs(one_round):
    job = SD3
    result = measure_levers(CPU, (job,), rounds=1)
    (found,) = result["jobs"]
    assert found["failed"] == {}
    assert [row["name"] for row in found["rows"]] == list(rows_of(job))
    first, equal = found["rows"][:2]
    assert (first["speedup"], first["counts"]["syncs"] > 2 * 9 * 8) == (1.0, True)
    assert equal["counts"]["syncs"] < first["counts"]["syncs"] / 2
    for row in found["rows"]:
        assert row["over_floor"] == pytest.approx(row["seconds"] / row["floor_s"], rel=1e-3)
        assert row["ratio_error"] in (None, 0.0)
        assert (row["counts"] is None) == row["compiled"]
        assert row["precision"] == "fp32"
    header, lines = lever_report.table(found)
    assert all(len(line) == len(header) for line in lines)
    page = [part for part in lever_report.sections(result | {"command": "x"}) if isinstance(part, str)]
    assert any("both loops compute the same" in part for part in page)


def test_a_row_alone_also_times_both_precisions(one_round):
    low = lever_rows._alone(rows_of(SD3)[LOW], CPU, 1)
    assert low["rollouts"]["speedup"] > 0
    assert low["rounds"] == 1


def test_a_row_for_itself_has_its_counts():
    timed = []
    runner = lever_rows.Runner(rows_of(SD3)[EQUAL], CPU)
    found = lever_rows.counted_row(runner, lambda: (timed.append(1), runner.time()))
    assert (timed, found["rounds"]) == ([1], 1)
    assert set(found["counts"]) == {"launches", "bytes", "syncs"}
    assert found["counts"]["launches"] > 1000


def test_a_gpus_rows_come_by_importance_until_time_is_out(monkeypatch):
    measured = []

    def alone(lever, device, rounds):
        measured.append(lever.name)
        return row(lever.name, 1.0)

    monkeypatch.setattr(lever_rows, "_alone", alone)
    kept, result = [], several(TINY_JOBS)
    one_by_one(TINY_JOBS, CPU, 1, 3600, lambda: kept.append(len(measured)), result)
    assert kept == list(range(1, len(measured) + 1))
    assert measured[:4] == [LOW, LOW, FAST, TRAINER]  # FLUX is guided within
    for job, found in zip(TINY_JOBS, result["jobs"], strict=True):
        assert [each["name"] for each in found["rows"]] == list(rows_of(job))
    late = several((SD3,))
    one_by_one((SD3,), CPU, 1, -1.0, lambda: None, late)
    assert len(late["left"]) == len(rows_of(SD3))


def test_a_row_that_fails_is_named_and_the_rest_go_on(monkeypatch):
    def alone(lever, device, rounds):
        if lever.name == LOW:
            raise RuntimeError("out of memory\nand more")
        return row(lever.name, 1.0)

    monkeypatch.setattr(lever_rows, "_alone", alone)
    result = several((SD3,))
    one_by_one((SD3,), CPU, 1, 3600, lambda: None, result)
    assert result["jobs"][0]["failed"] == {LOW: "RuntimeError: out of memory"}
    assert len(result["jobs"][0]["rows"]) == len(rows_of(SD3)) - 1


# ------------------------------------------------------------------------------------- on the CPU, in its time


class Clock:
    """A clock that only runners move."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def runners(monkeypatch):
    """Runners that take a second for every ten rows of the network, ten times that for what is compiled."""
    clock, made = Clock(), []

    class Fake:
        engine, floor, counts = None, None, None

        def __init__(self, lever, device):
            self.lever, self.seconds = lever, []
            made.append(lever.name)
            self.first_seconds = self.pass_time()

        def pass_time(self):
            seconds = lever_rows.work(self.lever) / 10 * (10 if self.lever.recipe.network.compile else 1)
            clock.now += seconds
            return seconds

        def count(self):
            self.pass_time()

        def time(self):
            self.seconds.append(self.pass_time())

        def row(self, rate):
            more = {"rounds": len(self.seconds), "ratio_error": None, "counts": None}
            return row(self.lever.name, self.seconds[0], **more)

    monkeypatch.setattr(lever_rows, "Runner", Fake)
    monkeypatch.setattr(lever_rows, "time", clock)
    found = {"log_prob": 0.0, "finished": 0.0, "gradient": 0.0}
    monkeypatch.setattr(lever_rows, "agreement", lambda recipe, device: found)
    monkeypatch.setattr(lever_rows, "_peak_elsewhere", lambda job, name: 10**9)
    monkeypatch.setattr(lever_rows, "cpu_multiplies_bf16", lambda: False)
    return made


def test_a_cpus_rows_come_cheapest_first_and_are_kept_one_by_one(runners):
    kept = []
    job = replace(SD3, compiles=False)
    result = measure_levers(
        CPU, (job,), rounds=2, limit=1e6, keep=lambda found: kept.append(len(found["jobs"][0]["rows"]))
    )
    (found,) = result["jobs"]
    costs = [lever_rows.work(rows_of(job)[name]) for name in runners]
    assert costs[:-1] == sorted(costs[:-1])
    assert (runners[0], runners[-1]) == (PRUNED, COMPILED)
    assert kept[: len(runners)] == list(range(1, len(runners) + 1))
    assert [each["name"] for each in found["rows"]] == list(rows_of(job))
    assert all(each["rounds"] == 2 and each["peak_bytes"] == 10**9 for each in found["rows"])
    assert result["left"] == []
    assert found["precision_because"] == "this CPU has no bf16 instructions"
    assert "measured in fp32: this CPU has no bf16 instructions" in lever_report.notes(found)


def test_a_cpu_begins_no_row_that_would_not_end(runners):
    result = measure_levers(CPU, (replace(SD3, compiles=False),), rounds=3, limit=150.0)
    (found,) = result["jobs"]
    assert 1 <= len(found["rows"]) < len(rows_of(SD3))
    assert len(found["rows"]) + len(result["left"]) == len(rows_of(SD3))
    assert f"{SD3}: {COMPILED}" in result["left"]
    assert lever_rows.time.now < 150.0


@pytest.mark.parametrize(("limit", "size"), [(1e7, CPU_SIZES[0]), (1.0, CPU_SIZES[-1])])
def test_a_cpu_takes_the_largest_size_that_it_has_time_for(runners, limit, size):
    (job, why) = lever_rows.fitting_job(limit)
    assert (job.network, job.group_size, job.num_prompts, job.precision) == (*size, "fp32")
    assert str(job) in why


def test_work_is_what_goes_through_the_network():
    """Of two prompts of four: ten steps and two halves; nine or two steps trained, a backward counted as two."""
    found = rows_of(replace(SD3, compiles=False))
    expected = {
        TRAINER: 8 * 20 + 8 * 9 * (6 + 2),
        EQUAL: 8 * 20 + 8 * 9 * (3 + 2),
        NO_KL: 8 * 20 + 8 * 2 * 3,
        FAST: 8 * 10 + 8 * 2 * 3,
        SHARED: 2 * 2 + 8 * 8 + (2 + 8) * 3,
    }
    assert {name: lever_rows.work(found[name]) for name in expected} == expected


def test_bf16_is_for_cpus_with_its_instructions(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    for flags, found in (("avx avx2 fma", False), ("avx512f avx512_bf16", True), ("amx_bf16 amx_tile", True)):
        cpuinfo.write_text(f"model name : a CPU\nflags : fpu {flags}\n")
        assert rows.cpu_multiplies_bf16(cpuinfo) is found
    assert not rows.cpu_multiplies_bf16(tmp_path / "none")


def several(jobs):
    return {"jobs": [{"job": str(job), "rows": [], "failed": {}} for job in jobs], "left": []}


def test_the_gpu_jobs_are_the_published_networks():
    assert [job.network for job in GPU_JOBS] == ["sd35_medium", "flux"]
    assert all(job.group_size * job.num_prompts == 24 for job in GPU_JOBS)
    for job, name in zip(GPU_JOBS, ("sd3.5-medium", "flux.1-dev"), strict=True):
        assert SCALES[job.network].transformer == PUBLISHED[name]["transformer"]
        assert all(lever.recipe.machine.precision == "bf16" for lever in job.levers)


def test_both_precisions_walk_the_whole_schedule():
    engine = build_engine(replace(rows_of(SD3)[LOW].recipe, network=SD3.recipe.network), CPU)
    calls = []
    engine.model.module.register_forward_pre_hook(lambda *_: calls.append("training"))
    engine.stage.sampler.outside.model.module.register_forward_pre_hook(lambda *_: calls.append("low"))
    found = rollouts(engine, rounds=1)
    assert set(found) == {"training", "low", "speedup"}
    assert calls.count("training") == calls.count("low") >= 2 * 10


def row(name, seconds, **more):
    return {"name": name, "images": 24, "seconds": seconds, "seconds_min": seconds, "floor_s": 1.0} | more


def test_targets_are_computed_from_the_rows():
    rows = [row(TRAINER, 12.0), row(EQUAL, 10.0), row(COMPILED, 8.0), row(FAST, 2.5), row(FLASH, 4.0)]
    rows.append(row(PRUNED, 1.0, images=12))
    compare(rows)
    assert [each["speedup"] for each in rows] == [1.0, 1.2, 1.5, 4.8, 3.0, 6.0]
    assert rows[1]["over_floor"] == 10
    result = {"jobs": [{"job": "small", "rows": rows, "failed": {}}]}
    equal, fast = lever_report.targets(result, "cpu")
    assert equal[1:] == ["met", "1 of 1", "1.5 (small: blocks compiled)"]
    assert fast[1:] == ["met", "1 of 1", "4.8 (small: no guidance)"]
    assert [line[1] for line in lever_report.targets(None, "cuda")] == ["not measured"] * 2
    floor, low = lever_report.targets(result, "cuda")
    assert floor[1:] == ["missed", "0 of 1", "2.5 (small: no guidance)"]
    rows.append(row(LOW, 2.0, rollouts={"training": 3.0, "low": 2.0, "speedup": 1.5}))
    assert lever_report.targets(result, "cuda")[1][1:] == ["met", "1 of 1", "1.5 (small)"]
    assert low[1] == "not measured"


def test_a_row_s_cells_are_a_share_of_the_floor_and_seconds_an_image():
    """Of the fields that results have had from the first."""
    rows = [row(TRAINER, 12.0), row(EQUAL, 10.0), row(COMPILED, 8.0, floor_s=None)]
    compare(rows)
    job = {"job": "small", "rows": [r | {"counts": None, "ratio_error": None} for r in rows], "failed": {}}
    header, lines = lever_report.table(job)
    cells = [dict(zip(header, line, strict=True)) for line in lines]
    assert [(c["s"], c["s/image"], c["of floor"]) for c in cells] == [
        ("12", "0.5", "8 %"),
        ("10", "0.417", "10 %"),
        ("8", "0.333", "-"),
    ]
    (note,) = lever_report.notes(job)
    assert note.startswith(
        "equal recipe: 1.20 times the trainers' loop, 1.50 times with this engine's blocks"
    )
    assert "takes the better of two rows" in lever_report.INTRODUCTION
