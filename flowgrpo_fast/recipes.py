"""One function per paper, with the paper's numbers. `digits` fits any of them to the default job.

Sources and what differs from each paper: docs/algorithms.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from flowgrpo_fast.recipe import (
    CPS,
    NFT,
    AllSteps,
    ClippedRatio,
    Credit,
    DanceSDE,
    Deterministic,
    DPMSolver2M,
    FlowSDE,
    FractionOfSteps,
    KeepAll,
    LowPrecision,
    Optimizer,
    Prune,
    RandomWindow,
    Recipe,
    Scouts,
    Sigmas,
    SlidingWindow,
)


def flow_grpo() -> Recipe:
    """Flow-GRPO, SD3.5-M: every step stochastic, batch std, KL to the start."""
    return Recipe(
        name="flow_grpo",
        sigmas=Sigmas(num_inference_steps=10, shift=3.0, spacing="diffusers"),
        dynamics=FlowSDE(noise_level=0.7),
        window=AllSteps(),
        guidance_scale=4.5,
        group_size=24,
        num_prompts=48,
        credit=Credit(std="batch", per_objective=False),
        loss=ClippedRatio(clip_range=1e-4, kl_beta=0.04),
        optimizer=Optimizer(lr=3e-4, num_updates=2, ema_decay=0.9, ema_every=8),
    )


def flow_grpo_fast() -> Recipe:
    """Flow-GRPO-Fast: two stochastic steps at a random place, no KL, a tighter clip."""
    return replace(
        flow_grpo(),
        name="flow_grpo_fast",
        dynamics=FlowSDE(noise_level=0.8),
        window=RandomWindow(size=2, low=0, high=5),
        loss=ClippedRatio(clip_range=1e-5),
        share_start_noise=True,
    )


def flow_cps() -> Recipe:
    """Flow-CPS: a window of three coefficient-preserving steps in the first half, no guidance, no KL."""
    return replace(
        flow_grpo_fast(),
        name="flow_cps",
        dynamics=CPS(noise_level=0.8),
        window=RandomWindow(size=3, low=0, high=5),
        guidance_scale=1.0,
    )


def dance_grpo() -> Recipe:
    """DanceGRPO, FLUX: constant noise rate, shared start, a random 60 % of the steps trained."""
    return Recipe(
        name="dance_grpo",
        sigmas=Sigmas(num_inference_steps=16, shift=3.0),
        dynamics=DanceSDE(noise_level=0.3),
        window=FractionOfSteps(fraction=0.6),
        share_start_noise=True,
        group_size=12,
        num_prompts=16,
        credit=Credit(eps=1e-8),
        loss=ClippedRatio(clip_range=1e-4),
        optimizer=Optimizer(lr=1e-5, num_updates=3),
    )


def mix_grpo() -> Recipe:
    """MixGRPO, FLUX: a sliding window of four stochastic steps, Euler elsewhere."""
    return Recipe(
        name="mix_grpo",
        sigmas=Sigmas(num_inference_steps=25, shift=3.0),
        dynamics=FlowSDE(noise_level=0.7),
        window=SlidingWindow(size=4, every=25, stride=1),
        share_start_noise=True,
        group_size=12,
        num_prompts=32,
        loss=ClippedRatio(clip_range=1e-4),
        optimizer=Optimizer(lr=1e-5, num_updates=4),
    )


def mix_grpo_flash() -> Recipe:
    """MixGRPO-Flash: MixGRPO with a second-order solver and 40 % of the steps after the window."""
    return replace(
        mix_grpo(),
        name="mix_grpo_flash",
        window=SlidingWindow(size=4, every=20, stride=1),
        solver=DPMSolver2M(keep=0.4),
    )


def pro_grpo() -> Recipe:
    """Pro-GRPO: 48 candidates, cut to 24 and to the 12 that are trained on, by the variance of preview rewards."""
    return replace(
        flow_grpo(),
        name="pro_grpo",
        group_size=12,
        prune=Prune(at=(5, 7), sizes=(48, 24)),
    )


def pro_grpo_flash() -> Recipe:
    """Pro-GRPO-Flash: Flow-GRPO's own 24 candidates, cut to 16 and to 12."""
    return replace(pro_grpo(), name="pro_grpo_flash", prune=Prune(at=(5, 7), sizes=(24, 16)))


def diffusion_nft() -> Recipe:
    """DiffusionNFT, SD3.5-M: finished ODE samples of a slower policy, noised again; no guidance, one update."""
    return Recipe(
        name="diffusion_nft",
        sigmas=Sigmas(num_inference_steps=10, shift=3.0, spacing="diffusers"),
        window=Deterministic(),
        solver=DPMSolver2M(),
        group_size=24,
        num_prompts=48,
        credit=Credit(std="batch", per_objective=False, drop_zero_variance=False),
        loss=NFT(beta=1.0, kl_beta=1e-4),
        optimizer=Optimizer(lr=3e-4, ema_decay=0.9),
    )


def sol_rl() -> Recipe:
    """Sol-RL: DiffusionNFT on 24 of 96 seeds, chosen by NVFP4 scouts of six steps, regenerated in full.

    NVFP4 is native on Blackwell; on Hopper set `explore.precision.format` to "fp8_rows".
    """
    return replace(
        diffusion_nft(),
        name="sol_rl",
        explore=Scouts(
            num_scouts=96, num_inference_steps=6, precision=LowPrecision(format="nvfp4", mode="merged")
        ),
    )


def naive_scaling() -> Recipe:
    """Sol-RL's first control: all 96 in full steps and precision; what scouts would cost if they were not cheap."""
    return replace(
        diffusion_nft(),
        name="naive_scaling",
        explore=Scouts(num_scouts=96, num_inference_steps=10, regenerate=False),
    )


def naive_quantized() -> Recipe:
    """Sol-RL's second control: all 96 in full steps and NVFP4, and the low-precision samples trained on."""
    precision = LowPrecision(format="nvfp4", mode="merged")
    return replace(
        diffusion_nft(),
        name="naive_quantized",
        explore=Scouts(num_scouts=96, num_inference_steps=10, regenerate=False, precision=precision),
    )


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of `flowgrpo-fast recipes`."""

    make: Callable[[], Recipe]
    paper: str


RECIPES = {
    "flow_grpo": Entry(flow_grpo, "arXiv 2505.05470"),
    "flow_grpo_fast": Entry(flow_grpo_fast, "arXiv 2505.05470"),
    "flow_cps": Entry(flow_cps, "arXiv 2509.05952"),
    "dance_grpo": Entry(dance_grpo, "arXiv 2505.07818"),
    "mix_grpo": Entry(mix_grpo, "arXiv 2507.21802"),
    "mix_grpo_flash": Entry(mix_grpo_flash, "arXiv 2507.21802"),
    "pro_grpo": Entry(pro_grpo, "arXiv 2512.15347"),
    "pro_grpo_flash": Entry(pro_grpo_flash, "arXiv 2512.15347"),
    "diffusion_nft": Entry(diffusion_nft, "arXiv 2509.16117"),
    "sol_rl": Entry(sol_rl, "arXiv 2604.06916"),
    "naive_scaling": Entry(naive_scaling, "arXiv 2604.06916"),
    "naive_quantized": Entry(naive_quantized, "arXiv 2604.06916"),
}


def digits(recipe: Recipe) -> Recipe:
    """Fits a paper's recipe to the default job: a 0.4 M-parameter model with 64-pixel latents on a CPU.

    A mean log-prob over 64 elements moves a thousand times further per update than one over 65 536, and a small
    network trained whole wants a larger step than a LoRA: clip range and learning rate follow. `eps` is of the
    size of a reward difference worth learning from: once nearly every sample is right, a z-score with a tiny eps
    would blow the last bits up to full-size advantages, and the digits collapse (docs/log.md). The method
    (dynamics, window, solver, credit, KL) stays the paper's.
    """
    window, loss = recipe.window, recipe.loss
    if isinstance(window, SlidingWindow):
        window = replace(window, every=5)
    if isinstance(loss, ClippedRatio):
        loss = replace(loss, clip_range=0.002)
    return replace(
        recipe,
        sigmas=replace(recipe.sigmas, num_inference_steps=10, shift=1.0, spacing="linear"),
        window=window,
        guidance_scale=1.0,
        group_size=24 if isinstance(recipe.prune, KeepAll) else recipe.group_size,
        num_prompts=10,
        credit=replace(recipe.credit, eps=0.3),
        loss=loss,
        optimizer=replace(recipe.optimizer, lr=1e-4, num_updates=2),
        num_steps=60,
    )
