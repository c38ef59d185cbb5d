from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor, nn

from flowgrpo_fast.models import digits
from flowgrpo_fast.models.digits import DigitsConfig, DigitsModel, DigitsNetwork
from flowgrpo_fast.models.network import ModelSetup
from flowgrpo_fast.recipe import (
    Bound,
    Clip,
    DropIdle,
    FlowSDE,
    FrozenWindow,
    Independent,
    Normalise,
    Optimizer,
    PolicyGradient,
    Recipe,
    RewardTerm,
    Sigmas,
    Task,
)
from flowgrpo_fast.types import Conditioning, FlowModel
from tests.conftest import with_changes

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def randomized(module: nn.Module, scale: float = 0.05) -> nn.Module:
    """Weights that say something: diffusers starts output layers, and peft its `b`, at 0."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def with_lora(transformer: nn.Module, **changes) -> nn.Module:
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | changes))
    return transformer


def sd3(lora: bool = True, seed: int = 0, **changes) -> DigitsModel:
    """The digits model, 128 wide so that every format has layers to quantise, with a LoRA on its attention."""
    torch.manual_seed(seed)
    network = DigitsNetwork(DigitsConfig(num_layers=2, num_attention_heads=4))
    network.words.requires_grad_(False)
    if lora:
        with_lora(network.transformer, **changes)
        network.peft_config = network.transformer.peft_config  # where a checkpoint reads it
    randomized(network)
    return DigitsModel(network)


class FluxModel(FlowModel):
    """A tiny FLUX transformer as a FlowModel whose `transformer` is an attribute, and the module itself."""

    latent_shape = (16, 16)
    sensitive = ("embed", "norm", "proj_mlp")
    transformer = None

    def __init__(self, module: nn.Module) -> None:
        self.module = self.transformer = module

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        positions = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], dim=1)
        return self.module(
            hidden_states=latents,
            encoder_hidden_states=conditioning.prompt_embeds,
            pooled_projections=conditioning.pooled_prompt_embeds,
            timestep=sigma,
            img_ids=positions,
            txt_ids=torch.zeros(conditioning.prompt_embeds.shape[1], 3),
            guidance=torch.ones_like(sigma),
            return_dict=False,
        )[0]


def flux(**changes) -> FluxModel:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    with_lora(transformer, **changes)
    randomized(transformer)
    return FluxModel(transformer)


def flux_inputs() -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return normal(3, 16, 16), torch.tensor([0.9, 0.5, 0.1]), Conditioning(normal(3, 5, 32), normal(3, 32))


def sd3_inputs(model: DigitsModel) -> tuple[Tensor, Tensor, Conditioning]:
    latents = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return latents, torch.tensor([0.9, 0.5, 0.1]), model.encode(digits.prompts()[:3])


def load(device: torch.device, setup: ModelSetup) -> DigitsModel:
    return sd3()


def load_whole(device: torch.device, setup: ModelSetup) -> DigitsModel:
    return sd3(lora=False)


def load_half(device: torch.device, setup: ModelSetup) -> DigitsModel:
    model = sd3(lora=False)
    model.module.to(torch.bfloat16)
    return model


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.flatten(1).mean(1)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch):
    """Makes small recipes for the model above; keywords replace fields, those of `Machine` in the machine."""
    monkeypatch.setitem(sys.modules, "precision_job", sys.modules[__name__])
    recipe = Recipe(
        name="precise",
        sigmas=Sigmas(num_inference_steps=5, shift=1.0),
        dynamics=FlowSDE(noise_level=0.7),
        topology=Independent(at=FrozenWindow(size=2, start=1)),
        group_size=4,
        num_prompts=2,
        credit=(Normalise(eps=1e-4), Bound(), DropIdle()),
        objective=PolicyGradient(trust=Clip(range=0.05)),
        optimizer=Optimizer(lr=3e-3),
        num_steps=2,
        task=Task(
            model="precision_job:load",
            rewards=(RewardTerm(function="precision_job:brightness"),),
            judge="",
            num_eval_samples=4,
        ),
    )

    def make(model: str = "load", **changes) -> Recipe:
        made = with_changes(recipe, **changes)
        return replace(made, task=replace(made.task, model=f"precision_job:{model}"))

    return make
