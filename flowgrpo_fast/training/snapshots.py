"""The model as it was at the start, and its moving average: no second copy of weights that never change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from flowgrpo_fast.models.adapters import (
    ADAPTER_FILE,
    adapter_layers,
    adapters_off,
    check_alpha,
    has_adapter,
    load_adapter,
)
from flowgrpo_fast.models.loading import one_line
from flowgrpo_fast.types import Conditioning, FlowModel, PromptRows


class View(FlowModel):
    """A model that is another one, except for what `changed` does to its weights during a velocity."""

    def __init__(self, model: FlowModel) -> None:
        self.model = model
        self.latent_shape, self.module = model.latent_shape, model.module
        self.latent_grid, self.image_seq_len = model.latent_grid, model.image_seq_len
        self.sensitive, self.takes_images = model.sensitive, model.takes_images
        self.mixes_guidance = model.mixes_guidance
        self._experts: dict[FlowModel, FlowModel] = {}  # by the model that each looks at, one each

    @property
    def transformer(self) -> nn.Module:
        """The model's own."""
        return self.model.transformer

    def guided(self, velocity: Tensor, negative: Tensor, scale: float) -> Tensor:
        """As the model."""
        return self.model.guided(velocity, negative, scale)

    def expert(self, sigma: Tensor) -> FlowModel:
        """The same view of what the model runs at `sigma`."""
        inner = self.model.expert(sigma)
        if inner not in self._experts:
            self._experts[inner] = self if inner is self.model else self._over(inner)
        return self._experts[inner]

    def _over(self, inner: FlowModel) -> FlowModel:
        raise AssertionError

    def changed(self) -> AbstractContextManager[None]:
        """The model's module holds the other weights, inside."""
        raise AssertionError

    def encode(self, prompts: Sequence[str], images: Sequence[Path] = ()) -> Conditioning:
        """As the model: text encoders are not trained."""
        return self.model.encode(prompts, images)

    def own_prompts(self) -> list[str]:
        """As the model."""
        return self.model.own_prompts()

    def prompt_rows(self, prompts: Sequence[str], images: Sequence[Path] = ()) -> PromptRows:
        """As the model."""
        return self.model.prompt_rows(prompts, images)

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """As the model under the changed weights, without gradient."""
        with torch.no_grad(), self.changed():
            return self.model.velocity(latents, sigma, conditioning)

    def decode(self, latents: Tensor) -> Tensor:
        """As the model: the autoencoder is not trained."""
        return self.model.decode(latents)

    def decode_with_grad(self, latents: Tensor) -> Tensor:
        """As the model."""
        return self.model.decode_with_grad(latents)


class Snapshot(View):
    """Shares the model's frozen weights and holds its own values of the trained ones.

    They are swapped in for each velocity and out again, whatever happens in between: two pointers a parameter, no
    copy. Optimiser and gradients keep seeing the model's own parameters.
    """

    def __init__(self, model: FlowModel) -> None:
        super().__init__(model)
        self.parameters = trained_parameters(model.module)
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model's module holds this snapshot's weights, inside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def changed(self) -> AbstractContextManager[None]:
        """As of `View`."""
        return self.swapped_in()

    def _over(self, inner: FlowModel) -> FlowModel:
        return Through(self, inner)

    def average(self, decay: float) -> None:
        """Moves the values towards the model's: `decay * values + (1 - decay) * parameters`."""
        with torch.no_grad():
            get_ema_multi_avg_fn(decay)(self.values, [p.detach() for p in self.parameters], 0)

    def load(self, values: Sequence[Tensor]) -> None:
        """Takes over values, in place.

        Raises:
            ValueError: not one of each parameter's shape.
        """
        shapes = [[tuple(t.shape) for t in tensors] for tensors in (values, self.values)]
        if shapes[0] != shapes[1]:
            raise ValueError("the snapshot's tensors are not those of the trained parameters")
        for own, value in zip(self.values, values, strict=True):
            own.copy_(value)

    def _swap(self) -> None:
        for index, parameter in enumerate(self.parameters):
            parameter.data, self.values[index] = self.values[index], parameter.data


class Through(View):
    """A snapshot's weights seen through another model that shares the trained parameters."""

    def __init__(self, snapshot: View, model: FlowModel) -> None:
        super().__init__(model)
        self.snapshot = snapshot

    def _over(self, inner: FlowModel) -> FlowModel:
        return Through(self.snapshot, inner)

    def changed(self) -> AbstractContextManager[None]:
        """As of `View`."""
        return self.snapshot.changed()


class WithoutAdapter(View):
    """An adapted model with its adapters off: the start of a LoRA run, for no memory at all."""

    def __init__(self, model: FlowModel) -> None:
        super().__init__(model)
        self._layers = adapter_layers(model.module)

    def _over(self, inner: FlowModel) -> FlowModel:
        return WithoutAdapter(inner)

    def changed(self) -> AbstractContextManager[None]:
        """As of `View`."""
        return adapters_off(self.model.module, self._layers)


def load_weights(snapshot: Snapshot, path: str) -> None:
    """Weights of the same kind from elsewhere: a run, a checkpoint folder, an adapter or a safetensors file.

    Raises:
        ValueError: nothing there, or another model's.
    """
    folder = Path(path)
    if not folder.exists():
        raise ValueError(f"Loaded.path is {path!r}; there is no such file or folder")
    module = snapshot.module
    name = ADAPTER_FILE if has_adapter(module) else "model.safetensors"
    file = folder / name if folder.is_dir() else folder
    try:
        if has_adapter(module):
            check_alpha(module, file)
            snapshot.load(load_adapter(module, file))
            return
        saved = load_file(file)
        names = [n for n, parameter in module.named_parameters() if parameter.requires_grad]
        snapshot.load([saved[n] for n in names])
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"Loaded.path {path!r} does not hold weights of this model: {one_line(error)}"
        ) from error


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those with gradient, in the module's order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
