"""OP-GRPO: the best trajectory of each prompt is kept, and takes one place in its next group. arXiv 2604.04142.

A replayed sample repeats its stored steps up to the `num_early_steps`-th and goes on as the present policy would; its
new end is scored like any other. Its loss carries the sequence weight

    w = min(cap, exp(mean over the repeated steps of old_log_prob - stored log_prob))

where `old` is the policy at the start of this step: the clip compares with that one, never with the buffer's. The new
reward replaces the stored one. The best fresh sample of the group takes the place of the trajectory if it is worth as
much as that is after `decay` for every training step of its age.

INFERRED: the mean in the exponent, the cap, the decay, and that the new reward replaces the old.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from flowgrpo_fast.checks import fraction, positive, require
from flowgrpo_fast.experience.experience import Gathered, Stage, Walks, in_chunks
from flowgrpo_fast.objectives.objective import Requires
from flowgrpo_fast.schedule.plan import Plan
from flowgrpo_fast.types import Draws, Imposed, Scored

# A stored trajectory, of plain types and tensors on the host, as a checkpoint holds it: "reward" float, "born" int, the
# training step that sampled it, "states" [num_early_steps + 1, *S] and "log_prob" [num_early_steps] under that policy.
Entry: TypeAlias = dict[str, Any]

_MEMORY = "replay_buffer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """Fresh samples, and one stored in each group whose prompt has been seen; all fresh while nothing is stored."""

    num_early_steps: int = 6  # that are stored, repeated and weighed; 0 replays nothing
    cap: float = 2.0  # of the sequence weight
    decay: float = 0.9  # of what a stored trajectory is worth, a training step
    requires = Requires(log_probs=True)  # stored transitions
    gives_transitions = True  # repeated steps are scored by the present policy
    scout_precision = None  # it ranks no seeds
    walks = Walks()  # the recipe's plan: repeated steps are asked again

    def __post_init__(self) -> None:
        """A count, a positive cap, a share."""
        require(
            self.num_early_steps >= 0,
            f"Replayed.num_early_steps is {self.num_early_steps}; it must be at least 0",
        )
        positive(self, cap=self.cap)
        fraction(self, decay=self.decay)

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

    def check_plan(self, plan: Plan) -> None:
        """As of `Experience`: what is repeated has to have been kept, for every sample."""
        require(
            all(step.kept.all() and not step.differs for step in plan.steps[: self.num_early_steps]),
            f"Replayed.num_early_steps is {self.num_early_steps}; every sample must keep its first steps, and the walk "
            f"keeps {list(plan.kept)}: use Independent with EarlySteps of that size",
        )

    def num_drawn(self, num_candidates: int) -> int:
        """One seed a sample; a replayed one takes its own for the steps it walks anew."""
        return num_candidates

    def weight(self, now: Tensor, then: Tensor) -> Tensor:
        """The sequence weight `[N]` of log-probs `[N, K]` under the policy of today and that which sampled."""
        return (now - then).mean(1).exp().clamp(max=self.cap)

    def priority(self, reward: float, age: int) -> float:
        """What a trajectory of that age is worth beside a fresh one; a reward below 0 sinks, too."""
        kept = self.decay**age
        return reward * kept if reward > 0 else reward / kept

    def collect(self, stage: Stage, draws: Draws, step: int) -> Gathered:
        """As of `Experience`.

        Raises:
            ValueError: what is stored was sampled in another way than this run samples.
        """
        plan, stored = stage.plan(step), self._stored(stage, stage.plan(step))
        prompts, device = draws.prompt_index.tolist(), draws.seed.device
        replayed = {place: stored[prompt] for place, prompt in enumerate(prompts) if prompt in stored}
        if not replayed:
            samples, scorings = in_chunks(stage, stage.sampler, plan, draws)
            return Gathered(samples, scorings, stage.scorer)
        size, entries = len(draws.group_id) // len(prompts), list(replayed.values())
        last = np.array([place * size + size - 1 for place in replayed])  # the last member makes room
        states = torch.stack([entry["states"] for entry in entries], 1).to(device)
        samples, scorings = in_chunks(stage, stage.sampler, plan, draws, Imposed(last, tuple(states)))
        then = torch.stack([entry["log_prob"] for entry in entries]).to(device)
        index = torch.from_numpy(last).to(device)
        now = torch.stack([kept.log_prob[index] for kept in samples.transitions[: self.num_early_steps]], 1)
        own = self.weight(now, then)
        weight = torch.ones(len(draws.group_id), device=device).index_copy_(0, index, own)
        shown = {
            "replayed": len(entries) / len(prompts),
            "replay_age": sum(step - entry["born"] for entry in entries) / len(entries),
        }
        return Gathered(
            replace(samples, weight=weight),
            scorings,
            stage.scorer,
            measures=lambda scores: {**shown, "replay_weight": float(own.mean())},
        )

    def settle(self, stage: Stage, scored: Scored, step: int) -> None:
        """Keeps of each group the best fresh sample, or what was replayed in it, by what they are worth now."""
        if self.num_early_steps == 0:
            return
        stored, samples = self._stored(stage, scored.samples.plan), scored.samples
        prompts, rewards = samples.draws.prompt_index.tolist(), scored.scores.total
        if scored.scores.valid is not None:
            rewards = rewards.masked_fill(~scored.scores.valid, -torch.inf)
        rewards = rewards.view(len(prompts), -1)
        replayed = torch.tensor([prompt in stored for prompt in prompts], device=rewards.device)
        fresh = rewards.clone()
        fresh[:, -1].masked_fill_(replayed, -torch.inf)
        best = fresh.argmax(1)
        winners = best + torch.arange(len(prompts), device=best.device) * rewards.shape[1]
        early = samples.transitions[: self.num_early_steps]
        states = torch.stack([early[0].latents[winners], *(kept.next_latents[winners] for kept in early)], 1)
        log_probs = torch.stack([kept.log_prob[winners] for kept in early], 1)
        found: dict[int, Entry] = {}  # a prompt may have several groups
        for place, (prompt, new, again) in enumerate(
            zip(prompts, fresh.amax(1).tolist(), rewards[:, -1].tolist(), strict=True)
        ):
            if new > -torch.inf:
                entry = {"reward": new, "born": step, "states": states[place], "log_prob": log_probs[place]}
                self._offer(found, prompt, entry, step)
            if prompt in stored:
                # Without a score, the trajectory stays what it was worth.
                reward = again if again > -torch.inf else stored[prompt]["reward"]
                self._offer(found, prompt, {**stored[prompt], "reward": reward}, step)
        for prompt, entry in found.items():
            held = {name: entry[name].to("cpu", copy=True) for name in ("states", "log_prob")}
            stored[prompt] = {**entry, **held}

    def _offer(self, found: dict[int, Entry], prompt: int, entry: Entry, step: int) -> None:
        """Keeps an entry unless one that was offered before, fresher or of another group, is worth as much."""
        worth = [
            self.priority(one["reward"], step - one["born"]) for one in (entry, found.get(prompt, entry))
        ]
        if prompt not in found or worth[0] > worth[1]:
            found[prompt] = entry

    def _stored(self, stage: Stage, plan: Plan) -> dict[int, Entry]:
        """What is stored, by prompt, if it was sampled as `plan` samples."""
        rows = [int(step.row[0, 0]) for step in plan.steps[: self.num_early_steps]]
        policy, digest = stage.sampler.policy, hashlib.sha256()
        for text in (*stage.prompts.prompts, *map(str, stage.prompts.images)):
            digest.update(f"{text}\n".encode())
        coeffs = plan.coeffs[rows]
        made_by = {
            "guidance_scale": policy.guidance_scale,
            "precision": policy.precision,
            "prompts": digest.hexdigest(),
        }
        memory = stage.memory.setdefault(_MEMORY, {"coeffs": coeffs, "made_by": made_by, "entries": {}})
        changed = [name for name, value in made_by.items() if memory["made_by"][name] != value]
        changed += [] if torch.equal(memory["coeffs"], coeffs) else ["noise or schedule"]
        require(
            not changed,
            f"the replay buffer of this run was sampled with another {', '.join(changed)}: log-probs do not compare; "
            "go on with the recipe as it was, or delete memory.pt in the checkpoint to begin with an empty buffer",
        )
        entries: dict[int, Entry] = memory["entries"]
        return entries
