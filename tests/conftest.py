from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn

from flowgrpo_fast.models.network import ModelSetup
from flowgrpo_fast.recipe import (
    Clip,
    FlowSDE,
    FrozenWindow,
    Independent,
    Machine,
    Optimizer,
    PolicyGradient,
    Prompts,
    Recipe,
    RewardTerm,
    Sigmas,
    Task,
)
from flowgrpo_fast.types import Conditioning, FlowModel

torch.set_num_threads(1)  # toy sizes: threads only wait for each other

GOLDEN = Path(__file__).parent / "golden"


# Minutes each, of compilers and of programs begun anew: first, so that no process is left alone with one at the end.
LONG = ("test_cuda_on_host.py", "test_execution.py", "test_cli.py", "test_sanitize_cpu.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device here: GPU code not run"))


@pytest.fixture(scope="session")
def made_once(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[..., Path]:
    """Makes a folder under a name, once for the whole run: the workers of pytest-xdist share what one has made."""
    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # a worker's folder is in that of the run
        root = root.parent
    root = root / "made_once"

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                make(half := path.with_name(f"{path.name}.half"))
                half.rename(path)
        return path

    return folder


@pytest.fixture(autouse=True, scope="session")
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Which code a user has agreed to is kept in the user's home: not by tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True, scope="module")
def small_heap() -> None:
    """What earlier modules left stays; the garbage collector, which loading a model calls, need not walk it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def methods() -> dict[str, dict]:
    """Worked examples of the literature's methods by name: `inputs` and the `expected` numbers of each."""
    return json.loads((GOLDEN / "methods.json").read_text())


@pytest.fixture(params=sorted(path.name for path in GOLDEN.glob("*.npz")))
def golden(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / request.param) as data:
        return dict(data)


class ToyModel(FlowModel):
    """A two-layer network on 6 latents; prompts are "low" (wants -1) and "high" (wants +1)."""

    latent_shape = (6,)

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.module = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 6))
        for parameter in self.module.parameters():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)

    def encode(self, prompts: Sequence[str], images: Sequence[Path] = ()) -> Conditioning:
        embeds = torch.tensor([[[-1.0 if p == "low" else 1.0]] for p in prompts])
        return Conditioning(embeds, embeds[:, 0], torch.zeros_like(embeds), torch.zeros_like(embeds[:, 0]))

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        inputs = torch.cat([latents, sigma[:, None], conditioning.prompt_embeds[:, 0]], dim=1)
        return self.module(inputs) + latents

    def decode(self, latents: Tensor) -> Tensor:
        return torch.sigmoid(latents.float()).view(-1, 1, 2, 3)

    def own_prompts(self) -> list[str]:
        return ["low", "high"]


def load(device: torch.device, setup: ModelSetup) -> ToyModel:
    return ToyModel()


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    sign = torch.tensor([-1.0 if p == "low" else 1.0 for p in prompts])
    return sign * (images.flatten(1).mean(1) - 0.5)


def constant(images: Tensor, prompts: list[str]) -> Tensor:
    return torch.full((len(images),), 0.25)


class ToyJudge:
    def correct(self, images: Tensor, prompts: list[str]) -> Tensor:
        return brightness(images, prompts) > 0


@pytest.fixture
def toy_module(monkeypatch: pytest.MonkeyPatch) -> str:
    """The toy job under an importable name."""
    import sys

    monkeypatch.setitem(sys.modules, "toy_job", sys.modules[ToyModel.__module__])
    return "toy_job"


@pytest.fixture
def toy_recipe(toy_module: str) -> Callable[..., Recipe]:
    """Makes small recipes for the toy job; keywords replace fields, those of `Machine` in the machine."""
    task = Task(
        model=f"{toy_module}:load",
        rewards=(RewardTerm(function=f"{toy_module}:brightness"),),
        judge=f"{toy_module}:ToyJudge",
        num_eval_samples=16,
        eval_every=2,
    )
    recipe = Recipe(
        name="toy",
        sigmas=Sigmas(num_inference_steps=6, shift=1.0),
        dynamics=FlowSDE(noise_level=0.7),
        topology=Independent(at=FrozenWindow(size=3, start=1)),
        group_size=8,
        num_prompts=4,
        objective=PolicyGradient(trust=Clip(range=0.05)),
        optimizer=Optimizer(lr=3e-3),
        num_steps=4,
        machine=Machine(),
        data=Prompts(),
        task=task,
    )
    return lambda **changes: with_changes(recipe, **changes)


def with_changes(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with other fields; those of its machine are named without it."""
    machine = {name: changes.pop(name) for name in list(changes) if name in Machine.__dataclass_fields__}
    changes.setdefault("machine", recipe.machine)
    return replace(recipe, **{**changes, "machine": replace(changes["machine"], **machine)})
