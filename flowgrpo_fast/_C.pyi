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
    outputs: tuple[Tensor, Tensor | None, Tensor | None],
    num_threads: int,
) -> None: ...
def flow_log_prob_backward(
    transition: tuple[Any, ...],
    next_latents: Tensor,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    num_threads: int,
) -> None: ...
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
