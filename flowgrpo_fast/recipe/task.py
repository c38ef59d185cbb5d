"""Parts of a recipe: what is trained, on which prompts, by which rewards, and who judges it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flowgrpo_fast.checks import one_of, positive, require


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTerm:
    """One reward: a function `package.module:function (images, prompts) -> [B]` and its weight.

    `where` it runs: "here", after the rollout; "thread" or "process", while the next prompts are rolled out (see
    `Recipe.prompts_per_chunk`). A thread suits what waits, say for a remote server, or runs on the device; a process
    what computes on the host. Its function is imported there and gets images on the host.
    """

    function: str
    weight: float = 1.0
    where: Literal["here", "thread", "process"] = "here"

    def __post_init__(self) -> None:
        """A known place."""
        one_of(self, ("here", "thread", "process"), where=self.where)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is trained, on which prompts, by which rewards, and who judges it."""

    model: str = "digits"  # a module of flowgrpo_fast.models, or package.module:function
    prompts: str = ""  # a text file, one prompt a line; empty = the model's own
    images: str = ""  # for editing: a text file, the source image of each prompt, one path a line
    rewards: tuple[RewardTerm, ...] = (
        RewardTerm(function="flowgrpo_fast.rewards.rules:digit_log_prob"),
        RewardTerm(function="flowgrpo_fast.rewards.rules:ink_contrast", weight=0.2),
    )
    reward_processes: int = 1  # for rewards with where="process"
    judge: str = "flowgrpo_fast.rewards.judges:DigitJudge"  # empty = none
    num_eval_samples: int = 500
    eval_every: int = 10

    def __post_init__(self) -> None:
        """There is something to learn from."""
        require(len(self.rewards) > 0, "Task.rewards is empty; name at least one reward function")
        names = [term.function.rpartition(":")[2] for term in self.rewards]
        for name in names:
            require(
                names.count(name) == 1,
                f"Task.rewards names {name!r} twice; metrics go by that name, so give each its own",
            )
        positive(self, num_eval_samples=self.num_eval_samples, eval_every=self.eval_every)
        positive(self, reward_processes=self.reward_processes)
