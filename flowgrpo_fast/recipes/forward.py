"""Methods that learn from finished samples noised again. Sources and what differs from each paper: docs/methods."""

from __future__ import annotations

from dataclasses import replace

from flowgrpo_fast.recipe import (
    NFT,
    Bound,
    Clip,
    Deterministic,
    DPMSolver2M,
    ForwardError,
    Independent,
    LowPrecision,
    Normalise,
    Optimizer,
    PolicyGradient,
    Ramp,
    Recipe,
    Scouts,
    Sigmas,
    VelocityKL,
)


def diffusion_nft() -> Recipe:
    """DiffusionNFT, SD3.5-M: finished ODE samples of a slower policy, noised again; no guidance, one update."""
    return Recipe(
        name="diffusion_nft",
        sigmas=Sigmas(num_inference_steps=10, shift=3.0, spacing="diffusers"),
        topology=Independent(at=Deterministic()),
        solver=DPMSolver2M(),
        group_size=24,
        num_prompts=48,
        credit=(Normalise(std="batch", aggregate="sum"), Bound()),
        objective=NFT(beta=1.0, kl_beta=1e-4),
        optimizer=Optimizer(lr=3e-4, partition="shuffled", ema_decay=0.9, ema_warm_up=True),
    )


def sol_rl() -> Recipe:
    """Sol-RL: DiffusionNFT on 24 of 96 seeds, chosen by NVFP4 scouts of six steps, regenerated in full.

    The numbers are those of SD3; the authors' FLUX runs have max_grad_norm 0.4 and fraction 1.0, SANA's 0.6 and 1.0.
    NVFP4 is native on Blackwell; on Hopper set `experience.precision.format` to "fp8_rows".
    """
    base = diffusion_nft()
    return replace(
        base,
        name="sol_rl",
        objective=NFT(beta=1.0, kl_beta=1e-4, fraction=0.6),
        optimizer=replace(base.optimizer, max_grad_norm=0.002),
        experience=Scouts(
            num_scouts=96, num_inference_steps=6, precision=LowPrecision(format="nvfp4", mode="merged")
        ),
    )


def naive_scaling() -> Recipe:
    """Sol-RL's first control: all 96 in full steps and precision; what scouts would cost if they were not cheap."""
    return replace(
        diffusion_nft(),
        name="naive_scaling",
        experience=Scouts(num_scouts=96, num_inference_steps=10, regenerate=False),
    )


def naive_quantized() -> Recipe:
    """Sol-RL's second control: all 96 in full steps and NVFP4, and the low-precision samples trained on."""
    precision = LowPrecision(format="nvfp4", mode="merged")
    return replace(
        diffusion_nft(),
        name="naive_quantized",
        experience=Scouts(num_scouts=96, num_inference_steps=10, regenerate=False, precision=precision),
    )


def awm() -> Recipe:
    """AWM, SD3.5-M: the error on the forward process as a pseudo log-prob, weighted by advantage; near its average.

    Of the authors' GenEval and OCR runs. The samples come from DPM-Solver++ 2M here, from an SA-solver there.
    """
    return Recipe(
        name="awm",
        sigmas=Sigmas(num_inference_steps=14, shift=3.0, spacing="diffusers"),
        topology=Independent(at=Deterministic()),
        solver=DPMSolver2M(),
        group_size=24,
        num_prompts=72,
        credit=(Normalise(std="batch", aggregate="sum"), Bound(limit=5.0, to=1.0)),
        objective=PolicyGradient(
            surrogate=ForwardError(weighting="ghuber", power=0.25, times=6, sigmas="schedule"),
            trust=Clip(range=1.0),
            regularizers=(
                VelocityKL(beta=1e-3),
                VelocityKL(beta=1.0, to="followed", rule=Ramp(rate=1e-3, most=0.3)),
            ),
        ),
        optimizer=Optimizer(lr=3e-4, partition="shuffled", ema_decay=0.99, ema_warm_up=True),
    )
