"""The loop on a small job: it learns, it is exact on policy, it resumes to the bit, and it refuses nonsense."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from flowgrpo_fast.models.digits import DigitsConfig, DigitsModel, DigitsNetwork, prompts
from flowgrpo_fast.names import resolve
from flowgrpo_fast.recipe import (
    CPS,
    Bound,
    Clip,
    Cuts,
    DPMSolver2M,
    FractionOfSteps,
    Independent,
    Loaded,
    Normalise,
    Optimizer,
    PolicyGradient,
    Prompts,
    RewardTerm,
    Scouts,
    SharedStart,
    SlidingWindow,
    TransitionKL,
)
from flowgrpo_fast.recipes import RECIPES, digits
from flowgrpo_fast.training import loop
from flowgrpo_fast.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.evaluate import diversity, evaluate
from flowgrpo_fast.training.learner import Learner
from flowgrpo_fast.training.loop import train, train_step
from tests.golden.digits_teachers import Taught
from tests.rewards.own_reward import OwnReward
from tests.training.steps import CPU, gathered, measured, snapshot_weights, weights


def with_kl(beta: float) -> PolicyGradient:
    return PolicyGradient(trust=Clip(range=0.05), regularizers=(TransitionKL(beta=beta),))


def run(recipe, steps: int | None = None):
    engine, reports = build_engine(recipe, CPU), []
    train(engine, reports.append, lambda: steps is not None and engine.step >= steps)
    return engine, reports


def test_training_raises_reward_and_judge(toy_recipe) -> None:
    recipe = toy_recipe(num_steps=60, optimizer=Optimizer(lr=2e-2), group_size=16)
    engine = build_engine(recipe, CPU)
    before = evaluate(engine).metrics
    train(engine, lambda report: None, lambda: False)
    after = evaluate(engine).metrics
    assert after["eval/reward"] > before["eval/reward"] + 0.15
    assert after["eval/judge"] >= 0.9 > before["eval/judge"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16"},
        {"guidance_scale": 3.0},
        {"optimizer": Optimizer(lr=3e-3, num_updates=2)},
        {"rows_per_forward": 8},
        {"topology": Independent(at=FractionOfSteps(fraction=0.5))},
        {"dynamics": CPS(), "solver": DPMSolver2M(keep=0.5)},
        {"topology": SharedStart(at=SlidingWindow(size=2, every=1))},
        {"objective": with_kl(0.1)},
    ],
    ids=str,
)
def test_the_first_ratio_is_exactly_one_at_every_step(toy_recipe, changes) -> None:
    _, reports = run(toy_recipe(**changes))
    assert reports[0].metrics["ratio_self_test"] == 0.0
    assert [report.metrics["first_ratio_error"] for report in reports] == [0.0] * 4


def shrunk(recipe):
    """A sixth of every group, or less."""
    topology, experience = recipe.topology, recipe.experience
    if isinstance(topology, Cuts):
        topology = dataclasses.replace(topology, sizes=tuple(size // 4 for size in topology.sizes))
        return dataclasses.replace(recipe, group_size=recipe.group_size // 4, topology=topology)
    if isinstance(experience, Scouts):
        experience = dataclasses.replace(experience, num_scouts=experience.num_scouts // 6)
    size = topology.only_group_size(recipe.sigmas.num_inference_steps) or min(recipe.group_size, 4)
    return dataclasses.replace(recipe, group_size=size, experience=experience)


def taught(recipe, network, folder):
    """Teachers for who learns from them: the network itself, its weights scaled."""
    if recipe.name != "flow_opd":
        return recipe
    teachers = {}
    for name, scale in (("even", 1.02), ("odd", 0.98)):
        weights = {key: (scale * value).contiguous() for key, value in network.state_dict().items()}
        save_file(weights, folder / f"{name}.safetensors")
        teachers[name] = Loaded(path=str(folder / f"{name}.safetensors"))
    return dataclasses.replace(
        recipe, data=Taught(), objective=dataclasses.replace(recipe.objective, teachers=teachers)
    )


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_recipe_is_exact_on_the_real_transformer(name, precision, monkeypatch, tmp_path) -> None:
    """diffusers' SD3 transformer, default geometry: the self-test reads exactly 0 in fp32 and bf16."""
    torch.manual_seed(0)
    network = DigitsNetwork(DigitsConfig(num_layers=2)).eval()
    network.words.requires_grad_(False)
    for parameter in network.parameters():  # diffusers starts the output layer at 0; make it say something
        parameter.data += 0.05 * torch.randn_like(parameter)
    monkeypatch.setattr("flowgrpo_fast.models.digits.load", lambda device, setup: DigitsModel(network))
    recipe = dataclasses.replace(
        shrunk(digits(taught(RECIPES[name].make(), network, tmp_path))), num_prompts=4, num_steps=2
    )
    recipe = dataclasses.replace(recipe, machine=dataclasses.replace(recipe.machine, precision=precision))
    recipe = dataclasses.replace(recipe, task=dataclasses.replace(recipe.task, judge=""))
    _, reports = run(recipe)
    if recipe.objective.requires.log_probs:
        assert reports[0].metrics["ratio_self_test"] == 0.0
        assert [report.metrics["first_ratio_error"] for report in reports] == [0.0, 0.0]
    assert all(report.metrics["grad_norm"] > 0 for report in reports)


def test_another_replay_geometry_is_measured_and_a_broken_replay_stops_the_run(toy_recipe) -> None:
    _, reports = run(toy_recipe(replay_rows=4))
    assert reports[0].metrics["ratio_self_test"] < 1e-5

    recipe = toy_recipe()
    engine = build_engine(recipe, CPU)
    engine.model.module.append(torch.nn.Dropout(0.5))  # the classic mistake: noise between rollout and replay
    engine.model.module.train()
    with pytest.raises(ValueError, match=r"ratio self-test: max \|ratio - 1\| is .* above the limit 0.05"):
        train_step(engine)
    assert engine.step == 0


def test_gradient_is_that_of_the_loss_written_out(toy_recipe, monkeypatch) -> None:
    """One update's accumulated gradient against autograd on the whole surrogate at once, in plain PyTorch."""
    recipe = toy_recipe(rows_per_forward=8, optimizer=Optimizer(lr=1e-9, max_grad_norm=1e9, weight_decay=0.0))
    engine = build_engine(recipe, CPU)
    seen = {}
    update = loop.update

    def spy(learner, batch):
        seen["batch"] = batch
        return update(learner, batch)

    monkeypatch.setattr(loop, "update", spy)
    monkeypatch.setattr(Learner, "step", lambda learner: torch.tensor(0.0))  # leaves the gradient where it is
    train_step(engine)
    ours = [p.grad.clone() for p in engine.model.module.parameters()]
    engine.learner.optimizer.zero_grad()
    batch = seen["batch"]
    trajectory = batch.samples
    total = 0.0
    for kept in trajectory.transitions:
        step = trajectory.plan.steps[kept.place].step
        sigma, a, b, _, _, inv_var, log_norm, _ = trajectory.coeffs[step]
        velocity = engine.model.velocity(kept.latents, sigma.expand(32), batch.conditioning)
        mean = a * kept.latents + b * velocity
        residual = kept.next_latents - mean
        log_prob = -0.5 * inv_var * residual.square().mean(1) + log_norm
        total = total - (torch.exp(log_prob - kept.log_prob) * batch.credit.advantages).sum()
    (total / (32 * 3)).backward()
    for mine, parameter in zip(ours, engine.model.module.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-7)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(toy_recipe) -> None:
    first, again = run(toy_recipe())[0], run(toy_recipe())[0]
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(run(toy_recipe(seed=1))[0]))


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(toy_recipe, tmp_path, ema_decay) -> None:
    recipe = toy_recipe(optimizer=Optimizer(lr=3e-3, ema_decay=ema_decay, ema_every=2))
    whole, _ = run(recipe)
    half, _ = run(recipe, steps=2)
    save_checkpoint(half, tmp_path)
    resumed = build_engine(recipe, CPU)
    load_checkpoint(resumed, latest_checkpoint(tmp_path))
    assert resumed.step == 2
    train(resumed, lambda report: None, lambda: False)
    assert torch.equal(weights(whole), weights(resumed))
    assert evaluate(whole).metrics == evaluate(resumed).metrics


def test_the_average_is_the_average(toy_recipe) -> None:
    recipe = toy_recipe(optimizer=Optimizer(lr=3e-2, ema_decay=0.5), num_steps=3)
    engine = build_engine(recipe, CPU)
    expected = weights(engine)
    for _ in range(3):
        train_step(engine)
        expected = 0.5 * expected + 0.5 * weights(engine)
    torch.testing.assert_close(snapshot_weights(engine, "average"), expected)
    assert engine.evaluated.model is engine.learner.snapshots["average"]


def test_kl_holds_the_policy_back(toy_recipe) -> None:
    free, held = (run(toy_recipe(num_steps=15, objective=with_kl(beta)))[0] for beta in (0, 50))
    start = weights(build_engine(toy_recipe(), CPU))
    assert (weights(held) - start).norm() < 0.7 * (weights(free) - start).norm()


def test_equal_rewards_everywhere_stop_the_run_at_once(toy_recipe, toy_module) -> None:
    recipe = toy_recipe()
    task = dataclasses.replace(recipe.task, rewards=(RewardTerm(function=f"{toy_module}:constant"),))
    with pytest.raises(ValueError, match=r"zero variance for 1 step.*mean reward is 0.25"):
        run(dataclasses.replace(recipe, task=task))
    kept = dataclasses.replace(recipe, task=task, credit=(Normalise(), Bound()))
    engine, _ = run(kept)  # asked for: nothing is dropped, nothing is learned
    torch.testing.assert_close(weights(engine), weights(build_engine(kept, CPU)), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda images, prompts: torch.zeros(3),
            r"returned shape \(3,\) for 32 images; it must return \(32,\)",
        ),
        (lambda images, prompts: torch.full((len(images),), float("nan")), "of sample 0 is nan"),
        (lambda images, prompts: ["good"] * 32, r"returned a list for 32 images; it must return 32 numbers"),
        (lambda images, prompts: None, r"returned a NoneType for 32 images; it must return 32 numbers"),
    ],
)
def test_bad_rewards_are_named(toy_recipe, function, message) -> None:
    engine = build_engine(toy_recipe(), CPU)
    engine.stage.scorer.terms = (OwnReward(function=function),)
    with pytest.raises(ValueError, match=message):
        train_step(engine)


def test_names_that_do_not_resolve() -> None:
    with pytest.raises(ValueError, match=r"is not package.module:name"):
        resolve("json.loads")
    with pytest.raises(ValueError, match="there is no module 'jsn'"):
        resolve("jsn:loads")
    with pytest.raises(ValueError, match="module json has no 'lods'"):
        resolve("json:lods")


def test_prompts_from_a_file(toy_recipe, tmp_path) -> None:
    recipe = toy_recipe()
    file = tmp_path / "prompts.txt"
    file.write_text("high\n\n  low \nhigh\n")
    named = dataclasses.replace(recipe, data=Prompts(path=str(file)))
    assert build_engine(named, CPU).prompts.prompts == (
        "high",
        "low",
        "high",
    )
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        build_engine(named, CPU)
    named = dataclasses.replace(recipe, data=Prompts(path=str(tmp_path / "none.txt")))
    with pytest.raises(ValueError, match=r"cannot read prompts from .*No such file"):
        build_engine(named, CPU)


def test_digits_prompts_cover_the_ten_digits() -> None:
    assert len(prompts()) % 10 == 0


def test_diversity_is_the_spread_within_a_prompt() -> None:
    images = torch.tensor([0.0, 1.0, 0.5, 0.5, 0.9]).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    assert diversity(images, torch.tensor([0, 0, 1, 1, 2])) == pytest.approx((0.5 + 0.0) / 2)
    assert diversity(images, torch.arange(5)) == 0.0


def test_kl_compares_guided_transitions(toy_recipe) -> None:
    """Both halves of the policy move away from the reference's; the KL is that of the mixed velocities."""
    recipe = toy_recipe(guidance_scale=3.0, objective=with_kl(0.1))
    engine = build_engine(recipe, CPU)
    for _ in range(3):
        train_step(engine)
    batch = gathered(engine)
    trajectory, rows = batch.samples, batch.conditioning
    assert batch.live.all()
    stats = measured(engine, batch)[1]
    kl = recipe.objective.regularizers[0].penalty(stats)
    second = trajectory.transitions[1]
    step = trajectory.plan.steps[second.place].step
    sigma, b, c = trajectory.coeffs[step, [0, 2, 3]]
    means = []
    for model in (engine.model, engine.learner.snapshots["start"]):
        with torch.no_grad():
            positive, negative = (
                model.velocity(second.latents, sigma.expand(32), half) for half in (rows, rows.negative())
            )
        means.append(b * (negative + 3.0 * (positive - negative)))
    minus_dt = trajectory.plan.sigmas[step] - trajectory.plan.sigmas[step + 1]
    expected = (means[0] - means[1]).square().mean(1) / (2 * c**2 / minus_dt)
    assert expected.min() > 0
    torch.testing.assert_close(kl, expected, rtol=1e-4, atol=0)
