"""The low-precision model beside the training model: which layers are quantised, and the refresh.

    merged        a copy, adapters merged into its weights, written again in place after every update
    bare_layers   a copy whose frozen layers without an adapter are quantised, once
    branch        a copy whose frozen layers are quantised, once; adapters stay beside them as they are
    shared_base   the training model itself, its frozen layers quantised, once: rollout and update run the same bits

Whatever a copy does not quantise is the training model's own memory, so that an update is in it at once.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from flowgrpo_fast.precision.adapters import Layer, active_lora, check_adapter, linear_layers
from flowgrpo_fast.precision.formats import FORMATS, Format
from flowgrpo_fast.precision.linear import QuantizedLinear
from flowgrpo_fast.types import FlowModel


@dataclass(frozen=True, slots=True)
class LowPrecisionModel:
    """What the steps without a log-prob run."""

    model: FlowModel  # in mode shared_base the training model itself
    merged: tuple[tuple[QuantizedLinear, Layer], ...]  # layers that follow a trained weight
    description: str  # one line: what is quantised, what is not and why

    @torch.no_grad()
    def refresh(self) -> None:
        """Merges from the master weights, into the same memory: captured graphs stay valid. Only `merged` needs it."""
        for quantized, source in self.merged:
            quantized.write_(source.linear.weight, active_lora(source.wrapper))


class Chosen(NamedTuple):
    """Which layers are quantised, by regular expressions."""

    only: tuple[str, ...]  # these alone, sensitive or not; () = all but the family's sensitive ones
    skip: tuple[str, ...]  # never these


def build_low_precision(
    model: FlowModel, form: Format, mode: str, choice: Chosen, emulate: bool
) -> LowPrecisionModel:
    """The low-precision model of a training model; arguments and errors as of `parts.LowPrecision`.

    The family says by `sensitive`, regular expressions searched for in layer names, what is never quantised, and by
    `transformer` where its layers are.
    """
    emulated = _check_device(form, next(model.module.parameters()).device, emulate)
    layers = list(linear_layers(model.transformer))
    _check_skip(choice.skip, layers)
    sensitive = choice.skip if choice.only else (*model.sensitive, *choice.skip)
    reasons = [_left_alone(layer, form, mode, Chosen(choice.only, sensitive)) for layer in layers]
    chosen = [layer for layer, reason in zip(layers, reasons, strict=True) if not reason]
    left = ", ".join(f"{count} {reason}" for reason, count in sorted(Counter(reasons).items()) if reason)
    if not chosen:
        raise ValueError(
            f"rollout_precision: no linear layer can run in {form.name} with mode={mode!r}: "
            f"of {len(layers)}, {left or 'none is there'}. Mode 'merged' takes trained layers and adapters"
        )
    if mode != "bare_layers":
        for layer in chosen:
            check_adapter(layer)
    target = model if mode == "shared_base" else sharing_copy(model)
    pairs = [(_quantize(target.transformer, layer, form, mode), layer) for layer in chosen]
    follows = tuple(pair for pair in pairs if mode == "merged" and (pair[1].wrapper or pair[1].is_trained))
    how = f"{form.name}{', emulated' if emulated else ''}, mode {mode}"
    description = f"{len(chosen)} of {len(layers)} linear layers in {how}{f' ({left})' if left else ''}"
    return LowPrecisionModel(target, follows, description)


def _check_device(form: Format, device: torch.device, emulate: bool) -> bool:
    """Whether the format is emulated there, which is said once."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"rollout_precision: there is no low precision on {device.type}; use a CPU or CUDA")
    if form.is_native(device):
        return False
    name = "a CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    able = [other.name for other in FORMATS.values() if other.is_native(device)]
    if not emulate:
        raise ValueError(
            f"rollout_precision.format is {form.name!r}, which {name} lacks (it has "
            f"{', '.join(able) or 'no low precision'}); emulate=true runs it dequantised, slower than bf16"
        )
    native = f"; native are {', '.join(able)}" if able else ""
    line = f"{form.name} is emulated on {name}: the numbers are right, but slower than bf16{native}"
    warnings.warn(line, RuntimeWarning, stacklevel=4)  # where the recipe's part was built
    return True


def _check_skip(skip: tuple[str, ...], layers: list[Layer]) -> None:
    for pattern in skip:
        try:
            matches = any(re.search(pattern, layer.name) for layer in layers)
        except re.error as error:
            raise ValueError(
                f"rollout_precision.skip has {pattern!r}, no regular expression: {error}"
            ) from None
        if not matches:
            raise ValueError(
                f"rollout_precision.skip has {pattern!r}, which is found in no linear layer's name"
            )


def _left_alone(layer: Layer, form: Format, mode: str, choice: Chosen) -> str:
    """Why a layer stays as it is; empty if it is quantised."""
    if choice.only and not any(re.search(pattern, layer.name) for pattern in choice.only):
        return "not in the published set"
    if any(re.search(pattern, layer.name) for pattern in choice.skip):
        return "sensitive"
    rows, columns = form.multiples
    if layer.linear.out_features % rows or layer.linear.in_features % columns:
        return f"not a multiple of {rows} x {columns}"
    if mode != "merged" and layer.is_trained:
        return "trained"
    if mode == "bare_layers" and layer.wrapper is not None:
        return "with an adapter"
    return ""


def _quantize(transformer: nn.Module, layer: Layer, form: Format, mode: str) -> QuantizedLinear:
    """Puts the quantised layer in the place of its source, or of its source within the adapter's wrapper."""
    quantized = QuantizedLinear(layer.linear, form)
    quantized.train(layer.linear.training)
    quantized.write_(layer.linear.weight, active_lora(layer.wrapper) if mode == "merged" else None)
    parent_name, _, name = layer.name.rpartition(".")
    parent = transformer.get_submodule(parent_name)
    if layer.wrapper is not None and mode != "merged":
        parent, name = parent.get_submodule(name), "base_layer"
    setattr(parent, name, quantized)
    return quantized


def sharing_copy(model: FlowModel) -> FlowModel:
    """A model with modules of its own and the tensors of the original; compiled modules are compiled again."""
    # deepcopy takes what it shall not copy by id: the tensors stay those of the original.
    memo = {id(tensor): tensor for tensor in (*model.module.parameters(), *model.module.buffers())}
    module = copy.deepcopy(model.module, memo)
    twins = dict(zip(model.module.modules(), module.modules(), strict=True))
    twin = copy.copy(model)
    slots = (name for kind in type(model).__mro__ for name in vars(kind).get("__slots__", ()))
    for name in (*vars(model), *slots):
        value = getattr(model, name)
        if isinstance(value, nn.Module) and value in twins:
            object.__setattr__(twin, name, twins[value])  # a model may be frozen
    for original, other in twins.items():
        if original._compiled_call_impl is not None:
            other.compile(dynamic=False)
    return twin
