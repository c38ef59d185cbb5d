"""Every op once: a call on small tensors, by name, so that a test can change each tensor of each op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowgrpo_fast import ops
from flowgrpo_fast.ops import Extras, Guidance


@dataclass(frozen=True)
class Op:
    """A call of named tensors."""

    name: str
    call: Callable[..., Any]
    tensors: dict[str, Tensor]

    def __call__(self, **changed: Tensor) -> list[Tensor]:
        """Everything that comes back, as one list."""
        return list(leaves(self.call(**self.tensors | changed)))


def leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from leaves(each)


def bits(tensors: list[Tensor]) -> list[list[int]]:
    """Shapes and bytes, so that NaN equals NaN and -0 is not 0."""
    return [
        [
            *t.shape,
            *t.detach()
            .resolve_conj()
            .resolve_neg()
            .contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .numpy()
            .tobytes(),
        ]
        for t in tensors
    ]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def trained(velocity: Tensor) -> Tensor:
    return velocity.detach().requires_grad_() if velocity.is_floating_point() else velocity


def _step(latents, velocity, negative, coeffs, step_index, seed, x0_prev):
    guidance = Guidance(negative, 3.0)
    return ops.flow_step(latents, velocity, coeffs, step_index, seed, guidance, x0_prev, return_x0_pred=True)


def _replay(latents, velocity, negative, next_latents, coeffs, step_index, x0_prev, reference, unconditional):
    extras = Extras(True, reference, unconditional, map_axis=1)
    guidance = Guidance(negative, 3.0)
    return ops.flow_log_prob(
        latents, velocity, next_latents, coeffs, step_index, guidance, x0_prev, extras=extras
    )


def _backward(latents, velocity, negative, next_latents, coeffs, step_index, grad):
    velocity, negative = trained(velocity), trained(negative)
    out = ops.flow_log_prob(
        latents, velocity, next_latents, coeffs, step_index, Guidance(negative, 3.0), extras=Extras(True)
    )
    return torch.autograd.grad(
        (out.log_prob, out.mean), (velocity, negative), (grad, torch.ones_like(out.mean))
    )


def _matching_backward(velocity, target, weight, grad):
    velocity = trained(velocity)
    return torch.autograd.grad(ops.matching(velocity, target, weight=weight).error, velocity, grad)


def _tensors() -> dict[str, Tensor]:
    shape = (2, 4, 4, 6)
    coeffs = _normal(5, 8).abs() + 0.25
    names = (
        "latents",
        "velocity",
        "negative",
        "next_latents",
        "x0_prev",
        "reference",
        "unconditional",
        "target",
        "old",
    )
    return {name: _normal(*shape, seed=k) for k, name in enumerate(names)} | {
        "coeffs": coeffs,
        "step_index": torch.tensor([1, 3]),
        "seed": torch.tensor([7, -9]),
        "weight": _normal(2, 1, 4, 6).abs(),
        "grad": _normal(2),
    }


def table() -> dict[str, Op]:
    """All ops, on new tensors."""
    t = _tensors()

    def op(name: str, call: Callable[..., Any], *names: str, **own: Tensor) -> Op:
        return Op(name, call, {each: t[each].clone() for each in names} | own)

    matrix = {"x": _normal(6, 32)}
    lora = {"weight": _normal(6, 32), "lora_a": _normal(3, 32), "lora_b": _normal(6, 3)}
    fp8, fp4 = ops.quantize_fp8_rows(matrix["x"]), ops.quantize_nvfp4(matrix["x"], swizzle=False)
    state = ("latents", "velocity", "negative")
    found = [
        op("flow_step", _step, *state, "coeffs", "step_index", "seed", "x0_prev"),
        op(
            "flow_log_prob",
            _replay,
            *state,
            "next_latents",
            "coeffs",
            "step_index",
            "x0_prev",
            "reference",
            "unconditional",
        ),
        op("flow_log_prob_backward", _backward, *state, "next_latents", "coeffs", "step_index", "grad"),
        op(
            "preview",
            lambda latents, velocity, coeffs, step_index: ops.preview(
                latents, velocity, coeffs, step_index, 2, group_size=2
            ),
            "latents",
            "velocity",
            "coeffs",
            "step_index",
        ),
        op(
            "matching",
            lambda velocity, target, old, reference, weight: ops.matching(
                velocity, target, old_velocity=old, reference_velocity=reference, weight=weight
            ),
            "velocity",
            "target",
            "old",
            "reference",
            "weight",
        ),
        op("matching_backward", _matching_backward, "velocity", "target", "weight", "grad"),
        op(
            "implicit_matching",
            lambda velocity, target, old, reference: ops.implicit_matching(
                velocity, target, old, 0.3, reference_velocity=reference
            ),
            "velocity",
            "target",
            "old",
            "reference",
        ),
        op(
            "philox_normal",
            lambda seed, step_index: ops.philox_normal(seed, (5,), step_index),
            "seed",
            "step_index",
            seed=torch.tensor([7, 9]),
        ),
        op("philox_uint32", lambda seed: ops.philox_uint32(seed, (5,)), "seed"),
        op(
            "group_advantages",
            lambda rewards, group_id: ops.group_advantages(rewards, group_id, 2, aggregate="gdpo"),
            rewards=_normal(6, 3),
            group_id=torch.tensor([0, 1, 0, 1, 1, 0]),
        ),
        op(
            "best_variance_subset",
            lambda rewards: ops.best_variance_subset(rewards, 3),
            rewards=_normal(2, 6),
        ),
        op("top_bottom", lambda rewards: ops.top_bottom(rewards, 2, 1), rewards=_normal(2, 6)),
        op("pareto_fronts", ops.pareto_fronts, objectives=_normal(2, 6, 3)),
        op(
            "compact",
            lambda indices, first, second: ops.compact(indices, first, second),
            indices=torch.tensor([2, 0]),
            first=_normal(3, 4),
            second=torch.arange(12).reshape(3, 2, 2),
        ),
        op("quantize_fp8_rows", ops.quantize_fp8_rows, **matrix),
        op("quantize_nvfp4", ops.quantize_nvfp4, **matrix),
        op("dequantize_fp8_rows", ops.dequantize_fp8_rows, codes=fp8.codes, scale=fp8.scale),
        op(
            "dequantize_nvfp4",
            lambda codes, scales, global_scale: ops.dequantize_nvfp4(
                codes, scales, global_scale, swizzle=False
            ),
            codes=fp4.codes,
            scales=fp4.scales,
            global_scale=fp4.global_scale,
        ),
        op(
            "merge_lora_quantize_ fp8",
            lambda weight, lora_a, lora_b: ops.merge_lora_quantize_(
                ops.quantize_fp8_rows(torch.zeros(6, 32, dtype=torch.float32)), weight, lora_a, lora_b, 0.5
            ),
            **lora,
        ),
        op(
            "merge_lora_quantize_ nvfp4",
            lambda weight, lora_a, lora_b: ops.merge_lora_quantize_(
                ops.quantize_nvfp4(torch.zeros(6, 32, dtype=torch.float32)), weight, lora_a, lora_b, 0.5
            ),
            **lora,
        ),
    ]
    return {each.name: each for each in found}
