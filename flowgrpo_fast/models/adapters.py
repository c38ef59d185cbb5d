"""What of a transformer is trained: low-rank adapters beside frozen weights, through peft, or all of it.

Adapters are saved in the file that diffusers' `load_lora_weights` and peft read: `transformer.<layer>.lora_A.weight`
and their configuration in the header.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowgrpo_fast.models.loading import one_line
from flowgrpo_fast.models.network import LoRA

ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # the name diffusers looks for
_NAME = "default"  # of the one adapter, inside peft
_METADATA = "lora_adapter_metadata"  # where diffusers keeps an adapter's configuration


def add_lora(transformer: Any, part: LoRA, family_targets: Sequence[str], seed: int, prefix: str) -> None:
    """Freezes a transformer and puts fp32 adapters beside its layers, fresh ones or those of `part.path`.

    A fresh adapter's second matrix is 0: the model is at first what it was. The first is drawn from `seed` alone.

    Raises:
        ValueError: targets that match no layer, or a file that is no adapter of this transformer.
    """
    targets = _targets(transformer, part, family_targets)
    transformer.requires_grad_(False)
    config = LoraConfig(
        r=part.rank,
        lora_alpha=part.alpha,  # type: ignore[arg-type]  # a float is fine
        init_lora_weights="gaussian",
        target_modules=targets,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformer.add_adapter(config, _NAME)
    except ValueError as error:
        raise ValueError(f"LoRA.targets {tuple(targets)}: {one_line(error)}") from error
    for layer in adapter_layers(transformer):
        layer.cast_input_dtype_enabled = False  # autocast casts; peft would go through fp32 first
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if part.path:
        _start_from(transformer, part, prefix)


def has_adapter(module: nn.Module) -> bool:
    """Whether low-rank adapters are what is trained."""
    return any(isinstance(layer, BaseTunerLayer) for layer in module.modules())


@contextmanager
def adapters_off(module: nn.Module, layers: Sequence[Any] | None = None) -> Iterator[None]:
    """The module without its adapters, inside; a flag per layer, no weight moves and no gradient setting changes.

    Args:
        layers: the module's `adapter_layers`, for who asks often: to find them is a walk through the whole tree.
    """
    layers = adapter_layers(module) if layers is None else layers
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer._disable_adapters = flag


def save_adapter(module: nn.Module, file: Path, values: Sequence[Tensor] | None = None) -> None:
    """Writes the adapters of every transformer in `module`; `values` replace the trained parameters, in order."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    kept = values if values is not None else [parameter for _, parameter in named]
    tensors = {
        _saved_name(module, name): value.detach().cpu().contiguous()
        for (name, _), value in zip(named, kept, strict=True)
    }
    settings = {
        f"{prefix}.{key}": sorted(value) if isinstance(value, set) else value
        for prefix, transformer in _transformers(module)
        for key, value in transformer.peft_config[_NAME].to_dict().items()
    }
    metadata = {"format": "pt", _METADATA: json.dumps(settings, indent=2, sort_keys=True, default=str)}
    save_file(tensors, file, metadata=metadata)


def load_adapter(module: nn.Module, file: Path) -> list[Tensor]:
    """Values of the trained parameters, in their order, from what `save_adapter` wrote; nothing is changed.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    saved = load_file(file)
    values = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        key = _saved_name(module, name)
        if key not in saved or saved[key].shape != parameter.shape:
            have = list(saved[key].shape) if key in saved else "nothing"
            raise ValueError(
                f"{str(file)!r} holds {have} for {key!r}; this adapter needs {list(parameter.shape)}"
            )
        values.append(saved[key].to(parameter.device, parameter.dtype))
    return values


def check_alpha(module: nn.Module, file: Path) -> None:
    """Refuses an adapter whose configuration has another scale: its shapes would fit, its effect would not.

    Raises:
        ValueError: it was trained with another alpha.
    """
    with safe_open(file, framework="pt") as handle:
        settings = json.loads((handle.metadata() or {}).get(_METADATA, "{}"))
    for prefix, transformer in _transformers(module):
        own = transformer.peft_config[_NAME].lora_alpha
        alpha = settings.get(f"{prefix}.lora_alpha", own)
        if alpha != own:
            raise ValueError(f"it was trained with alpha {alpha}; LoRA.alpha is {own}")


def _start_from(transformer: Any, part: LoRA, prefix: str) -> None:
    file = Path(part.path)
    file = file / ADAPTER_FILE if file.is_dir() else file
    try:
        with safe_open(file, framework="pt") as handle:
            settings = json.loads((handle.metadata() or {}).get(_METADATA, "{}"))
        values = _prefixed_values(transformer, file, prefix)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"LoRA.path {part.path!r} is no adapter for these layers: {one_line(error)}"
        ) from error
    alpha = settings.get(f"{prefix}.lora_alpha", part.alpha)
    if alpha != part.alpha:
        raise ValueError(
            f"LoRA.path {part.path!r} was trained with alpha {alpha}; LoRA.alpha is {part.alpha}"
        )
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for parameter, value in zip(trained, values, strict=True):
        parameter.data.copy_(value)


def _prefixed_values(transformer: nn.Module, file: Path, prefix: str) -> list[Tensor]:
    return load_adapter(nn.ModuleDict({prefix: transformer}), file)


def _targets(transformer: nn.Module, part: LoRA, family_targets: Sequence[str]) -> list[str]:
    """The recipe's targets, each of which must match a layer, or the family's own."""
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in part.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = sorted({name.rpartition(".")[2] for name in names} | {_last_two(name) for name in names})
            near = difflib.get_close_matches(target, ends, n=1, cutoff=0.0)
            raise ValueError(
                f"LoRA.targets names {target!r}, which ends the name of no linear layer of "
                f"{type(transformer).__name__}; did you mean {near[0]!r}?"
            )
    return list(part.targets or family_targets)


def _last_two(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _transformers(module: nn.Module) -> list[tuple[str, Any]]:
    """Name and module of each transformer: a family with two holds them in a ModuleDict."""
    return list(module.items()) if isinstance(module, nn.ModuleDict) else [("transformer", module)]


def _saved_name(module: nn.Module, name: str) -> str:
    name = name.replace(f".{_NAME}.", ".")
    return name if isinstance(module, nn.ModuleDict) else f"transformer.{name}"


def adapter_layers(module: nn.Module) -> list[Any]:
    """Those that hold an adapter."""
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
