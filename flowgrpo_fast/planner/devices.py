"""What GPUs can do: dense peaks, and the rate a floor is computed at.

The floor of an H100 is 800 TFLOP/s for bf16 matrix products and 1400 for FP8: 81 % and 71 % of the dense peaks, what
the best library kernels reach on large shapes. Every other GPU is given the same shares of its own peaks.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowgrpo_fast.names import nearest

_TERA = 1e12
_REACHED_16 = 800 / 989.4  # of the dense bf16 peak
_REACHED_LOW = 1400 / 1978.9  # of the dense FP8 or FP4 peak


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU: dense peaks in TFLOP/s with fp32 accumulation, 0 where it has no such instruction."""

    name: str
    bf16: float
    fp8: float
    fp4: float
    memory: float  # bytes
    source: str

    def rate(self, number_format: str = "bf16") -> float:
        """Attainable FLOP/s in `bf16`, `fp8` or `fp4`; a format the GPU lacks runs at the next wider one's rate."""
        rates = {
            "bf16": self.bf16 * _REACHED_16,
            "fp8": self.fp8 * _REACHED_LOW,
            "fp4": self.fp4 * _REACHED_LOW,
        }
        wider = {"fp4": "fp8", "fp8": "bf16"}
        while not rates[number_format]:
            number_format = wider[number_format]
        return rates[number_format] * _TERA


GPUS = {
    "h100": Gpu("H100", 989.4, 1978.9, 0, 80e9, "NVIDIA H100 data sheet, SXM5, dense"),
    "h200": Gpu("H200", 989.4, 1978.9, 0, 141e9, "NVIDIA H200 data sheet, SXM5, dense"),
    "b200": Gpu("B200", 2250, 4500, 9000, 180e9, "NVIDIA HGX B200 data sheet, an eighth of 8 GPUs, dense"),
    "a100": Gpu("A100", 312, 0, 0, 80e9, "NVIDIA A100 data sheet, SXM4 80 GB, dense"),
    "4090": Gpu(
        "RTX 4090", 165.2, 330.3, 0, 24e9, "NVIDIA Ada architecture white paper, dense, fp32 accumulate"
    ),
}


def named_gpu(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        ValueError: not in the table; names the nearest.
    """
    key = name.lower().removeprefix("rtx").strip(" _-")
    if key not in GPUS:
        raise ValueError(f"unknown GPU {name!r}; {nearest(key, GPUS)}")
    return GPUS[key]


def recognised_gpu(device_name: str) -> Gpu | None:
    """The row of a device as CUDA names it, e.g. "NVIDIA H100 80GB HBM3"; None for one without a row."""
    words = device_name.lower().replace("-", " ").split()
    return next((gpu for key, gpu in GPUS.items() if key in words), None)
