"""Every recipe by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flowgrpo_fast.recipe import Recipe
from flowgrpo_fast.recipes import distillation, forward, reward_gradient, trajectory


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of `flowgrpo-fast recipes`."""

    make: Callable[[], Recipe]
    family: str
    paper: str


RECIPES = {
    "flow_grpo": Entry(trajectory.flow_grpo, "trajectories", "arXiv 2505.05470"),
    "flow_grpo_fast": Entry(trajectory.flow_grpo_fast, "trajectories", "arXiv 2505.05470"),
    "flow_cps": Entry(trajectory.flow_cps, "trajectories", "arXiv 2509.05952"),
    "dance_grpo": Entry(trajectory.dance_grpo, "trajectories", "arXiv 2505.07818"),
    "mix_grpo": Entry(trajectory.mix_grpo, "trajectories", "arXiv 2507.21802"),
    "mix_grpo_flash": Entry(trajectory.mix_grpo_flash, "trajectories", "arXiv 2507.21802"),
    "pro_grpo": Entry(trajectory.pro_grpo, "trajectories", "arXiv 2512.15347"),
    "pro_grpo_flash": Entry(trajectory.pro_grpo_flash, "trajectories", "arXiv 2512.15347"),
    "tree_grpo": Entry(trajectory.tree_grpo, "trajectories", "arXiv 2512.08153"),
    "gcpo": Entry(trajectory.gcpo, "trajectories", "arXiv 2510.21583"),
    "op_grpo": Entry(trajectory.op_grpo, "trajectories", "arXiv 2604.04142"),
    "diffusion_nft": Entry(forward.diffusion_nft, "forward process", "arXiv 2509.16117"),
    "sol_rl": Entry(forward.sol_rl, "forward process", "arXiv 2604.06916"),
    "awm": Entry(forward.awm, "forward process", "arXiv 2509.25050"),
    "naive_scaling": Entry(forward.naive_scaling, "forward process", "arXiv 2604.06916"),
    "naive_quantized": Entry(forward.naive_quantized, "forward process", "arXiv 2604.06916"),
    "leap_align": Entry(reward_gradient.leap_align, "reward gradients", "arXiv 2604.15311"),
    "flow_opd": Entry(distillation.flow_opd, "distillation", "arXiv 2605.08063"),
}
