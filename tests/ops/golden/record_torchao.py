"""Records torchao's codes and scales in ``torchao.npz``, which `test_low_precision.py` compares with; nothing is needed
to run that. To record it again, with torchao 0.18 on a CPU:

    pip install torchao==0.18.0
    python tests/ops/golden/record_torchao.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchao
from torch import Tensor
from torchao.prototype.mx_formats import nvfp4_tensor
from torchao.quantization import Float8Tensor, PerRow

FILE = Path(__file__).with_name("torchao.npz")
BLOCK = 16


def inputs() -> Iterator[tuple[str, Tensor]]:
    """Matrices in bfloat16, and in float32 with more bits than that has."""
    generator = torch.Generator().manual_seed(2)
    ties = torch.randint(-48, 49, (64, 256), generator=generator) / 8
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    patterns = patterns[patterns.isfinite()]
    patterns = patterns[torch.randperm(len(patterns), generator=generator)][: 64 * 256].view(64, 256)
    yield "random", torch.randn(64, 256, generator=generator).bfloat16()
    yield "ties", ties.bfloat16()
    yield "tiny", (1e-30 * ties).bfloat16()
    yield "patterns", patterns
    yield "huge", (3e38 * torch.rand(8, 64, generator=generator)).bfloat16()
    spread = torch.logspace(-3, 3, 256)
    yield (
        "float32",
        spread[torch.randperm(256, generator=generator)] * torch.randn(32, 256, generator=generator),
    )
    beside = torch.randint(-2, 3, (32, 256), generator=generator, dtype=torch.int32)  # steps away from a tie
    yield (
        "float32 ties",
        (ties[:32].where(ties[:32] != 0, 0.25).view(torch.int32) + beside).view(torch.float32),
    )


def recorded(x: Tensor) -> dict[str, Any]:
    """What torchao makes of a matrix: NVFP4 with the scale of its amax, and FP8 rows."""
    global_scale = nvfp4_tensor.per_tensor_amax_to_scale(x.float().abs().max())
    scales, codes = nvfp4_tensor.nvfp4_quantize(x, BLOCK, global_scale)
    rows = Float8Tensor.from_hp(x.float(), granularity=PerRow())
    return {
        "x": x.view(torch.int16 if x.dtype is torch.bfloat16 else torch.int32).numpy(),
        "global_scale": global_scale.numpy(),
        "scales": scales.view(torch.uint8).numpy(),
        "codes": codes.view(torch.uint8).numpy(),
        "fp8": rows.qdata.view(torch.uint8).numpy(),
        "fp8_scale": rows.scale.numpy(),
    }


def main() -> None:
    arrays = {"torchao": np.array(torchao.__version__)}
    for name, x in inputs():
        arrays |= {f"{name}/{key}": value for key, value in recorded(x).items()}
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {len(arrays)} arrays of torchao {torchao.__version__}")


if __name__ == "__main__":
    main()
