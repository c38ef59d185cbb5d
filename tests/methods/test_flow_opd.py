"""Flow-OPD: its modes against the worked case and formulas, teachers by metadata, and two steps of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowgrpo_fast.credit.steps import AtLastStep
from flowgrpo_fast.models.digits import prompts, shipped
from flowgrpo_fast.objectives.distillation import Distillation
from flowgrpo_fast.objectives.regularizers import TransitionKL
from flowgrpo_fast.objectives.trust import Clip
from flowgrpo_fast.recipe import FractionOfSteps, Independent
from flowgrpo_fast.recipes import RECIPES
from flowgrpo_fast.training.checkpoint import save_checkpoint
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.learner import Counts, networks
from flowgrpo_fast.training.loop import train_step
from flowgrpo_fast.types import Credit
from tests.methods.runs import CPU, assert_resumes, batch_of, gradients, refused, small, trained_by_command
from tests.models import tiny

HALVES = ("even", "odd")
SEED = 1  # whose first step draws one prompt of either half


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt file that routes, and two teachers: the shipped weights, moved each its own way."""
    folder = tmp_path_factory.mktemp("taught")
    lines = [{"prompt": p, "dataset": HALVES[i % 2]} for i, p in enumerate(prompts())]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    weights = shipped().module.state_dict()
    for half, scale in zip(HALVES, (1.03, 0.96), strict=True):
        save_file({k: (scale * v).contiguous() for k, v in weights.items()}, folder / f"{half}.safetensors")
    return folder


def words_of(folder: Path, *changes: str, suffix: str = ".safetensors") -> tuple[str, ...]:
    teachers = {half: {"is": "Loaded", "path": f"{folder}/{half}{suffix}"} for half in HALVES}
    return f"data.path={folder}/prompts.jsonl", f"objective.teachers={json.dumps(teachers)}", *changes


def student(folder: Path, *changes: str, **how: str):
    return small("flow_opd", f"seed={SEED}", *words_of(folder, *changes, **how))


# ------------------------------------------------------------------------------------ the worked case


def worked(methods):
    """Stats of the worked case as the objective's own would be: `std` is c = q sqrt(-dt), for any -dt."""
    given = methods["flow_opd"]["inputs"]
    mu, teacher = (torch.tensor(given[key], dtype=torch.float64) for key in ("mu", "mu_teacher"))
    mu.requires_grad_()
    interval = torch.full((len(mu),), 0.125, dtype=torch.float64)
    log_prob = torch.zeros(len(mu), dtype=torch.float64, requires_grad=True)
    stats = {
        "drift/teacher": (mu - teacher).square().mean(1),
        "std": given["q"] * interval.sqrt(),
        "interval": interval,
        "log_prob": log_prob,
        "old_log_prob": log_prob.detach(),
    }
    return mu, log_prob, stats


def test_gkd_of_the_worked_case(methods) -> None:
    expected = methods["flow_opd"]["expected"]
    mu, _, stats = worked(methods)
    terms = Distillation(mode="gkd").loss(stats, torch.zeros(2))
    terms.loss.mean().backward()
    np.testing.assert_allclose(terms.shown["teacher_kl"], expected["kl"], rtol=1e-9)
    np.testing.assert_allclose(mu.grad, expected["gkd_grad"], atol=1e-6)


def test_kl_only_of_the_worked_case(methods) -> None:
    """On-policy the gradient by log_prob is minus the advantage; none reaches the means."""
    expected = methods["flow_opd"]["expected"]
    mu, log_prob, stats = worked(methods)
    Distillation(mode="kl_only").loss(stats, torch.zeros(2)).loss.sum().backward()
    np.testing.assert_allclose(-log_prob.grad, expected["A"], rtol=1e-9)
    assert mu.grad is None


@pytest.mark.parametrize(("mode", "task"), [("kl_only", 0.0), ("mixed", 1.0)])
def test_advantages_are_cut_at_the_bound(mode: str, task: float) -> None:
    """`mixed` cuts the sum, as the released loop does."""
    log_prob = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    kl = torch.tensor([0.5, 7.0, 100.0], dtype=torch.float64)
    ones = torch.ones(3, dtype=torch.float64)
    stats = {
        "drift/teacher": 2 * kl,
        "std": ones,
        "interval": ones,
        "log_prob": log_prob,
        "old_log_prob": torch.zeros_like(log_prob),
    }
    advantages = torch.tensor([2.0, 3.5, 2.0], dtype=torch.float64)
    Distillation(mode=mode).loss(stats, advantages).loss.sum().backward()
    expected = (task * advantages - kl).clamp(-5, 5)
    torch.testing.assert_close(-log_prob.grad, expected)


def table(num_samples: int = 5, num_steps: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    new, old, distance = 0.01 * torch.randn(
        3, num_samples, num_steps, generator=generator, dtype=torch.float64
    )
    ones = torch.ones(num_samples, num_steps, dtype=torch.float64)
    return {
        "log_prob": new.requires_grad_(),
        "old_log_prob": old,
        "drift/teacher": distance.square() * 1e4,
        "std": ones,
        "interval": ones,
    }


@pytest.mark.parametrize("mode", ["kl_only", "mixed"])
def test_normalised_signals_are_z_scores_over_samples_at_each_step(mode: str) -> None:
    stats = table()
    part = Distillation(mode=mode, normalise=True, trust=Clip(range=0.5))
    assert part.couples
    advantages = torch.tensor([0.5, -1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    loss = part.loss(stats, advantages).loss
    kl = (stats["drift/teacher"] / 2).numpy()
    score = (kl - kl.mean(0)) / (kl.std(0, ddof=1) + 1e-4)
    credit = -score + (advantages.numpy()[:, None] if mode == "mixed" else 0)
    ratio = np.exp((stats["log_prob"] - stats["old_log_prob"]).detach().numpy())
    expected = np.maximum(-credit * ratio, -credit * ratio.clip(0.5, 1.5)).mean(1)
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-12)


def test_the_task_counts_at_the_last_step_alone() -> None:
    """`AtLastStep` in the credit of "mixed": `[B] -> [B, K]`."""
    samples = type("Samples", (), {"transitions": (None,) * 4})
    scored = type("Scored", (), {"samples": samples})
    credit = AtLastStep()(Credit(torch.tensor([1.0, -2.0]), torch.tensor([1.0, 0.0])), scored)
    assert credit.advantages.tolist() == [[0, 0, 0, 1], [0, 0, 0, -2]]
    assert credit.weight.tolist() == [1, 0]


# ---------------------------------------------------------------------------------------- in training


def test_gradient_of_a_step_is_that_of_the_formula(taught) -> None:
    """gkd, each half by its own teacher, and the anchor, written out in plain torch."""
    recipe = student(taught, "optimizer.max_grad_norm=1e9", "objective.regularizers=[]")
    got, metrics = gradients(recipe)
    engine = build_engine(recipe, CPU)
    batch = batch_of(engine)
    halves = [entry["dataset"] for entry in batch.prompts.metadata]
    assert set(halves) == set(HALVES)
    losses = []
    for step in batch.samples.transitions:
        row = batch.samples.coeffs[step.row[0]]
        sigma = step.sigma
        velocity = engine.model.velocity(step.latents, sigma, batch.conditioning)
        by_half = {
            half: engine.learner.snapshots[f"teacher/{half}"].velocity(
                step.latents, sigma, batch.conditioning
            )
            for half in HALVES
        }
        other = torch.stack([by_half[half][i] for i, half in enumerate(halves)])
        rate_squared = row[3] ** 2 / batch.samples.plan.interval[step.row[0]]
        losses.append((row[2] * (velocity - other)).square().flatten(1).mean(1) / (2 * rate_squared))
    loss = torch.stack(losses).mean()
    loss.backward()
    assert metrics["teacher_kl"] == pytest.approx(loss.item(), rel=1e-4)
    expected = [p.grad for p in engine.model.module.parameters() if p.requires_grad]
    for own, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(own, reference, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("objective.mode=kl_only",),
        ("objective.mode=kl_only", "objective.normalise=true"),
        ("objective.mode=mixed", 'credit=[{"is": "Normalise"}, {"is": "Bound"}, {"is": "AtLastStep"}]'),
    ],
)
def test_micro_batches_do_not_matter(taught, changes: tuple[str, ...]) -> None:
    one, _ = gradients(student(taught, *changes), rows=2)
    every, metrics = gradients(student(taught, *changes))
    scale = max(float(g.abs().max()) for g in every)
    assert scale > 0
    for a, b in zip(one, every, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5 * scale)
    assert metrics["first_ratio_error"] == 0


def test_the_same_teacher_everywhere_teaches_what_it_teaches_alone(taught, tmp_path) -> None:
    """Routing changes nothing where all roads lead to one teacher."""
    for half in HALVES:
        (tmp_path / f"{half}.safetensors").write_bytes((taught / "even.safetensors").read_bytes())
    lines = (taught / "prompts.jsonl").read_text()
    (tmp_path / "prompts.jsonl").write_text(lines)
    both, _ = gradients(student(tmp_path))
    (tmp_path / "prompts.jsonl").write_text(lines.replace('"odd"', '"even"'))
    single, _ = gradients(student(tmp_path))
    for a, b in zip(both, single, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_teacher_is_asked_about_its_own_rows_alone(taught, monkeypatch, guidance: float) -> None:
    engine = build_engine(student(taught, f"guidance_scale={guidance}"), CPU)
    batch = batch_of(engine)
    asked: dict[str, int] = {}
    for name, snapshot in engine.learner.snapshots.items():
        original = snapshot.velocity

        def velocity(x, sigma, conditioning, name=name, original=original):
            asked[name] = asked.get(name, 0) + len(x)
            return original(x, sigma, conditioning)

        monkeypatch.setattr(snapshot, "velocity", velocity)
    point = batch.samples.transitions[0]
    evaluator = networks(engine.learner, batch, Counts()).at(point)
    with torch.no_grad():
        stats = engine.recipe.objective.measure(point, evaluator)
    half = 4 * (1 if guidance == 1 else 2)
    assert {name: asked[name] for name in asked if name != "start"} == {
        "teacher/even": half,
        "teacher/odd": half,
    }
    assert stats["drift/teacher"].shape == (8,)


@pytest.mark.parametrize("constant", [False, True], ids=["", "constant"])
@pytest.mark.parametrize(("guidance", "anchored"), [(1.0, True), (1.0, False), (2.0, True)])
def test_network_evaluations(taught, guidance: float, anchored: bool, constant: bool) -> None:
    """A sample: T and, at each of T - 1 steps, its own, a teacher's and the anchor's; twice that under guidance.

    Under guidance, where the unconditional half is constant, one forward of each step is saved, that half which the
    rollout has computed; else it goes back through the network, too.
    """
    changes = [f"guidance_scale={guidance}"] + ([] if anchored else ["objective.regularizers=[]"])
    changes += ["unconditional_gradient=false"] if constant else []
    metrics = train_step(build_engine(student(taught, *changes), CPU)).metrics
    halves = 1 if guidance == 1 else 2
    each = halves * (10 + 9 * (2 + anchored)) - (9 if halves == 2 and constant else 0)
    assert metrics["network_evaluations"] == 8 * each
    assert metrics["network_backwards"] == 8 * 9 * (1 if constant else halves)


def test_kl_only_has_no_gradient_on_average(taught) -> None:
    """A kl is known before a step's noise is drawn: over many draws its score-function gradient averages out.

    The squared norm of a mean of n independent gradients falls as 1/n, that of "gkd" does not.
    """
    changes = ("num_prompts=10", "group_size=24", "objective.regularizers=[]", "optimizer.max_grad_norm=1e9")

    def norms(mode: str) -> tuple[float, float]:
        found = []
        for seed in range(4):
            own, _ = gradients(student(taught, *changes, f"objective.mode={mode}", f"seed={seed}"))
            found.append(torch.cat([g.flatten() for g in own]))
        each = torch.stack(found).square().sum(1).mean()
        return float(each), float(torch.stack(found).mean(0).square().sum())

    noise, of_mean = norms("kl_only")
    assert of_mean / noise < 0.5  # 1/4 for independent noise
    signal, of_mean = norms("gkd")
    assert of_mean / signal > 0.9


def test_defaults_are_those_of_the_authors() -> None:
    recipe = RECIPES["flow_opd"].make()
    assert (recipe.group_size, recipe.num_prompts, recipe.guidance_scale) == (16, 16, 4.5)
    assert (recipe.optimizer.lr, recipe.optimizer.num_updates, recipe.optimizer.ema_decay) == (1e-4, 2, 0.9)
    part = recipe.objective
    assert (part.scale, part.bound, part.by) == (-1.0, 5.0, "dataset")
    assert part.regularizers == (TransitionKL(beta=0.04, to="start"),)


def test_a_resumed_run_goes_on_to_the_bit(taught, tmp_path) -> None:
    assert_resumes(student(taught, "optimizer.lr=0.001"), tmp_path)


def test_two_steps_of_the_command_line(taught, tmp_path) -> None:
    lines = trained_by_command("flow_opd", tmp_path / "run", *words_of(taught))
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[1]["ratio_self_test"] == 0
    assert all(np.isfinite(list(line.values())).all() for line in lines)


# ------------------------------------------------------------------------------------------- adapters


CHECKPOINT = "/checkpoints/step_000001"
INK = '[{"is": "RewardTerm", "function": "flowgrpo_fast.rewards.rules:ink_contrast"}]'


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3, two adapters of it that the product trained for a step, and prompts that route."""
    folder = tmp_path_factory.mktemp("adapters")
    tiny.make("sd3", folder / "sd3")
    lines = [
        {"prompt": p, "dataset": half} for p, half in zip(("a red cat", "two dogs"), HALVES, strict=True)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    for seed, half in enumerate(HALVES):
        changes = (f"seed={seed}", "optimizer.lr=0.01", f"data.path={folder}/prompts.jsonl")
        engine = build_engine(small("mix_grpo", *tiny_sd3(folder), *changes), CPU)
        train_step(engine)
        save_checkpoint(engine, folder / half)
    return folder


def tiny_sd3(folder: Path, alpha: int = 8) -> tuple[str, ...]:
    network = {"path": folder / "sd3", "height": 16, "width": 16, "train.rank": 4, "train.alpha": alpha}
    words = [f"network.{name}={value}" for name, value in network.items()]
    return "task.model=sd3", f"task.rewards={INK}", "sigmas.num_inference_steps=6", *words


def test_teachers_are_adapters_beside_one_base(adapters) -> None:
    """Each velocity is that of the base with the teacher's own adapter; the student's is untouched."""
    engine = build_engine(student(adapters, *tiny_sd3(adapters), suffix=CHECKPOINT), CPU)
    sizes = {
        name: sum(v.numel() for v in s.values)
        for name, s in engine.learner.snapshots.items()
        if name != "start"
    }
    trained = sum(p.numel() for p in engine.learner.parameters)
    assert set(sizes.values()) == {trained}  # of adapters alone
    assert trained < sum(p.numel() for p in engine.model.module.parameters()) / 2
    asked = engine.prompts.prompts
    x, sigma = torch.randn(len(asked), *engine.model.latent_shape), torch.full((len(asked),), 0.6)
    conditioning = engine.model.encode(asked)
    with torch.no_grad():
        own = engine.model.velocity(x, sigma, conditioning)
        for half in HALVES:
            path = f"network.train.path={adapters / half}{CHECKPOINT}"
            changes = (*tiny_sd3(adapters), path, f"data.path={adapters}/prompts.jsonl")
            expected = build_engine(small("mix_grpo", *changes), CPU).model.velocity(x, sigma, conditioning)
            got = engine.learner.snapshots[f"teacher/{half}"].velocity(x, sigma, conditioning)
            assert torch.equal(got, expected)
            assert not torch.equal(got, own)
        assert torch.equal(engine.model.velocity(x, sigma, conditioning), own)
    assert train_step(engine).metrics["teacher_kl"] > 0


def test_an_adapter_of_another_scale_is_refused(adapters) -> None:
    with pytest.raises(ValueError, match=r"was trained with alpha 8(\.0)?; LoRA.alpha is 16") as caught:
        build_engine(student(adapters, *tiny_sd3(adapters, alpha=16), suffix=CHECKPOINT), CPU)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------- what cannot be together


def test_refusals_are_one_line(taught, adapters, tmp_path, capsys) -> None:
    def error(*words: str) -> str:
        return refused(capsys, "flow_opd", *words, "--out", str(tmp_path / "run"))

    own = words_of(taught)
    assert "Distillation.teachers is empty; name a teacher" in error(own[0])
    nobody = own[1].replace("odd.safetensors", "nobody.safetensors")
    assert "nobody.safetensors'; there is no such file or folder" in error(own[0], nobody)
    assert "does not hold weights of this model" in error(
        own[0], own[1].replace("odd.safetensors", "prompts.jsonl")
    )
    short = load_file(taught / "odd.safetensors")
    del short["transformer.proj_out.weight"]
    save_file(short, tmp_path / "short")
    wrong = own[1].replace(f"{taught}/odd.safetensors", f"{tmp_path}/short")
    assert "does not hold weights of this model" in error(own[0], wrong)
    unlike = own[1].replace(f"{taught}/odd.safetensors", f"{adapters}/odd{CHECKPOINT}")
    assert "does not hold weights of this model" in error(own[0], unlike)  # an adapter is no whole model
    assert "mode is 'other'" in error(*own, "objective.mode=other")
    assert "the window Deterministic has no stochastic step" in error(*own, "topology.at=Deterministic")


@pytest.mark.parametrize("value", [None, "third", 3])
def test_a_prompt_of_no_teacher_is_refused_before_anything_is_sampled(
    taught, tmp_path, capsys, value
) -> None:
    lines = (taught / "prompts.jsonl").read_text().splitlines()
    bad = {"prompt": prompts()[0]} | ({} if value is None else {"dataset": value})
    (tmp_path / "prompts.jsonl").write_text("\n".join([*lines, json.dumps(bad)]) + "\n")
    words = (f"data.path={tmp_path}/prompts.jsonl", words_of(taught)[1])
    error = refused(capsys, "flow_opd", *words, "--out", str(tmp_path / "run"))
    assert f"has dataset = {'' if value is None else value!r} in its metadata" in error
    assert "Distillation knows 'even', 'odd'" in error


def test_the_last_step_must_be_trained() -> None:
    recipe = RECIPES["flow_opd"].make()
    mixed = replace(recipe.objective, mode="mixed")
    with pytest.raises(ValueError, match="trains 5 of 9"):
        replace(
            recipe,
            objective=mixed,
            credit=(*RECIPES["flow_grpo"].make().credit[:2], AtLastStep()),
            topology=Independent(at=FractionOfSteps(fraction=0.6)),
        )
