"""A model and how it is asked: guidance, precision, and which of its experts runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from flowgrpo_fast.ops import Guidance
from flowgrpo_fast.types import Conditioning, FlowModel, Predicted

Precision: TypeAlias = Literal["fp32", "bf16"]


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """What samples, or is measured: the same object in rollout and update, so that both compute the same bits."""

    model: FlowModel
    guidance_scale: float = 1.0
    precision: Precision = "fp32"  # of the network's matrix products
    # Whether the unconditional half of guidance goes back through the network, too; False holds it constant.
    unconditional_gradient: bool = False

    @property
    def halves(self) -> int:
        """Forwards a velocity takes: guidance has an unconditional half. At most 1 is none, as in the pipelines."""
        return 2 if self.guidance_scale > 1 else 1

    def of(self, model: FlowModel) -> Policy:
        """Another model, asked alike."""
        return replace(self, model=model)

    def at(self, level: Tensor | None) -> Policy:
        """What of the model runs where all rows are at one sigma, 0-d on the host; all of it where that is None."""
        if level is None:
            return self
        expert = self.model.expert(level)
        return self if expert is self.model else self.of(expert)

    def predict(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        unconditional: Tensor | None = None,
    ) -> Predicted:
        """The velocity of `latents [B, *S]` at `sigma [B]` or `[]` fp32; gradient as the caller's mode says.

        Args:
            conditioning: B rows.
            unconditional: `[B, *S]`, the half of guidance without the prompt, where it has been computed before under
                the same weights and carries no gradient.
        """
        sigma, model = sigma.expand(latents.shape[0]), self.model
        autocast = torch.autocast(latents.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")
        with autocast:
            velocity = model.velocity(latents, sigma, conditioning).contiguous()
            if self.halves == 1:
                return Predicted(velocity)
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.unconditional_gradient):
                if unconditional is None:
                    negative = model.velocity(latents, sigma, conditioning.negative()).contiguous()
                else:
                    negative = unconditional.contiguous()
            if model.mixes_guidance:
                return Predicted(model.guided(velocity, negative, self.guidance_scale))
        return Predicted(velocity, Guidance(negative, self.guidance_scale))
