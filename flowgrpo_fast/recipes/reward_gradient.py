"""Methods that follow the gradient of a differentiable reward. Sources and what differs: docs/methods."""

from __future__ import annotations

from flowgrpo_fast.recipe import Independent, LeapAlign, Network, Optimizer, RandomPair, Recipe, Sigmas


def leap_align() -> Recipe:
    """LeapAlign, FLUX: the reward's gradient through two leaps of a stored ODE walk."""
    return Recipe(
        name="leap_align",
        sigmas=Sigmas(num_inference_steps=25, shift=3.0),
        topology=Independent(at=RandomPair()),
        group_size=1,
        num_prompts=64,
        credit=(),
        objective=LeapAlign(alpha=0.3, threshold=0.55, tau=0.1),
        optimizer=Optimizer(lr=1e-5, ema_decay=0.995),
        network=Network(embedded_guidance=3.5),
    )
