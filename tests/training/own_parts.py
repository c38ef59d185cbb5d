"""Anyone's parts: one of every kind, as a user would write them, and what tests of the update need besides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from flowgrpo_fast.models.network import ModelSetup
from flowgrpo_fast.objectives.objective import Costs, Requires, Terms
from flowgrpo_fast.objectives.surrogates import PathLogProb
from flowgrpo_fast.rewards.terms import Seen
from flowgrpo_fast.schedule.dynamics import FlowSDE
from flowgrpo_fast.schedule.topology import Independent
from flowgrpo_fast.schedule.windows import Window, WindowSteps
from flowgrpo_fast.types import Credit, PromptSet, Scored
from tests.conftest import ToyModel


class WideToy(ToyModel):
    """The toy in fp64, of which it can also be asked in fp32; its decoder has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.module.double()

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        return super().velocity(latents.double(), sigma, conditioning).to(latents.dtype)

    def decode_with_grad(self, latents: Tensor) -> Tensor:
        return torch.sigmoid(latents.float()).view(-1, 1, 2, 3)


def load_wide(device: torch.device, setup: ModelSetup) -> WideToy:
    return WideToy()


def bright(images: Tensor, prompts: list[str]) -> Tensor:
    sign = torch.tensor([-1.0 if p == "low" else 1.0 for p in prompts])
    return sign * (images.flatten(1).mean(1) - 0.5)


def torn_off(images: Tensor, prompts: list[str]) -> Tensor:
    """Says that it is differentiable, and is not."""
    return bright(images, prompts).detach()


@dataclass(frozen=True, slots=True, kw_only=True)
class MyObjective:
    """A plain policy gradient without a trust region."""

    scale: float = 1.0
    requires: ClassVar[Requires] = Requires(log_probs=True)
    couples: ClassVar[bool] = False
    ratio_range: ClassVar[float] = 1e-6

    def check(self, plan: Any) -> None: ...

    def costs(self, plan: Any, num_prompts: int) -> Costs:
        return PathLogProb().costs(plan, num_prompts)

    def points(self, batch: Any) -> Any:
        return PathLogProb().points(batch)

    def measure(self, point: Any, evaluator: Any) -> dict[str, Tensor]:
        return dict(PathLogProb().measure(point, evaluator, ()))

    def loss(self, stats: Any, advantages: Tensor) -> Terms:
        loss = -self.scale * advantages * torch.exp(self.log_ratio(stats))
        return Terms(loss, {"loss": loss.detach()}, {})

    def log_ratio(self, stats: Any) -> Tensor:
        return stats["log_prob"] - stats["old_log_prob"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCoupled(MyObjective):
    """The members of a group compete: cross entropy between softmaxes of their advantages and mean log-ratios."""

    group_size: int = 8
    requires: ClassVar[Requires] = Requires(log_probs=True, all_steps=True, whole_groups=True)
    couples: ClassVar[bool] = True

    def loss(self, stats: Any, advantages: Tensor) -> Terms:
        drift = 3.0 * self.log_ratio(stats).mean(1).view(-1, self.group_size)
        target = torch.softmax(advantages.view(-1, self.group_size), 1)
        loss = -self.group_size * target * torch.log_softmax(drift, 1)
        return Terms(loss.flatten(), {"loss": loss.detach().flatten()}, {})


@dataclass(frozen=True, slots=True, kw_only=True)
class ByElement(MyObjective):
    """Every latent element has a ratio, and credit, of its own; the policy that sampled is the present one."""

    def measure(self, point: Any, evaluator: Any) -> dict[str, Tensor]:
        assert point.fan == 1
        velocity = evaluator.trained(point.latents, point.sigma).mixed
        _, a, b, _, _, inv_var, log_norm, _ = evaluator.coeffs[point.row].to(velocity.dtype).T[:, :, None]
        residual = point.next_latents - a * point.latents - b * velocity
        log_prob = -0.5 * inv_var * residual.square() + log_norm
        return {"log_prob": log_prob, "old_log_prob": log_prob.detach()}


@dataclass(frozen=True, slots=True, kw_only=True)
class MyCreditStep:
    """Bends advantages."""

    power: float = 0.5
    requires: ClassVar[Requires] = Requires()

    def __call__(self, credit: Credit, scored: Scored) -> Credit:
        bent = credit.advantages.sign() * credit.advantages.abs() ** self.power
        return replace(credit, advantages=bent)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByElementCredit:
    """`[B]` to `[B, 1, 6]`: later elements count more."""

    requires: ClassVar[Requires] = Requires()

    def __call__(self, credit: Credit, scored: Scored) -> Credit:
        share = torch.arange(1, 7, device=credit.advantages.device) / 6
        return replace(credit, advantages=credit.advantages[:, None, None] * share)


@dataclass(frozen=True, slots=True, kw_only=True)
class MyDynamics:
    """Flow-GRPO's table with half the noise."""

    noise_level: float = 0.7

    def row(self, sigmas: Any, step: int, to: int) -> Any:
        return FlowSDE(noise_level=self.noise_level / 2).row(sigmas, step, to)

    def rate(self, sigmas: Any, step: int) -> float:
        return FlowSDE(noise_level=self.noise_level / 2).rate(sigmas, step)


@dataclass(frozen=True, slots=True, kw_only=True)
class MyWindow:
    """Two steps apart."""

    first: int = 0
    second: int = 3

    def steps(self, num_steps: int, iteration: int, seed: int) -> WindowSteps:
        return WindowSteps((self.first, self.second), 2)

    def latest_start(self, num_steps: int) -> int:
        return self.first

    def earliest_end(self, num_steps: int) -> int:
        return self.second + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MyTopology:
    """Independent samples, under another name."""

    at: Window = field(default_factory=MyWindow)
    shares_start: ClassVar[bool] = False
    stages: ClassVar[tuple[int, ...]] = ()

    def only_group_size(self, num_steps: int) -> int | None:
        return None

    def num_candidates(self, group_size: int) -> int:
        return group_size

    def plan(self, course: Any) -> Any:
        return Independent(at=self.at).plan(course)


@dataclass(frozen=True, slots=True, kw_only=True)
class MyReward:
    """Brightness against a goal."""

    goal: float = 0.5
    weight: float = 1.0
    objective: ClassVar[str] = "mine"
    label: ClassVar[str] = "my reward"
    where: ClassVar[str] = "here"
    group_wise: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True

    def resolve(self) -> object:
        return self

    def score(self, seen: Seen) -> Tensor:
        return -(seen.images.flatten(1).mean(1) - self.goal).abs()

    def with_gradient(self, seen: Seen) -> Tensor:
        return self.score(seen)


@dataclass(frozen=True, slots=True, kw_only=True)
class MySource:
    """Always the first prompts, each with something known of it."""

    dataset: str = "mine"
    gives_pairs: ClassVar[bool] = False

    def load(self, own: Sequence[str]) -> PromptSet:
        return PromptSet(tuple(own), tuple({"dataset": self.dataset} for _ in own))

    def draw(self, step: int, seed: int, num_prompts: int, set_size: int) -> NDArray[np.int64]:
        return np.arange(num_prompts) % set_size


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedsPairs(MyObjective):
    requires: ClassVar[Requires] = Requires(pairs=True)


def load_adapted(device: torch.device, setup: ModelSetup) -> ToyModel:
    """The toy frozen, with a small adapter beside each layer."""
    model = ToyModel()
    model.module.requires_grad_(False)
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "2"]), model.module)
    return model
