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
def build_info() -> dict[str, Any]: ...
