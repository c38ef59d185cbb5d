"""What must hold for a precision to run on a device, and for small updates to count."""

from __future__ import annotations

import torch
from torch import nn


def check_training_precision(precision: str, device: torch.device) -> None:
    """Refuses bf16 on a GPU without it, where it would be emulated.

    Raises:
        ValueError: names the GPU and the remedy.
    """
    if precision != "bf16" or device.type != "cuda":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"Machine.precision is 'bf16', which {torch.cuda.get_device_name(device)} lacks; "
            "set machine.precision=fp32, or use an Ampere GPU or a later one"
        )


def check_masters(module: nn.Module) -> None:
    """Refuses trained parameters below fp32: an update of 1e-5 would round away. Matrix products may still be bf16.

    Raises:
        ValueError: names the first such parameter.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is trained in {str(parameter.dtype).removeprefix('torch.')}; trained parameters must be "
                "float32 (precision='bf16' runs their matrix products in bf16 all the same)"
            )
