"""A linear layer whose weight is stored in low precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flowgrpo_fast.precision.formats import Format, Lora, Stored


class QuantizedLinear(nn.Module):
    """`x @ weight.T + bias` with the weight in eight or four bits and activations quantised on the way in.

    The bias is the source's own parameter. The weight is derived, not learned: it is no parameter and in no state
    dict. A gradient passes to `x` alone, through the dequantised weight; the rounding of `x` counts as the identity.
    Results have x's dtype, or autocast's.
    """

    codes: Tensor
    scale: Tensor
    global_scale: Tensor

    def __init__(self, source: nn.Linear, form: Format) -> None:
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        self.form = form
        self.bias = source.bias
        stored = form.empty(self.out_features, self.in_features, source.weight.device)
        for name, value in stored._asdict().items():
            self.register_buffer(name, value, persistent=False)
        # Asked once: a compiled forward cannot ask the driver.
        self.native = form.is_native(source.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """As every module; another device may have other formats."""
        super()._apply(fn, recurse)
        self.native = self.form.is_native(self.codes.device)
        return self

    @property
    def stored(self) -> Stored:
        """The weight's bytes, same tensors for the life of the layer."""
        return Stored(self.codes, self.scale, self.global_scale)

    @torch.no_grad()
    def write_(self, weight: Tensor, lora: Lora | None = None) -> None:
        """Quantises another weight `[N, K]` into the same memory."""
        with torch.autocast(weight.device.type, enabled=False):  # merging is fp32
            self.form.write_(self.stored, weight, lora)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[N, K]` as it acts."""
        return self.form.values(self.stored, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., N]` for `x [..., K]`."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        rows = x.reshape(-1, self.in_features).contiguous()
        stored = (self.codes, self.scale, self.global_scale)
        result: Tensor = _Multiply.apply(rows, *stored, self.bias, self.form, dtype, self.native)
        return result.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As nn.Linear, and the format."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.form.name}"


class _Multiply(torch.autograd.Function):
    """The product, and its gradient with respect to the activations."""

    @staticmethod
    def forward(
        x: Tensor,
        codes: Tensor,
        scale: Tensor,
        global_scale: Tensor,
        bias: Tensor | None,
        form: Format,
        dtype: torch.dtype,
        native: bool,
    ) -> Tensor:
        return form.multiply(x, Stored(codes, scale, global_scale), bias, dtype, native)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *stored, _, form, _, _ = inputs
        ctx.save_for_backward(*stored)
        ctx.form, ctx.x_dtype = form, x.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        weight = ctx.form.values(Stored(*ctx.saved_tensors), grad.dtype)
        return (grad @ weight).to(ctx.x_dtype), *[None] * 7
