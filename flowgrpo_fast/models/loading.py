"""From names to models: `task.model` to its loader, `Network.path` to the parts of a diffusers pipeline.

What cannot be one is refused in one clear line.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import nn

from flowgrpo_fast.models.network import ModelSetup
from flowgrpo_fast.names import resolve
from flowgrpo_fast.types import FlowModel


def load_model(name: str, device: torch.device, setup: ModelSetup) -> FlowModel:
    """The model that a task names: what its loader, `load(device, setup) -> FlowModel`, makes.

    Args:
        name: `sd3` is `flowgrpo_fast.models.sd3:load`; `package.module:function` is taken as it stands.

    Raises:
        ValueError: a name that does not resolve, a loader that does not take two arguments, or one that made no
            `FlowModel`, or one with a part missing or of the wrong kind.
    """
    loader = resolve(name if ":" in name else f"flowgrpo_fast.models.{name}:load")
    if not callable(loader):
        raise ValueError(f"{name!r} is a {type(loader).__name__}; a loader is a function load(device, setup)")
    _check_arguments(name, loader, device, setup)
    model = loader(device, setup)
    needed = ("latent_shape", "module", "encode", "velocity", "decode")
    missing = [f"{part!r}" for part in needed if not hasattr(model, part)]
    if missing or not isinstance(model, FlowModel):
        lacks = f"; it lacks {', '.join(missing)}" if missing else ""
        raise ValueError(
            f"{name!r} made a {type(model).__name__}; a loader returns a model whose class is a subclass of "
            f"flowgrpo_fast.types.FlowModel{lacks}"
        )
    if not isinstance(model, Hashable):
        raise ValueError(
            f"{name!r} made a {type(model).__name__} that compares by its values; models are told apart by "
            "identity: declare it with @dataclass(eq=False)"
        )
    _check_parts(name, model)
    return model


def _check_arguments(name: str, loader: Callable[..., Any], *given: object) -> None:
    """Refuses a loader that cannot be called as one; a TypeError from inside of it stays its own."""
    try:
        signature = inspect.signature(loader)
    except (TypeError, ValueError):
        return  # one that cannot say what it takes
    try:
        signature.bind(*given)
    except TypeError as error:
        raise ValueError(
            f"{name!r} takes {signature}: {error}; a loader "
            "is called with two arguments: declare it as load(device, setup)"
        ) from None


def _check_parts(name: str, model: FlowModel) -> None:
    """Refuses what a model's author gets wrong, before a run finds out in its middle."""
    shape, patterns = model.latent_shape, model.sensitive
    of_sizes = isinstance(shape, tuple) and all(isinstance(size, int) and size > 0 for size in shape)
    length, grid = model.image_seq_len, model.latent_grid
    of_names = isinstance(patterns, tuple) and all(isinstance(pattern, str) for pattern in patterns)
    of_grid = isinstance(grid, tuple) and all(isinstance(size, int) and size > 0 for size in grid)
    methods = ("encode", "velocity", "decode", "decode_with_grad", "guided", "expert", "own_prompts")
    checks = [
        (bool(shape) and of_sizes, "latent_shape", "a tuple of sizes above 0, without the batch"),
        (isinstance(model.module, nn.Module), "module", "a torch.nn.Module, what is trained"),
        (isinstance(model.transformer, nn.Module), "transformer", "a torch.nn.Module, a part of module"),
        (
            length is None or (isinstance(length, int) and length > 0),
            "image_seq_len",
            "a number of tokens or None",
        ),
        (grid is None or of_grid, "latent_grid", "a tuple of sizes above 0, or None"),
        (of_names, "sensitive", "a tuple of regular expressions"),
        (isinstance(model.takes_images, bool), "takes_images", "True or False"),
        (isinstance(model.mixes_guidance, bool), "mixes_guidance", "True or False"),
        *((callable(getattr(model, method)), method, "a method") for method in methods),
    ]
    for fits, part, wanted in checks:
        if not fits:
            raise ValueError(
                f"{name!r} made a {type(model).__name__} whose {part} is {_named(getattr(model, part))}; "
                f"it must be {wanted}"
            )
    undefined = [
        f"{method!r}"
        for method in ("encode", "velocity", "decode")
        if getattr(model, method) == MethodType(getattr(FlowModel, method), model)
    ]
    if undefined:
        raise ValueError(
            f"{name!r} made a {type(model).__name__} that does not define {', '.join(undefined)}; a FlowModel defines "
            "encode, velocity and decode"
        )


def pipeline_folder(path: str, wanted: type, family: str) -> Path:
    """The local folder of a pipeline of class `wanted`; a name on the hub is downloaded, or found in its cache.

    Raises:
        ValueError: nothing there, no pipeline, another family's, or a part of it is missing.
    """
    if not path:
        raise ValueError(
            f"Network.path is empty; {family} needs a {wanted.__name__}: a folder, or a name on the hub"
        )
    folder = Path(path)
    if not folder.exists():
        folder = _download(path)
    index = _read_index(folder)
    found = index.get("_class_name")
    if found != wanted.__name__:
        raise ValueError(
            f"Network.path {path!r} holds a {found}; task.model {family!r} takes a {wanted.__name__}"
        )
    missing = [name for name in _parts(index) if not (folder / name).is_dir()]
    if missing:
        raise ValueError(
            f"Network.path {path!r} lacks {', '.join(f'{name}/' for name in missing)}, which its "
            "model_index.json names; download the whole pipeline"
        )
    return folder


def load_parts(
    folder: Path, pipeline: type[Any], leave_out: Sequence[str], dtypes: dict[str, torch.dtype]
) -> Any:
    """The pipeline on the CPU without the parts of `leave_out`; `dtypes` by part, `"default"` for the rest.

    Raises:
        ValueError: a part cannot be read, in one line.
    """
    index = _read_index(folder)
    empty = {name for name, value in index.items() if isinstance(value, list) and value[0] is None}
    without = dict.fromkeys(empty | {name for name in leave_out if name in index})
    try:
        # The new name, `dtype`, means nothing to the oldest diffusers we take.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
            return pipeline.from_pretrained(str(folder), torch_dtype=dtypes, **without)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ValueError(f"Network.path {str(folder)!r} cannot be loaded: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The first line of what a library said."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _named(value: object) -> str:
    """A value in one short line; of a module or a tensor its type."""
    return type(value).__name__ if isinstance(value, nn.Module | torch.Tensor) else repr(value)[:80]


def freeze(module: nn.Module) -> None:
    """No gradient, and no dropout."""
    module.requires_grad_(False).eval()


def _download(path: str) -> Path:
    try:
        return Path(DiffusionPipeline.download(path))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Network.path {path!r} is neither a folder nor a pipeline that the hub gives: {one_line(error)}"
        ) from error


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no JSON, or no text
        index = None
    if not isinstance(index, dict):
        raise ValueError(
            f"Network.path {str(folder)!r} holds no readable model_index.json; it is not a diffusers pipeline"
        )
    return index


def _parts(index: dict[str, Any]) -> list[str]:
    """Names of the folders a pipeline is made of."""
    return [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
