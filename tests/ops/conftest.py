from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import kernels_on_host
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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the fixture `device` runs on the CPU and on the GPU where there is one; a witness, which is small,
    also on the CUDA code compiled for the host."""
    if "device" in metafunc.fixturenames:
        witness = metafunc.definition.get_closest_marker("witness")
        params = ["cpu", *(["host"] if witness else []), pytest.param("cuda", marks=pytest.mark.gpu)]
        metafunc.parametrize("device", params, indirect=True)


@pytest.fixture(scope="session")
def host_module() -> Any:
    """The CUDA code compiled for the host."""
    if why := kernels_on_host.why_not():
        pytest.skip(f"CUDA code not run on the host: {why}")
    return kernels_on_host.load(kernels_on_host.built("plain/_C.so"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where a test's tensors are to be. On the host they are CPU tensors that the ops take for CUDA ones."""
    if request.param == "host":
        with kernels_on_host.in_place_of_the_gpu(request.getfixturevalue("host_module")):
            yield "cpu:0"
        return
    if request.param == "cuda" and not build_info()["cuda_archs"]:
        pytest.skip("built without CUDA: GPU code not run")
    yield request.param


@pytest.fixture
def case() -> Callable[..., Case]:
    return make_case


@pytest.fixture(params=[((3, 8, 8), False), ((2, 3, 8, 6), True), ((16, 4), False)], ids=str)
def benchmark_sample(request, monkeypatch) -> tuple[int, ...]:
    """Shape of one sample for a benchmark's contenders; only the videos', which takes seconds, are compiled."""
    sample, compiled = request.param
    torch._dynamo.reset()
    if not compiled:
        monkeypatch.setattr(torch, "compile", lambda function=None, **_: function or (lambda later: later))
    return sample
