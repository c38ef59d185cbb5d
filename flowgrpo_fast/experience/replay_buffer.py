"""OP-GRPO: the best trajectory of each prompt is kept, and takes one place in its next group. arXiv 2604.04142.

A replayed sample repeats its stored steps up to the `num_early_steps`-th and goes on as the present policy would; its
new end is scored like any other. Its loss carries the sequence weight

    w = min(cap, exp(mean over the repeated steps of old_log_prob - stored log_prob))

where `old` is the policy at the start of this step: the clip compares with that one, never with the buffer's.
INFERRED: the mean in the exponent, the cap, the decay of a stored reward with age.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from flowgrpo_fast.checks import fraction, positive, require
from flowgrpo_fast.experience.experience import Experience, Gathered, Stage, Walks, in_chunks
from flowgrpo_fast.experience.rollout import Rollout
from flowgrpo_fast.objectives.objective import Requires
from flowgrpo_fast.precision.parts import RolloutPrecision
from flowgrpo_fast.types import Draws, Imposed, Scored

_MEMORY, _REPEATED = "replay_buffer", "replay_buffer_now"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """Fresh samples, and one stored in each group whose prompt has been seen."""

    num_early_steps: int = 6  # that are stored, repeated and trained
    cap: float = 2.0  # of the sequence weight
    decay: float = 0.9  # of a stored reward's priority, a training step
    inner: Experience = field(default_factory=Rollout)

    def __post_init__(self) -> None:
        """Positive numbers."""
        positive(self, num_early_steps=self.num_early_steps, cap=self.cap)
        fraction(self, decay=self.decay)

    @property
    def requires(self) -> Requires:
        """Stored transitions."""
        return self.inner.requires.joined(Requires(log_probs=True))

    @property
    def gives_transitions(self) -> bool:
        """Repeated steps are scored by the present policy."""
        return True

    @property
    def scout_precision(self) -> RolloutPrecision | None:
        """As what it wraps."""
        return self.inner.scout_precision

    @property
    def walks(self) -> Walks:
        """As what it wraps: repeated steps are asked again."""
        return self.inner.walks

    def check(self, num_steps: int, group_size: int, stages: tuple[int, ...], shares_start: bool) -> None:
        """As of `Experience`."""
        require(
            self.num_early_steps < num_steps,
            f"Replayed.num_early_steps is {self.num_early_steps}; a replayed sample must go its own way for at least "
            f"one of the {num_steps} steps",
        )
        require(
            not stages,
            "Replayed takes a place of a finished group; Cuts would choose who is finished: use one",
        )
        require(
            not shares_start,
            "the topology shares start noise; a replayed sample brings its own: use Independent",
        )
        self.inner.check(num_steps, group_size, stages, shares_start)

    def num_drawn(self, num_candidates: int) -> int:
        """One seed a sample; a replayed one takes its own for the steps it walks anew."""
        return num_candidates

    def collect(self, stage: Stage, draws: Draws, step: int) -> Gathered:
        """As of `Experience`; where nothing is stored yet, what it wraps."""
        stored = stage.memory.get(_MEMORY, {})
        prompts = draws.prompt_index.tolist()
        replayed = [(place, stored[prompt]) for place, prompt in enumerate(prompts) if prompt in stored]
        if not replayed:
            return self.inner.collect(stage, draws, step)
        size, device = len(draws.group_id) // len(prompts), draws.seed.device
        last = np.array([place * size + size - 1 for place, _ in replayed])  # the last member makes room
        states = [
            torch.stack([entry["states"][k] for _, entry in replayed])
            for k in range(self.num_early_steps + 1)
        ]
        imposed = Imposed(last, tuple(state.to(device) for state in states))
        samples, scorings = in_chunks(stage, stage.sampler, stage.plan(step), draws, imposed)
        early = samples.transitions[: self.num_early_steps]
        then = torch.stack([entry["log_prob"] for _, entry in replayed]).to(device)  # [N, K]
        index = torch.from_numpy(last).to(device)
        now = torch.stack([kept.log_prob[index] for kept in early], 1)
        weight = torch.ones(len(draws.group_id), device=device)
        weight[index] = (now - then).mean(1).exp().clamp(max=self.cap)
        # What a replayed sample was drawn from stays what it was, should it be stored once more.
        stage.memory[_REPEATED] = {
            int(sample): entry["log_prob"] for sample, (_, entry) in zip(last, replayed, strict=True)
        }
        shown = {"replayed": len(replayed) / len(prompts), "replay_weight": float(weight[index].mean())}
        return Gathered(
            replace(samples, weight=weight), scorings, stage.scorer, measures=lambda scores: shown
        )

    def settle(self, stage: Stage, scored: Scored, step: int) -> None:
        """Keeps the best sample of each group, if it is worth more than what is stored of its prompt."""
        stored = stage.memory.setdefault(_MEMORY, {})
        repeated = stage.memory.pop(_REPEATED, {})
        samples = scored.samples
        early = samples.transitions[: self.num_early_steps]
        rewards = scored.scores.total.view(samples.num_prompts, -1)
        best = rewards.argmax(1)
        for prompt in stored:
            stored[prompt]["priority"] *= self.decay if stored[prompt]["priority"] > 0 else 1 / self.decay
        for place, (prompt, member, reward) in enumerate(
            zip(samples.draws.prompt_index.tolist(), best.tolist(), rewards.amax(1).tolist(), strict=True)
        ):
            if prompt in stored and stored[prompt]["priority"] > reward:
                continue
            sample = place * rewards.shape[1] + member
            stored[prompt] = {
                "priority": reward,
                "states": [early[0].latents[sample].clone()]
                + [kept.next_latents[sample].clone() for kept in early],
                "log_prob": repeated.get(sample, torch.stack([kept.log_prob[sample] for kept in early])),
            }
        self.inner.settle(stage, scored, step)
