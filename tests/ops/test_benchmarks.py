"""The benchmarks' contenders compute the same, their rows say what a clock said, and the ops move less than eager.

No test here asks how fast this machine is: where a time matters, the clock is ours.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import baselines, measure, report, rows, suite, timing, trainer_loop
from benchmarks.cases import SD3, SIZES, Case, Size, options
from benchmarks.counters import count
from benchmarks.rows import machine, machine_afterwards, measured_row
from benchmarks.timing import Roof, interleaved, rounds_within
from flowgrpo_fast.ops import Guidance, flow_log_prob, philox_normal
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import make_batch
from flowgrpo_fast.training.update import Tally, accumulate
from flowgrpo_fast.types import spread

CPU = torch.device("cpu")
HANGS = 1800  # seconds: no program takes as long, however busy the machine


def test_baselines_agree_with_the_op():
    w = baselines.make_workload((3, 4, 16, 16))
    ours = flow_log_prob(w.latents, w.velocity, w.next_latents, w.coeffs, w.step_index)
    _, unfused = baselines.unfused_step(w, w.velocity, w.next_latents)
    torch.testing.assert_close(unfused, ours, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(baselines.same_log_prob(w, w.velocity), ours, rtol=1e-5, atol=2e-6)
    functions = baselines.contenders(w)["replay_and_backward"]
    torch.testing.assert_close(functions["eager"](), functions["ours"](), rtol=1e-4, atol=1e-8)
    fresh, log_prob = baselines.unfused_step(w, w.velocity)
    replayed = flow_log_prob(w.latents, w.velocity, fresh, w.coeffs, w.step_index)
    torch.testing.assert_close(log_prob, replayed, rtol=1e-5, atol=2e-6)


@pytest.fixture
def engine(toy_recipe):
    return build_engine(
        toy_recipe(num_prompts=2), CPU
    )  # each prompt once: trainers group by the prompt's text


def plan_of(engine):
    return engine.recipe.plan(0)


@pytest.mark.parametrize(
    "make_step", [trainer_loop.eager_step, pytest.param(trainer_loop.compiled_step, marks=pytest.mark.slow)]
)
def test_the_steps_of_the_trainers_loop_agree_with_the_op(engine, make_step):
    plan = plan_of(engine)
    step = make_step(plan, engine.recipe, CPU)
    latents, velocity = torch.randn(2, 5, 6)
    index = trainer_loop.kept_steps(plan)[0]
    timestep = (1000 * plan.sigmas[index]).expand(5)
    following, log_prob, *_ = step(latents, velocity, timestep, None)
    ours = flow_log_prob(latents, velocity, following, plan.coeffs, index)
    torch.testing.assert_close(log_prob, ours, rtol=1e-5, atol=2e-6)
    _, replayed, *_ = step(latents, velocity, timestep, following)
    torch.testing.assert_close(replayed, ours, rtol=1e-5, atol=2e-6)


def test_the_trainers_update_has_our_gradient(engine):
    """Same transitions, same credit: the loss written the long way gives the gradient of ours."""
    recipe, plan = engine.recipe, plan_of(engine)
    draws = trainer_loop.drawn(recipe, len(engine.prompts), 0, CPU)
    conditioning = engine.stage.conditioning.rows(draws.prompt_index[draws.group_id])
    scored = recipe.experience.collect(engine.stage, draws, 0).scored()
    batch, transitions = make_batch(engine, scored), scored.samples.transitions
    whole = slice(0, len(batch))
    accumulate(engine.learner, batch.of_samples(whole), Tally())
    ours = [p.grad.clone() for p in engine.model.module.parameters()]
    engine.model.module.zero_grad()

    prompts = [engine.prompts.prompts[i] for i in draws.prompt_index[draws.group_id].tolist()]
    advantages = trainer_loop.advantages_of(scored.scores.total, prompts, recipe)
    torch.testing.assert_close(advantages, batch.credit.advantages, rtol=1e-5, atol=1e-6)
    kept = trainer_loop.kept_steps(plan)
    samples = trainer_loop.Samples(
        torch.stack([spread(t.latents, t.fan) for t in transitions], 1),
        torch.stack([t.next_latents for t in transitions], 1),
        torch.stack([t.log_prob for t in transitions], 1),
        (1000 * plan.sigmas[kept]).expand(len(advantages), -1),
        scored.samples.x0,
    )
    trainer = trainer_loop.Trainer(engine)
    step = trainer_loop.eager_step(plan, recipe, CPU)
    for j in range(len(kept)):
        (trainer.loss(samples, conditioning, advantages, (whole, j), step) / len(kept)).backward()
    for want, parameter in zip(ours, engine.model.module.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-3, atol=1e-6)


def test_the_trainers_loop_trains(engine):
    before = [p.clone() for p in engine.model.module.parameters()]
    info = trainer_loop.Trainer(engine).step().metrics
    assert info["ratio"] == pytest.approx(1, abs=0.05)
    assert any(not torch.equal(a, b) for a, b in zip(before, engine.model.module.parameters(), strict=True))


def test_every_family_is_found_and_every_case_asked_for_once():
    names = [request.name for request in suite.requests()]
    assert len(names) == len(set(names))
    assert {"flow", "group", "options", "preview", "quantize", "dequantize"} <= set(suite.families())
    for size in SIZES:
        for operation in ("sampling", "noise", "compact", "preview"):
            assert f"{operation} {size.name} float32" in names
    for operation in ("replay", "noise"):
        assert f"{operation} {SD3.name} bfloat16" in names
    assert "quantize_fp8_rows FLUX weight 3072x12288 bfloat16" in names
    request = next(r for r in suite.requests() if r.size_name == suite.TOY.name)
    made = suite.Maker(CPU)(request)
    assert (made.group, made.operation) == (request.name, request.operation)


def cases_of(family, size, dtype=torch.float32):
    return {case.operation: case for case in suite.families()[family].cases(size, dtype, CPU)}


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["as written", "compiled"])
def perhaps_compiled(request, monkeypatch):
    """With torch.compile, and without."""
    torch._dynamo.reset()
    if not request.param:
        monkeypatch.setattr(torch, "compile", lambda function: function)


def test_contenders_of_the_options_agree(perhaps_compiled):
    cases = cases_of("options", Size("toy", 4, (3, 8, 8)))
    assert len(cases) == 7
    guided = cases.pop("sampling_with_guidance")  # each contender draws its own noise
    w = baselines.make_workload(guided.size.shape)
    guidance = Guidance(w.velocity.flip(0).contiguous(), options.SCALE)
    for name, run in guided.contenders.items():
        following, log_prob = run()
        ours = flow_log_prob(w.latents, w.velocity, following, w.coeffs, w.step_index, guidance)
        torch.testing.assert_close(log_prob, ours, rtol=1e-5, atol=2e-6, msg=name)
    for case in cases.values():
        ours = case.contenders["ours"]()
        for name in ("eager", "compiled"):
            torch.testing.assert_close(case.contenders[name](), ours, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contenders_of_the_dequantisation_agree(perhaps_compiled, dtype):
    cases = cases_of("dequantize", Size("toy", 130, (96,)), dtype)  # more rows and scales than one tile
    assert len(cases) == 2
    for case in cases.values():
        ours = case.contenders["ours"]()
        for name in ("eager", "compiled"):
            assert torch.equal(case.contenders[name](), ours), (case.operation, name)


def test_the_noise_to_be_compiled_is_ours(perhaps_compiled):
    function, seed = torch.compile(baselines.same_noise), torch.tensor([0, 7919, -5, 2**62 + 1])
    for sample in ((3, 5, 7), (1000,)):
        noise = function(seed, sample, torch.float32)
        torch.testing.assert_close(noise, philox_normal(seed, sample), rtol=1e-5, atol=5e-6)
    assert set(cases_of("flow", suite.TOY)["noise"].contenders) == {"ours", "eager", "compiled"}


@pytest.fixture
def small_roof(monkeypatch):
    monkeypatch.setattr(timing, "_COPY_BYTES", 1 << 20)
    return Roof(CPU)


class Clock:
    """A clock on which a function takes the time it is said to take, on any machine."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def taking(self, seconds, function=lambda: None):
        def run():
            self.now += seconds
            return function()

        return run


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The benchmarks' clock. The large copy moves 40 GB/s on it, and a copy of a case's bytes 25 GB/s."""
    clock = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    monkeypatch.setattr(timing, "copy_of", lambda moved, device: clock.taking(moved / 40e9))
    monkeypatch.setattr(rows, "copy_of", lambda moved, device: clock.taking(moved / 25e9))
    return clock


@pytest.fixture
def result(clock) -> dict:
    """Two rows on that clock: one of a real op, and one of functions that do nothing."""
    case, roof = cases_of("flow", suite.TOY)["sampling"], Roof(CPU)
    functions = {n: clock.taking(t, case.contenders[n]) for n, t in (("ours", 0.001), ("eager", 0.008))}
    real = Case(case.operation, SD3, case.dtype, case.bytes, functions)
    waits = {"ours": clock.taking(0.002), "eager": clock.taking(0.008)}
    known = Case("waiting", SD3, torch.float32, 40_000_000, waits)
    measured = [measured_row(each, CPU, 0.05, roof) for each in (real, known)]
    return {"machine": machine_afterwards(machine(CPU), roof), "rows": measured}


def test_rows_say_what_was_measured(result):
    real, known = json.loads(json.dumps(result["rows"]))
    assert real["counts"]["ours"]["syncs"] == 0
    assert real["counts"]["eager"]["launches"] > real["counts"]["ours"]["launches"]
    assert real["speedup_by_median"] == real["speedup_by_min"] == {"eager": 8}
    assert known["median_ms"] == known["min_ms"] == {"ours": 2, "eager": 8, "copy": 1.6}
    assert known["speedup_by_median"] == {"eager": 4}
    assert (known["gbps"], known["copy_gbps"]) == (20, 40)
    assert (known["share_of_copy"], known["share_of_equal_copy"]) == (0.5, 0.8)
    assert result["machine"]["copy_gbps"] == [40, 40, 40]


def test_targets_are_computed_from_the_rows(result):
    faster, moving, compiled, share, equal, noise = report.targets(result, "cpu")
    waiting = f"waiting, {SD3.name}, float32"
    assert faster[1:] == ["missed", "1 of 2", f"4 ({waiting})"]
    assert moving[1:3] == ["met", "1 of 1"]
    assert compiled[1] == "not measured"
    assert share[1:] == ["missed", "0 of 1", f"50 ({waiting})"]
    assert equal[1:] == ["met", "1 of 1", f"80 ({waiting})"]
    assert noise[1] == "not measured"
    assert [line[1] for line in report.targets(None, "cuda")] == ["not measured"] * 4
    row = result["rows"][1] | {
        "graph_us": 12.0,
        "share_of_copy": 0.9,
        "share_of_equal_copy": 0.8,
        "bytes": 2e8,
    }
    cuda = {"rows": [row], "call_overhead_us": {"waiting": {"ours": 2.5}}}
    assert [line[1] for line in report.targets(cuda, "cuda")] == ["met", "missed", "missed", "met"]


def test_a_contender_that_fails_is_left_out_and_named(small_roof):
    case = cases_of("flow", suite.TOY)["sampling"]

    def broken():
        raise RuntimeError("no compiler here")

    contenders = {"ours": case.contenders["ours"], "compiled": broken}
    row = measured_row(Case("step", SD3, case.dtype, case.bytes, contenders), CPU, 0.01, small_roof)
    assert row["failed"] == {"compiled": "RuntimeError: no compiler here"}
    assert "compiled" not in row["speedup_by_median"]


def test_the_table_prints_with_and_without_rich(result, capsys, monkeypatch):
    measure.show("ops", result)
    rich = capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.console", None)
    measure.show("ops", result)
    plain = capsys.readouterr().out
    for out in (rich, plain):
        assert "waiting" in out
        assert "of copy" in out


def test_timing_takes_turns(clock):
    order = []
    interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2, warmup=1)
    assert "".join(order) == "aabb" * 3
    a_pass = {"a": clock.taking(2**-7)}  # of which floating point adds up without a rounding
    assert rounds_within(a_pass, seconds=0.5, most=200) == 32
    assert rounds_within(a_pass, seconds=0.5, most=20) == 20
    assert rounds_within(a_pass, seconds=0.01, most=200) == 5


@pytest.mark.slow
def test_measure_runs_as_a_script_from_anywhere(tmp_path):
    script = Path(measure.__file__)
    command = [
        sys.executable,
        str(script),
        "ops",
        "--only",
        "top_bottom toy",
        "--seconds",
        "0.02",
        "--threads",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    assert "toy x8" in done.stdout
    done = subprocess.run([sys.executable, str(script), "opz"], capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 2
    assert "level is 'opz', must be one of ops, rollout, train_step, levers" in done.stderr


def test_a_name_that_no_case_has_is_an_error(monkeypatch, small_roof, capsys):
    arguments = ["measure.py", "ops", "--only", "no such case", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as caught:
        measure.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("error: no case of ops has 'no such case' in its name\n")


@pytest.mark.slow
def test_the_suites_are_collected():
    root = Path(measure.__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "benchmarks"]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=HANGS).stdout
    for test in (
        f"bench_ops.py::bench_op[sampling {SD3.name} float32-ours]",
        "bench_rollout.py::bench_rollout[digits-network]",
        "bench_train_step.py::bench_train_step[eager]",
        "bench_train_step.py::bench_lever[",
    ):
        assert test in listed


@pytest.mark.parametrize(
    ("operation", "at_least"), [("sampling", 2), ("replay", 3), ("replay_and_backward", 2)]
)
def test_eager_does_the_work_several_times(operation, at_least):
    """What makes ours faster, counted: the bytes that each moves and the kernels that each launches."""
    functions = baselines.contenders(baselines.make_workload((8, 16, 64, 64)))[operation]
    ours, eager = count(functions["ours"]), count(functions["eager"])
    assert eager.bytes >= at_least * ours.bytes > 0
    assert eager.launches >= at_least * ours.launches > 0
