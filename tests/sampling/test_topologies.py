"""Walks along every topology against each sample's own path, made a step at a time with the op itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flowgrpo_fast.ops import flow_log_prob, flow_step, philox_normal
from flowgrpo_fast.sampling.policy import Policy
from flowgrpo_fast.sampling.step import Forwards
from flowgrpo_fast.sampling.walk import START_NOISE_STREAM, Sampler, walk
from flowgrpo_fast.schedule.dynamics import DPMSolver2M, Euler, FlowSDE, table
from flowgrpo_fast.schedule.sigmas import Sigmas
from flowgrpo_fast.schedule.topology import Comb, Course, Independent, OneStepEach, SharedStart, Tree
from flowgrpo_fast.schedule.windows import FrozenWindow
from flowgrpo_fast.types import Conditioning, Draws, FlowModel

NUM_STEPS, NUM_PROMPTS = 8, 3
SIGMAS = Sigmas(num_inference_steps=NUM_STEPS, shift=3.0).grid()


class Field(FlowModel):
    """A fixed field that depends on the prompt."""

    latent_shape = (4, 4)

    def __init__(self) -> None:
        self.module = nn.Identity()

    def encode(self, prompts: Sequence[str], images: Sequence[Path] = ()) -> Conditioning:
        return Conditioning(torch.arange(len(prompts)).float()[:, None, None])

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        wide = (1 + sigma + 0.1 * conditioning.prompt_embeds[:, 0, 0])[:, None, None]
        return torch.tanh(latents) * wide


def own_path(x: Tensor, prompt: int, moves: list, seeds: dict[int, int]) -> Tensor:
    """One sample `[4, 4]` by itself: moves (rule, step, to); `seeds` by step. Noise is that of the seed and step."""
    x, x0_prev, model = x[None], None, Field()
    for rule, step, to in moves:
        coeffs = table([rule.row(SIGMAS, step, to)] * (step + 1))
        conditioning = Conditioning(torch.tensor([[[float(prompt)]]]))
        velocity = model.velocity(x, coeffs[0, :1], conditioning)
        reads = bool(coeffs[0, 4] != 0)
        out = flow_step(
            x,
            velocity,
            coeffs,
            step,
            torch.tensor([seeds.get(step, 0)]),
            x0_prev=x0_prev if reads else None,
            return_x0_pred=True,
        )
        x, x0_prev = out.next_latents, out.x0_pred
    return x[0]


def euler(steps) -> list:
    return [(Euler(), k, k + 1) for k in steps]


NOISY = FlowSDE(noise_level=0.7)
WINDOW = FrozenWindow(size=2, start=1)


def moves_of(topology, plan, prompt: int, sample: int, solver) -> tuple[list, dict[int, int]]:
    """By the topology's definition: what a sample does at each step, and whose noise it gets there."""
    if isinstance(topology, Comb):
        step = 1 + sample // 2
        to = step + topology.merge
        later = [(Euler() if k <= 2 else solver, k, k + 1) for k in range(to, NUM_STEPS)]
        return [*euler(range(step)), (NOISY, step, to), *later], {step: sample}
    if isinstance(topology, OneStepEach):
        (step,) = plan.of_prompts(prompt, 1).kept
        later = [(solver, k, k + 1) for k in range(step + 1, NUM_STEPS)]
        return [*euler(range(step)), (NOISY, step, step + 1), *later], {step: sample}
    first = {1: sample // 2 * 2, 2: sample} if isinstance(topology, Tree) else {1: sample, 2: sample}
    later = [(solver, k, k + 1) for k in range(3, NUM_STEPS)]
    return [*euler([0]), (NOISY, 1, 2), (NOISY, 2, 3), *later], first


@pytest.mark.parametrize("solver", [Euler(), DPMSolver2M()], ids=["euler", "dpmpp_2m"])
@pytest.mark.parametrize(
    "topology",
    [
        Independent(at=WINDOW),
        SharedStart(at=WINDOW),
        SharedStart(at=WINDOW, share_prefix=False),
        Tree(at=WINDOW),
        Comb(at=WINDOW),
        Comb(at=WINDOW, merge=3),
        OneStepEach(at=FrozenWindow(size=4, start=1)),
        OneStepEach(at=FrozenWindow(size=4, start=1), share_start=True),
    ],
    ids=str,
)
def test_each_sample_is_its_own_path(topology, solver) -> None:
    if isinstance(topology, Comb) and topology.merge > 1 and solver != Euler():
        pytest.skip("refused, see tests/schedule")
    course = Course(
        sigmas=SIGMAS,
        shift=3.0,
        dynamics=NOISY,
        solver=solver,
        iteration=2,
        seed=0,
        num_prompts=NUM_PROMPTS,
        group_size=4,
    )
    plan = topology.plan(course)
    num_samples = 4 * NUM_PROMPTS
    seed = torch.arange(num_samples) + 100
    group = torch.arange(NUM_PROMPTS).repeat_interleave(4)
    start_seed = group + 7 if topology.shares_start else seed + 1000
    draws = Draws(prompt_index=torch.arange(NUM_PROMPTS), group_id=group, seed=seed, start_seed=start_seed)
    model = Field()
    conditioning = model.encode(["a", "b", "c"]).rows(group)
    sampler = Sampler(policy=Policy(model, 1.0, "fp32"), forwards=Forwards(rows=4))
    trajectory = walk(sampler, plan, conditioning, draws)
    start = philox_normal(start_seed, model.latent_shape, stream=START_NOISE_STREAM)
    for sample in range(num_samples):
        prompt, member = divmod(sample, 4)
        moves, noise_of = moves_of(topology, plan, prompt, member, solver)
        seeds = {step: int(seed[prompt * 4 + whose]) for step, whose in noise_of.items()}
        expected = own_path(start[sample], prompt, moves, seeds)
        torch.testing.assert_close(trajectory.x0[sample], expected, rtol=2e-5, atol=2e-6)
    assert trajectory.evaluations == plan.evaluations(NUM_PROMPTS)
    # What is stored is scored again to the same bits.
    for t in trajectory.transitions:
        prompts = Conditioning(conditioning.prompt_embeds[t.samples[:: t.fan, 0]])
        velocity = model.velocity(t.latents, t.sigma, prompts).repeat_interleave(t.fan, 0)
        again = flow_log_prob(
            t.latents.repeat_interleave(t.fan, 0), velocity, t.next_latents, trajectory.coeffs, t.row
        )
        assert torch.equal(again, t.log_prob)
