from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from flowgrpo_fast.ops import Guidance, build_info

NUM_STEPS = 5


@dataclass
class Case:
    """Inputs of one transition, of any shape and storage dtype."""

    latents: Tensor
    velocity: Tensor
    next_latents: Tensor
    coeffs: Tensor
    step_index: Tensor  # [B]
    seed: Tensor
    guidance: Guidance | None
    x0_prev: Tensor | None


def make_case(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    velocity_dtype: torch.dtype | None = None,
    guided: bool = False,
    history: bool = False,
    device: str = "cpu",
) -> Case:
    generator = torch.Generator().manual_seed(sum(shape) + 7 * len(shape))
    real = torch.float64 if dtype is torch.float64 else torch.float32

    def normal(wanted: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(wanted).to(device)

    coeffs = torch.rand(NUM_STEPS, 8, generator=generator) + 0.25
    coeffs[:, 2] *= -0.2  # b is a negative time step
    step_index = torch.randint(0, NUM_STEPS, shape[:1], generator=generator)
    seed = torch.randint(-(2**62), 2**62, shape[:1], generator=generator)
    wanted = velocity_dtype or dtype
    return Case(
        latents=normal(dtype),
        velocity=normal(wanted),
        next_latents=normal(dtype),
        coeffs=coeffs.to(device),
        step_index=step_index.to(device),
        seed=seed.to(device),
        guidance=Guidance(normal(wanted), 4.5) if guided else None,
        x0_prev=normal(real) if history else None,
    )


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device an op has code for. A test with this fixture runs on the GPU where there is one."""
    if request.param == "cuda" and not build_info()["cuda_archs"]:
        pytest.skip("built without CUDA: GPU code not run")
    return request.param


@pytest.fixture
def case() -> Callable[..., Case]:
    return make_case
