"""One iteration of a recipe against the counted table of the performance notes, and what the levers save."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

from flowgrpo_fast.planner.architectures import Counts, architecture, count
from flowgrpo_fast.planner.counting import Work
from flowgrpo_fast.planner.devices import GPUS
from flowgrpo_fast.planner.levers import levers
from flowgrpo_fast.planner.step import Execution, StepFlops, evaluations, plan_step
from flowgrpo_fast.recipe import (
    NFT,
    ChunkRatio,
    Comb,
    Cuts,
    Deterministic,
    DPMSolver2M,
    FractionOfSteps,
    FrozenWindow,
    FullFineTuning,
    Independent,
    LeapAlign,
    LowPrecision,
    Network,
    OneStepEach,
    Optimizer,
    PolicyGradient,
    RandomPair,
    RandomWindow,
    Recipe,
    RewardTerm,
    Scouts,
    SharedStart,
    Sigmas,
    Task,
    TransitionKL,
    Tree,
)
from flowgrpo_fast.recipe_io import override
from flowgrpo_fast.recipes import RECIPES
from flowgrpo_fast.recipes.trajectory import dance_grpo, flow_cps, flow_grpo, mix_grpo, mix_grpo_flash
from flowgrpo_fast.training.engine import build_engine
from flowgrpo_fast.training.loop import train_step
from tests.conftest import with_changes
from tests.golden.golden_cases import make

FLUX = Network(height=720, width=720, train=FullFineTuning(), checkpointing="full")
FLUX_LORA = Network(height=720, width=720)
HUNYUAN = Network(height=480, width=480, num_frames=53, train=FullFineTuning(), checkpointing="full")
WAN = Network(height=240, width=416, num_frames=33)

# The published trainers the table describes: the unconditional half in autograd, T5 once an image (Flow-GRPO).
PUBLISHED = Execution(text_each_sample=True)
MIX = Execution(num_reward_towers=3)
WINDOW_3 = replace(flow_grpo(), topology=Independent(at=RandomWindow(size=3, low=0, high=5)))
# An optimiser step of whole groups asks about a row that members share once; the recipe's asks in each of four.
GROUPS = replace(mix_grpo(), optimizer=replace(mix_grpo().optimizer, partition="groups"))
CONSTANT = replace(flow_grpo(), unconditional_gradient=False)
NO_REUSE = with_changes(CONSTANT, reuse_unconditional=False)


def apart(recipe: Recipe) -> Recipe:
    """Each sample of a group goes by itself, whatever they have in common."""
    return override(recipe, ["topology.share_prefix=false"])


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
        NO_REUSE,
        (51, 120, 220, 196, 4.6),
        execution=PUBLISHED,
    ),
    "window 3": Row("sd3.5-medium", WINDOW_3, (51, 49, 131, 108, 4.6), execution=PUBLISHED),
    "window 3, no CFG, no KL": Row(
        "sd3.5-medium",
        replace(WINDOW_3, guidance_scale=1.0, objective=PolicyGradient()),
        (26, 17, 59, 47, 4.6),
        execution=PUBLISHED,
    ),
    "dance_grpo": Row("flux.1-dev", dance_grpo(), (115, 262, 471, 418, 1.0), FLUX),
    "mix_grpo": Row("flux.1-dev", apart(mix_grpo()), (358, 233, 741, 572, 2.3), FLUX, MIX),
    "mix_grpo_flash": Row("flux.1-dev", apart(mix_grpo_flash()), (229, 233, 580, 472, 2.3), FLUX, MIX),
    "mix_grpo, LoRA, no checkpointing": Row(
        "flux.1-dev", apart(mix_grpo()), (358, 125, 606, 438, 2.3), FLUX_LORA, MIX
    ),
    "mix_grpo, shared prefix and first step of the update": Row(
        "flux.1-dev",
        GROUPS,
        # The table shares the first stochastic step in the update only, which makes its rollout 4 % longer.
        (286, 179, 584, 450, 2.3),
        FLUX,
        MIX,
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
        replace(flow_grpo(), num_prompts=32, group_size=16, topology=Independent(at=FrozenWindow(size=2))),
        (171, 139, 389, 303, 1.3),
        execution=Execution(recompute_old_log_prob=True),
        others=1.63,
    ),
    "flow_grpo Wan": Row(
        "wan2.1-1.3b",
        replace(flow_grpo(), num_prompts=8, group_size=8, sigmas=Sigmas(num_inference_steps=20)),
        (30, 94, 156, 143, 1.3),
        WAN,
        others=1.82,
    ),
    "sol_rl SD3.5-L": Row(
        "sd3.5-large",
        replace(
            flow_cps(),
            topology=Independent(at=Deterministic()),
            objective=NFT(kl_beta=1e-4, fraction=1.0),  # old and reference beside the new, at ten sigmas
            experience=Scouts(num_scouts=96, num_inference_steps=6),
        ),
        (281, 340, 795, 656, 15),
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
KL = PolicyGradient(regularizers=(TransitionKL(beta=0.1),))


def recipe(**changes) -> Recipe:
    base = Recipe(
        name="small",
        sigmas=Sigmas(num_inference_steps=6, shift=1.0),
        topology=Independent(at=FrozenWindow(size=2, start=1)),
        group_size=4,
        num_prompts=3,
    )
    return with_changes(base, **changes)


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
        ({"guidance_scale": 2.0, "reuse_unconditional": False}, {}, 2 * FORWARD + BACKWARD),
        ({"guidance_scale": 2.0, "optimizer": Optimizer(num_updates=2)}, {}, 1.5 * FORWARD + BACKWARD),
        ({"guidance_scale": 2.0, "unconditional_gradient": True}, {}, 2 * (FORWARD + BACKWARD)),
        ({"optimizer": Optimizer(num_epochs=3)}, {}, 3 * (FORWARD + BACKWARD)),
        (
            {"guidance_scale": 2.0, "optimizer": Optimizer(num_updates=2, num_epochs=2)},
            {},
            2 * (2 * FORWARD + BACKWARD) - FORWARD / 2,
        ),
        ({"objective": KL}, {}, 2 * FORWARD + BACKWARD),
        ({"guidance_scale": 2.0, "objective": KL}, {}, 3 * FORWARD + BACKWARD),
        ({}, {"recompute_old_log_prob": True}, 2 * FORWARD + BACKWARD),
        # The old policy, which samples, and the start; int(0.34 * 6) = 2 sigmas, as many as the window has steps.
        ({"objective": NFT(kl_beta=0.1, fraction=0.34)}, {}, 3 * FORWARD + BACKWARD),
        ({"objective": NFT(fraction=0.34)}, {}, 2 * FORWARD + BACKWARD),
        # Measured once for the slopes of a loss that joins steps; the rollout's half serves both times.
        ({"objective": ChunkRatio(sizes=(2,))}, {}, 2 * FORWARD + BACKWARD),
        ({"objective": ChunkRatio(sizes=(1, 1)), "guidance_scale": 2.0}, {}, 2 * FORWARD + BACKWARD),
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
    shared = recipe(topology=SharedStart(at=FrozenWindow(size=2, start=1)))
    assert plan_step(SIMPLE, shared, Execution(share_first_step=False)).forwards == 3 + 5 * 12
    both = plan_step(SIMPLE, shared)  # what the trainer does
    assert both.forwards == 2 * 3 + 4 * 12
    assert both.update == (12 + 3) * (FORWARD + BACKWARD)
    assert plan_step(SIMPLE, recipe()).forwards == 72  # other start noises share nothing
    assert plan_step(SIMPLE, apart(shared)) == plan_step(SIMPLE, recipe())
    # Each sample trains other steps.
    fraction = replace(shared, topology=SharedStart(at=FractionOfSteps(fraction=0.5)))
    assert plan_step(SIMPLE, fraction) == plan_step(SIMPLE, apart(fraction))
    halves = replace(shared, optimizer=Optimizer(num_updates=2))  # an update takes half of the second group
    assert plan_step(SIMPLE, halves).forwards == 3 + 5 * 12
    assert plan_step(SIMPLE, halves).update == plan_step(SIMPLE, apart(shared)).update


def test_a_funnel_and_its_previews() -> None:
    topology = Cuts(inner=recipe().topology, steps=(2, 4), sizes=(12, 8))
    funnel = recipe(topology=topology)
    step = plan_step(SIMPLE, funnel)
    assert step.forwards == 3 * (2 * 12 + 2 * 8 + 2 * 4)
    assert step.decode == (3 * (12 + 8) + 12) * 3.0
    quiet = plan_step(SIMPLE, replace(funnel, topology=replace(topology, score="latents")))
    assert (quiet.forwards, quiet.decode) == (step.forwards, 12 * 3.0)


def test_scouts_come_on_top_and_run_in_their_own_precision() -> None:
    explore = Scouts(num_scouts=20, num_inference_steps=3, precision=LowPrecision(format="nvfp4"))
    step = plan_step(SIMPLE, recipe(experience=explore))
    assert step.forwards == 72 + 3 * 20 * 3
    assert step.scouts.low == 180 * 8.0
    b200 = GPUS["b200"]
    plain = plan_step(
        SIMPLE, recipe(experience=replace(explore, precision=recipe().machine.rollout_precision))
    )
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
    step = plan_step(SIMPLE, sliding, Execution(share_first_step=False))
    assert step.forwards == pytest.approx(4 * (25 - 5.5) + 2 * 5.5)


@pytest.mark.slow
def test_levers_save_what_the_table_says() -> None:
    h100 = GPUS["h100"]
    network = Network()
    found = {
        lever.name: lever
        for lever in levers(
            count(architecture("sd3.5-medium"), network),
            with_changes(flow_grpo(), reuse_unconditional=False),
            h100,
            PUBLISHED,
        )
    }
    assert found["unconditional half held constant"].saves == pytest.approx(255 - 220, rel=0.02)
    assert found["window of 3 stochastic steps"].saves == pytest.approx(255 - 131, rel=0.02)
    assert not found["unconditional half held constant"].in_use
    mine = {x.name: x for x in levers(count(architecture("sd3.5-medium"), network), CONSTANT, h100)}
    assert mine["unconditional half held constant"].in_use
    reused = mine["unconditional half of the first update from the rollout"]
    assert reused.in_use
    assert reused.saves == pytest.approx(48 * 24 * 9 / 2 * 2.22e12 / 800e12, rel=0.02)  # of two updates
    assert mine["unconditional half held constant"].saves == pytest.approx(255 - 220 + reused.saves, rel=0.02)
    # 24 to 12 before step 3: 35 % of the rollout, half of the update and of what encodes and scores the samples.
    flow = planned(TABLE["flow_grpo"])
    saved = 0.35 * flow.rollout.total + (flow.update + flow.decode + flow.reward + flow.text) / 2
    assert found["prune 24 to 12 before step 3"].saves == pytest.approx(saved / 800e12, rel=0.01)

    mix = replace(GROUPS, network=FLUX)
    flux = architecture("flux.1-dev")
    found = {
        lever.name: lever
        for lever in levers(count(flux, FLUX), mix, h100, MIX, lambda other: count(flux, other.network))
    }
    prefix, first = found["shared steps before the window"], found["shared first stochastic step"]
    assert prefix.in_use
    assert first.in_use
    assert prefix.saves == pytest.approx((358 - 286) / 0.8, rel=0.02)
    # The table shares the first stochastic step in the update only.
    first_forward = (384 - 32) * 37.28e-3 / 0.8
    assert first.saves == pytest.approx((233 - 179) / 0.8 + first_forward, rel=0.03)
    across = replace(mix_grpo(), network=FLUX)
    more = plan_step(count(flux, FLUX), across).update - plan_step(count(flux, FLUX), mix).update
    assert more == pytest.approx(3 * 32 / (32 + 3 * 384) * plan_step(count(flux, FLUX), mix).update, rel=1e-9)
    found = {
        lever.name: lever
        for lever in levers(
            count(flux, FLUX), apart(mix), h100, MIX, lambda other: count(flux, other.network)
        )
    }
    both = found["shared steps up to the first stochastic one"]
    assert not both.in_use
    assert both.saves == pytest.approx(prefix.saves + first.saves, rel=1e-9)
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
        topology=SharedStart(at=FrozenWindow(size=2, start=1)),
    )
    found = {lever.name: lever for lever in levers(SIMPLE, pulled, GPUS["h100"])}
    in_use = {name for name, lever in found.items() if lever.in_use}
    assert in_use == {
        "unconditional half held constant",
        "unconditional half of the first update from the rollout",
        "shared steps before the window",
        "shared first stochastic step",
        "second-order solver, shorter tail",
        "low precision outside the window",
        "prompts encoded once",
    }
    assert all(lever.saves >= 0 for lever in found.values())
    assert all(0 <= lever.share < 1 for lever in found.values())


def test_rewards_with_gradient_are_decoded_again() -> None:
    """Each sample twice for its score and the loss, once more on the way back, which costs as much again."""
    differentiable = RewardTerm(function="flowgrpo_fast.rewards.rules:digit_log_prob", differentiable=True)
    leaps = recipe(
        topology=Independent(at=RandomPair()), objective=LeapAlign(), task=Task(rewards=(differentiable,))
    )
    step = plan_step(SIMPLE, leaps)
    assert step.update == 2 * 12 * (FORWARD + BACKWARD)
    assert (step.decode, step.reward) == (12 * (1 + 3) * 3.0, 12 * (1 + 2) * 7.0)


@pytest.mark.parametrize(
    ("topology", "rollout", "update"),
    [
        # Leaves 8: rows 1, 1, 2, 4, then 8 to the end; trained at the three that branch.
        (Tree(at=FrozenWindow(size=3, start=1)), 1 + 1 + 2 + 4 + 8 + 8, 1 + 2 + 4),
        # The trunk for four steps; two branches leave at each of three of them and walk to the end.
        (Comb(at=FrozenWindow(size=3, start=1)), 4 + 2 * (4 + 3 + 2), 3),
        # With two steps merged a branch waits for one.
        (Comb(at=FrozenWindow(size=3, start=1), merge=2), 4 + 2 * (3 + 2 + 1), 3),
        (OneStepEach(), 6 * 6, 6),
    ],
    ids=str,
)
def test_topologies_by_hand(topology, rollout, update) -> None:
    size = topology.only_group_size(6) or 6
    step = plan_step(SIMPLE, recipe(topology=topology, group_size=size))
    assert step.forwards == 3 * rollout
    assert step.rollout.window == 3 * update * 8.0
    assert step.update == 3 * update * (FORWARD + BACKWARD)


def check_against_a_step(recipe: Recipe) -> None:
    """Network evaluations and backwards of one training step, as the trainer counts them while they run."""
    metrics = train_step(build_engine(recipe, torch.device("cpu"))).metrics
    assert metrics["idle_groups"] == 0
    planned_rows = evaluations(recipe, recipe.plan(0, 1024))
    assert planned_rows.rollout + planned_rows.update == metrics["network_evaluations"]
    assert planned_rows.backwards == metrics["network_backwards"]


@pytest.mark.parametrize("name", [*RECIPES, "flow_grpo+guidance", "pro_grpo+guidance", "sol_rl+variance"])
def test_every_recipe_is_planned_as_it_runs(name) -> None:
    check_against_a_step(make(name))


WINDOW = FrozenWindow(size=3, start=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"topology": Tree(at=WINDOW)},
        {"topology": Tree(at=WINDOW), "objective": KL, "optimizer": Optimizer(num_updates=2)},
        {"topology": Tree(at=FrozenWindow(size=2, start=2), fan=3), "group_size": 9},
        {"topology": Comb(at=FrozenWindow(size=4)), "objective": KL},
        {"topology": Comb(at=FrozenWindow(size=2), merge=2, fan=4)},
        {"topology": OneStepEach()},
        {"topology": OneStepEach(share_start=True), "objective": KL, "optimizer": Optimizer(num_updates=2)},
        {"topology": SharedStart(at=WINDOW), "optimizer": Optimizer(num_updates=2), "steps_per_forward": 2},
        {"topology": SharedStart(at=FractionOfSteps(fraction=0.5))},
        {"topology": Cuts(inner=SharedStart(at=WINDOW), steps=(3, 5), sizes=(24, 16)), "objective": KL},
        {
            "topology": Independent(at=WINDOW),
            "objective": ChunkRatio(sizes=(1, 2), regularizers=KL.regularizers),
        },
        {
            "experience": Scouts(num_scouts=20, num_inference_steps=3),
            "prompts_per_chunk": 2,
            "rows_per_forward": 4,
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_every_shape_is_planned_as_it_runs(toy_recipe, changes, guidance_scale) -> None:
    check_against_a_step(toy_recipe(**{"guidance_scale": guidance_scale, **changes}))
