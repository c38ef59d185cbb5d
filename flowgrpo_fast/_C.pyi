from collections.abc import Sequence
from typing import Any

from torch import Tensor

def flow_step(
    transition: tuple[Any, ...],
    seed: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    num_threads: int,
) -> None: ...
def flow_log_prob(
    transition: tuple[Any, ...],
    next_latents: Tensor,
    outputs: tuple[Tensor, Tensor | None],
    extras: tuple[Any, ...],
    num_threads: int,
) -> None: ...
def flow_log_prob_backward(
    transition: tuple[Any, ...],
    next_latents: Tensor,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    extras: tuple[Any, ...],
    num_threads: int,
) -> None: ...
def preview(
    transition: tuple[Any, ...], shape: Sequence[int], pool: Sequence[int], pooled: Tensor, num_threads: int
) -> None: ...
def gram(pooled: Tensor, centred: Tensor, gram: Tensor, num_threads: int) -> None: ...
def philox(seed: Tensor, step: int | Tensor, stream: int, out: Tensor, num_threads: int) -> None: ...
def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def normal_pair(radius_word: int, angle_word: int) -> list[float]: ...
def quantize_fp8_rows(matrix: tuple[Any, ...], codes: Tensor, scale: Tensor, num_threads: int) -> None: ...
def quantize_nvfp4(
    matrix: tuple[Any, ...],
    outputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    is_static: bool,
    swizzle: bool,
    num_threads: int,
) -> None: ...
def dequantize_fp8_rows(codes: Tensor, scale: Tensor, out: Tensor, num_threads: int) -> None: ...
def dequantize_nvfp4(
    quantized: tuple[Tensor, Tensor, Tensor], out: Tensor, swizzle: bool, num_threads: int
) -> None: ...
def build_info() -> dict[str, Any]: ...
def group_advantages(
    rewards: Tensor,
    group_id: Tensor,
    options: Sequence[Any],
    advantages: Tensor,
    workspaces: tuple[Tensor | None, Tensor | None],
    num_threads: int,
) -> None: ...
def best_variance_subset(rewards: Tensor, size: int, indices: Tensor, num_threads: int) -> None: ...
def top_bottom(rewards: Tensor, num_top: int, num_bottom: int, indices: Tensor, num_threads: int) -> None: ...
def pareto_fronts(objectives: Tensor, fronts: Tensor, num_threads: int) -> None: ...
def compact(
    indices: Tensor, buffers: tuple[Tensor, ...], out: tuple[Tensor, ...], num_threads: int
) -> None: ...
def matching(
    inputs: tuple[Any, ...],
    beta: float | None,
    means: tuple[Tensor, ...],
    workspace: Tensor | None,
    num_threads: int,
) -> None: ...
def matching_backward(
    inputs: tuple[Any, ...],
    beta: float | None,
    grads: tuple[Tensor | None, ...],
    grad_velocity: Tensor,
    num_threads: int,
) -> None: ...
def weight_place(element: int, shared: int, inner: int) -> int: ...
