"""OP-GRPO: its worked case, what is stored, repeated and replaced, what it refuses, and a run."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flowgrpo_fast.credit.chain import assign
from flowgrpo_fast.credit.normalise import Normalise
from flowgrpo_fast.experience.replay_buffer import Replayed
from flowgrpo_fast.experience.rollout import Rollout
from flowgrpo_fast.objectives.policy_gradient import PolicyGradient
from flowgrpo_fast.objectives.trust import Clip
from flowgrpo_fast.recipes.trajectory import flow_grpo, op_grpo
from flowgrpo_fast.schedule.dynamics import FlowSDE
from flowgrpo_fast.schedule.topology import Independent, OneStepEach, SharedStart
from flowgrpo_fast.schedule.windows import AllSteps, EarlySteps, FrozenWindow
from flowgrpo_fast.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import make_batch, train_step
from flowgrpo_fast.training.update import Tally, separable
from flowgrpo_fast.types import Credit, Scores
from tests.methods.batches import final_bytes, gradient, move, resume, scored, train, without_times

CPU = torch.device("cpu")
EARLY = 3


def small(toy_recipe, **changes):
    """Two prompts, each in every step; the first three of six steps are stored."""
    return toy_recipe(
        **{
            "topology": Independent(at=EarlySteps(size=EARLY)),
            "experience": Replayed(num_early_steps=EARLY),
            "num_prompts": 2,
            "group_size": 4,
            **changes,
        }
    )


def entries(engine) -> dict:
    return engine.stage.memory["replay_buffer"]["entries"]


def settle(engine, walked, rewards, step: int) -> None:
    """Ends a step with rewards of our own."""
    scores = Scores(total=torch.tensor(rewards))
    engine.recipe.experience.settle(engine.stage, replace(walked, scores=scores), step)


def test_the_recipe_is_flow_grpo_with_a_buffer() -> None:
    recipe, base = op_grpo(), flow_grpo()
    assert recipe.experience == Replayed(num_early_steps=6, cap=2.0, decay=0.9)  # 60 % of ten steps
    assert recipe.topology == Independent(at=EarlySteps(size=6))
    assert recipe == replace(base, name="op_grpo", topology=recipe.topology, experience=recipe.experience)


def test_worked_case(methods) -> None:
    """Advantages, the sequence weight, and the loss of the whole batch with its gradient."""
    case = methods["op_grpo"]
    given, expected = case["inputs"], case["expected"]
    new, old, off = (
        torch.tensor(given[key], dtype=torch.float64) for key in ("logp", "logp_old", "logp_off")
    )
    rewards = torch.tensor(given["rewards"], dtype=torch.float64)
    seen = SimpleNamespace(
        scores=Scores(total=rewards),
        samples=SimpleNamespace(
            draws=SimpleNamespace(
                group_id=torch.zeros(4, dtype=torch.int64), prompt_index=torch.zeros(1, dtype=torch.int64)
            )
        ),
    )
    credit = assign((Normalise(aggregate="sum", eps=given["eps"]),), seen)
    np.testing.assert_allclose(credit.advantages, expected["A"], rtol=1e-6)
    is_replayed = torch.tensor(given["is_buffer"]) > 0
    weight = torch.where(is_replayed, Replayed(cap=given["cap"]).weight(old, off), 1.0)
    np.testing.assert_allclose(weight, expected["weight"], rtol=1e-6)
    # The update's own pull, a step at a time.
    advantages = torch.tensor(expected["A"], dtype=torch.float64)
    share = SimpleNamespace(
        credit=Credit(advantages, torch.ones(4, dtype=torch.float64)),
        samples=SimpleNamespace(weight=weight),
        total_weight=None,
    )
    objective, tally = PolicyGradient(trust=Clip(range=given["clip"])), Tally()
    pull = separable(objective, share, SimpleNamespace(per_sample=3), tally)
    moving = new.clone().requires_grad_()
    point = SimpleNamespace(samples=torch.arange(4)[:, None], row=None)
    loss = sum(
        pull(step, point, {"log_prob": moving[:, step], "old_log_prob": old[:, step]}) for step in range(3)
    )
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    ratio = torch.exp(new - old)
    clip, wide = given["clip"], advantages[:, None]
    active = torch.where(wide > 0, ratio <= 1 + clip, ratio >= 1 - clip)
    np.testing.assert_allclose(moving.grad, weight[:, None] * -wide * ratio * active / 12, rtol=1e-6)


def test_the_weight_is_capped_and_of_the_mean() -> None:
    part = Replayed(cap=2.0)
    now = torch.tensor([[0.3, 0.1], [3.0, 1.0], [-2.0, -2.0]])
    expected = [np.exp(0.2), 2.0, np.exp(-2.0)]
    np.testing.assert_allclose(part.weight(now, torch.zeros(3, 2)), expected, rtol=1e-6)


def test_priorities_sink_with_age() -> None:
    part = Replayed(decay=0.9)
    assert part.priority(2.0, 0) == 2.0
    assert part.priority(2.0, 2) == pytest.approx(1.62)
    assert part.priority(-2.0, 2) == pytest.approx(-2 / 0.81)
    assert part.priority(0.0, 5) == 0.0


def test_an_empty_buffer_gives_fresh_samples_alone(toy_recipe) -> None:
    engine, plain = (
        build_engine(small(toy_recipe), CPU),
        build_engine(small(toy_recipe, experience=Rollout()), CPU),
    )
    one, other = scored(engine).samples, scored(plain).samples
    assert one.weight is None
    assert torch.equal(one.x0, other.x0)
    assert entries(engine) == {}


def test_without_replays_it_is_flow_grpo_to_the_bit(toy_recipe) -> None:
    """`num_early_steps = 0` disables the buffer."""
    found = []
    for part in (Replayed(num_early_steps=0), Rollout()):
        engine = build_engine(small(toy_recipe, experience=part), CPU)
        for _ in range(3):
            train_step(engine)
        found.append([p.detach().clone() for p in engine.learner.parameters])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_best_of_a_group_is_stored_and_repeated(toy_recipe) -> None:
    engine = build_engine(small(toy_recipe), CPU)
    first = scored(engine)
    settle(engine, first, [0.1, 0.9, 0.3, 0.2, 0.5, 0.1, 0.2, 0.7], step=0)
    prompts = first.samples.draws.prompt_index.tolist()
    for place, best in zip(prompts, (1, 7), strict=True):
        entry = entries(engine)[place]
        steps = first.samples.transitions
        assert entry["born"] == 0
        assert entry["reward"] == pytest.approx({1: 0.9, 7: 0.7}[best])
        states = [steps[0].latents[best], *(step.next_latents[best] for step in steps)]
        assert torch.equal(entry["states"], torch.stack(states))
        assert torch.equal(entry["log_prob"], torch.stack([step.log_prob[best] for step in steps]))
    move(engine, 0.02)
    second = scored(engine, step=1)
    fresh = build_engine(small(toy_recipe, experience=Rollout()), CPU)
    move(fresh, 0.02)
    others = scored(fresh, step=1)
    again = second.samples.draws.prompt_index.tolist()
    for place, prompt in enumerate(again):
        sample = place * 4 + 3  # the last member made room
        steps, stored = second.samples.transitions, entries(engine)[prompt]
        states = [steps[0].latents[sample], *(step.next_latents[sample] for step in steps)]
        assert torch.equal(torch.stack(states), stored["states"])
        # Scored by the policy of today, and gone on with by it.
        now = torch.stack([step.log_prob[sample] for step in steps])
        assert (now != stored["log_prob"]).all()
        weight = torch.exp((now - stored["log_prob"]).mean()).clamp(max=2)
        torch.testing.assert_close(second.samples.weight[sample], weight)
        assert not torch.equal(second.samples.x0[sample], others.samples.x0[sample])
        assert not torch.equal(
            second.samples.x0[sample], first.samples.x0[prompts.index(prompt) * 4 + (1, 3)[place]]
        )
    rest = [i for i in range(8) if i % 4 != 3]
    assert torch.equal(second.samples.x0[rest], others.samples.x0[rest])
    assert torch.equal(second.samples.weight[rest], torch.ones(6))
    batch = make_batch(engine, second)
    assert gradient(engine, batch)[0] == pytest.approx(
        -float(batch.credit.advantages.mean()), abs=1e-5
    )  # ratios are 1 before the update, those of replayed samples, too


def test_a_prompt_that_was_not_seen_has_fresh_samples_alone(toy_recipe) -> None:
    engine = build_engine(small(toy_recipe), CPU)
    settle(engine, scored(engine), [0.0, 1, 0, 0, 0, 1, 0, 0], step=0)
    unseen = scored(engine, step=1).samples.draws.prompt_index.tolist()[0]
    del entries(engine)[unseen]
    fresh = scored(build_engine(small(toy_recipe, experience=Rollout()), CPU), step=1)
    second = scored(engine, step=1)
    assert torch.equal(second.samples.x0[:4], fresh.samples.x0[:4])
    assert torch.equal(second.samples.weight[:4], torch.ones(4))
    assert not torch.equal(second.samples.x0[7], fresh.samples.x0[7])


def after_replay(engine, rewards_of_each) -> tuple[dict, dict]:
    """The entry of the first group's prompt before and after a step in which it was replayed."""
    settle(engine, scored(engine), [0.1, 0.9, 0.3, 0.2] * 2, step=0)
    second = scored(engine, step=1)
    prompt = second.samples.draws.prompt_index.tolist()[0]
    before = entries(engine)[prompt]
    settle(engine, second, rewards_of_each * 2, step=1)
    return before, entries(engine)[prompt]


def test_the_replayed_sample_best_again_keeps_its_walk_and_its_age(toy_recipe) -> None:
    """Its new reward replaces the old one, lower or not."""
    before, after = after_replay(build_engine(small(toy_recipe), CPU), [0.1, 0.2, 0.3, 0.6])
    assert (after["reward"], after["born"]) == (pytest.approx(0.6), 0)
    assert torch.equal(after["states"], before["states"])
    assert torch.equal(after["log_prob"], before["log_prob"])


@pytest.mark.parametrize(("fresh", "stays"), [(0.53, True), (0.55, False)])
def test_a_fresh_sample_replaces_what_age_has_made_worth_less(toy_recipe, fresh: float, stays: bool) -> None:
    """0.6 of the step before is worth 0.54."""
    before, after = after_replay(build_engine(small(toy_recipe), CPU), [0.1, fresh, 0.3, 0.6])
    assert (after["born"] == 0) == stays
    assert torch.equal(after["states"], before["states"]) == stays
    assert after["reward"] == pytest.approx(0.6 if stays else fresh)


def test_a_sample_without_a_score_is_not_stored_and_unseats_nobody(toy_recipe) -> None:
    engine = build_engine(small(toy_recipe), CPU)
    first = scored(engine)
    valid = torch.tensor([True, False, True, True] + [False] * 4)
    scores = Scores(total=torch.tensor([0.1, 0.0, -0.3, 0.05] + [0.0] * 4), valid=valid)
    engine.recipe.experience.settle(engine.stage, replace(first, scores=scores), 0)
    seen, unseen = first.samples.draws.prompt_index.tolist()
    assert set(entries(engine)) == {seen}
    assert entries(engine)[seen]["reward"] == pytest.approx(0.1)
    second = scored(engine, step=1)
    failed = Scores(total=torch.zeros(8), valid=torch.zeros(8, dtype=torch.bool))
    engine.recipe.experience.settle(engine.stage, replace(second, scores=failed), 1)
    assert set(entries(engine)) == {seen}
    assert entries(engine)[seen]["reward"] == pytest.approx(0.1)
    assert entries(engine)[seen]["born"] == 0
    assert unseen not in entries(engine)


def test_of_several_groups_of_a_prompt_the_best_is_stored(toy_recipe) -> None:
    engine = build_engine(small(toy_recipe, num_prompts=4), CPU)  # of two prompts, twice each
    first = scored(engine)
    rewards = [0.1, 0.9, 0.3, 0.2, 0.5, 0.1, 0.2, 0.7, 0.1, 0.1, 0.8, 0.1, 0.95, 0.1, 0.2, 0.3]
    settle(engine, first, rewards, step=0)
    for prompt in (0, 1):
        own = [i for i, p in enumerate(first.samples.draws.prompt_index.tolist()) if p == prompt]
        best = max(own, key=lambda place: max(rewards[place * 4 : place * 4 + 4]))
        assert entries(engine)[prompt]["reward"] == pytest.approx(max(rewards[best * 4 : best * 4 + 4]))


def test_equal_rewards_store_something_and_teach_nothing(toy_recipe) -> None:
    engine = build_engine(small(toy_recipe), CPU)
    settle(engine, scored(engine), [0.25] * 8, step=0)
    assert len(entries(engine)) == 2
    second = replace(scored(engine, step=1), scores=Scores(total=torch.full((8,), 0.25)))
    batch = make_batch(engine, second)
    assert not batch.live.any()


def test_one_prompt_learns_and_its_first_ratio_is_one(toy_recipe) -> None:
    engine = build_engine(small(toy_recipe, num_prompts=1, rows_per_forward=2), CPU)
    for _ in range(4):
        metrics = train_step(engine).metrics
        assert metrics["first_ratio_error"] == 0
        assert metrics["network_evaluations"] == 4 * (6 + EARLY)
        assert metrics["network_backwards"] == 4 * EARLY
    assert metrics["replayed"] > 0


def test_all_but_the_last_step_may_be_repeated(toy_recipe) -> None:
    """Five of six: only the step that ends at sigma 0 is walked anew, and that is deterministic."""
    part = {"topology": Independent(at=AllSteps()), "experience": Replayed(num_early_steps=5)}
    engine = build_engine(small(toy_recipe, **part), CPU)
    for _ in range(3):
        assert train_step(engine).metrics["first_ratio_error"] == 0
    with pytest.raises(ValueError, match="its own way for at least one of the 6 steps"):
        small(toy_recipe, topology=Independent(at=AllSteps()), experience=Replayed(num_early_steps=6))


def test_chunks_of_prompts_make_no_difference(toy_recipe) -> None:
    """But for the last bit of a reward, which is a mean over fewer images at a time."""
    weights = []
    for chunk in (0, 1):
        engine = build_engine(small(toy_recipe, rows_per_forward=4, prompts_per_chunk=chunk), CPU)
        for _ in range(3):
            train_step(engine)
        weights.append([p.detach().clone() for p in engine.learner.parameters])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"topology": Independent(at=FrozenWindow(size=3, start=1))}, r"the walk keeps \[1, 2, 3\]"),
        ({"topology": Independent(at=EarlySteps(size=2))}, r"the walk keeps \[0, 1\]"),
        ({"topology": OneStepEach(at=AllSteps())}, "every sample must keep its first steps"),
    ],
)
def test_walks_that_do_not_keep_what_would_be_repeated_are_refused(toy_recipe, changes, what: str) -> None:
    with pytest.raises(ValueError, match=what) as error:
        small(toy_recipe, **changes).plan(0)
    assert "\n" not in str(error.value)


def test_shared_starts_are_refused(toy_recipe) -> None:
    with pytest.raises(ValueError, match="a replayed sample brings its own: use Independent"):
        small(toy_recipe, topology=SharedStart(at=EarlySteps(size=EARLY)))


def test_a_buffer_of_another_policy_is_refused(toy_recipe, tmp_path) -> None:
    """Resumed with other noise, schedule, guidance or precision, its log-probs would be of another density."""
    recipe = small(toy_recipe)
    engine = build_engine(recipe, CPU)
    train_step(engine)
    checkpoint = save_checkpoint(engine, tmp_path)
    changed = {
        "noise or schedule": {"dynamics": FlowSDE(noise_level=0.5)},
        "guidance_scale": {"guidance_scale": 2.0},
        "precision": {"precision": "bf16"},
    }
    for what, changes in changed.items():
        other = build_engine(small(toy_recipe, **changes), CPU)
        load_checkpoint(other, checkpoint)
        with pytest.raises(
            ValueError, match=f"sampled with another {what}: log-probs do not compare"
        ) as error:
            train_step(other)
        assert "\n" not in str(error.value)
    other = build_engine(replace(recipe, dynamics=FlowSDE(noise_level=0.5)), CPU)
    (checkpoint / "memory.pt").unlink()  # the remedy that the line names
    load_checkpoint(other, checkpoint)
    assert "replayed" not in train_step(other).metrics


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(toy_recipe, tmp_path) -> None:
    """A checkpoint holds the buffer as plain types and tensors, which `weights_only` reads."""
    recipe = small(toy_recipe)
    whole, part = build_engine(recipe, CPU), build_engine(recipe, CPU)
    for _ in range(4):
        train_step(whole)
    for _ in range(2):
        train_step(part)
    save_checkpoint(part, tmp_path)
    resumed = build_engine(recipe, CPU)
    load_checkpoint(resumed, latest_checkpoint(tmp_path))
    for _ in range(2):
        train_step(resumed)
    for one, other in zip(whole.learner.parameters, resumed.learner.parameters, strict=True):
        assert torch.equal(one, other)
    assert entries(whole).keys() == entries(resumed).keys()
    for prompt, entry in entries(whole).items():
        for name, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(entries(resumed)[prompt][name]))


def test_a_run_and_its_resumption(tmp_path) -> None:
    """On the digits: a repeated step is asked once, by the present policy, as a fresh one is."""
    own = ("num_prompts=10", "group_size=4")  # every prompt in every step
    lines = train(tmp_path / "whole", "op_grpo", 2, *own)
    assert [line["first_ratio_error"] for line in lines] == [0, 0]
    assert lines[1]["replayed"] == 1
    samples, steps, early = 10 * 4, 10, 6
    # The penalty measures from the start weights: as many again, without gradient.
    assert [line["network_evaluations"] for line in lines] == [samples * (steps + 2 * early)] * 2
    assert [line["network_backwards"] for line in lines] == [samples * early] * 2
    train(tmp_path / "parts", "op_grpo", 1, *own)
    assert without_times(resume(tmp_path / "parts", 2)) == without_times(lines)
    assert final_bytes(tmp_path / "parts", 2) == final_bytes(tmp_path / "whole", 2)
    with pytest.raises(SystemExit):
        resume(tmp_path / "parts", 3, "dynamics.noise_level=0.5")
