"""What of a transformer is trained: low-rank adapters beside frozen weights, through peft, or all of it.

Adapters are saved in the file that diffusers' `load_lora_weights` and peft read: `transformer.<layer>.lora_A.weight`
and their configuration in the header.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowgrpo_fast.models.loading import one_line
from flowgrpo_fast.models.network import LoRA

ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # the name diffusers looks for
PEFT_FILE = "adapter_model.safetensors"  # the name peft looks for
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
    named = _trained(module)
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

    Values alone: the scale stays that of the module, which is the recipe's `LoRA.alpha`, whatever the file was trained
    with. `check_alpha` refuses where that must not be.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    saved = load_file(file)
    if not isinstance(module, nn.ModuleDict):
        saved = {key.removeprefix("transformer."): value for key, value in saved.items()}
    return _fitting(module, saved, str(file))


def check_alpha(module: nn.Module, file: Path) -> None:
    """Refuses an adapter that says another scale than this module's: its shapes would fit, its effect would not.

    Raises:
        ValueError: a file without a configuration where alpha is not the rank, as diffusers reads one; another
            alpha; an alpha or a rank of some layers' own; DoRA or a bias.
    """
    settings, described = _settings(file)
    for prefix, transformer in _transformers(module):
        own = transformer.peft_config[_NAME]
        settings_here = {
            key.removeprefix(f"{prefix}."): value
            for key, value in settings.items()
            if key.startswith(f"{prefix}.")
        }
        _check_scale(settings_here, own.r, own.lora_alpha, described)


def load_lora(pipe: Any, path: str | Path) -> None:
    """Puts a saved adapter beside every transformer of a diffusers pipeline that it was trained for.

    What `pipe.load_lora_weights` does, which knows one transformer at a time: of Wan 2.2's two it fills the first.

    Args:
        pipe: a diffusers pipeline, of the class that was trained.
        path: a checkpoint's folder, or a file of one, such as `average.safetensors`.

    Raises:
        ValueError: the file was trained for a transformer that the pipeline lacks.
    """
    file = Path(path)
    file = file / ADAPTER_FILE if file.is_dir() else file
    names = sorted({key.partition(".")[0] for key in load_file(file)})
    for name in names:
        if pipe.components.get(name) is None:
            raise ValueError(f"{str(file)!r} holds adapters for {name!r}, which {type(pipe).__name__} lacks")
    for name in names:
        getattr(pipe, name).load_lora_adapter(str(file.parent), prefix=name, weight_name=file.name)


def _check_scale(settings: dict[str, Any], rank: int, alpha: float, described: bool) -> None:
    """Of one transformer: `settings` is peft's configuration of its adapter, `described` whether there was one."""
    if not described:
        if alpha != rank:
            raise ValueError(
                f"it says no alpha, which diffusers reads as the rank; set LoRA.alpha to {rank}, not {alpha}"
            )
        return
    for name in ("use_dora", "lora_bias", "alpha_pattern", "rank_pattern"):
        if settings.get(name):
            raise ValueError(f"it was trained with {name} {settings[name]}, which LoRA does not have")
    theirs = settings.get("lora_alpha", alpha)
    if settings.get("use_rslora"):
        # alpha / sqrt(rank) instead of alpha / rank: the same scale under another alpha.
        same = theirs * math.sqrt(settings.get("r", rank))
        if not math.isclose(same, alpha, rel_tol=1e-6):
            raise ValueError(
                f"it was trained with alpha {theirs} and use_rslora; the same scale is LoRA.alpha={same!r}, "
                f"not {alpha}"
            )
    elif theirs != alpha:
        raise ValueError(f"it was trained with alpha {theirs}; LoRA.alpha is {alpha}")


def _settings(file: Path) -> tuple[dict[str, Any], bool]:
    """The configuration in a file's header, and whether there is one."""
    with safe_open(file, framework="pt") as handle:
        text = (handle.metadata() or {}).get(_METADATA)
    settings: dict[str, Any] = {} if text is None else json.loads(text)
    return settings, text is not None


def _start_from(transformer: Any, part: LoRA, prefix: str) -> None:
    try:
        saved, settings, described = _read(Path(part.path), prefix)
        values = _fitting(transformer, saved, part.path)
        _check_scale(settings, part.rank, part.alpha, described)
        beyond = sorted(set(saved) - {name.replace(f".{_NAME}.", ".") for name, _ in _trained(transformer)})
        if beyond:
            raise ValueError(
                f"it also holds {beyond[0]!r}{f' and {len(beyond) - 1} more' if beyond[1:] else ''}, which would be "
                "left out; name these layers in LoRA.targets, if they are the transformer's"
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"LoRA.path {part.path!r} is no adapter for these layers: {one_line(error)}"
        ) from error
    for (_, parameter), value in zip(_trained(transformer), values, strict=True):
        parameter.data.copy_(value)


def _read(path: Path, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any], bool]:
    """One transformer's adapter by the names of its own layers, its configuration, and whether it has one.

    A file that diffusers wrote, a folder with one, or peft's `adapter_model.safetensors` beside its configuration;
    of a family with two transformers, each has a folder of its name there.
    """
    if (path / PEFT_FILE).exists() or (path / prefix / PEFT_FILE).exists():
        path = path / prefix / PEFT_FILE if (path / prefix / PEFT_FILE).exists() else path / PEFT_FILE
    if path.name == PEFT_FILE:
        if prefix != "transformer" and path.parent.name != prefix:
            raise ValueError(f"it is one transformer's; put {prefix!r}'s in a folder of this name")
        config = path.with_name("adapter_config.json")
        settings = json.loads(config.read_text(encoding="utf-8"))
        tensors, own = load_file(path), "base_model.model."
        described = True
    else:
        file = path / ADAPTER_FILE if path.is_dir() else path
        tensors, own = load_file(file), f"{prefix}."
        everything, described = _settings(file)
        settings = {key.removeprefix(own): value for key, value in everything.items() if key.startswith(own)}
        tensors = {
            key: value
            for key, value in tensors.items()
            if key.startswith(own) or not key.startswith(("transformer.", "transformer_2."))
        }
    saved = {key.removeprefix(own): value for key, value in tensors.items()}
    return saved, settings, described


def _fitting(module: nn.Module, saved: dict[str, Tensor], source: str) -> list[Tensor]:
    """The values of the trained parameters, in their order, by the names of `_saved_name` without a prefix."""
    values = []
    for name, parameter in _trained(module):
        key = name.replace(f".{_NAME}.", ".")
        if key not in saved or saved[key].shape != parameter.shape:
            have = list(saved[key].shape) if key in saved else "nothing"
            raise ValueError(
                f"{source!r} holds {have} for {key!r}; this adapter needs {list(parameter.shape)}"
            )
        values.append(saved[key].to(parameter.device, parameter.dtype))
    return values


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


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
