"""One iteration of a recipe against the counted table of the performance notes, and what the levers save."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from flowgrpo_fast.planner.architectures import Counts, architecture, count
from flowgrpo_fast.planner.counting import Work
from flowgrpo_fast.planner.devices import GPUS
from flowgrpo_fast.planner.levers import levers
from flowgrpo_fast.planner.step import Execution, StepFlops, plan_step
from flowgrpo_fast.recipe import (
    AllSteps,
    ClippedRatio,
    DPMSolver2M,
    FractionOfSteps,
    FrozenWindow,
    FullFineTuning,
    LowPrecision,
    Network,
    Optimizer,
    Prune,
    RandomWindow,
    Recipe,
    Scouts,
    Sigmas,
)
from flowgrpo_fast.recipes import dance_grpo, flow_cps, flow_grpo, mix_grpo, mix_grpo_flash

FLUX = Network(height=720, width=720, train=FullFineTuning(), checkpointing="full")
FLUX_LORA = Network(height=720, width=720)
HUNYUAN = Network(height=480, width=480, num_frames=53, train=FullFineTuning(), checkpointing="full")
WAN = Network(height=240, width=416, num_frames=33)

# The published trainers the table describes: the unconditional half in autograd, T5 once an image (Flow-GRPO).
# Each sample of a group goes by itself, whatever they have in common.
APART = Execution(share_prefix=False, share_first_step=False, share_first_forward=False)
PUBLISHED = replace(APART, uncond_gradient=True, text_each_sample=True)
MIX = replace(APART, num_reward_towers=3)
WINDOW_3 = replace(flow_grpo(), window=RandomWindow(size=3, low=0, high=5))


@dataclass
class Row:
    """PFLOP of rollout and update; GPU-seconds at 800 TFLOP/s, and with all linears of the rollout at 1400; PFLOP of
    decoding, text and reward."""

    model: str
    recipe: Recipe
    expected: tuple[float, float, float, float, float]
    network: Network = field(default_factory=Network)
    execution: Execution = field(default_factory=Execution)
    others: float = 0.0  # what we count in place of the last, where docs/planner.md says why


TABLE = {
    "flow_grpo": Row("sd3.5-medium", flow_grpo(), (51, 148, 255, 231, 4.6), execution=PUBLISHED),
    "flow_grpo, uncond under no_grad": Row(
        "sd3.5-medium",
        flow_grpo(),
        (51, 120, 220, 196, 4.6),
        execution=replace(PUBLISHED, uncond_gradient=False, recompute_unconditional=True),
    ),
    "window 3": Row("sd3.5-medium", WINDOW_3, (51, 49, 131, 108, 4.6), execution=PUBLISHED),
    "window 3, no CFG, no KL": Row(
        "sd3.5-medium",
        replace(WINDOW_3, guidance_scale=1.0, loss=ClippedRatio()),
        (26, 17, 59, 47, 4.6),
        execution=PUBLISHED,
    ),
    "dance_grpo": Row("flux.1-dev", dance_grpo(), (115, 262, 471, 418, 1.0), FLUX),
    "mix_grpo": Row("flux.1-dev", mix_grpo(), (358, 233, 741, 572, 2.3), FLUX, MIX),
    "mix_grpo_flash": Row("flux.1-dev", mix_grpo_flash(), (229, 233, 580, 472, 2.3), FLUX, MIX),
    "mix_grpo, LoRA, no checkpointing": Row(
        "flux.1-dev", mix_grpo(), (358, 125, 606, 438, 2.3), FLUX_LORA, MIX
    ),
    "mix_grpo, shared prefix and first step of the update": Row(
        "flux.1-dev",
        mix_grpo(),
        (286, 179, 584, 450, 2.3),
        FLUX,
        replace(MIX, share_prefix=True, share_first_step=True),
    ),
    "dance_grpo HunyuanVideo": Row(
        "hunyuan-video",
        replace(dance_grpo(), num_prompts=32, group_size=24),
        (3646, 2875, 8180, 7029, 23),
        HUNYUAN,
        Execution(trained_of_group=8),
        others=230,
    ),
    "flow_grpo Qwen-Image, old log-prob pass": Row(
        "qwen-image",
        replace(flow_grpo(), num_prompts=32, group_size=16, window=FrozenWindow(size=2)),
        (171, 139, 389, 303, 1.3),
        execution=Execution(uncond_gradient=True, recompute_old_log_prob=True),
        others=1.63,
    ),
    "flow_grpo Wan": Row(
        "wan2.1-1.3b",
        replace(flow_grpo(), num_prompts=8, group_size=8, sigmas=Sigmas(num_inference_steps=20)),
        (30, 94, 156, 143, 1.3),
        WAN,
        Execution(uncond_gradient=True),
        others=1.82,
    ),
    "sol_rl SD3.5-L": Row(
        "sd3.5-large",
        replace(
            flow_cps(),
            window=AllSteps(),
            share_start_noise=False,
            explore=Scouts(num_scouts=96, num_inference_steps=6),
        ),
        (281, 340, 795, 656, 15),
        execution=Execution(num_frozen_forwards=2, trained_steps=10),  # NFT: old and reference beside the new
        others=16.4,
    ),
}


def planned(row: Row) -> StepFlops:
    recipe = replace(row.recipe, network=row.network)
    return plan_step(count(architecture(row.model), row.network), recipe, row.execution)


@pytest.mark.slow
@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_an_iteration_is_that_of_the_table_within_5_percent(row) -> None:
    step = planned(row)
    rollout = step.rollout.total + step.scouts.total
    linear = step.rollout.low + step.rollout.window + step.scouts.low
    at_800 = step.seconds(800e12)
    fp8 = at_800 - linear / 800e12 + linear / 1400e12
    got = (rollout / 1e15, step.update / 1e15, at_800, fp8)
    assert got == tuple(pytest.approx(value, rel=0.05) for value in row.expected[:4])
    others = (step.decode + step.text + step.reward) / 1e15
    assert others == pytest.approx(row.others or row.expected[4], rel=0.01 if row.others else 0.05)


SIMPLE = Counts(
    name="simple",
    size="",
    forward=Work(linear=8.0, attention=2.0, adapted=2.0),
    trained_share=0.0,
    decode=3.0,
    text=5.0,
    reward=7.0,
    parameters=100,
    linear_parameters=80,
    trained=10,
    latent_elements=4,
)
FORWARD, BACKWARD = 10.0, 8.0 + 2.5 * 2.0


def recipe(**changes) -> Recipe:
    base = Recipe(
        name="small",
        sigmas=Sigmas(num_inference_steps=6, shift=1.0),
        window=FrozenWindow(size=2, start=1),
        group_size=4,
        num_prompts=3,
    )
    return replace(base, **changes)


def test_a_plain_step_by_hand() -> None:
    step = plan_step(SIMPLE, recipe())
    assert step.rollout.total == 12 * 6 * FORWARD
    assert (step.rollout.window, step.rollout.low) == (12 * 2 * 8.0, 12 * 4 * 8.0)
    assert step.update == 12 * 2 * (FORWARD + BACKWARD)
    assert (step.decode, step.text, step.reward) == (12 * 3.0, 0.0, 12 * 7.0)
    assert step.forwards == 72
    phases = step.phases(GPUS["h100"])
    assert list(phases) == ["rollout", "update", "decode", "text", "reward"]
    assert phases["text"] == (0.0, 0.0)  # encoded once: shown, not hidden


@pytest.mark.parametrize(
    ("changes", "execution", "each"),
    [
        ({"guidance_scale": 2.0}, {}, FORWARD + BACKWARD),  # the rollout has left the other half
        ({"guidance_scale": 2.0}, {"recompute_unconditional": True}, 2 * FORWARD + BACKWARD),
        ({"guidance_scale": 2.0, "reuse_unconditional": False}, {}, 2 * FORWARD + BACKWARD),
        ({"guidance_scale": 2.0, "optimizer": Optimizer(num_updates=2)}, {}, 1.5 * FORWARD + BACKWARD),
        ({"guidance_scale": 2.0}, {"uncond_gradient": True}, 2 * (FORWARD + BACKWARD)),
        ({"loss": ClippedRatio(kl_beta=0.1)}, {}, 2 * FORWARD + BACKWARD),
        ({"guidance_scale": 2.0, "loss": ClippedRatio(kl_beta=0.1)}, {}, 3 * FORWARD + BACKWARD),
        ({}, {"recompute_old_log_prob": True}, 2 * FORWARD + BACKWARD),
        ({}, {"num_frozen_forwards": 2}, 3 * FORWARD + BACKWARD),
        ({"network": Network(checkpointing="full")}, {}, 2 * FORWARD + BACKWARD),
        ({"network": Network(checkpointing="selective")}, {}, FORWARD + BACKWARD),
    ],
    ids=str,
)
def test_passes_of_the_update_by_hand(changes, execution, each) -> None:
    assert plan_step(SIMPLE, recipe(**changes), Execution(**execution)).update == 12 * 2 * each


def test_full_fine_tuning_adds_the_gradient_of_the_weights() -> None:
    whole = plan_step(replace(SIMPLE, trained_share=1.0), recipe()).update
    assert whole == 12 * 2 * (FORWARD + BACKWARD + 8.0)


def test_sharing_serves_a_group_with_one_forward() -> None:
    shared = recipe(share_start_noise=True)
    assert plan_step(SIMPLE, shared, replace(APART, share_prefix=True)).forwards == 3 + 5 * 12
    both = plan_step(SIMPLE, shared)  # what the trainer does
    assert both.forwards == 2 * 3 + 4 * 12
    assert both.update == (12 + 3) * (FORWARD + BACKWARD)
    assert plan_step(SIMPLE, recipe()).forwards == 72  # other start noises share nothing
    assert plan_step(SIMPLE, replace(shared, share_prefix=False)) == plan_step(SIMPLE, recipe())
    fraction = replace(shared, window=FractionOfSteps(fraction=0.5))  # each sample trains other steps
    assert plan_step(SIMPLE, fraction) == plan_step(SIMPLE, fraction, APART)
    halves = replace(shared, optimizer=Optimizer(num_updates=2))  # an update takes half of the second group
    assert plan_step(SIMPLE, halves).forwards == 3 + 5 * 12
    assert plan_step(SIMPLE, halves).update == plan_step(SIMPLE, shared, APART).update


def test_a_funnel_and_its_previews() -> None:
    funnel = recipe(prune=Prune(at=(2, 4), sizes=(12, 8)))
    step = plan_step(SIMPLE, funnel)
    assert step.forwards == 3 * (2 * 12 + 2 * 8 + 2 * 4)
    assert step.decode == (3 * (12 + 8) + 12) * 3.0
    quiet = plan_step(SIMPLE, replace(funnel, prune=Prune(at=(2, 4), sizes=(12, 8), score="latents")))
    assert (quiet.forwards, quiet.decode) == (step.forwards, 12 * 3.0)


def test_scouts_come_on_top_and_run_in_their_own_precision() -> None:
    explore = Scouts(num_scouts=20, num_inference_steps=3, precision=LowPrecision(format="nvfp4"))
    step = plan_step(SIMPLE, recipe(explore=explore))
    assert step.forwards == 72 + 3 * 20 * 3
    assert step.scouts.low == 180 * 8.0
    b200 = GPUS["b200"]
    plain = plan_step(SIMPLE, recipe(explore=replace(explore, precision=recipe().rollout_precision)))
    saved = 180 * 8.0 * (1 / b200.rate() - 1 / b200.rate("fp4"))
    assert plain.floor(b200) - step.floor(b200) == pytest.approx(saved, rel=1e-9, abs=0)


def test_low_precision_covers_only_steps_without_a_log_prob() -> None:
    h100 = GPUS["h100"]
    plain = plan_step(SIMPLE, recipe()).floor(h100)
    for mode, linear in (("branch", 8.0), ("merged", 8.0), ("bare_layers", 6.0)):
        low = plan_step(SIMPLE, recipe(rollout_precision=LowPrecision(mode=mode)))
        saved = 12 * 4 * linear * (1 / h100.rate() - 1 / h100.rate("fp8"))
        assert plain - low.floor(h100) == pytest.approx(saved, rel=1e-9, abs=0), mode
        assert sum(seconds for _, seconds in low.phases(h100).values()) == pytest.approx(
            low.floor(h100), rel=1e-9, abs=0
        )


def test_a_shared_base_is_low_in_every_forward() -> None:
    h100 = GPUS["h100"]
    shared = plan_step(SIMPLE, recipe(rollout_precision=LowPrecision(mode="shared_base")))
    assert shared.total == plan_step(SIMPLE, recipe()).total
    saved = 12 * (6 + 2) * 8.0 * (1 / h100.rate() - 1 / h100.rate("fp8"))
    assert plan_step(SIMPLE, recipe()).floor(h100) - shared.floor(h100) == pytest.approx(
        saved, rel=1e-9, abs=0
    )
    assert sum(s for _, s in shared.phases(h100).values()) == pytest.approx(
        shared.floor(h100), rel=1e-9, abs=0
    )


def test_a_moving_window_is_averaged_over_the_run() -> None:
    """MixGRPO rests 25 iterations at each of 12 places in 300: 5.5 steps before the window on the mean."""
    sliding = replace(mix_grpo(), num_prompts=2, group_size=2, optimizer=Optimizer())
    step = plan_step(SIMPLE, sliding, replace(APART, share_prefix=True))
    assert step.forwards == pytest.approx(4 * (25 - 5.5) + 2 * 5.5)


@pytest.mark.slow
def test_levers_save_what_the_table_says() -> None:
    h100 = GPUS["h100"]
    network, again = Network(), replace(PUBLISHED, recompute_unconditional=True)
    found = {
        lever.name: lever
        for lever in levers(count(architecture("sd3.5-medium"), network), flow_grpo(), h100, again)
    }
    assert found["unconditional half under no_grad"].saves == pytest.approx(255 - 220, rel=0.02)
    assert found["window of 3 stochastic steps"].saves == pytest.approx(255 - 131, rel=0.02)
    assert not found["unconditional half under no_grad"].in_use
    mine = {x.name: x for x in levers(count(architecture("sd3.5-medium"), network), flow_grpo(), h100)}
    assert mine["unconditional half under no_grad"].in_use
    reused = mine["unconditional half of the first update from the rollout"]
    assert reused.in_use
    assert reused.saves == pytest.approx(48 * 24 * 9 / 2 * 2.22e12 / 800e12, rel=0.02)  # of two updates
    assert mine["unconditional half under no_grad"].saves == pytest.approx(255 - 220 + reused.saves, rel=0.02)
    # 24 to 12 before step 3: 35 % of the rollout, half of the update and of what encodes and scores the samples.
    flow = planned(TABLE["flow_grpo"])
    saved = 0.35 * flow.rollout.total + (flow.update + flow.decode + flow.reward + flow.text) / 2
    assert found["prune 24 to 12 before step 3"].saves == pytest.approx(saved / 800e12, rel=0.01)

    mix = replace(mix_grpo(), network=FLUX)
    flux = architecture("flux.1-dev")
    found = {
        lever.name: lever
        for lever in levers(count(flux, FLUX), mix, h100, MIX, lambda other: count(flux, other.network))
    }
    assert found["shared steps before the window"].saves == pytest.approx((358 - 286) / 0.8, rel=0.02)
    first_forward = (
        (384 - 32) * 37.28e-3 / 0.8
    )  # the table shares the first stochastic step in the update only
    assert found["shared first stochastic step"].saves == pytest.approx(
        (233 - 179) / 0.8 + first_forward, rel=0.03
    )
    assert found["no checkpointing"].saves == pytest.approx(384 * 4 * 37.28e-3 / 0.8, rel=0.01)
    assert found["second-order solver, 40 % of the tail"].saves > 0
    assert found["LoRA instead of full fine-tuning"].saves == pytest.approx(
        384 * 4 * 32.77e-3 / 0.8, rel=0.01
    )
    assert not [
        name for name in found if name.startswith("prune")
    ]  # one start noise: candidates are equal that early


def test_levers_in_use_are_told_apart() -> None:
    pulled = recipe(
        guidance_scale=2.0,
        solver=DPMSolver2M(keep=0.5),
        rollout_precision=LowPrecision(),
        share_start_noise=True,
    )
    found = {lever.name: lever for lever in levers(SIMPLE, pulled, GPUS["h100"])}
    in_use = {name for name, lever in found.items() if lever.in_use}
    assert in_use == {
        "unconditional half under no_grad",
        "unconditional half of the first update from the rollout",
        "shared steps before the window",
        "shared first stochastic step",
        "second-order solver, shorter tail",
        "low precision outside the window",
        "prompts encoded once",
    }
    assert all(lever.saves >= 0 for lever in found.values())
    assert all(0 <= lever.share < 1 for lever in found.values())
