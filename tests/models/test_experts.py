"""Wan 2.2-A14B: where all samples are at one step, only the expert that it belongs to runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from flowgrpo_fast.recipe import (
    NFT,
    Clip,
    Deterministic,
    FractionOfSteps,
    FrozenWindow,
    Independent,
    LowPrecision,
    PolicyGradient,
    SharedStart,
    TransitionKL,
)
from flowgrpo_fast.sampling.walk import walk
from flowgrpo_fast.training.engine import Engine, build_engine
from flowgrpo_fast.training.loop import train_step
from flowgrpo_fast.types import FlowModel
from tests.models.families import WAN
from tests.sampling.walks import drawn

CPU = torch.device("cpu")
EXPERTS = replace(WAN, variant={"experts": True})


def models(engine: Engine) -> list[FlowModel]:
    """The training model and, where there is one, its copy in low precision."""
    outside = engine.stage.sampler.outside
    return [engine.model] if outside is None else [engine.model, outside.model]


def counted(engine: Engine) -> Counter[str]:
    """Forwards of each expert from here on, of the training model and of its copy in low precision."""
    calls: Counter[str] = Counter()
    for module in {id(m.module): m.module for m in models(engine)}.values():
        for name, transformer in module.items():
            transformer.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    return calls


def both(engine: Engine) -> None:
    """As if nobody could know beforehand which one is asked for."""
    for model in models(engine):
        model.expert = lambda sigma, model=model: model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "objective": PolicyGradient(trust=Clip(range=0.05), regularizers=(TransitionKL(beta=0.1),)),
            "guidance_scale": 2.0,
        },
        {"topology": SharedStart(at=FrozenWindow(size=2)), "graphs": True},
        {"rollout_precision": LowPrecision(mode="merged", emulate=True)},
    ],
    ids=["plain", "KL and guidance", "shared, static buffers", "FP8 outside"],
)
@pytest.mark.filterwarnings("ignore:fp8_rows is emulated")
def test_one_expert_a_step(changes, tiny_recipe) -> None:
    """Half the forwards, the same numbers; the first ratio stays exactly 1."""
    engine = build_engine(tiny_recipe(EXPERTS, **changes), CPU)
    sigmas = engine.stage.plan(0).sigmas[:-1]
    boundary = engine.model.pipe.config.boundary_ratio
    assert 0 < int((sigmas >= boundary).sum()) < len(sigmas)
    calls = counted(engine)
    report = train_step(engine)
    assert report.metrics["ratio_self_test"] == 0
    assert set(calls) == {"transformer", "transformer_2"}
    control = build_engine(tiny_recipe(EXPERTS, **changes), CPU)
    both(control)
    all_calls = counted(control)
    expected = train_step(control)
    assert all_calls["transformer"] == all_calls["transformer_2"] == calls.total()
    for name in ("reward", "loss", "ratio_self_test"):
        assert report.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-6, abs=1e-9)


def test_samples_are_those_of_both_to_the_bit(tiny_recipe) -> None:
    engine = build_engine(tiny_recipe(EXPERTS), CPU)
    sampler, draws = engine.stage.sampler, drawn(engine.recipe, len(engine.prompts))
    given = engine.stage.plan(0), engine.stage.conditioning.rows(draws.prompt_index[draws.group_id]), draws
    one = walk(sampler, *given)
    both(engine)
    assert torch.equal(one.x0, walk(sampler, *given).x0)


@pytest.mark.parametrize(
    "changes",
    [
        {"topology": Independent(at=FractionOfSteps(fraction=0.5))},
        {"topology": Independent(at=Deterministic()), "objective": NFT()},
    ],
    ids=["a fraction of the steps", "NFT"],
)
def test_samples_at_steps_of_their_own_are_served_by_both(changes, tiny_recipe) -> None:
    engine = build_engine(tiny_recipe(EXPERTS, **changes), CPU)
    metrics = train_step(engine).metrics
    assert metrics["grad_norm"] > 0
    assert metrics.get("ratio_self_test", 0) == 0


def test_a_view_is_made_once_and_only_where_there_are_two(tiny_recipe) -> None:
    engine = build_engine(
        tiny_recipe(EXPERTS, objective=PolicyGradient(regularizers=(TransitionKL(beta=0.1),))), CPU
    )
    sigmas = torch.tensor([0.9, 0.85, 0.1])
    for model in (engine.model, engine.learner.snapshots["start"]):
        high, still_high, low = (model.expert(sigma) for sigma in sigmas)
        assert high is still_high
        assert high is not low
        assert low.module is engine.model.module
        assert high.expert(sigmas[2]) is high
    single = build_engine(tiny_recipe(WAN), CPU).model
    assert single.expert(sigmas[0]) is single
