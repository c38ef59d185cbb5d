"""What the tests know of each family: its size in the tiny pipelines, its loader, and how its pipeline is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

from flowgrpo_fast.models.loading import load_model
from flowgrpo_fast.models.network import ModelSetup
from flowgrpo_fast.recipe import (
    Clip,
    FlowSDE,
    FrozenWindow,
    Independent,
    LoRA,
    Network,
    Optimizer,
    PolicyGradient,
    Prompts,
    Recipe,
    RewardTerm,
    Sigmas,
    Task,
)
from flowgrpo_fast.types import Conditioning, FlowModel
from tests.conftest import with_changes


@dataclass(frozen=True)
class Family:
    """One row of the tests."""

    name: str
    variant: dict[str, Any] = field(default_factory=dict)  # of the tiny pipeline
    network: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)  # of the pipeline
    scale: str = "guidance_scale"  # the pipeline's name for classifier-free guidance
    negative: str = "a blur"
    adapt: Callable[[Any, dict[str, Any]], None] | None = (
        None  # the pipeline's arguments, where they are its own
    )
    conditional_first: bool = False  # where one call holds both halves
    in_blocks: float = 0.2  # of a training step's work: the blocks' forward, at least
    atol: float = 2e-6  # of a velocity
    syncs: str = ""  # its transformer asks the device for a number: "always", or for "lengths" that differ

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.variant.items())])

    @property
    def edits(self) -> bool:
        return self.name == "flux_kontext"

    def encode(self, model: Any, prompts: list[str], images: list[Path]) -> Conditioning:
        """With the source images where the family takes them."""
        return model.encode(prompts, images) if self.edits else model.encode(prompts)


def source_images(folder: Path, count: int) -> list[Path]:
    """Pictures to edit, one for each prompt."""
    paths = [folder / f"source_{index}.png" for index in range(count)]
    for index, path in enumerate(paths):
        noise = torch.rand(40, 24, 3, generator=torch.Generator().manual_seed(index))
        Image.fromarray((255 * noise).byte().numpy()).save(path)
    return paths


def _klein(pipe: Any, arguments: dict[str, Any]) -> None:
    """Takes latents before they are packed, and no negative prompt but the empty one."""
    arguments.pop("negative_prompt", None)
    arguments["latents"] = arguments["latents"].transpose(1, 2).unflatten(2, (4, 4))


def _z_image(pipe: Any, arguments: dict[str, Any]) -> None:
    """Counts guidance from 0, and writes into the list of prompts."""
    arguments["guidance_scale"] -= 1
    arguments["prompt"] = list(arguments["prompt"])


def _guider(pipe: Any, arguments: dict[str, Any]) -> None:
    """Holds guidance as a part; its autoencoder takes one video at a time."""
    pipe.vae.use_slicing = True
    pipe.guider = diffusers.ClassifierFreeGuidance(guidance_scale=arguments.pop("guidance_scale"))


SD3 = Family("sd3", network={"max_sequence_length": 16}, call={"max_sequence_length": 16})
FLUX = Family(
    "flux", network={"max_sequence_length": 16}, call={"max_sequence_length": 16}, scale="true_cfg_scale"
)
KONTEXT = replace(FLUX, name="flux_kontext", call={**FLUX.call, "max_area": 32 * 32, "_auto_resize": False})
QWEN_IMAGE = Family("qwen_image", scale="true_cfg_scale")
WAN = Family(
    "wan",
    network={"max_sequence_length": 16, "num_frames": 5},
    call={"max_sequence_length": 16, "num_frames": 5},
)
FLUX2_KLEIN = Family(
    "flux2_klein",
    network={"max_sequence_length": 64},
    call={"max_sequence_length": 64},
    negative="",
    adapt=_klein,
)
# The pipeline runs both halves at once, under a mask over captions that ours need not have: other rounding.
Z_IMAGE = Family("z_image", adapt=_z_image, conditional_first=True, atol=1e-5, syncs="lengths")
SANA = Family(
    "sana",
    network={"max_sequence_length": 48},
    call={"max_sequence_length": 48, "use_resolution_binning": False},
)
HUNYUAN_VIDEO15 = Family(
    "hunyuan_video15",
    network={"num_frames": 5},
    call={"num_frames": 5},
    adapt=_guider,
    in_blocks=0.02,  # what reads the quotes is 2048 wide, whatever the configuration
    syncs="always",
)
FAMILIES = [
    SD3,
    replace(SD3, variant={"dual": True}),
    replace(SD3, variant={"t5": False}),
    FLUX,
    replace(FLUX, variant={"guidance": False}),
    KONTEXT,
    QWEN_IMAGE,
    WAN,
    replace(WAN, variant={"experts": True}),
    replace(WAN, variant={"expand_timesteps": True}),
    FLUX2_KLEIN,
    Z_IMAGE,
    SANA,
    HUNYUAN_VIDEO15,
]
FIRST = [SD3, FLUX, QWEN_IMAGE, WAN]  # for what takes long and depends little on the family
ONE_EACH = [family for family in FAMILIES if not family.variant]


def red(images: Tensor, prompts: list[str]) -> Tensor:
    """A reward for images and videos alike: how much red there is."""
    return (
        images.float().flatten(2).mean(2)[:, 0] if images.ndim == 4 else images.float().mean((1, 3, 4))[:, 0]
    )


def recipe_for(family: Family, path: Path, prompts: Path, **changes: Any) -> Recipe:
    """A small job on a tiny pipeline; keywords that are fields of Network or Machine go there, others to the recipe."""
    network = {"height": 32, "width": 32, "train": LoRA(rank=2, alpha=4.0), **family.network}
    network |= {key: changes.pop(key) for key in list(changes) if key in Network.__dataclass_fields__}
    images = prompts.with_name("images.txt")
    if family.edits:
        names = [path.name for path in source_images(prompts.parent, len(prompts.read_text().splitlines()))]
        images.write_text("\n".join(names))
    recipe = Recipe(
        name="tiny",
        sigmas=Sigmas(num_inference_steps=4, shift=3.0, spacing="diffusers"),
        dynamics=FlowSDE(noise_level=0.7),
        topology=Independent(at=FrozenWindow(size=2, start=0)),
        group_size=2,
        num_prompts=2,
        objective=PolicyGradient(trust=Clip(range=0.05)),
        optimizer=Optimizer(lr=1e-3),
        network=Network(path=str(path), **network),
        data=Prompts(path=str(prompts), images=str(images) if family.edits else ""),
        task=Task(
            model=family.name,
            rewards=(RewardTerm(function="families_of_tests:red"),),
            judge="",
            num_eval_samples=3,
        ),
    )
    return with_changes(recipe, **changes)


def loaded(recipe: Recipe) -> FlowModel:
    """The model of a recipe's task, on the CPU."""
    setup = ModelSetup(network=recipe.network, precision=recipe.machine.precision, seed=recipe.seed)
    return load_model(recipe.task.model, torch.device("cpu"), setup)


def captured(pipe: Any, run: Callable[[], Any]) -> tuple[Any, list[tuple[dict[str, Any], Tensor]]]:
    """What `run` returns, and arguments and output of each call of the pipeline's transformers meanwhile."""
    calls: list[tuple[dict[str, Any], Tensor]] = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        velocity = output[0]
        if isinstance(velocity, list):  # Z-Image's samples, and towards the image
            velocity = -torch.stack(velocity).squeeze(2)
        calls.append((kwargs, velocity))

    parts = [pipe.transformer, getattr(pipe, "transformer_2", None)]
    hooks = [part.register_forward_hook(keep, with_kwargs=True) for part in parts if part is not None]
    try:
        with torch.no_grad():
            return run(), calls
    finally:
        for hook in hooks:
            hook.remove()
