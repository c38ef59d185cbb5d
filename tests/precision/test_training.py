"""Training in every mode and format: the first ratio is exactly 1, and each step runs the precision it must."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowgrpo_fast.ops import flow_log_prob
from flowgrpo_fast.precision import FORMATS, check_masters, check_training_precision
from flowgrpo_fast.recipe import (
    NFT,
    AllSteps,
    Bound,
    Cuts,
    Deterministic,
    DPMSolver2M,
    FractionOfSteps,
    FrozenWindow,
    Independent,
    LowPrecision,
    Machine,
    Normalise,
    Optimizer,
    Recipe,
    Scouts,
)
from flowgrpo_fast.sampling.walk import Sampler, walk
from flowgrpo_fast.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import train, train_step
from flowgrpo_fast.training.update import Tally
from tests.sampling.walks import batch_of, drawn, learner_of, measured

from .conftest import sd3

pytestmark = pytest.mark.filterwarnings("ignore:.* is emulated on a CPU:RuntimeWarning")

CPU = torch.device("cpu")
MODES = ("merged", "bare_layers", "branch", "shared_base")
NAMES = sorted(FORMATS)


def run(recipe, steps: int | None = None):
    engine, reports = build_engine(recipe, CPU), []
    train(engine, reports.append, lambda: steps is not None and engine.step >= steps)
    return engine, reports


def trained(engine) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in engine.model.module.parameters() if p.requires_grad])


def is_exact(reports) -> bool:
    ratios = [report.metrics["first_ratio_error"] for report in reports]
    deltas = [report.metrics["delta_log_prob_max"] for report in reports]
    return reports[0].metrics["ratio_self_test"] == 0 and not any(ratios) and not any(deltas)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("mode", MODES)
def test_two_steps_with_a_first_ratio_of_exactly_one(job, mode, form, precision) -> None:
    recipe = job(precision=precision, rollout_precision=LowPrecision(mode=mode, format=form))
    start = trained(build_engine(recipe, CPU))
    engine, reports = run(recipe)
    assert is_exact(reports)
    assert all(report.metrics["grad_norm"] > 0 for report in reports)
    assert not torch.equal(trained(engine), start)


@pytest.mark.parametrize("form", NAMES)
def test_full_fine_tuning_with_a_merged_copy(job, form) -> None:
    engine, reports = run(
        job("load_whole", rollout_precision=LowPrecision(mode="merged", format=form), precision="bf16")
    )
    assert is_exact(reports)
    fresh = engine.recipe.machine.rollout_precision.build(engine.model)
    theirs = fresh.model.module.buffers()
    assert all(map(torch.equal, engine.copies[0].model.module.buffers(), theirs))


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": 3.0},
        {"solver": DPMSolver2M(keep=0.5)},
        {"optimizer": Optimizer(lr=3e-3, num_updates=2)},
        {"rows_per_forward": 4},
        {"topology": Independent(at=FractionOfSteps(fraction=0.5))},
        {"topology": Independent(at=AllSteps())},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", MODES)
def test_the_ratio_is_exact_whatever_else_the_recipe_does(job, mode, changes) -> None:
    _, reports = run(job(rollout_precision=LowPrecision(mode=mode), **changes))
    assert is_exact(reports)


def parts(engine):
    """What a walk of the first step takes, besides who is asked."""
    draws = drawn(engine.recipe, len(engine.prompts))
    conditioning = engine.stage.conditioning.rows(draws.prompt_index[draws.group_id])
    return engine.stage.plan(0), conditioning, draws


def outside(engine):
    return engine.stage.sampler.outside.model


@pytest.mark.parametrize("mode", MODES[:3])
def test_steps_with_a_log_prob_run_the_training_model_and_the_others_the_copy(job, mode, monkeypatch) -> None:
    engine = build_engine(job(rollout_precision=LowPrecision(mode=mode)), CPU)
    calls = []
    for name, model in (("training", engine.model), ("low", outside(engine))):

        def velocity(latents, sigma, conditioning, name=name, inner=model.velocity):
            calls.append((name, round(float(sigma[0]), 3)))
            return inner(latents, sigma, conditioning)

        monkeypatch.setattr(model, "velocity", velocity)
    trajectory = walk(engine.stage.sampler, *parts(engine))
    sigmas = [round(float(sigma), 3) for sigma in trajectory.plan.sigmas[:-1]]
    assert calls == list(zip(["low", "training", "training", "low", "low"], sigmas, strict=True))


def test_only_the_steps_outside_the_window_differ(job) -> None:
    """The copy moves the latents; the log-prob stays that of the training model at those latents."""
    engine = build_engine(job(rollout_precision=LowPrecision(mode="bare_layers")), CPU)
    plan, conditioning, draws = parts(engine)
    exact = walk(replace(engine.stage.sampler, outside=None), plan, conditioning, draws)
    got = walk(engine.stage.sampler, plan, conditioning, draws)
    assert len(got.transitions) == 2
    assert any(
        not torch.equal(mine.latents, theirs.latents)
        for mine, theirs in zip(got.transitions, exact.transitions, strict=True)
    )
    for kept in got.transitions:
        (step,) = set(kept.row.tolist())
        sigma = plan.sigmas[step].expand(8)
        with torch.no_grad():
            velocity = engine.model.velocity(kept.latents, sigma, conditioning)
        log_prob = flow_log_prob(kept.latents, velocity, kept.next_latents, got.coeffs, step)
        assert torch.equal(log_prob, kept.log_prob)


@pytest.mark.parametrize("form", NAMES)
def test_log_probs_of_another_model_are_recomputed(job, form) -> None:
    engine = build_engine(job(rollout_precision=LowPrecision(mode="merged", format=form)), CPU)
    plan, conditioning, draws = parts(engine)

    def under(model, trajectory):
        """The trajectory's log-probs under another model."""
        found = [
            stats
            for _, stats in measured(learner_of(model, engine.recipe), batch_of(trajectory, conditioning))
        ]
        return [stats["log_prob"].detach() for stats in found], [stats["old_log_prob"] for stats in found]

    sampler = Sampler(engine.stage.sampler.policy.of(outside(engine)), engine.recipe.forwards)
    foreign = walk(sampler, plan, conditioning, draws)
    own, stored = (torch.cat(values) for values in under(engine.model, foreign))
    delta = (own - stored).abs()
    assert 1e-6 < float(delta.max()) < 1
    again, stored = (torch.cat(values) for values in under(outside(engine), foreign))
    assert torch.equal(again, stored)


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_stops_the_run(job, form, value) -> None:
    """Low precision has no way to hide it: the first step, outside the window, already names it."""
    engine = build_engine(job(rollout_precision=LowPrecision(mode="merged", format=form)), CPU)
    next(p for p in engine.model.module.parameters() if p.requires_grad).data[0, 0] = value
    engine.copies[0].refresh()
    with pytest.raises(ValueError, match="the velocity is NaN or infinite at step 0"):
        walk(engine.stage.sampler, *parts(engine))


def test_the_copy_follows_every_update(job) -> None:
    engine, _ = run(job(rollout_precision=LowPrecision(mode="merged")))
    fresh = engine.recipe.machine.rollout_precision.build(engine.model)
    before = engine.recipe.machine.rollout_precision.build(sd3())
    ours = list(engine.copies[0].model.module.buffers())
    assert all(map(torch.equal, ours, fresh.model.module.buffers()))
    assert not all(map(torch.equal, ours, before.model.module.buffers()))


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(job, mode, tmp_path) -> None:
    recipe = job(rollout_precision=LowPrecision(mode=mode), num_steps=3)
    whole, _ = run(recipe)
    half, _ = run(recipe, steps=1)
    save_checkpoint(half, tmp_path)
    resumed = build_engine(recipe, CPU)
    load_checkpoint(resumed, latest_checkpoint(tmp_path))
    train(resumed, lambda report: None, lambda: False)
    assert torch.equal(trained(whole), trained(resumed))


@pytest.mark.parametrize("mode", MODES)
def test_masters_gradients_and_moments_are_fp32_under_bf16(job, mode, monkeypatch) -> None:
    engine = build_engine(job(precision="bf16", rollout_precision=LowPrecision(mode=mode)), CPU)
    dtypes = set()
    optimizer = engine.learner.optimizer
    inner = optimizer.step

    def step() -> None:
        dtypes.update(p.grad.dtype for p in optimizer.param_groups[0]["params"])
        inner()

    monkeypatch.setattr(optimizer, "step", step)
    train_step(engine)
    assert dtypes == {torch.float32}
    assert {p.dtype for p in engine.model.module.parameters() if p.requires_grad} == {torch.float32}
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert {moment.dtype for moment in moments} == {torch.float32}


def test_masters_below_fp32_are_refused(job) -> None:
    with pytest.raises(ValueError, match=r"is trained in bfloat16; trained parameters must be float32"):
        build_engine(job("load_half"), CPU)
    model = sd3()
    for name, parameter in model.module.named_parameters():
        parameter.data = parameter.data if "lora" in name else parameter.data.bfloat16()
    check_masters(model.module)  # a frozen base may be bf16


@pytest.mark.parametrize("mode", MODES[:3])
def test_scouts_are_the_sampling_policy_in_low_precision(job, mode) -> None:
    """DiffusionNFT samples from an old policy: its low precision is the old weights', the training weights aside."""
    low = LowPrecision(mode=mode)
    changes = {
        "objective": NFT(),
        "topology": Independent(at=Deterministic()),
        "credit": (Normalise(std="batch"), Bound()),
    }
    scouts = Scouts(num_scouts=8, num_inference_steps=3, precision=low)
    engine, reports = run(job(experience=scouts, **changes))
    assert reports[-1].metrics["scout_spearman"] <= 1
    _, conditioning, draws = parts(engine)
    latents, sigma = torch.randn(len(draws.seed), *engine.model.latent_shape), torch.tensor(0.5)
    with torch.no_grad():
        scouts = engine.stage.scout.policy.model.velocity(latents, sigma.expand(len(latents)), conditioning)
        with engine.learner.snapshots["old"].swapped_in():
            twin = low.build(engine.model).model
            expected = twin.velocity(latents, sigma.expand(len(latents)), conditioning)
        new = low.build(engine.model).model.velocity(latents, sigma.expand(len(latents)), conditioning)
    assert torch.equal(scouts, expected)
    assert not torch.equal(scouts, new)


SHARED = LowPrecision(mode="shared_base", format="nvfp4")
FRACTION = Independent(at=FractionOfSteps(fraction=0.5))
CUTS = Cuts(inner=Independent(at=FrozenWindow(size=2, start=1)), steps=(1,), sizes=(8,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rollout_precision": SHARED, "topology": FRACTION},
            "replays other batches",
        ),
        ({"rollout_precision": SHARED, "replay_rows": 4}, "replays other batches"),
        (
            {
                "rollout_precision": SHARED,
                "topology": CUTS,
            },
            "replays other batches",
        ),
        (
            {"rollout_precision": SHARED, "experience": Scouts(num_scouts=8, num_inference_steps=5)},
            "replays other batches",
        ),
        (
            {
                "experience": Scouts(
                    num_scouts=8, num_inference_steps=5, precision=LowPrecision(mode="shared_base")
                )
            },
            "that is the training model itself",
        ),
    ],
    ids=["steps", "rows", "pruning", "scouts", "shared scouts"],
)
def test_recipes_whose_ratio_would_not_be_one_are_refused(job, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        job(**changes)


def test_the_batch_scale_of_the_refused_ones_does_break_the_ratio(job, monkeypatch) -> None:
    """What the refusal prevents: random steps a sample, one activation scale a batch."""
    monkeypatch.setattr(LowPrecision, "check_replay", lambda part, same_batches: None)
    part = LowPrecision(mode="shared_base", format="fp8_tensor")
    _, reports = run(
        job(rollout_precision=part, topology=Independent(at=FractionOfSteps(fraction=0.5))), steps=1
    )
    assert reports[0].metrics["delta_log_prob_max"] > 1e-6


def test_mismatch_by_step_is_the_maximum_and_mean_of_each(job) -> None:
    recipe = job(topology=Independent(at=FrozenWindow(size=4, start=0)))
    engine = build_engine(recipe, CPU)
    plan, conditioning, draws = parts(engine)
    batch = batch_of(walk(engine.stage.sampler, plan, conditioning, draws), conditioning)
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(0, 3, (40,), generator=generator)
    delta = torch.randn(40, generator=generator) / 10
    tally = Tally()
    for rows in (slice(0, 25), slice(25, 40)):
        tally.first_rows.append(row[rows])
        tally.first_ratios.append(delta[rows])
    values = tally.metrics(batch)
    for step in range(3):
        own = delta[row == step].abs()
        assert values[f"delta_log_prob_max/step_{step}"] == pytest.approx(float(own.max()))
        assert values[f"delta_log_prob_mean/step_{step}"] == pytest.approx(float(own.mean()))
    assert values["delta_log_prob_mean/step_3"] == values["delta_log_prob_max/step_3"] == 0
    assert values["delta_log_prob_max"] == pytest.approx(float(delta.abs().max()))
    assert values["delta_log_prob_mean"] == pytest.approx(float(delta.abs().mean()))
    assert values["first_ratio_error"] == pytest.approx(float((delta.exp() - 1).abs().max()))
    assert not [name for name in Tally().metrics(batch) if "delta" in name or "ratio" in name]


def test_the_mismatch_is_reported_by_step_of_the_schedule(job) -> None:
    _, reports = run(job(replay_rows=2))
    for report in reports:
        names = {name for name in report.metrics if name.startswith("delta_log_prob")}
        kinds = ("delta_log_prob_max", "delta_log_prob_mean")
        assert names == {f"{kind}{step}" for kind in kinds for step in ("", "/step_1", "/step_2")}
    assert 0 < reports[0].metrics["delta_log_prob_max"] < 1e-5  # other micro-batches, other rounding


def test_bf16_on_a_gpu_without_it_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    gpu = torch.device("cuda")
    check_training_precision("fp32", gpu)
    check_training_precision("bf16", CPU)
    with pytest.raises(
        ValueError, match=r"precision is 'bf16', which Tesla T4 lacks; set machine.precision=fp32"
    ):
        check_training_precision("bf16", gpu)


def test_a_gpu_that_is_not_the_first_becomes_the_current_one(monkeypatch) -> None:
    """Before anything asks for the current device: streams, events, captures and rewards' own `cuda()` do."""

    class ReachedError(Exception):
        pass

    def reached(device) -> None:
        raise ReachedError(str(device))

    monkeypatch.setattr(torch.cuda, "set_device", reached)
    with pytest.raises(ReachedError, match=r"^cuda:1$"):
        build_engine(Recipe(name="any", machine=Machine(precision="bf16")), torch.device("cuda:1"))
