"""Methods that learn from stochastic trajectories. Sources and what differs from each paper: docs/methods."""

from __future__ import annotations

from dataclasses import replace

from flowgrpo_fast.recipe import (
    CPS,
    AllSteps,
    Bound,
    ChunkRatio,
    Clip,
    Cuts,
    DanceSDE,
    DPMSolver2M,
    DropIdle,
    EarlySteps,
    FlowSDE,
    FractionOfSteps,
    Independent,
    Normalise,
    Optimizer,
    PolicyGradient,
    RandomWindow,
    Recipe,
    Replayed,
    SharedStart,
    Sigmas,
    SlidingWindow,
    TransitionKL,
    Tree,
    TreeBackup,
)


def flow_grpo() -> Recipe:
    """Flow-GRPO, SD3.5-M: every step stochastic, batch std, KL to the start."""
    return Recipe(
        name="flow_grpo",
        sigmas=Sigmas(num_inference_steps=10, shift=3.0, spacing="diffusers"),
        dynamics=FlowSDE(noise_level=0.7),
        topology=Independent(at=AllSteps()),
        guidance_scale=4.5,
        unconditional_gradient=True,
        group_size=24,
        num_prompts=48,
        credit=(Normalise(std="batch", aggregate="sum"), Bound(), DropIdle(mode="filtered")),
        objective=PolicyGradient(trust=Clip(range=1e-4), regularizers=(TransitionKL(beta=0.04),)),
        optimizer=Optimizer(
            lr=3e-4,
            num_updates=2,
            partition="shuffled",
            ema_decay=0.9,
            ema_every=8,
            ema_warm_up=True,
            ema_calls=2,
        ),
    )


def flow_grpo_fast() -> Recipe:
    """Flow-GRPO-Fast: two stochastic steps at a random place, no KL, a tighter clip."""
    return replace(
        flow_grpo(),
        name="flow_grpo_fast",
        dynamics=FlowSDE(noise_level=0.8),
        topology=SharedStart(at=RandomWindow(size=2, low=0, high=10)),
        objective=PolicyGradient(trust=Clip(range=1e-5)),
    )


def flow_cps() -> Recipe:
    """Flow-CPS: a window of three coefficient-preserving steps in the first half, no guidance, no KL."""
    return replace(
        flow_grpo_fast(),
        name="flow_cps",
        dynamics=CPS(noise_level=0.8),
        topology=SharedStart(at=RandomWindow(size=3, low=0, high=5)),
        guidance_scale=1.0,
    )


def dance_grpo() -> Recipe:
    """DanceGRPO, FLUX: constant noise rate, shared start, a random 60 % of the steps trained."""
    return Recipe(
        name="dance_grpo",
        sigmas=Sigmas(num_inference_steps=16, shift=3.0),
        dynamics=DanceSDE(noise_level=0.3),
        topology=SharedStart(at=FractionOfSteps(fraction=0.6)),
        group_size=12,
        num_prompts=16,
        credit=(Normalise(eps=1e-8, ddof=1), Bound(), DropIdle(mode="kept")),
        objective=PolicyGradient(trust=Clip(range=1e-4)),
        optimizer=Optimizer(lr=1e-5, num_updates=3, partition="across_groups"),
    )


def mix_grpo() -> Recipe:
    """MixGRPO, FLUX: a sliding window of four stochastic steps, Euler elsewhere."""
    return Recipe(
        name="mix_grpo",
        sigmas=Sigmas(num_inference_steps=25, shift=3.0),
        dynamics=FlowSDE(noise_level=0.7),
        topology=SharedStart(at=SlidingWindow(size=4, every=25, stride=1, cut=True)),
        group_size=12,
        num_prompts=32,
        credit=(Normalise(eps=1e-8, ddof=1, unit_weights=True), Bound(), DropIdle(mode="kept")),
        objective=PolicyGradient(trust=Clip(range=1e-4)),
        optimizer=Optimizer(lr=1e-5, num_updates=4, partition="across_groups"),
    )


def mix_grpo_flash() -> Recipe:
    """MixGRPO-Flash: MixGRPO with a second-order solver and 40 % of the steps after the window."""
    return replace(
        mix_grpo(),
        name="mix_grpo_flash",
        topology=SharedStart(at=SlidingWindow(size=4, every=20, stride=1, cut=True)),
        solver=DPMSolver2M(keep=0.4),
    )


def pro_grpo() -> Recipe:
    """Pro-GRPO: 48 candidates, cut to 24 and to the 12 that are trained on, by the variance of preview rewards."""
    return replace(
        flow_grpo(),
        name="pro_grpo",
        group_size=12,
        topology=Cuts(inner=Independent(at=AllSteps()), steps=(5, 7), sizes=(48, 24)),
    )


def pro_grpo_flash() -> Recipe:
    """Pro-GRPO-Flash: Flow-GRPO's own 24 candidates, cut to 16 and to 12."""
    return replace(
        pro_grpo(),
        name="pro_grpo_flash",
        topology=Cuts(inner=Independent(at=AllSteps()), steps=(5, 7), sizes=(24, 16)),
    )


def tree_grpo() -> Recipe:
    """TreeGRPO, SD3.5-M: a binary tree of four stochastic steps, leaf advantages backed up to its edges."""
    return Recipe(
        name="tree_grpo",
        sigmas=Sigmas(num_inference_steps=10, shift=3.0, spacing="diffusers"),
        dynamics=FlowSDE(noise_level=0.7),
        topology=Tree(at=SlidingWindow(size=4, every=50, stride=1), fan=2),
        guidance_scale=4.5,
        unconditional_gradient=True,
        group_size=16,
        num_prompts=16,
        credit=(Normalise(aggregate="sum", eps=1e-8), Bound(), TreeBackup(edges="summed")),
        objective=PolicyGradient(trust=Clip(range=1e-4)),
        optimizer=Optimizer(lr=1e-5, num_updates=2),
    )


def gcpo() -> Recipe:
    """GCPO, FLUX: DanceGRPO with one ratio for each chunk of steps."""
    return replace(
        dance_grpo(),
        name="gcpo",
        sigmas=Sigmas(num_inference_steps=17, shift=3.0),
        topology=SharedStart(at=AllSteps()),
        credit=(Normalise(eps=1e-8, ddof=1), Bound(), DropIdle(mode="kept")),
        objective=ChunkRatio(sizes=(2, 3, 4, 7), trust=Clip(range=1e-4)),
    )


def op_grpo() -> Recipe:
    """OP-GRPO, SD3.5-M: Flow-GRPO on the early steps, with the best stored trajectory in every group."""
    return replace(
        flow_grpo(),
        name="op_grpo",
        topology=Independent(at=EarlySteps(size=6)),
        experience=Replayed(num_early_steps=6),
    )
