"""The linear layers of a transformer, and the LoRA adapters that peft wraps around them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from flowgrpo_fast.precision.formats import Lora

if TYPE_CHECKING:  # peft takes seconds to import; only a run in low precision does
    from peft.tuners.tuners_utils import BaseTunerLayer

MAX_RANK = 256  # of `merge_lora_quantize_`


class Layer(NamedTuple):
    """A linear layer where it stands."""

    name: str  # in the transformer; an adapter's wrapper has the name of the layer it wraps
    linear: nn.Linear
    wrapper: BaseTunerLayer | None

    @property
    def is_trained(self) -> bool:
        """Whether its own weight or bias is; an adapter's weights are not its own."""
        return any(parameter.requires_grad for parameter in self.linear.parameters())


def linear_layers(module: nn.Module, prefix: str = "") -> Iterator[Layer]:
    """Every `nn.Linear`, and every adapter around one, in order; adapters around anything else are passed over."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for child_name, child in module.named_children():
        name = f"{prefix}{child_name}"
        if isinstance(child, BaseTunerLayer):
            base = child.get_base_layer()
            if type(base) is nn.Linear:
                yield Layer(name, base, child)
        elif type(child) is nn.Linear:  # a subclass may hand its weight to code that multiplies by itself
            yield Layer(name, child, None)
        else:
            yield from linear_layers(child, f"{name}.")


def check_adapter(layer: Layer) -> None:
    """Refuses an adapter that is more than `scale * (b @ a)` beside its layer.

    Raises:
        ValueError: DoRA or another variant, another kind of adapter, a trained bias, one already merged, or a rank
            above 256.
    """
    wrapper = layer.wrapper
    if wrapper is None:
        return
    found = _unknown(wrapper)
    if found:
        raise ValueError(
            f"rollout_precision: {layer.name} carries {found}; low precision knows plain LoRA alone. "
            "Use mode='bare_layers', which leaves adapters as they are, or train a plain LoRA"
        )


def _unknown(wrapper: BaseTunerLayer) -> str:
    from peft.tuners.lora import Linear as LoraLinear

    if type(wrapper) is not LoraLinear:
        return f"an adapter of type {type(wrapper).__module__}.{type(wrapper).__name__}"
    if wrapper.merged:
        return f"adapters already merged into the weight ({', '.join(wrapper.merged_adapters)})"
    for name in wrapper.lora_A:
        if name in wrapper.lora_variant:
            return f"the LoRA variant {type(wrapper.lora_variant[name]).__name__}"
        if wrapper.lora_bias[name]:
            return "a LoRA with a bias of its own (lora_bias)"
    rank = sum(wrapper.r[name] for name in wrapper.active_adapters if name in wrapper.lora_A)
    return f"LoRA adapters of rank {rank} together, above {MAX_RANK}," if rank > MAX_RANK else ""


def active_lora(wrapper: Any) -> Lora | None:
    """The update of a LoRA layer's active adapters; several stand side by side in one, their scales in `b`."""
    if wrapper is None or wrapper.disable_adapters:
        return None
    parts = [
        Lora(wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.scaling[name])
        for name in wrapper.active_adapters
        if name in wrapper.lora_A
    ]
    if len(parts) < 2:
        return parts[0] if parts else None
    a = torch.cat([part.a.float() for part in parts])
    b = torch.cat([part.scale * part.b.float() for part in parts], dim=1)
    return Lora(a, b, 1.0)
