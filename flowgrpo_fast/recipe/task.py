"""Parts of a recipe: what is trained, on which prompts, by which rewards, and who judges it."""

from __future__ import annotations

from dataclasses import dataclass

from flowgrpo_fast.checks import positive, require
from flowgrpo_fast.rewards.terms import RewardTerm


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is trained, on which prompts, by which rewards, and who judges it."""

    model: str = "digits"  # a module of flowgrpo_fast.models, or package.module:function
    prompts: str = (
        ""  # a text file, one prompt a line, or a .jsonl file (`data.prompts`); empty = the model's own
    )
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
        names = [term.objective for term in self.rewards]
        for name in names:
            require(
                names.count(name) == 1,
                f"Task.rewards names {name!r} twice; metrics go by that name, so give each its own",
            )
        positive(self, num_eval_samples=self.num_eval_samples, eval_every=self.eval_every)
        positive(self, reward_processes=self.reward_processes)
